"""One way to perturb genes in the cells of one object, ready to run any sets in any cells with any network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gfx._core.edits import can_be_perturbed, pad_sets
from gfx._core.statistics import divided, of_sample
from gfx.tl._prepare import vectors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gfx._engine.perturb import Comparison
    from gfx._engine.run import CellBlock, Job, Network, Result
    from gfx._run_store import RunStore
    from gfx._types import Positions
    from gfx.tl._prepare import Prepared

    #: Finds the ranks that genes move to, `(n_runs, n_genes)`, from the cell of each run and its genes.
    NewRanks = Callable[[np.ndarray, np.ndarray], np.ndarray]

#: Cells and runs in a block: what a stopped run loses, and what is sent to a worker.
CELLS_PER_BLOCK, RUNS_PER_BLOCK = 128, 1024


@dataclass
class Runs:
    """A table of runs, a row each: one set of genes, perturbed in one cell by one network.

    Parameters
    ----------
    sets
        Tokens of each set of genes.
    cell, which
        Cell and set of each run, int `(n_runs,)`.
    perturbation, gene_sums
        Perturbation that each set belongs to, ascending, int `(n_sets,)`; and for each perturbation sum, sum of squares
        and number of the shifts of other genes, float64 `(3, n_tokens, n_perturbations)`. `None` adds nothing up.
    effects
        What was measured, an array `(n_runs, ...)` each: `shift`, `rank`, `toward` and so on.
    """

    sets: Sequence[np.ndarray]
    cell: np.ndarray
    which: np.ndarray
    perturbation: np.ndarray | None = None
    gene_sums: np.ndarray | None = None
    effects: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.cell)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.effects[name]

    def effect(self, measure: str, state: int | None = None) -> np.ndarray:
        """Shifts, or with `state` changes of the cosine to this one of the states, float32 `(n_runs,)`."""
        return self[measure] if measure == "shift" else self[measure][:, state]

    @property
    def n_cells(self) -> np.ndarray:
        """Number of cells that each set was perturbed in, int64 `(n_sets,)`."""
        return np.bincount(self.which, minlength=len(self.sets))

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean of each set over its runs, in float64; NaN does not count, and is the mean of sets without values."""
        known = ~np.isnan(values)
        n, sums = (
            np.bincount(self.which[known], weights, minlength=len(self.sets))
            for weights in (None, values[known].astype(np.float64))
        )
        return divided(sums, n)

    def sd(self, values: np.ndarray) -> np.ndarray:
        """Take the standard deviation of each set over its runs, in float64; NaN for fewer than two."""
        return of_sample(self.mean((values - self.mean(values)[self.which]) ** 2), self.n_cells)

    def find(self, which: np.ndarray, cell: np.ndarray) -> np.ndarray:
        """Numbers of the runs of given sets in given cells; runs are sorted by set, then by cell."""
        n = 1 + int(self.cell.max(initial=0))
        return np.searchsorted(self.which * n + self.cell, which * n + cell)

    def by_cell(self, values: np.ndarray, n_obs: int) -> np.ndarray:
        """Lay values of runs out by cell and set, float32 `(n_obs, n_sets, ...)`; NaN where there is no run."""
        out = np.full((n_obs, len(self.sets), *values.shape[1:]), np.nan, dtype=np.float32)
        out[self.cell, self.which] = values
        return out

    def add(self, cells: CellBlock, result: Result) -> None:
        """Take in the result of a block: single genes that only served for comparison are left out."""
        run = cells.given["run"]
        own = run < len(self)
        for name, values in result.items():
            if name.startswith("gene_"):
                continue
            if name not in self.effects:
                self.effects[name] = np.full((len(self), *values.shape[1:]), np.nan, values.dtype)
            self.effects[name][run[own]] = values[own]
        if "gene_sums" in result:
            self.gene_sums[:, result["gene_token"], result["gene_group"]] += result["gene_sums"]


