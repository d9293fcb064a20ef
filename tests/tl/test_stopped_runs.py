"""Runs that are stopped and go on from a store, and runs that several devices or workers share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

import gfx
from gfx._engine import tasks
from gfx._run_store import RunStoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

# The toy cells' states are drawn at random, and most of the time nothing separates them.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

GENES = ["TOY90", ("TOY90", "TOY48")]
STATES = {"groupby": "cell_type", "start": "a", "goal": "b"}
CONTROLS = ["parts", "random_sets", "random_weights", "baselines", "centroids"]
TOOLS: dict[str, dict[str, Any]] = {
    "embed": {},
    "embed_genes": {"groupby": "cell_type"},
    "delete_genes": {"genes": GENES, "controls": CONTROLS, "n_random": 4, "donor_key": "donor", **STATES},
    "shift_genes": {"genes": GENES, "by": ("fold_change", 0.3), "controls": "random_sets", "n_random": 4},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Cut runs into several blocks, and draw few random genes."""
    for name in ("gfx._engine.run.CELLS_PER_BLOCK", "gfx._engine.run.CELLS_PER_SUM"):
        monkeypatch.setattr(name, 7)
    monkeypatch.setattr("gfx.tl.perturbation._experiment.RUNS_PER_BLOCK", 40)
    monkeypatch.setattr("gfx.tl.perturbation._controls.N_RANK_SAMPLE", 30)


@dataclass
class Calls:
    """Counts the blocks that are run, and stops before one of them."""

    n: int = 0
    stop_at: int | None = None

    def watch(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def watched(task: Any, *args: Any) -> Any:
            if self.n == self.stop_at:
                raise KeyboardInterrupt
            self.n += 1
            return run(task, *args)

        return watched


@pytest.fixture
def calls(monkeypatch) -> Calls:
    counter = Calls()
    for task in (tasks.CellEmbedding, tasks.GeneEmbedding, tasks.Perturbation):
        monkeypatch.setattr(task, "run", counter.watch(task.run))
    return counter


def call(name: str, adata: AnnData, **arguments: Any) -> AnnData:
    """Run a tool on a copy."""
    return getattr(gfx.tl, name)(adata, **TOOLS[name] | arguments, copy=True)


@pytest.mark.parametrize("name", ["embed", "embed_genes", "delete_genes"])
def test_a_run_that_is_stopped_several_times_goes_on_to_the_same_result(cells, toy_model, slots, calls, tmp_path, name):
    """To the last bit; what is finished is not run again."""
    expected, store = call(name, cells, model=toy_model), tmp_path / "run.zarr"
    n_layers, calls.n = calls.n, 0
    assert n_layers >= 4
    before = slots(cells)
    for share in (0.1, 0.5, 0.9):
        calls.stop_at = int(n_layers * share)
        with pytest.raises(KeyboardInterrupt):
            call(name, cells, model=toy_model, store=store)
        assert calls.n == calls.stop_at
        assert slots(cells) == before
    calls.stop_at = None
    found = call(name, cells, model=toy_model, store=store)
    assert calls.n == n_layers
    assert slots(found) == slots(expected)
    calls.stop_at = calls.n  # nothing is left to run
    assert slots(call(name, cells, model=toy_model, store=store)) == slots(expected)


@pytest.mark.parametrize("name", ["embed", "embed_genes", "delete_genes"])
def test_a_call_that_goes_on_says_once_how_much_of_all_is_there(cells, toy_model, calls, tmp_path, caplog, name):
    caplog.set_level("INFO", logger="gfx")
    call(name, cells, model=toy_model)
    calls.n, calls.stop_at = 0, calls.n - 1
    with pytest.raises(KeyboardInterrupt):
        call(name, cells, model=toy_model, store=tmp_path / "run.zarr")
    calls.stop_at = None
    assert not [message for message in caplog.messages if "going on" in message]
    call(name, cells, model=toy_model, store=tmp_path / "run.zarr")
    (message,) = [message for message in caplog.messages if "going on" in message]
    n, n_blocks = map(int, re.search(r"run\.zarr has (\d+) of (\d+) blocks of cells; going on\.$", message).groups())
    assert n == n_blocks - 1 > 0


OTHER_CALLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "hidden layer": ("embed", {"hidden_layer": -1}, "hidden_layer"),
    "pooling": ("embed", {"pooling": "mean"}, "pooling"),
    "groups": ("embed_genes", {"groupby": "condition"}, "groupby, groups"),
    "cells of genes": ("embed_genes", {"mask_obs": np.arange(24) > 3}, "groups"),
    "genes": ("delete_genes", {"genes": ["TOY90"]}, "genes"),
    "positions": ("delete_genes", {"positions": "keep"}, "positions"),
    "seed": ("delete_genes", {"rng": 1}, "rng"),
    "random sets": ("delete_genes", {"n_random": 5}, "n_random"),
    "controls": ("delete_genes", {"controls": ["random_sets"]}, "controls"),
    "goal": ("delete_genes", {"goal": "c"}, "goal"),
    "start": ("delete_genes", {"start": "c"}, "perturbed_cells, start"),
    "change": ("shift_genes", {"by": ("fold_change", 0.5)}, "by"),
}


