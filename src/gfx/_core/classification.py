"""How well classes are predicted: curves, measures, bootstrap intervals, and the tables made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.metrics import roc_curve

from gfx._core.statistics import COVERAGE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: False positive rates at which curves are kept.
GRID = np.linspace(0, 1, 101)

METRICS = ("auc", "accuracy", "macro_f1")

#: Draws of a bootstrap.
N_DRAWS = 200

#: Columns that one value of a summary belongs to, and those of the curves.
_BY = ["task", "unit", "method", "n_cells", "metric"]
_CURVE = ["task", "unit", "method", "repeat", "fold", "class", "fpr", "tpr"]


# --- measures -------------------------------------------------------------------------------------------------------


def curve(is_class: np.ndarray, score: np.ndarray) -> np.ndarray | None:
    """Find the true positive rate at each false positive rate of :data:`GRID`; `None` unless there are some of both."""
    if not 0 < is_class.sum() < len(is_class):
        return None
    fpr, tpr, _ = roc_curve(is_class, score)
    rates = np.interp(GRID, fpr, tpr)
    rates[0] = 0.0
    return rates


def measure(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve, accuracy and macro F1, of classes, int `(n,)`, and probabilities `(n, n_classes)`.

    The area is that of the second class where there are two, else the mean over the classes that are present, each
    against all others; macro F1 is the mean over the classes that are present. NaN where they are all of one class.
    """
    return {"auc": _area(truth, probabilities), **measure_counts(confusion(truth, probabilities))}


def measure_counts(counts: np.ndarray) -> dict[str, float]:
    """Accuracy, and macro F1 over the classes that are present, of counts of true against predicted classes."""
    correct, n_true, n_predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    present = n_true > 0
    return {
        "accuracy": float(correct.sum() / counts.sum()),
        "macro_f1": float((2 * correct[present] / (n_true + n_predicted)[present]).mean()),
    }


def scored_classes(n_classes: int) -> list[int]:
    """Classes with a curve of their own: of two, the curve of the second one says everything."""
    return [1] if n_classes == 2 else list(range(n_classes))


def _area(truth: np.ndarray, probabilities: np.ndarray) -> float:
    scored = scored_classes(probabilities.shape[1])
    areas = []
    for number, ranks in zip(scored, rankdata(probabilities[:, scored].astype(np.float64), axis=0).T, strict=True):
        is_class = truth == number
        n = is_class.sum()
        if 0 < n < len(truth):
            areas.append((ranks[is_class].mean() - (n + 1) / 2) / (len(truth) - n))
    return mean_of_known(areas)


