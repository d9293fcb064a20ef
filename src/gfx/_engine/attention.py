"""Attention, summed into genes and ranks as each layer computes it: never cells × length × length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from gfx._engine.device import sum_dtype
from gfx._engine.forward import run_cells, states
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
        states(encoder, tokens, valid)
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
    Sums over cells, float64, and numbers of cells, int64; heads are layer by layer:

    `genes`, `uniform`, `n_cells`
        Weight that each token receives from an average position of its cell, `(n_tokens, n_layers * n_heads)`; what
        uniform attention would give it, and the cells that have it, `(n_tokens,)`.
    `ranks`, `ranks_uniform`, `ranks_n_cells`
        The same for each rank, 0 the top gene of a cell.
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
    shape, n_tokens = (encoder.config.num_hidden_layers, encoder.config.num_attention_heads), len(vocabulary)
    n_ranks = max(int(lengths.max(initial=0)) - vocabulary.n_specials, 0)

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    width = shape[0] * shape[1]
    genes = zeros(n_tokens, width), zeros(n_tokens), zeros(n_tokens, dtype=torch.int64)
    ranks = zeros(n_ranks, width), zeros(n_ranks), zeros(n_ranks, dtype=torch.int64)
    to_special, entropies = zeros(*shape), zeros(*shape)
    special = special_tokens(vocabulary, device)
    for batch in run_cells(encoder, ids, lengths, max_pairs=_MAX_WEIGHTS // shape[1], forward=attend):
        received, entropy = batch.output
        flat = received.permute(1, 3, 0, 2).flatten(2).to(dtype)  # (b, l, layers * heads)
        is_gene = batch.valid & ~special[batch.tokens]
        even = (1.0 / batch.valid.sum(1).to(dtype))[:, None].expand(-1, batch.tokens.shape[1])
        rank = (torch.arange(batch.tokens.shape[1], device=device) - vocabulary.first_gene).expand_as(batch.tokens)
        for (sums, evens, counts), slot in ((genes, batch.tokens[is_gene]), (ranks, rank[is_gene])):
            sums.index_add_(0, slot, flat[is_gene])
            evens.index_add_(0, slot, even[is_gene])
            counts.add_(torch.bincount(slot, minlength=len(counts)))
        # Of all a cell's attention, what does not go to its genes goes to <cls> and <eos>.
        is_special = (batch.valid & special[batch.tokens]).to(dtype)
        to_special += torch.einsum("nbhl,bl->nh", received.to(dtype), is_special)
        entropies += entropy.to(dtype).sum(1)
    names = "genes", "uniform", "n_cells", "ranks", "ranks_uniform", "ranks_n_cells", "special", "entropy"
    totals = zip(names, (*genes, *ranks, to_special, entropies), strict=True)
    return {name: total.cpu().numpy() for name, total in totals}


def mean_attention(results: Iterable[Mapping[str, np.ndarray]], n_cells: int) -> dict[str, np.ndarray]:
    """Turn results of :func:`sum_attention`, those of the longest cells first, into means over so many cells.

    Their names are the same. Means are float32 and NaN where no cell has a gene or rank: `genes`
    `(n_tokens, n_layers, n_heads)`, `ranks` `(n_layers, n_heads, n_ranks)`, and all others as they were.
    """
    totals: dict[str, np.ndarray] = {}
    for result in results:
        for name, values in result.items():
            totals.setdefault(name, np.zeros_like(values))[: len(values)] += values
    shape = totals["special"].shape

    def mean(name: str, n: str) -> np.ndarray:
        sums, counts = totals[name], totals[n].reshape(-1, *[1] * (totals[name].ndim - 1))
        return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0).astype(np.float32)

    means = {
        "genes": mean("genes", "n_cells").reshape(-1, *shape),
        "uniform": mean("uniform", "n_cells"),
        "ranks": mean("ranks", "ranks_n_cells").reshape(-1, *shape).transpose(1, 2, 0),
        "ranks_uniform": mean("ranks_uniform", "ranks_n_cells"),
    }
    of_cells = {name: (totals[name] / max(n_cells, 1)).astype(np.float32) for name in ("special", "entropy")}
    return totals | means | of_cells
