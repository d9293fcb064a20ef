"""Edits of cells against Python lists, one cell at a time."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gfx._core.edits import (
    GONE,
    NO_GENE,
    Edits,
    can_be_perturbed,
    find_places,
    pad_sets,
    quartile_ranks,
    ranks_of,
    single_deletions,
)
from gfx._core.vocabulary import SPECIALS, Vocabulary
from gfx._engine.edited import edit_cells, find_positions, place_edits

N_GENES = 12
OPERATORS = ["delete", "overexpress", "shift"]


def vocabulary(*, with_cls: bool) -> Vocabulary:
    specials = list(SPECIALS if with_cls else SPECIALS[:2])
    return Vocabulary(
        name="test",
        ids=np.array(specials + [f"ENSG{n:011d}" for n in range(N_GENES)], dtype=object),
        medians=np.array([np.nan] * len(specials) + [1.0] * N_GENES),
        symbols=np.full(len(specials) + N_GENES, "", dtype=object),
    )


VOCABULARIES = {with_cls: vocabulary(with_cls=with_cls) for with_cls in (True, False)}


def cell(vocab: Vocabulary, ranking: list[int]) -> list[int]:
    """Genes 0, 1, 2 ... as tokens, between `<cls>` and `<eos>` if there are such."""
    tokens = [token + len(vocab) - N_GENES for token in ranking]
    return [vocab.cls, *tokens, vocab.eos] if vocab.has_cls else tokens


def laid_out(vocab: Vocabulary, cells: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(row) for row in cells])
    rows = np.full((len(cells), lengths.max(initial=0)), vocab.pad, dtype=np.uint16)
    for at, row in enumerate(cells):
        rows[at, : len(row)] = row
    return rows, lengths


def edit_rows(rows, lengths, genes, vocab, operator, *, max_length, to=None):
    """One edit in each cell, as arrays: `tokens`, `lengths`, `source`, `kept`, `cut`."""
    tokens, is_special = torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(vocab.is_special)
    row = np.arange(len(rows))
    placed = place_edits(
        Edits(operator, genes, row, row, to),
        row,
        row,
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        table=find_positions(tokens, is_special),
        most=max_length,
    )
    edited = edit_cells(tokens, placed, vocab, is_special=is_special, most=max_length)
    arrays = {name: getattr(edited, name).numpy() for name in ("tokens", "source", "kept")}
    cut = np.zeros(rows.shape, dtype=bool) if edited.cut is None else edited.cut.numpy()
    return SimpleNamespace(**arrays, lengths=placed.new_lengths.numpy(), cut=cut)


def naive_edit(row, genes, vocab, operator, *, max_length, to=None):
    """The edited cell, where its tokens stood, the positions they hold, and the genes cut off both cells."""
    ranking = [token for token in row if not vocab.is_special[token]]
    others = [token for token in ranking if token not in genes]
    if operator == "delete":
        new = others
    elif operator == "overexpress":
        new = [*genes, *others]
    else:
        goes = {gene: min(rank, len(others)) for gene, rank in zip(genes, to, strict=True) if rank != GONE}
        new = []
        for rank in range(len(others) + 1):
            new += [gene for gene in ranking if goes.get(gene) == rank]
            new += others[rank : rank + 1]
    n_cut = max(0, len(new) + vocab.n_specials - max_length)
    cut = others[len(others) - n_cut :]
    front, behind = ([vocab.cls], [vocab.eos]) if vocab.has_cls else ([], [])
    edited = [*front, *(token for token in new if token not in cut), *behind]
    compared = [token for token in row if token not in cut]
    return {
        "tokens": edited,
        "source": [-1 if token in genes else row.index(token) for token in edited],
        "kept": [at if token in genes else compared.index(token) for at, token in enumerate(edited)],
        "cut": [row.index(token) for token in cut],
    }


def check(edited, expected, vocab, width):
    assert edited.lengths.tolist() == [len(one["tokens"]) for one in expected]
    longest = max((len(one["tokens"]) for one in expected), default=0)
    fillers = {"tokens": vocab.pad, "source": -1, "kept": 0}
    for name, filler in fillers.items():
        padded = [one[name] + [filler] * (longest - len(one[name])) for one in expected]
        assert getattr(edited, name).tolist() == padded, name
        assert getattr(edited, name).dtype == np.int64
    assert edited.cut.tolist() == [[at in one["cut"] for at in range(width)] for one in expected]


@st.composite
def edits_of_cells(draw, *, operators=OPERATORS, full=(False, True)):
    """Cells of 3 to 9 genes, a set of 1 to 3 genes and new ranks for each, and how long the model's input is."""
    vocab, operator = VOCABULARIES[draw(st.booleans())], draw(st.sampled_from(operators))
    gene = st.integers(0, N_GENES - 1)
    rankings = draw(st.lists(st.lists(gene, min_size=3, max_size=9, unique=True), min_size=1, max_size=5))
    sets = [draw(st.lists(gene, min_size=1, max_size=3, unique=True)) for _ in rankings]
    rows, lengths = laid_out(vocab, [cell(vocab, ranking) for ranking in rankings])
    genes = pad_sets([np.array(one) + len(vocab) - N_GENES for one in sets])
    to = np.array([[draw(st.integers(GONE, 10)) for _ in row] for row in genes])
    # A model whose input the longest cell fills; in no cell are all genes cut.
    max_length = int(lengths.max()) + (0 if draw(st.sampled_from(full)) else 4)
    max_length = max(max_length, vocab.n_specials + 4)
    return vocab, operator, rows, lengths, genes, to, max_length


