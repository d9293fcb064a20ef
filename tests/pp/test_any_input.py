"""Generated inputs of all kinds: what is accepted has the tokens of a reference, what is refused stays as it was.

150 of them run always, 10,000 by hand: ``pytest -m slow tests/pp/test_any_input.py``.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy import sparse

import gfx
from gfx._tokens import find_tokens

#: What files hold: counts as `x`, and the generator of random numbers.
VALUES = {
    "counts": lambda x, rng: x,
    "deep counts": lambda x, rng: x * rng.integers(1, 5_000, x.shape[1]),
    "detection": lambda x, rng: x > 0,
    "zeros": lambda x, rng: x * 0,
    "normalised": lambda x, rng: x / np.maximum(x.sum(axis=1, keepdims=True), 1) * 1e4,
    "log1p": lambda x, rng: np.log1p(x / np.maximum(x.sum(axis=1, keepdims=True), 1) * 1e4),
    "log1p of counts": lambda x, rng: np.log1p(x),
    "log2": lambda x, rng: np.log2(x * 1.7 + 1),
    "log10": lambda x, rng: np.log10(x + 1.0),
    "estimates": lambda x, rng: x * rng.beta(8, 2, x.shape),
    "shallow estimates": lambda x, rng: np.minimum(x * rng.beta(5, 2, x.shape), 14),
    "one fraction": lambda x, rng: np.where(np.arange(x.size).reshape(x.shape) == x.argmax(), 3.3, x),
    "FPKM": lambda x, rng: x / rng.lognormal(0, 0.8, x.shape[1]),
    "TPM": lambda x, rng: to_one_sum(x / rng.lognormal(0, 0.8, x.shape[1]), 1e6),
    "log of TPM": lambda x, rng: np.log1p(to_one_sum(x / rng.lognormal(0, 0.8, x.shape[1]), 1e6)),
    "small negative": lambda x, rng: np.where(rng.random(x.shape) < 0.02, -0.01, x * rng.beta(8, 2, x.shape)),
    "scaled": lambda x, rng: (x - x.mean(axis=0)) / (x.std(axis=0) + 0.1),
    "NaN": lambda x, rng: np.where(rng.random(x.shape) < 0.1, np.nan, x),
    "infinite": lambda x, rng: np.where(x == x.max(), np.inf, x),
    "below half": lambda x, rng: x / (x.max() + 1) / 2.1,
}
DTYPES = ["float64", "float32", "float16", "int64", "int32", "uint16", "bool", ">f4", ">i2", ">f8"]
COUNTS = ["raw", "normalized", "log1p", "estimated"]


def to_one_sum(x, total):
    return x / np.maximum(x.sum(axis=1, keepdims=True), 1e-9) * total


def with_duplicates(x):
    """Store every value in two parts."""
    csr = sparse.csr_array(x)
    halves = csr.data // 2 if x.dtype.kind in "iu" else csr.data / 2 if x.dtype.kind == "f" else csr.data
    halves = np.where(np.isfinite(csr.data), halves, 0).astype(x.dtype)
    data = np.column_stack([halves, csr.data ^ halves if x.dtype.kind == "b" else csr.data - halves]).ravel()
    return sparse.csr_array((data, np.repeat(csr.indices, 2), csr.indptr * 2), shape=x.shape)


def unsorted(x):
    csr = sparse.csr_array(x)
    for start, stop in zip(csr.indptr[:-1], csr.indptr[1:], strict=True):
        csr.data[start:stop], csr.indices[start:stop] = csr.data[start:stop][::-1], csr.indices[start:stop][::-1]
    return csr


def damaged(x):
    csr = sparse.csr_array(x)
    csr.indices[: csr.nnz // 2] += 1_000_000
    return csr


def masked(x):
    return np.ma.masked_array(x, mask=np.arange(x.size).reshape(x.shape) == x.argmax())


CONTAINERS = {
    "dense": np.array,
    "fortran": np.asfortranarray,
    "csr_matrix": sparse.csr_matrix,
    "csr_array": sparse.csr_array,
    "csc_matrix": sparse.csc_matrix,
    "csc_array": sparse.csc_array,
    "duplicates": with_duplicates,
    "unsorted": unsorted,
    "damaged": damaged,
    "masked": masked,
    "unmasked": np.ma.masked_array,
    "dask": lambda x: da.from_array(x, chunks=(5, 70)),
    "dask of csr": lambda x: da.from_array(x, chunks=(5, -1)).map_blocks(sparse.csr_matrix),
    "backed csr": sparse.csr_matrix,
    "backed csc": sparse.csc_matrix,
    "backed dense": np.array,
}
#: How genes are named, each in one way or every gene in its own; and what is counted beside them.
SPELLINGS = {
    "ids": "ENSG{:011d}",  # beyond those of the vocabulary they are ids of other genes
    "symbols": "TOY{}",
    "versioned": "ENSG{:011d}.7",
    "former": "OLDTOY{}",
    "prefixed": "GRCh38_TOY{}",
    "unknown": "Nothing{}",
    "proteins": "TOY{}_ADT",
}
NAMES = [*SPELLINGS, "mixed", "repeated", "few"]
PLACES = ["X", "layer", "raw"]
#: What a message of a refusal says to do.
REMEDIES = ("`layer=`", "gene_ids=", "all their genes", "from where it came", 'Leave `counts="log1p"` out')

INPUTS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "n_cells": st.integers(1, 25),
        "n_genes": st.integers(5, 205),
        "values": st.sampled_from(sorted(VALUES)),
        "dtype": st.sampled_from(DTYPES),
        "container": st.sampled_from(sorted(CONTAINERS)),
        "names": st.sampled_from(NAMES),
        "place": st.sampled_from(PLACES),
        "counts": st.sampled_from(COUNTS),
        "max_length": st.sampled_from([8, 64, 512]),
    }
)


def names_of(kind, rng, n_genes):
    """Names of some of 200 known genes and five unknown ones, and their numbers: 0 if unknown, -1 if no gene."""
    numbers = rng.permutation(205)[:n_genes] + 1
    if kind == "repeated":
        numbers[n_genes // 2 :] = numbers[: n_genes - n_genes // 2]
    if kind == "few":
        numbers[5:] = 201
    kinds = rng.choice([*SPELLINGS], n_genes) if kind in {"mixed", "repeated"} else np.full(n_genes, kind)
    names = [SPELLINGS.get(how, SPELLINGS["ids"]).format(n) for how, n in zip(kinds, numbers.tolist(), strict=True)]
    return names, np.select([kinds == "proteins", (numbers > 200) | (kinds == "unknown")], [-1, 0], numbers)


def reference(values, numbers, vocabulary, counts, max_length):
    """The tokens of each cell by the definition: summed by gene, over the median, descending, cut."""
    undo = np.expm1 if counts == "log1p" else lambda x: np.where(x < 0.5, 0, x) if counts == "estimated" else x
    first = int(np.flatnonzero(vocabulary.ids == "ENSG00000000001")[0])
    cells = []
    for row in undo(np.asarray(values, dtype=np.float64)):
        sums = np.zeros(len(vocabulary))
        np.add.at(sums, first + numbers[numbers > 0] - 1, row[numbers > 0])
        ranks = np.divide(sums, vocabulary.medians, out=np.zeros_like(sums), where=sums > 0)
        genes = np.lexsort((np.arange(len(ranks)), -ranks))[: (ranks > 0).sum()]
        cells.append((genes[: max_length - 2].tolist(), ranks))
    return cells


def assert_as_reference(cells, tokens, lengths, *, is_exact):
    for (genes, ranks), row, length in zip(cells, tokens, lengths, strict=True):
        own = row[1 : length - 1].tolist() if length else []
        assert row[length:].tolist() == [0] * (len(row) - length)
        if is_exact:
            assert own == genes
        else:  # whole counts came back out of rounded values: equal but for what was nearly tied
            assert len(own) == len(set(own)) == len(genes)
            assert (ranks[own] >= ranks[genes] * 0.97).all()
            assert (ranks[own] <= ranks[genes] * 1.03).all()


def state_of(adata):
    """What a refused call must leave alone; of arrays, that they are the same ones with the same content."""
    layers = [key for key in adata.layers if key is not None]  # newer AnnData have `X` among them
    held = {f"layers/{key}": adata.layers[key] for key in layers} | {"X": adata.X}
    if adata.raw is not None:
        held["raw"] = adata.raw.X
    parts = {
        f"{name}/{part}": np.array(getattr(x, part))
        for name, x in held.items()
        if sparse.issparse(x)
        for part in ("data", "indices", "indptr")
    }
    parts |= {name: np.array(x) for name, x in held.items() if isinstance(x, np.ndarray)}
    tables = {"obs": adata.obs.copy(), "var": adata.var.copy()}
    keys = {slot: sorted(getattr(adata, slot)) for slot in ("obsm", "varm", "obsp", "varp", "uns")}
    return parts, tables, keys | {"layers": sorted(layers)}


def assert_unchanged(adata, before):
    parts, tables, keys = state_of(adata)
    assert keys == before[2]
    for name, table in tables.items():
        pd.testing.assert_frame_equal(table, before[1][name])
    assert set(parts) == set(before[0])
    for name, values in parts.items():
        np.testing.assert_array_equal(values, before[0][name])
        assert values.dtype == before[0][name].dtype


def make(spec, folder):
    """Make the object, and say which values and genes it holds and how to call for them."""
    rng = np.random.default_rng(spec["seed"])
    names, numbers = names_of(spec["names"], rng, spec["n_genes"])
    counts = rng.poisson(rng.lognormal(0, 1, spec["n_genes"]), (spec["n_cells"], spec["n_genes"]))
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.asarray(VALUES[spec["values"]](counts, rng)).astype(spec["dtype"])
    is_backed = spec["container"].startswith("backed")
    if values.dtype == np.float16 and spec["container"] not in {"dense", "fortran", "masked", "unmasked", "dask"}:
        values = values.astype(np.float32)  # scipy has no such sparse matrix
    if not values.dtype.isnative and spec["container"] not in {"dense", "fortran", "masked", "unmasked", "dask"}:
        values = values.astype(values.dtype.newbyteorder("="))  # its constructors refuse them
    x = CONTAINERS[spec["container"]](values)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(spec["n_cells"])])
    var = pd.DataFrame({"name": names}, index=[f"row{i}" for i in range(len(names))])
    empty = sparse.csr_matrix(values.shape, dtype=np.float32)
    match "X" if is_backed else spec["place"]:
        case "X":
            adata, where = ad.AnnData(x, obs=obs, var=var), {}
        case "layer":
            adata, where = ad.AnnData(empty, obs=obs, var=var, layers={"held": x}), {"layer": "held"}
        case "raw":
            adata, where = ad.AnnData(empty, obs=obs, var=var), {"use_raw": True}
            adata.raw = ad.AnnData(x, obs=obs, var=var)
    if spec["container"] == "masked":
        values = x.astype(np.float64).filled(np.nan)
    if is_backed:
        adata.write_h5ad(Path(folder) / "cells.h5ad")
        adata = ad.read_h5ad(Path(folder) / "cells.h5ad", backed="r")
    return adata, values, numbers, where | {"gene_ids": "name", "counts": spec["counts"]}


def outcome(function, *args, **kwargs):
    """Call, and return the error if there is one; any that is not ours fails the test."""
    try:
        return function(*args, **kwargs), None
    except (TypeError, ValueError) as error:
        return None, error


def assert_read_or_refused(spec, model):
    with tempfile.TemporaryDirectory() as folder, gfx.settings.override(verbosity=0):
        adata, values, numbers, call = make(spec, folder)
        before = state_of(adata)
        findings, not_checked = outcome(gfx.pp.check, adata, model=model, **call)
        assert_unchanged(adata, before)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Only .* of the counts belong to genes that the model knows", UserWarning)
            _, refused = outcome(gfx.pp.tokenize, adata, model=model, **call)
        # One answer from both: a row with "error", or an exception, where `pp.tokenize` stops, and nowhere else.
        if not_checked is not None:  # of two reasons, `pp.tokenize` may see the other first
            assert type(refused) is type(not_checked)
        else:
            errors = findings.loc[findings["status"] == "error", "advice"].tolist()
            assert bool(errors) == (refused is not None), (errors, refused)
        if refused is not None:
            assert_unchanged(adata, before)
            assert type(refused) is ValueError
            assert any(text in str(refused) for text in REMEDIES)
        else:
            tokens, lengths = adata.obsm["gfx_tokens"], adata.obs["gfx_tokens_n"].to_numpy()
            cells = reference(values, numbers, model.vocabulary, spec["counts"], spec["max_length"])
            assert_as_reference(cells, tokens, lengths, is_exact=spec["counts"] in {"raw", "estimated"})
            assert len(find_tokens(adata, model.vocabulary, model.max_length)) == spec["n_cells"]
        assert_answer_is_right(spec, values, numbers, refused)
        if adata.isbacked:
            adata.file.close()


def assert_answer_is_right(spec, values, numbers, refused):
    """Some inputs can only be accepted, or refused for one reason."""
    n_values, values = np.count_nonzero(values), values[:, numbers >= 0]  # nothing else is read
    with np.errstate(invalid="ignore"):
        are_counts = (values >= 0).all() and (values == np.rint(values)).all()
    if (numbers > 0).sum() < 10:
        assert "genes" in str(refused)
    elif spec["container"].startswith("dask") and refused is not None:
        assert "`adata" in str(refused)  # for the first of several reasons, for each chunk may have its own
    elif spec["container"] == "damaged" and n_values > 1:
        assert "damaged" in str(refused)
    elif np.isnan(values).any():
        assert "NaN" in str(refused)
    elif np.isinf(values).any():
        assert "infinite" in str(refused)
    elif (values < 0).sum() > values.size / 4:
        assert "negative" in str(refused)
    elif are_counts:
        assert (refused is None) == (spec["counts"] != "log1p" or not values.any())
    elif spec["counts"] == "raw":
        assert refused is not None


@examples(max_examples=150)
@given(INPUTS)
def test_generated_inputs_are_read_as_the_reference_or_refused(toy_vocabulary, as_model, spec):
    assert_read_or_refused(spec, as_model(toy_vocabulary, spec["max_length"]))


@pytest.mark.slow
@examples(max_examples=10_000)
@given(INPUTS)
def test_many_generated_inputs_are_read_as_the_reference_or_refused(toy_vocabulary, as_model, spec):
    assert_read_or_refused(spec, as_model(toy_vocabulary, spec["max_length"]))
