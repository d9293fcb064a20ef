"""The tools against the official software: counts in, slots out, on its own cells and models."""

from __future__ import annotations

import ast
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import gfx

# Eight cells of a random model: nothing tells their states apart.
pytestmark = [pytest.mark.filterwarnings("ignore:Held-out cells of"), pytest.mark.usefixtures("in_float32")]

TOLERANCE = 1e-5

#: What the official software calls emb_layer, and what we call hidden_layer.
LAYERS = [(0, -1), (-1, -2)]


@pytest.fixture(autouse=True)
def in_float32():
    """On every machine alike."""
    with gfx.settings.override(dtype="float32"):
        yield


@pytest.fixture
def model(golden_run):
    return gfx.models.load(golden_run.folder)


def published(tool, run):
    """Call a tool as the official software runs, which compares cells of V1 gene by gene."""
    return partial(tool, controls=None, pooling="cls" if run.vocabulary.has_cls else "genes")


@pytest.fixture
def delete_genes(golden_run):
    return published(gfx.tl.delete_genes, golden_run)


@pytest.fixture
def overexpress_genes(golden_run):
    return published(gfx.tl.overexpress_genes, golden_run)


@pytest.fixture
def adata(golden_run):
    """Counts whose ranking is the official cells: the first gene of n has n counts, the last one 1."""
    genes = golden_run.vocabulary.ids[golden_run.tokens].astype(str)
    counts = np.zeros((len(golden_run.ids), len(genes)), dtype=np.float32)
    for row, cell in enumerate(golden_run.expected["cells"]):
        ranking = [token for token in cell if token in golden_run.tokens]
        for rank, token in enumerate(ranking):
            counts[row, golden_run.tokens.index(token)] = len(ranking) - rank
    obs = pd.DataFrame({"state": pd.Categorical(golden_run.state)}, index=[f"cell{i}" for i in range(len(counts))])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))


def name(run, token):
    return str(run.vocabulary.ids[token])


def official_order(run, values, state=None):
    rows = [row for row in run.order if state is None or run.state[row] == state]
    return values[rows][~np.isnan(values[rows])]


def test_cells_are_the_official_ones(golden_run, adata, model):
    gfx.pp.tokenize(adata, model=model)
    np.testing.assert_array_equal(adata.obsm["gfx_tokens"], golden_run.ids)


@pytest.mark.parametrize(("official", "ours"), LAYERS)
@pytest.mark.parametrize("mode", ["cell", "cls"])
def test_embed(golden_run, adata, model, mode, official, ours):
    if mode == "cls" and not golden_run.vocabulary.has_cls:
        pytest.skip("this family has no <cls>")
    pooling = "mean" if mode == "cell" else "cls"
    gfx.tl.embed(adata, model=model, hidden_layer=ours, pooling=pooling)
    np.testing.assert_allclose(
        adata.obsm["X_gfx"][golden_run.order], golden_run.embedding(mode, official), atol=TOLERANCE
    )


@pytest.mark.parametrize(("official", "ours"), LAYERS)
def test_embed_genes(golden_run, adata, model, official, ours):
    gfx.tl.embed_genes(adata, model=model, hidden_layer=ours)
    expected = golden_run.embedding("gene", official).drop(["<cls>", "<eos>"], errors="ignore")
    found = pd.DataFrame(adata.varm["gfx_genes"], index=adata.var_names)
    np.testing.assert_allclose(found.loc[expected.index], expected, atol=TOLERANCE)
    assert set(found.index[found.notna().all(axis=1)]) == set(expected.index)


def test_states_are_exact_means(golden_run, adata, model):
    gfx.tl.embed(adata, model=model)
    for state, expected in golden_run.expected["state_embs"].items():
        found = adata.obsm["X_gfx"][adata.obs["state"] == state].mean(axis=0)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def assert_spread(run, adata, name_of_run, perturbed, key):
    """Compare with the official table of other genes: mean, standard deviation and number of cells."""
    table = pd.read_csv(run.folder / f"stats_{name_of_run}_aggregate_gene_shifts.csv")
    table = table[table["Affected"] != "cell_emb"]
    rows = adata.var_names.get_indexer(table["Affected_Ensembl_ID"])
    columns = [perturbed.index(ast.literal_eval(str(entry))) for entry in table["Perturbed"]]
    assert (rows >= 0).all()
    assert len(table) == (adata.varm[f"{key}_n_cells"] > 0).sum()
    np.testing.assert_array_equal(adata.varm[f"{key}_n_cells"][rows, columns], table["N_Detections"])
    np.testing.assert_allclose(1 - adata.varm[key][rows, columns], table["Cosine_sim_mean"], atol=TOLERANCE)
    np.testing.assert_allclose(adata.varm[f"{key}_sd"][rows, columns], table["Cosine_sim_stdev"], atol=TOLERANCE)
    assert (table["Cosine_sim_stdev"] > 0.01).any()


