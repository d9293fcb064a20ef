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

# The toy cells' states are drawn at random, and most of the time nothing separates them.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

#: In nearly all of the toy cells, and in some.
GENE, OTHER = "TOY90", "TOY48"

shift_genes = partial(gfx.tl.shift_genes, controls=["parts"])


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
def test_quartiles(cells, any_model, slow, assert_effects, quartiles):
    rows, names = slow.tokens(cells), [GENE, OTHER, "TOY21"]
    shift_genes(cells, names, by=("quartiles", quartiles), model=any_model)
    moved = 0
    for at, gene in enumerate(slow.named(names)):
        effects = {}
        for place, row in enumerate(rows):
            if gene in row:
                ranking = slow.genes(row)
                rank, n = ranking.index(gene), len(ranking)
                to = landing(rank, n, quartiles)
                assert (to <= rank) if quartiles > 0 else (to >= rank)
                assert quarter(to, n) == np.clip(quarter(rank, n) - quartiles, 0, 3)
                moved += to != rank
                effects[place] = slow.effect(row, slow.edited(row, [gene], "shift", [to]), [gene], slow.pooling)
        assert_effects(cells, at, effects, "gfx_shift")
    assert moved > 10
    params = cells.uns["gfx_shift"]["params"]
    assert params["by"] == ["quartiles", str(quartiles)]
    assert params["function"] == "tl.shift_genes"


def test_every_gene_of_one_cell_by_quartiles(cells, toy_model):
    """A gene at each rank: what is first cannot rise, what is last cannot fall."""
    one = cells[[0]].copy()
    gfx.pp.tokenize(one, model=toy_model)
    row = one.obsm["gfx_tokens"][0]
    names = toy_model.vocabulary.symbols[row[row > 3]].tolist()
    for quartiles, unmoved in ((1, names[0]), (-1, names[-1])):
        shift_genes(one, names, by=("quartiles", quartiles), model=toy_model)
        still = np.array(names)[np.abs(one.obsm["gfx_shift"][0]) < 1e-7]
        assert still.tolist() == [unmoved]


def test_quartiles_of_sets_and_toward_states(cells, any_model, slow, assert_effects):
    """Each gene of a set goes where it would go by itself; those that meet keep their order."""
    shift_genes(cells, (GENE, OTHER), by=("quartiles", 3), model=any_model, groupby="cell_type", start="b", goal="c")
    genes, rows = slow.named([GENE, OTHER]), slow.tokens(cells)
    vectors = np.array([slow.cell(row, slow.pooling) for row in rows])
    goals = [vectors[cells.obs["cell_type"] == state].mean(axis=0) for state in "abc"]
    effects = {}
    for place in np.flatnonzero(cells.obs["cell_type"] == "b"):
        ranking = slow.genes(rows[place])
        if set(genes) <= set(ranking):
            ranks = [ranking.index(gene) for gene in genes]
            wanted = sorted((landing(rank, len(ranking), 3), rank) for rank in ranks)
            # The second one has the first before it, which is none of the others that `to` counts.
            first, second = wanted[0][0], max(wanted[0][0], wanted[1][0] - 1)
            to = [first if rank == wanted[0][1] else second for rank in ranks]
            edited = slow.edited(rows[place], genes, "shift", to)
            effects[place] = slow.effect(rows[place], edited, genes, slow.pooling, goals)
    assert len(effects) > 3
    assert_effects(cells, 0, effects, "gfx_shift")


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


def assert_fold_change(cells, model, slow, sets, assert_effects, *, fold):
    """What `pp.tokenize` makes of the multiplied counts, but for genes that no longer find a place."""
    shift_genes(cells, sets, by=("fold_change", fold), model=model)
    rows = tokenized(cells.copy(), model)
    told = {"moved": 0, "gone": 0}
    for at, names in enumerate(sets):
        genes = slow.named(names)
        after = tokenized(multiplied(cells, names, fold), model, counts="normalized")
        effects = {}
        for place, (row, new) in enumerate(zip(rows, after, strict=True)):
            if set(genes) <= set(row):
                edited = [token for token in new if token in row]  # nobody moves up from behind the last gene
                told["moved"] += edited != row
                told["gone"] += not set(genes) <= set(new)
                effects[place] = slow.effect(row, edited, genes, slow.pooling)
        assert_effects(cells, at, effects, "gfx_shift")
    return told


