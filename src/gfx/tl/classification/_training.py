"""How a network is fine-tuned: choices that are settled for a model, and trainings that go on where they stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gfx._core.arguments import check_choice, check_whole
from gfx._core.manifest import write_whole
from gfx.models import FineTuning, LinearProbe

if TYPE_CHECKING:
    from collections.abc import Callable

    from gfx._engine.classifier import Classifier
    from gfx._engine.examples import LabelledCells
    from gfx.models import Model
    from gfx.tl.classification._units import Split, Units

Method = Literal["linear_probe", "fine_tune"] | FineTuning | LinearProbe

#: Methods by name, with their defaults.
METHODS = {"fine_tune": FineTuning(), "linear_probe": LinearProbe()}

#: Network layers that are trained when the first ones are frozen: in the paper two of six, for dosage sensitivity.
TRAINED_LAYERS = 2

#: Arguments that are settled together, because a network is saved when it is evaluated.
STRATEGIES = frozenset({"eval_steps", "eval_strategy", "load_best_model_at_end", "save_steps", "save_strategy"})


def settle_method(method: Method, model: Model, of: Literal["genes", "cells"]) -> FineTuning | LinearProbe:
    """Replace automatic choices by those for a model, for genes or cells; refuse what is not possible.

    Nothing has been computed then, and no folder has a plan yet.
    """
    if not isinstance(method, FineTuning | LinearProbe):
        check_choice(method, "method", METHODS)
        method = METHODS[method]
    check_choice(method.class_weight, "class_weight", (None, "balanced", *["auto"] * isinstance(method, FineTuning)))
    if isinstance(method, LinearProbe):
        return method
    named = {
        "learning_rate": method.learning_rate,
        "num_train_epochs": method.n_epochs,
        "per_device_train_batch_size": method.batch_size,
    }
    check_whole(method.batch_size, "batch_size", 1)
    if isinstance(method.n_epochs, str | bool) or (method.n_epochs is not None and not method.n_epochs > 0):
        msg = f"`n_epochs` is a number above 0, found {method.n_epochs!r}."
        raise (TypeError if isinstance(method.n_epochs, str | bool) else ValueError)(msg)
    settled = {"training": {name: value for name, value in named.items() if value is not None}}
    settled["training"] |= dict(method.training or {})
    if method.freeze_layers is None:
        settled["freeze_layers"] = max(model.n_layers - TRAINED_LAYERS, 0) if of == "genes" else 0
    if method.class_weight == "auto":
        settled["class_weight"] = None if of == "genes" else "balanced"
    if of == "genes":
        settled["patience"] = None
    method = replace(method, **settled)
    _check(method, model, of)
    return method


def _check(method: FineTuning, model: Model, of: Literal["genes", "cells"]) -> None:
    from gfx._engine.fine_tuning import arguments_for, check_adapter, check_search

    check_whole(method.n_trials, "n_trials", 0)
    if method.patience is not None:
        check_whole(method.patience, "patience", 1)
    if check_whole(method.freeze_layers, "freeze_layers") not in range(model.n_layers + 1):
        msg = (
            f"`freeze_layers={method.freeze_layers}` is outside this model of {model.n_layers} network layers: it is "
            "the number of layers, from the first on, that stay as they are."
        )
        raise ValueError(msg)
    if method.adapter is not None and method.freeze_layers == model.n_layers:
        msg = (
            f"`adapter={method.adapter!r}` adapts weights of layers that are trained, and `freeze_layers` freezes all "
            f"{model.n_layers}. Freeze fewer, or leave `adapter` out."
        )
        raise ValueError(msg)
    check_adapter(method.adapter)
    check_search(method.n_trials)
    evaluates = of == "cells"  # a validation set chooses the best pass
    how = {"of": of, "given": method.training, "evaluates": evaluates, "adapter": method.adapter, "seed": 0}
    try:
        settings = arguments_for(Path(), 1, **how)
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


@dataclass(frozen=True)
class FineTunedNetwork:
    """The network, trained with a head; held-out units are never labelled in training.

    As ``"random_weights"`` it starts from random weights, all of which are trained: a random network that is frozen in
    part, or adapted in part, would be a weaker control. `folder` holds trainings and finished scores.
    """

    name: Literal["model", "random_weights"]
    units: Units
    method: FineTuning
    folder: Path

    def predict(self, split: Split) -> np.ndarray:
        """Read the scores that a finished training left, or train; delete what the training no longer needs."""
        place = self.folder / f"seed{split.seed}" / f"fold{split.fold}" / f"{self.name}_{split.n_cells}"
        file = place.with_suffix(".npy")
        if not file.is_file():
            scores = self.units.scores(self.fit(split, place), split.held_out)
            file.parent.mkdir(parents=True, exist_ok=True)
            content = BytesIO()
            np.save(content, scores)
            write_whole(file, content.getvalue())
        shutil.rmtree(place, ignore_errors=True)  # also what a stopped call left
        return np.load(file)

    def fit(self, split: Split, place: Path) -> Classifier:
        """Train a classifier, or go on in a folder where a training was stopped."""
        from gfx._engine import fine_tuning

        method, units, train, search = self.method, self.units, split.train, None
        stops_early = units.of == "cells"
        if stops_early or method.n_trials:
            validates = units.validation_part(train, split.seed)
            if not validates.all():  # else none would be left to train on
                search = units.examples(train[~validates], split), units.examples(train[validates], split)
                train = train[~validates] if stops_early else train
        weights = None
        if method.class_weight is not None:
            weights = fine_tuning.class_weights(units.truth[train], list(units.head.slices.values()))
        vocabulary, arguments = units.prepared.model.vocabulary, dict(method.training)
        how = {"adapter": None if self.name == "random_weights" else method.adapter, "seed": split.seed}

        def make() -> Classifier:
            return self._start(weights, split.seed)

        if method.n_trials and search is not None:
            arguments |= self._hyperparameters(make, search, place, **how)
        examples, validation = search if stops_early and search else (units.examples(train, split), None)
        how |= {"validation": validation, "arguments": arguments, "patience": method.patience}
        return (
            fine_tuning.fine_tune(make, examples, vocabulary, place, **how).eval().requires_grad_(requires_grad=False)
        )

    def _start(self, class_weight: np.ndarray | None, seed: int) -> Classifier:
        from gfx._engine.classifier import freeze, make_classifier, weigh_classes

        model, random = self.units.prepared.model, self.name == "random_weights"
        how = {"seed": seed, "n_layers": model.n_layers, "random": random}
        classifier = make_classifier(model.weights, model.config, self.units.head, **how)
        if not random:
            freeze(classifier, self.method.freeze_layers)
        if class_weight is not None:
            weigh_classes(classifier, class_weight)
        return classifier

    def _hyperparameters(
        self, make: Callable[[], Classifier], search: tuple[LabelledCells, LabelledCells], place: Path, **how: Any
    ) -> dict[str, Any]:
        """Search hyperparameters, or read those that a stopped call found."""
        from gfx._engine.fine_tuning import find_hyperparameters

        file = place / "hyperparameters.json"
        if not file.is_file():
            how |= {"arguments": self.method.training, "n_trials": self.method.n_trials}
            best = find_hyperparameters(make, *search, self.units.prepared.model.vocabulary, place / "search", **how)
            shutil.rmtree(place / "search", ignore_errors=True)
            place.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(best))
        return json.loads(file.read_text())
