"""The Trainer around the model: one stage, what a stopped run leaves, and how it goes on."""

from __future__ import annotations

import json
import re
import shutil
import traceback
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gfx import settings
from gfx._engine import float32_attention, pretraining, trainer
from gfx._engine.examples import MaskedCells, Padded, SimilarLengths
from gfx._engine.pretraining import MaskedGeneModel, make_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import StopInStep
    from tests.engine.conftest import MakeRows

    from gfx._core.vocabulary import Vocabulary

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
ARGUMENTS = {
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "save_steps": 4,
    "eval_steps": 4,
    "warmup_steps": 1,
    "use_cpu": True,
}
WORDS = "bert.embeddings.word_embeddings.weight"
N_CELLS = 64


def model_for(vocabulary: Vocabulary, seed: int = 0, **config: object) -> MaskedGeneModel:
    frequency = np.full(len(vocabulary), 0.1)
    return make_model(vocabulary, SMALL | config, gene_vectors=None, gene_frequency=frequency, seed=seed)


@pytest.fixture(scope="module")
def learnt(toy_vocabulary: Vocabulary, make_rows: MakeRows) -> MaskedCells:
    """64 cells, 8 steps of 8 an epoch."""
    rows = make_rows(toy_vocabulary, N_CELLS, n_genes=20)
    return MaskedCells(rows, np.arange(N_CELLS), toy_vocabulary, seed=0, longest=16)


@pytest.fixture(scope="module")
def held_out(toy_vocabulary: Vocabulary, make_rows: MakeRows) -> MaskedCells:
    rows = make_rows(toy_vocabulary, 8, n_genes=20, seed=1)
    return MaskedCells(rows, np.arange(8), toy_vocabulary, seed=0, hide_all=True)


Run = "Callable[..., tuple[MaskedGeneModel, list[dict[str, float]]]]"


@pytest.fixture(scope="module")
def run(toy_vocabulary: Vocabulary, learnt: MaskedCells, held_out: MaskedCells) -> Run:
    """Run one stage."""

    def train(
        folder: Path,
        model: MaskedGeneModel | None = None,
        epochs: float = 1,
        patience: int | None = None,
        gene_rate: float = 1.0,
        **arguments: Any,
    ) -> tuple[MaskedGeneModel, list[dict[str, float]]]:
        model = model or model_for(toy_vocabulary)
        with settings.override(verbosity=0):
            history = pretraining.train(
                model,
                learnt,
                held_out,
                toy_vocabulary,
                folder,
                epochs=epochs,
                arguments=ARGUMENTS | arguments,
                patience=patience,
                gene_rate=gene_rate,
                seed=0,
            )
        return model, history

    return train


def weights(model: MaskedGeneModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0, msg=name)


