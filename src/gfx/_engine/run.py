"""One way to run a model over cells: a task mapped over blocks of cells.

A *task* says which network computes what, and can be pickled. A *block* is some cells with their tokens. What a task
makes of a block is a table of named arrays. Blocks run in this process, on several of its devices, or on the workers of
a dask client, as the settings say; results come in the order of the blocks, and finished blocks are kept in a store if
there is one.
"""

from __future__ import annotations

import json
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from tqdm.auto import tqdm

from gfx import _log
from gfx._engine.classifier import load_classifier
from gfx._engine.device import DTYPES, choose_device, choose_devices
from gfx._engine.encoder import load_encoder, random_encoder
from gfx._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from transformers import BertModel

    from gfx._engine.classifier import Classifier
    from gfx._run_store import RunStore

#: What a task makes of a block of cells.
Result = dict[str, np.ndarray]

#: Cells in a block: rows a cell are small, sums over cells are not.
CELLS_PER_BLOCK, CELLS_PER_SUM = 512, 2048

#: Blocks that wait at each worker while another one runs there.
BLOCKS_AHEAD = 2

#: Threads of one process load a network once, and do not draw from one generator at a time.
_ONE_AT_A_TIME = Lock()


@dataclass(frozen=True)
class CellBlock:
    """Some cells.

    Parameters
    ----------
    number
        Which cells of the AnnData they are, int `(n,)`.
    ids, lengths
        Tokens `(n, longest)` and lengths `(n,)`.
    given
        What else the task needs to know of these cells, such as their groups or the perturbations to run.
    """

    number: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    given: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.number)


class Task(Protocol):
    """What to compute, with which network."""

    def run(self, cells: CellBlock, device: torch.device, report: Callable[[float], None]) -> Result:
        """Compute it for some cells; `report` is told the finished share, from 0 to 1."""


@dataclass(frozen=True)
class Network:
    """A network, as it is sent to whoever runs it: an encoder up to the wanted layer, with its weights or random ones.

    Parameters
    ----------
    weights, config
        File of the checkpoint, which workers find under the same path, and its configuration.
    n_layers
        How many layers to run.
    dtype
        Precision.
    attention
        ``"eager"`` shows its weights.
    random_weights
        Seed of weights that are drawn anew; `None`: those of the checkpoint.
    classifies
        A trained classifier: all layers, with its head.
    """

    weights: Path
    config: Mapping[str, Any]
    n_layers: int
    dtype: str
    attention: Literal["sdpa", "eager"] = "sdpa"
    random_weights: int | None = None
    classifies: bool = False

    def randomized(self, seed: int) -> Network:
        """Take the same network with weights drawn anew, in float32."""
        return replace(self, random_weights=seed, dtype="float32")

    def load(self, device: torch.device) -> BertModel | Classifier:
        """Load the network; each process keeps it until its file changes, or :func:`networks` ends."""
        with _ONE_AT_A_TIME:
            return _load(
                self.weights,
                self.weights.stat().st_mtime_ns,
                json.dumps(dict(self.config), sort_keys=True),
                self.n_layers,
                dtype=self.dtype,
                attention=self.attention,
                random_weights=self.random_weights,
                classifies=self.classifies,
                device=device,
            )


@lru_cache(maxsize=16)
def _load(
    weights: Path,
    _changed: int,
    config: str,
    n_layers: int,
    *,
    dtype: str,
    attention: Literal["sdpa", "eager"],
    random_weights: int | None,
    classifies: bool,
    device: torch.device,
) -> BertModel | Classifier:
    if classifies:
        return load_classifier(weights, json.loads(config), device=device, dtype=DTYPES[dtype])
    where = {"n_blocks": n_layers, "device": device, "dtype": DTYPES[dtype]}
    if random_weights is not None:
        return random_encoder(json.loads(config), seed=random_weights, **where)
    return load_encoder(weights, json.loads(config), attention=attention, **where)


#: Calls of :func:`networks` that have not ended, the outermost first.
_calls: list[object] = []


@contextmanager
def networks() -> Iterator[None]:
    """Keep networks in memory from block to block and from run to run, until the outermost such call ends."""
    _calls.append(call := object())
    try:
        yield
    finally:
        _calls.remove(call)
        if not _calls:
            _load.cache_clear()


@dataclass(frozen=True)
class Job:
    """A task and the cells that it runs over.

    Parameters
    ----------
    name
        Under which a store keeps its blocks.
    task
        What to compute.
    ids, lengths
        Tokens of all cells of the AnnData, `(n_obs, longest)`, which are not copied as a whole, and lengths.
    blocks
        Rows of the AnnData, block by block.
    given
        Makes what else a task needs to know of a block, from its number.
    """

    name: str
    task: Task
    ids: np.ndarray
    lengths: np.ndarray
    blocks: Sequence[np.ndarray]
    given: Callable[[int], Mapping[str, np.ndarray]] | None = None

    def cells(self, number: int) -> CellBlock:
        """Take the cells of a block, no wider than they need."""
        rows = self.blocks[number]
        lengths = self.lengths[rows]
        ids = self.ids[rows, : int(lengths.max(initial=0))]
        return CellBlock(rows, ids, lengths, {} if self.given is None else self.given(number))

    @property
    def n_cells(self) -> int:
        return sum(map(len, self.blocks))


def cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut rows into blocks of so many."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def by_length(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut all cells that have tokens into blocks of similar length, the longest first, where memory is scarcest."""
    order = np.argsort(-lengths, kind="stable")
    return cut(order[lengths[order] > 0], size)


def run(
    jobs: Sequence[Job], *, description: str, store: RunStore | None = None
) -> Iterator[tuple[Job, CellBlock, Result]]:
    """Run jobs block by block, one job after the other; results come in order, whoever computes them.

    One progress bar counts the cells of all jobs. What the store has is not run again.
    """
    finished = {job.name: set() if store is None else store.finished(job.name) for job in jobs}
    if store is not None and any(finished.values()):
        n = sum(map(len, finished.values()))
        _log.info(f"{store.path} has {n:,} of {sum(len(job.blocks) for job in jobs):,} blocks of cells; going on.")
    shown = {"desc": description, "unit": "cell", "leave": False, "delay": 1, "disable": not _log.shows_progress()}
    with networks(), tqdm(total=sum(job.n_cells for job in jobs), **shown) as bar:
        progress = _Progress(bar)
        under_way: deque[CellBlock] = deque()  # the cells of a block are taken once: that may rank them anew

        def calls() -> Iterator[tuple[Task, CellBlock]]:
            for job in jobs:
                for number in range(len(job.blocks)):
                    if number not in finished[job.name]:
                        under_way.append(job.cells(number))
                        yield job.task, under_way[-1]

        fresh = _in_order(calls(), progress)
        for job in jobs:
            for number in range(len(job.blocks)):
                if number in finished[job.name]:
                    cells, result = job.cells(number), store.read(job.name, number)
                    is_new = result is None  # damaged
                    if is_new:
                        result = next(_in_order([(job.task, cells)], progress))
                else:
                    result, is_new = next(fresh), True
                    cells = under_way.popleft()
                if is_new and store is not None:
                    store.write(job.name, number, result)
                yield job, cells, result
                progress.finish(len(cells))


class _Progress:
    """Moves the bar within the block at hand; other threads report, too."""

    def __init__(self, bar: tqdm) -> None:
        self.bar, self.finished = bar, 0

    def report(self, n_cells: int, share: float) -> None:
        """Show that a share of a block of so many cells is finished."""
        self._show(self.finished + int(n_cells * share))

    def finish(self, n_cells: int) -> None:
        self.finished += n_cells
        self._show(self.finished)

    def _show(self, n: int) -> None:
        self.bar.update(max(0, n - self.bar.n))


def _in_order(calls: Iterable[tuple[Task, CellBlock]], progress: _Progress) -> Iterator[Result]:
    """Run tasks where the settings say."""
    devices = choose_devices() if settings.client is None else []
    if settings.client is not None:
        yield from _on_workers(calls, settings.client)
    elif len(devices) == 1:
        for task, cells in calls:
            yield task.run(cells, devices[0], partial(progress.report, len(cells)))
    else:
        yield from _on_devices(calls, devices)


def _on_devices(calls: Iterable[tuple[Task, CellBlock]], devices: Sequence[torch.device]) -> Iterator[Result]:
    """Run each block on whichever device is free, a thread each."""
    free: SimpleQueue[torch.device] = SimpleQueue()
    for device in devices:
        free.put(device)

    def call(task: Task, cells: CellBlock) -> Result:
        device = free.get()
        try:
            return task.run(cells, device, _unheard)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        yield from _ahead((pool.submit(call, task, cells) for task, cells in calls), len(devices))


def _on_workers(calls: Iterable[tuple[Task, CellBlock]], client: Any) -> Iterator[Result]:
    """Run blocks on dask workers. A worker that dies is dask's to replace: its blocks run again elsewhere."""
    # Each task is sent once; as a task of dask, since scattered data is lost with the workers that hold it.
    sent: dict[int, tuple[Task, Any]] = {}
    device = settings.device if isinstance(settings.device, str) else None

    def submit(task: Task, cells: CellBlock) -> Any:
        if id(task) not in sent:
            sent[id(task)] = task, client.submit(_itself, task, pure=False)
        return client.submit(_run_on_worker, sent[id(task)][1], cells, device, settings.batch_tokens, pure=False)

    yield from _ahead((submit(task, cells) for task, cells in calls), max(1, len(client.ncores())))


def _ahead(futures: Iterable[Any], n_workers: int) -> Iterator[Result]:
    """Keep a few blocks under way for each worker, so that no more than these are in memory."""
    waiting: deque = deque()
    try:
        for future in futures:
            waiting.append(future)
            while len(waiting) >= (1 + BLOCKS_AHEAD) * n_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _itself(task: Task) -> Task:
    return task


def _run_on_worker(task: Task, cells: CellBlock, device: str | None, batch_tokens: int | None) -> Result:
    settings.batch_tokens = batch_tokens
    return task.run(cells, choose_device(device), _unheard)


def _unheard(_share: float) -> None:
    """Whoever runs elsewhere reports nothing."""
