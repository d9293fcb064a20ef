"""Random sets stand where the perturbed genes stand: everything promised is found again, naively."""

from __future__ import annotations

from collections import Counter
from math import ceil

import numpy as np
import pytest
from scipy import stats

from gfx._core import matched_sets
from gfx._core.encodings import Encodings
from gfx._core.matched_sets import NEAR_IN_DETECTION, NEAR_RANKS, NEAR_SHARE, draw_matched_sets
from gfx._core.vocabulary import SPECIALS, Vocabulary


def vocabulary(n_genes: int, *, with_cls: bool = True) -> Vocabulary:
    specials = list(SPECIALS if with_cls else SPECIALS[:2])
    return Vocabulary(
        name="test",
        ids=np.array(specials + [f"ENSG{n:011d}" for n in range(n_genes)], dtype=object),
        medians=np.array([np.nan] * len(specials) + [1.0] * n_genes),
        symbols=np.full(len(specials) + n_genes, "", dtype=object),
    )


def laid_out(vocab: Vocabulary, rankings: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Cells of these tokens, between `<cls>` and `<eos>` if there are such."""
    front, behind = ([vocab.cls], [vocab.eos]) if vocab.has_cls else ([], [])
    cells = [[*front, *ranking, *behind] if len(ranking) else [] for ranking in rankings]
    lengths = np.array([len(cell) for cell in cells], dtype=np.int32)
    ids = np.zeros((len(cells), lengths.max(initial=0)), dtype=np.uint16)
    for at, cell in enumerate(cells):
        ids[at, : len(cell)] = cell
    return ids, lengths


def noisy_rankings(vocab: Vocabulary, n_cells: int, *, noise: float, detected: float = 0.6, seed: int = 0):
    """Genes in about the same order in all cells, late ones detected less often."""
    rng = np.random.default_rng(seed)
    genes = np.flatnonzero(~vocab.is_special)
    share = np.linspace(1, 2 * detected - 1, len(genes)).clip(0.02, 0.98)
    rankings = []
    for _ in range(n_cells):
        there = genes[rng.random(len(genes)) < share]
        rankings.append(there[np.argsort(there + rng.normal(0, noise, len(there)))].tolist())
    return rankings


def draw(vocab, rankings, genes, cells=None, *, n_sets=40, cells_per_set=5, seed=0):
    tokens = Encodings.of(*laid_out(vocab, rankings))
    cells = np.arange(len(rankings)) if cells is None else np.array(cells, dtype=np.int64)
    size = {"n_sets": n_sets, "cells_per_set": cells_per_set}
    return draw_matched_sets(tokens, np.array(genes), cells, vocab, rng=np.random.default_rng(seed), **size)


def fits(ranking: list[int], genes: list[int], others: list[int]) -> bool:
    """Whether the others stand near the genes in this cell, or lack as they do."""
    near = max(NEAR_RANKS, ceil(NEAR_SHARE * len(ranking)))
    for gene, other in zip(genes, others, strict=True):
        if (gene in ranking) != (other in ranking):
            return False
        if gene in ranking and abs(ranking.index(gene) - ranking.index(other)) > near:
            return False
    return True


def check(drawn, vocab, rankings, genes, cells, *, n_sets, cells_per_set):
    """Every promise, set by set and cell by cell."""
    assert len(drawn) <= n_sets
    assert len({frozenset(others) for others in drawn}) == len(drawn)
    for others, in_cells in drawn.items():
        assert len(set(others)) == len(others) == len(genes)
        assert not set(others) & set(genes)
        assert not vocab.is_special[list(others)].any()
        assert (np.diff(in_cells) > 0).all()
        # Cells that have, and lack, the same of the genes as the one that the set was drawn from.
        pattern = {frozenset(set(genes) & set(rankings[cell])) for cell in in_cells}
        assert len(pattern) == 1
        alike = [cell for cell in cells if set(genes) & set(rankings[cell]) in pattern]
        fitting = [cell for cell in alike if fits(rankings[cell], genes, others)]
        assert set(in_cells) <= set(fitting)
        assert len(in_cells) == min(cells_per_set, len(fitting))


@pytest.mark.parametrize("with_cls", [True, False])
@pytest.mark.parametrize("n_genes", [1, 2, 3])
def test_sets_have_the_ranks_of_the_genes(with_cls, n_genes):
    vocab = vocabulary(150, with_cls=with_cls)
    rankings = noisy_rankings(vocab, 50, noise=8)
    genes = np.random.default_rng(1).choice(np.flatnonzero(~vocab.is_special), n_genes, replace=False).tolist()
    cells = [cell for cell, ranking in enumerate(rankings) if set(genes) <= set(ranking)]
    assert 4 < len(cells) < 50
    drawn = draw(vocab, rankings, genes, cells)
    assert len(drawn) > 15
    assert max(map(len, drawn.values())) > 1  # some are followed through several cells
    check(drawn, vocab, rankings, genes, cells, n_sets=40, cells_per_set=5)


def test_sets_of_two_neighbours():
    """There are few pairs beside them: each counts once, in whatever order it is drawn."""
    vocab = vocabulary(10)
    ranking = np.flatnonzero(~vocab.is_special).tolist()
    drawn = draw(vocab, [ranking], ranking[4:6], n_sets=100)
    check(drawn, vocab, [ranking], ranking[4:6], [0], n_sets=100, cells_per_set=5)
    assert len(drawn) == 8 * 7 / 2  # every pair of the eight others


def test_long_cells_have_wider_neighbourhoods():
    vocab = vocabulary(1200)
    rankings = [np.random.default_rng(seed).permutation(np.arange(4, 1204)).tolist() for seed in range(3)]
    rankings[0] = rankings[0][:200]  # a short one, where ten ranks are the limit
    gene = rankings[0][100]
    drawn = draw(vocab, rankings, [gene], n_sets=1000)
    check(drawn, vocab, rankings, [gene], range(3), n_sets=1000, cells_per_set=5)
    apart = {cell: [] for cell in range(3)}
    for (other,), in_cells in drawn.items():
        for cell in in_cells:
            apart[cell].append(abs(rankings[cell].index(other) - rankings[cell].index(gene)))
    # 2.5 % of 1,200 genes, and of 200 genes ten ranks: all that is near is found in the end.
    assert [max(found) for found in apart.values()] == [10, 30, 30]


@pytest.mark.parametrize("place", [0, -1])
def test_genes_at_the_ends_of_cells(place):
    vocab = vocabulary(60)
    rankings = noisy_rankings(vocab, 10, noise=3, detected=1)
    gene = rankings[0][place]
    cells = [cell for cell, ranking in enumerate(rankings) if gene in ranking]
    drawn = draw(vocab, rankings, [gene], cells)
    check(drawn, vocab, rankings, [gene], cells, n_sets=40, cells_per_set=5)
    assert len(drawn) >= 10


def test_absent_genes_are_matched_by_absent_ones_detected_as_often():
    vocab = vocabulary(500)
    rankings = noisy_rankings(vocab, 60, noise=8, detected=0.5)
    detected = Counter(gene for ranking in rankings for gene in ranking)
    genes = [gene for gene, n in detected.items() if n == 30][:2]
    cells = [cell for cell, ranking in enumerate(rankings) if not set(genes) & set(ranking)]
    assert len(cells) > 10
    drawn = draw(vocab, rankings, genes, cells, n_sets=200)
    check(drawn, vocab, rankings, genes, cells, n_sets=200, cells_per_set=5)
    assert len(drawn) == 200
    detected_there = Counter(gene for cell in cells for gene in rankings[cell])
    in_order = sorted(detected_there.values())
    for others in drawn:
        for gene, other in zip(genes, others, strict=True):
            low, high = sorted([detected_there[gene], detected_there[other]])
            # Genes detected more often than the one and more rarely than the other.
            n_between = np.searchsorted(in_order, high) - np.searchsorted(in_order, low, side="right")
            assert n_between <= NEAR_IN_DETECTION / 2


def test_a_gene_is_matched_in_cells_that_have_it_and_in_cells_that_lack_it():
    vocab = vocabulary(150)
    rankings = noisy_rankings(vocab, 60, noise=4)
    gene = 80
    has = {cell for cell, ranking in enumerate(rankings) if gene in ranking}
    assert 10 < len(has) < 50
    drawn = draw(vocab, rankings, [gene], cells_per_set=100)
    check(drawn, vocab, rankings, [gene], range(60), n_sets=40, cells_per_set=100)
    kinds = {(bool(set(in_cells) & has), bool(set(in_cells) - has)) for in_cells in drawn.values()}
    assert kinds == {(True, False), (False, True)}  # a set is matched by rank or by absence, not now so and now so


def test_a_gene_that_no_cell_has_is_matched_by_rare_ones():
    vocab = vocabulary(300)
    rankings = [[gene for gene in ranking if gene != 20] for ranking in noisy_rankings(vocab, 40, noise=8)]
    drawn = draw(vocab, rankings, [20])
    check(drawn, vocab, rankings, [20], range(40), n_sets=40, cells_per_set=5)
    detected = Counter(gene for ranking in rankings for gene in ranking)
    assert len(drawn) == 40
    rarest = sorted(detected.values())[NEAR_IN_DETECTION // 2]
    assert max(detected[other] for (other,) in drawn) <= rarest


@pytest.mark.parametrize("cells_per_set", [1, 3, 100])
@pytest.mark.parametrize("n_sets", [1, 7])
def test_no_more_than_asked_for(n_sets, cells_per_set):
    vocab = vocabulary(150)
    rankings = noisy_rankings(vocab, 30, noise=4)
    cells = [cell for cell, ranking in enumerate(rankings) if 10 in ranking]
    drawn = draw(vocab, rankings, [10], cells, n_sets=n_sets, cells_per_set=cells_per_set)
    assert len(drawn) == n_sets
    check(drawn, vocab, rankings, [10], cells, n_sets=n_sets, cells_per_set=cells_per_set)


def test_only_some_of_very_many_cells_are_looked_at(monkeypatch):
    monkeypatch.setattr(matched_sets, "MOST_CELLS", 6)
    vocab = vocabulary(150)
    rankings = noisy_rankings(vocab, 50, noise=4)
    cells = [cell for cell, ranking in enumerate(rankings) if 10 in ranking]
    assert len(cells) > 20
    drawn = draw(vocab, rankings, [10], cells, cells_per_set=100)
    looked_at = np.unique(np.concatenate([*drawn.values()])).tolist()
    assert len(looked_at) == 6
    assert set(looked_at) <= set(cells)
    check(drawn, vocab, rankings, [10], looked_at, n_sets=40, cells_per_set=100)


def test_the_same_random_numbers_give_the_same_sets():
    vocab = vocabulary(150)
    rankings = noisy_rankings(vocab, 30, noise=4)
    one, same, other = (draw(vocab, rankings, [10, 30], seed=seed) for seed in (3, 3, 4))
    assert list(one) == list(same) != list(other)
    for others, in_cells in one.items():
        np.testing.assert_array_equal(in_cells, same[others])


def test_genes_in_another_order_have_the_same_sets():
    vocab = vocabulary(150)
    rankings = noisy_rankings(vocab, 30, noise=4)
    genes = [30, 10, 50]
    one, other = draw(vocab, rankings, genes), draw(vocab, rankings, genes[::-1])
    check(one, vocab, rankings, genes, range(30), n_sets=40, cells_per_set=5)
    assert [others[::-1] for others in one] == list(other)
    for others, in_cells in one.items():
        np.testing.assert_array_equal(in_cells, other[others[::-1]])


def test_few_cells_and_few_genes_give_few_sets():
    vocab = vocabulary(20)
    a, b, c, d = 4, 5, 6, 7
    rankings = {"cells": [[a, b]], "alone": [[a], [a]], "pair": [[a, b, c], [b, a]]}
    genes = {"cells": [a], "alone": [a], "pair": [a, b]}
    cells = {"cells": [], "alone": [0, 1], "pair": [0, 1]}
    for name, of_cells in rankings.items():
        assert draw(vocab, of_cells, genes[name], cells[name]) == {}, name
    drawn = draw(vocab, [[a, b], [c, a, d], []], [a], [0, 1])
    assert {others: in_cells.tolist() for others, in_cells in drawn.items()} == {(b,): [0], (c,): [1], (d,): [1]}


def test_genes_that_fit_many_cells_are_drawn_more_often():
    """Neighbourhoods of 20 others, in each of four cells; a gene is drawn as often as it is in one of them."""
    vocab = vocabulary(60)
    genes = np.flatnonzero(~vocab.is_special).tolist()
    gene, everywhere, in_two, others = genes[0], genes[1:6], genes[6:12], genes[12:]
    rankings = []
    for cell in range(4):
        alone = others[cell * 12 : (cell + 1) * 12]  # 9 or 15 of these are needed
        beside = [*everywhere, *(in_two if cell < 2 else []), *alone]
        beside = [*beside, *in_two[: 20 - len(beside)]] if cell >= 2 else beside[:20]
        rankings.append([*beside[:10], gene, *beside[10:]])
        assert len(rankings[-1]) == 21
    covers = Counter(other for ranking in rankings for other in ranking if other != gene)
    assert set(covers.values()) == {1, 2, 4}
    rng = np.random.default_rng(0)
    ids, lengths = laid_out(vocab, rankings)
    n_draws, one = 3000, {"n_sets": 1, "cells_per_set": 1, "rng": rng}
    drawn = Counter()
    for _ in range(n_draws):
        ((other,),) = draw_matched_sets(Encodings.of(ids, lengths), np.array([gene]), np.arange(4), vocab, **one)
        drawn[other] += 1
    found = np.array([drawn[other] for other in covers])
    expected = np.array([n / 80 for n in covers.values()]) * n_draws
    assert stats.chisquare(found, expected).pvalue > 0.001
    assert stats.chisquare(found).pvalue < 1e-9  # and not all alike
