from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import gfx

# The toy cells' states are drawn at random, and most of the time nothing tells them apart.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

GENES = ["TOY90", "TOY48", ("TOY90", "TOY48")]
NAMES = ["TOY90", "TOY48", "TOY90+TOY48"]

delete_genes = partial(gfx.tl.delete_genes, controls=["parts"])
deletion_df = partial(gfx.get.deletion_df, min_cells=1)


@pytest.fixture(scope="module")
def plain(toy_cells, toy_model):
    adata = toy_cells(18)
    delete_genes(adata, GENES, model=toy_model)
    return adata


@pytest.fixture(scope="module")
def with_states(toy_cells, toy_model):
    adata = toy_cells(18)
    delete_genes(adata, GENES, model=toy_model, groupby="cell_type", start="b", goal="a", key_added="mine")
    return adata


#: In some of the cells, more or fewer.
MORE = ["TOY90", "TOY48", "TOY165", "TOY171", "TOY137", "TOY88"]
STATES = {"groupby": "cell_type", "start": "b", "goal": "a"}


@pytest.fixture(scope="module")
def controlled(toy_cells, toy_model):
    """With random sets and donors: plain, and with states."""
    adata = toy_cells(48)
    gfx.tl.delete_genes(adata, MORE, model=toy_model, n_random=9, donor_key="donor")
    gfx.tl.delete_genes(adata, MORE, model=toy_model, n_random=9, donor_key="donor", key_added="mine", **STATES)
    return adata


PARTS = ["composition", "position", "context"]
EFFECTS = ["shift_mean", "shift_sd", "composition_mean", "position_mean", "context_mean", "rank_mean"]


def test_deletion_df(plain):
    table = deletion_df(plain)
    shift = plain.obsm["gfx_delete"].astype(np.float64)
    order = np.argsort(-np.nanmean(shift, axis=0))
    assert table.columns.tolist() == ["perturbation", "n_cells", *EFFECTS, "detection", "expression_mean"]
    assert table["perturbation"].tolist() == np.array(NAMES)[order].tolist()
    np.testing.assert_allclose(table["shift_mean"], np.nanmean(shift, axis=0)[order])
    np.testing.assert_allclose(table["shift_sd"], np.nanstd(shift, axis=0, ddof=1)[order])
    assert table["n_cells"].tolist() == (~np.isnan(shift)).sum(axis=0)[order].tolist()
    assert table.attrs["note"] == plain.uns["gfx_delete"]["note"] != ""
    table["shift_mean"] = 0.0  # a copy: the result stays as it is
    assert deletion_df(plain)["shift_mean"].gt(0).all()


def test_deletion_df_with_states(with_states):
    table = deletion_df(with_states, key="mine")
    toward = with_states.obsm["mine_states"].astype(np.float64)
    order = np.argsort(-np.nanmean(toward[:, :, 0], axis=0))  # the goal is the first state
    assert table["perturbation"].tolist() == [name for name in np.array(NAMES)[order] for _ in "abc"]
    assert table["state"].tolist() == list("abc") * 3
    assert table["role"].tolist() == ["goal", "start", "alternative"] * 3
    np.testing.assert_allclose(table["toward_mean"].to_numpy().reshape(3, 3), np.nanmean(toward, axis=0)[order])
    np.testing.assert_allclose(table["toward_sd"].to_numpy().reshape(3, 3), np.nanstd(toward, axis=0, ddof=1)[order])
    shift = np.nanmean(with_states.obsm["mine"].astype(np.float64), axis=0)[order]
    np.testing.assert_allclose(table["shift_mean"], np.repeat(shift, 3))
    assert "n_cells" in table
    assert "logfc" in table
    assert not [column for column in table if column.removeprefix("toward_") in {"z", "p", "fdr", "n_random"}]
    assert table.columns.is_unique
    assert table.attrs["note"] == with_states.uns["mine"]["note"]


# --- z, p and their adjustment --------------------------------------------------------------------------------------


def adjusted(p):
    """Benjamini and Hochberg, by their definition; what is missing is no test."""
    p = np.asarray(p, dtype=float)
    tested, out = np.flatnonzero(~np.isnan(p)), np.full(len(p), np.nan)
    for at in tested:
        out[at] = min(1, *(q * len(tested) / (p[tested] <= q).sum() for q in p[tested] if q >= p[at]))
    return out


