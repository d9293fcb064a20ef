from __future__ import annotations

import dataclasses
import itertools
import logging
import warnings
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from scipy import sparse, stats
from transformers import BertConfig, BertForMaskedLM, BertModel

import gfx
from gfx.models._vocabulary_file import write_vocabulary
from gfx.tl import _perturbation_run

# The toy cells' states are drawn at random, and most of the time nothing tells them apart.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

#: Of single cells none can be held out.
UNTESTED = pytest.mark.filterwarnings("ignore:Whether '.*' and '.*' can be told apart could not be tested")

#: In nearly all of the toy cells.
GENE, OTHER = "TOY90", "TOY48"

#: Most tests are about effects, not about what they are held against.
delete_genes = partial(gfx.tl.delete_genes, null=None)


def default_pooling(model):
    return "cls" if model.vocabulary.has_cls else "genes"


def poolings(model):
    return ["auto", "mean", "genes", *["cls"] * model.vocabulary.has_cls]


def token(slow, name):
    return int(np.flatnonzero(slow.vocabulary.symbols == name)[0])


def slow_deletions(slow, rows, names, how, **arguments):
    """Effect of deleting genes on each cell that has them all and others beside."""
    genes = [token(slow, name) for name in names]
    return {
        at: slow.effect(row, slow.edited(row, genes, "delete"), genes, how, **arguments)
        for at, row in enumerate(rows)
        if set(genes) <= set(row) and len(row) > len(genes) + 2 * slow.vocabulary.has_cls
    }


def assert_nested_equal(found, expected, where="uns"):
    """Compare what `uns` holds with what came back from a file."""
    if hasattr(expected, "columns"):
        pd.testing.assert_frame_equal(found, expected, check_index_type=False, obj=where, check_dtype=False)
    elif hasattr(expected, "items"):
        assert set(found) == set(expected), where
        for key, value in expected.items():
            assert_nested_equal(found[key], value, f"{where}[{key!r}]")
    else:
        np.testing.assert_array_equal(found, expected, err_msg=where)


def laid_out(effects, n_cells, get):
    """A value of each cell, NaN where there is none."""
    shape = np.shape(get(next(iter(effects.values()))))
    return np.array([get(effects[at]) if at in effects else np.full(shape, np.nan) for at in range(n_cells)])


@pytest.mark.parametrize("operator", ["delete", "hold"])
@pytest.mark.parametrize("hidden_layer", [-2, -1])
def test_it_is_what_the_published_model_gives(cells, any_model, slow, hidden_layer, operator):
    """Two genes, each and together; with states; against lists, one cell at a time."""
    given = [GENE, (GENE, OTHER)]
    how = default_pooling(any_model)
    delete_genes(
        cells,
        given,
        model=any_model,
        groupby="cell_type",
        start="b",
        goal="c",
        hidden_layer=hidden_layer,
        operator=operator,
    )
    tokens = slow.tokens(cells)
    vectors = np.array([slow.cell(row, "cls" if how == "cls" else "mean", hidden_layer) for row in tokens])
    centroids = [vectors[cells.obs["cell_type"] == state].mean(axis=0) for state in "abc"]
    starts = [row if state == "b" else [] for row, state in zip(tokens, cells.obs["cell_type"], strict=True)]
    for at, names in enumerate([(GENE,), (GENE, OTHER)]):
        effects = slow_deletions(
            slow, starts, names, how, goals=centroids, hidden_layer=hidden_layer, hold=operator == "hold"
        )
        assert 0 < len(effects) < 8 * (at + 1)
        for key, get in {
            "gfx_delete": lambda effect: effect.shift,
            "gfx_delete_parts": lambda effect: effect.parts,
            "gfx_delete_states": lambda effect: effect.toward,
        }.items():
            np.testing.assert_allclose(cells.obsm[key][:, at], laid_out(effects, 24, get), atol=1e-5, err_msg=key)
        table = cells.uns["gfx_delete"]["state_table"].query(f"perturbation == '{'+'.join(names)}'")
        parts = table[["toward_composition_mean", "toward_position_mean", "toward_context_mean"]]
        expected = np.mean([effect.toward_parts for effect in effects.values()], axis=0)
        np.testing.assert_allclose(parts, expected, atol=1e-5)
        np.testing.assert_allclose(parts.sum(axis=1), table["toward_mean"], atol=1e-6)
        for gene, name in enumerate(cells.var_names):
            values = [effect.genes[name] for effect in effects.values() if name in effect.genes]
            assert cells.varm["gfx_delete_n_cells"][gene, at] == len(values)
            mean, sd = (np.mean(values), np.std(values)) if values else (np.nan, np.nan)
            np.testing.assert_allclose(cells.varm["gfx_delete"][gene, at], mean, atol=1e-5)
            np.testing.assert_allclose(cells.varm["gfx_delete_sd"][gene, at], sd, atol=2e-6)
    assert np.nanmax(cells.varm["gfx_delete_sd"]) > 0.001


@pytest.mark.parametrize("pooling", ["auto", "mean", "genes", "cls"])
def test_ways_to_compare_cells(cells, any_model, slow, pooling):
    """Shift and parts by each of them; the parts add up, and each is something."""
    if pooling not in poolings(any_model):
        pytest.skip("this family has no <cls>")
    how = default_pooling(any_model) if pooling == "auto" else pooling
    delete_genes(cells, GENE, model=any_model, pooling=pooling)
    effects = slow_deletions(slow, slow.tokens(cells), [GENE], how)
    shift, parts = cells.obsm["gfx_delete"][:, 0], cells.obsm["gfx_delete_parts"][:, 0]
    np.testing.assert_allclose(shift, laid_out(effects, 24, lambda effect: effect.shift), atol=1e-5)
    np.testing.assert_allclose(parts, laid_out(effects, 24, lambda effect: effect.parts), atol=1e-5)
    np.testing.assert_allclose(parts.sum(axis=1), shift, atol=1e-6)
    largest = np.nanmax(abs(parts), axis=0)
    assert (largest[1:] > 1e-4).all()
    assert largest[0] > 1e-5 if how == "mean" else largest[0] == 0
    assert cells.uns["gfx_delete"]["params"]["pooling"] == how


@pytest.mark.parametrize("pooling", ["mean", "genes", "cls"])
def test_nothing_changes_its_position_when_it_is_held(cells, toy_model, pooling):
    arguments = {"model": toy_model, "pooling": pooling, "groupby": "cell_type", "start": "a", "goal": "b"}
    delete_genes(cells, GENE, operator="hold", key_added="held", **arguments)
    delete_genes(cells, GENE, key_added="moved", **arguments)
    held, moved = cells.obsm["held_parts"], cells.obsm["moved_parts"]
    assert (held[..., 1][~np.isnan(held[..., 1])] == 0).all()
    np.testing.assert_allclose(held[..., [0, 2]], moved[..., [0, 2]], atol=1e-6)
    assert np.nanmax(abs(moved[..., 1])) > 1e-3
    assert cells.uns["held"]["params"]["operator"] == "hold"
    assert (cells.uns["held"]["state_table"]["toward_position_mean"] == 0).all()


def test_the_last_gene_leaves_every_position_as_it_was(cells, toy_model_v1):
    """Nothing stands behind it, so both operators do the same."""
    one = cells[[0]].copy()
    gfx.pp.tokenize(one, model=toy_model_v1)
    tokens = one.obsm["gfx_tokens"][0]
    last = toy_model_v1.vocabulary.symbols[tokens[tokens > 0][-1]]
    delete_genes(one, last, model=toy_model_v1, pooling="mean")
    composition, position, context = one.obsm["gfx_delete_parts"][0, 0]
    assert abs(position) < 1e-6
    assert composition != 0
    assert abs(context) > 1e-6


@pytest.mark.parametrize("given", [GENE, (GENE, OTHER)])
def test_states_without_the_deleted_genes(cells, any_model, slow, given):
    """The centroid of every state is a mean of cells without the genes, whichever of them they have."""
    delete_genes(
        cells, given, model=any_model, groupby="cell_type", start="b", goal="c", centroids="without", key_added="x"
    )
    delete_genes(cells, given, model=any_model, groupby="cell_type", start="b", goal="c", key_added="whole")
    how = "cls" if any_model.vocabulary.has_cls else "mean"
    names = (given,) if isinstance(given, str) else given
    genes = [token(slow, name) for name in names]
    tokens = slow.tokens(cells)
    vectors = np.array([slow.cell(slow.edited(row, genes, "delete"), how) for row in tokens])
    goals = [vectors[cells.obs["cell_type"] == state].mean(axis=0) for state in "abc"]
    starts = [row if state == "b" else [] for row, state in zip(tokens, cells.obs["cell_type"], strict=True)]
    effects = slow_deletions(slow, starts, names, default_pooling(any_model), goals=goals)
    expected = laid_out(effects, 24, lambda effect: effect.toward)
    np.testing.assert_allclose(cells.obsm["x_states"][:, 0], expected, atol=1e-5)
    assert np.nanmax(abs(cells.obsm["whole_states"][:, 0] - expected)) > 1e-4
    np.testing.assert_array_equal(cells.obsm["x"], cells.obsm["whole"])
    assert cells.uns["x"]["params"]["centroids"] == "without"


def test_every_deletion_has_its_own_states_without_it(cells, toy_model):
    """Several at once are what each is by itself; of random sets, too."""
    arguments = {"model": toy_model, "groupby": "cell_type", "start": "a", "goal": "b", "centroids": "without"}
    delete_genes(cells, [GENE, OTHER], key_added="both", **arguments)
    for at, gene in enumerate([GENE, OTHER]):
        delete_genes(cells, gene, key_added="one", **arguments)
        np.testing.assert_allclose(cells.obsm["both_states"][:, [at]], cells.obsm["one_states"], atol=1e-6)


