"""Ranking against a few lines of numpy, and what must not change it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from gfx._core.ranking import RankedCells, rank_cells
from gfx._core.vocabulary import SPECIALS, Vocabulary


def vocabulary(n_genes: int, *, with_cls: bool = True, seed: int = 0, medians: np.ndarray | None = None) -> Vocabulary:
    specials = list(SPECIALS if with_cls else SPECIALS[:2])
    if medians is None:
        medians = np.random.default_rng(seed).lognormal(1, 1, n_genes)
    return Vocabulary(
        name="test",
        ids=np.array(specials + [f"ENSG{n:011d}" for n in range(n_genes)], dtype=object),
        medians=np.concatenate([np.full(len(specials), np.nan), medians]),
        symbols=np.full(len(specials) + n_genes, "", dtype=object),
    )


def reference(counts: np.ndarray, column_token: np.ndarray, vocab: Vocabulary, max_length: int) -> list[list[int]]:
    """Rank with lexsort: value descending, then token ascending."""
    encoded = []
    for cell in np.asarray(counts, dtype=np.float64):
        sums = np.zeros(len(vocab))
        np.add.at(sums, column_token[column_token >= 0], cell[column_token >= 0])
        genes = np.flatnonzero(sums > 0)
        ranked = genes[np.lexsort((genes, -(sums[genes] / vocab.medians[genes])))].tolist()
        if not ranked:
            encoded.append([])
        elif vocab.has_cls:
            encoded.append([vocab.cls, *ranked[: max_length - 2], vocab.eos])
        else:
            encoded.append(ranked[:max_length])
    return encoded


def rows(ranked: RankedCells) -> list[list[int]]:
    tokens, lengths = ranked.tokens, ranked.lengths
    assert (np.where(np.arange(tokens.shape[1]) >= lengths[:, None], tokens, 0) == 0).all(), "padded with 0"
    return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


def some_counts(n_cells: int, n_genes: int, seed: int = 0, density: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.geometric(0.4, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < density)


@pytest.mark.parametrize("with_cls", [True, False])
@pytest.mark.parametrize("max_length", [3, 40, 10_000])
@pytest.mark.parametrize("n_cells", [1, 31, 100])
def test_agrees_with_lexsort(n_cells, max_length, with_cls):
    vocab = vocabulary(500, with_cls=with_cls)
    column_token = np.arange(len(vocab) - 500, len(vocab))
    column_token[::7] = -1
    counts = some_counts(n_cells, 500)
    found = rank_cells(sparse.csr_array(counts), column_token, vocab, max_length)
    assert rows(found) == reference(counts, column_token, vocab, max_length)
    assert found.tokens.shape[1] == found.lengths.max()


counts_and_tokens = st.integers(1, 12).flatmap(
    lambda n_columns: st.tuples(
        hnp.arrays(
            np.float64,
            st.tuples(st.integers(0, 6), st.just(n_columns)),
            # Few different values, so that ties are common; and any value at all.
            elements=st.one_of(
                st.sampled_from([0.0, 1.0, 2.0, 3.0]), st.floats(0, 1e30, allow_subnormal=True), st.integers(0, 10**9)
            ),
        ),
        hnp.arrays(np.int32, n_columns, elements=st.integers(-1, 11).map(lambda t: t if t > 3 else -1)),
        st.sampled_from([np.ones(8), np.array([1, 2, 3, 1, 2, 3, 0.5, 1e-6]), np.linspace(0.3, 7, 8)]),
    )
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(counts_and_tokens, st.integers(3, 12))
def test_agrees_with_lexsort_whatever_comes(case, max_length):
    counts, column_token, medians = case
    vocab = vocabulary(8, medians=medians)
    found = rank_cells(counts, column_token, vocab, max_length)
    assert rows(found) == reference(counts, column_token, vocab, max_length)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.001, 0.3, 3.0, 7e5]))
def test_neither_columns_nor_depth_matter(seed, factor):
    rng = np.random.default_rng(seed)
    vocab = vocabulary(60, medians=rng.choice([0.5, 1.0, 1.7, 2.0], 60))  # shared medians: many exact ties
    counts = some_counts(9, 60, seed)
    column_token = np.arange(4, 64)
    expected = rows(rank_cells(counts, column_token, vocab, 64))
    order = rng.permutation(60)
    assert rows(rank_cells(counts[:, order], column_token[order], vocab, 64)) == expected
    # A power of two scales without rounding; any other factor may only reorder values that differ in the last bit.
    assert rows(rank_cells(counts * 2.0**-7, column_token, vocab, 64)) == expected
    scaled = rank_cells(counts * factor, column_token, vocab, 64)
    for cell, ours in zip(counts, rows(scaled), strict=True):
        values = (cell / vocab.medians[4:])[np.array(ours[1:-1], dtype=int) - 4]
        assert (np.diff(values) <= 1e-12 * values[:-1]).all()


def test_values_that_float32_cannot_tell_apart_are_told_apart():
    vocab = vocabulary(4, medians=np.array([1.0, 1.0 + 1e-12, 1.0 - 1e-12, 1.0]))
    counts = np.array([[1.0, 1.0, 1.0, 1.0]])
    assert rows(rank_cells(counts, np.arange(4, 8), vocab, 10)) == [[2, 6, 4, 7, 5, 3]]


def test_values_beyond_float32_are_ordered():
    vocab = vocabulary(4, medians=np.ones(4))
    counts = np.array([[1e300, 1e308, 1e-300, 1e-308]])
    assert rows(rank_cells(counts, np.arange(4, 8), vocab, 10)) == [[2, 5, 4, 6, 7, 3]]


@pytest.mark.parametrize(
    "dtype", [bool, np.int8, np.uint8, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64]
)
def test_number_types_agree(dtype):
    vocab = vocabulary(80)
    counts = some_counts(20, 80)
    counts = counts > 0 if dtype is bool else counts.clip(max=120)
    expected = reference(counts, np.arange(4, 84), vocab, 50)
    matrix = sparse.csr_array(counts.astype(dtype))
    assert rows(rank_cells(matrix, np.arange(4, 84), vocab, 50)) == expected


def test_repeated_genes_are_summed_without_overflow():
    vocab = vocabulary(2, medians=np.array([1.0, 1.0]))
    # 200 + 100 is 44 in uint8, which would rank below 60.
    counts = sparse.csr_array(np.array([[200, 60, 100]], dtype=np.uint8))
    assert rows(rank_cells(counts, np.array([4, 5, 4]), vocab, 10)) == [[2, 4, 5, 3]]
    counts = sparse.csr_array(np.array([[100, 160, 50]], dtype=np.uint8))
    assert rows(rank_cells(counts, np.array([4, 5, 4]), vocab, 10)) == [[2, 5, 4, 3]]


def test_entries_in_any_order_and_repeated_entries_count_once():
    vocab = vocabulary(5, medians=np.arange(1.0, 6.0))
    shuffled = sparse.csr_array((np.array([1, 9, 4, 2]), np.array([3, 0, 2, 0]), np.array([0, 4])), shape=(1, 5))
    stored = shuffled.data.copy(), shuffled.indices.copy()
    expected = reference(np.array([[11, 0, 4, 1, 0]]), np.arange(4, 9), vocab, 10)
    assert rows(rank_cells(shuffled, np.arange(4, 9), vocab, 10)) == expected
    np.testing.assert_array_equal(shuffled.data, stored[0])
    np.testing.assert_array_equal(shuffled.indices, stored[1])


def test_stored_zeros_are_not_detected():
    vocab = vocabulary(3)
    stored = sparse.csr_array((np.array([0, 5]), np.array([0, 2]), np.array([0, 2])), shape=(1, 3))
    assert rows(rank_cells(stored, np.arange(4, 7), vocab, 10)) == [[2, 6, 3]]


def test_cells_without_genes_are_empty_rows():
    vocab = vocabulary(3)
    tokens, lengths, *_ = rank_cells(np.array([[0, 0, 0, 7], [0, 1, 0, 0]]), np.array([4, 5, 6, -1]), vocab, 10)
    assert tokens.tolist() == [[0, 0, 0], [2, 5, 3]]
    assert lengths.tolist() == [0, 3]
    for shape in [(0, 4), (2, 4)]:
        tokens, lengths, *_ = rank_cells(sparse.csr_array(shape), np.array([4, 5, 6, -1]), vocab, 10)
        assert tokens.shape == (shape[0], 0)
        assert not lengths.any()


@pytest.mark.parametrize(("n_genes", "dtype"), [(65_532, np.uint16), (65_533, np.uint32), (70_000, np.uint32)])
def test_large_vocabularies_get_wider_tokens(n_genes, dtype):
    vocab = vocabulary(n_genes)
    last = len(vocab) - 1
    ranked = rank_cells(np.array([[1, 2]]), np.array([last, 4]), vocab, 10)
    assert ranked.tokens.dtype == dtype
    assert set(rows(ranked)[0]) == {2, last, 4, 3}


def test_says_what_was_there_before_cutting():
    vocab = vocabulary(6)
    counts = np.array([[1, 2, 3, 4, 5, 6], [1, 0, 0, 0, 9, 0], [0, 0, 0, 0, 0, 8]])
    ranked = rank_cells(counts, np.array([4, 5, 6, 7, 7, -1]), vocab, 5)
    assert ranked.lengths.tolist() == [5, 4, 0]
    assert ranked.n_detected.tolist() == [4, 2, 0]
    assert ranked.totals.tolist() == [21, 10, 8]
    assert ranked.known_totals.tolist() == [15, 10, 0]


def test_refuses_what_the_compiled_loop_would_misread():
    vocab = vocabulary(3)
    counts = np.ones((1, 3))
    with pytest.raises(ValueError, match=r"one token per column: expected \(3,\), found \(2,\)"):
        rank_cells(counts, np.array([4, 5]), vocab, 10)
    with pytest.raises(ValueError, match="goes up to 7"):
        rank_cells(counts, np.array([4, 5, 7]), vocab, 10)
    with pytest.raises(ValueError, match="no room for a gene"):
        rank_cells(counts, np.array([4, 5, 6]), vocab, 2)
    swapped = dataclasses.replace(vocab, ids=vocab.ids[[1, 0, *range(2, 7)]])
    with pytest.raises(ValueError, match="pads with token 1"):
        rank_cells(counts, np.array([4, 5, 6]), swapped, 10)
