"""A screen and its follow-up are the same experiment: defaults that look alike mean the same."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import gfx

# The toy cells' states are drawn at random, and most of the time nothing separates them.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

#: In nearly all of the toy cells, in some, and in some.
GENES = ["TOY90", "TOY48", "TOY165"]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"groupby": "condition", "start": "sick", "goal": "healthy"},
        {"positions": "keep", "hidden_layer": -1},
        {"pooling": "genes"},
    ],
    ids=str,
)
def test_a_screen_and_its_follow_up_are_the_same_experiment(toy_cells, any_model, arguments):
    """A gene shifts cells, also toward a goal, as far in a screen as when it is deleted by itself."""
    cells = toy_cells(12)
    gfx.tl.screen_genes(cells, genes=GENES, model=any_model, controls=None, **arguments)
    gfx.tl.delete_genes(cells, GENES, model=any_model, controls=None, **arguments)
    screen, table = cells.varm["gfx_screen"].loc[GENES], cells.uns["gfx_delete"]["table"]
    assert screen["n_cells"].tolist() == table["n_cells"].tolist()
    np.testing.assert_allclose(screen["shift_mean"], table["shift_mean"], atol=1e-6)
    np.testing.assert_allclose(screen["shift_sd"], table["shift_sd"], atol=1e-6)
    np.testing.assert_allclose(screen["rank_mean"], table["rank_mean"], atol=1e-6)
    if "goal" in arguments:
        toward = cells.uns["gfx_delete"]["state_table"].query("role == 'goal'")["toward_mean"]
        np.testing.assert_allclose(screen["toward_mean"], toward, atol=1e-6)
        assert abs(toward).min() > 1e-5
    for name in ("pooling", "positions", "hidden_layer", "dtype"):
        assert cells.uns["gfx_screen"]["params"][name] == cells.uns["gfx_delete"]["params"][name], name


def test_arguments_that_both_have_are_called_alike_and_have_the_same_defaults():
    screen, deletion = (inspect.signature(tool).parameters for tool in (gfx.tl.screen_genes, gfx.tl.delete_genes))
    other = {"genes", "controls"}  # a screen has every gene, and is itself the sample of random genes
    shared = [name for name in screen if name in deletion and name not in other]
    assert {"positions", "pooling", "hidden_layer", "store", "rng", "groupby", "start", "goal"} < set(shared)
    for name in shared:
        assert screen[name].default == deletion[name].default, name
        assert screen[name].kind == deletion[name].kind, name


def test_all_tools_turn_cells_into_vectors_alike(cells, any_model):
    gfx.tl.embed(cells, model=any_model)
    states = {"groupby": "cell_type", "start": "a", "goal": "b"}
    gfx.tl.delete_genes(cells, GENES[0], model=any_model, controls=None, **states)
    gfx.tl.screen_genes(cells, genes=GENES, model=any_model, controls=None, **states)
    pooling = {cells.uns[key]["params"]["pooling"] for key in ("X_gfx", "gfx_delete", "gfx_screen")}
    assert len(pooling) == 1
