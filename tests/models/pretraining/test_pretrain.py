"""A model of one's own, from counts to embeddings."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from scipy import sparse
from transformers import BertConfig, BertForSequenceClassification

import gfx
from gfx._engine import examples
from gfx._engine.examples import MaskedCells
from gfx._engine.pretraining import MaskedGeneModel, masked_accuracy, read_model
from gfx.models import build_vocabulary, load, pretrain
from gfx.models._plan import keep_to_plan
from gfx.models._registry import CONFIGURATIONS
from gfx.models._vocabulary_file import write_vocabulary
from gfx.models.pretraining._coexpression import find_coexpression
from gfx.models.pretraining._pretrain import GENE_RATE_WHEN_STARTED, _each_stage, _what_to_train
from gfx.models.pretraining._shards import TokenShards

if TYPE_CHECKING:
    from tests.conftest import StopInStep, ToyCells

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "initializer_range": 0.2,  # wide, so that so narrow a model learns at once
}
QUICK = {
    "per_device_train_batch_size": 16,
    "logging_steps": 1,
    "save_steps": 4,
    "eval_steps": 4,
    "warmup_steps": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
}
WORDS = "bert.embeddings.word_embeddings.weight"
DISTRIBUTED = Path(__file__).with_name("distributed_pretraining.py")


def gene_ids(n: int, start: int = 1) -> list[str]:
    return [f"ENSG{number:011d}" for number in range(start, start + n)]


@pytest.fixture(scope="module")
def structured() -> ad.AnnData:
    """240 cells of six types, each with 10 genes of its own beside noise: who sees the others knows the hidden one."""
    rng = np.random.default_rng(0)
    types = np.arange(240) % 6
    rate = np.full((240, 60), 0.02)
    for kind in range(6):
        rate[np.ix_(types == kind, np.arange(10 * kind, 10 * kind + 10))] = 4.0
    adata = ad.AnnData(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)))
    adata.var_names = gene_ids(60)
    adata.obs_names = [f"cell{at}" for at in range(240)]
    adata.obs["type"] = pd.Categorical([f"type{kind}" for kind in types])
    return adata


WHOLE = {
    "config": TINY | {"num_hidden_layers": 1},
    "curriculum": [(24, 2), (48, 14)],
    "training": QUICK | {"eval_steps": 20, "save_steps": 50},
    "held_out": 0.2,
}


@pytest.fixture(scope="module")
def trained(structured: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained until it knows something."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    with gfx.settings.override(verbosity=0):
        returned = pretrain([structured], folder, **WHOLE)
    assert returned == folder
    return folder


def quick_run(structured: ad.AnnData, folder: Path, **changes: Any) -> Path:
    """Train 80 cells in stages of 5 and 10 steps."""
    how = {"config": TINY, "curriculum": [(24, 1), (48, 2)], "training": QUICK} | changes
    with gfx.settings.override(verbosity=0):
        return pretrain(structured[:80].copy(), folder, **how)


@pytest.fixture(scope="module")
def quick(structured: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick_run(structured, tmp_path_factory.mktemp("runs") / "quick")


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "pretraining.json").read_text())


def read(folder: Path) -> MaskedGeneModel:
    model = load(folder)
    return read_model(model.weights, model.config)


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in report(folder)["history"] if "loss" in entry]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder: Path, other: Path) -> None:
    expected = weights(other)
    for name, tensor in weights(folder).items():
        np.testing.assert_allclose(tensor, expected[name], atol=1e-6, err_msg=name)


def held_cells(folder: Path, seed: int = 0) -> MaskedCells:
    """Read the cells that the report says were held out, as they are evaluated."""
    rows = TokenShards(sorted((folder / "tokens").glob("*.npy")))
    ((_, cells),) = report(folder)["held_out"].items()
    return MaskedCells(rows, np.array(cells), load(folder).vocabulary, seed=seed, hide_all=True)


# --- training -------------------------------------------------------------------------------------------------------


def test_masked_genes_are_predicted_better_than_by_rank(trained: Path) -> None:
    found = report(trained)
    assert np.mean(losses(trained)[-5:]) < 0.8 * np.mean(losses(trained)[:5])
    assert found["masked_gene"]["top_10"] > found["rank_baseline"]["top_10"] + 0.2
    assert found["masked_gene"]["top_1"] > found["rank_baseline"]["top_1"]
    assert found["masked_gene"]["n"] == found["rank_baseline"]["n"]
    assert found["cells"] == 240 - 48


@pytest.mark.usefixtures("in_float32")
def test_the_folder_loads_and_embeds(trained: Path, structured: ad.AnnData) -> None:
    model = load(trained)
    assert model.name == "own"
    assert model.n_layers == 1
    assert model.vocabulary.sha256 == build_vocabulary([structured]).sha256
    adata = structured.copy()
    gfx.tl.embed(adata, model=trained, hidden_layer=-1)
    vectors = adata.obsm["X_gfx"] - adata.obsm["X_gfx"].mean(axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = (vectors @ vectors.T - 2 * np.eye(240)).argmax(axis=1)
    same = adata.obs["type"].to_numpy() == adata.obs["type"].to_numpy()[nearest]
    assert same.mean() > 0.9  # <cls> tells the types apart


def test_the_reported_accuracy_is_that_of_the_written_model(trained: Path) -> None:
    assert masked_accuracy(read(trained), held_cells(trained)) == pytest.approx(report(trained)["masked_gene"])


def test_the_same_seed_gives_the_same_model(quick: Path, structured: ad.AnnData, tmp_path: Path) -> None:
    second = quick_run(structured, tmp_path / "second", rng=0)
    assert_same_weights(second, quick)
    assert losses(second) == losses(quick)
    other = quick_run(structured, tmp_path / "other", rng=1, curriculum=[(24, 1)])
    assert abs(weights(other)[WORDS] - weights(quick)[WORDS]).max() > 0.01


def test_each_stage_writes_its_log_as_lines_of_json(quick: Path) -> None:
    lines = [
        [json.loads(line) for line in (quick / "stages" / stage / "log.jsonl").read_text().splitlines()]
        for stage in "01"
    ]
    assert [entry["step"] for entry in lines[0] if "loss" in entry] == list(range(1, 6))
    assert [entry["step"] for entry in lines[1] if "loss" in entry] == list(range(1, 11))
    assert lines[0] + lines[1] == report(quick)["history"]
    evaluations = [entry for stage in lines for entry in stage if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [4, 5, 4, 8, 10]  # and at the end of a stage
    for name in ("top_1", "top_10", "top_1_unseen", "top_10_unseen"):
        assert all(f"eval_{name}" in entry for entry in evaluations)
        assert evaluations[-1][f"eval_{name}"] == pytest.approx(report(quick)["masked_gene"][name])


def test_each_stage_may_have_arguments_of_its_own(structured: ad.AnnData, tmp_path: Path) -> None:
    folder = quick_run(structured, tmp_path, training=[QUICK | {"learning_rate": 0.0}, QUICK | {"learning_rate": 1e-3}])
    rates = [entry["learning_rate"] for entry in report(folder)["history"] if "learning_rate" in entry]
    assert rates[:5] == [0.0] * 5
    assert max(rates[5:]) == pytest.approx(1e-3)
    assert len(rates) == 15


def test_a_stage_ends_when_patience_does(structured: ad.AnnData, tmp_path: Path) -> None:
    """Nothing is learnt, so the first of ten evaluations is not bettered by the second."""
    training = QUICK | {"learning_rate": 0.0, "eval_steps": 1, "save_steps": 1}
    folder = quick_run(structured, tmp_path, curriculum=[(48, 2)], training=training, patience=1)
    assert len(losses(folder)) == 2
    losses_held_out = [entry["eval_loss"] for entry in report(folder)["history"] if "eval_loss" in entry]
    assert report(folder)["masked_gene"]["loss"] == pytest.approx(losses_held_out[0], abs=1e-5)


def test_random_numbers_are_left_alone_and_nothing_is_printed(
    structured: ad.AnnData, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def states() -> list:
        name, keys, *rest = np.random.get_state()
        return [torch.get_rng_state().tolist(), name, keys.tolist(), rest, random.getstate()]

    before = states()
    quick_run(structured, tmp_path / "new", start_from="coexpression", cell_weight=1.0, curriculum=[(24, 1)])
    quick_run(structured, tmp_path / "new", start_from="coexpression", cell_weight=1.0, curriculum=[(24, 1)])
    quick_run(structured, tmp_path / "on", start_from=trained, config=None, curriculum=[(24, 1)])
    assert states() == before
    assert capfd.readouterr() == ("", "")


# --- stopped and resumed --------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    quick: Path, structured: ad.AnnData, tmp_path: Path, stop_in_step: StopInStep
) -> None:
    """Stopped in its second stage, in the second epoch: the first is not trained again."""
    folder = tmp_path / "run"
    stop_in_step(5 + 10)
    with pytest.raises(stop_in_step.stopped):
        quick_run(structured, folder)
    assert not (folder / "config.json").exists()  # nothing that looks like a model
    shards = {path.name: path.stat().st_ino for path in (folder / "tokens").iterdir()}
    steps = stop_in_step(10_000)
    quick_run(structured, folder)
    assert len(steps) == 2  # 76 cells in batches of 16: 5 steps, then 10, of these 8 in a checkpoint
    assert losses(folder) == pytest.approx(losses(quick), abs=1e-6)
    final, expected = ([entry.get("train_loss") for entry in report(each)["history"]] for each in (folder, quick))
    assert final == pytest.approx(expected, abs=1e-5)
    assert_same_weights(folder, quick)
    assert {path.name: path.stat().st_ino for path in (folder / "tokens").iterdir()} == shards


def test_a_finished_run_is_not_trained_again(quick: Path, structured: ad.AnnData, stop_in_step: StopInStep) -> None:
    before = {name: (quick / name).read_bytes() for name in ("model.safetensors", "pretraining.json")}
    steps = stop_in_step(1)
    quick_run(structured, quick)
    assert steps == []
    assert {name: (quick / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"training": QUICK | {"learning_rate": 1e-3}}, "another training,"),
        ({"training": None}, "another cells per step, training,"),
        ({"config": TINY | {"hidden_size": 16}}, "another config,"),
        ({"curriculum": [(24, 2)], "rng": 1}, "another cells per step, curriculum, rng, training,"),
        ({"cell_weight": 1.0, "config": TINY}, "another cell_weight, config,"),
        ({"patience": 3, "training": QUICK | {"eval_steps": 5, "save_steps": 5}}, "another patience, training,"),
        ({"held_out": 0.1}, "another held_out,"),
        ({"start_from": "coexpression"}, "another start_from,"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    structured: ad.AnnData, trained: Path, changes: dict[str, Any], text: str
) -> None:
    before = (trained / "model.safetensors").read_bytes()
    with gfx.settings.override(verbosity=0), pytest.raises(ValueError, match=f"holds a run with {text}"):
        pretrain([structured], trained, **(WHOLE | changes))
    assert (trained / "model.safetensors").read_bytes() == before


def test_settings_that_change_no_loss_may_differ(quick: Path, structured: ad.AnnData) -> None:
    before = (quick / "model.safetensors").read_bytes()
    quick_run(structured, quick, training=QUICK | {"logging_steps": 7, "save_total_limit": 1})
    assert (quick / "model.safetensors").read_bytes() == before


def test_another_number_of_cells_in_a_step_is_refused(quick: Path, structured: ad.AnnData) -> None:
    """As with another number of processes: the run would end elsewhere, and not say so."""
    plan = json.loads((quick / "plan.json").read_text())
    assert plan["cells per step"] == [16, 16]
    text = r"another cells per step.*- cells per step: \[16, 16\], now \[32, 32\]"
    with pytest.raises(ValueError, match=f"(?s){text}"):
        quick_run(structured, quick, training=QUICK | {"gradient_accumulation_steps": 2})


def test_the_model_is_there_before_it_is_scored(
    structured: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring may take long; other processes return, and a stop costs nothing but the report."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gfx._engine.pretraining.masked_accuracy", stopped)
        with pytest.raises(KeyboardInterrupt):
            quick_run(structured, tmp_path / "run")
    assert load(tmp_path / "run").n_layers == 2
    assert report(quick_run(structured, tmp_path / "run"))["masked_gene"]["n"] > 0


def test_a_trained_model_starts_with_a_low_learning_rate(trained: Path, structured: ad.AnnData, tmp_path: Path) -> None:
    given = {name: value for name, value in QUICK.items() if name != "learning_rate"}
    folder = quick_run(structured, tmp_path / "run", start_from=trained, config=None, training=given)
    rates = [entry["learning_rate"] for entry in report(folder)["history"] if "learning_rate" in entry]
    assert 0 < max(rates) <= 5e-5


def test_a_seed_that_is_no_number_is_refused(structured: ad.AnnData, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`rng` is a whole number"):
        quick_run(structured, tmp_path / "run", rng=None)
    assert not (tmp_path / "run").exists()


def test_other_cells_in_the_same_folder_are_refused(structured: ad.AnnData, quick: Path) -> None:
    vocabulary = load(quick).vocabulary
    with pytest.raises(ValueError, match="holds a run with another cells,"):
        quick_run(structured[80:], quick, vocabulary=vocabulary)


def test_a_plan_is_the_same_when_it_is_read_back(tmp_path: Path) -> None:
    plan = {"curriculum": ((24, 1),), "training": {"logging_dir": tmp_path, "betas": (0.9, 0.99)}}
    keep_to_plan(tmp_path, plan, unfinished="stages")
    keep_to_plan(tmp_path, plan, unfinished="stages")
    with pytest.raises(ValueError, match="another training,"):
        keep_to_plan(
            tmp_path, plan | {"training": {"logging_dir": tmp_path, "betas": (0.9, 0.95)}}, unfinished="stages"
        )


def test_a_plan_made_with_other_versions_goes_on_with_a_warning(tmp_path: Path) -> None:
    keep_to_plan(tmp_path, {"rng": 0}, unfinished="stages")
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"torch_version": "2.0", "gfx_version": "0.0.1"}))
    with pytest.warns(UserWarning, match=r"began with gfx 0\.0\.1 \(now .*\) and torch 2\.0 \(now .*\)") as caught:
        keep_to_plan(tmp_path, {"rng": 0}, unfinished="stages")
    assert caught[0].filename == __file__, "shown at the caller's line"
    with pytest.raises(ValueError, match="another rng,"):
        keep_to_plan(tmp_path, {"rng": 1}, unfinished="stages")


# --- which cells ----------------------------------------------------------------------------------------------------


def test_held_out_cells_are_those_that_were_not_trained_on(
    structured: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watched while it trains, cell by cell; two cells of one gene are left out and not counted."""
    first, second = structured[:40].copy(), structured[40:75].copy()
    x = second.X.toarray()
    x[[3, 20]] = 0
    x[[3, 20], 5] = 1
    second.X = sparse.csr_matrix(x)
    asked: dict[bool, set[int]] = {True: set(), False: set()}
    look = MaskedCells.__getitem__

    def watched(self, index):
        asked[self.hide_all].add(int(self.cells[index % len(self)]))
        return look(self, index)

    monkeypatch.setattr(examples.MaskedCells, "__getitem__", watched)
    with gfx.settings.override(verbosity=0):
        folder = pretrain([first, second], tmp_path, config=TINY, curriculum=[(24, 1)], training=QUICK, held_out=0.3)
    found = report(folder)["held_out"]
    assert list(found) == ["0: source 0", "1: source 1"]
    held = set(found["0: source 0"]) | {40 + cell for cell in found["1: source 1"]}
    assert asked == {True: held, False: set(range(73)) - held}
    assert len(held) == round(0.3 * 73)
    assert report(folder)["cells"] == 73 - len(held)
    assert all(cells == sorted(cells) for cells in found.values())


