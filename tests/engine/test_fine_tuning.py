"""Training of classifiers: what is learnt, what is left alone, what a stopped run leaves, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from transformers import Trainer, TrainingArguments

from gfx import settings
from gfx._core.encodings import Encodings
from gfx._engine import extras
from gfx._engine.class_scores import of_cells, of_occurrences, probabilities
from gfx._engine.classifier import Classifier, Head, freeze, make_classifier, weigh_classes
from gfx._engine.examples import NOTHING, LabelledCells, Padded
from gfx._engine.fine_tuning import (
    ADAPTERS,
    DEFAULTS,
    arguments_for,
    check_adapter,
    check_search,
    class_weights,
    find_hyperparameters,
    fine_tune,
)
from gfx._engine.surroundings import quiet_surroundings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import StopInStep

    from gfx._core.vocabulary import Vocabulary
    from gfx.models import Model

#: peft asks transformers for it by its old name.
OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ARGUMENTS = {
    "per_device_train_batch_size": 6,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "use_cpu": True,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CELLS = Head("cells", "mean", {"type": ["healthy", "sick"]})
GENES = Head("genes", "gene", {"labels": ["tolerant", "sensitive"]})
N_LEARNT, N_CELLS = 48, 72
WORDS = "bert.embeddings.word_embeddings.weight"
NEVER = 10_000


@dataclass(frozen=True)
class Task:
    """A model, and cells: 48 to learn from, 12 to stop by, 12 that no training sees.

    Sick cells have three genes in front that healthy ones lack, which have three others. Of the other genes, those of
    odd number are sensitive.
    """

    model: Model
    ids: np.ndarray
    lengths: np.ndarray
    sick: np.ndarray
    of_token: np.ndarray

    @property
    def vocabulary(self) -> Vocabulary:
        return self.model.vocabulary

    @property
    def tokens(self) -> Encodings:
        return Encodings.of(self.ids, self.lengths)

    def cells(self, start: int, stop: int, head: Head) -> LabelledCells:
        labels = {"of_token": self.of_token} if head.of == "genes" else {"of_cell": self.sick[:, None]}
        return LabelledCells(self.tokens, np.arange(start, stop), **labels)

    def learnt(self, head: Head = CELLS) -> LabelledCells:
        return self.cells(0, N_LEARNT, head)

    def judged(self, head: Head = CELLS) -> LabelledCells:
        return self.cells(N_LEARNT, 60, head)

    def misleading(self) -> LabelledCells:
        """The cells to stop by under wrong labels: each pass that teaches something is a worse one."""
        return LabelledCells(self.tokens, np.arange(N_LEARNT, 60), of_cell=1 - self.sick[:, None])

    def make(self, head: Head = CELLS, *, seed: int = 0, frozen: int = 0, **config: Any) -> Classifier:
        model = make_classifier(self.model.weights, self.model.config | config, head, seed=seed, n_layers=3)
        freeze(model, frozen)
        return model


@pytest.fixture(scope="module")
def task(toy_model: Model) -> Task:
    vocabulary, rng = toy_model.vocabulary, np.random.default_rng(0)
    genes = np.flatnonzero(~vocabulary.is_special)
    sick = np.arange(N_CELLS) % 2
    rows = []
    for is_sick in sick:
        others = rng.choice(genes[6:22], rng.integers(5, 13), replace=False)
        rows.append([vocabulary.cls, *genes[:6][3 * is_sick :][:3], *others, vocabulary.eos])
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    ids = np.zeros((N_CELLS, lengths.max()), dtype=np.uint16)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
    of_token = np.full(len(vocabulary), NOTHING)
    of_token[genes[6:22]] = genes[6:22] % 2
    return Task(toy_model, ids, lengths, sick, of_token)


Run = "Callable[..., Classifier]"


@pytest.fixture(scope="module")
def run(task: Task) -> Run:
    """Train on 48 cells in 8 steps an epoch; `stops`: judged after each by 12 others, or by the cells given."""

    def train(
        folder: Path,
        head: Head = CELLS,
        *,
        stops: bool | LabelledCells = False,
        patience: int | None = None,
        adapter: str | None = None,
        seed: int = 0,
        make: Any = None,
        **arguments: Any,
    ) -> Classifier:
        with settings.override(verbosity=0):
            return fine_tune(
                make or partial(task.make, head, seed=seed),
                task.learnt(head),
                task.vocabulary,
                folder,
                validation=(task.judged(head) if stops is True else stops) or None,
                arguments={"num_train_epochs": 2} | ARGUMENTS | arguments,
                patience=patience,
                adapter=adapter,
                seed=seed,
            )

    return train


@pytest.fixture
def stop_in_step(monkeypatch: pytest.MonkeyPatch, stop_in_step: StopInStep) -> StopInStep:
    """Stop the training of a classifier in a step of one's choice."""
    return type(stop_in_step)(monkeypatch, Classifier, Classifier.forward)