@dataclass(frozen=True)
class Experiment:
    """What is done to genes, in which cells, by which network, and how cells are compared."""

    cells: Prepared
    network: Network
    operator: str
    positions: Positions
    pooling: Comparison
    lengths: np.ndarray  # tokens of each cell, 0 for cells that are not perturbed, int (n_obs,)
    new_ranks: NewRanks | None = None  # of genes that move

    def where(self, genes: np.ndarray) -> np.ndarray:
        """Rows of the cells in which a set of genes can be perturbed."""
        places = self.cells.tokens.places(genes)
        return np.flatnonzero(can_be_perturbed(places, self.lengths, self.cells.model.vocabulary, self.operator))

    def runs(
        self,
        sets: Sequence[np.ndarray],
        cells_of: Sequence[np.ndarray],
        perturbation: np.ndarray | None = None,
        n_perturbations: int = 0,
    ) -> Runs:
        """List the runs of each set in its cells, by set; the perturbations of sets are as in :class:`Runs`."""
        cell = np.concatenate([np.zeros(0, dtype=np.int64), *cells_of]).astype(np.int64)
        which = np.repeat(np.arange(len(sets)), np.array([len(rows) for rows in cells_of], dtype=np.int64))
        is_summed, shape = perturbation is not None, (3, len(self.cells.model.vocabulary), n_perturbations)
        return Runs(sets, cell, which, perturbation, np.zeros(shape) if is_summed else None)

    def job(
        self,
        name: str,
        runs: Runs,
        *,
        network: Network | None = None,
        goals: np.ndarray | None = None,
        together: bool = False,
        split: bool = False,
        keep_vectors: bool = False,
    ) -> Job:
        """Make the job that fills a table of runs, by the model or another network.

        Goals are vectors of states; they, `split` and `keep_vectors` are those of
        :class:`gfx._engine.tasks.Perturbation`. With `together`, the genes of larger sets are also perturbed one by
        one, to compare.
        """
        from gfx._engine.perturb import n_passes
        from gfx._engine.run import Job
        from gfx._engine.tasks import Perturbation

        tokens = self.cells.tokens
        sets, cell, which, members = _with_single_genes(runs) if together else (runs.sets, runs.cell, runs.which, None)
        n_states = 0 if goals is None else goals.shape[-2]
        shapes = {"shift": (), "rank": (), "toward": (n_states,)}
        if split:
            shapes |= {"parts": (3,), "toward_parts": (n_states, 3)}
        for name_of_effect, shape in shapes.items():  # also where there are no runs
            runs.effects[name_of_effect] = np.full((len(runs), *shape), np.nan, dtype=np.float32)
        if goals is not None and goals.ndim == 3:  # single genes that only serve for comparison need no goals
            goals = goals[np.minimum(np.arange(len(sets)), len(goals) - 1)]
        blocks, runs_of = _blocks(cell, tokens.lengths)
        padded = None if self.new_ranks is None else pad_sets(sets)
        group = None if runs.gene_sums is None else np.append(runs.perturbation[runs.which], -1)  # -1: single genes

        def given(number: int) -> dict[str, np.ndarray]:
            run = runs_of[number]  # cell after cell, in the order of the block
            values = {"run": run, "cell": np.cumsum(np.diff(cell[run], prepend=cell[run[0]]) != 0), "set": which[run]}
            if padded is not None:
                values["to"] = self.new_ranks(cell[run], padded[which[run]])
            if members is not None:
                number_in_block = np.full(len(cell) + 1, -1, dtype=np.int64)  # of -1, too
                number_in_block[run] = np.arange(len(run))
                values["members"] = number_in_block[members[run]]
                values["own"] = run < len(runs)
            if group is not None:
                values["group"] = group[np.minimum(run, len(runs))]
            return values

        what = (self.cells.model.vocabulary, self.operator, self.positions, self.pooling)
        task = Perturbation(network or self.network, *what, sets, goals, split=split, keep_vectors=keep_vectors)
        n_more = n_passes(split=split, positions=self.positions) - 1
        passes = [len(run) + int((run < len(runs)).sum()) * n_more for run in runs_of]
        return Job(name, task, tokens, blocks, given, passes)