@pytest.mark.parametrize("held_out", [0.0, 1.0])
def test_held_out_shares_that_leave_a_part_empty_are_refused(
    structured: ad.AnnData, tmp_path: Path, held_out: float
) -> None:
    with pytest.raises(ValueError, match=rf"`held_out={held_out}` keeps \d+ of 80 cells"):
        quick_run(structured, tmp_path, held_out=held_out)


# --- what a model starts from ---------------------------------------------------------------------------------------


def test_start_from_coexpression(structured: ad.AnnData, tmp_path: Path) -> None:
    """Genes of one type start alike, and learn slower than all else."""
    folder = quick_run(
        structured,
        tmp_path,
        start_from="coexpression",
        config=TINY | {"hidden_size": 8},  # five directions tell six types apart, the others are noise
        training=QUICK | {"learning_rate": 1e-4},
        curriculum=[(48, 1)],
    )
    words = weights(folder)[WORDS][4:64]
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    alike = words @ words.T
    same_type = np.kron(np.eye(6), np.ones((10, 10))).astype(bool)
    assert alike[same_type & ~np.eye(60, dtype=bool)].mean() > alike[~same_type].mean() + 0.2
    assert initial_rates(folder) == pytest.approx([GENE_RATE_WHEN_STARTED * 1e-4, 1e-4])


