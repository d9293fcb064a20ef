"""Attention, summed into genes and ranks as it is computed, some queries at a time: never length × length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from gfx._engine.blocks import blocks_of, embed, scores_are_small
from gfx._engine.device import sum_dtype
from gfx._engine.forward import run_cells
from gfx._engine.pooling import special_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import BertModel

    from gfx._core.vocabulary import Vocabulary

#: Scores of a block of queries that are held at once: what a CPU core's cache takes, and few calls elsewhere.
_SCORES = {"cpu": 1 << 19}
_SCORES_ELSEWHERE = 1 << 25

#: Score of padding, whose weight is 0, as is its product with the score.
_LOWEST = -1e30


def read_attention(encoder: BertModel, tokens: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run cells and keep, layer by layer, what their attention sums to; no weights are kept.

    Returns
    -------
    Mean weight that each position receives, `(n_layers, b, n_heads, l)`; entropy of a position's attention over the
    logarithm of the length, mean over positions, `(n_layers, b, n_heads)`.
    """
    blocks, all_sums = blocks_of(encoder), []
    hidden = embed(encoder, tokens)
    for block in blocks:
        attended, *sums = attend_and_sum(block.project(hidden), valid)
        all_sums.append(sums)
        if block is not blocks[-1]:
            hidden = block.finish(hidden, attended)
    received, entropies = map(torch.stack, zip(*all_sums, strict=True))
    n = valid.sum(1)
    return received / n[:, None, None], entropies / (n * torch.log(n.clamp(min=2)))[:, None]


