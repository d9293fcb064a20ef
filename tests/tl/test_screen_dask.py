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

# The toy cells' states are drawn at random, and most of the time nothing tells them apart.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out cells of")

N_CELLS = 160


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Two workers of one thread each, as many as torch has in these tests: results are the same to the last bit."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, protocol="tcp"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def arguments(toy_folder: Path) -> dict[str, Any]:
    """80 of 160 cells, in 10 blocks, with a goal."""
    return {"model": toy_folder, "groupby": "condition", "start": "sick", "goal": "healthy", "layers": True}


@pytest.fixture(scope="module")
def expected(
    toy_cells: ToyCells, arguments: dict[str, Any], slots: ReadSlots, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Slots, Path]:
    """What comes out without dask, and the store."""
    adata, store = toy_cells(N_CELLS), tmp_path_factory.mktemp("whole") / "store"
    gfx.tl.screen_genes(adata, store=store, **arguments)
    return slots(adata), store


def files(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_workers_do_the_same(
    toy_cells: ToyCells, arguments: dict[str, Any], expected: tuple[Slots, Path], slots: ReadSlots, client: Any
) -> None:
    adata = toy_cells(N_CELLS)
    gfx.tl.screen_genes(adata, client=client, **arguments)
    assert slots(adata) == expected[0]


def test_workers_go_on(
    *,
    toy_cells: ToyCells,
    arguments: dict[str, Any],
    expected: tuple[Slots, Path],
    slots: ReadSlots,
    client: Any,
    tmp_path: Path,
) -> None:
    """What one run left undone is done by workers."""
    store = shutil.copytree(expected[1], tmp_path / "store")
    for block in (0, 3, 9):
        shutil.rmtree(store / "model" / "shift" / "c" / str(block))
    adata = toy_cells(N_CELLS)
    gfx.tl.screen_genes(adata, client=client, store=store, **arguments)
    assert slots(adata) == expected[0]
    assert files(store) == files(expected[1])


def test_estimates_by_workers(toy_cells: ToyCells, toy_folder: Path, slots: ReadSlots, client: Any) -> None:
    """Random directions are those of the cell, whoever draws them."""
    arguments = {"model": toy_folder, "method": "first_order", "n_probes": 2}
    here, there = toy_cells(150), toy_cells(150)
    gfx.tl.screen_genes(here, **arguments)
    gfx.tl.screen_genes(there, client=client, **arguments)
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
def test_workers_that_die(
    *,
    toy_cells: ToyCells,
    arguments: dict[str, Any],
    expected: tuple[Slots, Path],
    slots: ReadSlots,
    client: Any,
    tmp_path: Path,
    n_killed: int,
) -> None:
    """kill -9 of one, or of both, amid the run: others take over, and every bit is the same."""
    client.wait_for_workers(2)
    before, store = pids(client), tmp_path / "store"
    chunks = store / "model" / "shift" / "c"
    killer = kill_when(lambda: chunks.exists() and len([*chunks.iterdir()]) > 1, before[:n_killed])
    adata = toy_cells(N_CELLS)
    gfx.tl.screen_genes(adata, client=client, store=store, **arguments)
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
    killer = kill_when(lambda: time.monotonic() > began + 0.3, pids(client)[:1])
    adata = toy_cells(N_CELLS)
    gfx.tl.screen_genes(adata, client=client, **arguments)
    assert not killer.is_alive()  # it was killed before this was done
    assert slots(adata) == expected[0]


def test_a_failure_of_a_worker_is_told(
    *, toy_cells: ToyCells, arguments: dict[str, Any], slots: ReadSlots, client: Any, toy_folder: Path, tmp_path: Path
) -> None:
    """It sees no weights where we do; nothing is written."""
    from gfx.models import load

    folder = shutil.copytree(toy_folder, tmp_path / "model")
    model = load(folder)
    adata = toy_cells(N_CELLS)
    before = slots(adata)

    def hide() -> None:
        shutil.move(folder, tmp_path / "hidden")

    client.submit(hide, pure=False).result()
    with pytest.raises(FileNotFoundError):
        gfx.tl.screen_genes(adata, client=client, **(arguments | {"model": model, "start": None, "goal": None}))
    assert slots(adata) == before
