"""Edits against Python lists, one cell and one edit at a time; screens are edits of every gene by itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gfx import settings
from gfx._core.edits import GONE, PARTS, Edits, pad_sets, single_deletions
from gfx._core.screening import wanted_places
from gfx._engine.blocks import WithoutKey
from gfx._engine.encoder import random_encoder
from gfx._engine.perturb import run_edits

LAYERS = [-1, -2, 0]
POSITIONS = ["close", "keep"]
OPERATORS = ["delete", "overexpress", "shift"]
FIELDS = ("shift", "parts", "toward", "toward_parts", "rank", "vectors", "genes")
TOLERANCE = 1e-5


# --- reference -----------------------------------------------------------------------------------------------------


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def edited_cell(toy, cell, genes, operator, to):
    """The cell that is compared, and the edited one; where this grows beyond the model's input, both lose their end."""
    vocabulary, max_length = toy.vocabulary, toy.model.max_length
    ranking = [token for token in cell if toy.is_gene(token)]
    others = [token for token in ranking if token not in genes]
    if operator == "delete":
        new = others
    elif operator == "overexpress":
        new = [*genes, *others]
    else:
        goes = dict(zip(genes, to, strict=True))
        new = []
        for rank in range(len(others) + 1):
            new += [gene for gene in ranking if gene in goes and min(goes[gene], len(others)) == rank]
            new += others[rank : rank + 1]
    n_cut = max(0, len(new) + vocabulary.n_specials - max_length)
    cut = others[len(others) - n_cut :]
    front, behind = ([vocabulary.cls], [vocabulary.eos]) if vocabulary.has_cls else ([], [])
    return [token for token in cell if token not in cut], [*front, *(t for t in new if t not in cut), *behind]


@dataclass
class Effect:
    shift: float
    parts: list[float]
    toward: list[float]
    toward_parts: list[list[float]]
    rank: float
    vectors: np.ndarray
    genes: dict[int, float]


def naive_effect(toy, cell, genes, *, operator, to, layer, how, positions, goals):
    ranking = [token for token in cell if toy.is_gene(token)]
    ranks = [ranking.index(gene) / max(len(ranking) - 1, 1) for gene in genes if gene in ranking]
    cell, edited = edited_cell(toy, cell, genes, operator, to)
    own_positions = [place if token in genes else cell.index(token) for place, token in enumerate(edited)]
    before = dict(zip(cell, toy.reference.states(cell, layer), strict=True))
    held = dict(zip(edited, toy.reference.states(edited, layer, own_positions), strict=True))
    after = held if positions == "keep" else dict(zip(edited, toy.reference.states(edited, layer), strict=True))
    others = [token for token in edited if toy.is_gene(token) and token not in genes]

    def vector(states):
        if how == "cls":
            return states[toy.vocabulary.cls]
        return np.mean([state for token, state in states.items() if toy.is_gene(token)], axis=0)

    # Own vectors of the perturbed genes alone; then what the network makes of it; then the places of the others.
    own = before if how == "cls" else {token: before[token] if token in others else held[token] for token in edited}
    way = [vector(states) for states in (before, own, held, after)]

    def moved(states):
        return {token: 1 - cosine(states[token], before[token]) for token in others}

    if how == "genes":
        stations = [0, np.mean(list(moved(held).values())), np.mean(list(moved(after).values()))]
    else:
        stations = [1 - cosine(way[0], later) for later in way[1:]]

    def parts(own, held, total):
        return [own, total - held, held - own]

    toward = [[cosine(later, goal) - cosine(way[0], goal) for later in way[1:]] for goal in goals]
    return Effect(
        shift=stations[-1],
        parts=parts(*stations),
        toward=[stations[-1] for stations in toward],
        toward_parts=[parts(*stations) for stations in toward],
        rank=np.mean(ranks) if ranks else np.nan,
        vectors=np.stack([way[0], way[-1]]),
        genes=moved(after),
    )


