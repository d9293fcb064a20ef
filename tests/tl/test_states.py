from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from transformers import BertForMaskedLM

import gfx
from gfx.models._vocabulary_file import write_vocabulary

# The toy cells' states are drawn at random, and most of the time nothing separates them.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

#: In nearly all of the toy cells.
GENE, OTHER = "TOY90", "TOY48"

#: Most tests are about effects, not about their controls.
delete_genes = partial(gfx.tl.delete_genes, controls=["parts"])


@pytest.mark.parametrize("given", [GENE, (GENE, OTHER)])
def test_centroids_without_the_deleted_genes(cells, any_model, slow, given):
    """The centroid of every state is a mean of cells without the genes, whichever of them they have."""
    arguments = {"model": any_model, "groupby": "cell_type", "start": "b", "goal": "c"}
    delete_genes(cells, given, controls=["parts", "centroids"], key_added="x", **arguments)
    delete_genes(cells, given, key_added="whole", **arguments)
    names = (given,) if isinstance(given, str) else given
    tokens = slow.tokens(cells)
    vectors = np.array([slow.cell(slow.edited(row, slow.named(names), "delete"), slow.pooling) for row in tokens])
    goals = [vectors[cells.obs["cell_type"] == state].mean(axis=0) for state in "abc"]
    starts = [row if state == "b" else [] for row, state in zip(tokens, cells.obs["cell_type"], strict=True)]
    effects = slow.effects(starts, names, goals=goals)
    table, whole = cells.uns["x"]["state_table"], cells.uns["whole"]["state_table"]
    expected = np.mean([effect.toward for effect in effects.values()], axis=0)
    np.testing.assert_allclose(table["toward_without_mean"], expected, atol=1e-5)
    # Nothing else changes.
    pd.testing.assert_frame_equal(table.drop(columns="toward_without_mean"), whole)
    assert abs(table["toward_without_mean"] - table["toward_mean"]).max() > 1e-4
    for slot in ("", "_parts", "_states"):
        np.testing.assert_array_equal(cells.obsm[f"x{slot}"], cells.obsm[f"whole{slot}"])
    assert cells.uns["x"]["params"]["controls"] == ["parts", "centroids"]
    assert cells.uns["whole"]["params"]["controls"] == ["parts"]


def test_every_deletion_has_its_own_centroids(cells, toy_model):
    """Several at once are what each is by itself, whatever other controls run."""
    arguments = {"model": toy_model, "groupby": "cell_type", "start": "a", "goal": "b"}
    genes = [GENE, OTHER, (GENE, OTHER)]
    gfx.tl.delete_genes(
        cells, genes, controls=["centroids", "random_sets"], n_random=4, donor_key="donor", key_added="all", **arguments
    )
    gfx.tl.delete_genes(
        cells, genes, controls="random_sets", n_random=4, donor_key="donor", key_added="whole", **arguments
    )
    result, whole = cells.uns["all"], cells.uns["whole"]
    for gene in genes:
        delete_genes(cells, gene, controls="centroids", key_added="one", **arguments)
        name = cells.uns["one"]["perturbations"].item()
        found = result["state_table"].query(f"perturbation == '{name}'")["toward_without_mean"]
        np.testing.assert_allclose(found, cells.uns["one"]["state_table"]["toward_without_mean"], atol=1e-6)
    for table in ("table", "random_sets", "random_states", "donors", "donor_states", "synergy"):
        pd.testing.assert_frame_equal(result[table], whole[table])
    pd.testing.assert_frame_equal(result["state_table"].drop(columns="toward_without_mean"), whole["state_table"])
    assert result["state_table"]["toward_z"].notna().all()


def test_a_cell_of_nothing_but_the_deleted_gene_keeps_its_place_in_the_centroid(cells, toy_model, toy_slow):
    """There is no cell left without it."""
    counts = cells.X.toarray()
    counts[1] = 0
    counts[1, cells.var_names.get_loc(GENE)] = 3
    cells.X = sparse.csr_matrix(counts)
    delete_genes(cells, GENE, model=toy_model, groupby="cell_type", start="a", goal="b", controls="centroids")
    rows = toy_slow.tokens(cells)
    edited = [toy_slow.edited(row, toy_slow.named([GENE]), "delete") for row in rows]
    vectors = np.array(
        [toy_slow.cell(new if len(new) > 2 else row, "cls") for row, new in zip(rows, edited, strict=True)]
    )
    goals = [vectors[cells.obs["cell_type"] == state].mean(axis=0) for state in "abc"]
    starts = [row if state == "a" else [] for row, state in zip(rows, cells.obs["cell_type"], strict=True)]
    effects = toy_slow.effects(starts, [GENE], goals=goals)
    expected = np.mean([effect.toward for effect in effects.values()], axis=0)
    np.testing.assert_allclose(cells.uns["gfx_delete"]["state_table"]["toward_without_mean"], expected, atol=1e-5)


