"""One way to perturb genes in the cells of one object, ready to run any sets in any cells with any network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gfx._core.edits import can_be_perturbed, pad_sets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gfx._core.edits import Operator, Positions
    from gfx._engine.perturb import Comparison
    from gfx._engine.run import CellBlock, Job, Network, Result
    from gfx.tl._prepare import Prepared
    from gfx.tl._states import States

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
    group, n_groups
        Group of each run, in which shifts of the other genes are added up, int `(n_runs,)`, and how many groups there
        are, some of them without runs; `None` adds nothing up.
    effects
        What was measured, an array `(n_runs, ...)` each: `shift`, `rank`, `toward` and so on.
    gene_sums
        Sum, sum of squares and number of the shifts of other genes, float64 `(3, n_tokens, n_groups)`.
    """

    sets: Sequence[np.ndarray]
    cell: np.ndarray
    which: np.ndarray
    group: np.ndarray | None = None
    n_groups: int = 0
    effects: dict[str, np.ndarray] = field(default_factory=dict)
    gene_sums: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.cell)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.effects[name]

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean of each set over its runs, in float64; NaN for sets without any."""
        counts = np.bincount(self.which, minlength=len(self.sets))
        sums = np.bincount(self.which, values.astype(np.float64), minlength=len(self.sets))
        return np.divide(sums, counts, out=np.full(len(self.sets), np.nan), where=counts > 0)

    def add(self, cells: CellBlock, result: Result) -> None:
        """Take in the result of a block: single genes that only served for comparison are left out."""
        run = cells.given["run"]
        own = run < len(self)
        for name, values in result.items():
            if not name.startswith("gene_"):
                missing = np.full((len(self), *values.shape[1:]), np.nan, values.dtype)
                self.effects.setdefault(name, missing)[run[own]] = values[own]
        if "gene_sums" in result:
            self.gene_sums[:, result["gene_token"], result["gene_group"]] += result["gene_sums"]


@dataclass(frozen=True)
class Experiment:
    """What is done to genes, and where.

    Parameters
    ----------
    cells
        Cells, tokens and model.
    network
        The model up to the wanted layer.
    operator, positions
        What is done to the genes, and whether the other genes close up behind them.
    pooling
        How cells are compared.
    lengths
        Tokens of each cell, 0 for cells that are not perturbed, int `(n_obs,)`.
    new_ranks
        Finds the ranks that genes move to, `(n_runs, n_genes)`, from the cell of each run and its genes.
    """

    cells: Prepared
    network: Network
    operator: Operator
    positions: Positions
    pooling: Comparison
    lengths: np.ndarray
    new_ranks: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

    def where(self, genes: np.ndarray) -> np.ndarray:
        """Rows of the cells in which a set of genes can be perturbed."""
        vocabulary = self.cells.model.vocabulary
        return np.flatnonzero(can_be_perturbed(self.cells.tokens.ids, self.lengths, genes, vocabulary, self.operator))

    def runs(self, sets: Sequence[np.ndarray], cells_of: Sequence[np.ndarray], *, group: bool = False) -> Runs:
        """List the runs of each set in its cells; with `group`, shifts of other genes are added up for each set."""
        which = np.repeat(np.arange(len(sets)), [len(rows) for rows in cells_of])
        cell = np.concatenate([np.zeros(0, dtype=np.int64), *cells_of]).astype(np.int64)
        return Runs(sets, cell, which, which if group else None, len(sets))

    def job(
        self,
        name: str,
        runs: Runs,
        *,
        network: Network | None = None,
        goals: np.ndarray | None = None,
        together: bool = False,
        **how: Any,
    ) -> Job:
        """Make the job that fills a table of runs.

        Parameters
        ----------
        network
            Another network than the model.
        goals
            Vectors of states, see :class:`gfx._engine.tasks.Perturbation`.
        together
            Also perturb the genes of larger sets one by one, to compare.
        how
            Passed on to the task.
        """
        from gfx._engine.run import Job
        from gfx._engine.tasks import Perturbation

        vocabulary, tokens = self.cells.model.vocabulary, self.cells.tokens
        sets, cell, which, members = _with_single_genes(runs) if together else (runs.sets, runs.cell, runs.which, None)
        if runs.group is not None:
            runs.gene_sums = np.zeros((3, len(vocabulary), runs.n_groups))
        n_states = 0 if goals is None else goals.shape[-2]
        for measure, shape in (("shift", ()), ("rank", ()), ("toward", (n_states,))):  # also where there are no runs
            runs.effects[measure] = np.full((len(runs), *shape), np.nan, dtype=np.float32)
        if goals is not None and goals.ndim == 3:  # single genes that only serve for comparison are beside no states
            goals = goals[np.minimum(np.arange(len(sets)), len(goals) - 1)]
        blocks, runs_of = _blocks(cell, tokens.lengths)
        padded = None if self.new_ranks is None else pad_sets(sets)

        def given(number: int) -> dict[str, np.ndarray]:
            run = runs_of[number]
            row = np.empty(len(tokens.lengths), dtype=np.int64)
            row[blocks[number]] = np.arange(len(blocks[number]))
            told = {"run": run, "cell": row[cell[run]], "set": which[run]}
            if padded is not None:
                told["to"] = self.new_ranks(cell[run], padded[which[run]])
            if members is not None:
                place = np.full(len(cell) + 1, -1, dtype=np.int64)  # of -1, too
                place[run] = np.arange(len(run))
                told["members"] = place[members[run]]
            if runs.group is not None:
                told["group"] = np.full(len(run), -1, dtype=np.int64)
                told["group"][run < len(runs)] = runs.group[run[run < len(runs)]]
            return told

        task = Perturbation(
            network or self.network, vocabulary, self.operator, self.positions, self.pooling, sets, goals, **how
        )
        return Job(name, task, tokens.ids, tokens.lengths, blocks, given)

    def embedding(self, name: str, states: States, network: Network | None = None) -> Job:
        """Make the job that embeds all cells of the states as they are."""
        from gfx._engine.run import CELLS_PER_BLOCK, Job, by_length
        from gfx._engine.tasks import CellEmbedding

        tokens = self.cells.tokens
        task = CellEmbedding(
            network or self.network, self.cells.model.vocabulary, "cls" if self.pooling == "cls" else "mean"
        )
        blocks = by_length(np.where(states.group >= 0, tokens.lengths, 0), CELLS_PER_BLOCK)
        return Job(name, task, tokens.ids, tokens.lengths, blocks)


def _with_single_genes(
    runs: Runs,
) -> tuple[Sequence[np.ndarray], np.ndarray, np.ndarray, np.ndarray | None]:
    """Add the genes of larger sets one by one, each once in a cell however many sets it is in.

    Returns
    -------
    Sets, cells and numbers of sets of all runs, single genes behind; and for each run those of its genes, int
    `(n_runs, largest)`, -1 where there is none.
    """
    sizes = np.array([len(genes) for genes in runs.sets])[runs.which] if len(runs) else np.zeros(0, dtype=np.int64)
    several = np.flatnonzero(sizes > 1)
    if not len(several):
        return runs.sets, runs.cell, runs.which, None
    n_genes = sizes[several]
    genes = np.concatenate([runs.sets[number] for number in runs.which[several]])
    wanted = np.column_stack([np.repeat(runs.cell[several], n_genes), genes])
    unique, number = np.unique(wanted, axis=0, return_inverse=True)
    single, which = np.unique(unique[:, 1], return_inverse=True)
    cell = np.concatenate([runs.cell, unique[:, 0]])
    members = np.full((len(cell), int(n_genes.max())), -1, dtype=np.int64)
    place = np.concatenate([np.arange(n) for n in n_genes])
    members[np.repeat(several, n_genes), place] = len(runs) + number.ravel()
    return [*runs.sets, *single[:, None]], cell, np.concatenate([runs.which, len(runs.sets) + which]), members


def _blocks(cell: np.ndarray, lengths: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Cut cells into blocks of similar length, the longest first: rows of the cells, and runs, of each block."""
    by_cell = np.argsort(cell, kind="stable")
    rows, n_runs = np.unique(cell, return_counts=True)
    runs_of_row = np.split(by_cell, np.cumsum(n_runs)[:-1]) if len(rows) else []
    blocks: list[list[int]] = []
    n_here = 0
    for number in np.argsort(-lengths[rows], kind="stable"):
        if not blocks or len(blocks[-1]) == CELLS_PER_BLOCK or n_here + n_runs[number] > RUNS_PER_BLOCK:
            blocks.append([])
            n_here = 0
        blocks[-1].append(number)
        n_here += n_runs[number]
    return [rows[block] for block in blocks], [np.concatenate([runs_of_row[row] for row in block]) for block in blocks]
