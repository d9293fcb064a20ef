from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest

import gfx

# The toy cells' states are drawn at random, and most of the time nothing separates them.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

#: In nearly all of the toy cells.
GENE, OTHER = "TOY90", "TOY48"

#: Most tests are about effects, not about their controls.
delete_genes = partial(gfx.tl.delete_genes, controls=None)


def test_tables_of_donors_are_means_over_their_cells(cells, toy_model):
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


ALONE = ", and no random sets were run to compare with: there are no p-values."
BESIDE = ": p and fdr compare with rank-matched random gene sets"
RANDOM_SETS = {"controls": "random_sets", "n_random": 3}
NOTES = {
    "alone": ({}, ALONE),
    "donors": ({"donor_key": "donor"}, ALONE),
    "random sets": (RANDOM_SETS, f"{BESIDE}; name the donors with `donor_key=` for tests over donors as well."),
    "random sets and donors": (RANDOM_SETS | {"donor_key": "donor"}, f"{BESIDE}, donor_p also over 4 donors."),
    "one donor of the start": (
        RANDOM_SETS | {"donor_key": "of_start", "groupby": "cell_type", "start": "a", "goal": "b"},
        f"{BESIDE}, donor_p also over 1 donor.",
    ),
}


@pytest.mark.parametrize("note", NOTES)
def test_the_note_says_what_p_values_are_over(cells, toy_model, note):
    arguments, text = NOTES[note]
    cells.obs["of_start"] = np.where(cells.obs["cell_type"] == "a", "one", cells.obs["donor"].astype(str))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Whether 'a' and 'b' are separable could not be tested")
        delete_genes(cells, GENE, model=toy_model, **arguments)
    assert cells.uns["gfx_delete"]["note"] == f"Cells are not replicates{text}"