def initial_rates(folder: Path) -> list[float]:
    """Learning rates of all groups of parameters."""
    last = max((folder / "stages" / "0").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    groups = torch.load(last / "optimizer.pt", weights_only=True)["param_groups"]
    return sorted({group["initial_lr"] for group in groups})


def test_random_weights_are_trained_at_one_rate(quick: Path) -> None:
    assert initial_rates(quick) == [1e-2]


def test_cell_weight_makes_cls_like_the_cell_vector(structured: ad.AnnData, tmp_path: Path) -> None:
    """On cells that were held out, where embeddings are read from."""
    likeness = {}
    for weight in (0.0, 5.0):
        folder = quick_run(structured, tmp_path / str(weight), cell_weight=weight, curriculum=[(48, 4)], held_out=0.25)
        held = held_cells(folder)
        learnt = np.setdiff1d(np.arange(80), held.cells)
        coexpression = find_coexpression(held.rows, learnt, held.vocabulary, 32, seed=0)
        model = read(folder).eval()
        found = []
        for cell in held.cells:
            row = held.rows[cell]
            with torch.no_grad():
                ids = torch.from_numpy(row.astype(np.int64))[None]
                cls = model.bert(ids, output_hidden_states=True).hidden_states[-2][0, 0].numpy()
            vector = coexpression.cell_vector(row)
            found.append(cls @ vector / np.linalg.norm(cls) / np.linalg.norm(vector))
        likeness[weight] = np.mean(found)
    assert likeness[5.0] > likeness[0.0] + 0.3
    assert report(folder)["cell_weight"] == 5.0


def test_a_given_vocabulary_is_used(structured: ad.AnnData, tmp_path: Path) -> None:
    vocabulary = build_vocabulary([structured], name="mine", genes=structured.var_names[:40])
    folder = quick_run(structured, tmp_path, vocabulary=vocabulary, curriculum=[(24, 1)])
    assert load(folder).vocabulary.sha256 == vocabulary.sha256
    assert load(folder).vocabulary.name == "mine"


#: Without learning, what comes out is what it started from.
STILL = QUICK | {"learning_rate": 0.0, "max_steps": 2, "eval_steps": 1, "save_steps": 1}
#: What the library notes in a configuration when it writes one.
NOTES = {"transformers_version", "architectures", "dtype", "use_cache"}


def assert_goes_on_with(folder: Path, origin: Path) -> None:
    """Weights, vocabulary, configuration, and the loss of the first evaluation."""
    expected = read(origin).state_dict()
    for name, tensor in read(folder).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0, msg=name)
    found, before = load(folder), load(origin)
    assert found.vocabulary.sha256 == before.vocabulary.sha256
    assert {name: found.config.get(name) for name in set(before.config) - NOTES} == {
        name: value for name, value in before.config.items() if name not in NOTES
    }
    accuracy = masked_accuracy(read(origin), held_cells(folder))
    first = next(entry for entry in report(folder)["history"] if "eval_loss" in entry)
    assert first["eval_loss"] == pytest.approx(accuracy["loss"], abs=1e-4)
    assert first["eval_top_10"] == pytest.approx(accuracy["top_10"])
    assert report(folder)["masked_gene"] == pytest.approx(accuracy, abs=1e-5)


