"""Classify genes: every learner, in every fold of every seed, and a model taught with all labels."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gfx import _log
from gfx._core.evaluation import Evaluation
from gfx._core.folds import each_fold
from gfx.tl._cross_validation import bar_of, plan_of
from gfx.tl._gene_learners import Expression, FineTuned, LinearProbe, Majority, find_task
from gfx.tl._trained_model import TEACHING, is_taught, with_linear_head, write_trained

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pandas as pd

    from gfx._engine.classifier import Head
    from gfx.tl._fine_tuning import Recipe
    from gfx.tl._gene_labels import GeneLabels
    from gfx.tl._gene_learners import GeneLearner, GeneTask
    from gfx.tl._prepare import Prepared

#: Which states a linear head reads.
HIDDEN_LAYER = -2


def draw_task(
    cells: Prepared, given: GeneLabels, lengths: np.ndarray, *, max_cells: int, n_splits: int, rng: int
) -> GeneTask:
    """Draw the cells to use among those that have a labelled gene; leave out genes that none of them has."""
    found = find_task(cells, given, np.flatnonzero(lengths > 0))
    rows = np.random.default_rng(rng).permutation(found.rows[np.unique(found.cell)])[:max_cells]
    n_cells = np.zeros(len(cells.model.vocabulary), dtype=np.int64)
    n_cells[given.tokens] = np.bincount(find_task(cells, given, rows).gene, minlength=len(given.tokens))
    return find_task(cells, given.seen(n_cells, n_splits), rows)


@dataclass(frozen=True)
class GeneRun:
    """What is run.

    Parameters
    ----------
    n_cells
        Numbers of cells to learn from, the full one last.
    """

    task: GeneTask
    method: str
    recipe: Recipe
    n_cells: list[int]
    baselines: bool
    rng: int

    @property
    def head(self) -> Head:
        """What the model tells."""
        from gfx._engine.classifier import Head

        return Head(of="genes", pooling="gene", tasks={self.task.labels.task: self.task.labels.classes})

    def learners(self, folder: Path) -> list[GeneLearner]:
        """Make the model, first, and what it is held against."""
        learners: list[GeneLearner] = [self._model("model", folder)]
        if self.baselines:
            learners += [self._model("random_weights", folder), Expression(self.task), Majority(self.task)]
        return learners

    def _model(self, name: str, folder: Path) -> FineTuned | LinearProbe:
        is_random = name == "random_weights"
        if self.method == "fine_tune":
            return FineTuned(name, self.task, self.head, self.recipe, folder, random=is_random)
        return LinearProbe(name, self.task, self._states(self.rng if is_random else None))

    def _states(self, random_seed: int | None) -> np.ndarray:
        """States of every occurrence of a labelled gene; of a network with random weights, given its seed."""
        from gfx._engine.class_scores import of_occurrences
        from gfx._engine.encoder import random_encoder
        from gfx._engine.forward import states

        task = self.task
        encoder = task.cells.encoder(HIDDEN_LAYER)
        if random_seed is not None:
            same = {"n_blocks": len(encoder.encoder.layer), "device": encoder.device, "dtype": encoder.dtype}
            encoder = random_encoder(task.cells.model.config, seed=random_seed, **same)
        wanted = task.of_tokens(np.arange(len(task.labels.tokens))) >= 0
        lengths = task.lengths(len(task.rows))
        what = "states of labelled genes" + ("" if random_seed is None else ", random weights")
        return of_occurrences(encoder, task.cells.tokens.ids, lengths, wanted, states, description=what)[2]

    def evaluate(self, learners: list[GeneLearner], fold: np.ndarray) -> tuple[Evaluation, np.ndarray]:
        """Let every learner predict every fold.

        Parameters
        ----------
        fold
            Fold of each labelled gene, `(n_seeds, n_genes)`.

        Returns
        -------
        What they predict; and the standard deviation over cells of what the model says, `(n_genes, n_classes)`.
        """
        task, name = self.task, self.task.labels.task
        evaluation = Evaluation("gene", {name: task.labels.classes}, {name: task.labels.truth}, fold)
        spread = np.zeros((len(task.labels.tokens), task.n_classes))
        n_folds = sum(len(np.unique(of_seed)) for of_seed in fold)
        with bar_of(n_folds * len(learners) * len(self.n_cells)) as bar:
            for seed, of_seed in enumerate(fold):
                for at, train, held in each_fold(of_seed):
                    gene = task.gene[held[task.gene]]
                    for learner in learners:
                        for n in self.n_cells:
                            place = {"task": name, "method": learner.name, "n_cells": n, "seed": seed, "fold": at}
                            found = learner.predict(train, held, n_cells=n, seed=self.rng + seed, fold=at)
                            mean, sd = task.over_cells(found, held)
                            evaluation.add_occurrences(gene, found, **place)
                            evaluation.add(np.flatnonzero(held), mean[held].astype(np.float32), **place)
                            if learner.name == "model" and n == self.n_cells[-1]:
                                spread[held] += sd[held] / len(fold)
                            bar.update()
        return evaluation, spread

    def keep_to_plan(self, folder: Path, params: Mapping[str, Any]) -> None:
        """Refuse to go on in a folder with other cells, labels or settings."""
        from gfx.models._plan import keep_to_plan

        task = self.task
        plan = plan_of(task.cells, task.rows, params, self.recipe.training) | {
            "classes": task.labels.classes,
            "genes": {str(token): at for token, at in zip(task.labels.tokens, task.labels.truth.tolist(), strict=True)},
            "learning_curve": self.n_cells,
            "baselines": self.baselines,
        }
        keep_to_plan(folder, plan, unfinished="runs")

    def teach_all(self, learner: GeneLearner, folder: Path, summary: pd.DataFrame, params: Mapping[str, Any]) -> None:
        """Teach the model with all labels and keep it, unless it is there."""
        if is_taught(folder):
            shutil.rmtree(folder / "runs" / TEACHING, ignore_errors=True)  # also what a stopped call left
            return
        task = self.task
        every = np.ones(len(task.labels.tokens), dtype=bool)
        if isinstance(learner, FineTuned):
            place = folder / "runs" / TEACHING
            classifier = learner.fit(every, place, n_cells=self.n_cells[-1], seed=self.rng)
        else:
            linear = learner.fit(every, n_cells=self.n_cells[-1], seed=self.rng)
            classifier = with_linear_head(task.cells, self.head, linear, HIDDEN_LAYER)
        ids = task.cells.model.vocabulary.ids[task.labels.tokens]
        taught = {name: sorted(ids[task.labels.truth == at]) for at, name in enumerate(task.labels.classes)}
        write_trained(classifier, self.recipe.model, folder, taught=taught, summary=summary, params=params)
        shutil.rmtree(folder / "runs" / TEACHING, ignore_errors=True)
        _log.info(f"a model taught with all labels is in {folder}: `gfx.tl.predict_genes(adata, {str(folder)!r})`")