def test_delete_each_gene(golden_run, adata, model, delete_genes):
    in_cells = [token for token in golden_run.tokens if (golden_run.ids == token).any()]
    delete_genes(adata, [name(golden_run, token) for token in in_cells], model=model)
    expected = golden_run.run("delete_all")
    assert {token for token, _ in expected} == set(in_cells)
    for at, token in enumerate(in_cells):
        found = official_order(golden_run, adata.obsm["gfx_delete"][:, at])
        np.testing.assert_allclose(1 - found, expected[token, "cell_emb"], atol=TOLERANCE)
    rows = {token: adata.var_names.get_loc(name(golden_run, token)) for token in in_cells}
    genes = golden_run.run("delete_all_gene", "gene_embs")
    for (deleted, affected), values in genes.items():
        slot = rows[affected], in_cells.index(deleted)
        assert adata.varm["gfx_delete_n_cells"][slot] == len(values)
        assert 1 - adata.varm["gfx_delete"][slot] == pytest.approx(np.mean(values), abs=TOLERANCE)
    assert (adata.varm["gfx_delete_n_cells"] > 0).sum() == len(genes)
    assert_spread(golden_run, adata, "delete_all_gene", in_cells, "gfx_delete")


def test_delete_each_gene_with_states(golden_run, adata, model, delete_genes):
    in_start = golden_run.ids[golden_run.state == "a"]
    tokens = [token for token in golden_run.tokens if (in_start == token).any()]
    names = [name(golden_run, token) for token in tokens]
    delete_genes(adata, names, model=model, groupby="state", start="a", goal="b")
    assert adata.uns["gfx_delete"]["states"].tolist() == ["a", "b", "c"]
    for at_state, state in enumerate("abc"):
        expected = golden_run.run_states("delete_all_states", state)
        assert {token for token, _ in expected} == set(tokens)
        for at, token in enumerate(tokens):
            found = official_order(golden_run, adata.obsm["gfx_delete_states"][:, at, at_state])
            np.testing.assert_allclose(found, expected[token, "cell_emb"], atol=TOLERANCE)
    table = gfx.get.deletion_df(adata, min_cells=1).set_index(["perturbation", "state"])
    for token in tokens[:5]:
        values = golden_run.run_states("delete_all_states", "b")[token, "cell_emb"]
        found = table.loc[name(golden_run, token), "b"]
        assert found["toward_mean"] == pytest.approx(np.mean(values), abs=TOLERANCE)
        assert found["role"] == "goal"


def test_delete_a_list_together(golden_run, adata, model, delete_genes):
    ((genes, _), expected), *_ = golden_run.run("delete_list").items()
    together = tuple(name(golden_run, token) for token in genes)
    delete_genes(adata, [together], model=model)
    np.testing.assert_allclose(1 - adata.obsm["gfx_delete"][golden_run.order, 0], expected, atol=TOLERANCE)
    assert gfx.get.deletion_df(adata, min_cells=1)["shift_mean"].iloc[0] == pytest.approx(
        1 - np.mean(expected), abs=TOLERANCE
    )
    for (_, affected), values in golden_run.run("delete_list", "gene_embs").items():
        row = adata.var_names.get_loc(name(golden_run, affected))
        assert adata.varm["gfx_delete_n_cells"][row, 0] == len(values)
        assert 1 - adata.varm["gfx_delete"][row, 0] == pytest.approx(np.mean(values), abs=TOLERANCE)
    assert_spread(golden_run, adata, "delete_list", [genes], "gfx_delete")
    delete_genes(adata, [together], model=model, groupby="state", start="a", goal="b")
    for at, state in enumerate("abc"):
        expected = golden_run.run_states("delete_list_states", state)[genes, "cell_emb"]
        found = official_order(golden_run, adata.obsm["gfx_delete_states"][:, 0, at])
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_delete_pairs_with_an_anchor(golden_run, adata, model, delete_genes):
    expected = golden_run.run("delete_anchor")
    others = [token for token, _ in expected]
    in_all = [token for token in golden_run.tokens if (golden_run.ids == token).any(axis=1).all()]
    (anchor,) = set(in_all) - set(others)
    pairs = [(name(golden_run, anchor), name(golden_run, other)) for other in others]
    delete_genes(adata, pairs, model=model)
    for at, other in enumerate(others):
        found = official_order(golden_run, adata.obsm["gfx_delete"][:, at])
        np.testing.assert_allclose(1 - found, expected[other, "cell_emb"], atol=TOLERANCE)


