"""A screen is every deletion by itself: against `tl.delete_genes`, and sums over cells against its own layers."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from gfx.tl._screen_run import CANDIDATES, CELLS_PER_CANDIDATE, FEWEST_CELLS
from safetensors.numpy import load_file, save_file
from scipy import sparse, stats

import gfx
from gfx._core.screening import NEIGHBOURS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import ToyCells

    from gfx.models import Model

# The toy cells' states are drawn at random, and most of the time nothing tells them apart.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

STATES = {"groupby": "cell_type", "start": "b", "goal": "a"}
FIRST_ORDER = {"method": "first_order", "n_probes": 2}


def dense(adata: ad.AnnData, layer: str = "gfx_screen") -> np.ndarray:
    """Effects by cell and gene; NaN where no gene was deleted."""
    found = adata.layers[layer].tocoo()
    out = np.full(adata.shape, np.nan)
    out[found.row, found.col] = found.data
    return out


@pytest.fixture
def other_folder(toy_folder: Path, tmp_path: Path) -> Path:
    """The toy model with weights in another order, so that it has learnt something else."""
    folder = shutil.copytree(toy_folder, tmp_path / "other")
    rng = np.random.default_rng(0)
    weights = load_file(folder / "model.safetensors")
    save_file({name: rng.permuted(value) for name, value in weights.items()}, folder / "model.safetensors")
    return folder


def screen(adata: ad.AnnData, model: Model, **arguments: Any) -> ad.AnnData:
    return gfx.tl.screen_genes(adata, model=model, copy=True, **({"null": None, "layers": True} | arguments))


@pytest.fixture(scope="module")
def screened(toy_cells: ToyCells, toy_model: Model) -> ad.AnnData:
    """24 cells in three groups, exactly, with everything that is written."""
    return screen(toy_cells(24), toy_model, groupby="cell_type", null="random_weights")


@pytest.fixture(scope="module")
def estimated(toy_cells: ToyCells, toy_model: Model) -> ad.AnnData:
    """16 of 48 cells on their way to another state, by derivatives."""
    return screen(toy_cells(48), toy_model, **STATES, **FIRST_ORDER, null="random_weights")


# --- one gene at a time -----------------------------------------------------------------------------------------------


def some_genes(adata: ad.AnnData, model: Model) -> list[str]:
    """Genes that stand first, somewhere, and last in cells of the state b."""
    gfx.pp.tokenize(adata, model=model)
    tokens, lengths = adata.obsm["gfx_tokens"], adata.obs["gfx_tokens_n"].to_numpy()
    first, last = model.vocabulary.first_gene, model.vocabulary.n_specials - model.vocabulary.first_gene + 1
    chosen = [tokens[1, first], tokens[4, lengths[4] // 2], tokens[1, lengths[1] - last], tokens[4, first + 2]]
    return list(dict.fromkeys(str(model.vocabulary.symbols[token]) for token in chosen))


@pytest.mark.parametrize("operator", ["hold", "delete"])
@pytest.mark.parametrize("pooling", ["auto", "mean", "genes"])
def test_every_deletion_is_that_of_one_gene(toy_cells: ToyCells, any_model: Model, operator: str, pooling: str) -> None:
    adata = toy_cells(18)
    genes = some_genes(adata, any_model)
    assert len(genes) >= 3
    given = {"model": any_model, "operator": operator, "null": None, "hidden_layer": -1} | STATES
    gfx.tl.screen_genes(adata, layers=True, pooling=pooling, **given)
    if pooling == "auto":
        pooling = "cls" if any_model.vocabulary.has_cls else "mean"
    gfx.tl.delete_genes(adata, genes, pooling=pooling, **given)
    at = adata.var_names.get_indexer(genes)
    is_start = (adata.obs["cell_type"] == "b").to_numpy()
    shift = np.where(is_start[:, None], adata.obsm["gfx_delete"], np.nan)
    assert (~np.isnan(shift)).sum() >= 8
    np.testing.assert_allclose(dense(adata)[:, at], shift, rtol=1e-3, atol=2e-7)
    toward = adata.obsm["gfx_delete_states"][:, :, 0]  # the goal is the first state
    toward = np.where(is_start[:, None], toward, np.nan)
    np.testing.assert_allclose(dense(adata, "gfx_screen_toward")[:, at], toward, rtol=1e-3, atol=5e-7)
    assert np.nanmax(np.abs(toward)) > 1e-4


def test_layers_hold_every_gene_that_a_cell_has(screened: ad.AnnData, toy_model: Model) -> None:
    """Nothing is stored where no gene was deleted; nothing is missing where one was."""
    layer = screened.layers["gfx_screen"]
    assert layer.format == "csr"
    assert layer.dtype == np.float32
    assert layer.has_canonical_format
    tokens = gfx.pp.tokenize(screened, model=toy_model, copy=True).obsm["gfx_tokens"]
    symbols = toy_model.vocabulary.symbols
    for cell, row in enumerate(tokens):
        expected = {str(symbols[token]) for token in row if symbols[token]}
        stored = layer.indices[layer.indptr[cell] : layer.indptr[cell + 1]]
        assert set(screened.var_names[stored]) == expected
    assert np.isfinite(layer.data).all()
    assert (layer.data > 0).mean() > 0.99
    unknown = ~screened.var_names.str.startswith("TOY")
    assert screened.X[:, unknown].nnz > 0
    assert layer[:, unknown].nnz == 0


def test_a_gene_in_two_columns_is_screened_once(toy_cells: ToyCells, toy_model: Model) -> None:
    adata = toy_cells(6)
    gene = some_genes(adata, toy_model)[0]
    adata.var_names = [f"probe{at}" if name == "UNKNOWN1" else name for at, name in enumerate(adata.var_names)]
    doubled = adata.copy()
    column = adata.var_names.get_loc(gene)
    other = np.flatnonzero(adata.var_names.str.startswith("probe"))[0]
    doubled.var["names"] = adata.var_names.to_numpy(dtype=object)
    doubled.var.loc[doubled.var_names[other], "names"] = f"OLD{gene}"
    doubled.X = sparse.csr_matrix(adata.X.multiply(np.arange(adata.n_vars) != other))
    gfx.pp.tokenize(doubled, model=toy_model, gene_ids="names")
    gfx.tl.screen_genes(doubled, model=toy_model, layers=True, null=None)
    first, second = sorted([column, other])
    assert doubled.layers["gfx_screen"][:, first].nnz > 0
    assert doubled.layers["gfx_screen"][:, second].nnz == 0
    shift = doubled.varm["gfx_screen"]["shift_mean"]
    assert shift.iloc[first] == shift.iloc[second] > 0


# --- over cells -------------------------------------------------------------------------------------------------------


def naive_excess(shift: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Less the median of the genes within 20 places in the order of the cell; the first and the last 20 left out."""
    out = np.full(shift.shape, np.nan)
    for row, cell, rank in zip(out, shift, ranks, strict=True):
        order = [at for at in np.argsort(rank, kind="stable") if not np.isnan(cell[at])]
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


