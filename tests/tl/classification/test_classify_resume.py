"""Folders of classifiers: calls that are stopped and repeated, calls that do not belong there, what is left."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import gfx
from gfx._engine.classifier import Classifier
from gfx.models import FineTuning

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import anndata as ad

    from gfx.models import Model

PROBE = {"method": "linear_probe"}
LABELS = {"odd": [f"TOY{n}" for n in range(1, 81, 2)], "even": [f"TOY{n}" for n in range(2, 81, 2)]}
QUICK = {"n_splits": 2, "n_repeats": 1, "controls": None}
#: Two steps an epoch for genes, whose checkpoints are a step apart; one for cells, two when all are taught.
EPOCHS = {"genes": 2, "cells": 3}
N_STEPS = 12
#: Fields of a fine-tuning among the arguments of a call.
CHOICES = ("training", "freeze_layers", "patience", "class_weight")


@dataclass(frozen=True)
class Call:
    """A call with a folder."""

    function: Callable[..., None]
    what: Any
    make: Callable[..., ad.AnnData]
    arguments: dict[str, Any]

    def __call__(
        self, folder: Path, *, cells: ad.AnnData | None = None, what: Any = None, **changes: Any
    ) -> ad.AnnData:
        cells = self.make(24) if cells is None else cells
        arguments = self.arguments | changes
        choices = {name: arguments.pop(name) for name in CHOICES if name in arguments}
        method = arguments.pop("method", FineTuning(**choices))
        self.function(cells, what or self.what, folder=folder, method=method, **arguments)
        return cells


@dataclass(frozen=True)
class Whole:
    """A call that went through at once, and what came of it."""

    call: Call
    folder: Path
    result: dict[str, Any]


def calls(toy_cells: Any, model: Model) -> dict[str, Call]:
    def settings(of: str) -> dict[str, Any]:
        return {"model": model, **QUICK, "training": {"num_train_epochs": EPOCHS[of], "learning_rate": 1e-3}}

    return {
        "genes": Call(gfx.tl.classify_genes, LABELS, toy_cells, settings("genes")),
        "cells": Call(gfx.tl.classify_cells, "cell_type", toy_cells, settings("cells")),
    }


@pytest.fixture(scope="module")
def wholes(toy_cells: Any, toy_model: Model, slots: Any, tmp_path_factory: Any) -> dict[str, Whole]:
    """A call for genes, and one for cells."""
    folder = tmp_path_factory.mktemp("whole")
    made = calls(toy_cells, toy_model).items()
    return {name: Whole(call, folder / name, slots(call(folder / name))) for name, call in made}


@pytest.fixture(params=["genes", "cells"])
def call(request: Any, toy_cells: Any, toy_model: Model) -> Call:
    """A call for genes, or for cells, that has not been made."""
    return calls(toy_cells, toy_model)[request.param]


@pytest.fixture(params=["genes", "cells"])
def whole(request: Any, wholes: dict[str, Whole]) -> Whole:
    """One of the two."""
    return wholes[request.param]


@pytest.fixture
def finished(whole: Whole, tmp_path: Path) -> Path:
    """A copy of the finished folder, for tests that may change it."""
    return shutil.copytree(whole.folder, tmp_path / "finished")


@pytest.fixture
def stop(stop_in_step: Any) -> Any:
    """Stop the training of a classifier in a step of one's choice."""
    return replace(stop_in_step, model=Classifier, forward=Classifier.forward)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_files(folder: Path, expected: Path) -> None:
    found, wanted = files(folder), files(expected)
    assert set(found) == set(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_a_folder_changes_nothing(whole: Whole, slots: Any) -> None:
    cells = whole.call(None)
    assert slots(cells) == whole.result


STOPS = [("genes", 6), ("genes", 10), ("cells", 2), ("cells", 10)]


@pytest.mark.parametrize(("whole", "step"), STOPS, indirect=["whole"])
def test_stopped_in_a_training_it_goes_on_to_the_same_result(
    step: int, whole: Whole, slots: Any, stop: Any, tmp_path: Path
) -> None:
    """In the first fold, in the second, and with all labels: every bit is the same, and nothing is trained twice."""
    cells = whole.call.make(24)
    before = slots(cells)
    stop(step)
    with pytest.raises(stop.stopped):
        whole.call(tmp_path / "folder", cells=cells)
    assert slots(cells) == before
    scores = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(scores) == {2: 0, 6: 1, 10: 2}[step]
    assert list(tmp_path.rglob("checkpoint-*"))

    steps = stop(-1)  # counts, and stops in none
    assert slots(whole.call(tmp_path / "folder")) == whole.result
    again = (
        1 if step == 10 and whole.call.function is gfx.tl.classify_cells else 0
    )  # its checkpoints are two steps apart
    assert len(steps) == N_STEPS - (step - 1) + again
    assert {path: path.stat().st_mtime_ns for path in scores} == scores
    assert_same_files(tmp_path / "folder", whole.folder)


#: Loads everything once, and forks a process for each call, which is killed when the first scores are there.
CHILD = """
import json, os, signal, sys, time, traceback
import anndata as ad, sklearn.linear_model, torch, transformers
import gfx
torch.set_num_threads(1)
gfx.settings.verbosity = 1
endings = []
for asked in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        try:
            call = getattr(gfx.tl, asked["function"])
            method = gfx.models.FineTuning(training=asked["training"])
            call(ad.read_h5ad(asked["cells"]), asked["what"], method=method, **asked["arguments"])
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    until = time.monotonic() + 60
    # os.walk passes over folders of checkpoints that vanish meanwhile.
    while time.monotonic() < until and not any(
        name.endswith(".npy") for _, _, names in os.walk(asked["arguments"]["folder"]) for name in names
    ):
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    endings.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(endings))
"""


@pytest.mark.slow  # a process of its own; what stops in this one goes on alike
def test_killed_when_a_fold_is_done_it_goes_on_to_the_same_result(
    wholes: dict[str, Whole], toy_model: Model, slots: Any, stop: Any, tmp_path: Path
) -> None:
    """kill -9."""
    asked = []
    for name, whole in wholes.items():
        whole.call.make(24).write_h5ad(tmp_path / "cells.h5ad")
        arguments = whole.call.arguments | {"model": str(toy_model.folder), "folder": str(tmp_path / name)}
        training = arguments.pop("training")
        told = {
            "function": whole.call.function.__name__,
            "what": whole.call.what,
            "arguments": arguments,
            "training": training,
        }
        asked.append(told | {"cells": str(tmp_path / "cells.h5ad")})
    # numba's threads by OpenMP outlive no fork.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "workqueue"}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == f"{[-signal.SIGKILL] * 2}\n", done.stderr
    for name, whole in wholes.items():
        scores = {path: path.stat().st_mtime_ns for path in (tmp_path / name).rglob("*.npy")}
        assert len(scores) == 1
        steps = stop(-1)  # counts, and stops in none
        assert slots(whole.call(tmp_path / name)) == whole.result
        assert 0 < len(steps) < N_STEPS
        assert {path: path.stat().st_mtime_ns for path in scores} == scores
        for file in ("model.safetensors", "classification.json", "README.md"):
            assert (tmp_path / name / file).read_bytes() == (whole.folder / file).read_bytes()


def test_a_finished_folder_is_read(whole: Whole, slots: Any, stop: Any) -> None:
    """Not a step is trained, not a file is written again; arguments that change no result may differ."""
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*") if path.is_file()}
    steps = stop(-1)
    assert slots(whole.call(whole.folder)) == whole.result
    other = whole.call.arguments["training"] | {"logging_steps": 7}
    whole.call(whole.folder, training=other, key_added="mine")
    assert steps == []
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*") if path.is_file()} == before


def test_checkpoints_are_deleted_when_scores_are_written(whole: Whole) -> None:
    n_cells = 24 if whole.call.function is gfx.tl.classify_genes else 12
    left = {str(path.relative_to(whole.folder / "runs")) for path in (whole.folder / "runs").rglob("*")}
    folds = {f"seed0/fold{at}" for at in range(2)}
    assert left == {"seed0", *folds, *(f"{fold}/model_{n_cells}.npy" for fold in folds)}


def test_checkpoints_of_a_killed_call_are_deleted(whole: Whole, finished: Path) -> None:
    """It was killed when scores, or the model, were there already."""
    (scores,) = (finished / "runs" / "seed0" / "fold0").iterdir()
    for place in (scores.with_suffix(""), finished / "runs" / "all_labels"):
        (place / "checkpoint-2").mkdir(parents=True)
        (place / "checkpoint-2" / "optimizer.pt").write_bytes(b"large")
    whole.call(finished)
    assert not list(finished.rglob("checkpoint-*"))


GENES = {
    "labels": ({"what": LABELS | {"odd": [*LABELS["odd"][1:], "TOY99"]}}, "labels"),
    "order of classes": ({"what": dict(reversed(LABELS.items()))}, "classes, labels"),
}
CELLS = {
    "column": ({"what": "condition"}, "classes, groupby, labels"),
    "donors": ({"donor_key": "donor"}, "labels, donor_key"),
    "pooling": ({"pooling": "mean"}, "pooling"),
    "a longer patience": ({"patience": 3}, "patience"),
    "no patience": ({"patience": None}, "patience"),
    "no weights": ({"class_weight": None}, "class_weight"),
}
BOTH = {
    "folds": ({"n_splits": 3}, "n_splits"),
    "repeats": ({"n_repeats": 2}, "n_repeats"),
    "rng": ({"rng": 1}, "rng"),
    "training": ({"training": {"num_train_epochs": 4}}, "training"),
    "blocks": ({"freeze_layers": 2}, "freeze_layers"),
    "controls": ({"controls": ("random_weights", "baselines")}, "controls"),
    "method": ({"method": "linear_probe"}, "method"),
    "fewer cells": ({"max_cells": 14}, "cells, n_cells"),
    "cells": ({"mask_obs": np.arange(24) > 0}, "mask_obs"),
    "learning curve": ({"learning_curve": [8]}, "learning_curve"),
}


CHANGES = [(kind, change) for kind, own in (("genes", GENES), ("cells", CELLS)) for change in own | BOTH]


@pytest.mark.parametrize(("whole", "change"), CHANGES, indirect=["whole"])
def test_a_folder_refuses_other_arguments(change: str, whole: Whole, slots: Any) -> None:
    changes, said = (GENES | CELLS | BOTH)[change]
    before = files(whole.folder)
    cells = whole.call.make(24)
    untouched = slots(cells)
    with pytest.raises(ValueError, match=r"(?s)holds a run with another .*Give another folder; or delete") as caught:
        whole.call(whole.folder, cells=cells, **changes)
    named = str(caught.value).partition(" with another ")[2].partition(", which")[0].split(", ")
    assert set(said.split(", ")) <= set(named)
    assert files(whole.folder) == before
    assert slots(cells) == untouched


def test_a_folder_refuses_other_cells_and_models(whole: Whole, toy_model_v1: Model) -> None:
    with pytest.raises(ValueError, match=r"holds a run with another .*cells"):
        whole.call(whole.folder, cells=whole.call.make(24, seed=3))
    with pytest.raises(ValueError, match=r"holds a run with another .*weights_sha256"):
        whole.call(whole.folder, model=toy_model_v1)


def test_a_folder_begun_anew_as_the_message_says_holds_the_new_model(call: Call, tmp_path: Path) -> None:
    call(tmp_path, **PROBE)
    before = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "plan.json").unlink()
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    call(tmp_path, **PROBE, rng=1, cells=call.make(24, seed=3))
    assert json.loads((tmp_path / "classification.json").read_text())["params"]["rng"] == 1
    assert (tmp_path / "model.safetensors").read_bytes() != before