@pytest.fixture
def with_p_values(controlled):
    """Other p-values than a run on toys gives, that tell a test of one number from another."""
    adata = controlled.copy()
    adata.uns["gfx_delete"]["table"]["p"] = [0.01, 0.04, 0.03, 0.2, 0.02, 0.5]
    adata.uns["mine"]["table"]["p"] = [0.01, 0.04, 0.03, 0.2, 0.02, 0.5]
    states = adata.uns["mine"]["state_table"]
    states["toward_p"] = np.linspace(0.001, 0.9, len(states)) ** 2
    return adata


def test_rows_are_in_the_order_of_z(controlled):
    table = deletion_df(controlled)
    assert set(table["perturbation"]) == set(MORE)
    assert table["z"].is_monotonic_decreasing
    assert not table["shift_mean"].is_monotonic_decreasing
    found, expected = table.set_index("perturbation"), controlled.uns["gfx_delete"]["table"].set_index("perturbation")
    expected = expected.rename(columns={"shift_random_weights": "random_weights_shift_mean"})
    columns = [column for column in expected if column != "logfc"]
    pd.testing.assert_frame_equal(found.loc[MORE, columns], expected[columns])
    donors = ["n_donors", "donor_mean", "donor_low", "donor_high", "donor_p", "donor_fdr"]
    assert [*found] == [
        *(c for c in columns[: columns.index("p") + 1]),
        "fdr",
        *columns[columns.index("p") + 1 :],
        *donors,
    ]


def test_states_are_kept_together_and_in_the_order_of_the_goal(controlled):
    table = deletion_df(controlled, key="mine")
    assert table["state"].tolist() == list("abc") * 6
    goals = table[table["role"] == "goal"]
    assert goals["toward_z"].is_monotonic_decreasing
    assert table["perturbation"].tolist() == goals["perturbation"].repeat(3).tolist()
    assert not goals["z"].is_monotonic_decreasing


def test_the_order_is_that_of_effects_where_no_z_to_the_goal_is_known(controlled, toy_cells, toy_model):
    """Without random sets there is none."""
    adata = toy_cells(48)
    gfx.tl.delete_genes(adata, MORE, model=toy_model, controls=None, donor_key="donor", **STATES)
    table = deletion_df(adata)
    assert not {"z", "toward_z", "toward_p", "toward_fdr"} & set(table)
    goals = table[table["role"] == "goal"]
    assert goals["toward_mean"].is_monotonic_decreasing
    assert not goals["shift_mean"].is_monotonic_decreasing
    assert table["perturbation"].tolist() == goals["perturbation"].repeat(3).tolist()
    # One that is known suffices.
    adata = controlled.copy()
    states = adata.uns["mine"]["state_table"]
    states.loc[states["perturbation"] != "TOY165", "toward_z"] = np.nan
    assert deletion_df(adata, key="mine")["perturbation"].tolist()[:3] == ["TOY165"] * 3


def test_tests_of_perturbations_are_counted_once(with_p_values):
    table = deletion_df(with_p_values).set_index("perturbation").loc[MORE]
    expected = adjusted([0.01, 0.04, 0.03, 0.2, 0.02, 0.5])
    np.testing.assert_allclose(table["fdr"], expected)
    states = deletion_df(with_p_values, key="mine")
    for state in "abc":
        rows = states[states["state"] == state].set_index("perturbation").loc[MORE]
        np.testing.assert_allclose(rows["fdr"], expected, err_msg=state)
        np.testing.assert_allclose(rows["toward_fdr"], adjusted(rows["toward_p"]), err_msg=state)
        np.testing.assert_allclose(rows["donor_fdr"], adjusted(rows["donor_p"]), err_msg=state)
    assert (states["toward_fdr"] > states["toward_p"]).sum() > 6


