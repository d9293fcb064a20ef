from __future__ import annotations

import logging
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import stats

import gfx

# The toy cells' states are drawn at random, and most of the time nothing separates them.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

#: In nearly all of the toy cells.
GENE, OTHER = "TOY90", "TOY48"

#: Most tests are about effects, not about their controls.
delete_genes = partial(gfx.tl.delete_genes, controls=None)


WITH_STATES = {"groupby": "condition", "start": "sick", "goal": "healthy"}


#: Baselines are compared with the effects of random genes of all ranks where these are there.
COMPARED = ["random_weights", "baselines"]


def baselines_of(controls):
    """Correlations with the baselines, a row for each measure and baseline."""
    rows = controls[controls["control"].isin(["detection", "expression", "rank", "logfc"])]
    index = pd.MultiIndex.from_frame(rows[["measure", "control"]]).unique()
    table = rows.pivot(index=["measure", "control"], columns="statistic", values="value")
    return table.assign(n=rows.groupby(["measure", "control"])["n"].first()).loc[index]


def test_detection_expression_and_rank(cells, toy_model):
    delete_genes(cells, [GENE, OTHER, (GENE, OTHER)], model=toy_model, controls=COMPARED)
    gfx.pp.tokenize(cells, model=toy_model)
    ids = cells.obsm["gfx_tokens"]
    detection = {name: (ids == at).any(axis=1).mean() for at, name in enumerate(toy_model.vocabulary.symbols) if name}
    logs = np.log1p(cells.X.toarray() / cells.X.toarray().sum(axis=1, keepdims=True) * 1e4).mean(axis=0)
    expression = dict(zip(cells.var_names, logs, strict=True))
    result = cells.uns["gfx_delete"]
    table = result["table"].set_index("perturbation")
    for name, row in table.iterrows():
        assert row["detection"] == pytest.approx(np.mean([detection[gene] for gene in name.split("+")]))
        assert row["expression_mean"] == pytest.approx(
            np.mean([expression[gene] for gene in name.split("+")]), rel=1e-6
        )
    assert table["logfc"].isna().all()
    # How far each of them ranks genes as the model does: random genes of all ranks.
    of_genes = genes_of_all_ranks(cells, toy_model)
    ranks = {
        name: np.mean([(list(row).index(at) - 1) / ((row > 0).sum() - 3) for row in ids if at in row])
        for at, name in enumerate(toy_model.vocabulary.symbols)
        if name and (ids == at).any()
    }
    found = baselines_of(result["controls"])
    assert sorted(found.index) == [("shift", name) for name in ("detection", "expression", "rank")]
    assert (found["n"] == 100).all()
    found = found.loc["shift"]
    shifts = result["genes_of_all_ranks"]["shift"]
    columns = pd.DataFrame({"detection": detection, "expression": expression, "rank": ranks}).loc[of_genes]
    in_cells = columns.assign(rank=result["genes_of_all_ranks"]["rank"].to_numpy())  # of the runs, not of the genes
    for name in columns:
        assert found["spearman"][name] == pytest.approx(stats.spearmanr(shifts, in_cells[name]).statistic, abs=1e-6)
        inverse = np.linalg.inv(
            np.corrcoef(stats.rankdata([shifts, columns[name], *columns.drop(columns=name).T.to_numpy()], axis=1))
        )
        partial_correlation = -inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1])
        assert found["partial_spearman"][name] == pytest.approx(partial_correlation, abs=1e-6)


def genes_of_all_ranks(cells, model, **states):
    """Names of the random genes, found by what deleting each gene in each cell does."""
    sample = cells.uns["gfx_delete"]["genes_of_all_ranks"]
    every = delete_genes(cells, ..., model=model, key_added="every", copy=True, **states)
    shifts = every.obsm["every"]
    cell, gene = np.nonzero(~np.isnan(shifts))
    apart = abs(sample["shift"].to_numpy()[:, None] - shifts[cell, gene])
    assert apart.min(axis=1).max() < 1e-6
    found = np.array(every.uns["every"]["perturbations"])[gene[apart.argmin(axis=1)]]
    assert len(set(found)) > 40
    return found


def test_without_random_genes_baselines_are_beside_the_perturbations(cells, toy_model):
    """Single genes alone; of fewer than ten, nothing is told."""
    often = np.asarray((cells[cells.obs["condition"] == "sick", :200].X > 0).sum(axis=0)).ravel() >= 5
    genes = cells.var_names[:200][often][::3][:12].tolist()
    delete_genes(cells, [*genes, (GENE, OTHER)], model=toy_model, controls="baselines", **WITH_STATES)
    result = cells.uns["gfx_delete"]
    table = result["table"][:-1]
    assert (table["n_cells"] > 0).sum() == 12
    toward = result["state_table"].query("role == 'goal'")["toward_mean"].to_numpy()[:-1]
    found = baselines_of(result["controls"])
    for effect, values in {"shift": table["shift_mean"], "toward": toward}.items():
        for baseline, column in (("detection", "detection"), ("expression", "expression_mean"), ("logfc", "logfc")):
            row = found.loc[effect, baseline]
            there = np.isfinite(values) & np.isfinite(table[column])
            assert row["n"] == there.sum()
            expected = stats.spearmanr(np.asarray(values)[there], table[column][there]).statistic
            assert row["spearman"] == pytest.approx(expected)
    delete_genes(cells, [*genes[:9], (GENE, OTHER)], model=toy_model, controls="baselines")
    few = baselines_of(cells.uns["gfx_delete"]["controls"])
    assert few.index.tolist() == [("shift", name) for name in ("detection", "expression", "rank")]
    assert (few["n"] <= 9).all()
    assert few[["spearman", "partial_spearman"]].isna().all(axis=None)


