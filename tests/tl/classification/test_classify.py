"""What holds of classified genes and cells alike: folds, tables, seeds, learning curves, arguments."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import f1_score, roc_auc_score, roc_curve

import gfx
from gfx._engine.encoder import random_encoder
from gfx.models import FineTuning, LinearProbe

if TYPE_CHECKING:
    import anndata as ad

    from gfx.models import Model

CONTROLS = ("random_weights", "baselines")


def test_each_unit_is_held_out_once_a_repeat_and_folds_share_the_classes(
    kind: Any, cells: ad.AnnData, toy_model: Model
) -> None:
    what = {"few": [f"TOY{n}" for n in range(1, 60, 6)], "many": [f"TOY{n}" for n in range(2, 120, 2)]}
    kind.probe(cells, what if kind.of == "genes" else None, model=toy_model, n_splits=4, n_repeats=3)
    truth, folds, *_ = kind.scored(cells)
    assert len(truth) == 24 if kind.of == "cells" else len(truth) > 60
    for of_repeat in folds.T:
        counts = pd.crosstab(truth, of_repeat)
        assert [*counts.columns] == [0, 1, 2, 3]
        assert (counts.max(axis=1) - counts.min(axis=1) <= 1).all()
    assert len({tuple(of_repeat) for of_repeat in folds.T}) == 3


def test_tables_are_those_of_the_scores_written(kind: Any, cells: ad.AnnData, toy_model: Model) -> None:
    donors = {} if kind.of == "genes" else {"donor_key": "donor"}
    kind.probe(cells, model=toy_model, n_splits=3, **donors)
    truth, folds, scores, predicted = kind.scored(cells)
    fold, unit, n_classes = folds[:, 0], kind.of.removesuffix("s"), scores.shape[1]
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(predicted, scores.argmax(axis=1))
    drawn = [1] if n_classes == 2 else range(n_classes)
    parts = [(truth[fold == at], scores[fold == at]) for at in range(3)]
    expected = {
        "auc": [np.mean([roc_auc_score(known == at, found[:, at]) for at in drawn]) for known, found in parts],
        "accuracy": [np.mean(known == found.argmax(axis=1)) for known, found in parts],
        "macro_f1": [f1_score(known, found.argmax(axis=1), average="macro") for known, found in parts],
    }
    whole = {"accuracy": np.mean(truth == predicted), "macro_f1": f1_score(truth, predicted, average="macro")}
    metrics, table = cells.uns[kind.key]["metrics"], gfx.get.classification_df(cells)
    assert set(metrics["unit"]) == {"cell"} if kind.of == "cells" else {"gene", "occurrence"}
    for metric, values in expected.items():
        rows = metrics[(metrics["metric"] == metric) & (metrics["unit"] == unit)].sort_values("fold")
        np.testing.assert_allclose(rows["value"], values, atol=1e-6)
        assert rows["n"].tolist() == [len(known) for known, _ in parts]
        row = table[(table["metric"] == metric) & (table["unit"] == unit)].iloc[0]
        assert row["mean"] == pytest.approx(whole.get(metric, np.mean(values)))
        assert row["n"] == len(truth)
        assert np.isnan(row["sd"])  # one repeat
        assert row["low"] < row["high"]
    assert table[table["unit"] == "occurrence"][["low", "high"]].isna().all(axis=None)
    ((_, names),) = cells.uns[kind.key]["tasks"].items()
    counts = pd.crosstab(np.array(names)[truth], np.array(names)[predicted], dropna=False)
    for row in gfx.get.confusion_df(cells).itertuples():
        assert row.n == counts.loc[row.true, row.predicted]
        assert row.share == pytest.approx(row.n / counts.loc[row.true].sum())
    curves = gfx.get.roc_df(cells)
    assert set(curves["class"]) == set(np.array(names)[drawn])
    assert set(curves["unit"]) == set(metrics["unit"])
    for at, (known, found) in enumerate(parts):
        for number in drawn:
            curve = curves[(curves["fold"] == at) & (curves["unit"] == unit) & (curves["class"] == names[number])]
            fpr, tpr, _ = roc_curve(known == number, found[:, number])
            np.testing.assert_allclose(curve["tpr"].iloc[1:], np.interp(np.linspace(0, 1, 101), fpr, tpr)[1:])


def test_a_seed_draws_its_own_folds_and_a_repeated_call_the_same(
    kind: Any, cells: ad.AnnData, toy_model: Model
) -> None:
    for key, rng in (("one", 0), ("again", np.int64(0)), ("other", 7)):
        kind.probe(cells, model=toy_model, controls=CONTROLS, rng=rng, key_added=key)
    for part in ("", "_fold"):
        one, again, other = (kind.read(cells, part, key) for key in ("one", "again", "other"))
        np.testing.assert_array_equal(one, again)
        assert not np.array_equal(one, other, equal_nan=True)
    for name in ("metrics", "summary", "roc", "confusion"):
        pd.testing.assert_frame_equal(cells.uns["one"][name], cells.uns["again"][name])


def test_the_users_random_numbers_stay_as_they_were(kind: Any, cells: ad.AnnData, toy_model: Model) -> None:
    def drawn() -> list[float]:
        return [float(torch.rand(1)), np.random.rand()]

    training = {"max_steps": 1}
    for how in ({"controls": CONTROLS}, {"method": FineTuning(training=training)}):
        torch.manual_seed(3)
        np.random.seed(3)
        expected = drawn()
        torch.manual_seed(3)
        np.random.seed(3)
        kind.probe(cells, model=toy_model, **how)
        assert drawn() == expected


def test_blank_text_is_no_class(kind: Any, cells: ad.AnnData, toy_model: Model) -> None:
    """As a table reads that was filled in by hand, or read from CSV without missing values."""
    frame = cells.var if kind.of == "genes" else cells.obs
    known = np.arange(len(frame)) % 4 > 0
    given = pd.Series(np.where(np.arange(len(frame)) % 2, "odd", "even"), frame.index, dtype=object)
    blank = given.where(known, np.where(np.arange(len(frame)) % 8, "", "  "))
    columns = {"missing": given.where(known, None), "blank": blank, "categories": pd.Categorical(blank)}
    for name, column in columns.items():
        frame[name] = column
        kind.probe(cells, name, model=toy_model, key_added=f"from_{name}")
        assert cells.uns[f"from_{name}"]["tasks"][name].tolist() == ["even", "odd"]
        for part in ("", "_fold"):
            values = (kind.read(cells, part, f"from_{column}") for column in ("missing", name))
            np.testing.assert_array_equal(*values)
        assert np.isnan(kind.read(cells, "", f"from_{name}")[~known]).all()


def test_a_learning_curve_adds_smaller_training_sets_and_changes_no_score(
    kind: Any, cells: ad.AnnData, toy_model: Model
) -> None:
    n_cells = {"genes": 24, "cells": 12}[kind.of]
    kind.probe(cells, model=toy_model, key_added="plain")
    kind.probe(cells, model=toy_model, controls=CONTROLS, learning_curve=[8, 6, n_cells])
    curve = gfx.get.learning_curve_df(cells, key=kind.key)
    for _, rows in curve.groupby(["unit", "method", "metric"]):
        assert rows["n_cells"].tolist() == [6, 8, n_cells]
        assert rows["n"].nunique() == 1  # what is held out stays the same, so that results compare
    few = curve[curve["n_cells"] < n_cells]
    assert few[["low", "high"]].isna().all(axis=None)
    np.testing.assert_array_equal(kind.read(cells), kind.read(cells, key="plain"))
    assert set(gfx.get.classification_df(cells, key=kind.key)["n_cells"]) == {n_cells}
    assert few[(few["metric"] == "auc") & (few["method"] == "model")]["mean"].nunique() > 1


def test_columns_with_the_classes_are_not_written_over(kind: Any, cells: ad.AnnData, toy_model: Model) -> None:
    frame, key = (cells.var, "kind") if kind.of == "genes" else (cells.obs, "cell")
    column = "kind" if kind.of == "genes" else "cell_kind"
    frame["kind"] = frame[column] = given = pd.Series(np.arange(len(frame)) % 3 > 0, frame.index).astype(str)
    with pytest.raises(ValueError, match=f"{column}.*key_added"):
        kind.probe(cells, "kind", model=toy_model, key_added=key)
    pd.testing.assert_series_equal(frame[column], given, check_names=False)


def test_a_column_of_truth_values_has_two_classes(kind: Any, cells: ad.AnnData, toy_model: Model) -> None:
    frame = cells.var if kind.of == "genes" else cells.obs
    frame["sensitive"] = np.arange(len(frame)) % 3 == 0
    kind.probe(cells, "sensitive", model=toy_model)
    assert cells.uns[kind.key]["tasks"]["sensitive"].tolist() == ["False", "True"]


COLUMNS = {
    "values that read alike": (
        "alike",
        r"`adata\.(var|obs)\['alike'\]` has values .*\(int, str\) that read .*: \['1'\]",
    ),
    "a slash": ("a/b", r"'a/b' has a '/'.*Rename it"),
    "one class": ("only", "two"),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_columns_that_hold_no_classes(column: str, kind: Any, cells: ad.AnnData, toy_model: Model, slots: Any) -> None:
    name, text = COLUMNS[column]
    frame = cells.var if kind.of == "genes" else cells.obs
    values = {"alike": [1, "1", 2], "a/b": ["a", "b", "a"], "only": ["x", "x", "x"]}[name]
    frame[name] = pd.Series((values * len(frame))[: len(frame)], frame.index, dtype=object)
    before = slots(cells)
    with pytest.raises(ValueError, match=text):
        kind.probe(cells, name, model=toy_model)
    assert slots(cells) == before


def tuning(**choices: Any) -> dict[str, FineTuning]:
    return {"method": FineTuning(**choices)}


#: Arguments, where they are wrong for one kind alone its name, the error and its text.
WRONG = {
    "method": ({"method": "probe"}, ValueError, r"`method` is one of \['fine_tune', 'linear_probe'\], found 'probe'"),
    "class_weight": (
        {"method": LinearProbe(class_weight="even")},
        ValueError,
        r"`class_weight` is one of \[None, 'bal",
    ),
    "n_splits": ({"n_splits": 1}, ValueError, "`n_splits` is 2 or more, found 1"),
    "n_splits, not whole": ({"n_splits": 2.5}, TypeError, "`n_splits` is a whole number, found 2.5"),
    "n_repeats": ({"n_repeats": 0}, ValueError, "`n_repeats` is 1 or more"),
    "max_cells": ({"max_cells": 1}, ValueError, "`max_cells` is 2 or more"),
    "n_trials": (tuning(n_trials=-1), ValueError, "`n_trials` is 0 or more"),
    "rng, a truth value": ({"rng": True}, TypeError, "`rng` is a whole number, found True"),
    "rng": ({"rng": 0.5}, TypeError, "`rng` is a whole number, found 0.5"),
    "controls": ({"controls": ["random_sets"]}, ValueError, "`controls` is one of .* found 'random_sets'"),
    "too many layers": (tuning(freeze_layers=4), ValueError, "`freeze_layers=4` is outside .* of 3 network"),
    "less than no layer": (tuning(freeze_layers=-1), ValueError, "`freeze_layers=-1` is outside .* of 3 network"),
    "adapter of no layer": (tuning(adapter="lora", freeze_layers=3), ValueError, "`freeze_layers` freezes all 3"),
    "adapter": (tuning(adapter="qlora"), ValueError, "`adapter` is one of .* found 'qlora'"),
    "training": (tuning(training={"learning_rte": 1}), ValueError, "no 'learning_rte'.* Did you mean 'learning_rate'"),
    "training, ours": (tuning(training={"output_dir": "x"}), ValueError, "no 'output_dir'.* or is settled here"),
    "learning_curve of one": ({"learning_curve": [1, 8]}, ValueError, r"training cells, 2 to (24|12) here; found \[1,"),
    "learning_curve of more": ({"learning_curve": [8, 25]}, ValueError, r"training cells, 2 to (24|12) here; found"),
    "learning_curve of less": ({"learning_curve": [-3]}, ValueError, r"training cells, 2 to (24|12) here; found \[-3"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_arguments_that_cannot_be_used(wrong: str, kind: Any, cells: ad.AnnData, toy_model: Model, slots: Any) -> None:
    arguments, error, text = WRONG[wrong]
    before = slots(cells)
    with pytest.raises(error, match=text):
        kind.probe(cells, model=toy_model, **arguments)
    assert slots(cells) == before


# --- fine-tuning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze_layers", [None, 3])
def test_frozen_layers_stay_as_they_are_and_random_weights_are_trained_whole(
    freeze_layers: int | None, kind: Any, cells: ad.AnnData, toy_model: Model, trainings: list[tuple[Any, Any, Any]]
) -> None:
    """By default all but the last two stay for genes, and none for cells; embeddings are trained.

    Each network ends near the weights that it started from. Layers of random weights that are not trained would make a
    control that is easier to beat.
    """
    training = {"max_steps": 2, "learning_rate": 0.01, "warmup_steps": 0}
    method, controls = FineTuning(freeze_layers=freeze_layers, training=training), CONTROLS[: freeze_layers is None]
    kind.probe(cells, model=toy_model, method=method, controls=controls, rng=3)  # the toy was drawn with 0
    n_frozen = {"genes": 1, "cells": 0}[kind.of] if freeze_layers is None else freeze_layers
    assert len(trainings) == 2 * (1 + len(controls))
    for number, (*_, classifier) in enumerate(trainings):
        is_random = controls != () and number % 2 == 1
        tensors = load_file(toy_model.folder / "model.safetensors")
        start = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}
        if is_random:
            drawn = random_encoder(
                toy_model.config, seed=3, n_layers=3, device=torch.device("cpu"), dtype=torch.float32
            )
            start = {f"bert.{name}": tensor for name, tensor in drawn.state_dict().items()}
        state = classifier.state_dict()
        assert max(float((state[name] - tensor).abs().max()) for name, tensor in start.items()) < 0.05
        moved = {name for name, tensor in start.items() if not torch.equal(state[name], tensor)}
        for layer in range(3):
            names = {name for name in start if f"layer.{layer}." in name}
            assert len(names) == 16
            assert moved & names == (set() if layer < n_frozen and not is_random else names)
        assert "bert.embeddings.word_embeddings.weight" in moved
    noted = cells.uns[kind.key]["params"]
    assert noted["freeze_layers"] == n_frozen
    assert json.loads(noted["training"]) == training | {"per_device_train_batch_size": 12}
