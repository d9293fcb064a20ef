"""Genes perturbed together against what they do one by one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Synergy:
    """Excess of a set's effect over the sum of its genes' effects, cell by cell.

    Parameters
    ----------
    together
        Shift of the cell, all genes perturbed, `(n_cells,)`.
    summed
        Sum of the shifts with one gene perturbed at a time.
    displaced
        1 - cosine of the cell's vector before and after, all genes perturbed: `together`, unless shifts are means over
        genes.
    composed
        The same if the displacements of the vector, one gene at a time, simply added up.
    """

    together: np.ndarray
    summed: np.ndarray
    displaced: np.ndarray
    composed: np.ndarray

    @property
    def on_shifts(self) -> np.ndarray:
        """Excess over the sum of shifts, as the 2023 paper takes it."""
        return self.together - self.summed

    @property
    def on_vectors(self) -> np.ndarray:
        """Excess over the sum of displacements: two genes that push the same way are no surprise."""
        return self.displaced - self.composed


def synergy(
    before: np.ndarray, together: np.ndarray, singles: np.ndarray, shift: np.ndarray, single_shifts: np.ndarray
) -> Synergy:
    """Compare a set with its genes in the same cells.

    A cosine is no linear measure: where displacements are small, 1 - cosine grows with their square, so two genes that
    push the same way have four times the shift of one, not twice. The sum of displacements knows that.

    Parameters
    ----------
    before, together
        The cell as it was and with all genes perturbed, `(n_cells, d)`.
    singles
        The cell with one gene perturbed at a time, `(n_genes, n_cells, d)`.
    shift, single_shifts
        Shifts of the cell, `(n_cells,)` and `(n_genes, n_cells)`.
    """
    expected = before + (singles - before).sum(axis=0)
    return Synergy(
        together=shift,
        summed=single_shifts.sum(axis=0),
        displaced=_apart(before, together),
        composed=_apart(before, expected),
    )


def _apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return 1 - (one * other).sum(axis=1) / lengths
