"""Attention, summed into genes and ranks as each layer computes it: never cells × length × length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from gfx._engine.device import sum_dtype
from gfx._engine.forward import run_cells
from gfx._engine.pooling import special_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import BertModel

    from gfx._core.vocabulary import Vocabulary

#: Attention weights of one layer held at once, in numbers; eager attention needs about three arrays of this size.
_MAX_WEIGHTS = 32_000_000


def attend(encoder: BertModel, tokens: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run cells and keep, layer by layer, what their attention sums to; the weights themselves are let go.

    Returns
    -------
    Mean weight that each position receives, float32 `(n_layers, b, n_heads, l)`; entropy of a position's attention
    over the logarithm of the length, mean over positions, float32 `(n_layers, b, n_heads)`.
    """
    received, entropies = [], []
    query = valid.float()
    n = query.sum(1)

    def collect(_module: object, _inputs: object, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        weights = outputs[1].float()  # (b, h, query, key)
        received.append(torch.einsum("bhqk,bq->bhk", weights, query) / n[:, None, None])
        entropy = torch.special.entr(weights).sum(-1)
        entropies.append(torch.einsum("bhq,bq->bh", entropy, query) / (n * torch.log(n.clamp(min=2)))[:, None])

    hooks = [layer.attention.self.register_forward_hook(collect) for layer in encoder.encoder.layer]
    try:
        encoder(input_ids=tokens, attention_mask=None if bool(valid.all()) else valid.long())
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(received), torch.stack(entropies)


def sum_attention(
    encoder: BertModel, ids: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    """Add up attention over cells, with an encoder that was loaded with ``attention="eager"``.

    Memory: sums of heads × (tokens + ranks), and the attention of one layer in one batch.

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
    if encoder.config._attn_implementation != "eager":
        msg = (
            f'Attention weights need an encoder with attention="eager", found {encoder.config._attn_implementation!r}.'
        )
        raise ValueError(msg)
    device, dtype = encoder.device, sum_dtype(encoder.device)
    shape = encoder.config.num_hidden_layers, encoder.config.num_attention_heads
    width = shape[0] * shape[1] + 2
    n_ranks = max(int(lengths.max(initial=0)) - vocabulary.n_specials, 0)
    genes, ranks = (torch.zeros(n, width, dtype=dtype, device=device) for n in (len(vocabulary), n_ranks))
    to_special, entropies = torch.zeros(2, *shape, dtype=dtype, device=device)
    special = special_tokens(vocabulary, device)
    for batch in run_cells(encoder, ids, lengths, max_pairs=_MAX_WEIGHTS // shape[1], forward=attend):
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