@pytest.fixture(scope="module")
def begun(toy_cells, toy_model, tmp_path_factory):
    """A store for each tool, begun by a run on the cells."""
    folder, adata = tmp_path_factory.mktemp("begun"), toy_cells(24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gfx.tl.perturbation._controls.N_RANK_SAMPLE", 30)
        for name in TOOLS:
            call(name, adata, model=toy_model, store=folder / name)
    return adata, folder


@pytest.mark.parametrize("other", OTHER_CALLS)
def test_a_store_of_another_call_is_refused(begun, toy_model, slots, other):
    adata, folder = begun
    name, arguments, differs = OTHER_CALLS[other]
    before, adata = slots(adata), adata.copy()
    with pytest.raises(RunStoreError, match=rf"holds a run with another {differs}, which cannot go on with these:"):
        call(name, adata, model=toy_model, store=folder / name, **arguments)
    assert slots(adata) == before


@pytest.mark.parametrize("name", TOOLS)
def test_a_store_of_other_cells_tools_or_settings_is_refused(begun, toy_model, toy_model_v1, name):
    adata, folder = begun
    shorter = adata[:-1].copy()
    other = next(tool for tool in TOOLS if tool != name)
    for wanted, model, store, differs in (
        (shorter, toy_model, name, "cells"),
        (adata[::-1].copy(), toy_model, name, "cells"),
        (adata, toy_model_v1, name, "model"),
        (adata, toy_model, other, "function"),
    ):
        with pytest.raises(RunStoreError, match=rf"holds a run with another [^:]*\b{differs}\b"):
            call(name, wanted, model=model, store=folder / store)
    with (
        gfx.settings.override(batch_tokens=100),
        pytest.raises(RunStoreError, match="holds a run with another batch_tokens"),
    ):
        call(name, adata, model=toy_model, store=folder / name)
    with (
        gfx.settings.override(dtype="float16"),
        pytest.raises(RunStoreError, match="holds a run with another dtype"),
    ):
        call(name, adata, model=toy_model, store=folder / name)


def test_tables_are_made_anew_from_the_same_runs(cells, toy_model, slots, calls, tmp_path):
    """Donors and baselines change no run."""
    call("delete_genes", cells, model=toy_model, store=tmp_path / "run")
    calls.stop_at = calls.n
    arguments = {"donor_key": None, "controls": [name for name in CONTROLS if name != "baselines"]}
    found = call("delete_genes", cells, model=toy_model, store=tmp_path / "run", **arguments)
    calls.stop_at = None
    assert slots(found) == slots(call("delete_genes", cells, model=toy_model, **arguments))


def assert_close(found: AnnData, expected: AnnData) -> None:
    """To rounding: threads of other devices may add up in another order."""
    for element in ("obsm", "varm"):
        held, wanted = getattr(found, element), getattr(expected, element)
        assert set(held) == set(wanted)
        for key in wanted:
            np.testing.assert_allclose(held[key], wanted[key], atol=1e-6, err_msg=key)
    for key in set(expected.uns) & {"gfx_delete", "gfx_shift"}:
        for name, table in expected.uns[key].items():
            if isinstance(table, pd.DataFrame):
                pd.testing.assert_frame_equal(found.uns[key][name], table, rtol=1e-3, atol=1e-6, obj=name)


@pytest.mark.parametrize("name", TOOLS)
def test_devices_and_workers_share_the_cells(cells, toy_model, calls, client, name):
    expected, n_layers = call(name, cells, model=toy_model), calls.n
    for where in ({"device": ["cpu", "cpu:0"]}, {"client": client}):
        calls.n = 0
        with gfx.settings.override(**where):
            assert_close(call(name, cells, model=toy_model), expected)
        assert calls.n == n_layers
