"""Masked-gene pretraining on transformers' Trainer: one stage, from its last checkpoint, to its end."""

from __future__ import annotations

import json
from dataclasses import fields
from difflib import get_close_matches
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from gfx import _log
from gfx._engine import float32_attention
from gfx._engine.device import has_fast_bfloat16
from gfx._engine.masked_model import MaskedGeneModel
from gfx._engine.masking import NOTHING, Padded, SimilarLengths
from gfx._engine.surroundings import quiet_surroundings
from gfx._settings import settings as gfx_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import EvalPrediction

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.masking import MaskedCells

LOG_FILE = "log.jsonl"

#: As in the 2023 paper, but for the batch, the warm-up (10,000 steps there) and what is about logs and checkpoints.
DEFAULTS = {
    "learning_rate": 1e-3,
    "weight_decay": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.03,  # below 1: of all steps
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "eval_strategy": "steps",
    "save_total_limit": 2,
    "logging_steps": 50,
    "report_to": "none",
    # The others wait while the first process reads the corpus, which may take longer than torch's half hour.
    "ddp_timeout": 86_400,
}

#: Steps between evaluations, and between checkpoints, at most; a short stage has ten of them.
EVALUATE_EVERY = 500

#: Arguments that change no loss: a run may go on with others.
HARMLESS = frozenset(
    {
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "ddp_timeout",
        "disable_tqdm",
        "log_level",
        "logging_dir",
        "logging_steps",
        "logging_strategy",
        "report_to",
        "run_name",
        "save_total_limit",
    }
)


def training_arguments(
    folder: Path, given: Mapping[str, Any], defaults: Mapping[str, Any] = DEFAULTS
) -> TrainingArguments:
    """Make settings for the Trainer: what is given, else ours, else its own."""
    fixed = {"output_dir": str(folder), "remove_unused_columns": False}
    here = {
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # there are none; looking for them takes time
        "disable_tqdm": not _log.shows_progress(),
        "use_cpu": gfx_settings.device == "cpu",
    }
    known = {field.name for field in fields(TrainingArguments) if field.init} - set(fixed)
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=3)
            meant = (
                f"did you mean {' or '.join(map(repr, close))}?" if close else "see transformers' TrainingArguments."
            )
            msg = f"`training` takes no {name!r}; {'that is settled here.' if name in fixed else meant}"
            raise ValueError(msg)
    return TrainingArguments(**(here | dict(defaults) | dict(given) | fixed))


def stage_arguments(
    folder: Path, n_cells: int, *, epochs: float, arguments: Mapping[str, Any], patience: int | None, seed: int
) -> TrainingArguments:
    """Make settings for one stage of training."""
    given = {"num_train_epochs": epochs, "seed": seed} | dict(arguments)
    if patience is not None:
        given |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "restore_callback_states_from_checkpoint": True,  # a run that goes on has not forgotten its patience
        }
    settings = training_arguments(folder, given)
    steps = settings.max_steps if settings.max_steps > 0 else ceil(n_cells / cells_per_step(settings)) * epochs
    every = max(1, min(EVALUATE_EVERY, int(steps / 10)))
    every = given.get("eval_steps", given.get("save_steps", every))  # the best model is one that was saved
    return training_arguments(folder, {"eval_steps": every, "save_steps": every} | given)


def cells_per_step(settings: TrainingArguments) -> int:
    """Count the cells that all devices together see between two updates of the weights."""
    return settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size


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
    checkpoint = last_checkpoint(folder)
    best = None if checkpoint is None else where_patience_ended(checkpoint, patience)
    if best is not None:
        model.load_state_dict(MaskedGeneModel.from_pretrained(best.best_model_checkpoint).state_dict())
        if settings.process_index == 0:
            _finish(model, finished, best.log_history)
        return best.log_history
    if settings.bf16 and not has_fast_bfloat16(settings.device) and settings.device.type == "cpu":
        model.set_attn_implementation(float32_attention.NAME)
    order = SimilarLengths(cells.lengths, cells_per_step(settings), seed)
    trainer = OrderedTrainer(
        order,
        gene_rate,
        model=model,
        args=settings,
        data_collator=Padded(vocabulary),
        train_dataset=cells,
        eval_dataset=held_out,
        preprocess_logits_for_metrics=_places_of_the_truth,
        compute_metrics=_accuracy,
        callbacks=[JsonLog(folder / LOG_FILE)],
    )
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(patience))
    if not _log.shows_progress():
        trainer.remove_callback(PrinterCallback)  # without bars the Trainer prints every log entry
    trainer.train(resume_from_checkpoint=checkpoint)
    # Mixed precision is wrapped around the model's forward pass: the next stage may want another.
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    model.set_attn_implementation("sdpa")
    if trainer.is_world_process_zero():
        _finish(model, finished, trainer.state.log_history)
    trainer.accelerator.wait_for_everyone()
    return trainer.state.log_history


class OrderedTrainer(Trainer):
    """A Trainer with our order of cells, also behind a stop in an epoch, and a rate for gene embeddings."""

    def __init__(self, order: SimilarLengths, gene_rate: float, **kwargs: Any) -> None:
        self.order, self.gene_rate = order, gene_rate
        super().__init__(**kwargs)
        self.add_callback(_TellTheEpoch(order))

    def _get_train_sampler(self, train_dataset: object = None) -> SimilarLengths:
        return self.order

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        words = self.model.get_input_embeddings().weight
        for group in list(optimizer.param_groups):
            if self.gene_rate != 1 and any(parameter is words for parameter in group["params"]):
                group["params"] = [parameter for parameter in group["params"] if parameter is not words]
                optimizer.add_param_group(group | {"params": [words], "lr": group["lr"] * self.gene_rate})
        return optimizer


class _TellTheEpoch(TrainerCallback):
    def __init__(self, order: SimilarLengths) -> None:
        self.order = order

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.order.epoch = int((state.epoch or 0) + 1e-6)  # a fraction while a stopped epoch goes on


class JsonLog(TrainerCallback):
    """Write the log as lines of JSON; those behind the checkpoint that a run goes on from are written anew."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.path.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with self.path.open("a") as lines:
                lines.write(json.dumps(state.log_history[-1]) + "\n")


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


def where_patience_ended(checkpoint: str, patience: int | None) -> TrainerState | None:
    """Read the state of a run that was stopped between its early end and its last word; `None` if it has to go on."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    callback = state.stateful_callbacks.get("EarlyStoppingCallback", {})
    waited = callback.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return state if patience is not None and waited >= patience else None


def last_checkpoint(folder: Path) -> str | None:
    """Find the last whole checkpoint: a run that was stopped while it wrote one leaves a part of it."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]  # the file written last
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None
