from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy import sparse

import gfx

# The toy cells' states are drawn at random, and most of the time nothing separates them.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

#: In nearly all of the toy cells, in some, in few.
GENE, OTHER, RARE = "TOY90", "TOY48", "TOY7"

overexpress_genes = partial(gfx.tl.overexpress_genes, controls=["parts"])


@pytest.fixture
def kinds_of_cells(cells):
    """Cells at full length and short ones, which have the genes or lack them; one of nothing else, and an empty one."""
    counts = cells.X.toarray()
    gene, other = (cells.var_names.get_loc(name) for name in (GENE, OTHER))
    counts[::3, gene] = counts[1::4, other] = 0
    counts[5, 100:] = counts[6, :100] = 0
    counts[2:4] = 0
    counts[2, [gene, other]] = 3
    cells.X = sparse.csr_matrix(counts)
    cells.raw = None
    return cells


@pytest.mark.parametrize("positions", ["close", "keep"])
@pytest.mark.parametrize("pooling", ["auto", "mean", "genes"])
def test_effects_are_those_of_the_published_model(kinds_of_cells, any_model, slow, assert_effects, positions, pooling):
    """One gene, one that few cells have, and three in their order."""
    if pooling == "auto" and not any_model.vocabulary.has_cls:
        pytest.skip("the mean, which is tested by name")
    cells, sets = kinds_of_cells, [(GENE,), (RARE,), (OTHER, RARE, GENE)]
    overexpress_genes(cells, sets, model=any_model, positions=positions, pooling=pooling)
    how = slow.pooling if pooling == "auto" else pooling
    rows = slow.tokens(cells)
    for number, names in enumerate(sets):
        is_full = [len(row) == 64 for row in rows]
        has = [set(slow.named(names)) <= set(row) for row in rows]
        assert {(True, False), (False, False)} <= set(zip(is_full, has, strict=True))
        effects = slow.effects(rows, names, "overexpress", how, hold=positions == "keep")
        assert set(range(24)) - set(effects) == ({2, 3} if number == 2 else {3})
        assert_effects(cells, number, effects, "gfx_overexpress")
    assert cells.uns["gfx_overexpress"]["table"]["n_cells"].tolist() == [23, 23, 22]
    assert cells.uns["gfx_overexpress"]["params"]["positions"] == positions


def test_toward_states_and_their_centroids_without_the_genes(kinds_of_cells, any_model, slow, assert_effects):
    cells, sets = kinds_of_cells, [(GENE,), (OTHER, GENE)]
    overexpress_genes(
        cells,
        sets,
        model=any_model,
        groupby="cell_type",
        start="b",
        goal="c",
        controls="centroids",
        donor_key="donor",
    )
    rows, state = slow.tokens(cells), cells.obs["cell_type"]
    starts = [row if of == "b" else [] for row, of in zip(rows, state, strict=True)]
    table = cells.uns["gfx_overexpress"]["state_table"].set_index("perturbation")
    for number, names in enumerate(sets):
        vectors = {"whole": np.full((24, 16), np.nan), "without": np.full((24, 16), np.nan)}
        for place, row in enumerate(rows):
            without = slow.edited(row, slow.named(names), "delete")
            # A cell of nothing else has no vector without them, and keeps that with them.
            left = without if any(map(slow.is_gene, without)) else row
            if row:
                vectors["whole"][place] = slow.cell(row, slow.pooling)
                vectors["without"][place] = slow.cell(left, slow.pooling)
        goals = {
            name: [np.nanmean(of_cells[state == label], axis=0) for label in "abc"]
            for name, of_cells in vectors.items()
        }
        assert_effects(
            cells, number, slow.effects(starts, names, "overexpress", goals=goals["whole"]), "gfx_overexpress"
        )
        without = slow.effects(starts, names, "overexpress", goals=goals["without"])
        expected = np.mean([effect.toward for effect in without.values()], axis=0)
        np.testing.assert_allclose(table.loc["+".join(names), "toward_without_mean"], expected, atol=1e-5)
    assert cells.uns["gfx_overexpress"]["donors"]["n_cells"].sum() == len(sets) * 8


def test_the_order_of_a_set_matters(cells, toy_model):
    overexpress_genes(cells, (GENE, OTHER), model=toy_model, key_added="x")
    overexpress_genes(cells, (OTHER, GENE), model=toy_model, key_added="y")
    assert cells.uns["x"]["perturbations"].tolist() == [f"{GENE}+{OTHER}"]
    assert cells.uns["y"]["perturbations"].tolist() == [f"{OTHER}+{GENE}"]
    assert abs(cells.obsm["x"] - cells.obsm["y"]).max() > 1e-3


