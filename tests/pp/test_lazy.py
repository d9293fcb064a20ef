"""Lazily read objects, whose tables come from a file column by column."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import gfx

pytest.importorskip("xarray", reason="`anndata.experimental.read_lazy` needs xarray")


@pytest.fixture
def lazy(toy_cells, tmp_path):
    """Cells whose counts and tables stay on disk."""
    toy_cells(20).write_h5ad(tmp_path / "cells.h5ad")
    return ad.experimental.read_lazy(tmp_path / "cells.h5ad")


@pytest.mark.parametrize("gene_ids", [None, "ensembl_id"])
def test_lazy_cells_are_checked_and_tokenized_as_those_in_memory(lazy, toy_cells, toy_model, gene_ids):
    cells = toy_cells(20)
    findings = [gfx.pp.check(adata, model=toy_model, gene_ids=gene_ids) for adata in (cells, lazy)]
    pd.testing.assert_frame_equal(*findings)
    for adata in (cells, lazy):
        gfx.pp.tokenize(adata, model=toy_model, gene_ids=gene_ids)
    np.testing.assert_array_equal(lazy.obsm["gfx_tokens"], cells.obsm["gfx_tokens"])


@pytest.mark.usefixtures("in_float32")
def test_lazy_columns_group_cells_as_those_in_memory(lazy, toy_cells, toy_model):
    cells = toy_cells(20)
    for adata in (cells, lazy):
        gfx.tl.embed_genes(adata, model=toy_model, groupby="cell_type")
        gfx.pp.tokenize(adata, model=toy_model)
        gfx.tl.embed(adata, model=toy_model)
    np.testing.assert_array_equal(lazy.varm["gfx_genes_groups"], cells.varm["gfx_genes_groups"])
    np.testing.assert_array_equal(lazy.obsm["X_gfx"], cells.obsm["X_gfx"])


@pytest.mark.usefixtures("in_float32")
def test_official_statistics_of_lazy_cells_are_those_of_cells_in_memory(lazy, toy_cells, toy_model):
    cells = toy_cells(20)
    for adata in (cells, lazy):
        gfx.tl.delete_genes(adata, ["TOY1", "TOY2"], model=toy_model, controls=None, key_added="mine")
    tables = [gfx.get.official_statistics_df(adata, "gene_shifts", key="mine") for adata in (cells, lazy)]
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["Affected_Ensembl_ID"].iloc[1:].str.startswith("ENSG").all()
