from __future__ import annotations

import dataclasses
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import gfx
from gfx.models._vocabulary_file import write_vocabulary

# The toy cells' states are drawn at random, and most of the time nothing tells them apart.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

#: In nearly all of the toy cells, and in some.
GENE, OTHER = "TOY90", "TOY48"

shift_genes = partial(gfx.tl.shift_genes, null=None)


def default_pooling(model):
    return "cls" if model.vocabulary.has_cls else "genes"


def tokens_of(slow, names):
    return [int(np.flatnonzero(slow.vocabulary.symbols == name)[0]) for name in names]


def genes_of(slow, row):
    return [token for token in row if slow.is_gene(token)]


def assert_like(cells, at, effects, key="gfx_shift"):
    for slot, name in ((key, "shift"), (f"{key}_parts", "parts"), (f"{key}_states", "toward")):
        if slot in cells.obsm:
            values = {row: getattr(effect, name) for row, effect in effects.items()}
            missing = np.full(np.shape(next(iter(values.values()))), np.nan)
            expected = [values.get(row, missing) for row in range(cells.n_obs)]
            np.testing.assert_allclose(cells.obsm[slot][:, at], expected, atol=1e-5, err_msg=slot)
    for row, gene in enumerate(cells.var_names):
        values = [effect.genes[gene] for effect in effects.values() if gene in effect.genes]
        assert cells.varm[f"{key}_n_cells"][row, at] == len(values)
        np.testing.assert_allclose(cells.varm[key][row, at], np.mean(values) if values else np.nan, atol=1e-5)


# --- quartiles ------------------------------------------------------------------------------------------------------


def quarter(rank, n):
    """Which quarter of n genes a rank is in, 0 the first."""
    return next(at for at in range(4) if rank < (at + 1) * n / 4)


def landing(rank, n, quartiles):
    """The rank in the middle of the quartile that it is moved to, or at the very end beyond the last one."""
    new = quarter(rank, n) - quartiles
    if new < 0:
        return 0
    if new > 3:
        return n - 1
    return int((new + 0.5) * n / 4)


@pytest.mark.parametrize("quartiles", [1, 2, 3, -1, -2, -3])
def test_quartiles(cells, any_model, slow, quartiles):
    rows, names = slow.tokens(cells), [GENE, OTHER, "TOY21"]
    shift_genes(cells, names, quartiles=quartiles, model=any_model)
    moved = 0
    for at, gene in enumerate(tokens_of(slow, names)):
        effects = {}
        for place, row in enumerate(rows):
            if gene in row:
                ranking = genes_of(slow, row)
                rank, n = ranking.index(gene), len(ranking)
                to = landing(rank, n, quartiles)
                assert (to <= rank) if quartiles > 0 else (to >= rank)
                assert quarter(to, n) == np.clip(quarter(rank, n) - quartiles, 0, 3)
                moved += to != rank
                effects[place] = slow.effect(
                    row, slow.edited(row, [gene], "shift", [to]), [gene], default_pooling(any_model)
                )
        assert_like(cells, at, effects)
    assert moved > 10
    params = cells.uns["gfx_shift"]["params"]
    assert params["quartiles"] == quartiles
    assert params["function"] == "tl.shift_genes"
    assert not {"fold_change"} & set(params)


def test_every_gene_of_one_cell_by_quartiles(cells, toy_model):
    """A gene at each rank: what is first cannot rise, what is last cannot fall."""
    one = cells[[0]].copy()
    gfx.pp.tokenize(one, model=toy_model)
    row = one.obsm["gfx_tokens"][0]
    names = toy_model.vocabulary.symbols[row[row > 3]].tolist()
    for quartiles, unmoved in ((1, names[0]), (-1, names[-1])):
        shift_genes(one, names, quartiles=quartiles, model=toy_model)
        still = np.array(names)[np.abs(one.obsm["gfx_shift"][0]) < 1e-7]
        assert still.tolist() == [unmoved]


