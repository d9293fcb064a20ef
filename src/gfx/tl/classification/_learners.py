"""Methods that learn classes from some units and predict those of others: the model, its controls, and baselines."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd

from gfx import _log
from gfx._core.components import principal_components
from gfx._core.linear_head import fit_linear_head
from gfx._tokens import CountsNotAtHandError
from gfx.tl._baselines import describe_genes, log_counts
from gfx.tl.classification._training import kept, train_classifier

if TYPE_CHECKING:
    from pathlib import Path

    from scipy.sparse import csr_array

    from gfx._core.linear_head import LinearHead
    from gfx._engine.classifier import Classifier
    from gfx.models._methods import FineTuning
    from gfx.tl.classification._units import Genes, Split, Units

N_GENES, N_COMPONENTS = 2000, 50

#: What a linear method reads: training units; their features `(n, k)`; other features `(m, k)`; and which of these
#: rows is that of each occurrence of the units held out.
Features = Callable[["Split"], "tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | slice]"]


class Learner(Protocol):
    """Learns from some units and predicts the classes of others."""

    name: str

    def predict(self, split: Split) -> np.ndarray:
        """Probability of each class of each task, for each occurrence of the units held out, float32."""


class LinearMethod:
    """Logistic regression of each task on some features.

    Parameters
    ----------
    one_unit
        Features are of one kind, see :func:`gfx._core.linear_head.fit_linear_head`.
    """

    def __init__(
        self, name: str, units: Units, features: Features, class_weight: str | None, *, one_unit: bool = True
    ) -> None:
        self.name, self.units, self.features = name, units, features
        self.class_weight, self.one_unit = class_weight, one_unit

    def fit(self, split: Split) -> list[LinearHead]:
        """Fit a head per task."""
        return self._fit(split, *self.features(split)[:2])

    def _fit(self, split: Split, train: np.ndarray, features: np.ndarray) -> list[LinearHead]:
        heads = []
        for task, classes in self.units.tasks.items():
            truth = self.units.classes_of(task)[train]
            known = truth >= 0
            how = {"one_unit": self.one_unit, "class_weight": self.class_weight}
            how |= self.units.penalty(truth[known], split.seed)
            heads.append(fit_linear_head(features[known], truth[known], len(classes), **how))
        return heads

    def predict(self, split: Split) -> np.ndarray:
        train, features, others, rows = self.features(split)
        return np.hstack([head.probabilities(others) for head in self._fit(split, train, features)])[rows]


class FineTunedNetwork:
    """The network, trained with a head; held-out units are never labelled in training.

    Parameters
    ----------
    random
        Start from random weights.
    """

    def __init__(self, name: str, units: Units, method: FineTuning, folder: Path, *, random: bool) -> None:
        self.name, self.units, self.method, self.folder, self.random = name, units, method, folder, random

    def predict(self, split: Split) -> np.ndarray:
        place = self.folder / f"seed{split.seed}" / f"fold{split.fold}" / f"{self.name}_{split.n_cells}"
        return kept(place, lambda: self.units.scores(self.fit(split, place), split.held_out))

    def fit(self, split: Split, place: Path) -> Classifier:
        """Train, or go on in a folder where a training was stopped."""
        return train_classifier(self.method, self.units, split, place, random=self.random)


class Majority:
    """The share of each class in the training set."""

    name = "majority"

    def __init__(self, units: Units) -> None:
        self.units = units

    def predict(self, split: Split) -> np.ndarray:
        shares = []
        for task, classes in self.units.tasks.items():
            truth = self.units.classes_of(task)[split.train]
            counts = np.bincount(truth[truth >= 0], minlength=len(classes))
            shares.append(counts / counts.sum() if counts.any() else np.full(len(classes), 1 / len(classes)))
        n = int(self.units.occurrences_of(split.held_out).sum())
        return np.tile(np.concatenate(shares).astype(np.float32), (n, 1))


# --- features -------------------------------------------------------------------------------------------------------


def mean_states(units: Units, states: Callable[[int], np.ndarray]) -> Features:
    """Describe each training unit by its mean state, and each occurrence of those held out by its state.

    A head that is linear says of a mean what it says of the states on average, so it is fitted on one mean per unit and
    read out in every occurrence.

    Parameters
    ----------
    states
        Makes the states of all occurrences, of a seed.
    """

    def features(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray, slice]:
        values = states(split.seed)
        return *units.training_means(values, split), values[units.occurrences_of(split.held_out)], slice(None)

    return features


def expression_of_genes(genes: Genes) -> Features:
    """Describe each gene by detection, mean rank, mean and variance of expression.

    Training genes are described in the training cells, others in all of them, as the model sees either.
    """

    @lru_cache
    def described(n_cells: int) -> np.ndarray:
        return describe_genes(genes.prepared, genes.prepared.lengths_of(genes.rows[:n_cells]))[genes.where]

    def features(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        rows = np.searchsorted(split.held_out, genes.unit[genes.occurrences_of(split.held_out)])
        everywhere = described(len(genes.rows))
        return split.train, described(split.n_cells)[split.train], everywhere[split.held_out], rows

    return features


def counts_of_cells(cells: Units) -> dict[str, Features]:
    """Describe cells by log counts of 2,000 genes that vary most among training cells; and by 50 components of them.

    Log counts of all cells are in memory, as sparse as they are.
    """
    from scipy.sparse import vstack

    logs: csr_array = vstack([logs for _, logs in log_counts(cells.prepared)], format="csr")[cells.where]
    chosen: dict[bytes, np.ndarray] = {}

    def variable(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray, slice]:
        train = split.train.tobytes()
        if train not in chosen:  # genes are found once for both methods
            chosen[train] = _most_variable(logs[split.train])
        learnt, others = (
            logs[some][:, chosen[train]].toarray().astype(np.float32) for some in (split.train, split.held_out)
        )
        return split.train, learnt, others, slice(None)

    def components(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray, slice]:
        train, learnt, others, rows = variable(split)
        return train, *principal_components(learnt, others, N_COMPONENTS, split.seed), rows

    return {"hvg": variable, "pca": components}


def _most_variable(logs: csr_array) -> np.ndarray:
    """Find the genes that vary most, as scanpy does; int `(n_genes,)`."""
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


def baselines(units: Units, class_weight: str | None) -> list[Learner]:
    """Make what predicts without a model; a new baseline is one row here."""
    if units.of == "genes":
        expression = LinearMethod("expression", units, expression_of_genes(units), class_weight, one_unit=False)
        return [expression, Majority(units)]
    try:
        of_counts = counts_of_cells(units)
    except CountsNotAtHandError as problem:
        _log.info(f"No baseline of log counts, for the counts are not at hand: {problem.args[0]}")
        of_counts = {}
    return [*(LinearMethod(name, units, of, class_weight) for name, of in of_counts.items()), Majority(units)]
