from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import gfx

# The toy cells' states are drawn at random, and most of the time nothing separates them.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

#: In nearly all of the toy cells.
GENE, OTHER = "TOY90", "TOY48"

#: Most tests are about effects, not about their controls.
delete_genes = partial(gfx.tl.delete_genes, controls=None)


WITH_STATES = {"groupby": "condition", "start": "sick", "goal": "healthy"}


def few_genes(cells):
    """Cell 0 has only the gene, cell 1 only both genes, no cell has TOY7."""
    counts = cells.X.toarray()
    gene, other = (cells.var_names.get_loc(name) for name in (GENE, OTHER))
    counts[:2] = 0
    counts[0, gene] = counts[1, gene] = counts[1, other] = 3
    counts[:, cells.var_names.get_loc("TOY7")] = 0
    cells.X = sparse.csr_matrix(counts)


def test_what_is_drawn_follows_the_seed(cells, toy_model, slots):
    def run(rng):
        adata = cells.copy()
        gfx.tl.delete_genes(adata, [GENE, (GENE, OTHER)], model=toy_model, n_random=3, rng=rng, **WITH_STATES)
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
    arguments = {"model": toy_model, "n_random": 6, "donor_key": "donor", "rng": 4, **states}
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
    arguments = {"model": toy_model, "n_random": 6, "donor_key": "donor", "rng": 4}
    genes = [GENE, OTHER, (GENE, OTHER)]
    gfx.tl.delete_genes(cells, genes, **arguments, **WITH_STATES)
    sick = cells[cells.obs["condition"] == "sick"].copy()
    gfx.tl.delete_genes(sick, genes, **arguments)
    found, expected = cells.uns["gfx_delete"], sick.uns["gfx_delete"]
    names = [GENE, OTHER, f"{GENE}+{OTHER}"]
    assert_same_of_each(found, expected, names, OF_PERTURBATIONS[:-1])
    assert_same_of_each(found, expected, names[2:], ["synergy"])
    np.testing.assert_allclose(found["table"]["p"], expected["table"]["p"])
    columns = ["rank", "shift", "random_weights_shift_mean"]
    ours, theirs = (result["genes_of_all_ranks"][columns] for result in (found, expected))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4, atol=1e-7)


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
    "arguments", [{}, {"controls": None}, WITH_STATES, {"centroids": "without", **WITH_STATES}], ids=str
)
@pytest.mark.filterwarnings("ignore:No cell .*has the genes of")
def test_results_do_not_depend_on_blocks(cells, toy_model, monkeypatch, most, arguments):
    few_genes(cells)
    genes = ["TOY7", GENE, (GENE, OTHER), "TOY21", ("TOY7", GENE), (OTHER, "TOY21", GENE), OTHER]
    arguments = {"model": toy_model, "n_random": 5, "donor_key": "donor"} | arguments
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