def test_quartiles_of_sets_and_towards_states(cells, any_model, slow):
    """Each gene of a set goes where it would go by itself; those that meet keep their order."""
    shift_genes(cells, (GENE, OTHER), quartiles=3, model=any_model, groupby="cell_type", start="b", goal="c")
    genes, rows = tokens_of(slow, [GENE, OTHER]), slow.tokens(cells)
    vectors = np.array([slow.cell(row, "cls" if any_model.vocabulary.has_cls else "mean") for row in rows])
    goals = [vectors[cells.obs["cell_type"] == state].mean(axis=0) for state in "abc"]
    effects = {}
    for place in np.flatnonzero(cells.obs["cell_type"] == "b"):
        ranking = genes_of(slow, rows[place])
        if set(genes) <= set(ranking):
            ranks = [ranking.index(gene) for gene in genes]
            wanted = sorted((landing(rank, len(ranking), 3), rank) for rank in ranks)
            # The second one has the first before it, which is none of the others that `to` counts.
            first, second = wanted[0][0], max(wanted[0][0], wanted[1][0] - 1)
            to = [first if rank == wanted[0][1] else second for rank in ranks]
            edited = slow.edited(rows[place], genes, "shift", to)
            effects[place] = slow.effect(rows[place], edited, genes, default_pooling(any_model), goals)
    assert len(effects) > 3
    assert_like(cells, 0, effects)


# --- fold changes ---------------------------------------------------------------------------------------------------


def multiplied(cells, names, fold):
    """The cells with counts of some genes multiplied, in float64."""
    other = cells.copy()
    counts = other.X.toarray().astype(np.float64)
    counts[:, [other.var_names.get_loc(name) for name in names]] *= fold
    other.X = sparse.csr_matrix(counts)
    return other


def tokenized(cells, model, **arguments):
    gfx.pp.tokenize(cells, model=model, **arguments)
    key = arguments.get("key_added", "gfx_tokens")
    return [[int(token) for token in row if token != model.vocabulary.pad] for row in cells.obsm[key]]


def assert_fold_change(cells, model, slow, sets, *, fold):
    """What `pp.tokenize` makes of the multiplied counts, but for genes that no longer find a place."""
    shift_genes(cells, sets, fold_change=fold, model=model)
    rows = tokenized(cells.copy(), model)
    told = {"moved": 0, "gone": 0}
    for at, names in enumerate(sets):
        genes = tokens_of(slow, names)
        after = tokenized(multiplied(cells, names, fold), model, counts="normalized")
        effects = {}
        for place, (row, new) in enumerate(zip(rows, after, strict=True)):
            if set(genes) <= set(row):
                edited = [token for token in new if token in row]  # nobody moves up from behind the last gene
                told["moved"] += edited != row
                told["gone"] += not set(genes) <= set(new)
                effects[place] = slow.effect(row, edited, genes, default_pooling(model))
        assert_like(cells, at, effects)
    return told


@pytest.mark.parametrize("fold", [4, 0.25, 1.7, 1e6, 1e-6])
def test_fold_change(cells, any_model, slow, fold):
    is_full = np.array([len(genes_of(slow, row)) == slow.room for row in slow.tokens(cells)])
    assert 0 < is_full.sum() < 24
    told = assert_fold_change(cells, any_model, slow, [(GENE,), (OTHER,), (GENE, OTHER)], fold=fold)
    assert told["moved"] > 10
    assert (told["gone"] > 3) == (fold < 1)
    assert cells.uns["gfx_shift"]["params"]["fold_change"] == fold
    assert "quartiles" not in cells.uns["gfx_shift"]["params"]


