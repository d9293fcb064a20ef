"""Tokens read back: joined tables, tables that are damaged, tokens of several models in one object."""

from __future__ import annotations

import anndata as ad
import dask.array as da
import h5py
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


def test_joined_tokens_of_two_vocabularies_are_refused(toy_cells, toy_model, toy_model_v1):
    first, second = toy_cells(12), toy_cells(9, seed=1)
    second.obs_names = [f"second{i}" for i in range(9)]
    gfx.pp.tokenize(first, model=toy_model)
    gfx.pp.tokenize(second, model=toy_model_v1)
    joined = ad.concat([first, second], join="outer", merge="same", uns_merge="first")
    with pytest.raises(ValueError, match=r"vocabulary in 9 of 21 cells.*uns_merge=\"first\".*Run `gfx\.pp\.tok"):
        gfx.tl.embed(joined, model=toy_model)
    assert "X_gfx" not in joined.obsm
    # Without any counts to compare, too, and in the half that the record is not about.
    del joined.X
    for half in (joined, joined[12:]):
        with pytest.raises(ValueError, match="were made for another vocabulary in 9 of"):
            read(half, toy_model)
    np.testing.assert_array_equal(padded(read(joined[:12].copy(), toy_model)), padded(read(first, toy_model)))
    # Those of one vocabulary are joined as before, whichever record is kept.
    gfx.pp.tokenize(second, model=toy_model)
    joined = ad.concat([first, second], join="outer", merge="same", uns_merge="first")
    assert read(joined, toy_model).lengths.tolist() == [*first.obs["gfx_tokens_n"], *second.obs["gfx_tokens_n"]]


def test_tokens_of_an_earlier_version_have_no_mark_of_their_vocabulary(tokens, toy_model):
    expected = padded(read(tokens, toy_model))
    del tokens.obs["gfx_tokens_vocabulary"]
    np.testing.assert_array_equal(padded(read(tokens, toy_model)), expected)


# --- counts that changed --------------------------------------------------------------------------------------------


def other_cells(adata):
    adata.X = adata.X[::-1].copy()


def other_genes(adata):
    adata.var_names = [*adata.var_names[1:], adata.var_names[0]]


def downsampled(adata):
    adata.X = sparse.csr_matrix(np.random.default_rng(0).binomial(adata.X.toarray().astype(int), 0.3))


def corrected(adata):
    adata.X = adata.X.multiply(np.arange(adata.n_vars) % 5 > 0).tocsr() * np.float32(np.pi)
    adata.X.data += np.random.default_rng(0).normal(0, 0.1, adata.X.nnz).astype(np.float32).clip(-0.5, 0.5)


def other_depths(adata):
    adata.X = sparse.csr_matrix(np.log1p(adata.X.toarray()[:, ::-1] * 3.7))


@pytest.mark.parametrize("change", [other_cells, other_genes, downsampled, corrected, other_depths])
def test_tokens_of_counts_that_were_replaced_are_refused(toy_cells, toy_model, change):
    adata = toy_cells(200)
    gfx.pp.tokenize(adata, model=toy_model)
    change(adata)
    match = r"not those of the counts in `adata\.X`.*of 128 cells looked at.*'cell0'.*Run `gfx\.pp\.tokenize\(adata, mo"
    with pytest.raises(ValueError, match=match):
        gfx.tl.embed(adata, model=toy_model)
    assert "X_gfx" not in adata.obsm
    with pytest.raises(ValueError, match="not those of the counts"):
        gfx.tl.embed(adata[50:90].copy(), model=toy_model)
    if change is not corrected:
        gfx.pp.tokenize(adata, model=toy_model, counts="log1p" if change is other_depths else "raw")
        read(adata, toy_model)


