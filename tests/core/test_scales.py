"""Telling counts, normalised counts and logarithms apart by the mark that whole numbers leave."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from gfx._core.scales import recover_counts, scale_of, survey


def cells(n_cells: int = 40, n_genes: int = 400, seed: int = 0) -> sparse.csr_array:
    rng = np.random.default_rng(seed)
    rate = rng.lognormal(-1, 1.3, n_genes) * rng.lognormal(0, 0.5, (n_cells, 1))
    return sparse.csr_array(rng.poisson(rate).astype(np.float64))


def with_values(x: sparse.csr_array, values: np.ndarray) -> sparse.csr_array:
    return sparse.csr_array((values, x.indices, x.indptr), shape=x.shape)


def divided(x: sparse.csr_array, target: float) -> sparse.csr_array:
    depth = np.repeat(x.sum(axis=1), np.diff(x.indptr))
    return with_values(x, x.data / depth * target)


LOGS = {"log1p": np.log1p, "log2": lambda v: np.log2(v + 1), "log10": lambda v: np.log10(v + 1)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("target", [None, 1e4, 1e6])
@pytest.mark.parametrize("name", ["normalized", *LOGS])
def test_scales_are_recognised(name, target, dtype):
    x = cells() if target is None else divided(cells(), target)
    if name == "normalized":
        expected = "counts" if target is None else "normalized"
        assert scale_of(with_values(x, x.data.astype(dtype))) == expected
    else:
        assert scale_of(with_values(x, LOGS[name](x.data).astype(dtype))) == name


def test_log1p_is_recognised_in_real_cells():
    scanpy = pytest.importorskip("scanpy")
    adata = scanpy.datasets.pbmc68k_reduced()
    assert scale_of(sparse.csr_array(adata.raw.X)) == "log1p"
    assert scale_of(sparse.csr_array(adata.X)) == "negative"


def test_real_cells_on_every_scale(real_cells):
    x = sparse.csr_array(real_cells("eval/pbmc3k_10x").X[:300])
    assert scale_of(x) == "counts"
    normalised = divided(with_values(x, x.data.astype(np.float64)), 1e4)
    assert scale_of(with_values(x, normalised.data.astype(np.float32))) == "normalized"
    for name, log in LOGS.items():
        assert scale_of(with_values(x, log(normalised.data).astype(np.float32))) == name


@pytest.mark.parametrize(
    ("value", "expected"),
    [(np.nan, "missing"), (np.inf, "infinite"), (-np.inf, "infinite"), (-90, "negative"), (-0.1, "few negative")],
)
def test_a_single_bad_value_decides_the_scale(value, expected):
    x = cells()
    x.data[-1] = value
    assert scale_of(x) == expected


def test_one_fraction_is_no_raw_count():
    x = cells()
    x.data[-1] = 0.37
    assert scale_of(x) == "estimated"  # division by depth would have left few whole numbers


def test_unmarked_values_are_estimates():
    x = cells()
    x.data = np.random.default_rng(0).gamma(2, 2, x.nnz)
    assert scale_of(x) == "estimated"
    # A handful of values is no evidence.
    assert scale_of(sparse.csr_array(np.array([[0.5, 1.0, 1.5]]))) == "estimated"


def corrected(x: sparse.csr_array, kind: str) -> sparse.csr_array:
    """Counts as other software leaves them: what it does to them, in one line each."""
    rng = np.random.default_rng(1)
    cell = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))
    depth, ambient = x.sum(axis=1)[cell], (x.sum(axis=0) / x.sum())[x.indices]
    by_length = x.data / rng.lognormal(7.5, 0.8, x.shape[1])[x.indices]
    noise = rng.normal(0, 0.02, x.nnz)
    values = {
        "ambient removed": lambda: np.clip(x.data - 0.1 * depth * ambient, 0, None),  # SoupX
        "shares of counts": lambda: x.data * rng.beta(8, 2, x.nnz),  # decontX
        "few shared reads": lambda: np.where(rng.random(x.nnz) < 0.2, x.data * rng.random(x.nnz), x.data),  # alevin
        "FPKM": lambda: by_length / depth * 1e9,
        "TPM": lambda: by_length / np.bincount(cell, by_length)[cell] * 1e6,
        "imputed": lambda: np.where(rng.random(x.nnz) < 0.05, -np.abs(noise), x.data + noise),
    }[kind]()
    return with_values(x, values)


KINDS = {
    "ambient removed": "estimated",
    "shares of counts": "estimated",
    "few shared reads": "estimated",
    "FPKM": "estimated",
    "TPM": "estimated normalized",
    "imputed": "few negative",
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["toy", "eval/pbmc3k_10x"])
def test_what_is_estimated_or_divided_by_length_is_told_from_counts(real_cells, source, kind, dtype):
    counts = cells() if source == "toy" else sparse.csr_array(real_cells(source)[:300].X).astype(np.float64)
    x = corrected(counts, kind)
    assert scale_of(with_values(x, x.data.astype(dtype))) == KINDS[kind]
    if kind == "imputed":
        return
    # Logarithms of values that have one sum show it; of others, nothing tells them from values.
    normalised = divided(x, 1e4)
    assert scale_of(with_values(x, normalised.data.astype(dtype))) == "estimated normalized"
    for name, log in LOGS.items():
        assert scale_of(with_values(x, log(normalised.data).astype(dtype))) == f"estimated {name}"


def test_shallow_estimates_are_no_logarithms():
    x = corrected(cells(), "shares of counts")
    x.data = np.minimum(x.data, 14.0)
    assert scale_of(x) == "estimated"


@pytest.mark.parametrize("change", ["scaled", "centred", "residuals"])
def test_differences_from_a_mean_are_not_a_few_negative_values(change):
    dense = cells().toarray()
    expected = np.outer(dense.sum(axis=1), dense.sum(axis=0)) / dense.sum()
    values = {
        "scaled": lambda: (dense - dense.mean(axis=0)) / (dense.std(axis=0) + 0.01),
        "centred": lambda: dense - dense.mean(axis=0),
        "residuals": lambda: (dense - expected) / np.sqrt(expected + 0.01),
    }[change]()
    assert scale_of(sparse.csr_array(values)) == "negative"
    assert scale_of(sparse.csr_array(values.clip(max=10))) == "negative"


def test_nothing_is_empty():
    assert scale_of(sparse.csr_array((3, 4))) == "empty"
    assert scale_of(sparse.csr_array((np.zeros(2), np.array([0, 1]), np.array([0, 2])), shape=(1, 4))) == "empty"
    assert scale_of(sparse.csr_array(np.array([[True, False]]))) == "counts"


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.uint8])
def test_survey_agrees_with_numpy(dtype):
    values = np.array([3, 0, 7, 2], dtype=dtype)
    assert survey(values) == (0, 7, 0, 0)
    assert survey(values[:0]) == (0, 0, 0, 0)
    if np.dtype(dtype).kind == "f":
        assert survey(np.array([1.5, -2, np.nan, 4], dtype=dtype)) == (-2, 4, 1, 2)
    if np.dtype(dtype).kind == "i":
        assert survey(-values) == (-7, 0, 0, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_recovered_counts_are_the_counts(dtype):
    x = cells()
    smallest = np.minimum.reduceat(x.data, x.indptr[:-1])
    assert (smallest == 1).all()
    blurred = np.expm1(np.log1p(divided(x, 1e4).data.astype(dtype)))
    assert not (blurred == x.data).all()
    np.testing.assert_array_equal(recover_counts(with_values(x, blurred)).data, x.data)


def test_cells_without_the_mark_are_left_alone():
    x = sparse.csr_array(np.array([[0.5, 1.0, 2.0], [0.5, 0.7, 0], [0, 0, 0]]))
    assert recover_counts(x).toarray().tolist() == [[1, 2, 4], [0.5, 0.7, 0], [0, 0, 0]]
    assert x.toarray()[0].tolist() == [0.5, 1.0, 2.0]
