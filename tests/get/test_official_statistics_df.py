"""Slots in, the tables of the official software out."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import gfx
from gfx._results import PERTURBATIONS, TABLE
from gfx.get import _official as official

METHODS = ["goal_state_shift", "vs_null", "mixture", "aggregate", "gene_shifts"]
NAMES = ["A", "B", "C", "D", "A+B"]
IDS = ["ENSG00000000004", "ENSG00000000003", "ENSG00000000002", "ENSG00000000001", "ENSG00000000004+ENSG00000000003"]
STATES = ["goal", "other", "start"]


def put(adata, *, function="tl.delete_genes", key=None, names=NAMES, ids=IDS, with_states=True, seed=0):
    """Write what a perturbation leaves behind, of made-up numbers."""
    rng = np.random.default_rng(seed)
    n, p, v = adata.n_obs, len(names), adata.n_vars
    key = key or TABLE[function].default
    shift = rng.uniform(0, 0.4, (n, p)).astype(np.float32)
    shift[rng.random(shift.shape) < 0.3] = np.nan
    n_cells = rng.integers(0, 4, (v, p)).astype(np.int32)
    adata.obsm[key] = shift
    adata.varm[key] = np.where(n_cells > 0, rng.uniform(0, 0.4, (v, p)), np.nan).astype(np.float32)
    adata.varm[f"{key}_sd"] = np.where(n_cells > 0, rng.uniform(0, 0.1, (v, p)), np.nan).astype(np.float32)
    adata.varm[f"{key}_n_cells"] = n_cells
    params = {"gfx_version": "0", "function": function}
    result = {"perturbations": np.array(names, dtype=object), "ensembl_ids": np.array(ids, dtype=object)}
    if with_states:
        toward = rng.normal(0, 0.1, (n, p, 3)).astype(np.float32)
        toward[np.isnan(shift)] = np.nan
        adata.obsm[f"{key}_states"] = toward
        result["states"] = np.array(STATES, dtype=object)
        params |= {"groupby": "state", "start": "start", "goal": "goal"}
    adata.uns[key] = {"params": params, **result}


@pytest.fixture
def adata():
    var = pd.DataFrame({"ensembl_id": [f"ENSG{at:011d}.2" for at in range(1, 7)]}, index=list("DCBAEF"))
    found = ad.AnnData(np.zeros((20, 6), dtype=np.float32), var=var)
    found.obs_names = [f"cell{at}" for at in range(20)]
    put(found)
    put(found, key="null", seed=1)
    return found


def arguments(method):
    return {"null_key": "null"} if method == "vs_null" else {}


def expected(adata, method):
    genes = pd.DataFrame({"Gene_name": NAMES, "Ensembl_ID": IDS}, dtype=object)
    cosines = 1 - adata.obsm["gfx_delete"].astype(np.float64)
    toward = adata.obsm["gfx_delete_states"]
    mean, sd, n = (adata.varm[f"gfx_delete{part}"] for part in ("", "_sd", "_n_cells"))
    ids = [f"ENSG{at:011d}" for at in range(1, 7)]
    affected = pd.DataFrame({"Gene_name": list("DCBAEF"), "Ensembl_ID": ids}, dtype=object)
    match method:
        case "goal_state_shift":
            return official.goal_state_shift(genes, toward[:, :, 0], {"other": toward[:, :, 1]})
        case "vs_null":
            return official.vs_null(genes, cosines, 1 - adata.obsm["null"].astype(np.float64))
        case "mixture":
            return official.mixture(genes, cosines)
        case "aggregate":
            return official.aggregate(genes, cosines)
        case _:
            of_genes = {"mean": 1 - mean.astype(np.float64), "sd": sd, "n": n}
            return official.gene_shifts(genes, cosines, affected, of_genes)


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_tables(adata, method):
    found = gfx.get.official_statistics_df(adata, method, **arguments(method))
    pd.testing.assert_frame_equal(found, expected(adata, method))
    assert len(found)


@pytest.mark.parametrize("method", METHODS)
def test_tables_after_a_file(adata, method, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    back = ad.read_h5ad(tmp_path / "cells.h5ad")
    found, before = (gfx.get.official_statistics_df(one, method, **arguments(method)) for one in (back, adata))
    pd.testing.assert_frame_equal(found, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("function", PERTURBATIONS)
def test_any_perturbation_under_any_key(adata, function, method):
    before = gfx.get.official_statistics_df(adata, method, **arguments(method))
    other = ad.AnnData(adata.X, obs=adata.obs, var=adata.var)
    put(other, function=function)
    put(other, function=function, key="mine")
    put(other, function=function, key="null", seed=1)
    for key in (None, TABLE[function].default, "mine"):
        found = gfx.get.official_statistics_df(other, method, key=key, **arguments(method))
        pd.testing.assert_frame_equal(found, before)


def test_mudata(adata, as_mudata):
    mdata = as_mudata({"rna": adata, "other": ad.AnnData(np.zeros((20, 1), dtype=np.float32), obs=adata.obs)})
    found = gfx.get.official_statistics_df(mdata, "aggregate", mod="rna")
    pd.testing.assert_frame_equal(found, gfx.get.official_statistics_df(adata, "aggregate"))


def test_goal_state_shift_of_one_perturbation_has_nothing_to_compare_with(adata):
    put(adata, key="one", names=["A+B"], ids=IDS[-1:])
    found = gfx.get.official_statistics_df(adata, "goal_state_shift", key="one")
    assert found.columns.tolist() == ["Shift_to_goal_end", "Shift_to_alt_end_other"]
    np.testing.assert_allclose(found.to_numpy()[0], np.nanmean(adata.obsm["one_states"][:, 0, :2], axis=0), 1e-6)


def test_a_subset_has_the_statistics_of_its_cells(adata):
    some = adata[:7].copy()
    found = gfx.get.official_statistics_df(some, "aggregate")
    assert len(found) == int((~np.isnan(adata.obsm["gfx_delete"][:7])).sum())


def test_the_null_is_matched_by_gene(adata):
    put(adata, key="shuffled", names=["x", "y", "B"], ids=[IDS[4], "ENSG00000000099", IDS[1]], seed=3)
    found = gfx.get.official_statistics_df(adata, "vs_null", null_key="shuffled").set_index("Ensembl_ID")
    null = 1 - np.nanmean(adata.obsm["shuffled"].astype(np.float64), axis=0)
    assert found["Null_avg_shift"][IDS[4]] == pytest.approx(null[0])
    assert found["Null_avg_shift"][IDS[1]] == pytest.approx(null[2])
    assert found.loc[[IDS[0], IDS[2], IDS[3]], "N_Detections_null"].eq(0).all()
    assert found.loc[[IDS[0], IDS[2], IDS[3]], "Test_vs_null_pval"].eq(1).all()


def affected(adata):
    table = gfx.get.official_statistics_df(adata, "gene_shifts")
    genes = table[table["Affected"] != "cell_emb"]
    assert not genes.duplicated(["Ensembl_ID", "Affected_gene_name"]).any()
    return dict(zip(genes["Affected_gene_name"], genes["Affected_Ensembl_ID"], strict=True))


def test_where_the_ids_of_affected_genes_come_from(adata):
    adata.varm["gfx_delete_n_cells"][:] = 1
    adata.var["stable"] = [f"ENSG{at:011d}" for at in range(11, 17)]
    adata.uns["gfx_delete"]["params"]["gene_ids"] = "stable"
    assert affected(adata)["D"] == "ENSG00000000011"
    del adata.uns["gfx_delete"]["params"]["gene_ids"]
    assert affected(adata)["D"] == "ENSG00000000001"
    adata.var["ensembl_id"] = ["ENSG00000000001", "", "ENSG00000000001", "ENSG00000000004", "", ""]
    found = affected(adata)  # two columns of one gene; three genes without an id
    assert set(found) == set("DCAEF")
    assert found["D"] == "ENSG00000000001"
    assert pd.isna(found["C"])
    del adata.var["ensembl_id"]
    assert pd.isna(list(affected(adata).values())).all()
    adata.var_names = [f"ENSG{at:011d}.7" for at in range(21, 27)]
    assert affected(adata)["ENSG00000000021.7"] == "ENSG00000000021"


@pytest.mark.filterwarnings("ignore:Held-out cells of:UserWarning")  # random cells, a random model
def test_after_the_tool(toy_cells, toy_model):
    adata = toy_cells(18)
    names = ["TOY90", "TOY48", "TOY90+TOY48"]
    call = {"model": toy_model, "groupby": "cell_type", "start": "b", "goal": "a", "controls": None}
    gfx.tl.delete_genes(adata, ["TOY90", "TOY48", ("TOY90", "TOY48")], **call)
    found = gfx.get.official_statistics_df(adata, "goal_state_shift").set_index("Gene_name").loc[names]
    assert found["Ensembl_ID"].tolist() == ["ENSG00000000090", "ENSG00000000048", "ENSG00000000090+ENSG00000000048"]
    toward = np.nanmean(adata.obsm["gfx_delete_states"].astype(np.float64), axis=0)
    np.testing.assert_allclose(found[["Shift_to_goal_end", "Shift_to_alt_end_c"]], toward[:, [0, 2]], rtol=1e-9)
    assert "Shift_to_alt_end_b" not in found
    genes = gfx.get.official_statistics_df(adata, "gene_shifts")
    genes = genes[genes["Affected"] != "cell_emb"]
    at = adata.var_names.get_indexer(genes["Affected_gene_name"]), pd.Index(names).get_indexer(genes["Gene_name"])
    assert len(genes) == (adata.varm["gfx_delete_n_cells"] > 0).sum()
    np.testing.assert_allclose(genes["Cosine_sim_mean"], 1 - adata.varm["gfx_delete"][at], rtol=1e-6)
    np.testing.assert_array_equal(genes["Cosine_sim_stdev"], adata.varm["gfx_delete_sd"][at])
    np.testing.assert_array_equal(genes["N_Detections"], adata.varm["gfx_delete_n_cells"][at])
    assert genes["Affected_Ensembl_ID"].tolist() == adata.var["ensembl_id"].iloc[at[0]].tolist()


def test_tables_write_nothing(adata):
    kept = {name: {slot: getattr(adata, name)[slot] for slot in getattr(adata, name)} for name in ("obsm", "varm")}
    kept = {name: {slot: values.copy() for slot, values in slots.items()} for name, slots in kept.items()}
    for method in METHODS:
        table = gfx.get.official_statistics_df(adata, method, **arguments(method))
        table.iloc[:, 0] = table.iloc[0, 0]
    for name, slots in kept.items():
        assert list(getattr(adata, name)) == list(slots)
        for slot, values in slots.items():
            np.testing.assert_array_equal(getattr(adata, name)[slot], values)
    assert adata.uns["gfx_delete"]["perturbations"].tolist() == NAMES


# --- errors ---------------------------------------------------------------------------------------------------------


def test_no_such_method(adata):
    with pytest.raises(
        ValueError, match=r"one of \['goal_state_shift', .*\], found 'mixture_model'\. Did you mean 'mix"
    ):
        gfx.get.official_statistics_df(adata, "mixture_model")


def test_a_null_is_needed_for_one_method_and_for_no_other(adata):
    with pytest.raises(
        ValueError, match=r"found no `null_key`\. Run `gfx\.tl\.delete_genes\(adata, \.\.\., key_added='nu"
    ):
        gfx.get.official_statistics_df(adata, "vs_null")
    with pytest.raises(ValueError, match=r"`null_key='null'` is for `method='vs_null'`, found 'mixture'\. Leave"):
        gfx.get.official_statistics_df(adata, "mixture", null_key="null")
    with pytest.raises(
        KeyError, match=r"Did not find 'nul' in `adata\.uns`\. Results of `gfx\.tl\.delete_genes`, .*: .*'null'\]"
    ):
        gfx.get.official_statistics_df(adata, "vs_null", null_key="nul")
    with pytest.raises(ValueError, match=r"is the result to be compared itself"):
        gfx.get.official_statistics_df(adata, "vs_null", null_key="gfx_delete")
    put(adata, key="strangers", names=["x"], ids=["ENSG00000000099"])
    with pytest.raises(ValueError, match=r"has none of the perturbations \['A', .*\]; it has \['x'\]\. Run the same"):
        gfx.get.official_statistics_df(adata, "vs_null", null_key="strangers")


def test_states_are_needed_for_one_method(adata):
    put(adata, key="plain", with_states=False)
    with pytest.raises(
        ValueError,
        match=r"has no states, so no goal to shift toward. Run `gfx\.tl\.delete_genes\(adata, \.\.\., groupby=",
    ):
        gfx.get.official_statistics_df(adata, "goal_state_shift", key="plain")
    for method in METHODS[1:]:
        assert len(gfx.get.official_statistics_df(adata, method, key="plain", **arguments(method)))


def test_a_mixture_needs_several_perturbations(adata):
    put(adata, key="one", names=["A"], ids=IDS[:1])
    with pytest.raises(ValueError, match=r"two different averages; found 1 with 1\. Perturb more genes"):
        gfx.get.official_statistics_df(adata, "mixture", key="one")


@pytest.mark.parametrize("method", METHODS)
def test_no_result(toy_cells, toy_model, method):
    adata = toy_cells(3)
    adata.uns |= {"neighbors": {"params": {"method": "umap"}}, "list": ["params"]}
    with pytest.raises(KeyError, match=r"Did not find a result of `gfx\.tl\.delete_genes`, .*Run one of them first"):
        gfx.get.official_statistics_df(adata, method)
    for key in ("mine", "neighbors", "list", ""):
        with pytest.raises(KeyError, match=rf"Did not find '{key}' in `adata\.uns`.*Run one of them first"):
            gfx.get.official_statistics_df(adata, method, key=key)
    gfx.tl.embed(adata, model=toy_model, key_added="embedding")
    with pytest.raises(KeyError, match=r"`adata\.uns\['embedding'\]` was written by `gfx\.tl\.embed`, not by `gfx\.tl"):
        gfx.get.official_statistics_df(adata, method, key="embedding")


def test_several_results_under_default_names(adata):
    put(adata, function="tl.shift_genes")
    with pytest.raises(
        KeyError, match=r"several results of .*; choose one with `key=`: \['gfx_delete', 'gfx_shift', 'null'\]"
    ):
        gfx.get.official_statistics_df(adata, "mixture")
    assert len(gfx.get.official_statistics_df(adata, "mixture", key="gfx_shift"))


@pytest.mark.parametrize(
    ("where", "slot", "method"),
    [
        ("obsm", "gfx_delete", "mixture"),
        ("obsm", "gfx_delete_states", "goal_state_shift"),
        ("varm", "gfx_delete_sd", "gene_shifts"),
        ("obsm", "null", "vs_null"),
    ],
)
def test_a_part_of_the_result_is_gone(adata, where, slot, method):
    del getattr(adata, where)[slot]
    with pytest.raises(KeyError, match=rf"Did not find `adata\.{where}\[.*{slot}.*a part of the result"):
        gfx.get.official_statistics_df(adata, method, **arguments(method))