STATES = {
    "start alone": ({"start": "a"}, ValueError, "`groupby`, `start` and `goal` go together"),
    "no goal": ({"groupby": "cell_type", "start": "a"}, ValueError, "go together; found .*'goal': None"),
    "no start": ({"groupby": "cell_type", "goal": "a"}, ValueError, "go together"),
    "groupby alone": ({"groupby": "cell_type"}, ValueError, "go together"),
    "no such start": (
        {"groupby": "condition", "start": "sck", "goal": "healthy"},
        KeyError,
        r"Did not find start='sck' in `adata\.obs\['condition'\]`\. Did you mean 'sick'.*\['healthy', 'sick'\]",
    ),
    "no such goal": ({"groupby": "condition", "start": "sick", "goal": "x"}, KeyError, "Did not find goal='x'"),
    "same": ({"groupby": "condition", "start": "sick", "goal": "sick"}, ValueError, "are both 'sick'"),
    "no cell": (
        {"groupby": "stage", "start": "late", "goal": "early"},
        ValueError,
        r"No cell is of the state start='late'\. States with cells: \['early', 'middle'\]",
    ),
    "no gene in a state": (
        {"groupby": "full", "start": "yes", "goal": "no"},
        ValueError,
        r"No cell of the states \['no'\] has a gene that the model knows",
    ),
}


@pytest.mark.parametrize("wrong", STATES)
def test_states_that_cannot_be_used(cells, toy_model, slots, wrong):
    arguments, error, text = STATES[wrong]
    full = np.arange(24) > 3
    cells.X = sparse.csr_matrix(cells.X.multiply(full[:, None]))
    cells.obs["full"] = np.where(full, "yes", "no")
    cells.obs["stage"] = pd.Categorical(
        np.where(np.arange(24) % 2, "early", "middle"), categories=["early", "middle", "late"]
    )
    before = slots(cells)
    with pytest.raises(error, match=text):
        delete_genes(cells, GENE, model=toy_model, **arguments)
    assert slots(cells) == before


def test_categories_without_cells_and_cells_without_state(cells, toy_model):
    """Neither changes the states that there are."""
    arguments = {"model": toy_model, "start": "a", "goal": "b"}
    some = cells[cells.obs["cell_type"] != "c"].copy()
    some.obs["cell_type"] = some.obs["cell_type"].cat.remove_unused_categories()
    delete_genes(some, GENE, groupby="cell_type", **arguments)
    labels = cells.obs["cell_type"].astype(str).where(cells.obs["cell_type"] != "c")
    cells.obs["some"] = pd.Categorical(labels, categories=["z", "a", "none", "b"])
    delete_genes(cells, GENE, groupby="some", **arguments)
    assert cells.uns["gfx_delete"]["states"].tolist() == ["a", "b"]
    in_state = cells.obs["some"].notna().to_numpy()
    for key in ("gfx_delete", "gfx_delete_states"):
        np.testing.assert_allclose(cells.obsm[key][in_state], some.obsm[key], atol=1e-5)
        assert np.isnan(cells.obsm[key][~in_state]).all()
    assert np.isnan(cells.obsm["gfx_delete"][cells.obs["some"] == "b"]).all()  # they are a goal, nothing is deleted


def test_states_of_one_cell_are_doubted_for_cells_where_there_are_no_donors(cells, toy_model):
    cells.obs["one each"] = ["x", "y"] + [None] * 22
    with pytest.warns(UserWarning, match="no cells can be held out .* may reflect differences between cells"):
        delete_genes(cells, GENE, model=toy_model, groupby="one each", start="x", goal="y", controls=None)


