"""Masked-gene pretraining: one stage, from its last checkpoint, to its end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PrinterCallback

from gfx import _log
from gfx._engine import float32_attention
from gfx._engine.device import has_fast_bfloat16
from gfx._engine.examples import NOTHING, Padded
from gfx._engine.masked_model import MaskedGeneModel
from gfx._engine.surroundings import quiet_surroundings
from gfx._engine.trainer import (
    COMMON,
    HARMLESS,
    KEEP_BEST,
    LOG_FILE,
    OrderedTrainer,
    cells_per_step,
    current_device,
    last_checkpoint,
    planned_arguments,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import EvalPrediction, TrainingArguments

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.examples import MaskedCells

__all__ = ["HARMLESS", "cells_per_step", "masked_accuracy", "stage_arguments", "train"]

#: As in the 2023 paper, but for the batch, the warm-up (10,000 steps there) and what is about logs and checkpoints.
DEFAULTS = COMMON | {
    "learning_rate": 1e-3,
    "warmup_steps": 0.03,  # below 1: of all steps
    "per_device_train_batch_size": 32,
    "eval_strategy": "steps",
    # The others wait while the first process reads the corpus, which may take longer than torch's half hour.
    "ddp_timeout": 86_400,
}

#: Steps between evaluations, and between checkpoints, at most; a short stage has ten of them.
EVALUATE_EVERY = 500


def stage_arguments(
    folder: Path, n_cells: int, *, epochs: float, arguments: Mapping[str, Any], patience: int | None, seed: int
) -> TrainingArguments:
    """Make arguments for one stage of training."""
    given = DEFAULTS | {"num_train_epochs": epochs, "seed": seed} | dict(arguments)
    if patience is not None:
        given |= KEEP_BEST

    def plan(steps: float) -> dict[str, int]:
        every = max(1, min(EVALUATE_EVERY, int(steps / 10)))
        every = given.get("eval_steps", given.get("save_steps", every))  # the best model is one that was saved
        return {"eval_steps": every, "save_steps": every}

    return planned_arguments(folder, n_cells, given, plan)


@quiet_surroundings()
def train(
    model: MaskedGeneModel,
    cells: MaskedCells,
    held_out: MaskedCells,
    vocabulary: Vocabulary,
    folder: Path,
    *,
    epochs: float,
    arguments: Mapping[str, Any],
    patience: int | None,
    gene_rate: float,
    seed: int,
) -> list[dict[str, float]]:
    """Train one stage, or go on from its last checkpoint in `folder`; returns the log.

    A finished stage is read back and not trained again. Under `torchrun` or `accelerate launch` every process calls
    this, each takes its share of every batch, and the first one writes.

    Parameters
    ----------
    arguments
        What replaces :data:`DEFAULTS`, and other arguments of :class:`transformers.TrainingArguments`.
    patience
        Stop after that many evaluations without a lower loss, and take the best model; `None` trains to the end.
    gene_rate
        Learning rate of the gene embeddings, as a share of that of all else: below 1 where they start well.
    seed
        Seed of the order of cells.
    """
    folder = folder.resolve()  # checkpoints name each other by path
    finished = folder / "finished"
    history = finished / "history.json"  # written last
    if history.is_file():
        model.load_state_dict(MaskedGeneModel.from_pretrained(finished).state_dict())
        return json.loads(history.read_text())
    settings = stage_arguments(folder, len(cells), epochs=epochs, arguments=arguments, patience=patience, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, ended = last_checkpoint(folder, patience)
    if ended is not None:
        model.load_state_dict(MaskedGeneModel.from_pretrained(ended.best_model_checkpoint).state_dict())
        if settings.process_index == 0:
            _finish(model, finished, ended.log_history)
        return ended.log_history
    if settings.bf16 and not has_fast_bfloat16(settings.device) and settings.device.type == "cpu":
        model.set_attn_implementation(float32_attention.NAME)
    with current_device(settings.device):
        trainer = OrderedTrainer(
            settings,
            cells,
            held_out,
            vocabulary,
            seed=seed,
            log=folder / LOG_FILE,
            patience=patience,
            gene_rate=gene_rate,
            model=model,
            preprocess_logits_for_metrics=_places_of_the_truth,
            compute_metrics=_accuracy,
        )
        if not _log.shows_progress():
            trainer.remove_callback(PrinterCallback)  # without bars the Trainer prints every log entry
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.trained_model()  # as it came: the next stage may want another precision
    model.set_attn_implementation("sdpa")
    if trainer.is_world_process_zero():
        _finish(model, finished, trainer.state.log_history)
    trainer.accelerator.wait_for_everyone()
    return trainer.state.log_history


@torch.inference_mode()
def masked_accuracy(model: MaskedGeneModel, held_out: MaskedCells, *, batch_size: int = 32) -> dict[str, float]:
    """Predict the hidden genes of cells: mean loss (nats), top-1 and top-10 accuracy, number of predictions.

    ``top_1_unseen`` and ``top_10_unseen`` leave out the genes that the cell still shows, which cannot be hidden: what
    a baseline that leaves them out, too, is to be compared with.
    """
    model.eval()
    collate = Padded(held_out.vocabulary)
    order = np.argsort(held_out.lengths, kind="stable")
    loss, places, unseen = 0.0, [], []
    for start in range(0, len(order), batch_size):
        batch = collate([held_out[cell] for cell in order[start : start + batch_size]])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        chosen = batch["labels"] != NOTHING
        output = model(**batch)
        shown = batch["input_ids"][torch.nonzero(chosen)[:, 0]]
        without = output.logits.scatter(1, shown, -torch.inf)
        places.append(_places_of_the_truth(output.logits, batch["labels"])[chosen].cpu())
        unseen.append(_places_of_the_truth(without, batch["labels"])[chosen].cpu())
        loss += float(output.loss) * len(places[-1])
    found = {"": torch.cat(places), "_unseen": torch.cat(unseen)}
    n = len(found[""])
    shares = {f"top_{k}{of}": float((at < k).float().mean()) for of, at in found.items() for k in (1, 10)}
    return {"loss": loss / n, **shares, "n": n}


def _places_of_the_truth(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many genes are scored above the true one, where one is to be predicted; `(b, l)`, -100 elsewhere."""
    chosen = labels != NOTHING
    truth = logits.gather(1, labels[chosen][:, None])
    places = torch.full_like(labels, NOTHING)
    places[chosen] = (logits > truth).sum(dim=1)
    return places


def _accuracy(found: EvalPrediction) -> dict[str, float]:
    places = found.predictions[found.label_ids != NOTHING]
    return {"top_1": float((places < 1).mean()), "top_10": float((places < 10).mean()), "predictions": len(places)}


def _finish(model: MaskedGeneModel, folder: Path, history: list[dict[str, float]]) -> None:
    model.save_pretrained(folder)
    (folder / "history.json").write_text(json.dumps(history))
