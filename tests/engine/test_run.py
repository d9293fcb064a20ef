"""The runner: order, devices, dask workers, stores that are stopped, damaged, or of another call."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr

from gfx import _settings
from gfx._core.encodings import Encodings
from gfx._engine.run import Job, by_length, networks, run
from gfx._engine.tasks import CellEmbedding
from gfx._run_store import FORMAT, RunStore, RunStoreError
from gfx._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gfx._engine.run import CellBlock

N_CELLS = 20


@dataclass(frozen=True)
class RowSums:
    """A task that needs no network: the sum of the tokens of each cell."""

    fails_at: int | None = None

    def run(self, cells: CellBlock, device: object) -> dict[str, np.ndarray]:
        if self.fails_at in cells.number:
            raise RuntimeError("stopped")
        return {"sum": cells.ids.sum(axis=1, dtype=np.float64)}

    def shapes(self, cells: CellBlock) -> dict[str, tuple[int, ...]]:
        return {"sum": (len(cells),)}


def job(name: str = "sums", task: Any = None, size: int = 3) -> Job:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, N_CELLS).astype(np.int32)
    ids = np.where(np.arange(9) < lengths[:, None], rng.integers(1, 50, (N_CELLS, 9)), 0).astype(np.uint16)
    return Job(name, task or RowSums(), Encodings.of(ids, lengths), by_length(lengths, size))


def sums(jobs: list[Job], **chosen: Any) -> dict[str, np.ndarray]:
    """Run jobs, and lay what they give where the cells are."""
    out = {each.name: np.full(N_CELLS, np.nan) for each in jobs}
    for each, cells, result in run(jobs, description="adding", **chosen):
        out[each.name][cells.number] = result["sum"]
    return out


def expected(each: Job) -> np.ndarray:
    return np.array([row.sum(dtype=np.float64) if len(row) else np.nan for row in each.tokens])


def test_blocks_hold_each_cell_with_tokens_once_longest_first() -> None:
    each = job()
    rows = np.concatenate(each.blocks)
    assert sorted(rows) == np.flatnonzero(each.tokens.lengths).tolist()
    assert (np.diff(each.tokens.lengths[rows]) <= 0).all()
    block = each.cells(len(each.blocks) - 1)
    assert block.ids.shape[1] == block.lengths.max()


def test_jobs_run_one_after_the_other_in_the_order_of_their_blocks() -> None:
    jobs = [job("a"), job("b", size=5)]
    seen = [(each.name, cells.number.tolist()) for each, cells, _ in run(jobs, description="adding")]
    assert seen == [(each.name, rows.tolist()) for each in jobs for rows in each.blocks]
    found = sums(jobs)
    for each in jobs:
        np.testing.assert_array_equal(found[each.name], expected(each))


def test_what_a_task_is_given_belongs_to_its_block() -> None:
    given = job()
    given = Job("a", RowSums(), given.tokens, given.blocks, lambda number: {"number": np.array([number])})
    assert [int(cells.given["number"][0]) for _, cells, _ in run([given], description="x")] == [
        *range(len(given.blocks))
    ]


def test_several_devices_share_the_blocks_and_results_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gfx._engine.run.choose_devices", lambda: ["first", "second"])
    seen = threading.Barrier(2, timeout=10)

    @dataclass(frozen=True)
    class Both(RowSums):
        def run(self, cells: CellBlock, device: object) -> dict[str, np.ndarray]:
            if 0 not in cells.number and len(cells) == 3 and not seen.broken:
                try:
                    seen.wait(0.5)  # two blocks are under way at once
                    used.add(str(device))
                except threading.BrokenBarrierError:
                    pass
            return super().run(cells, device)

    used: set[str] = set()
    each = job(task=Both())
    np.testing.assert_array_equal(sums([each])["sums"], expected(each))
    assert used == {"first", "second"}


def test_a_failure_on_one_of_several_devices_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gfx._engine.run.choose_devices", lambda: ["first", "second"])
    with pytest.raises(RuntimeError, match="stopped"):
        sums([job(task=RowSums(fails_at=int(job().blocks[2][0])))])


def test_a_network_is_loaded_once_and_let_go(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gfx._engine import run as module

    loads = []
    original = module.load_encoder
    monkeypatch.setattr(module, "load_encoder", lambda *args, **chosen: loads.append(1) or original(*args, **chosen))
    network = module.Network(toy.model.weights, toy.model.config, 1, "float32")
    task = CellEmbedding(network, toy.vocabulary, "mean")
    each = Job("vectors", task, toy.tokens, by_length(toy.lengths, 2))
    with networks():
        for _ in range(2):
            assert all(np.isfinite(result["vectors"]).all() for _, _, result in run([each], description="x"))
    assert len(loads) == 1
    assert module._load.cache_info().currsize == 0


def test_one_bar_counts_all_cells_batch_by_batch(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of tasks that tell of no batches count when their block is finished."""
    import tqdm

    from gfx._engine import run as module

    class Bar(tqdm.tqdm):
        def update(self, n: int) -> None:
            seen.append((id(self), n))
            super().update(n)

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    network = module.Network(toy.model.weights, toy.model.config, 1, "float32")
    blocks = by_length(toy.lengths, 10)
    embedding = Job("vectors", CellEmbedding(network, toy.vocabulary, "mean"), toy.tokens, blocks)
    with settings.override(batch_tokens=70, verbosity=2):
        n_cells = [len(cells) for _, cells, _ in run([embedding, job()], description="x")]
    assert len({bar for bar, _ in seen}) == 1
    assert sum(n for _, n in seen) == sum(n_cells)
    assert len([n for _, n in seen if n]) > len(n_cells)
    assert min(n for _, n in seen) == 0


