"""What is classified: genes, each of which occurs in many cells, or cells, each with one occurrence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gfx import _log
from gfx._core.arguments import check_whole
from gfx._core.batching import pieces
from gfx._core.folds import folds, validation_part
from gfx.tl._prepare import vectors_of
from gfx.tl.classification._labels import check_classes_of_cells, find_cell_labels, find_donors, find_gene_labels

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transformers import BertModel

    from gfx._engine.classifier import Classifier, Head
    from gfx._engine.examples import LabelledCells
    from gfx.tl._prepare import Prepared
    from gfx.tl.classification._labels import GeneLabels

#: Class of a gene or cell that has none, as the loss of the network expects it.
NOTHING = -100

#: Which states a linear head reads: those that embed cells.
HIDDEN_LAYER = -2

#: Cells that are padded together where this process scores them.
CELLS_TOGETHER = 8192

#: Folds of the training genes to choose the strength of a penalty by, or hyperparameters.
INNER_FOLDS = 5


@dataclass(frozen=True)
class Split:
    """Training units, int `(n,)`, in the order in which they are taken, and held-out units, int `(m,)`, ascending.

    `n_cells` is the number of training cells.
    """

    train: np.ndarray
    held_out: np.ndarray
    n_cells: int
    seed: int
    fold: int


@dataclass(frozen=True)
class Units:
    """Genes or cells with known classes.

    Parameters
    ----------
    prepared
        All cells, and the model.
    tasks, first
        Names of the classes of each task; the task whose classes are spread evenly over folds.
    truth
        Class of each unit in each task, int64 `(n_units, n_tasks)`, -100 for none.
    where
        Token of each gene, or row of each cell in the AnnData, int64 `(n_units,)`, ascending.
    rows
        Cells to use, in the order in which they are taken, int64 `(n_cells,)`.
    unit, cell
        Unit of each occurrence and its cell, as an index of `rows`, int64 `(n_occurrences,)`, in the order of cells in
        the AnnData and of ranks.
    pooling
        How a head reads the states of a cell.
    donor
        Donor of each cell, int64 `(n_units,)`, or `None`.
    given
        Class of each token, int64 `(n_tokens,)`, -1 for none; also of genes that none of the cells has.
    """

    of: Literal["genes", "cells"]
    prepared: Prepared
    tasks: dict[str, list[str]]
    first: str
    truth: np.ndarray
    where: np.ndarray
    rows: np.ndarray
    unit: np.ndarray
    cell: np.ndarray
    pooling: str
    donor: np.ndarray | None = None
    given: np.ndarray | None = None

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

    def laid_out(self, values: np.ndarray, fill: float, dtype: str) -> np.ndarray:
        """Lay out values of units over all genes, or cells, of the AnnData."""
        adata, vocabulary = self.prepared.adata, self.prepared.model.vocabulary
        n, places = (len(vocabulary), self.prepared.gene_tokens) if self.of == "genes" else (adata.n_obs, slice(-1))
        out = np.full((n + 1, *values.shape[1:]), fill, dtype=dtype)
        out[self.where] = values
        return out[places]  # an unknown gene, -1, finds the row behind the last token

    # --- what is trained on

    def training_sizes(self, learning_curve: Sequence[int] | None, fold: np.ndarray) -> list[int]:
        """Numbers of training cells, ascending; the last one is all of them, on average."""
        left = [len(self.rows)]
        if self.of == "cells":
            left = [len(self) - np.bincount(of_repeat) for of_repeat in fold]
        n_cells, most = round(float(np.mean(left))), int(np.min(left))
        given = [learning_curve] if np.isscalar(learning_curve) else learning_curve
        points = sorted({check_whole(n, "learning_curve") for n in (() if given is None else given)})
        if points and not 1 < points[0] <= points[-1] <= most:
            msg = f"`learning_curve` has numbers of training cells, 2 to {most:,} here; found {points}."
            raise ValueError(msg)
        return [n for n in points if n < n_cells] + [n_cells]

    def splits(self, is_train: np.ndarray, sizes: list[int], *, seed: int, fold: int = 0) -> list[Split]:
        """Training sets of each size, in cells, among the units that are not held out, bool `(n_units,)`."""
        held_out = np.flatnonzero(~is_train)
        if self.of == "genes":
            return [Split(np.flatnonzero(is_train), held_out, n, seed, fold) for n in sizes]
        taken = np.searchsorted(self.where, self.rows)
        train = taken[is_train[taken]]
        drawn = np.random.default_rng([seed, fold]).permutation(train)
        parts = [*(drawn[:n] for n in sizes[:-1]), train]
        return [Split(part, held_out, len(part), seed, fold) for part in parts]

    def everything(self, seed: int) -> Split:
        """All units as a training set."""
        return self.splits(np.ones(len(self), dtype=bool), [len(self.rows)], seed=seed)[0]

    def validation_part(self, train: np.ndarray, seed: int) -> np.ndarray:
        """Choose some of the training units to evaluate a training by, bool `(n,)`."""
        if self.of == "genes":
            return inner_folds(self.truth[train, 0], seed) == 0
        donor = None if self.donor is None else self.donor[train]
        return validation_part(self.classes_of(self.first)[train], seed, donor)

    def examples(self, units: np.ndarray, split: Split) -> LabelledCells:
        """Training cells with the classes of some units."""
        from gfx._engine.examples import LabelledCells

        tokens = self.prepared.tokens
        if self.of == "genes":
            cells = self.rows[np.unique(self.cell[self.occurrences_of(units, split)])]
            return LabelledCells(tokens, cells, of_token=self._classes_of_tokens(units))
        of_cell = np.full((len(tokens.lengths), len(self.tasks)), NOTHING, dtype=np.int64)
        of_cell[self.where] = self.truth
        return LabelledCells(tokens, self.where[units], of_cell=of_cell)

    def _classes_of_tokens(self, units: np.ndarray) -> np.ndarray:
        """Class of each token, int64 `(n_tokens,)`, for some of the genes; -100 for all else."""
        classes = np.full(len(self.prepared.model.vocabulary), NOTHING, dtype=np.int64)
        classes[self.where[units]] = self.truth[units, 0]
        return classes

    # --- occurrences

    def occurrences_of(self, units: np.ndarray, split: Split | None = None) -> np.ndarray:
        """Which occurrences are those of some units, bool `(n_occurrences,)`; with a split, in its training cells."""
        occurrences = np.isin(np.arange(len(self)), units)[self.unit]
        return occurrences & (self.cell < split.n_cells) if split and self.of == "genes" else occurrences

    def over_occurrences(self, values: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation over the occurrences of each of some units, ascending; float64 `(n_units, k)`.

        `values`, `(n, k)`, are those of all their occurrences.
        """
        unit = np.searchsorted(units, self.unit[self.occurrences_of(units)])
        n = np.bincount(unit, minlength=len(units))[:, None]
        mean, square = (_add_up(power, unit, len(units)) / n for power in (values, values.astype(np.float64) ** 2))
        return mean, np.sqrt(np.maximum(square - mean**2, 0))

    def training_means(self, values: np.ndarray, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Training units that the training cells have, and the mean over the occurrences of each in them.

        `values`, `(n_occurrences, k)`, are those of all occurrences.
        """
        seen = self.occurrences_of(split.train, split)
        n = np.bincount(self.unit[seen], minlength=len(self))
        units = split.train[n[split.train] > 0]
        return units, _add_up(values[seen], self.unit[seen], len(self))[units] / n[units, None]

    def states(self, random_weights: int | None) -> np.ndarray:
        """Compute the state of each occurrence, as a linear head reads it, float32 `(n_occurrences, d)`.

        A seed of `random_weights` takes a network with weights drawn anew. States of cells are computed by the runner,
        those of genes in this process, because they are as many as tokens.
        """
        from gfx._engine.device import choose_device
        from gfx._engine.forward import states
        from gfx._engine.run import CELLS_PER_BLOCK, Job, by_length, networks, run
        from gfx._engine.tasks import CellEmbedding

        network = replace(self.prepared.network(HIDDEN_LAYER), random_weights=random_weights)
        how = "" if random_weights is None else ", random weights"
        with networks():
            if self.of == "genes":
                encoder = network.load(choose_device())
                return self._read_out(encoder, np.arange(len(self)), states, f"states of labelled genes{how}")
            lengths = self.prepared.lengths_of(self.where)
            task = CellEmbedding(network, self.prepared.model.vocabulary, self.pooling)
            job = Job("states", task, self.prepared.tokens, by_length(lengths, CELLS_PER_BLOCK))
            return vectors_of(run([job], description=f"embedding{how}"), len(lengths))["states"][self.where]

    def scores(self, classifier: Classifier, units: np.ndarray) -> np.ndarray:
        """Probabilities of the classes for each occurrence of some units, float32 `(n, n_logits)`."""
        from gfx._engine.class_scores import of_cells, probabilities

        if self.of == "genes":
            return self._read_out(classifier, units, probabilities, "scoring held-out genes")
        vocabulary = self.prepared.model.vocabulary
        return np.concatenate([of_cells(classifier, *cells, vocabulary) for cells in self._padded(self.where[units])])

    def _read_out(self, model: Classifier | BertModel, genes: np.ndarray, forward: Any, description: str) -> np.ndarray:
        from gfx._engine.class_scores import of_occurrences

        rows = np.sort(self.rows[np.unique(self.cell[self.occurrences_of(genes)])])
        wanted = self._classes_of_tokens(genes) >= 0
        return np.concatenate(
            [of_occurrences(model, *cells, wanted, forward, description=description)[2] for cells in self._padded(rows)]
        )

    def _padded(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens and lengths of some cells, so many at a time that they fit into memory and fill batches."""
        tokens = self.prepared.tokens
        return ((tokens.padded(some), tokens.lengths[some]) for some in pieces(rows, CELLS_TOGETHER))


def inner_folds(truth: np.ndarray, seed: int) -> np.ndarray:
    """Fold of each training gene, int16 `(n,)`: five folds, or as many as the smallest class has genes.

    Where no class has two genes there is nothing to choose by: all are in one fold.
    """
    counts = np.unique(truth, return_counts=True)[1]
    if not (counts > 1).any():
        return np.zeros(len(truth), dtype=np.int16)
    return folds(truth, min(INNER_FOLDS, max(int(counts.min()), 2)), seed)


def _add_up(values: np.ndarray, unit: np.ndarray, n_units: int) -> np.ndarray:
    """Add up rows by unit, float64 `(n_units, k)`."""
    from scipy.sparse import csr_array

    n = len(unit)
    by_unit = csr_array((np.ones(n), unit, np.arange(n + 1)), shape=(n, n_units)).T
    return np.asarray(by_unit @ values.astype(np.float64))


# --- drawing them ---------------------------------------------------------------------------------------------------


def draw_genes(
    prepared: Prepared,
    labels: GeneLabels,
    unknown: Literal["raise", "drop"],
    lengths: np.ndarray,
    *,
    max_cells: int,
    n_splits: int,
    rng: int,
) -> Units:
    """Draw the cells to use among those that have a labelled gene; leave out genes that none of them has."""
    task, names, given = find_gene_labels(prepared, labels, unknown)
    cell, _ = _occurrences(prepared, given, np.flatnonzero(lengths > 0))
    rows = np.random.default_rng(rng).permutation(np.unique(cell))[:max_cells]
    cell, token = _occurrences(prepared, given, rows)
    where, unit = np.unique(token, return_inverse=True)
    counts, n_given = (np.bincount(classes, minlength=len(names)) for classes in (given[where], given[given >= 0]))
    if counts.sum() < n_given.sum():
        missing = np.setdiff1d(np.flatnonzero(given >= 0), where)
        n_cut = int(prepared.are_cut(missing, lengths).sum())
        why = f". {n_cut:,} of them: {prepared.behind}" if n_cut else ""
        _log.info(f"{len(missing):,} of {n_given.sum():,} labelled genes are in none of the cells{why}")
    if counts.min() < n_splits:
        few = int(counts.argmin())
        msg = (
            f"The class {names[few]!r} has {counts[few]} genes that these cells express (of {n_given[few]} given), "
            f"fewer than the {n_splits} folds of `n_splits`: each fold holds some of every class out. Give more "
            f"genes or cells, or `n_splits={max(2, counts[few])}`."
        )
        raise ValueError(msg)
    place = np.empty(len(lengths), dtype=np.int64)
    place[rows] = np.arange(len(rows))
    occurrences = {"unit": unit, "cell": place[cell], "where": where, "truth": given[where][:, None]}
    return Units("genes", prepared, {task: names}, task, rows=rows, pooling="gene", given=given, **occurrences)


def _occurrences(prepared: Prepared, given: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find every occurrence of labelled genes in some cells: the row of the cell, and the token."""
    cells, tokens = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for some in pieces(np.sort(rows)):
        ids = prepared.tokens.padded(some)
        is_token = np.arange(ids.shape[1]) < prepared.tokens.lengths[some][:, None]
        number, rank = np.nonzero(is_token & (given[ids] >= 0))
        cells.append(some[number])
        tokens.append(ids[number, rank].astype(np.int64))
    return np.concatenate(cells), np.concatenate(tokens)


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
) -> Units:
    """Read the classes, and draw the cells to use among those that have one."""
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
    occurrences = {"unit": np.arange(len(rows)), "cell": np.argsort(rows), "where": where}
    how = {"truth": np.stack(truth, axis=1), "rows": rows, "pooling": pooling, "donor": donor}
    return Units("cells", prepared, tasks, first, **occurrences, **how)
