"""One way to run a model over cells: a task mapped over blocks of cells.

A *task* says which network computes what, and can be pickled. A *block* is some cells with their tokens. What a task
makes of a block is a table of named arrays. Blocks run in this process, on several of its devices, or on the workers of
a dask client, as the settings say; results come in the order of the blocks, and finished blocks are kept in a store if
there is one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gfx import _log
from gfx._core.batching import ahead, pieces
from gfx._engine.classifier import load_classifier
from gfx._engine.device import DTYPES, choose_device, choose_devices
from gfx._engine.encoder import load_encoder, random_encoder
from gfx._engine.forward import batch_listener
from gfx._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    import torch
    from transformers import BertModel

    from gfx._core.encodings import Encodings
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
    """Some cells: their rows in the AnnData, int `(n,)`, tokens `(n, longest)` and lengths `(n,)`.

    `given` is what else the task needs to know of them, such as their groups or the perturbations to run.
    """

    number: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    given: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.number)


class Task(Protocol):
    """What to compute, with which network."""

    def run(self, cells: CellBlock, device: torch.device) -> Result:
        """Compute it for some cells."""

    def shapes(self, cells: CellBlock) -> Mapping[str, tuple[int, ...]]:
        """Tell the shapes of results for some cells, as far as they are known."""


@dataclass(frozen=True)
class Network:
    """A network, as it is sent to whoever runs it: an encoder up to the wanted layer, with its weights or random ones.

    Parameters
    ----------
    weights, config
        File of the checkpoint, which workers find under the same path, and its configuration.
    random_weights
        Seed of weights that are drawn anew; `None`: those of the checkpoint.
    classifies
        A trained classifier: all layers, with its head.
    """

    weights: Path
    config: Mapping[str, Any] = field(hash=False)
    n_layers: int
    dtype: str
    random_weights: int | None = None
    classifies: bool = False

    def randomized(self, seed: int) -> Network:
        """Take the same network with weights drawn anew, in float32."""
        return replace(self, random_weights=seed, dtype="float32")

    def load(self, device: torch.device) -> BertModel | Classifier:
        """Load the network; each process keeps it until its file changes, or :func:`networks` ends."""
        with _ONE_AT_A_TIME:
            return _load(self, self.weights.stat().st_mtime_ns, device)


@lru_cache(maxsize=16)
def _load(network: Network, _changed: int, device: torch.device) -> BertModel | Classifier:
    chosen = {"device": device, "dtype": DTYPES[network.dtype]}
    if network.classifies:
        return load_classifier(network.weights, network.config, **chosen)
    if network.random_weights is not None:
        return random_encoder(network.config, n_layers=network.n_layers, seed=network.random_weights, **chosen)
    return load_encoder(network.weights, network.config, n_layers=network.n_layers, **chosen)


#: One entry for each call of :func:`networks` that has not ended.
_open_calls: list[None] = []


@contextmanager
def networks(store: RunStore | None = None) -> Iterator[None]:
    """Keep networks in memory from block to block and from run to run, until the last such call ends.

    The store, if there is one, is kept to this process in the same way.
    """
    _open_calls.append(None)
    try:
        with nullcontext() if store is None else store.held():
            yield
    finally:
        _open_calls.pop()
        if not _open_calls:
            _load.cache_clear()


@dataclass(frozen=True)
class Job:
    """A task and the cells that it runs over; a store keeps its blocks under its name.

    Parameters
    ----------
    tokens
        Tokens of all cells of the AnnData.
    blocks
        Rows of the AnnData, block by block.
    given
        Makes what else a task needs to know of a block, from its number.
    passes
        Passes of the network that each block takes; `None`: one a cell.
    """

    name: str
    task: Task
    tokens: Encodings
    blocks: Sequence[np.ndarray]
    given: Callable[[int], Mapping[str, np.ndarray]] | None = None
    passes: Sequence[int] | None = None

    def cells(self, number: int) -> CellBlock:
        """Take the cells of a block, no wider than they need."""
        rows = self.blocks[number]
        given = {} if self.given is None else self.given(number)
        return CellBlock(rows, self.tokens.padded(rows), self.tokens.lengths[rows], given)

    @property
    def n_cells(self) -> int:
        return sum(map(len, self.blocks))

    def n_passes(self, number: int | None = None) -> int:
        """Count the passes of a block, or of all."""
        passes = [len(rows) for rows in self.blocks] if self.passes is None else self.passes
        return sum(passes) if number is None else passes[number]


def by_length(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut all cells that have tokens into blocks of similar length, the longest first, where memory is scarcest."""
    order = np.argsort(-lengths, kind="stable")
    return pieces(order[lengths[order] > 0], size)