def members(genes: np.ndarray) -> list[int]:
    return [gene for gene in genes.tolist() if gene != NO_GENE]


@given(edits_of_cells())
def test_edits_are_those_of_lists(case):
    vocab, operator, rows, lengths, genes, to, max_length = case
    before = rows.copy()
    edited = edit_rows(rows, lengths, genes, vocab, operator, max_length=max_length, to=to)
    expected = [
        naive_edit(row[:n].tolist(), some, vocab, operator, max_length=max_length, to=new[: len(some)].tolist())
        for row, n, some, new in zip(rows, lengths, map(members, genes), to, strict=True)
    ]
    check(edited, expected, vocab, rows.shape[1])
    np.testing.assert_array_equal(rows, before)


@given(edits_of_cells())
def test_what_an_edited_cell_holds(case):
    vocab, operator, rows, lengths, genes, to, max_length = case
    edited = edit_rows(rows, lengths, genes, vocab, operator, max_length=max_length, to=to)
    assert edited.lengths.max() <= max_length
    for at, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        old, new, cut = row[:n].tolist(), edited.tokens[at, : edited.lengths[at]].tolist(), row[edited.cut[at]].tolist()
        some = members(genes[at])
        goes = [gene for gene, rank in zip(some, to[at], strict=False) if gene in old and rank != GONE]
        inside = {"delete": [], "overexpress": some, "shift": goes}[operator]
        assert sorted(new) == sorted([*(token for token in old if token not in [*some, *cut]), *inside])
        others = [token for token in new if token not in some]
        assert others == [token for token in old if token not in [*some, *cut]]  # in their old order
        if vocab.has_cls:
            assert (new[0], new[-1]) == (vocab.cls, vocab.eos)


@given(edits_of_cells())
def test_an_edit_done_twice_is_done_once(case):
    vocab, operator, rows, lengths, genes, to, max_length = case
    once = edit_rows(rows, lengths, genes, vocab, operator, max_length=max_length, to=to)
    twice = edit_rows(once.tokens, once.lengths, genes, vocab, operator, max_length=max_length, to=to)
    np.testing.assert_array_equal(twice.tokens, once.tokens)
    assert not twice.cut.any()


