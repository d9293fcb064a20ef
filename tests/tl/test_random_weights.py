from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import BertConfig, BertForMaskedLM, BertModel

import gfx
from gfx.models._vocabulary_file import write_vocabulary
from gfx.tl.perturbation._controls import RANDOM_WEIGHTS, stream

# The toy cells' states are drawn at random, and most of the time nothing separates them.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

#: In nearly all of the toy cells.
GENE, OTHER = "TOY90", "TOY48"

#: Most tests are about effects, not about their controls.
delete_genes = partial(gfx.tl.delete_genes, controls=None)


WITH_STATES = {"groupby": "condition", "start": "sick", "goal": "healthy"}


#: Of single cells none can be held out.
UNTESTED = pytest.mark.filterwarnings("ignore:Whether '.*' and '.*' are separable could not be tested")


def changed(model, folder, change):
    """The model with other weights, in a folder of its own."""
    network = BertForMaskedLM.from_pretrained(model.folder)
    with torch.no_grad():
        change(network)
    network.save_pretrained(folder)
    write_vocabulary(model.vocabulary, folder)
    return gfx.models.load(folder)


@pytest.mark.parametrize(("hidden_layer", "states"), [(-2, {}), (-1, {}), (-2, WITH_STATES)])
def test_random_weights_are_those_of_the_seed_in_the_same_cells(
    cells, toy_model, tmp_path, value_of, monkeypatch, hidden_layer, states
):
    """Shifts are those of a model of the same shape, whose weights were drawn with the seed."""
    monkeypatch.setattr("gfx.tl.perturbation._controls._n_of_random_weights", len)  # all cells
    genes = [GENE, OTHER, "TOY21", (GENE, OTHER)]
    arguments = {"hidden_layer": hidden_layer, **states}
    delete_genes(cells, genes, model=toy_model, controls="random_weights", rng=3, **arguments)
    controls, n_layers = cells.uns["gfx_delete"]["controls"], 3 if hidden_layer == -1 else 2

    def draw(network):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(stream(3, RANDOM_WEIGHTS).integers(2**31)))
            config = BertConfig.from_pretrained(toy_model.folder, num_hidden_layers=n_layers)
            drawn = BertModel(config, add_pooling_layer=False)
        network.bert.embeddings.load_state_dict(drawn.embeddings.state_dict())
        for layer, new in zip(network.bert.encoder.layer, drawn.encoder.layer, strict=False):
            layer.load_state_dict(new.state_dict())

    random = changed(toy_model, tmp_path / "random", draw)
    delete_genes(cells, genes, model=random, key_added="random", **arguments)
    table, expected = cells.uns["gfx_delete"]["table"], cells.uns["random"]["table"]
    np.testing.assert_allclose(table["random_weights_shift_mean"], expected["shift_mean"], atol=1e-6)
    assert abs(table["random_weights_shift_mean"] / table["shift_mean"] - 1).min() > 0.01
    sample = cells.uns["gfx_delete"]["genes_of_all_ranks"]
    effects = {"shift": [cells.uns[key]["table"]["shift_mean"] for key in ("gfx_delete", "random")]}
    if states:
        of_states = [cells.uns[key]["state_table"].query("role == 'goal'") for key in ("gfx_delete", "random")]
        effects["toward"] = [table["toward_mean"].to_numpy() for table in of_states]
    agreement = controls[controls["control"] == "random_weights"]
    assert set(agreement["measure"]) == set(effects)
    for measure, (of_model, of_random) in effects.items():
        correlation = stats.spearmanr(sample[measure], sample[f"random_weights_{measure}"]).statistic
        assert value_of(controls, "random_weights", "spearman", measure) == pytest.approx(correlation)
        assert value_of(controls, "random_weights", "spearman", measure, "n") == 100
        # Agreement is asked of single genes alone: the pair is not what most of the perturbations are.
        statistic = "spearman_perturbations"
        correlation = stats.spearmanr(of_model[:-1], of_random[:-1]).statistic
        assert value_of(controls, "random_weights", statistic, measure) == pytest.approx(correlation)
        assert value_of(controls, "random_weights", statistic, measure, "n") == 3
    if states:
        # Random weights have goals of their own: a random gene shifts a cell as far toward them as when deleted there.
        delete_genes(cells, ..., model=random, key_added="every", **arguments)
        by_hand = cells.obsm["every_states"][..., cells.uns["every"]["states"].tolist().index("healthy")]
        by_hand = by_hand[~np.isnan(by_hand)]
        distance = abs(sample["random_weights_toward"].to_numpy()[:, None] - by_hand).min(axis=1)
        assert distance.max() < 1e-6
        assert np.std(by_hand) > 1e-4


