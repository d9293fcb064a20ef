"""What deleting each gene would do, from derivatives: all genes of a cell in a few passes.

Every gene has a weight that says how much of it is kept, 1 in the cell as it is and 0 in one without it: its logarithm
is added to the scores of the gene as a key, and it is the gene's weight in the mean. The vector of the cell is a smooth
function of the weights; its derivative with respect to one of them estimates the vector without that gene. Where the
other genes close up, the vector is a smooth function of their positions, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from gfx._core.batching import batches_by_length
from gfx._core.edits import pad_sets, ranks_of
from gfx._engine.blocks import blocks_of, embed
from gfx._engine.device import batch_tokens, halving, n_workers, workers
from gfx._engine.edited import find_positions
from gfx._engine.forward import put_cells, tell
from gfx._engine.perturb import unknown_effects
from gfx._engine.pooling import Pooling, special_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import BertModel

    from gfx._core.edits import Edits
    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.blocks import Block
    from gfx._types import Positions

#: A pass that derivatives are taken of keeps what every block computes: so many times fewer tokens at once.
_KEPT = 8

#: Numbers that each of several workers may keep of a cell, about; with more, one worker has all threads.
_MOST_KEPT = 1 << 27


def n_passes(n_probes: int, n_goals: int) -> int:
    """Count the passes that estimates take in a cell, where a backward pass counts as two."""
    return 1 + 2 * (n_probes + n_goals)


def estimate_deletions(
    encoder: BertModel,
    ids: np.ndarray,
    lengths: np.ndarray,
    vocabulary: Vocabulary,
    edits: Edits,
    *,
    how: Pooling,
    positions: Positions,
    goals: np.ndarray | None = None,
    n_probes: int,
    seeds: Sequence[Sequence[int]],
) -> dict[str, np.ndarray]:
    """Estimate what deletions of single genes do to each cell: `shift`, `toward` states, and `rank`.

    Shifts toward states are first order: minus the derivative of the cosine. The cosine of a cell to itself is highest
    where the cell is, so shifts are second order: half the square of how fast the cell's vector turns. That is measured
    along random directions, orthogonal to the vector and to each other; with as many as there are, exactly, with fewer
    without bias. Where `<cls>` is compared in the embedding, no gene has an effect, and all estimates are 0.

    Cost: one pass forward, one backward for each state and each direction, see :func:`n_passes`.

    Parameters
    ----------
    edits
        Of single genes that the cells have, from :func:`gfx._core.edits.single_deletions`.
    how, positions, goals
        As in :func:`gfx._engine.perturb.run_edits`; goals `(n_states, d)`.
    n_probes
        Random directions for each cell; 0 leaves shifts out. Not more than the vector has dimensions, less one.
    seeds
        Of the directions of each cell.
    """
    device, width, n_states = encoder.device, encoder.config.hidden_size, 0 if goals is None else len(goals)
    targets = torch.from_numpy(np.zeros((0, width)) if goals is None else np.asarray(goals)).to(device, torch.float32)
    effects = unknown_effects(len(edits), shift=(), rank=(), toward=(n_states,))
    special, blocks = special_tokens(vocabulary, device), blocks_of(encoder)
    concerned = np.where(np.isin(np.arange(len(lengths)), edits.cell), lengths, 0)
    n = _n_workers(encoder)
    batches = batches_by_length(concerned, max(1, batch_tokens(device) // (n * _KEPT)))

    def run(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, valid = put_cells(ids, lengths, rows, device)
        draws = [np.random.default_rng(seeds[row]).standard_normal((width, n_probes)) for row in rows]
        probes = torch.from_numpy(np.stack(draws).astype(np.float32)).to(device)
        with torch.enable_grad():
            slopes = _slopes(
                encoder,
                blocks,
                tokens,
                valid,
                valid & ~special[tokens],
                how=how,
                positions=positions,
                goals=targets,
                probes=probes,
            )
        return find_positions(torch.where(valid, tokens, vocabulary.pad), special), *slopes

    genes = pad_sets(edits.sets)[:, 0]
    with workers(n) as mapped:
        for rows, (table, turned, toward) in halving(batches, run, mapped):
            tell(n_passes(n_probes, n_states) * len(rows))
            numbers, row = edits.of_cells(rows)
            cell = torch.from_numpy(row).to(device)
            position = table[cell, torch.from_numpy(genes[edits.which[numbers]]).to(device)].long()
            effects["toward"][numbers] = toward[cell, position].cpu().numpy()
            if n_probes:
                effects["shift"][numbers] = turned[cell, position].cpu().numpy()
            effects["rank"][numbers] = ranks_of(position.cpu().numpy()[:, None], lengths[rows[row]], vocabulary)
    return effects


def _n_workers(encoder: BertModel) -> int:
    """Count the workers: as many as memory has room for, whatever the cells, so that sums round alike beside others."""
    config = encoder.config
    kept = 20 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings
    return n_workers(encoder.device) if kept <= _MOST_KEPT else 1


def _slopes(
    encoder: BertModel,
    blocks: list[Block],
    tokens: torch.Tensor,
    valid: torch.Tensor,
    is_gene: torch.Tensor,
    *,
    how: Pooling,
    positions: Positions,
    goals: torch.Tensor,
    probes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Second-order shifts `(n, l)` and first-order shifts toward states `(n, l, n_states)`."""
    (n, longest), n_probes = tokens.shape, probes.shape[-1]
    turned = torch.zeros(n, longest, device=tokens.device)
    toward = torch.zeros(n, longest, len(goals), device=tokens.device)
    if how == "cls" and not blocks:
        return turned, toward
    log_keep = torch.zeros(n, longest, device=tokens.device, requires_grad=True)
    table = encoder.embeddings.position_embeddings.weight[:longest]
    if positions == "close":
        # The table of positions is no smooth curve: the slope at a position says little of the one before it. With
        # every token half-way between the two, slopes span the step. That is one point for all genes, though each moves
        # only those behind it; in trained models that has sufficed.
        half_way = (table + torch.cat([table[:1], table[:-1]])) / 2
        stands = half_way.expand(n, -1, -1).clone().requires_grad_()
    else:
        stands = table.expand(n, -1, -1)
    padding = None if bool(valid.all()) else valid
    hidden = embed(encoder, tokens, stands)
    for number, block in enumerate(blocks, start=1):
        run = block.run_first if how == "cls" and number == len(blocks) else block.run
        hidden = run(hidden, valid=padding, log_keep=log_keep)
    hidden = hidden.float()
    if how == "cls":
        vector = hidden[:, 0]
    else:
        weight = is_gene * log_keep.exp()
        vector = torch.einsum("nld,nl->nd", hidden, weight) / weight.sum(1, keepdim=True)

    def without(score: torch.Tensor) -> torch.Tensor:
        """First-order change of a sum over cells as each gene is left out."""
        if positions == "keep":
            return -torch.autograd.grad(score, log_keep, retain_graph=True)[0]
        keep, place = torch.autograd.grad(score, [log_keep, stands], retain_graph=True)
        # Each later token moves up by one: what that does, summed from the end.
        moved = functional.pad((place[:, 1:] * (table[:-1] - table[1:])).sum(-1), (0, 1))
        return moved.flip(1).cumsum(1).flip(1) - keep

    if n_probes:
        length = vector.detach().norm(dim=-1, keepdim=True)
        # Orthogonal to the vector and to each other: the columns that QR makes after the vector's own.
        across = torch.linalg.qr(torch.cat([vector.detach()[..., None], probes], dim=-1)).Q[..., 1:]
        for probe in across.unbind(-1):
            turned += without((vector * probe / length).sum()) ** 2
        turned *= (vector.shape[-1] - 1) / (2 * n_probes)
    for number, goal in enumerate(goals):
        toward[..., number] = without(functional.cosine_similarity(vector, goal[None]).sum())
    return turned.detach(), toward.detach()