# --- cells and edits -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(toy):
    """Cells that fill the model's input or nearly so, of the first genes in random order, and a few short ones."""
    vocabulary, rng = toy.vocabulary, np.random.default_rng(3)
    genes = np.flatnonzero(~vocabulary.is_special)
    front, behind = ([vocabulary.cls], [vocabulary.eos]) if vocabulary.has_cls else ([], [])
    most = toy.model.max_length - vocabulary.n_specials
    cells = [[*front, *rng.choice(genes[:80], n, replace=False), *behind] for n in (most, most - 1, most, most - 2, 9)]
    ids = np.zeros((len(cells), toy.model.max_length), dtype=np.uint16)
    for row, cell in zip(ids, cells, strict=True):
        row[: len(cell)] = cell
    return dataclasses.replace(toy, ids=ids, lengths=np.array([len(cell) for cell in cells], dtype=np.int32))


def perturbations(toy):
    """Frequent genes alone, two and three at once, one far behind, one that no cell has, all genes of a short cell."""
    genes = np.flatnonzero(~toy.vocabulary.is_special)
    first, second, third = genes[:3].tolist()
    short = [token for cell in toy.cells() if 0 < len(cell) <= 4 for token in cell if toy.is_gene(token)]
    absent = np.setdiff1d(genes, np.unique(toy.ids))[0]
    last = toy.cells()[1][-1 - toy.vocabulary.first_gene]
    sets = [[first], [second], [first, second], [second, third, first], [int(last)], [int(absent)], short[-2:]]
    return [np.array(some) for some in sets if some]


def make_edits(toy, operator, sets=None, *, seed=0):
    """Each set in each cell where this can be done, in random order."""
    rng = np.random.default_rng(seed)
    sets = perturbations(toy) if sets is None else [np.array(some) for some in sets]
    pairs = []
    for row, cell in enumerate(toy.cells()):
        for which, genes in enumerate(sets):
            there = set(genes.tolist()) <= set(cell) or operator == "overexpress"
            if there and any(toy.is_gene(token) and token not in genes for token in cell):
                pairs.append((row, which))
    pairs = rng.permutation(pairs)
    to = rng.integers(GONE, 70, (len(pairs), pad_sets(sets).shape[1]))
    to[::3] = np.minimum(to[::3], 3)
    return Edits(operator, sets, pairs[:, 0], pairs[:, 1], to if operator == "shift" else None)


def some_of(edits, some):
    return dataclasses.replace(
        edits, cell=edits.cell[some], which=edits.which[some], to=None if edits.to is None else edits.to[some]
    )


def hows(toy):
    return [*toy.poolings, "genes"]


def goals_of(toy, *shape):
    return np.random.default_rng(0).normal(size=(*shape, toy.model.hidden_size))


def dense(found, vocabulary, n_groups):
    """Results by attribute, and sums over genes as `genes`, `(3, n_tokens, n_groups)`."""
    genes = np.zeros((3, len(vocabulary), n_groups))
    if "gene_sums" in found:
        genes[:, found["gene_token"], found["gene_group"]] = found["gene_sums"]
    return SimpleNamespace(**found, genes=genes)


def run(toy, edits, *, layer=-2, how="mean", encoder=None, n_groups=None, **kwargs):
    """All that can be asked for; genes are summed by the set of the edit."""
    wanted = {"gene_groups": edits.which, "keep_vectors": True, "split": True}
    wanted |= {"goals": goals_of(toy, 2), "positions": "close"}
    encoder = toy.encoder(layer) if encoder is None else encoder
    found = run_edits(encoder, toy.ids, toy.lengths, toy.vocabulary, edits, how=how, **(wanted | kwargs))
    return dense(found, toy.vocabulary, len(edits.sets) if n_groups is None else n_groups)


def check(toy, edits, found, *, layer, how, positions="close", goals, atol=TOLERANCE, fields=FIELDS):
    """Compare everything, edit by edit; genes as sums by the set of the edit."""
    genes = np.zeros((3, len(toy.vocabulary), len(edits.sets)))
    cells = toy.cells()
    for at, (cell, which) in enumerate(zip(edits.cell, edits.which, strict=True)):
        to = None if edits.to is None else edits.to[at][: len(edits.sets[which])].tolist()
        expected = naive_effect(
            toy,
            cells[cell],
            edits.sets[which].tolist(),
            operator=edits.operator,
            to=to,
            layer=layer,
            how=how,
            positions=positions,
            goals=goals if goals.ndim == 2 else goals[which],
        )
        for field in set(fields) - {"rank", "genes"}:
            np.testing.assert_allclose(
                getattr(found, field)[at], getattr(expected, field), rtol=0, atol=atol, err_msg=field
            )
        assert found.rank[at] == pytest.approx(expected.rank, abs=1e-6, nan_ok=True)
        for token, value in expected.genes.items():
            genes[:, token, which] += [value, value**2, 1]
    if "genes" in fields:
        n = np.maximum(genes[2], 1)
        np.testing.assert_array_equal(found.genes[2], genes[2])
        np.testing.assert_allclose(found.genes[:2] / n, genes[:2] / n, rtol=0, atol=atol)


