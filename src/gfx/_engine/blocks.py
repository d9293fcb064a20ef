"""An encoder network layer by network layer (block), run in ways that its own forward pass does not offer.

A last block for `<cls>` alone, a first block whose projections are shared by many edits of one cell, keys that are kept
in part, and attention that stays in a CPU's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional

from gfx._engine.device import has_fast_bfloat16

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
        first, between, last = self.layer.attention.output, self.layer.intermediate, self.layer.output
        attended = first.LayerNorm(first.dense(attended.flatten(-2)).add_(hidden))
        inner = between.dense(attended)
        is_relu = isinstance(between.intermediate_act_fn, nn.ReLU)
        inner = inner.relu_() if is_relu else between.intermediate_act_fn(inner)
        return last.LayerNorm(last.dense(inner).add_(attended))

    def run(
        self,
        hidden: torch.Tensor,
        *,
        projected: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
        log_keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the block, `(n, l, d)` -> `(n, l, d)`; `projected` is what :meth:`project` gives, if that is known."""
        projected = self.project(hidden) if projected is None else projected
        return self.finish(hidden, attend(projected, valid=valid, log_keep=log_keep))

    def run_first(
        self, hidden: torch.Tensor, *, valid: torch.Tensor | None = None, log_keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the block for the first position alone, `(n, l, d)` -> `(n, 1, d)`.

        One query needs no keys and values: its head's key projection is applied to the query, and the value projection
        to the mean of the states.
        """
        heads = self.layer.attention.self.num_attention_heads
        weights = self.weight.unflatten(0, (3, heads, -1))  # (3, heads, e, d)
        query = torch.einsum("nd,hed->nhe", hidden[:, 0], weights[0]) + self.bias.unflatten(0, (3, heads, -1))[0]
        scale = query.shape[-1] ** -0.5
        scores = torch.einsum("nhe,hed->nhd", query * scale, weights[1]) @ hidden.transpose(1, 2)
        scores = scores.float()  # what the keys' bias adds is the same for all, and softmax takes it out
        if log_keep is not None:
            scores = scores + log_keep[:, None]
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None], -torch.inf)
        mean = scores.softmax(-1).to(hidden.dtype) @ hidden
        attended = torch.einsum("nhd,hed->nhe", mean, weights[2]) + self.bias.unflatten(0, (3, heads, -1))[2]
        return self.finish(hidden[:, :1], attended[:, None])


#: Blocks of encoders whose weights are frozen; and threads of one process put them together once.
_blocks: WeakKeyDictionary[BertModel, list[Block]] = WeakKeyDictionary()
_ONE_AT_A_TIME = Lock()


def blocks_of(encoder: BertModel) -> list[Block]:
    """Take an encoder apart: once, if its weights are frozen."""
    with _ONE_AT_A_TIME:
        blocks = _blocks.get(encoder)
        if blocks is None:
            blocks = [_block_of(layer) for layer in encoder.encoder.layer]
            if not any(parameter.requires_grad for parameter in encoder.parameters()):
                _blocks[encoder] = blocks
        return blocks


@torch.inference_mode(mode=False)  # first order takes derivatives with the same blocks
@torch.no_grad()
def _block_of(layer: BertLayer) -> Block:
    parts = [layer.attention.self.query, layer.attention.self.key, layer.attention.self.value]
    return Block(layer, torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))


def embed(encoder: BertModel, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Embed tokens at position vectors, or at those of their places: `(..., l)` and `(..., l, d)` -> `(..., l, d)`."""
    parts = encoder.embeddings
    if positions is None:
        positions = parts.position_embeddings.weight[: tokens.shape[-1]]
    return parts.LayerNorm(parts.word_embeddings(tokens) + parts.token_type_embeddings.weight[0] + positions)


def attend(
    projected: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    log_keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend, `(n, l, 3, heads, d)` -> `(n, l, heads, d)`.

    `valid` are positions that are not padding, bool `(n, l)`, `None` if all are. `log_keep` is the logarithm of how
    much of each key is kept, `(n, l)`, added to its scores; differentiable; 0 keeps all.
    """
    query, key, value = projected.transpose(1, 3).unbind(2)  # (n, heads, l, d) each
    # torch's fused attention is slow in bfloat16 on a CPU without matrix units, where it computes in float32.
    is_bfloat16_on_cpu = projected.device.type == "cpu" and projected.dtype == torch.bfloat16
    is_slow = is_bfloat16_on_cpu and not has_fast_bfloat16(projected.device)
    if log_keep is None and valid is None and is_slow:
        return _attend_in_cache(query, key, value).transpose(1, 2)
    if log_keep is None and valid is not None and _has_packed_attention(projected):
        return _attend_packed(projected, valid)
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


def _has_packed_attention(projected: torch.Tensor) -> bool:
    """Whether flash attention takes cells of different lengths in one row: on recent CUDA, in half precision."""
    if projected.device.type != "cuda" or projected.dtype not in {torch.bfloat16, torch.float16}:
        return False
    is_recent = torch.cuda.get_device_capability(projected.device) >= (8, 0)
    return is_recent and find_spec("torch.nn.attention.varlen") is not None


def _attend_packed(projected: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Attend within each cell without its padding: flash attention takes no mask, and what takes one is slower."""
    from torch.nn.attention.varlen import varlen_attn

    ends = valid.sum(1).cumsum(0)
    offsets, longest = functional.pad(ends, (1, 0)).int(), valid.shape[1]
    query, key, value = projected[valid].unbind(1)  # (n_tokens, heads, d) each
    out = torch.zeros_like(projected[:, :, 0])
    # With more than the result where that is asked for.
    out[valid] = cast("torch.Tensor", varlen_attn(query, key, value, offsets, offsets, longest, longest))
    return out


class WithoutKey:
    """Attention within one sequence, ready to lose any one key.

    Where nothing else changes, softmax over the other keys is that over all, less the lost one and scaled up again.
    `projected` are queries, keys and values of the sequence, `(l, 3, heads, d)`.
    """

    #: Where a lost key had more of the attention than this, what is left of the sums is too rough.
    MOST = 0.9

    def __init__(self, projected: torch.Tensor) -> None:
        query, key, value = projected.float().transpose(0, 2).unbind(1)  # (heads, l, d) each
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        self.value, self.attended = value.transpose(0, 1), (weights @ value).transpose(0, 1)  # (l, heads, d)
        self.of_key = weights.permute(2, 1, 0).contiguous()  # (l keys, l queries, heads)
        others = ~torch.eye(len(projected), dtype=torch.bool, device=projected.device)
        self.most = (self.of_key.amax(-1) * others).amax(-1)

    @staticmethod
    def fits(length: int, heads: int) -> bool:
        """Whether the weights of all keys may be held in memory."""
        return heads * length**2 <= 1 << 26

    def can_lose(self, gone: torch.Tensor) -> bool:
        """Whether enough is left for every other position, when each of these keys, `(n,)`, is lost by itself."""
        return bool(self.most[gone].max() < self.MOST)

    def __call__(self, gone: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Attend from some positions, int `(n, l)`, without a key, `(n,)`, that is not among them.

        Float32 `(n, l, heads, d)`.
        """
        lost = self.of_key[gone].gather(1, source[..., None].expand(-1, -1, self.of_key.shape[-1]))[..., None]
        return self.attended[source].addcmul_(lost, self.value[gone][:, None], value=-1).div_(1 - lost)


def scores_are_small(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether all products of these vectors, `(..., d)`, can be exponentiated as they are."""
    largest = torch.stack([torch.linalg.vector_norm(x, dim=-1).amax().float() for x in (query, key)]).prod()
    return bool(largest < _SAFE_SCORE)


def _attend_in_cache(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend some queries of one cell at a time, so that scores stay in the cache, `(n, heads, l, d)`."""
    query, key, value = query * query.shape[-1] ** -0.5, key.contiguous(), value.contiguous()
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    are_small = scores_are_small(query, key)
    n_heads, length = key.shape[1:3]
    rows = max(1, _CACHED // (n_heads * length))
    for cell in range(len(query)):
        for start in range(0, query.shape[2], rows):
            part = slice(start, start + rows)
            scores = query[cell, :, part] @ key[cell].transpose(-1, -2)
            weights = (scores if are_small else scores.sub_(scores.amax(-1, keepdim=True))).exp_()
            total = weights.sum(-1, keepdim=True, dtype=torch.float32)
            torch.div(weights @ value[cell], total, out=out[cell, :, part])
    return out
