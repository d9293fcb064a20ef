"""Where the tools depart from the official software on purpose; `docs/differences.md` lists them."""

from __future__ import annotations

import numpy as np
import pytest

import gfx


@pytest.mark.filterwarnings("ignore:Held-out cells of")
def test_departure_states_are_whole_labels(toy_cells, toy_model):
    """Cells labelled "n" are none of the state "nf", although the label is a part of its name."""
    adata = toy_cells(30)
    adata.obs["state"] = np.array(["nf", "n", "hcm"])[np.arange(30) % 3]
    detected = np.asarray((adata.X > 0).sum(axis=0)).ravel() * adata.var_names.str.startswith("TOY")
    gene = adata.var_names[int(np.argmax(detected))]
    states = {"groupby": "state", "start": "hcm", "goal": "nf", "model": toy_model, "controls": None}
    without = adata[adata.obs["state"] != "n"].copy()
    gfx.tl.delete_genes(adata, gene, **states)
    gfx.tl.delete_genes(without, gene, **states)
    toward = {}
    for name, cells in (("with", adata), ("without", without)):
        table = gfx.get.deletion_df(cells, min_cells=5).set_index("state")["toward_mean"]
        toward[name] = table["nf"]
    assert np.isfinite(toward["with"])
    np.testing.assert_allclose(toward["with"], toward["without"], rtol=0, atol=1e-7)
