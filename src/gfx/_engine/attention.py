"""Attention, summed into genes and ranks as each block computes it: never cells × length × length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gfx._engine.device import sum_dtype
from gfx._engine.forward import run_cells, states
from gfx._engine.pooling import special_tokens

if TYPE_CHECKING:
    import numpy as np
    from transformers import BertModel

    from gfx._core.vocabulary import Vocabulary

#: Attention weights of one block held at once, in numbers; eager attention needs about three arrays of this size.
_MAX_WEIGHTS = 32_000_000


@dataclass(frozen=True)
class AttentionSums:
    """Mean attention, over the cells in which a gene or rank occurs.

    Parameters
    ----------
    genes
        Weight that each gene receives from an average position of its cell, float32 `(n_tokens, n_blocks, n_heads)`.
    n_cells
        Cells with the gene, int64 `(n_tokens,)`.
    uniform
        What even attention would give each gene: mean of 1 / length, float32 `(n_tokens,)`.
    ranks
        Weight received by rank of the attended gene, float32 `(n_blocks, n_heads, n_ranks)`; rank 0 is the top gene.
    ranks_uniform
        What even attention would give each rank, float32 `(n_ranks,)`.
    n_rank_cells
        Cells long enough to have the rank, int64 `(n_ranks,)`.
    special
        Share of attention that goes to special tokens, float32 `(n_blocks, n_heads)`.
    entropy
        Mean entropy of a position's attention over the logarithm of the length, 1 for even attention, float32
        `(n_blocks, n_heads)`.
    """

    genes: np.ndarray
    n_cells: np.ndarray
    uniform: np.ndarray
    ranks: np.ndarray
    ranks_uniform: np.ndarray
    n_rank_cells: np.ndarray
    special: np.ndarray
    entropy: np.ndarray


def attend(encoder: BertModel, tokens: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run cells and keep, block by block, what their attention sums to; the weights themselves are let go.

    Returns
    -------
    Mean weight that each position receives, float32 `(n_blocks, b, n_heads, l)`; entropy of a position's attention
    over the logarithm of the length, mean over positions, float32 `(n_blocks, b, n_heads)`.
    """
    received, entropies = [], []
    query = valid.float()
    n = query.sum(1)

    def collect(_module: object, _inputs: object, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        weights = outputs[1].float()  # (b, h, query, key)
        received.append(torch.einsum("bhqk,bq->bhk", weights, query) / n[:, None, None])
        entropy = torch.special.entr(weights).sum(-1)
        entropies.append(torch.einsum("bhq,bq->bh", entropy, query) / (n * torch.log(n.clamp(min=2)))[:, None])

    hooks = [block.attention.self.register_forward_hook(collect) for block in encoder.encoder.layer]
    try:
        states(encoder, tokens, valid)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(received), torch.stack(entropies)


def attention_sums(encoder: BertModel, ids: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary) -> AttentionSums:
    """Stream attention over all cells.

    Memory: running sums of blocks × heads × (tokens + ranks), and one block's attention of one batch.

    Parameters
    ----------
    encoder
        Loaded with ``attention="eager"``: fused attention does not show its weights.
    """
    if encoder.config._attn_implementation != "eager":
        msg = (
            f'Attention weights need an encoder with attention="eager", found {encoder.config._attn_implementation!r}.'
        )
        raise ValueError(msg)
    device, dtype = encoder.device, sum_dtype(encoder.device)
    n_blocks, n_heads, n_tokens = encoder.config.num_hidden_layers, encoder.config.num_attention_heads, len(vocabulary)
    n_ranks = max(int(lengths.max(initial=0)) - vocabulary.n_specials, 0)
    genes = torch.zeros(n_tokens, n_blocks * n_heads, dtype=dtype, device=device)
    ranks = torch.zeros(n_ranks, n_blocks * n_heads, dtype=dtype, device=device)
    uniform = torch.zeros(n_tokens, dtype=dtype, device=device)
    ranks_uniform = torch.zeros(n_ranks, dtype=dtype, device=device)
    n_cells = torch.zeros(n_tokens, dtype=torch.int64, device=device)
    n_rank_cells = torch.zeros(n_ranks, dtype=torch.int64, device=device)
    to_special = torch.zeros(n_blocks, n_heads, dtype=dtype, device=device)
    entropies = torch.zeros(n_blocks, n_heads, dtype=dtype, device=device)
    special = special_tokens(vocabulary, device)
    max_pairs = _MAX_WEIGHTS // n_heads
    for batch in run_cells(encoder, ids, lengths, max_pairs=max_pairs, forward=attend, description="attention"):
        received, entropy = batch.output
        flat = received.permute(1, 3, 0, 2).flatten(2).to(dtype)  # (b, l, blocks * heads)
        is_gene = batch.valid & ~special[batch.tokens]
        even = (1.0 / batch.valid.sum(1).to(dtype))[:, None].expand(-1, batch.tokens.shape[1])
        token = batch.tokens[is_gene]
        rank = (torch.arange(batch.tokens.shape[1], device=device) - vocabulary.first_gene).expand_as(batch.tokens)[
            is_gene
        ]
        for sums, evens, counts, slot in (
            (genes, uniform, n_cells, token),
            (ranks, ranks_uniform, n_rank_cells, rank),
        ):
            sums.index_add_(0, slot, flat[is_gene])
            evens.index_add_(0, slot, even[is_gene])
            counts.add_(torch.bincount(slot, minlength=len(counts)))
        # Of all a cell's attention, what does not go to its genes goes to <cls> and <eos>.
        is_special = (batch.valid & special[batch.tokens]).to(dtype)
        to_special += torch.einsum("nbhl,bl->nh", received.to(dtype), is_special)
        entropies += entropy.to(dtype).sum(1)
    total = max(int((lengths > 0).sum()), 1)
    shape = (n_blocks, n_heads)

    def mean(sums: torch.Tensor, counts: torch.Tensor) -> np.ndarray:
        return (sums / counts.reshape(-1, *[1] * (sums.ndim - 1))).float().cpu().numpy()

    return AttentionSums(
        genes=mean(genes, n_cells).reshape(n_tokens, *shape),
        n_cells=n_cells.cpu().numpy(),
        uniform=mean(uniform, n_cells),
        ranks=mean(ranks, n_rank_cells).reshape(n_ranks, *shape).transpose(1, 2, 0),
        ranks_uniform=mean(ranks_uniform, n_rank_cells),
        n_rank_cells=n_rank_cells.cpu().numpy(),
        special=(to_special / total).float().cpu().numpy(),
        entropy=(entropies / total).float().cpu().numpy(),
    )