@pytest.mark.parametrize("kind", [int, bool, float])
def test_states_that_are_no_text(cells, toy_model, kind):
    cells.obs["sick"] = (cells.obs["condition"] == "sick").astype(kind)
    delete_genes(cells, GENE, model=toy_model, groupby="condition", start="sick", goal="healthy", key_added="x")
    delete_genes(cells, GENE, model=toy_model, groupby="sick", start=kind(1), goal=kind(0), key_added="y")
    np.testing.assert_array_equal(cells.obsm["y_states"], cells.obsm["x_states"])
    assert cells.uns["y"]["states"].tolist() == [str(kind(0)), str(kind(1))]


def changed(model, folder, change):
    """The model with other weights, in a folder of its own."""
    network = BertForMaskedLM.from_pretrained(model.folder)
    with torch.no_grad():
        change(network)
    network.save_pretrained(folder)
    write_vocabulary(model.vocabulary, folder)
    return gfx.models.load(folder)


@pytest.fixture
def separated(cells):
    """Half of the cells have only the first hundred genes, the others only the second: state; and labels by lot."""
    half = np.arange(24) % 2 == 0
    counts = cells.X.toarray()
    counts[:, :2] += 1  # to have something to delete
    counts[half, 100:] = counts[~half, 2:100] = 0
    cells.X = sparse.csr_matrix(counts)
    cells.obs["state"] = np.where(half, "x", "y")
    cells.obs["by lot"] = np.where(np.arange(24) // 2 % 2, "x", "y")
    cells.obs["donor"] = [f"d{at // 4}" for at in range(24)]
    return cells


@pytest.fixture(scope="module")
def two_kinds(any_model, tmp_path_factory):
    """A model that takes the first hundred genes for nearly one, and the others for another."""

    def merge(network):
        words, first = network.bert.embeddings.word_embeddings.weight, int(any_model.vocabulary.resolve(["TOY1"])[0])
        for some in (slice(first, first + 100), slice(first + 100, first + 200)):
            words[some] = words[some][:1] + 0.05 * words[some]
        network.bert.embeddings.position_embeddings.weight *= 0.05

    return changed(any_model, tmp_path_factory.mktemp("kinds") / "model", merge)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("donors", [{}, {"donor_key": "donor"}])
def test_states_that_are_separable_raise_no_doubt(separated, two_kinds, value_of, donors):
    delete_genes(separated, "TOY1", model=two_kinds, groupby="state", start="x", goal="y", **donors)
    controls = separated.uns["gfx_delete"]["controls"]
    assert controls["control"].tolist() == ["state_axis"]
    assert value_of(controls, "state_axis", "auc", "toward") > 0.95
    assert controls["n"].item() == 5


def test_states_by_lot_are_doubted(separated, two_kinds, value_of):
    with pytest.warns(
        UserWarning, match=r"Held-out cells of 'x' and 'y' are hardly separable.*\(AUC 0\.[0-5]\d; chance is 0\.5\)"
    ) as caught:
        delete_genes(separated, "TOY1", model=two_kinds, groupby="by lot", start="x", goal="y")
    assert caught[0].filename == __file__
    assert len(caught) == 1
    assert value_of(separated.uns["gfx_delete"]["controls"], "state_axis", "auc", "toward") < 0.6


@pytest.mark.parametrize("of", ["state", "state and lot"])
def test_states_of_other_donors_are_doubted(separated, two_kinds, value_of, of):
    """Each donor, or all but one of a state, would have to be held out: nothing says that states are no donors."""
    separated.obs["state and lot"] = separated.obs["state"].where(separated.obs["state"] == "x", separated.obs["donor"])
    with pytest.warns(
        UserWarning,
        match="Whether 'x' and 'y' are separable could not be tested: no donors can be held out with some of both "
        "states left on either side.*may reflect differences between donors",
    ) as caught:
        delete_genes(separated, "TOY1", model=two_kinds, groupby="state", start="x", goal="y", donor_key=of)
    assert caught[0].filename == __file__
    assert len(caught) == 1
    controls = separated.uns["gfx_delete"]["controls"]
    assert np.isnan(value_of(controls, "state_axis", "auc", "toward"))
    assert controls["n"].item() == 0


def test_a_warning_that_is_an_error_leaves_the_object_as_it_was(separated, two_kinds, slots):
    before = slots(separated)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Held-out cells"):
            delete_genes(separated, "TOY1", model=two_kinds, groupby="by lot", start="x", goal="y")
    assert slots(separated) == before
