from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import gfx
from gfx.tl.perturbation import _experiment

# The toy cells' states are drawn at random, and most of the time nothing separates them.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

#: In nearly all of the toy cells.
GENE, OTHER = "TOY90", "TOY48"

#: Most tests are about effects, not about their controls.
delete_genes = partial(gfx.tl.delete_genes, controls=None)


WITH_STATES = {"groupby": "condition", "start": "sick", "goal": "healthy"}


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
    weights = [adata.uns["gfx_delete"]["table"]["random_weights_shift_mean"] for adata in (first, other)]
    assert (weights[0] != weights[1]).all()
    np.testing.assert_array_equal(first.obsm["gfx_delete"], other.obsm["gfx_delete"])
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


@pytest.mark.parametrize("n_random", [6, None])
@pytest.mark.parametrize("states", [{}, WITH_STATES], ids=["plain", "states"])
def test_z_does_not_depend_on_what_else_is_perturbed(cells, toy_model, states, n_random):
    """Nor on the order: random sets, and all else that is drawn, follow the seed and the genes."""
    arguments = {"model": toy_model, "n_random": n_random, "donor_key": "donor", "rng": 4, **states}
    gfx.tl.delete_genes(cells, [GENE, (GENE, OTHER)], key_added="few", **arguments)
    gfx.tl.delete_genes(
        cells, ["TOY21", (GENE, OTHER), "TOY165", (OTHER, "TOY21"), GENE], key_added="many", **arguments
    )
    few, many = cells.uns["few"], cells.uns["many"]
    names = [f"{GENE}+{OTHER}", GENE]
    tables = OF_PERTURBATIONS + (OF_PERTURBATIONS_AND_STATES if states else [])
    assert_same_of_each(many, few, names, [table for table in tables if table != "synergy"])
    assert_same_of_each(many, few, names[:1], ["synergy"])
    assert n_random is None or many["table"]["z"].notna().all()  # by default, few cells have too few random sets
    pd.testing.assert_frame_equal(many["genes_of_all_ranks"], few["genes_of_all_ranks"], rtol=1e-4, atol=1e-7)
    of_all_ranks = [result["controls"].query("statistic != 'spearman_perturbations'") for result in (many, few)]
    pd.testing.assert_frame_equal(*of_all_ranks, atol=1e-3)
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
    columns = ["rank", "shift", "random_weights_shift"]
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


@pytest.mark.parametrize(
    ("n_cells", "n_runs", "arguments"),
    [
        (1, 1, {}),
        (5, 15, {"controls": ["parts"]}),
        (5, 15, WITH_STATES),
        (1, 1, {"controls": ["centroids"], **WITH_STATES}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:No cell .*has the genes of")
def test_results_do_not_depend_on_blocks(cells, toy_model, monkeypatch, n_cells, n_runs, arguments):
    genes = ["TOY7", GENE, (GENE, OTHER), "TOY21", ("TOY7", GENE), (OTHER, "TOY21", GENE), OTHER]
    few = cells[:12].copy()
    few.X = sparse.csr_matrix(few.X.multiply(few.var_names != "TOY7"))
    arguments = {"model": toy_model, "n_random": 5, "donor_key": "donor"} | arguments
    monkeypatch.setattr("gfx.tl.perturbation._controls.N_RANK_SAMPLE", 40)
    gfx.tl.delete_genes(few, genes, key_added="x", **arguments)
    monkeypatch.setattr("gfx.tl.perturbation._experiment.CELLS_PER_BLOCK", n_cells)
    monkeypatch.setattr("gfx.tl.perturbation._experiment.RUNS_PER_BLOCK", n_runs)
    gfx.tl.delete_genes(few, genes, key_added="y", **arguments)
    found, expected = few.uns["y"], few.uns["x"]
    for result in (found, expected):
        del result["slots"]
    assert_nearly_equal(found, expected)
    for held in (few.obsm, few.varm):
        keys = [key for key in held if key == "x" or key.startswith("x_")]
        assert len(keys) >= 2
        for key in keys:
            np.testing.assert_allclose(held["y" + key[1:]], held[key], atol=1e-6, err_msg=key)


@pytest.mark.parametrize(
    "n_runs", [[], [5], [3, 4, 3], [10, 10, 10], [11, 1, 9, 1], [2, 30, 2, 1, 8], [1] * 12], ids=str
)
def test_blocks_hold_every_run_once_with_the_longest_cells_first(monkeypatch, n_runs):
    monkeypatch.setattr(_experiment, "RUNS_PER_BLOCK", 10)
    monkeypatch.setattr(_experiment, "CELLS_PER_BLOCK", 4)
    rng = np.random.default_rng(0)
    lengths, cell = rng.integers(1, 20, len(n_runs) + 3), np.repeat(np.arange(len(n_runs)) + 2, n_runs)
    cell = rng.permutation(cell)
    rows, runs = _experiment._blocks(cell, lengths)
    assert sorted(np.concatenate([*runs, []]).tolist()) == list(range(len(cell)))
    assert sorted(np.concatenate([*rows, []]).tolist()) == [at + 2 for at in range(len(n_runs))]
    assert (np.diff(lengths[np.concatenate([*rows, []]).astype(int)]) <= 0).all()
    for of_block, run in zip(rows, runs, strict=True):
        assert set(cell[run]) == set(of_block)
        assert len(of_block) <= 4
        assert len(run) <= 10 or len(of_block) == 1
