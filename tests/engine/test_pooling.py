"""Cell and gene embeddings against one cell at a time, and what they must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gfx import settings
from gfx._engine import blocks, device
from gfx._engine.blocks import attend
from gfx._engine.forward import run_cells
from gfx._engine.pooling import embed_cells, mean_genes, sum_genes, sums_of_genes


def embed_genes(*cells, n_groups, **chosen):
    """Mean hidden state of each gene, and numbers of cells."""
    slots = n_groups * len(cells[-1])
    means, counts = mean_genes(*sums_of_genes([sum_genes(*cells, n_groups=n_groups, **chosen)], slots), n_groups)
    return means[:-1], counts[:-1]


LAYERS = [-1, -2, 0, 1]
#: Seen on states up to 2.7: 0.018 between bfloat16 runs of the same cells in other batches (a last bit is 0.0156),
#: 0.035 between bfloat16 and float32, 1.3e-6 between float32 runs.
SAME_IN_BFLOAT16 = 0.04
BFLOAT16 = 0.08


def naive_cells(toy, layer, how):
    out = np.full((len(toy.lengths), toy.model.hidden_size), np.nan)
    for at, cell in enumerate(toy.cells()):
        if cell:
            states = toy.reference.states(cell, layer)
            genes = [place for place, token in enumerate(cell) if toy.is_gene(token)]
            out[at] = states[0] if how == "cls" else np.mean([states[place] for place in genes], axis=0)
    return out


def naive_genes(toy, layer, group, n_groups):
    seen = {}
    for cell, at_group in zip(toy.cells(), group, strict=True):
        if cell and at_group >= 0:
            states = toy.reference.states(cell, layer)
            for place, token in enumerate(cell):
                if toy.is_gene(token):
                    seen.setdefault((at_group, token), []).append(states[place])
    means = np.full((n_groups, len(toy.vocabulary), toy.model.hidden_size), np.nan)
    counts = np.zeros(means.shape[:2], dtype=int)
    for slot, vectors in seen.items():
        means[slot], counts[slot] = np.mean(vectors, axis=0), len(vectors)
    return means, counts


@pytest.mark.parametrize("layer", LAYERS)
def test_embed_cells(toy, layer):
    for how in toy.poolings:
        found = embed_cells(toy.encoder(layer), toy.ids, toy.lengths, toy.vocabulary, how=how)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, naive_cells(toy, layer, how), atol=1e-5)
        assert np.isnan(found[toy.lengths == 0]).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_embed_genes(toy, layer):
    group = np.array([0, 1, 2, -1, 0, 1, 2] * 2)
    found = embed_genes(toy.encoder(layer), toy.ids, toy.lengths, toy.vocabulary, group=group, n_groups=4)
    means, counts = naive_genes(toy, layer, group, 4)
    assert found[0].dtype == np.float32
    np.testing.assert_allclose(found[0], means, atol=1e-5)
    np.testing.assert_array_equal(found[1], counts)
    assert np.isnan(found[0][3]).all()  # a group without cells


def test_mean_leaves_special_tokens_out(toy):
    """By hand: an embedding layer without position or token type, so that a state is known."""
    encoder = toy.encoder(0)
    with torch.no_grad():
        for table in (encoder.embeddings.position_embeddings, encoder.embeddings.token_type_embeddings):
            table.weight.zero_()
    states = encoder(input_ids=torch.arange(len(toy.vocabulary))[None, :64]).last_hidden_state[0].numpy()
    found = embed_cells(encoder, toy.ids, toy.lengths, toy.vocabulary, how="mean")
    short = [at for at, cell in enumerate(toy.cells()) if cell and max(cell) < 64]
    for at in short:
        genes = [token for token in toy.cells()[at] if toy.is_gene(token)]
        np.testing.assert_allclose(found[at], states[genes].mean(axis=0), atol=1e-5)


# --- what a result must not depend on -------------------------------------------------------------------------------


def both(toy, encoder, rows=slice(None)):
    """Cell embeddings by every pooling, side by side."""
    cells = toy.ids[rows], toy.lengths[rows], toy.vocabulary
    return np.hstack([embed_cells(encoder, *cells, how=how) for how in toy.poolings])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, SAME_IN_BFLOAT16)])
class TestInvariance:
    def test_batches(self, toy, dtype, tolerance):
        encoder = toy.encoder(dtype=dtype)
        expected = both(toy, encoder)
        for batch_tokens in (1, 70, 300):
            with settings.override(batch_tokens=batch_tokens):
                np.testing.assert_allclose(both(toy, encoder), expected, atol=tolerance)

    def test_order_of_cells(self, toy, dtype, tolerance):
        encoder = toy.encoder(dtype=dtype)
        order = np.random.default_rng(0).permutation(len(toy.ids))
        np.testing.assert_allclose(both(toy, encoder, order), both(toy, encoder)[order], atol=tolerance)

    def test_other_cells(self, toy, dtype, tolerance):
        """A short cell alone, and padded to the longest cell of all."""
        encoder = toy.encoder(dtype=dtype)
        with settings.override(batch_tokens=1):
            expected = both(toy, encoder)
        longest = int(toy.lengths.argmax())
        for row in np.flatnonzero(toy.lengths):
            pair = both(toy, encoder, [row, longest])
            np.testing.assert_allclose(pair[0], expected[row], atol=tolerance)

    def test_subset(self, toy, dtype, tolerance):
        encoder = toy.encoder(dtype=dtype)
        subset = [2, 9, 3]
        np.testing.assert_allclose(both(toy, encoder, subset), both(toy, encoder)[subset], atol=tolerance)


def test_bfloat16_is_close_to_float32(toy):
    rough, exact = (both(toy, toy.encoder(dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    np.testing.assert_allclose(rough, exact, atol=BFLOAT16)
    assert np.nanmax(abs(rough - exact)) > 1e-4  # it did run in another precision


@pytest.mark.parametrize("batch_tokens", [1, 150, None])
def test_genes_do_not_depend_on_batches(toy, batch_tokens):
    cells = toy.ids, toy.lengths, toy.vocabulary
    group = np.arange(len(toy.ids)) % 2
    expected, counts = embed_genes(toy.encoder(), *cells, group=group, n_groups=2)
    order = np.random.default_rng(1).permutation(len(toy.ids))
    shuffled = toy.ids[order], toy.lengths[order], toy.vocabulary
    with settings.override(batch_tokens=batch_tokens):
        found, found_counts = embed_genes(toy.encoder(), *shuffled, group=group[order], n_groups=2)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(found_counts, counts)


# --- batches --------------------------------------------------------------------------------------------------------


def test_batches_hold_each_cell_once_without_needless_padding(toy):
    rows = []
    with settings.override(batch_tokens=100):
        batches = list(run_cells(toy.encoder(), toy.ids, toy.lengths))
    for batch in batches:
        assert batch.tokens.shape == batch.valid.shape == batch.output.shape[:2]
        assert batch.tokens.shape[1] == toy.lengths[batch.rows].max()
        assert batch.valid.sum(1).tolist() == toy.lengths[batch.rows].tolist()
        rows += batch.rows.tolist()
    assert sorted(rows) == np.flatnonzero(toy.lengths).tolist()


def test_a_forward_pass_needs_no_gradient_and_no_mask_where_nothing_is_padded(toy, monkeypatch):
    encoder, masks = toy.encoder(), []

    def watched(projected, **how):
        masks.append(how["valid"])
        return attend(projected, **how)

    monkeypatch.setattr(blocks, "attend", watched)
    with settings.override(batch_tokens=1):
        batches = list(run_cells(encoder, toy.ids, toy.lengths))
    assert not any(batch.output.requires_grad for batch in batches)
    assert masks == [None] * len(batches) * toy.model.n_layers


def test_workers_change_nothing(toy, threads, monkeypatch):
    """Batches that several threads run at a time come in order, without gradients."""
    encoder, group = toy.encoder(), np.arange(len(toy.ids)) % 2
    expected = both(toy, encoder), *embed_genes(encoder, toy.ids, toy.lengths, toy.vocabulary, group=group, n_groups=2)
    monkeypatch.setattr(device, "_MIXED_TOKENS", 70)
    threads(3)
    found = both(toy, encoder), *embed_genes(encoder, toy.ids, toy.lengths, toy.vocabulary, group=group, n_groups=2)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    batches = list(run_cells(encoder, toy.ids, toy.lengths))
    assert len(batches) > 4
    assert not any(batch.output.requires_grad for batch in batches)
    longest = [toy.lengths[batch.rows].max() for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_a_large_vocabulary_has_wide_tokens(toy):
    wide = toy.ids.astype(np.uint32)
    np.testing.assert_array_equal(
        embed_cells(toy.encoder(), wide, toy.lengths, toy.vocabulary, how="mean"),
        embed_cells(toy.encoder(), toy.ids, toy.lengths, toy.vocabulary, how="mean"),
    )