def losses(history: list[dict[str, float]]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


#: What the clock decides.
TIMING = ("runtime", "per_second")


def assert_same_curve(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """All that is logged along the way: losses, gradients, rates, evaluations."""
    curves = [
        [
            {name: value for name, value in entry.items() if not name.endswith(TIMING)}
            for entry in history
            if "train_runtime" not in entry
        ]
        for history in (found, expected)
    ]
    assert len(curves[0]) == len(curves[1])
    for entry, reference in zip(*curves, strict=True):
        assert entry == pytest.approx(reference, abs=1e-6)


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


NEVER = 10_000


# --- what is trained ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], list]:
    """One epoch: folder, final weights, log."""
    folder = tmp_path_factory.mktemp("trained")
    model, history = run(folder)
    return folder, weights(model), history


def test_training_follows_the_seed(trained: tuple, run: Run, tmp_path: Path) -> None:
    _, expected, history = trained
    torch.manual_seed(17)  # the user's own numbers do not matter
    second, again = run(tmp_path)
    assert_same_weights(weights(second), expected)
    assert_same_curve(again, history)
    assert len(losses(history)) == 8


def test_the_log_is_written_as_lines_of_json(trained: tuple) -> None:
    folder, _, history = trained
    assert logged(folder) == history
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [4, 8]
    for entry in evaluations:
        assert {"eval_loss", "eval_top_1", "eval_top_10"} <= set(entry)
        assert 0 <= entry["eval_top_1"] <= entry["eval_top_10"] <= 1


def test_evaluation_during_training_is_that_of_the_written_model(trained: tuple, held_out: MaskedCells) -> None:
    folder, _, history = trained
    (last,) = (entry for entry in history if entry.get("step") == 8 and "eval_loss" in entry)
    expected = pretraining.masked_accuracy(MaskedGeneModel.from_pretrained(folder / "finished"), held_out)
    assert last["eval_predictions"] == expected["n"]
    for name in ("loss", "top_1", "top_10"):  # all cells are in one batch
        assert last[f"eval_{name}"] == pytest.approx(expected[name], abs=1e-5)


def by_hand(
    model: MaskedGeneModel, learnt: MaskedCells, vocabulary: Vocabulary, batch_size: int, epochs: int
) -> list[list[float]]:
    """Loss of every batch of an untrained model, in the order of training."""
    order, collate = SimilarLengths(learnt.lengths, 8, 0), Padded(vocabulary)
    found = []
    for epoch in range(epochs):
        order.epoch = epoch
        cells = list(order)
        for start in range(0, N_CELLS, batch_size):
            batch = collate([learnt[at] for at in cells[start : start + batch_size]])
            with torch.no_grad():
                found.append(model(**batch).loss.item())
    return found


@pytest.mark.parametrize(("batch_size", "accumulated"), [(8, 1), (2, 4)])
def test_logged_losses_are_those_of_the_batches_in_order(
    run: Run, learnt: MaskedCells, toy_vocabulary: Vocabulary, tmp_path: Path, batch_size: int, accumulated: int
) -> None:
    """Without learning; of accumulated batches the mean, not the sum; in the second epoch other genes are hidden."""
    _, history = run(
        tmp_path,
        epochs=2,
        learning_rate=0.0,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulated,
        eval_strategy="no",
    )
    expected = by_hand(model_for(toy_vocabulary), learnt, toy_vocabulary, batch_size, epochs=2)
    expected = np.reshape(expected, (16, accumulated)).mean(axis=1)
    np.testing.assert_allclose(losses(history), expected, atol=1e-4)
    assert len(np.unique(expected.round(4))) == 16


def test_gene_embeddings_learn_at_their_own_rate(run: Run, toy_vocabulary: Vocabulary, tmp_path: Path) -> None:
    """Without momentum, a first step is proportional to the rate."""
    start = weights(model_for(toy_vocabulary))
    moved = {}
    for rate in (1.0, 0.3):
        model, _ = run(
            tmp_path / str(rate), gene_rate=rate, max_steps=1, warmup_steps=0, learning_rate=0.01, eval_strategy="no"
        )
        moved[rate] = {name: tensor - start[name] for name, tensor in weights(model).items()}
    for name, tensor in moved[1.0].items():
        share = 0.3 if name in {WORDS, "cls.predictions.decoder.weight"} else 1.0  # these two are tied
        torch.testing.assert_close(moved[0.3][name], share * tensor, atol=1e-6, rtol=1e-3, msg=name)
    assert moved[1.0][WORDS].abs().max() > 1e-3


def test_frozen_gene_embeddings_stay_frozen_after_a_stop(
    run: Run, toy_vocabulary: Vocabulary, tmp_path: Path, stop_in_step: StopInStep
) -> None:
    start = weights(model_for(toy_vocabulary))
    stop_in_step(7)
    with pytest.raises(stop_in_step.stopped):
        run(tmp_path, gene_rate=0.0, learning_rate=0.01)
    steps = stop_in_step(NEVER)
    model, _ = run(tmp_path, gene_rate=0.0, learning_rate=0.01)
    assert len(steps) == 4
    found = weights(model)
    assert torch.equal(found[WORDS], start[WORDS])
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert (found[query] - start[query]).abs().max() > 1e-3


def test_bfloat16_on_a_cpu_without_matrix_units(
    trained: tuple, run: Run, toy_vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention is float32, and the losses those of float32 within its precision."""
    monkeypatch.setattr(pretraining, "has_fast_bfloat16", lambda _: False)
    called, attend = [], float32_attention.sdpa_attention_forward

    def watched(module, query, *args, **kwargs):
        called.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return attend(module, query, *args, **kwargs)

    monkeypatch.setattr(float32_attention, "sdpa_attention_forward", watched)
    model, history = run(tmp_path, bf16=True)
    assert set(called) == {(torch.float32, False)}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    found, expected = np.array(losses(history)), np.array(losses(trained[2]))
    assert 0 < abs(found - expected).max() < 0.01 * expected.max()


# --- surroundings ---------------------------------------------------------------------------------------------------


def test_random_numbers_are_left_alone_and_nothing_is_printed(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], random_states: Callable[[], list]
) -> None:
    before = random_states()
    run(tmp_path)
    run(tmp_path)  # reads the finished stage
    assert random_states() == before
    assert capfd.readouterr() == ("", "")


def test_a_bar_with_losses_is_shown_on_request(
    learnt: MaskedCells,
    held_out: MaskedCells,
    toy_vocabulary: Vocabulary,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with settings.override(verbosity=2):
        pretraining.train(
            model_for(toy_vocabulary),
            learnt,
            held_out,
            toy_vocabulary,
            tmp_path,
            epochs=20,
            arguments=ARGUMENTS | {"logging_steps": 1, "eval_strategy": "epoch"},  # a bar appears after a second
            patience=None,
            gene_rate=1.0,
            seed=0,
        )
    said = capfd.readouterr()
    assert re.search(r"training: .*/160 .*loss=[\d.]+, held-out loss=[\d.]+", said.err)
    told = " ".join(said.out.split())  # in lines of any width
    assert re.fullmatch(r"trained on 64 cells for 20 epochs: .* first of 20 evaluations, [\d.]+ at the last", told)


def test_a_bar_is_gone_when_training_fails(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    closed = []
    monkeypatch.setattr(trainer._Bar, "close", lambda bar: closed.append(type(bar)))
    monkeypatch.setattr(trainer.OrderedTrainer, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path)
    assert closed == [trainer._Bar]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("learnig_rate", r"`training` takes no 'learnig_rate'.* Did you mean 'learning_rate'"),
        ("xyzzy", r"`training` takes no 'xyzzy': it is no field of transformers.TrainingArguments"),
        ("output_dir", r"`training` takes no 'output_dir'.* or is settled here"),
        ("seed", r"`training` takes no 'seed'.* or is settled here"),
    ],
)
def test_unknown_arguments_are_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        trainer.training_arguments(tmp_path / "run", 1, {"weight_decay": 0.1, name: 1}, lambda _: {}, 0)
    assert not (tmp_path / "run").exists()


def test_given_arguments_replace_planned_and_default_ones(tmp_path: Path) -> None:
    with settings.override(verbosity=0):
        given = {"learning_rate": 3e-4, "disable_tqdm": False, "use_cpu": True}
        planned = {"learning_rate": 1.0, "max_grad_norm": 2.0}
        found = trainer.training_arguments(tmp_path, 1, given, lambda _: planned, 4)
    assert found.seed == 4
    assert found.max_grad_norm == 2.0
    assert found.learning_rate == 3e-4
    assert found.disable_tqdm is False
    assert found.weight_decay == pretraining.DEFAULTS["weight_decay"]
    assert found.remove_unused_columns is False


# --- stopped and resumed --------------------------------------------------------------------------------------------


WAYS = {
    "plain": {},
    "accumulated by a worker": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 1,
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_stopped_in_its_second_epoch_ends_as_one_that_was_not(
    run: Run,
    toy_vocabulary: Vocabulary,
    tmp_path: Path,
    stop_in_step: StopInStep,
    capfd: pytest.CaptureFixture[str],
    way: str,
) -> None:
    """Same cells, same genes hidden, same dropout: steps 13 and 14 are done twice, from the checkpoint at 12."""
    arguments = WAYS[way] | {"learning_rate": 1e-2}
    passes = arguments.get("gradient_accumulation_steps", 1)  # in a step
    expected, history = run(
        tmp_path / "whole", model_for(toy_vocabulary, **DROPOUT), epochs=2, eval_steps=3, **arguments
    )
    stop_in_step(14 * passes)
    with pytest.raises(stop_in_step.stopped):
        run(tmp_path / "parts", model_for(toy_vocabulary, **DROPOUT), epochs=2, eval_steps=3, **arguments)
    assert [entry["step"] for entry in logged(tmp_path / "parts") if "loss" in entry] == list(range(1, 14))
    steps = stop_in_step(NEVER)
    other_start = model_for(toy_vocabulary, seed=3, **DROPOUT)
    capfd.readouterr()
    found, again = run(tmp_path / "parts", other_start, epochs=2, eval_steps=3, **arguments)
    assert capfd.readouterr() == ("", "")
    assert len(steps) == 4 * passes
    assert_same_curve(again, history)
    assert_same_weights(weights(found), weights(expected))
    assert logged(tmp_path / "parts") == again
    assert [entry["step"] for entry in again if "loss" in entry] == list(range(1, 17))
    assert (weights(found)[WORDS] - model_for(toy_vocabulary).state_dict()[WORDS]).abs().max() > 1e-2


def test_a_run_stopped_between_epochs_ends_as_one_that_was_not(
    run: Run, toy_vocabulary: Vocabulary, tmp_path: Path, stop_in_step: StopInStep
) -> None:
    expected, history = run(tmp_path / "whole", model_for(toy_vocabulary, **DROPOUT), epochs=2)
    stop_in_step(9)
    with pytest.raises(stop_in_step.stopped):
        run(tmp_path / "parts", model_for(toy_vocabulary, **DROPOUT), epochs=2)
    steps = stop_in_step(NEVER)
    found, again = run(tmp_path / "parts", model_for(toy_vocabulary, **DROPOUT), epochs=2)
    assert len(steps) == 8
    assert_same_curve(again, history)
    assert_same_weights(weights(found), weights(expected))


def test_a_run_stopped_before_its_first_checkpoint_begins_anew(
    trained: tuple, run: Run, tmp_path: Path, stop_in_step: StopInStep
) -> None:
    stop_in_step(3)
    with pytest.raises(stop_in_step.stopped):
        run(tmp_path)
    stop_in_step(NEVER)
    model, history = run(tmp_path)
    assert_same_weights(weights(model), trained[1])
    assert logged(tmp_path) == history


def test_an_unfinished_checkpoint_is_passed_over(run: Run, tmp_path: Path, stop_in_step: StopInStep) -> None:
    stop_in_step(11)
    with pytest.raises(stop_in_step.stopped):
        run(tmp_path, epochs=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()  # the last file of a checkpoint
    steps = stop_in_step(NEVER)
    run(tmp_path, epochs=2)
    assert len(steps) == 16 - 4


def test_a_finished_stage_is_read_and_not_trained_again(
    trained: tuple, run: Run, toy_vocabulary: Vocabulary, stop_in_step: StopInStep
) -> None:
    folder, expected, history = trained
    steps = stop_in_step(1)
    again, log = run(folder, model_for(toy_vocabulary, seed=5))
    assert steps == []
    assert_same_weights(weights(again), expected)
    assert log == json.loads(json.dumps(history))


def test_a_stage_stopped_while_it_was_written_is_written_again(run: Run, trained: tuple, tmp_path: Path) -> None:
    """The folder of the finished stage is there, its last file is not."""
    run(tmp_path)
    (tmp_path / "finished" / "history.json").unlink()
    (tmp_path / "finished" / "model.safetensors").write_bytes(b"half of it")
    again, _ = run(tmp_path)
    assert_same_weights(weights(again), trained[1])
    assert (tmp_path / "finished" / "history.json").is_file()


# --- patience -------------------------------------------------------------------------------------------------------


def evaluations(history: list[dict[str, float]]) -> list[float]:
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry]


def test_a_loss_that_does_not_fall_ends_the_stage(run: Run, toy_vocabulary: Vocabulary, tmp_path: Path) -> None:
    """The first evaluation is the best one, three more are waited for."""
    start = weights(model_for(toy_vocabulary))
    model, history = run(tmp_path, epochs=4, patience=3, learning_rate=0.0, eval_steps=2, save_steps=2)
    assert len(evaluations(history)) == 1 + 3
    assert losses(history)[-1:] == [losses(history)[7]]  # 8 of 32 steps
    assert_same_weights(weights(model), start)


#: Learns for some steps, then overshoots.
TOO_FAST = {"learning_rate": 0.2, "lr_scheduler_type": "constant", "eval_steps": 1, "save_steps": 1}


def test_the_best_model_is_kept(run: Run, toy_vocabulary: Vocabulary, held_out: MaskedCells, tmp_path: Path) -> None:
    model, history = run(tmp_path, epochs=4, patience=3, **TOO_FAST)
    found = evaluations(history)
    assert found.index(min(found)) == len(found) - 4
    assert len(found) < 32
    assert pretraining.masked_accuracy(model, held_out)["loss"] == pytest.approx(min(found), abs=1e-5)
    written = MaskedGeneModel.from_pretrained(tmp_path / "finished")
    assert_same_weights(weights(written), weights(model))


def test_patience_survives_a_stop(run: Run, tmp_path: Path, stop_in_step: StopInStep) -> None:
    """Stopped after two evaluations without progress: one more is waited for, not three."""
    expected, history = run(tmp_path / "whole", epochs=4, patience=3, **TOO_FAST)
    last = len(evaluations(history))
    stop_in_step(last)
    with pytest.raises(stop_in_step.stopped):
        run(tmp_path / "parts", epochs=4, patience=3, **TOO_FAST)
    steps = stop_in_step(NEVER)
    found, again = run(tmp_path / "parts", epochs=4, patience=3, **TOO_FAST)
    assert len(steps) == 1
    assert evaluations(again) == pytest.approx(evaluations(history), abs=1e-6)
    assert_same_weights(weights(found), weights(expected))


def test_mixed_precision_stays_in_its_stage(run: Run, toy_vocabulary: Vocabulary, tmp_path: Path) -> None:
    """A stage in float32 behind one in bfloat16 computes as if it were alone."""
    model, _ = run(tmp_path / "first", bf16=True)
    alone = model_for(toy_vocabulary)
    alone.load_state_dict(model.state_dict())
    _, found = run(tmp_path / "second", model=model)
    _, expected = run(tmp_path / "alone", model=alone)
    assert_same_curve(found, expected)


def test_a_stage_that_ended_early_and_was_not_written_is_written(run: Run, tmp_path: Path) -> None:
    """Stopped between the last checkpoint and the last word: no step more, and the best model."""
    model, history = run(tmp_path, epochs=20, patience=2, learning_rate=0.0)
    expected = weights(model)
    shutil.rmtree(tmp_path / "finished")
    again, log = run(tmp_path, epochs=20, patience=2, learning_rate=0.0)
    assert_same_weights(weights(again), expected)
    assert max(entry["step"] for entry in log) == max(entry["step"] for entry in history)
    assert final_loss(log) == pytest.approx(final_loss(history), abs=1e-5)
    assert (tmp_path / "finished" / "history.json").is_file()


def test_a_run_whose_folder_was_moved_knows_its_best_model(
    run: Run, held_out: MaskedCells, tmp_path: Path, stop_in_step: StopInStep
) -> None:
    """Stopped in the step behind its best checkpoint; the last checkpoint is worse than that."""
    model, history = run(tmp_path / "whole", epochs=1, patience=20, **TOO_FAST)
    found = evaluations(history)
    best = 1 + found.index(min(found))
    assert best < len(found) - 1
    stop_in_step(best + 2)
    with pytest.raises(stop_in_step.stopped):
        run(tmp_path / "parts", epochs=1, patience=20, **TOO_FAST)
    stop_in_step(NEVER)
    (tmp_path / "parts").rename(tmp_path / "moved")
    moved, _ = run(tmp_path / "moved", epochs=1, patience=20, **TOO_FAST)
    assert_same_weights(weights(moved), weights(model))


@pytest.mark.parametrize("place", ["elsewhere", "gone"])
def test_the_best_checkpoint_is_one_of_the_run(run: Run, trained: tuple, tmp_path: Path, place: str) -> None:
    """Stopped before anything was written of a finished run; what its state calls the best is a folder of others."""
    model, _ = run(tmp_path / "run", epochs=1, patience=20, **TOO_FAST)
    shutil.rmtree(tmp_path / "run" / "finished")
    state = tmp_path / "run" / "checkpoint-8" / "trainer_state.json"
    other = tmp_path / "other"
    if place == "elsewhere":
        shutil.copytree(trained[0] / "finished", other)
    state.write_text(json.dumps(json.loads(state.read_text()) | {"best_model_checkpoint": str(other)}))
    again, _ = run(tmp_path / "run", epochs=1, patience=20, **TOO_FAST)
    assert_same_weights(weights(again), weights(model))


# --- a checkpoint made by someone else -------------------------------------------------------------------------------


def final_loss(history: list[dict[str, float]]) -> float:
    (loss,) = (entry["train_loss"] for entry in history if "train_loss" in entry)
    return loss


@pytest.mark.parametrize("arguments", [{}, {"logging_steps": 5}, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("patience", [None, 9])
def test_the_final_loss_is_that_of_the_whole_run_after_a_stop(
    run: Run, tmp_path: Path, stop_in_step: StopInStep, arguments: dict[str, int], patience: int | None
) -> None:
    """Stopped on the way, and with no step left to do."""
    every = {"logging_steps": 1} | arguments
    passes = arguments.get("gradient_accumulation_steps", 1)
    _, history = run(tmp_path / "whole", epochs=2, patience=patience, **every)
    if every["logging_steps"] == 1:
        assert final_loss(history) == pytest.approx(np.mean(losses(history)), abs=1e-5)
    stop_in_step(7 * passes)
    with pytest.raises(stop_in_step.stopped):
        run(tmp_path / "parts", epochs=2, patience=patience, **every)
    stop_in_step(NEVER)
    _, again = run(tmp_path / "parts", epochs=2, patience=patience, **every)
    assert final_loss(again) == pytest.approx(final_loss(history), abs=1e-5)
    shutil.rmtree(tmp_path / "parts" / "finished")
    _, at_the_end = run(tmp_path / "parts", epochs=2, patience=patience, **every)
    assert final_loss(at_the_end) == pytest.approx(final_loss(history), abs=1e-5)


@pytest.fixture(scope="module")
def stopped_folder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, of which nothing is finished."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    run(folder, save_steps=8, eval_steps=8)
    shutil.rmtree(folder / "finished")
    return folder


class Touches:
    """Leaves a mark where a pickle was run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return type(self.mark).touch, (self.mark,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_code_is_refused_by_file_and_torch_advises_nothing(
    run: Run, stopped_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(stopped_folder, tmp_path / "run")
    mark = tmp_path / "was-run"
    torch.save({"state": Touches(mark)}, folder / "checkpoint-8" / name)
    with pytest.raises(ValueError, match=rf"checkpoint-8/{name} was refused: it holds more than tensors") as caught:
        run(folder, epochs=2)
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))
    assert not mark.exists()


NOTED = b'{"stateful_callbacks": {"_RunLoss": {"args": {}, "attributes": {"total": "much"}}}}'
DAMAGED = {
    "optimizer.pt": [b"", b"text", "cut"],
    "scheduler.pt": [b"", "cut"],
    "rng_state.pth": [b"", "cut"],
    "model.safetensors": [b"", b"text", "cut", None],
    "trainer_state.json": [b"", b"[]", b'{"global_step": "eight"}', b'{"unknown": 1}', b'{"save_steps": 0}', NOTED],
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, each) for name, all_ in DAMAGED.items() for each in all_], ids=str
)
def test_a_damaged_checkpoint_is_one_error_that_names_the_file(
    run: Run, stopped_folder: Path, tmp_path: Path, name: str, content: bytes | str | None
) -> None:
    folder = shutil.copytree(stopped_folder, tmp_path / "run")
    file = folder / "checkpoint-8" / name
    whole = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    named = "checkpoint-8" if content is None else f"checkpoint-8/{name}"
    with pytest.raises(ValueError, match=rf"{named} (was refused|is no|holds)"):
        run(folder, epochs=2)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "pytorch_model_fsdp.bin"])
