"""Attention sums against the weights of one cell at a time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from gfx import settings
from gfx._core.attention import BAND_STARTS, BANDS, AttentionSums
from gfx._engine import attention, device
from gfx._engine.attention import Pairs, attend_and_sum, find_places, sum_attention
from gfx._engine.blocks import blocks_of


def attention_of(toy, encoder=None, rows=slice(None), **how):
    """Means over all cells and, of pairs, sums."""
    lengths, n_tokens = toy.lengths[rows], len(toy.vocabulary)
    unit = np.zeros(len(lengths), dtype=np.int64)
    result = sum_attention(
        encoder or toy.encoder(), toy.ids[rows], lengths, toy.vocabulary, unit=unit, n_units=1, **how
    )
    n_units = 3 if how.get("deleted") else 1
    sums = AttentionSums.of([result], n_units, n_tokens)
    means = [sums.means(np.array([number])) for number in range(n_units)]
    return SimpleNamespace(**(means[0] | sums.by_rank()), states=means, sums=sums)


def equal(found, expected):
    for name, value in vars(expected).items():
        if name not in {"states", "sums"}:
            np.testing.assert_allclose(getattr(found, name), value, atol=2e-6, rtol=1e-5, err_msg=name)


def band_of(place, cell, toy):
    """Number of the band of a position: special tokens first."""
    if not toy.is_gene(cell[place]):
        return 0
    rank = place - toy.vocabulary.first_gene + 1
    return max(number for number, first in enumerate(BAND_STARTS, 1) if rank >= first)


def reference(toy, cells, weights):
    """Everything straight from its definition, from the weights of each cell, `(layers, heads, query, key)`.

    Lists of what each gene received and gave, and of what each cell has.
    """
    found = {name: {} for name in ("received", "given", "uniform", "given_uniform", "rank", "by_rank")}
    of_cells = {name: [] for name in ("entropy", "distance", "special", "distance_uniform")}
    n_bands, n_heads = len(BANDS), weights[0].shape[0] * weights[0].shape[1]
    bands, even, n_in_band = np.zeros((n_heads, n_bands, n_bands)), np.zeros((n_bands, n_bands)), np.zeros(n_bands)
    for cell, whole in zip(cells, weights, strict=True):
        of_cell = whole.reshape(n_heads, len(cell), len(cell))
        genes = [place for place, token in enumerate(cell) if toy.is_gene(token)]
        for rank, place in enumerate(genes):
            values = {
                "received": of_cell[:, :, place].mean(axis=1),
                "given": of_cell[:, place, genes].sum(axis=1) - of_cell[:, place, place],
                "uniform": 1 / len(cell),
                "given_uniform": (len(genes) - 1) / len(cell),
                "rank": rank,
            }
            for name, value in values.items():
                found[name].setdefault(cell[place], []).append(value)
            found["by_rank"].setdefault(rank, []).append(values["received"])
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = np.where(of_cell > 0, -of_cell * np.log(of_cell), 0)
        among = of_cell[:, genes][:, :, genes]
        apart = abs(np.subtract.outer(genes, genes))
        of_cells["entropy"].append(surprise.sum(axis=2).mean(axis=1) / np.log(max(len(cell), 2)))
        of_cells["distance"].append((among * apart).sum(axis=(1, 2)) / among.sum(axis=(1, 2)))
        of_cells["distance_uniform"].append(apart.mean())
        of_cells["special"].append(1 - of_cell[:, :, genes].sum(axis=2).mean(axis=1))
        band = [band_of(place, cell, toy) for place in range(len(cell))]
        for query, own in enumerate(band):
            n_in_band[own] += 1
            for key, other in enumerate(band):
                bands[:, own, other] += of_cell[:, query, key]
                even[own, other] += 1 / len(cell)
    seen = np.maximum(n_in_band, 1)
    return found, of_cells, bands / seen[:, None], even / seen[:, None], n_in_band


def whole_cells(toy):
    cells = [cell for cell in toy.cells() if cell]
    return cells, [toy.reference.attention(cell) for cell in cells]


def check(found, toy, cells, weights):
    genes, of_cells, bands, bands_uniform, n_in_band = reference(toy, cells, weights)
    for token in range(len(toy.vocabulary)):
        values = genes["received"].get(token, [])
        assert found.n_with_gene[token] == len(values)
        for name in ("received", "given", "uniform", "given_uniform", "rank"):
            mean = getattr(found, name)[token]
            if values:
                np.testing.assert_allclose(mean, np.mean(genes[name][token], axis=0), atol=2e-6, rtol=1e-5)
            else:
                assert np.isnan(mean).all()
        for name in ("received", "given"):
            if values:
                deviation = np.std(genes[name][token], axis=0)
                np.testing.assert_allclose(getattr(found, f"{name}_sd")[token], deviation, atol=1e-5)
    for name, values in of_cells.items():
        np.testing.assert_allclose(getattr(found, name), np.mean(values, axis=0), atol=1e-5, rtol=1e-5)
    assert found.n_cells == len(cells)
    np.testing.assert_array_equal(found.n_in_band, n_in_band)
    used = n_in_band > 0
    np.testing.assert_allclose(found.bands[:, used], bands[:, used], atol=2e-6)
    np.testing.assert_allclose(found.bands_uniform[used], bands_uniform[used], atol=1e-6)
    assert np.isnan(found.bands[:, ~used]).all()
    return genes


def test_all_means_are_those_of_the_weights(toy):
    cells, weights = whole_cells(toy)
    found = attention_of(toy)
    genes = check(found, toy, cells, weights)
    assert found.ranks.shape == (len(genes["by_rank"]), weights[0].shape[0] * weights[0].shape[1])
    for rank, values in genes["by_rank"].items():
        assert found.ranks_n_cells[rank] == len(values)
        np.testing.assert_allclose(found.ranks[rank], np.mean(values, axis=0), atol=1e-6)


def test_units_are_means_over_their_own_cells(toy):
    unit = np.arange(len(toy.ids)) % 3
    result = sum_attention(toy.encoder(), toy.ids, toy.lengths, toy.vocabulary, unit=unit, n_units=3)
    sums = AttentionSums.of([result], 3, len(toy.vocabulary))
    for units in ([0], [1], [2], [0, 2]):
        chosen = np.flatnonzero(np.isin(unit, units) & (toy.lengths > 0))
        cells = [toy.cells()[row] for row in chosen]
        found = SimpleNamespace(**sums.means(np.array(units)))
        check(found, toy, cells, [toy.reference.attention(cell) for cell in cells])


def test_deleted_genes_leave_their_place_empty(toy):
    """The others keep their positions: means before, without the genes, and of each gene's change."""
    deleted = tuple(np.flatnonzero(~toy.vocabulary.is_special)[:2].tolist())
    rows = [row for row, cell in enumerate(toy.cells()) if set(deleted) & set(cell) and len(cell) > 4]
    cells = [toy.cells()[row] for row in rows]
    found = attention_of(toy, rows=rows, deleted=deleted)
    before = [toy.reference.attention(cell) for cell in cells]
    check(SimpleNamespace(**found.states[0]), toy, cells, before)
    received, given, to_deleted, changes, given_changes = {}, {}, {}, {}, {}
    for cell, whole in zip(cells, before, strict=True):
        stays = [place for place, token in enumerate(cell) if token not in deleted]
        tokens = [cell[place] for place in stays]
        run = toy.reference._run(tokens, stays).attentions
        weights = np.stack([layer[0].double().numpy() for layer in run]).reshape(-1, len(stays), len(stays))
        intact = whole.reshape(-1, len(cell), len(cell))
        gone = [place for place, token in enumerate(cell) if token in deleted]
        genes = [at for at, token in enumerate(tokens) if toy.is_gene(token)]
        for at in genes:
            token, value = tokens[at], weights[:, :, at].mean(axis=1)
            received.setdefault(token, []).append(value)
            given.setdefault(token, []).append(weights[:, at, genes].sum(axis=1) - weights[:, at, at])
            to_deleted.setdefault(token, []).append(intact[:, stays[at], gone].sum(axis=1))
            ratio = intact[:, :, stays[at]].sum(axis=1)  # uniform attention adds up to 1
            changes.setdefault(token, []).append(value * len(stays) - ratio)
            n_others = len(genes) - 1, sum(map(toy.is_gene, cell)) - 1
            if n_others[0]:
                share = given[token][-1] * len(stays) / n_others[0]
                own = [place for place, other in enumerate(cell) if toy.is_gene(other) and place != stays[at]]
                share -= intact[:, stays[at], own].sum(axis=1) * len(cell) / n_others[1]
            given_changes.setdefault(token, []).append(share if n_others[0] else np.zeros(len(value)))
    _, after, change = (SimpleNamespace(**state) for state in found.states)
    for token, values in received.items():
        assert after.n_with_gene[token] == change.n_with_gene[token] == len(values)
        np.testing.assert_allclose(after.received[token], np.mean(values, axis=0), atol=2e-6)
        np.testing.assert_allclose(after.given[token], np.mean(given[token], axis=0), atol=2e-6)
        np.testing.assert_allclose(change.received[token], np.mean(changes[token], axis=0), atol=2e-5)
        np.testing.assert_allclose(change.received_sd[token], np.std(changes[token], axis=0), atol=2e-5)
        np.testing.assert_allclose(change.given[token], np.mean(given_changes[token], axis=0), atol=2e-5)
        np.testing.assert_allclose(change.given_sd[token], np.std(given_changes[token], axis=0), atol=2e-5)
        np.testing.assert_allclose(found.states[0]["to_deleted"][token], np.mean(to_deleted[token], 0), atol=2e-6)
    assert after.n_with_gene[list(deleted)].sum() == 0


