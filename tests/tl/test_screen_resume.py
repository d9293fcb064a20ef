"""Screens that are killed at any moment go on from what they left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import gfx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import anndata as ad
    from tests.conftest import ToyCells

    Slots = dict[str, Any]
    ReadSlots = Callable[[ad.AnnData], Slots]

# The toy cells' states are drawn at random, and most of the time they are not separable.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out cells of")

N_BLOCKS = 8


@dataclass(frozen=True)
class Children:
    """Processes that screen cells, forked from one that has everything loaded."""

    server: subprocess.Popen[str]
    cells: Path

    def run(self, arguments: dict[str, Any], *, kill_after: float, kill_at: int = 0) -> int:
        """Screen, and return how that ended: 0, or minus the signal that did it, so long after so many blocks."""
        asked = {"cells": str(self.cells), "arguments": arguments, "kill_after": kill_after, "kill_at": kill_at}
        print(json.dumps(asked), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())


@dataclass(frozen=True)
class Screen:
    """A screen that went through at once, and how to do it again."""

    make: Callable[[], ad.AnnData]
    arguments: dict[str, Any]
    store: Path
    expected: dict[str, Any]

    def files(self, store: Path) -> dict[str, bytes]:
        """Content of every file of a store."""
        return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}

    def finished(self, store: Path) -> list[Path]:
        """Blocks of the model and of random weights that are there."""
        jobs = [store / "model", store / "random_weights"]
        return [block for job in jobs if job.exists() for block in job.iterdir() if block.name.isdecimal()]


@pytest.fixture(scope="module")
def screen(toy_cells: ToyCells, toy_folder: Path, slots: ReadSlots, tmp_path_factory: pytest.TempPathFactory) -> Screen:
    """8 of 16 cells, in 4 blocks each of the model and of random weights, with a goal."""

    def make() -> ad.AnnData:
        return toy_cells(16)

    states = {"groupby": "condition", "start": "sick", "goal": "healthy"}
    arguments = {"model": str(toy_folder), "controls": ["random_weights"], **states}
    store = tmp_path_factory.mktemp("whole") / "store"
    adata = make()
    gfx.tl.screen_genes(adata, store=store, **arguments)
    whole = Screen(make, arguments, store, slots(adata))
    assert len(whole.finished(store)) == N_BLOCKS
    return whole


@pytest.fixture(scope="module")
def children(screen: Screen, toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    cells = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    screen.make().write_h5ad(cells)
    script = Path(__file__).with_name("screen_child.py")
    arguments = [sys.executable, "-W", "ignore", script, cells, toy_folder]
    # numba's threads by OpenMP outlive no fork.
    environment = os.environ | {"GFX_VERBOSITY": "1", "OMP_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "workqueue"}
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdout.readline() == "ready\n"
        yield Children(server, cells)
        server.stdin.close()


def assert_goes_on(screen: Screen, slots: ReadSlots, store: Path) -> None:
    """To the same result and to the same store, to the last bit; what a killed process was writing is written anew."""
    adata = screen.make()
    gfx.tl.screen_genes(adata, store=store, **screen.arguments)
    assert slots(adata) == screen.expected
    assert screen.files(store) == screen.files(screen.store)


def test_a_store_changes_nothing(screen: Screen, slots: ReadSlots) -> None:
    adata = screen.make()
    gfx.tl.screen_genes(adata, **screen.arguments)
    assert slots(adata) == screen.expected


@pytest.mark.parametrize("n_killed", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_to_the_same_result(
    screen: Screen, children: Children, slots: ReadSlots, tmp_path: Path, n_killed: int
) -> None:
    """kill -9 when so many blocks are finished, and a moment later: these are kept, and every bit is the same."""
    rng = np.random.default_rng(0)
    n_unfinished = 0
    for number in range(n_killed):
        store, kill_at = tmp_path / str(number), 3 * number % N_BLOCKS
        given = {**screen.arguments, "store": str(store)}
        ended = children.run(given, kill_at=kill_at, kill_after=rng.uniform(0, 0.03))
        assert ended in {0, -signal.SIGKILL}
        finished = screen.finished(store) if store.exists() else []
        assert len(finished) >= kill_at
        n_unfinished += ended != 0
        before = {path: path.stat().st_mtime_ns for block in finished for path in block.rglob("*")}
        assert_goes_on(screen, slots, store)
        assert {path: path.stat().st_mtime_ns for path in before} == before
    assert n_unfinished >= n_killed // 2


def test_killed_while_it_goes_on(screen: Screen, children: Children, slots: ReadSlots, tmp_path: Path) -> None:
    """One run after the other, each killed a little later than the one before."""
    store = tmp_path / "store"
    for kill_after in np.linspace(0.1, 0.3, 5):
        ended = children.run({**screen.arguments, "store": str(store)}, kill_after=kill_after)
        assert ended in {0, -signal.SIGKILL}
    assert_goes_on(screen, slots, store)
