"""The folder of a trained classifier: weights, vocabulary, what it was taught, and a card with what it is worth."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gfx.models import load
from gfx.models._plan import PLAN_FILE
from gfx.models._registry import file_sha256
from gfx.models._vocabulary_file import write_vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pandas as pd

    from gfx._core.linear_head import LinearHead
    from gfx._engine.classifier import Classifier, Head
    from gfx.models import Model
    from gfx.tl._prepare import Prepared

#: What a folder says of itself, beside `config.json`; the first is written last.
TEACHING_FILE, CARD_FILE = "classification.json", "README.md"


def is_taught(folder: Path) -> bool:
    """Whether the model that the plan of a folder asks for is there."""
    teaching = folder / TEACHING_FILE
    if not teaching.is_file():
        return False
    try:
        told = json.loads(teaching.read_text(encoding="utf-8"))
    except ValueError:  # cut off: it is written anew
        return False
    return told.get("plan_sha256") == file_sha256(folder / PLAN_FILE)


def with_linear_head(cells: Prepared, head: Head, linear: LinearHead, hidden_layer: int) -> Classifier:
    """Put fitted weights upon the blocks that they were fitted on."""
    from gfx._engine.classifier import make_classifier, set_head
    from gfx._engine.encoder import blocks_needed

    model = cells.model
    n_blocks = blocks_needed(hidden_layer, model.n_blocks)
    classifier = make_classifier(model.weights, model.config, head, seed=0, n_blocks=n_blocks)
    set_head(classifier, linear.weight, linear.bias)
    return classifier


def write_trained(
    classifier: Classifier,
    model: Model,
    folder: Path,
    *,
    taught: Mapping[str, Any],
    summary: pd.DataFrame,
    params: Mapping[str, Any],
) -> None:
    """Write everything that `gfx.models.load` and the functions that predict need, and what a reader wants to know."""
    from gfx._engine.classifier import save_classifier

    folder.mkdir(parents=True, exist_ok=True)
    save_classifier(classifier, folder)
    write_vocabulary(model.vocabulary, folder)
    (folder / CARD_FILE).write_text(_card(classifier.head, model, summary, params), encoding="utf-8")
    teaching = {
        "gfx_version": version("scgfx"),
        "plan_sha256": file_sha256(folder / PLAN_FILE),
        "start_from": model.provenance(),
        "taught": taught,
        "params": dict(params),
        "summary": json.loads(summary.to_json(orient="records")),
    }
    part = folder / f"{TEACHING_FILE}.part"
    part.write_text(json.dumps(teaching, indent=1, default=_plain), encoding="utf-8")
    part.replace(folder / TEACHING_FILE)  # there as a whole, or not at all


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _card(head: Head, model: Model, summary: pd.DataFrame, params: Mapping[str, Any]) -> str:
    what = "genes in cells" if head.of == "genes" else "cells"
    tasks = "\n".join(f"- {task}: {', '.join(classes)}" for task, classes in head.tasks.items())
    shown = summary[summary["n_cells"] == summary["n_cells"].max()]
    rows = "\n".join(
        f"| {row.task} | {row.unit} | {row.method} | {row.metric} | {_figure(row.mean, row.sd)} |"
        for row in shown.itertuples()
    )
    return (
        f"# A classifier of {what}\n\n"
        f"Made by `gfx.{params['function']}` (gfx {params['gfx_version']}, {params['method']}) from {model.name!r}, "
        f"whose weights have the sha256 {model.weights_sha256}. It reads the vocabulary {model.vocabulary.name!r} "
        f"(sha256 {model.vocabulary.sha256}), which lies beside it.\n\n"
        f"Classes:\n\n{tasks}\n\n"
        "What it was worth for what was held out; the weights here have seen all labels. Mean over folds, ± standard "
        "deviation over seeds.\n\n"
        f"| task | scored | method | measure | value |\n|---|---|---|---|---|\n{rows}\n\n"
        f"Use it with `gfx.tl.predict_{head.of}(adata, model=folder)`; labels and figures are in `{TEACHING_FILE}`.\n"
    )


def _figure(mean: float, sd: float) -> str:
    return f"{mean:.3f}" if np.isnan(sd) else f"{mean:.3f} ± {sd:.3f}"


def load_trained(model: str | Path | Model, of: Literal["genes", "cells"]) -> tuple[Model, dict[str, Any]]:
    """Find a classifier, and what it was taught, if that lies beside it.

    Raises
    ------
    ValueError
        A model without a head, or with one for the other.
    """
    from gfx._engine.classifier import head_of

    found = load(model)
    head = head_of(found.config)
    call = f"gfx.tl.classify_{of}(adata, ..., folder=...)"
    if head is None:
        msg = f"{found.name!r} has no head that classifies. Train one with `{call}`, and give its folder."
        raise ValueError(msg)
    if head.of != of:
        msg = f"{found.name!r} classifies {head.of}, not {of}. Use `gfx.tl.predict_{head.of}(adata, model)`."
        raise ValueError(msg)
    teaching = found.folder / TEACHING_FILE
    return found, json.loads(teaching.read_text(encoding="utf-8")) if teaching.is_file() else {}


def classifier_of(model: Model, *, device: str | None, dtype: str | None) -> Classifier:
    """Load a classifier where and in the precision asked for."""
    from gfx._engine.classifier import load_classifier
    from gfx._engine.device import choose_device, choose_dtype

    chosen = choose_device(device)
    return load_classifier(model.weights, model.config, device=chosen, dtype=choose_dtype(dtype, chosen))
