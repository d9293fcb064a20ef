"""What predicted classes are worth: curves, measures, and intervals over genes, cells or donors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import roc_curve

from gfx._core.statistics import COVERAGE

if TYPE_CHECKING:
    import pandas as pd

#: False positive rates at which curves are kept.
GRID = np.linspace(0, 1, 101)

METRICS = ("auc", "accuracy", "macro_f1")

#: Draws of a bootstrap.
N_DRAWS = 200


def curve(is_class: np.ndarray, score: np.ndarray) -> np.ndarray | None:
    """Find the true positive rate at each false positive rate of :data:`GRID`; `None` unless there are some of both."""
    if not 0 < is_class.sum() < len(is_class):
        return None
    fpr, tpr, _ = roc_curve(is_class, score)
    rates = np.interp(GRID, fpr, tpr)
    rates[0] = 0.0
    return rates


def measure(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve, accuracy and macro F1.

    Parameters
    ----------
    truth
        Class of each, int `(n,)`.
    probabilities
        `(n, n_classes)`.

    Returns
    -------
    The area is that of the second class where there are two, else the mean over the classes that are there, each
    against all others; macro F1 is the mean over the classes that are there. NaN where there is nothing to tell apart.
    """
    return {"auc": _area(truth, probabilities), **measure_counts(confusion(truth, probabilities))}


def measure_counts(counts: np.ndarray) -> dict[str, float]:
    """Accuracy, and macro F1 over the classes that are there, of counts of true against predicted classes."""
    right, there, told = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    known = there > 0
    return {
        "accuracy": float(right.sum() / counts.sum()),
        "macro_f1": float((2 * right[known] / (there + told)[known]).mean()),
    }


def scored_classes(n_classes: int) -> list[int]:
    """Which classes have a curve of their own: of two, the second says it all."""
    return [1] if n_classes == 2 else list(range(n_classes))


def _area(truth: np.ndarray, probabilities: np.ndarray) -> float:
    scored = scored_classes(probabilities.shape[1])
    ranks = rankdata(probabilities[:, scored], axis=0)
    areas = []
    for at, of_class in zip(scored, ranks.T, strict=True):
        is_class = truth == at
        n = is_class.sum()
        if 0 < n < len(truth):
            areas.append((of_class[is_class].mean() - (n + 1) / 2) / (len(truth) - n))
    return float(np.mean(areas)) if areas else np.nan


def confusion(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Count true against predicted classes, int64 `(n_classes, n_classes)`."""
    n_classes = probabilities.shape[1]
    pairs = truth * n_classes + probabilities.argmax(axis=1)
    return np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)


def intervals(
    truth: np.ndarray,
    probabilities: np.ndarray,
    fold: np.ndarray,
    rng: np.random.Generator,
    groups: np.ndarray | None = None,
) -> dict[str, tuple[float, float]]:
    """95 % bootstrap interval of each measure, as :func:`summarize` takes it.

    Genes, cells or whole donors are drawn with replacement, the same ones in all folds and seeds: seeds are no
    replicates.

    Parameters
    ----------
    truth
        int `(n,)`.
    probabilities
        `(n_seeds, n, n_classes)`; NaN where a seed did not score.
    fold
        `(n_seeds, n)`.
    groups
        Donor of each, int `(n,)`.
    """
    members = None if groups is None else _members(groups)
    n_units = len(truth) if members is None else len(members)
    if n_units < 3:  # of one or two, nothing follows
        return dict.fromkeys(METRICS, (np.nan, np.nan))
    drawn: list[dict[str, float]] = []
    for _ in range(N_DRAWS):
        chosen = rng.integers(n_units, size=n_units)
        if members is not None:
            chosen = np.concatenate([members[at] for at in chosen])
        drawn.append(_over_seeds(truth[chosen], probabilities[:, chosen], fold[:, chosen]))
    tail = (1 - COVERAGE) / 2
    out = {}
    for name in METRICS:
        values = np.array([draw[name] for draw in drawn])
        values = values[~np.isnan(values)]
        out[name] = tuple(float(q) for q in np.quantile(values, [tail, 1 - tail])) if len(values) else (np.nan, np.nan)
    return out


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """Places of the members of each group."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def _over_seeds(truth: np.ndarray, probabilities: np.ndarray, fold: np.ndarray) -> dict[str, float]:
    """Measure every seed as a summary does, and average."""
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    for of_seed, at_seed in zip(probabilities, fold, strict=True):
        scored = (at_seed >= 0) & ~np.isnan(of_seed[:, 0])
        if not scored.any():
            continue
        folds = [scored & (at_seed == at) for at in np.unique(at_seed[scored])]
        found["auc"].append(mean_of_known([_area(truth[there], of_seed[there]) for there in folds]))
        for name, value in measure_counts(confusion(truth[scored], of_seed[scored])).items():
            found[name].append(value)
    return {name: mean_of_known(values) for name, values in found.items()}


def mean_of_known(values: list[float]) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else np.nan


def summarize(metrics: pd.DataFrame, pooled: pd.DataFrame) -> pd.DataFrame:
    """Average over seeds: the area as it is in the folds, for scores of two models do not compare; all else pooled.

    A fold may lack a class, as where each donor has one. Macro F1 of such folds says little, and so does its mean.

    Parameters
    ----------
    metrics
        Columns `task`, `unit`, `method`, `n_cells`, `seed`, `fold`, `metric`, `value` and `n`.
    pooled
        What takes the place of the mean over folds: the same columns, but for `fold` and `n`.

    Returns
    -------
    One row per task, unit, method, number of cells and metric, in the order of `metrics`: `mean` and `sd` over seeds
    (NaN with one), `n_seeds`; `n_folds`, the folds of all seeds that have a value; and `n`, what one seed scores.
    """
    by = ["task", "unit", "method", "n_cells", "metric"]
    each = metrics.groupby([*by, "seed"], sort=False, observed=True).agg(
        value=("value", "mean"), n_folds=("value", "count"), n=("n", "sum")
    )
    each.update(pooled.set_index([*by, "seed"])[["value"]])
    table = each.groupby(level=by, sort=False).agg(
        mean=("value", "mean"),
        sd=("value", "std"),
        n_seeds=("value", "size"),
        n_folds=("n_folds", "sum"),
        n=("n", "max"),
    )
    return table.reset_index()
