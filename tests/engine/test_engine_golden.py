"""The engine against the official software, on its own cells and models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gfx._engine.encoder import blocks_needed, load_encoder
from gfx._engine.perturb import delete_genes
from gfx._engine.pooling import embed_cells, embed_genes
from gfx.models import load

TOLERANCE = 1e-5
#: What the official software calls emb_layer, and what we call hidden_layer.
LAYERS = [(0, -1), (-1, -2)]


def encoder(run, hidden_layer=-2):
    model = load(run.folder)
    n_blocks = blocks_needed(hidden_layer, model.n_blocks)
    return load_encoder(model.weights, model.config, n_blocks=n_blocks, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def centroids(golden_run):
    return np.array([golden_run.expected["state_embs"][state] for state in "abc"])


@pytest.mark.parametrize(("official", "ours"), LAYERS)
@pytest.mark.parametrize("mode", ["cell", "cls"])
def test_cell_embeddings(golden_run, mode, official, ours):
    if mode == "cls" and not golden_run.vocabulary.has_cls:
        pytest.skip("this family has no <cls>")
    how = "mean" if mode == "cell" else "cls"
    found = embed_cells(encoder(golden_run, ours), golden_run.ids, golden_run.lengths, golden_run.vocabulary, how=how)
    np.testing.assert_allclose(found[golden_run.order], golden_run.embedding(mode, official), atol=TOLERANCE)


@pytest.mark.parametrize(("official", "ours"), LAYERS)
def test_gene_embeddings(golden_run, official, ours):
    means, counts = embed_genes(
        encoder(golden_run, ours),
        golden_run.ids,
        golden_run.lengths,
        golden_run.vocabulary,
        group=np.zeros(len(golden_run.ids), dtype=np.int64),
        n_groups=1,
    )
    expected = golden_run.embedding("gene", official)
    expected = expected[~expected.index.isin(["<cls>", "<eos>"])]  # the official table has them, as genes
    tokens = [golden_run.vocabulary.token_of[gene] for gene in expected.index]
    np.testing.assert_allclose(means[0, tokens], expected, atol=TOLERANCE)
    assert sorted(tokens) == np.flatnonzero(counts[0]).tolist()


def test_state_embeddings_are_exact_means(golden_run, centroids):
    found = embed_cells(
        encoder(golden_run), golden_run.ids, golden_run.lengths, golden_run.vocabulary, how=golden_run.pooling
    )
    means = np.stack([found[golden_run.state == state].mean(axis=0) for state in "abc"])
    np.testing.assert_allclose(means, centroids, atol=TOLERANCE)


@pytest.fixture
def each_gene_deleted(golden_run, centroids):
    return delete_genes(
        encoder(golden_run),
        golden_run.ids,
        golden_run.lengths,
        golden_run.vocabulary,
        [np.array([token]) for token in golden_run.tokens],
        how=golden_run.pooling,
        state_vectors=centroids,
    )


def in_official_order(run, values, state=None):
    """Our values of one perturbation as the official software lists them: longest cell first, no missing ones."""
    rows = [row for row in run.order if state is None or run.state[row] == state]
    return values[rows][~np.isnan(values[rows])]


def test_delete_all(golden_run, each_gene_deleted):
    expected = golden_run.run("delete_all")
    for at, token in enumerate(golden_run.tokens):
        found = in_official_order(golden_run, each_gene_deleted.cells[:, at])
        np.testing.assert_allclose(1 - found, expected.get((token, "cell_emb"), []), atol=TOLERANCE)


def test_delete_all_gene(golden_run, each_gene_deleted):
    expected = golden_run.run("delete_all_gene", "gene_embs")
    assert (each_gene_deleted.n_gene_cells > 0).sum() == len(expected)
    for (deleted, affected), values in expected.items():
        at = golden_run.tokens.index(deleted)
        assert each_gene_deleted.n_gene_cells[affected, at] == len(values)
        assert 1 - each_gene_deleted.genes[affected, at] == pytest.approx(np.mean(values), abs=TOLERANCE)


def test_delete_all_states(golden_run, each_gene_deleted):
    for at_state, state in enumerate("abc"):
        expected = golden_run.run_states("delete_all_states", state)
        for at, token in enumerate(golden_run.tokens):
            found = in_official_order(golden_run, each_gene_deleted.states[:, at, at_state], "a")
            np.testing.assert_allclose(found, expected.get((token, "cell_emb"), []), atol=TOLERANCE)


def test_delete_list(golden_run, centroids):
    ((genes, _), expected), *_ = golden_run.run("delete_list").items()
    effects = delete_genes(
        encoder(golden_run),
        golden_run.ids,
        golden_run.lengths,
        golden_run.vocabulary,
        [np.array(genes)],
        how=golden_run.pooling,
        state_vectors=centroids,
    )
    np.testing.assert_allclose(1 - effects.cells[golden_run.order, 0], expected, atol=TOLERANCE)
    for (deleted, affected), values in golden_run.run("delete_list", "gene_embs").items():
        assert deleted == genes
        assert effects.n_gene_cells[affected, 0] == len(values)
        assert 1 - effects.genes[affected, 0] == pytest.approx(np.mean(values), abs=TOLERANCE)
    for at, state in enumerate("abc"):
        expected = golden_run.run_states("delete_list_states", state)[genes, "cell_emb"]
        found = in_official_order(golden_run, effects.states[:, 0, at], "a")
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_delete_anchor(golden_run):
    expected = golden_run.run("delete_anchor")
    anchors = set(golden_run.tokens) - {token for token, _ in expected}
    in_all = {token for token in anchors if (golden_run.ids == token).any(axis=1).all()}
    assert len(in_all) == 1
    (anchor,) = in_all
    others = [token for token, _ in expected]
    effects = delete_genes(
        encoder(golden_run),
        golden_run.ids,
        golden_run.lengths,
        golden_run.vocabulary,
        [np.array([anchor, other]) for other in others],
        how=golden_run.pooling,
    )
    for at, other in enumerate(others):
        found = in_official_order(golden_run, effects.cells[:, at])
        np.testing.assert_allclose(1 - found, expected[other, "cell_emb"], atol=TOLERANCE)