@pytest.mark.parametrize("fold", [0.25, 1.7, 1e6, 1e-6])
def test_fold_change(cells, any_model, slow, assert_effects, fold):
    is_full = np.array([len(slow.genes(row)) == slow.room for row in slow.tokens(cells)])
    assert 0 < is_full.sum() < 24
    told = assert_fold_change(cells, any_model, slow, [(GENE,), (OTHER,), (GENE, OTHER)], assert_effects, fold=fold)
    assert told["moved"] > 10
    assert (told["gone"] > 3) == (fold < 1)
    assert cells.uns["gfx_shift"]["params"]["by"] == ["fold_change", str(float(fold))]


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
def test_ties_are_those_of_tokenize(cells, even, slow, assert_effects, fold):
    names = [(name,) for name in ("TOY90", "TOY48", "TOY21", "TOY150", "TOY5")]
    cells = cells[:12].copy()
    assert_fold_change(cells, even, slow, names, assert_effects, fold=fold)
    counts = cells[:, [name for (name,) in names]].X.toarray()
    assert {1, 2} & set(counts[counts > 0])


def test_fold_changes_of_stored_tokens(cells, any_model, slow):
    """Counts are read from where the tokens were made of them, by the names that they were made with."""
    shift_genes(cells, [GENE, (GENE, OTHER)], by=("fold_change", 3), model=any_model, key_added="x")
    expected = cells.obsm["x"].copy()
    other = cells.copy()
    other.layers["counts"], other.X = other.X, other.X * 0
    other.var_names = [f"probe{at}" for at in range(other.n_vars)]
    gfx.pp.tokenize(other, model=any_model, layer="counts", gene_ids="ensembl_id")
    shift_genes(other, [GENE, (GENE, OTHER)], by=("fold_change", 3), model=any_model, key_added="x")
    np.testing.assert_allclose(other.obsm["x"], expected, atol=1e-6)
    # A column twice is a gene with the sum of both.
    halves = np.column_stack([cells.X.toarray(), cells.X.toarray()[:, cells.var_names.get_loc(GENE)]])
    halves[:, [cells.var_names.get_loc(GENE), 205]] /= 2
    doubled = ad.AnnData(sparse.csr_matrix(halves), var=pd.DataFrame(index=[*cells.var_names, "OLDTOY90"]))
    gfx.pp.tokenize(doubled, model=any_model, counts="normalized")
    shift_genes(doubled, [GENE, (GENE, OTHER)], by=("fold_change", 3), model=any_model, key_added="x")
    np.testing.assert_allclose(doubled.obsm["x"], expected, atol=1e-6)


def test_logarithms_are_taken_back(cells, toy_model):
    shift_genes(cells, [GENE, OTHER], by=("fold_change", 3), model=toy_model)
    expected = cells.obsm["gfx_shift"].copy()
    cells.X = cells.X.astype(np.float64)
    cells.X = sparse.csr_matrix(np.log1p(cells.X.toarray() / cells.X.sum(axis=1) * 1e4))
    gfx.pp.tokenize(cells, model=toy_model, counts="log1p")
    shift_genes(cells, [GENE, OTHER], by=("fold_change", 3), model=toy_model)
    np.testing.assert_allclose(cells.obsm["gfx_shift"], expected, atol=1e-6)


def test_fold_changes_without_counts(cells, toy_model, slots):
    gfx.pp.tokenize(cells, model=toy_model)
    cells.X = None
    before = slots(cells)
    with pytest.raises(ValueError, match=r"`adata\.X` is empty"):
        shift_genes(cells, GENE, by=("fold_change", 3), model=toy_model)
    assert slots(cells) == before
    shift_genes(cells, GENE, by=("quartiles", 1), model=toy_model)  # needs the ranking alone
    assert np.nanmax(cells.obsm["gfx_shift"]) > 1e-4


def test_fold_changes_of_a_layer_that_is_gone(cells, toy_model, slots):
    gfx.pp.tokenize(cells, model=toy_model, layer="doubled")
    del cells.layers["doubled"]
    before = slots(cells)
    with pytest.raises(ValueError, match=r"Did not find 'doubled' in `adata\.layers`"):
        shift_genes(cells, GENE, by=("fold_change", 3), model=toy_model)
    assert slots(cells) == before


def test_stored_zeros_are_no_genes(cells, toy_model):
    shift_genes(cells, [GENE, OTHER], by=("fold_change", 0.2), model=toy_model)
    expected = cells.obsm["gfx_shift"].copy()
    dense = cells.X.toarray()
    everywhere = sparse.csr_matrix(np.ones_like(dense))
    everywhere.data[:] = dense.ravel()
    assert everywhere.nnz > (dense > 0).sum()
    cells.X = everywhere
    shift_genes(cells, [GENE, OTHER], by=("fold_change", 0.2), model=toy_model)
    np.testing.assert_array_equal(cells.obsm["gfx_shift"], expected)


