"""transformers' Trainer as gfx uses it: one device, our order of cells, a log in lines of JSON, exact resume."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, TRAINER_STATE_NAME, safe_globals
from transformers.trainer_callback import ExportableState
from transformers.training_args import ParallelMode
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME

from gfx import _log
from gfx._core.arguments import check_whole, did_you_mean
from gfx._core.checkpoint import read_json
from gfx._engine.device import choose_device, ran_out_of_memory
from gfx._engine.encoder import load_weights, read_pickle, read_tensors
from gfx._engine.examples import LabelledCells, Padded, SimilarLengths
from gfx._engine.extras import need
from gfx._settings import settings as gfx_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from accelerate import Accelerator
    from torch import nn
    from transformers import TrainerControl

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.examples import MaskedCells

#: Defaults of every training.
COMMON = {
    "weight_decay": 1e-3,
    "lr_scheduler_type": "linear",
    "per_device_eval_batch_size": 32,
    "save_total_limit": 2,  # the last and the best: a run that had ended early must not go on from the best
    "logging_steps": 50,
    "report_to": "none",
}

#: With a validation set the best model is kept; a run that goes on has not forgotten its patience.
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


#: Entries of the log beside the progress bar, and what they are called there.
_SHOWN = {"loss": "loss", "eval_loss": "held-out loss"}


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


def check_names(argument: str, given: Iterable[str], known: Collection[str], of: str) -> None:
    """Refuse names that an argument of ours, a mapping of fields of a class of transformers, does not take."""
    for name in given:
        if name not in known:
            what = f"it is no field of transformers.{of}, or is settled here"
            msg = f"`{argument}` takes no {name!r}: {what}.{did_you_mean(name, known, 3)}"
            raise ValueError(msg)


def training_arguments(
    folder: Path, n_cells: int, given: Mapping[str, Any], plan: Callable[[float], Mapping[str, Any]], seed: int
) -> OneDevice:
    """Make arguments for the Trainer: what is given, else what `plan` derives from the number of steps, else ours."""
    need("Training", "accelerate")
    fixed = {"output_dir": str(folder), "remove_unused_columns": False, "seed": seed}
    known = {field.name for field in fields(TrainingArguments) if field.init} - set(fixed)
    check_names("training", given, known, "TrainingArguments")
    for name in sorted(name for name in given if name.endswith(("_batch_size", "_accumulation_steps"))):
        check_whole(given[name], f"training[{name!r}]", 1)
    ours = COMMON | {
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # there are none; looking for them takes time
        "disable_tqdm": not _log.shows_progress(),
        "use_cpu": gfx_settings.device == "cpu",
    }
    counted = OneDevice(**(ours | dict(given) | fixed))
    epochs = ceil(n_cells / cells_per_step(counted)) * counted.num_train_epochs
    steps = counted.max_steps if counted.max_steps > 0 else epochs
    arguments = OneDevice(**(ours | dict(plan(steps)) | dict(given) | fixed))
    _ = arguments.device  # settings may be others later
    return arguments


def cells_per_step(arguments: TrainingArguments) -> int:
    """Count the cells that all devices together see between two updates of the weights."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