@pytest.mark.parametrize("key", ["gfx_delete", "mine"])
def test_few_cells_say_nothing(with_p_values, key):
    """Neither an effect nor a test: NaN, not 0, at the end, and no part of the adjustment."""
    counts = deletion_df(with_p_values, key=key).drop_duplicates("perturbation").set_index("perturbation")["n_cells"]
    min_cells = int(counts.median()) + 1
    few = counts.index[counts < min_cells]
    assert 0 < len(few) < 6
    table = gfx.get.deletion_df(with_p_values, key=key, min_cells=min_cells)
    assert len(table) == (6 if key == "gfx_delete" else 18)
    is_few = table["perturbation"].isin(few)
    assert is_few.tolist() == sorted(is_few)
    told = ["perturbation", "n_cells", "n_donors", "detection", "expression_mean", "n_random"]
    told += ["state", "role", "logfc", "toward_n_random"] if key == "mine" else []
    assert table.loc[is_few, told].notna().all(axis=None)
    assert table.loc[is_few].drop(columns=told).isna().all(axis=None)
    assert table.loc[~is_few, ["shift_mean", "z", "p", "fdr", "donor_mean"]].notna().all(axis=None)
    rows = table[~is_few & (table.get("state", "a") == "a")]
    np.testing.assert_allclose(rows["fdr"], adjusted(rows["p"]))
    np.testing.assert_allclose(rows["donor_fdr"], adjusted(rows["donor_p"]))


def test_ten_cells_are_asked_for(controlled):
    pd.testing.assert_frame_equal(gfx.get.deletion_df(controlled), gfx.get.deletion_df(controlled, min_cells=10))


# --- donors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["gfx_delete", "mine"])
def test_over_donors(controlled, key):
    """Means and intervals of the excess over random sets, one value a donor, beside those of other genes.

    The test is that of Welch: donors on one side; on the other one more random set, beside the mean of those there are.
    """
    effect, donors = ("shift", "donors") if key == "gfx_delete" else ("toward", "donor_states")
    prefix = "" if key == "gfx_delete" else "toward_"
    tables = controlled.uns[key][donors]
    for _, row in deletion_df(controlled, key=key).iterrows():
        mine = tables[tables["perturbation"] == row["perturbation"]]
        mine = mine if key == "gfx_delete" else mine[mine["state"] == row["state"]]
        values = mine[f"{effect}_excess"].dropna()
        interval = stats.ttest_1samp(values, 0).confidence_interval()
        sd, n = row[f"{prefix}random_sd"], row[f"{prefix}n_random"]
        apart = stats.ttest_ind_from_stats(
            values.mean(), values.std(ddof=1), len(values), 0, sd * np.sqrt(n + 1), n, equal_var=False
        )
        assert row["n_donors"] == len(values) > 2
        assert n == 9
        expected = [values.mean(), *interval, apart.pvalue]
        np.testing.assert_allclose(row[["donor_mean", "donor_low", "donor_high", "donor_p"]].tolist(), expected)


def test_donors_whose_cells_no_random_set_was_in_do_not_enter(controlled):
    adata = controlled.copy()
    donors = adata.uns["gfx_delete"]["donors"]
    of = donors["perturbation"] == "TOY48"
    donors.loc[of, "shift_excess"] = [0.1, np.nan, 0.3, 0.2]
    donors.loc[donors["perturbation"] == "TOY165", "shift_excess"] = np.nan
    table, before = (deletion_df(one).set_index("perturbation") for one in (adata, controlled))
    assert table.loc["TOY48", "n_donors"] == 3
    assert table.loc["TOY48", "donor_mean"] == pytest.approx(0.2)
    assert table.loc["TOY165", "n_donors"] == 0
    assert table.loc["TOY165", ["donor_mean", "donor_low", "donor_high", "donor_p", "donor_fdr"]].isna().all()
    rest = [name for name in MORE if name not in ("TOY48", "TOY165")]
    columns = ["n_donors", "donor_mean", "donor_p"]
    pd.testing.assert_frame_equal(table.loc[rest, columns], before.loc[rest, columns])


def test_over_donors_without_random_sets(toy_cells, toy_model):
    """Means and intervals are of the effects themselves; with nothing to compare them with, there is no test."""
    adata = toy_cells(24)
    delete_genes(adata, MORE[:2], model=toy_model, donor_key="donor")
    delete_genes(adata, MORE[:2], model=toy_model, donor_key="donor", key_added="mine", **STATES)
    table = deletion_df(adata)
    assert table[["donor_p", "donor_fdr"]].isna().all(axis=None)
    assert (table["donor_low"] < table["donor_mean"]).all()
    donors = adata.uns["gfx_delete"]["donors"].groupby("perturbation")["shift_mean"].mean()
    np.testing.assert_allclose(table["donor_mean"], donors[table["perturbation"]])
    states = deletion_df(adata, key="mine").set_index(["perturbation", "state"])
    assert states[["donor_p", "donor_fdr"]].isna().all(axis=None)
    for name, values in adata.uns["mine"]["donor_states"].groupby(["perturbation", "state"])["toward_mean"]:
        expected = [len(values), values.mean(), *stats.ttest_1samp(values, 0).confidence_interval()]
        found = states.loc[name, ["n_donors", "donor_mean", "donor_low", "donor_high"]]
        np.testing.assert_allclose(found.tolist(), expected)