# --- beside random genes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"by": ("quartiles", -2)}, {"by": ("fold_change", 0.1)}], ids=str)
def test_random_genes_are_moved_alike(toy_cells, any_model, slow, arguments):
    few = toy_cells(8)
    gfx.tl.shift_genes(few, [GENE, (GENE, OTHER)], model=any_model, controls="random_sets", n_random=6, **arguments)
    sets = few.uns["gfx_shift"]["random_sets"]
    assert sets["perturbation"].tolist() == [GENE] * 6 + [f"{GENE}+{OTHER}"] * 6
    by_hand = few.copy()
    shift_genes(by_hand, [tuple(name.split("+")) for name in sets["genes"]], model=any_model, **arguments)
    rows = slow.tokens(few)
    for at, (perturbation, name, n_cells) in enumerate(
        zip(sets["perturbation"], sets["genes"], sets["n_cells"], strict=True)
    ):
        pairs = list(zip(*(slow.named(one.split("+")) for one in (perturbation, name)), strict=True))
        cells = [
            place
            for place, row in enumerate(rows)
            if all({a, b} <= set(row) and abs(row.index(a) - row.index(b)) <= 10 for a, b in pairs)
        ]
        assert n_cells == len(cells)
        assert sets["shift_mean"][at] == pytest.approx(by_hand.obsm["gfx_shift"][cells, at].mean(), abs=1e-6)
    assert set(few.uns["gfx_shift"]["synergy"]["perturbation"]) == {f"{GENE}+{OTHER}"}


# --- arguments ------------------------------------------------------------------------------------------------------

PAIR = r"`by` is \('quartiles', n\) or \('fold_change', x\), found "
QUARTILES = "Genes move by 1, 2 or 3 quartiles, or by fewer than 0 to inhibit them; found "
FOLD_CHANGE = "A fold change multiplies counts: a positive number other than 1, found "
WRONG = {
    "a number": (-1, f"{PAIR}-1"),
    "nothing given": (None, f"{PAIR}None"),
    "a word": ("quartiles", f"{PAIR}'quartiles'"),
    "two words": (("quartiles", "one"), PAIR),
    "a truth value": (("quartiles", True), PAIR),
    "another unit": (("rank", 3), PAIR),
    "no quartile": (("quartiles", 0), f"{QUARTILES}0"),
    "four quartiles": (("quartiles", -4), f"{QUARTILES}-4"),
    "half a quartile": (("quartiles", 0.5), f"{QUARTILES}0.5"),
    "no number of quartiles": (("quartiles", np.nan), f"{QUARTILES}nan"),
    "endless quartiles": (("quartiles", np.inf), f"{QUARTILES}inf"),
    "same": (("fold_change", 1), f"{FOLD_CHANGE}1"),
    "nothing": (("fold_change", 0), f"{FOLD_CHANGE}0. To take a gene out, call `gfx.tl.delete_genes`"),
    "below nothing": (("fold_change", -2.0), f"{FOLD_CHANGE}-2.0"),
    "everything": (("fold_change", np.inf), f"{FOLD_CHANGE}inf"),
    "no number": (("fold_change", np.nan), f"{FOLD_CHANGE}nan"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_changes_that_cannot_be(cells, toy_model, slots, wrong):
    by, text = WRONG[wrong]
    before = slots(cells)
    with pytest.raises(ValueError, match=text):
        shift_genes(cells, GENE, by=by, model=toy_model)
    assert slots(cells) == before


def test_by_has_no_default(cells, toy_model):
    with pytest.raises(TypeError, match="'by'"):
        shift_genes(cells, GENE, model=toy_model)


def test_numbers_of_numpy(cells, toy_model):
    for given, plain in (
        (("quartiles", np.int64(1)), ("quartiles", 1)),
        (["fold_change", np.float64(2.0)], ("fold_change", 2)),
    ):
        shift_genes(cells, GENE, by=given, model=toy_model, key_added="given")
        shift_genes(cells, GENE, by=plain, model=toy_model, key_added="plain")
        assert cells.uns["given"]["params"]["by"] == cells.uns["plain"]["params"]["by"]
        np.testing.assert_array_equal(cells.obsm["given"], cells.obsm["plain"])