def test_bringing_the_first_gene_to_the_front_shifts_nothing(cells, any_model, slow):
    """Nor do genes that are the first of a cell in their order."""
    row = slow.genes(slow.tokens(cells)[0])
    one = cells[[0]].copy()
    names = slow.vocabulary.symbols[row[:3]].tolist()
    overexpress_genes(one, [names[0], tuple(names), names[1]], model=any_model)
    np.testing.assert_allclose(one.obsm["gfx_overexpress"][0, :2], 0, atol=1e-6)
    assert one.obsm["gfx_overexpress"][0, 2] > 1e-4
    ranks = one.uns["gfx_overexpress"]["table"]["rank_mean"]
    np.testing.assert_allclose(ranks, [0, 1 / (len(row) - 1), 1 / (len(row) - 1)], atol=1e-6)


def test_a_gene_that_no_cell_has_has_no_rank_but_an_effect(cells, toy_model):
    counts = cells.X.toarray()
    counts[:, cells.var_names.get_loc(RARE)] = 0
    cells.X = sparse.csr_matrix(counts)
    overexpress_genes(cells, RARE, model=toy_model, controls="baselines")
    table = cells.uns["gfx_overexpress"]["table"]
    assert table["n_cells"].item() == 24
    assert table["shift_mean"].item() > 1e-3
    assert np.isnan(table["rank_mean"].item())
    assert table["detection"].item() == 0
    assert table["expression_mean"].item() == 0
    assert cells.varm["gfx_overexpress_n_cells"][cells.var_names.get_loc(RARE), 0] == 0


def test_random_sets_are_lacked_or_there_like_the_gene(toy_cells, any_model, slow):
    """And do what overexpressing them by hand does in the cells in which they are like it."""
    few = toy_cells(8)
    counts = few.X.toarray()
    counts[:4, few.var_names.get_loc(GENE)] = 0
    few.X = sparse.csr_matrix(counts)
    overexpress_genes(few, GENE, model=any_model, controls="random_sets", n_random=15)
    rows, gene = slow.tokens(few), slow.named([GENE])[0]
    sets = few.uns["gfx_overexpress"]["random_sets"]
    overexpress_genes(few, sets["genes"].tolist(), model=any_model, key_added="by_hand")
    absent = 0
    for at, row in sets.iterrows():
        other = slow.named([row["genes"]])[0]
        lacking = [place for place, cell in enumerate(rows) if gene not in cell and other not in cell]
        near = [
            place
            for place, cell in enumerate(rows)
            if {gene, other} <= set(cell) and abs(cell.index(gene) - cell.index(other)) <= 10
        ]
        # A set is matched by absence or by rank; which, tells the rank that it has.
        cells = lacking if np.isnan(row["rank_mean"]) else near
        absent += sum(gene not in rows[place] for place in cells)
        assert row["n_cells"] == len(cells) > 0
        assert row["shift_mean"] == pytest.approx(few.obsm["by_hand"][cells, at].mean(), abs=1e-6)
        own = few.obsm["gfx_overexpress"][cells, 0]
        assert row["difference"] == pytest.approx((few.obsm["by_hand"][cells, at] - own).mean(), abs=1e-6)
    assert 0 < absent < sets["n_cells"].sum()
    assert few.uns["gfx_overexpress"]["table"]["n_random"].item() == 15


def test_every_gene(cells, toy_model, slots):
    few = cells[:2].copy()
    by_name = few.copy()
    overexpress_genes(few, ..., model=toy_model)
    overexpress_genes(by_name, few.uns["gfx_overexpress"]["perturbations"], model=toy_model)
    assert slots(few) == slots(by_name)
    assert (few.uns["gfx_overexpress"]["table"]["n_cells"] == 2).all()  # where it is lacked, it is inserted


@pytest.mark.parametrize("positions", ["hold", "overexpress", None])
def test_positions_are_kept_or_closed_up(cells, toy_model, slots, positions):
    before = slots(cells)
    with pytest.raises(ValueError, match=r"`positions` is one of \['close', 'keep'\], found"):
        overexpress_genes(cells, GENE, model=toy_model, positions=positions)
    assert slots(cells) == before


def test_no_cell_with_another_gene(cells, toy_model):
    """Where a cell has nothing but the gene, there is nothing to compare."""
    counts = np.zeros(cells.shape, dtype=np.float32)
    counts[:, cells.var_names.get_loc(GENE)] = 1
    cells.X = sparse.csr_matrix(counts)
    with pytest.warns(UserWarning, match=rf"No cell has the genes of \['{GENE}'\], together with another gene"):
        overexpress_genes(cells, [GENE, OTHER], model=toy_model)
    assert cells.uns["gfx_overexpress"]["table"]["n_cells"].tolist() == [0, 24]
