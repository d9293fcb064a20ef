"""Run edited cells and compare them with the cells as they were."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.nn import functional

from gfx._core.edits import edit_rows, find_places, pad_sets, ranks_of
from gfx._engine.device import batch_tokens, halving, sum_dtype
from gfx._engine.forward import run_cells, states
from gfx._engine.pooling import pool, special_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import BertModel

    from gfx._core.edits import Edit, EditedRows
    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.forward import Batch

#: How far a cell moved: `<cls>`, the mean of its genes, or the mean over its genes of how far each one moved.
Comparison = Literal["cls", "mean", "genes"]


@dataclass(frozen=True)
class Edits:
    """Which genes are perturbed in which cells.

    Parameters
    ----------
    kind
        What is done to the genes.
    sets
        Tokens perturbed together, one array each.
    cell
        Row of the cell, int `(n_edits,)`.
    which
        Number of the set, int `(n_edits,)`.
    to
        New ranks of moved genes, `(n_edits, n_genes)`.
    """

    kind: Edit
    sets: Sequence[np.ndarray]
    cell: np.ndarray
    which: np.ndarray
    to: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.cell)


@dataclass(frozen=True)
class EditEffects:
    """What moved, edit by edit, in the order of the edits.

    Parameters
    ----------
    shift
        Of the cell, 1 - cosine, float32 `(n_edits,)`.
    parts
        What of it is composition, position and context, float32 `(n_edits, 3)`; they add up to `shift`.
    toward
        Change of the cell's cosine to each state, float32 `(n_edits, n_states)`.
    toward_parts
        The same split, float32 `(n_edits, n_states, 3)`.
    rank
        Mean rank of the perturbed genes in the cell, 0 its first gene and 1 its last, float32 `(n_edits,)`; NaN if it
        has none of them.
    vectors
        The cell before and after, float32 `(n_edits, 2, d)`, if asked for.
    genes
        Sum, sum of squares and number of the shifts of each remaining gene, float64 `(3, n_tokens, n_groups)`, if
        asked for.
    """

    shift: np.ndarray
    parts: np.ndarray
    toward: np.ndarray
    toward_parts: np.ndarray
    rank: np.ndarray
    vectors: np.ndarray | None
    genes: np.ndarray | None


def measure_edits(
    encoder: BertModel,
    ids: np.ndarray,
    lengths: np.ndarray,
    vocabulary: Vocabulary,
    edits: Edits,
    *,
    how: Comparison,
    hold: bool = False,
    split: bool = True,
    goals: np.ndarray | None = None,
    gene_groups: np.ndarray | None = None,
    n_groups: int = 0,
    keep_vectors: bool = False,
    description: str = "perturbing",
) -> EditEffects:
    """Perturb genes in cells and measure how far each cell, and each of its other genes, moves.

    A shift is split into three parts, which add up to it. *Composition*: only the perturbed genes' own vectors leave
    or change in the mean, nothing else moves; 0 where a cell is not a mean over its genes. *Context*: the network
    reads the cell without them, every other gene keeping its position. *Position*: the others give way.

    Memory: results of the edits, and of the genes three numbers a token and group, however many cells there are.

    Parameters
    ----------
    ids, lengths
        Tokens `(n_cells, longest)` and lengths `(n_cells,)` of all cells.
    how
        What is compared; towards states, ``"genes"`` is ``"mean"``.
    hold
        No other gene gives way: positions stay as they were, and the position part is 0.
    split
        Find the parts; without, they are NaN, and a pass is saved unless `hold`.
    goals
        Vectors of states, float `(n_states, d)`, or `(n_sets, n_states, d)` for other ones with each set.
    gene_groups, n_groups
        Group of each edit, int `(n_edits,)`, to sum the shifts of the remaining genes in; and how many there are.
    keep_vectors
        Return the cell before and after each edit, too.
    """
    device, n_tokens = encoder.device, len(vocabulary)
    n_edits, n_states = len(edits), 0 if goals is None else goals.shape[-2]
    shift = np.full(n_edits, np.nan, dtype=np.float32)
    rank = shift.copy()
    parts = np.full((n_edits, 3), np.nan, dtype=np.float32)
    toward = np.full((n_edits, n_states), np.nan, dtype=np.float32)
    toward_parts = np.full((n_edits, n_states, 3), np.nan, dtype=np.float32)
    vectors = np.full((n_edits, 2, encoder.config.hidden_size), np.nan, np.float32) if keep_vectors else None
    genes = torch.zeros(3, n_tokens * n_groups, dtype=sum_dtype(device), device=device)
    targets = None
    if goals is not None:
        targets = torch.from_numpy(np.asarray(goals, dtype=np.float32)).to(device, sum_dtype(device))
    compare = partial(
        _compare,
        encoder,
        special_tokens(vocabulary, device),
        how=how,
        hold=hold,
        split=split,
        goals=targets,
        with_genes=gene_groups is not None,
    )
    sets = pad_sets(edits.sets)
    by_cell = np.argsort(edits.cell, kind="stable")
    first, last = (np.searchsorted(edits.cell[by_cell], np.arange(len(lengths)), side) for side in ("left", "right"))
    concerned = np.where(last > first, lengths, 0)
    # Originals stay in memory while their edited copies run.
    for batch in run_cells(encoder, ids, concerned, description=description):
        some = np.concatenate([by_cell[first[row] : last[row]] for row in batch.rows])
        of_batch = np.repeat(np.arange(len(batch.rows)), last[batch.rows] - first[batch.rows])
        at_once = max(1, batch_tokens(device) // (batch.tokens.shape[1] + sets.shape[1]))
        chunks = [np.arange(i, min(i + at_once, len(some))) for i in range(0, len(some), at_once)]
        tokens = batch.tokens.cpu().numpy()

        def run(chunk, batch=batch, some=some, of_batch=of_batch, tokens=tokens):
            at = some[chunk]
            rows, n = tokens[of_batch[chunk]], lengths[edits.cell[at]].astype(np.int64)
            perturbed, to = sets[edits.which[at]], None if edits.to is None else edits.to[at]
            rank[at] = ranks_of(find_places(rows, perturbed), n, vocabulary)
            max_length = encoder.config.max_position_embeddings
            edited = edit_rows(rows, n, perturbed, vocabulary, edits.kind, max_length=max_length, to=to)
            return compare(batch, of_batch=of_batch[chunk], rows=rows, edited=edited, which=edits.which[at])

        for chunk, found in halving(chunks, run):
            at = some[chunk]
            shift[at], parts[at] = _host(found.shift), _host(found.parts)
            if targets is not None:
                toward[at], toward_parts[at] = _host(found.toward), _host(found.toward_parts)
            if vectors is not None:
                vectors[at] = _host(found.vectors)
            if gene_groups is not None:
                group = torch.from_numpy(gene_groups[at]).to(device)[:, None]
                slot = (found.tokens * n_groups + group)[found.is_other]
                moved = found.gene_shift[found.is_other].to(genes.dtype)
                for row, values in enumerate((moved, moved**2, torch.ones_like(moved))):
                    genes[row].index_add_(0, slot, values)
    gene_sums = None if gene_groups is None else genes.cpu().numpy().reshape(3, n_tokens, n_groups).astype(np.float64)
    return EditEffects(shift, parts, toward, toward_parts, rank, vectors, gene_sums)


def _host(values: torch.Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


@dataclass(frozen=True)
class _Compared:
    """What one chunk of edits gave, on the device; `tokens`, `is_other` and `gene_shift` are `(n, l)`."""

    shift: torch.Tensor
    parts: torch.Tensor
    toward: torch.Tensor | None
    toward_parts: torch.Tensor | None
    vectors: torch.Tensor
    tokens: torch.Tensor
    is_other: torch.Tensor
    gene_shift: torch.Tensor | None


def _compare(
    encoder: BertModel,
    special: torch.Tensor,
    batch: Batch,
    *,
    of_batch: np.ndarray,
    rows: np.ndarray,
    edited: EditedRows,
    which: np.ndarray,
    how: Comparison,
    hold: bool,
    split: bool,
    goals: torch.Tensor | None,
    with_genes: bool,
) -> _Compared:
    device = batch.tokens.device

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    cell = put(of_batch)
    before, was_valid = batch.output[cell], batch.valid[cell]
    was_gene = was_valid & ~special[put(rows)]
    if edited.cut.any():
        before = _without_cut_genes(encoder, before, rows, was_valid.cpu().numpy(), edited)
        was_gene = was_gene & ~put(edited.cut)
    tokens, source = put(edited.tokens), put(edited.source)
    valid = torch.arange(tokens.shape[1], device=device) < put(edited.lengths)[:, None]
    is_gene = valid & ~special[tokens]
    is_other = is_gene & (source >= 0)
    stayed = torch.gather(before, 1, source.clamp(min=0)[..., None].expand(-1, -1, before.shape[-1]))
    held = states(encoder, tokens, valid, put(edited.held)) if hold or split else None
    after = held if hold else states(encoder, tokens, valid)

    cell_how = "mean" if how == "genes" else how
    pooled = partial(_vector, how=cell_how, dtype=sum_dtype(device))
    path = [pooled(before, was_gene), pooled(after, is_gene)]
    if split:
        # Only the perturbed genes' own vectors change; then the network reads; then the others give way.
        own = path[0] if cell_how == "cls" else pooled(torch.where(is_other[..., None], stayed, held), is_gene)
        path[1:1] = [own, pooled(held, is_gene)]
    gene_shift = _apart(stayed.float(), after.float()) if with_genes or how == "genes" else None
    if how == "genes":
        moved = [_mean(gene_shift, is_other)]
        if split:
            on_the_way = moved[0] if hold else _mean(_apart(stayed.float(), held.float()), is_other)
            moved = [torch.zeros_like(moved[0]), on_the_way, *moved]
    else:
        # What did not change is at 0, not at the rounding of a cosine.
        moved = [torch.where((vector == path[0]).all(-1), 0, _apart(path[0], vector)) for vector in path[1:]]
    toward = toward_parts = None
    if goals is not None:
        at = goals[put(which)] if goals.ndim == 3 else goals[None]
        cosines = [functional.cosine_similarity(vector[:, None], at, dim=-1) for vector in path]
        changes = [cosine - cosines[0] for cosine in cosines[1:]]
        toward, toward_parts = changes[-1], _parts(changes)
    return _Compared(
        shift=moved[-1],
        parts=_parts(moved),
        toward=toward,
        toward_parts=toward_parts,
        vectors=torch.stack([path[0], path[-1]], dim=1),
        tokens=tokens,
        is_other=is_other,
        gene_shift=gene_shift,
    )


def _apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return 1 - functional.cosine_similarity(one, other, dim=-1)


def _mean(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return (values * where).sum(1) / where.sum(1)


def _vector(hidden: torch.Tensor, is_gene: torch.Tensor, *, how: Literal["cls", "mean"], dtype: torch.dtype):
    return pool(hidden, is_gene, how).to(dtype)


def _parts(path: list[torch.Tensor]) -> torch.Tensor:
    """Composition, position and context from the effect at each station of the way; NaN if there is but the last."""
    if len(path) == 1:
        return torch.full((*path[0].shape, 3), torch.nan, device=path[0].device)
    own, held, total = path
    return torch.stack([own, total - held, held - own], dim=-1)


def _without_cut_genes(
    encoder: BertModel, before: torch.Tensor, rows: np.ndarray, valid: np.ndarray, edited: EditedRows
) -> torch.Tensor:
    """Read cells again without the genes that an insertion pushed off their end; states at their old positions."""
    device = before.device
    some = np.flatnonzero(edited.cut.any(axis=1))
    kept = valid[some] & ~edited.cut[some]
    lengths = kept.sum(axis=1)
    order = np.argsort(~kept, axis=1, kind="stable")[:, : lengths.max()]
    tokens = torch.from_numpy(np.take_along_axis(rows[some], order, axis=1)).to(device)
    there = torch.arange(order.shape[1], device=device) < torch.from_numpy(lengths).to(device)[:, None]
    tokens = torch.where(there, tokens, encoder.config.pad_token_id)
    again = states(encoder, tokens, there)
    at = torch.from_numpy(order).to(device)[..., None].expand_as(again)
    placed = torch.zeros_like(before[: len(some)]).scatter(1, at, again)
    return before.index_copy(0, torch.from_numpy(some).to(device), placed)