class OrderedTrainer(Trainer):
    """A Trainer with our order of cells, also after a stop within an epoch.

    Training ends after `patience` evaluations of `held_out` cells without a lower loss. Gene embeddings have
    `gene_rate` times the learning rate of all else. The log has a file; our progress bar tells the last losses, and
    bars and tables of transformers are off.
    """

    def __init__(
        self,
        arguments: TrainingArguments,
        examples: MaskedCells | LabelledCells,
        held_out: MaskedCells | LabelledCells | None,
        vocabulary: Vocabulary,
        *,
        patience: int | None = None,
        gene_rate: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if arguments.device.type == "cuda":
            torch.cuda.set_device(arguments.device)  # accelerate moves models and batches to the current one
        self.order = SimilarLengths(examples.lengths, cells_per_step(arguments), arguments.seed)
        self.gene_rate = gene_rate
        super().__init__(
            args=arguments,
            data_collator=Padded(vocabulary, of_cells=getattr(examples, "of_cell", None) is not None),
            train_dataset=examples,
            eval_dataset=held_out,
            callbacks=[_OrderAndLog(self.order), _RunLoss(), _EvaluationAtEnd(), _BestOfThisRun()],
            **kwargs,
        )
        if patience is not None:
            self.add_callback(EarlyStoppingCallback(patience))
        for theirs in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):  # with a bar in a terminal, a table in a notebook
            self.remove_callback(theirs)
        self._bar = _Bar()
        self.add_callback(self._bar)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and take the progress bar away however that ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._bar.close()

    def get_train_dataloader(self) -> DataLoader[Any]:
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

    # --- the loss of the whole run ---

    @property
    def _run_loss(self) -> _RunLoss:
        # The Trainer may put another one in its place when a run goes on.
        return next(each for each in self.callback_handler.callbacks if isinstance(each, _RunLoss))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Add up losses."""
        loss = super().training_step(*args, **kwargs)
        self._run_loss.of_this_process += loss.detach()
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._run_loss.gather(self.accelerator)
        super()._save_checkpoint(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Put the mean loss of all steps in place of that of the steps since the run went on."""
        if "train_loss" in logs:
            self._run_loss.gather(self.accelerator)
            logs["train_loss"] = self._run_loss.total / max(1, self.state.global_step)
        super().log(logs, *args, **kwargs)

    # --- a checkpoint to go on from ---

    def _load_from_checkpoint(self, checkpoint: str, *_args: Any, **_kwargs: Any) -> None:
        check_checkpoint(Path(checkpoint))
        load_checkpoint(self.model, Path(checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _named(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _named(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_best_model(self) -> None:
        load_checkpoint(self.model, Path(self.state.best_model_checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _named(checkpoint):
            super()._load_rng_state(checkpoint)

    def trained_model(self) -> nn.Module:
        """Take the model out of what was wrapped around it, mixed precision included: others may want another."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)


class _Bar(TrainerCallback):
    """Show how many steps are done, and the last losses."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._losses: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        is_hidden = args.disable_tqdm or not state.is_world_process_zero
        self._bar, self._losses = _log.progress(state.max_steps, "training", "step", is_hidden=is_hidden), {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float],
        **kwargs: Any,
    ) -> None:
        if self._bar is not None:
            self._losses |= {called: f"{logs[name]:.3g}" for name, called in _SHOWN.items() if name in logs}
            self._bar.set_postfix(self._losses, refresh=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


class _OrderAndLog(TrainerCallback):
    """Set the epoch of the order; write the log as lines of JSON, those behind the checkpoint to go on from anew."""

    def __init__(self, order: SimilarLengths) -> None:
        self.order = order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.order.epoch = int((state.epoch or 0) + 1e-6)  # a fraction while a stopped epoch goes on

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write("w", args, state, state.log_history)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._write("a", args, state, state.log_history[-1:])

    def _write(self, mode: str, args: TrainingArguments, state: TrainerState, entries: list[dict[str, float]]) -> None:
        if state.is_world_process_zero:
            with (Path(args.output_dir) / "log.jsonl").open(mode) as lines:
                lines.writelines(json.dumps(entry) + "\n" for entry in entries)


class _EvaluationAtEnd(TrainerCallback):
    """Evaluate after the last step as well, as newer versions of transformers do by themselves."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.eval_strategy == "steps" and state.global_step >= max(state.max_steps, args.eval_delay):
            control.should_evaluate = True


class _BestOfThisRun(TrainerCallback):
    """Take the best checkpoint from the folder of this run, wherever that was when the run stopped."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = best_checkpoint(Path(args.output_dir), state)
        state.best_model_checkpoint = str(best) if best.is_dir() else None


class _RunLoss(TrainerCallback, ExportableState):
    """The sum of the losses of all steps; checkpoints hold it, so that it is that of the whole run."""

    def __init__(self) -> None:
        self.total: float = 0.0
        self.of_this_process: torch.Tensor | float = 0.0  # not yet in the total

    def state(self) -> dict[str, dict[str, float]]:
        """Return what a checkpoint holds."""
        return {"args": {}, "attributes": {"total": self.total}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.total, self.of_this_process = _noted(state, type(self), "total") if state.global_step else 0.0, 0.0

    def gather(self, accelerator: Accelerator) -> None:
        """Add the mean over processes to the total; all of them call this."""
        mine = torch.as_tensor(self.of_this_process, dtype=torch.float32, device=accelerator.device)
        self.total += float(accelerator.gather(mine.reshape(1)).mean())
        self.of_this_process = 0.0


# --- checkpoints ----------------------------------------------------------------------------------------------------


def _begin_anew(checkpoint: object) -> str:
    return f"Delete {checkpoint} to go on from the checkpoint before it, or to begin anew."


def _noted(state: TrainerState, callback: type, name: str) -> float:
    """Read a number that a callback left in a state; 0 if it left none."""
    return state.stateful_callbacks.get(callback.__name__, {}).get("attributes", {}).get(name, 0)


def last_checkpoint(folder: Path, patience: int | None) -> tuple[str | None, TrainerState | None]:
    """Find the last whole checkpoint of a stopped run; and its state, if patience had ended the run there.

    The log of that state ends with the mean loss of all steps, as that of every finished run does.
    """
    # The state is the file written last: a run that was stopped while it wrote a checkpoint leaves a part of it.
    written = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    whole = {int(number): path for path in written if (number := path.name.removeprefix("checkpoint-")).isdecimal()}
    if not whole:
        return None, None
    checkpoint = whole[max(whole)]
    state = _read_state(checkpoint / TRAINER_STATE_NAME)
    if patience is None or _noted(state, EarlyStoppingCallback, "early_stopping_patience_counter") < patience:
        return str(checkpoint), None
    loss = _noted(state, _RunLoss, "total") / max(1, state.global_step)
    state.log_history.append({"train_loss": loss, "epoch": state.epoch, "step": state.global_step})
    return str(checkpoint), state


def _read_state(file: Path) -> TrainerState:
    content = read_json(file)
    numbers = {"global_step": 0, "max_steps": 0, "num_train_epochs": 0, "logging_steps": 1, "eval_steps": 1}
    try:
        state = TrainerState(**content)
        is_sound = all(getattr(state, name) >= least for name, least in (numbers | {"save_steps": 1}).items())
        noted = [value for of in state.stateful_callbacks.values() for part in of.values() for value in part.values()]
        is_sound = is_sound and all(isinstance(value, int | float | None) for value in noted)
        is_sound = is_sound and isinstance(state.best_global_step, int | None)
        is_sound = is_sound and all(isinstance(entry, dict) for entry in state.log_history)
    except (TypeError, AttributeError):
        is_sound = False
    if not is_sound:
        msg = f"{file} is no state of a training. {_begin_anew(file.parent)}"
        raise ValueError(msg)
    return state


def best_checkpoint(folder: Path, state: TrainerState) -> Path:
    """Find the best checkpoint of a run, wherever its folder was when that was noted."""
    return folder / f"checkpoint-{state.best_global_step}"


def check_checkpoint(checkpoint: Path) -> None:
    """Refuse a checkpoint whose state or pickles are broken or hold more than tensors, before they are read."""
    _read_state(checkpoint / TRAINER_STATE_NAME)
    for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("rng_state*.pth")):
        with safe_globals():
            read_pickle(file, _begin_anew(checkpoint), mmap=True)


def load_checkpoint(model: nn.Module, folder: Path) -> None:
    """Put the weights of a checkpoint, or its adapter where that is trained, into a model; nothing else is read."""
    is_adapted = hasattr(model, "peft_config")
    file, what = folder / (ADAPTER_SAFE_WEIGHTS_NAME if is_adapted else SAFE_WEIGHTS_NAME), "what is trained here"
    try:
        if not file.is_file():
            msg = f"{folder} holds no weights as `{file.name}`."
            raise ValueError(msg)
        if not is_adapted:
            load_weights(model, file, what)
            return
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        expected = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
        set_peft_model_state_dict(model, read_tensors(file, expected, what))
    except ValueError as error:
        msg = f"{error} {_begin_anew(folder)}"
        raise ValueError(msg) from None


@contextmanager
def _named(checkpoint: str | None) -> Iterator[None]:
    """Say of what does not fit the training which checkpoint it is from."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and ran_out_of_memory(error):
            raise
        msg = (
            f"{checkpoint} does not go with this training ({type(error).__name__}: {error}). {_begin_anew(checkpoint)}"
        )
        raise ValueError(msg) from error
