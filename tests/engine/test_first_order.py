"""Estimates of deletions against a whole Jacobian, finite differences, and exact results."""

from __future__ import annotations

import dataclasses
from threading import get_ident
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import gfx
from gfx import settings
from gfx._core.edits import single_deletions
from gfx._core.screening import wanted_places
from gfx._engine import first_order
from gfx._engine.blocks import blocks_of, embed
from gfx._engine.encoder import load_encoder
from gfx._engine.first_order import estimate_deletions
from gfx._engine.perturb import run_edits
from gfx._engine.pooling import embed_cells

LAYERS = [-1, -2]
POSITIONS = ["keep", "close"]


def every_gene(toy):
    return single_deletions(toy.ids, wanted_places(toy.ids, toy.lengths, ~toy.vocabulary.is_special, toy.vocabulary))


def goals_of(toy, n=2):
    return np.random.default_rng(5).standard_normal((n, toy.model.hidden_size))


def estimated(toy, *, rows=slice(None), layer=-1, seeds=None, n_probes=4, edits=None, **given):
    rows = np.arange(len(toy.ids))[rows]
    some = dataclasses.replace(toy, ids=toy.ids[rows], lengths=toy.lengths[rows])
    found = estimate_deletions(
        toy.encoder(layer),
        some.ids,
        some.lengths,
        toy.vocabulary,
        every_gene(some) if edits is None else edits,
        seeds=[(0, int(row)) for row in rows] if seeds is None else seeds,
        n_probes=n_probes,
        **given,
    )
    return SimpleNamespace(**found)


def jacobian(toy, cell, *, how, layer):
    """How the vector of one cell follows the weights of its tokens, `(d, l)`, by the published network and torch."""
    tokens = torch.tensor([cell])
    is_gene = torch.tensor([toy.is_gene(token) for token in cell])

    def vector(log_keep):
        mask = log_keep[None, None, None].expand(1, 1, len(cell), -1)
        states = toy.reference.model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states[layer][0]
        weight = log_keep.exp() * is_gene
        return states[0] if how == "cls" else (states * weight[:, None]).sum(0) / weight.sum()

    start = torch.zeros(len(cell))
    return torch.autograd.functional.jacobian(vector, start).numpy(), vector(start).detach().numpy()


@pytest.mark.parametrize("layer", LAYERS)
def test_all_directions_are_the_whole_jacobian(toy, layer):
    goals, all_of_them = goals_of(toy), toy.model.hidden_size - 1
    for how in toy.poolings:
        found = estimated(toy, layer=layer, how=how, positions="keep", goals=goals, n_probes=all_of_them)
        edits = every_gene(toy)
        for row in (0, 3, 6):
            runs = edits.cell == row
            slopes, vector = jacobian(toy, toy.cells()[row], how=how, layer=layer)
            length = np.linalg.norm(vector)
            across = slopes - np.outer(vector, vector @ slopes) / length**2
            genes = np.array([toy.is_gene(token) for token in toy.cells()[row]])
            shift = (across**2).sum(axis=0)[genes] / (2 * length**2)
            np.testing.assert_allclose(found.shift[runs], shift, rtol=2e-3, atol=1e-9)
            for at, goal in enumerate(goals):
                toward = -(goal / np.linalg.norm(goal)) @ across[:, genes] / length
                np.testing.assert_allclose(found.toward[runs, at], toward, rtol=2e-3, atol=1e-7)


def test_few_directions_are_right_on_average(toy):
    how = toy.poolings[-1]
    rows, n_draws = np.zeros(400, dtype=int), 400
    seeds = [(1, draw) for draw in range(n_draws)]
    few = estimated(toy, rows=rows, how=how, positions="keep", n_probes=2, seeds=seeds).shift.reshape(n_draws, -1)
    whole = estimated(toy, rows=[0], how=how, positions="keep", n_probes=toy.model.hidden_size - 1).shift
    mean, error = few.mean(axis=0), few.std(axis=0) / np.sqrt(n_draws)
    assert error.min() > 0
    assert np.abs((mean - whole) / error).max() < 4.5


def test_estimates_are_what_deletion_does(real_cells):
    """In the embedded model and a real cell: shifts, and shifts toward a goal, come in the same order."""
    blood, model = real_cells("eval/pbmc3k_10x"), gfx.models.load("mini")
    shortest = np.argsort((blood.X > 0).sum(axis=1).A1, kind="stable")[:1]
    blood = blood[[*shortest, *range(-20, 0)]].copy()
    gfx.pp.tokenize(blood, model=model, gene_ids="ensembl_id")
    ids, lengths = blood.obsm["gfx_tokens"], blood.obs["gfx_tokens_n"].to_numpy()
    assert lengths[0] > 150
    encoder = load_encoder(model.weights, model.config, n_layers=3, device=torch.device("cpu"), dtype=torch.float32)
    goal = embed_cells(encoder, ids[1:], lengths[1:], model.vocabulary, how="cls").mean(axis=0)
    cell = ids[:1], lengths[:1]
    edits = single_deletions(ids[:1], wanted_places(*cell, ~model.vocabulary.is_special, model.vocabulary))
    for positions in POSITIONS:
        given = {"how": "cls", "positions": positions, "goals": goal[None]}
        exact = run_edits(encoder, *cell, model.vocabulary, edits, **given)
        all_of_them = {"n_probes": model.hidden_size - 1, "seeds": [(0, 0)]}
        found = estimate_deletions(encoder, *cell, model.vocabulary, edits, **given, **all_of_them)
        assert spearmanr(exact["toward"][:, 0], found["toward"][:, 0]).statistic > 0.98
        assert spearmanr(exact["shift"], found["shift"]).statistic > 0.98
        np.testing.assert_array_equal(found["rank"], exact["rank"])


