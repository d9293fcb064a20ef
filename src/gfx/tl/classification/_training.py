"""How a classifier is trained, and what is left of it: scores of what was held out, so that a run can go on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gfx._core.seeds import check_whole
from gfx.models import FineTuning, LinearProbe
from gfx.tl._prepare import check_choice

if TYPE_CHECKING:
    from collections.abc import Callable

    from gfx._engine.classifier import Classifier, Head
    from gfx._engine.examples import LabelledCells
    from gfx.models import Model
    from gfx.tl.classification._units import Split, Units

Method = Literal["linear_probe", "fine_tune"] | FineTuning | LinearProbe

#: Methods by name, with their defaults.
METHODS = {"fine_tune": FineTuning(), "linear_probe": LinearProbe()}

#: Network layers that are trained when the first ones are frozen: in the paper two of six, for dosage sensitivity.
TRAINED_LAYERS = 2

#: What settles together when a network is evaluated and saved.
STRATEGIES = frozenset({"eval_steps", "eval_strategy", "load_best_model_at_end", "save_steps", "save_strategy"})


def settle_method(method: Method, model: Model, of: Literal["genes", "cells"]) -> FineTuning | LinearProbe:
    """Replace automatic choices by those for a model, for genes or cells; refuse what cannot be done.

    Nothing has been computed then, and no folder has a plan yet.
    """
    if not isinstance(method, FineTuning | LinearProbe):
        check_choice("method", method, tuple(METHODS))
        method = METHODS[method]
    check_choice("class_weight", method.class_weight, (None, "balanced", *["auto"] * isinstance(method, FineTuning)))
    if isinstance(method, LinearProbe):
        return method
    automatic = {"freeze_layers": 0, "class_weight": "balanced"}
    if of == "genes":
        automatic = {"freeze_layers": max(model.n_blocks - TRAINED_LAYERS, 0), "class_weight": None}
    settled = {
        "freeze_layers": automatic["freeze_layers"] if method.freeze_layers is None else method.freeze_layers,
        "class_weight": automatic["class_weight"] if method.class_weight == "auto" else method.class_weight,
        "patience": None if of == "genes" else method.patience,
        "training": _trainer_arguments(method),
    }
    method = replace(method, **settled)
    _check(method, model, of)
    return method


def _trainer_arguments(method: FineTuning) -> dict[str, Any]:
    """Arguments of the Trainer that are not the defaults."""
    named = {
        "learning_rate": method.learning_rate,
        "num_train_epochs": method.n_epochs,
        "per_device_train_batch_size": method.batch_size,
    }
    return {name: value for name, value in named.items() if value is not None} | dict(method.training or {})


def _check(method: FineTuning, model: Model, of: Literal["genes", "cells"]) -> None:
    from gfx._engine.fine_tuning import arguments_for, check_adapter, check_search

    check_whole(method.n_trials, "n_trials", 0)
    if method.patience is not None:
        check_whole(method.patience, "patience", 1)
    if not 0 <= method.freeze_layers <= model.n_blocks:
        msg = (
            f"`freeze_layers={method.freeze_layers}` is outside this model of {model.n_blocks} network layers: it is "
            "the number of layers, from the first on, that stay as they are."
        )
        raise ValueError(msg)
    if method.adapter is not None and method.freeze_layers == model.n_blocks:
        msg = (
            f"`adapter={method.adapter!r}` adapts weights of layers that are trained, and `freeze_layers` freezes all "
            f"{model.n_blocks}. Freeze fewer, or leave `adapter` out."
        )
        raise ValueError(msg)
    check_adapter(method.adapter)
    check_search(method.n_trials)
    evaluates = of == "cells"  # of which some choose the best pass
    try:
        settings = arguments_for(
            Path(), 1, of=of, given=method.training, evaluates=evaluates, adapter=method.adapter, seed=0
        )
    except ValueError as error:
        strategies = sorted(STRATEGIES & set(method.training))
        if not strategies or str(error).startswith("`training`"):  # ours already, of a name that nothing has
            raise
        why = (
            "the pass that is best for the validation set is kept, so each must be evaluated and saved alike"
            if evaluates
            else "genes are trained to the end, without a validation set"
        )
        msg = f"`training` sets {strategies}, which does not go with the rest: {why}. Leave them out. ({error})"
        raise ValueError(msg) from error
    if not evaluates and settings.eval_strategy != "no":
        msg = "`training` sets 'eval_strategy'; genes are trained to the end, without a validation set. Leave it out."
        raise ValueError(msg)


def method_params(method: FineTuning | LinearProbe) -> dict[str, Any]:
    """Say how a classifier is trained, for the record of a result."""
    params: dict[str, Any] = {"method": "linear_probe", "class_weight": method.class_weight}
    if isinstance(method, FineTuning):
        arguments = json.dumps(method.training, default=str, sort_keys=True) if method.training else None
        params |= {
            "method": "fine_tune",
            "freeze_layers": method.freeze_layers,
            "adapter": method.adapter,
            "n_trials": method.n_trials or None,
            "patience": method.patience,
            "training": arguments,
        }
    return params


def train_classifier(method: FineTuning, units: Units, split: Split, place: Path, *, random: bool) -> Classifier:
    """Train one classifier, or go on where it was stopped.

    Parameters
    ----------
    random
        Start from random weights, and train them all: a random network that is frozen in part, or adapted in part,
        would be a weaker control.
    """
    from gfx._engine import fine_tuning

    train, search = split.train, None
    if units.stops_early or method.n_trials:
        judges = units.validation_part(train, split.seed)
        if not judges.all():  # else none would be left to train on
            search = units.examples(train[~judges], split), units.examples(train[judges], split)
            train = train[~judges] if units.stops_early else train
    model, vocabulary = units.prepared.model, units.prepared.model.vocabulary
    weights = None
    if method.class_weight is not None:
        weights = fine_tuning.class_weights(units.truth[train], list(units.head.slices.values()))
    how = {"adapter": None if random else method.adapter, "seed": split.seed}
    make = partial(_make, method, model, units.head, class_weight=weights, seed=split.seed, random=random)
    arguments = dict(method.training)
    if method.n_trials and search is not None:
        arguments |= _hyperparameters(method, make, search, vocabulary, place, **how)
    examples, validation = search if units.stops_early and search else (units.examples(train, split), None)
    return fine_tuning.fine_tune(
        make,
        examples,
        vocabulary,
        place,
        validation=validation,
        arguments=arguments,
        patience=method.patience,
        **how,
    ).eval()


def _make(
    method: FineTuning, model: Model, head: Head, *, class_weight: np.ndarray | None, seed: int, random: bool
) -> Classifier:
    from gfx._engine.classifier import freeze, make_classifier, weigh_classes

    classifier = make_classifier(model.weights, model.config, head, seed=seed, n_blocks=model.n_blocks, random=random)
    if not random:
        freeze(classifier, method.freeze_layers)
    if class_weight is not None:
        weigh_classes(classifier, class_weight)
    return classifier


def _hyperparameters(
    method: FineTuning,
    make: Callable[[], Classifier],
    search: tuple[LabelledCells, LabelledCells],
    vocabulary: Any,
    place: Path,
    **how: Any,
) -> dict[str, Any]:
    """Search hyperparameters, or read those that a stopped call found."""
    from gfx._engine.fine_tuning import find_hyperparameters

    file = place / "hyperparameters.json"
    if not file.is_file():
        arguments = {"arguments": method.training, "n_trials": method.n_trials}
        best = find_hyperparameters(make, *search, vocabulary, place / "search", **arguments, **how)
        shutil.rmtree(place / "search", ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(best))
    return json.loads(file.read_text())


def kept(place: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Read the scores that a finished training left, or compute them, and delete what the training needs no more."""
    file = place.with_suffix(".npy")
    if not file.is_file():
        scores = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        with part.open("wb") as out:
            np.save(out, scores)
        part.replace(file)  # there as a whole, or not at all
    shutil.rmtree(place, ignore_errors=True)  # also what a stopped call left
    return np.load(file)
