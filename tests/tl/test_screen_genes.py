"""A screen deletes each gene of each cell by itself: effects in cells, means over cells, states, genes and cells."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import gfx
from gfx._core.screening import NEIGHBOURS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import ToyCells
    from tests.tl.conftest import Screened

    from gfx.models import Model

    Screen = Callable[..., Screened]

# The toy cells' states are drawn at random, and most of the time they are not separable.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

STATES = {"groupby": "cell_type", "start": "b", "goal": "a"}
FIRST_ORDER = {"method": gfx.tl.FirstOrder(n_probes=2)}
METHODS = pytest.mark.parametrize("method", [{}, FIRST_ORDER], ids=["exact", "first order"])


@pytest.fixture(scope="module")
def screened(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> Screened:
    """24 cells in three groups, exactly, with controls."""
    return screen(toy_cells(24), toy_model, stored=True, groupby="cell_type", controls=("random_weights", "baselines"))


# --- one gene at a time ---------------------------------------------------------------------------------------------


def genes_of_several_ranks(adata: ad.AnnData, model: Model) -> list[str]:
    """Genes that are first, somewhere, and last in cells of the state b."""
    tokens = gfx.pp.tokenize(adata, model=model, copy=True).obsm["gfx_tokens"]
    lengths = (tokens != model.vocabulary.pad).sum(axis=1)
    first, last = model.vocabulary.first_gene, model.vocabulary.n_specials - model.vocabulary.first_gene + 1
    chosen = [tokens[1, first], tokens[4, lengths[4] // 2], tokens[1, lengths[1] - last], tokens[4, first + 2]]
    return list(dict.fromkeys(str(model.vocabulary.symbols[token]) for token in chosen))


def assert_same_as_named_deletions(
    adata: ad.AnnData, model: Model, screen: Screen, of_screen: dict[str, Any], of_deletions: dict[str, Any]
) -> None:
    genes = genes_of_several_ranks(adata, model)
    assert len(genes) >= 3
    found = screen(adata, model, stored=True, **of_screen, **STATES)
    gfx.tl.delete_genes(adata, genes, model=model, controls=None, **of_deletions, **STATES)
    columns = adata.var_names.get_indexer(genes)
    is_start = (adata.obs["cell_type"] == "b").to_numpy()
    shift = np.where(is_start[:, None], adata.obsm["gfx_delete"], np.nan)
    assert (~np.isnan(shift)).sum() >= 8
    np.testing.assert_allclose(found.effects()[:, columns], shift, rtol=1e-3, atol=2e-7)
    toward = adata.obsm["gfx_delete_states"][:, :, 0]  # the goal is the first state
    toward = np.where(is_start[:, None], toward, np.nan)
    np.testing.assert_allclose(found.effects("toward")[:, columns], toward, rtol=1e-3, atol=5e-7)
    assert np.nanmax(np.abs(toward)) > 1e-4


@pytest.mark.parametrize("positions", ["keep", "close"])
@pytest.mark.parametrize("pooling", ["auto", "mean", "genes"])
def test_effects_are_those_of_delete_genes(
    toy_cells: ToyCells, any_model: Model, screen: Screen, positions: str, pooling: str
) -> None:
    chosen = {"positions": positions, "pooling": pooling, "hidden_layer": -1}
    assert_same_as_named_deletions(toy_cells(18), any_model, screen, chosen, chosen)


def test_a_screen_and_its_follow_up_are_the_same_experiment_by_default(
    toy_cells: ToyCells, any_model: Model, screen: Screen
) -> None:
    """Without any choice of positions, layer and pooling, for both families."""
    assert_same_as_named_deletions(toy_cells(18), any_model, screen, {}, {})


def test_a_gene_in_two_columns_is_deleted_once(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> None:
    """Both columns show the same effects, which are counted once."""
    adata = toy_cells(6)
    gene = genes_of_several_ranks(adata, toy_model)[0]
    column, other = adata.var_names.get_loc(gene), adata.var_names.get_loc("UNKNOWN1")
    adata.var["names"] = adata.var_names.to_numpy(dtype=object)
    adata.var.loc["UNKNOWN1", "names"] = f"OLD{gene}"
    adata.X = sparse.csr_matrix(adata.X.multiply(np.arange(adata.n_vars) != other))
    gfx.pp.tokenize(adata, model=toy_model, gene_ids="names")
    found = screen(adata, toy_model, stored=True)
    effects = found.effects()
    assert (~np.isnan(effects[:, column])).sum() == found.table["n_cells"].iloc[column] > 0
    np.testing.assert_array_equal(effects[:, column], effects[:, other])
    pd.testing.assert_series_equal(found.table.iloc[column], found.table.iloc[other], check_names=False)


def test_a_cell_of_one_gene_has_nothing_left_to_compare(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> None:
    adata = toy_cells(4)
    counts = adata.X.toarray()
    counts[0] = np.arange(adata.n_vars) == 3
    adata.X = sparse.csr_matrix(counts)
    is_deleted = ~np.isnan(screen(adata, toy_model, stored=True).effects())
    assert is_deleted[0].sum() == 0
    assert is_deleted[1].sum() > 10
    with pytest.raises(ValueError, match="No cell that is screened has any of the genes and at least one other gene"):
        screen(adata, toy_model, mask_obs=np.arange(4) == 0)
    with pytest.raises(ValueError, match="No cell that is screened has any of the genes"):
        screen(adata[:, adata.var_names != "TOY7"], toy_model, genes=["TOY7"])


@pytest.mark.parametrize("hidden_layer", [0, -4])
@METHODS
@pytest.mark.parametrize("controls", [None, "random_weights"])
def test_cls_before_the_first_network_layer_is_refused(
    *,
    cells: ad.AnnData,
    toy_model: Model,
    slots: Callable[[ad.AnnData], dict[str, Any]],
    hidden_layer: int,
    method: dict[str, Any],
    controls: str | None,
) -> None:
    """`<cls>` is the same in every cell there: it has no derivative, and no shift but 0."""
    before = slots(cells)
    with pytest.raises(ValueError, match=r"`hidden_layer=0` is the input .*Use `pooling='mean'`, or a later layer"):
        gfx.tl.screen_genes(cells, model=toy_model, hidden_layer=hidden_layer, controls=controls, **method)
    assert slots(cells) == before


@METHODS
def test_means_over_genes_before_the_first_network_layer(
    toy_cells: ToyCells, any_model: Model, screen: Screen, method: dict[str, Any]
) -> None:
    """Composition is all there is: the mean of the embeddings of the other genes where genes keep their positions."""
    found = screen(toy_cells(12), any_model, hidden_layer=0, pooling="mean", positions="keep", **method)
    assert found.table["shift_mean"].max() > 1e-4
    controlled = screen(toy_cells(12), any_model, hidden_layer=0, pooling="mean", controls="random_weights", **method)
    assert np.isfinite(controlled.table["random_weights_shift_mean"]).any()


# --- over cells -----------------------------------------------------------------------------------------------------


def naive_excess(shift: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Less the median of the genes within 20 places in the order of the cell; the first and the last 20 left out."""
    out = np.full(shift.shape, np.nan)
    for row, cell, rank in zip(out, shift, ranks, strict=True):
        order = [gene for gene in np.argsort(rank, kind="stable") if not np.isnan(cell[gene])]
        for place in range(NEIGHBOURS, len(order) - NEIGHBOURS):
            around = order[place - NEIGHBOURS : place + NEIGHBOURS + 1]
            row[order[place]] = cell[order[place]] - np.median(cell[around])
    return out


