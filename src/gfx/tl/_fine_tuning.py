"""How a classifier is trained, and what is left of it: scores of what was held out, so that a run can go on."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gfx._engine.classifier import Classifier, Head
    from gfx._engine.examples import LabelledCells
    from gfx.models import Model


#: What settles together when a network is judged and saved.
STRATEGIES = frozenset({"eval_steps", "eval_strategy", "load_best_model_at_end", "save_steps", "save_strategy"})


@dataclass(frozen=True)
class Recipe:
    """What is done in every training of a call.

    Parameters
    ----------
    model
        The pretrained model.
    freeze_layers
        Blocks that stay as they are, from the first on.
    adapter
        Low-rank adapters in place of all weights.
    n_trials
        Trials of a search for hyperparameters before each training; 0 for none.
    patience
        Passes without a lower loss on validation cells before it ends.
    training
        Arguments of the Trainer.
    """

    model: Model
    freeze_layers: int
    adapter: str | None = None
    n_trials: int = 0
    patience: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def noted(self) -> dict[str, Any]:
        """Tell what a result says of it."""
        return {
            "freeze_layers": self.freeze_layers,
            "adapter": self.adapter,
            "n_trials": self.n_trials or None,
            "patience": self.patience,
            "training": json.dumps(self.training, default=str, sort_keys=True) if self.training else None,
        }

    def check(self, of: Literal["genes", "cells"]) -> None:
        """Refuse what cannot be done before anything is computed, and before a folder is planned for it."""
        from gfx._engine.fine_tuning import arguments_for, check_adapter, check_search

        if not 0 <= self.freeze_layers <= self.model.n_blocks:
            msg = (
                f"`freeze_layers={self.freeze_layers}` is outside this model of {self.model.n_blocks} blocks: it is "
                "the number of blocks, from the first on, that stay as they are."
            )
            raise ValueError(msg)
        if self.adapter is not None and self.freeze_layers == self.model.n_blocks:
            msg = (
                f"`adapter={self.adapter!r}` goes beside the weights of blocks that learn, and `freeze_layers` freezes "
                f"all {self.model.n_blocks}. Freeze fewer, or leave `adapter` out."
            )
            raise ValueError(msg)
        check_adapter(self.adapter)
        check_search(self.n_trials)
        evaluates = of == "cells"  # of which some choose the best pass
        try:
            settings = arguments_for(
                Path(), 1, of=of, given=self.training, evaluates=evaluates, adapter=self.adapter, seed=0
            )
        except ValueError as error:
            strategies = sorted(STRATEGIES & set(self.training))
            if not strategies or str(error).startswith("`training`"):  # ours already, of a name that nothing has
                raise
            why = (
                "the pass that is best for some of the cells is kept, so each must be judged and saved alike"
                if evaluates
                else "genes are taught to the end, without any to judge by"
            )
            msg = f"`training` sets {strategies}, which does not go with the rest: {why}. Leave them out. ({error})"
            raise ValueError(msg) from error
        if not evaluates and settings.eval_strategy != "no":
            msg = "`training` sets 'eval_strategy'; genes are taught to the end, without any to judge by. Leave it out."
            raise ValueError(msg)

    def train(
        self,
        head: Head,
        cells: LabelledCells,
        place: Path,
        *,
        validation: LabelledCells | None,
        search: tuple[LabelledCells, LabelledCells] | None,
        class_weight: np.ndarray | None,
        seed: int,
        random: bool,
    ) -> Classifier:
        """Train one classifier, or go on where it was stopped.

        Parameters
        ----------
        search
            Cells to learn from and to judge by while hyperparameters are searched, none of them held out.
        random
            Start from random weights, and train them all: a random network that is frozen in part, or beside adapters,
            would be a weaker one to be held against.
        """
        from gfx._engine import fine_tuning

        adapter = None if random else self.adapter
        make = partial(self._make, head, class_weight=class_weight, seed=seed, random=random)
        vocabulary = self.model.vocabulary
        arguments = dict(self.training)
        if self.n_trials and search is not None:
            arguments |= self._hyperparameters(make, search, place, adapter, seed)
        return fine_tuning.fine_tune(
            make,
            cells,
            vocabulary,
            place,
            validation=validation,
            arguments=arguments,
            patience=self.patience,
            adapter=adapter,
            seed=seed,
        ).eval()

    def _make(self, head: Head, *, class_weight: np.ndarray | None, seed: int, random: bool) -> Classifier:
        from gfx._engine.classifier import freeze, make_classifier, weigh_classes

        model = make_classifier(
            self.model.weights, self.model.config, head, seed=seed, n_blocks=self.model.n_blocks, random=random
        )
        if not random:
            freeze(model, self.freeze_layers)
        if class_weight is not None:
            weigh_classes(model, class_weight)
        return model

    def _hyperparameters(
        self,
        make: Callable[[], Classifier],
        search: tuple[LabelledCells, LabelledCells],
        place: Path,
        adapter: str | None,
        seed: int,
    ) -> dict[str, Any]:
        from gfx._engine.fine_tuning import find_hyperparameters

        found = place / "hyperparameters.json"
        if not found.is_file():
            best = find_hyperparameters(
                make,
                *search,
                self.model.vocabulary,
                place / "search",
                arguments=self.training,
                n_trials=self.n_trials,
                adapter=adapter,
                seed=seed,
            )
            shutil.rmtree(place / "search", ignore_errors=True)
            place.mkdir(parents=True, exist_ok=True)
            found.write_text(json.dumps(best))
        return json.loads(found.read_text())


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