@given(edits_of_cells(full=[False]))
def test_genes_that_were_moved_and_then_taken_out_are_taken_out(case):
    vocab, operator, rows, lengths, genes, to, max_length = case
    moved = edit_rows(rows, lengths, genes, vocab, operator, max_length=max_length, to=to)
    after = edit_rows(moved.tokens, moved.lengths, genes, vocab, "delete", max_length=max_length)
    at_once = edit_rows(rows, lengths, genes, vocab, "delete", max_length=max_length)
    np.testing.assert_array_equal(after.lengths, at_once.lengths)
    np.testing.assert_array_equal(after.tokens, at_once.tokens)


@given(edits_of_cells(operators=["shift"]))
def test_genes_moved_to_where_they_stand_stay(case):
    vocab, _, rows, lengths, genes, _, max_length = case
    stands = np.zeros(genes.shape, dtype=np.int64)
    for at, (row, some) in enumerate(zip(rows, genes, strict=True)):
        for place, gene in enumerate(some):
            others = [token for token in row.tolist() if not vocab.is_special[token] and token not in some]
            before = row.tolist()[: row.tolist().index(gene)] if gene in row else []
            stands[at, place] = sum(token in others for token in before)
    edited = edit_rows(rows, lengths, genes, vocab, "shift", max_length=max_length, to=stands)
    np.testing.assert_array_equal(edited.tokens, rows)
    np.testing.assert_array_equal(edited.lengths, lengths)


@given(edits_of_cells(operators=["shift"]))
def test_genes_moved_beyond_what_is_read_are_taken_out(case):
    vocab, _, rows, lengths, genes, _, max_length = case
    gone = np.full(genes.shape, GONE)
    moved = edit_rows(rows, lengths, genes, vocab, "shift", max_length=max_length, to=gone)
    deleted = edit_rows(rows, lengths, genes, vocab, "delete", max_length=max_length)
    for field in ("tokens", "lengths", "source", "kept", "cut"):
        np.testing.assert_array_equal(getattr(moved, field), getattr(deleted, field))


@given(edits_of_cells(), st.integers(1, 5))
def test_padding_does_not_matter(case, n_more):
    vocab, operator, rows, lengths, genes, to, max_length = case
    wide = np.pad(rows, ((0, 0), (0, n_more)), constant_values=vocab.pad)
    more_genes = np.pad(genes, ((0, 0), (0, n_more)), constant_values=NO_GENE)
    more_to = np.pad(to, ((0, 0), (0, n_more)), constant_values=GONE)
    narrow = edit_rows(rows, lengths, genes, vocab, operator, max_length=max_length, to=to)
    padded = edit_rows(wide, lengths, more_genes, vocab, operator, max_length=max_length, to=more_to)
    np.testing.assert_array_equal(padded.lengths, narrow.lengths)
    assert not padded.cut[:, rows.shape[1] :].any()
    np.testing.assert_array_equal(padded.cut[:, : rows.shape[1]], narrow.cut)
    for field in ("tokens", "source", "kept"):
        np.testing.assert_array_equal(getattr(padded, field), getattr(narrow, field))


@pytest.mark.parametrize("with_cls", [True, False])
def test_a_full_cell_loses_its_last_genes_there_as_here(with_cls):
    """Three genes to the front, one of them from the very end: two are new, so the last two others are cut."""
    vocab = VOCABULARIES[with_cls]
    rows, lengths = laid_out(vocab, [cell(vocab, [0, 1, 2, 3, 4, 5])])
    first = len(vocab) - N_GENES
    genes = np.array([[10, 5, 11]]) + first
    edited = edit_rows(rows, lengths, genes, vocab, "overexpress", max_length=rows.shape[1])
    assert edited.tokens.tolist() == [cell(vocab, [10, 5, 11, 0, 1, 2])]
    assert (rows[edited.cut] - first).tolist() == [3, 4]
    o = vocab.first_gene
    eos_moves_up = [6 + o - 2] * with_cls
    assert edited.kept.tolist() == [[*range(o), o, o + 1, o + 2, o, o + 1, o + 2, *eos_moves_up]]


