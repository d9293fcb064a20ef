"""Attention sums against the weights of one cell at a time."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gfx import settings
from gfx._engine.attention import attend, mean_attention, sum_attention


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
    encoder = encoder or toy.encoder(attention="eager")
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
    encoder = toy.encoder(attention="eager")
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


def test_batches_follow_the_length_of_their_cells(toy, monkeypatch):
    """The weights of a block stay within their limit, and one long cell does not make all batches small."""
    expected = sums(toy)
    n_heads, longest = 2, int(toy.lengths.max())
    limit = n_heads * longest**2  # room for one of the longest cells
    monkeypatch.setattr("gfx._engine.attention._MAX_WEIGHTS", limit)
    encoder, seen = toy.encoder(attention="eager"), []
    encoder.encoder.layer[0].attention.self.register_forward_hook(
        lambda _module, _inputs, outputs: seen.append(outputs[1].shape)
    )
    found = sums(toy, encoder)
    assert all(shape.numel() <= limit for shape in seen)
    assert seen[0][0] == 1
    assert max(shape[0] for shape in seen) > 3
    for name, value in vars(expected).items():
        np.testing.assert_allclose(getattr(found, name), value, atol=1e-6, err_msg=name)


def test_fused_attention_is_refused(toy):
    with pytest.raises(ValueError, match="need an encoder with attention=\"eager\", found 'sdpa'"):
        sums(toy, toy.encoder())


def test_no_weights_are_kept(toy):
    """When a block has its weights, those of the block before are gone: memory does not grow with cells or blocks."""
    encoder = toy.encoder(attention="eager")
    alive, most = [], []

    def watch(_module, _inputs, outputs):
        alive.append(weakref.ref(outputs[1]))
        most.append(sum(weights() is not None for weights in alive))

    for block in encoder.encoder.layer:
        block.attention.self.register_forward_hook(watch)
    with settings.override(batch_tokens=70):
        sums(toy, encoder)
    assert len(most) >= 5 * 3  # batches × blocks
    assert max(most) <= 2
    assert not any(weights() is not None for weights in alive)


def test_what_is_kept_does_not_grow_with_cells(toy):
    once, thrice = sums(toy), sums(toy, rows=np.tile(np.arange(len(toy.ids)), 3))
    for name, value in vars(once).items():
        assert getattr(thrice, name).shape == value.shape


def hooks(encoder):
    return sum(len(module._forward_hooks) for module in encoder.modules())


def test_hooks_are_removed(toy):
    encoder = toy.encoder(attention="eager")
    sums(toy, encoder)
    assert hooks(encoder) == 0


def test_hooks_are_removed_after_a_failure(toy):
    encoder = toy.encoder(attention="eager")
    encoder.encoder.layer[1].output.LayerNorm.weight = torch.nn.Parameter(torch.ones(3))  # does not fit
    tokens = torch.tensor([[2, 5, 6]])
    with pytest.raises(RuntimeError), torch.no_grad():
        attend(encoder, tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert hooks(encoder) == 0
