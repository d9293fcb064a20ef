"""One screen: every block of cells, sums over them, estimates compared with exact results, candidates run exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gfx._core.batching import pieces
from gfx._core.screening import GeneSums, agreement, excess_over_neighbours, standing_out, wanted_places
from gfx._core.statistics import spearman
from gfx.tl._baselines import CONTROL_COLUMNS, compare_with_baselines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gfx._engine.run import Job, Result
    from gfx._engine.tasks import Screen
    from gfx._run_store import RunStore

#: Cells in a block, which is what a stopped run loses at most: some thousand passes each.
CELLS_PER_BLOCK = {True: 2, False: 128}

#: Cells in which estimates are compared with exact results.
CHECKED_CELLS = 4

#: Genes that are run exactly after estimates, and cells of each.
CANDIDATES, CELLS_PER_CANDIDATE = 50, 20

#: Genes in fewer cells are no candidates, and are left out of comparisons.
FEWEST_CELLS = 10

MODEL, RANDOM = "model", "random_weights"


@dataclass(frozen=True)
class Plan:
    """What is screened: tasks by network, the model and one with random weights; ``"shift"`` and ``"toward"``."""

    ids: np.ndarray  # tokens of all cells, (n_obs, longest)
    lengths: np.ndarray  # and how many, 0 for cells that are not screened
    tasks: dict[str, Screen]
    measures: Sequence[str]
    group: np.ndarray  # of each cell of the AnnData, -1 for none
    n_groups: int

    @cached_property
    def number(self) -> np.ndarray:
        """Which cells of the AnnData are screened, int `(n_cells,)`."""
        return np.flatnonzero(self.lengths)

    @property
    def cells_per_block(self) -> int:
        return CELLS_PER_BLOCK[self.tasks[MODEL].is_exact]

    def toward(self, goals: Mapping[str, np.ndarray]) -> Plan:
        """Set the states that networks measure shifts toward."""
        return replace(self, tasks={name: replace(task, goals=goals[name]) for name, task in self.tasks.items()})

    def measures_of(self, name: str) -> list[str]:
        """Say what a network measures; without probes, estimates have no shifts."""
        return [measure for measure in self.measures if measure != "shift" or self.tasks[name].measures_shifts]

    def job(self, name: str, task: Screen, rows: np.ndarray, size: int) -> Job:
        from gfx._engine.run import Job

        return Job(name, task, self.ids, self.lengths, pieces(rows, size))

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of some cells, and which of them are deleted, both `(n_cells, longest)`."""
        ids, task = self.ids[rows, : int(self.lengths[rows].max())], self.tasks[MODEL]
        return ids, wanted_places(ids, self.lengths[rows], task.genes, task.vocabulary)


def run_screen(plan: Plan, store: RunStore | None, checked: np.ndarray) -> tuple[GeneSums, dict[int, Result]]:
    """Screen all cells with all networks, in order.

    Returns sums, of which group 0 is all cells and the groups of the plan follow, and the runs of the model in each of
    the `checked` cells.
    """
    from gfx._engine.run import run

    n_tokens = len(plan.tasks[MODEL].vocabulary)
    sums, of_checked = GeneSums(n_tokens, 1 + plan.n_groups), {}
    jobs = [plan.job(name, task, plan.number, plan.cells_per_block) for name, task in plan.tasks.items()]
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
    plan: Plan, estimates: Mapping[int, Result], store: RunStore | None
) -> list[tuple[str, str, str, float, int]]:
    """Compare estimates with exact results, over the genes of each of some cells: rows of the table of controls."""
    from gfx._engine.run import run

    job = plan.job("exact_check", replace(plan.tasks[MODEL], is_exact=True), np.array(sorted(estimates)), 1)
    exact = {int(cells.number[0]): runs for _, cells, runs in run([job], description="checking estimates", store=store)}
    rows = []
    for measure in plan.measures_of(MODEL):
        pairs = [(_values(estimates[cell], measure), _values(exact[cell], measure)) for cell in exact]
        values = pd.DataFrame([agreement(*pair) for pair in pairs], columns=["spearman", "recall"])
        rows += [("exact", measure, name, mean, len(exact)) for name, mean in values.mean().items()]
    return rows


def run_candidates(plan: Plan, sums: GeneSums, store: RunStore | None, rng: np.random.Generator) -> GeneSums:
    """Delete the genes that stand out most exactly, in some of their cells."""
    from gfx._engine.run import run

    measure = plan.measures[-1]
    n = sums.n(f"{MODEL}/{measure}")[:, 0]
    excess = np.where(n >= FEWEST_CELLS, sums.mean(f"{MODEL}/{measure}_excess")[:, 0], np.nan)
    distance = np.abs(standing_out(excess, sums.mean("rank")[:, 0], n)[0])
    candidates = np.argsort(np.where(np.isnan(distance), -1, distance), kind="stable")[::-1][:CANDIDATES]
    candidates = candidates[~np.isnan(distance[candidates])]
    exact = GeneSums(len(distance), 1)
    if not len(candidates):
        return exact
    wanted = _draw_cells(plan, candidates, sums.n("rank")[candidates, 0], rng)
    task = replace(plan.tasks[MODEL], is_exact=True)
    job = plan.job("candidates", task, np.array(sorted(wanted)), CELLS_PER_BLOCK[True])
    job = replace(job, given=lambda number: {"wanted": _wanted(plan, job.blocks[number], wanted)})
    for _, _, runs in run([job], description="candidates, exactly", store=store):
        for measured in plan.measures:
            exact.add(measured, runs["token"], np.zeros(len(runs["token"]), np.int64), _values(runs, measured))
    return exact


def _wanted(plan: Plan, rows: np.ndarray, tokens_of: Mapping[int, Sequence[int]]) -> np.ndarray:
    """Find the places of the given tokens in some cells, bool `(n_cells, longest)`."""
    ids, places = plan.places(rows)
    return places & np.stack([np.isin(row, tokens_of[int(cell)]) for row, cell in zip(ids, rows, strict=True)])


def _draw_cells(
    plan: Plan, candidates: np.ndarray, n_cells: np.ndarray, rng: np.random.Generator
) -> dict[int, list[int]]:
    """Draw some of the cells that have each candidate: which candidates to delete in each cell."""
    chosen = [set(rng.permutation(n)[:CELLS_PER_CANDIDATE].tolist()) for n in n_cells]
    numbers = {int(token): number for number, token in enumerate(candidates)}
    n_seen = [0] * len(candidates)
    drawn: dict[int, list[int]] = {}
    for cell in plan.number:  # one at a time: all candidates of all cells take memory
        ids, places = plan.places(cell[None])
        for token in ids[places & np.isin(ids, candidates)].tolist():
            if n_seen[numbers[token]] in chosen[numbers[token]]:
                drawn.setdefault(int(cell), []).append(token)
            n_seen[numbers[token]] += 1
    return drawn


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
            columns[f"{prefix}{measure}_excess"] = sums.mean(f"{name}/{measure}_excess")[:, group]
    return pd.DataFrame(columns)


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
