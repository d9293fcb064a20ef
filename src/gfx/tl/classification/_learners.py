"""Methods that are trained on some units and predict classes of others: the model, its controls, and baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx import _log
from gfx._core.linear_head import fit_linear_head
from gfx._core.statistics import principal_components
from gfx._tokens import CountsNotAtHandError
from gfx.models import FineTuning
from gfx.tl._baselines import describe_genes, log_counts
from gfx.tl.classification._training import FineTunedNetwork
from gfx.tl.classification._units import HIDDEN_LAYER, inner_folds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from scipy.sparse import csr_array

    from gfx._core.linear_head import LinearHead
    from gfx._engine.classifier import Classifier
    from gfx.models import LinearProbe
    from gfx.tl.classification._units import Split, Units

N_GENES, N_COMPONENTS = 2000, 50

#: Inverse strength of the penalty of every logistic regression that classifies cells.
STRENGTH_FOR_CELLS = 0.1

#: What a linear method reads: training units; their features `(n, k)`; and features of each held-out occurrence.
Features = Callable[["Split"], "tuple[np.ndarray, np.ndarray, np.ndarray]"]


@dataclass(frozen=True)
class LinearMethod:
    """Logistic regression of each task on some features, which are of one kind or not."""

    name: str
    units: Units
    features: Features
    class_weight: str | None
    one_unit: bool = True

    def fit(self, split: Split, _place: Path) -> Classifier:
        """Put fitted heads upon the layers that they were fitted on."""
        from gfx._engine.classifier import make_classifier, set_head

        prepared, heads = self.units.prepared, self.heads(split, *self.features(split)[:2])
        how = {"seed": 0, "n_layers": prepared.network(HIDDEN_LAYER).n_layers}
        classifier = make_classifier(prepared.model.weights, prepared.model.config, self.units.head, **how)
        set_head(classifier, *(np.concatenate([getattr(head, part) for head in heads]) for part in ("weight", "bias")))
        return classifier

    def heads(self, split: Split, train: np.ndarray, features: np.ndarray) -> list[LinearHead]:
        """Fit a head per task on features of training units."""
        heads = []
        for task, classes in self.units.tasks.items():
            truth = self.units.classes_of(task)[train]
            known = truth >= 0
            how = {"one_unit": self.one_unit, "class_weight": self.class_weight, "strength": STRENGTH_FOR_CELLS}
            if self.units.of == "genes":
                how |= {"strength": None, "inner_folds": inner_folds(truth[known], split.seed)}
            heads.append(fit_linear_head(features[known], truth[known], len(classes), **how))
        return heads

    def predict(self, split: Split) -> np.ndarray:
        """Probability of each class of each task, for each occurrence of the held-out units, float32."""
        train, features, held_out = self.features(split)
        return np.hstack([head.probabilities(held_out) for head in self.heads(split, train, features)])


@dataclass(frozen=True)
class Majority:
    """The share of each class in the training set."""

    units: Units
    name: str = "majority"

    def predict(self, split: Split) -> np.ndarray:
        shares = []
        for task, classes in self.units.tasks.items():
            truth = self.units.classes_of(task)[split.train]
            counts = np.bincount(truth[truth >= 0], minlength=len(classes))
            shares.append(counts / counts.sum() if counts.any() else np.full(len(classes), 1 / len(classes)))
        n = int(self.units.occurrences_of(split.held_out).sum())
        return np.tile(np.concatenate(shares).astype(np.float32), (n, 1))


Learner = FineTunedNetwork | LinearMethod | Majority


def make_learners(
    units: Units, method: FineTuning | LinearProbe, controls: Sequence[str], folder: Path, rng: int
) -> list[Learner]:
    """Make the model, first, and what it is compared with; a new baseline is one line here."""
    names = ("model", "random_weights") if "random_weights" in controls else ("model",)
    if isinstance(method, FineTuning):
        learners: list[Learner] = [FineTunedNetwork(name, units, method, folder) for name in names]
    else:
        learners = [LinearMethod(name, units, _states(units, name, rng), method.class_weight) for name in names]
    if "baselines" not in controls:
        return learners
    weight = method.class_weight  # classes weigh as those of the model, or accuracy would not compare
    if units.of == "genes":
        learners.append(LinearMethod("expression", units, expression_of_genes(units), weight, one_unit=False))
    else:
        learners += [LinearMethod(name, units, of, weight) for name, of in _counts_of_cells(units).items()]
    return [*learners, Majority(units)]


# --- features -------------------------------------------------------------------------------------------------------


def _states(units: Units, name: str, rng: int) -> Features:
    """Describe each training unit by its mean state, and each held-out occurrence by its state.

    The logits of a mean are the mean of the logits, so a head is fitted on one mean per unit and applied to every
    occurrence. States are computed once for all folds of a repeat, and with random weights of genes once for all.
    """

    @lru_cache(maxsize=1)
    def states(random_weights: int | None) -> np.ndarray:
        return units.states(random_weights)

    def features(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seed = None if name == "model" else rng if units.of == "genes" else split.seed
        values = states(seed)
        return *units.training_means(values, split), values[units.occurrences_of(split.held_out)]

    return features


def expression_of_genes(genes: Units) -> Features:
    """Describe each gene by detection, mean rank, mean and variance of expression.

    Training genes are described in the training cells, others in all of them, as the model sees either.
    """

    @lru_cache
    def described(n_cells: int) -> np.ndarray:
        return describe_genes(genes.prepared, genes.prepared.lengths_of(genes.rows[:n_cells]))[genes.where]

    def features(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        held_out = genes.unit[genes.occurrences_of(split.held_out)]
        return split.train, described(split.n_cells)[split.train], described(len(genes.rows))[held_out]

    return features


def _counts_of_cells(cells: Units) -> dict[str, Features]:
    """Describe cells by log counts of 2,000 genes that vary most among training cells; and by 50 components of them.

    Log counts of all cells are in memory, as sparse as they are.
    """
    from scipy.sparse import vstack

    try:
        logs: csr_array = vstack([logs for _, logs in log_counts(cells.prepared)], format="csr")[cells.where]
    except CountsNotAtHandError as problem:
        _log.info(f"The baselines of log counts are missing, because there are no counts to read: {problem.args[0]}")
        return {}
    chosen: dict[bytes, np.ndarray] = {}

    def variable(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        train = split.train.tobytes()
        if train not in chosen:  # genes are found once for both methods
            chosen[train] = _most_variable(logs[split.train])
        parts = (logs[part][:, chosen[train]] for part in (split.train, split.held_out))
        return split.train, *(part.toarray().astype(np.float32) for part in parts)

    def components(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        train, *parts = variable(split)
        return train, *principal_components(*parts, N_COMPONENTS, split.seed)

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
