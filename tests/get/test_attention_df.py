from __future__ import annotations

import numpy as np
import pytest

import gfx

LAYERS, HEADS = 3, 2


@pytest.fixture(scope="module", params=[None, "mine"])
def key(request):
    return request.param


@pytest.fixture(scope="module")
def adata(toy_cells, toy_model, key):
    adata = toy_cells(18)
    gfx.tl.attention(adata, model=toy_model, key_added=key)
    return adata


def test_attention_df(adata, key):
    slot = key or "gfx_attention"
    table = gfx.get.attention_df(adata, key=key)
    assert table.columns.tolist() == ["gene", "layer", "head", "attention", "uniform", "ratio", "n_cells"]
    seen = adata.var[f"{slot}_n_cells"] > 0
    assert len(table) == seen.sum() * LAYERS * HEADS
    assert not table.isna().any(axis=None)
    for row in table.sample(50, random_state=0).itertuples():
        at = adata.var_names.get_loc(row.gene)
        assert row.attention == adata.varm[slot][at, (row.layer - 1) * HEADS + row.head - 1]
        assert row.uniform == adata.var[f"{slot}_uniform"].iloc[at]
        assert row.n_cells == adata.var[f"{slot}_n_cells"].iloc[at]
        assert row.ratio == pytest.approx(row.attention / row.uniform)


@pytest.mark.parametrize("min_cells", [0, 4, 1000])
def test_genes_of_few_cells_are_left_out(adata, key, min_cells):
    table = gfx.get.attention_df(adata, key=key, min_cells=min_cells)
    enough = adata.var[f"{key or 'gfx_attention'}_n_cells"] >= max(min_cells, 1)
    assert len(table) == enough.sum() * LAYERS * HEADS
    assert set(table["gene"]) == set(adata.var_names[enough])


def test_attention_ranks_df(adata, key):
    result = adata.uns[key or "gfx_attention"]
    table = gfx.get.attention_ranks_df(adata, key=key)
    assert table.columns.tolist() == ["layer", "head", "rank", "attention", "uniform", "ratio", "n_cells"]
    assert len(table) == result["ranks"].size
    for row in table.sample(50, random_state=0).itertuples():
        assert row.attention == result["ranks"][row.layer - 1, row.head - 1, row.rank - 1]
        assert row.uniform == result["ranks_uniform"][row.rank - 1]
        assert row.n_cells == result["ranks_n_cells"][row.rank - 1]
        assert row.ratio == pytest.approx(row.attention / row.uniform)
    assert table["rank"].min() == 1
    assert table.loc[table["rank"] == 1, "n_cells"].eq(18).all()


def test_attention_heads_df(adata, key):
    result = adata.uns[key or "gfx_attention"]
    table = gfx.get.attention_heads_df(adata, key=key)
    assert table.columns.tolist() == ["layer", "head", "entropy", "special"]
    for row in table.itertuples():
        assert row.entropy == result["entropy"][row.layer - 1, row.head - 1]
        assert row.special == result["special"][row.layer - 1, row.head - 1]
    assert len(table) == LAYERS * HEADS
    assert table["entropy"].between(0, 1).all()


def test_tables_agree_with_each_other(adata, key):
    """A cell's attention goes to genes and special tokens: by gene and by rank it adds up to the same."""
    by_gene, by_rank = gfx.get.attention_df(adata, key=key), gfx.get.attention_ranks_df(adata, key=key)
    special = gfx.get.attention_heads_df(adata, key=key).set_index(["layer", "head"])["special"]
    for table in (by_gene, by_rank):
        total = (table["attention"] * table["n_cells"]).groupby([table["layer"], table["head"]]).sum() / 18
        np.testing.assert_allclose(total, 1 - special, atol=1e-5)
