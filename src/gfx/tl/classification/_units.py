"""What is classified: genes, each with many occurrences in cells, or cells, each with one, which is the cell itself."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from gfx import _log
from gfx._core.folds import folds, validation_part
from gfx.tl._prepare import pieces
from gfx.tl.classification._labels import (
    NOTHING,
    check_classes_of_cells,
    find_cell_labels,
    find_donors,
    find_gene_labels,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import BertModel

    from gfx._engine.classifier import Classifier, Head
    from gfx._engine.examples import LabelledCells
    from gfx.tl._prepare import Prepared
    from gfx.tl.classification._labels import GeneLabels

#: Folds of the training genes to choose the strength of a penalty by, or hyperparameters.
INNER_FOLDS = 5

#: Inverse strength of the penalty of every logistic regression that classifies cells.
STRENGTH_FOR_CELLS = 0.1


@dataclass(frozen=True)
class Split:
    """One training, and what it is evaluated on.

    Parameters
    ----------
    train
        Training units, int `(n,)`, in the order in which they are taken.
    held_out
        Units held out, int `(m,)`, ascending.
    n_cells
        Number of training cells.
    """

    train: np.ndarray
    held_out: np.ndarray
    n_cells: int
    seed: int
    fold: int = 0


@dataclass(frozen=True)
class Units(ABC):
    """Genes or cells with known classes.

    Parameters
    ----------
    prepared
        All cells, and the model.
    tasks
        Names of the classes of each task.
    first
        The task whose classes are spread evenly over folds.
    truth
        Class of each unit in each task, int64 `(n_units, n_tasks)`, -100 for none.
    where
        Token of each gene, or place of each cell in the AnnData, int64 `(n_units,)`, ascending.
    rows
        Cells to use, in the order in which they are taken, int64 `(n_cells,)`.
    unit, cell
        Unit of each occurrence and its cell, as a place in `rows`, int64 `(n_occurrences,)`, in the order of cells in
        the AnnData and of ranks.
    donor
        Donor of each unit, int64 `(n_units,)`, or `None`.
    pooling
        How a head reads the states of a cell.
    """

    prepared: Prepared
    tasks: dict[str, list[str]]
    first: str
    truth: np.ndarray
    where: np.ndarray
    rows: np.ndarray
    unit: np.ndarray
    cell: np.ndarray
    donor: np.ndarray | None
    pooling: str

    of: ClassVar[Literal["genes", "cells"]]
    #: Whether part of the training set ends a training early and chooses the best pass.
    stops_early: ClassVar[bool]
    #: Whether each repeat draws its own random weights under a linear head.
    redraws_weights: ClassVar[bool]

    def __len__(self) -> int:
        return len(self.where)

    @property
    def head(self) -> Head:
        """The head that classifies them."""
        from gfx._engine.classifier import Head

        return Head(of=self.of, pooling=self.pooling, tasks=self.tasks)

    def classes_of(self, task: str) -> np.ndarray:
        """Class of each unit in a task, int64 `(n_units,)`."""
        return self.truth[:, list(self.tasks).index(task)]

    def folds(self, n_splits: int, seed: int) -> np.ndarray:
        """Fold in which each unit is held out, int16 `(n_units,)`."""
        return folds(self.classes_of(self.first), n_splits, seed, self.donor)

    def occurrences_of(self, units: np.ndarray) -> np.ndarray:
        """Which occurrences are those of some units, bool `(n_occurrences,)`."""
        return np.isin(np.arange(len(self)), units)[self.unit]

    def over_occurrences(self, values: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation over occurrences, float64 `(n_units, k)`; NaN but for some units.

        Parameters
        ----------
        values
            `(n, k)`, for the occurrences of these units in order.
        """
        unit = self.unit[self.occurrences_of(units)]
        n = np.bincount(unit, minlength=len(self))[:, None]
        with np.errstate(invalid="ignore"):
            mean, square = (_add_up(power, unit, len(self)) / n for power in (values, values.astype(np.float64) ** 2))
        return mean, np.sqrt(np.maximum(square - mean**2, 0))

    def training_means(self, values: np.ndarray, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Training units that the training cells have, and the mean of each over its occurrences there.

        Parameters
        ----------
        values
            `(n_occurrences, k)`.
        """
        seen = self.occurrences_of(split.train) & self._is_read(split)
        counts = np.bincount(self.unit[seen], minlength=len(self))
        units = split.train[counts[split.train] > 0]
        return units, _add_up(values[seen], self.unit[seen], len(self))[units] / counts[units, None]

    @abstractmethod
    def training_sizes(self, learning_curve: Sequence[int] | None, fold: np.ndarray) -> list[int]:
        """Numbers of training cells, ascending; the last one is all of them."""

    @abstractmethod
    def splits(self, is_train: np.ndarray, sizes: list[int], *, seed: int, fold: int) -> list[Split]:
        """Training sets of each size among the units that are not held out, bool `(n_units,)`."""

    @abstractmethod
    def everything(self, seed: int) -> Split:
        """All units as a training set."""

    @abstractmethod
    def _is_read(self, split: Split) -> np.ndarray:
        """Which occurrences are in training cells, bool `(n_occurrences,)`."""

    @abstractmethod
    def validation_part(self, train: np.ndarray, seed: int) -> np.ndarray:
        """Choose some of the training units to evaluate a training by, bool `(n,)`."""

    @abstractmethod
    def penalty(self, truth: np.ndarray, seed: int) -> dict[str, Any]:
        """How the penalty of a logistic regression is found, for units of some classes."""

    @abstractmethod
    def states(self, encoder: BertModel, description: str) -> np.ndarray:
        """State of each occurrence, as a linear head reads it, float32 `(n_occurrences, d)`."""

    @abstractmethod
    def examples(self, units: np.ndarray, split: Split) -> LabelledCells:
        """Cells with the classes of some units, to train on."""

    @abstractmethod
    def scores(self, classifier: Classifier, units: np.ndarray) -> np.ndarray:
        """Probabilities of the classes for each occurrence of some units, float32 `(n, n_logits)`."""

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """Describe what is learnt, for the plan of a folder."""

    @abstractmethod
    def taught(self) -> dict[str, Any]:
        """Describe what the model was trained on, for users of the model."""


# --- genes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Genes(Units):
    """Labelled genes in the cells that have them.

    Parameters
    ----------
    given
        Token and class of all labelled genes, also of those that no cell to use has.
    """

    given: tuple[np.ndarray, np.ndarray]

    of = "genes"
    stops_early = False
    redraws_weights = False

    def training_sizes(self, learning_curve: Sequence[int] | None, fold: np.ndarray) -> list[int]:
        return sizes(learning_curve, len(self.rows), len(self.rows))

    def splits(self, is_train: np.ndarray, sizes: list[int], *, seed: int, fold: int) -> list[Split]:
        return [Split(np.flatnonzero(is_train), np.flatnonzero(~is_train), n, seed, fold) for n in sizes]

    def everything(self, seed: int) -> Split:
        return Split(np.arange(len(self)), np.arange(0), len(self.rows), seed)

    def _is_read(self, split: Split) -> np.ndarray:
        return self.cell < split.n_cells

    def validation_part(self, train: np.ndarray, seed: int) -> np.ndarray:
        return _inner_folds(self.truth[train, 0], seed) == 0

    def penalty(self, truth: np.ndarray, seed: int) -> dict[str, Any]:
        return {"inner_folds": _inner_folds(truth, seed)}

    def of_tokens(self, units: np.ndarray) -> np.ndarray:
        """Class of each token, int64 `(n_tokens,)`, for some of the genes; -100 for all else."""
        classes = np.full(len(self.prepared.model.vocabulary), NOTHING, dtype=np.int64)
        classes[self.where[units]] = self.truth[units, 0]
        return classes

    def _read_out(self, model: Classifier | BertModel, units: np.ndarray, forward: Any, description: str) -> np.ndarray:
        from gfx._engine.class_scores import of_occurrences

        prepared = self.prepared
        lengths = prepared.lengths_of(self.rows[np.unique(self.cell[self.occurrences_of(units)])])
        wanted = self.of_tokens(units) >= 0
        return of_occurrences(model, prepared.tokens.ids, lengths, wanted, forward, description=description)[2]

    def states(self, encoder: BertModel, description: str) -> np.ndarray:
        from gfx._engine.forward import states

        return self._read_out(encoder, np.arange(len(self)), states, f"states of labelled genes{description}")

    def examples(self, units: np.ndarray, split: Split) -> LabelledCells:
        from gfx._engine.examples import LabelledCells

        tokens = self.prepared.tokens
        has_one = np.unique(self.cell[self.occurrences_of(units) & self._is_read(split)])
        return LabelledCells(tokens.ids, tokens.lengths, self.rows[has_one], of_token=self.of_tokens(units))

    def scores(self, classifier: Classifier, units: np.ndarray) -> np.ndarray:
        from gfx._engine.class_scores import probabilities

        return self._read_out(classifier, units, probabilities, "scoring held-out genes")

    def plan(self) -> dict[str, Any]:
        (classes,) = self.tasks.values()
        genes = zip(self.where, self.truth[:, 0].tolist(), strict=True)
        return {"classes": classes, "genes": {str(token): at for token, at in genes}}

    def taught(self) -> dict[str, Any]:
        (classes,) = self.tasks.values()
        ids = self.prepared.model.vocabulary.ids[self.where]
        return {name: sorted(ids[self.truth[:, 0] == at]) for at, name in enumerate(classes)}


def _inner_folds(truth: np.ndarray, seed: int) -> np.ndarray:
    """Fold of each training gene, int16 `(n,)`: five folds, or as many as the smallest class has genes.

    Where no class has two genes there is nothing to choose by: all are in one fold.
    """
    counts = np.unique(truth, return_counts=True)[1]
    if not (counts > 1).any():
        return np.zeros(len(truth), dtype=np.int16)
    return folds(truth, min(INNER_FOLDS, max(int(counts.min()), 2)), seed)


def draw_genes(
    prepared: Prepared,
    labels: GeneLabels,
    unknown: Literal["raise", "drop"],
    lengths: np.ndarray,
    *,
    max_cells: int,
    n_splits: int,
    rng: int,
) -> Genes:
    """Draw the cells to use among those that have a labelled gene; leave out genes that none of them has."""
    tasks, tokens, truth = find_gene_labels(prepared, labels, unknown)
    with_tokens = np.flatnonzero(lengths > 0)
    cell, _ = _occurrences(prepared, tokens, with_tokens)
    rows = np.random.default_rng(rng).permutation(with_tokens[np.unique(cell)])[:max_cells]
    cell, gene = _occurrences(prepared, tokens, rows)
    is_seen = np.bincount(gene, minlength=len(tokens)) > 0
    if not is_seen.all():
        _log.info(f"{(~is_seen).sum():,} of {len(is_seen):,} labelled genes are in none of the cells")
    ((task, names),) = tasks.items()
    counts, n_given = (np.bincount(some, minlength=len(names)) for some in (truth[is_seen], truth))
    if counts.min() < n_splits:
        few = int(counts.argmin())
        msg = (
            f"The class {names[few]!r} has {counts[few]} genes that these cells express (of {n_given[few]} given), "
            f"fewer than the {n_splits} folds of `n_splits`: each fold holds some of every class out. Give more "
            f"genes or cells, or `n_splits={max(2, counts[few])}`."
        )
        raise ValueError(msg)
    return Genes(
        prepared,
        tasks,
        task,
        truth=truth[is_seen][:, None],
        where=tokens[is_seen],
        rows=rows,
        unit=np.searchsorted(tokens[is_seen], tokens[gene]),
        cell=cell,
        donor=None,
        pooling="gene",
        given=(tokens, truth),
    )


def _occurrences(prepared: Prepared, tokens: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find every occurrence of some genes in some cells: the cell, by its place in `rows`, and the gene."""
    gene_of = np.full(len(prepared.model.vocabulary), -1, dtype=np.int64)
    gene_of[tokens] = np.arange(len(tokens))
    place = np.empty(len(prepared.tokens.lengths), dtype=np.int64)
    place[rows] = np.arange(len(rows))
    cells, genes = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for some in pieces(np.sort(rows)):
        ids = prepared.tokens.ids[some]
        gene = np.where(np.arange(ids.shape[1]) < prepared.tokens.lengths[some][:, None], gene_of[ids], -1)
        number, rank = np.nonzero(gene >= 0)
        cells.append(place[some[number]])
        genes.append(gene[number, rank])
    return np.concatenate(cells), np.concatenate(genes)


# --- cells ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells(Units):
    """Cells with a class."""

    of = "cells"
    stops_early = True
    redraws_weights = True

    def training_sizes(self, learning_curve: Sequence[int] | None, fold: np.ndarray) -> list[int]:
        left = [len(self) - np.bincount(of_repeat) for of_repeat in fold]
        return sizes(learning_curve, round(float(np.mean(left))), int(np.min(left)))

    @property
    def _taken(self) -> np.ndarray:
        """Units in the order in which cells are taken."""
        return np.searchsorted(self.where, self.rows)

    def splits(self, is_train: np.ndarray, sizes: list[int], *, seed: int, fold: int) -> list[Split]:
        train, held_out = self._taken[is_train[self._taken]], np.flatnonzero(~is_train)
        drawn = np.random.default_rng([seed, fold]).permutation(train)
        parts = [*(drawn[:n] for n in sizes[:-1]), train]
        return [Split(part, held_out, len(part), seed, fold) for part in parts]

    def everything(self, seed: int) -> Split:
        return Split(self._taken, np.arange(0), len(self), seed)

    def _is_read(self, split: Split) -> np.ndarray:
        return np.ones(len(self.unit), dtype=bool)

    def validation_part(self, train: np.ndarray, seed: int) -> np.ndarray:
        donors = None if self.donor is None else self.donor[train]
        return validation_part(self.classes_of(self.first)[train], seed, donors)

    def penalty(self, truth: np.ndarray, seed: int) -> dict[str, Any]:
        return {"strength": STRENGTH_FOR_CELLS}

    def states(self, encoder: BertModel, description: str) -> np.ndarray:
        from gfx._engine.pooling import embed_cells

        prepared = self.prepared
        lengths = prepared.lengths_of(self.where)
        ids, vocabulary = prepared.tokens.ids, prepared.model.vocabulary
        return embed_cells(encoder, ids, lengths, vocabulary, how=self.pooling)[self.where]

    @cached_property
    def _of_cell(self) -> np.ndarray:
        """Class of each cell of the AnnData in each task, int64 `(n_obs, n_tasks)`."""
        classes = np.full((len(self.prepared.tokens.lengths), len(self.tasks)), NOTHING, dtype=np.int64)
        classes[self.where] = self.truth
        return classes

    def examples(self, units: np.ndarray, split: Split) -> LabelledCells:
        from gfx._engine.examples import LabelledCells

        tokens = self.prepared.tokens
        return LabelledCells(tokens.ids, tokens.lengths, self.where[units], of_cell=self._of_cell)

    def scores(self, classifier: Classifier, units: np.ndarray) -> np.ndarray:
        from gfx._engine.class_scores import of_cells

        prepared, rows = self.prepared, self.where[units]
        return of_cells(classifier, prepared.tokens.ids, prepared.lengths_of(rows), prepared.model.vocabulary)[rows]

    def plan(self) -> dict[str, Any]:
        parts = (self.where, np.ascontiguousarray(self.truth), self.donor)
        content = b"".join(part.tobytes() for part in parts if part is not None)
        # The first task decides the folds, and tasks are sorted by name.
        return {"classes": self.tasks, "first": self.first, "labels": hashlib.sha256(content).hexdigest()}

    def taught(self) -> dict[str, Any]:
        return {"n_cells": len(self), "tasks": self.tasks}


def draw_cells(
    prepared: Prepared,
    groupby: str | Iterable[str],
    donor_key: str | None,
    lengths: np.ndarray,
    *,
    pooling: str,
    max_cells: int | None,
    n_splits: int,
    rng: int,
) -> Cells:
    """Read the classes, and draw the cells to use among those that have one.

    Raises
    ------
    KeyError
        No such column of `obs`.
    ValueError
        Fewer than two classes, a class with fewer cells than folds, fewer donors than folds, cells without a donor,
        classes or donors that read alike.
    """
    first, given = find_cell_labels(prepared, groupby, donor_key)
    has_class = np.any([codes >= 0 for _, codes in given.values()], axis=0) & (lengths > 0)
    rows = np.random.default_rng(rng).permutation(np.flatnonzero(has_class))[:max_cells]
    where = np.sort(rows)
    tasks, truth = {}, []
    for column, (names, codes) in given.items():
        counts = np.bincount(codes[rows][codes[rows] >= 0], minlength=len(names))
        present = np.flatnonzero(counts)
        tasks[column] = [names[number] for number in present]
        check_classes_of_cells(column, tasks[column], counts[present], n_splits)
        renumbered = np.full(len(names) + 1, NOTHING, dtype=np.int64)
        renumbered[present] = np.arange(len(present))
        truth.append(renumbered[codes[where]])
    donor = None if donor_key is None else find_donors(prepared, donor_key, rows, n_splits)[where]
    return Cells(
        prepared,
        tasks,
        first,
        truth=np.stack(truth, axis=1),
        where=where,
        rows=rows,
        unit=np.arange(len(rows)),
        cell=np.argsort(rows),
        donor=donor,
        pooling=pooling,
    )


# --- both -----------------------------------------------------------------------------------------------------------


def sizes(learning_curve: Sequence[int] | None, n_cells: int, most: int) -> list[int]:
    """Numbers of training cells, ascending; the last one, `n_cells`, is all of them.

    Parameters
    ----------
    most
        Training cells that every fold has.

    Raises
    ------
    ValueError
        A number that is no part of the cells there are.
    """
    points = sorted({int(n) for n in learning_curve or ()})
    if points and not 1 < points[0] <= points[-1] <= most:
        msg = f"`learning_curve` has numbers of cells to learn from, 2 to {most:,} here; found {points}."
        raise ValueError(msg)
    return [n for n in points if n < n_cells] + [n_cells]


def _add_up(values: np.ndarray, unit: np.ndarray, n_units: int) -> np.ndarray:
    """Add up rows by unit, float64 `(n_units, k)`."""
    from scipy.sparse import csr_array

    n = len(unit)
    by_unit = csr_array((np.ones(n), unit, np.arange(n + 1)), shape=(n, n_units)).T
    return np.asarray(by_unit @ values.astype(np.float64))