def test_genes_that_meet_keep_their_order():
    vocab = VOCABULARIES[True]
    rows, lengths = laid_out(vocab, [cell(vocab, [0, 1, 2, 3, 4, 5])])
    genes = np.array([[5, 1, 3]]) + len(vocab) - N_GENES  # named in another order than they stand in
    for rank, expected in {0: [1, 3, 5, 0, 2, 4], 2: [0, 2, 1, 3, 5, 4], 9: [0, 2, 4, 1, 3, 5]}.items():
        to = np.full((1, 3), rank)
        edited = edit_rows(rows, lengths, genes, vocab, "shift", max_length=99, to=to)
        assert edited.tokens.tolist() == [cell(vocab, expected)]


def test_brought_to_the_front_in_the_order_given():
    vocab = VOCABULARIES[False]
    rows, lengths = laid_out(vocab, [cell(vocab, [0, 1, 2])] * 2)
    genes = np.array([[9, 2, 1], [1, 2, 9]]) + len(vocab) - N_GENES
    edited = edit_rows(rows, lengths, genes, vocab, "overexpress", max_length=99)
    assert edited.tokens.tolist() == [cell(vocab, [9, 2, 1, 0]), cell(vocab, [1, 2, 9, 0])]


def test_no_cells():
    vocab = VOCABULARIES[True]
    nothing = np.zeros((0, 5), dtype=np.uint16), np.zeros(0, dtype=np.int64), np.zeros((0, 2), dtype=np.int64)
    for operator in OPERATORS:
        edited = edit_rows(*nothing, vocab, operator, max_length=9, to=nothing[2])
        assert edited.tokens.shape == (0, 0)
        assert edited.cut.shape == (0, 5)


# --- where genes stand ---------------------------------------------------------------------------------------------


def test_sets_of_all_sizes_in_one_array():
    padded = pad_sets([np.array([7, 5]), np.array([], dtype=int), np.array([9, 8, 4])])
    assert padded.tolist() == [[7, 5, NO_GENE], [NO_GENE] * 3, [9, 8, 4]]
    assert padded.dtype == np.int64
    assert pad_sets([]).shape == (0, 0)


@given(edits_of_cells())
def test_places(case):
    _, _, rows, _, genes, _, _ = case
    found = find_places(rows, genes)
    for row, some, places in zip(rows.tolist(), genes.tolist(), found.tolist(), strict=True):
        assert places == [row.index(gene) if gene in row else -1 for gene in some]
    np.testing.assert_array_equal(find_places(rows, genes[0]), find_places(rows, np.tile(genes[0], (len(rows), 1))))


@given(edits_of_cells())
def test_mean_rank_of_the_genes_that_a_cell_has(case):
    vocab, _, rows, lengths, genes, _, _ = case
    found = ranks_of(find_places(rows, genes), lengths, vocab)
    for row, some, rank in zip(rows.tolist(), genes.tolist(), found.tolist(), strict=True):
        ranking = [token for token in row if not vocab.is_special[token]]
        ranks = [ranking.index(gene) / (len(ranking) - 1) for gene in some if gene in ranking]
        assert rank == pytest.approx(np.mean(ranks) if ranks else np.nan, nan_ok=True)


def test_cells_without_tokens_have_no_places():
    places = find_places(np.zeros((3, 0), dtype=np.uint16), np.array([7, 8]))
    assert places.tolist() == [[-1, -1]] * 3


def test_rank_of_the_only_gene():
    vocab = VOCABULARIES[True]
    rows, lengths = laid_out(vocab, [cell(vocab, [3])])
    assert ranks_of(find_places(rows, rows[:, 1:2]), lengths, vocab).tolist() == [0]