def test_go_on_with_a_model_of_ones_own(trained: Path, structured: ad.AnnData, tmp_path: Path) -> None:
    """As folder and as model; cells of an atlas of which the model knows some genes only."""
    other = structured[100:180].copy()
    other.var_names = [*gene_ids(50), *gene_ids(10, 5000)]
    folder = quick_run(other, tmp_path / "still", start_from=trained, config=None, training=STILL)
    assert_goes_on_with(folder, trained)
    assert report(folder)["start_from"] == "own"
    again = quick_run(
        other,
        tmp_path / "again",
        start_from=load(trained),
        vocabulary=load(trained).vocabulary,
        config=None,
        training=STILL,
    )
    assert_same_weights(again, trained)


def test_a_trained_model_starts_with_a_lower_loss(
    trained: Path, quick: Path, structured: ad.AnnData, tmp_path: Path
) -> None:
    """The same cells, from a trained model: it begins where training from nothing does not get in 15 steps."""
    folder = quick_run(structured, tmp_path, start_from=trained, config=None, training=QUICK | {"learning_rate": 1e-3})
    assert np.mean(losses(folder)[:5]) < np.mean(losses(quick)[:5]) - 0.3
    assert abs(weights(folder)[WORDS] - weights(trained)[WORDS]).max() > 1e-3


