from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import numpy as np
import pandas as pd
import pytest

import gfx
from gfx.models._vocabulary_file import write_vocabulary

# The toy cells' states are drawn at random, and most of the time nothing separates them.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

#: In nearly all of the toy cells.
GENE, OTHER = "TOY90", "TOY48"

#: Most tests are about effects, not about their controls.
delete_genes = partial(gfx.tl.delete_genes, controls=None)


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
        r"does not know \['x0', .*, 'x9'\] and 2 more\. Its vocabulary 'toy' has \d+ genes, by symbol",
    ),
    "special token": ("<cls>", ValueError, "does not know"),
    "a mapping": ({GENE: [GENE]}, TypeError, "names of genes, or tuples of names, found .* of type dict"),
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


#: Of single cells none can be held out.
UNTESTED = pytest.mark.filterwarnings("ignore:Whether '.*' and '.*' are separable could not be tested")


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
    gfx.tl.delete_genes(few, given, model=shared_symbol, controls="random_sets", n_random=20, key_added="given")
    assert few.uns["given"]["perturbations"].tolist() == given
    random = set(few.uns["given"]["random_sets"]["genes"])
    assert random <= set(expected)
