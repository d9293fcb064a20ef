"""Attention in float32 inside a model that else computes in bfloat16, for CPUs whose bfloat16 attention is unsteady.

On CPUs with bfloat16 instructions but without matrix units (AMX), matrix products in bfloat16 are several times faster
than in float32. torch's fused attention is not: it takes between one and eight times as long, from run to run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from torch import nn

NAME = "float32_sdpa"


def float32_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' `sdpa` does, in float32, and return the precision that came in."""
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.float()
    with torch.autocast(query.device.type, enabled=False):  # which would make it bfloat16 again
        attended, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **kwargs
        )
    return attended.to(query.dtype), None


AttentionInterface.register(NAME, float32_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