@pytest.mark.parametrize("min_donors", [2, 4, 5])
def test_few_donors_say_nothing(controlled, min_donors):
    table = deletion_df(controlled, min_donors=min_donors)
    excess = controlled.uns["gfx_delete"]["donors"].dropna().groupby("perturbation").size()
    enough = (excess[table["perturbation"]] >= min_donors).to_numpy()
    assert enough.any() == (min_donors < 5)
    for column in ("donor_mean", "donor_low", "donor_high", "donor_p", "donor_fdr"):
        assert (table[column].notna() == enough).all(), column
    assert table["n_donors"].tolist() == excess[table["perturbation"]].tolist()
    assert table["z"].notna().all()


# --- other tables ---------------------------------------------------------------------------------------------------


def test_deletion_cells_df(plain):
    table = gfx.get.deletion_cells_df(plain)
    assert table.columns.tolist() == ["cell", "perturbation", "shift", *PARTS]
    np.testing.assert_allclose(table[PARTS].sum(axis=1), table["shift"], atol=1e-6)
    for at, part in enumerate(PARTS):
        wide = table.pivot_table(index="cell", columns="perturbation", values=part)
        wide = wide.reindex(index=plain.obs_names, columns=NAMES)
        np.testing.assert_array_equal(wide, plain.obsm["gfx_delete_parts"][:, :, at])
    wide = table.pivot_table(index="cell", columns="perturbation", values="shift")
    wide = wide.reindex(index=plain.obs_names, columns=NAMES)
    np.testing.assert_array_equal(wide, plain.obsm["gfx_delete"])
    assert not table.duplicated(["cell", "perturbation"]).any()


def test_deletion_cells_df_with_states(with_states):
    table = gfx.get.deletion_cells_df(with_states, key="mine")
    assert table.columns.tolist() == ["cell", "perturbation", "shift", *PARTS, "state", "toward"]
    assert not table.isna().any(axis=None)
    for at, state in enumerate("abc"):
        wide = table[table["state"] == state].pivot_table(index="cell", columns="perturbation", values="toward")
        wide = wide.reindex(index=with_states.obs_names, columns=NAMES)
        np.testing.assert_array_equal(wide, with_states.obsm["mine_states"][:, :, at])


def assert_gene_effects(adata, names, key, columns, by):
    everything = gfx.get.gene_effects_df(adata, key=key, min_cells=1)
    assert everything.columns.tolist() == columns
    assert everything["perturbation"].unique().tolist() == names
    for at, name in enumerate(names):
        table = gfx.get.gene_effects_df(adata, name, key=key, min_cells=1)
        pd.testing.assert_frame_equal(table, everything[everything["perturbation"] == name].reset_index(drop=True))
        assert table[by].dropna().is_monotonic_decreasing
        seen = adata.varm[f"{key}_n_cells"][:, at] > 0
        assert set(table["gene"]) == set(adata.var_names[seen])
        by_gene = table.set_index("gene").loc[adata.var_names[seen]]
        for column, slot in {"shift": key, "shift_sd": f"{key}_sd", "n_cells": f"{key}_n_cells"}.items():
            np.testing.assert_array_equal(by_gene[column], adata.varm[slot][seen, at])
        if by == "excess":
            np.testing.assert_array_equal(by_gene["random_shift"], adata.varm[f"{key}_null"][seen, at])
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.log2(by_gene["shift"].astype(float) / by_gene["random_shift"].astype(float))
            ratio[~np.isfinite(ratio)] = np.nan
            np.testing.assert_allclose(by_gene["excess"], ratio - ratio.median(), atol=1e-12)
            assert by_gene["excess"].notna().sum() > len(by_gene) / 2
            assert not table["shift"].is_monotonic_decreasing