# --- stores --------------------------------------------------------------------------------------------------------

MANIFEST = {"function": "tl.embed", "gfx_version": "0.1.0", "torch_version": "2.13.0", "rng": 0, "names": ["a", "b"]}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_read_and_written_nowhere(tmp_path: Path) -> None:
    store = RunStore.open(tmp_path / "store", MANIFEST)
    each = job()
    first = sums([each], store=store)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    again = RunStore.open(tmp_path / "store", MANIFEST)
    np.testing.assert_array_equal(
        sums([job(task=RowSums(fails_at=int(each.blocks[0][0])))], store=again)["sums"], first["sums"]
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before


def test_a_stopped_run_goes_on_from_its_finished_blocks(tmp_path: Path) -> None:
    whole = RunStore.open(tmp_path / "whole", MANIFEST)
    each = job()
    sums([each], store=whole)
    store = RunStore.open(tmp_path / "store", MANIFEST)
    stopped = job(task=RowSums(fails_at=int(each.blocks[3][0])))
    with pytest.raises(RuntimeError, match="stopped"):
        sums([stopped], store=store)
    assert store.finished("sums") == {0, 1, 2}
    np.testing.assert_array_equal(sums([each], store=store)["sums"], expected(each))
    assert files(tmp_path / "store") == files(tmp_path / "whole")


def flip(path: Path, *, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int((len(content) - 1) * at)] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": lambda path: path.unlink(),
    **{f"flipped at {at}": partial(flip, at=at) for at in (0, 0.5, 1)},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["sum/c/0", "sum/zarr.json", "zarr.json"])
def test_a_damaged_block_is_run_again_and_no_other(tmp_path: Path, damage: Callable[[Path], None], name: str) -> None:
    store = RunStore.open(tmp_path / "store", MANIFEST)
    each = job()
    sums([each], store=store)
    before = files(tmp_path / "store")
    others = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "sums" / "2").rglob("*")}
    damage(tmp_path / "store" / "sums" / "1" / name)
    np.testing.assert_array_equal(sums([each], store=store)["sums"], expected(each))
    # A flip in a description may leave the arrays as they are, to the last bit: then the block is still good.
    assert store.read("sums", 1) is not None
    if not name.endswith("zarr.json"):
        assert files(tmp_path / "store") == before
    assert {path: path.stat().st_mtime_ns for path in others} == others