def test_positions_of_later_genes_are_in_the_slopes_of_deletion(toy):
    """A gene left out and all behind it one place up, by finite differences about half of that way."""
    encoder, row, place, step = toy.encoder(dtype=torch.float64), 0, 4, 1e-4
    tokens = torch.from_numpy(toy.ids[row, : toy.lengths[row]].astype(np.int64))[None]
    table = encoder.embeddings.position_embeddings.weight[: tokens.shape[1]]
    goal = torch.from_numpy(goals_of(toy)[0])

    def score(part):
        log_keep = torch.zeros(1, tokens.shape[1], dtype=torch.float64)
        log_keep[0, place] = np.log1p(-part)
        positions = (table + torch.cat([table[:1], table[:-1]]))[None] / 2
        positions[0, place + 1 :] += part * (table[place:-1] - table[place + 1 :])
        hidden = embed(encoder, tokens, positions)
        for block in blocks_of(encoder):
            hidden = block.run(hidden, log_keep=log_keep)
        weight = log_keep.exp() * torch.tensor([toy.is_gene(token) for token in toy.cells()[row]])
        vector = (hidden * weight[..., None]).sum(1) / weight.sum()
        return torch.cosine_similarity(vector, goal[None]).item()

    slope = (score(step) - score(-step)) / (2 * step)
    run = np.flatnonzero(every_gene(toy).cell == row)[place - toy.vocabulary.first_gene]
    closed, kept = (
        estimated(toy, how="mean", positions=positions, goals=goals_of(toy)).toward[run, 0]
        for positions in ("close", "keep")
    )
    assert closed == pytest.approx(slope, rel=1e-3)
    assert kept != pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("positions", POSITIONS)
def test_estimates_do_not_depend_on_company(toy, positions):
    how = toy.poolings[-1]
    whole = estimated(toy, how=how, positions=positions, goals=goals_of(toy))
    with settings.override(batch_tokens=1):
        alone = estimated(toy, how=how, positions=positions, goals=goals_of(toy))
    back = estimated(toy, rows=slice(None, None, -1), how=how, positions=positions, goals=goals_of(toy))
    order = np.argsort(-every_gene(toy).cell, kind="stable")
    for name in ("shift", "toward", "rank"):
        expected = getattr(whole, name)
        np.testing.assert_allclose(getattr(alone, name), expected, rtol=2e-3, atol=1e-7)
        np.testing.assert_allclose(getattr(back, name), expected[order], rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("positions", POSITIONS)
def test_workers_do_not_matter(toy, threads, monkeypatch, positions):
    given = {"how": toy.poolings[-1], "positions": positions, "goals": goals_of(toy)}
    alone = estimated(toy, **given)
    seen = set()
    monkeypatch.setattr(first_order, "_slopes", recorded(first_order._slopes, seen))
    for n_threads in (2, 5):
        threads(n_threads)
        found = estimated(toy, **given)
        np.testing.assert_allclose(found.shift, alone.shift, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found.toward, alone.toward, atol=2e-6)
        np.testing.assert_array_equal(found.toward, estimated(toy, **given).toward)
    assert len(seen) > 1, "threads that run cells"


def recorded(function, threads_seen):
    """Note in which threads a function is called."""

    def call(*args, **kwargs):
        threads_seen.add(get_ident())
        return function(*args, **kwargs)

    return call


def test_large_networks_have_one_worker(toy, threads, monkeypatch):
    """Each keeps what it derives from, and all of them might have no room."""
    threads(4)
    monkeypatch.setattr(first_order, "_MOST_KEPT", 1)
    seen = set()
    monkeypatch.setattr(first_order, "_slopes", recorded(first_order._slopes, seen))
    estimated(toy, how=toy.poolings[-1], positions="keep")
    assert len(seen) == 1


def test_some_genes_in_any_order(toy):
    """Estimates come in the order of the edits, whichever genes are wanted."""
    how, edits = toy.poolings[-1], every_gene(toy)
    whole = estimated(toy, how=how, positions="close", goals=goals_of(toy))
    some = np.random.default_rng(0).permutation(len(edits))[:40]
    few = dataclasses.replace(edits, cell=edits.cell[some], which=edits.which[some])
    found = estimated(toy, edits=few, how=how, positions="close", goals=goals_of(toy))
    for name in ("shift", "toward", "rank"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name)[some], rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("positions", POSITIONS)
def test_in_the_embedding_no_gene_has_an_effect_on_cls(toy, positions):
    """Exactly none, as in an exact screen; the mean over genes does lose one."""
    how = toy.poolings[-1]
    found = estimated(toy, layer=0, how=how, positions=positions, goals=goals_of(toy))
    is_zero = how == "cls"
    assert (found.shift == 0).all() == (found.toward == 0).all() == is_zero
    assert np.isfinite(found.rank).all()
    exact = run_edits(
        toy.encoder(0), toy.ids, toy.lengths, toy.vocabulary, every_gene(toy), how=how, positions=positions
    )
    assert (exact["shift"] == 0).all() == is_zero


def test_no_probes_no_shifts(toy):
    found = estimated(toy, how="mean", positions="keep", goals=goals_of(toy), n_probes=0)
    assert np.isnan(found.shift).all()
    assert len(found.toward)
    assert not np.isnan(found.toward).any()
