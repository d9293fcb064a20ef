"""An encoder block by block, run in ways that its own forward pass does not offer.

A last block for `<cls>` alone, a first block whose projections are shared by many edits of one cell, keys that are kept
in part, and attention that stays in a CPU's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import BertModel
    from transformers.models.bert.modeling_bert import BertLayer

#: Scores that a core's cache holds, and the products around them.
_CACHED = 1 << 20

#: Scores up to this can be exponentiated as they are: neither they nor their sum overflow, nor do all vanish.
_SAFE_SCORE = 60.0


@dataclass(frozen=True)
class Block:
    """One block: its layers, and the three projections as one, `(3 d, d)` and `(3 d,)`."""

    layer: BertLayer
    weight: torch.Tensor
    bias: torch.Tensor

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Make queries, keys and values, `(..., d)` -> `(..., 3, heads, d / heads)`."""
        heads = self.layer.attention.self.num_attention_heads
        return functional.linear(hidden, self.weight, self.bias).unflatten(-1, (3, heads, -1))

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Do all that follows attention, `(..., d)` and `(..., heads, d / heads)` -> `(..., d)`."""
        attended = self.layer.attention.output(attended.flatten(-2), hidden)
        return self.layer.output(self.layer.intermediate(attended), attended)

    def run(
        self,
        hidden: torch.Tensor,
        *,
        projected: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
        log_keep: torch.Tensor | None = None,
        only_first: bool = False,
    ) -> torch.Tensor:
        """Run the block, `(n, l, d)` -> `(n, l, d)`, or `(n, 1, d)` where only the first position is wanted.

        Parameters
        ----------
        projected
            What :meth:`project` makes of `hidden`, if that is known.
        valid, log_keep
            See :func:`attend`.
        """
        projected = self.project(hidden) if projected is None else projected
        queries = slice(0, 1) if only_first else slice(None)
        attended = attend(projected, queries=queries, valid=valid, log_keep=log_keep)
        return self.finish(hidden[:, queries], attended)


def blocks_of(encoder: BertModel) -> list[Block]:
    """Take an encoder apart."""
    found = []
    for layer in encoder.encoder.layer:
        parts = [layer.attention.self.query, layer.attention.self.key, layer.attention.self.value]
        found.append(Block(layer, torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])))
    return found


def embed(encoder: BertModel, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Embed tokens at position vectors, `(..., l)` and `(..., l, d)` -> `(..., l, d)`."""
    parts = encoder.embeddings
    return parts.LayerNorm(parts.word_embeddings(tokens) + parts.token_type_embeddings.weight[0] + positions)


def attend(
    projected: torch.Tensor,
    *,
    queries: slice = slice(None),
    valid: torch.Tensor | None = None,
    log_keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend, `(n, l, 3, heads, d)` -> `(n, n_queries, heads, d)`.

    Parameters
    ----------
    valid
        Which positions are not padding, bool `(n, l)`; `None` if all are.
    log_keep
        Logarithm of how much of each key is kept, `(n, l)`, added to its scores; differentiable. 0 keeps all.
    """
    query, key, value = projected.transpose(1, 3).unbind(2)  # (n, heads, l, d) each
    query = query[:, :, queries]
    if log_keep is None and valid is None and _is_better_by_hand(projected):
        return _attend_in_cache(query, key, value).transpose(1, 2)
    scale = query.shape[-1] ** -0.5
    if log_keep is not None:
        # One more feature, 1/scale in queries and the weight in keys, adds it to the scores in any fused kernel.
        query = functional.pad(query, (0, 8))
        query[..., -8] = 1 / scale
        extra = log_keep.to(key.dtype)[:, None, :, None].expand(*key.shape[:-1], 1)
        key = functional.pad(torch.cat([key, extra], dim=-1), (0, 7))
        value = functional.pad(value, (0, 8))
    mask = None if valid is None else valid[:, None, None, :]
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return (attended if log_keep is None else attended[..., :-8]).transpose(1, 2)


def _is_better_by_hand(projected: torch.Tensor) -> bool:
    """Whether torch's fused attention is slow here: in bfloat16 on a CPU, where it computes in float32."""
    return projected.device.type == "cpu" and projected.dtype == torch.bfloat16


def _attend_in_cache(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend some queries of one cell at a time, so that scores stay in the cache, `(n, heads, l, d)`."""
    query, key, value = query * query.shape[-1] ** -0.5, key.contiguous(), value.contiguous()
    out = torch.empty_like(query)
    largest = torch.stack(
        [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax() for x in (query, key)]
    ).prod()
    exponentiate = torch.exp_ if largest < _SAFE_SCORE else _exp_below_maximum
    n_heads, length = key.shape[1:3]
    rows = max(1, _CACHED // (n_heads * length))
    for at in range(len(query)):
        for start in range(0, query.shape[2], rows):
            some = slice(start, start + rows)
            weights = exponentiate(query[at, :, some] @ key[at].transpose(-1, -2))
            total = weights.sum(-1, keepdim=True, dtype=torch.float32)
            torch.div(weights @ value[at], total, out=out[at, :, some])
    return out


def _exp_below_maximum(scores: torch.Tensor) -> torch.Tensor:
    return scores.sub_(scores.amax(-1, keepdim=True)).exp_()
