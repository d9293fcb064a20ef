"""Attention sums against the weights of one cell at a time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from gfx import settings
from gfx._engine import attention, device
from gfx._engine.attention import mean_attention, sum_attention
from gfx._engine.blocks import blocks_of


def attention_of(encoder, ids, lengths, vocabulary):
    """Mean attention over all cells."""
    found = mean_attention([sum_attention(encoder, ids, lengths, vocabulary)], int((lengths > 0).sum()))
    return SimpleNamespace(**found)


def naive(toy):
    """Lists of what each gene and each rank received, of shares and entropies, straight from the definition."""
    genes, ranks, uniform, ranks_uniform, special, entropy = {}, {}, {}, {}, [], []
    for cell in toy.cells():
        if not cell:
            continue
        weights = toy.reference.attention(cell)  # (block, head, query, key)
        received = weights.mean(axis=2)
        rank = 0
        for place, token in enumerate(cell):
            if toy.is_gene(token):
                genes.setdefault(token, []).append(received[:, :, place])
                uniform.setdefault(token, []).append(1 / len(cell))
                ranks.setdefault(rank, []).append(received[:, :, place])
                ranks_uniform.setdefault(rank, []).append(1 / len(cell))
                rank += 1
        at_special = [place for place, token in enumerate(cell) if not toy.is_gene(token)]
        special.append(received[:, :, at_special].sum(axis=2))
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = np.where(weights > 0, -weights * np.log(weights), 0)
        entropy.append(surprise.sum(axis=3).mean(axis=2) / np.log(max(len(cell), 2)))
    return genes, ranks, uniform, ranks_uniform, np.mean(special, axis=0), np.mean(entropy, axis=0)


def sums(toy, encoder=None, rows=slice(None)):
    encoder = encoder or toy.encoder()
    return attention_of(encoder, toy.ids[rows], toy.lengths[rows], toy.vocabulary)


def test_sums(toy):
    found = sums(toy)
    genes, ranks, uniform, ranks_uniform, special, entropy = naive(toy)
    tokens = range(len(toy.vocabulary))
    assert found.n_cells.tolist() == [len(genes.get(token, [])) for token in tokens]
    for token in tokens:
        if token in genes:
            np.testing.assert_allclose(found.genes[token], np.mean(genes[token], axis=0), atol=1e-6)
            assert found.uniform[token] == pytest.approx(np.mean(uniform[token]))
        else:
            assert np.isnan(found.genes[token]).all()
            assert np.isnan(found.uniform[token])
    assert found.ranks.shape == (3, 2, len(ranks))
    for rank, values in ranks.items():
        assert found.ranks_n_cells[rank] == len(values)
        np.testing.assert_allclose(found.ranks[:, :, rank], np.mean(values, axis=0), atol=1e-6)
        assert found.ranks_uniform[rank] == pytest.approx(np.mean(ranks_uniform[rank]))
    np.testing.assert_allclose(found.special, special, atol=1e-6)
    np.testing.assert_allclose(found.entropy, entropy, atol=1e-6)


def test_attention_of_a_cell_adds_up_to_one(toy):
    """By blocks and heads: what genes receive in all cells, and the special tokens' share, are all there is."""
    found = sums(toy)
    n_cells = (toy.lengths > 0).sum()
    to_genes = np.nansum(found.genes * found.n_cells[:, None, None], axis=0) / n_cells
    by_rank = (found.ranks * found.ranks_n_cells).sum(axis=2) / n_cells
    np.testing.assert_allclose(to_genes + found.special, 1, atol=1e-5)
    np.testing.assert_allclose(by_rank + found.special, 1, atol=1e-5)
    assert (found.special > 0).all() == toy.vocabulary.has_cls


