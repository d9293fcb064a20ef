"""What every cross-validation of a classifier has in common."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm.auto import tqdm

from gfx import _log
from gfx.models._plan import PLAN_FILE, keep_to_plan
from gfx.tl._fine_tuning import Recipe
from gfx.tl._trained_model import TEACHING_FILE, is_taught, write_trained

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from transformers import BertModel

    from gfx._engine.classifier import Classifier, Head
    from gfx.models import Model

METHODS = ("fine_tune", "linear_probe")

#: Class of a gene or cell that has none, as the loss of the network knows it.
NOTHING = -100

#: Which states a linear head reads: those that embed cells.
HIDDEN_LAYER = -2

#: Where in a folder trainings lie that are not finished, and scores of those that are.
UNFINISHED = "runs"

_LEAST = {"n_splits": 2, "n_seeds": 1, "max_cells": 2, "n_trials": 0, "patience": 1, "rng": 0}


def check_numbers(**given: int | None) -> None:
    """Refuse numbers that leave nothing to do."""
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            msg = f"`{name}` is a whole number, found {value!r}."
            raise TypeError(msg)
        if value < _LEAST[name]:
            msg = f"`{name}` is {_LEAST[name]} or more, found {value}."
            raise ValueError(msg)


def check_folder(folder: str | Path | None, model: Model) -> None:
    """Refuse to write a model over the one that it starts from, and over anything that no such call left."""
    if folder is None:
        return
    place = Path(folder)
    if place.resolve() == model.folder.resolve():
        msg = f"`folder` is that of the model to start from, {model.name!r}, which would be lost. Give another one."
        raise ValueError(msg)
    if place.exists() and not place.is_dir():
        msg = f"`folder={str(folder)!r}` is a file. Give a folder."
        raise ValueError(msg)
    found = sorted(path.name for path in place.iterdir()) if place.exists() else []
    if PLAN_FILE in found or not found:
        return
    if UNFINISHED in found:  # scores in there are of who knows which run
        msg = (
            f"{place} has `{UNFINISHED}` of a run whose `{PLAN_FILE}` is gone. Give another folder; or delete "
            f"`{UNFINISHED}` as well, to begin anew."
        )
        raise ValueError(msg)
    if TEACHING_FILE not in found:
        shown = f"{', '.join(found[:5])}{', ...' if len(found) > 5 else ''}"
        msg = (
            f"{place} holds what no such call left, {shown}, and would be written over. Give a new or an empty folder."
        )
        raise ValueError(msg)


def precision(method: str) -> str:
    """Say in which precision states are computed: those under a linear head where it is fast, else in float32."""
    from gfx._engine.device import choose_device, choose_dtype

    dtype = choose_dtype("float32" if method == "fine_tune" else None, choose_device(None))
    return str(dtype).removeprefix("torch.")


def settle_recipe(
    model: Model,
    method: str,
    *,
    of: Literal["genes", "cells"],
    freeze_layers: int | None,
    adapter: str | None,
    n_trials: int,
    patience: int | None,
    training: Mapping[str, Any] | None,
) -> Recipe:
    """Put together how networks are trained; refuse what cannot be done, or would do nothing."""
    recipe = Recipe(model, freeze_layers or 0, adapter, n_trials, patience, dict(training or {}))
    if method == "fine_tune":
        recipe.check(of)
    elif adapter is not None or n_trials or training or freeze_layers:
        msg = "`adapter`, `n_trials`, `training` and `freeze_layers` are for `method='fine_tune'`."
        raise ValueError(msg)
    return recipe


def sizes(learning_curve: Sequence[int] | None, n_cells: int, most: int) -> list[int]:
    """Numbers of cells to learn from, ascending; the last one, `n_cells`, is all of them.

    Parameters
    ----------
    most
        What every fold has to learn from.

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


@dataclass(frozen=True)
class Run:
    """What is run; genes and cells each have their own way to learn and to tell.

    Parameters
    ----------
    task
        What is classified, in which cells.
    n_cells
        Numbers of cells to learn from, the full one last.
    """

    task: Any
    method: str
    recipe: Recipe
    n_cells: list[int]
    baselines: bool
    rng: int

    @property
    def head(self) -> Head:
        """What the model tells."""
        raise NotImplementedError

    def labels(self) -> dict[str, Any]:
        """Say what is learnt, for the plan of a folder."""
        raise NotImplementedError

    def taught(self) -> dict[str, Any]:
        """Say what the model has learnt, for who uses it."""
        raise NotImplementedError

    def teach(self, learner: Any, place: Path) -> Classifier:
        """Teach a learner, the model, with all labels."""
        raise NotImplementedError

    def encoder(self, random_seed: int | None = None) -> BertModel:
        """Load the blocks under a linear head; or a network like them with random weights, of a seed."""
        from gfx._engine.encoder import random_twin

        cells = self.task.cells
        encoder = cells.encoder(HIDDEN_LAYER)
        return encoder if random_seed is None else random_twin(encoder, cells.model.config, random_seed)

    def keep_to_plan(self, folder: Path, params: Mapping[str, Any]) -> None:
        """Refuse to go on in a folder with other cells, labels or settings; the version may be another."""
        from gfx._engine.training import HARMLESS

        used = np.ascontiguousarray(self.task.cells.tokens.ids[np.sort(self.task.rows)])
        plan = {key: value for key, value in params.items() if key not in ("gfx_version", "training")} | {
            "training": {key: value for key, value in self.recipe.training.items() if key not in HARMLESS},
            "cells": hashlib.sha256(used.tobytes()).hexdigest(),
            "learning_curve": self.n_cells,
            "baselines": self.baselines,
        }
        keep_to_plan(folder, plan | self.labels(), unfinished=UNFINISHED)

    def teach_all(self, learner: Any, folder: Path, summary: pd.DataFrame, params: Mapping[str, Any]) -> None:
        """Teach the model with all labels and keep it, unless it is there."""
        place = folder / UNFINISHED / "all_labels"
        if not is_taught(folder):
            classifier = self.teach(learner, place)
            taught = self.taught()
            write_trained(classifier, self.recipe.model, folder, taught=taught, summary=summary, params=params)
            call = f"gfx.tl.predict_{self.head.of}(adata, {str(folder)!r})"
            _log.info(f"a model taught with all labels is in {folder}: `{call}`")
        shutil.rmtree(place, ignore_errors=True)  # also what a stopped call left


def bar_of(total: int) -> tqdm:
    """Make a progress bar over all trainings."""
    return tqdm(total=total, desc="folds", unit="fit", leave=False, delay=1, disable=not _log.shows_progress())
