"""Ways to learn classes of cells from some cells, and to tell those of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd

from gfx._core.components import principal_components
from gfx._core.folds import validation_part
from gfx._core.linear_head import fit_linear_head
from gfx.tl._baselines import log_counts
from gfx.tl._fine_tuning import kept

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from scipy.sparse import csr_array

    from gfx._core.linear_head import LinearHead
    from gfx._engine.classifier import Classifier, Head
    from gfx._engine.examples import LabelledCells
    from gfx.tl._cell_labels import CellTask
    from gfx.tl._fine_tuning import Recipe

#: Inverse strength of the penalty of every logistic regression here.
STRENGTH = 0.1

N_GENES, N_COMPONENTS = 2000, 50


class CellLearner(Protocol):
    """Learns from some cells and tells the classes of others."""

    name: str

    def predict(self, train: np.ndarray, held: np.ndarray, *, seed: int, fold: int) -> np.ndarray:
        """Learn from the cells `train` and tell the classes of the cells `held`, int `(n,)` each.

        Returns
        -------
        Probability of each class of each task, float32 `(n_held, n_logits)`.
        """


def fit_tasks(task: CellTask, features: np.ndarray, rows: np.ndarray, class_weight: str | None) -> list[LinearHead]:
    """Fit one head per task on the features of some cells, `(n_rows, k)`, each on the cells that have a class in it."""
    heads = []
    for column, classes in task.tasks.items():
        truth = task.of(column)[rows]
        known = truth >= 0
        how = {"one_unit": True, "strength": STRENGTH, "class_weight": class_weight}
        heads.append(fit_linear_head(features[known], truth[known], len(classes), **how))
    return heads


# --- the network ----------------------------------------------------------------------------------------------------


class LinearProbe:
    """Logistic regression on cell embeddings, `vectors(seed)`, which serve all folds of a seed."""

    def __init__(
        self, name: str, task: CellTask, vectors: Callable[[int], np.ndarray], class_weight: str | None
    ) -> None:
        self.name, self.task, self.vectors, self.class_weight = name, task, vectors, class_weight

    def fit(self, train: np.ndarray, *, seed: int) -> list[LinearHead]:
        """Fit a head per task on some cells, int `(n,)`."""
        return fit_tasks(self.task, self.vectors(seed)[train], train, self.class_weight)

    def predict(self, train: np.ndarray, held: np.ndarray, *, seed: int, fold: int) -> np.ndarray:
        return np.hstack([head.probabilities(self.vectors(seed)[held]) for head in self.fit(train, seed=seed)])


class FineTuned:
    """A head on the cell, trained with the network; the best pass is chosen on some of the cells to learn from."""

    def __init__(
        self,
        name: str,
        task: CellTask,
        head: Head,
        recipe: Recipe,
        folder: Path,
        *,
        class_weight: str | None,
        random: bool,
    ) -> None:
        self.name, self.task, self.head, self.recipe, self.folder = name, task, head, recipe, folder
        self.class_weight, self.random = class_weight, random

    def predict(self, train: np.ndarray, held: np.ndarray, *, seed: int, fold: int) -> np.ndarray:
        place = self.folder / f"seed{seed}" / f"fold{fold}" / f"{self.name}_{len(train)}"
        return kept(place, lambda: self._scores(self.fit(train, place, seed=seed), held))

    def fit(self, train: np.ndarray, place: Path, *, seed: int) -> Classifier:
        """Train on some cells, int `(n,)`."""
        from gfx._engine.fine_tuning import class_weights

        task = self.task
        judge = validation_part(task.of(task.first)[train], seed, task.donors(train))
        learnt = train[~judge]
        cells, judged = self._labelled(learnt), self._labelled(train[judge])
        weights = None
        if self.class_weight is not None:
            weights = class_weights(task.truth[learnt], list(self.head.slices.values()))
        return self.recipe.train(
            self.head,
            cells,
            place,
            validation=judged,
            search=(cells, judged),
            class_weight=weights,
            seed=seed,
            random=self.random,
        )

    def _labelled(self, rows: np.ndarray) -> LabelledCells:
        from gfx._engine.examples import LabelledCells

        tokens = self.task.cells.tokens
        return LabelledCells(tokens.ids, tokens.lengths, rows, of_cell=self.task.truth)

    def _scores(self, model: Classifier, held: np.ndarray) -> np.ndarray:
        from gfx._engine.class_scores import of_cells

        cells = self.task.cells
        return of_cells(model, cells.tokens.ids, cells.lengths_of(held), cells.model.vocabulary)[held]


# --- without a network ----------------------------------------------------------------------------------------------


class VariableGenes:
    """Log-normalised counts of all cells, by token, and the genes that vary most among some of them.

    All counts are in memory, as sparse as they are. Genes are found once for the cells of a fold, whoever asks.
    """

    def __init__(self, task: CellTask) -> None:
        from scipy.sparse import vstack

        self.logs: csr_array = vstack([logs for _, logs in log_counts(task.cells)], format="csr")
        self._found: dict[bytes, np.ndarray] = {}

    def among(self, rows: np.ndarray) -> np.ndarray:
        """Find 2,000 genes that vary most among some cells, int `(n,)`, as scanpy does; int `(n_genes,)`."""
        cells = rows.tobytes()
        if cells not in self._found:
            self._found[cells] = _most_variable(self.logs[rows])
        return self._found[cells]

    def of(self, rows: np.ndarray, genes: np.ndarray) -> np.ndarray:
        """Log counts of some genes in some cells, float32 `(n_rows, n_genes)`."""
        return self.logs[rows][:, genes].toarray().astype(np.float32)


def _most_variable(logs: csr_array) -> np.ndarray:
    seen = np.flatnonzero(np.diff(logs.tocsc().indptr) > 0)
    if len(seen) <= N_GENES:
        return seen
    import anndata as ad
    import scanpy as sc
    from scipy.sparse import csr_matrix

    # scanpy 1.11 multiplies no sparse arrays, only matrices.
    cells = ad.AnnData(csr_matrix(logs[:, seen]), var=pd.DataFrame(index=seen.astype(str)))
    cells.uns["log1p"] = {"base": None}
    sc.pp.highly_variable_genes(cells, n_top_genes=N_GENES)
    return seen[cells.var["highly_variable"].to_numpy()]


class Counts:
    """Logistic regression on log counts: of 2,000 highly variable genes, or of their first 50 principal components.

    Genes are chosen and components found among the cells to learn from.
    """

    def __init__(self, name: str, task: CellTask, genes: VariableGenes, class_weight: str | None) -> None:
        self.name, self.task, self.genes, self.class_weight = name, task, genes, class_weight

    def predict(self, train: np.ndarray, held: np.ndarray, *, seed: int, fold: int) -> np.ndarray:
        chosen = self.genes.among(train)
        learnt, rest = self.genes.of(train, chosen), self.genes.of(held, chosen)
        if self.name == "pca":
            learnt, rest = principal_components(learnt, rest, N_COMPONENTS, seed)
        heads = fit_tasks(self.task, learnt, train, self.class_weight)
        return np.hstack([head.probabilities(rest) for head in heads])


class Majority:
    """The share of each class among the cells to learn from."""

    name = "majority"

    def __init__(self, task: CellTask) -> None:
        self.task = task

    def predict(self, train: np.ndarray, held: np.ndarray, *, seed: int, fold: int) -> np.ndarray:
        shares = []
        for column, classes in self.task.tasks.items():
            truth = self.task.of(column)[train]
            counts = np.bincount(truth[truth >= 0], minlength=len(classes))
            shares.append(counts / counts.sum() if counts.any() else np.full(len(classes), 1 / len(classes)))
        return np.tile(np.concatenate(shares).astype(np.float32), (len(held), 1))