def confusion(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Count true against predicted classes, int64 `(n_classes, n_classes)`."""
    n_classes = probabilities.shape[1]
    pairs = truth * n_classes + probabilities.argmax(axis=1)
    return np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)


def mean_of_known(values: list[float]) -> float:
    """Mean of all values that are not NaN; NaN if none is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else np.nan


# --- intervals ------------------------------------------------------------------------------------------------------


def intervals(
    truth: np.ndarray,
    probabilities: np.ndarray,
    fold: np.ndarray,
    rng: np.random.Generator,
    groups: np.ndarray | None = None,
) -> dict[str, tuple[float, float]]:
    """95 % bootstrap interval of each measure, as :func:`summarize` averages it.

    Genes, cells, or whole donors, `groups`, int `(n,)`, are drawn with replacement, the same ones in all folds and
    repeats, because repeats are not replicates. Classes are int `(n,)`; probabilities `(n_repeats, n, n_classes)`, NaN
    where a repeat has no score; and folds `(n_repeats, n)`.
    """
    members = None if groups is None else list(pd.Series(groups).groupby(groups).indices.values())
    n_units = len(truth) if members is None else len(members)
    if n_units < 3:  # of one or two, nothing follows
        return dict.fromkeys(METRICS, (np.nan, np.nan))
    draws = []
    for _ in range(N_DRAWS):
        chosen = rng.integers(n_units, size=n_units)
        if members is not None:
            chosen = np.concatenate([members[group] for group in chosen])
        draws.append(_over_repeats(truth[chosen], probabilities[:, chosen], fold[:, chosen]))
    tail = (1 - COVERAGE) / 2
    return {name: (low, high) for name, (low, high) in pd.DataFrame(draws).quantile([tail, 1 - tail]).items()}


def _over_repeats(truth: np.ndarray, probabilities: np.ndarray, fold: np.ndarray) -> dict[str, float]:
    """Measure every repeat as a summary does, and average."""
    repeats = []
    for scores, fold_of in zip(probabilities, fold, strict=True):
        scored = (fold_of >= 0) & ~np.isnan(scores[:, 0])
        if scored.any():
            folds = [scored & (fold_of == number) for number in np.unique(fold_of[scored])]
            area = mean_of_known([_area(truth[held_out], scores[held_out]) for held_out in folds])
            repeats.append({"auc": area} | measure_counts(confusion(truth[scored], scores[scored])))
    return {name: mean_of_known([repeat[name] for repeat in repeats]) for name in METRICS}


# --- tables ---------------------------------------------------------------------------------------------------------


def summarize(metrics: pd.DataFrame, pooled: pd.DataFrame) -> pd.DataFrame:
    """Average over repeats: the area by fold, because scores of two models are not comparable; all else pooled.

    A fold may lack a class, as where each donor has one. Macro F1 of such folds says little, and so does its mean.
    `metrics` has columns `task`, `unit`, `method`, `n_cells`, `repeat`, `fold`, `metric`, `value` and `n`; values of
    `pooled`, which has the same but for `fold` and `n`, replace the mean over folds.

    Returns
    -------
    One row per task, unit, method, number of cells and metric, in the order of `metrics`: `mean` and `sd` over repeats
    (NaN with one), `n_repeats`; `n_folds`, the folds of all repeats that have a value; and `n`, what one repeat scores.
    """
    repeats = metrics.groupby([*_BY, "repeat"], sort=False, observed=True).agg(
        value=("value", "mean"), n_folds=("value", "count"), n=("n", "sum")
    )
    repeats.update(pooled.set_index([*_BY, "repeat"])[["value"]])
    table = repeats.groupby(level=_BY, sort=False).agg(
        mean=("value", "mean"),
        sd=("value", "std"),
        n_repeats=("value", "size"),
        n_folds=("n_folds", "sum"),
        n=("n", "max"),
    )
    return table.reset_index()


class Evaluation:
    """Predictions of methods for held-out genes or cells, collected fold by fold.

    Parameters
    ----------
    unit
        What is classified: ``"gene"`` or ``"cell"``.
    tasks, truth
        Names of the classes of each task; class of each gene or cell in each task, int `(n_units,)`, negative for none.
    fold
        Fold of each gene or cell in each repeat, int `(n_repeats, n_units)`, -1 for none.
    groups
        Donor of each, int `(n_units,)`, or `None`.
    """

    def __init__(
        self,
        unit: str,
        tasks: Mapping[str, Sequence[str]],
        truth: Mapping[str, np.ndarray],
        fold: np.ndarray,
        groups: np.ndarray | None = None,
    ) -> None:
        self.unit, self.tasks, self.truth, self.fold, self.groups = unit, tasks, truth, fold, groups
        self._metrics: list[dict[str, Any]] = []
        self._curves: list[pd.DataFrame] = []
        self._counts: dict[tuple[Any, ...], np.ndarray] = {}
        self._probabilities: dict[tuple[str, str, int], np.ndarray] = {}

    def add(self, units: np.ndarray, probabilities: np.ndarray, *, occurrences: bool = False, **place: Any) -> None:
        """Add what a method predicts for the genes or cells of a fold, int `(n,)` and `(n, n_classes)`.

        `place` is `task`, `method`, `n_cells`, `repeat` and `fold`. Predictions for `occurrences` of genes
        are measured alone, and come with the gene of each.
        """
        task, method, n_cells, repeat, fold = (place[name] for name in ("task", "method", "n_cells", "repeat", "fold"))
        truth = self.truth[task][units]
        known = (truth >= 0) & ~np.isnan(probabilities[:, 0])
        if not known.any():
            return
        units, probabilities, truth = units[known], probabilities[known], truth[known]
        of_repeat = {"task": task, "unit": "occurrence" if occurrences else self.unit, "method": method}
        of_repeat |= {"n_cells": n_cells, "repeat": repeat}
        of_fold = of_repeat | {"fold": fold}
        values = measure(truth, probabilities).items()
        self._metrics += [of_fold | {"metric": metric, "value": value, "n": len(truth)} for metric, value in values]
        key = tuple(of_repeat.items())
        self._counts[key] = self._counts.get(key, 0) + confusion(truth, probabilities)
        classes = self.tasks[task]
        for number in scored_classes(len(classes)):
            rates = curve(truth == number, probabilities[:, number])
            if rates is not None:
                self._curves.append(pd.DataFrame({**of_fold, "class": classes[number], "fpr": GRID, "tpr": rates}))
        if not occurrences:
            if (task, method, n_cells) not in self._probabilities:
                shape = (*self.fold.shape, len(classes))
                self._probabilities[task, method, n_cells] = np.full(shape, np.nan, dtype=np.float32)
            self._probabilities[task, method, n_cells][repeat, units] = probabilities

    def mean_probabilities(self, task: str, method: str, n_cells: int) -> np.ndarray:
        """Mean over repeats, float32 `(n_units, n_classes)`; NaN where nothing was scored."""
        nothing = np.full((*self.fold.shape, len(self.tasks[task])), np.nan, dtype=np.float32)
        scores = self._probabilities.get((task, method, n_cells), nothing)
        n = (~np.isnan(scores)).sum(axis=0)
        out = np.full(scores.shape[1:], np.nan, dtype=np.float32)
        return np.divide(np.nansum(scores, axis=0), n, out=out, where=n > 0)

    def tables(self, n_cells: int, rng: np.random.Generator) -> dict[str, pd.DataFrame]:
        """Make `metrics`, `summary`, `roc` and `confusion`; curves and counts at `n_cells`, the full number."""
        metrics = pd.DataFrame(self._metrics)
        pooled = [
            {**dict(of_repeat), "metric": metric, "value": value}
            for of_repeat, counts in self._counts.items()
            for metric, value in measure_counts(counts).items()
        ]
        summary = summarize(metrics, pd.DataFrame(pooled))
        ends: dict[tuple[Any, ...], tuple[float, float]] = {}
        confused = []
        for (task, method, n), scores in self._probabilities.items():
            if n == n_cells:
                used = np.flatnonzero((self.truth[task] >= 0) & ~np.isnan(scores[..., 0]).all(axis=0))
                groups = None if self.groups is None else self.groups[used]
                found = intervals(self.truth[task][used], scores[:, used], self.fold[:, used], rng, groups)
                ends |= {(task, self.unit, method, n, metric): interval for metric, interval in found.items()}
                confused.append(self._confusion(task, method, scores))
        rows = summary[_BY].itertuples(index=False, name=None)
        low, high = np.array([ends.get(row, (np.nan, np.nan)) for row in rows]).T
        after = summary.columns.get_loc("sd") + 1
        summary.insert(after, "low", low)
        summary.insert(after + 1, "high", high)
        curves = pd.concat(self._curves) if self._curves else pd.DataFrame(columns=["n_cells", *_CURVE])
        return {
            "metrics": metrics,
            "summary": summary,
            "roc": curves.loc[curves["n_cells"] == n_cells, _CURVE].reset_index(drop=True),
            "confusion": pd.concat(confused, ignore_index=True),
        }

    def _confusion(self, task: str, method: str, scores: np.ndarray) -> pd.DataFrame:
        """Count true against predicted classes, mean over repeats."""
        classes = np.array(self.tasks[task], dtype=object)
        counts = np.zeros((len(classes), len(classes)))
        for of_repeat in scores:
            known = ~np.isnan(of_repeat[:, 0])
            counts += confusion(self.truth[task][known], of_repeat[known]) / len(scores)
        true, predicted = np.repeat(classes, len(classes)), np.tile(classes, len(classes))
        where = {"task": task, "unit": self.unit, "method": method}
        return pd.DataFrame(where | {"true": true, "predicted": predicted, "n": counts.ravel()})
