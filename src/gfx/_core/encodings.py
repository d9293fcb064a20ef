"""Rank value encodings of many cells, each as long as the cell has genes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Encodings:
    """Tokens of cells, in one array: rows of a padded one, or one cell behind the other.

    Parameters
    ----------
    values
        Tokens, special ones included, and 0 between cells: uint16, or uint32 for a vocabulary that needs it.
    begins
        Where each cell begins, int64 `(n_cells,)`, ascending.
    lengths
        Number of tokens of each cell, int32 `(n_cells,)`; 0 for a cell without any known gene.
    """

    values: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, padded: np.ndarray, lengths: np.ndarray) -> Encodings:
        """Take rows of tokens, padded on the right, `(n_cells, longest)`, as they are."""
        n_cells, longest = padded.shape
        return cls(padded.ravel(), np.arange(n_cells) * longest, lengths.astype(np.int32))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, cell: int) -> np.ndarray:
        """Tokens of a cell, not to be written to."""
        return self.values[self.begins[cell] : self.begins[cell] + self.lengths[cell]]

    def without_padding(self) -> Encodings:
        """Copy the tokens, one cell behind the other."""
        begins = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        cells = (self[cell] for cell in range(len(self)))
        return Encodings(np.concatenate([self.values[:0], *cells]), begins, self.lengths)

    def padded(self, cells: np.ndarray) -> np.ndarray:
        """Tokens of some cells, padded with 0 on the right up to the longest of them, `(n, longest)`."""
        out = np.zeros((len(cells), int(self.lengths[cells].max(initial=0))), dtype=self.values.dtype)
        for row, cell in zip(out, cells, strict=True):
            row[: self.lengths[cell]] = self[cell]
        return out

    def places(self, genes: Sequence[int]) -> np.ndarray:
        """Find the position of each gene in every cell, int64 `(n_cells, n_genes)`; -1 where it is absent."""
        out = np.full((len(self), len(genes)), -1, dtype=np.int64)
        for of_gene, gene in zip(out.T, genes, strict=True):
            where = np.flatnonzero(self.values == int(gene))  # a numpy integer would widen all tokens
            cell = np.searchsorted(self.begins, where, side="right") - 1
            of_gene[cell] = where - self.begins[cell]
        return out
