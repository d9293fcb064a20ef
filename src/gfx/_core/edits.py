"""Genes taken out of encoded cells, brought to the front, or moved: rows of tokens in, edited rows out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gfx._core.vocabulary import Vocabulary

Edit = Literal["delete", "overexpress", "shift"]

#: What a shift is split into, in this order; the parts add up to it.
PARTS = ("composition", "position", "context")

#: What fills up a set of fewer genes, so that sets of all sizes lie in one array.
NO_GENE = -1

#: Where a moved gene goes that falls behind the last one that the model reads.
GONE = -1


@dataclass(frozen=True)
class EditedRows:
    """Cells with some of their genes perturbed.

    Parameters
    ----------
    tokens
        Edited cells, padded on the right, int64 `(n_edits, longest)`.
    lengths
        Their tokens, int64 `(n_edits,)`.
    source
        Where each token stood in the cell as it was, int64 `(n_edits, longest)`; -1 for perturbed genes and padding.
    held
        Positions where no gene gives way to another: every other gene keeps its own, int64 `(n_edits, longest)`.
    cut
        Which genes of the cell as it was do not take part in the comparison, bool `(n_edits, l)`: where genes were
        inserted into a cell that fills the model's input, the last ones are cut off here as there.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    source: np.ndarray
    held: np.ndarray
    cut: np.ndarray


def pad_sets(sets: Sequence[np.ndarray]) -> np.ndarray:
    """Lay sets of genes of different sizes into one array, int64 `(n_sets, largest)`."""
    out = np.full((len(sets), max(map(len, sets), default=0)), NO_GENE, dtype=np.int64)
    for at, genes in enumerate(sets):
        out[at, : len(genes)] = genes
    return out


def find_places(rows: np.ndarray, genes: np.ndarray) -> np.ndarray:
    """Find the position of each gene in its row, int64 `(n_rows, n_genes)`; -1 where it is absent.

    Parameters
    ----------
    rows
        Tokens `(n_rows, l)`.
    genes
        Tokens to find, `(n_rows, n_genes)`, or `(n_genes,)` for the same in all rows.
    """
    genes = np.broadcast_to(genes, (len(rows), np.shape(genes)[-1]))
    out = np.full(genes.shape, -1, dtype=np.int64)
    for at in range(genes.shape[1] if rows.size else 0):
        found = rows == genes[:, at : at + 1]
        there = found.any(axis=1) & (genes[:, at] != NO_GENE)
        out[there, at] = found[there].argmax(axis=1)
    return out


def can_be_perturbed(
    ids: np.ndarray, lengths: np.ndarray, genes: np.ndarray, vocabulary: Vocabulary, edit: Edit
) -> np.ndarray:
    """Say in which cells a set of genes can be perturbed, bool `(n_cells,)`.

    Inserting needs no presence; deleting and moving need all genes of the set; all need another gene to compare.
    """
    places = find_places(ids, genes)
    n_others = lengths - vocabulary.n_specials - (places >= 0).sum(axis=1)
    present = np.ones(len(ids), dtype=bool) if edit == "overexpress" else (places >= 0).all(axis=1)
    return present & (lengths > 0) & (n_others > 0)