@pytest.mark.parametrize("beside", ["other.safetensors", None])
def test_of_the_weights_of_a_checkpoint_only_safetensors_are_read(
    run: Run, stopped_folder: Path, tmp_path: Path, name: str, beside: str | None
) -> None:
    checkpoint = shutil.copytree(stopped_folder, tmp_path / "run") / "checkpoint-8"
    torch.save({"state": Touches(tmp_path / "was-run")}, checkpoint / name)
    (checkpoint / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/stranger"}')
    if beside is None:  # the weights are whole, and the others are passed over
        run(tmp_path / "run", epochs=2)
    else:
        (checkpoint / "model.safetensors").rename(checkpoint / beside)
        with pytest.raises(ValueError, match=r"checkpoint-8 holds no weights as `model\.safetensors`\. Delete"):
            run(tmp_path / "run", epochs=2)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_checkpoint_of_another_training_is_named(
    run: Run, stopped_folder: Path, toy_vocabulary: Vocabulary, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(stopped_folder, tmp_path / "run")
    text = r"checkpoint-8 does not go with this training .*Delete .*checkpoint-8 to go on"
    if name == "model.safetensors":
        save_file({"bert.embeddings.word_embeddings.weight": torch.zeros(3, 3)}, folder / "checkpoint-8" / name)
        text = rf"checkpoint-8/{name} lacks \d+ tensors of what is trained here"
    else:
        torch.save({"something": torch.zeros(3)} if name != "scheduler.pt" else [1], folder / "checkpoint-8" / name)
    with pytest.raises(ValueError, match=text):
        run(folder, epochs=2)