@pytest.mark.parametrize("heads", [None, (0, 3), (2,)])
def test_pairs_are_means_over_the_cells_that_have_both(toy, heads):
    genes = np.flatnonzero(~toy.vocabulary.is_special)
    gives, receives = np.full((2, len(toy.vocabulary)), -1)
    gives[genes[:40]] = np.arange(40)
    receives[genes[10:90]] = np.arange(80)
    found, uniform, n_cells = attention_of(toy, pairs=Pairs(gives, receives, heads)).sums.of_pairs()
    cells, weights = whole_cells(toy)
    n_kept = 6 if heads is None else 1
    expected, even, n = np.zeros((40, 80, n_kept)), np.zeros((40, 80)), np.zeros((40, 80))
    for cell, whole in zip(cells, weights, strict=True):
        of_cell = whole.reshape(6, len(cell), len(cell))
        kept = of_cell if heads is None else of_cell[list(heads)].mean(axis=0, keepdims=True)
        for query, one in enumerate(cell):
            for key, other in enumerate(cell):
                if gives[one] >= 0 and receives[other] >= 0:
                    expected[gives[one], receives[other]] += kept[:, query, key]
                    even[gives[one], receives[other]] += 1 / len(cell)
                    n[gives[one], receives[other]] += 1
    np.testing.assert_array_equal(n_cells, n)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found, expected / n[..., None], atol=5e-6)
        np.testing.assert_allclose(uniform, even / n, rtol=1e-6)


