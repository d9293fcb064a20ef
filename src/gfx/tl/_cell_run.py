"""Classify cells: every learner, in every fold of every seed, and a model taught with all cells."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from gfx import _log
from gfx._core.evaluation import Evaluation
from gfx._core.folds import each_fold
from gfx._core.linear_head import LinearHead
from gfx._tokens import CountsNotAtHandError
from gfx.tl._cell_learners import Counts, FineTuned, LinearProbe, Majority, VariableGenes
from gfx.tl._cross_validation import HIDDEN_LAYER, Run, bar_of
from gfx.tl._trained_model import with_linear_head

if TYPE_CHECKING:
    from pathlib import Path

    from gfx._engine.classifier import Classifier, Head
    from gfx.tl._cell_labels import CellTask
    from gfx.tl._cell_learners import CellLearner


@dataclass(frozen=True)
class CellRun(Run):
    """Cells, classified.

    Parameters
    ----------
    pooling
        How a cell becomes one vector.
    class_weight
        Whether classes or cells count alike.
    """

    task: CellTask
    pooling: str
    class_weight: str | None

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
            genes = VariableGenes(self.task)
            learners += [Counts(name, self.task, genes, self.class_weight) for name in ("hvg", "pca")]
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
        if is_random:  # drawn anew by each seed, of which one after the other is asked
            return LinearProbe(name, self.task, lru_cache(maxsize=1)(self._vectors), self.class_weight)
        vectors = self._vectors(None)
        return LinearProbe(name, self.task, lambda _seed: vectors, self.class_weight)

    def _vectors(self, random_seed: int | None) -> np.ndarray:
        """Embed the cells to use; with a network of random weights, of a seed, if wanted."""
        from gfx._engine.pooling import embed_cells

        cells = self.task.cells
        lengths = cells.lengths_of(self.task.rows)
        encoder = self.encoder(random_seed)
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
                    part = np.random.default_rng([self.rng + seed, at]).permutation(train)
                    for learner in learners:
                        for n in self.n_cells:
                            some = train if n == self.n_cells[-1] else part[:n]
                            found = learner.predict(some, held, seed=self.rng + seed, fold=at)
                            for column, columns in slices.items():
                                place = {"task": column, "method": learner.name, "n_cells": n}
                                evaluation.add(held, found[:, columns], **place, seed=seed, fold=at)
                            bar.update()
        return evaluation

    def labels(self) -> dict[str, Any]:
        truth, donor = np.ascontiguousarray(self.task.truth), self.task.donor
        content = truth.tobytes() + (b"" if donor is None else donor.tobytes())
        # The first task decides the folds, and tasks are sorted by name.
        return {"classes": self.task.tasks, "first": self.task.first, "labels": hashlib.sha256(content).hexdigest()}

    def taught(self) -> dict[str, Any]:
        return {"n_cells": len(self.task.rows), "tasks": self.task.tasks}

    def teach(self, learner: FineTuned | LinearProbe, place: Path) -> Classifier:
        if isinstance(learner, FineTuned):
            return learner.fit(self.task.rows, place, seed=self.rng)
        heads = learner.fit(self.task.rows, seed=self.rng)
        linear = LinearHead(
            np.concatenate([head.weight for head in heads]), np.concatenate([head.bias for head in heads])
        )
        return with_linear_head(self.task.cells, self.head, linear, HIDDEN_LAYER)
