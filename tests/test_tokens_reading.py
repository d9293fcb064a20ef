"""Tokens read back: joined tables, tables that are damaged, tokens of several models in one object."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import gfx
from gfx._tokens import find_tokens

MERGE = {"merge": "same", "uns_merge": "same"}


@pytest.fixture
def tables(toy_cells, toy_model):
    """Tokens of two tables, the second much narrower; and both as one table that was never apart."""
    wide, narrow = toy_cells(12), toy_cells(9, seed=1)
    narrow.X = narrow.X.multiply(np.arange(narrow.n_vars) % 4 == 0).tocsr()
    narrow.obs_names = [f"narrow{i}" for i in range(9)]
    whole = ad.concat([wide, narrow])
    for adata in (wide, narrow, whole):
        gfx.pp.tokenize(adata, model=toy_model)
    assert narrow.obsm["gfx_tokens"].shape[1] < wide.obsm["gfx_tokens"].shape[1]
    return wide, narrow, whole


@pytest.fixture
def tokens(toy_cells, toy_model):
    """Cells with tokens."""
    adata = toy_cells(12)
    gfx.pp.tokenize(adata, model=toy_model)
    return adata


def read(adata, model, **kwargs):
    return find_tokens(adata, model.vocabulary, model.max_length, **kwargs)


def padded(tokens):
    return tokens.padded(np.arange(len(tokens)))


# --- memory ---------------------------------------------------------------------------------------------------------


def test_one_deep_cell_costs_the_others_nothing(toy_cells, toy_model):
    adata = toy_cells(12)
    shallow = adata.X[1:].multiply(np.arange(adata.n_vars) % 4 == 0)
    adata.X = sparse.vstack([np.ones((1, adata.n_vars), dtype=np.float32), shallow]).tocsr()
    found = read(adata, toy_model)
    assert found.lengths[0] == toy_model.max_length > found.lengths[1:].max()
    assert found.values.nbytes == 2 * found.lengths.sum()


def test_stored_tokens_are_not_copied(tokens, toy_model):
    assert np.shares_memory(read(tokens, toy_model).values, tokens.obsm["gfx_tokens"])


# --- joined tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_an_outer_join_keeps_tokens(tables, toy_model, order):
    *parts, _ = tables
    joined = ad.concat(parts[::order], join="outer", **MERGE)
    assert joined.obsm["gfx_tokens"].dtype == np.float64  # NaN fills what is narrower
    found = read(joined, toy_model)
    assert found.values.dtype == np.uint16
    for part in parts:
        rows, ids = joined.obs_names.isin(part.obs_names), part.obsm["gfx_tokens"]
        np.testing.assert_array_equal(found.padded(np.flatnonzero(rows)), ids)
        np.testing.assert_array_equal(found.lengths[rows], part.obs["gfx_tokens_n"])


@pytest.mark.usefixtures("in_float32")
def test_embeddings_of_an_outer_join_are_those_of_its_parts(tables, toy_model):
    *parts, whole = tables
    joined = ad.concat(parts, join="outer", **MERGE)
    for adata in (*parts, joined, whole):
        gfx.tl.embed(adata, model=toy_model)
    apart = np.concatenate([part.obsm["X_gfx"] for part in parts])
    np.testing.assert_allclose(joined.obsm["X_gfx"], apart, atol=1e-6)
    np.testing.assert_allclose(joined.obsm["X_gfx"], whole.obsm["X_gfx"], atol=1e-6)


def test_an_inner_join_cuts_tokens_and_is_refused(tables, toy_model):
    *parts, _ = tables
    joined = ad.concat(parts, **MERGE)
    width = joined.obsm["gfx_tokens"].shape[1]
    n_cut = int((joined.obs["gfx_tokens_n"] > width).sum())
    assert n_cut
    with pytest.raises(ValueError, match=rf"{n_cut} cells.*have been cut, as `anndata\.concat`.*`join='outer'`"):
        gfx.tl.embed(joined, model=toy_model)
    assert "X_gfx" not in joined.obsm


def test_a_join_of_equal_widths_needs_nothing(tokens, toy_model):
    joined = ad.concat([tokens, tokens], index_unique="-", **MERGE)
    np.testing.assert_array_equal(padded(read(joined, toy_model)), np.tile(tokens.obsm["gfx_tokens"], (2, 1)))


def test_cells_that_joined_without_tokens_are_not_empty_cells(tokens, toy_cells, toy_model):
    joined = ad.concat([tokens, toy_cells(5, seed=1)], join="outer", index_unique="-", merge="same", uns_merge="first")
    with pytest.raises(ValueError, match="5 cells"):
        read(joined, toy_model)


@pytest.mark.parametrize("join", ["inner", "outer"])
def test_a_join_without_records(tables, toy_model, join):
    *parts, _ = tables
    with pytest.raises(ValueError, match=r"no full record.*drops `uns` unless called with `uns_merge="):
        read(ad.concat(parts, join=join), toy_model)


# --- damaged tables -------------------------------------------------------------------------------------------------


def half(ids):
    return ids + 0.5


def negative(ids):
    return ids.astype(np.int32) - 1


def too_high(ids):
    return np.where(ids == ids.max(), 204, ids)  # 200 genes and 4 special tokens: 0 to 203


def infinite(ids):
    return np.where(ids == 0, np.inf, ids)


def truth(ids):
    return ids > 0


def text(ids):
    return ids.astype(str)


@pytest.mark.parametrize("damage", [half, negative, too_high, infinite, truth, text])
def test_what_is_no_token_is_refused(tokens, toy_model, damage):
    tokens.obsm["gfx_tokens"] = damage(tokens.obsm["gfx_tokens"])
    with pytest.raises(ValueError, match=r"whole numbers from 0 to 203.*Run `gfx\.pp\.tokenize` again"):
        read(tokens, toy_model)


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_the_same_numbers_of_another_kind_are_the_same_tokens(tokens, toy_model, dtype):
    expected = read(tokens, toy_model)
    tokens.obsm["gfx_tokens"] = tokens.obsm["gfx_tokens"].astype(dtype)
    found = read(tokens, toy_model)
    np.testing.assert_array_equal(padded(found), padded(expected))
    np.testing.assert_array_equal(found.lengths, expected.lengths)


def test_tokens_without_the_column_of_lengths(tokens, toy_model):
    expected = read(tokens, toy_model)
    del tokens.obs["gfx_tokens_n"]
    np.testing.assert_array_equal(read(tokens, toy_model).lengths, expected.lengths)


# --- tokens of several models ---------------------------------------------------------------------------------------


def test_tokens_are_found_by_their_vocabulary(tokens, toy_model, toy_model_v1, capsys):
    gfx.pp.tokenize(tokens, model=toy_model_v1, key_added="older")
    tokens.uns["params"] = {"params": "something else"}
    capsys.readouterr()
    with gfx.settings.override(verbosity=2):
        np.testing.assert_array_equal(padded(read(tokens, toy_model)), tokens.obsm["gfx_tokens"])
        assert capsys.readouterr().out == ""
        np.testing.assert_array_equal(padded(read(tokens, toy_model_v1)), tokens.obsm["older"])
        assert "'older' (adata.obsm)" in capsys.readouterr().out


def test_tokens_are_found_by_their_layer(tokens, toy_model):
    tokens.layers["reversed"] = tokens.X[::-1].copy()
    gfx.pp.tokenize(tokens, model=toy_model, layer="reversed", key_added="other")
    np.testing.assert_array_equal(padded(read(tokens, toy_model)), tokens.obsm["gfx_tokens"])
    found = read(tokens, toy_model, layer="reversed")
    np.testing.assert_array_equal(padded(found), tokens.obsm["other"])
    assert found.source["layer"] == "reversed"


def test_tokens_of_other_models_alone_are_refused_by_name(tokens, toy_model, toy_model_v1):
    tokens.obsm["mine"] = tokens.obsm.pop("gfx_tokens")
    tokens.uns["mine"] = tokens.uns.pop("gfx_tokens")
    np.testing.assert_array_equal(padded(read(tokens, toy_model)), tokens.obsm["mine"])
    with pytest.raises(ValueError, match=r"`adata\.obsm\['mine'\]` were made for the vocabulary 'toy', .*`key_added=`"):
        read(tokens, toy_model_v1)
