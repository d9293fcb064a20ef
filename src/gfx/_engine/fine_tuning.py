"""Fine-tuning: one classifier, from its last checkpoint, to its end; adapters, and a search for hyperparameters."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch

from gfx._core.arguments import check_choice
from gfx._engine.classifier import Classifier
from gfx._engine.examples import NOTHING
from gfx._engine.extras import need
from gfx._engine.surroundings import quiet_surroundings
from gfx._engine.trainer import (
    COMMON,
    KEEP_BEST,
    OrderedTrainer,
    best_checkpoint,
    last_checkpoint,
    load_checkpoint,
    training_arguments,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from peft import PeftModel
    from transformers import TrainingArguments

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.examples import LabelledCells

Adapter = Literal["lora", "lora-8bit", "lora-4bit"]
ADAPTERS: tuple[str, ...] = ("lora", "lora-8bit", "lora-4bit")

#: As in the 2023 paper: one epoch for genes, up to ten for cells.
DEFAULTS = COMMON | {"learning_rate": 5e-5, "per_device_train_batch_size": 12}
EPOCHS = {"genes": 1, "cells": 10}

#: Steps of warm-up in the paper, where there were 833; where there are fewer, the same share of them.
WARM_UP, WARM_UP_SHARE = 500, 0.6

#: As the official software sets it; with adapters far more of the network stands still, so it learns faster.
LORA = {"r": 64, "lora_alpha": 128, "lora_dropout": 0.1, "target_modules": ["query", "value"]}
ADAPTER_RATE = 5e-4


def check_adapter(adapter: str | None) -> None:
    """Refuse what this machine cannot do before anything is computed."""
    if adapter is None:
        return
    check_choice(adapter, "adapter", (None, *ADAPTERS))
    need(f"`adapter={adapter!r}`", "peft", *(["bitsandbytes"] if adapter != "lora" else []))
    if adapter != "lora" and not torch.cuda.is_available():
        msg = (
            f"`adapter={adapter!r}` keeps the network in {adapter[-4]} bits, which runs on CUDA only, and this torch "
            "sees no CUDA device. Use `adapter='lora'`, or `method='linear_probe'`, which is fast on a CPU."
        )
        raise ValueError(msg)


def check_search(n_trials: int) -> None:
    """Refuse a search for hyperparameters where there is nothing to search with."""
    if n_trials:
        need(f"`n_trials={n_trials}`", "optuna")


def arguments_for(
    folder: Path, cells: int, *, of: str, given: Mapping[str, Any], evaluates: bool, adapter: str | None, seed: int
) -> TrainingArguments:
    """Make arguments for one training; with a validation set (`evaluates`), the best epoch is kept."""
    ours = DEFAULTS | {"num_train_epochs": EPOCHS[of]}
    if adapter is not None:
        ours["learning_rate"] = ADAPTER_RATE
    if evaluates:
        ours |= KEEP_BEST | {"eval_strategy": "epoch", "save_strategy": "epoch"}

    def plan(steps: float) -> dict[str, Any]:
        planned: dict[str, Any] = {"warmup_steps": min(WARM_UP, int(WARM_UP_SHARE * steps))}
        if not evaluates:
            planned |= {"save_strategy": "steps", "save_steps": max(1, min(500, int(steps / 4)))}
        return planned

    return training_arguments(folder, cells, ours | dict(given), plan, seed)


@quiet_surroundings()
def fine_tune(
    make: Callable[[], Classifier],
    cells: LabelledCells,
    vocabulary: Vocabulary,
    folder: Path,
    *,
    validation: LabelledCells | None,
    arguments: Mapping[str, Any],
    patience: int | None,
    adapter: Adapter | None,
    seed: int,
) -> Classifier:
    """Train a classifier, or go on from the last checkpoint in `folder`; it stays on the device of the training.

    `make` makes the classifier to start from, the same each time, and `arguments` replace :data:`DEFAULTS`. With
    `validation` cells the best epoch is taken, and training ends after `patience` epochs without a lower loss; without
    them it goes to the end. An `adapter` trains low-rank adapters in layers that are not frozen, and the head, with the
    network in 8 or 4 bits if wanted, and then adds them to the weights in full precision, so that the result is a
    classifier like any other.
    """
    folder = folder.resolve()  # checkpoints name each other by path
    model = make()
    how: dict[str, Any] = {"of": model.head.of, "given": arguments, "evaluates": validation is not None}
    settings = arguments_for(folder, len(cells), **how, adapter=adapter, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    patience = None if validation is None else patience
    checkpoint, ended = last_checkpoint(folder, patience)
    if ended is not None:
        best = best_checkpoint(folder, ended)
        if adapter is None:
            load_checkpoint(model, best)
    else:
        adapted = _with_adapter(model, adapter, settings)
        trainer = OrderedTrainer(settings, cells, validation, vocabulary, patience=patience, model=adapted)
        trainer.train(resume_from_checkpoint=checkpoint)
        model = cast("Classifier", trainer.trained_model())
        if adapter is not None:
            best = folder / "adapter"
            model.save_pretrained(best)
    if adapter is not None:
        # Trained adapters are added to the weights that they were trained beside, in full precision.
        model = _with_adapter(make(), "lora", settings)
        load_checkpoint(model, best)
        model = model.merge_and_unload()
    return model.to(settings.device)


# --- adapters -------------------------------------------------------------------------------------------------------


def _with_adapter(start: Classifier, adapter: Adapter | None, settings: TrainingArguments) -> Classifier | PeftModel:
    """Put low-rank adapters, if wanted, beside queries and values of layers that are trained, as is the head."""
    torch.manual_seed(settings.seed)  # adapters start from random numbers
    if adapter is None:
        return start
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    # Not empty, which peft would take for all layers: whoever freezes them all is refused an adapter.
    trained_layers = [
        number
        for number, layer in enumerate(start.bert.encoder.layer)
        if any(parameter.requires_grad for parameter in layer.parameters())
    ]
    if adapter != "lora":
        start = prepare_model_for_kbit_training(_quantized(start, adapter, settings))
    head = ["classifier"] + (["pooler"] if start.pooler is not None else [])
    start.name_or_path = None  # older peft asks a hub for the configuration of whatever has a name, even ""
    return get_peft_model(start, LoraConfig(**LORA, layers_to_transform=trained_layers, modules_to_save=head))


def _quantized(start: Classifier, adapter: Adapter, settings: TrainingArguments) -> Classifier:
    """Read the classifier anew in 8 or 4 bits; on CUDA only, which has been checked."""
    from transformers import BitsAndBytesConfig

    bits: dict[str, Any] = {"load_in_8bit": True}
    if adapter == "lora-4bit":
        bits = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=settings.output_dir) as folder:  # where there is room for checkpoints
        start.save_pretrained(folder)
        model = Classifier.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(**bits, llm_int8_skip_modules=["classifier"]),
            device_map={"": settings.device.index},
        )
    model.class_weight = start.class_weight.to(model.device)
    return model


# --- hyperparameters ------------------------------------------------------------------------------------------------


@quiet_surroundings()
def find_hyperparameters(
    make: Callable[[], Classifier],
    cells: LabelledCells,
    validation: LabelledCells,
    vocabulary: Vocabulary,
    folder: Path,
    *,
    arguments: Mapping[str, Any],
    n_trials: int,
    adapter: Adapter | None,
    seed: int,
) -> dict[str, Any]:
    """Search learning rate, weight decay, schedule and warm-up for the lowest loss on validation cells.

    The space is that of the official software, warm-up as a share of the steps. With an adapter, each trial trains the
    adapter, because other learning rates suit the whole network.
    """
    import optuna

    def space(trial: optuna.Trial) -> dict[str, Any]:
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-3, log=True),
            "weight_decay": trial.suggest_float("weight_decay", 0.0, 0.3),
            "lr_scheduler_type": trial.suggest_categorical("lr_scheduler_type", ["linear", "cosine", "polynomial"]),
            "warmup_steps": trial.suggest_float("warmup_steps", 0.01, 0.6),
        }

    of = "genes" if cells.of_token is not None else "cells"
    given = {"num_train_epochs": 1, "save_strategy": "no"} | dict(arguments) | {"load_best_model_at_end": False}
    # The Trainer turns what is tried into the type that it finds: a share of the steps into 0, where that is an int.
    given |= dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps"), 0.0)
    settings = arguments_for(folder, len(cells), of=of, given=given, evaluates=False, adapter=adapter, seed=seed)
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        trainer = OrderedTrainer(
            settings, cells, validation, vocabulary, model_init=lambda _: _with_adapter(make(), adapter, settings)
        )
        best = trainer.hyperparameter_search(
            hp_space=space,
            compute_objective=lambda metrics: metrics["eval_loss"],
            n_trials=n_trials,
            direction="minimize",
            backend="optuna",
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
    finally:
        optuna.logging.set_verbosity(level)
    return dict(best.hyperparameters)


def class_weights(truth: np.ndarray, slices: list[slice]) -> np.ndarray:
    """Weigh the classes of each task to count alike, float32 `(n_logits,)`; a class without cells weighs 0.

    `truth` is int `(n_cells, n_tasks)`, -100 for none; `slices` are the logits of each task.
    """
    weights = np.zeros(slices[-1].stop, dtype=np.float32)
    for column, task in zip(truth.T, slices, strict=True):
        counts = np.bincount(column[column != NOTHING], minlength=task.stop - task.start)
        present = counts > 0
        weights[task][present] = counts.sum() / (present.sum() * counts[present])
    return weights