def describe(folder: Path, **changed: object) -> None:
    """Change what an array says of itself."""
    path = folder / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def grid(*shape: int) -> dict[str, object]:
    return {"shape": shape, "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}}}


CLAIMS = {
    "30 GB": grid(1_000_000_000, 4),
    "2**62": grid(1 << 62),
    "negative": grid(-3),
    "two axes": grid(1, 3),
    "no axis": grid(),
    "more cells": grid(4),
    "text as a shape": {"shape": "many"},
    "no shape": {"shape": None},
    "objects": {"data_type": "object"},
    "another type": {"data_type": "int8"},
    "a codec that runs code": {"codecs": [{"name": "pickle"}]},
    "no codecs": {"codecs": None},
    "another format": {"zarr_format": 2},
    "a group": {"node_type": "group"},
}


def assert_run_again_without_memory(folder: Path, damage: Callable[[Path], object]) -> None:
    """Store a run, damage one of its blocks, and run it again: to the same sums and files, in less than 10 MB."""
    store = RunStore.open(folder, MANIFEST)
    each = job()
    sums([each], store=store)
    before = files(folder)
    damage(folder / "sums" / "1")
    tracemalloc.start()
    np.testing.assert_array_equal(sums([each], store=store)["sums"], expected(each))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e7
    assert files(folder) == before


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_an_array_that_claims_what_it_is_not_is_run_again_and_takes_no_memory(
    tmp_path: Path, claim: dict[str, object]
) -> None:
    assert_run_again_without_memory(tmp_path / "store", lambda block: describe(block / "sum", **claim))


def test_a_chunk_that_unpacks_to_more_than_its_array_is_run_again_and_takes_no_memory(tmp_path: Path) -> None:
    """300 MB of zeros in some ten kilobytes."""
    bomb = zarr.create_array(tmp_path / "bomb", data=np.ones(300_000_000, np.int8), chunks=(300_000_000,))
    chunk = bomb.store.root / "c" / "0"
    assert_run_again_without_memory(tmp_path / "store", lambda block: shutil.copy(chunk, block / "sum" / "c" / "0"))


@pytest.mark.parametrize("values", [{"sum": np.zeros(4)}, {"sum": np.zeros((3, 1))}, {"other": np.zeros(3)}, {}])
def test_a_block_of_other_arrays_is_run_again(tmp_path: Path, values: dict[str, np.ndarray]) -> None:
    """Whole by its checksums, and of no call of ours."""
    store = RunStore.open(tmp_path / "store", MANIFEST)
    each = job()
    sums([each], store=store)
    before = files(tmp_path / "store")
    store.write("sums", 1, values)
    np.testing.assert_array_equal(sums([each], store=store)["sums"], expected(each))
    assert files(tmp_path / "store") == before


BEGIN = """
import sys
from gfx._run_store import RunStore
store = RunStore.open(sys.argv[1], {"rng": 0})
with store.held():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_store_that_another_process_has_is_refused_with_its_name_until_that_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with subprocess.Popen(
        [sys.executable, "-c", BEGIN, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        mine = RunStore.open(path, {"rng": 0})
        text = rf"store is in use by process {other.pid} on \S+, since .*Wait until that has ended"
        with pytest.raises(RunStoreError, match=text):
            sums([job()], store=mine)
        assert not mine.finished("sums")
        other.kill()
        other.wait()
    assert (tmp_path / "store.lock").exists()  # it was killed, and its lock is free
    each = job()
    np.testing.assert_array_equal(sums([each], store=mine)["sums"], expected(each))
    assert {entry.name for entry in tmp_path.iterdir()} == {"store"}


def test_a_store_that_another_thread_has_is_refused(tmp_path: Path) -> None:
    store = RunStore.open(tmp_path / "store", MANIFEST)
    with store.held(), store.held(), ThreadPoolExecutor(1) as other:
        with pytest.raises(RunStoreError, match=rf"store is in use by process {os.getpid()} on"):
            other.submit(sums, [job()], store=store).result()
        np.testing.assert_array_equal(sums([job()], store=store)["sums"], expected(job()))
    assert not (tmp_path / "store.lock").exists()


def test_of_processes_that_begin_a_store_at_once_one_has_it(tmp_path: Path) -> None:
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    several = [subprocess.Popen([sys.executable, "-c", BEGIN, str(tmp_path / "store")], **how) for _ in range(3)]
    first_lines = [process.stdout.readline() for process in several]
    said = [process.communicate(timeout=60)[1] for process in several]
    assert sorted(first_lines) == ["", "", "held\n"]
    assert sum("RunStoreError" in text and "is in use by process" in text for text in said) == 2


def test_a_store_may_begin_in_folders_that_are_to_be_made(tmp_path: Path) -> None:
    each, store = job(), RunStore.open(tmp_path / "new" / "runs" / "store", MANIFEST)
    np.testing.assert_array_equal(sums([each], store=store)["sums"], expected(each))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"Could not begin a store at .*file/store: .*Nothing was left there"):
        RunStore.open(tmp_path / "file" / "store", MANIFEST)


def test_a_run_that_stops_lets_go_of_its_store(tmp_path: Path) -> None:
    store = RunStore.open(tmp_path / "store", MANIFEST)
    with pytest.raises(RuntimeError, match="stopped"):
        sums([job(task=RowSums(fails_at=int(job().blocks[2][0])))], store=store)
    assert not (tmp_path / "store.lock").exists()


def test_a_block_that_was_not_moved_to_its_place_does_not_count(tmp_path: Path) -> None:
    store = RunStore.open(tmp_path / "store", MANIFEST)
    each = job()
    sums([each], store=store)
    before = files(tmp_path / "store")
    shutil.move(tmp_path / "store" / "sums" / "2", tmp_path / "store" / "sums" / "2.part")
    assert 2 not in store.finished("sums")
    sums([each], store=store)
    assert files(tmp_path / "store") == before


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((0, 3), np.float32),
        np.array([np.nan, 1.5]),
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.array(3.0),
        np.array([True, False]),
    ],
)
def test_arrays_of_any_shape_come_back_as_they_were(tmp_path: Path, values: np.ndarray) -> None:
    store = RunStore.open(tmp_path / "store", MANIFEST)
    store.write("job", 0, {"values": values})
    found = store.read("job", 0)["values"]
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    np.testing.assert_array_equal(found, values)


def test_another_call_is_refused_and_told_what_differs(tmp_path: Path) -> None:
    RunStore.open(tmp_path / "store", MANIFEST)
    before = files(tmp_path)
    with pytest.raises(
        RunStoreError, match=r"another names, rng, which cannot(.|\n)*- rng: 0, now 1(.|\n)*Give another"
    ):
        RunStore.open(tmp_path / "store", MANIFEST | {"rng": 1, "names": ["a"]})
    assert files(tmp_path) == before


def test_other_versions_of_gfx_and_torch_go_on_with_a_warning_that_names_them(tmp_path: Path) -> None:
    RunStore.open(tmp_path / "store", MANIFEST)
    newer = MANIFEST | {"gfx_version": "0.2.0", "torch_version": "3.0"}
    with pytest.warns(UserWarning, match=r"gfx 0\.1\.0 \(now 0\.2\.0\) and torch 2\.13\.0 \(now 3\.0\)"):
        RunStore.open(tmp_path / "store", newer)


def test_another_format_is_refused(tmp_path: Path) -> None:
    group = zarr.open_group(RunStore.open(tmp_path / "store", MANIFEST).path, mode="r+")
    group.attrs["gfx"] = group.attrs["gfx"] | {"format": FORMAT + 1}
    with pytest.raises(RunStoreError, match="another format"):
        RunStore.open(tmp_path / "store", MANIFEST)


# --- dask ----------------------------------------------------------------------------------------------------------


def test_workers_give_the_same_in_the_same_order(toy: Any, client: Any) -> None:
    from gfx._engine.run import Network

    task = CellEmbedding(Network(toy.model.weights, toy.model.config, 1, "float32"), toy.vocabulary, "mean")
    each = Job("vectors", task, toy.tokens, by_length(toy.lengths, 2))
    here = [(cells.number.tolist(), result["vectors"]) for _, cells, result in run([each], description="x")]
    with settings.override(client=client):
        there = [(cells.number.tolist(), result["vectors"]) for _, cells, result in run([each], description="x")]
    assert [rows for rows, _ in here] == [rows for rows, _ in there]
    for (_, one), (_, other) in zip(here, there, strict=True):
        np.testing.assert_array_equal(one, other)
    assert _settings.settings.client is None