def same(ours, theirs, some=slice(None), *, fields=FIELDS, atol=TOLERANCE):
    for field in fields:
        expected = getattr(theirs, field)
        expected = expected if field == "genes" else expected[some]
        np.testing.assert_allclose(getattr(ours, field), expected, rtol=0, atol=atol, err_msg=field)


# --- effects -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    ("operator", "layer"), [("delete", -1), ("delete", -2), ("delete", 0), ("overexpress", -1), ("shift", -2)]
)
def test_effects(toy, operator, positions, layer):
    edits, goals = make_edits(toy, operator), goals_of(toy, 3)
    for how in hows(toy):
        found = run(toy, edits, layer=layer, how=how, positions=positions, goals=goals)
        check(toy, edits, found, layer=layer, how=how, positions=positions, goals=goals)
        assert {getattr(found, field).dtype for field in FIELDS[:-1]} == {np.dtype(np.float32)}
        assert found.gene_sums.dtype == np.float64


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_genes_inserted_into_full_cells(full, positions, layer):
    """The last genes fall off the edited cell: it is compared with the cell read again without them."""
    new = np.setdiff1d(np.flatnonzero(~full.vocabulary.is_special), np.unique(full.ids))[:2].tolist()
    last = int(full.ids[0, full.lengths[0] - 1 - full.vocabulary.first_gene])
    sets = [[new[0]], new, [new[1], last, new[0]], [last]]
    edits, goals = make_edits(full, "overexpress", sets), goals_of(full, 2)
    for how in hows(full):
        found = run(full, edits, layer=layer, how=how, positions=positions, goals=goals)
        check(full, edits, found, layer=layer, how=how, positions=positions, goals=goals)


def test_departure_nearly_full_cells_lose_as_many_genes_as_do_not_fit(full):
    """Two genes into a cell with room for one: one falls off. The official software cuts two off the cell as it was."""
    room, cell = 1, full.cells()[1]
    genes = np.setdiff1d(np.flatnonzero(~full.vocabulary.is_special), np.unique(full.ids))[:2]
    assert len(cell) + room == full.model.max_length
    how = full.poolings[-1]  # cls, if the family has it

    def vector(tokens):
        states = full.reference.states(tokens, -2)
        is_gene = [full.is_gene(token) for token in tokens]
        return states[0] if how == "cls" else states[is_gene].mean(axis=0)

    front, behind = full.vocabulary.first_gene, len(cell) - full.vocabulary.first_gene
    edited = vector([*cell[:front], *genes.tolist(), *cell[front : behind - 1], *cell[behind:]])
    one_less, two_less = (vector([*cell[: behind - n], *cell[behind:]]) for n in (1, 2))
    found = run(full, Edits("overexpress", [genes], np.array([1]), np.array([0])), how=how).shift[0]
    assert found == pytest.approx(1 - cosine(one_less, edited), abs=1e-6)
    assert abs(found - (1 - cosine(two_less, edited))) > 1e-5


def test_full_cells_are_not_compared_with_genes_that_are_not_read(full):
    """What falls off the end is no effect of the gene: against the cell as it was, the shift would be another."""
    gene = np.setdiff1d(np.flatnonzero(~full.vocabulary.is_special), np.unique(full.ids))[:2]
    edits = Edits("overexpress", [gene], np.array([0]), np.array([0]))
    found = run(full, edits, how="mean")
    cell = full.cells()[0]
    compared, edited = edited_cell(full, cell, gene.tolist(), "overexpress", None)
    assert (len(compared), len(edited)) == (len(cell) - 2, len(cell))

    def mean(tokens):
        states = full.reference.states(tokens, -2)
        return np.mean([state for token, state in zip(tokens, states, strict=True) if full.is_gene(token)], axis=0)

    assert found.shift[0] == pytest.approx(1 - cosine(mean(compared), mean(edited)), abs=1e-6)
    assert abs(found.shift[0] - (1 - cosine(mean(cell), mean(edited)))) > 1e-4