def test_even_attention(toy):
    """Queries of zero make all weights equal: entropy 1, and everything as even attention gives."""
    encoder = toy.encoder()
    with torch.no_grad():
        for block in encoder.encoder.layer:
            block.attention.self.query.weight.zero_()
            block.attention.self.query.bias.zero_()
    found = sums(toy, encoder)
    seen = found.n_cells > 0
    np.testing.assert_allclose(
        found.genes[seen], np.broadcast_to(found.uniform[seen, None, None], (seen.sum(), 3, 2)), atol=1e-6
    )
    np.testing.assert_allclose(found.ranks, np.broadcast_to(found.ranks_uniform, found.ranks.shape), atol=1e-6)
    # A cell of one token has an entropy of 0 however even its attention is.
    several = (toy.lengths > 1).sum() / (toy.lengths > 0).sum()
    np.testing.assert_allclose(found.entropy, several, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 70, 100_000])
def test_batches_and_order_do_not_matter(toy, batch_tokens):
    expected = sums(toy)
    order = np.random.default_rng(0).permutation(len(toy.ids))
    with settings.override(batch_tokens=batch_tokens):
        found = sums(toy, rows=order)
    for name, value in vars(expected).items():
        np.testing.assert_allclose(getattr(found, name), value, atol=1e-6, err_msg=name)


class LargestTensor(TorchFunctionMode):
    """Counts the numbers in the largest tensor that is made."""

    size = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel())
        return result


def test_the_weights_of_a_cell_are_never_whole(toy, monkeypatch):
    """Blocks of queries change nothing, and are all that there is at a time."""
    expected = sums(toy)
    encoder, n_heads, length = toy.encoder(), 2, int(toy.lengths.max())
    monkeypatch.setitem(attention._SCORES, "cpu", 3 * n_heads * length)
    found = sums(toy)
    for name, value in vars(expected).items():
        np.testing.assert_allclose(getattr(found, name), value, atol=1e-6, err_msg=name)
    projected = blocks_of(encoder)[0].project(torch.randn(1, length, encoder.config.hidden_size))
    with LargestTensor() as largest:
        attention.attend_and_sum(projected, torch.ones(1, length, dtype=torch.bool))
    assert largest.size <= projected.numel() < n_heads * length**2 / 2


@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_padded_cells_together_are_each_by_itself(scale):
    """As they are on a GPU; with scores in the hundreds, too, of which powers would overflow."""
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(3, 9, 3, 2, 8, generator=generator) * torch.tensor([scale, scale, 1.0])[:, None, None]
    lengths = torch.tensor([9, 1, 5])
    valid = torch.arange(9) < lengths[:, None]
    alone = attention.attend_and_sum(projected, valid)
    attended, received, entropy = (torch.zeros_like(value) for value in alone)
    attention._attend_by_queries(projected, valid, attended, received, entropy)
    for cell, length in enumerate(lengths.tolist()):
        query, key, value = projected[cell, :length].double().permute(1, 2, 0, 3)
        weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
        for one in (attended, alone[0]):
            torch.testing.assert_close(
                one[cell, :length].double(), (weights @ value).transpose(0, 1), atol=1e-5, rtol=0
            )
        for one in (received, alone[1]):
            torch.testing.assert_close(one[cell, :, :length].double(), weights.sum(1), atol=1e-5, rtol=0)
            assert (one[cell, :, length:] == 0).all()
        for one in (entropy, alone[2]):
            expected = torch.special.entr(weights).sum((1, 2))
            torch.testing.assert_close(one[cell].double(), expected, atol=1e-4, rtol=1e-4)


def test_workers_change_nothing(toy, threads, monkeypatch):
    expected = sums(toy)
    monkeypatch.setattr(device, "_MIXED_TOKENS", 70)
    threads(3)
    found = sums(toy)
    for name, value in vars(expected).items():
        np.testing.assert_allclose(getattr(found, name), value, atol=1e-6, err_msg=name)


def test_what_is_kept_does_not_grow_with_cells(toy):
    once, thrice = sums(toy), sums(toy, rows=np.tile(np.arange(len(toy.ids)), 3))
    for name, value in vars(once).items():
        assert getattr(thrice, name).shape == value.shape
