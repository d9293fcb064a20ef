"""Attention in float32 inside a bfloat16 model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BertConfig

from gfx._engine import float32_attention as ours
from gfx._engine.pretraining import MaskedGeneModel

if TYPE_CHECKING:
    from collections.abc import Callable

SCALE = 16**-0.5
N = 40


@pytest.fixture
def states() -> list[torch.Tensor]:
    """Queries, keys and values, bfloat16 `(cells, heads, tokens, size)`."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, N, 16, generator=generator).bfloat16().requires_grad_() for _ in range(3)]


MASKS: dict[str, Callable[[], torch.Tensor | None]] = {
    "none": lambda: None,
    "bool": lambda: (torch.arange(N) < torch.tensor([N, 30, 5])[:, None])[:, None, None, :].expand(3, 1, N, N),
    "added": lambda: torch.zeros(3, 1, N, N, dtype=torch.bfloat16).masked_fill(~MASKS["bool"](), -1e9),
}


def attend(states: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
    found, weights = ours.float32_attention(nn.Module(), *states, mask, scaling=SCALE, dropout=0.0, is_causal=False)
    assert weights is None
    return found


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("autocast", [True, False])
def test_it_is_float32_attention_of_what_comes_in(states: list[torch.Tensor], kind: str, *, autocast: bool) -> None:
    """Also inside autocast, where torch makes attention bfloat16 again."""
    mask = MASKS[kind]()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend(states, mask)
    exact = [state.detach().float().requires_grad_() for state in states]
    float_mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
    expected = functional.scaled_dot_product_attention(*exact, attn_mask=float_mask, scale=SCALE).transpose(1, 2)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    coarse = functional.scaled_dot_product_attention(
        *states, attn_mask=mask if kind != "none" else None, scale=SCALE
    ).transpose(1, 2)
    assert not torch.equal(found, coarse), "bfloat16 attention gives something else"
    # The gradient flows through all three, and is that of float32 attention.
    found.float().square().sum().backward()
    expected.bfloat16().float().square().sum().backward()
    for state, reference in zip(states, exact, strict=True):
        assert torch.equal(state.grad, reference.grad.bfloat16())
        assert state.grad.abs().max() > 0


def test_a_model_in_bfloat16_is_the_float32_model_within_its_precision() -> None:
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MaskedGeneModel(config).eval()
        ids = torch.randint(4, 50, (6, 30))
    attention_mask = (torch.arange(30) < torch.tensor([30, 25, 20, 15, 10, 5])[:, None]).long()
    with torch.no_grad():
        expected = model(ids, attention_mask=attention_mask).logits
        model.set_attn_implementation(ours.NAME)
        same = model(ids, attention_mask=attention_mask).logits
        with torch.autocast("cpu", torch.bfloat16):
            found = model(ids, attention_mask=attention_mask).logits
    torch.testing.assert_close(same, expected, atol=1e-5, rtol=1e-5)
    real = attention_mask.bool()
    difference = (found.float() - expected)[real].abs()
    assert 0 < difference.mean() < 2**-7 * expected[real].abs().mean()  # bfloat16 has 8 bits
