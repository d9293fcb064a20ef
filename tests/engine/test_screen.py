"""Every gene deleted in turn, against the published model run on Python lists; estimates against a whole Jacobian."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import gfx
from gfx._core.screening import Screened, wanted_places
from gfx._engine.blocks import WithoutKey, attend, blocks_of, embed
from gfx._engine.encoder import load_encoder, random_encoder
from gfx._engine.first_order import screen_by_derivatives
from gfx._engine.pooling import embed_cells
from gfx._engine.screen import screen_exactly

LAYERS = [-1, -2]
OPERATORS = ["hold", "delete"]
TOLERANCE = 2e-6


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def all_wanted(toy):
    return wanted_places(toy.ids, toy.lengths, np.ones(len(toy.vocabulary), dtype=bool), toy.vocabulary)


def goals_of(toy, n=2):
    return np.random.default_rng(5).standard_normal((n, toy.model.hidden_size))


def exactly(toy, encoder=None, *, rows=slice(None), wanted=None, tokens_at_once=1000, **given):
    wanted = all_wanted(toy) if wanted is None else wanted
    return screen_exactly(
        toy.encoder(given.pop("layer", -1)) if encoder is None else encoder,
        toy.ids[rows],
        wanted[rows],
        toy.lengths[rows],
        toy.vocabulary,
        tokens_at_once=tokens_at_once,
        **given,
    )


def estimated(toy, *, rows=slice(None), layer=-1, tokens_at_once=8000, seeds=None, n_probes=4, **given):
    rows = np.arange(len(toy.ids))[rows]
    return screen_by_derivatives(
        toy.encoder(layer),
        toy.ids[rows],
        all_wanted(toy)[rows],
        toy.lengths[rows],
        toy.vocabulary,
        seeds=[(0, int(row)) for row in rows] if seeds is None else seeds,
        tokens_at_once=tokens_at_once,
        n_probes=n_probes,
        **given,
    )


# --- exactly -------------------------------------------------------------------------------------------------------


def naive(toy, *, how, operator, layer, goals):
    """One cell and one gene at a time, in float64 but for the network."""
    found = Screened.nothing(*toy.ids.shape, len(goals))
    for row, cell in enumerate(toy.cells()):
        genes = [place for place, token in enumerate(cell) if toy.is_gene(token)]
        for place in genes if len(genes) > 1 else []:
            left = [at for at in range(len(cell)) if at != place]
            edited = [cell[at] for at in left]
            before = toy.reference.states(cell, layer)
            after = toy.reference.states(edited, layer, left if operator == "hold" else None)
            is_gene = [toy.is_gene(token) for token in edited]
            if how == "cls":
                one, other = before[0], after[0]
            else:
                one, other = before[genes].mean(axis=0), after[is_gene].mean(axis=0)
            shift = 1 - cosine(one, other)
            if how == "genes":
                shift = np.mean([1 - cosine(*pair) for pair in zip(before[left][is_gene], after[is_gene], strict=True)])
            found.shift[row, place] = shift
            found.toward[row, place] = [cosine(other, goal) - cosine(one, goal) for goal in goals]
    return found


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_gene_as_one_at_a_time(toy, layer, operator):
    goals = goals_of(toy)
    for how in (*toy.poolings, "genes"):
        expected = naive(toy, how=how, operator=operator, layer=layer, goals=goals)
        found = exactly(toy, layer=layer, how=how, operator=operator, goals=goals)
        np.testing.assert_allclose(found.shift, expected.shift, atol=TOLERANCE)
        np.testing.assert_allclose(found.toward, expected.toward, atol=TOLERANCE)
        assert np.nanmax(found.shift) > 100 * TOLERANCE  # else agreement says nothing


def test_embedding_alone_has_only_composition(toy):
    """Without a block nothing reads anything: `<cls>` stays, the mean loses a gene."""
    found = exactly(toy, layer=0, how=toy.poolings[-1], operator="hold")
    there = ~np.isnan(found.shift)
    assert there.any()
    assert (found.shift[there] == 0).all() == toy.vocabulary.has_cls


@pytest.mark.parametrize("operator", OPERATORS)
def test_batches_and_other_cells_change_nothing(toy, operator):
    whole = exactly(toy, how=toy.poolings[-1], operator=operator, goals=goals_of(toy))
    one_by_one = exactly(toy, how=toy.poolings[-1], operator=operator, goals=goals_of(toy), tokens_at_once=1)
    rows = np.array([7, 1, 3])
    some = exactly(toy, rows=rows, how=toy.poolings[-1], operator=operator, goals=goals_of(toy))
    for name in ("shift", "toward"):
        np.testing.assert_allclose(getattr(one_by_one, name), getattr(whole, name), atol=TOLERANCE)
        np.testing.assert_allclose(getattr(some, name), getattr(whole, name)[rows], atol=TOLERANCE)


@pytest.mark.parametrize("operator", OPERATORS)
def test_workers_change_nothing(toy, threads, operator):
    given = {"how": toy.poolings[-1], "operator": operator, "goals": goals_of(toy), "tokens_at_once": 20_000}
    alone = exactly(toy, **given)
    for n_threads in (2, 4, 5):
        threads(n_threads)
        found = exactly(toy, **given)
        np.testing.assert_allclose(found.shift, alone.shift, atol=TOLERANCE)
        np.testing.assert_allclose(found.toward, alone.toward, atol=TOLERANCE)
        np.testing.assert_array_equal(found.shift, exactly(toy, **given).shift)


def test_only_wanted_genes_are_deleted(toy):
    genes = np.zeros(len(toy.vocabulary), dtype=bool)
    genes[toy.ids[0, 3]] = True
    wanted = wanted_places(toy.ids, toy.lengths, genes, toy.vocabulary)
    some = exactly(toy, wanted=wanted, how="mean", operator="delete")
    whole = exactly(toy, how="mean", operator="delete")
    assert wanted.any()
    np.testing.assert_array_equal(~np.isnan(some.shift), wanted)
    np.testing.assert_allclose(some.shift[wanted], whole.shift[wanted], atol=TOLERANCE)


# --- by derivatives ------------------------------------------------------------------------------------------------


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
        found = estimated(toy, layer=layer, how=how, operator="hold", goals=goals, n_probes=all_of_them)
        for row in (0, 3, 6):
            slopes, vector = jacobian(toy, toy.cells()[row], how=how, layer=layer)
            length = np.linalg.norm(vector)
            across = slopes - np.outer(vector, vector @ slopes) / length**2
            genes = all_wanted(toy)[row, : toy.lengths[row]]
            shift = (across**2).sum(axis=0)[genes] / (2 * length**2)
            np.testing.assert_allclose(found.shift[row][all_wanted(toy)[row]], shift, rtol=2e-3, atol=1e-9)
            for at, goal in enumerate(goals):
                toward = -(goal / np.linalg.norm(goal)) @ across[:, genes] / length
                np.testing.assert_allclose(found.toward[row][all_wanted(toy)[row], at], toward, rtol=2e-3, atol=1e-7)


def test_few_directions_are_right_on_average(toy):
    how = toy.poolings[-1]
    rows, n_draws = np.zeros(400, dtype=int), 400
    seeds = [(1, draw) for draw in range(n_draws)]
    few = estimated(toy, rows=rows, how=how, operator="hold", n_probes=2, seeds=seeds).shift
    whole = estimated(toy, rows=[0], how=how, operator="hold", n_probes=toy.model.hidden_size - 1).shift[0]
    there = ~np.isnan(whole)
    mean, error = few[:, there].mean(axis=0), few[:, there].std(axis=0) / np.sqrt(n_draws)
    assert few[:, there].std(axis=0).min() > 0
    assert np.abs((mean - whole[there]) / error).max() < 4.5


@pytest.mark.parametrize("operator", OPERATORS)
def test_estimates_are_what_deletion_does(real_cells, operator):
    """In the embedded model and a real cell: movements and shifts come in the same order."""
    blood, model = real_cells("eval/pbmc3k_10x"), gfx.models.load("mini")
    gfx.pp.tokenize(blood, model=model, gene_ids="ensembl_id")
    ids, lengths = blood.obsm["gfx_tokens"], blood.obs["gfx_tokens_n"].to_numpy()
    rows = np.flatnonzero((lengths > 400) & (lengths < 450))[:1]
    encoder = load_encoder(model.weights, model.config, n_blocks=3, device=torch.device("cpu"), dtype=torch.float32)
    goal = embed_cells(encoder, ids[-100:], lengths[-100:], model.vocabulary, how="cls").mean(axis=0)
    wanted = wanted_places(ids[rows], lengths[rows], np.ones(len(model.vocabulary), dtype=bool), model.vocabulary)
    given = encoder, ids[rows], wanted, lengths[rows], model.vocabulary
    how = {"how": "cls", "operator": operator, "goals": goal[None], "tokens_at_once": 8000}
    whole = screen_exactly(*given, **how)
    found = screen_by_derivatives(*given, **how, n_probes=model.hidden_size - 1, seeds=[(0, 0)])
    assert spearmanr(whole.toward[wanted], found.toward[wanted]).statistic > 0.98
    assert spearmanr(whole.shift[wanted], found.shift[wanted]).statistic > 0.98


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
        weight = log_keep.exp() * torch.from_numpy(all_wanted(toy)[row, : tokens.shape[1]])
        vector = (hidden * weight[..., None]).sum(1) / weight.sum()
        return torch.cosine_similarity(vector, goal[None]).item()

    slope = (score(step) - score(-step)) / (2 * step)
    found = estimated(toy, how="mean", operator="delete", goals=goals_of(toy)).toward[row, place, 0]
    held = estimated(toy, how="mean", operator="hold", goals=goals_of(toy)).toward[row, place, 0]
    assert found == pytest.approx(slope, rel=1e-3)
    assert held != pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("operator", OPERATORS)
def test_estimates_do_not_depend_on_company(toy, operator):
    how = toy.poolings[-1]
    whole = estimated(toy, how=how, operator=operator, goals=goals_of(toy))
    alone = estimated(toy, how=how, operator=operator, goals=goals_of(toy), tokens_at_once=1)
    back = estimated(toy, rows=slice(None, None, -1), how=how, operator=operator, goals=goals_of(toy))
    for name in ("shift", "toward"):
        expected = getattr(whole, name)
        np.testing.assert_allclose(getattr(alone, name), expected, rtol=2e-3, atol=1e-7)
        np.testing.assert_allclose(getattr(back, name)[::-1], expected, rtol=2e-3, atol=1e-7)


def test_no_probes_no_shifts(toy):
    found = estimated(toy, how="mean", operator="hold", goals=goals_of(toy), n_probes=0)
    assert np.isnan(found.shift).all()
    assert not np.isnan(found.toward[all_wanted(toy)]).any()


# --- blocks --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("scale", "error"), [(0.3, 0.01), (1.0, 0.03), (30.0, np.inf)])
def test_attention_in_the_cache_is_attention(scale, error):
    """In bfloat16 on a CPU; with scores in the thousands, which must not overflow, the largest still decides."""
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(3, 37, 3, 4, 16, generator=generator) * torch.tensor([scale, scale, 1.0])[:, None, None]
    short = projected.bfloat16()
    found = attend(short)
    expected = attend(short.float())
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < error
    assert torch.corrcoef(torch.stack([found.float().flatten(), expected.flatten()]))[0, 1] > 0.99


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


def test_a_screen_is_exact_where_a_key_has_nearly_all_attention(toy, monkeypatch):
    """Such genes are computed anew; with the others, results do not depend on which way was taken."""
    by_sums = exactly(toy, how=toy.poolings[-1], operator="hold")
    monkeypatch.setattr(WithoutKey, "MOST", 0.0)
    anew = exactly(toy, how=toy.poolings[-1], operator="hold")
    np.testing.assert_allclose(by_sums.shift, anew.shift, atol=TOLERANCE)
    assert not np.array_equal(by_sums.shift, anew.shift, equal_nan=True)  # two ways, or nothing was compared


def test_kept_in_part_is_a_weight_of_keys():
    """Keeping a key by half counts it half as often in the average."""
    projected = torch.randn(1, 5, 3, 2, 8, generator=torch.Generator().manual_seed(1))
    log_keep = torch.log(torch.tensor([[1.0, 0.5, 1.0, 1e-12, 1.0]]))
    query, key, value = projected[0].permute(1, 2, 0, 3)
    weights = torch.exp(query @ key.transpose(-1, -2) / 8**0.5) * log_keep.exp()
    expected = (weights / weights.sum(-1, keepdim=True)) @ value
    torch.testing.assert_close(attend(projected, log_keep=log_keep)[0].transpose(0, 1), expected)


@pytest.mark.parametrize("how", ["cls", "mean"])
def test_shorter_formats_find_the_same_genes(toy, how):
    """A network as wide as a small published one; noise of bfloat16 stays below the differences between genes."""
    if how not in toy.poolings:
        pytest.skip("no <cls> in this family")
    config = {**toy.model.config, "hidden_size": 64, "num_attention_heads": 2, "initializer_range": 0.1}
    made = {"n_blocks": 2, "seed": 0, "device": torch.device("cpu")}
    found = [
        exactly(toy, random_encoder(config, dtype=dtype, **made), how=how, operator="delete").shift[1]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    there = ~np.isnan(found[0])
    assert np.corrcoef(found[0][there], found[1][there])[0, 1] > 0.9