def test_go_on_with_mini(tmp_path: Path) -> None:
    with gfx.settings.override(verbosity=0):
        folder = pretrain(
            gfx.datasets.toy(),
            tmp_path,
            start_from="mini",
            gene_ids="ensembl_id",
            held_out=0.2,
            curriculum=[(64, 1)],
            training=STILL | {"per_device_train_batch_size": 8},
        )
    assert_goes_on_with(folder, load("mini").folder)
    assert report(folder)["start_from"] == "mini"


def test_go_on_with_a_model_without_cls(toy_folder_v1: Path, toy_cells: ToyCells, tmp_path: Path) -> None:
    how = {"start_from": toy_folder_v1, "gene_ids": "ensembl_id", "curriculum": [(24, 1)], "held_out": 0.2}
    with gfx.settings.override(verbosity=0):
        folder = pretrain(toy_cells(), tmp_path / "still", training=STILL, **how)
        assert_goes_on_with(folder, toy_folder_v1)
        assert not load(folder).vocabulary.has_cls
        with pytest.raises(ValueError, match=r"`cell_weight` needs `<cls>`, which Vocabulary\('toy-v1'.* lacks"):
            pretrain(toy_cells(), tmp_path / "drawn", training=STILL, cell_weight=1.0, **how)
    assert not (tmp_path / "drawn").exists()