def attend_and_sum(projected: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend, `(n, l, 3, heads, d)` -> `(n, l, heads, d)`, and add up over the queries of each cell.

    Sums are the weight that each key receives, `(n, heads, l)`, and the entropies, `(n, heads)`.
    """
    n, longest, _, heads, _ = projected.shape
    attended = torch.zeros_like(projected[:, :, 0])
    received, entropy = projected.new_zeros(n, heads, longest), projected.new_zeros(n, heads)
    if projected.device.type == "cpu":
        for cell, length in enumerate(valid.sum(1).cpu().tolist()):
            one = slice(cell, cell + 1)
            of_cell = attended[one, :length], received[one, :, :length], entropy[one]
            _attend_by_queries(projected[one, :length], None, *of_cell)
    else:
        _attend_by_queries(projected, None if bool(valid.all()) else valid, attended, received, entropy)
    return attended, received, entropy


def _attend_by_queries(
    projected: torch.Tensor,
    valid: torch.Tensor | None,
    attended: torch.Tensor,
    received: torch.Tensor,
    entropy: torch.Tensor,
) -> None:
    """Attend some queries of some cells at a time; fills the outputs of :func:`attend_and_sum`."""
    query, key, value = projected.transpose(1, 3).unbind(2)  # (n, heads, l, d) each
    # Powers of 2 take two thirds of the time of powers of e.
    query = query * (math.log2(math.e) * query.shape[-1] ** -0.5)
    are_small = scores_are_small(query, key)
    key, value = key.transpose(-1, -2).contiguous(), value.contiguous()
    n, heads, length = received.shape
    rows = max(1, _SCORES.get(projected.device.type, _SCORES_ELSEWHERE) // (n * heads * length))
    for start in range(0, length, rows):
        part = slice(start, start + rows)
        scores = query[:, :, part] @ key
        if valid is not None:
            scores.masked_fill_(~valid[:, None, None], _LOWEST)
        if not are_small:
            scores.sub_(scores.amax(-1, keepdim=True))
        weights = scores.exp2()
        total = weights.sum(-1, keepdim=True)
        weights.div_(total)
        attended[:, part] = (weights @ value).transpose(1, 2)
        surprise = total.log2()
        if valid is not None:  # queries that are padding count for nothing
            is_query = valid[:, None, part, None]
            weights.mul_(is_query)
            surprise.mul_(is_query)
        received += weights.sum(2)
        entropy += math.log(2) * (surprise.sum((2, 3)) - scores.mul_(weights).sum((2, 3)))


def sum_attention(
    encoder: BertModel, ids: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    """Add up attention over cells.

    Memory: sums of heads × (tokens + ranks), and what a pass takes.

    Returns
    -------
    Sums over cells, float64; heads are layer by layer:

    `genes`, `ranks`
        For each token, and for each rank (0 is the top gene of a cell), the weight that each head gives it from an
        average position of the cell; what uniform attention would give it; and 1: `(n, n_layers * n_heads + 2)`.
    `special`, `entropy`
        Weight that special tokens receive; entropy of a position's attention over the logarithm of the length, 1 for
        uniform attention; `(n_layers, n_heads)`.
    """
    device, dtype = encoder.device, sum_dtype(encoder.device)
    shape = encoder.config.num_hidden_layers, encoder.config.num_attention_heads
    width = shape[0] * shape[1] + 2
    n_ranks = max(int(lengths.max(initial=0)) - vocabulary.n_specials, 0)
    genes, ranks = (torch.zeros(n, width, dtype=dtype, device=device) for n in (len(vocabulary), n_ranks))
    to_special, entropies = torch.zeros(2, *shape, dtype=dtype, device=device)
    special = special_tokens(vocabulary, device)
    for batch in run_cells(encoder, ids, lengths, forward=read_attention):
        received, entropy = batch.output
        by_head = received.permute(1, 3, 0, 2).flatten(2).to(dtype)  # (b, l, layers * heads)
        uniform = (1 / batch.valid.sum(1).to(dtype))[:, None, None].expand(-1, by_head.shape[1], 1)
        values = torch.cat([by_head, uniform, torch.ones_like(uniform)], dim=-1)
        is_gene = batch.valid & ~special[batch.tokens]
        rank = (torch.arange(by_head.shape[1], device=device) - vocabulary.first_gene).expand_as(batch.tokens)
        genes.index_add_(0, batch.tokens[is_gene], values[is_gene])
        ranks.index_add_(0, rank[is_gene], values[is_gene])
        # Of all a cell's attention, what does not go to its genes goes to <cls> and <eos>.
        is_special = (batch.valid & special[batch.tokens]).to(dtype)
        to_special += torch.einsum("nbhl,bl->nh", received.to(dtype), is_special)
        entropies += entropy.to(dtype).sum(1)
    totals = {"genes": genes, "ranks": ranks, "special": to_special, "entropy": entropies}
    return {name: total.cpu().numpy() for name, total in totals.items()}


def mean_attention(results: Iterable[Mapping[str, np.ndarray]], n_cells: int) -> dict[str, np.ndarray]:
    """Turn results of :func:`sum_attention`, those of the longest cells first, into means over so many cells.

    Float32, NaN where no cell has a gene or rank: `genes` `(n_tokens, n_layers, n_heads)` and `uniform` `(n_tokens,)`;
    `ranks` `(n_layers, n_heads, n_ranks)` and `ranks_uniform` `(n_ranks,)`; `special` and `entropy` as they were. And
    numbers of cells, int64: `n_cells` and `ranks_n_cells`.
    """
    totals: dict[str, np.ndarray] = {}
    for result in results:
        for name, values in result.items():
            totals.setdefault(name, np.zeros_like(values))[: len(values)] += values

    def means(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sums, n = totals[name][:, :-1], totals[name][:, -1:]
        values = np.divide(sums, n, out=np.full(sums.shape, np.nan), where=n > 0).astype(np.float32)
        return values[:, :-1].reshape(-1, *totals["special"].shape), values[:, -1], n[:, 0].astype(np.int64)

    genes, uniform, n_with_gene = means("genes")
    ranks, ranks_uniform, n_with_rank = means("ranks")
    of_cells = {name: (totals[name] / max(n_cells, 1)).astype(np.float32) for name in ("special", "entropy")}
    of_genes = {"genes": genes, "uniform": uniform, "n_cells": n_with_gene}
    of_ranks = {"ranks": ranks.transpose(1, 2, 0), "ranks_uniform": ranks_uniform, "ranks_n_cells": n_with_rank}
    return of_cells | of_genes | of_ranks
