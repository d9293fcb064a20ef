from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import gfx

#: In nearly all of the toy cells.
GENE, OTHER = "TOY90", "TOY48"


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def vector(slow, tokens, states, pooling):
    genes = [state for token, state in zip(tokens, states, strict=True) if slow.is_gene(token)]
    return states[0] if pooling == "cls" else np.mean(genes, axis=0)


@pytest.mark.parametrize("hidden_layer", [-2, -1])
def test_it_is_what_the_published_model_gives(cells, any_model, slow, hidden_layer):
    """Two genes, each and together; with states; against lists, one cell at a time."""
    given = [GENE, (GENE, OTHER)]
    pooling = "cls" if any_model.vocabulary.has_cls else "mean"
    gfx.tl.delete_genes(
        cells, given, model=any_model, groupby="cell_type", start="b", goal="c", hidden_layer=hidden_layer
    )
    tokens = slow.tokens(cells)
    before = [slow.states(row, hidden_layer) for row in tokens]
    vectors = np.array([vector(slow, row, states, pooling) for row, states in zip(tokens, before, strict=True)])
    centroids = [vectors[cells.obs["cell_type"] == state].mean(axis=0) for state in "abc"]
    name_of = slow.vocabulary.symbols
    shift, toward = np.full((24, 2), np.nan), np.full((24, 2, 3), np.nan)
    genes = {}
    for at, names in enumerate([(GENE,), (GENE, OTHER)]):
        for row in np.flatnonzero(cells.obs["cell_type"] == "b"):
            if not set(names) <= {name_of[token] for token in tokens[row]}:
                continue
            rest = [token for token in tokens[row] if name_of[token] not in names]
            after = slow.states(rest, hidden_layer)
            shifts = {
                name_of[token]: 1 - cosine(after[place], before[row][tokens[row].index(token)])
                for place, token in enumerate(rest)
                if slow.is_gene(token)
            }
            shift[row, at] = 1 - cosine(after[0], before[row][0]) if pooling == "cls" else np.mean([*shifts.values()])
            moved = vector(slow, rest, after, pooling)
            toward[row, at] = [cosine(moved, goal) - cosine(vectors[row], goal) for goal in centroids]
            for gene, value in shifts.items():
                genes.setdefault((gene, at), []).append(value)
    np.testing.assert_allclose(cells.obsm["gfx_delete"], shift, atol=1e-5)
    np.testing.assert_allclose(cells.obsm["gfx_delete_states"], toward, atol=1e-5)
    for (row, gene), at in ((slot, at) for slot in enumerate(cells.var_names) for at in (0, 1)):
        values = genes.get((gene, at), [])
        assert cells.varm["gfx_delete_n_cells"][row, at] == len(values)
        expected = np.mean(values) if values else np.nan
        np.testing.assert_allclose(cells.varm["gfx_delete"][row, at], expected, atol=1e-5)
    assert 0 < np.isnan(shift[cells.obs["cell_type"] == "b"]).sum() < 16


