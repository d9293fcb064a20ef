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
    gfx.tl.delete_genes(adata, GENES, model=toy_model, null=5)
    gfx.tl.delete_genes(adata, GENES, model=toy_model, null=5, key_added="states", donor_key="donor", **STATES)
    gfx.tl.delete_genes(adata, GENES, model=toy_model, null=None, key_added="alone")
    gfx.tl.delete_genes(adata, GENES, model=toy_model, null=None, key_added="states_alone", **STATES)
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
        with pytest.raises(KeyError, match=r"This result has no .*made with `null=None`\. Leave `null` out"):
            getattr(gfx.get, name)(perturbed, key=key)
    with pytest.raises(KeyError, match=r"Did not find 'other' in `adata\.uns`\. Run `gfx\.tl\.delete_genes\(adata"):
        getattr(gfx.get, name)(perturbed, key="other")


# --- genes of all ranks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "effects"), [("gfx_delete", ["shift"]), ("states", ["shift", "toward_goal"])])
def test_rank_trend(perturbed, key, effects):
    table = gfx.get.rank_trend_df(perturbed, key=key)
    pd.testing.assert_frame_equal(table, perturbed.uns[key]["genes_of_all_ranks"].reset_index(drop=True))
    assert table.columns.tolist() == ["rank", *[f"{e}{of}" for e in effects for of in ("", "_random_weights")]]
    assert len(table) == 200
    assert table["rank"].between(0, 1).all()
    assert table["rank"].min() < 0.1
    assert table["rank"].max() > 0.9
    assert set(table.attrs) == {"trend", "trend_random_weights"}
    for column, name in {"shift": "trend", "shift_random_weights": "trend_random_weights"}.items():
        drawn = table[table[column] > 0]
        slope, intercept = np.polyfit(drawn["rank"], np.log(drawn[column]), 1)
        left = np.log(drawn[column]) - intercept - slope * drawn["rank"]
        expected = {"intercept": intercept, "slope": slope, "sd": np.sqrt((left**2).sum() / (len(drawn) - 2))}
        assert table.attrs[name] == pytest.approx(expected, abs=1e-6)
    table["shift"] = 0.0  # a copy: the result stays as it is
    assert gfx.get.rank_trend_df(perturbed, key=key)["shift"].gt(0).any()


# --- controls -------------------------------------------------------------------------------------------------------

COLUMNS = ["control", "effect", "statistic", "value", "n", "over"]
BASELINES = ["detection", "expression", "rank of gene"]


def index_of(table):
    return table.set_index([*COLUMNS[:3], "over"])


def rank_correlation(x, y):
    return pd.Series(np.asarray(x)).corr(pd.Series(np.asarray(y)), method="spearman")


def baseline_rows(effects, names, over):
    kinds = ("Spearman", "partial Spearman")
    return [(name, effect, kind, over) for effect in effects for name in names for kind in kinds]


def assert_baselines(table, controls, over):
    for row in controls["baselines"].itertuples():
        name = "rank of gene" if row.baseline == "rank" else row.baseline
        for statistic, value in {"Spearman": row.spearman, "partial Spearman": row.partial_spearman}.items():
            found = index_of(table).loc[(name, row.effect, statistic, over)]
            np.testing.assert_array_equal(found["value"], value)
            assert found["n"] == row.n