def test_fold_change_is_that_of_scanpy(cells, toy_model):
    delete_genes(cells, [GENE, OTHER, (GENE, OTHER)], model=toy_model, controls=COMPARED, **WITH_STATES)
    with_states = cells.uns["gfx_delete"]
    logs = ad.AnnData(cells.X.copy(), obs=cells.obs, var=cells.var)
    sc.pp.normalize_total(logs, target_sum=1e4)
    sc.pp.log1p(logs)
    sc.tl.rank_genes_groups(logs, "condition", groups=["healthy"], reference="sick", method="t-test")
    fold = sc.get.rank_genes_groups_df(logs, "healthy").set_index("names")["logfoldchanges"]
    expected = [fold[GENE], fold[OTHER], (fold[GENE] + fold[OTHER]) / 2]
    np.testing.assert_allclose(with_states["table"]["logfc"], expected, rtol=1e-4)
    # Detection and expression are those of the cells that are perturbed.
    start = cells[cells.obs["condition"] == "sick"].copy()
    delete_genes(start, [GENE, OTHER, (GENE, OTHER)], model=toy_model, controls="baselines")
    for column in ("detection", "expression_mean"):
        np.testing.assert_allclose(with_states["table"][column], start.uns["gfx_delete"]["table"][column])
    found = baselines_of(with_states["controls"])
    names = ("detection", "expression", "rank", "logfc")
    assert sorted(found.index) == sorted((measure, name) for measure in ("shift", "toward") for name in names)
    sample = with_states["genes_of_all_ranks"]
    of_genes = fold[genes_of_all_ranks(cells, toy_model, **WITH_STATES)]
    for measure in ("shift", "toward"):
        # Ties of the fold change by scanpy's float32 and ours need not be the same.
        expected = stats.spearmanr(sample[measure], of_genes).statistic
        assert found.loc[(measure, "logfc"), "spearman"] == pytest.approx(expected, abs=1e-6)
        assert found.loc[(measure, "logfc"), "n"] == 100


def test_states_of_one_cell_have_no_fold_change(cells, toy_model, value_of):
    cells.obs["state"] = ["one", *["rest"] * 23]
    with pytest.warns(UserWarning, match=r"Whether 'rest' and 'one' are separable could not be tested: no cells"):
        delete_genes(cells, GENE, model=toy_model, groupby="state", start="rest", goal="one", controls="baselines")
    table = cells.uns["gfx_delete"]["table"]
    assert table["logfc"].isna().all()
    assert table["expression_mean"].notna().all()
    assert np.isnan(value_of(cells.uns["gfx_delete"]["controls"], "state_axis", "auc", "toward"))


def normalised(adata):
    gfx.pp.tokenize(adata, model=TOKENIZED["model"])
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)


def layer_gone(adata):
    gfx.pp.tokenize(adata, model=TOKENIZED["model"], layer="doubled")
    del adata.layers["doubled"]


def emptied(adata):
    gfx.pp.tokenize(adata, model=TOKENIZED["model"])
    adata.X = None


def raw_gone(adata):
    gfx.pp.tokenize(adata, model=TOKENIZED["model"], use_raw=True)
    adata.raw = None


TOKENIZED = {}


@pytest.mark.parametrize("spoil", [normalised, layer_gone, emptied, raw_gone])
def test_counts_that_are_gone_cost_the_baseline_alone(cells, toy_model, caplog, spoil):
    expected = cells.copy()
    gfx.tl.delete_genes(expected, GENE, model=toy_model, n_random=5)
    TOKENIZED["model"] = toy_model
    spoil(cells)
    with caplog.at_level(logging.INFO, logger="gfx"):
        gfx.tl.delete_genes(cells, GENE, model=toy_model, n_random=5)
    assert "Expression is missing from the baselines, because there are no counts to read: " in caplog.text
    for table in ("table", "random_sets"):
        found = cells.uns["gfx_delete"][table].drop(columns="expression_mean", errors="ignore")
        wanted = expected.uns["gfx_delete"][table].drop(columns="expression_mean", errors="ignore")
        pd.testing.assert_frame_equal(found, wanted)
    assert cells.uns["gfx_delete"]["table"]["expression_mean"].isna().all()
    assert cells.uns["gfx_delete"]["controls"].query("statistic == 'partial_spearman'")["control"].tolist() == [
        "detection",
        "rank",
    ]


def test_bugs_are_not_taken_for_counts_that_are_gone(cells, toy_model, slots, monkeypatch):
    """What is wrong in the arithmetic is raised, and nothing is written."""

    def broken(*_arguments):
        msg = "the arithmetic has changed"
        raise ValueError(msg)

    monkeypatch.setattr("gfx.tl._baselines._expression", broken)
    before = slots(cells)
    with pytest.raises(ValueError, match="the arithmetic has changed"):
        delete_genes(cells, GENE, model=toy_model, controls="baselines", **WITH_STATES)
    assert slots(cells) == before