def ranks_of(places: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Mean rank of the genes of a set that a cell has: 0 its first gene, 1 its last; NaN if it has none of them."""
    there = places >= 0
    n_there = there.sum(axis=1)
    mean = np.divide(
        np.where(there, places, 0).sum(axis=1), n_there, out=np.full(len(places), np.nan), where=n_there > 0
    )
    return (mean - vocabulary.first_gene) / np.maximum(lengths - vocabulary.n_specials - 1, 1)


def edit_rows(
    rows: np.ndarray,
    lengths: np.ndarray,
    genes: np.ndarray,
    vocabulary: Vocabulary,
    edit: Edit,
    *,
    max_length: int,
    to: np.ndarray | None = None,
) -> EditedRows:
    """Perturb a set of genes in each row.

    Every token gets a place to sort by: its position, or for a perturbed gene one between those of its new
    neighbours. Sorted, that is the edited cell.

    Parameters
    ----------
    rows, lengths
        Tokens `(n_edits, l)`, padded on the right, and how many there are, `(n_edits,)`.
    genes
        Tokens to perturb, `(n_edits, n_genes)`, filled up with -1.
    edit
        ``"delete"``: taken out. ``"overexpress"``: brought to the front, in the order given, inserted where absent.
        ``"shift"``: moved to the ranks `to`.
    max_length
        Tokens that the model reads.
    to
        How many of the other genes then stand before each moved gene, int `(n_edits, n_genes)`; -1 takes it out.
    """
    rows = rows.astype(np.int64)
    width = rows.shape[1]
    position = np.arange(width)
    valid = position < lengths[:, None]
    places = find_places(rows, genes)
    perturbed = np.zeros(rows.shape, dtype=bool)
    edit_at, gene_at = np.nonzero(places >= 0)
    perturbed[edit_at, places[edit_at, gene_at]] = True
    others = valid & ~perturbed & ~vocabulary.is_special[rows]

    between = _between(places, genes, others, vocabulary, edit, to=to)
    sort_by = np.concatenate([np.where(valid & ~perturbed, position, np.inf), between], axis=1)
    n_cut = np.maximum(np.isfinite(sort_by).sum(axis=1) - max_length, 0)
    from_the_end = others[:, ::-1].cumsum(axis=1)[:, ::-1]
    cut = others & (from_the_end <= n_cut[:, None])
    sort_by[:, :width][cut] = np.inf

    new_lengths = np.isfinite(sort_by).sum(axis=1)
    longest = int(new_lengths.max(initial=0))
    order = np.argsort(sort_by, axis=1, kind="stable")[:, :longest]
    kept = np.arange(longest) < new_lengths[:, None]
    # Where genes are cut, <eos> moves up in the cell that is compared with, too.
    own = np.concatenate([position - cut.cumsum(axis=1), np.zeros(genes.shape, dtype=np.int64)], axis=1)
    tokens = np.take_along_axis(np.concatenate([rows, genes], axis=1), order, axis=1)
    return EditedRows(
        tokens=np.where(kept, tokens, vocabulary.pad),
        lengths=new_lengths,
        source=np.where(kept & (order < width), order, -1),
        held=np.where(kept, np.where(order < width, np.take_along_axis(own, order, axis=1), np.arange(longest)), 0),
        cut=cut,
    )


def _between(
    places: np.ndarray,
    genes: np.ndarray,
    others: np.ndarray,
    vocabulary: Vocabulary,
    edit: Edit,
    *,
    to: np.ndarray | None,
) -> np.ndarray:
    """Where perturbed genes go: numbers between the positions of their new neighbours, `(n_edits, n_genes)`.

    Infinite for genes that go nowhere.
    """
    out = np.full(genes.shape, np.inf)
    n_genes = genes.shape[1]
    if edit == "overexpress":
        out[:] = vocabulary.first_gene - 1 + (np.arange(n_genes) + 1) / (n_genes + 1)
    elif edit == "shift":
        in_order = np.argsort(~others, axis=1, kind="stable")
        n_others = others.sum(axis=1)[:, None]
        behind_all = np.take_along_axis(in_order, np.maximum(n_others - 1, 0), axis=1) + 0.5
        before = np.take_along_axis(in_order, np.clip(to, 0, n_others - 1), axis=1) - 0.5
        # Genes that meet keep their order.
        aside = np.argsort(np.argsort(places, axis=1, kind="stable"), axis=1, kind="stable") * 1e-4
        goes = (places >= 0) & (to != GONE)
        out = np.where(goes, np.where(to < n_others, before, behind_all) + aside, np.inf)
    out[genes == NO_GENE] = np.inf
    return out


def quartile_ranks(places: np.ndarray, lengths: np.ndarray, quartiles: int, vocabulary: Vocabulary) -> np.ndarray:
    """Find where genes go that move by quartiles of their cell: to the middle of the new one, or to the very end.

    Parameters
    ----------
    places
        Positions of the genes, `(n_cells, n_genes)`, -1 where absent.
    quartiles
        How many, above 0 towards the front.

    Returns
    -------
    How many of the other genes then stand before each, int64 `(n_cells, n_genes)`, which for a gene by itself is its
    new rank; what it says where a gene is absent means nothing.
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
