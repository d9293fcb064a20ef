"""Tables of a screen, against what `tl.screen_genes` wrote and the statistics they are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import gfx
from gfx._core.screening import standing_out

if TYPE_CHECKING:
    import anndata as ad
    from tests.conftest import ToyCells

    from gfx.models import Model

# The toy cells' states are drawn at random, and most of the time nothing tells them apart.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out cells of")

STATES = {"groupby": "cell_type", "start": "b", "goal": "a"}

STATISTICS = ["mean", "sd", "excess", "low", "high", "z", "p", "fdr"]
SHIFT = [f"shift_{name}" for name in STATISTICS]
TOWARD = [f"toward_{name}" for name in STATISTICS]


@pytest.fixture(scope="module")
def grouped(toy_cells: ToyCells, toy_model: Model) -> ad.AnnData:
    adata = toy_cells(48)
    adata.var["gene_name"] = [f"name of {name}" for name in adata.var_names]
    gfx.tl.screen_genes(adata, model=toy_model, groupby="cell_type")
    return adata


@pytest.fixture(scope="module")
def with_goal(toy_cells: ToyCells, toy_model: Model) -> ad.AnnData:
    adata = toy_cells(48)
    gfx.tl.screen_genes(
        adata, model=toy_model, method=gfx.tl.FirstOrder(n_probes=2), positions="keep", key_added="mine", **STATES
    )
    return adata


@pytest.fixture(scope="module")
def alone(toy_cells: ToyCells, toy_model: Model) -> ad.AnnData:
    adata = toy_cells(24)
    gfx.tl.screen_genes(adata, model=toy_model, controls="baselines")
    return adata


def test_columns(grouped: ad.AnnData, with_goal: ad.AnnData, alone: ad.AnnData) -> None:
    first, last = ["gene", "n_cells", "rank_mean"], ["detection", "expression_mean"]
    assert [*gfx.get.screen_df(grouped)] == [*first, *SHIFT, "random_weights_shift_mean", *last]
    assert [*gfx.get.screen_df(grouped, "a", min_cells=5)] == [*first, *SHIFT, "random_weights_shift_mean"]
    random = ["random_weights_shift_mean", "random_weights_toward_mean"]
    exact = ["exact_n_cells", "exact_shift_mean", "exact_toward_mean"]
    assert [*gfx.get.screen_df(with_goal, key="mine")] == [*first, *SHIFT, *TOWARD, *random, *last, "logfc", *exact]
    assert [*gfx.get.screen_df(alone)] == [*first, *SHIFT[:-2], *last]


def test_rows_are_the_genes_that_enough_cells_have(grouped: ad.AnnData) -> None:
    stored = grouped.varm["gfx_screen"]
    for min_cells in (1, 10, 30):
        table = gfx.get.screen_df(grouped, min_cells=min_cells)
        assert set(table["gene"]) == set(grouped.var_names[stored["n_cells"] >= min_cells])
        assert table.index.tolist() == list(range(len(table)))
        found = table.set_index("gene")
        columns = [name for name in stored if name in found]
        pd.testing.assert_frame_equal(found[columns], stored.loc[found.index, columns], check_names=False)
    assert len(gfx.get.screen_df(grouped)) == (stored["n_cells"] >= 10).sum()
    assert len(gfx.get.screen_df(grouped, min_cells=1000)) == 0


def test_the_gene_that_stands_out_most_comes_first(grouped: ad.AnnData, with_goal: ad.AnnData) -> None:
    table = gfx.get.screen_df(grouped)
    assert table["shift_z"].is_monotonic_decreasing
    assert not table["shift_mean"].is_monotonic_decreasing
    table = gfx.get.screen_df(with_goal, key="mine")
    assert table["toward_z"].is_monotonic_decreasing
    assert table["toward_z"].iloc[0] > 0 > table["toward_z"].iloc[-1]
    assert not table["shift_z"].is_monotonic_decreasing


def test_where_no_z_is_known_the_order_is_that_of_effects(toy_cells: ToyCells, toy_model: Model) -> None:
    adata = toy_cells(24)
    gfx.tl.screen_genes(adata, model=toy_model, genes=["TOY90", "TOY48", "TOY165", "TOY171"], controls=None)
    table = gfx.get.screen_df(adata, min_cells=1)
    assert len(table) == 4
    assert table[["shift_z", "shift_low", "shift_high"]].isna().all(axis=None)
    assert table["shift_mean"].is_monotonic_decreasing


def test_z_and_band_compare_with_all_genes_in_ten_cells(grouped: ad.AnnData) -> None:
    table = gfx.get.screen_df(grouped)
    stored = grouped.varm["gfx_screen"]
    stored = stored[stored["n_cells"] >= 10]
    expected = standing_out(*(stored[name].to_numpy(float) for name in ("shift_excess", "rank_mean", "n_cells")))
    z, centre, spread = (pd.Series(one, index=stored.index)[table["gene"]].to_numpy() for one in expected)
    assert not np.isnan(z).any()
    np.testing.assert_allclose(table["shift_z"], z)
    np.testing.assert_allclose(table["shift_low"], centre - 3 * spread)
    np.testing.assert_allclose(table["shift_high"], centre + 3 * spread)
    beyond = (table["shift_excess"] < table["shift_low"]) | (table["shift_excess"] > table["shift_high"])
    assert (beyond == (table["shift_z"].abs() > 3)).all()


@pytest.mark.parametrize("group", [None, "a"])
def test_min_cells_filters_rows_and_changes_no_statistic(grouped: ad.AnnData, group: str | None) -> None:
    every = gfx.get.screen_df(grouped, group, min_cells=0).set_index("gene")
    untested = every["n_cells"] < 10
    assert 0 < untested.sum() < len(every)
    statistics = ["shift_low", "shift_high", "shift_z", "shift_p", "shift_fdr"]
    assert every.loc[untested, statistics].isna().all(axis=None)
    assert every.loc[~untested, statistics].notna().all(axis=None) == (group is None)  # too few genes in 16 cells
    for min_cells in (1, 10, 14, 20):
        table = gfx.get.screen_df(grouped, group, min_cells=min_cells)
        assert set(table["gene"]) == set(every.index[every["n_cells"] >= min_cells])
        pd.testing.assert_frame_equal(table.set_index("gene"), every.loc[table["gene"]])


def naive_p(z: float, random: np.ndarray) -> float:
    """As many as lie as far out on the same side, doubled, with z itself among them."""
    n = min((random >= z).sum(), (random <= z).sum())
    return min(1.0, 2 * (1 + n) / (len(random) + 1))


@pytest.mark.parametrize("measure", ["shift", "toward"])
def test_p_is_the_place_among_genes_of_a_network_with_random_weights(with_goal: ad.AnnData, measure: str) -> None:
    table = gfx.get.screen_df(with_goal, key="mine")
    stored = with_goal.varm["mine"].query("n_cells >= 10")
    columns = [f"random_weights_{measure}_excess", "rank_mean", "n_cells"]
    random = standing_out(*(stored[name].to_numpy(float) for name in columns))[0]
    expected = [naive_p(z, random) for z in table[f"{measure}_z"]]
    np.testing.assert_allclose(table[f"{measure}_p"], expected)
    np.testing.assert_allclose(table[f"{measure}_fdr"], stats.false_discovery_control(expected))
    assert table[f"{measure}_p"].nunique() > 5
    assert table[f"{measure}_p"].min() >= 2 / (len(table) + 1)


def test_a_gene_that_random_weights_never_move_so_far(grouped: ad.AnnData) -> None:
    """Planted: its p is the smallest there is, and one that moves as far with random weights is nothing special."""
    adata = grouped.copy()
    adata.varm["gfx_screen"] = stored = adata.varm["gfx_screen"].copy()
    common = stored.index[stored["n_cells"] >= 20]
    stored.loc[common[0], "shift_excess"] = 100
    table = gfx.get.screen_df(adata)
    assert table["gene"].iloc[0] == common[0]
    assert table["shift_p"].iloc[0] == pytest.approx(2 / (len(table) + 1))
    stored.loc[common[1:3], "random_weights_shift_excess"] = 1e6
    table = gfx.get.screen_df(adata)
    assert table["gene"].iloc[0] == common[0]
    assert table["shift_p"].iloc[0] == pytest.approx(2 * 3 / (len(table) + 1))


def test_groups(grouped: ad.AnnData) -> None:
    noted, values = grouped.uns["gfx_screen"], grouped.varm["gfx_screen_groups"]
    for at, name in enumerate("abc"):
        table = gfx.get.screen_df(grouped, name, min_cells=5).set_index("gene")
        expected = pd.DataFrame(values[:, at], index=grouped.var_names, columns=list(noted["columns"]))
        assert set(table.index) == set(expected.index[expected["n_cells"] >= 5])
        assert table["n_cells"].dtype == np.int32
        for column in ("n_cells", "shift_mean", "shift_excess", "rank_mean"):
            np.testing.assert_array_equal(table[column], expected.loc[table.index, column])
    with pytest.raises(KeyError, match=r"Did not find the group 'x'. Present: \['a', 'b', 'c'\]"):
        gfx.get.screen_df(grouped, "x")


def test_names_of_genes(grouped: ad.AnnData) -> None:
    expected = [f"name of {name}" for name in gfx.get.screen_df(grouped)["gene"]]
    assert gfx.get.screen_df(grouped, names="gene_name")["gene"].tolist() == expected
    with pytest.raises(KeyError, match="gene_nam"):
        gfx.get.screen_df(grouped, names="gene_nam")


def test_the_table_says_what_it_is(grouped: ad.AnnData, with_goal: ad.AnnData, alone: ad.AnnData) -> None:
    table = gfx.get.screen_df(with_goal, key="mine")
    assert (table.attrs["start"], table.attrs["goal"]) == ("b", "a")
    assert table.attrs["approx"] is True
    assert "random-weights model" in table.attrs["note"]
    assert gfx.get.screen_df(grouped).attrs["approx"] is False
    assert not {"start", "goal"} & set(gfx.get.screen_df(grouped).attrs)
    assert "no p-value" in gfx.get.screen_df(alone).attrs["note"]


def test_tables_are_copies(grouped: ad.AnnData) -> None:
    before = grouped.copy()
    for table in (
        gfx.get.screen_df(grouped, min_cells=1),
        gfx.get.screen_df(grouped, "a"),
        gfx.get.controls_df(grouped),
    ):
        for name in table:
            table[name] = 0
    pd.testing.assert_frame_equal(grouped.varm["gfx_screen"], before.varm["gfx_screen"])
    np.testing.assert_array_equal(grouped.varm["gfx_screen_groups"], before.varm["gfx_screen_groups"])
    pd.testing.assert_frame_equal(grouped.uns["gfx_screen"]["controls"], before.uns["gfx_screen"]["controls"])


def test_controls(grouped: ad.AnnData, with_goal: ad.AnnData) -> None:
    table = gfx.get.controls_df(grouped)
    assert [*table] == ["control", "measure", "statistic", "value", "n"]
    pd.testing.assert_frame_equal(table, grouped.uns["gfx_screen"]["controls"])
    table = gfx.get.controls_df(with_goal, key="mine")
    assert table["control"].unique().tolist() == [
        *("random_weights", "rank", "detection", "expression", "logfc", "exact", "state_axis")
    ]
    assert table["measure"].unique().tolist() == ["shift", "toward"]


def test_mudata(grouped: ad.AnnData, as_mudata) -> None:
    other = grouped[:, :5].copy()
    other.var_names = [f"other {name}" for name in other.var_names]
    mdata = as_mudata({"rna": grouped, "other": other})
    pd.testing.assert_frame_equal(gfx.get.screen_df(mdata, "b", mod="rna"), gfx.get.screen_df(grouped, "b"))
    pd.testing.assert_frame_equal(gfx.get.controls_df(mdata, mod="rna"), gfx.get.controls_df(grouped))


@pytest.mark.parametrize("get", ["screen_df", "controls_df"])
def test_without_a_result(toy_cells: ToyCells, with_goal: ad.AnnData, toy_model: Model, get: str) -> None:
    get = getattr(gfx.get, get)
    with pytest.raises(KeyError, match=r"Did not find a result of .*`gfx\.tl\.screen_genes` in `adata\.uns`"):
        get(toy_cells(6))
    pd.testing.assert_frame_equal(get(with_goal), get(with_goal, key="mine"))  # the only one
    adata = toy_cells(6)
    gfx.tl.attention(adata, model=toy_model, key_added="other")
    with pytest.raises(KeyError, match=r"written by `gfx.tl.attention`"):
        get(adata, key="other")
