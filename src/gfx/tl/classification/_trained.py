"""The folder of a trained classifier: weights, vocabulary, what it was trained on, and a card with what it is worth."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gfx import _log
from gfx._settings import settings
from gfx.models import FineTuning, load
from gfx.models._plan import PLAN_FILE, keep_to_plan
from gfx.models._registry import file_sha256
from gfx.models._vocabulary_file import write_vocabulary
from gfx.tl.classification._learners import FineTunedNetwork, LinearMethod, mean_states
from gfx.tl.classification._training import method_params

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from transformers import BertModel

    from gfx._core.linear_head import LinearHead
    from gfx._engine.classifier import Classifier
    from gfx.models import LinearProbe, Model
    from gfx.tl._prepare import Prepared
    from gfx.tl.classification._units import Units

#: What a folder says of itself, beside `config.json`; the first is written last.
TEACHING_FILE, CARD_FILE = "classification.json", "README.md"

#: Where in a folder trainings lie that are not finished, and scores of those that are.
UNFINISHED = "runs"

#: Which states a linear head reads: those that embed cells.
HIDDEN_LAYER = -2


# --- how a classifier is made ---------------------------------------------------------------------------------------


def classifier_of(
    name: Literal["model", "random_weights"], units: Units, method: FineTuning | LinearProbe, folder: Path, rng: int
) -> FineTunedNetwork | LinearMethod:
    """Make what learns by a method: from the pretrained network, or, as a control, from one of random weights."""
    is_random = name == "random_weights"
    if isinstance(method, FineTuning):
        return FineTunedNetwork(name, units, method, folder, random=is_random)
    computed: dict[int | None, np.ndarray] = {}

    def states(seed: int) -> np.ndarray:
        """Compute states once for all folds of a seed."""
        random_seed = None if not is_random else seed if units.redraws_weights else rng
        if random_seed not in computed:
            computed.clear()
            computed[random_seed] = units.states(_encoder(units.prepared, random_seed), ", random weights" * is_random)
        return computed[random_seed]

    return LinearMethod(name, units, mean_states(units, states), method.class_weight)


def _encoder(prepared: Prepared, random_seed: int | None) -> BertModel:
    """Load the layers under a linear head; or a network like them with random weights."""
    from gfx._engine.encoder import random_twin

    encoder = prepared.encoder(HIDDEN_LAYER)
    return encoder if random_seed is None else random_twin(encoder, prepared.model.config, random_seed)


def _with_linear_head(units: Units, heads: list[LinearHead]) -> Classifier:
    """Put fitted weights upon the layers that they were fitted on."""
    from gfx._engine.classifier import make_classifier, set_head
    from gfx._engine.encoder import blocks_needed

    model = units.prepared.model
    n_blocks = blocks_needed(HIDDEN_LAYER, model.n_blocks)
    classifier = make_classifier(model.weights, model.config, units.head, seed=0, n_blocks=n_blocks)
    set_head(classifier, *(np.concatenate([getattr(head, part) for head in heads]) for part in ("weight", "bias")))
    return classifier


def classification_params(units: Units, method: FineTuning | LinearProbe, **params: object) -> dict[str, Any]:
    """Say what was classified and how, for the record of a result or of a model."""
    from gfx._engine.device import choose_device, choose_dtype

    is_tuned = isinstance(method, FineTuning)
    # States under a linear head are computed in bfloat16 where it is fast.
    dtype = choose_dtype("float32" if is_tuned else settings.dtype, choose_device())
    return {
        **units.prepared.model.provenance(),
        **units.prepared.tokens.source,
        "dtype": str(dtype).removeprefix("torch."),
        "n_cells": len(units.rows),
        "hidden_layer": -1 if is_tuned else HIDDEN_LAYER,
        **method_params(method),
        **params,
    }


# --- its folder -----------------------------------------------------------------------------------------------------


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
    names = sorted(path.name for path in place.iterdir()) if place.exists() else []
    if PLAN_FILE in names or not names:
        return
    if UNFINISHED in names:  # scores in there are of who knows which run
        msg = (
            f"{place} has `{UNFINISHED}` of a run whose `{PLAN_FILE}` is gone. Give another folder; or delete "
            f"`{UNFINISHED}` as well, to begin anew."
        )
        raise ValueError(msg)
    if TEACHING_FILE not in names:
        shown = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        msg = (
            f"{place} holds what no such call left, {shown}, and would be written over. Give a new or an empty folder."
        )
        raise ValueError(msg)


def keep_to_the_plan(
    folder: Path, units: Units, method: FineTuning | LinearProbe, params: Mapping[str, Any], **more: Any
) -> None:
    """Refuse to go on in a folder with other cells, labels or settings; other versions are a warning."""
    import hashlib

    from gfx._engine.trainer import HARMLESS

    used = np.ascontiguousarray(units.prepared.tokens.ids[np.sort(units.rows)])
    training = method.training if isinstance(method, FineTuning) else {}
    plan = {
        **params,
        "training": {key: value for key, value in training.items() if key not in HARMLESS},
        "cells": hashlib.sha256(used.tobytes()).hexdigest(),
        **more,
        **units.plan(),
    }
    keep_to_plan(folder, plan, unfinished=UNFINISHED)


def train_on_all(
    learner: FineTunedNetwork | LinearMethod,
    folder: Path,
    params: Mapping[str, Any],
    *,
    rng: int,
    summary: pd.DataFrame | None = None,
) -> None:
    """Train the model on all labels and keep it, unless it is there."""
    units, place = learner.units, folder / UNFINISHED / "all_labels"
    if not _is_trained(folder):
        split = units.everything(rng)
        is_tuned = isinstance(learner, FineTunedNetwork)
        classifier = learner.fit(split, place) if is_tuned else _with_linear_head(units, learner.fit(split))
        _write_trained(classifier, units, folder, params, summary)
        call = f"gfx.tl.predict_{units.of}(adata, {str(folder)!r})"
        _log.info(f"a model trained on all labels is in {folder}: `{call}`")
    shutil.rmtree(place, ignore_errors=True)  # also what a stopped call left


def _is_trained(folder: Path) -> bool:
    """Whether the model that the plan of a folder asks for is there."""
    teaching = folder / TEACHING_FILE
    if not teaching.is_file():
        return False
    try:
        content = json.loads(teaching.read_text(encoding="utf-8"))
    except ValueError:  # cut off: it is written anew
        return False
    return content.get("plan_sha256") == file_sha256(folder / PLAN_FILE)


def _write_trained(
    classifier: Classifier, units: Units, folder: Path, params: Mapping[str, Any], summary: pd.DataFrame | None
) -> None:
    """Write everything that `gfx.models.load` and the functions that predict need, and what a reader wants to know."""
    from gfx._engine.classifier import save_classifier

    model = units.prepared.model
    folder.mkdir(parents=True, exist_ok=True)
    save_classifier(classifier, folder)
    write_vocabulary(model.vocabulary, folder)
    (folder / CARD_FILE).write_text(_card(units, model, params, summary), encoding="utf-8")
    teaching = {
        "gfx_version": version("scgfx"),
        "plan_sha256": file_sha256(folder / PLAN_FILE),
        "start_from": model.provenance(),
        "taught": units.taught(),
        "params": dict(params),
        "summary": [] if summary is None else json.loads(summary.to_json(orient="records")),
    }
    part = folder / f"{TEACHING_FILE}.part"
    part.write_text(json.dumps(teaching, indent=1, default=_plain), encoding="utf-8")
    part.replace(folder / TEACHING_FILE)  # there as a whole, or not at all


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _card(units: Units, model: Model, params: Mapping[str, Any], summary: pd.DataFrame | None) -> str:
    what = "genes in cells" if units.of == "genes" else "cells"
    tasks = "\n".join(f"- {task}: {', '.join(classes)}" for task, classes in units.tasks.items())
    return (
        f"# A classifier of {what}\n\n"
        f"Made by `gfx.{params['function']}` (gfx {params['gfx_version']}, {params['method']}) from {model.name!r}, "
        f"whose weights have the sha256 {model.weights_sha256}. It reads the vocabulary {model.vocabulary.name!r} "
        f"(sha256 {model.vocabulary.sha256}), which lies beside it.\n\n"
        f"Classes:\n\n{tasks}\n\n"
        f"{_worth(units.of, summary)}\n"
        f"Use it with `gfx.tl.predict_{units.of}(adata, model=folder)`; labels and figures are in `{TEACHING_FILE}`.\n"
    )


def _worth(of: str, summary: pd.DataFrame | None) -> str:
    if summary is None:
        return f"It was not evaluated; `gfx.tl.classify_{of}` does that by cross-validation.\n"
    shown = summary[summary["n_cells"] == summary["n_cells"].max()]
    rows = "\n".join(
        f"| {row.task} | {row.unit} | {row.method} | {row.metric} | {_figure(row.mean, row.sd)} |"
        for row in shown.itertuples()
    )
    return (
        "Cross-validated performance; the weights here were trained on all labels. Mean over folds, ± standard "
        f"deviation over repeats.\n\n| task | scored | method | measure | value |\n|---|---|---|---|---|\n{rows}\n"
    )


def _figure(mean: float, sd: float) -> str:
    return f"{mean:.3f}" if np.isnan(sd) else f"{mean:.3f} ± {sd:.3f}"


# --- reading it -----------------------------------------------------------------------------------------------------


def load_trained(model: str | Path | Model, of: Literal["genes", "cells"]) -> tuple[Model, dict[str, Any]]:
    """Find a classifier, and what it was trained on, if that lies beside it.

    Raises
    ------
    ValueError
        A model without a head, or with one for the other.
    """
    from gfx._engine.classifier import head_of

    loaded = load(model)
    head = head_of(loaded.config)
    if head is None:
        msg = (
            f"{loaded.name!r} has no head that classifies. Train one with `gfx.models.fine_tune_{of}(adata, ..., "
            f"folder)` or `gfx.tl.classify_{of}(adata, ..., folder=...)`, and give its folder."
        )
        raise ValueError(msg)
    if head.of != of:
        msg = f"{loaded.name!r} classifies {head.of}, not {of}. Use `gfx.tl.predict_{head.of}(adata, model)`."
        raise ValueError(msg)
    teaching = loaded.folder / TEACHING_FILE
    return loaded, json.loads(teaching.read_text(encoding="utf-8")) if teaching.is_file() else {}


def load_network(model: Model) -> Classifier:
    """Load a classifier where and in the precision that settings say."""
    from gfx._engine.classifier import load_classifier
    from gfx._engine.device import choose_device, choose_dtype

    device = choose_device()
    return load_classifier(model.weights, model.config, device=device, dtype=choose_dtype(settings.dtype, device))
