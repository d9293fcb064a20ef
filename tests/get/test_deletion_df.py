from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import gfx

GENES = ["TOY90", "TOY48", ("TOY90", "TOY48")]
NAMES = ["TOY90", "TOY48", "TOY90+TOY48"]


@pytest.fixture(scope="module")
def plain(toy_cells, toy_model):
    adata = toy_cells(18)
    gfx.tl.delete_genes(adata, GENES, model=toy_model)
    return adata


@pytest.fixture(scope="module")
def with_states(toy_cells, toy_model):
    adata = toy_cells(18)
    gfx.tl.delete_genes(adata, GENES, model=toy_model, groupby="cell_type", start="b", goal="a", key_added="mine")
    return adata


def test_deletion_df(plain):
    table = gfx.get.deletion_df(plain)
    assert table["perturbation"].tolist() == NAMES
    shift = plain.obsm["gfx_delete"].astype(np.float64)
    np.testing.assert_allclose(table["shift_mean"], np.nanmean(shift, axis=0))
    np.testing.assert_allclose(table["shift_sd"], np.nanstd(shift, axis=0, ddof=1))
    assert table["n_cells"].tolist() == (~np.isnan(shift)).sum(axis=0).tolist()
    table["shift_mean"] = 0.0  # a copy: the result stays as it is
    assert gfx.get.deletion_df(plain)["shift_mean"].gt(0).all()


def test_deletion_df_with_states(with_states):
    table = gfx.get.deletion_df(with_states, key="mine")
    assert table["perturbation"].tolist() == [name for name in NAMES for _ in "abc"]
    assert table["state"].tolist() == list("abc") * 3
    assert table["role"].tolist() == ["goal", "start", "alternative"] * 3
    toward = with_states.obsm["mine_states"].astype(np.float64)
    np.testing.assert_allclose(table["toward_mean"].to_numpy().reshape(3, 3), np.nanmean(toward, axis=0))
    np.testing.assert_allclose(table["toward_sd"].to_numpy().reshape(3, 3), np.nanstd(toward, axis=0, ddof=1))
    shift = np.nanmean(with_states.obsm["mine"].astype(np.float64), axis=0)
    np.testing.assert_allclose(table["shift_mean"], np.repeat(shift, 3))
    assert "n_cells" in table
    assert table.columns.is_unique


def test_deletion_cells_df(plain):
    table = gfx.get.deletion_cells_df(plain)
    assert table.columns.tolist() == ["cell", "perturbation", "shift"]
    wide = table.pivot_table(index="cell", columns="perturbation", values="shift")
    wide = wide.reindex(index=plain.obs_names, columns=NAMES)
    np.testing.assert_array_equal(wide, plain.obsm["gfx_delete"])
    assert not table.duplicated(["cell", "perturbation"]).any()


def test_deletion_cells_df_with_states(with_states):
    table = gfx.get.deletion_cells_df(with_states, key="mine")
    assert table.columns.tolist() == ["cell", "perturbation", "shift", "state", "toward"]
    assert not table.isna().any(axis=None)
    for at, state in enumerate("abc"):
        wide = table[table["state"] == state].pivot_table(index="cell", columns="perturbation", values="toward")
        wide = wide.reindex(index=with_states.obs_names, columns=NAMES)
        np.testing.assert_array_equal(wide, with_states.obsm["mine_states"][:, :, at])


def test_gene_effects_df(plain):
    everything = gfx.get.gene_effects_df(plain)
    assert everything.columns.tolist() == ["perturbation", "gene", "shift", "n_cells"]
    assert everything["perturbation"].unique().tolist() == NAMES
    for at, name in enumerate(NAMES):
        table = gfx.get.gene_effects_df(plain, name)
        pd.testing.assert_frame_equal(table, everything[everything["perturbation"] == name].reset_index(drop=True))
        assert table["shift"].is_monotonic_decreasing
        seen = plain.varm["gfx_delete_n_cells"][:, at] > 0
        assert set(table["gene"]) == set(plain.var_names[seen])
        by_gene = table.set_index("gene").loc[plain.var_names[seen]]
        np.testing.assert_array_equal(by_gene["shift"], plain.varm["gfx_delete"][seen, at])
        np.testing.assert_array_equal(by_gene["n_cells"], plain.varm["gfx_delete_n_cells"][seen, at])


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
        gfx.tl.delete_genes(adata, [absent, "TOY90"], model=toy_model)
    assert gfx.get.deletion_df(adata)["n_cells"].iloc[0] == 0
    assert gfx.get.gene_effects_df(adata, absent).empty
    assert set(gfx.get.gene_effects_df(adata)["perturbation"]) == {"TOY90"}
    assert set(gfx.get.deletion_cells_df(adata)["perturbation"]) == {"TOY90"}


TABLES = {
    "deletion_df": ("gfx_delete", r"gfx\.tl\.delete_genes\(adata, \.\.\."),
    "deletion_cells_df": ("gfx_delete", r"gfx\.tl\.delete_genes\(adata, \.\.\."),
    "gene_effects_df": ("gfx_delete", r"gfx\.tl\.delete_genes\(adata, \.\.\."),
    "attention_df": ("gfx_attention", r"gfx\.tl\.attention\(adata"),
    "attention_ranks_df": ("gfx_attention", r"gfx\.tl\.attention\(adata"),
    "attention_heads_df": ("gfx_attention", r"gfx\.tl\.attention\(adata"),
}


@pytest.mark.parametrize("name", TABLES)
def test_nothing_to_tabulate(toy_cells, name):
    slot, call = TABLES[name]
    adata = toy_cells(3)
    adata.uns |= {"neighbors": {"params": {"method": "umap"}}, "other": {"params": "text"}, "list": ["params"]}
    with pytest.raises(
        KeyError, match=rf"Did not find '{slot}' in `adata\.uns`\. Run `{call}\)` first\. .* here: \[\]"
    ):
        getattr(gfx.get, name)(adata)
    for key in ("mine", "neighbors", "other", "list"):
        with pytest.raises(KeyError, match=rf"Run `{call}, key_added='{key}'\)` first|was written by"):
            getattr(gfx.get, name)(adata, key=key)


@pytest.mark.parametrize("name", TABLES)
def test_the_result_of_another_tool(toy_cells, toy_model, name):
    adata = toy_cells(6)
    gfx.tl.embed(adata, model=toy_model, key_added="mine")
    with pytest.raises(KeyError, match=r"`adata\.uns\['mine'\]` was written by 'tl\.embed', not by `gfx\.tl\."):
        getattr(gfx.get, name)(adata, key="mine")


def test_results_under_other_keys_are_named(with_states):
    with pytest.raises(KeyError, match=r"Results of `gfx\.tl\.delete_genes` here: \['mine'\]"):
        gfx.get.deletion_df(with_states)


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
