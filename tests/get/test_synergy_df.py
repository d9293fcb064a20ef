from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import gfx

PAIRS = [("TOY90", "TOY48"), ("TOY90", "TOY165"), ("TOY48", "TOY165"), ("TOY90", "TOY48", "TOY165")]
NAMES = ["+".join(pair) for pair in PAIRS]


@pytest.fixture(scope="module")
def pairs(toy_cells, toy_model):
    adata = toy_cells(30)
    gfx.tl.delete_genes(adata, [*PAIRS, "TOY90"], model=toy_model, n_random=9)
    return adata


def test_synergy_df(pairs):
    table = gfx.get.synergy_df(pairs, min_cells=1)
    measures = ["mean", "low", "high", "z", "p", "fdr"]
    assert table.columns.tolist() == [
        *[
            "perturbation",
            "n_cells",
            "together_mean",
            "summed_mean",
            "displaced_mean",
            "composed_mean",
            "interval_over",
        ],
        *[f"on_shifts_{name}" for name in measures],
        *[f"on_vectors_{name}" for name in measures],
    ]
    assert set(table["perturbation"]) == set(NAMES)
    assert table["on_vectors_z"].is_monotonic_decreasing
    np.testing.assert_allclose(table["on_shifts_mean"], table["together_mean"] - table["summed_mean"], atol=1e-7)
    np.testing.assert_allclose(table["on_vectors_mean"], table["displaced_mean"] - table["composed_mean"], atol=1e-7)
    assert table.attrs["note"] == pairs.uns["gfx_delete"]["note"]
    stored = pairs.uns["gfx_delete"]["synergy"].set_index("perturbation")
    found = table.set_index("perturbation").loc[stored.index, stored.columns]
    pd.testing.assert_frame_equal(found, stored)
    table["together_mean"] = 0.0  # a copy: the result stays as it is
    assert gfx.get.synergy_df(pairs, min_cells=1)["together_mean"].gt(0).all()


def test_the_order_is_that_of_z_on_vectors_then_of_the_excess(pairs):
    adata = pairs.copy()
    stored = adata.uns["gfx_delete"]["synergy"].set_index("perturbation").loc[NAMES].reset_index()
    stored["on_shifts_z"], stored["on_vectors_z"] = [4.0, 3.0, 2.0, 1.0], [-1.0, np.nan, 2.0, np.nan]
    stored["on_vectors_mean"] = [0.1, 0.2, 0.3, 0.4]
    adata.uns["gfx_delete"]["synergy"] = stored
    table = gfx.get.synergy_df(adata, min_cells=1)
    assert table["perturbation"].tolist() == [NAMES[at] for at in (2, 0, 3, 1)]


def test_few_cells_say_nothing_and_are_no_test(pairs):
    adata = pairs.copy()
    stored = adata.uns["gfx_delete"]["synergy"]
    stored["n_cells"], stored["on_shifts_p"], stored["on_vectors_p"] = [30, 12, 9, 10], [0.01, 0.2, 0.001, 0.04], 0.5
    table = gfx.get.synergy_df(adata).set_index("perturbation")
    assert table.index[-1] == NAMES[2]
    assert table.loc[NAMES[2], ["n_cells", "interval_over"]].tolist() == [9, "cells"]
    assert table.loc[NAMES[2]].drop(["n_cells", "interval_over"]).isna().all()
    np.testing.assert_allclose(table.loc[NAMES, "on_shifts_fdr"], [0.03, 0.2, np.nan, 0.06])
    np.testing.assert_allclose(table.loc[NAMES, "on_vectors_fdr"], [0.5, 0.5, np.nan, 0.5])


def test_without_random_sets_by_effect(toy_cells, toy_model):
    adata = toy_cells(30)
    gfx.tl.overexpress_genes(adata, PAIRS, model=toy_model, controls=None, donor_key="donor", key_added="mine")
    table = gfx.get.synergy_df(adata)
    assert table["on_vectors_mean"].is_monotonic_decreasing
    assert table.filter(regex="_(z|p|fdr)$").isna().all(axis=None)
    assert (table["interval_over"] == "donors").all()
    assert table.filter(regex="_(low|high)$").notna().all(axis=None)


def test_no_set_of_several_genes(toy_cells, toy_model):
    adata = toy_cells(6)
    gfx.tl.delete_genes(adata, "TOY90", model=toy_model, controls=None)
    with pytest.raises(KeyError, match=r"No genes were perturbed together in any cell\. Give tuples of genes"):
        gfx.get.synergy_df(adata)
