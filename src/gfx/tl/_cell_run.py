"""Classify cells: every learner, in every fold of every seed, and a model taught with all cells."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gfx import _log
from gfx._core.evaluation import Evaluation
from gfx._core.folds import each_fold
from gfx._core.linear_head import LinearHead
from gfx._tokens import CountsNotAtHandError
from gfx.tl._cell_learners import Counts, FineTuned, LinearProbe, Majority, all_log_counts
from gfx.tl._cross_validation import bar_of, plan_of
from gfx.tl._trained_model import TEACHING, is_taught, with_linear_head, write_trained

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pandas as pd

    from gfx._engine.classifier import Head
    from gfx.tl._cell_labels import CellTask
    from gfx.tl._cell_learners import CellLearner
    from gfx.tl._fine_tuning import Recipe

#: Which states a linear head reads: those that embed cells.
HIDDEN_LAYER = -2


@dataclass(frozen=True)
class CellRun:
    """What is run.

    Parameters
    ----------
    pooling
        How a cell becomes one vector.
    n_cells
        Numbers of cells to learn from, the full one last.
    """

    task: CellTask
    method: str
    recipe: Recipe
    pooling: str
    class_weight: str | None
    n_cells: list[int]
    baselines: bool
    rng: int

    @property
    def head(self) -> Head:
        """What the model tells."""
        from gfx._engine.classifier import Head

        return Head(of="cells", pooling=self.pooling, tasks=self.task.tasks)

    def learners(self, folder: Path) -> list[CellLearner]:
        """Make the model, first, and what it is held against."""
        learners: list[CellLearner] = [self._model("model", folder)]
        if not self.baselines:
            return learners
        learners.append(self._model("random_weights", folder))
        try:
            logs = all_log_counts(self.task)
            learners += [Counts(name, self.task, logs, self.class_weight) for name in ("hvg", "pca")]
        except CountsNotAtHandError as problem:
            _log.info(f"No baseline of log counts, for the counts are not at hand: {problem.args[0]}")
        return [*learners, Majority(self.task)]

    def _model(self, name: str, folder: Path) -> FineTuned | LinearProbe:
        is_random = name == "random_weights"
        if self.method == "fine_tune":
            return FineTuned(
                name,
                self.task,
                self.head,
                self.recipe,
                folder,
                class_weight=self.class_weight,
                random=is_random,
            )
        return LinearProbe(name, self.task, self._vectors(self.rng if is_random else None), self.class_weight)

    def _vectors(self, random_seed: int | None) -> np.ndarray:
        """Embed the cells to use; with a network of random weights, given its seed."""
        from gfx._engine.encoder import random_encoder
        from gfx._engine.pooling import embed_cells

        cells = self.task.cells
        encoder = cells.encoder(HIDDEN_LAYER)
        if random_seed is not None:
            same = {"n_blocks": len(encoder.encoder.layer), "device": encoder.device, "dtype": encoder.dtype}
            encoder = random_encoder(cells.model.config, seed=random_seed, **same)
        lengths = self.task.lengths(self.task.rows)
        return embed_cells(encoder, cells.tokens.ids, lengths, cells.model.vocabulary, how=self.pooling)

    def evaluate(self, learners: list[CellLearner], fold: np.ndarray) -> Evaluation:
        """Let every learner predict every fold, `(n_seeds, n_obs)`."""
        task, slices = self.task, self.head.slices
        truth = {column: task.of(column) for column in task.tasks}
        evaluation = Evaluation("cell", task.tasks, truth, fold, task.donor)
        n_folds = sum(len(np.unique(of_seed[of_seed >= 0])) for of_seed in fold)
        with bar_of(n_folds * len(learners) * len(self.n_cells)) as bar:
            for seed, of_seed in enumerate(fold):
                for at, is_train, is_held in each_fold(of_seed):
                    train = task.rows[is_train[task.rows]]  # in the order in which cells are taken
                    held = np.flatnonzero(is_held)
                    for learner in learners:
                        for n in self.n_cells:
                            some = train if n == self.n_cells[-1] else train[:n]
                            found = learner.predict(some, held, seed=self.rng + seed, fold=at)
                            for column, part in slices.items():
                                place = {"task": column, "method": learner.name, "n_cells": n}
                                evaluation.add(held, found[:, part], **place, seed=seed, fold=at)
                            bar.update()
        return evaluation

    def keep_to_plan(self, folder: Path, params: Mapping[str, Any]) -> None:
        """Refuse to go on in a folder with other cells, classes or settings."""
        from gfx.models._plan import keep_to_plan

        task = self.task
        donor = np.zeros(0) if task.donor is None else task.donor
        plan = plan_of(task.cells, task.rows, params, self.recipe.training) | {
            "classes": task.tasks,
            "labels": hashlib.sha256(np.ascontiguousarray(task.truth).tobytes() + donor.tobytes()).hexdigest(),
            "learning_curve": self.n_cells,
            "baselines": self.baselines,
        }
        keep_to_plan(folder, plan, unfinished="runs")

    def teach_all(self, learner: CellLearner, folder: Path, summary: pd.DataFrame, params: Mapping[str, Any]) -> None:
        """Teach the model with all cells and keep it, unless it is there."""
        if is_taught(folder):
            shutil.rmtree(folder / "runs" / TEACHING, ignore_errors=True)  # also what a stopped call left
            return
        task = self.task
        if isinstance(learner, FineTuned):
            classifier = learner.fit(task.rows, folder / "runs" / TEACHING, seed=self.rng)
        else:
            heads = learner.fit(task.rows)
            linear = LinearHead(
                np.concatenate([head.weight for head in heads]), np.concatenate([head.bias for head in heads])
            )
            classifier = with_linear_head(task.cells, self.head, linear, HIDDEN_LAYER)
        taught = {"n_cells": len(task.rows), "tasks": task.tasks}
        write_trained(classifier, self.recipe.model, folder, taught=taught, summary=summary, params=params)
        shutil.rmtree(folder / "runs" / TEACHING, ignore_errors=True)
        _log.info(f"a model taught with all cells is in {folder}: `gfx.tl.predict_cells(adata, {str(folder)!r})`")