def logged(folder: Path, name: str = "loss") -> list[float]:
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry[name] for entry in entries if name in entry]


def same_weights(found: Classifier, expected: Classifier) -> bool:
    """To the last bit."""
    states = found.state_dict(), expected.state_dict()
    return states[0].keys() == states[1].keys() and all(map(torch.equal, *(state.values() for state in states)))


def changed(found: Classifier, start: Classifier) -> set[str]:
    before = start.state_dict()
    assert found.state_dict().keys() == before.keys()
    return {name for name, tensor in found.state_dict().items() if not torch.equal(tensor, before[name])}


def loss_of(model: Classifier, cells: LabelledCells, vocabulary: Vocabulary) -> float:
    """Loss on all cells as one batch."""
    collate = Padded(vocabulary, of_cells=model.head.of == "cells")
    with torch.no_grad():
        return model.eval()(**collate([cells[at] for at in range(len(cells))])).loss.item()


# --- what is learnt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_cell_classes_are_learnt_and_predicted_for_held_out_cells(
    run: Run, task: Task, tmp_path: Path, pooling: str
) -> None:
    """And told of cells that were not seen."""
    head = Head("cells", pooling, CELLS.tasks)
    found = []
    for model in (task.make(head).eval(), run(tmp_path, head, num_train_epochs=5, warmup_steps=2).eval()):
        told = of_cells(model, task.ids[60:], task.lengths[60:], task.vocabulary).argmax(axis=1)
        found.append((told == task.sick[60:]).mean())
    assert found[0] < 0.8
    assert found[1] == 1.0


def test_gene_classes_are_learnt_and_predicted_in_held_out_cells(run: Run, task: Task, tmp_path: Path) -> None:
    found = []
    trained = run(tmp_path, GENES, make=partial(task.make, GENES, **NO_DROPOUT), num_train_epochs=12, warmup_steps=2)
    for model in (task.make(GENES).eval(), trained.eval()):
        cells = task.ids[60:], task.lengths[60:]
        _, tokens, told = of_occurrences(model, *cells, task.of_token >= 0, probabilities, description="")
        found.append((told.argmax(axis=1) == task.of_token[tokens]).mean())
    assert found[0] < 0.8
    assert found[1] > 0.95