@pytest.mark.parametrize("operator", OPERATORS)
def test_other_goals_with_each_set(toy, operator):
    edits = make_edits(toy, operator)
    goals = goals_of(toy, len(edits.sets), 2)
    for how in hows(toy):
        found = run(toy, edits, how=how, goals=goals)
        check(toy, edits, found, layer=-2, how=how, goals=goals)


@pytest.mark.parametrize("n_goals", [0, 3])
def test_as_many_states_as_goals(toy, n_goals):
    edits = make_edits(toy, "delete")
    found = run(toy, edits, goals=goals_of(toy, n_goals) if n_goals else None)
    assert found.toward.shape == (len(edits), n_goals)
    assert found.toward_parts.shape == (len(edits), n_goals, len(PARTS))
    assert not np.isnan(found.shift).any()


# --- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_parts_add_up(toy, full, operator):
    for cells in (toy, full):
        edits = make_edits(cells, operator)
        for how in hows(cells):
            found = run(cells, edits, how=how)
            np.testing.assert_allclose(found.parts.sum(axis=-1), found.shift, rtol=0, atol=1e-6)
            np.testing.assert_allclose(found.toward_parts.sum(axis=-1), found.toward, rtol=0, atol=1e-6)
            assert found.parts.any(axis=0).tolist() == [how == "mean", True, True]


def test_composition_of_a_deletion_is_known_without_a_second_pass(toy):
    """The mean over all genes against that over the others, all in the cell as it was."""
    edits, goal = make_edits(toy, "delete"), goals_of(toy, 1)
    found = run(toy, edits, goals=goal)
    for at, (row, which) in enumerate(zip(edits.cell, edits.which, strict=True)):
        cell, genes = toy.cells()[row], edits.sets[which].tolist()
        states = dict(zip(cell, toy.reference.states(cell, -2), strict=True))
        whole = np.mean([state for token, state in states.items() if toy.is_gene(token)], axis=0)
        rest = np.mean([state for t, state in states.items() if toy.is_gene(t) and t not in genes], axis=0)
        assert found.parts[at, 0] == pytest.approx(1 - cosine(whole, rest), abs=1e-6)
        assert found.toward_parts[at, 0, 0] == pytest.approx(cosine(rest, goal[0]) - cosine(whole, goal[0]), abs=1e-6)


@pytest.mark.parametrize("operator", OPERATORS)
def test_cells_that_are_no_mean_have_no_composition(toy, operator):
    edits = make_edits(toy, operator)
    for how in set(hows(toy)) - {"mean"}:
        found = run(toy, edits, how=how)
        np.testing.assert_array_equal(found.parts[:, 0], 0)
        if how == "cls":
            np.testing.assert_array_equal(found.toward_parts[..., 0], 0)