@pytest.fixture(scope="module")
def even(any_model, tmp_path_factory):
    """A model whose genes have one median, so that equal counts are ties.

    The median is a number for which (1 / median) * 3 is not 3 / median.
    """
    median = next(m for m in np.arange(1, 100) / 7 if (1 / m) * 3 != 3 / m)
    vocabulary = any_model.vocabulary
    vocabulary = dataclasses.replace(
        vocabulary, medians=np.where(vocabulary.is_special, np.nan, median), name=f"even-{vocabulary.name}"
    )
    folder = tmp_path_factory.mktemp("even") / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((any_model.folder / name).read_bytes())
    write_vocabulary(vocabulary, folder)
    return gfx.models.load(folder)


@pytest.mark.parametrize("fold", [3, 2, 0.5])
def test_ties_are_those_of_tokenize(cells, even, slow, fold):
    names = [(name,) for name in ("TOY90", "TOY48", "TOY21", "TOY150", "TOY5")]
    assert_fold_change(cells, even, slow, names, fold=fold)
    counts = cells[:, [name for (name,) in names]].X.toarray()
    assert {1, 2} & set(counts[counts > 0])


def test_fold_changes_of_stored_tokens(cells, any_model, slow):
    """Counts are read from where the tokens were made of them, by the names that they were made with."""
    shift_genes(cells, [GENE, (GENE, OTHER)], fold_change=3, model=any_model, key_added="x")
    expected = cells.obsm["x"].copy()
    other = cells.copy()
    other.layers["counts"], other.X = other.X, other.X * 0
    other.var_names = [f"probe{at}" for at in range(other.n_vars)]
    gfx.pp.tokenize(other, model=any_model, layer="counts", gene_ids="ensembl_id")
    shift_genes(other, [GENE, (GENE, OTHER)], fold_change=3, model=any_model, key_added="x")
    np.testing.assert_allclose(other.obsm["x"], expected, atol=1e-6)
    # A column twice is a gene with the sum of both.
    halves = np.column_stack([cells.X.toarray(), cells.X.toarray()[:, cells.var_names.get_loc(GENE)]])
    halves[:, [cells.var_names.get_loc(GENE), 205]] /= 2
    doubled = ad.AnnData(sparse.csr_matrix(halves), var=pd.DataFrame(index=[*cells.var_names, "OLDTOY90"]))
    gfx.pp.tokenize(doubled, model=any_model, counts="normalized")
    shift_genes(doubled, [GENE, (GENE, OTHER)], fold_change=3, model=any_model, key_added="x")
    np.testing.assert_allclose(doubled.obsm["x"], expected, atol=1e-6)


def test_logarithms_are_taken_back(cells, toy_model):
    shift_genes(cells, [GENE, OTHER], fold_change=3, model=toy_model)
    expected = cells.obsm["gfx_shift"].copy()
    cells.X = cells.X.astype(np.float64)
    cells.X = sparse.csr_matrix(np.log1p(cells.X.toarray() / cells.X.sum(axis=1) * 1e4))
    gfx.pp.tokenize(cells, model=toy_model, counts="log1p")
    shift_genes(cells, [GENE, OTHER], fold_change=3, model=toy_model)
    np.testing.assert_allclose(cells.obsm["gfx_shift"], expected, atol=1e-6)


def test_fold_changes_without_counts(cells, toy_model, slots):
    gfx.pp.tokenize(cells, model=toy_model)
    cells.X = None
    before = slots(cells)
    with pytest.raises(ValueError, match=r"`adata\.X` is empty"):
        shift_genes(cells, GENE, fold_change=3, model=toy_model)
    assert slots(cells) == before
    shift_genes(cells, GENE, quartiles=1, model=toy_model)  # needs the ranking alone
    assert np.nanmax(cells.obsm["gfx_shift"]) > 1e-4


def test_fold_changes_of_a_layer_that_is_gone(cells, toy_model, slots):
    gfx.pp.tokenize(cells, model=toy_model, layer="doubled")
    del cells.layers["doubled"]
    before = slots(cells)
    with pytest.raises(ValueError, match=r"Did not find 'doubled' in `adata\.layers`"):
        shift_genes(cells, GENE, fold_change=3, model=toy_model)
    assert slots(cells) == before