def test_attention_of_a_cell_adds_up_to_one(toy):
    """What genes receive in all cells, and the special tokens' share, are all there is."""
    found = attention_of(toy)
    n_cells = (toy.lengths > 0).sum()
    to_genes = np.nansum(found.received * found.n_with_gene[:, None], axis=0) / n_cells
    by_rank = (found.ranks * found.ranks_n_cells[:, None]).sum(axis=0) / n_cells
    np.testing.assert_allclose(to_genes + found.special, 1, atol=1e-5)
    np.testing.assert_allclose(by_rank + found.special, 1, atol=1e-5)
    assert (found.special > 1e-4).all() == toy.vocabulary.has_cls
    np.testing.assert_allclose(np.nansum(found.bands, axis=2)[:, found.n_in_band > 0], 1, atol=1e-5)


def test_uniform_attention_is_what_it_is_compared_with(toy):
    """Queries of zero make all weights equal."""
    encoder = toy.encoder()
    with torch.no_grad():
        for block in encoder.encoder.layer:
            block.attention.self.query.weight.zero_()
            block.attention.self.query.bias.zero_()
    found = attention_of(toy, encoder)

    def is_everywhere(values, uniform):
        np.testing.assert_allclose(values, np.broadcast_to(uniform, values.shape), atol=2e-5)

    is_everywhere(found.received.T, found.uniform)
    is_everywhere(found.given.T, found.given_uniform)
    is_everywhere(found.ranks.T, found.ranks_uniform)
    is_everywhere(found.distance, found.distance_uniform)
    is_everywhere(found.bands, found.bands_uniform)
    # A cell of one token has an entropy of 0 however uniform its attention is.
    is_everywhere(found.entropy, (toy.lengths > 1).sum() / (toy.lengths > 0).sum())


@pytest.mark.parametrize("batch_tokens", [1, 70, 100_000])
def test_batches_and_order_do_not_matter(toy, batch_tokens):
    expected = attention_of(toy)
    order = np.random.default_rng(0).permutation(len(toy.ids))
    with settings.override(batch_tokens=batch_tokens):
        equal(attention_of(toy, rows=order), expected)


class LargestTensor(TorchFunctionMode):
    """Counts the numbers in the largest tensor that is made."""

    size = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel())
        return result


def places_of(toy, tokens, valid):
    is_special = torch.from_numpy(toy.vocabulary.is_special)
    return find_places(tokens, valid, is_special, toy.vocabulary.first_gene, torch.zeros_like(is_special))


def test_the_weights_of_a_cell_are_never_whole(toy, monkeypatch):
    """Blocks of queries change nothing, and are all that there is at a time."""
    expected = attention_of(toy)
    encoder, n_heads, length = toy.encoder(), 2, int(toy.lengths.max())
    monkeypatch.setitem(attention._SCORES, "cpu", 3 * n_heads * length)
    equal(attention_of(toy), expected)
    longest = torch.from_numpy(toy.ids[[toy.lengths.argmax()]].astype(np.int64))
    valid = torch.ones_like(longest, dtype=torch.bool)
    projected = blocks_of(encoder)[0].project(torch.randn(1, length, encoder.config.hidden_size))
    places = places_of(toy, longest, valid)
    with LargestTensor() as largest:
        attend_and_sum(projected, valid, places)
    assert largest.size <= projected.numel() < n_heads * length**2 / 2


