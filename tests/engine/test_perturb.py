"""Deletions against Python lists, one cell and one perturbation at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gfx import settings
from gfx._engine.perturb import delete_genes

LAYERS = [-1, -2, 0]


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def cell_vector(toy, cell, states, how):
    if how == "cls":
        return states[0]
    return np.mean([state for token, state in zip(cell, states, strict=True) if toy.is_gene(token)], axis=0)


def naive_deletion(toy, cell, genes, *, layer, how, goals):
    """Shift of the cell and of each remaining gene, change towards each goal, mean rank; `None` if not applicable."""
    if not set(genes) <= set(cell) or not any(toy.is_gene(token) and token not in genes for token in cell):
        return None
    rest = [token for token in cell if token not in genes]
    before, after = toy.reference.states(cell, layer), toy.reference.states(rest, layer)
    shifts = {
        token: 1 - cosine(after[place], before[cell.index(token)])
        for place, token in enumerate(rest)
        if toy.is_gene(token)
    }
    shift = np.mean(list(shifts.values())) if how == "mean" else 1 - cosine(after[0], before[0])
    old, new = cell_vector(toy, cell, before, how), cell_vector(toy, rest, after, how)
    toward = [cosine(new, goal) - cosine(old, goal) for goal in goals]
    ranking = [token for token in cell if toy.is_gene(token)]
    rank = np.mean([ranking.index(gene) for gene in genes]) / (len(ranking) - 1)
    return shift, shifts, toward, rank


def naive_effects(toy, sets, *, layer, how, goals):
    n_cells, n_sets = len(toy.lengths), len(sets)
    shift = np.full((n_cells, n_sets), np.nan)
    toward, ranks, genes = np.full((n_cells, n_sets, len(goals)), np.nan), shift.copy(), {}
    for (row, cell), (at, deleted) in itertools.product(enumerate(toy.cells()), enumerate(sets)):
        effect = naive_deletion(toy, cell, deleted, layer=layer, how=how, goals=goals)
        if effect is not None:
            shift[row, at], shifts, toward[row, at], ranks[row, at] = effect
            for token, value in shifts.items():
                genes.setdefault((token, at), []).append(value)
    means = np.full((len(toy.vocabulary), n_sets), np.nan)
    counts = np.zeros(means.shape, dtype=int)
    for slot, values in genes.items():
        means[slot], counts[slot] = np.mean(values), len(values)
    return shift, toward, means, counts, ranks


def perturbations(toy):
    """The two frequent genes, both at once in both orders of naming, three, single genes of short cells."""
    first, second, third = np.flatnonzero(~toy.vocabulary.is_special)[:3].tolist()
    alone = [next(token for token in cell if toy.is_gene(token)) for cell in toy.cells() if 0 < len(cell) <= 4]
    single = [[gene] for gene in dict.fromkeys([first, second, *alone])]
    pair = [token for token in toy.cells()[6] if toy.is_gene(token)]  # all genes of a cell: nothing is left of it
    assert len(pair) == 2
    return [*single, [first, second], [second, third, first], pair]


def run(toy, sets, *, layer=-2, how="mean", goals=None, rows=slice(None)):
    return delete_genes(
        toy.encoder(layer),
        toy.ids[rows],
        toy.lengths[rows],
        toy.vocabulary,
        [np.array(genes) for genes in sets],
        how=how,
        state_vectors=goals,
    )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("n_goals", [0, 3])
def test_effects(toy, layer, n_goals):
    sets = perturbations(toy)
    goals = np.random.default_rng(0).normal(size=(n_goals, toy.model.hidden_size))
    for how in toy.poolings:
        effects = run(toy, sets, layer=layer, how=how, goals=goals if n_goals else None)
        shift, toward, genes, n_gene_cells, ranks = naive_effects(toy, sets, layer=layer, how=how, goals=goals)
        np.testing.assert_allclose(effects.cells, shift, atol=1e-5)
        np.testing.assert_allclose(effects.states, toward, atol=1e-5)
        np.testing.assert_allclose(effects.genes, genes, atol=1e-5)
        np.testing.assert_array_equal(effects.n_gene_cells, n_gene_cells)
        np.testing.assert_allclose(effects.ranks, ranks, atol=1e-6)
        assert {effects.cells.dtype, effects.states.dtype, effects.genes.dtype, effects.ranks.dtype} == {
            np.dtype(np.float32)
        }


def test_cells_of_the_deleted_genes_alone_have_no_effect(toy):
    sets = perturbations(toy)
    effects = run(toy, sets)
    assert np.isnan(effects.cells[4]).all()  # a cell of one gene, which is deleted by itself
    assert np.isnan(effects.cells[6, -1])  # a cell of the two genes that are deleted together
    assert not np.isnan(effects.cells[6]).all()  # each of them by itself leaves the other


def test_tokens_of_a_set_in_any_order(toy):
    first, second = np.flatnonzero(~toy.vocabulary.is_special)[:2]
    effects = run(toy, [[first, second], [second, first]])
    np.testing.assert_array_equal(effects.cells[:, 0], effects.cells[:, 1])


def test_without_position_a_deletion_moves_no_other_gene_of_the_embedding(toy):
    """In the embedding layer a gene's state knows of its position only: no position, no shift."""
    import torch

    encoder = toy.encoder(0)
    with torch.no_grad():
        encoder.embeddings.position_embeddings.weight.zero_()
    gene = np.flatnonzero(~toy.vocabulary.is_special)[:1]
    effects = delete_genes(encoder, toy.ids, toy.lengths, toy.vocabulary, [gene], how="mean")
    has_gene = (toy.ids == gene).any(axis=1)
    np.testing.assert_allclose(effects.cells[has_gene], 0, atol=1e-6)


