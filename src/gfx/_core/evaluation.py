"""Predictions for what was held out, method by method, turned into tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._core.classification import (
    GRID,
    confusion,
    curve,
    intervals,
    measure,
    measure_counts,
    scored_classes,
    summarize,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Evaluation:
    """Collect what methods predict in each fold of each seed.

    Parameters
    ----------
    unit
        What is classified: ``"gene"`` or ``"cell"``.
    tasks
        Names of the classes of each task.
    truth
        Class of each gene or cell in each task, int `(n_units,)`, negative for none.
    fold
        Fold of each gene or cell in each seed, int `(n_seeds, n_units)`, -1 for none.
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
        self._metrics: list[dict[str, object]] = []
        self._curves: list[pd.DataFrame] = []
        self._counts: dict[tuple[object, ...], np.ndarray] = {}
        self._whole: dict[tuple[str, str, int], np.ndarray] = {}

    def add(
        self,
        units: np.ndarray,
        probabilities: np.ndarray,
        *,
        task: str,
        method: str,
        n_cells: int,
        seed: int,
        fold: int,
    ) -> None:
        """Take what a method predicts for the genes or cells of a fold, int `(n,)` and `(n, n_classes)`."""
        truth = self.truth[task][units]
        known = (truth >= 0) & ~np.isnan(probabilities[:, 0])
        units, probabilities, truth = units[known], probabilities[known], truth[known]
        if not len(units):
            return
        place = {"task": task, "unit": self.unit, "method": method, "n_cells": n_cells, "seed": seed, "fold": fold}
        self._measure(truth, probabilities, place)
        of_method = task, method, n_cells
        if of_method not in self._whole:
            shape = (*self.fold.shape, len(self.tasks[task]))
            self._whole[of_method] = np.full(shape, np.nan, dtype=np.float32)
        self._whole[of_method][seed, units] = probabilities

    def add_occurrences(
        self,
        units: np.ndarray,
        probabilities: np.ndarray,
        *,
        task: str,
        method: str,
        n_cells: int,
        seed: int,
        fold: int,
    ) -> None:
        """Take what a method predicts for each occurrence of a gene: its gene, int `(n,)`, and `(n, n_classes)`."""
        place = {"task": task, "unit": "occurrence", "method": method, "n_cells": n_cells, "seed": seed, "fold": fold}
        self._measure(self.truth[task][units], probabilities, place)

    def _measure(self, truth: np.ndarray, probabilities: np.ndarray, place: dict[str, object]) -> None:
        for metric, value in measure(truth, probabilities).items():
            self._metrics.append({**place, "metric": metric, "value": value, "n": len(truth)})
        of_seed = tuple(place[name] for name in _SEED)
        self._counts[of_seed] = self._counts.get(of_seed, 0) + confusion(truth, probabilities)
        classes = self.tasks[str(place["task"])]
        for at in scored_classes(len(classes)):
            rates = curve(truth == at, probabilities[:, at])
            if rates is not None:
                self._curves.append(pd.DataFrame({**place, "class": classes[at], "fpr": GRID, "tpr": rates}))

    def mean_probabilities(self, task: str, method: str, n_cells: int) -> np.ndarray:
        """Mean over seeds, float32 `(n_units, n_classes)`; NaN for what was not scored."""
        whole = self._whole[task, method, n_cells]
        n = (~np.isnan(whole)).sum(axis=0)
        out = np.full(whole.shape[1:], np.nan, dtype=np.float32)
        return np.divide(np.nansum(whole, axis=0), n, out=out, where=n > 0)

    def tables(self, n_cells: int, rng: np.random.Generator) -> dict[str, pd.DataFrame]:
        """Put together `metrics`, `summary`, `roc` and `confusion`; curves and counts at `n_cells`, the full number."""
        metrics = pd.DataFrame(self._metrics)
        pooled = [
            {**dict(zip(_SEED, of_seed, strict=True)), "metric": metric, "value": value}
            for of_seed, counts in self._counts.items()
            for metric, value in measure_counts(counts).items()
        ]
        summary = summarize(metrics, pd.DataFrame(pooled))
        summary.insert(summary.columns.get_loc("n_seeds"), "low", np.nan)
        summary.insert(summary.columns.get_loc("n_seeds"), "high", np.nan)
        confused = []
        for (task, method, n), whole in self._whole.items():
            if n != n_cells:
                continue
            used = np.flatnonzero((self.fold >= 0).any(axis=0) & (self.truth[task] >= 0))
            groups = None if self.groups is None else self.groups[used]
            found = intervals(self.truth[task][used], whole[:, used], self.fold[:, used], rng, groups)
            is_here = (summary["task"] == task) & (summary["method"] == method) & (summary["n_cells"] == n)
            for metric, ends in found.items():
                row = is_here & (summary["unit"] == self.unit) & (summary["metric"] == metric)
                summary.loc[row, ["low", "high"]] = ends
            confused.append(self._confused(task, method, whole))
        curves = (
            pd.concat(self._curves, ignore_index=True) if self._curves else pd.DataFrame(columns=["n_cells", *_CURVE])
        )
        curves = curves[curves["n_cells"] == n_cells]
        return {
            "metrics": metrics,
            "summary": summary,
            "roc": curves[_CURVE].reset_index(drop=True),
            "confusion": pd.concat(confused, ignore_index=True),
        }

    def _confused(self, task: str, method: str, whole: np.ndarray) -> pd.DataFrame:
        """Count true against predicted classes, mean over seeds."""
        classes = np.array(self.tasks[task], dtype=object)
        counts = np.zeros((len(classes), len(classes)))
        for of_seed in whole:
            known = ~np.isnan(of_seed[:, 0])
            counts += confusion(self.truth[task][known], of_seed[known]) / len(whole)
        true, predicted = np.meshgrid(classes, classes, indexing="ij")
        return pd.DataFrame(
            {
                "task": task,
                "unit": self.unit,
                "method": method,
                "true": true.ravel(),
                "predicted": predicted.ravel(),
                "n": counts.ravel(),
            }
        )


#: What one seed of a method is known by, all its folds together.
_SEED = ("task", "unit", "method", "n_cells", "seed")

_CURVE = ["task", "unit", "method", "seed", "fold", "class", "fpr", "tpr"]