def test_random_weights_see_some_cells_of_a_perturbation(cells, toy_model, monkeypatch):
    """Those of the seed and the genes, whatever else is perturbed; the model is compared in the same cells."""
    runs = {}
    compare = gfx.tl.perturbation._controls.compare_networks

    def kept(perturbed, model, random, goal):
        runs["random"], runs["n"] = random, len(model.sets)
        return compare(perturbed, model, random, goal)

    monkeypatch.setattr("gfx.tl.perturbation._controls.compare_networks", kept)
    monkeypatch.setattr("gfx.tl.perturbation._controls.SHARE_OF_RANDOM_WEIGHTS", 1)
    chosen = []
    for genes in ([GENE, OTHER], [OTHER, "TOY21", GENE]):
        delete_genes(cells, genes, model=toy_model, controls="random_weights")
        random, result = runs["random"], cells.uns["gfx_delete"]
        of_genes = [random.which == runs["n"] + number for number in range(len(genes))]
        chosen.append(random.cell[of_genes[genes.index(GENE)]].tolist())
        means = [[], []]
        for number, own in enumerate(of_genes):
            means[0].append(cells.obsm["gfx_delete"][random.cell[own], number].mean(dtype=float))
            means[1].append(random["shift"][own].mean(dtype=float))
        np.testing.assert_allclose(result["table"]["random_weights_shift_mean"], means[1])
        if len(genes) == 3:
            row = result["controls"].query("statistic == 'spearman_perturbations'")
            assert row["value"].item() == pytest.approx(stats.spearmanr(*means).statistic)
    assert len(set(chosen[0])) == 10 < result["table"]["n_cells"].max()
    assert chosen[0] == chosen[1]


def test_the_users_random_numbers_stay_as_they_are(cells, toy_model):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    gfx.tl.delete_genes(cells, GENE, model=toy_model, n_random=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_genes_of_all_ranks(cells, toy_model):
    """In one cell, a rank says which gene it was."""
    one = cells[[1]].copy()
    delete_genes(one, GENE, model=toy_model, controls="random_weights")
    sample, controls = one.uns["gfx_delete"]["genes_of_all_ranks"], one.uns["gfx_delete"]["controls"]
    assert len(sample) == 100
    gfx.pp.tokenize(one, model=toy_model)
    tokens = one.obsm["gfx_tokens"][0]
    tokens = tokens[tokens > 3]
    delete_genes(one, toy_model.vocabulary.symbols[tokens].tolist(), model=toy_model, key_added="every")
    at = np.rint(sample["rank"] * (len(tokens) - 1)).astype(int)
    np.testing.assert_allclose(sample["rank"], at / (len(tokens) - 1), atol=1e-6)
    np.testing.assert_allclose(sample["shift"], one.obsm["every"][0, at], atol=1e-6)
    assert len(set(at)) > len(tokens) / 2
    assert {0, len(tokens) - 1} & set(at)
    for column, control, prefix in (("shift", "rank", ""), ("random_weights_shift", "random_weights", "rank_")):
        line = stats.linregress(sample["rank"], np.log(sample[column]))
        expected = {"spearman": stats.spearmanr(sample["rank"], sample[column]).statistic, "slope": line.slope}
        rows = controls[controls["control"] == control].set_index("statistic")
        for statistic, value in expected.items():
            assert rows.loc[f"{prefix}{statistic}", "value"] == pytest.approx(value, rel=1e-4)
            assert rows.loc[f"{prefix}{statistic}", "n"] == 100


@UNTESTED
def test_genes_of_all_ranks_are_those_of_the_start(cells, toy_model):
    """Deleting them gives, in the cells of the start, these shifts."""
    few = cells[:3].copy()
    few.obs["state"] = ["start", "goal", "goal"]
    delete_genes(few, GENE, model=toy_model, controls="random_weights", groupby="state", start="start", goal="goal")
    delete_genes(few, ..., model=toy_model, groupby="state", start="start", goal="goal", key_added="every")
    shifts = few.obsm["every"][0]
    distance = abs(few.uns["gfx_delete"]["genes_of_all_ranks"]["shift"].to_numpy()[:, None] - shifts).min(axis=1)
    assert distance.max() < 1e-6


def test_random_weights_alone_are_in_the_table_and_drawn(cells, toy_model):
    gfx.tl.delete_genes(cells, [GENE, OTHER], model=toy_model, controls="random_weights")
    table = gfx.get.deletion_df(cells)
    assert table["random_weights_shift_mean"].notna().all()
    assert "random_mean" not in table
    assert gfx.pl.rank_trend(cells, show=False) is not None