@pytest.mark.parametrize("operator", OPERATORS)
def test_held_positions_leave_no_position_part(toy, full, operator):
    for cells in (toy, full):
        edits = make_edits(cells, operator)
        for how in hows(cells):
            found = run(cells, edits, how=how, positions="keep")
            np.testing.assert_array_equal(found.parts[:, 1], 0)
            np.testing.assert_array_equal(found.toward_parts[..., 1], 0)
            free = run(cells, edits, how=how)
            # What is left is what the free run calls the same.
            np.testing.assert_allclose(found.parts[:, [0, 2]], free.parts[:, [0, 2]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_effects_without_their_parts(toy, operator, positions):
    edits = make_edits(toy, operator)
    for how in hows(toy):
        with_parts, without = (run(toy, edits, how=how, positions=positions, split=split) for split in (True, False))
        same(without, with_parts, fields=("shift", "toward", "rank", "vectors", "genes"), atol=0)
        assert with_parts.__dict__.keys() - without.__dict__.keys() == {"parts", "toward_parts"}


@pytest.mark.parametrize("operator", OPERATORS)
def test_in_the_embedding_other_genes_know_of_their_position_only(toy, full, operator):
    for cells in (toy, full):
        edits = make_edits(cells, operator)
        found = run(cells, edits, layer=0, how="genes")
        np.testing.assert_allclose(found.parts[:, [0, 2]], 0, atol=1e-6)
        assert found.parts[:, 1].max() > 0.01
        held = run(cells, edits, layer=0, how="genes", positions="keep")
        np.testing.assert_allclose(held.shift, 0, atol=1e-6)
        np.testing.assert_allclose(held.genes[:2], 0, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_network_without_positions_has_no_position_part(toy, full, operator):
    for cells in (toy, full):
        encoder = cells.encoder(-1)
        with torch.no_grad():
            encoder.embeddings.position_embeddings.weight.zero_()
        edits = make_edits(cells, operator)
        for how in hows(cells):
            found = run(cells, edits, encoder=encoder, how=how, goals=None)
            np.testing.assert_allclose(found.parts[:, 1], 0, atol=2e-6)
            # To move genes about changes nothing at all, to take some out or put some in does.
            in_place = (edits.to != GONE).all(axis=1) if operator == "shift" else np.zeros(len(edits), dtype=bool)
            np.testing.assert_allclose(found.shift[in_place], 0, atol=2e-6)
            assert operator == "shift" or found.shift.max() > 1e-4


# --- edits that do little ------------------------------------------------------------------------------------------


def test_genes_moved_beyond_what_is_read_are_deleted(toy):
    deleted = make_edits(toy, "delete")
    moved = dataclasses.replace(deleted, operator="shift", to=np.full((len(deleted), 3), GONE))
    same(run(toy, moved), run(toy, deleted), atol=0)


def test_genes_that_stay_move_nothing(toy):
    """The first gene brought to the front, a gene moved to its own place: exactly 0, not a rounding."""
    rows = np.flatnonzero(toy.lengths > toy.vocabulary.n_specials + 3)
    o = toy.vocabulary.first_gene
    sets = list(toy.ids[rows, o : o + 1].astype(np.int64))
    third = list(toy.ids[rows, o + 2 : o + 3].astype(np.int64))
    to_the_front = Edits("overexpress", sets, rows, np.arange(len(rows)))
    to_its_place = Edits("shift", third, rows, np.arange(len(rows)), np.full((len(rows), 1), 2))
    for edits in (to_the_front, to_its_place):
        for how in hows(toy):
            found = run(toy, edits, how=how, keep_vectors=True)
            for field in ("shift", "parts", "toward", "toward_parts"):
                np.testing.assert_allclose(getattr(found, field), 0, atol=1e-6)
            np.testing.assert_allclose(found.vectors[:, 0], found.vectors[:, 1], atol=1e-5)
    assert run(toy, to_the_front).rank.tolist() == [0] * len(rows)


def test_tokens_of_a_set_in_any_order(toy):
    """It matters in what order genes are brought to the front, and not in what order they leave."""
    first, second = np.flatnonzero(~toy.vocabulary.is_special)[:2].tolist()
    rows = np.flatnonzero([{first, second} < set(cell) for cell in toy.cells()])
    for operator, is_same in {"delete": True, "overexpress": False}.items():
        one, other = (
            run(toy, Edits(operator, [np.array(genes)], rows, np.zeros_like(rows)))
            for genes in ([first, second], [second, first])
        )
        assert np.array_equal(one.shift, other.shift) == is_same


def test_no_edits(toy):
    nothing = np.zeros(0, dtype=np.int64)
    for sets in ([], [np.array([7])]):
        for operator in OPERATORS:
            edits = Edits(operator, sets, nothing, nothing, np.zeros((0, len(sets)), dtype=np.int64))
            found = run(toy, edits)
            assert found.shift.shape == found.rank.shape == (0,)
            assert found.parts.shape == (0, 3)
            assert found.toward.shape == (0, 2)
            assert found.vectors.shape == (0, 2, toy.model.hidden_size)
            assert found.genes.shape == (3, len(toy.vocabulary), len(sets))
            assert not found.genes.any()


def test_edits_of_cells_without_tokens_stay_missing(toy):
    empty = int(np.flatnonzero(toy.lengths == 0)[0])
    edits = make_edits(toy, "overexpress")
    more = dataclasses.replace(edits, cell=np.insert(edits.cell, 4, empty), which=np.insert(edits.which, 4, 0))
    found = run(toy, more)
    for field in ("shift", "parts", "toward", "toward_parts", "rank", "vectors"):
        assert np.isnan(getattr(found, field)[4]).all()
    same(found, run(toy, edits), fields=("genes",))


def test_only_what_is_asked_for(toy):
    edits = make_edits(toy, "delete")
    found = run_edits(toy.encoder(-2), toy.ids, toy.lengths, toy.vocabulary, edits, how="mean", positions="close")
    assert set(found) == {"shift", "rank", "toward"}
    assert found["toward"].shape == (len(edits), 0)
    same(SimpleNamespace(**found), run(toy, edits), fields=("shift", "rank"), atol=0)


# --- every gene by itself ------------------------------------------------------------------------------------------


def every_gene(toy):
    """The edits of a screen."""
    return single_deletions(toy.ids, wanted_places(toy.ids, toy.lengths, ~toy.vocabulary.is_special, toy.vocabulary))


def screen(toy, *, edits=None, **kwargs):
    """What a screen asks for."""
    edits = every_gene(toy) if edits is None else edits
    return run(toy, edits, **{"layer": -1, "split": False, "gene_groups": None, "keep_vectors": False, **kwargs})


@pytest.mark.parametrize(("positions", "layer"), [("close", -2), ("keep", -1)])
def test_every_gene_of_a_screen(toy, layer, positions):
    edits, goals = every_gene(toy), goals_of(toy, 2)
    for how in hows(toy):
        with settings.override(batch_tokens=1000):
            found = screen(toy, edits=edits, layer=layer, how=how, positions=positions, goals=goals)
        wanted = {"fields": ("shift", "toward", "rank"), "atol": 2e-6}
        check(toy, edits, found, layer=layer, how=how, positions=positions, goals=goals, **wanted)
        assert found.shift.max() > 1e-4  # else agreement says nothing


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_named_deletion_equals_that_of_a_screen(toy, positions):
    """Whatever else is asked for, and whichever other edits run beside it."""
    edits, goals = every_gene(toy), goals_of(toy, 2)
    for how in hows(toy):
        whole = screen(toy, how=how, positions=positions, goals=goals)
        gene = np.bincount(edits.which).argmax()
        some = np.flatnonzero(edits.which == gene)
        named = Edits("delete", [edits.sets[gene]], edits.cell[some], np.zeros(len(some), dtype=np.int64))
        assert len(named) > 1
        for alone in (run, screen):
            found = alone(toy, edits=named, layer=-1, how=how, positions=positions, goals=goals)
            same(found, whole, some, fields=("shift", "toward", "rank"), atol=1e-6)


def test_in_the_embedding_a_screen_has_only_composition(toy):
    """Without a network layer nothing reads anything: `<cls>` stays, the mean loses a gene."""
    found = screen(toy, layer=0, how=toy.poolings[-1], positions="keep")
    assert len(found.shift)
    assert (found.shift == 0).all() == toy.vocabulary.has_cls


@pytest.mark.parametrize("positions", POSITIONS)
def test_batches_and_other_cells_do_not_matter_to_a_screen(toy, positions):
    given = {"how": toy.poolings[-1], "positions": positions}
    edits, whole = every_gene(toy), screen(toy, **given)
    fields = ("shift", "toward", "rank")
    with settings.override(batch_tokens=1):
        same(screen(toy, **given), whole, fields=fields, atol=2e-6)
    rows = np.array([1, 3, 7])
    some = dataclasses.replace(toy, ids=toy.ids[rows], lengths=toy.lengths[rows])
    same(screen(some, **given), whole, np.isin(edits.cell, rows), fields=fields, atol=2e-6)


@pytest.mark.parametrize("positions", POSITIONS)
def test_workers_do_not_matter(toy, threads, positions):
    given = {"how": toy.poolings[-1], "positions": positions}
    alone = screen(toy, **given)
    for n_threads in (2, 5):
        threads(n_threads)
        found = screen(toy, **given)
        same(found, alone, fields=("shift", "toward"), atol=2e-6)
        np.testing.assert_array_equal(found.shift, screen(toy, **given).shift)


def test_a_screen_is_exact_where_a_key_has_nearly_all_attention(toy, monkeypatch):
    """Such genes are computed anew; with the others, results do not depend on which way was taken."""
    by_sums = screen(toy, how=toy.poolings[-1], positions="keep")
    monkeypatch.setattr(WithoutKey, "MOST", 0.0)
    anew = screen(toy, how=toy.poolings[-1], positions="keep")
    np.testing.assert_allclose(by_sums.shift, anew.shift, atol=2e-6)
    assert not np.array_equal(by_sums.shift, anew.shift)  # two ways, or nothing was compared


def test_deletions_of_absent_genes_change_nothing(toy):
    """Beside deletions of genes that are there, in one pass."""
    edits = every_gene(toy)
    absent = np.setdiff1d(np.flatnonzero(~toy.vocabulary.is_special), np.unique(toy.ids))[:1]
    more = Edits("delete", [*edits.sets, absent], np.append(edits.cell, 1), np.append(edits.which, len(edits.sets)))
    for positions in POSITIONS:
        found = screen(toy, edits=more, positions=positions)
        assert found.shift[-1] == pytest.approx(0, abs=1e-6)
        assert np.isnan(found.rank[-1])
        same(screen(toy, positions=positions), found, slice(0, -1), fields=("shift", "toward", "rank"), atol=2e-6)


@pytest.mark.parametrize("how", ["cls", "mean"])
def test_shorter_formats_find_the_same_genes(toy, how):
    """A network as wide as a small published one; noise of bfloat16 stays below the differences between genes."""
    if how not in toy.poolings:
        pytest.skip("no <cls> in this family")
    config = {**toy.model.config, "hidden_size": 64, "num_attention_heads": 2, "initializer_range": 0.1}
    made = {"n_layers": 2, "seed": 0, "device": torch.device("cpu")}
    longest = every_gene(toy).cell == 1
    found = [
        screen(toy, encoder=random_encoder(config, dtype=dtype, **made), how=how, goals=None).shift[longest]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert np.corrcoef(*found)[0, 1] > 0.9


# --- sums over genes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mean", "genes"])
def test_genes_are_summed_in_the_groups_of_edits(toy, how):
    edits = make_edits(toy, "overexpress")
    group = np.random.default_rng(0).integers(0, 4, len(edits))
    found = run(toy, edits, how=how, gene_groups=group, n_groups=5).genes
    by_edit = run(toy, edits, how=how, gene_groups=np.arange(len(edits)), n_groups=len(edits)).genes
    for at in range(5):
        np.testing.assert_allclose(found[..., at], by_edit[..., group == at].sum(axis=-1), atol=1e-5)
    np.testing.assert_allclose(by_edit[1], by_edit[0] ** 2, atol=1e-6)
    assert set(np.unique(by_edit[2])) == {0, 1}
    shift = (by_edit[0].sum(axis=0) / by_edit[2].sum(axis=0)).astype(np.float32)
    np.testing.assert_allclose(run(toy, edits, how="genes").shift, shift, atol=1e-6)
    without = run(toy, edits, how=how, gene_groups=np.where(group == 2, -1, group), n_groups=5).genes
    assert not without[..., 2].any()
    np.testing.assert_allclose(np.delete(without, 2, axis=-1), np.delete(found, 2, axis=-1), atol=1e-12)


def each_pass(encoder):
    """A module that every pass runs once, with its copies in the first argument."""
    return encoder.encoder.layer[0].intermediate.dense


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operator", "batch_tokens"), [("delete", 150), ("overexpress", 1), ("shift", 150)])
def test_batches_do_not_matter(toy, full, operator, batch_tokens):
    for cells in (toy, full):
        edits = make_edits(cells, operator)
        expected = run(cells, edits)
        with settings.override(batch_tokens=batch_tokens):
            found = run(cells, edits)
        same(found, expected)
        np.testing.assert_array_equal(found.genes[2], expected.genes[2])


@pytest.mark.parametrize("operator", OPERATORS)
def test_edits_in_any_order(toy, operator):
    edits = make_edits(toy, operator)
    order = np.random.default_rng(1).permutation(len(edits))
    same(run(toy, some_of(edits, order)), run(toy, edits), order)


@pytest.mark.parametrize("operator", OPERATORS)
def test_order_and_company_of_cells_do_not_matter(toy, operator):
    edits = make_edits(toy, operator)
    expected = run(toy, edits)
    order = np.random.default_rng(0).permutation(len(toy.ids))
    moved = dataclasses.replace(toy, ids=toy.ids[order], lengths=toy.lengths[order])
    same(run(moved, dataclasses.replace(edits, cell=np.argsort(order)[edits.cell])), expected)
    wide = dataclasses.replace(toy, ids=np.pad(toy.ids, ((0, 0), (0, 5))))
    same(run(wide, edits), expected, atol=0)
    some = np.flatnonzero(np.isin(edits.cell, [3, 9]))
    same(run(toy, some_of(edits, some)), expected, some, fields=FIELDS[:-1])


@pytest.mark.parametrize("operator", OPERATORS)
def test_sets_do_not_touch_each_other(toy, operator):
    edits = make_edits(toy, operator)
    together = run(toy, edits)
    for which in range(len(edits.sets)):
        some = np.flatnonzero(edits.which == which)
        alone = run(toy, some_of(edits, some))
        same(alone, together, some, fields=FIELDS[:-1])
        np.testing.assert_allclose(alone.genes[..., which], together.genes[..., which], atol=1e-5)


@pytest.mark.parametrize("operator", ["delete", "overexpress"])
def test_what_does_not_fit_in_memory_is_halved_and_counted_once(full, operator):
    edits = make_edits(full, operator)
    expected = run(full, edits)
    encoder, n_failed = full.encoder(-2), []

    def small_memory(_module, args):
        if len(args[0]) > 3:
            n_failed.append(1)
            raise torch.OutOfMemoryError

    each_pass(encoder).register_forward_pre_hook(small_memory)
    found = run(full, edits, encoder=encoder)
    assert len(n_failed) > 1
    same(found, expected)
    np.testing.assert_array_equal(found.genes[2], expected.genes[2])


@pytest.mark.parametrize(
    ("positions", "split", "n_passes"), [("close", True, 2), ("close", False, 1), ("keep", True, 1), ("keep", False, 1)]
)
def test_no_pass_too_many(toy, positions, split, n_passes):
    """Each cell with edits once as it is, and each edit once, or twice for its parts."""
    encoder, n_run = toy.encoder(), []
    each_pass(encoder).register_forward_pre_hook(lambda _module, args: n_run.append(len(args[0])))
    edits = make_edits(toy, "delete", [np.flatnonzero(~toy.vocabulary.is_special)[:1]])
    assert 0 < len(edits) < len(toy.ids) - 1
    run(toy, edits, encoder=encoder, positions=positions, split=split)
    assert sum(n_run) == (1 + n_passes) * len(edits)


@pytest.mark.parametrize("positions", POSITIONS)
def test_edits_in_full_and_others(toy, positions):
    """Others have neither parts nor other genes, nor a pass for them; all else is the same."""
    edits, encoder, n_run = make_edits(toy, "delete"), toy.encoder(), []
    in_full = np.arange(len(edits)) % 3 > 0
    each_pass(encoder).register_forward_pre_hook(lambda _module, args: n_run.append(len(args[0])))
    for how in hows(toy):
        given = {"how": how, "positions": positions, "encoder": encoder}
        expected, n_expected = run(toy, edits, **given), sum(n_run)
        n_run.clear()
        found, n_found = run(toy, edits, in_full=in_full, **given), sum(n_run)
        n_run.clear()
        same(found, expected, fields=("shift", "toward", "rank", "vectors"))
        for field in ("parts", "toward_parts"):
            values = getattr(found, field)
            np.testing.assert_allclose(values[in_full], getattr(expected, field)[in_full], rtol=0, atol=TOLERANCE)
            assert np.isnan(values[~in_full]).all()
        of_full = run(toy, some_of(edits, in_full), **given)
        same(found, of_full, fields=("genes",))
        n_run.clear()
        assert n_expected - n_found == (0 if positions == "keep" else (~in_full).sum())


def test_cut_cells_are_read_once_more(full):
    encoder, n_run = full.encoder(), []
    each_pass(encoder).register_forward_pre_hook(lambda _module, args: n_run.append(len(args[0])))
    absent = np.setdiff1d(np.flatnonzero(~full.vocabulary.is_special), np.unique(full.ids))[:1]
    edits = make_edits(full, "overexpress", [absent])
    run(full, edits, encoder=encoder, split=False)
    assert sum(n_run) == 2 * len(full.ids) + (full.lengths == full.model.max_length).sum()
