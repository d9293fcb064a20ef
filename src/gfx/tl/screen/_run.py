"""One screen: every block of cells, sums over them, estimates compared with exact results, candidates run exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gfx._core.batching import pieces
from gfx._core.screening import (
    CHECKED,
    GeneSums,
    agreement,
    draw_checked,
    excess_over_neighbours,
    standing_out,
    wanted_places,
)
from gfx._core.statistics import spearman
from gfx.tl._baselines import CONTROL_COLUMNS, compare_with_baselines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gfx._core.encodings import Encodings
    from gfx._engine.run import Job, Result
    from gfx._engine.tasks import Screen
    from gfx._run_store import RunStore

#: Cells in a block, which is what a stopped run loses at most: some thousand passes each.
CELLS_PER_BLOCK = {True: 2, False: 128}

#: Cells in a block of checks, some hundred passes.
CHECKED_PER_BLOCK = 8

#: Passes that all checks of estimates may take, at least and at most.
PASSES_OF_CHECKS = 300, 1500

#: Genes that are run exactly after estimates, and cells of each, at least and at most.
CANDIDATES, CELLS_PER_CANDIDATE = 50, (5, 20)

#: Genes in fewer cells are no candidates, and are left out of comparisons.
FEWEST_CELLS = 10

MODEL, RANDOM = "model", "random_weights"


@dataclass(frozen=True)
class Plan:
    """What is screened: tasks by network, the model and one with random weights; ``"shift"`` and ``"toward"``."""

    tokens: Encodings
    n_deletions: np.ndarray  # genes to delete in each cell, 0 for cells that are not screened
    tasks: dict[str, Screen]
    measures: Sequence[str]
    group: np.ndarray  # of each cell of the AnnData, -1 for none
    n_groups: int

    @cached_property
    def number(self) -> np.ndarray:
        """Which cells of the AnnData are screened, int `(n_cells,)`."""
        return np.flatnonzero(self.n_deletions)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Numbers of tokens, 0 for cells that are not screened, int `(n_obs,)`."""
        return np.where(self.n_deletions > 0, self.tokens.lengths, 0)

    @property
    def cells_per_block(self) -> int:
        return CELLS_PER_BLOCK[self.tasks[MODEL].is_exact]

    def toward(self, goals: Mapping[str, np.ndarray]) -> Plan:
        """Set the states that networks measure shifts toward."""
        return replace(self, tasks={name: replace(task, goals=goals[name]) for name, task in self.tasks.items()})

    def measures_of(self, name: str) -> list[str]:
        """Say what a network measures; without probes, estimates have no shifts."""
        return [measure for measure in self.measures if measure != "shift" or self.tasks[name].measures_shifts]

    @property
    def passes_per_check(self) -> int:
        """How many passes each of the two checks of estimates may take.

        Both together take half of the passes of the estimates, within bounds; a backward pass counts as two.
        """
        return int(np.clip(len(self.number) * self.passes_per_cell(MODEL) // 2, *PASSES_OF_CHECKS)) // 2

    def passes_per_cell(self, name: str) -> int:
        """Count the passes of estimates, as :func:`gfx._engine.first_order.n_passes` does."""
        from gfx._engine.first_order import n_passes

        return n_passes(self.tasks[name].n_probes, self.measures.count("toward"))

    @property
    def n_checked(self) -> int:
        """In how many cells estimates are compared with exact results; the cell as it is takes a pass, too."""
        return self.passes_per_check // (1 + CHECKED)

    def job(self, name: str, task: Screen, rows: np.ndarray, size: int) -> Job:
        from gfx._engine.run import Job

        return Job(name, task, self.tokens, pieces(rows, size))

    def exact_job(self, name: str, tokens_of: Mapping[int, np.ndarray]) -> Job:
        """Delete the given tokens of the given cells, exactly."""
        job = self.job(name, replace(self.tasks[MODEL], is_exact=True), np.array(sorted(tokens_of)), CHECKED_PER_BLOCK)

        def given(number: int) -> dict[str, np.ndarray]:
            rows = job.blocks[number]
            ids, places = self.places(rows)
            return {"wanted": places & [np.isin(row, tokens_of[cell]) for row, cell in zip(ids, rows, strict=True)]}

        return replace(job, given=given, passes=[sum(len(tokens_of[cell]) for cell in rows) for rows in job.blocks])

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of some cells, and which of them are deleted, both `(n_cells, longest)`."""
        ids, task = self.tokens.padded(rows), self.tasks[MODEL]
        return ids, wanted_places(ids, self.lengths[rows], task.genes, task.vocabulary)


def make_jobs(plan: Plan) -> list[Job]:
    """Make the jobs that screen all cells with all networks."""
    jobs = [plan.job(name, task, plan.number, plan.cells_per_block) for name, task in plan.tasks.items()]

    def passes(job: Job, rows: np.ndarray) -> int:
        return int(plan.n_deletions[rows].sum()) if job.task.is_exact else len(rows) * plan.passes_per_cell(job.name)

    return [replace(job, passes=[passes(job, rows) for rows in job.blocks]) for job in jobs]


def run_screen(
    plan: Plan, jobs: Sequence[Job], store: RunStore | None, checked: np.ndarray
) -> tuple[GeneSums, dict[int, Result]]:
    """Screen all cells with all networks, in order.

    Returns sums, of which group 0 is all cells and the groups of the plan follow, and the runs of the model in each of
    the `checked` cells.
    """
    from gfx._engine.run import run

    n_tokens = len(plan.tasks[MODEL].vocabulary)
    sums, of_checked = GeneSums(n_tokens, 1 + plan.n_groups), {}
    for job, cells, runs in run(jobs, description="screening", store=store):
        measured = {"rank": runs["rank"]} if job.name == MODEL else {}
        for measure in plan.measures_of(job.name):
            values = _values(runs, measure)
            measured[f"{job.name}/{measure}"] = values
            measured[f"{job.name}/{measure}_excess"] = excess_over_neighbours(values, runs["cell"])
        of_cell = plan.group[runs["cell"]]
        group = np.concatenate([np.zeros_like(of_cell), np.where(of_cell < 0, -1, of_cell + 1)])
        for name, values in measured.items():
            sums.add(name, np.tile(runs["token"], 2), group, np.tile(values, 2))
        for cell in np.intersect1d(checked, cells.number) if job.name == MODEL else ():
            of_checked[int(cell)] = {name: values[runs["cell"] == cell] for name, values in runs.items()}
    return sums, of_checked


def _values(runs: Result, measure: str) -> np.ndarray:
    return runs["shift"] if measure == "shift" else runs["toward"][:, 0]


# --- estimates and exact results -----------------------------------------------------------------------------------


def check_estimates(
    plan: Plan, estimates: Mapping[int, Result], store: RunStore | None, rng: np.random.Generator
) -> list[tuple[str, str, str, float, int]]:
    """Compare estimates with exact results, in some genes of each of some cells: rows of the table of controls."""
    from gfx._engine.run import run

    measures = plan.measures_of(MODEL)
    estimated = {
        cell: np.stack([_values(estimates[cell], measure) for measure in measures]) for cell in sorted(estimates)
    }
    weights = {cell: draw_checked(values, rng) for cell, values in estimated.items()}
    job = plan.exact_job("checked", {cell: estimates[cell]["token"][weights[cell] > 0] for cell in estimates})
    compared = []  # measure by statistic, of each cell
    for _, cells, runs in run([job], description="checking estimates", store=store):
        for cell in cells.number:
            exact = np.full(estimated[cell].shape, np.nan)
            of_cell = runs["cell"] == cell
            exact[:, weights[cell] > 0] = [_values(runs, measure)[of_cell] for measure in measures]
            compared.append([agreement(*pair, weights[cell]) for pair in zip(estimated[cell], exact, strict=True)])
    names = [(measure, statistic) for measure in measures for statistic in ("spearman", "precision")]
    of_cells = pd.DataFrame(np.reshape(compared, (len(compared), len(names))))  # NaN for cells that tell nothing
    return [("exact", *name, of_cells[at].mean(), int(of_cells[at].count())) for at, name in enumerate(names)]


def run_candidates(plan: Plan, sums: GeneSums, store: RunStore | None, rng: np.random.Generator) -> GeneSums:
    """Delete the genes that stand out most exactly, in some of their cells."""
    from gfx._engine.run import run

    measure = f"{MODEL}/{plan.measures[-1]}"
    n = sums.n(measure)[:, 0]
    excess = np.where(n >= FEWEST_CELLS, _excess(sums, measure)[:, 0], np.nan)
    z, centre, _ = standing_out(excess, sums.mean("rank")[:, 0], n)
    candidates = np.argsort(-np.abs(z), kind="stable")[:CANDIDATES]
    candidates = candidates[np.abs(z[candidates]) > 0]  # neither NaN
    # In so many cells, twice the standard error of a mean is its distance from the mean of genes like it.
    n_cells = (2 * sums.sd(measure)[candidates, 0] / (excess - centre)[candidates]) ** 2
    n_cells = np.ceil(np.clip(n_cells, *CELLS_PER_CANDIDATE)).astype(np.int64)
    n_passes = np.cumsum(n_cells) + np.maximum.accumulate(n_cells)  # cells as they are take passes, too
    is_run = n_passes <= plan.passes_per_check
    exact = GeneSums(len(z), 1)
    if not is_run.any():
        return exact
    job = plan.exact_job("candidates", _draw_cells(plan, candidates[is_run], n_cells[is_run], rng))
    for _, _, runs in run([job], description="candidates, exactly", store=store):
        for measured in plan.measures:
            exact.add(measured, runs["token"], np.zeros(len(runs["token"]), np.int64), _values(runs, measured))
    return exact


def _draw_cells(
    plan: Plan, candidates: np.ndarray, n_cells: np.ndarray, rng: np.random.Generator
) -> dict[int, np.ndarray]:
    """Draw some of the cells that have each candidate: which candidates to delete in each cell.

    They are the first ones in one order of all cells, so that few cells serve all candidates.
    """
    number = np.full(len(plan.tasks[MODEL].vocabulary), -1)
    number[candidates] = np.arange(len(candidates))
    cells, chosen = [], []
    for rows in pieces(rng.permutation(plan.number)):
        ids, places = plan.places(rows)
        cell, place = np.nonzero(places & (number[ids] >= 0))
        has = np.zeros((len(rows), len(candidates)), dtype=bool)
        has[cell, number[ids[cell, place]]] = True
        cells.append(rows)
        chosen.append(has & (np.cumsum(has, axis=0) <= n_cells))
        n_cells = n_cells - has.sum(axis=0)
        if (n_cells <= 0).all():
            break
    is_chosen = np.concatenate(chosen)
    # As many candidates as there are passes for, each in all of its cells; cells as they are take passes, too.
    n_passes = is_chosen.sum(axis=0).cumsum() + np.logical_or.accumulate(is_chosen, axis=1).sum(axis=0)
    is_chosen &= n_passes <= plan.passes_per_check
    drawn = zip(np.concatenate(cells).tolist(), is_chosen, strict=True)
    return {cell: candidates[of_cell] for cell, of_cell in drawn if of_cell.any()}


# --- tables --------------------------------------------------------------------------------------------------------


def gene_columns(plan: Plan, sums: GeneSums, group: int) -> pd.DataFrame:
    """One row a token: what deleting it did in the cells of a group, 0 for all cells."""
    main = f"{MODEL}/{plan.measures_of(MODEL)[0]}"
    columns = {"n_cells": sums.n(main)[:, group], "rank_mean": sums.mean("rank")[:, group]}
    for name in plan.tasks:
        prefix = "" if name == MODEL else f"{name}_"
        for measure in plan.measures_of(name):
            columns[f"{prefix}{measure}_mean"] = sums.mean(f"{name}/{measure}")[:, group]
            if name == MODEL:
                columns[f"{measure}_sd"] = sums.sd(f"{name}/{measure}")[:, group]
            columns[f"{prefix}{measure}_excess"] = _excess(sums, f"{name}/{measure}")[:, group]
    return pd.DataFrame(columns)


def _excess(sums: GeneSums, measure: str) -> np.ndarray:
    """Mean excess over the cells of enough genes, `(n_tokens, n_groups)`; NaN if so few have it that none is tested."""
    excess = f"{measure}_excess"
    is_enough = sums.n(excess) >= np.minimum(sums.n(measure), FEWEST_CELLS)
    return np.where(is_enough, sums.mean(excess), np.nan)


def control_table(
    table: pd.DataFrame,
    measures: Sequence[str],
    agreement_rows: Sequence[tuple[str, str, str, float, int]],
    axis: dict[str, Any] | None,
) -> pd.DataFrame:
    """Compare the ranking of genes with its controls, a row each; with rows of :func:`check_estimates`."""
    rows: list[tuple[str, str, str, float, int]] = []
    table = table[table["n_cells"] >= FEWEST_CELLS]
    names = {"rank": "rank_mean", "detection": "detection", "expression": "expression_mean", "logfc": "logfc"}
    baselines = {name: table[column].to_numpy() for name, column in names.items() if column in table}
    for measure in measures:
        effect = table[f"{measure}_mean"].to_numpy()
        if f"{RANDOM}_{measure}_mean" in table:
            random = table[f"{RANDOM}_{measure}_mean"].to_numpy()
            n = int((np.isfinite(effect) & np.isfinite(random)).sum())
            rows.append((RANDOM, measure, "spearman", spearman(effect, random), n))
        rows += compare_with_baselines({measure: effect}, baselines)
    rows += agreement_rows
    if axis is not None:
        rows.append(("state_axis", "toward", "auc", axis["auc"], axis["n_folds"]))
    return pd.DataFrame(rows, columns=list(CONTROL_COLUMNS))