@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("n_scores", [200, 1 << 20])  # some blocks of queries, or one
def test_padded_cells_together_are_each_by_itself(toy, monkeypatch, scale, n_scores):
    """As they are on a GPU; with scores in the hundreds, too, of which powers would overflow."""
    monkeypatch.setitem(attention._SCORES, "cpu", n_scores)
    generator = torch.Generator().manual_seed(0)
    rows = [1, 3, 5]  # of different lengths
    lengths = torch.from_numpy(toy.lengths[rows]).long()
    tokens = torch.from_numpy(toy.ids[rows, : lengths.max()].astype(np.int64))
    valid = torch.arange(tokens.shape[1]) < lengths[:, None]
    projected = torch.randn(3, tokens.shape[1], 3, 2, 8, generator=generator)
    projected *= torch.tensor([scale, scale, 1.0])[:, None, None]
    places = places_of(toy, tokens, valid)
    attended, alone = attend_and_sum(projected, valid, places)
    together, sums = torch.zeros_like(attended), attention.LayerSums.zeros(projected)
    attention._attend_by_queries(projected, valid, places, (), attended=together, sums=sums)
    for cell, length in enumerate(lengths.tolist()):
        query, key, value = projected[cell, :length].double().permute(1, 2, 0, 3)
        weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
        for one in (attended, together):
            expected = (weights @ value).transpose(0, 1)
            torch.testing.assert_close(one[cell, :length].double(), expected, atol=1e-5, rtol=1e-5)
        for one in (alone, sums):
            expected = weights.sum(1)
            torch.testing.assert_close(one.received[cell, :, :length].double(), expected, atol=1e-5, rtol=1e-5)
            assert (one.received[cell, :, length:] == 0).all()
            assert (one.given[cell, :, length:] == 0).all()
            expected = torch.special.entr(weights).sum((1, 2))
            torch.testing.assert_close(one.entropy[cell].double(), expected, atol=1e-4, rtol=1e-4)
            is_gene, rank = places.is_gene[cell, :length].double(), places.rank[cell, :length].double()
            between_genes = weights * is_gene[:, None] * is_gene
            expected = (between_genes * (rank[:, None] - rank).abs()).sum((1, 2))
            torch.testing.assert_close(one.distance[cell].double(), expected, atol=1e-5, rtol=1e-5)
            expected = between_genes.sum(2) - between_genes.diagonal(dim1=1, dim2=2)
            torch.testing.assert_close(one.given[cell, :, :length].double(), expected, atol=1e-5, rtol=1e-5)
            band = places.columns[cell, :length, : len(BANDS)].double()
            expected = torch.einsum("qb,hqk,kc->hbc", band, weights, band)
            torch.testing.assert_close(one.bands[cell].double(), expected, atol=1e-5, rtol=1e-5)
    nothing, without_values = attend_and_sum(projected, valid, places, sums_only=True)
    assert nothing is None
    for one, *others in zip(alone, sums, without_values, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


def test_short_distances_in_long_cells_are_exact():
    """Genes that attend nearly only to themselves: no difference of large sums may remain."""
    length, generator = 2048, torch.Generator().manual_seed(0)
    key = torch.nn.functional.normalize(torch.randn(length, 64, generator=generator), dim=-1)
    projected = torch.stack([8 * 20 * key, key, key], dim=1)[None, :, :, None]
    valid, is_special = torch.ones(1, length, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
    places = find_places(torch.zeros(1, length, dtype=torch.int64), valid, is_special, 0, is_special)
    weights = (20 * key.double() @ key.double().T).softmax(-1)
    rank = torch.arange(length).double()
    expected = (weights * (rank[:, None] - rank).abs()).sum()
    assert 0.01 < expected / length < 1
    _, sums = attend_and_sum(projected, valid, places)
    torch.testing.assert_close(sums.distance[0, 0].double(), expected, rtol=1e-5, atol=0)


def test_workers_change_nothing(toy, threads, monkeypatch):
    expected = attention_of(toy)
    monkeypatch.setattr(device, "_MIXED_TOKENS", 70)
    threads(3)
    equal(attention_of(toy), expected)


def test_what_is_kept_does_not_grow_with_cells(toy):
    once, thrice = attention_of(toy), attention_of(toy, rows=np.tile(np.arange(len(toy.ids)), 3))
    for name, value in vars(once).items():
        if name not in {"states", "sums"}:
            assert getattr(thrice, name).shape == value.shape
