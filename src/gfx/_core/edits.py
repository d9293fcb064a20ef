"""Perturbations of genes in cells: which genes in which cells, where that can be done, and where moved genes go."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from gfx._core.statistics import divided

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gfx._core.vocabulary import Vocabulary

#: What a shift is split into, in this order; the parts add up to it.
PARTS = ("composition", "position", "context")

#: What fills up a set of fewer genes, so that sets of all sizes lie in one array.
NO_GENE = -1

#: Where a moved gene goes that falls behind the last one that the model reads.
GONE = -1


@dataclass(frozen=True)
class Edits:
    """Which genes are perturbed in which cells.

    Parameters
    ----------
    operator
        What is done to the genes, a name that :mod:`gfx._engine.edited` knows.
    sets
        Tokens perturbed together, one array each; or `(n_sets, n_genes)` where all sets are of one size.
    cell
        Row of the cell, int `(n_edits,)`.
    which
        Number of the set, int `(n_edits,)`.
    to
        New ranks of moved genes, `(n_edits, n_genes)`: how many of the other genes then stand before each.
    """

    operator: str
    sets: Sequence[np.ndarray] | np.ndarray
    cell: np.ndarray
    which: np.ndarray
    to: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.cell)

    def of_cells(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the edits of some cells, and which of these cells each is in, both `(n,)`."""
        order, cells = self._by_cell
        first, last = (np.searchsorted(cells, rows, side) for side in ("left", "right"))
        numbers = [order[start:end] for start, end in zip(first, last, strict=True)]
        return np.concatenate([order[:0], *numbers]), np.repeat(np.arange(len(rows)), last - first)

    @cached_property
    def _by_cell(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.cell, kind="stable")
        return order, self.cell[order]


def single_deletions(ids: np.ndarray, places: np.ndarray) -> Edits:
    """Delete genes one at a time: cell after cell, in the order of their genes.

    `places` says which of the tokens to delete, bool `(n_cells, longest)`; see
    :func:`gfx._core.screening.wanted_places`.
    """
    cell, place = np.nonzero(places)
    genes, which = np.unique(ids[cell, place].astype(np.int64), return_inverse=True)
    return Edits("delete", genes[:, None], cell, which)


def pad_sets(sets: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Lay sets of genes of different sizes into one array, int64 `(n_sets, largest)`."""
    if isinstance(sets, np.ndarray) and sets.ndim == 2:
        return sets.astype(np.int64, copy=False)
    out = np.full((len(sets), max(map(len, sets), default=0)), NO_GENE, dtype=np.int64)
    for row, genes in zip(out, sets, strict=True):
        row[: len(genes)] = genes
    return out


def find_places(rows: np.ndarray, genes: np.ndarray) -> np.ndarray:
    """Find the position of each gene in its row, int64 `(n_rows, n_genes)`; -1 where it is absent.

    `rows` are tokens `(n_rows, l)`; `genes` those to find, `(n_rows, n_genes)`, or `(n_genes,)` for the same in all.
    """
    genes = np.broadcast_to(genes, (len(rows), np.shape(genes)[-1]))
    out = np.full(genes.shape, -1, dtype=np.int64)
    for places, gene in zip(out.T, genes.T if rows.size else (), strict=False):
        is_gene = rows == gene[:, None]
        present = is_gene.any(axis=1) & (gene != NO_GENE)
        places[present] = is_gene[present].argmax(axis=1)
    return out


def can_be_perturbed(places: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary, operator: str) -> np.ndarray:
    """Say in which cells a set of genes can be perturbed, bool `(n_cells,)`.

    `places` are the positions of its genes, `(n_cells, n_genes)`, -1 where absent. Inserting needs no presence;
    deleting and moving need all genes of the set; all need another gene to compare.
    """
    n_others = lengths - vocabulary.n_specials - (places >= 0).sum(axis=1)
    present = np.ones(len(places), dtype=bool) if operator == "overexpress" else (places >= 0).all(axis=1)
    return present & (lengths > 0) & (n_others > 0)


def ranks_of(places: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Mean rank of the genes of a set that a cell has: 0 its first gene, 1 its last; NaN if it has none of them."""
    sums, n = np.maximum(places, 0).sum(axis=1), (places >= 0).sum(axis=1)
    return (divided(sums, n) - vocabulary.first_gene) / np.maximum(lengths - vocabulary.n_specials - 1, 1)


def quartile_ranks(places: np.ndarray, lengths: np.ndarray, quartiles: int, vocabulary: Vocabulary) -> np.ndarray:
    """Find where genes go that move by quartiles of their cell: to the middle of the new one, or to the very end.

    `places` are positions of the genes, `(n_cells, n_genes)`, -1 where absent; `quartiles` above 0 lead to the front.

    Returns
    -------
    How many of the other genes then stand before each, int64 `(n_cells, n_genes)`, which for a gene by itself is its
    new rank; the value where a gene is absent means nothing.
    """
    n_genes = (lengths - vocabulary.n_specials)[:, None]
    rank = places - vocabulary.first_gene
    new = 4 * rank // np.maximum(n_genes, 1) - quartiles
    middle = (2 * new + 1) * n_genes // 8
    wanted = np.where(new < 0, 0, np.where(new > 3, n_genes - 1, middle))
    # Genes that move together do not count as each other's neighbours, and keep their order where they meet.
    order = np.argsort(np.where(places >= 0, wanted * (n_genes + 1) + rank, np.iinfo(np.int64).max), axis=1)
    others_before = np.take_along_axis(wanted, order, axis=1) - np.arange(places.shape[1])
    out = np.empty_like(wanted)
    np.put_along_axis(out, order, np.maximum.accumulate(np.maximum(others_before, 0), axis=1), axis=1)
    return out
