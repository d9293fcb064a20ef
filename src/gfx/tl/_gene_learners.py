"""Ways to learn classes of genes from some genes, and to tell those of others in every cell that has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gfx._core.folds import folds
from gfx._core.linear_head import LinearHead, fit_linear_head
from gfx.tl._baselines import describe_genes
from gfx.tl._cross_validation import NOTHING
from gfx.tl._fine_tuning import kept
from gfx.tl._prepare import pieces

if TYPE_CHECKING:
    from pathlib import Path

    from gfx._engine.classifier import Classifier, Head
    from gfx._engine.examples import LabelledCells
    from gfx.tl._fine_tuning import Recipe
    from gfx.tl._gene_labels import GeneLabels
    from gfx.tl._prepare import Prepared

#: Folds of the labelled genes to choose the strength of a penalty by, or hyperparameters.
INNER_FOLDS = 5


@dataclass(frozen=True)
class GeneTask:
    """Labelled genes in the cells to use.

    Parameters
    ----------
    cells
        All cells, and the model.
    labels
        Labelled genes that the cells to use have.
    rows
        Cells to use, in the order in which they are taken, int64 `(n_cells,)`.
    cell, gene
        Cell of each occurrence of a labelled gene, by its place in `rows`, and the gene, by its place in `labels`;
        int64 `(n_occurrences,)`, in the order of cells in the AnnData and of ranks.
    """

    cells: Prepared
    labels: GeneLabels
    rows: np.ndarray
    cell: np.ndarray
    gene: np.ndarray

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.labels.classes)

    def of_tokens(self, genes: np.ndarray) -> np.ndarray:
        """Class of each token, int64 `(n_tokens,)`, for some of the genes; -100 for all else."""
        classes = np.full(len(self.cells.model.vocabulary), NOTHING, dtype=np.int64)
        classes[self.labels.tokens[genes]] = self.labels.truth[genes]
        return classes

    def over_cells(self, values: np.ndarray, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation over cells of what each occurrence of `genes` has, `(n_genes, k)`; NaN elsewhere.

        Parameters
        ----------
        values
            `(n, k)`, for the occurrences of the genes in order.
        genes
            bool `(n_genes,)`.
        """
        gene = self.gene[genes[self.gene]]
        n = np.bincount(gene, minlength=len(genes))[:, None]
        sums = [_add_up(power, gene, len(genes)) for power in (values, values.astype(np.float64) ** 2)]
        with np.errstate(invalid="ignore"):
            mean, square = (total / n for total in sums)
        return mean, np.sqrt(np.maximum(square - mean**2, 0))


def find_task(cells: Prepared, labels: GeneLabels, rows: np.ndarray) -> GeneTask:
    """Find every occurrence of a labelled gene in the cells to use."""
    place = np.full(len(cells.model.vocabulary), -1, dtype=np.int64)
    place[labels.tokens] = np.arange(len(labels.tokens))
    found_cells, found_genes = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    taken = np.empty(len(cells.tokens.lengths), dtype=np.int64)
    taken[rows] = np.arange(len(rows))
    for some in pieces(np.sort(rows)):
        ids = cells.tokens.ids[some]
        genes = np.where(np.arange(ids.shape[1]) < cells.tokens.lengths[some][:, None], place[ids], -1)
        at, rank = np.nonzero(genes >= 0)
        found_cells.append(taken[some[at]])
        found_genes.append(genes[at, rank])
    return GeneTask(cells, labels, rows, np.concatenate(found_cells), np.concatenate(found_genes))


class GeneLearner(Protocol):
    """Learns from some genes and tells the classes of others."""

    name: str

    def predict(self, train: np.ndarray, held: np.ndarray, *, n_cells: int, seed: int, fold: int) -> np.ndarray:
        """Learn from the genes `train`, bool `(n_genes,)`, in the first cells; tell the class of each one of `held`.

        Returns
        -------
        Probabilities for each occurrence of the genes `held` in all cells to use, float32 `(n, n_classes)`.
        """


# --- a linear head on the encoder as it is --------------------------------------------------------------------------


class LinearProbe:
    """Logistic regression on the mean state of a gene over cells; states are computed once, for all folds and seeds.

    A head that is linear says of a mean what it says of the states on average, so it is fitted on one mean per gene and
    read out in every cell.
    """

    def __init__(self, name: str, task: GeneTask, states: np.ndarray) -> None:
        self.name, self.task, self.states = name, task, states

    def fit(self, train: np.ndarray, *, n_cells: int, seed: int) -> LinearHead:
        """Fit the head on the means of some genes, bool `(n_genes,)`, over the first cells."""
        task = self.task
        here = train[task.gene] & (task.cell < n_cells)
        counts = np.bincount(task.gene[here], minlength=len(train))
        genes = np.flatnonzero(counts)
        means = _add_up(self.states[here], task.gene[here], len(train))[genes] / counts[genes, None]
        return _fit(means, task.labels.truth[genes], task.n_classes, seed, one_unit=True, class_weight="balanced")

    def predict(self, train: np.ndarray, held: np.ndarray, *, n_cells: int, seed: int, fold: int) -> np.ndarray:
        head = self.fit(train, n_cells=n_cells, seed=seed)
        return head.probabilities(self.states[held[self.task.gene]])


