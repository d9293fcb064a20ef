"""Edited copies of encoded cells, as index arithmetic on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch

from gfx._core.edits import GONE, NO_GENE, pad_sets

if TYPE_CHECKING:
    from gfx._core.edits import Edits
    from gfx._core.vocabulary import Vocabulary


class EditedCells(NamedTuple):
    """Cells with some of their genes perturbed.

    Parameters
    ----------
    tokens
        Edited cells, padded on the right, int64 `(n_edits, longest)`.
    source
        Position of each token in the cell before, int64 `(n_edits, longest)`; -1 for perturbed genes and padding.
    kept
        Positions if every other gene keeps its own, int64 `(n_edits, longest)`.
    cut
        Genes of the cell before that are left out of the comparison, bool `(n_edits, l)`, or `None` if there are none.
        Where genes are inserted into a cell that fills the model's input, the last ones are cut off before and after.
    """

    tokens: torch.Tensor
    source: torch.Tensor
    kept: torch.Tensor
    cut: torch.Tensor | None

    def take(self, rows: torch.Tensor, length: int) -> EditedCells:
        """Take some of the cells, none of which is longer than `length`."""
        cut = None if self.cut is None else self.cut[rows]
        tokens, source, kept = (values[rows, :length] for values in self[:3])
        return EditedCells(tokens, source, kept, cut)


def find_positions(tokens: torch.Tensor, is_special: torch.Tensor) -> torch.Tensor:
    """Position of every gene in each cell, int32 `(n_cells, n_tokens)`; -1 where it is absent."""
    n_cells, length = tokens.shape
    out = torch.full((n_cells, len(is_special)), -1, dtype=torch.int32, device=tokens.device)
    position = torch.arange(length, dtype=torch.int32, device=tokens.device)
    out.scatter_(1, tokens, position.expand(n_cells, -1))
    return out.masked_fill_(is_special, -1)


class PlacedEdits(NamedTuple):
    """Edits of the cells of a block, on the device.

    Parameters
    ----------
    operator
        ``"delete"``: taken out. ``"overexpress"``: brought to the front, in the order given, inserted where absent.
        ``"shift"``: moved to the ranks `to`.
    row, which
        Row of the cell in the block and number of the set, `(n_edits,)`.
    genes, positions
        Tokens of the set, filled up with -1, and their positions in the cell, -1 where absent, `(n_edits, n_genes)`.
    lengths, new_lengths
        Tokens of the cell before and after, `(n_edits,)`.
    to
        How many of the other genes then stand before each moved gene, int `(n_edits, n_genes)`; -1 takes it out.
    """

    operator: str
    row: torch.Tensor
    which: torch.Tensor
    genes: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    new_lengths: torch.Tensor
    to: torch.Tensor | None

    def take(self, numbers: torch.Tensor) -> PlacedEdits:
        row, which, genes, positions, lengths, new_lengths = (values[numbers] for values in self[1:7])
        to = None if self.to is None else self.to[numbers]
        return PlacedEdits(self.operator, row, which, genes, positions, lengths, new_lengths, to)


def place_edits(
    edits: Edits, numbers: np.ndarray, row: np.ndarray, *, lengths: torch.Tensor, table: torch.Tensor, most: int
) -> PlacedEdits:
    """Find the genes of some edits in their cells.

    Parameters
    ----------
    numbers, row
        Which edits, and the row in the block of the cell of each, `(n,)`.
    lengths, table
        Numbers of tokens of the cells of the block, and positions of genes from :func:`find_positions`.
    most
        Tokens that the model reads.
    """

    def put(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(table.device)

    which = edits.which[numbers]
    genes, cell = put(pad_sets(edits.sets)[which]), put(row)
    to = None if edits.to is None else put(edits.to[numbers])
    positions = torch.where(genes >= 0, table[cell[:, None], genes.clamp(min=0)].long(), -1)
    before, is_present = lengths[cell], positions >= 0
    if edits.operator == "delete":
        after = before - is_present.sum(1)
    elif edits.operator == "shift":
        after = before - (is_present & (to == GONE)).sum(1)
    else:
        after = (before + (~is_present & (genes != NO_GENE)).sum(1)).clamp(max=most)
    return PlacedEdits(edits.operator, cell, put(which), genes, positions, before, after, to)


def edit_cells(
    tokens: torch.Tensor, edits: PlacedEdits, vocabulary: Vocabulary, *, is_special: torch.Tensor, most: int
) -> EditedCells:
    """Perturb a set of genes in the cell of each edit, `tokens`, padded on the right, `(n_edits, l)`.

    Every token gets a key to sort by: its position, or for a perturbed gene a number between those of its new
    neighbours. Sorted, that is the edited cell. The model reads `most` tokens.
    """
    genes, positions, longest = edits.genes, edits.positions, int(edits.new_lengths.max()) if len(edits.row) else 0
    device, width, n_genes = tokens.device, tokens.shape[1], genes.shape[1]
    position = torch.arange(width, device=device)
    # Absent genes are marked in a column beyond the cell.
    is_perturbed = torch.zeros(len(tokens), width + 1, dtype=torch.bool, device=device)
    is_perturbed.scatter_(1, torch.where(positions >= 0, positions, width), True)  # noqa: FBT003 - torch's signature
    is_left = (position < edits.lengths[:, None]) & ~is_perturbed[:, :width]
    is_other = is_left & ~is_special[tokens]

    step = 2 * n_genes + 2  # room for all perturbed genes on either side of a token
    nowhere = (width + 1) * step
    key = torch.where(is_left, position * step + n_genes + 1, nowhere)
    cut = None
    if edits.operator == "overexpress":
        n_too_many = (is_left.sum(1) + (genes != NO_GENE).sum(1) - most).clamp(min=0)[:, None]
        from_the_end = is_other.flip(1).cumsum(1).flip(1)
        cut = is_other & (from_the_end <= n_too_many)
        key = torch.where(cut, nowhere, key)
        front = vocabulary.first_gene * step + torch.arange(n_genes, device=device)
        key = torch.cat([key, torch.where(genes != NO_GENE, front, nowhere)], dim=1)
    elif edits.operator == "shift":
        to = cast("torch.Tensor", edits.to)
        key = torch.cat([key, _between(positions, is_other, to, step=step, nowhere=nowhere)], dim=1)
    order = torch.argsort(key, dim=1, stable=True)[:, :longest]
    is_filled = torch.arange(order.shape[1], device=device) < edits.new_lengths[:, None]
    is_old = is_filled & (order < width)
    # Where genes are cut, <eos> closes up in the cell that is compared with, too.
    own = position.expand(len(tokens), -1) if cut is None else position - cut.cumsum(1)
    there = torch.where(is_old, order, 0)
    edited = tokens.gather(1, there)
    if edits.operator != "delete":
        edited = torch.where(is_old, edited, genes.gather(1, (order - width).clamp(0, n_genes - 1)))
    new = torch.where(is_filled, torch.arange(order.shape[1], device=device), 0)
    return EditedCells(
        tokens=torch.where(is_filled, edited, vocabulary.pad),
        source=torch.where(is_old, order, -1),
        kept=torch.where(is_old, own.gather(1, there), new),
        cut=cut if cut is not None and bool(cut.any()) else None,
    )


def _between(
    positions: torch.Tensor, is_other: torch.Tensor, to: torch.Tensor, *, step: int, nowhere: int
) -> torch.Tensor:
    """Keys of moved genes: between those of their new neighbours, `(n_edits, n_genes)`."""
    others_first = torch.argsort((~is_other).to(torch.uint8), dim=1, stable=True)
    n_others = is_other.sum(1)[:, None]
    last = others_first.gather(1, (n_others - 1).clamp(min=0))
    behind_all = (last + 1) * step - positions.shape[1]
    before = others_first.gather(1, torch.minimum(to.clamp(min=0), (n_others - 1).clamp(min=0))) * step
    # Genes that meet keep their order.
    aside = torch.argsort(torch.argsort(positions, dim=1, stable=True), dim=1, stable=True)
    goes = (positions >= 0) & (to != GONE)
    return torch.where(goes, torch.where(to < n_others, before, behind_all) + aside, nowhere)