def genes_in(run, row):
    return [token for token in run.ids[row, : run.lengths[row]] if token in run.tokens]


def without_the_first(run, values, token, state=None):
    """Effects in the official order, without cells in which the gene comes first: it does not perturb these."""
    rows = [row for row in run.order if state is None or run.state[row] == state]
    return np.array([values[row] for row in rows if token in genes_in(run, row)[1:]])


def test_overexpress_each_gene(golden_run, adata, model, overexpress_genes):
    expected = golden_run.run("overexpress_all")
    tokens = [token for token, _ in expected]
    overexpress_genes(adata, [name(golden_run, token) for token in tokens], model=model)
    first = 0
    for at, token in enumerate(tokens):
        shift = adata.obsm["gfx_overexpress"][:, at]
        found = without_the_first(golden_run, shift, token)
        np.testing.assert_allclose(1 - found, expected[token, "cell_emb"], atol=TOLERANCE)
        firsts = [shift[row] for row in range(len(shift)) if genes_in(golden_run, row)[0] == token]
        np.testing.assert_allclose(firsts, 0, atol=TOLERANCE)  # it is there already
        first += len(firsts)
    assert first > 0


def test_overexpress_each_gene_with_states(golden_run, adata, model, overexpress_genes):
    runs = {state: golden_run.run_states("overexpress_all_states", state) for state in "abc"}
    tokens = [token for token, _ in runs["a"]]
    names = [name(golden_run, token) for token in tokens]
    overexpress_genes(adata, names, model=model, groupby="state", start="a", goal="b")
    for at_state, state in enumerate("abc"):
        for at, token in enumerate(tokens):
            found = without_the_first(golden_run, adata.obsm["gfx_overexpress_states"][:, at, at_state], token, "a")
            np.testing.assert_allclose(found, runs[state][token, "cell_emb"], atol=TOLERANCE)


def test_departure_other_genes_under_overexpression_have_their_own_effects(golden_run, adata, model, overexpress_genes):
    """The official list of affected genes begins one gene too late: each value is filed under the next gene."""
    expected = golden_run.run("overexpress_all_gene", "gene_embs")
    official, right = {}, 0
    for row in golden_run.order:
        genes, one = genes_in(golden_run, row), adata[[row]].copy()
        overexpress_genes(one, [name(golden_run, token) for token in genes[1:]], model=model)
        for at, token in enumerate(genes[1:]):
            shifts = pd.Series(1 - one.varm["gfx_overexpress"][:, at], index=one.var_names)
            others = [gene for gene in genes if gene != token]
            labels = [gene for gene in genes[1:] if gene != token]
            for label, other in zip(labels, others[:-1], strict=True):
                official.setdefault((token, label), []).append(shifts[name(golden_run, other)])
                right += label == other
    assert set(official) == set(expected)
    assert right == 0
    for key, values in expected.items():
        np.testing.assert_allclose(official[key], values, atol=TOLERANCE)


def test_overexpress_a_list_together(golden_run, adata, model, overexpress_genes):
    ((genes, _), expected), *_ = golden_run.run("overexpress_list").items()
    together = tuple(name(golden_run, token) for token in genes)
    overexpress_genes(adata, [together], model=model)
    np.testing.assert_allclose(1 - adata.obsm["gfx_overexpress"][golden_run.order, 0], expected, atol=TOLERANCE)
    others = golden_run.run("overexpress_list", "gene_embs")
    assert (adata.varm["gfx_overexpress_n_cells"] > 0).sum() == len(others)
    assert_spread(golden_run, adata, "overexpress_list", [genes], "gfx_overexpress")
    overexpress_genes(adata, [together], model=model, groupby="state", start="a", goal="b")
    for at, state in enumerate("abc"):
        expected = golden_run.run_states("overexpress_list_states", state)[genes, "cell_emb"]
        found = official_order(golden_run, adata.obsm["gfx_overexpress_states"][:, 0, at])
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
