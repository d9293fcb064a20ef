"""Tables of predictions for what was held out, against what a few lines of pandas and scikit-learn say."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, roc_auc_score, roc_curve

from gfx._core.classification import Evaluation

TASKS = {"stage": ["early", "mid", "late"], "type": ["healthy", "sick"]}
METHODS = ("model", "majority")
SIZES = (8, 20)
N, N_SEEDS, N_FOLDS = 36, 2, 3

METRICS = ["task", "unit", "method", "n_cells", "repeat", "fold", "metric", "value", "n"]
SUMMARY = ["task", "unit", "method", "n_cells", "metric", "mean", "sd", "low", "high", "n_repeats", "n_folds", "n"]
ROC = ["task", "unit", "method", "repeat", "fold", "class", "fpr", "tpr"]
CONFUSION = ["task", "unit", "method", "true", "predicted", "n"]

Told = dict[tuple[str, str, int, int], np.ndarray]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def truth() -> dict[str, np.ndarray]:
    """Every class in every fold of both seeds; some cells have no class of one task."""
    found = {task: np.arange(N) // 3 % len(classes) for task, classes in TASKS.items()}
    found["stage"][[5, 17]] = -100
    found["type"][30] = -1
    return found


@pytest.fixture(scope="module")
def fold() -> np.ndarray:
    both = np.stack([np.arange(N) % N_FOLDS, (np.arange(N) + np.arange(N) // 3) % N_FOLDS]).astype(np.int16)
    both[:, -1] = -1  # a cell that is not used
    return both


@pytest.fixture(scope="module")
def told(truth: dict[str, np.ndarray]) -> Told:
    """What each method says of all cells, by task, method, size and seed; of some cells the model says nothing."""
    out = {}
    for task, method, size, seed in product(TASKS, METHODS, SIZES, range(N_SEEDS)):
        draws = rng(abs(hash((len(task), len(method), size, seed))))
        n_classes = len(TASKS[task])
        logits = draws.normal(size=(N, n_classes))
        if method == "model":
            logits += 1.5 * np.eye(n_classes)[np.maximum(truth[task], 0)]
        found = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
        if method == "model" and seed == 1:
            found[[2, 9]] = np.nan
        out[task, method, size, seed] = found
    return out


@pytest.fixture(scope="module")
def evaluation(truth: dict[str, np.ndarray], fold: np.ndarray, told: Told) -> Evaluation:
    """Cells; folds come in any order."""
    found = Evaluation("cell", TASKS, truth, fold)
    for (task, method, size, seed), probabilities in told.items():
        for at in (2, 0, 1):
            held = np.flatnonzero(fold[seed] == at)
            found.add(held, probabilities[held], task=task, method=method, n_cells=size, repeat=seed, fold=at)
    return found


@pytest.fixture(scope="module")
def tables(evaluation: Evaluation) -> dict[str, pd.DataFrame]:
    return evaluation.tables(20, rng())


def of(table: pd.DataFrame, **place: object) -> pd.DataFrame:
    return table[np.logical_and.reduce([table[name] == value for name, value in place.items()])]


def scored(truth: np.ndarray, fold: np.ndarray, probabilities: np.ndarray, at: int) -> np.ndarray:
    """Which cells of a fold have a class and a prediction."""
    return np.array(
        [row for row in range(N) if fold[row] == at and truth[row] >= 0 and not np.isnan(probabilities[row, 0])]
    )


def test_columns_and_entries(tables: dict[str, pd.DataFrame]) -> None:
    assert {name: list(table) for name, table in tables.items()} == {
        "metrics": METRICS,
        "summary": SUMMARY,
        "roc": ROC,
        "confusion": CONFUSION,
    }
    for table in tables.values():
        assert list(table.index) == list(range(len(table)))
        assert set(table["unit"]) == {"cell"}
        assert set(table["method"]) == set(METHODS)
        assert set(table["task"]) == set(TASKS)
    assert len(tables["metrics"]) == 2 * 2 * 2 * N_SEEDS * N_FOLDS * 3
    assert len(tables["summary"]) == 2 * 2 * 2 * 3


def test_measures_of_every_fold(
    tables: dict[str, pd.DataFrame], truth: dict[str, np.ndarray], fold: np.ndarray, told: Told
) -> None:
    for (task, method, size, seed), probabilities in told.items():
        for at in range(N_FOLDS):
            rows = scored(truth[task], fold[seed], probabilities, at)
            true, said = truth[task][rows], probabilities[rows]
            score = said[:, 1] if len(TASKS[task]) == 2 else said
            expected = {
                "auc": roc_auc_score(true, score, multi_class="ovr"),
                "accuracy": accuracy_score(true, said.argmax(axis=1)),
                "macro_f1": f1_score(true, said.argmax(axis=1), average="macro"),
            }
            found = of(tables["metrics"], task=task, method=method, n_cells=size, repeat=seed, fold=at)
            assert dict(zip(found["metric"], found["value"], strict=True)) == pytest.approx(expected, abs=1e-6)
            assert set(found["n"]) == {len(rows)}


def test_summary_averages_folds_and_repeats(
    tables: dict[str, pd.DataFrame], truth: dict[str, np.ndarray], fold: np.ndarray, told: Told
) -> None:
    """Areas are a mean over folds, then over seeds; all else is measured in all folds together.

    There is an interval about each, but for points of the learning curve.
    """
    for row in tables["summary"].itertuples():
        place = {name: getattr(row, name) for name in ("task", "method", "n_cells", "metric")}
        values = of(tables["metrics"], **place)
        seeds = [of(values, repeat=seed)["value"].mean() for seed in range(N_SEEDS)]
        if row.metric != "auc":
            seeds = []
            for seed in range(N_SEEDS):
                said = told[row.task, row.method, row.n_cells, seed]
                rows = np.concatenate([scored(truth[row.task], fold[seed], said, at) for at in range(N_FOLDS)])
                both = truth[row.task][rows], said[rows].argmax(axis=1)
                seeds.append(accuracy_score(*both) if row.metric == "accuracy" else f1_score(*both, average="macro"))
        assert row.n_folds == N_SEEDS * N_FOLDS
        assert row.mean == pytest.approx(np.mean(seeds))
        assert row.sd == pytest.approx(abs(seeds[0] - seeds[1]) / np.sqrt(2))
        assert row.n_repeats == N_SEEDS
        assert row.n == max(of(values, repeat=seed)["n"].sum() for seed in range(N_SEEDS))
        if row.n_cells == 20:
            assert row.low < row.mean < row.high
        else:
            assert np.isnan([row.low, row.high]).all()


def test_curves_at_the_full_number_of_cells(
    tables: dict[str, pd.DataFrame], truth: dict[str, np.ndarray], fold: np.ndarray, told: Told
) -> None:
    """Of two classes, the second one has a curve."""
    roc = tables["roc"]
    assert len(roc) == (3 + 1) * len(METHODS) * N_SEEDS * N_FOLDS * 101
    for (task, method, size, seed), probabilities in told.items():
        if size != 20:
            continue
        for at, (number, name) in product(range(N_FOLDS), enumerate(TASKS[task])):
            found = of(roc, **{"task": task, "method": method, "repeat": seed, "fold": at, "class": name})
            if name == "healthy":
                assert found.empty
                continue
            rows = scored(truth[task], fold[seed], probabilities, at)
            fpr, tpr, _ = roc_curve(truth[task][rows] == number, probabilities[rows, number])
            np.testing.assert_allclose(found["fpr"], np.arange(101) / 100, atol=1e-12)
            np.testing.assert_allclose(found["tpr"][1:], np.interp(found["fpr"][1:], fpr, tpr), atol=1e-12)
            assert found["tpr"].iloc[0] == 0


def test_confusion_is_the_mean_over_seeds(
    tables: dict[str, pd.DataFrame], truth: dict[str, np.ndarray], fold: np.ndarray, told: Told
) -> None:
    for (task, classes), method in product(TASKS.items(), METHODS):
        expected = np.zeros((len(classes), len(classes)))
        for seed in range(N_SEEDS):
            probabilities = told[task, method, 20, seed]
            rows = np.concatenate([scored(truth[task], fold[seed], probabilities, at) for at in range(N_FOLDS)])
            told_classes = probabilities[rows].argmax(axis=1)
            expected += confusion_matrix(truth[task][rows], told_classes, labels=range(len(classes))) / N_SEEDS
        found = of(tables["confusion"], task=task, method=method)
        assert list(zip(found["true"], found["predicted"], strict=True)) == list(product(classes, classes))
        np.testing.assert_allclose(found["n"], expected.ravel())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_mean_probabilities_are_over_the_repeats_that_scored(
    evaluation: Evaluation,
    truth: dict[str, np.ndarray],
    fold: np.ndarray,
    told: Told,
    task: str,
    method: str,
    size: int,
) -> None:
    """Over the seeds that scored a cell; NaN for cells that none did."""
    found = evaluation.mean_probabilities(task, method, size)
    assert found.dtype == np.float32
    assert found.shape == (N, len(TASKS[task]))
    for row in range(N):
        of_seeds = [told[task, method, size, seed][row] for seed in range(N_SEEDS)]
        known = [one for one in of_seeds if not np.isnan(one[0])]
        if truth[task][row] < 0 or fold[0, row] < 0:
            assert np.isnan(found[row]).all()
        else:
            np.testing.assert_allclose(found[row], np.mean(known, axis=0), atol=1e-6)


def test_the_order_in_which_predictions_come_does_not_matter(
    *,
    truth: dict[str, np.ndarray],
    fold: np.ndarray,
    told: Told,
    evaluation: Evaluation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = Evaluation("cell", TASKS, truth, fold)
    for at, (key, probabilities) in product(range(N_FOLDS), told.items()):
        task, method, size, seed = key
        held = rng(at).permutation(np.flatnonzero(fold[seed] == at))
        other.add(held, probabilities[held], task=task, method=method, n_cells=size, repeat=seed, fold=at)
    for key in told:
        found, expected = (one.mean_probabilities(*key[:3]) for one in (other, evaluation))
        np.testing.assert_array_equal(found, expected)
    monkeypatch.setattr("gfx._core.classification.N_DRAWS", 3)
    columns = ["task", "method", "n_cells", "repeat", "fold", "metric"]
    tables = [one.tables(20, rng())["metrics"].sort_values(columns, ignore_index=True) for one in (other, evaluation)]
    pd.testing.assert_frame_equal(*tables)


def test_macro_f1_where_each_donor_has_one_class() -> None:
    """By hand, over all cells held out: the majority has half of 2 * 12 / (12 + 20), and nothing of the other class.

    In folds it would be 1 for those of the one class and 0 for the others, 0.6 in all.
    """
    donor = np.repeat(np.arange(5), 4)
    truth = {"type": (donor >= 3).astype(int)}
    evaluation = Evaluation("cell", {"type": TASKS["type"]}, truth, donor[None], donor)
    for at in range(5):
        said = np.tile(np.array([0.7, 0.3], dtype=np.float32), (4, 1))
        place = {"task": "type", "method": "majority", "n_cells": 16, "repeat": 0, "fold": at}
        evaluation.add(np.flatnonzero(donor == at), said, **place)
    tables = evaluation.tables(16, rng())
    assert of(tables["metrics"], metric="macro_f1")["value"].tolist() == [1, 1, 1, 0, 0]
    row = of(tables["summary"], metric="macro_f1").iloc[0]
    assert row["mean"] == pytest.approx(0.375)
    assert row["low"] < row["mean"] < row["high"]
    assert of(tables["summary"], metric="accuracy")["mean"].item() == pytest.approx(0.6)
    assert of(tables["summary"], metric="auc")["n_folds"].item() == 0
    assert of(tables["summary"], metric="accuracy")["n_folds"].item() == 5


# --- genes ----------------------------------------------------------------------------------------------------------


def test_occurrences_are_measured_beside_genes() -> None:
    """Each occurrence counts in the measures and curves; not in probabilities, intervals and confusion."""
    classes = {"labels": ["no", "yes"]}
    truth = {"labels": np.arange(12) % 2}
    fold = np.arange(12)[None] // 2 % 3
    of_genes, of_occurrences = Evaluation("gene", classes, truth, fold), Evaluation("gene", classes, truth, fold)
    draws = rng()
    for at in range(3):
        place = {"task": "labels", "method": "model", "n_cells": 5, "repeat": 0, "fold": at}
        held = np.flatnonzero(fold[0] == at)
        genes = np.repeat(held, [1, 2, 3, 4])
        score = draws.random(len(genes)).astype(np.float32)
        each = np.stack([1 - score, score], axis=1)
        mean = np.array([each[genes == gene].mean(axis=0) for gene in held])
        of_occurrences.add(genes, each, occurrences=True, **place)
        for one in (of_genes, of_occurrences):
            one.add(held, mean, **place)
    tables, alone = of_occurrences.tables(5, rng()), of_genes.tables(5, rng())
    assert list(tables["summary"]["unit"]) == ["occurrence"] * 3 + ["gene"] * 3
    for name in ("metrics", "summary", "roc", "confusion"):
        here = of(tables[name], unit="gene").reset_index(drop=True)
        pd.testing.assert_frame_equal(here, alone[name])
    each = of(tables["metrics"], unit="occurrence")
    assert set(each["n"]) == {10}
    summary = of(tables["summary"], unit="occurrence")
    assert summary[["low", "high"]].isna().all(axis=None)
    assert summary["sd"].isna().all()  # one seed
    assert set(summary["n"]) == {30}
    assert len(of(tables["roc"], unit="occurrence")) == 3 * 101
    area = of(each, metric="auc", fold=2)["value"].item()
    assert area == pytest.approx(roc_auc_score(truth["labels"][genes], score), abs=1e-6)


def test_a_fold_without_anything_to_score_leaves_no_row() -> None:
    truth = {"type": np.array([0, 1, 0, 1, -1, -1])}
    fold = np.array([[0, 0, 0, 0, 1, 1]])
    evaluation = Evaluation("cell", {"type": TASKS["type"]}, truth, fold)
    probabilities = np.tile(np.array([0.4, 0.6], dtype=np.float32), (6, 1))
    probabilities[0] = np.nan
    for at in (0, 1):
        held = np.flatnonzero(fold[0] == at)
        evaluation.add(held, probabilities[held], task="type", method="model", n_cells=3, repeat=0, fold=at)
    tables = evaluation.tables(3, rng())
    assert set(tables["metrics"]["fold"]) == {0}
    assert set(tables["metrics"]["n"]) == {3}
    assert tables["confusion"]["n"].tolist() == [0, 1, 0, 2]
    expected = [True, False, False, False, True, True]
    assert np.isnan(evaluation.mean_probabilities("type", "model", 3)[:, 0]).tolist() == expected


def test_a_table_of_curves_may_be_empty() -> None:
    """One class a fold: there is no curve and no area, and the table has its columns."""
    truth = {"type": np.array([0, 0, 0, 1, 1, 1])}
    evaluation = Evaluation("cell", {"type": TASKS["type"]}, truth, truth["type"][None])
    for at in (0, 1):
        held = np.flatnonzero(truth["type"] == at)
        said = np.full((3, 2), 0.5, dtype=np.float32)
        evaluation.add(held, said, task="type", method="model", n_cells=3, repeat=0, fold=at)
    tables = evaluation.tables(3, rng())
    assert list(tables["roc"]) == ROC
    assert tables["roc"].empty
    assert of(tables["summary"], metric="auc")[["mean", "low", "high"]].isna().all(axis=None)
    assert of(tables["summary"], metric="accuracy")["mean"].item() == 0.5


@pytest.mark.parametrize("with_donors", [False, True])
def test_cells_that_are_not_used_widen_no_interval(with_donors: bool) -> None:
    """Without a class, or in no fold: what is drawn again and again are the others."""
    labels = np.arange(60) % 2
    fold = (np.arange(60) // 2 % 3)[None]
    score = (rng().random(60) + 0.3 * labels).astype(np.float32) / 2
    probabilities = np.stack([1 - score, score], axis=1)
    place = np.sort(rng(1).permutation(200)[:60])  # among others
    donor = np.arange(200) % 23
    tables = []
    for here, n in ((np.arange(60), 60), (place, 200)):
        truth = {"type": np.full(n, 1)}
        truth["type"][here] = labels
        folds = np.full((1, n), -1)
        folds[:, here] = fold
        rest = np.setdiff1d(np.arange(n), here)
        truth["type"][rest[::2]], folds[:, rest[::2]] = -100, 0
        groups = (donor[place] if n == 60 else donor) if with_donors else None
        evaluation = Evaluation("cell", {"type": TASKS["type"]}, truth, folds, groups)
        for at in range(3):
            held = here[fold[0] == at]
            said = probabilities[fold[0] == at]
            evaluation.add(held, said, task="type", method="model", n_cells=9, repeat=0, fold=at)
        tables.append(evaluation.tables(9, rng())["summary"])
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["low"].notna().all()


def test_donors_widen_the_intervals() -> None:
    """Ten donors of ten cells that are all alike are worth ten cells."""
    donor = np.repeat(np.arange(30), 10)
    truth = {"type": donor % 2}
    fold = (donor // 2 % 3)[None]
    score = rng().random(30)[donor] * 0.5 + 0.3 * truth["type"]
    probabilities = np.stack([1 - score, score], axis=1).astype(np.float32)
    widths = []
    for groups in (donor, None):
        evaluation = Evaluation("cell", {"type": TASKS["type"]}, truth, fold, groups)
        for at in range(3):
            held = np.flatnonzero(fold[0] == at)
            evaluation.add(held, probabilities[held], task="type", method="model", n_cells=9, repeat=0, fold=at)
        summary = evaluation.tables(9, rng())["summary"]
        widths.append((summary["high"] - summary["low"]).to_numpy())
    assert (widths[0] > 2 * widths[1]).all()
