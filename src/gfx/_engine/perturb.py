"""Delete genes from encoded cells and compare with the untouched cell."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from gfx._engine.device import batch_tokens, halving, sum_dtype
from gfx._engine.forward import run_cells, states
from gfx._engine.pooling import pool, special_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import BertModel

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.forward import Batch
    from gfx._engine.pooling import Pooling


@dataclass(frozen=True)
class DeletionEffects:
    """What moved when genes were deleted; NaN where a cell lacks one of them.

    Parameters
    ----------
    cells
        Shift of each cell, 1 - cosine, float32 `(n_cells, n_perturbations)`.
    states
        Change of each cell's cosine to each state, float32 `(n_cells, n_perturbations, n_states)`.
    genes
        Mean shift of each remaining gene, 1 - cosine, float32 `(n_tokens, n_perturbations)`.
    n_gene_cells
        Cells behind each of these means, int64 `(n_tokens, n_perturbations)`.
    ranks
        Mean rank of the deleted genes in each cell, 0 the first gene and 1 the last, float32
        `(n_cells, n_perturbations)`.
    """

    cells: np.ndarray
    states: np.ndarray
    genes: np.ndarray
    n_gene_cells: np.ndarray
    ranks: np.ndarray


def delete_genes(
    encoder: BertModel,
    ids: np.ndarray,
    lengths: np.ndarray,
    vocabulary: Vocabulary,
    perturbations: Sequence[np.ndarray],
    *,
    how: Pooling,
    state_vectors: np.ndarray | None = None,
) -> DeletionEffects:
    """Delete each set of genes from each cell that has all of them.

    The sequence closes up behind a deleted gene, as in the published software. With ``how="cls"`` the shift of a
    cell is that of its first position; with ``how="mean"`` the mean over the remaining genes of each gene's shift.

    Parameters
    ----------
    perturbations
        Tokens deleted together, one array each.
    state_vectors
        Centroids of cell states, float `(n_states, d)`.
    """
    device, n_tokens, n_sets = encoder.device, len(vocabulary), len(perturbations)
    n_states = 0 if state_vectors is None else len(state_vectors)
    goals = None if state_vectors is None else torch.from_numpy(np.asarray(state_vectors, dtype=np.float32)).to(device)
    shift = np.full((len(lengths), n_sets), np.nan, dtype=np.float32)
    ranks = shift.copy()
    toward = np.full((len(lengths), n_sets, n_states), np.nan, dtype=np.float32)
    gene_sums = torch.zeros(n_tokens * n_sets, dtype=sum_dtype(device), device=device)
    gene_counts = torch.zeros(n_tokens * n_sets, dtype=torch.int64, device=device)
    special = special_tokens(vocabulary, device)
    concerned = np.isin(ids, np.concatenate(perturbations)).any(axis=1)
    max_tokens = batch_tokens(device)
    # Originals stay in memory while their edited copies run.
    for batch in run_cells(encoder, ids, np.where(concerned, lengths, 0), description="deleting"):
        edits = _edits(batch.tokens.cpu().numpy(), lengths[batch.rows] - vocabulary.n_specials, perturbations, n_tokens)
        if not len(edits.cell):
            continue
        before = pool(batch.output, batch.valid & ~special[batch.tokens], how)
        cells_at_once = max(1, max_tokens // batch.tokens.shape[1])
        parts = [
            np.arange(i, min(i + cells_at_once, len(edits.cell))) for i in range(0, len(edits.cell), cells_at_once)
        ]

        compare = partial(_compare, encoder, batch, edits, before=before, special=special, goals=goals, how=how)
        for part, (cell_shift, state_shift, cosine, tokens, is_gene) in halving(parts, compare):
            rows, sets = batch.rows[edits.cell[part]], edits.perturbation[part]
            shift[rows, sets] = cell_shift.cpu().numpy()
            if state_shift is not None:
                toward[rows, sets] = state_shift.cpu().numpy()
            slot = tokens * n_sets + torch.from_numpy(sets).to(device)[:, None]
            gene_sums.index_add_(0, slot[is_gene], (1 - cosine[is_gene]).to(gene_sums.dtype))
            gene_counts += torch.bincount(slot[is_gene], minlength=n_tokens * n_sets)
        n_genes = lengths[batch.rows[edits.cell]] - vocabulary.n_specials
        ranks[batch.rows[edits.cell], edits.perturbation] = (edits.place - vocabulary.first_gene) / np.maximum(
            n_genes - 1, 1
        )
    means = (gene_sums / gene_counts).float().cpu().numpy().reshape(n_tokens, n_sets)
    return DeletionEffects(shift, toward, means, gene_counts.cpu().numpy().reshape(n_tokens, n_sets), ranks)


@dataclass(frozen=True)
class _Edits:
    """Which cell of the batch loses which set of genes, `(n_edits,)` each, and where they stood on average."""

    cell: np.ndarray
    perturbation: np.ndarray
    place: np.ndarray
    removed: np.ndarray  # bool (n_edits, l)


def _edits(tokens: np.ndarray, n_genes: np.ndarray, perturbations: Sequence[np.ndarray], n_tokens: int) -> _Edits:
    place = np.full((len(tokens), n_tokens), -1, dtype=np.int32)
    np.put_along_axis(place, tokens, np.arange(tokens.shape[1], dtype=np.int32)[None], axis=1)
    cells, sets, means, removed = [], [], [], []
    for at, genes in enumerate(perturbations):
        where = place[:, genes]
        # A cell of nothing but the deleted genes has nothing left to compare.
        has_all = np.flatnonzero((where >= 0).all(axis=1) & (n_genes > len(genes)))
        gone = np.zeros((len(has_all), tokens.shape[1]), dtype=bool)
        np.put_along_axis(gone, where[has_all], True, axis=1)  # noqa: FBT003
        cells.append(has_all)
        sets.append(np.full(len(has_all), at))
        means.append(where[has_all].mean(axis=1))
        removed.append(gone)
    return _Edits(np.concatenate(cells), np.concatenate(sets), np.concatenate(means), np.concatenate(removed))


def _compare(
    encoder: BertModel,
    batch: Batch,
    edits: _Edits,
    part: np.ndarray,
    *,
    before: torch.Tensor,
    special: torch.Tensor,
    goals: torch.Tensor | None,
    how: Pooling,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run edited cells and compare them, position by position, with what is left of the originals.

    Returns
    -------
    Shift of each edited cell `(m,)`; change of its cosine to each goal `(m, n_states)`; cosine at each remaining
    position `(m, l)`; the tokens there; and which of them are genes.
    """
    device = batch.tokens.device
    cell = torch.from_numpy(edits.cell[part]).to(device)
    kept = batch.valid[cell] & ~torch.from_numpy(edits.removed[part]).to(device)
    longest = int(kept.sum(1).max())
    # Kept positions first, in their order: the edited sequence as an index into the original one.
    source = torch.argsort(kept.logical_not().to(torch.uint8), dim=1, stable=True)[:, :longest]
    valid = torch.gather(kept, 1, source)
    tokens = torch.gather(batch.tokens[cell], 1, source)
    tokens = torch.where(valid, tokens, encoder.config.pad_token_id)
    after = states(encoder, tokens, valid)
    original = torch.gather(batch.output[cell], 1, source[..., None].expand(-1, -1, after.shape[-1]))
    cosine = functional.cosine_similarity(after.float(), original.float(), dim=-1)
    is_gene = valid & ~special[tokens]
    mean_cosine = cosine[:, 0] if how == "cls" else (cosine * is_gene).sum(1) / is_gene.sum(1)
    toward = None
    if goals is not None:
        moved = pool(after, is_gene, how)
        toward = functional.cosine_similarity(moved[:, None], goals[None], dim=-1)
        toward = toward - functional.cosine_similarity(before[cell][:, None], goals[None], dim=-1)
    return 1 - mean_cosine, toward, cosine, tokens, is_gene
