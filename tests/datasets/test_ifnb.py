from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import gfx

ORIGIN = Path(__file__).parents[3] / "shared/data/cells/tutorial/kang2018_ifnb_1120.h5ad"
INTERFERON = ["IFI27", "ISG15", "IFITM3", "CXCL10", "OAS3", "IFITM1", "IFI6"]


@pytest.fixture(scope="module")
def ifnb():
    return gfx.datasets.ifnb()


def test_raw_counts_of_1120_cells(ifnb):
    assert ifnb.shape == (1120, 12420)
    assert ifnb.X.format == "csr"
    assert ifnb.X.dtype == np.float32
    assert (ifnb.X.data >= 1).all()
    assert (ifnb.X.data == ifnb.X.data.round()).all()
    assert ifnb.obs["condition"].value_counts().to_dict() == {"control": 560, "stimulated": 560}
    assert ifnb.obs["cell_type"].value_counts().to_dict() == {"CD14 Mono": 600, "B": 200, "CD4 Naive T": 200, "NK": 120}
    assert "GSE96583" in ifnb.uns["source"]


def test_symbols_and_ids_name_the_same_genes(ifnb):
    vocabulary = gfx.models.load("mini").vocabulary
    by_symbol, by_id = vocabulary.resolve(ifnb.var_names), vocabulary.resolve(ifnb.var["ensembl_id"])
    both = (by_symbol >= 0) & (by_id >= 0)
    assert both.mean() > 0.9
    assert (by_symbol == by_id)[both].mean() > 0.999


def test_interferon_induces_its_known_genes(ifnb):
    stimulated = (ifnb.obs["condition"] == "stimulated").to_numpy()
    counts = ifnb[:, INTERFERON].X.toarray()
    assert (counts[stimulated].mean(axis=0) > 3 * counts[~stimulated].mean(axis=0)).all()


def test_each_call_reads_anew(ifnb):
    other = gfx.datasets.ifnb()
    other.X.data[:] = 0
    assert gfx.datasets.ifnb().X.sum() == ifnb.X.sum()


def test_counts_are_those_of_the_origin(ifnb):
    if not ORIGIN.exists():
        pytest.skip("needs ../shared")
    origin = ad.read_h5ad(ORIGIN)
    assert ifnb.obs_names.equals(origin.obs_names.rename(None))
    assert ifnb.var_names.equals(origin.var_names.rename(None))
    assert (ifnb.X != origin.X).nnz == 0
    for column in ("condition", "cell_type"):
        assert ifnb.obs[column].astype(str).equals(origin.obs[column].astype(str))