def test_gene_effects_df(plain):
    columns = ["perturbation", "gene", "shift", "shift_sd", "n_cells"]
    assert_gene_effects(plain, NAMES, "gfx_delete", columns, "shift")


def test_gene_effects_compared_with_random_sets(controlled):
    columns = ["perturbation", "gene", "shift", "shift_sd", "n_cells", "random_shift", "excess"]
    assert_gene_effects(controlled, MORE, "mine", columns, "excess")


def test_excess_is_the_log_ratio_less_its_median(controlled):
    """Genes that never move, or whose shift under random sets is not known, have none and tell nothing of others."""
    adata, n = controlled.copy(), controlled.n_vars
    adata.varm["gfx_delete_n_cells"][:, 0] = [20] * 8 + [9] + [0] * (n - 9)
    adata.varm["gfx_delete"][:9, 0] = [0.1, 0.2, 0.4, 0.8, 0.1, 0.0, 0.5, 0.6, 0.9]
    adata.varm["gfx_delete_null"][:9, 0] = [0.1, 0.1, 0.1, 0.1, 0.05, 0.1, 0.0, np.nan, 1e-6]
    table = gfx.get.gene_effects_df(adata, MORE[0])
    assert table["gene"].tolist() == [f"TOY{at}" for at in (4, 3, 2, 5, 1, 6, 7, 8)]
    np.testing.assert_allclose(table["excess"], [2, 1, 0, 0, -1, np.nan, np.nan, np.nan], atol=1e-6)
    # With the gene in nine cells, the median is another one.
    more = gfx.get.gene_effects_df(adata, MORE[0], min_cells=9)
    assert more["gene"].tolist()[:2] == ["TOY9", "TOY4"]
    np.testing.assert_allclose(more["excess"][1:6], [1.5, 0.5, -0.5, -0.5, -1.5], atol=1e-6)
    adata.varm["gfx_delete_null"][:, 0] = np.nan
    unknown = gfx.get.gene_effects_df(adata, MORE[0])
    assert len(unknown) == 8
    assert unknown["excess"].isna().all()


@pytest.mark.parametrize("min_cells", [0, 1, 5, 1000])
def test_gene_effects_of_few_cells_are_left_out(plain, min_cells):
    table = gfx.get.gene_effects_df(plain, "TOY90", min_cells=min_cells)
    counts = plain.varm["gfx_delete_n_cells"][:, 0]
    assert len(table) == (counts >= max(min_cells, 1)).sum()
    assert not table["shift"].isna().any()


def test_effects_of_a_gene_that_no_cell_has(toy_cells, toy_model):
    adata = toy_cells(18)
    absent = next(name for name in adata.var_names if not adata[:, name].X.sum())
    with pytest.warns(UserWarning, match="No cell has the genes"):
        delete_genes(adata, [absent, "TOY90"], model=toy_model)
    table = gfx.get.deletion_df(adata, min_cells=0).set_index("perturbation")
    assert table.index.tolist() == ["TOY90", absent]
    assert table["n_cells"][absent] == 0
    assert table.loc[absent, EFFECTS].isna().all()
    assert gfx.get.gene_effects_df(adata, absent, min_cells=0).empty
    assert set(gfx.get.gene_effects_df(adata)["perturbation"]) == {"TOY90"}
    assert set(gfx.get.deletion_cells_df(adata)["perturbation"]) == {"TOY90"}


TABLES = ["deletion_df", "deletion_cells_df", "gene_effects_df", "synergy_df", "random_sets_df", "rank_trend_df"]
TABLES += ["attention_df", "attention_ranks_df", "attention_heads_df"]


@pytest.mark.parametrize("name", [*TABLES, "controls_df", "screen_df"])
def test_nothing_to_tabulate(toy_cells, name):
    adata = toy_cells(3)
    adata.uns |= {"neighbors": {"params": {"method": "umap"}}, "other": {"params": "text"}, "list": ["params"]}
    with pytest.raises(KeyError, match=r"Did not find a result of .*`gfx\.tl\.\w+` in `adata\.uns`\. Run .* first\."):
        getattr(gfx.get, name)(adata)
    for key in ("mine", "neighbors", "other", "list"):
        with pytest.raises(KeyError, match=rf"Did not find '{key}' in `adata\.uns`\..* Run "):
            getattr(gfx.get, name)(adata, key=key)


