"""What perturbed genes are held against: random sets, genes of all ranks, a random network, and no network."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import gfx

# The toy cells' states are drawn at random, and most of the time nothing tells them apart.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

GENES = ["TOY90", "TOY48", "TOY165", "TOY171", ("TOY90", "TOY48")]
STATES = {"groupby": "cell_type", "start": "b", "goal": "a"}
ALL_RANKS = "genes of all ranks"


@pytest.fixture(scope="module")
def perturbed(toy_cells, toy_model):
    """With random sets, under another name with states, and under a third with neither."""
    adata = toy_cells(48)
    gfx.tl.delete_genes(adata, GENES, model=toy_model, n_random=5)
    gfx.tl.delete_genes(adata, GENES, model=toy_model, n_random=5, key_added="states", donor_key="donor", **STATES)
    gfx.tl.delete_genes(adata, GENES, model=toy_model, controls="baselines", key_added="alone")
    gfx.tl.delete_genes(adata, GENES, model=toy_model, controls="baselines", key_added="states_alone", **STATES)
    return adata


# --- random sets ----------------------------------------------------------------------------------------------------

OF_SETS = ["perturbation", "genes", "n_cells", "rank_mean", "shift_mean", "difference"]
OF_EXCESS = ["on_shifts_difference", "on_vectors_difference"]


def test_random_sets(perturbed):
    table = gfx.get.random_sets_df(perturbed)
    stored = perturbed.uns["gfx_delete"]["random_sets"].reset_index(drop=True)
    pd.testing.assert_frame_equal(table, stored)
    assert table.columns.tolist() == [*OF_SETS, *OF_EXCESS]
    assert table["perturbation"].value_counts().to_dict() == dict.fromkeys([*GENES[:4], "TOY90+TOY48"], 5)
    assert table["n_cells"].between(1, 8).all()
    several = table["perturbation"] == "TOY90+TOY48"
    assert table.loc[several, OF_EXCESS].notna().all(axis=None)
    assert table.loc[~several, OF_EXCESS].isna().all(axis=None)
    assert (table["genes"].str.count(r"\+") == several).all()
    effects = gfx.get.deletion_df(perturbed, min_cells=1).set_index("perturbation")
    difference = table.groupby("perturbation")["difference"]
    np.testing.assert_allclose(effects["random_mean"], (effects["shift_mean"] + difference.mean())[effects.index])
    np.testing.assert_allclose(effects["random_sd"], difference.std()[effects.index])
    table["difference"] = 0.0  # a copy: the result stays as it is
    assert gfx.get.random_sets_df(perturbed)["difference"].ne(0).any()


def test_random_sets_with_states(perturbed):
    """A row a set and state, sets in their order."""
    table = gfx.get.random_sets_df(perturbed, key="states")
    stored = perturbed.uns["states"]
    assert table.columns.tolist() == [*OF_SETS, *OF_EXCESS, "state", "toward_mean", "toward_difference"]
    assert table["state"].tolist() == list("abc") * 25
    for state in "abc":
        rows = table[table["state"] == state].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows[[*OF_SETS, *OF_EXCESS]], stored["random_sets"].reset_index(drop=True))
        of_state = stored["random_states"].query("state == @state").reset_index(drop=True)
        columns = ["perturbation", "genes", "toward_mean", "toward_difference"]
        pd.testing.assert_frame_equal(rows[columns], of_state[columns])


@pytest.mark.parametrize("name", ["random_sets_df", "rank_trend_df"])
def test_without_null_there_is_none(perturbed, name):
    for key in ("alone", "states_alone"):
        with pytest.raises(
            KeyError, match=rf"The result '{key}' of `gfx.tl.delete_genes` has no .* without this control"
        ):
            getattr(gfx.get, name)(perturbed, key=key)


# --- genes of all ranks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "measures"), [("gfx_delete", ["shift"]), ("states", ["shift", "toward"])])
def test_rank_trend(perturbed, key, measures):
    table, stored = gfx.get.rank_trend_df(perturbed, key=key), perturbed.uns[key]["genes_of_all_ranks"]
    assert table.columns.tolist() == ["rank", *[f"{of}{m}" for m in measures for of in ("", "random_weights_")]]
    np.testing.assert_array_equal(table, stored)
    assert len(table) == 100
    assert table["rank"].between(0, 1).all()
    assert table["rank"].min() < 0.1
    assert table["rank"].max() > 0.9
    assert set(table.attrs) == {"trend", "random_weights_trend"}
    for of in ("", "random_weights_"):
        drawn = table[table[f"{of}shift"] > 0]
        slope, intercept = np.polyfit(drawn["rank"], np.log(drawn[f"{of}shift"]), 1)
        left = np.log(drawn[f"{of}shift"]) - intercept - slope * drawn["rank"]
        expected = {"intercept": intercept, "slope": slope, "sd": np.sqrt((left**2).sum() / (len(drawn) - 2))}
        assert table.attrs[f"{of}trend"] == pytest.approx(expected, abs=1e-6)
    table["shift"] = 0.0  # a copy: the result stays as it is
    assert gfx.get.rank_trend_df(perturbed, key=key)["shift"].gt(0).any()


# --- controls -------------------------------------------------------------------------------------------------------

COLUMNS = ["control", "measure", "statistic", "value", "n"]
BASELINES = ["detection", "expression", "rank"]
BOTH = ["spearman", "partial_spearman"]


def index_of(table):
    assert table.columns.tolist() == COLUMNS
    assert not table.duplicated(COLUMNS[:3]).any()
    return table.set_index(COLUMNS[:3])


def rank_correlation(x, y):
    return pd.Series(np.asarray(x)).corr(pd.Series(np.asarray(y)), method="spearman")


def random_weights(measure):
    return [("random_weights", measure, statistic) for statistic in ("spearman", "spearman_perturbations")]


def baselines(measures, names):
    return [(name, measure, statistic) for measure in measures for name in names for statistic in BOTH]


TREND = [("random_weights", "shift", "rank_spearman"), ("random_weights", "shift", "rank_slope")]


def test_controls(perturbed):
    rows, sample = index_of(gfx.get.controls_df(perturbed, key="gfx_delete")), gfx.get.rank_trend_df(perturbed)
    expected = [*random_weights("shift"), *TREND, ("rank", "shift", "slope"), *baselines(["shift"], BASELINES)]
    assert set(rows.index) == set(expected)
    for control, column, prefix, trend in (
        ("rank", "shift", "", "trend"),
        ("random_weights", "random_weights_shift", "rank_", "random_weights_trend"),
    ):
        drawn = sample[sample[column] > 0]
        found = rows.loc[(control, "shift", f"{prefix}spearman")]
        assert found["value"] == pytest.approx(rank_correlation(drawn["rank"], drawn[column]))
        assert found["n"] == len(drawn)
        slope = rows.loc[(control, "shift", f"{prefix}slope")]
        assert slope["value"] == pytest.approx(sample.attrs[trend]["slope"])
        assert slope["n"] == len(drawn)
    both = rows.loc[("random_weights", "shift", "spearman")]
    assert both["value"] == pytest.approx(rank_correlation(sample["shift"], sample["random_weights_shift"]))
    assert both["n"] == 100
    # Four single genes and a pair: the pair is left out.
    assert rows.loc[("random_weights", "shift", "spearman_perturbations"), "n"] == 4
    assert rows["value"].notna().all()
    is_slope = rows.index.get_level_values("statistic").str.endswith("slope")
    assert rows.loc[~is_slope, "value"].between(-1, 1).all()


def test_controls_with_states(perturbed):
    rows, sample = (
        index_of(gfx.get.controls_df(perturbed, key="states")),
        gfx.get.rank_trend_df(perturbed, key="states"),
    )
    measures = ["shift", "toward"]
    expected = [*random_weights("shift"), *random_weights("toward"), *TREND, ("rank", "shift", "slope")]
    expected += [*baselines(measures, [*BASELINES, "logfc"]), ("state_axis", "toward", "auc")]
    assert set(rows.index) == set(expected)
    assert len(rows) == len(expected)
    found = rows.loc[("random_weights", "toward", "spearman"), "value"]
    assert found == pytest.approx(rank_correlation(sample["toward"], sample["random_weights_toward"]))
    assert 0 <= rows.loc[("state_axis", "toward", "auc"), "value"] <= 1
    assert rows.loc[("state_axis", "toward", "auc"), "n"] > 0


def test_controls_without_random_genes_are_over_the_perturbations(perturbed):
    """Fewer than ten genes say nothing about what their ranking follows."""
    rows = index_of(gfx.get.controls_df(perturbed, key="alone"))
    assert rows.index.tolist() == baselines(["shift"], BASELINES)
    assert (rows["n"] == 4).all()
    assert rows["value"].isna().all()
    rows = index_of(gfx.get.controls_df(perturbed, key="states_alone"))
    expected = [*baselines(["shift", "toward"], [*BASELINES, "logfc"]), ("state_axis", "toward", "auc")]
    assert set(rows.index) == set(expected)


def test_controls_over_enough_perturbations(toy_cells, toy_model):
    adata = toy_cells(30)
    genes = [f"TOY{at}" for at in (90, 48, 165, 171, 137, 88, 80, 75, 47, 192, 50, 60)]
    gfx.tl.delete_genes(adata, genes, model=toy_model, controls="baselines")
    rows = index_of(gfx.get.controls_df(adata))
    effects = gfx.get.deletion_df(adata, min_cells=1).dropna(subset=["shift_mean"])
    assert len(effects) >= 10
    for control, column in {"detection": "detection", "expression": "expression_mean"}.items():
        found = rows.loc[(control, "shift", "spearman")]
        assert found["value"] == pytest.approx(rank_correlation(effects["shift_mean"], effects[column]))
        assert found["n"] == len(effects)