def same(ours, theirs, rows=slice(None)):
    for field in ("cells", "states", "ranks"):
        np.testing.assert_allclose(getattr(ours, field), getattr(theirs, field)[rows], atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 70, 200])
def test_batches_do_not_matter(toy, batch_tokens):
    sets, goals = perturbations(toy), np.eye(2, 16)
    expected = run(toy, sets, goals=goals)
    with settings.override(batch_tokens=batch_tokens):
        found = run(toy, sets, goals=goals)
    same(found, expected)
    np.testing.assert_allclose(found.genes, expected.genes, atol=1e-5)
    np.testing.assert_array_equal(found.n_gene_cells, expected.n_gene_cells)


def test_order_and_company_of_cells_do_not_matter(toy):
    sets = perturbations(toy)
    expected = run(toy, sets)
    order = np.random.default_rng(0).permutation(len(toy.ids))
    same(run(toy, sets, rows=order), expected, order)
    same(run(toy, sets, rows=[6, 9]), expected, [6, 9])


def test_perturbations_do_not_touch_each_other(toy):
    sets = perturbations(toy)
    together = run(toy, sets)
    for at, genes in enumerate(sets):
        alone = run(toy, [genes])
        np.testing.assert_allclose(alone.cells[:, 0], together.cells[:, at], atol=1e-5)
        np.testing.assert_allclose(alone.genes[:, 0], together.genes[:, at], atol=1e-5)


def test_genes_that_no_cell_has(toy):
    in_cells = np.unique(toy.ids)
    absent = np.setdiff1d(np.flatnonzero(~toy.vocabulary.is_special), in_cells)[:1]
    effects = run(toy, [absent])
    assert np.isnan(effects.cells).all()
    assert np.isnan(effects.genes).all()
    assert not effects.n_gene_cells.any()


def test_only_cells_with_the_genes_are_run(toy):
    encoder, n_run = toy.encoder(), []
    encoder.register_forward_pre_hook(lambda _m, _i, kwargs: n_run.append(len(kwargs["input_ids"])), with_kwargs=True)
    gene = np.flatnonzero(~toy.vocabulary.is_special)[:1]
    delete_genes(encoder, toy.ids, toy.lengths, toy.vocabulary, [gene], how="mean")
    has_gene = (toy.ids == gene).any(axis=1).sum()
    assert 0 < has_gene < len(toy.ids) - 1
    assert sum(n_run) == 2 * has_gene  # each once as it is, once without the gene
