"""An encoder layer by layer, and its ways to attend, against the published model and plain softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gfx._engine import blocks
from gfx._engine.blocks import WithoutKey, attend, blocks_of, embed


def test_blocks_are_the_encoder(toy):
    encoder = toy.encoder()
    tokens = torch.from_numpy(toy.ids[[0, 3, 9]].astype(np.int64))
    valid = torch.arange(tokens.shape[1]) < torch.from_numpy(toy.lengths[[0, 3, 9]])[:, None]
    expected = encoder(input_ids=tokens, attention_mask=valid.long()).last_hidden_state
    hidden = embed(encoder, tokens, encoder.embeddings.position_embeddings.weight[: tokens.shape[1]])
    for block in blocks_of(encoder):
        first = block.run_first(hidden, valid=valid)
        hidden = block.run(hidden, valid=valid)
    torch.testing.assert_close(hidden[valid], expected[valid])
    torch.testing.assert_close(first, expected[:, :1])


def test_frozen_encoders_are_taken_apart_once(toy):
    """In whatever mode that is; those that are trained, each time."""
    encoder = toy.encoder()
    with torch.inference_mode():
        blocks = blocks_of(encoder)
    assert blocks_of(encoder) is blocks
    hidden = torch.randn(1, 5, encoder.config.hidden_size, requires_grad=True)
    blocks[0].run(hidden).sum().backward()
    assert hidden.grad is not None
    trained = toy.encoder().requires_grad_(requires_grad=True)
    before = blocks_of(trained)[0].weight
    with torch.no_grad():
        trained.encoder.layer[0].attention.self.key.weight.zero_()
    assert not torch.equal(blocks_of(trained)[0].weight, before)
    assert not before.requires_grad


@pytest.mark.parametrize("has_matrix_units", [False, True])
@pytest.mark.parametrize(("scale", "error"), [(0.3, 0.01), (1.0, 0.03), (30.0, np.inf)])
def test_attention_in_bfloat16_on_a_cpu_is_attention(monkeypatch, scale, error, has_matrix_units):
    """In the cache, or fused by torch; with scores in the thousands, which must not overflow, the largest decides."""
    called, in_cache = [], blocks._attend_in_cache
    monkeypatch.setattr(blocks, "has_fast_bfloat16", lambda _device: has_matrix_units)
    monkeypatch.setattr(blocks, "_attend_in_cache", lambda *args: called.append(1) or in_cache(*args))
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(3, 37, 3, 4, 16, generator=generator) * torch.tensor([scale, scale, 1.0])[:, None, None]
    short = projected.bfloat16()
    found = attend(short)
    expected = attend(short.float())
    assert found.dtype == torch.bfloat16
    assert called == ([] if has_matrix_units else [1])
    assert (found - expected).abs().max() < error
    assert torch.corrcoef(torch.stack([found.float().flatten(), expected.flatten()]))[0, 1] > 0.99


def test_packed_attention_is_attention(monkeypatch):
    """As flash attention on CUDA takes cells of several lengths; here one that reads each cell by itself plays it."""

    def by_cell(query, key, value, query_ends, key_ends, longest, longest_key):
        assert query.shape == key.shape == value.shape
        assert query_ends.dtype == key_ends.dtype == torch.int32
        cells = list(zip(query_ends[:-1].tolist(), query_ends[1:].tolist(), strict=True))
        assert max(end - start for start, end in cells) == longest == longest_key
        parts = [[x[start:end].transpose(0, 1) for x in (query, key, value)] for start, end in cells]
        return torch.cat([torch.nn.functional.scaled_dot_product_attention(*part).transpose(0, 1) for part in parts])

    projected = torch.randn(4, 21, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(21) < torch.tensor([21, 3, 1, 8])[:, None]
    expected = attend(projected, valid=valid)
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch is older than packed attention")
    monkeypatch.setattr(varlen, "varlen_attn", by_cell)
    monkeypatch.setattr("gfx._engine.blocks._has_packed_attention", lambda _projected: True)
    found = attend(projected, valid=valid)
    torch.testing.assert_close(found[valid], expected[valid])
    assert not found[~valid].any()


def softmax_without(projected, gone):
    """Attend from every other position to every other one, key by key of softmax."""
    left = [at for at in range(len(projected)) if at != gone]
    query, key, value = projected[left].double().permute(1, 2, 0, 3)
    return ((query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1) @ value).transpose(0, 1)


def test_attention_without_a_key_follows_from_attention_with_it():
    projected = torch.randn(9, 3, 2, 8, generator=torch.Generator().manual_seed(2))
    lost = WithoutKey(projected)
    gone = torch.tensor([0, 4, 8])
    assert lost.can_lose(gone)
    source = torch.stack([torch.tensor([at for at in range(9) if at != key]) for key in gone.tolist()])
    found = lost(gone, source)
    for at, key in enumerate(gone.tolist()):
        torch.testing.assert_close(found[at].double(), softmax_without(projected, key), atol=1e-5, rtol=1e-5)


def test_a_key_that_has_nearly_all_attention_is_not_taken_out_of_sums():
    projected = torch.randn(9, 3, 2, 8, generator=torch.Generator().manual_seed(2))
    projected[:, 0, :, 0], projected[4, 1, :, 0] = 5.0, 10.0  # everybody looks at the fifth
    lost = WithoutKey(projected)
    assert not lost.can_lose(torch.tensor([1, 4]))
    assert lost.can_lose(torch.tensor([1, 5]))


def test_kept_in_part_is_a_weight_of_keys():
    """Keeping a key by half counts it half as often in the average."""
    projected = torch.randn(1, 5, 3, 2, 8, generator=torch.Generator().manual_seed(1))
    log_keep = torch.log(torch.tensor([[1.0, 0.5, 1.0, 1e-12, 1.0]]))
    query, key, value = projected[0].permute(1, 2, 0, 3)
    weights = torch.exp(query @ key.transpose(-1, -2) / 8**0.5) * log_keep.exp()
    expected = (weights / weights.sum(-1, keepdim=True)) @ value
    torch.testing.assert_close(attend(projected, log_keep=log_keep)[0].transpose(0, 1), expected)