def test_table_of_genes_is_over_cells(screened: ad.AnnData, toy_model: Model) -> None:
    table, shift, ranks = screened.varm["gfx_screen"], dense(screened), ranks_of(screened, toy_model)
    assert table.index.equals(screened.var_names)
    assert table.columns.tolist() == [
        *("n_cells", "rank_mean", "shift_mean", "shift_sd", "shift_excess"),
        *("random_weights_shift_mean", "random_weights_shift_excess", "detection", "expression_mean"),
    ]
    assert {str(dtype) for dtype in table.dtypes} == {"int32", "float32"}
    assert table["n_cells"].dtype == np.int32
    by_gene = pd.DataFrame(shift, columns=screened.var_names)
    assert table["n_cells"].tolist() == by_gene.count().tolist()
    np.testing.assert_allclose(table["shift_mean"], by_gene.mean(), rtol=1e-5)
    np.testing.assert_allclose(table["shift_sd"], by_gene.std(ddof=0), rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(table["rank_mean"], pd.DataFrame(ranks).mean(), rtol=1e-5)
    known = by_gene.count() > 0
    np.testing.assert_allclose(table.loc[known, "detection"], by_gene.count()[known] / 24, rtol=1e-6)
    assert table.loc[~screened.var_names.str.startswith("TOY")].drop(columns="n_cells").isna().all(axis=None)


def test_excess_is_beside_neighbours_in_the_same_cells(toy_cells: ToyCells, toy_model: Model) -> None:
    """In cells of one gene more than two windows, one gene has neighbours on both sides."""
    adata = screen(toy_cells(24), toy_model)
    excess = naive_excess(dense(adata), ranks_of(adata, toy_model))
    table = adata.varm["gfx_screen"]
    inner = (~np.isnan(excess)).sum(axis=0) == table["n_cells"]
    inner &= table["n_cells"] > 0
    assert inner.sum() >= 1
    np.testing.assert_allclose(table.loc[inner, "shift_excess"], np.nanmean(excess[:, inner], axis=0), atol=1e-7)


def test_groups_are_what_each_gives_alone(screened: ad.AnnData, toy_cells: ToyCells, toy_model: Model) -> None:
    values, noted = screened.varm["gfx_screen_groups"], screened.uns["gfx_screen"]
    assert values.dtype == np.float32
    assert values.shape == (screened.n_vars, 3, len(noted["columns"]))
    assert list(noted["groups"]) == ["a", "b", "c"]
    assert list(noted["columns"]) == screened.varm["gfx_screen"].columns[:7].tolist()
    for at, name in enumerate("abc"):
        adata = toy_cells(24)
        gfx.tl.screen_genes(adata, model=toy_model, mask_obs=(adata.obs["cell_type"] == name).to_numpy())
        expected = adata.varm["gfx_screen"][list(noted["columns"])]
        np.testing.assert_allclose(values[:, at], expected.to_numpy(dtype=np.float32), rtol=1e-4, atol=1e-7)


def test_cells_without_a_group_are_in_none(toy_cells: ToyCells, toy_model: Model) -> None:
    adata = toy_cells(12)
    adata.obs["cell_type"] = adata.obs["cell_type"].where(np.arange(12) >= 6)
    found = screen(adata, toy_model, groupby="cell_type")
    per_group = found.varm["gfx_screen_groups"][:, :, 0].sum(axis=1)
    in_groups = (~np.isnan(dense(found)[6:])).sum(axis=0)
    assert per_group.tolist() == in_groups.tolist()
    assert found.varm["gfx_screen"]["n_cells"].sum() > in_groups.sum()


# --- states -----------------------------------------------------------------------------------------------------------


def test_with_a_goal_cells_of_the_start_are_screened(toy_cells: ToyCells, toy_model: Model) -> None:
    adata = screen(toy_cells(48), toy_model, **STATES, null="random_weights")
    is_start = (adata.obs["cell_type"] == "b").to_numpy()
    toward = dense(adata, "gfx_screen_toward")
    assert adata.layers["gfx_screen_toward"].dtype == np.float32
    np.testing.assert_array_equal(np.isnan(toward), np.isnan(dense(adata)))
    assert np.isnan(toward[~is_start]).all()
    assert not np.isnan(toward[is_start]).all(axis=1).any()
    table = adata.varm["gfx_screen"]
    np.testing.assert_allclose(table["toward_mean"], pd.DataFrame(toward).mean(), rtol=1e-4, atol=1e-8)
    expected = ["toward_mean", "toward_sd", "toward_excess", "random_weights_toward_mean", "logfc"]
    assert set(expected) <= set(table)
    assert table["logfc"].notna().sum() > 100
    assert "gfx_screen_groups" not in adata.varm
    assert "groups" not in adata.uns["gfx_screen"]
    params = adata.uns["gfx_screen"]["params"]
    assert {name: params[name] for name in STATES} == STATES
    assert params["n_probes"] == 8  # of the network with random weights
    controls = adata.uns["gfx_screen"]["controls"]
    (axis,) = controls[controls["control"] == "state_axis"].itertuples()
    assert (axis.measure, axis.statistic) == ("toward", "auc")
    assert 0 <= axis.value <= 1


def test_states_that_cannot_be_told_apart_are_warned_of(toy_cells: ToyCells, toy_model: Model) -> None:
    with pytest.warns(UserWarning, match=r"Held-out cells of 'b' and 'a'"):
        screen(toy_cells(24), toy_model, **STATES)


# --- which genes, which cells -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, FIRST_ORDER], ids=["exact", "first order"])
def test_some_genes_alone_do_what_they_do_among_all(
    screened: ad.AnnData, toy_cells: ToyCells, toy_model: Model, arguments: dict[str, Any]
) -> None:
    whole = screened if not arguments else screen(toy_cells(24), toy_model, **arguments)
    chosen = ["TOY90", "OLDTOY48", "ENSG00000000165"]  # a symbol, an alias, an id
    found = screen(toy_cells(24), toy_model, genes=chosen, **arguments)
    is_chosen = found.var_names.isin(["TOY90", "TOY48", "TOY165"])
    assert (found.varm["gfx_screen"]["n_cells"] > 0).tolist() == is_chosen.tolist()
    np.testing.assert_allclose(dense(found)[:, is_chosen], dense(whole)[:, is_chosen], rtol=1e-4, atol=1e-7)
    assert found.varm["gfx_screen"]["shift_excess"].isna().all()  # three genes are no neighbourhood
    assert gfx.get.screen_df(found, min_cells=1)["shift_z"].isna().all()


def test_one_gene_by_its_name(toy_cells: ToyCells, toy_model: Model) -> None:
    found = screen(toy_cells(6), toy_model, genes="TOY90")
    assert found.var_names[found.varm["gfx_screen"]["n_cells"] > 0].tolist() == ["TOY90"]


@pytest.mark.parametrize("arguments", [{}, FIRST_ORDER], ids=["exact", "first order"])
def test_a_cell_gives_the_same_among_others_and_in_any_order(
    toy_cells: ToyCells, toy_model: Model, arguments: dict[str, Any]
) -> None:
    adata = toy_cells(24)
    whole = dense(screen(adata, toy_model, **arguments))
    some = np.array([17, 2, 9])
    np.testing.assert_allclose(dense(screen(adata[some], toy_model, **arguments)), whole[some], rtol=1e-4, atol=1e-7)
    masked = screen(adata, toy_model, mask_obs=np.isin(np.arange(24), some), **arguments)
    np.testing.assert_allclose(dense(masked)[some], whole[some], rtol=1e-4, atol=1e-7)
    assert masked.layers["gfx_screen"].nnz == (~np.isnan(whole[some])).sum()
    order = np.random.default_rng(0).permutation(24)
    shuffled = screen(adata[order], toy_model, **arguments)
    np.testing.assert_allclose(dense(shuffled), whole[order], rtol=1e-4, atol=1e-7)


def test_a_cell_of_one_gene_has_nothing_left_to_compare(toy_cells: ToyCells, toy_model: Model) -> None:
    adata = toy_cells(4)
    counts = adata.X.toarray()
    counts[0] = np.arange(adata.n_vars) == 3
    adata.X = sparse.csr_matrix(counts)
    found = screen(adata, toy_model)
    assert found.layers["gfx_screen"][0].nnz == 0
    assert found.layers["gfx_screen"][1].nnz > 10
    with pytest.raises(ValueError, match="No cell that is screened has any of the genes and another one beside it"):
        screen(adata, toy_model, mask_obs=np.arange(4) == 0)
    with pytest.raises(ValueError, match="No cell that is screened has any of the genes"):
        screen(adata[:, adata.var_names != "TOY7"], toy_model, genes=["TOY7"])


# --- what it is held against ------------------------------------------------------------------------------------------


def test_without_a_null_nothing_else_is_run(toy_cells: ToyCells, toy_model: Model) -> None:
    adata = screen(toy_cells(24), toy_model)
    assert not [name for name in adata.varm["gfx_screen"] if "random_weights" in name]
    noted = adata.uns["gfx_screen"]
    assert "random_weights" not in set(noted["controls"]["control"])
    assert "no p-value" in noted["note"]
    assert noted["params"].get("null") is None
    assert noted["approx"] is False


def test_random_weights_are_of_a_network_that_has_learnt_nothing(
    screened: ad.AnnData, toy_cells: ToyCells, toy_model: Model, other_folder: Path
) -> None:
    """Another model of the same shape has the same; another seed has not."""
    other = gfx.models.load(other_folder)
    columns = ["random_weights_shift_mean", "random_weights_shift_excess"]
    expected = screened.varm["gfx_screen"]
    found = screen(toy_cells(24), other, null="random_weights").varm["gfx_screen"]
    pd.testing.assert_frame_equal(found[columns], expected[columns])
    assert not np.allclose(found["shift_mean"], expected["shift_mean"], rtol=0.1, equal_nan=True)
    found = screen(toy_cells(24), toy_model, null="random_weights", rng=1).varm["gfx_screen"]
    assert not np.allclose(found[columns], expected[columns], rtol=0.1, equal_nan=True)
    np.testing.assert_array_equal(found["shift_mean"], expected["shift_mean"])
    assert "a network with random weights" in screened.uns["gfx_screen"]["note"]


def test_controls_are_rankings_of_genes(screened: ad.AnnData) -> None:
    table = screened.varm["gfx_screen"].query("n_cells >= @FEWEST_CELLS")
    controls = screened.uns["gfx_screen"]["controls"].set_index(["control", "statistic"])
    assert controls["measure"].unique().tolist() == ["shift"]
    columns = {"random_weights": "random_weights_shift_mean", "rank": "rank_mean", "expression": "expression_mean"}
    for control, column in (columns | {"detection": "detection"}).items():
        expected = stats.spearmanr(table["shift_mean"], table[column]).statistic
        assert controls.loc[(control, "spearman"), "value"] == pytest.approx(expected, abs=1e-6), control
        assert controls.loc[(control, "spearman"), "n"] == len(table)
    assert not {"exact", "state_axis"} & set(controls.index.get_level_values(0))


@pytest.mark.parametrize("arguments", [{}, FIRST_ORDER], ids=["exact", "first order"])
def test_few_cells_tell_of_genes_but_not_of_rankings(
    toy_cells: ToyCells, toy_model: Model, arguments: dict[str, Any]
) -> None:
    adata = screen(toy_cells(3), toy_model, null="random_weights", **arguments)
    assert adata.varm["gfx_screen"]["shift_mean"].notna().sum() > 50
    controls = adata.uns["gfx_screen"]["controls"]
    assert controls.loc[controls["control"] != "exact", "value"].isna().all()
    if arguments:
        assert (adata.varm["gfx_screen"]["exact_n_cells"] == 0).all()


# --- estimates --------------------------------------------------------------------------------------------------------


def test_estimates_stand_beside_exact_results(estimated: ad.AnnData, toy_cells: ToyCells, toy_model: Model) -> None:
    noted = estimated.uns["gfx_screen"]
    assert noted["approx"] is True
    assert (noted["params"]["method"], noted["params"]["n_probes"]) == ("first_order", 2)
    exact = screen(toy_cells(48), toy_model, **STATES)
    table, of_exact = estimated.varm["gfx_screen"], dense(exact, "gfx_screen_toward")
    np.testing.assert_array_equal(table["n_cells"], exact.varm["gfx_screen"]["n_cells"])
    done = table["exact_n_cells"] > 0
    assert table["exact_n_cells"].dtype == np.int32
    assert 0 < done.sum() <= CANDIDATES
    assert (table.loc[done, "exact_n_cells"] == table.loc[done, "n_cells"].clip(upper=CELLS_PER_CANDIDATE)).all()
    assert (table.loc[done, "n_cells"] >= FEWEST_CELLS).all()
    assert table.loc[~done, ["exact_shift_mean", "exact_toward_mean"]].isna().all(axis=None)
    # These are fewer cells than there may be: all that the candidates have.
    for measure in ("shift", "toward"):
        np.testing.assert_allclose(
            table.loc[done, f"exact_{measure}_mean"],
            exact.varm["gfx_screen"].loc[done, f"{measure}_mean"],
            rtol=1e-3,
            atol=1e-7,
        )
    found = dense(estimated, "gfx_screen_toward")
    there = ~np.isnan(found)
    assert stats.spearmanr(found[there], of_exact[there]).statistic > 0.9


def test_candidates_are_done_exactly_in_some_of_their_cells(toy_cells: ToyCells, toy_model: Model) -> None:
    table = screen(toy_cells(48), toy_model, **FIRST_ORDER).varm["gfx_screen"].query("exact_n_cells > 0")
    assert (table["n_cells"] > 20).any()
    assert (table["exact_n_cells"] == table["n_cells"].clip(upper=20)).all()
    assert stats.spearmanr(table["exact_shift_mean"], table["shift_mean"]).statistic > 0.8


def test_agreement_of_estimates_is_told(estimated: ad.AnnData) -> None:
    controls = estimated.uns["gfx_screen"]["controls"]
    exact = controls[controls["control"] == "exact"].set_index(["measure", "statistic"])
    assert exact.index.tolist() == [
        *(("shift", "spearman"), ("shift", "recall"), ("toward", "spearman"), ("toward", "recall"))
    ]
    assert (exact["n"] == 4).all()
    assert exact.loc[("toward", "spearman"), "value"] > 0.9
    assert 0 < exact.loc[("shift", "spearman"), "value"] < 1


def test_estimates_that_do_not_agree_are_warned_of(toy_cells: ToyCells, toy_model: Model) -> None:
    """A gene that goes moves all behind it by a whole place, which is far for a table of positions drawn at random."""
    with pytest.warns(UserWarning, match=r"agree with exact results only at Spearman .*Use `method='exact'`"):
        screen(toy_cells(24), toy_model, operator="delete", **STATES, **FIRST_ORDER)


def test_more_probes_are_nearer(toy_cells: ToyCells, toy_model: Model) -> None:
    def spearman(n_probes: int) -> float:
        adata = screen(toy_cells(24), toy_model, method="first_order", n_probes=n_probes)
        controls = adata.uns["gfx_screen"]["controls"].set_index(["control", "statistic"])
        return controls.loc[("exact", "spearman"), "value"]

    assert spearman(1) < spearman(15) > 0.9
    assert spearman(15) == spearman(1000)  # there are no more directions


def test_no_probes_leave_shifts_out(toy_cells: ToyCells, toy_model: Model) -> None:
    adata = screen(toy_cells(48), toy_model, method="first_order", n_probes=0, **STATES)
    assert "gfx_screen_toward" in adata.layers
    assert "gfx_screen" not in adata.layers
    table = adata.varm["gfx_screen"]
    assert not [name for name in table if "shift" in name and not name.startswith("exact_")]
    assert table["n_cells"].max() >= FEWEST_CELLS
    assert gfx.get.screen_df(adata)["toward_z"].notna().any()
    with pytest.raises(ValueError, match="`n_probes=0` measures no shifts by derivatives"):
        screen(toy_cells(6), toy_model, method="first_order", n_probes=0)
    with pytest.raises(ValueError, match="`n_probes=0` measures no shifts by derivatives"):
        screen(toy_cells(6), toy_model, n_probes=0, null="random_weights")


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_same_call_gives_the_same(
    toy_cells: ToyCells, toy_model: Model, slots: Callable[[ad.AnnData], dict[str, Any]]
) -> None:
    given = {"groupby": "cell_type", "null": "random_weights", **FIRST_ORDER}
    once, again = (screen(toy_cells(24), toy_model, **given) for _ in range(2))
    assert slots(once) == slots(again)
    other = screen(toy_cells(24), toy_model, **given, rng=1)
    assert not np.allclose(dense(other), dense(once), rtol=0.1, equal_nan=True)


def test_what_an_earlier_call_left_goes(toy_cells: ToyCells, toy_model: Model) -> None:
    adata = toy_cells(24)
    given = {"model": toy_model, "null": None, "genes": ["TOY90", "TOY48"]}
    gfx.tl.screen_genes(adata, layers=True, **STATES, **given)
    assert set(adata.layers) == {"gfx_screen", "gfx_screen_toward"}
    gfx.tl.screen_genes(adata, layers=True, groupby="cell_type", **given)
    assert set(adata.layers) == {"gfx_screen"}
    assert "gfx_screen_groups" in adata.varm
    gfx.tl.screen_genes(adata, **given)
    assert not set(adata.layers)
    assert set(adata.varm) == {"gfx_screen"}
    assert set(adata.uns["gfx_screen"]) == {"params", "approx", "controls", "note"}


def test_what_is_the_user_s_own_stays(toy_cells: ToyCells, toy_model: Model) -> None:
    adata = toy_cells(6)
    adata.layers["mine"], adata.layers["mine_toward"] = adata.X.copy(), adata.X.copy()
    adata.varm["mine_groups"] = np.ones((adata.n_vars, 2))
    gfx.tl.screen_genes(adata, model=toy_model, genes="TOY90", null=None, key_added="mine")
    assert set(adata.layers) == {"mine", "mine_toward"}
    assert (adata.layers["mine"] != adata.X).nnz == 0
    assert set(adata.varm) == {"mine", "mine_groups"}


@pytest.mark.parametrize("how", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore::UserWarning:zarr", "ignore::UserWarning:anndata")
def test_files_keep_a_screen_towards_a_state(
    estimated: ad.AnnData, slots: Callable[[ad.AnnData], dict[str, Any]], tmp_path, how: str
) -> None:
    path = tmp_path / f"cells.{how}"
    getattr(estimated, f"write_{how}")(path)
    read = ad.read_h5ad(path) if how == "h5ad" else ad.read_zarr(path)
    for layer in ("gfx_screen", "gfx_screen_toward"):
        np.testing.assert_array_equal(dense(read, layer), dense(estimated, layer))
        assert read.layers[layer].dtype == np.float32
    pd.testing.assert_frame_equal(read.varm["gfx_screen"], estimated.varm["gfx_screen"])
    pd.testing.assert_frame_equal(gfx.get.screen_df(read), gfx.get.screen_df(estimated))
    pd.testing.assert_frame_equal(
        gfx.get.screen_controls_df(read), gfx.get.screen_controls_df(estimated), check_dtype=False
    )


def test_a_model_that_was_trained_anew_is_read_anew(toy_cells: ToyCells, toy_folder: Path, other_folder: Path) -> None:
    """Networks are kept from block to block, but not beyond their file."""
    after = dense(screen(toy_cells(3), gfx.models.load(other_folder)))
    shutil.copy(toy_folder / "model.safetensors", other_folder / "model.safetensors")
    found = dense(screen(toy_cells(3), gfx.models.load(other_folder)))
    np.testing.assert_array_equal(found, dense(screen(toy_cells(3), gfx.models.load(toy_folder))))
    assert not np.allclose(found, after, equal_nan=True)


def test_says_what_was_done(toy_cells: ToyCells, toy_model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    adata = screen(toy_cells(24), toy_model, null="random_weights")
    told = capsys.readouterr().out
    n = adata.layers["gfx_screen"].nnz
    assert f"{n:,} deletions in 24 cells with 'toy': added 'gfx_screen'" in told
    controls = adata.uns["gfx_screen"]["controls"].set_index(["control", "statistic"])["value"]
    assert f"with a network of random weights {controls['random_weights', 'spearman']:+.2f} (shift)" in told


# --- errors -----------------------------------------------------------------------------------------------------------

ERRORS = {
    "method": ({"method": "fast"}, ValueError, r"`method` is one of \['exact', 'first_order'\], found 'fast'"),
    "operator": ({"operator": "move"}, ValueError, r"`operator` is one of \['hold', 'delete'\], found 'move'"),
    "null": ({"null": 100}, ValueError, r"`null` is one of \['random_weights', None\], found 100"),
    "probes": ({"n_probes": -1}, ValueError, "`n_probes` is a number of random directions, found -1"),
    "half a probe": ({"n_probes": 2.5}, ValueError, "`n_probes` is a number of random directions, found 2.5"),
    "generator": ({"rng": np.random.default_rng(0)}, TypeError, "`rng` is a whole number"),
    "start alone": ({"groupby": "cell_type", "start": "a"}, ValueError, "`groupby`, `start` and `goal` go together"),
    "goal alone": ({"goal": "a"}, ValueError, "`groupby`, `start` and `goal` go together"),
    "no such state": (STATES | {"goal": "x"}, KeyError, "Did not find goal='x'"),
    "one state": (STATES | {"goal": "b"}, ValueError, "`start` and `goal` are both 'b'"),
    "no such gene": ({"genes": ["TOY90", "TOYX"]}, ValueError, r"The model does not know \['TOYX'\]"),
    "no gene": ({"genes": []}, ValueError, "`genes` is empty"),
    "a gene twice": ({"genes": ["TOY90", "TOY90"]}, ValueError, "same perturbation; give it once"),
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


def test_genes_together_are_sent_to_where_they_belong(toy_cells: ToyCells, toy_model: Model) -> None:
    with pytest.raises(ValueError, match=r"one at a time; for genes together, call `gfx.tl.delete_genes"):
        screen(toy_cells(6), toy_model, genes=[("TOY1", "TOY2")])
