"""Cross-validation: every method in every fold of every repeat, and where its results go."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gfx import _log
from gfx._core.classification import Evaluation
from gfx._core.folds import each_fold, folds, in_training
from gfx._results import record
from gfx.tl.classification._learners import make_learners
from gfx.tl.classification._trained import UNFINISHED, classification_params, keep_to_the_plan, train_on_all

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gfx._engine.classifier import Head
    from gfx.models import FineTuning, LinearProbe
    from gfx.tl.classification._learners import Learner
    from gfx.tl.classification._units import Units

CONTROLS = ("random_weights", "baselines")


def cross_validate(
    units: Units,
    method: FineTuning | LinearProbe,
    *,
    controls: tuple[str, ...],
    n_splits: int,
    n_repeats: int,
    learning_curve: Sequence[int] | None,
    folder: str | Path | None,
    rng: int,
    **params: object,
) -> None:
    """Classify genes or cells by cross-validation, and write the results; with a folder, keep a model as well."""
    classes = units.classes_of(units.first)
    fold = np.stack([folds(classes, n_splits, rng + repeat, units.donor) for repeat in range(n_repeats)])
    scored = _scored(units, fold)
    sizes = units.training_sizes(learning_curve, fold)
    how = classification_params(units, method, n_splits=n_splits, n_repeats=n_repeats, rng=rng, **params)
    how = record(units.prepared.slots.function, **how)
    with nullcontext(folder) if folder is not None else tempfile.TemporaryDirectory() as place:
        if folder is not None:
            keep_to_the_plan(Path(place), units, method, how, learning_curve=sizes, controls=controls)
        learners = make_learners(units, method, controls, Path(place) / UNFINISHED, rng)
        evaluation, spread = _evaluate(units, learners, fold, scored, sizes=sizes, rng=rng)
        tables = evaluation.tables(sizes[-1], np.random.default_rng(rng))
        if folder is not None:
            train_on_all(learners[0], Path(place), how, rng=rng, summary=tables["summary"])
    scores = np.hstack([evaluation.mean_probabilities(task, "model", sizes[-1]) for task in units.tasks])
    _write(units, tables, how, fold=fold, scores=scores, spread=spread)


def _scored(units: Units, fold: np.ndarray) -> dict[str, np.ndarray]:
    """Find the units that count in each task and repeat, bool `(n_repeats, n_units)`: whose class was in training.

    Classes that no training set has are named, and refused where there are no others.
    """
    scored, never = {}, {}
    for task, names in units.tasks.items():
        truth = units.classes_of(task)
        scored[task] = np.stack([in_training(truth, of_repeat) for of_repeat in fold])
        never[task] = [name for number, name in enumerate(names) if not scored[task][:, truth == number].any()]
    what = "; ".join(f"{task!r}: {names}" for task, names in never.items() if names)
    why = f"Classes that only one donor has, or donors of one fold, so that no training set has them: {what}."
    if not any(counts.any() for counts in scored.values()):
        msg = f"{why} There are no others. Give several donors of each class, or no `donor_key`, which says less."
        raise ValueError(msg)
    if what:
        _log.warn(f"{why} Their cells are left out of all measures.")
    return scored


def _evaluate(
    units: Units,
    learners: list[Learner],
    fold: np.ndarray,
    scored: Mapping[str, np.ndarray],
    *,
    sizes: list[int],
    rng: int,
) -> tuple[Evaluation, np.ndarray]:
    """Let every learner predict every fold; the first repeat has the seed `rng`, each other the next one.

    Returns predictions, and the standard deviation of the model's scores over occurrences, `(n_units, n_logits)`, mean
    over repeats.
    """
    truth = {task: units.classes_of(task) for task in units.tasks}
    evaluation = Evaluation(units.of.removesuffix("s"), units.tasks, truth, fold, units.donor)
    spread = np.zeros((len(units), units.head.n_logits))
    n_fits = sum(len(np.unique(of_repeat)) for of_repeat in fold) * len(learners) * len(sizes)
    with _log.progress(n_fits, "folds", "fit") as bar:
        for repeat, of_repeat in enumerate(fold):
            for number, is_train, _ in each_fold(of_repeat):
                splits = units.splits(is_train, sizes, seed=rng + repeat, fold=number)
                for learner, (n_cells, split) in product(learners, zip(sizes, splits, strict=True)):
                    scores, held_out = learner.predict(split), split.held_out
                    mean, sd = units.over_occurrences(scores, held_out)
                    for task, part in units.head.slices.items():
                        place = {"task": task, "method": learner.name, "n_cells": n_cells}
                        place |= {"repeat": repeat, "fold": number}
                        if units.of == "genes":
                            unit = units.unit[units.occurrences_of(held_out)]
                            evaluation.add(unit, scores[:, part], occurrences=True, **place)
                        counts = scored[task][repeat, held_out]
                        evaluation.add(held_out[counts], mean[counts, part].astype(np.float32), **place)
                    if learner.name == "model" and n_cells == sizes[-1]:
                        spread[held_out] += sd / len(fold)
                    bar.update()
    return evaluation, spread


def _write(
    units: Units,
    tables: dict[str, pd.DataFrame],
    params: dict[str, Any],
    *,
    fold: np.ndarray,
    scores: np.ndarray,
    spread: np.ndarray,
) -> None:
    slots, of_units = units.prepared.slots, units.laid_out(scores, np.nan, "float32")
    predicted = predicted_classes(of_units, units.head)
    parts = {"": of_units, "fold": units.laid_out(fold.T, -1, "int16")}
    uns = {"tasks": {task: np.array(names, dtype=object) for task, names in units.tasks.items()}, **tables}
    if units.of == "genes":
        done = _summary(units, tables, "auc", f"{len(units):,} genes in {len(units.rows):,} cells")
        uns["note"] = (
            "Intervals are over genes; standard deviations over repeats, which draw the folds anew. Per occurrence, "
            "genes that more cells have count more."
        )
        ((task, names),) = units.tasks.items()
        given = np.append(units.given, -1)[units.prepared.gene_tokens]
        n_cells = np.bincount(units.unit, minlength=len(units))
        var = {"": pd.Categorical.from_codes(given, categories=names), "predicted": predicted[task]}
        var["n_cells"] = units.laid_out(n_cells, 0, "int32")
        parts["sd"] = units.laid_out(spread, np.nan, "float32")
        slots.write(done, params=params, varm=parts, var=var, uns=uns)
    else:
        done = _summary(units, tables, "macro_f1", f"{len(units):,} cells")
        over = "cells; cells of one donor are not replicates" if units.donor is None else "donors"
        is_same = units.donor is not None and len(np.unique(units.donor)) == params["n_splits"]
        draw = "hold out the same donors, one by one" if is_same else "draw the folds anew"
        uns["note"] = f"Intervals are over {over}. Standard deviations are over repeats, which {draw}."
        slots.write(done, params=params, obsm=parts, obs=predicted, uns=uns)


def predicted_classes(scores: np.ndarray, head: Head) -> dict[str, pd.Categorical]:
    """Find the most probable class in each task, `scores` `(n, n_logits)`; none where nothing was scored."""
    out = {}
    for task, part in head.slices.items():
        best = np.where(np.isnan(scores[:, part.start]), -1, np.nan_to_num(scores[:, part]).argmax(axis=1))
        out[task] = pd.Categorical.from_codes(best, categories=head.tasks[task])
    return out


def _summary(units: Units, tables: dict[str, pd.DataFrame], metric: str, what: str) -> str:
    """Say in a line what was classified, and how well."""
    table = tables["summary"]
    shown = table[(table["metric"] == metric) & (table["unit"] != "occurrence")]
    shown = shown[shown["n_cells"] == shown["n_cells"].max()]
    figures = "; ".join(
        f"{task}: " + ", ".join(f"{row.method.replace('_', ' ')} {row.mean:.2f}" for row in of_task.itertuples())
        for task, of_task in shown.groupby("task", sort=False)
    )
    held_out = "donors" if units.donor is not None else units.of
    return f"classified {what}; {metric.replace('_', ' ')} of held-out {held_out}: {figures}"
