"""Screens that are killed at any moment, and what goes on from what they left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
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

# The toy cells' states are drawn at random, and most of the time nothing tells them apart.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out cells of")

N_KILLED = 20


@dataclass(frozen=True)
class Children:
    """Processes that screen cells, forked from one that has everything loaded."""

    server: subprocess.Popen[str]
    cells: Path

    def run(self, arguments: dict[str, Any], *, kill_after: float | None = None) -> int:
        """Screen, and return how that ended: 0, or minus the signal that did it."""
        asked = {"cells": str(self.cells), "arguments": arguments, "kill_after": kill_after}
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
        """Content of every file of a store, but those that a killed process was about to rename."""
        files = [path for path in store.rglob("*") if path.is_file() and path.suffix != ".partial"]
        return {str(path.relative_to(store)): path.read_bytes() for path in files}

    @property
    def n_blocks(self) -> int:
        return len([*(self.store / "model" / "shift" / "c").iterdir()])

    def blocks(self, store: Path) -> list[list[Path]]:
        """Where the chunks of every block of cells are, or will be."""
        parts = [
            store / network / measure for network in ("model", "random_weights") for measure in ("shift", "toward")
        ]
        return [[part / "c" / str(at) / "0" for part in parts] for at in range(self.n_blocks)]


@pytest.fixture(scope="module")
def screen(toy_cells: ToyCells, toy_folder: Path, slots: ReadSlots, tmp_path_factory: pytest.TempPathFactory) -> Screen:
    """40 of 80 cells, in 5 blocks, with a goal, a network of random weights and layers."""

    def make() -> ad.AnnData:
        return toy_cells(80)

    arguments = {
        "model": str(toy_folder),
        "groupby": "condition",
        "start": "sick",
        "goal": "healthy",
        "layers": True,
    }
    store = tmp_path_factory.mktemp("whole") / "store"
    adata = make()
    with pytest.warns(UserWarning, match="Held-out cells of"):
        gfx.tl.screen_genes(adata, store=store, **arguments)
    found = Screen(make, arguments, store, slots(adata))
    assert found.n_blocks == 20
    return found


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


def again(screen: Screen, slots: ReadSlots, store: Path) -> None:
    """Go on to the same result, and to the same store."""
    adata = screen.make()
    gfx.tl.screen_genes(adata, store=store, **screen.arguments)
    assert slots(adata) == screen.expected
    assert screen.files(store) == screen.files(screen.store)


def test_a_store_changes_nothing(screen: Screen, slots: ReadSlots) -> None:
    adata = screen.make()
    gfx.tl.screen_genes(adata, **screen.arguments)
    assert slots(adata) == screen.expected


def test_what_is_done_is_read(screen: Screen, slots: ReadSlots, tmp_path: Path) -> None:
    """Not a chunk is written again."""
    store = tmp_path / "store"
    shutil.copytree(screen.store, store)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    adata = screen.make()
    gfx.tl.screen_genes(adata, store=store, **screen.arguments)
    assert slots(adata) == screen.expected
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_killed_at_any_moment_it_goes_on_to_the_same_result(
    screen: Screen, children: Children, slots: ReadSlots, tmp_path: Path
) -> None:
    """kill -9, twenty times, from first to last: finished blocks are kept, and every bit is the same."""
    rng = np.random.default_rng(0)
    durations = []
    for name in ("first", "second"):
        began = time.monotonic()
        assert children.run({**screen.arguments, "store": str(tmp_path / name)}) == 0
        durations.append(time.monotonic() - began)
        assert screen.files(tmp_path / name) == screen.files(screen.store)

    n_finished: list[int] = []
    moments = [*(rng.permutation(N_KILLED) + rng.random(N_KILLED)) / N_KILLED, *rng.random(10 * N_KILLED)]
    for number, moment in enumerate(moments):
        store = tmp_path / str(number)
        ended = children.run({**screen.arguments, "store": str(store)}, kill_after=min(durations) * moment)
        if ended == 0:  # it was done before
            continue
        assert ended == -signal.SIGKILL
        blocks = screen.blocks(store)
        finished = [path for block in blocks if all(path.exists() for path in block) for path in block]
        before = {path: path.stat().st_mtime_ns for path in finished}
        n_finished.append(len(finished) // len(blocks[0]))
        again(screen, slots, store)
        assert {path: path.stat().st_mtime_ns for path in finished} == before
        if len(n_finished) == N_KILLED:
            break
    assert len(n_finished) == N_KILLED
    unfinished = [n for n in n_finished if 0 < n < screen.n_blocks]
    assert len(unfinished) >= 3
    assert len(set(unfinished)) >= 2


def test_killed_while_it_goes_on(screen: Screen, children: Children, slots: ReadSlots, tmp_path: Path) -> None:
    """One run after the other, each killed a little later than the one before."""
    store = tmp_path / "store"
    for kill_after in np.linspace(0.1, 0.3, 5):
        ended = children.run({**screen.arguments, "store": str(store)}, kill_after=kill_after)
        assert ended in {0, -signal.SIGKILL}
    again(screen, slots, store)