TABLE = ["perturbation", "n_cells", "shift_mean", "shift_sd", "composition_mean", "position_mean", "context_mean"]
TABLE += ["rank_mean", "random_mean", "random_sd", "n_random", "random_n_cells", "z", "p", "shift_random_weights"]
TABLE += ["detection", "expression_mean", "logfc"]
STATE_TABLE = ["perturbation", "state", "role", "n_cells", "toward_mean", "toward_sd", "toward_composition_mean"]
STATE_TABLE += ["toward_position_mean", "toward_context_mean", "toward_random_mean", "toward_random_sd"]
STATE_TABLE += ["toward_n_random", "toward_random_n_cells", "toward_z", "toward_p"]


def test_tables(cells, toy_model):
    delete_genes(cells, [GENE, (GENE, OTHER)], model=toy_model, groupby="cell_type", start="a", goal="c", key_added="x")
    result = cells.uns["x"]
    assert result["perturbations"].tolist() == [GENE, f"{GENE}+{OTHER}"]
    assert result["ensembl_ids"].tolist() == ["ENSG00000000090", "ENSG00000000090+ENSG00000000048"]
    assert result["states"].tolist() == ["a", "b", "c"]
    table = result["table"]
    assert table.columns.tolist() == TABLE
    for at, row in table.iterrows():
        values = cells.obsm["x"][:, at]
        values = values[~np.isnan(values)].astype(np.float64)
        assert row["n_cells"] == len(values) > 2
        assert row["shift_mean"] == pytest.approx(values.mean())
        assert row["shift_sd"] == pytest.approx(np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1)))
        parts = np.nanmean(cells.obsm["x_parts"][:, at].astype(np.float64), axis=0)
        np.testing.assert_allclose(row[["composition_mean", "position_mean", "context_mean"]].tolist(), parts)
        assert 0 <= row["rank_mean"] <= 1
    assert (table["n_random"] == 0).all()
    of_random = ["random_mean", "random_sd", "random_n_cells", "z", "p", "shift_random_weights"]
    assert table[of_random].isna().all(axis=None)
    states = result["state_table"]
    assert states.columns.tolist() == STATE_TABLE
    states = states.set_index(["perturbation", "state"])
    assert states["role"].tolist() == ["start", "alternative", "goal"] * 2
    for (name, state), row in states.iterrows():
        values = cells.obsm["x_states"][:, result["perturbations"].tolist().index(name), "abc".index(state)]
        assert row["toward_mean"] == pytest.approx(np.nanmean(values.astype(np.float64)))
        assert row["toward_sd"] == pytest.approx(np.nanstd(values.astype(np.float64), ddof=1))
        assert row["n_cells"] == (~np.isnan(values)).sum()