def test_training_follows_the_seed_alone(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = run(tmp_path / "first")
    torch.manual_seed(2)
    assert same_weights(run(tmp_path / "again"), expected)
    assert not same_weights(run(tmp_path / "other", seed=1), expected)
    assert type(expected) is Classifier


def test_the_order_of_cells_follows_the_seed(run: Run, task: Task, tmp_path: Path) -> None:
    """The same start, and no dropout: other batches."""
    losses = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        run(folder, seed=seed, make=partial(task.make, **NO_DROPOUT), learning_rate=0.0)
        losses.append(logged(folder))
    assert len(losses[0]) == 16
    assert losses[0] != losses[1]


def test_every_cell_is_trained_on_once_an_epoch(
    run: Run, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, collate = [], Padded.__call__

    def watched(self, cells):
        seen.extend(tuple(cell["input_ids"]) for cell in cells)
        return collate(self, cells)

    monkeypatch.setattr(Padded, "__call__", watched)
    run(tmp_path)
    cells = sorted(tuple(task.learnt()[at]["input_ids"]) for at in range(N_LEARNT))
    assert sorted(seen[:N_LEARNT]) == sorted(seen[N_LEARNT:]) == cells
    assert seen[:N_LEARNT] != seen[N_LEARNT:]


@pytest.mark.parametrize("head", [CELLS, GENES], ids=["cells", "genes"])
def test_frozen_blocks_stay_as_they_are(run: Run, task: Task, tmp_path: Path, head: Head) -> None:
    """Embeddings learn, as with the official software."""
    found = run(tmp_path, head, make=partial(task.make, head, frozen=2))
    moved = changed(found, task.make(head))
    assert not any(name.startswith(("bert.encoder.layer.0.", "bert.encoder.layer.1.")) for name in moved)
    assert {name.split(".")[3] for name in moved if name.startswith("bert.encoder.layer")} == {"2"}
    learning = {name for name, one in task.make(head, frozen=2).named_parameters() if one.requires_grad}
    assert moved == learning
    assert WORDS in moved


def test_class_weights_reach_the_training(run: Run, task: Task, tmp_path: Path) -> None:
    """A class that counts for nothing is never told."""

    def make() -> Classifier:
        model = task.make()
        weigh_classes(model, np.array([1.0, 0.0], dtype=np.float32))
        return model

    found = run(tmp_path, make=make, num_train_epochs=3, warmup_steps=2).eval()
    assert of_cells(found, task.ids, task.lengths, task.vocabulary)[:, 0].min() > 0.9


def test_random_states_are_left_alone_and_nothing_is_printed(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], random_states: Callable[[], list]
) -> None:
    before = random_states()
    run(tmp_path, stops=True)
    assert random_states() == before
    assert capfd.readouterr() == ("", "")


def test_a_bar_is_shown_on_request(task: Task, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with settings.override(verbosity=2):
        fine_tune(
            task.make,
            task.learnt(),
            task.vocabulary,
            tmp_path,
            validation=None,
            arguments=ARGUMENTS | {"num_train_epochs": 50},  # a bar appears after a second
            patience=None,
            adapter=None,
            seed=0,
        )
    said = capfd.readouterr()
    assert re.search(r"training: .*\d+/400 .*loss=[\d.]+", said.err)
    assert said.out == ""


# --- passes to choose from ------------------------------------------------------------------------------------------

#: Learns in the first pass already.
FAST = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0, "num_train_epochs": 4}


@OLD_NAME
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_the_best_epoch_is_kept(run: Run, task: Task, tmp_path: Path, adapter: str | None) -> None:
    if adapter:
        pytest.importorskip("peft")
    found = run(tmp_path, stops=task.misleading(), adapter=adapter, **FAST)
    losses = logged(tmp_path, "eval_loss")
    assert len(losses) == 4
    assert losses[-1] > min(losses) + 0.3
    assert loss_of(found, task.misleading(), task.vocabulary) == pytest.approx(min(losses), abs=1e-5)


def test_without_a_validation_set_the_last_epoch_is_kept(run: Run, task: Task, tmp_path: Path) -> None:
    """The same training, not judged."""
    make = partial(task.make, **NO_DROPOUT)
    found = run(tmp_path, make=make, **FAST)
    run(tmp_path / "judged", make=make, stops=task.misleading(), **FAST)
    losses = logged(tmp_path / "judged", "eval_loss")
    assert logged(tmp_path, "eval_loss") == []
    assert losses[-1] > min(losses) + 0.3
    assert loss_of(found, task.misleading(), task.vocabulary) == pytest.approx(losses[-1], abs=1e-4)


@pytest.mark.parametrize("patience", [1, 3])
def test_training_ends_when_the_loss_does_not_fall(run: Run, task: Task, tmp_path: Path, patience: int) -> None:
    found = run(tmp_path, stops=True, patience=patience, learning_rate=0.0, num_train_epochs=9)
    assert len(logged(tmp_path, "eval_loss")) == 1 + patience
    assert len(logged(tmp_path)) == 8 * (1 + patience)
    assert same_weights(found, task.make())


# --- stopped and resumed --------------------------------------------------------------------------------------------


WAYS = {
    "cells": (CELLS, False, None, {}, 12),
    "genes": (GENES, False, None, {}, 12),
    "judged": (CELLS, True, None, {}, 8),
    "accumulated": (CELLS, False, None, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, 12),
    "lora": (CELLS, True, "lora", {}, 8),
}


@OLD_NAME
@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_ends_as_one_that_was_not(
    run: Run, task: Task, tmp_path: Path, stop_in_step: StopInStep, way: str
) -> None:
    """From the checkpoint after so many of 16 steps; the same to the last bit."""
    head, stops, adapter, arguments, checkpoint = WAYS[way]
    if adapter:
        pytest.importorskip("peft")
    how = {"stops": stops, "adapter": adapter, **arguments}
    passes = arguments.get("gradient_accumulation_steps", 1)
    expected = run(tmp_path / "whole", head, **how)
    stop_in_step(14 * passes)
    with pytest.raises(stop_in_step.stopped):
        run(tmp_path / "parts", head, **how)
    steps = stop_in_step(NEVER)
    found = run(tmp_path / "parts", head, **how)
    assert len(steps) == (16 - checkpoint) * passes
    assert same_weights(found, expected)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    assert not same_weights(found, task.make(head))


def test_patience_survives_a_stop(run: Run, tmp_path: Path, stop_in_step: StopInStep) -> None:
    """Two passes without a better one are behind it: one more is waited for, not three."""
    how = {"stops": True, "patience": 3, "learning_rate": 0.0, "num_train_epochs": 9}
    stop_in_step(3 * 8 + 5)
    with pytest.raises(stop_in_step.stopped):
        run(tmp_path, **how)
    steps = stop_in_step(NEVER)
    run(tmp_path, **how)
    assert len(steps) == 8
    assert len(logged(tmp_path, "eval_loss")) == 4


@pytest.mark.parametrize("stops", [False, True])
def test_a_finished_run_is_not_trained_further(run: Run, tmp_path: Path, stop_in_step: StopInStep, stops: bool) -> None:
    """It may have been stopped while its scores were computed."""
    expected = run(tmp_path, stops=stops)
    steps = stop_in_step(NEVER)
    assert same_weights(run(tmp_path, stops=stops), expected)
    assert steps == []


@OLD_NAME
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_a_run_that_ended_early_is_not_trained_further(
    run: Run, task: Task, tmp_path: Path, stop_in_step: StopInStep, adapter: str | None
) -> None:
    """Stopped while its scores were computed, it is not trained further."""
    if adapter:
        pytest.importorskip("peft")
    how = {"stops": task.misleading(), "patience": 1, "adapter": adapter} | FAST | {"num_train_epochs": 9}
    expected = run(tmp_path, **how)
    assert len(logged(tmp_path)) < 72
    steps = stop_in_step(NEVER)
    assert same_weights(run(tmp_path, **how), expected)
    assert steps == []


@OLD_NAME
def test_of_an_adapter_only_its_weights_are_read(run: Run, task: Task, tmp_path: Path) -> None:
    """Of a run that patience had ended; a description beside the weights could name any model or method."""
    pytest.importorskip("peft")
    how = {"stops": task.misleading(), "patience": 1, "adapter": "lora"} | FAST | {"num_train_epochs": 9}
    expected = run(tmp_path, **how)
    for file in tmp_path.glob("checkpoint-*/adapter_config.json"):
        file.write_text('{"peft_type": "STRANGE", "base_model_name_or_path": "stranger/repository"}')
    assert same_weights(run(tmp_path, **how), expected)
    for file in tmp_path.glob("checkpoint-*/adapter_model.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a readable safetensors file"):
        run(tmp_path, **how)


# --- adapters -------------------------------------------------------------------------------------------------------


@OLD_NAME
@pytest.mark.parametrize("head", [GENES, Head("cells", "pooler", CELLS.tasks)], ids=["genes", "pooler"])
def test_adapters_become_part_of_the_weights(run: Run, task: Task, tmp_path: Path, head: Head) -> None:
    """Only the queries and values of every block, and the head, differ from the start."""
    pytest.importorskip("peft")
    found = run(tmp_path, head, adapter="lora")
    assert type(found) is Classifier
    assert found.head == head
    places = [f"bert.encoder.layer.{at}.attention.self.{name}.weight" for at in range(3) for name in ("query", "value")]
    own = ["classifier", "pooler.dense"] if head.pooling == "pooler" else ["classifier"]
    expected = {*places, *(f"{name}.{part}" for name in own for part in ("weight", "bias"))}
    assert changed(found, task.make(head)) == expected
    start = task.make(head)
    for name in places:  # what is added has the rank of the adapter at most: here that of the whole matrix
        assert (found.state_dict()[name] - start.state_dict()[name]).abs().max() > 1e-4


@OLD_NAME
def test_adapters_leave_frozen_blocks_as_they_are(run: Run, task: Task, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    how = {"make": partial(task.make, frozen=1), "adapter": "lora"}
    found = run(tmp_path / "plain", **how)
    judged = run(tmp_path / "judged", stops=task.misleading(), patience=1, **how, **FAST)
    again = run(tmp_path / "judged", stops=task.misleading(), patience=1, **how, **FAST)  # read back
    assert same_weights(again, judged)
    for model in (found, judged):
        blocks = {int(name.split(".")[3]) for name in changed(model, task.make()) if name.startswith("bert.encoder")}
        assert blocks == {1, 2}


@OLD_NAME
def test_adapters_follow_the_seed_alone(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(1)
    expected = run(tmp_path / "first", adapter="lora")
    torch.manual_seed(2)
    assert same_weights(run(tmp_path / "again", adapter="lora"), expected)


def test_unknown_adapters_are_refused() -> None:
    check_adapter(None)
    assert ADAPTERS == ("lora", "lora-8bit", "lora-4bit")
    with pytest.raises(ValueError, match=r"`adapter` is one of \[None, 'lora', 'lora-8bit', 'lora-4bit'\], .*'dora'"):
        check_adapter("dora")


@pytest.mark.parametrize(("adapter", "bits"), [("lora-4bit", 4), ("lora-8bit", 8)])
def test_quantized_adapters_need_cuda(monkeypatch: pytest.MonkeyPatch, adapter: str, bits: int) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_adapter("lora")
    with pytest.raises(ValueError, match=rf"`adapter='{adapter}'` .* in {bits} bits.*CUDA.*adapter='lora'"):
        check_adapter(adapter)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_adapter(adapter)


@pytest.mark.parametrize(
    ("missing", "adapter", "text"),
    [
        (["peft"], "lora", r"needs peft: `pip install 'scgfx\[lora\]'` or `conda install -c conda-forge peft`"),
        (["bitsandbytes"], "lora-8bit", r"needs bitsandbytes: `pip install 'scgfx\[quantized\]'` or `conda "),
        (["peft", "bitsandbytes"], "lora-4bit", r"needs peft and bitsandbytes: `pip .*\[lora,quantized\]'`.*peft bits"),
    ],
)
def test_adapters_need_packages(monkeypatch: pytest.MonkeyPatch, missing: list[str], adapter: str, text: str) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in missing else object())
    with pytest.raises(ImportError, match=text):
        check_adapter(adapter)


# --- hyperparameters ------------------------------------------------------------------------------------------------


def search(task: Task, folder: Path, seed: int = 0, *, adapter: str | None = None, **arguments: Any) -> dict[str, Any]:
    with settings.override(verbosity=0):
        return find_hyperparameters(
            task.make,
            task.learnt(),
            task.judged(),
            task.vocabulary,
            folder,
            arguments={"use_cpu": True, "per_device_train_batch_size": 6} | arguments,
            n_trials=2,
            adapter=adapter,
            seed=seed,
        )


@dataclass
class Trial:
    """What a training of a search was told to do."""

    found: dict[str, Any]
    steps: int
    warm_up: int


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """Note the settings of each training when it makes its schedule."""
    noted, create = [], Trainer.create_scheduler

    def watched(self, num_training_steps, *args, **kwargs):
        names = ("learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps")
        found = {name: getattr(self.args, name) for name in names}
        noted.append(Trial(found, num_training_steps, self.args.get_warmup_steps(num_training_steps)))
        return create(self, num_training_steps, *args, **kwargs)

    monkeypatch.setattr(Trainer, "create_scheduler", watched)
    return noted


def test_hyperparameters_are_searched(
    task: Task, tmp_path: Path, trials: list[Trial], capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    best = search(task, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")
    assert set(best) == {"learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps"}
    assert 1e-6 <= best["learning_rate"] <= 1e-3
    assert 0 <= best["weight_decay"] <= 0.3
    assert best["lr_scheduler_type"] in {"linear", "cosine", "polynomial"}
    assert 0.01 <= best["warmup_steps"] <= 0.6
    assert json.loads(json.dumps(best)) == best
    assert best in [trial.found for trial in trials]  # what is told was tried
    assert [trial.steps for trial in trials] == [8, 8]  # one pass
    assert [trial.warm_up for trial in trials] == [int(np.ceil(8 * trial.found["warmup_steps"])) for trial in trials]
    assert trials[0].found != trials[1].found
    torch.manual_seed(2)
    assert search(task, tmp_path / "again") == best
    assert search(task, tmp_path / "other", seed=1) != best
    assert (
        arguments_for(tmp_path, N_LEARNT, of="cells", given=best, evaluates=True, adapter=None, seed=0).learning_rate
        == best["learning_rate"]
    )


def test_the_better_trial_wins(task: Task, tmp_path: Path, trials: list[Trial]) -> None:
    """By the loss of each on the cells to judge by, trained one by one."""
    pytest.importorskip("optuna")
    best = search(task, tmp_path)
    losses = []
    for trial in list(trials):
        with settings.override(verbosity=0):
            model = fine_tune(
                task.make,
                task.learnt(),
                task.vocabulary,
                tmp_path / str(len(losses)),
                validation=None,
                arguments={"use_cpu": True, "per_device_train_batch_size": 6, "num_train_epochs": 1} | trial.found,
                patience=None,
                adapter=None,
                seed=0,
            )
        losses.append(loss_of(model, task.judged(), task.vocabulary))
    assert losses[0] != losses[1]
    assert trials[int(np.argmin(losses))].found == best


@OLD_NAME
def test_with_an_adapter_trials_train_the_adapter(
    task: Task, tmp_path: Path, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the network, for which other rates are good."""
    pytest.importorskip("optuna")
    pytest.importorskip("peft")
    learning, create = [], Trainer.create_optimizer

    def watched(self, *args, **kwargs):
        learning.append({name for name, one in self.model.named_parameters() if one.requires_grad})
        return create(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "create_optimizer", watched)
    best = search(task, tmp_path, adapter="lora")
    assert best in [trial.found for trial in trials]
    assert len(learning) == 2
    for names in learning:
        assert names
        assert all("lora_" in name or "classifier" in name for name in names)


def test_a_search_needs_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    check_search(0)
    with pytest.raises(ImportError, match=r"`n_trials=3` .*optuna.*`pip install 'scgfx\[search\]'`"):
        check_search(3)
    monkeypatch.setattr(extras, "find_spec", lambda name: object())
    check_search(3)


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "of", "given", "expected"),
    [
        (10_000, "genes", {}, 500),  # 834 steps, as in the paper
        (1_200, "genes", {}, 60),
        (1_201, "genes", {}, int(0.6 * 101)),  # a last batch that is not full is a step
        (120, "cells", {}, 60),  # ten passes
        (120, "cells", {"num_train_epochs": 0.5}, 3),
        (120, "cells", {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, 120),
        (120, "cells", {"max_steps": 20}, 12),
        (120, "cells", {"warmup_steps": 7}, 7),
        (1, "genes", {}, 0),
    ],
)
def test_warm_up(tmp_path: Path, cells: int, of: str, given: dict[str, Any], expected: int) -> None:
    found = arguments_for(
        tmp_path, cells, of=of, given={"use_cpu": True} | given, evaluates=False, adapter=None, seed=0
    )
    assert found.warmup_steps == expected


def test_defaults_are_those_of_the_paper(tmp_path: Path) -> None:
    how = {"given": {"use_cpu": True}, "seed": 4}
    genes = arguments_for(tmp_path, 2400, of="genes", evaluates=False, adapter=None, **how)
    cells = arguments_for(tmp_path, 2400, of="cells", evaluates=True, adapter="lora", **how)
    for found in (genes, cells):
        for name in ("weight_decay", "per_device_train_batch_size", "per_device_eval_batch_size"):
            assert getattr(found, name) == DEFAULTS[name]
        assert found.lr_scheduler_type == "linear"
        assert found.seed == 4
        assert found.report_to == []
    assert (genes.num_train_epochs, cells.num_train_epochs) == (1, 10)
    assert (genes.learning_rate, cells.learning_rate) == (5e-5, 5e-4)
    assert (genes.eval_strategy, genes.save_strategy, genes.save_steps) == ("no", "steps", 50)  # four times
    assert not genes.load_best_model_at_end
    assert (cells.eval_strategy, cells.save_strategy) == ("epoch", "epoch")
    assert cells.load_best_model_at_end
    assert (cells.metric_for_best_model, cells.greater_is_better) == ("eval_loss", False)
    many = arguments_for(tmp_path, 10**6, of="genes", evaluates=False, adapter=None, **how)
    assert many.save_steps == 500


def test_given_arguments_replace_the_defaults(tmp_path: Path) -> None:
    given = {"use_cpu": True, "learning_rate": 1e-3, "num_train_epochs": 3, "save_steps": 9, "weight_decay": 0.2}
    found = arguments_for(tmp_path, 2400, of="genes", given=given, evaluates=False, adapter="lora", seed=0)
    assert {name: getattr(found, name) for name in given} == given
    with pytest.raises(ValueError, match=r"takes no 'learnig_rate'.* Did you mean 'learning_rate'"):
        arguments_for(tmp_path, 10, of="genes", given={"learnig_rate": 1}, evaluates=False, adapter=None, seed=0)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let torch say that it sees two, and note which one is made the current one."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(int(str(device)[-1])))
    yield current
    monkeypatch.undo()
    TrainingArguments(use_cpu=True).device  # noqa: B018 forget the devices


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", "cuda:1"), ("cuda", "cuda:0"), (None, "cuda:0")])
def test_one_device_trains_the_chosen_one(
    tmp_path: Path, two_gpus: list[int], device: str | None, expected: str
) -> None:
    """The Trainer by itself takes the first one, and twice the cells a step where it sees two."""
    with settings.override(device=device):
        found = arguments_for(tmp_path, 120, of="cells", given={}, evaluates=True, adapter=None, seed=0)
    assert str(found.device) == expected
    assert found.n_gpu == 1
    assert found.train_batch_size == found.per_device_train_batch_size == 12
    assert found.warmup_steps == 60  # of 100 steps


def test_the_cpu_trains_if_settings_say_so(tmp_path: Path, two_gpus: list[int]) -> None:
    with settings.override(device="cpu"):
        found = arguments_for(tmp_path, 120, of="cells", given={}, evaluates=True, adapter=None, seed=0)
    assert found.device == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:1", None, "cpu"])
def test_the_current_device_and_random_numbers_of_all_devices_stay_what_they_were(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch, device: str | None
) -> None:
    """The Trainer seeds every device, whichever of them trains."""
    states = {0: torch.tensor([10]), 1: torch.tensor([11])}
    before = dict(states)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[int(device)])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({int(device): state}))
    with settings.override(device=device), quiet_surroundings():
        torch.cuda.set_device("cuda:1")
        states.update({0: torch.tensor([0]), 1: torch.tensor([0])})
    assert torch.cuda.current_device() == 0
    assert states == before


@OLD_NAME
@pytest.mark.parametrize("way", [("lora", False), ("lora", True), (None, True)])
def test_a_trained_classifier_stays_on_the_device_of_the_training(
    run: Run, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: tuple[str | None, bool]
) -> None:
    """What is read back from files is put on the device of the training, that held-out scores are computed there."""
    adapter, ends = way
    if adapter:
        pytest.importorskip("peft")
    how = {"adapter": adapter} | FAST | {"num_train_epochs": 9}
    if ends:
        how |= {"stops": task.misleading(), "patience": 1}
        run(tmp_path, **how)  # read back below
    else:
        how["num_train_epochs"] = 1
    moved, move = [], Classifier.to

    def watched(self, *args, **kwargs):
        moved.append((self, args))
        return move(self, *args, **kwargs)

    monkeypatch.setattr(Classifier, "to", watched)
    found = run(tmp_path, **how)
    assert moved[-1][0] is found
    assert moved[-1][1] == (torch.device("cpu"),)


def test_classes_are_weighted_to_count_alike() -> None:
    """As scikit-learn balances them; one that is not there weighs nothing."""
    rng = np.random.default_rng(0)
    truth = np.stack([rng.choice(3, 50, p=[0.6, 0.3, 0.1]), rng.choice([0, 2], 50, p=[0.2, 0.8])], axis=1)
    truth[rng.random(truth.shape) < 0.2] = NOTHING
    found = class_weights(truth, [slice(0, 3), slice(3, 6)])
    assert found.dtype == np.float32
    for at, (part, classes) in enumerate([(slice(0, 3), [0, 1, 2]), (slice(3, 6), [0, 2])]):
        known = truth[:, at][truth[:, at] >= 0]
        expected = np.zeros(3)
        expected[classes] = compute_class_weight("balanced", classes=np.array(classes), y=known)
        np.testing.assert_allclose(found[part], expected, rtol=1e-6)