def embed_states(
    cells: Prepared, networks: Mapping[str, Network], pooling: Comparison, rows: np.ndarray, store: RunStore | None
) -> dict[str, np.ndarray]:
    """Embed the cells of states, bool `(n_obs,)`, as they are: float32 `(n_obs, d)` by network, NaN for others."""
    from gfx._engine.run import run

    lengths = np.where(rows, cells.tokens.lengths, 0)
    jobs = [cells.embedding(f"states_{name}", network, pooling, lengths) for name, network in networks.items()]
    vectors = vectors_of(run(jobs, description="embedding states", store=store), cells.adata.n_obs)
    return {name: vectors[f"states_{name}"] for name in networks}


def _with_single_genes(
    runs: Runs,
) -> tuple[Sequence[np.ndarray], np.ndarray, np.ndarray, np.ndarray | None]:
    """Add the genes of larger sets one by one, each once in a cell however many sets it is in, unless it runs anyway.

    Returns sets, cells and numbers of sets of all runs, added ones last; and for each run those of its genes, int
    `(n_runs, largest)`, -1 where there is none.
    """
    sizes = np.array([len(genes) for genes in runs.sets], dtype=np.int64)[runs.which]
    several = np.flatnonzero(sizes > 1)
    if not len(several):
        return runs.sets, runs.cell, runs.which, None
    n_genes = sizes[several]
    alone = np.flatnonzero(sizes == 1)
    genes, first = (
        np.concatenate([runs.sets[0][:0], *(runs.sets[number] for number in runs.which[some])]).astype(np.int64)
        for some in (several, alone)
    )
    key = np.concatenate([runs.cell[alone], np.repeat(runs.cell[several], n_genes)]), np.concatenate([first, genes])
    # Of the same gene in the same cell the first stands for all: a run there is, or the one that is added.
    pairs, at, number = np.unique(np.column_stack(key), axis=0, return_index=True, return_inverse=True)
    is_new = at >= len(alone)
    run_of = np.empty(len(pairs), dtype=np.int64)
    run_of[~is_new], run_of[is_new] = alone[at[~is_new]], len(runs) + np.arange(is_new.sum())
    single, which = np.unique(pairs[is_new, 1], return_inverse=True)
    cell = np.concatenate([runs.cell, pairs[is_new, 0]])
    members = np.full((len(cell), int(n_genes.max())), -1, dtype=np.int64)
    place = np.concatenate([np.arange(n) for n in n_genes])
    members[np.repeat(several, n_genes), place] = run_of[number.ravel()[len(alone) :]]
    return [*runs.sets, *single[:, None]], cell, np.concatenate([runs.which, len(runs.sets) + which]), members


def _blocks(cell: np.ndarray, lengths: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Cut cells into blocks of similar length, the longest first: rows of the cells, and runs, of each block."""
    by_cell = np.argsort(cell, kind="stable")
    rows, n_runs = np.unique(cell, return_counts=True)
    runs_of_row = np.split(by_cell, np.cumsum(n_runs)[:-1]) if len(rows) else []
    blocks: list[list[int]] = []
    n_in_block = 0
    for number in np.argsort(-lengths[rows], kind="stable"):
        if not blocks or len(blocks[-1]) == CELLS_PER_BLOCK or n_in_block + n_runs[number] > RUNS_PER_BLOCK:
            blocks.append([])
            n_in_block = 0
        blocks[-1].append(number)
        n_in_block += n_runs[number]
    return [rows[block] for block in blocks], [np.concatenate([runs_of_row[row] for row in block]) for block in blocks]
