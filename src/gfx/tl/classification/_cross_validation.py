"""Cross-validation: every method in every fold of every repeat, and where its results go."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from gfx import _log
from gfx._core.evaluation import Evaluation
from gfx._core.folds import each_fold
from gfx._results import record
from gfx.tl.classification._learners import Learner, baselines
from gfx.tl.classification._trained import (
    UNFINISHED,
    classification_params,
    classifier_of,
    keep_to_the_plan,
    train_on_all,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gfx.models import FineTuning, LinearProbe
    from gfx.tl.classification._units import Cells, Genes, Units

CONTROLS = ("random_weights", "baselines")


@dataclass(frozen=True)
class CrossValidation:
    """What is run.

    Parameters
    ----------
    fold
        Fold in which each unit is held out, in each repeat, int16 `(n_repeats, n_units)`.
    sizes
        Numbers of training cells, all of them last.
    rng
        Seed of the first repeat; each other has the next one.
    """

    units: Units
    method: FineTuning | LinearProbe
    fold: np.ndarray
    sizes: list[int]
    controls: tuple[str, ...]
    rng: int

    def learners(self, folder: Path) -> list[Learner]:
        """Make the model, first, and what it is compared with."""
        names = ("model", *(name for name in ("random_weights",) if name in self.controls))
        learners: list[Learner] = [classifier_of(name, self.units, self.method, folder, self.rng) for name in names]
        if "baselines" in self.controls:
            learners += baselines(self.units, self.method.class_weight)  # as the model weighs classes
        return learners

    def evaluate(self, learners: list[Learner]) -> tuple[Evaluation, np.ndarray]:
        """Let every learner predict every fold.

        Returns
        -------
        What they predict; and the standard deviation of the model's scores over occurrences, `(n_units, n_logits)`,
        mean over repeats.
        """
        units, slices = self.units, self.units.head.slices
        truth = {task: units.classes_of(task) for task in units.tasks}
        evaluation = Evaluation(units.of.removesuffix("s"), units.tasks, truth, self.fold, units.donor)
        spread = np.zeros((len(units), units.head.n_logits))
        n_fits = sum(len(np.unique(of_repeat)) for of_repeat in self.fold) * len(learners) * len(self.sizes)
        bar = tqdm(total=n_fits, desc="folds", unit="fit", leave=False, delay=1, disable=not _log.shows_progress())
        with bar:
            for repeat, of_repeat in enumerate(self.fold):
                for number, is_train, _ in each_fold(of_repeat):
                    splits = units.splits(is_train, self.sizes, seed=self.rng + repeat, fold=number)
                    for learner in learners:
                        for n, split in zip(self.sizes, splits, strict=True):
                            scores = learner.predict(split)
                            mean, sd = units.over_occurrences(scores, split.held_out)
                            for task, part in slices.items():
                                place = {"task": task, "method": learner.name, "n_cells": n, "seed": repeat}
                                place |= {"fold": number}
                                if units.of == "genes":
                                    unit = units.unit[units.occurrences_of(split.held_out)]
                                    evaluation.add_occurrences(unit, scores[:, part], **place)
                                of_units = mean[split.held_out, part].astype(np.float32)
                                evaluation.add(split.held_out, of_units, **place)
                            if learner.name == "model" and n == self.sizes[-1]:
                                spread[split.held_out] += sd[split.held_out] / len(self.fold)
                            bar.update()
        return evaluation, spread


def cross_validate(
    units: Units,
    method: FineTuning | LinearProbe,
    *,
    controls: Sequence[str] | None,
    n_splits: int,
    n_repeats: int,
    learning_curve: Sequence[int] | None,
    folder: str | Path | None,
    rng: int,
    **params: object,
) -> None:
    """Classify genes or cells by cross-validation, and write what was found; with a folder, keep a model as well."""
    fold = np.stack([units.folds(n_splits, rng + repeat) for repeat in range(n_repeats)])
    sizes = units.training_sizes(learning_curve, fold)
    chosen = check_controls(controls)
    slots = units.prepared.slots
    how = {"n_splits": n_splits, "n_repeats": n_repeats, "rng": rng, **params}
    how = record(slots.function, **classification_params(units, method, **how))
    run = CrossValidation(units, method, fold, sizes, chosen, rng)
    with nullcontext(folder) if folder is not None else tempfile.TemporaryDirectory() as place:
        if folder is not None:
            keep_to_the_plan(Path(place), units, method, how, learning_curve=sizes, controls=chosen)
        learners = run.learners(Path(place) / UNFINISHED)
        evaluation, spread = run.evaluate(learners)
        tables = evaluation.tables(sizes[-1], np.random.default_rng(rng))
        if folder is not None:
            train_on_all(learners[0], Path(place), how, rng=rng, summary=tables["summary"])
    scores = np.hstack([evaluation.mean_probabilities(task, "model", sizes[-1]) for task in units.tasks])
    write = _write_genes if units.of == "genes" else _write_cells
    write(run, scores, spread, tables, how)


def check_controls(controls: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the controls, in our order."""
    given = () if controls is None else (controls,) if isinstance(controls, str) else tuple(controls)
    unknown = [name for name in given if name not in CONTROLS]
    if unknown:
        msg = f"`controls` are of {list(CONTROLS)}, or `None`; found {unknown}."
        raise ValueError(msg)
    return tuple(name for name in CONTROLS if name in given)