@given(edits_of_cells(), st.integers(0, 2**32 - 1))
def test_genes_at_places_are_deleted_one_at_a_time(case, seed):
    vocab, _, rows, _, _, _, _ = case
    places = ~vocab.is_special[rows] & np.random.default_rng(seed).integers(0, 2, rows.shape, dtype=bool)
    edits = single_deletions(rows, places)
    expected = [(cell, rows[cell, place]) for cell, place in np.argwhere(places)]
    assert edits.operator == "delete"
    assert list(zip(edits.cell.tolist(), edits.sets[edits.which, 0].tolist(), strict=True)) == expected


@given(edits_of_cells(), st.lists(st.integers(0, N_GENES - 1), max_size=2, unique=True))
def test_where_genes_can_be_perturbed(case, few):
    vocab, operator, rows, lengths, genes, _, _ = case
    short = cell(vocab, few) if few else []  # a cell of very few genes, or without tokens
    rows, lengths = laid_out(vocab, [*(row[:n].tolist() for row, n in zip(rows, lengths, strict=True)), short])
    some = np.array(members(genes[0]))
    expected = []
    for row, n in zip(rows.tolist(), lengths, strict=True):
        ranking = {token for token in row[:n] if not vocab.is_special[token]}
        present = set(some.tolist()) <= ranking
        expected.append((present or operator == "overexpress") and bool(ranking - set(some.tolist())))
    assert can_be_perturbed(find_places(rows, some), lengths, vocab, operator).tolist() == expected


# --- quartiles -----------------------------------------------------------------------------------------------------


def naive_quartile_rank(rank: int, n: int, quartiles: int) -> int:
    quartile = next(k for k in range(4) if Fraction(k * n, 4) <= rank < Fraction((k + 1) * n, 4))
    new = quartile - quartiles
    if new < 0:
        wanted = 0
    elif new > 3:
        wanted = n - 1
    else:
        wanted = int((Fraction(new * n, 4) + Fraction((new + 1) * n, 4)) / 2)
    stays = wanted > rank if quartiles > 0 else wanted < rank
    return rank if stays else wanted


@given(st.booleans(), st.integers(1, 300), st.sampled_from([-4, -3, -2, -1, 1, 2, 3, 4]), st.data())
def test_quartiles(with_cls, n, quartiles, data):
    vocab = VOCABULARIES[with_cls]
    rank = data.draw(st.integers(0, n - 1))
    places, lengths = np.array([[vocab.first_gene + rank]]), np.array([n + vocab.n_specials])
    assert quartile_ranks(places, lengths, quartiles, vocab).tolist() == [[naive_quartile_rank(rank, n, quartiles)]]


def test_quartiles_of_many_cells_at_once():
    vocab = VOCABULARIES[True]
    ranks, n = np.array([[0, 30, 99], [0, 10, 39]]), np.array([100, 40])
    found = quartile_ranks(ranks + 1, n + 2, -1, vocab)
    # Middles of the second and the third quartile, and the very end; the genes that move are not counted there.
    assert (found + np.arange(3)).tolist() == [[37, 62, 99], [15, 25, 39]]


@pytest.mark.parametrize("quartiles", [-1, 1, 2])
def test_genes_that_move_together_land_where_each_would(quartiles):
    """Unless they meet: then they keep their order."""
    vocab = VOCABULARIES[True]
    row, n = np.flatnonzero(~vocab.is_special)[:12], np.array([14])
    cell = np.array([[vocab.cls, *row, vocab.eos]])
    for ranks in ([1, 4, 10], [10, 1, 4], [0, 1, 2]):
        places = np.array([ranks]) + 1
        genes = np.array([row[ranks]])
        to = quartile_ranks(places, n, quartiles, vocab)
        edited = edit_rows(cell, n, genes, vocab, "shift", max_length=50, to=to).tokens[0].tolist()
        found = {gene: edited.index(gene) - 1 for gene in genes[0]}
        wanted = {row[rank]: naive_quartile_rank(rank, 12, quartiles) for rank in ranks}
        by_rank = sorted(found)
        assert sorted(found.values()) == [found[gene] for gene in by_rank]
        if len(set(wanted.values())) == len(ranks):
            assert found == wanted
