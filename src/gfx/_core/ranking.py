"""Rank value encoding: a cell becomes its detected genes, most characteristic first."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numba
import numpy as np
from scipy import sparse

from gfx._core.scratch import compiled

if TYPE_CHECKING:
    from gfx._core.vocabulary import Vocabulary

_DIGIT_BITS = 11
_BUCKETS = 1 << _DIGIT_BITS
_KEY_BITS = 2 * _DIGIT_BITS
_LOW, _HIGH = np.uint32(_BUCKETS - 1), np.uint32(_DIGIT_BITS)
_KEY, _POSITION = np.uint64(32), np.uint64(0xFFFFFFFF)
_CELLS_PER_TASK = 32


@compiled(nogil=True)
def _sort_descending(  # noqa: PLR0917 - compiled code takes arrays
    values: np.ndarray,
    tokens: np.ndarray,
    n: int,
    floats: np.ndarray,
    packed: np.ndarray,
    spare: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> None:
    """Order the first `n` entries by value, descending; equal values by token, ascending.

    Leaves their positions in the lower half of `packed`. The upper half is a key of 22 bits: the distance from the
    largest value, on the bits of float32, which are ordered like the numbers themselves and as fine as the cell's
    range allows. Two passes of radix sort order the keys; entries that share one are put in order by their float64.
    """
    bits = floats.view(np.int32)
    for i in range(n):
        floats[i] = values[i]
    highest = bits[0]
    lowest = bits[0]
    for i in range(n):
        highest = max(highest, bits[i])
        lowest = min(lowest, bits[i])
    shift = np.uint32(0)
    while np.uint32(highest - lowest) >> shift >= np.uint32(1 << _KEY_BITS):
        shift += np.uint32(1)
    low[:] = 0
    high[:] = 0
    # Unsigned throughout: for a signed index numba looks each time whether it counts from the end.
    for i in range(n):
        key = np.uint32(highest - bits[i]) >> shift
        low[key & _LOW] += 1
        high[key >> _HIGH] += 1
        packed[i] = np.uint64(key) << _KEY | np.uint64(i)
    before_low = np.uint32(0)
    before_high = np.uint32(0)
    for bucket in range(_BUCKETS):
        count = low[bucket]
        low[bucket] = before_low
        before_low += count
        count = high[bucket]
        high[bucket] = before_high
        before_high += count
    for i in range(n):
        bucket = packed[i] >> _KEY & np.uint64(_LOW)
        spare[low[bucket]] = packed[i]
        low[bucket] += 1
    for i in range(n):
        bucket = spare[i] >> _KEY + np.uint64(_HIGH)
        packed[high[bucket]] = spare[i]
        high[bucket] += 1
    for i in range(1, n):
        entry = packed[i]
        j = i - 1
        while j >= 0 and packed[j] >> _KEY == entry >> _KEY and _goes_first(entry, packed[j], values, tokens):
            packed[j + 1] = packed[j]
            j -= 1
        packed[j + 1] = entry


@compiled(nogil=True)
def _goes_first(entry: np.uint64, other: np.uint64, values: np.ndarray, tokens: np.ndarray) -> bool:
    entry &= _POSITION
    other &= _POSITION
    if values[entry] == values[other]:
        return tokens[entry] < tokens[other]
    return values[entry] > values[other]


@compiled(nogil=True)
def _collect(  # noqa: PLR0917
    data: np.ndarray,
    indices: np.ndarray,
    begin: int,
    end: int,
    column_token: np.ndarray,
    column_median: np.ndarray,
    values: np.ndarray,
    tokens: np.ndarray,
) -> tuple[int, float, float]:
    """Take the known genes of a cell; say how many, or -1 if its columns are not in strictly ascending order."""
    n = 0
    previous = -1
    ascending = True
    total = 0.0
    known = 0.0
    for at in range(begin, end):
        ascending &= indices[at] > previous
        previous = indices[at]
        column = np.uint32(indices[at])
        token = column_token[column]
        count = np.float64(data[at])
        # Written always and kept sometimes: a branch on known or unknown would be guessed wrong half of the time.
        values[n] = count / column_median[column]
        tokens[n] = token
        kept = (token >= 0) & (count > 0)  # a stored zero is not a detected gene
        n += kept
        total += count
        known += count * kept
    return n if ascending else -1, total, known


@compiled(nogil=True)
def _collect_sums(  # noqa: PLR0917
    data: np.ndarray,
    indices: np.ndarray,
    begin: int,
    end: int,
    column_token: np.ndarray,
    medians: np.ndarray,
    values: np.ndarray,
    tokens: np.ndarray,
    sums: np.ndarray,
) -> int:
    """Take the known genes of a cell, each with the sum of its entries; `sums` is all 0 before and after."""
    n = 0
    for at in range(begin, end):
        token = column_token[indices[at]]
        if token >= 0 and data[at] > 0:
            if sums[token] == 0:
                tokens[n] = token
                n += 1
            sums[token] += data[at]
    for i in range(n):
        values[i] = sums[tokens[i]] / medians[tokens[i]]
        sums[tokens[i]] = 0
    return n


@compiled(parallel=True, nogil=True)
def _encode(  # noqa: PLR0917
    matrix: tuple[np.ndarray, np.ndarray, np.ndarray],
    column_token: np.ndarray,
    column_median: np.ndarray,
    medians: np.ndarray,
    repeats: bool,  # noqa: FBT001
    longest: int,
    ends: tuple[int, ...],
    out: np.ndarray,
    per_cell: tuple[np.ndarray, ...],
) -> None:
    data, indices, indptr = matrix
    prefix, suffix = ends
    lengths, n_detected, totals, known_totals = per_cell
    n_cells = indptr.shape[0] - 1
    widest = 0
    for cell in range(n_cells):
        widest = max(widest, indptr[cell + 1] - indptr[cell])
    n_tasks = (n_cells + _CELLS_PER_TASK - 1) // _CELLS_PER_TASK
    for task in numba.prange(n_tasks):
        tokens = np.empty(widest + 1, np.int32)
        values = np.empty(widest + 1, np.float64)
        floats = np.empty(widest + 1, np.float32)
        packed = np.empty(widest, np.uint64)
        spare = np.empty(widest, np.uint64)
        low = np.empty(_BUCKETS, np.uint32)
        high = np.empty(_BUCKETS, np.uint32)
        sums = np.zeros(medians.shape[0], np.float64)
        for cell in range(task * _CELLS_PER_TASK, min((task + 1) * _CELLS_PER_TASK, n_cells)):
            begin = indptr[cell]
            end = indptr[cell + 1]
            n, total, known = _collect(data, indices, begin, end, column_token, column_median, values, tokens)
            if repeats or n < 0:
                n = _collect_sums(data, indices, begin, end, column_token, medians, values, tokens, sums)
            n_detected[cell] = n
            totals[cell] = total
            known_totals[cell] = known
            lengths[cell] = 0
            if n == 0:
                continue
            _sort_descending(values, tokens, n, floats, packed, spare, low, high)
            position = 0
            if prefix >= 0:
                out[cell, 0] = prefix
                position = 1
            for i in range(min(n, longest)):
                out[cell, position] = tokens[packed[i] & _POSITION]
                position += 1
            if suffix >= 0:
                out[cell, position] = suffix
                position += 1
            lengths[cell] = position


class RankedCells(NamedTuple):
    """Rank value encodings, and what was there before they were cut."""

    tokens: np.ndarray  # uint16, or uint32 for a vocabulary that needs it, `(n_cells, longest)`, padded with 0
    lengths: np.ndarray  # int32 `(n_cells,)`, special tokens included; 0 for a cell without any known gene
    n_detected: np.ndarray  # known genes with a count above 0, int32 `(n_cells,)`
    totals: np.ndarray  # sum of all counts, float64 `(n_cells,)`
    known_totals: np.ndarray  # sum of the counts of known genes, float64 `(n_cells,)`


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

    `counts` are cells × genes, finite and non-negative; zeros, stored or not, are genes that were not detected.
    `column_token` is the token of each column, -1 for genes outside the vocabulary, int `(n_columns,)`; columns with
    the same token are summed, in float64. Encodings have at most `max_length` tokens, special ones included.
    """
    column_token = np.ascontiguousarray(column_token, dtype=np.int32)
    rows: sparse.csr_array = counts if getattr(counts, "format", "") == "csr" else sparse.csr_array(counts)
    longest = max_length - vocabulary.n_specials
    # The compiled loop checks no index, so everything is checked before.
    if column_token.shape != (rows.shape[1],):
        msg = f"`column_token` is one token per column: expected {(rows.shape[1],)}, found {column_token.shape}."
        raise ValueError(msg)
    if column_token.max(initial=-1) >= len(vocabulary):
        msg = f"`column_token` goes up to {column_token.max()}; {vocabulary!r} has {len(vocabulary)} tokens."
        raise ValueError(msg)
    if longest < 1:
        msg = f"`max_length={max_length}` leaves no room for a gene beside {vocabulary.n_specials} special tokens."
        raise ValueError(msg)
    if vocabulary.pad != 0:
        msg = f"{vocabulary!r} pads with token {vocabulary.pad}; encodings are padded with 0."
        raise ValueError(msg)
    known = column_token >= 0
    n_genes = len(np.unique(column_token[known]))
    column_median = np.ones(len(column_token))
    column_median[known] = vocabulary.medians[column_token[known]]
    n_cells = rows.shape[0]
    width = min(int(np.diff(rows.indptr).max(initial=0)), n_genes, longest) + vocabulary.n_specials
    tokens = np.zeros((n_cells, width), dtype=vocabulary.token_dtype)
    per_cell = tuple(np.zeros(n_cells, dtype=dtype) for dtype in (np.int32, np.int32, np.float64, np.float64))
    ends = tuple(-1 if token is None else token for token in (vocabulary.cls, vocabulary.eos))
    # Few kinds of numbers reach the compiled loop, so that it is compiled few times.
    data = rows.data if rows.data.dtype in (np.float32, np.int32) else rows.data.astype(np.float64, copy=False)
    matrix = data, rows.indices.astype(np.int32, copy=False), rows.indptr.astype(np.int64, copy=False)
    repeats = bool(n_genes < known.sum())
    _encode(matrix, column_token, column_median, vocabulary.medians, repeats, longest, ends, tokens, per_cell)
    return RankedCells(tokens[:, : int(per_cell[0].max(initial=0))], *per_cell)
