"""The folder of a trained classifier: weights, vocabulary, its training set, and a card with its performance."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gfx import _log
from gfx._core.checkpoint import read_json
from gfx._core.manifest import file_sha256, fingerprint, write_whole
from gfx.models import FineTuning, load
from gfx.models._plan import PLAN_FILE, keep_to_plan
from gfx.models._vocabulary_file import write_vocabulary
from gfx.tl.classification._units import HIDDEN_LAYER

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from gfx._engine.classifier import Classifier, Head
    from gfx._types import ModelLike
    from gfx.models import LinearProbe, Model
    from gfx.tl.classification._learners import LinearMethod
    from gfx.tl.classification._training import FineTunedNetwork
    from gfx.tl.classification._units import Units

#: Files with notes and the card, beside `config.json`; the first is written last.
NOTES_FILE, CARD_FILE = "classification.json", "README.md"

#: Where in a folder trainings lie that are not finished, and scores of those that are.
UNFINISHED = "runs"


def classification_params(units: Units, method: FineTuning | LinearProbe, **params: object) -> dict[str, Any]:
    """Note what was classified and how, for the record of a result or of a model."""
    prepared = units.prepared
    how = {**prepared.model.provenance(), **prepared.tokens.source, "n_cells": len(units.rows)}
    how |= {"class_weight": method.class_weight, **params}
    if isinstance(method, FineTuning):
        training = json.dumps(method.training, default=str, sort_keys=True) if method.training else None
        how |= {"method": "fine_tune", "dtype": "float32", "hidden_layer": -1, "training": training}
        how |= {name: getattr(method, name) for name in ("freeze_layers", "adapter", "patience")}
        how["n_trials"] = method.n_trials or None
    else:
        dtype = prepared.network(HIDDEN_LAYER).dtype
        how |= {"method": "linear_probe", "dtype": dtype, "hidden_layer": HIDDEN_LAYER}
    return how


# --- writing it -----------------------------------------------------------------------------------------------------


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
    if UNFINISHED in names:  # whose labels and settings are not known
        msg = (
            f"{place} has `{UNFINISHED}` of a run whose `{PLAN_FILE}` is gone. Give another folder; or delete "
            f"`{UNFINISHED}` as well, to begin anew."
        )
        raise ValueError(msg)
    if NOTES_FILE not in names:
        shown = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        msg = (
            f"{place} holds what no such call left, {shown}, and would be written over. Give a new or an empty folder."
        )
        raise ValueError(msg)


def keep_to_the_plan(
    folder: Path, units: Units, method: FineTuning | LinearProbe, params: Mapping[str, Any], **more: Any
) -> None:
    """Refuse to go on in a folder with other cells, labels or settings; other versions are a warning."""
    from gfx._engine.trainer import HARMLESS

    tokens, rows = units.prepared.tokens, np.sort(units.rows)
    training = method.training if isinstance(method, FineTuning) else {}
    parts = (units.where, np.ascontiguousarray(units.truth), units.donor)
    labels = b"".join(part.tobytes() for part in parts if part is not None)
    plan = {
        **params,
        "training": {key: value for key, value in training.items() if key not in HARMLESS},
        "cells": fingerprint(tokens.lengths[rows], (tokens[row] for row in rows)),
        "classes": units.tasks,
        "first": units.first,  # it decides the folds, and tasks are sorted by name
        "labels": hashlib.sha256(labels).hexdigest(),
        **more,
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
        _write(learner.fit(units.everything(rng), place), units, folder, params, summary)
        call = f"gfx.tl.predict_{units.of}(adata, {str(folder)!r})"
        _log.info(f"a model trained on all labels is in {folder}: `{call}`")
    shutil.rmtree(place, ignore_errors=True)  # also what a stopped call left


def _is_trained(folder: Path) -> bool:
    """Whether the model that the plan of a folder asks for is there."""
    try:
        content = read_json(folder / NOTES_FILE)
    except (FileNotFoundError, ValueError):  # or cut off: it is written anew
        return False
    return content.get("plan_sha256") == file_sha256(folder / PLAN_FILE)


def _write(
    classifier: Classifier, units: Units, folder: Path, params: Mapping[str, Any], summary: pd.DataFrame | None
) -> None:
    """Write everything that `gfx.models.load` and the functions that predict need, and what a reader wants to know."""
    from gfx._engine.classifier import save_classifier

    model = units.prepared.model
    folder.mkdir(parents=True, exist_ok=True)
    save_classifier(classifier, folder)
    write_vocabulary(model.vocabulary, folder)
    (folder / CARD_FILE).write_text(_card(units, params, summary), encoding="utf-8")
    training_set: dict[str, Any] = {"n_cells": len(units), "tasks": units.tasks}
    if units.of == "genes":
        (classes,) = units.tasks.values()
        ids = model.vocabulary.ids[units.where]
        training_set = {name: sorted(ids[units.truth[:, 0] == number]) for number, name in enumerate(classes)}
    notes = {
        "gfx_version": version("scgfx"),
        "plan_sha256": file_sha256(folder / PLAN_FILE),
        "start_from": model.provenance(),
        "taught": training_set,
        "params": dict(params),
        "summary": [] if summary is None else json.loads(summary.to_json(orient="records")),
    }
    write_whole(folder / NOTES_FILE, json.dumps(notes, indent=1))


def _card(units: Units, params: Mapping[str, Any], summary: pd.DataFrame | None) -> str:
    model, what = units.prepared.model, "genes in cells" if units.of == "genes" else "cells"
    tasks = "\n".join(f"- {task}: {', '.join(classes)}" for task, classes in units.tasks.items())
    performance = f"It was not evaluated; `gfx.tl.classify_{units.of}` does that by cross-validation.\n"
    if summary is not None:
        shown = summary[summary["n_cells"] == summary["n_cells"].max()]
        rows = "\n".join(
            f"| {row.task} | {row.unit} | {row.method} | {row.metric} | {row.mean:.3f}"
            + ("" if np.isnan(row.sd) else f" ± {row.sd:.3f}")
            + " |"
            for row in shown.itertuples()
        )
        performance = (
            "Cross-validated performance; the weights here were trained on all labels. Mean over folds, ± standard "
            f"deviation over repeats.\n\n| task | scored | method | measure | value |\n|---|---|---|---|---|\n{rows}\n"
        )
    return (
        f"# A classifier of {what}\n\n"
        f"Made by `gfx.{params['function']}` (gfx {params['gfx_version']}, {params['method']}) from {model.name!r}, "
        f"whose weights have the sha256 {model.weights_sha256}. It reads the vocabulary {model.vocabulary.name!r} "
        f"(sha256 {model.vocabulary.sha256}), which lies beside it.\n\n"
        f"Classes:\n\n{tasks}\n\n"
        f"{performance}\n"
        f"Use it with `gfx.tl.predict_{units.of}(adata, model=folder)`; labels and figures are in `{NOTES_FILE}`.\n"
    )


# --- reading it -----------------------------------------------------------------------------------------------------


def load_trained(model: ModelLike, of: Literal["genes", "cells"]) -> tuple[Model, Head, list[str]]:
    """Find a classifier, its head, and the genes that it was trained on, if these are listed beside it."""
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
    notes = loaded.folder / NOTES_FILE
    if of == "cells" or not notes.is_file():
        return loaded, head, []
    by_class = read_json(notes).get("taught")
    lists = list(by_class.values()) if isinstance(by_class, dict) else [None]
    if not all(isinstance(genes, list) and all(isinstance(gene, str) for gene in genes) for genes in lists):
        msg = f"{notes} does not list the genes of each class of the training. Copy or fetch it again, or delete it."
        raise ValueError(msg)
    return loaded, head, [gene for genes in lists for gene in genes]