def finished_blocks(jobs: Sequence[Job], store: RunStore | None) -> dict[str, set[int]]:
    """List the blocks of each job that the store has, by the job's name."""
    return {job.name: set() if store is None else store.finished(job.name) for job in jobs}


def tell_finished(jobs: Sequence[Job], store: RunStore | None) -> dict[str, set[int]]:
    """Say once in a call, of all that it is going to run, how much the store has; returns :func:`finished_blocks`."""
    finished = finished_blocks(jobs, store)
    n = sum(map(len, finished.values()))
    if store is not None and n:
        _log.info(f"{store.path} has {n:,} of {sum(len(job.blocks) for job in jobs):,} blocks of cells; going on.")
    return finished


def run(
    jobs: Sequence[Job], *, description: str, store: RunStore | None = None
) -> Iterator[tuple[Job, CellBlock, Result]]:
    """Run jobs block by block, one job after the other; results come in order, whoever computes them.

    One progress bar counts the passes of all jobs. What the store has is not run again.
    """
    finished = finished_blocks(jobs, store)
    unit = "cell" if all(job.passes is None for job in jobs) else "pass"
    blocks = [(job, number) for job in jobs for number in range(len(job.blocks))]
    with networks(store), _log.progress(sum(job.n_passes() for job in jobs), description, unit) as bar:
        missing = ((job.task, job.cells(number)) for job, number in blocks if number not in finished[job.name])
        fresh = _in_order(missing, bar.update)
        n_finished = 0
        for job, number in blocks:
            is_finished = number in finished[job.name]
            result = store.read(job.name, number) if store is not None and is_finished else None
            if result is not None:
                cells = job.cells(number)
                shapes = job.task.shapes(cells)
                if any(name not in result or result[name].shape != shape for name, shape in shapes.items()):
                    result = None
            if result is None:
                again = [(job.task, job.cells(number))] if is_finished else []  # its files are damaged
                cells, result = next(_in_order(again, bar.update) if is_finished else fresh)
                if store is not None:
                    store.write(job.name, number, result)
            yield job, cells, result
            n_finished += job.n_passes(number)
            bar.update(n_finished - bar.n)  # what no batch has told


def _in_order(
    calls: Iterable[tuple[Task, CellBlock]], listener: Callable[[int], object]
) -> Iterator[tuple[CellBlock, Result]]:
    """Run tasks where the settings say; cells come with their results."""
    if settings.client is not None:
        n_calls = (1 + BLOCKS_AHEAD) * max(1, len(settings.client.ncores()))
        yield from ahead(_on_workers(calls, settings.client), n_calls)
        return
    devices = choose_devices()
    if len(devices) == 1:
        for task, cells in calls:
            yield cells, _compute(task, cells, devices[0], listener)
        return
    free: SimpleQueue[torch.device] = SimpleQueue()
    for device in devices:
        free.put(device)

    def on_free_device(task: Task, cells: CellBlock) -> Result:
        device = free.get()
        try:
            return _compute(task, cells, device)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        submitted = ((cells, pool.submit(on_free_device, task, cells)) for task, cells in calls)
        yield from ahead(submitted, (1 + BLOCKS_AHEAD) * len(devices))


def _on_workers(calls: Iterable[tuple[Task, CellBlock]], client: Any) -> Iterator[tuple[CellBlock, Future[Result]]]:
    """Run blocks on dask workers. A worker that dies is dask's to replace: its blocks run again elsewhere."""
    # Each task is sent once; as a task of dask, since scattered data is lost with the workers that hold it.
    sent: dict[int, tuple[Task, Any]] = {}
    device = settings.device if isinstance(settings.device, str) else None
    for task, cells in calls:
        if id(task) not in sent:
            sent[id(task)] = task, client.submit(lambda task: task, task, pure=False)
        place = device, settings.batch_tokens
        yield cells, client.submit(_compute_on_worker, sent[id(task)][1], cells, *place, pure=False)


def _compute_on_worker(task: Task, cells: CellBlock, device: str | None, batch_tokens: int | None) -> Result:
    settings.batch_tokens = batch_tokens
    return _compute(task, cells, choose_device(device))


def _compute(
    task: Task, cells: CellBlock, device: torch.device, listener: Callable[[int], object] = lambda _n: None
) -> Result:
    """Run a task; it has no bar of its own, and the listener is told of its batches."""
    token = batch_listener.set(listener)
    try:
        return task.run(cells, device)
    finally:
        batch_listener.reset(token)
