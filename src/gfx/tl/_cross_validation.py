"""What every cross-validation of a classifier has in common."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from gfx import _log
from gfx.tl._fine_tuning import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gfx.models import Model
    from gfx.tl._prepare import Prepared

METHODS = ("fine_tune", "linear_probe")

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
    """Refuse to write a model over the one that it starts from."""
    if folder is not None and Path(folder).resolve() == model.folder.resolve():
        msg = f"`folder` is that of the model to start from, {model.name!r}, which would be lost. Give another one."
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
    freeze_layers: int | None,
    adapter: str | None,
    n_trials: int,
    patience: int | None,
    training: Mapping[str, Any] | None,
) -> Recipe:
    """Put together how networks are trained; refuse what cannot be done, or would do nothing."""
    recipe = Recipe(model, freeze_layers or 0, adapter, n_trials, patience, dict(training or {}))
    if method == "fine_tune":
        recipe.check()
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


def plan_of(
    cells: Prepared, rows: np.ndarray, params: Mapping[str, Any], training: Mapping[str, Any]
) -> dict[str, Any]:
    """Say which cells a folder is about, and with which settings; the version and what changes no result left out."""
    from gfx._engine.training import HARMLESS

    used = np.ascontiguousarray(cells.tokens.ids[np.sort(rows)])
    return {key: value for key, value in params.items() if key not in ("gfx_version", "training")} | {
        "training": {key: value for key, value in training.items() if key not in HARMLESS},
        "cells": hashlib.sha256(used.tobytes()).hexdigest(),
    }


def bar_of(total: int) -> tqdm:
    """Make a progress bar over all trainings."""
    return tqdm(total=total, desc="folds", unit="fit", leave=False, delay=1, disable=not _log.shows_progress())