def test_a_folder_refuses_columns_in_another_order(toy_cells: Any, toy_model: Model, tmp_path: Path) -> None:
    """The first one decides the folds: models of the other order have seen the cells that this one holds out."""
    call = calls(toy_cells, toy_model)["cells"]
    call(tmp_path, what=["cell_type", "condition"], **PROBE)
    with pytest.raises(ValueError, match="holds a run with another first, which"):
        call(tmp_path, what=["condition", "cell_type"], **PROBE)


#: What makes a call of no avail, and what is said of it.
REFUSED = {
    "genes": [
        ({"load_best_model_at_end": True}, r"sets \['load_best_model_at_end'\].*without a validation set"),
        ({"eval_strategy": "epoch"}, "sets 'eval_strategy'; genes are trained to the end"),
    ],
    "cells": [
        ({"save_strategy": "steps"}, r"sets \['save_strategy'\].*evaluated and saved alike"),
        ({"save_strategy": "steps", "learning_rte": 1}, r"^`training` takes no 'learning_rte'.* Did you mean"),
        ({"eval_strategy": "no"}, r"sets \['eval_strategy'\].*evaluated and saved alike"),
    ],
}


def test_a_training_that_is_refused_leaves_no_plan(call: Call, slots: Any, tmp_path: Path) -> None:
    """Or the call that mends it would be refused."""
    cells = call.make(24)
    before = slots(cells)
    for training, text in REFUSED["genes" if call.what is LABELS else "cells"]:
        with pytest.raises(ValueError, match=text):
            call(tmp_path / "folder", cells=cells, training=training)
    assert slots(cells) == before
    assert not (tmp_path / "folder").exists()