def test_stored_zeros_are_no_genes(cells, toy_model):
    shift_genes(cells, [GENE, OTHER], fold_change=0.2, model=toy_model)
    expected = cells.obsm["gfx_shift"].copy()
    dense = cells.X.toarray()
    everywhere = sparse.csr_matrix(np.ones_like(dense))
    everywhere.data[:] = dense.ravel()
    assert everywhere.nnz > (dense > 0).sum()
    cells.X = everywhere
    shift_genes(cells, [GENE, OTHER], fold_change=0.2, model=toy_model)
    np.testing.assert_array_equal(cells.obsm["gfx_shift"], expected)


# --- beside random genes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"quartiles": -2}, {"fold_change": 0.1}], ids=str)
def test_random_genes_are_moved_alike(toy_cells, any_model, slow, arguments):
    few = toy_cells(8)
    gfx.tl.shift_genes(few, [GENE, (GENE, OTHER)], model=any_model, null=6, **arguments)
    sets = few.uns["gfx_shift"]["random_sets"]
    assert sets["perturbation"].tolist() == [GENE] * 6 + [f"{GENE}+{OTHER}"] * 6
    by_hand = few.copy()
    shift_genes(by_hand, [tuple(name.split("+")) for name in sets["genes"]], model=any_model, **arguments)
    rows = slow.tokens(few)
    for at, (perturbation, name, n_cells) in enumerate(
        zip(sets["perturbation"], sets["genes"], sets["n_cells"], strict=True)
    ):
        pairs = list(zip(*(tokens_of(slow, one.split("+")) for one in (perturbation, name)), strict=True))
        cells = [
            place
            for place, row in enumerate(rows)
            if all({a, b} <= set(row) and abs(row.index(a) - row.index(b)) <= 10 for a, b in pairs)
        ]
        assert n_cells == len(cells)
        assert sets["shift_mean"][at] == pytest.approx(by_hand.obsm["gfx_shift"][cells, at].mean(), abs=1e-6)
    assert set(few.uns["gfx_shift"]["synergy"]["perturbation"]) == {f"{GENE}+{OTHER}"}


# --- arguments ------------------------------------------------------------------------------------------------------

WRONG = {
    "neither": ({}, "Give either `quartiles` or `fold_change`; found None and None"),
    "both": ({"quartiles": 1, "fold_change": 2.0}, "Give either `quartiles` or `fold_change`; found 1 and 2.0"),
    "no quartile": ({"quartiles": 0}, "`quartiles` is 1, 2 or 3, or below 0 to inhibit; found 0"),
    "four quartiles": ({"quartiles": -4}, "found -4"),
    "half a quartile": ({"quartiles": 0.5}, "found 0.5"),
    "same": ({"fold_change": 1}, "a positive number other than 1, found 1"),
    "nothing": ({"fold_change": 0}, "found 0. To take a gene out, call `gfx.tl.delete_genes`"),
    "below nothing": ({"fold_change": -2.0}, "found -2.0"),
    "everything": ({"fold_change": np.inf}, "found inf"),
    "no number": ({"fold_change": np.nan}, "found nan"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_how_far_to_move(cells, toy_model, slots, wrong):
    arguments, text = WRONG[wrong]
    before = slots(cells)
    with pytest.raises(ValueError, match=text):
        shift_genes(cells, GENE, model=toy_model, **arguments)
    assert slots(cells) == before


def test_numbers_of_numpy(cells, toy_model):
    shift_genes(cells, GENE, quartiles=np.int64(1), model=toy_model)
    assert cells.uns["gfx_shift"]["params"]["quartiles"] == 1
    shift_genes(cells, GENE, fold_change=np.float64(2.0), model=toy_model)
    assert cells.uns["gfx_shift"]["params"]["fold_change"] == 2