@pytest.mark.parametrize("name", TABLES)
def test_the_result_of_another_tool(toy_cells, toy_model, name):
    adata = toy_cells(6)
    gfx.tl.embed(adata, model=toy_model, key_added="mine")
    with pytest.raises(KeyError, match=r"`adata\.uns\['mine'\]` was written by `gfx\.tl\.embed`, not by `gfx\.tl\."):
        getattr(gfx.get, name)(adata, key="mine")


def test_the_only_result_is_found_under_any_key(with_states):
    pd.testing.assert_frame_equal(deletion_df(with_states), deletion_df(with_states, key="mine"))


def test_results_under_other_keys_are_named(with_states):
    with pytest.raises(KeyError, match=r"Did not find 'other' in `adata\.uns`\. Results of .*: \['mine'\]"):
        gfx.get.deletion_df(with_states, key="other")


# --- which result is meant ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(toy_cells, toy_model):
    """Results of three functions, one under its own name and the others not."""
    adata = toy_cells(12)
    gfx.tl.overexpress_genes(adata, "TOY48", model=toy_model, controls=None)
    gfx.tl.shift_genes(adata, "TOY165", by=("quartiles", 3), model=toy_model, controls=None, key_added="shifted")
    delete_genes(adata, "TOY90", model=toy_model, key_added="deleted")
    return adata


def only(adata, *keys):
    part = adata.copy()
    for key in ("gfx_overexpress", "shifted", "deleted"):
        if key not in keys:
            del part.uns[key]
    return part


@pytest.mark.parametrize(("key", "gene"), [("gfx_overexpress", "TOY48"), ("shifted", "TOY165"), ("deleted", "TOY90")])
def test_results_by_their_name_and_the_only_one_without(several, key, gene):
    for found in (deletion_df(several, key=key), deletion_df(only(several, key))):
        assert found["perturbation"].tolist() == [gene]
        np.testing.assert_allclose(found["shift_mean"], np.nanmean(several.obsm[key].astype(float), axis=0))
    cells = gfx.get.deletion_cells_df(several, key=key)
    assert len(cells) == (~np.isnan(several.obsm[key])).sum()
    assert set(gfx.get.gene_effects_df(several, key=key, min_cells=1)["perturbation"]) == {gene}


FINDERS = [gfx.get.deletion_df, gfx.get.deletion_cells_df, gfx.get.gene_effects_df, gfx.get.synergy_df]
FINDERS += [gfx.get.controls_df, gfx.get.random_sets_df, gfx.get.rank_trend_df]


@pytest.mark.parametrize("get", FINDERS)
def test_several_results_have_to_be_named(several, toy_model, get):
    """Several under default names, or several of which none is."""
    with pytest.raises(KeyError, match=r"several results of .*; choose one with `key=`: \['deleted', 'shifted'\]"):
        get(only(several, "deleted", "shifted"))
    adata = delete_genes(several, "TOY171", model=toy_model, copy=True)
    with pytest.raises(
        KeyError, match=r"choose one with `key=`: \['deleted', 'gfx_delete', 'gfx_overexpress', 'shifted'\]"
    ):
        get(adata)


def test_the_result_under_a_default_name_comes_first(several):
    assert deletion_df(several)["perturbation"].tolist() == ["TOY48"]
    assert set(gfx.get.deletion_cells_df(several)["perturbation"]) == {"TOY48"}


def test_no_such_perturbation(plain):
    with pytest.raises(
        KeyError, match=r"Did not find the perturbation 'TOY9O'\. Did you mean 'TOY90'\? Present: \['TOY90',"
    ):
        gfx.get.gene_effects_df(plain, "TOY9O")
    with pytest.raises(KeyError, match=r"TOY48\+TOY90"):
        gfx.get.gene_effects_df(plain, "TOY48+TOY90")


def test_tables_write_nothing(plain):
    kept = {name: list(getattr(plain, name)) for name in ("obs", "var", "obsm", "varm", "uns")}
    for get in (gfx.get.deletion_df, gfx.get.deletion_cells_df, gfx.get.gene_effects_df):
        get(plain)
    assert {name: list(getattr(plain, name)) for name in kept} == kept