def test_controls(perturbed):
    table = gfx.get.controls_df(perturbed)
    assert table.columns.tolist() == COLUMNS
    assert [*index_of(table).index] == [
        ("rank", "shift", "Spearman", ALL_RANKS),
        ("rank", "shift", "slope of the logarithm", ALL_RANKS),
        ("rank, random weights", "shift", "Spearman", ALL_RANKS),
        ("rank, random weights", "shift", "slope of the logarithm", ALL_RANKS),
        ("random weights", "shift", "Spearman", ALL_RANKS),
        ("random weights", "shift", "Spearman", "perturbations"),
        *baseline_rows(["shift"], BASELINES, ALL_RANKS),
    ]
    rows, sample = index_of(table), gfx.get.rank_trend_df(perturbed)
    for control, column, trend in (
        ("rank", "shift", "trend"),
        ("rank, random weights", "shift_random_weights", "trend_random_weights"),
    ):
        found = rows.loc[(control, "shift", "Spearman", ALL_RANKS)]
        drawn = sample[sample[column] > 0]
        assert found["value"] == pytest.approx(rank_correlation(drawn["rank"], drawn[column]))
        assert found["n"] == len(drawn)
        slope = rows.loc[(control, "shift", "slope of the logarithm", ALL_RANKS)]
        assert slope["value"] == sample.attrs[trend]["slope"]
        assert slope["n"] == len(drawn)
    both = rows.loc[("random weights", "shift", "Spearman", ALL_RANKS)]
    assert both["value"] == pytest.approx(rank_correlation(sample["shift"], sample["shift_random_weights"]))
    assert both["n"] == 200
    # Four single genes and a pair: the pair is left out.
    assert rows.loc[("random weights", "shift", "Spearman", "perturbations"), "n"] == 4
    assert_baselines(table, perturbed.uns["gfx_delete"]["controls"], ALL_RANKS)
    assert table["value"].notna().all()
    assert table.loc[table["statistic"] != "slope of the logarithm", "value"].between(-1, 1).all()


def test_controls_with_states(perturbed):
    table = gfx.get.controls_df(perturbed, key="states")
    effects = ["shift", "toward goal"]
    assert [*index_of(table).index] == [
        ("rank", "shift", "Spearman", ALL_RANKS),
        ("rank", "shift", "slope of the logarithm", ALL_RANKS),
        ("rank, random weights", "shift", "Spearman", ALL_RANKS),
        ("rank, random weights", "shift", "slope of the logarithm", ALL_RANKS),
        *[("random weights", effect, "Spearman", over) for effect in effects for over in (ALL_RANKS, "perturbations")],
        ("state axis", "toward goal", "AUC", "folds of donors"),
        *baseline_rows(effects, [*BASELINES, "logfc"], ALL_RANKS),
    ]
    rows, sample = index_of(table), gfx.get.rank_trend_df(perturbed, key="states")
    found = rows.loc[("random weights", "toward goal", "Spearman", ALL_RANKS), "value"]
    assert found == pytest.approx(rank_correlation(sample["toward_goal"], sample["toward_goal_random_weights"]))
    axis = perturbed.uns["states"]["controls"]["state_axis"]
    found = rows.loc[("state axis", "toward goal", "AUC", "folds of donors")]
    assert (found["value"], found["n"]) == (axis["auc"], axis["n_folds"])
    assert_baselines(table, perturbed.uns["states"]["controls"], ALL_RANKS)


def test_controls_without_null_are_over_the_perturbations(perturbed):
    """Fewer than ten genes say nothing about what their ranking follows."""
    table = gfx.get.controls_df(perturbed, key="alone")
    assert [*index_of(table).index] == baseline_rows(["shift"], BASELINES, "perturbations")
    assert (table["n"] == 4).all()
    assert table["value"].isna().all()
    assert_baselines(table, perturbed.uns["alone"]["controls"], "perturbations")
    table = gfx.get.controls_df(perturbed, key="states_alone")
    assert [*index_of(table).index] == [
        ("state axis", "toward goal", "AUC", "folds of cells"),
        *baseline_rows(["shift", "toward goal"], [*BASELINES, "logfc"], "perturbations"),
    ]


def test_controls_over_enough_perturbations(toy_cells, toy_model):
    adata = toy_cells(30)
    genes = [f"TOY{at}" for at in (90, 48, 165, 171, 137, 88, 80, 75, 47, 192, 50, 60)]
    gfx.tl.delete_genes(adata, genes, model=toy_model, null=None)
    rows = index_of(gfx.get.controls_df(adata))
    effects = gfx.get.deletion_df(adata, min_cells=1).dropna(subset=["shift_mean"])
    assert len(effects) >= 10
    for control, column in {"detection": "detection", "expression": "expression_mean"}.items():
        found = rows.loc[(control, "shift", "Spearman", "perturbations")]
        assert found["value"] == pytest.approx(rank_correlation(effects["shift_mean"], effects[column]))
        assert found["n"] == len(effects)
