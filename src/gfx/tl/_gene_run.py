"""Classify genes: every learner, in every fold of every seed, and a model taught with all labels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gfx._core.evaluation import Evaluation
from gfx._core.folds import each_fold
from gfx.tl._cross_validation import HIDDEN_LAYER, Run, bar_of
from gfx.tl._gene_learners import Expression, FineTuned, LinearProbe, Majority, find_task
from gfx.tl._trained_model import with_linear_head

if TYPE_CHECKING:
    from pathlib import Path

    from gfx._engine.classifier import Classifier, Head
    from gfx.tl._gene_labels import GeneLabels
    from gfx.tl._gene_learners import GeneLearner, GeneTask
    from gfx.tl._prepare import Prepared


def draw_task(
    cells: Prepared, given: GeneLabels, lengths: np.ndarray, *, max_cells: int, n_splits: int, rng: int
) -> GeneTask:
    """Draw the cells to use among those that have a labelled gene; leave out genes that none of them has."""
    found = find_task(cells, given, np.flatnonzero(lengths > 0))
    rows = np.random.default_rng(rng).permutation(found.rows[np.unique(found.cell)])[:max_cells]
    task = find_task(cells, given, rows)
    seen = given.seen(np.bincount(task.gene, minlength=len(given.tokens)) > 0, n_splits)
    return replace(task, labels=seen, gene=np.searchsorted(seen.tokens, given.tokens[task.gene]))


class GeneRun(Run):
    """Genes, classified in the cells that have them."""

    task: GeneTask

    @property
    def head(self) -> Head:
        """What the model tells."""
        from gfx._engine.classifier import Head

        return Head(of="genes", pooling="gene", tasks={self.task.labels.task: self.task.labels.classes})

    def learners(self, folder: Path) -> list[GeneLearner]:
        """Make the model, first, and what it is held against."""
        learners: list[GeneLearner] = [self._model("model", folder)]
        if self.baselines:
            weight = "balanced" if self.method == "linear_probe" else None  # as the model weighs classes
            expression = Expression(self.task, weight)
            learners += [self._model("random_weights", folder), expression, Majority(self.task)]
        return learners

    def _model(self, name: str, folder: Path) -> FineTuned | LinearProbe:
        is_random = name == "random_weights"
        if self.method == "fine_tune":
            return FineTuned(name, self.task, self.head, self.recipe, folder, random=is_random)
        return LinearProbe(name, self.task, self._states(is_random=is_random))

    def _states(self, *, is_random: bool) -> np.ndarray:
        """States of every occurrence of a labelled gene; of a network with random weights, if wanted."""
        from gfx._engine.class_scores import of_occurrences
        from gfx._engine.forward import states

        task = self.task
        encoder = self.encoder(self.rng if is_random else None)
        wanted = task.of_tokens(np.arange(len(task.labels.tokens))) >= 0
        lengths = task.cells.lengths_of(task.rows)
        what = "states of labelled genes" + (", random weights" if is_random else "")
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

    def labels(self) -> dict[str, Any]:
        labels = self.task.labels
        genes = zip(labels.tokens, labels.truth.tolist(), strict=True)
        return {"classes": labels.classes, "genes": {str(token): at for token, at in genes}}

    def taught(self) -> dict[str, Any]:
        labels = self.task.labels
        ids = self.task.cells.model.vocabulary.ids[labels.tokens]
        return {name: sorted(ids[labels.truth == at]) for at, name in enumerate(labels.classes)}

    def teach(self, learner: FineTuned | LinearProbe, place: Path) -> Classifier:
        how = {"n_cells": self.n_cells[-1], "seed": self.rng}
        every = np.ones(len(self.task.labels.tokens), dtype=bool)
        if isinstance(learner, FineTuned):
            return learner.fit(every, place, **how)
        return with_linear_head(self.task.cells, self.head, learner.fit(every, **how), HIDDEN_LAYER)
