"""Rank value encoding: a cell becomes its detected genes, most characteristic first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from gfx._core.vocabulary import Vocabulary

_DIGIT_BITS = 11
_BUCKETS = 1 << _DIGIT_BITS
_CELLS_PER_TASK = 16


@numba.njit(cache=True, nogil=True)
def _sort_descending(values, tokens, n, keys, order, swap, buckets):  # noqa: PLR0917 - compiled code takes arrays
    """Order the first `n` entries by value, descending; equal values by token, ascending.

    Radix sort on the bits of the values rounded to float32 (rounding never inverts an order), then one insertion
    pass on the float64 values, which only ever looks at neighbours that rounding made equal.
    """
    bits = keys[:n].view(np.uint32)
    for i in range(n):
        keys[i] = np.float32(values[i])
        order[i] = i
    for shift in (0, _DIGIT_BITS, 2 * _DIGIT_BITS):
        buckets[:] = 0
        for i in range(n):
            buckets[(bits[i] >> shift) & (_BUCKETS - 1)] += 1
        total = 0
        for bucket in range(_BUCKETS - 1, -1, -1):  # largest first
            count = buckets[bucket]
            buckets[bucket] = total
            total += count
        for i in range(n):
            entry = order[i]
            bucket = (bits[entry] >> shift) & (_BUCKETS - 1)
            swap[buckets[bucket]] = entry
            buckets[bucket] += 1
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
def _encode(  # noqa: PLR0917 - compiled code takes arrays
    data, indices, indptr, column_token, medians, longest, prefix, suffix, out, lengths, n_detected
):
    n_cells = indptr.shape[0] - 1
    widest = 0
    for cell in range(n_cells):
        widest = max(widest, indptr[cell + 1] - indptr[cell])
    widest = min(widest, medians.shape[0])
    n_tasks = (n_cells + _CELLS_PER_TASK - 1) // _CELLS_PER_TASK
    for task in numba.prange(n_tasks):
        sums = np.zeros(medians.shape[0], np.float64)
        tokens = np.empty(widest, np.int32)
        values = np.empty(widest, np.float64)
        keys = np.empty(widest, np.float32)
        order = np.empty(widest, np.int32)
        swap = np.empty(widest, np.int32)
        buckets = np.empty(_BUCKETS, np.int32)
        for cell in range(task * _CELLS_PER_TASK, min((task + 1) * _CELLS_PER_TASK, n_cells)):
            n = 0
            for at in range(indptr[cell], indptr[cell + 1]):
                token = column_token[indices[at]]
                if token >= 0 and data[at] > 0:  # a stored zero is not a detected gene
                    if sums[token] == 0:
                        tokens[n] = token
                        n += 1
                    sums[token] += data[at]
            n_detected[cell] = n
            lengths[cell] = 0
            if n == 0:
                continue
            for i in range(n):
                token = tokens[i]
                values[i] = sums[token] / medians[token]
                sums[token] = 0
            _sort_descending(values, tokens, n, keys, order, swap, buckets)
            position = 0
            if prefix >= 0:
                out[cell, 0] = prefix
                position = 1
            for i in range(min(n, longest)):
                out[cell, position] = tokens[order[i]]
                position += 1
            if suffix >= 0:
                out[cell, position] = suffix
                position += 1
            lengths[cell] = position


@dataclass(frozen=True)
class RankedCells:
    """Rank value encodings, and what was there before they were cut.

    Parameters
    ----------
    tokens
        uint16, or uint32 for a vocabulary that needs it, `(n_cells, longest)`, padded with 0 on the right.
    lengths
        int32 `(n_cells,)`, special tokens included; 0 for a cell without any known gene.
    n_detected
        Known genes with a count above 0, int32 `(n_cells,)`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    n_detected: np.ndarray


def rank_cells(
    counts: sparse.csr_matrix | sparse.csr_array | np.ndarray,
    column_token: np.ndarray,
    vocabulary: Vocabulary,
    max_length: int,
) -> RankedCells:
    """Write each cell as tokens, by count over the gene's non-zero median, descending.

    Depth normalisation divides a cell by one number, which changes no order, so it is left out: raw and
    depth-normalised counts give the same tokens. Equal values are ordered by token, so that the encoding depends
    neither on the order of the columns nor on the sorting algorithm.

    Parameters
    ----------
    counts
        Cells × genes, finite and non-negative. Zeros, stored or not, are genes that were not detected.
    column_token
        Token of each column, -1 for genes outside the vocabulary, int `(n_columns,)`. Columns with the same token
        are summed, in float64.
    vocabulary
        Medians and special tokens.
    max_length
        Longest encoding, special tokens included; lower-ranked genes are cut off.

    Raises
    ------
    ValueError
        `column_token` does not fit the columns or the vocabulary, or `max_length` leaves no room for a gene.
    """
    column_token = np.ascontiguousarray(column_token, dtype=np.int32)
    rows = counts if sparse.issparse(counts) and counts.format == "csr" else sparse.csr_array(counts)
    n_specials = 2 if vocabulary.has_cls else 0
    longest = max_length - n_specials
    # The compiled loop indexes without looking, so everything is looked at here.
    if column_token.shape != (rows.shape[1],):
        msg = f"`column_token` is one token per column: expected {(rows.shape[1],)}, found {column_token.shape}."
        raise ValueError(msg)
    if column_token.max(initial=-1) >= len(vocabulary):
        msg = f"`column_token` goes up to {column_token.max()}; {vocabulary!r} has {len(vocabulary)} tokens."
        raise ValueError(msg)
    if longest < 1:
        msg = f"`max_length={max_length}` leaves no room for a gene beside {n_specials} special tokens."
        raise ValueError(msg)
    if vocabulary.pad != 0:
        msg = f"{vocabulary!r} pads with token {vocabulary.pad}; encodings are padded with 0."
        raise ValueError(msg)
    n_genes = len(np.unique(column_token[column_token >= 0]))
    width = min(int(np.diff(rows.indptr).max(initial=0)), n_genes, longest) + n_specials
    dtype = np.uint16 if len(vocabulary) - 1 <= np.iinfo(np.uint16).max else np.uint32
    tokens = np.zeros((rows.shape[0], width), dtype=dtype)
    lengths = np.zeros(rows.shape[0], dtype=np.int32)
    n_detected = np.zeros(rows.shape[0], dtype=np.int32)
    prefix = -1 if vocabulary.cls is None else vocabulary.cls
    suffix = -1 if vocabulary.eos is None else vocabulary.eos
    # Few kinds of numbers reach the compiled loop, so that it is compiled few times.
    data = rows.data if rows.data.dtype in (np.float32, np.int32) else rows.data.astype(np.float64, copy=False)
    indices = rows.indices.astype(np.int32, copy=False)
    indptr = rows.indptr.astype(np.int64, copy=False)
    _encode(
        data, indices, indptr, column_token, vocabulary.medians, longest, prefix, suffix, tokens, lengths, n_detected
    )
    return RankedCells(tokens=tokens[:, : int(lengths.max(initial=0))], lengths=lengths, n_detected=n_detected)


def rank_encode(
    counts: sparse.csr_matrix | sparse.csr_array | np.ndarray,
    column_token: np.ndarray,
    vocabulary: Vocabulary,
    max_length: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and lengths of :func:`rank_cells`."""
    ranked = rank_cells(counts, column_token, vocabulary, max_length)
    return ranked.tokens, ranked.lengths
