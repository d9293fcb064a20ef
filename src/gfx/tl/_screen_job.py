"""One screen, as it is sent to whoever runs it: what to do, with which model, and some cells to do it in."""

from __future__ import annotations

import json
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from transformers import BertModel

    from gfx._core.screening import Screened
    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.perturb import Comparison
    from gfx._engine.screen import Operator

Method = Literal["exact", "first_order"]

#: Threads of a worker load a network once, and do not draw from one generator at a time.
_ONE_AT_A_TIME = Lock()

#: Blocks that wait at each worker while another one runs there.
BLOCKS_AHEAD = 2


@dataclass(frozen=True)
class CellBlock:
    """Some cells: their numbers in the AnnData, tokens `(n, longest)`, lengths, and which tokens to delete."""

    number: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    wanted: np.ndarray


@dataclass(frozen=True)
class ScreenJob:
    """What to do with cells.

    Parameters
    ----------
    weights, config, n_blocks, vocabulary
        The model; workers read the weights from the same path.
    random_weights
        Seed of a network with weights drawn anew, to run instead; `None` runs the model.
    method, operator, how, n_probes
        As in :func:`gfx.tl.screen_genes`.
    goals
        Vectors of states, `(n_states, d)`.
    seed
        Of the random directions.
    device, dtype, batch_tokens
        Where, how precisely, and how much at once; `None` leaves device and batch to whoever runs it.
    """

    weights: Path
    config: Mapping[str, Any]
    n_blocks: int
    vocabulary: Vocabulary
    method: Method
    operator: Operator
    how: Comparison
    n_probes: int
    goals: np.ndarray | None
    seed: int
    dtype: str
    device: str | None = None
    batch_tokens: int | None = None
    random_weights: int | None = None

    @property
    def measures_shifts(self) -> bool:
        """Whether shifts are measured: estimates of them need probes."""
        return self.method == "exact" or self.n_probes > 0

    def by_random_weights(self, seed: int, goals: np.ndarray | None) -> ScreenJob:
        """Make the same job for a network that has learnt nothing: by derivatives, which cost little."""
        how = "mean" if self.how == "genes" else self.how
        by = {"method": "first_order", "how": how, "dtype": "float32"}
        return replace(self, random_weights=seed, goals=goals, **by)

    def exactly(self) -> ScreenJob:
        """Make the same job without estimates."""
        return replace(self, method="exact")

    def encoder(self) -> BertModel:
        """Load the network; each process keeps it, until its file changes."""
        with _ONE_AT_A_TIME:
            return _encoder(
                self.weights,
                self.weights.stat().st_mtime_ns,
                json.dumps(dict(self.config), sort_keys=True),
                self.n_blocks,
                device=self.device,
                dtype=self.dtype,
                random_weights=self.random_weights,
            )

    def run(self, cells: CellBlock) -> Screened:
        """Screen some cells."""
        from gfx._engine.device import batch_tokens
        from gfx._engine.first_order import screen_by_derivatives
        from gfx._engine.screen import screen_exactly

        encoder = self.encoder()
        given = encoder, cells.ids, cells.wanted, cells.lengths, self.vocabulary
        wanted = {"operator": self.operator, "goals": self.goals}
        wanted["tokens_at_once"] = self.batch_tokens or batch_tokens(encoder.device)
        if self.method == "exact":
            return screen_exactly(*given, how=self.how, **wanted)
        # By what a cell is, not by where it stands: a subset of the cells gives the same.
        rows = zip(cells.ids, cells.lengths, strict=True)
        seeds = [(self.seed, crc32(row[:length].astype("<i8").tobytes())) for row, length in rows]
        return screen_by_derivatives(*given, how=self.how, n_probes=self.n_probes, seeds=seeds, **wanted)


@lru_cache(maxsize=3)
def _encoder(
    weights: Path,
    _changed: int,
    config: str,
    n_blocks: int,
    *,
    device: str | None,
    dtype: str,
    random_weights: int | None,
) -> BertModel:
    from gfx._engine.device import choose_device, choose_dtype
    from gfx._engine.encoder import load_encoder, random_encoder

    chosen = choose_device(device)
    made = {"n_blocks": n_blocks, "device": chosen, "dtype": choose_dtype(dtype, chosen)}
    if random_weights is not None:
        return random_encoder(json.loads(config), seed=random_weights, **made)
    return load_encoder(weights, json.loads(config), **made)


@contextmanager
def networks() -> Iterator[None]:
    """Keep networks in memory from block to block, and in this process no longer than a screen."""
    try:
        yield
    finally:
        _encoder.cache_clear()


def run_in_order(tasks: Iterable[tuple[ScreenJob, CellBlock]], client: Any | None) -> Iterator[Screened]:
    """Run jobs in blocks of cells; here, or on the workers of a `dask.distributed.Client`. Results come in order.

    A few blocks are under way for each worker, so that no more than these are in memory. A worker that dies is dask's
    to replace: its blocks run again elsewhere.
    """
    if client is None:
        yield from (job.run(cells) for job, cells in tasks)
        return
    # Each job is sent once. As a task, not as scattered data, which would be lost with the workers that hold it.
    sent: dict[int, Any] = {}
    waiting: deque = deque()
    try:
        for job, cells in tasks:
            if id(job) not in sent:
                sent[id(job)] = job, client.submit(_itself, job, pure=False)
            waiting.append(client.submit(_run, sent[id(job)][1], cells, pure=False))
            while len(waiting) >= (1 + BLOCKS_AHEAD) * max(1, len(client.ncores())):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _itself(job: ScreenJob) -> ScreenJob:
    return job


def _run(job: ScreenJob, cells: CellBlock) -> Screened:
    return job.run(cells)
