"""Rank value encoding: a cell becomes its detected genes, most characteristic first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from gfx._core.vocabulary import Vocabulary

_DIGIT_BITS = 11
_BUCKETS = 1 << _DIGIT_BITS
_CELLS_PER_TASK = 64


@numba.njit(cache=True, nogil=True)
def _sort_descending(values, tokens, n, keys, order, swap, counts):
    """Order the first `n` entries by value, descending; equal values by token, ascending.

    Radix sort on the bits of the values rounded to float32 (rounding never inverts an order), then one insertion
    pass on the float64 values, which only ever looks at neighbours that rounding made equal.
    """
    bits = keys[:n].view(np.uint32)
    for i in range(n):
        keys[i] = np.float32(values[i])
        order[i] = i
    for shift in (0, _DIGIT_BITS, 2 * _DIGIT_BITS):
        counts[:] = 0
        for i in range(n):
            counts[(bits[i] >> shift) & (_BUCKETS - 1)] += 1
        total = 0
        for bucket in range(_BUCKETS - 1, -1, -1):  # largest first
            count = counts[bucket]
            counts[bucket] = total
            total += count
        for i in range(n):
            entry = order[i]
            bucket = (bits[entry] >> shift) & (_BUCKETS - 1)
            swap[counts[bucket]] = entry
            counts[bucket] += 1
        for i in range(n):
            order[i] = swap[i]
    for i in range(1, n):
        entry = order[i]
        value = values[entry]
        token = tokens[entry]
        j = i - 1
        while j >= 0:
            other = order[j]
            if values[other] > value or (values[other] == value and tokens[other] < token):
                break
            order[j + 1] = other
            j -= 1
        order[j + 1] = entry


@numba.njit(cache=True, parallel=True, nogil=True)
def _encode(data, indices, indptr, column_token, column_median, longest, prefix, suffix, out, lengths):
    n_cells = indptr.shape[0] - 1
    widest = 0
    for cell in range(n_cells):
        widest = max(widest, indptr[cell + 1] - indptr[cell])
    n_tasks = (n_cells + _CELLS_PER_TASK - 1) // _CELLS_PER_TASK
    for task in numba.prange(n_tasks):
        values = np.empty(widest, np.float64)
        tokens = np.empty(widest, np.int32)
        keys = np.empty(widest, np.float32)
        order = np.empty(widest, np.int32)
        swap = np.empty(widest, np.int32)
        counts = np.empty(_BUCKETS, np.int32)
        for cell in range(task * _CELLS_PER_TASK, min((task + 1) * _CELLS_PER_TASK, n_cells)):
            n = 0
            for at in range(indptr[cell], indptr[cell + 1]):
                token = column_token[indices[at]]
                if token >= 0 and data[at] > 0:  # explicit zeros are not detected genes
                    values[n] = data[at] / column_median[indices[at]]
                    tokens[n] = token
                    n += 1
            if n == 0:
                lengths[cell] = 0
                continue
            _sort_descending(values, tokens, n, keys, order, swap, counts)
            kept = min(n, longest)
            position = 0
            if prefix >= 0:
                out[cell, 0] = prefix
                position = 1
            for i in range(kept):
                out[cell, position + i] = tokens[order[i]]
            position += kept
            if suffix >= 0:
                out[cell, position] = suffix
                position += 1
            lengths[cell] = position


def rank_encode(
    counts: sparse.csr_matrix | sparse.csr_array | np.ndarray,
    column_token: np.ndarray,
    vocabulary: Vocabulary,
    max_length: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Write each cell as tokens, by count over the gene's non-zero median, descending.

    Depth normalisation divides a cell by one number, which changes no order, so it is left out: raw and
    depth-normalised counts give the same tokens. Equal values are ordered by token, so that the encoding depends
    neither on the order of the columns nor on the sorting algorithm.

    Parameters
    ----------
    counts
        Cells × genes, non-negative. Zeros, stored or not, are genes that were not detected.
    column_token
        Token of each column, -1 for genes outside the vocabulary, int `(n_columns,)`. Columns with the same token
        are summed.
    vocabulary
        Medians and special tokens.
    max_length
        Longest encoding, special tokens included; lower-ranked genes are cut off.

    Returns
    -------
    Tokens, uint16 or uint32 `(n_cells, longest)`, padded with 0 on the right; and lengths, int32 `(n_cells,)`.
    """
    column_token = np.asarray(column_token, dtype=np.int32)
    rows = counts if sparse.issparse(counts) and counts.format == "csr" else sparse.csr_array(counts)
    rows, column_token = _sum_repeated(rows, column_token)
    medians = np.ones(len(column_token))
    known = column_token >= 0
    medians[known] = vocabulary.medians[column_token[known]]
    n_specials = 2 if vocabulary.has_cls else 0
    longest = max_length - n_specials
    n_detected = int(np.diff(rows.indptr).max(initial=0))
    width = min(n_detected, int(known.sum()), longest) + n_specials
    dtype = np.uint16 if len(vocabulary) <= np.iinfo(np.uint16).max else np.uint32
    out = np.zeros((rows.shape[0], width), dtype=dtype)
    lengths = np.zeros(rows.shape[0], dtype=np.int32)
    prefix = -1 if vocabulary.cls is None else vocabulary.cls
    suffix = -1 if vocabulary.eos is None else vocabulary.eos
    data = rows.data if rows.data.dtype in (np.float32, np.float64, np.int32) else rows.data.astype(np.float64)
    _encode(data, rows.indices, rows.indptr, column_token, medians, longest, prefix, suffix, out, lengths)
    return out[:, : int(lengths.max(initial=0))], lengths


def _sum_repeated(rows, column_token: np.ndarray) -> tuple[sparse.csr_array, np.ndarray]:
    """Sum columns that carry the same token, so that each gene has one count."""
    known = np.flatnonzero(column_token >= 0)
    unique, gene = np.unique(column_token[known], return_inverse=True)
    if len(unique) == len(known):
        return rows, column_token
    selector = sparse.csr_array(
        (np.ones(len(known), dtype=np.float64), (known, gene)), shape=(len(column_token), len(unique))
    )
    return sparse.csr_array(rows.astype(np.float64) @ selector), unique.astype(np.int32)
