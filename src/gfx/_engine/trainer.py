"""transformers' Trainer as gfx uses it: one device, our order of cells, a log in lines of JSON, exact resume."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import fields
from difflib import get_close_matches
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.training_args import ParallelMode

from gfx import _log
from gfx._engine.device import choose_device
from gfx._engine.examples import LabelledCells, Padded, SimilarLengths
from gfx._settings import settings as gfx_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import nn

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.examples import MaskedCells

LOG_FILE = "log.jsonl"

#: What every training has in common, but for arguments that are given.
COMMON = {
    "weight_decay": 1e-3,
    "lr_scheduler_type": "linear",
    "per_device_eval_batch_size": 32,
    "save_total_limit": 2,  # the last beside the best: a run that had ended early must not go on from the best
    "logging_steps": 50,
    "report_to": "none",
}

#: Where held-out examples judge, the best model is taken; a run that goes on has not forgotten its patience.
KEEP_BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
    "restore_callback_states_from_checkpoint": True,
}

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


# --- arguments ------------------------------------------------------------------------------------------------------


class OneDevice(TrainingArguments):
    """Train on the chosen device alone: the Trainer takes the first, and a batch more for each other that it sees."""

    @cached_property
    def device(self) -> torch.device:
        """The device chosen when it was asked for first; of several processes, each has its own."""
        device = super().device
        if device.type != "cuda" or self.parallel_mode is ParallelMode.DISTRIBUTED:
            return device
        chosen = choose_device()
        return chosen if chosen.index is not None else device

    @property
    def n_gpu(self) -> int:
        """One device at most."""
        return min(super().n_gpu, 1)


def training_arguments(folder: Path, given: Mapping[str, Any]) -> OneDevice:
    """Make arguments for the Trainer: what is given, else ours, else its own."""
    fixed = {"output_dir": str(folder), "remove_unused_columns": False}
    ours = {
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
    arguments = OneDevice(**(ours | COMMON | dict(given) | fixed))
    _ = arguments.device  # settings may be others later
    return arguments


def planned_arguments(
    folder: Path, n_cells: int, given: Mapping[str, Any], plan: Callable[[float], Mapping[str, Any]]
) -> OneDevice:
    """Make arguments of which some follow, unless given, from the number of steps, by `plan`."""
    counted = training_arguments(folder, given)
    epochs = ceil(n_cells / cells_per_step(counted)) * counted.num_train_epochs
    steps = counted.max_steps if counted.max_steps > 0 else epochs
    return training_arguments(folder, dict(plan(steps)) | dict(given))


def cells_per_step(arguments: TrainingArguments) -> int:
    """Count the cells that all devices together see between two updates of the weights."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def current_device(device: torch.device) -> AbstractContextManager:
    """Make a device the current one, which is the one that accelerate moves models and batches to."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# --- training -------------------------------------------------------------------------------------------------------


class OrderedTrainer(Trainer):
    """A Trainer with our order of cells, also after a stop within an epoch, and a rate for gene embeddings.

    Parameters
    ----------
    examples, held_out
        Cells to train on, and to evaluate with, if any.
    seed
        Seed of the order of cells.
    log
        File of the log.
    patience
        Evaluations without a lower loss before training ends.
    gene_rate
        Learning rate of the gene embeddings, as a share of that of all else.
    """

    def __init__(
        self,
        arguments: TrainingArguments,
        examples: MaskedCells | LabelledCells,
        held_out: MaskedCells | LabelledCells | None,
        vocabulary: Vocabulary,
        *,
        seed: int,
        log: Path | None = None,
        patience: int | None = None,
        gene_rate: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.order = SimilarLengths(examples.lengths, cells_per_step(arguments), seed)
        self.gene_rate = gene_rate
        of_cells = isinstance(examples, LabelledCells) and examples.of_cell is not None
        super().__init__(
            args=arguments,
            data_collator=Padded(vocabulary, of_cells=of_cells),
            train_dataset=examples,
            eval_dataset=held_out,
            callbacks=[_TellTheEpoch(self.order)],
            **kwargs,
        )
        if log is not None:
            self.add_callback(JsonLog(log))
        if patience is not None:
            self.add_callback(EarlyStoppingCallback(patience))

    def get_train_dataloader(self) -> DataLoader:
        """Load cells in our order, which the Trainer's own samplers do not know."""
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            sampler=self.order,
            collate_fn=self.data_collator,
            drop_last=self.args.dataloader_drop_last,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Give gene embeddings a rate of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        words = self.model.get_input_embeddings().weight
        for group in list(optimizer.param_groups):
            if self.gene_rate != 1 and any(parameter is words for parameter in group["params"]):
                group["params"] = [parameter for parameter in group["params"] if parameter is not words]
                optimizer.add_param_group(group | {"params": [words], "lr": group["lr"] * self.gene_rate})
        return optimizer

    def trained_model(self) -> nn.Module:
        """Take the model out of what was wrapped around it, mixed precision included: others may want another."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)


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


# --- where a stopped run goes on ------------------------------------------------------------------------------------


def last_checkpoint(folder: Path, patience: int | None) -> tuple[str | None, TrainerState | None]:
    """Find the last whole checkpoint of a stopped run, and whether patience had ended it there.

    Returns
    -------
    The checkpoint, or `None`; and its state if the run had ended and was stopped before it said so.
    """
    # The state is the file written last: a run that was stopped while it wrote a checkpoint leaves a part of it.
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    if not whole:
        return None, None
    checkpoint = max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    callback = state.stateful_callbacks.get("EarlyStoppingCallback", {})
    waited = callback.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return str(checkpoint), state if patience is not None and waited >= patience else None
