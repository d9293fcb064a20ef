"""Screens on the workers of a dask cluster, which may die."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

import gfx

distributed = pytest.importorskip("distributed")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import anndata as ad
    from tests.conftest import ToyCells

    Slots = dict[str, Any]
    ReadSlots = Callable[[ad.AnnData], Slots]

# The toy cells' states are drawn at random, and most of the time they are not separable.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out cells of")

N_CELLS = 24


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Two workers of one thread each, as many as torch has in these tests: results are the same to the last bit."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", protocol="tcp"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def arguments(toy_folder: Path) -> dict[str, Any]:
    """12 of 24 cells, in 6 blocks each of the model and of random weights, with a goal."""
    states = {"groupby": "condition", "start": "sick", "goal": "healthy"}
    return {"model": toy_folder, "controls": "random_weights", **states}


@pytest.fixture(scope="module")
def expected(
    toy_cells: ToyCells, arguments: dict[str, Any], slots: ReadSlots, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Slots, Path]:
    """What comes out without dask, and the store."""
    adata, store = toy_cells(N_CELLS), tmp_path_factory.mktemp("whole") / "store"
    gfx.tl.screen_genes(adata, store=store, **arguments)
    return slots(adata), store


def screen(client: Any, adata: ad.AnnData, **arguments: Any) -> None:
    with gfx.settings.override(client=client):
        gfx.tl.screen_genes(adata, **arguments)


def files(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_workers_do_the_same(
    toy_cells: ToyCells, arguments: dict[str, Any], expected: tuple[Slots, Path], slots: ReadSlots, client: Any
) -> None:
    adata = toy_cells(N_CELLS)
    screen(client, adata, **arguments)
    assert slots(adata) == expected[0]


def test_workers_go_on_from_a_store(
    *,
    toy_cells: ToyCells,
    arguments: dict[str, Any],
    expected: tuple[Slots, Path],
    slots: ReadSlots,
    client: Any,
    tmp_path: Path,
) -> None:
    """What this process left undone."""
    store = shutil.copytree(expected[1], tmp_path / "store")
    for block in ("model/0", "model/3", "random_weights/5", "states_model/0"):
        shutil.rmtree(store / block)
    adata = toy_cells(N_CELLS)
    screen(client, adata, store=store, **arguments)
    assert slots(adata) == expected[0]
    assert files(store) == files(expected[1])


def test_estimates_of_workers_are_the_same(
    toy_cells: ToyCells, toy_folder: Path, slots: ReadSlots, client: Any
) -> None:
    """Random directions are those of the cell, whoever draws them."""
    arguments = {"model": toy_folder, "method": gfx.tl.FirstOrder(n_probes=2), "controls": None}
    here, there = toy_cells(12), toy_cells(12)
    gfx.tl.screen_genes(here, **arguments)
    screen(client, there, **arguments)
    assert slots(there) == slots(here)


def pids(client: Any) -> list[int]:
    return sorted(client.run(os.getpid).values())


def kill_when(is_time: Callable[[], bool], pids: list[int]) -> threading.Thread:
    """Kill processes as soon as it is time."""

    def wait_and_kill() -> None:
        while not is_time():
            time.sleep(0.001)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


@pytest.mark.parametrize("n_killed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_others_take_over_from_workers_that_die(
    *,
    toy_cells: ToyCells,
    arguments: dict[str, Any],
    expected: tuple[Slots, Path],
    slots: ReadSlots,
    client: Any,
    tmp_path: Path,
    n_killed: int,
) -> None:
    """kill -9 of one, or of both, amid the run: every bit is the same."""
    client.wait_for_workers(2)
    before, store = pids(client), tmp_path / "store"
    killer = kill_when((store / "model" / "1").exists, before[:n_killed])
    adata = toy_cells(N_CELLS)
    screen(client, adata, store=store, **arguments)
    assert not killer.is_alive()  # it was killed before this was done
    assert slots(adata) == expected[0]
    assert files(store) == files(expected[1])
    client.wait_for_workers(2)
    assert not set(before[:n_killed]) & set(pids(client))


@pytest.mark.slow
def test_a_worker_that_dies_without_a_store(
    toy_cells: ToyCells, arguments: dict[str, Any], expected: tuple[Slots, Path], slots: ReadSlots, client: Any
) -> None:
    client.wait_for_workers(2)
    began = time.monotonic()
    killer = kill_when(lambda: time.monotonic() > began + 0.15, pids(client)[:1])
    adata = toy_cells(N_CELLS)
    screen(client, adata, **arguments)
    assert not killer.is_alive()  # it was killed before this was done
    assert slots(adata) == expected[0]


def test_a_failure_of_a_worker_is_raised_and_nothing_is_written(
    *, toy_cells: ToyCells, arguments: dict[str, Any], slots: ReadSlots, client: Any, toy_folder: Path, tmp_path: Path
) -> None:
    """It finds no weights where this process does."""
    from gfx.models import load

    folder = shutil.copytree(toy_folder, tmp_path / "model")
    model = load(folder)
    adata = toy_cells(N_CELLS)
    before = slots(adata)

    def hide() -> None:
        shutil.move(folder, tmp_path / "hidden")

    client.submit(hide, pure=False).result()
    with pytest.raises(FileNotFoundError):
        screen(client, adata, **(arguments | {"model": model, "start": None, "goal": None}))
    assert slots(adata) == before