def test_a_single_gene_that_went_or_rose_is_seen(tokens, toy_model):
    for value in (0, 500):
        changed = tokens.copy()
        cell = changed.X[3].toarray().ravel()
        column = np.flatnonzero(cell[:200] == 1)[0]
        changed.X = changed.X.toarray()
        changed.X[3, column] = value
        with pytest.raises(ValueError, match=r"12 cells looked at, 1 do not fit, such as 'cell3'"):
            read(changed, toy_model)


def normalised(adata):
    adata.X = sparse.csr_matrix(adata.X.multiply(1e4 / adata.X.sum(axis=1))).astype(np.float32)


def logarithms(adata):
    normalised(adata)
    adata.X = adata.X.log1p()


def scaled(adata):
    logarithms(adata)
    dense = adata.X.toarray()
    adata.X = (dense - dense.mean(axis=0)) / (dense.std(axis=0) + 1e-3)


def square_roots(adata):
    adata.X = adata.X.sqrt()


def no_counts(adata):
    del adata.X


def nothing(adata):
    pass


CHANGES = [nothing, normalised, logarithms, scaled, square_roots, no_counts]
CHOICES = {
    "all": lambda adata: adata,
    "a view": lambda adata: adata[30:170:3],
    "some cells": lambda adata: adata[[150, 3, 77]].copy(),
    "some genes": lambda adata: adata[:, 5:60].copy(),
    "reversed": lambda adata: adata[::-1, ::-1].copy(),
    "other genes": lambda adata: adata[:, 200:].copy(),
}


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_keeps_the_order_of_counts_keeps_tokens(toy_cells, toy_model, change, choose):
    adata = toy_cells(200)  # some have more genes than the model reads
    gfx.pp.tokenize(adata, model=toy_model)
    change(adata)
    chosen = CHOICES[choose](adata)
    found = read(chosen, toy_model)
    assert (found.lengths.min(), found.lengths.max()) > (0, 50)
    np.testing.assert_array_equal(found.padded(np.arange(len(found))), padded_table(chosen.obsm["gfx_tokens"]))


@pytest.mark.parametrize("digits", [2, 3, 6])
@pytest.mark.parametrize("counts", ["normalized", "log1p"])
def test_rounded_values_are_not_taken_for_others(toy_cells, toy_model, counts, digits):
    """Files are written with two digits, too."""
    adata = toy_cells(200)
    normalised(adata)
    if counts == "log1p":
        adata.X = adata.X.log1p()
    adata.X.data = adata.X.data.round(digits)
    gfx.pp.tokenize(adata, model=toy_model, counts=counts)
    assert len(read(adata, toy_model)) == 200
    adata.X = adata.X[::-1].copy()
    with pytest.raises(ValueError, match="not those of the counts"):
        read(adata, toy_model)


def padded_table(ids):
    return ids[:, : (ids > 0).sum(axis=1).max()]


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
@pytest.mark.parametrize("form", ["h5ad", "zarr", "backed", "dask", "csc", "dense"])
def test_replaced_counts_are_seen_wherever_they_are(toy_cells, toy_model, tmp_path, form):
    for is_replaced in (False, True):
        adata = toy_cells(200)
        gfx.pp.tokenize(adata, model=toy_model)
        if is_replaced:
            adata.X = adata.X[::-1]
        match form:
            case "h5ad" | "backed":
                adata.write_h5ad(tmp_path / "cells.h5ad")
                adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r" if form == "backed" else None)
            case "zarr":
                adata.write_zarr(tmp_path / "cells.zarr")
                adata = ad.read_zarr(tmp_path / "cells.zarr")
            case "dask":
                adata.X = da.from_array(adata.X.toarray(), chunks=(50, 40))
            case "csc":
                adata.X = adata.X.tocsc()
            case "dense":
                adata.X = adata.X.toarray()
        if is_replaced:
            with pytest.raises(ValueError, match="not those of the counts"):
                read(adata, toy_model)
        else:
            assert len(read(adata, toy_model)) == 200
        if form == "backed":
            adata.file.close()