def test_rank_of_the_deleted_gene(cells, toy_model):
    """The gene that stands first in its cell has rank 0, the last one 1."""
    gfx.pp.tokenize(cells, model=toy_model)
    symbols = toy_model.vocabulary.symbols
    row = cells.obsm["gfx_tokens"][0]
    row = row[row > 3]
    one = cells[[0]].copy()
    delete_genes(one, [symbols[row[0]], symbols[row[-1]], symbols[row[len(row) // 2]]], model=toy_model)
    ranks = one.uns["gfx_delete"]["table"]["rank_mean"]
    np.testing.assert_allclose(ranks, [0, 1, (len(row) // 2) / (len(row) - 1)], atol=1e-6)
    assert one.uns["gfx_delete"]["table"]["shift_sd"].isna().all()  # one cell has no spread


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (GENE, [GENE]),
        ([GENE, OTHER], [GENE, OTHER]),
        ((GENE, OTHER), [f"{GENE}+{OTHER}"]),  # a tuple is one set, by itself too
        ([(GENE, OTHER)], [f"{GENE}+{OTHER}"]),
        (((GENE, OTHER), OTHER), [f"{GENE}+{OTHER}", OTHER]),
        (itertools.combinations([GENE, OTHER, "TOY21"], 2), [f"{GENE}+{OTHER}", f"{GENE}+TOY21", f"{OTHER}+TOY21"]),
        ([(GENE, OTHER), GENE, OTHER], [f"{GENE}+{OTHER}", GENE, OTHER]),
        (np.array([GENE, OTHER]), [GENE, OTHER]),
        (pd.Index([GENE, OTHER]), [GENE, OTHER]),
        ("ENSG00000000090.3", ["ENSG00000000090.3"]),
        ("oldtoy90", ["oldtoy90"]),
    ],
)
def test_ways_to_name_genes(cells, toy_model, given, names):
    delete_genes(cells, given, model=toy_model)
    assert cells.uns["gfx_delete"]["perturbations"].tolist() == names
    assert cells.obsm["gfx_delete"].shape == (24, len(names))
    together = names[0].count("+") + 1
    n_cells = np.asarray((cells[:, [GENE, OTHER][:together]].X > 0).sum(axis=1) == together).sum()
    assert 0 < cells.uns["gfx_delete"]["table"]["n_cells"].iloc[0] <= n_cells


def test_names_in_ids_and_symbols_are_the_same_deletion(cells, toy_model):
    delete_genes(cells, GENE, model=toy_model, key_added="symbol")
    delete_genes(cells, "ENSG00000000090", model=toy_model, key_added="id")
    np.testing.assert_array_equal(cells.obsm["symbol"], cells.obsm["id"])


WRONG = {
    "unknown": ("TOY900", ValueError, r"does not know \['TOY900'\]\. Did you mean 'TOY90'"),
    "unknown in a set": ([GENE, (OTHER, "GATA4")], ValueError, r"does not know \['GATA4'\].*vocabulary 'toy'"),
    "several unknown": (
        ["TOY900", GENE, (OTHER, "GATA4"), "TOY900", ("x", ...)],
        ValueError,
        r"does not know \['TOY900', 'GATA4', 'x'\]\. Did you mean 'TOY90'",
    ),
    "very many unknown": (
        [GENE, *(f"x{n}" for n in range(12))],
        ValueError,
        r"does not know \['x0', .*, 'x9'\] and 2 more\. Genes are given as symbols",
    ),
    "special token": ("<cls>", ValueError, "does not know"),
    "a number": ([GENE, 7], TypeError, "names, or tuples of names; found 7 of type int"),
    "a number in a set": ([(GENE, 7)], TypeError, "of type tuple"),
    "nothing": ([], ValueError, "`genes` is empty"),
    "empty set": ([GENE, ()], ValueError, "`genes` is empty"),
    "twice": ([GENE, OTHER, GENE], ValueError, f"'{GENE}' and '{GENE}' are the same perturbation"),
    "twice under two names": ([GENE, "ENSG00000000090"], ValueError, f"'ENSG00000000090' and '{GENE}' are the same"),
    "set in another order": ([(GENE, OTHER), (OTHER, GENE)], ValueError, "are the same perturbation; give it once"),
    "gene twice in a set": ([(GENE, "OLDTOY90")], ValueError, "A gene is named twice"),
    "every pair": (
        (..., ...),
        ValueError,
        r"has `\.\.\.` more than once; name the pairs, such as with itertools\.combin",
    ),
    "a gene and every gene": ([GENE, ...], ValueError, f"'{GENE}' and '{GENE}' are the same perturbation"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_genes_that_cannot_be_deleted(cells, toy_model, slots, wrong):
    genes, error, text = WRONG[wrong]
    before = slots(cells)
    with pytest.raises(error, match=text):
        delete_genes(cells, genes, model=toy_model)
    assert slots(cells) == before


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


def test_nothing_of_an_earlier_run_with_everything_stays(cells, toy_model, slots):
    fresh = cells.copy()
    arguments = {"model": toy_model, "groupby": "cell_type", "start": "a", "goal": "b"}
    delete_genes(cells, [GENE, (GENE, OTHER)], null=3, donor_key="donor", **arguments)
    everything = WITHOUT_CONTROLS | OF_STATES | OF_RANDOM_SETS | {"random_states", "donors", "donor_states", "synergy"}
    assert set(cells.uns["gfx_delete"]) == everything
    assert "gfx_delete_null" in cells.varm
    delete_genes(cells, GENE, model=toy_model)
    delete_genes(fresh, GENE, model=toy_model)
    assert slots(cells) == slots(fresh)


@pytest.mark.parametrize("kind", [int, bool, float])
def test_states_that_are_no_text(cells, toy_model, kind):
    cells.obs["sick"] = (cells.obs["condition"] == "sick").astype(kind)
    delete_genes(cells, GENE, model=toy_model, groupby="condition", start="sick", goal="healthy", key_added="x")
    delete_genes(cells, GENE, model=toy_model, groupby="sick", start=kind(1), goal=kind(0), key_added="y")
    np.testing.assert_array_equal(cells.obsm["y_states"], cells.obsm["x_states"])
    assert cells.uns["y"]["states"].tolist() == [str(kind(0)), str(kind(1))]


WITHOUT_CONTROLS = {"params", "perturbations", "ensembl_ids", "note", "table", "controls"}
OF_STATES = {"states", "state_table"}
OF_RANDOM_SETS = {"random_sets", "genes_of_all_ranks"}


def test_states_of_an_earlier_run_do_not_stay(cells, toy_model):
    delete_genes(cells, [GENE, OTHER], model=toy_model, groupby="cell_type", start="a", goal="b")
    delete_genes(cells, GENE, model=toy_model)
    assert "gfx_delete_states" not in cells.obsm
    assert set(cells.uns["gfx_delete"]) == WITHOUT_CONTROLS
    assert not {"groupby", "start", "goal", "centroids"} & set(cells.uns["gfx_delete"]["params"])
    assert cells.varm["gfx_delete"].shape == cells.varm["gfx_delete_n_cells"].shape == (cells.n_vars, 1)


# --- `...` ----------------------------------------------------------------------------------------------------------


def test_every_gene(cells, slow, any_model, slots):
    """`...` is every gene of the encodings, in the order of tokens; none that a cell has only behind the last read."""
    few = cells[:3].copy()
    every = sorted({token for row in slow.tokens(few) for token in row if slow.is_gene(token)})
    names = [str(slow.vocabulary.symbols[token]) for token in every]
    assert set(names) < set(few.var_names[np.asarray((few.X > 0).sum(axis=0)).ravel() > 0])
    by_name = few.copy()
    delete_genes(few, ..., model=any_model)
    delete_genes(by_name, names, model=any_model)
    assert few.uns["gfx_delete"]["perturbations"].tolist() == names
    assert slots(few) == slots(by_name)


@UNTESTED
def test_every_gene_of_the_start(cells, slow, any_model):
    """And of no other state."""
    few = cells[:3].copy()
    few.obs["state"] = ["start", "goal", "goal"]
    delete_genes(few, [...], model=any_model, groupby="state", start="start", goal="goal")
    in_start = sorted(token for token in slow.tokens(few)[0] if slow.is_gene(token))
    assert few.uns["gfx_delete"]["perturbations"].tolist() == slow.vocabulary.symbols[in_start].tolist()
    assert (few.uns["gfx_delete"]["table"]["n_cells"] == 1).all()


@pytest.mark.parametrize("given", [(GENE, ...), [(GENE, ...)], [(..., GENE)], [(GENE, ...), OTHER]])
def test_a_gene_with_every_other(cells, toy_model, given):
    has_both = np.asarray((cells[:, [GENE, OTHER]].X > 0).sum(axis=1)).ravel() == 2
    few = cells[[np.flatnonzero(has_both)[2]]].copy()
    by_name = few.copy()
    delete_genes(few, given, model=toy_model)
    gfx.pp.tokenize(by_name, model=toy_model, key_added="tokens")
    tokens = np.unique(by_name.obsm["tokens"])
    others = [name for name in toy_model.vocabulary.symbols[tokens[tokens > 3]] if name != GENE]
    pairs = [(GENE, name) for name in others] + ([OTHER] if OTHER in given else [])
    delete_genes(by_name, pairs, model=toy_model)
    assert few.uns["gfx_delete"]["perturbations"][: len(others)].tolist() == [f"{GENE}+{name}" for name in others]
    np.testing.assert_array_equal(few.obsm["gfx_delete"], by_name.obsm["gfx_delete"])
    np.testing.assert_array_equal(few.varm["gfx_delete"], by_name.varm["gfx_delete"])


@pytest.fixture
def shared_symbol(toy_model, tmp_path):
    """The toy model, in which the genes 21 and 48 are called TOY21, and gene 33 is called nothing."""
    vocabulary = toy_model.vocabulary
    symbols = vocabulary.symbols.copy()
    symbols[symbols == OTHER], symbols[symbols == "TOY33"] = "TOY21", ""
    folder = tmp_path / "shared"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((toy_model.folder / name).read_bytes())
    write_vocabulary(dataclasses.replace(vocabulary, symbols=symbols, name="shared"), folder)
    return gfx.models.load(folder)


def test_genes_that_share_a_symbol_have_their_ids_in_their_names(cells, toy_model, shared_symbol):
    n_of_three = np.asarray((cells[:, [OTHER, "TOY21", "TOY33"]].X > 0).sum(axis=1)).ravel()
    few = cells[np.argsort(-n_of_three, kind="stable")[:6]].copy()
    delete_genes(few, ..., model=toy_model, key_added="plain")
    names = {OTHER: "TOY21 (ENSG00000000048)", "TOY21": "TOY21 (ENSG00000000021)", "TOY33": "ENSG00000000033"}
    expected = [names.get(name, name) for name in few.uns["plain"]["perturbations"]]
    assert set(names.values()) < set(expected)
    gfx.pp.tokenize(few, model=shared_symbol, gene_ids="ensembl_id")
    delete_genes(few, ..., model=shared_symbol, key_added="x")
    assert few.uns["x"]["perturbations"].tolist() == expected
    assert few.uns["x"]["ensembl_ids"].tolist() == few.uns["plain"]["ensembl_ids"].tolist()
    np.testing.assert_array_equal(few.obsm["x"], few.obsm["plain"])
    one = few[[0]].copy()
    delete_genes(one, (GENE, ...), model=shared_symbol)
    there = np.array(expected)[~np.isnan(one.obsm["x"][0])]
    assert one.uns["gfx_delete"]["perturbations"].tolist() == [f"{GENE}+{name}" for name in there if name != GENE]
    # What the user gives is what it is called; random genes go by the same names.
    given = ["ENSG00000000048", "ENSG00000000021"]
    gfx.tl.delete_genes(few, given, model=shared_symbol, key_added="given")
    assert few.uns["given"]["perturbations"].tolist() == given
    random = set(few.uns["given"]["random_sets"]["genes"])
    assert random <= set(expected)


# --- genes and cells that are not there -----------------------------------------------------------------------------


def few_genes(cells):
    """Cell 0 has only the gene, cell 1 only both genes, no cell has TOY7."""
    counts = cells.X.toarray()
    gene, other = (cells.var_names.get_loc(name) for name in (GENE, OTHER))
    counts[:2] = 0
    counts[0, gene] = counts[1, gene] = counts[1, other] = 3
    counts[:, cells.var_names.get_loc("TOY7")] = 0
    cells.X = sparse.csr_matrix(counts)


def test_cells_of_nothing_but_the_deleted_genes(cells, any_model):
    few_genes(cells)
    delete_genes(cells, [GENE, (GENE, OTHER)], model=any_model)
    shift = cells.obsm["gfx_delete"]
    assert np.isnan(shift[0]).all()
    assert np.isnan(shift[1]).tolist() == [False, True]
    assert (~np.isnan(shift)).sum(axis=0).tolist() == cells.uns["gfx_delete"]["table"]["n_cells"].tolist()


@pytest.mark.parametrize("null", [None, 3])
def test_genes_of_no_cell(cells, toy_model, null):
    few_genes(cells)
    with pytest.warns(UserWarning, match=r"No cell has the genes of \['TOY7', 'TOY7\+TOY90'\]") as caught:
        gfx.tl.delete_genes(cells, ["TOY7", GENE, ("TOY7", GENE)], model=toy_model, null=null)
    assert caught[0].filename == __file__
    assert np.isnan(cells.obsm["gfx_delete"]).all(axis=0).tolist() == [True, False, True]
    assert np.isnan(cells.varm["gfx_delete"]).all(axis=0).tolist() == [True, False, True]
    table = cells.uns["gfx_delete"]["table"].set_index("perturbation")
    assert table["n_cells"].tolist()[::2] == [0, 0]
    missing = ["shift_mean", "shift_sd", "rank_mean", "random_mean", "z", "p", "shift_random_weights"]
    assert table.loc[["TOY7", "TOY7+TOY90"], missing].isna().all(axis=None)
    assert table["n_random"].tolist() == [0, null or 0, 0]


def test_many_genes_of_no_cell_are_not_all_named(cells, toy_model):
    cells.X = sparse.csr_matrix(cells.X.multiply(~cells.var_names.isin([f"TOY{n}" for n in range(1, 13)])))
    with pytest.warns(UserWarning, match=r"\['TOY1', .*'TOY9', 'TOY10', '\.\.\.'\] and others beside them"):
        delete_genes(cells, [GENE, *(f"TOY{n}" for n in range(1, 13))], model=toy_model)


@pytest.mark.parametrize("states", [{}, {"groupby": "condition", "start": "sick", "goal": "healthy"}])
def test_no_perturbation_in_any_cell(cells, toy_model, tmp_path, states):
    """All that is held against it is empty, and files take it."""
    few_genes(cells)
    with pytest.warns(UserWarning, match="has the genes of"):
        gfx.tl.delete_genes(cells, ["TOY7", ("TOY7", GENE)], model=toy_model, donor_key="donor", **states)
    result = cells.uns["gfx_delete"]
    assert result["random_sets"].empty
    assert result["donors"].empty
    assert "synergy" not in result
    assert result["controls"]["rank_trend"]["n"] == 200  # of genes that are there
    assert np.isnan(cells.varm["gfx_delete_null"]).all()
    assert gfx.get.deletion_df(cells)["donor_p"].isna().all()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert_nested_equal(ad.read_h5ad(tmp_path / "cells.h5ad").uns["gfx_delete"], result)


def test_genes_of_no_cell_of_the_start(cells, toy_model):
    counts = cells.X.toarray()
    counts[np.ix_(cells.obs["condition"] == "sick", cells.var_names == GENE)] = 0
    cells.X = sparse.csr_matrix(counts)
    with pytest.warns(UserWarning, match=rf"No cell of the state 'sick' has the genes of \['{GENE}'\]"):
        delete_genes(cells, GENE, model=toy_model, groupby="condition", start="sick", goal="healthy")
    assert np.isnan(cells.obsm["gfx_delete_states"]).all()
    assert cells.uns["gfx_delete"]["state_table"]["n_cells"].tolist() == [0, 0]


def test_genes_outside_the_object_move_cells_too(cells, toy_model):
    """Tokens hold genes that were since left out of the object: they are deleted all the same."""
    gfx.pp.tokenize(cells, model=toy_model)
    delete_genes(cells, GENE, model=toy_model)
    part = cells[:, [name for name in cells.var_names if name != GENE][:50]].copy()
    delete_genes(part, GENE, model=toy_model, key_added="again")
    np.testing.assert_array_equal(part.obsm["again"], cells.obsm["gfx_delete"])
    np.testing.assert_array_equal(part.varm["again"], part.varm["gfx_delete"])


# --- donors ---------------------------------------------------------------------------------------------------------


def test_means_of_donors(cells, toy_model):
    """Without random sets there is no excess over them."""
    arguments = {"groupby": "cell_type", "start": "a", "goal": "b"}
    delete_genes(cells, [GENE, (GENE, OTHER)], model=toy_model, donor_key="donor", key_added="plain")
    delete_genes(cells, [GENE, (GENE, OTHER)], model=toy_model, donor_key="donor", key_added="x", **arguments)
    assert "donor_states" not in cells.uns["plain"]
    assert cells.uns["x"]["params"]["donor_key"] == "donor"
    for key, states in (("plain", []), ("x", ["a", "b", "c"])):
        found = cells.uns[key]["donors"].set_index(["perturbation", "donor"])
        assert len(found) > 4
        assert found["shift_excess"].isna().all()
        for at, name in enumerate([GENE, f"{GENE}+{OTHER}"]):
            by_donor = pd.Series(cells.obsm[key][:, at].astype(float), cells.obs["donor"]).dropna()
            by_donor = by_donor.groupby(level=0, observed=True)
            np.testing.assert_array_equal(found.loc[name, "n_cells"], by_donor.size())
            np.testing.assert_allclose(found.loc[name, "shift_mean"], by_donor.mean())
            for number, state in enumerate(states):
                toward = pd.Series(cells.obsm["x_states"][:, at, number].astype(float), cells.obs["donor"]).dropna()
                mine = cells.uns["x"]["donor_states"].query(f"perturbation == '{name}' and state == '{state}'")
                means = toward.groupby(level=0, observed=True).mean()
                np.testing.assert_array_equal(mine["donor"], means.index)
                np.testing.assert_allclose(mine["toward_mean"], means)
                assert mine["toward_excess"].isna().all()
    assert len(cells.uns["x"]["donor_states"]) == 3 * len(cells.uns["x"]["donors"])


def test_donors_that_are_numbers_are_names(cells, toy_model):
    cells.obs["number"] = cells.obs["donor"].astype(str).str[1:].astype(int)
    delete_genes(cells, GENE, model=toy_model, donor_key="number", key_added="x")
    delete_genes(cells, GENE, model=toy_model, donor_key="donor", key_added="y")
    assert cells.uns["x"]["donors"]["donor"].tolist() == ["1", "2", "3", "4"]
    np.testing.assert_array_equal(cells.uns["x"]["donors"]["shift_mean"], cells.uns["y"]["donors"]["shift_mean"])


BESIDE = "p and fdr compare with random sets of genes of neighbouring rank"
NOTHING = "and nothing else was run to compare with: no p-value is given."
NOTES = {
    "alone": ({}, f", {NOTHING}"),
    "donors": ({"donor_key": "donor"}, f", {NOTHING}"),
    "null": ({"null": 3}, f": {BESIDE}; name the donors with `donor_key=` for tests over them, too."),
    "null and donors": ({"null": 3, "donor_key": "donor"}, f": {BESIDE}, donor_p with these and over 4 donors."),
    "one donor of the start": (
        {"null": 3, "donor_key": "of_start", "groupby": "cell_type", "start": "a", "goal": "b"},
        f": {BESIDE}, donor_p with these and over 1 donor.",
    ),
}


@pytest.mark.parametrize("note", NOTES)
def test_what_the_p_values_are_over(cells, toy_model, caplog, note):
    arguments, text = NOTES[note]
    cells.obs["of_start"] = np.where(cells.obs["cell_type"] == "a", "one", cells.obs["donor"].astype(str))
    with caplog.at_level(logging.INFO, logger="gfx"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Whether 'a' and 'b' can be told apart could not be tested")
        delete_genes(cells, GENE, model=toy_model, **arguments)
    assert cells.uns["gfx_delete"]["note"] == f"Cells are not replicates{text}"
    assert f". Cells are not replicates{text}" in caplog.messages[-1]


# --- against random sets --------------------------------------------------------------------------------------------

PERTURBED = {GENE: (GENE,), f"{GENE}+{OTHER}": (GENE, OTHER)}
WITH_STATES = {"groupby": "condition", "start": "sick", "goal": "healthy"}


def place(slow, row, name):
    wanted = token(slow, name)
    return row.index(wanted) if wanted in row else None


def fitting(slow, rows, mine, others, perturbed):
    """Cells in which each gene of a random set stands within ten ranks of the perturbed one."""

    def near(row, gene, other):
        return place(slow, row, other) is not None and abs(place(slow, row, other) - place(slow, row, gene)) <= 10

    return [at for at in np.flatnonzero(perturbed) if all(map(partial(near, rows[at]), mine, others))]


class Controlled:
    """A run on so few cells that every random set is perturbed in each cell that it fits, and the same by hand."""

    def __init__(self, adata, model, slow, **arguments):
        self.adata, self.slow = adata, slow
        gfx.tl.delete_genes(adata, list(PERTURBED.values()), model=model, null=12, donor_key="donor", **arguments)
        self.result = adata.uns["gfx_delete"]
        self.rows = slow.tokens(adata)
        self.table = self.result["random_sets"]
        sets = {frozenset(genes.split("+")): tuple(genes.split("+")) for genes in self.table["genes"]}
        by_hand = adata.copy()
        delete_genes(by_hand, list(sets.values()), model=model, key_added="by_hand", **arguments)
        column = {key: at for at, key in enumerate(sets)}
        #: Each set: the perturbation's number, its genes, cells, and the shifts and movements of these.
        self.runs = []
        for name, genes in zip(self.table["perturbation"], self.table["genes"].str.split("+"), strict=True):
            number, at = list(PERTURBED).index(name), column[frozenset(genes)]
            perturbed = ~np.isnan(adata.obsm["gfx_delete"][:, number])
            cells = fitting(slow, self.rows, PERTURBED[name], genes, perturbed)
            moved = [by_hand.obsm["by_hand"][cells, at]]
            if arguments:
                moved += [*by_hand.obsm["by_hand_states"][cells, at].T]
            self.runs.append((number, genes, cells, moved))

    def rank(self, row, genes):
        specials = 2 * self.slow.vocabulary.has_cls
        places = np.array([place(self.slow, self.rows[row], gene) for gene in genes]) - specials / 2
        return places.mean() / (len(self.rows[row]) - specials - 1)


@pytest.fixture(scope="module", params=[{}, WITH_STATES], ids=["plain", "states"])
def controlled(request, toy_cells, any_model, slow):
    adata = toy_cells(16 if request.param else 8)
    return Controlled(adata, any_model, slow, **request.param)


def test_random_sets_are_what_deleting_them_gives(controlled):
    table = controlled.table
    assert table["perturbation"].tolist() == [name for name in PERTURBED for _ in range(12)]
    for at, (number, genes, cells, moved) in enumerate(controlled.runs):
        assert table["n_cells"][at] == len(cells) > 0
        assert not set(genes) & set(list(PERTURBED.values())[number])
        assert table["rank_mean"][at] == pytest.approx(
            np.mean([controlled.rank(row, genes) for row in cells]), abs=1e-6
        )
        assert table["shift_mean"][at] == pytest.approx(moved[0].mean(), abs=1e-6)
        own = controlled.adata.obsm["gfx_delete"][cells, number]
        assert table["difference"][at] == pytest.approx((moved[0] - own).mean(), abs=1e-6)
        if "random_states" in controlled.result:
            states = controlled.result["random_states"]
            for state, values in zip(controlled.result["states"], moved[1:], strict=True):
                row = states[states["state"] == state].iloc[at]
                column = controlled.result["states"].tolist().index(state)
                own = controlled.adata.obsm["gfx_delete_states"][cells, number, column]
                assert row["toward_mean"] == pytest.approx(values.mean(), abs=1e-6)
                assert row["toward_difference"] == pytest.approx((values - own).mean(), abs=1e-6)
    assert table["difference"].abs().max() > 1e-3
    for _, sets in table.groupby("perturbation"):
        assert sets["genes"].is_unique


def slow_z(differences):
    """Of the perturbation among its random sets, and of each of these among the others."""
    z = -differences.mean() / differences.std(ddof=1)
    others = [np.delete(differences, at) for at in range(len(differences))]
    each = [(one - rest.mean()) / rest.std(ddof=1) for one, rest in zip(differences, others, strict=True)]
    return z, np.array(each)


def assert_beside(row, sets, differences, effect, prefix=""):
    """`sets` are the random sets of the perturbation, and no other is of its size."""
    z, each = slow_z(differences)
    above, below = (each >= z).sum(), (each <= z).sum()
    assert row[f"{prefix}n_random"] == len(differences) == 12
    assert row[f"{prefix}random_n_cells"] == np.median(sets["n_cells"])
    assert row[f"{prefix}random_mean"] == pytest.approx(effect + differences.mean())
    assert row[f"{prefix}random_sd"] == pytest.approx(differences.std(ddof=1))
    assert row[f"{prefix}z"] == pytest.approx(z)
    assert row[f"{prefix}p"] == pytest.approx(min(1, 2 * (1 + min(above, below)) / 13))


def test_place_among_random_sets(controlled):
    for _, row in controlled.result["table"].iterrows():
        sets = controlled.table[controlled.table["perturbation"] == row["perturbation"]]
        assert_beside(row, sets, sets["difference"].to_numpy(), row["shift_mean"])
    for _, row in controlled.result.get("state_table", pd.DataFrame()).iterrows():
        sets = controlled.table[controlled.table["perturbation"] == row["perturbation"]]
        states = controlled.result["random_states"]
        mine = (states["perturbation"] == row["perturbation"]) & (states["state"] == row["state"])
        differences = states.loc[mine, "toward_difference"].to_numpy()
        assert_beside(row, sets, differences, row["toward_mean"], "toward_")


def test_p_is_pooled_over_perturbations_of_one_size(cells, toy_model):
    genes = [GENE, OTHER, "TOY21", "TOY165", (GENE, OTHER), (GENE, "TOY21")]
    gfx.tl.delete_genes(cells, genes, model=toy_model, null=8, **WITH_STATES)
    result, sizes = cells.uns["gfx_delete"], np.array([1, 1, 1, 1, 2, 2])

    def expected(sets, column):
        found = [slow_z(of[column].to_numpy()) for _, of in sets.groupby("perturbation", sort=False)]
        for (z, _), size in zip(found, sizes, strict=True):
            pool = np.concatenate([each for (_, each), other in zip(found, sizes, strict=True) if other == size])
            yield min(1, 2 * (1 + min((pool >= z).sum(), (pool <= z).sum())) / (len(pool) + 1))

    np.testing.assert_allclose(result["table"]["p"], [*expected(result["random_sets"], "difference")])
    for state in ("healthy", "sick"):
        of_state = result["state_table"].query(f"state == '{state}'")
        sets = result["random_states"].query(f"state == '{state}'")
        np.testing.assert_allclose(of_state["toward_p"], [*expected(sets, "toward_difference")])


def test_excess_over_random_sets_by_donor(controlled):
    donor = controlled.adata.obs["donor"].astype(str).to_numpy()

    def excess(mine, number, own, which):
        for _, row in mine.iterrows():
            pairs = [
                own[cell] - value
                for at, _, cells, moved in controlled.runs
                for cell, value in zip(cells, moved[which], strict=True)
                if at == number and donor[cell] == row["donor"]
            ]
            yield np.mean(pairs) if pairs else np.nan

    donors = controlled.result["donors"]
    for number, name in enumerate(PERTURBED):
        mine = donors[donors["perturbation"] == name]
        expected = [*excess(mine, number, controlled.adata.obsm["gfx_delete"][:, number], 0)]
        np.testing.assert_allclose(mine["shift_excess"], expected, atol=1e-6)
        assert np.isfinite(expected).sum() >= 2
        for at, state in enumerate(controlled.result.get("states", [])):
            states = controlled.result["donor_states"]
            mine = states[(states["perturbation"] == name) & (states["state"] == state)]
            expected = [*excess(mine, number, controlled.adata.obsm["gfx_delete_states"][:, number, at], at + 1)]
            np.testing.assert_allclose(mine["toward_excess"], expected, atol=1e-6)


def test_other_genes_when_random_sets_are_deleted(controlled):
    slow, how = controlled.slow, default_pooling(controlled.slow)
    for number in range(2):
        shifts = {}
        for at, genes, cells, _ in controlled.runs:
            if at == number:
                rows = [row if place in cells else [] for place, row in enumerate(controlled.rows)]
                for effect in slow_deletions(slow, rows, genes, how).values():
                    for name, value in effect.genes.items():
                        shifts.setdefault(name, []).append(value)
        runs = [shifts.get(name, []) for name in controlled.adata.var_names]
        assert {0, 4, 5} <= set(map(len, runs))
        # The mean of fewer than five runs says little.
        expected = [np.mean(values) if len(values) >= 5 else np.nan for values in runs]
        np.testing.assert_allclose(controlled.adata.varm["gfx_delete_null"][:, number], expected, atol=1e-5)


def test_states_without_the_deleted_genes_have_no_z(cells, toy_model, slots):
    """Means of states without a gene are not the means that random genes would be held against."""
    arguments = {"model": toy_model, "null": 5, "donor_key": "donor", **WITH_STATES}
    gfx.tl.delete_genes(cells, [GENE, OTHER], centroids="without", key_added="x", **arguments)
    gfx.tl.delete_genes(cells, [GENE, OTHER], key_added="whole", **arguments)
    result, whole = cells.uns["x"], cells.uns["whole"]
    states = result["state_table"]
    missing = ["toward_random_mean", "toward_random_sd", "toward_random_n_cells", "toward_z", "toward_p"]
    assert states[missing].isna().all(axis=None)
    assert (states["toward_n_random"] == 0).all()
    assert states["toward_mean"].notna().all()
    assert (whole["state_table"]["toward_n_random"] == 5).all()
    assert whole["state_table"][missing].notna().all(axis=None)
    assert result["random_states"][["toward_mean", "toward_difference"]].isna().all(axis=None)
    assert result["donor_states"]["toward_excess"].isna().all()
    # The shift does not look at states.
    for table in ("table", "random_sets", "donors"):
        pd.testing.assert_frame_equal(result[table], whole[table])
    assert result["table"]["z"].notna().all()
    shown = gfx.get.deletion_df(cells, key="x", min_cells=1)
    assert shown[["toward_z", "toward_p", "toward_fdr", "donor_mean", "donor_p"]].isna().all(axis=None)
    assert (shown["n_donors"] == 0).all()
    assert shown["z"].notna().all()
    of_goal = shown.loc[shown["role"] == "goal", "toward_mean"]
    assert of_goal.is_monotonic_decreasing  # no z to sort by


@pytest.mark.parametrize("null", [3, np.int64(7)])
def test_a_number_of_random_sets(cells, toy_model, null):
    gfx.tl.delete_genes(cells, [GENE, OTHER], model=toy_model, null=null)
    assert cells.uns["gfx_delete"]["table"]["n_random"].tolist() == [null, null]
    assert (cells.uns["gfx_delete"]["random_sets"]["n_cells"] <= 8).all()
    assert cells.uns["gfx_delete"]["params"]["null"] == null


def test_rank_is_a_hundred_sets(cells, toy_model):
    gfx.tl.delete_genes(cells, GENE, model=toy_model)
    assert len(cells.uns["gfx_delete"]["random_sets"]) == 100
    assert cells.uns["gfx_delete"]["params"]["null"] == "rank"


@pytest.mark.parametrize("states", [{}, WITH_STATES], ids=["plain", "states"])
def test_random_genes_do_not_stand_out(toy_cells, toy_model, states):
    """Nor over donors."""
    adata = toy_cells(60)
    start = (adata.obs["condition"] == "sick").to_numpy()
    often = np.asarray((adata[start, :200].X > 0).sum(axis=0)).ravel() >= 14
    genes = np.random.default_rng(1).choice(adata.var_names[:200][often], 40, replace=False)
    gfx.tl.delete_genes(adata, genes, model=toy_model, null=20, donor_key="donor", **states)
    table = gfx.get.deletion_df(adata, min_cells=5)
    prefix = "toward_" if states else ""
    if states:
        table = table[table["role"] == "goal"]
    most = stats.binom.ppf(0.999, 40, [0.05, 0.2])
    for p in (f"{prefix}p", "donor_p"):
        assert table[p].notna().all()
        assert (table[p] <= 0.05).sum() <= most[0]
        assert (table[p] <= 0.2).sum() <= most[1]
    assert abs(table[f"{prefix}z"].mean()) < 0.5


def changed(model, folder, change):
    """The model with other weights, in a folder of its own."""
    network = BertForMaskedLM.from_pretrained(model.folder)
    with torch.no_grad():
        change(network)
    network.save_pretrained(folder)
    write_vocabulary(model.vocabulary, folder)
    return gfx.models.load(folder)


def test_a_gene_that_matters_stands_out(cells, toy_model, tmp_path):
    """In a model for which all genes are nearly the same, but for one."""

    planted = int(toy_model.vocabulary.resolve([GENE])[0])

    def level(network):
        words = network.bert.embeddings.word_embeddings.weight
        kept = words[planted].clone()
        words *= 0.01
        words[planted] = kept
        network.bert.embeddings.position_embeddings.weight *= 0.01

    model = changed(toy_model, tmp_path / "level", level)
    gfx.tl.delete_genes(cells, [GENE, OTHER], model=model, null=19, donor_key="donor")
    first, plain = gfx.get.deletion_df(cells).itertuples()
    assert first.perturbation == GENE
    assert first.z > 5
    # 19 random genes beside each of the two; beside the other one the gene itself may be one of them.
    itself = (cells.uns["gfx_delete"]["random_sets"]["genes"] == GENE).sum()
    assert itself <= 1
    assert first.p == pytest.approx(2 * (1 + itself) / 39)
    assert abs(plain.z) < 2
    assert first.donor_p < 0.001
    assert plain.donor_p > 0.05


# --- a random network, and genes of all ranks -----------------------------------------------------------------------


@pytest.mark.parametrize(("hidden_layer", "states"), [(-2, {}), (-1, {}), (-2, WITH_STATES)])
def test_the_random_network(cells, toy_model, tmp_path, hidden_layer, states):
    """Its shifts are those of a model of the same shape whose weights were drawn with the seed that is told."""
    genes = [GENE, OTHER, "TOY21", (GENE, OTHER)]
    gfx.tl.delete_genes(cells, genes, model=toy_model, null=3, hidden_layer=hidden_layer, **states)
    controls = cells.uns["gfx_delete"]["controls"]
    n_blocks = 3 if hidden_layer == -1 else 2

    def draw(network):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(controls["random_weights_seed"])
            config = BertConfig.from_pretrained(toy_model.folder, num_hidden_layers=n_blocks)
            drawn = BertModel(config, add_pooling_layer=False)
        network.bert.embeddings.load_state_dict(drawn.embeddings.state_dict())
        for block, new in zip(network.bert.encoder.layer, drawn.encoder.layer, strict=False):
            block.load_state_dict(new.state_dict())

    twin = changed(toy_model, tmp_path / "twin", draw)
    delete_genes(cells, genes, model=twin, hidden_layer=hidden_layer, key_added="twin", **states)
    table, expected = cells.uns["gfx_delete"]["table"], cells.uns["twin"]["table"]
    np.testing.assert_allclose(table["shift_random_weights"], expected["shift_mean"], atol=1e-6)
    assert abs(table["shift_random_weights"] / table["shift_mean"] - 1).min() > 0.01
    assert ("random_weights, toward goal" in controls) == bool(states)
    # Agreement is asked of single genes alone: the pair is not what most of the perturbations are.
    agreement = stats.spearmanr(table["shift_mean"][:-1], expected["shift_mean"][:-1]).statistic
    sample = cells.uns["gfx_delete"]["genes_of_all_ranks"]
    assert controls["random_weights, shift"] == pytest.approx(
        {
            "spearman": stats.spearmanr(sample["shift"], sample["shift_random_weights"]).statistic,
            "n": 200,
            "spearman_perturbations": agreement,
            "n_perturbations": 3,
        }
    )
    if states:
        moved = [
            cells.uns[key]["state_table"].query("role == 'goal'")["toward_mean"].to_numpy()[:-1]
            for key in ("gfx_delete", "twin")
        ]
        assert controls["random_weights, toward goal"] == pytest.approx(
            {
                "spearman": stats.spearmanr(sample["toward_goal"], sample["toward_goal_random_weights"]).statistic,
                "n": 200,
                "spearman_perturbations": stats.spearmanr(*moved).statistic,
                "n_perturbations": 3,
            }
        )
        # A random gene in the twin moves a cell as far towards the twin's mean of the goal as when deleted there.
        delete_genes(cells, ..., model=twin, hidden_layer=hidden_layer, key_added="every", **states)
        by_hand = cells.obsm["every_states"][..., cells.uns["every"]["states"].tolist().index("healthy")]
        by_hand = by_hand[~np.isnan(by_hand)]
        distance = abs(sample["toward_goal_random_weights"].to_numpy()[:, None] - by_hand).min(axis=1)
        assert distance.max() < 1e-6
        assert np.std(by_hand) > 1e-4


def test_the_users_random_numbers_stay_as_they_are(cells, toy_model):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    gfx.tl.delete_genes(cells, GENE, model=toy_model, null=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_genes_of_all_ranks(cells, toy_model):
    """In one cell, a rank says which gene it was."""
    one = cells[[1]].copy()
    gfx.tl.delete_genes(one, GENE, model=toy_model, null=3)
    sample, controls = one.uns["gfx_delete"]["genes_of_all_ranks"], one.uns["gfx_delete"]["controls"]
    assert len(sample) == 200
    gfx.pp.tokenize(one, model=toy_model)
    tokens = one.obsm["gfx_tokens"][0]
    tokens = tokens[tokens > 3]
    delete_genes(one, toy_model.vocabulary.symbols[tokens].tolist(), model=toy_model, key_added="every")
    at = np.rint(sample["rank"] * (len(tokens) - 1)).astype(int)
    np.testing.assert_allclose(sample["rank"], at / (len(tokens) - 1), atol=1e-6)
    np.testing.assert_allclose(sample["shift"], one.obsm["every"][0, at], atol=1e-6)
    assert len(set(at)) > len(tokens) / 2
    assert {0, len(tokens) - 1} & set(at)
    for column, name in (("shift", "rank_trend"), ("shift_random_weights", "rank_trend_random_weights")):
        line = stats.linregress(sample["rank"], np.log(sample[column]))
        left = np.log(sample[column]) - line.intercept - line.slope * sample["rank"]
        expected = {
            "spearman": stats.spearmanr(sample["rank"], sample[column]).statistic,
            "slope": line.slope,
            "intercept": line.intercept,
            "sd": np.sqrt((left**2).sum() / 198),
            "n": 200,
        }
        assert controls[name] == pytest.approx(expected, rel=1e-4)


@UNTESTED
def test_genes_of_all_ranks_are_those_of_the_start(cells, toy_model):
    """Deleting them gives, in the cells of the start, these shifts."""
    few = cells[:3].copy()
    few.obs["state"] = ["start", "goal", "goal"]
    gfx.tl.delete_genes(few, GENE, model=toy_model, null=3, groupby="state", start="start", goal="goal")
    delete_genes(few, ..., model=toy_model, groupby="state", start="start", goal="goal", key_added="every")
    shifts = few.obsm["every"][0]
    distance = abs(few.uns["gfx_delete"]["genes_of_all_ranks"]["shift"].to_numpy()[:, None] - shifts).min(axis=1)
    assert distance.max() < 1e-6


# --- what is known without a model ----------------------------------------------------------------------------------


def test_detection_expression_and_rank(cells, toy_model):
    gfx.tl.delete_genes(cells, [GENE, OTHER, (GENE, OTHER)], model=toy_model, null=3)
    gfx.pp.tokenize(cells, model=toy_model)
    ids = cells.obsm["gfx_tokens"]
    detection = {name: (ids == at).any(axis=1).mean() for at, name in enumerate(toy_model.vocabulary.symbols) if name}
    logs = np.log1p(cells.X.toarray() / cells.X.toarray().sum(axis=1, keepdims=True) * 1e4).mean(axis=0)
    expression = dict(zip(cells.var_names, logs, strict=True))
    result = cells.uns["gfx_delete"]
    table = result["table"].set_index("perturbation")
    for name, row in table.iterrows():
        assert row["detection"] == pytest.approx(np.mean([detection[gene] for gene in name.split("+")]))
        assert row["expression_mean"] == pytest.approx(
            np.mean([expression[gene] for gene in name.split("+")]), rel=1e-6
        )
    assert table["logfc"].isna().all()
    # How far each of them ranks genes as the model does: random genes of all ranks.
    of_genes = genes_of_all_ranks(cells, toy_model)
    ranks = {
        name: np.mean([(list(row).index(at) - 1) / ((row > 0).sum() - 3) for row in ids if at in row])
        for at, name in enumerate(toy_model.vocabulary.symbols)
        if name and (ids == at).any()
    }
    found = result["controls"]["baselines"].set_index("baseline")
    assert found.index.tolist() == ["detection", "expression", "rank"]
    assert set(found["effect"]) == {"shift"}
    assert (found["n"] == 200).all()
    shifts = result["genes_of_all_ranks"]["shift"]
    columns = pd.DataFrame({"detection": detection, "expression": expression, "rank": ranks}).loc[of_genes]
    for name in columns:
        assert found["spearman"][name] == pytest.approx(stats.spearmanr(shifts, columns[name]).statistic, abs=1e-6)
        inverse = np.linalg.inv(
            np.corrcoef(stats.rankdata([shifts, columns[name], *columns.drop(columns=name).T.to_numpy()], axis=1))
        )
        partial_correlation = -inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1])
        assert found["partial_spearman"][name] == pytest.approx(partial_correlation, abs=1e-6)


def genes_of_all_ranks(cells, model, **states):
    """Names of the random genes, found by what deleting each gene in each cell does."""
    sample = cells.uns["gfx_delete"]["genes_of_all_ranks"]
    every = delete_genes(cells, ..., model=model, key_added="every", copy=True, **states)
    shifts = every.obsm["every"]
    cell, gene = np.nonzero(~np.isnan(shifts))
    apart = abs(sample["shift"].to_numpy()[:, None] - shifts[cell, gene])
    assert apart.min(axis=1).max() < 1e-6
    found = np.array(every.uns["every"]["perturbations"])[gene[apart.argmin(axis=1)]]
    assert len(set(found)) > 40
    return found


def test_without_random_genes_baselines_are_beside_the_perturbations(cells, toy_model):
    """Single genes alone; of fewer than ten, nothing is told."""
    often = np.asarray((cells[cells.obs["condition"] == "sick", :200].X > 0).sum(axis=0)).ravel() >= 5
    genes = cells.var_names[:200][often][::3][:12].tolist()
    delete_genes(cells, [*genes, (GENE, OTHER)], model=toy_model, **WITH_STATES)
    result = cells.uns["gfx_delete"]
    table = result["table"][:-1]
    assert (table["n_cells"] > 0).sum() == 12
    toward = result["state_table"].query("role == 'goal'")["toward_mean"].to_numpy()[:-1]
    found = result["controls"]["baselines"].set_index(["effect", "baseline"])
    for effect, values in {"shift": table["shift_mean"], "toward goal": toward}.items():
        for baseline, column in (("detection", "detection"), ("expression", "expression_mean"), ("logfc", "logfc")):
            row = found.loc[effect, baseline]
            there = np.isfinite(values) & np.isfinite(table[column])
            assert row["n"] == there.sum()
            expected = stats.spearmanr(np.asarray(values)[there], table[column][there]).statistic
            assert row["spearman"] == pytest.approx(expected)
    delete_genes(cells, [*genes[:9], (GENE, OTHER)], model=toy_model)
    few = cells.uns["gfx_delete"]["controls"]["baselines"]
    assert few["baseline"].tolist() == ["detection", "expression", "rank"]
    assert (few["n"] <= 9).all()
    assert few[["spearman", "partial_spearman"]].isna().all(axis=None)


def test_fold_change_is_that_of_scanpy(cells, toy_model):
    gfx.tl.delete_genes(cells, [GENE, OTHER, (GENE, OTHER)], model=toy_model, null=3, **WITH_STATES)
    with_states = cells.uns["gfx_delete"]
    logs = ad.AnnData(cells.X.copy(), obs=cells.obs, var=cells.var)
    sc.pp.normalize_total(logs, target_sum=1e4)
    sc.pp.log1p(logs)
    sc.tl.rank_genes_groups(logs, "condition", groups=["healthy"], reference="sick", method="t-test")
    fold = sc.get.rank_genes_groups_df(logs, "healthy").set_index("names")["logfoldchanges"]
    expected = [fold[GENE], fold[OTHER], (fold[GENE] + fold[OTHER]) / 2]
    np.testing.assert_allclose(with_states["table"]["logfc"], expected, rtol=1e-4)
    # Detection and expression are those of the cells that are perturbed.
    start = cells[cells.obs["condition"] == "sick"].copy()
    delete_genes(start, [GENE, OTHER, (GENE, OTHER)], model=toy_model)
    for column in ("detection", "expression_mean"):
        np.testing.assert_allclose(with_states["table"][column], start.uns["gfx_delete"]["table"][column])
    baselines = with_states["controls"]["baselines"]
    assert baselines["effect"].unique().tolist() == ["shift", "toward goal"]
    assert baselines["baseline"].tolist() == ["detection", "expression", "rank", "logfc"] * 2
    sample = with_states["genes_of_all_ranks"]
    of_genes = fold[genes_of_all_ranks(cells, toy_model, **WITH_STATES)]
    for effect in ("shift", "toward goal"):
        found = baselines.query(f"effect == '{effect}' and baseline == 'logfc'").iloc[0]
        # Ties of the fold change by scanpy's float32 and ours need not be the same.
        expected = stats.spearmanr(sample[effect.replace(" ", "_")], of_genes).statistic
        assert found["spearman"] == pytest.approx(expected, abs=1e-6)
        assert found["n"] == 200


def test_states_of_one_cell_have_no_fold_change(cells, toy_model):
    cells.obs["state"] = ["one", *["rest"] * 23]
    with pytest.warns(UserWarning, match=r"Whether 'rest' and 'one' can be told apart could not be tested: no cells"):
        delete_genes(cells, GENE, model=toy_model, groupby="state", start="rest", goal="one")
    table = cells.uns["gfx_delete"]["table"]
    assert table["logfc"].isna().all()
    assert table["expression_mean"].notna().all()
    assert np.isnan(cells.uns["gfx_delete"]["controls"]["state_axis"]["auc"])


def normalised(adata):
    gfx.pp.tokenize(adata, model=TOKENIZED["model"])
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)


def layer_gone(adata):
    gfx.pp.tokenize(adata, model=TOKENIZED["model"], layer="doubled")
    del adata.layers["doubled"]


def emptied(adata):
    gfx.pp.tokenize(adata, model=TOKENIZED["model"])
    adata.X = None


def raw_gone(adata):
    gfx.pp.tokenize(adata, model=TOKENIZED["model"], use_raw=True)
    adata.raw = None


TOKENIZED = {}


@pytest.mark.parametrize("spoil", [normalised, layer_gone, emptied, raw_gone])
def test_counts_that_are_gone_cost_the_baseline_alone(cells, toy_model, caplog, spoil):
    expected = cells.copy()
    gfx.tl.delete_genes(expected, GENE, model=toy_model, null=3)
    TOKENIZED["model"] = toy_model
    spoil(cells)
    with caplog.at_level(logging.INFO, logger="gfx"):
        gfx.tl.delete_genes(cells, GENE, model=toy_model, null=3)
    assert "Expression is not among the baselines, for the counts are not at hand: " in caplog.text
    for table in ("table", "random_sets"):
        found = cells.uns["gfx_delete"][table].drop(columns="expression_mean", errors="ignore")
        wanted = expected.uns["gfx_delete"][table].drop(columns="expression_mean", errors="ignore")
        pd.testing.assert_frame_equal(found, wanted)
    assert cells.uns["gfx_delete"]["table"]["expression_mean"].isna().all()
    assert cells.uns["gfx_delete"]["controls"]["baselines"]["baseline"].tolist() == ["detection", "rank"]


def test_bugs_are_not_taken_for_counts_that_are_gone(cells, toy_model, slots, monkeypatch):
    """What is wrong in scanpy, or in our call of it, is said."""

    def broken(*_args, **_kwargs):
        msg = "scanpy has changed"
        raise ValueError(msg)

    monkeypatch.setattr(sc.tl, "rank_genes_groups", broken)
    before = slots(cells)
    with pytest.raises(ValueError, match="scanpy has changed"):
        delete_genes(cells, GENE, model=toy_model, **WITH_STATES)
    assert slots(cells) == before


# --- states that can be told apart ----------------------------------------------------------------------------------


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
def test_states_that_are_apart_raise_no_doubt(separated, two_kinds, donors):
    delete_genes(separated, "TOY1", model=two_kinds, groupby="state", start="x", goal="y", **donors)
    axis = separated.uns["gfx_delete"]["controls"]["state_axis"]
    assert axis["auc"] > 0.95
    assert axis["n_folds"] == 5
    assert axis["held_out"] == ("donors" if donors else "cells")


def test_states_by_lot_are_doubted(separated, two_kinds):
    with pytest.warns(
        UserWarning, match=r"Held-out cells of 'x' and 'y' can hardly be told apart.*\(AUC 0\.[0-5]\d; chance is 0\.5\)"
    ) as caught:
        delete_genes(separated, "TOY1", model=two_kinds, groupby="by lot", start="x", goal="y")
    assert caught[0].filename == __file__
    assert len(caught) == 1
    assert separated.uns["gfx_delete"]["controls"]["state_axis"]["auc"] < 0.6


@pytest.mark.parametrize("of", ["state", "state and lot"])
def test_states_of_other_donors_are_doubted(separated, two_kinds, of):
    """Each donor, or all but one of a state, would have to be held out: nothing says that states are no donors."""
    separated.obs["state and lot"] = separated.obs["state"].where(separated.obs["state"] == "x", separated.obs["donor"])
    with pytest.warns(
        UserWarning,
        match="Whether 'x' and 'y' can be told apart could not be tested: no donors can be held out with some of both "
        "states left on either side.*may be a difference of donors",
    ) as caught:
        delete_genes(separated, "TOY1", model=two_kinds, groupby="state", start="x", goal="y", donor_key=of)
    assert caught[0].filename == __file__
    assert len(caught) == 1
    axis = separated.uns["gfx_delete"]["controls"]["state_axis"]
    assert np.isnan(axis["auc"])
    assert (axis["n_folds"], axis["held_out"]) == (0, "donors")


def test_a_warning_that_is_an_error_leaves_the_object_as_it_was(separated, two_kinds, slots):
    before = slots(separated)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Held-out cells"):
            delete_genes(separated, "TOY1", model=two_kinds, groupby="by lot", start="x", goal="y")
    assert slots(separated) == before


# --- random numbers -------------------------------------------------------------------------------------------------


def test_what_is_drawn_follows_the_seed(cells, toy_model, slots):
    def run(rng):
        adata = cells.copy()
        gfx.tl.delete_genes(adata, [GENE, (GENE, OTHER)], model=toy_model, null=3, rng=rng, **WITH_STATES)
        return adata

    first, again, other = run(5), run(5), run(6)
    assert slots(first) == slots(again)
    assert first.uns["gfx_delete"]["params"]["rng"] == 5
    assert (
        first.uns["gfx_delete"]["random_sets"]["genes"].tolist()
        != other.uns["gfx_delete"]["random_sets"]["genes"].tolist()
    )
    seeds = [adata.uns["gfx_delete"]["controls"]["random_weights_seed"] for adata in (first, other)]
    assert seeds[0] != seeds[1]
    np.testing.assert_array_equal(first.obsm["gfx_delete"], other.obsm["gfx_delete"])
    generated = run(np.random.default_rng(5))
    assert "rng" not in generated.uns["gfx_delete"]["params"]
    del first.uns["gfx_delete"]["params"], generated.uns["gfx_delete"]["params"]
    assert slots(first) == slots(generated)
    assert run(np.int64(5)).uns["gfx_delete"]["params"]["rng"] == 5


OF_PERTURBATIONS = ["table", "random_sets", "donors", "synergy"]
OF_PERTURBATIONS_AND_STATES = ["state_table", "random_states", "donor_states"]


def assert_same_of_each(found, expected, names, tables):
    """Rows of some perturbations; p is taken among random sets of all perturbations."""
    for table in tables:
        rows = [
            pd.concat([one[table][one[table]["perturbation"] == name] for name in names], ignore_index=True)
            for one in (found, expected)
        ]
        rows = [one.drop(columns=[column for column in one if column in P or column in BESIDE_STATES]) for one in rows]
        pd.testing.assert_frame_equal(*rows, rtol=1e-3, atol=1e-7, obj=table)
        assert len(rows[0]) > 0


#: Of all random sets in the call, and of the cells of both states.
P, BESIDE_STATES = {"p", "toward_p", "on_shifts_p", "on_vectors_p"}, {"logfc"}


@pytest.mark.parametrize("states", [{}, WITH_STATES], ids=["plain", "states"])
def test_z_does_not_depend_on_what_else_is_perturbed(cells, toy_model, states):
    """Nor on the order: random sets, and all else that is drawn, follow the seed and the genes."""
    arguments = {"model": toy_model, "null": 6, "donor_key": "donor", "rng": 4, **states}
    gfx.tl.delete_genes(cells, [GENE, (GENE, OTHER)], key_added="few", **arguments)
    gfx.tl.delete_genes(
        cells, ["TOY21", (GENE, OTHER), "TOY165", (OTHER, "TOY21"), GENE], key_added="many", **arguments
    )
    few, many = cells.uns["few"], cells.uns["many"]
    names = [f"{GENE}+{OTHER}", GENE]
    tables = OF_PERTURBATIONS + (OF_PERTURBATIONS_AND_STATES if states else [])
    assert_same_of_each(many, few, names, [table for table in tables if table != "synergy"])
    assert_same_of_each(many, few, names[:1], ["synergy"])
    assert many["table"]["z"].notna().all()
    pd.testing.assert_frame_equal(many["genes_of_all_ranks"], few["genes_of_all_ranks"], rtol=1e-4, atol=1e-7)
    pd.testing.assert_frame_equal(many["controls"]["baselines"], few["controls"]["baselines"], atol=1e-3)
    assert many["controls"]["random_weights_seed"] == few["controls"]["random_weights_seed"]
    for key in ("", "_sd", "_null"):
        np.testing.assert_allclose(cells.varm[f"many{key}"][:, [4, 1]], cells.varm[f"few{key}"], atol=1e-6)


def test_z_of_the_shift_does_not_depend_on_states(cells, toy_model):
    arguments = {"model": toy_model, "null": 6, "donor_key": "donor", "rng": 4}
    genes = [GENE, OTHER, (GENE, OTHER)]
    gfx.tl.delete_genes(cells, genes, **arguments, **WITH_STATES)
    sick = cells[cells.obs["condition"] == "sick"].copy()
    gfx.tl.delete_genes(sick, genes, **arguments)
    found, expected = cells.uns["gfx_delete"], sick.uns["gfx_delete"]
    names = [GENE, OTHER, f"{GENE}+{OTHER}"]
    assert_same_of_each(found, expected, names, OF_PERTURBATIONS[:-1])
    assert_same_of_each(found, expected, names[2:], ["synergy"])
    np.testing.assert_allclose(found["table"]["p"], expected["table"]["p"])
    columns = ["rank", "shift", "shift_random_weights"]
    ours, theirs = (result["genes_of_all_ranks"][columns] for result in (found, expected))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4, atol=1e-7)


# --- blocks ---------------------------------------------------------------------------------------------------------


def assert_nearly_equal(found, expected, where=""):
    if hasattr(expected, "columns"):
        pd.testing.assert_frame_equal(found, expected, rtol=1e-3, atol=1e-7, obj=where)
    elif hasattr(expected, "items"):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_nearly_equal(found[key], value, f"{where}[{key!r}]")
    elif np.asarray(expected).dtype.kind == "f":
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6, err_msg=where)
    else:
        np.testing.assert_array_equal(found, expected, err_msg=where)


@pytest.mark.parametrize("most", [1, 15])
@pytest.mark.parametrize(
    "arguments", [{}, {"null": None}, WITH_STATES, {"centroids": "without", **WITH_STATES}], ids=str
)
@pytest.mark.filterwarnings("ignore:No cell .*has the genes of")
def test_results_do_not_depend_on_blocks(cells, toy_model, monkeypatch, most, arguments):
    few_genes(cells)
    genes = ["TOY7", GENE, (GENE, OTHER), "TOY21", ("TOY7", GENE), (OTHER, "TOY21", GENE), OTHER]
    arguments = {"model": toy_model, "null": 5, "donor_key": "donor"} | arguments
    gfx.tl.delete_genes(cells, genes, key_added="x", **arguments)
    monkeypatch.setattr(_perturbation_run, "MOST_RUNS", most)
    blocks, cut = [], _perturbation_run._blocks
    monkeypatch.setattr(_perturbation_run, "_blocks", lambda n_runs: blocks.extend(cut(n_runs)) or blocks)
    gfx.tl.delete_genes(cells, genes, key_added="y", **arguments)
    assert len(blocks) > 1
    assert_nearly_equal(cells.uns["y"], cells.uns["x"])
    for held in (cells.obsm, cells.varm):
        keys = [key for key in held if key == "x" or key.startswith("x_")]
        assert len(keys) >= 2
        for key in keys:
            np.testing.assert_allclose(held["y" + key[1:]], held[key], atol=1e-6, err_msg=key)


@pytest.mark.parametrize(
    "n_runs", [[5], [0, 0], [3, 4, 3], [10, 10, 10], [11, 1, 9, 1], [2, 30, 2, 0, 8], [9, 0, 1, 0]]
)
def test_blocks_hold_what_fits(monkeypatch, n_runs):
    monkeypatch.setattr(_perturbation_run, "MOST_RUNS", 10)
    blocks = _perturbation_run._blocks(n_runs)
    assert [at for block in blocks for at in block] == list(range(len(n_runs)))
    sums = [sum(n_runs[at] for at in block) for block in blocks]
    assert all(total <= 10 or len(block) == 1 for total, block in zip(sums, blocks, strict=True))
    # None could take the first of the next one, too.
    assert all(total + n_runs[after[0]] > 10 for total, after in zip(sums, blocks[1:], strict=False))


def test_a_generator_moves_on(cells, toy_model):
    rng = np.random.default_rng(5)
    gfx.tl.delete_genes(cells, GENE, model=toy_model, null=3, rng=rng, key_added="x")
    gfx.tl.delete_genes(cells, GENE, model=toy_model, null=3, rng=rng, key_added="y")
    assert cells.uns["x"]["random_sets"]["genes"].tolist() != cells.uns["y"]["random_sets"]["genes"].tolist()


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["h5ad", "zarr"])
def test_everything_comes_back_from_files(cells, toy_model, tmp_path, how):
    gfx.tl.delete_genes(
        cells, [GENE, (GENE, OTHER)], model=toy_model, null=3, donor_key="donor", centroids="without", **WITH_STATES
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="zarr|anndata")
        getattr(cells, f"write_{how}")(tmp_path / "cells")
        read = getattr(ad, f"read_{how}")(tmp_path / "cells")
    expected = cells.uns["gfx_delete"]
    tables = {name for name, value in expected.items() if hasattr(value, "columns")}
    assert {"table", "state_table", "random_sets", "random_states", "donors", "donor_states", "synergy"} <= tables
    assert_nested_equal(read.uns["gfx_delete"], expected)
    for key in ("gfx_delete", "gfx_delete_parts", "gfx_delete_states"):
        np.testing.assert_array_equal(read.obsm[key], cells.obsm[key])
    for key in ("gfx_delete", "gfx_delete_sd", "gfx_delete_n_cells", "gfx_delete_null"):
        np.testing.assert_array_equal(read.varm[key], cells.varm[key])


# --- failures -------------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "null 2": ({"null": 2}, ValueError, "`null` is 'rank', a number of random sets of at least 3, or None; found 2"),
    "null 0": ({"null": 0}, ValueError, "`null` is 'rank'"),
    "null true": ({"null": True}, ValueError, "`null` is 'rank'.*found True"),
    "null fraction": ({"null": 2.5}, ValueError, "`null` is 'rank'"),
    "null word": ({"null": "ranks"}, ValueError, "`null` is 'rank'.*found 'ranks'"),
    "operator": ({"operator": "overexpress"}, ValueError, r"`operator` is one of \['delete', 'hold'\], found 'overexp"),
    "centroids": ({"centroids": "both"}, ValueError, r"`centroids` is one of \['whole', 'without'\], found 'both'"),
    "pooling": ({"pooling": "max"}, ValueError, r"`pooling` is one of \['auto', 'mean', 'cls', 'genes'\], found 'max'"),
    "no such donors": (
        {"donor_key": "donors"},
        KeyError,
        r"Did not find 'donors' in `adata\.obs`\. Did you mean 'donor'",
    ),
    "missing donors": (
        {"donor_key": "some"},
        ValueError,
        r"`adata\.obs\['some'\]` names no donor for 3 cells\. Leave these out",
    ),
    "seed": ({"rng": "seed"}, TypeError, "SeedSequence"),
}


@pytest.mark.parametrize("wrong", ARGUMENTS)
def test_arguments_that_cannot_be(cells, toy_model, slots, wrong):
    arguments, error, text = ARGUMENTS[wrong]
    cells.obs["some"] = cells.obs["donor"].astype(object).where(np.arange(24) > 2)
    before = slots(cells)
    with pytest.raises(error, match=text):
        delete_genes(cells, GENE, model=toy_model, **arguments)
    assert slots(cells) == before


def test_the_model_gives_up_at_the_very_end(cells, toy_model, slots, monkeypatch):
    """When all effects are there, and random genes are run."""
    forward, calls = BertModel.forward, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == last:
            msg = "the device was lost"
            raise RuntimeError(msg)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertModel, "forward", counted)
    arguments = {"model": toy_model, "null": 3, **WITH_STATES}
    last = None
    gfx.tl.delete_genes(cells, GENE, copy=True, **arguments)
    before, last = slots(cells), len(calls)
    calls.clear()
    with pytest.raises(RuntimeError, match="the device was lost"):
        gfx.tl.delete_genes(cells, GENE, **arguments)
    assert slots(cells) == before
