"""On which scale values are: counts, counts divided by the depth of the cell, logarithms of these, or others.

Counts leave a mark that division by depth does not remove: every value of a cell is a whole multiple of its smallest.
The mark tells the scales apart without any threshold on the size of the values, and gives the counts back. Values that
lack it are estimates, or counts divided by more than depth; that they have one sum in every cell is a mark of theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

import numba
import numpy as np

from gfx._core.scratch import compiled

if TYPE_CHECKING:
    from collections.abc import Callable

    from scipy import sparse

Scale = Literal[
    "empty",
    "counts",
    "normalized",
    "log1p",
    "log2",
    "log10",
    "estimated",
    "estimated normalized",
    "estimated log1p",
    "estimated log2",
    "estimated log10",
    "few negative",
    "negative",
    "infinite",
    "missing",
]

#: What a scale of values is called, the worst first: the worst of all blocks of rows is that of the matrix.
SCALES: dict[Scale, str] = {
    "missing": "NaN",
    "infinite": "infinite values",
    "negative": "negative values",
    "few negative": "fractions, and a few small negative values",
    "estimated": "estimated counts, or FPKM",
    "estimated normalized": "TPM, or estimated counts divided by depth",
    "estimated log2": "logarithms of TPM or estimated counts to the base 2",
    "estimated log10": "logarithms of TPM or estimated counts to the base 10",
    "estimated log1p": "logarithms of TPM or estimated counts",
    "log2": "logarithms to the base 2",
    "log10": "logarithms to the base 10",
    "log1p": "log-normalised counts",
    "normalized": "counts divided by depth",
    "counts": "raw counts",
    "empty": "nothing but zeros",
}

#: How far from a whole multiple a value may lie, relative to it: files are written with three digits, too.
_TOLERANCE = 0.01
#: A multiple above this lies that near to a whole number by chance.
_TELLING = 30.0
#: The share of cells that has to bear the mark, and the values it has to rest on.
_MOST = 0.9
_ENOUGH = 20
#: How near sums of cells are that were made one, relative, and how many cells show it.
_SAME, _CELLS = 0.001, 5
#: Negative values that add up to less than this share of the others are a remainder, not differences from a mean.
_REMAINDER = 0.01

#: How to get from a scale back to values proportional to counts. The flattest comes first: a steeper exponential than
#: the right one throws nearly all multiples out of the telling range, a flatter one breaks them.
UNDO: dict[Scale, Callable[[np.ndarray], np.ndarray]] = {
    "normalized": lambda values: values,
    "log2": lambda values: np.exp2(values) - 1,
    "log1p": np.expm1,
    "log10": lambda values: np.power(10.0, values) - 1,
}

#: No logarithm of counts is larger, to whatever base in use; the exponential would overflow, too.
_HIGHEST_LOGARITHM = 64.0


def worse(one: Scale, other: Scale) -> Scale:
    """Return the one of two scales that says more about a matrix in which both occur."""
    return min(one, other, key=[*SCALES].index)


def scale_of(block: sparse.csr_array) -> Scale:
    """Tell the scale of some cells from their stored values, cells × genes, without repeated entries.

    ``"estimated"`` are non-negative values that bear no mark, or hold more whole numbers than others: corrected,
    length-normalised, averaged or imputed counts. ``"estimated normalized"`` and ``"estimated log1p"`` are such values
    of one sum in every cell, and logarithms of these. ``"few negative"`` values are not centred on a mean.
    """
    values = block.data
    lowest, highest, n_missing, n_fractions = survey(values)
    plain: dict[Scale, bool | np.bool] = {
        "missing": n_missing > 0,
        "infinite": np.isinf(lowest) or np.isinf(highest),
        "few negative": lowest < 0 and _few_negative(values),
        "negative": lowest < 0,
        "empty": highest == 0,
        "counts": n_fractions == 0,
    }
    for scale, is_found in plain.items():
        if is_found:
            return scale
    values = values.astype(np.float64)
    possible = {scale: of for scale, of in UNDO.items() if scale == "normalized" or highest < _HIGHEST_LOGARITHM}
    for scale, undo in possible.items():
        if _marked(undo(values), block.indptr):
            mostly_whole = scale == "normalized" and n_fractions < np.count_nonzero(values) / 2
            return "estimated" if mostly_whole else scale
    for scale, undo in possible.items():
        if _of_one_sum(undo(values), block.indptr):
            return cast("Scale", f"estimated {scale}")
    return "estimated"


def survey(values: np.ndarray) -> tuple[float, float, int, int]:
    """Find the lowest and the highest value, or 0 beyond them; how many are NaN, and how many no whole numbers."""
    if values.dtype.kind == "f":
        return _survey(values if values.dtype == np.float32 else values.astype(np.float64, copy=False))
    lowest = 0 if values.dtype.kind in "ub" else min(0, int(values.min(initial=0)))
    return float(lowest), float(values.max(initial=0)), 0, 0


@compiled(parallel=True, nogil=True)
def _survey(values: np.ndarray) -> tuple[float, float, int, int]:
    lowest = 0.0
    highest = 0.0
    n_missing = 0
    n_fractions = 0
    for i in numba.prange(values.shape[0]):
        value = np.float64(values[i])
        lowest = min(lowest, value)
        highest = max(highest, value)
        n_missing += value != value  # noqa: PLR0124 - what NaN is
        n_fractions += value != np.rint(value)
    return lowest, highest, n_missing, n_fractions


def recover_counts(block: sparse.csr_array) -> sparse.csr_array:
    """Give cells that were divided by their depth their whole counts back, up to one factor per cell.

    Cells without the mark stay as they are.
    """
    multiples, marked = _multiples(block.data, block.indptr)
    recovered = block.copy()
    recovered.data = np.where(np.repeat(marked, np.diff(block.indptr)), np.rint(multiples), block.data)
    return recovered


def _few_negative(values: np.ndarray) -> bool:
    """Whether negative values are few, and smaller than the mean of the others."""
    positive, negative = (values[is_of].astype(np.float64) for is_of in (values > 0, values < 0))
    return bool(-negative.sum() < _REMAINDER * positive.sum() and -negative.min() <= positive.mean())


def _marked(values: np.ndarray, indptr: np.ndarray) -> bool:
    """Whether most of the cells that can tell consist of whole multiples."""
    multiples, whole = _multiples(values, indptr)
    telling = (multiples > 1 + 2 * _TOLERANCE) & (multiples < _TELLING)
    cells = _by_cell(np.logical_or, telling, indptr)
    return bool(telling.sum() >= _ENOUGH and whole[cells].mean() > _MOST)


def _of_one_sum(values: np.ndarray, indptr: np.ndarray) -> bool:
    """Whether most of the cells have the same sum."""
    sums = _by_cell(np.add, values, indptr)
    sums = sums[sums > 0]
    return len(sums) >= _CELLS and np.mean(np.abs(sums / np.median(sums) - 1) < _SAME) > _MOST


def _multiples(values: np.ndarray, indptr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide each cell by its smallest value above 0; tell in which cells that gives whole numbers throughout."""
    positive = np.where(values > 0, values, np.inf)
    smallest = np.repeat(_by_cell(np.minimum, positive, indptr), np.diff(indptr))
    multiples = values / smallest
    whole = np.abs(multiples - np.rint(multiples)) <= _TOLERANCE * multiples
    return multiples, _by_cell(np.logical_and, whole, indptr)


def _by_cell(operation: np.ufunc, values: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """Reduce each cell's values to one; cells without values give 0 or false."""
    stored = np.diff(indptr) > 0
    reduced = np.zeros(len(indptr) - 1, dtype=values.dtype)
    if stored.any():
        reduced[stored] = operation.reduceat(values, indptr[:-1][stored])
    return reduced