def test_files_of_others_are_not_written_over(call: Call, toy_model: Model, slots: Any, tmp_path: Path) -> None:
    """Notes, another checkpoint, a file, the model to start from; an empty folder is taken."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    shutil.copytree(toy_model.folder, tmp_path / "checkpoint")
    before, cells = files(tmp_path), call.make(24)
    untouched = slots(cells)
    with pytest.raises(ValueError, match="is that of the model to start from"):
        call(tmp_path / "checkpoint", cells=cells, model=tmp_path / "checkpoint", **PROBE)
    for name, text in (("project", "README.md"), ("checkpoint", "config.json")):
        with pytest.raises(ValueError, match=rf"holds what no such call left, .*{text}.*Give a new or an empty folder"):
            call(tmp_path / name, cells=cells, **PROBE)
    with pytest.raises(ValueError, match="is a file"):
        call(tmp_path / "project" / "README.md", cells=cells, **PROBE)
    assert files(tmp_path) == before
    assert slots(cells) == untouched
    (tmp_path / "empty").mkdir()
    call(tmp_path / "empty", **PROBE)


def test_a_folder_of_other_versions_goes_on_with_a_warning(whole: Whole, finished: Path, slots: Any, stop: Any) -> None:
    """What results depend on is the same: nothing is trained anew."""
    plan = json.loads((finished / "plan.json").read_text())
    (finished / "plan.json").write_text(json.dumps(plan | {"gfx_version": "0.0.7", "torch_version": "1.0"}, indent=1))
    trained = json.loads((finished / "classification.json").read_text())
    trained["plan_sha256"] = hashlib.sha256((finished / "plan.json").read_bytes()).hexdigest()
    (finished / "classification.json").write_text(json.dumps(trained))
    steps = stop(-1)
    versions = f"gfx 0.0.7 (now {plan['gfx_version']}) and torch 1.0 (now {plan['torch_version']}); it goes on"
    with pytest.warns(UserWarning, match=re.escape(versions)):
        assert slots(whole.call(finished)) == whole.result
    assert steps == []


def test_scores_without_their_plan_are_not_used(whole: Whole, finished: Path) -> None:
    (finished / "plan.json").unlink()
    before = files(finished)
    with pytest.raises(ValueError, match=r"has `runs` of a run whose `plan\.json` is gone.*delete `runs` as well"):
        whole.call(finished)
    assert files(finished) == before


def test_a_folder_refuses_adapters_after_whole_weights(whole: Whole, finished: Path) -> None:
    """Whichever came first."""
    plan = json.loads((finished / "plan.json").read_text())
    (finished / "plan.json").write_text(json.dumps(plan | {"adapter": "lora", "n_trials": 5}))
    with pytest.raises(ValueError, match="holds a run with another adapter, n_trials"):
        whole.call(finished)


def test_a_finished_folder_of_a_linear_probe_is_read_and_one_that_was_cut_off_is_mended(
    call: Call, slots: Any, tmp_path: Path
) -> None:
    """The last file was cut off: the call was killed while it wrote."""
    expected = slots(call(tmp_path, **PROBE))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert slots(call(tmp_path, **PROBE)) == expected
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match=r"holds a run with another .*n_splits"):
        call(tmp_path, **PROBE, n_splits=3)
    file = tmp_path / "classification.json"
    content = file.read_text()
    file.write_text(content[: len(content) // 2])
    assert slots(call(tmp_path, **PROBE)) == expected
    assert file.read_text() == content