def test_start_a_model_without_cls_from_coexpression(toy_folder_v1: Path, toy_cells: ToyCells, tmp_path: Path) -> None:
    with gfx.settings.override(verbosity=0):
        folder = pretrain(
            toy_cells(),
            tmp_path,
            vocabulary=load(toy_folder_v1).vocabulary,
            gene_ids="ensembl_id",
            start_from="coexpression",
            config=TINY,
            curriculum=[(24, 1)],
            training=QUICK,
        )
    assert not load(folder).vocabulary.has_cls


# --- what contradicts itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"config": "V3-1B"}, r"`config` is one of mini, V1-10M, .*V2-316M, or a mapping of fields; found 'V3-1B'"),
        ({"curriculum": []}, r"`curriculum` is empty: give at least one stage"),
        ({"curriculum": [(24, 1), (3, 1)]}, r"`curriculum` has cells of 3 tokens; 4 are 2 genes with special tokens"),
        ({"curriculum": [(24, 0)]}, r"`curriculum` has a stage of 0 passes"),
        ({"training": [QUICK]}, r"`training` has arguments for 1 stages, `curriculum` has 2"),
        (
            {"training": [QUICK, {"learnig_rate": 1}]},
            r"`training` takes no 'learnig_rate'.* Did you mean",
        ),
        ({"cell_weight": -1.0}, r"`cell_weight=-1.0` is a weight; give 0 or more"),
        (
            {"cell_weight": 1.0, "config": TINY | {"num_hidden_layers": 1}},
            r"`cell_weight` uses `<cls>` of the",
        ),
        ({"start_from": "V9-3M"}, r"No published model or vocabulary is called 'V9-3M'"),
        ({"start_from": "co-expression"}, r"`start_from` is 'random' or 'coexpression', or a model\. "),
        ({"config": TINY | {"hidden_sise": 7}}, r"`config` takes no 'hidden_sise'.* Did you mean 'hidden_size'"),
        ({"config": TINY | {"vocab_size": 7}}, r"`config` takes no 'vocab_size'.* or is settled here"),
        ({"config": TINY | {"num_attention_heads": 3}}, r"3 heads .* do not divide a width of 32"),
        ({"patience": 2, "training": QUICK | {"save_steps": 3}}, r"saving steps to be a round multiple"),
        ({"config": TINY | {"max_position_embeddings": 3}}, r"`config` reads 3 tokens; 4 are 2 genes"),
    ],
)
def test_contradicting_settings_are_refused_before_a_cell_is_read(
    structured: ad.AnnData, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        quick_run(structured, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_model_brings_its_configuration_and_its_vocabulary(
    trained: Path, structured: ad.AnnData, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"Model\('own'.* brings its configuration. Leave `config` out"):
        quick_run(structured, tmp_path / "run", start_from=trained)
    other = build_vocabulary([structured], genes=structured.var_names[:40], name="other")
    with pytest.raises(ValueError, match=r"brings its vocabulary; Vocabulary\('other'.* is another. Leave"):
        quick_run(structured, tmp_path / "run", start_from=trained, config=None, vocabulary=other)
    assert not (tmp_path / "run").exists()


def test_a_classifier_is_no_start(trained: Path, structured: ad.AnnData, tmp_path: Path) -> None:
    BertForSequenceClassification(BertConfig.from_pretrained(trained)).save_pretrained(tmp_path / "classifier")
    write_vocabulary(load(trained).vocabulary, tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"lacks 5 tensors of a masked-gene model \(a classifier has none: go on"):
        quick_run(structured, tmp_path / "run", start_from=tmp_path / "classifier", config=None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_published_sizes_by_name(name: str) -> None:
    assert _what_to_train(None, name, None, 0.0) == (None, CONFIGURATIONS[name])


def test_fields_replace_those_of_mini() -> None:
    assert _what_to_train(None, None, None, 0.0)[1] == CONFIGURATIONS["mini"]
    _, fields = _what_to_train(None, {"hidden_size": 64, "hidden_act": "gelu"}, None, 0.0)
    assert fields == CONFIGURATIONS["mini"] | {"hidden_size": 64, "intermediate_size": 256, "hidden_act": "gelu"}
    _, fields = _what_to_train(None, {"hidden_size": 64, "intermediate_size": 100}, None, 0.0)
    assert fields["intermediate_size"] == 100


def test_arguments_of_stages() -> None:
    assert _each_stage(None, 2) == [{}, {}]
    assert _each_stage({"bf16": True}, 2) == [{"bf16": True}] * 2
    assert _each_stage(({"bf16": True}, {}), 2) == [{"bf16": True}, {}]


# --- sources that cannot be used ------------------------------------------------------------------------------------


def test_cells_of_one_gene_alone_are_refused(structured: ad.AnnData, tmp_path: Path) -> None:
    counts = structured.X.toarray()
    counts[:, 1:] = 0
    alone = ad.AnnData(sparse.csr_matrix(counts), var=structured.var)
    with pytest.raises(ValueError, match="No cell has more than one gene of the vocabulary"):
        pretrain([alone], tmp_path, config=TINY, training=QUICK)


def test_a_source_without_the_vocabularys_genes(structured: ad.AnnData, tmp_path: Path) -> None:
    first = structured[:20, :30].copy()
    first.var_names = gene_ids(30, 5000)
    vocabulary = build_vocabulary([structured])
    with pytest.raises(ValueError, match=r"(?s)1 of 2 sources.*source 1: .*vocabulary 'own'.*'ENSG00000005000'"):
        pretrain([structured, first], tmp_path, vocabulary=vocabulary, config=TINY, training=QUICK)


def test_a_bad_file_is_named_and_the_others_are_not_read_again(
    structured: ad.AnnData, tmp_path: Path, stop_in_step: StopInStep
) -> None:
    paths = [tmp_path / f"{name}.h5ad" for name in ("heart", "aorta", "blood")]
    for at, path in enumerate(paths):
        structured[30 * at : 30 * (at + 1)].copy().write_h5ad(path)
    vocabulary = build_vocabulary([structured])
    good = paths[1].read_bytes()
    paths[1].write_bytes(good[: len(good) // 2])
    folder = tmp_path / "run"
    run = {"vocabulary": vocabulary, "config": TINY, "curriculum": [(24, 1)], "training": STILL}
    steps = stop_in_step(1)
    unreadable = r"(?s)aorta\.h5ad: .*cannot be read to its end .*truncated.* Was it copied or fetched completely\?"
    with gfx.settings.override(verbosity=0), pytest.raises(ValueError, match=unreadable) as error:
        pretrain(paths, folder, **run)
    assert steps == []
    text = str(error.value)
    assert text.startswith(f"1 of 3 sources cannot be used. The cells of the others are kept as tokens in {folder}")
    assert "heart.h5ad" not in text
    assert "blood.h5ad" not in text
    kept = {path.name.partition("-")[0]: path.stat() for path in (folder / "tokens").iterdir()}
    assert set(kept) == {"heart", "blood"}
    with pytest.raises(ValueError, match=r"(?s)^1 of 3 sources cannot be used.*- aorta\.h5ad: "):
        quick_run_of_files(paths, tmp_path / "without vocabulary")
    paths[1].write_bytes(good)
    stop_in_step(10_000)
    with gfx.settings.override(verbosity=0):
        pretrain(paths, folder, **run)
    now = {path.name.partition("-")[0]: path.stat() for path in (folder / "tokens").iterdir()}
    assert set(now) == {"heart", "aorta", "blood"}
    for name, before in kept.items():
        assert (now[name].st_ino, now[name].st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(report(folder)["held_out"]) == ["0: heart.h5ad", "1: aorta.h5ad", "2: blood.h5ad"]


def quick_run_of_files(paths: list[Path], folder: Path) -> None:
    with gfx.settings.override(verbosity=0):
        pretrain(paths, folder, config=TINY, curriculum=[(24, 1)], training=QUICK)


def test_a_missing_file_is_named(structured: ad.AnnData, tmp_path: Path) -> None:
    structured[:30].copy().write_h5ad(tmp_path / "heart.h5ad")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 sources do not exist: .*aorta\.h5ad"):
        quick_run_of_files([tmp_path / "heart.h5ad", tmp_path / "aorta.h5ad"], tmp_path / "run")


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_files(structured: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / "heart.h5ad", folder / "aorta.h5ad"]
    for at, path in enumerate(paths):
        structured[60 * at : 60 * (at + 1)].copy().write_h5ad(path)
    return paths


def launch(folder: Path, sources: list[Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Train with two processes, which talk over gloo, in batches of 8 cells each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, str(DISTRIBUTED), str(folder), "8", *map(str, sources)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GFX_VERBOSITY": "2"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def by_two(two_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of two processes."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    done = launch(folder, two_files)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def one_process(folder: Path, sources: list[Path]) -> Path:
    """Train the same in one process, in batches of 16."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("distributed_pretraining", DISTRIBUTED)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with gfx.settings.override(verbosity=0):
        script.train(folder, 16, sources)
    return folder


def test_two_processes_train_one_model(by_two: tuple[Path, str], two_files: list[Path], tmp_path: Path) -> None:
    """The same cells in each step as in one process with batches of twice the size.

    Losses are close and not the same: each process takes the mean over the hidden genes of its cells, and the mean of
    two means is not that of all genes where one half has more of them.
    """
    folder, said = by_two
    assert sorted(re.findall(r"(\w+)\.h5ad: 60 cells written as tokens", said)) == ["aorta", "heart"]
    assert sorted(path.name.partition("-")[0] for path in (folder / "tokens").iterdir()) == ["aorta", "heart"]
    assert said.count("pretraining on 96 cells") == 1
    assert said.count("masked genes of held-out cells") == 1
    one = one_process(tmp_path, two_files)
    assert len(losses(folder)) == len(losses(one)) == 12
    np.testing.assert_allclose(losses(folder), losses(one), rtol=0.03)
    assert np.ptp(losses(one)) > 0.3, "other cells in a step would have other losses"
    assert report(folder)["held_out"] == report(one)["held_out"]
    assert report(folder)["rank_baseline"] == report(one)["rank_baseline"]
    assert report(folder)["masked_gene"]["loss"] == pytest.approx(report(one)["masked_gene"]["loss"], rel=0.03)
    evaluations = [entry for entry in report(folder)["history"] if "eval_loss" in entry]
    assert [entry["eval_predictions"] for entry in evaluations] == [report(one)["masked_gene"]["n"]] * 3
    found, expected = weights(folder), weights(one)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert load(folder).n_layers == 1


@pytest.mark.slow
def test_two_processes_continue_after_one_was_killed(
    by_two: tuple[Path, str], two_files: list[Path], tmp_path: Path
) -> None:
    killed = launch(tmp_path, two_files, DIE_IN_STEP="10")
    assert killed.returncode != 0
    assert not (tmp_path / "model.safetensors").exists()
    resumed = launch(tmp_path, two_files)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "written as tokens" not in resumed.stdout
    assert losses(tmp_path) == pytest.approx(losses(by_two[0]), abs=1e-6)
    assert_same_weights(tmp_path, by_two[0])