def _fit(
    features: np.ndarray, truth: np.ndarray, n_classes: int, seed: int, *, one_unit: bool, class_weight: str | None
) -> LinearHead:
    """Fit a head, its penalty chosen in folds of the genes to learn from."""
    how = {"one_unit": one_unit, "class_weight": class_weight}
    return fit_linear_head(features, truth, n_classes, inner_folds=inner_folds(truth, seed), **how)


def inner_folds(truth: np.ndarray, seed: int) -> np.ndarray:
    """Fold of each gene to learn from, int16 `(n,)`: five, or as many as the smallest class has genes.

    Where no class has two genes there is nothing to choose by: all are in one fold.
    """
    counts = np.unique(truth, return_counts=True)[1]
    if not (counts > 1).any():
        return np.zeros(len(truth), dtype=np.int16)
    return folds(truth, min(INNER_FOLDS, max(int(counts.min()), 2)), seed)


# --- fine-tuning ----------------------------------------------------------------------------------------------------


class FineTuned:
    """A token-classification head on the encoder, trained with it; a held-out gene is never labelled in training."""

    def __init__(self, name: str, task: GeneTask, head: Head, recipe: Recipe, folder: Path, *, random: bool) -> None:
        self.name, self.task, self.head, self.recipe, self.folder = name, task, head, recipe, folder
        self.random = random

    def predict(self, train: np.ndarray, held: np.ndarray, *, n_cells: int, seed: int, fold: int) -> np.ndarray:
        place = self.folder / f"seed{seed}" / f"fold{fold}" / f"{self.name}_{n_cells}"
        return kept(place, lambda: self._scores(self.fit(train, place, n_cells=n_cells, seed=seed), held))

    def fit(self, train: np.ndarray, place: Path, *, n_cells: int, seed: int) -> Classifier:
        """Train on some genes, bool `(n_genes,)`, in the first cells."""
        search = None
        if self.recipe.n_trials:
            genes = np.flatnonzero(train)
            judged = np.zeros(len(train), dtype=bool)
            judged[genes[inner_folds(self.task.labels.truth[genes], seed) == 0]] = True
            if judged.sum() != train.sum():  # else none would be left to learn from
                search = self._labelled(train & ~judged, n_cells), self._labelled(judged, n_cells)
        return self.recipe.train(
            self.head,
            self._labelled(train, n_cells),
            place,
            validation=None,
            search=search,
            class_weight=None,
            seed=seed,
            random=self.random,
        )

    def _labelled(self, genes: np.ndarray, n_cells: int) -> LabelledCells:
        from gfx._engine.examples import LabelledCells

        task, tokens = self.task, self.task.cells.tokens
        has_one = np.unique(task.cell[genes[task.gene] & (task.cell < n_cells)])
        return LabelledCells(tokens.ids, tokens.lengths, task.rows[has_one], of_token=task.of_tokens(genes))

    def _scores(self, model: Classifier, held: np.ndarray) -> np.ndarray:
        from gfx._engine.class_scores import of_occurrences, probabilities

        task = self.task
        lengths = task.cells.lengths_of(task.rows[np.unique(task.cell[held[task.gene]])])
        wanted = task.of_tokens(held) >= 0
        return of_occurrences(
            model, task.cells.tokens.ids, lengths, wanted, probabilities, description="scoring held-out genes"
        )[2]


# --- without a network ----------------------------------------------------------------------------------------------


class Expression:
    """Logistic regression on detection, mean rank, mean and variance of expression of a gene; alike in all cells.

    Genes to learn from are described in the first cells, genes to tell in all of them, as the model sees either; and
    classes are weighed as the model weighs them.
    """

    name = "expression"

    def __init__(self, task: GeneTask, class_weight: str | None) -> None:
        self.task, self.class_weight = task, class_weight
        self._described: dict[int, np.ndarray] = {}

    def predict(self, train: np.ndarray, held: np.ndarray, *, n_cells: int, seed: int, fold: int) -> np.ndarray:
        task = self.task
        features, truth = self._features(n_cells)[train], task.labels.truth[train]
        head = _fit(features, truth, task.n_classes, seed, one_unit=False, class_weight=self.class_weight)
        return head.probabilities(self._features(len(task.rows)))[task.gene[held[task.gene]]]

    def _features(self, n_cells: int) -> np.ndarray:
        """Describe all labelled genes in the first cells, `(n_genes, 4)`."""
        if n_cells not in self._described:
            described = describe_genes(self.task.cells, self.task.cells.lengths_of(self.task.rows[:n_cells]))
            self._described[n_cells] = described[self.task.labels.tokens]
        return self._described[n_cells]


class Majority:
    """The share of each class among the genes to learn from."""

    name = "majority"

    def __init__(self, task: GeneTask) -> None:
        self.task = task

    def predict(self, train: np.ndarray, held: np.ndarray, *, n_cells: int, seed: int, fold: int) -> np.ndarray:
        counts = np.bincount(self.task.labels.truth[train], minlength=self.task.n_classes)
        n = int(held[self.task.gene].sum())
        return np.tile((counts / counts.sum()).astype(np.float32), (n, 1))


def _add_up(values: np.ndarray, gene: np.ndarray, n_genes: int) -> np.ndarray:
    """Add up rows by gene, float64 `(n_genes, k)`."""
    from scipy.sparse import csr_array

    n = len(gene)
    by_gene = csr_array((np.ones(n), gene, np.arange(n + 1)), shape=(n, n_genes)).T
    return np.asarray(by_gene @ values.astype(np.float64))