def test_tables(cells, toy_model):
    gfx.tl.delete_genes(
        cells, [GENE, (GENE, OTHER)], model=toy_model, groupby="cell_type", start="a", goal="c", key_added="x"
    )
    result = cells.uns["x"]
    assert result["perturbations"].tolist() == [GENE, f"{GENE}+{OTHER}"]
    assert result["states"].tolist() == ["a", "b", "c"]
    table = result["table"]
    assert table.columns.tolist() == ["perturbation", "n_cells", "shift_mean", "shift_sd", "rank_mean"]
    for at, row in table.iterrows():
        values = cells.obsm["x"][:, at]
        values = values[~np.isnan(values)].astype(np.float64)
        assert row["n_cells"] == len(values) > 2
        assert row["shift_mean"] == pytest.approx(values.mean())
        assert row["shift_sd"] == pytest.approx(np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1)))
        assert 0 <= row["rank_mean"] <= 1
    states = result["state_table"].set_index(["perturbation", "state"])
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
    gfx.tl.delete_genes(one, [symbols[row[0]], symbols[row[-1]], symbols[row[len(row) // 2]]], model=toy_model)
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
        (np.array([GENE, OTHER]), [GENE, OTHER]),
        (pd.Index([GENE, OTHER]), [GENE, OTHER]),
        ("ENSG00000000090.3", ["ENSG00000000090.3"]),
        ("oldtoy90", ["oldtoy90"]),
    ],
)
def test_ways_to_name_genes(cells, toy_model, given, names):
    gfx.tl.delete_genes(cells, given, model=toy_model)
    assert cells.uns["gfx_delete"]["perturbations"].tolist() == names
    assert cells.obsm["gfx_delete"].shape == (24, len(names))
    together = names[0].count("+") + 1
    n_cells = np.asarray((cells[:, [GENE, OTHER][:together]].X > 0).sum(axis=1) == together).sum()
    assert 0 < cells.uns["gfx_delete"]["table"]["n_cells"].iloc[0] <= n_cells


def test_names_in_ids_and_symbols_are_the_same_deletion(cells, toy_model):
    gfx.tl.delete_genes(cells, GENE, model=toy_model, key_added="symbol")
    gfx.tl.delete_genes(cells, "ENSG00000000090", model=toy_model, key_added="id")
    np.testing.assert_array_equal(cells.obsm["symbol"], cells.obsm["id"])


WRONG = {
    "unknown": ("TOY900", ValueError, r"does not know \['TOY900'\]\. Did you mean 'TOY90'"),
    "unknown in a set": ([GENE, (OTHER, "GATA4")], ValueError, r"does not know \['GATA4'\].*vocabulary 'toy'"),
    "special token": ("<cls>", ValueError, "does not know"),
    "nothing": ([], ValueError, "`genes` is empty"),
    "empty set": ([GENE, ()], ValueError, "`genes` is empty"),
    "twice": ([GENE, OTHER, GENE], ValueError, f"'{GENE}' and '{GENE}' are the same perturbation"),
    "twice under two names": ([GENE, "ENSG00000000090"], ValueError, f"'ENSG00000000090' and '{GENE}' are the same"),
    "set in another order": ([(GENE, OTHER), (OTHER, GENE)], ValueError, "are the same perturbation; give it once"),
    "gene twice in a set": ([(GENE, "OLDTOY90")], ValueError, "A gene is named twice"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_genes_that_cannot_be_deleted(cells, toy_model, slots, wrong):
    genes, error, text = WRONG[wrong]
    before = slots(cells)
    with pytest.raises(error, match=text):
        gfx.tl.delete_genes(cells, genes, model=toy_model)
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
        gfx.tl.delete_genes(cells, GENE, model=toy_model, **arguments)
    assert slots(cells) == before


def test_categories_without_cells_and_cells_without_state(cells, toy_model):
    """Neither changes the states that there are."""
    arguments = {"model": toy_model, "start": "a", "goal": "b"}
    some = cells[cells.obs["cell_type"] != "c"].copy()
    some.obs["cell_type"] = some.obs["cell_type"].cat.remove_unused_categories()
    gfx.tl.delete_genes(some, GENE, groupby="cell_type", **arguments)
    labels = cells.obs["cell_type"].astype(str).where(cells.obs["cell_type"] != "c")
    cells.obs["some"] = pd.Categorical(labels, categories=["z", "a", "none", "b"])
    gfx.tl.delete_genes(cells, GENE, groupby="some", **arguments)
    assert cells.uns["gfx_delete"]["states"].tolist() == ["a", "b"]
    in_state = cells.obs["some"].notna().to_numpy()
    for key in ("gfx_delete", "gfx_delete_states"):
        np.testing.assert_allclose(cells.obsm[key][in_state], some.obsm[key], atol=1e-5)
        assert np.isnan(cells.obsm[key][~in_state]).all()
    assert np.isnan(cells.obsm["gfx_delete"][cells.obs["some"] == "b"]).all()  # they are a goal, nothing is deleted


@pytest.mark.parametrize("kind", [int, bool, float])
def test_states_that_are_no_text(cells, toy_model, kind):
    cells.obs["sick"] = (cells.obs["condition"] == "sick").astype(kind)
    gfx.tl.delete_genes(cells, GENE, model=toy_model, groupby="condition", start="sick", goal="healthy", key_added="x")
    gfx.tl.delete_genes(cells, GENE, model=toy_model, groupby="sick", start=kind(1), goal=kind(0), key_added="y")
    np.testing.assert_array_equal(cells.obsm["y_states"], cells.obsm["x_states"])
    assert cells.uns["y"]["states"].tolist() == [str(kind(0)), str(kind(1))]


def test_states_of_an_earlier_run_do_not_stay(cells, toy_model):
    gfx.tl.delete_genes(cells, [GENE, OTHER], model=toy_model, groupby="cell_type", start="a", goal="b")
    gfx.tl.delete_genes(cells, GENE, model=toy_model)
    assert "gfx_delete_states" not in cells.obsm
    assert set(cells.uns["gfx_delete"]) == {"params", "perturbations", "table"}
    assert not {"groupby", "start", "goal"} & set(cells.uns["gfx_delete"]["params"])
    assert cells.varm["gfx_delete"].shape == cells.varm["gfx_delete_n_cells"].shape == (cells.n_vars, 1)


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
    gfx.tl.delete_genes(cells, [GENE, (GENE, OTHER)], model=any_model)
    shift = cells.obsm["gfx_delete"]
    assert np.isnan(shift[0]).all()
    assert np.isnan(shift[1]).tolist() == [False, True]
    assert (~np.isnan(shift)).sum(axis=0).tolist() == cells.uns["gfx_delete"]["table"]["n_cells"].tolist()


def test_genes_of_no_cell(cells, toy_model):
    few_genes(cells)
    with pytest.warns(UserWarning, match=r"No cell has the genes of \['TOY7', 'TOY7\+TOY90'\]") as caught:
        gfx.tl.delete_genes(cells, ["TOY7", GENE, ("TOY7", GENE)], model=toy_model)
    assert caught[0].filename == __file__
    assert np.isnan(cells.obsm["gfx_delete"]).all(axis=0).tolist() == [True, False, True]
    assert np.isnan(cells.varm["gfx_delete"]).all(axis=0).tolist() == [True, False, True]
    table = cells.uns["gfx_delete"]["table"].set_index("perturbation")
    assert table["n_cells"].tolist()[::2] == [0, 0]
    assert table.loc[["TOY7", "TOY7+TOY90"], ["shift_mean", "shift_sd", "rank_mean"]].isna().all(axis=None)


def test_genes_of_no_cell_of_the_start(cells, toy_model):
    counts = cells.X.toarray()
    counts[np.ix_(cells.obs["condition"] == "sick", cells.var_names == GENE)] = 0
    cells.X = sparse.csr_matrix(counts)
    with pytest.warns(UserWarning, match=rf"No cell of the state 'sick' has the genes of \['{GENE}'\]"):
        gfx.tl.delete_genes(cells, GENE, model=toy_model, groupby="condition", start="sick", goal="healthy")
    assert np.isnan(cells.obsm["gfx_delete_states"]).all()
    assert cells.uns["gfx_delete"]["state_table"]["n_cells"].tolist() == [0, 0]


def test_genes_outside_the_object_move_cells_too(cells, toy_model):
    """Tokens hold genes that were since left out of the object: they are deleted all the same."""
    gfx.pp.tokenize(cells, model=toy_model)
    gfx.tl.delete_genes(cells, GENE, model=toy_model)
    part = cells[:, [name for name in cells.var_names if name != GENE][:50]].copy()
    gfx.tl.delete_genes(part, GENE, model=toy_model, key_added="again")
    np.testing.assert_array_equal(part.obsm["again"], cells.obsm["gfx_delete"])
    np.testing.assert_array_equal(part.varm["again"], part.varm["gfx_delete"])