def test_tokens_joined_over_different_genes_are_those_of_the_counts(toy_cells, toy_model):
    first, second = toy_cells(40)[:, :150].copy(), toy_cells(30, seed=1)[:, 60:].copy()
    second.obs_names = [f"second{i}" for i in range(30)]
    for adata in (first, second):
        gfx.pp.tokenize(adata, model=toy_model)
    for genes in ("inner", "outer"):
        joined = ad.concat([first, second], join="outer", merge="same", uns_merge="same")
        if genes == "inner":
            joined = joined[:, 60:150].copy()
        assert len(read(joined, toy_model)) == 70
        joined.X = joined.X[::-1].copy()
        with pytest.raises(ValueError, match="not those of the counts"):
            read(joined, toy_model)


def test_a_gene_of_two_columns_may_lose_one(toy_cells, toy_model):
    adata = toy_cells(40)
    adata.var["name"] = [*adata.var_names[:204], "TOY3"]
    adata.X = np.where(np.arange(205) == 204, 7, adata.X.toarray())
    gfx.pp.tokenize(adata, model=toy_model, gene_ids="name")
    assert len(read(adata, toy_model)) == 40
    assert len(read(adata[:, :204].copy(), toy_model)) == 40
    adata.X = adata.X[::-1].copy()
    with pytest.raises(ValueError, match="not those of the counts"):
        read(adata, toy_model)


def test_the_comparison_reads_few_cells(toy_cells, toy_model, tmp_path, monkeypatch):
    adata = toy_cells(3_000)
    gfx.pp.tokenize(adata, model=toy_model)
    chunks = []

    def load(block):
        chunks.append(len(block))
        return block

    in_dask = adata.copy()
    in_dask.X = da.from_array(adata.X.toarray(), chunks=(50, -1)).map_blocks(load, meta=adata.X[:0].toarray())
    read(in_dask, toy_model)
    assert sum(chunks) <= 4 * 50
    values, getitem = [], h5py.Dataset.__getitem__

    def counted(dataset, key, *args, **kwargs):
        found = getitem(dataset, key, *args, **kwargs)
        if dataset.name.startswith("/X"):
            values.append(np.size(found))
        return found

    for form in ("csr", "csc", "dense"):
        adata.X = adata.X.toarray() if form == "dense" else getattr(sparse, f"{form}_matrix")(adata.X)
        adata.write_h5ad(tmp_path / f"{form}.h5ad")
        backed = ad.read_h5ad(tmp_path / f"{form}.h5ad", backed="r")
        with monkeypatch.context() as patched:
            patched.setattr(h5py.Dataset, "__getitem__", counted)
            values.clear()
            read(backed, toy_model)
        backed.file.close()
        # 128 of 3,000 cells; where rows begin, of a few thousand; and of a matrix by columns nothing else.
        assert sum(values) <= 200 / 3_000 * adata.X.size + 10 * 3_001


# --- counts that are elsewhere --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        gfx.pp.tokenize,
        gfx.tl.embed,
        gfx.tl.embed_genes,
        gfx.tl.attention,
        lambda adata, **kwargs: gfx.tl.delete_genes(adata, ["TOY1"], **kwargs),
        lambda adata, **kwargs: gfx.models.fine_tune_cells(adata, "cell_type", "nowhere", **kwargs),
    ],
)
def test_counts_in_raw_beside_logarithms_are_found_by_every_error(toy_cells, toy_model, function):
    """As files of CELLxGENE have them."""
    cells = toy_cells(60)
    cells.raw = cells
    cells.X = cells.X.log1p()
    with pytest.raises(ValueError, match=r"log-normalised.*with `gfx\.pp\.tokenize\(adata, use_raw=True\)`"):
        function(cells, model=toy_model)
    assert not cells.uns
    gfx.pp.tokenize(cells, model=toy_model, use_raw=True)
    assert len(read(cells, toy_model)) == 60