def ranks_of(adata: ad.AnnData, model: Model) -> np.ndarray:
    """Place of each gene in each cell, 0 the first, 1 the last."""
    tokens = gfx.pp.tokenize(adata, model=model, copy=True).obsm["gfx_tokens"]
    out = np.full(adata.shape, np.nan)
    for cell, row in zip(out, tokens, strict=True):
        genes = [str(model.vocabulary.symbols[token]) for token in row if model.vocabulary.symbols[token]]
        cell[adata.var_names.get_indexer(genes)] = np.linspace(0, 1, len(genes))
    return out


def test_the_table_of_genes_summarizes_effects_in_cells(screened: Screened, toy_model: Model) -> None:
    table, names = screened.table, screened.adata.var_names
    assert table.index.equals(names)
    assert table.columns.tolist() == [
        *("n_cells", "rank_mean", "shift_mean", "shift_sd", "shift_excess"),
        *("random_weights_shift_mean", "random_weights_shift_excess", "detection", "expression_mean"),
    ]
    assert {str(dtype) for dtype in table.dtypes} == {"int32", "float32"}
    assert table["n_cells"].dtype == np.int32
    by_gene = pd.DataFrame(screened.effects(), columns=names)
    assert table["n_cells"].tolist() == by_gene.count().tolist()
    np.testing.assert_allclose(table["shift_mean"], by_gene.mean(), rtol=1e-5)
    np.testing.assert_allclose(table["shift_sd"], by_gene.std(ddof=1), rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(table["rank_mean"], pd.DataFrame(ranks_of(screened.adata, toy_model)).mean(), rtol=1e-5)
    known = by_gene.count() > 0
    np.testing.assert_allclose(table.loc[known, "detection"], by_gene.count()[known] / 24, rtol=1e-6)
    assert table.loc[~names.str.startswith("TOY")].drop(columns="n_cells").isna().all(axis=None)


def test_excess_is_over_genes_of_similar_rank_in_the_same_cells(screened: Screened, toy_model: Model) -> None:
    """In cells of one gene more than two windows, one gene has neighbours on both sides."""
    excess = naive_excess(screened.effects(), ranks_of(screened.adata, toy_model))
    inner = (~np.isnan(excess)).sum(axis=0) == screened.table["n_cells"]
    inner &= screened.table["n_cells"] > 0
    assert inner.sum() >= 1
    expected = np.nanmean(excess[:, inner], axis=0)
    np.testing.assert_allclose(screened.table.loc[inner, "shift_excess"], expected, atol=1e-7)


def test_each_group_has_what_its_cells_give_alone(
    screened: Screened, toy_cells: ToyCells, toy_model: Model, screen: Screen
) -> None:
    values, result = screened.adata.varm["gfx_screen_groups"], screened.adata.uns["gfx_screen"]
    assert values.dtype == np.float32
    assert values.shape == (screened.adata.n_vars, 3, len(result["columns"]))
    assert list(result["groups"]) == ["a", "b", "c"]
    assert list(result["columns"]) == screened.table.columns[:7].tolist()
    for number, name in enumerate("abc"):
        adata = toy_cells(24)
        alone = screen(
            adata, toy_model, mask_obs=(adata.obs["cell_type"] == name).to_numpy(), controls="random_weights"
        )
        expected = alone.table[list(result["columns"])].to_numpy(dtype=np.float32)
        np.testing.assert_allclose(values[:, number], expected, rtol=1e-4, atol=1e-7)


def test_cells_without_a_group_count_among_all_cells_alone(
    toy_cells: ToyCells, toy_model: Model, screen: Screen
) -> None:
    adata = toy_cells(12)
    adata.obs["cell_type"] = adata.obs["cell_type"].where(np.arange(12) >= 6)
    found = screen(adata, toy_model, stored=True, groupby="cell_type")
    per_group = found.adata.varm["gfx_screen_groups"][:, :, 0].sum(axis=1)
    in_groups = (~np.isnan(found.effects()[6:])).sum(axis=0)
    assert per_group.tolist() == in_groups.tolist()
    assert found.table["n_cells"].sum() > in_groups.sum()


# --- states ---------------------------------------------------------------------------------------------------------


def test_with_a_goal_cells_of_the_start_are_screened(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> None:
    found = screen(toy_cells(36), toy_model, stored=True, **STATES, controls=("random_weights", "baselines"))
    adata, toward = found.adata, found.effects("toward")
    is_start = (adata.obs["cell_type"] == "b").to_numpy()
    np.testing.assert_array_equal(np.isnan(toward), np.isnan(found.effects()))
    assert np.isnan(toward[~is_start]).all()
    assert not np.isnan(toward[is_start]).all(axis=1).any()
    np.testing.assert_allclose(found.table["toward_mean"], pd.DataFrame(toward).mean(), rtol=1e-4, atol=1e-8)
    expected = ["toward_mean", "toward_sd", "toward_excess", "random_weights_toward_mean", "logfc"]
    assert set(expected) <= set(found.table)
    assert found.table["logfc"].notna().sum() > 100
    assert "gfx_screen_groups" not in adata.varm
    assert "groups" not in adata.uns["gfx_screen"]
    params = adata.uns["gfx_screen"]["params"]
    assert {name: params[name] for name in STATES} == STATES
    assert params["n_probes"] == 8  # of the random-weights model
    axis = found.controls.loc["state_axis"].loc["auc"]
    assert axis["measure"] == "toward"
    assert 0 <= axis["value"] <= 1


def test_states_that_are_hardly_separable_are_warned_of(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> None:
    with pytest.warns(UserWarning, match=r"Held-out cells of 'b' and 'a'"):
        screen(toy_cells(24), toy_model, **STATES)


def test_an_excess_that_few_cells_have_is_none(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> None:
    """Where most cells have few of the screened genes, the excess of a gene would be that of the other cells."""
    adata = toy_cells(24)
    often = np.argsort(-(adata.X.toarray()[:, :200] > 0).sum(axis=0), kind="stable")
    found = screen(adata, toy_model, genes=adata.var_names[often[:37]].tolist(), stored=True)
    is_deleted = ~np.isnan(found.effects())
    n_cells, n_known = is_deleted.sum(axis=0), is_deleted[is_deleted.sum(axis=1) > NEIGHBOURS].sum(axis=0)
    is_known = (n_known > 0) & (n_known >= np.minimum(n_cells, 10))
    assert ((n_cells >= 10) & (n_known > 0) & ~is_known).any()
    assert ((n_cells > n_known) & is_known).any()
    np.testing.assert_array_equal(found.table["shift_excess"].notna(), is_known)


# --- which genes, which cells ---------------------------------------------------------------------------------------


@METHODS
def test_chosen_genes_have_the_effects_that_they_have_among_all(
    *, screened: Screened, toy_cells: ToyCells, toy_model: Model, screen: Screen, method: dict[str, Any]
) -> None:
    whole = screened if not method else screen(toy_cells(24), toy_model, stored=True, **method)
    chosen = ["TOY90", "OLDTOY48", "ENSG00000000165"]  # a symbol, an alias, an id
    found = screen(toy_cells(24), toy_model, genes=chosen, stored=True, **method)
    is_chosen = found.adata.var_names.isin(["TOY90", "TOY48", "TOY165"])
    assert (found.table["n_cells"] > 0).tolist() == is_chosen.tolist()
    np.testing.assert_allclose(found.effects()[:, is_chosen], whole.effects()[:, is_chosen], rtol=1e-4, atol=1e-7)
    assert found.table["shift_excess"].isna().all()  # three genes have no others of similar rank
    assert gfx.get.screen_df(found.adata, min_cells=1)["shift_z"].isna().all()


def test_one_gene_by_its_name(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> None:
    found = screen(toy_cells(6), toy_model, genes="TOY90")
    assert found.adata.var_names[found.table["n_cells"] > 0].tolist() == ["TOY90"]


def test_an_ellipsis_is_every_gene(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> None:
    """As in `tl.delete_genes`."""
    every, found = screen(toy_cells(6), toy_model), screen(toy_cells(6), toy_model, genes=...)
    pd.testing.assert_frame_equal(found.table, every.table)
    assert (found.table["n_cells"] > 0).sum() > 100


@METHODS
def test_a_cell_gives_the_same_among_others_and_in_any_order(
    toy_cells: ToyCells, toy_model: Model, screen: Screen, method: dict[str, Any]
) -> None:
    adata = toy_cells(12)

    def effects(cells: ad.AnnData, **chosen: Any) -> np.ndarray:
        return screen(cells, toy_model, stored=True, **method, **chosen).effects()

    whole, rows = effects(adata), np.array([7, 2, 9])
    np.testing.assert_allclose(effects(adata[rows]), whole[rows], rtol=1e-4, atol=1e-7)
    masked = effects(adata, mask_obs=np.isin(np.arange(12), rows))
    np.testing.assert_allclose(masked[rows], whole[rows], rtol=1e-4, atol=1e-7)
    assert (~np.isnan(masked)).sum() == (~np.isnan(whole[rows])).sum()
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_allclose(effects(adata[order]), whole[order], rtol=1e-4, atol=1e-7)


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_same_call_gives_the_same(
    toy_cells: ToyCells, toy_model: Model, screen: Screen, slots: Callable[[ad.AnnData], dict[str, Any]]
) -> None:
    chosen = {"groupby": "cell_type", "controls": "random_weights", **FIRST_ORDER}
    once, again = (screen(toy_cells(6), toy_model, **chosen) for _ in range(2))
    assert slots(once.adata) == slots(again.adata)
    other = screen(toy_cells(6), toy_model, **chosen, rng=1)
    assert not np.allclose(other.table["shift_mean"], once.table["shift_mean"], rtol=0.1, equal_nan=True)


def test_what_an_earlier_call_left_goes(toy_cells: ToyCells, toy_model: Model) -> None:
    adata = toy_cells(24)
    chosen = {"model": toy_model, "controls": None, "genes": ["TOY90", "TOY48"]}
    gfx.tl.screen_genes(adata, groupby="cell_type", **chosen)
    assert set(adata.varm) == {"gfx_screen", "gfx_screen_groups"}
    gfx.tl.screen_genes(adata, **chosen)
    assert set(adata.varm) == {"gfx_screen"}
    assert set(adata.uns["gfx_screen"]) == {"params", "slots", "approx", "controls", "note"}
    assert not set(adata.layers) - {None}


def test_a_slot_of_the_user_s_own_is_refused_and_stays(
    toy_cells: ToyCells, toy_model: Model, slots: Callable[[ad.AnnData], dict[str, Any]]
) -> None:
    adata = toy_cells(6)
    adata.varm["mine_groups"] = np.ones((adata.n_vars, 2))
    before = slots(adata)
    with pytest.raises(ValueError, match="mine_groups"):
        gfx.tl.screen_genes(adata, model=toy_model, genes="TOY90", controls=None, key_added="mine")
    assert slots(adata) == before


@pytest.mark.parametrize("how", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore::UserWarning:zarr", "ignore::UserWarning:anndata")
def test_files_keep_a_screen_and_its_store_stays_readable(
    toy_cells: ToyCells, toy_model: Model, screen: Screen, tmp_path: Path, how: str
) -> None:
    found = screen(toy_cells(12), toy_model, stored=True, controls="baselines", **STATES)
    path = tmp_path / f"cells.{how}"
    getattr(found.adata, f"write_{how}")(path)
    read = ad.read_h5ad(path) if how == "h5ad" else ad.read_zarr(path)
    for measure in ("shift", "toward"):
        stored = gfx.get.screen_cells(read, found.store, measure=measure)
        assert (stored != gfx.get.screen_cells(found.adata, found.store, measure=measure)).nnz == 0
        assert stored.nnz > 100
    pd.testing.assert_frame_equal(read.varm["gfx_screen"], found.table)
    pd.testing.assert_frame_equal(gfx.get.screen_df(read), gfx.get.screen_df(found.adata))
    expected = found.adata.uns["gfx_screen"]["controls"]
    pd.testing.assert_frame_equal(
        read.uns["gfx_screen"]["controls"], expected, check_dtype=False, check_index_type=False
    )


def test_a_model_that_was_trained_anew_is_read_anew(
    toy_cells: ToyCells, toy_folder: Path, other_toy_folder: Path, screen: Screen
) -> None:
    """Networks are kept from block to block, but not beyond their file."""
    first = screen(toy_cells(3), gfx.models.load(other_toy_folder)).table
    shutil.copy(toy_folder / "model.safetensors", other_toy_folder / "model.safetensors")
    found = screen(toy_cells(3), gfx.models.load(other_toy_folder)).table
    pd.testing.assert_frame_equal(found, screen(toy_cells(3), gfx.models.load(toy_folder)).table)
    assert not np.allclose(found["shift_mean"], first["shift_mean"], equal_nan=True)


def test_a_line_says_what_was_done(
    toy_cells: ToyCells, toy_model: Model, screen: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    found = screen(toy_cells(20), toy_model, controls="random_weights")
    printed = capsys.readouterr().out
    n = found.table["n_cells"].sum()
    assert f"{n:,} deletions in 20 cells with 'toy': added 'gfx_screen'" in printed
    value = found.controls["value"]["random_weights", "spearman"]
    assert f"Spearman with random weights {value:+.2f}, with rank" in printed


# --- errors ---------------------------------------------------------------------------------------------------------

ERRORS = {
    "method": ({"method": "fast"}, ValueError, r"`method` is one of \['exact', 'first_order'\], found 'fast'"),
    "positions": ({"positions": "move"}, ValueError, r"`positions` is one of \['close', 'keep'\], found 'move'"),
    "controls": ({"controls": ["twin"]}, ValueError, r"`controls` is one of .*'random_weights', .*found 'twin'"),
    "random sets": ({"controls": "random_sets"}, ValueError, "`controls` is one of .*found 'random_sets'"),
    "generator": ({"rng": np.random.default_rng(0)}, TypeError, "`rng` is a whole number"),
    "start alone": ({"groupby": "cell_type", "start": "a"}, ValueError, "`groupby`, `start` and `goal` go together"),
    "goal alone": ({"goal": "a"}, ValueError, "`groupby`, `start` and `goal` go together"),
    "no such state": (STATES | {"goal": "x"}, KeyError, "Did not find goal='x'"),
    "one state": (STATES | {"goal": "b"}, ValueError, "`start` and `goal` are both 'b'"),
    "no such gene": ({"genes": ["TOY90", "TOYX"]}, ValueError, r"The model does not know \['TOYX'\]"),
    "no gene": ({"genes": []}, ValueError, "`genes` is empty"),
    "a gene twice": ({"genes": ["TOY90", "TOY90"]}, ValueError, "same perturbation; give it once"),
    "genes together": ({"genes": [("TOY1", "TOY2")]}, ValueError, "for genes together, call `gfx.tl.delete_genes"),
    "estimates of means of shifts": (
        {"pooling": "genes", "method": "first_order"},
        ValueError,
        "`pooling='genes'` has no estimates",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong_and_write_nothing(
    cells: ad.AnnData, toy_model: Model, slots: Callable[[ad.AnnData], dict[str, Any]], name: str
) -> None:
    arguments, error, text = ERRORS[name]
    before = slots(cells)
    with pytest.raises(error, match=text):
        gfx.tl.screen_genes(cells, model=toy_model, **arguments)
    assert slots(cells) == before


@pytest.mark.parametrize(
    ("n_probes", "error"), [(-1, ValueError), (2.5, TypeError), (True, TypeError), ("many", TypeError)]
)
def test_a_number_of_probes_is_a_whole_number(n_probes: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="`n_probes`"):
        gfx.tl.FirstOrder(n_probes=n_probes)
