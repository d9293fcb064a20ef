from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import gfx

pytestmark = pytest.mark.usefixtures("in_float32")


def naive(slow, adata, rows):
    """Mean state and number of cells of each gene, over the given cells."""
    seen = {}
    for row, tokens in enumerate(slow.tokens(adata)):
        if row in rows:
            states = slow.states(tokens)
            for token, state in zip(tokens, states, strict=True):
                seen.setdefault(slow.vocabulary.symbols[token], []).append(state)
    means = [np.mean(seen[gene], axis=0) if gene in seen else np.full(16, np.nan) for gene in adata.var_names]
    return np.array(means), [len(seen.get(gene, [])) for gene in adata.var_names]


def test_over_all_cells(cells, any_model, slow):
    gfx.tl.embed_genes(cells, model=any_model)
    means, counts = naive(slow, cells, range(24))
    np.testing.assert_allclose(cells.varm["gfx_genes"], means, atol=1e-5)
    assert cells.var["gfx_genes_n_cells"].tolist() == counts


def test_in_each_group(cells, any_model, slow):
    gfx.tl.embed_genes(cells, model=any_model, groupby="cell_type")
    assert cells.uns["gfx_genes"]["groups"].tolist() == ["a", "b", "c"]
    for at, group in enumerate("abc"):
        means, counts = naive(slow, cells, np.flatnonzero(cells.obs["cell_type"] == group))
        np.testing.assert_allclose(cells.varm["gfx_genes_groups"][:, at], means, atol=1e-5)
        assert cells.varm["gfx_genes_groups_n_cells"][:, at].tolist() == counts
    means, counts = naive(slow, cells, range(24))
    np.testing.assert_allclose(cells.varm["gfx_genes"], means, atol=1e-5)
    assert cells.var["gfx_genes_n_cells"].tolist() == counts


def test_cells_without_group_count_overall_only(cells, toy_model):
    gfx.tl.embed_genes(cells, model=toy_model, key_added="all")
    cells.obs["some"] = cells.obs["cell_type"].where(cells.obs["cell_type"] != "c")
    gfx.tl.embed_genes(cells, model=toy_model, groupby="some", key_added="some")
    np.testing.assert_allclose(cells.varm["some"], cells.varm["all"], atol=1e-5)
    assert cells.var["some_n_cells"].tolist() == cells.var["all_n_cells"].tolist()
    in_groups = cells.varm["some_groups_n_cells"].sum(axis=1)
    assert (in_groups <= cells.var["all_n_cells"]).all()
    assert in_groups.sum() < cells.var["all_n_cells"].sum()


def test_groups_without_cells_and_of_any_type(cells, toy_model):
    cells.obs["batch"] = pd.Categorical(np.arange(24) % 2, categories=[0, 1, 2])
    cells.obs["good"] = np.arange(24) % 2 == 0
    gfx.tl.embed_genes(cells, model=toy_model, groupby="batch")
    assert cells.uns["gfx_genes"]["groups"].tolist() == ["0", "1", "2"]
    assert np.isnan(cells.varm["gfx_genes_groups"][:, 2]).all()
    assert not cells.varm["gfx_genes_groups_n_cells"][:, 2].any()
    gfx.tl.embed_genes(cells, model=toy_model, groupby="good")
    assert cells.uns["gfx_genes"]["groups"].tolist() == ["False", "True"]
    assert cells.varm["gfx_genes_groups"].shape == (cells.n_vars, 2, 16)


def test_groups_of_an_earlier_run_do_not_stay(cells, toy_model):
    gfx.tl.embed_genes(cells, model=toy_model, groupby="cell_type")
    gfx.tl.embed_genes(cells, model=toy_model)
    assert {name for name in cells.varm if name.startswith("gfx")} == {"gfx_genes"}
    assert set(cells.uns["gfx_genes"]) == {"params", "slots"}
    assert "groupby" not in cells.uns["gfx_genes"]["params"]


@pytest.mark.parametrize("batch_tokens", [1, 200])
def test_embedding_does_not_depend_on_the_size_of_batches(cells, toy_model, batch_tokens):
    gfx.tl.embed_genes(cells, model=toy_model, key_added="all")
    with gfx.settings.override(batch_tokens=batch_tokens):
        gfx.tl.embed_genes(cells, model=toy_model, key_added="few")
    np.testing.assert_allclose(cells.varm["few"], cells.varm["all"], atol=1e-5)
