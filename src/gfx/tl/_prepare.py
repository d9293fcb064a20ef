"""What every tool does first: find the cells, the model and the tokens; torch is loaded only here and below."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gfx._adata import GeneMatch, cell_mask, gene_names, obs_column, read_genes
from gfx._core.arguments import check_choice
from gfx._core.batching import pieces
from gfx._core.manifest import fingerprint
from gfx._log import info
from gfx._results import Slots, claim, record
from gfx._settings import settings
from gfx._tokens import CountsNotAtHandError, counts_by_token, find_tokens
from gfx.models import load

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData

    from gfx._engine.run import CellBlock, Job, Network, Result
    from gfx._engine.tasks import GeneEmbedding
    from gfx._run_store import RunStore
    from gfx._tokens import Tokens
    from gfx._types import Data, Mask, ModelLike, Pooling, PoolingOfShifts
    from gfx.models import Model


#: Passes from which on a call says what it costs, and cells that are timed for that.
LONG_CALL, CELLS_TIMED = 500, 8


@dataclass(frozen=True)
class Prepared:
    """A model, its tokens for every cell, and the slots where results go: all that a tool needs to run."""

    model: Model
    tokens: Tokens
    slots: Slots

    @property
    def adata(self) -> AnnData:
        """The cells, and where results go."""
        return self.slots.adata

    @property
    def result(self) -> Data | None:
        """What the tool returns: the copy it worked on, or `None`."""
        return self.slots.returned

    @cached_property
    def gene_tokens(self) -> np.ndarray:
        """Token of each gene of the AnnData, -1 for genes that the model does not know, int32 `(n_vars,)`."""
        column = self.tokens.source.get("gene_ids")
        var = self.adata.var
        names = read_genes(var, column if column in var.columns else None).names
        tokens = GeneMatch.of(names, self.model.vocabulary).tokens
        if not (tokens >= 0).any():
            where = "`adata.var_names`" if column is None else f"`adata.var[{column!r}]`, where the tokens came from"
            msg = (
                f"The model knows none of the genes here, such as {names[:3].tolist()}, though it knows those of the "
                f"tokens. Put the names back into {where}, or run `gfx.pp.tokenize(adata, ...)` again."
            )
            raise ValueError(msg)
        return tokens

    def lengths(self, mask_obs: Mask | None) -> np.ndarray:
        """Numbers of tokens of the cells to use, 0 for all others, int32 `(n_obs,)`."""
        lengths = np.where(cell_mask(self.adata, mask_obs), self.tokens.lengths, 0)
        if not lengths.any():
            msg = "None of the cells that `mask_obs` selects has a gene that the model knows."
            raise ValueError(msg)
        return lengths

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of tokens of the cells in some rows, 0 for all others, int32 `(n_obs,)`."""
        lengths = np.zeros_like(self.tokens.lengths)
        lengths[rows] = self.tokens.lengths[rows]
        return lengths

    def per_gene(self, values: np.ndarray) -> np.ndarray:
        """Turn one row per token into one row per gene of the AnnData, float32; NaN for unknown genes."""
        tokens = self.gene_tokens
        out = np.full((len(tokens), *values.shape[1:]), np.nan, dtype=np.float32)
        out[tokens >= 0] = values[tokens[tokens >= 0]]
        return out

    def cells_per_gene(self, counts: np.ndarray) -> np.ndarray:
        """Turn numbers of cells per token into numbers per gene of the AnnData, int32; 0 for unknown genes."""
        tokens = self.gene_tokens
        return np.where((tokens >= 0).reshape(-1, *[1] * (counts.ndim - 1)), counts[tokens], 0).astype(np.int32)

    def are_cut(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Which of some genes the cells to use detect, bool `(n,)`, of genes that their encodings lack: they were cut.

        Without counts at hand nothing is known of any.
        """
        detected = np.zeros(len(tokens), dtype=bool)
        if lengths.max(initial=0) < self.model.max_length:
            return detected
        try:
            for rows, counts, _ in counts_by_token(self.adata, self.model.vocabulary, self.tokens.source):
                detected |= np.asarray(counts[lengths[rows] > 0][:, tokens].sum(axis=0)).ravel() > 0
        except CountsNotAtHandError as problem:
            info(f"Whether genes were cut is not known: {problem.args[0]}")
        return detected

    @property
    def behind(self) -> str:
        """Say where genes are that were cut."""
        room = self.model.max_length - self.model.vocabulary.n_specials
        return f"Cells express them, but behind the {room:,} genes of a cell that {self.model.name!r} reads: cut."

    def network(self, hidden_layer: int, dtype: str | None = None) -> Network:
        """Name the layers of the model up to the wanted one, for tasks of the runner.

        `dtype` is the precision where the settings name none; `None` is bfloat16 where that is faster, else float32.
        """
        from gfx._engine.device import choose_device, choose_dtype
        from gfx._engine.encoder import layers_needed
        from gfx._engine.run import Network

        return Network(
            self.model.weights,
            self.model.config,
            layers_needed(hidden_layer, self.model.n_layers),
            str(choose_dtype(settings.dtype or dtype, choose_device(), self.model.hidden_size)).removeprefix("torch."),
        )

    def pooling(self, pooling: Pooling, choices: tuple[str, ...] = ("auto", "mean", "cls")) -> Literal["mean", "cls"]:
        """Choose how a cell becomes one vector: as the model's family does, unless said otherwise."""
        has_cls = self.model.vocabulary.has_cls
        check_choice(pooling, "pooling", choices)
        if pooling == "cls" and not has_cls:
            msg = (
                f"{self.model.name!r} has no <cls> token; its family embeds a cell as the mean over its genes. "
                "Use `pooling='mean'`."
            )
            raise ValueError(msg)
        return ("cls" if has_cls else "mean") if pooling == "auto" else pooling

    def comparison(self, pooling: PoolingOfShifts) -> Literal["mean", "cls", "genes"]:
        """Choose how perturbed cells are compared: as :meth:`pooling`, or gene by gene."""
        return self.pooling(pooling, ("auto", "mean", "cls", "genes"))

    def embedding(self, name: str, network: Network, pooling: str, lengths: np.ndarray | None = None) -> Job:
        """Make the job that embeds all cells that have tokens, or those that have any in `lengths`.

        Where cells are compared gene by gene (`pooling`), their vectors are means.
        """
        from gfx._engine.run import CELLS_PER_BLOCK, Job, by_length
        from gfx._engine.tasks import CellEmbedding

        task = CellEmbedding(network, self.model.vocabulary, "cls" if pooling == "cls" else "mean")
        blocks = by_length(self.tokens.lengths if lengths is None else lengths, CELLS_PER_BLOCK)
        return Job(name, task, self.tokens, blocks)

    def sums_of_genes(
        self, task: GeneEmbedding, lengths: np.ndarray, group: np.ndarray, *, description: str, store: RunStore | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add up what a task gives for genes over the cells of each group, float64 `(n_groups * n_tokens, d)`.

        Numbers of cells, int64 `(n_groups * n_tokens,)`, are returned as well.
        """
        from gfx._engine.pooling import sums_of_genes
        from gfx._engine.run import CELLS_PER_SUM, Job, by_length, run, tell_finished

        blocks = by_length(lengths, CELLS_PER_SUM)
        job = Job("genes", task, self.tokens, blocks, lambda number: {"group": group[blocks[number]]})
        tell_finished([job], store)
        results = (result for _, _, result in run([job], description=description, store=store))
        return sums_of_genes(results, task.n_groups * len(self.model.vocabulary))

    def announce(self, jobs: Sequence[Job], network: Network, store: RunStore | None, n_more: int = 0) -> None:
        """Say what the store has, and what a long call costs before it is paid: passes of the network, and their time.

        Blocks that the store has cost nothing; `n_more` are passes that are not among the jobs.
        """
        from gfx._engine.device import choose_devices
        from gfx._engine.run import run, tell_finished

        finished = tell_finished(jobs, store)
        missing = [(job, number) for job in jobs for number in set(range(len(job.blocks))) - finished[job.name]]
        n_passes = sum(job.n_passes(number) for job, number in missing) + n_more
        if n_passes < LONG_CALL:
            return
        expected = ""
        if missing and settings.client is None and len(choose_devices()) == 1:
            rows = np.unique(np.concatenate([job.blocks[number] for job, number in missing]))
            by_length = rows[np.argsort(self.tokens.lengths[rows], kind="stable")]
            sample = np.unique(by_length[np.linspace(0, len(by_length) - 1, CELLS_TIMED).astype(int)])
            timed = self.embedding("timed", network, "mean", self.lengths_of(sample))
            for _ in range(2):  # the first time loads the network
                start = perf_counter()
                list(run([timed], description="timing"))
            seconds = (perf_counter() - start) * n_passes / timed.n_cells
            expected = f", about {seconds / 60:.0f} min" if seconds >= 90 else f", about {seconds:.0f} s"
        info(f"{n_passes:,} passes of the network{expected}")

    def provenance(self, network: Network) -> dict[str, Any]:
        """Note which model ran, on what, and how precisely."""
        return {**self.model.provenance(), **self.tokens.source, "dtype": network.dtype}


def groups(adata: AnnData, groupby: str) -> tuple[list[str], np.ndarray]:
    """Read a column of `obs` as groups: their names, and the group of each cell, int64 `(n_obs,)`, -1 where missing."""
    column = obs_column(adata, groupby).astype("category")
    if column.isna().all():
        msg = f"`adata.obs[{groupby!r}]` is missing for every cell: there are no groups."
        raise ValueError(msg)
    return [str(name) for name in column.cat.categories], column.cat.codes.to_numpy(dtype=np.int64)


def groups_and_rest(adata: AnnData, groupby: str | None) -> tuple[list[str], np.ndarray]:
    """Read groups as :func:`groups` does, none without `groupby`.

    Cells without a group go into one more, behind the last, so that a single pass serves all cells, too.
    """
    names, group = ([], np.zeros(adata.n_obs, dtype=np.int64)) if groupby is None else groups(adata, groupby)
    return names, np.where(group < 0, len(names), group)


def donors(adata: AnnData, donor_key: str) -> np.ndarray:
    """Read the donor of each cell, as text; every cell has one."""
    column = obs_column(adata, donor_key)
    if n_missing := int((gene_names(column) == "").sum()):  # "nan" is no name of a donor either
        msg = f"`adata.obs[{donor_key!r}]` names no donor for {n_missing:,} cells. Leave these out."
        raise ValueError(msg)
    return column.astype(str).to_numpy(dtype=object)


def check_controls(given: Iterable[str] | None, choices: tuple[str, ...]) -> tuple[str, ...]:
    """Read the controls to run, in the order of the choices; one that is none of them is refused."""
    if not isinstance(given, Iterable | None):
        check_choice(given, "controls", (*choices, None))
    wanted = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    for control in wanted:
        check_choice(control, "controls", (*choices, None))
    return tuple(control for control in choices if control in wanted)


def open_store(store: str | Path, function: str, cells: Prepared, depends: Mapping[str, object]) -> RunStore:
    """Open the store of a run on these cells, or begin one; `depends` is what else its results depend on."""
    from gfx._engine.device import choose_device
    from gfx._run_store import RunStore

    names, tokens = cells.adata.obs_names.to_numpy(dtype=object), cells.tokens
    manifest = record(function) | {name: value for name, value in depends.items() if value is not None}
    manifest |= {
        "torch_version": version("torch"),
        "device": choose_device().type,
        "batch_tokens": settings.batch_tokens,
        "cells": fingerprint(names),
        "tokens": fingerprint(tokens.lengths, (tokens.padded(rows) for rows in pieces(np.arange(len(names))))),
    }
    return RunStore.open(store, manifest)


def vectors_of(results: Iterable[tuple[Job, CellBlock, Result]], n_obs: int) -> dict[str, np.ndarray]:
    """Lay the vectors of embedding jobs where their cells are, float32 `(n_obs, d)`; NaN for all others."""
    vectors: dict[str, np.ndarray] = {}
    for job, cells, result in results:
        if job.name not in vectors:
            vectors[job.name] = np.full((n_obs, result["vectors"].shape[1]), np.nan, dtype=np.float32)
        vectors[job.name][cells.number] = result["vectors"]
    return vectors


def prepare(
    data: Data,
    model: ModelLike | None,
    *,
    function: str,
    layer: str | None,
    mod: str | None,
    copy: bool,
    key_added: str | None = None,
) -> Prepared:
    """Claim the slots of a tool, and find the cells, the model and the tokens that it runs on; writes nothing."""
    slots = claim(data, function, key_added, mod=mod, copy=copy)
    loaded = load(model)
    tokens = find_tokens(slots.adata, loaded.vocabulary, loaded.max_length, layer=layer)
    if not (tokens.lengths > 0).any():
        why = "No cell has a gene that the model knows. Run `gfx.pp.check(adata)` to see why."
        msg = why if slots.adata.n_obs else "The object has no cells."
        raise ValueError(msg)
    return Prepared(model=loaded, tokens=tokens, slots=slots)