# --- results --------------------------------------------------------------------------------------------------------


def _write_genes(
    run: CrossValidation, scores: np.ndarray, spread: np.ndarray, tables: dict[str, pd.DataFrame], params: dict
) -> None:
    genes: Genes = run.units
    prepared = genes.prepared
    ((task, names),) = genes.tasks.items()

    def by_gene(tokens: np.ndarray, values: np.ndarray, fill: float, dtype: str) -> np.ndarray:
        """Lay out values of some tokens over the genes of the AnnData."""
        out = np.full((len(prepared.model.vocabulary) + 1, *values.shape[1:]), fill)
        out[tokens] = values
        return out[prepared.gene_tokens].astype(dtype)  # an unknown gene, -1, finds the row behind the last token

    n_cells = np.bincount(genes.unit, minlength=len(genes))
    given = by_gene(*genes.given, -1.0, "int64")
    predicted = by_gene(genes.where, scores.argmax(axis=1), -1.0, "int64")
    prepared.slots.write(
        _summary(run, tables, "auc"),
        params=params,
        varm={
            "": by_gene(genes.where, scores, np.nan, "float32"),
            "sd": by_gene(genes.where, spread, np.nan, "float32"),
            "fold": by_gene(genes.where, run.fold.T, -1.0, "int16"),
        },
        var={
            "": pd.Categorical.from_codes(given, categories=names),
            "predicted": pd.Categorical.from_codes(predicted, categories=names),
            "n_cells": by_gene(genes.where, n_cells, 0.0, "int32"),
        },
        uns={
            "tasks": {task: np.array(names, dtype=object)},
            **tables,
            "note": (
                "Intervals are over genes; standard deviations over repeats, which draw the folds anew. Per "
                "occurrence, genes that more cells have count more."
            ),
        },
    )


def _write_cells(
    run: CrossValidation, scores: np.ndarray, _spread: np.ndarray, tables: dict[str, pd.DataFrame], params: dict
) -> None:
    cells: Cells = run.units
    n_obs = cells.prepared.adata.n_obs

    def by_cell(values: np.ndarray, fill: float, dtype: str) -> np.ndarray:
        """Lay out values of the classified cells over all."""
        out = np.full((n_obs, values.shape[1]), fill, dtype=dtype)
        out[cells.where] = values
        return out

    of_cells = by_cell(scores, np.nan, "float32")
    units = "cells; cells of one donor are no replicates" if cells.donor is None else "donors"
    is_same = cells.donor is not None and len(np.unique(cells.donor)) == params["n_splits"]
    draw = "hold out the same donors, one by one" if is_same else "draw the folds anew"
    cells.prepared.slots.write(
        _summary(run, tables, "macro_f1"),
        params=params,
        obsm={"": of_cells, "fold": by_cell(run.fold.T, -1, "int16")},
        obs=predicted_classes(of_cells, cells.tasks, cells.head.slices),
        uns={
            "tasks": {task: np.array(classes, dtype=object) for task, classes in cells.tasks.items()},
            **tables,
            "note": f"Intervals are over {units}. Standard deviations are over repeats, which {draw}.",
        },
    )


def predicted_classes(
    scores: np.ndarray, tasks: dict[str, list[str]], slices: dict[str, slice]
) -> dict[str, pd.Categorical]:
    """Find the most probable class in each task; none where nothing was scored."""
    out = {}
    for task, part in slices.items():
        best = np.where(np.isnan(scores[:, part][:, 0]), -1, np.nan_to_num(scores[:, part]).argmax(axis=1))
        out[task] = pd.Categorical.from_codes(best, categories=tasks[task])
    return out


def _summary(run: CrossValidation, tables: dict[str, pd.DataFrame], metric: str) -> str:
    """Say in a line what was classified, and how well."""
    units, summary = run.units, tables["summary"]
    full = summary[(summary["n_cells"] == run.sizes[-1]) & (summary["metric"] == metric)]
    full = full[full["unit"] != "occurrence"]
    figures = "; ".join(
        f"{task}: " + ", ".join(f"{row.method.replace('_', ' ')} {row.mean:.2f}" for row in of_task.itertuples())
        for task, of_task in full.groupby("task", sort=False)
    )
    what = f"{len(units):,} genes in {len(units.rows):,} cells" if units.of == "genes" else f"{len(units):,} cells"
    held_out = "donors" if units.donor is not None else units.of
    return f"classified {what}; {metric.replace('_', ' ')} of held-out {held_out}: {figures}"
