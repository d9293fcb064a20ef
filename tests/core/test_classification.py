"""Measures of predicted classes against scikit-learn, intervals against what they are for, summaries by hand."""

from __future__ import annotations

import time
from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, roc_auc_score

from gfx._core import classification
from gfx._core.classification import (
    GRID,
    METRICS,
    confusion,
    curve,
    intervals,
    mean_of_known,
    measure,
    measure_counts,
    scored_classes,
    summarize,
)


def predictions(
    n: int, n_classes: int, seed: int = 0, *, decimals: int | None = None, sharp: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """True classes, and probabilities that know something of them; rounded, they have ties."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, n_classes, n)
    logits = rng.normal(size=(n, n_classes)) + sharp * np.eye(n_classes)[truth]
    found = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return truth, (found if decimals is None else found.round(decimals)).astype(np.float32)


# --- measures -------------------------------------------------------------------------------------------------------


def by_scikit_learn(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    n_classes = probabilities.shape[1]
    present = np.unique(truth)
    told = probabilities.argmax(axis=1)
    areas = [
        roc_auc_score(truth == at, probabilities[:, at])
        for at in ([1] if n_classes == 2 else range(n_classes))
        if 0 < (truth == at).sum() < len(truth)
    ]
    return {
        "auc": np.mean(areas) if areas else np.nan,
        "accuracy": accuracy_score(truth, told),
        "macro_f1": f1_score(truth, told, labels=present, average="macro", zero_division=0),
    }


@st.composite
def some_predictions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Few classes, some of them absent, and many ties."""
    n_classes = draw(st.integers(2, 4))
    n = draw(st.integers(1, 30))
    truth = draw(st.lists(st.integers(0, n_classes - 1), min_size=n, max_size=n))
    row = st.lists(st.integers(0, 4), min_size=n_classes, max_size=n_classes)
    scores = draw(st.lists(row, min_size=n, max_size=n))
    return np.array(truth), np.array(scores, dtype=np.float32) / 4


@given(some_predictions())
@examples(max_examples=50, deadline=None)
def test_measures_are_those_of_scikit_learn(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    found = measure(*drawn)
    assert tuple(found) == METRICS
    assert found == pytest.approx(by_scikit_learn(*drawn), nan_ok=True, abs=1e-9)


@pytest.mark.parametrize(("n_classes", "n"), [(2, 50), (3, 200), (5, 200)])
def test_the_area_of_all_classes(n_classes: int, n: int) -> None:
    truth, probabilities = predictions(n, n_classes)
    scores = probabilities[:, 1] if n_classes == 2 else probabilities
    expected = roc_auc_score(truth, scores, multi_class="ovr", average="macro")
    assert measure(truth, probabilities)["auc"] == pytest.approx(expected, abs=1e-6)
    assert 0.6 < expected < 0.95


def test_the_area_is_exact_where_ranks_have_the_precision_of_what_is_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest scipy ranks float32 in float32."""
    truth, probabilities = predictions(5_000, 3)
    expected = measure(truth, probabilities)["auc"]

    def of_the_newest_scipy(values: np.ndarray, axis: int) -> np.ndarray:
        return rankdata(values, axis=axis).astype(values.dtype)

    monkeypatch.setattr("gfx._core.classification.rankdata", of_the_newest_scipy)
    assert measure(truth, probabilities.astype(np.float32))["auc"] == expected


def test_the_area_of_two_classes_is_that_of_the_second() -> None:
    """Where probabilities do not add up to one, the first class would say something else."""
    truth = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.1, 0.2], [0.9, 0.3], [0.1, 0.4]], dtype=np.float32)
    assert measure(truth, probabilities)["auc"] == 1.0
    assert measure(1 - truth, probabilities)["auc"] == 0.0
    assert measure(truth, np.full((4, 2), 0.5, dtype=np.float32))["auc"] == 0.5


def test_one_class_has_no_area() -> None:
    found = measure(np.ones(4, dtype=int), np.tile(np.array([0.2, 0.8], dtype=np.float32), (4, 1)))
    assert np.isnan(found["auc"])
    assert found["accuracy"] == found["macro_f1"] == 1.0


def test_the_order_and_the_precision_do_not_matter() -> None:
    truth, probabilities = predictions(80, 3, decimals=2)
    order = np.random.default_rng(0).permutation(80)
    expected = measure(truth, probabilities)
    assert measure(truth[order], probabilities[order]) == pytest.approx(expected, abs=1e-12)
    assert measure(truth, probabilities.astype(np.float64)) == pytest.approx(expected, abs=1e-12)


@given(some_predictions())
@examples(max_examples=50, deadline=None)
def test_confusion_is_that_of_scikit_learn(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    truth, probabilities = drawn
    n_classes = probabilities.shape[1]
    expected = confusion_matrix(truth, probabilities.argmax(axis=1), labels=range(n_classes))
    np.testing.assert_array_equal(confusion(truth, probabilities), expected)


def test_classes_with_a_curve_of_their_own() -> None:
    assert scored_classes(2) == [1]
    assert scored_classes(4) == [0, 1, 2, 3]


def test_mean_of_known_values() -> None:
    assert mean_of_known([1.0, np.nan, 4.0]) == 2.5
    assert np.isnan(mean_of_known([np.nan]))
    assert np.isnan(mean_of_known([]))


# --- curves ---------------------------------------------------------------------------------------------------------


def test_curve_by_hand() -> None:
    """At each rate of false positives that 37 negatives leave in between: how many positives score above."""
    rng = np.random.default_rng(0)
    negative, positive = rng.normal(size=37), rng.normal(0.8, 1, size=23)
    order = rng.permutation(60)
    is_class = np.repeat([False, True], [37, 23])[order]
    found = curve(is_class, np.concatenate([negative, positive])[order])
    falling = np.sort(negative)[::-1]
    assert len(GRID) == 101
    for rate, of_positives in zip(GRID[1:-1], found[1:-1], strict=True):
        assert of_positives == pytest.approx((positive > falling[int(rate * 37)]).mean())
    assert found[0] == 0.0
    assert found[-1] == 1.0
    assert (np.diff(found) >= 0).all()


def test_the_area_under_the_curve() -> None:
    """As exact as a hundred steps are."""
    truth, probabilities = predictions(400, 2)
    rates = curve(truth == 1, probabilities[:, 1])
    area = ((rates[1:] + rates[:-1]) / 2).mean()
    assert area == pytest.approx(measure(truth, probabilities)["auc"], abs=0.01)


def test_equal_scores_are_a_diagonal() -> None:
    np.testing.assert_allclose(curve(np.arange(10) < 4, np.full(10, 0.3)), GRID, atol=1e-12)


def test_no_curve_of_one_class() -> None:
    assert curve(np.zeros(5, dtype=bool), np.arange(5.0)) is None
    assert curve(np.ones(5, dtype=bool), np.arange(5.0)) is None


# --- intervals ------------------------------------------------------------------------------------------------------


def in_folds(
    truth: np.ndarray, probabilities: np.ndarray, fold: np.ndarray, groups: np.ndarray | None = None, seed: int = 0
) -> dict[str, tuple[float, float]]:
    return intervals(truth, probabilities, fold, np.random.default_rng(seed), groups)


def two_seeds(n: int, n_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    truth, first = predictions(n, n_classes, seed)
    noise = np.random.default_rng(seed + 100).uniform(0, 0.2, first.shape).astype(np.float32)
    fold = np.stack([np.arange(n) % 3, np.arange(n) // 2 % 3])
    return truth, np.stack([first, first + noise]), fold


def estimate(truth: np.ndarray, probabilities: np.ndarray, fold: np.ndarray) -> dict[str, float]:
    """Leave out what was not scored; the area in every fold, all else in all folds together; average over seeds."""
    found = []
    for of_seed, at_seed in zip(probabilities, fold, strict=True):
        scored = (at_seed >= 0) & ~np.isnan(of_seed[:, 0])
        areas = [by_scikit_learn(truth[there], of_seed[there])["auc"] for there in parts(scored, at_seed)]
        found.append(by_scikit_learn(truth[scored], of_seed[scored]) | {"auc": np.nanmean(areas)})
    return {name: np.nanmean([one[name] for one in found]) for name in METRICS}


def parts(scored: np.ndarray, fold: np.ndarray) -> list[np.ndarray]:
    """Which of the scored are in each fold that has any."""
    return [there for at in range(fold.max() + 1) if (there := scored & (fold == at)).any()]


@pytest.mark.parametrize("n_classes", [2, 3])
def test_an_interval_is_about_the_estimate_and_narrows_with_numbers(n_classes: int) -> None:
    widths = []
    for n in (60, 600):
        cells = two_seeds(n, n_classes)
        found, expected = in_folds(*cells), estimate(*cells)
        assert tuple(found) == METRICS
        for name, (low, high) in found.items():
            assert low < expected[name] < high
        widths.append([high - low for low, high in found.values()])
    ratio = np.divide(*widths)
    assert (ratio > 2).all()  # about the square root of ten
    assert (ratio < 5).all()


@pytest.mark.parametrize("with_groups", [False, True])
def test_each_draw_is_measured_as_the_whole(monkeypatch: pytest.MonkeyPatch, with_groups: bool) -> None:
    """Draw the same units one by one, and measure with scikit-learn."""
    monkeypatch.setattr(classification, "N_DRAWS", 7)
    truth, probabilities, fold = two_seeds(40, 3)
    probabilities[1, :5] = np.nan  # a seed did not score some
    fold[0, 7] = -1
    groups = np.random.default_rng(3).integers(0, 9, 40) * 3 if with_groups else None  # of any size, in any order
    members = [[at] for at in range(40)]
    if with_groups:
        members = [[at for at in range(40) if groups[at] == group] for group in sorted(set(groups))]
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(7):
        chosen = [row for at in rng.integers(len(members), size=len(members)) for row in members[at]]
        drawn.append(estimate(truth[chosen], probabilities[:, chosen], fold[:, chosen]))
    found = in_folds(truth, probabilities, fold, groups, seed=5)
    for name in METRICS:
        expected = np.quantile([one[name] for one in drawn], [0.025, 0.975])
        assert found[name] == pytest.approx(tuple(expected), abs=1e-9)


def test_many_cells_are_drawn_in_a_time_that_grows_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over all cells for each cell would take a minute."""
    monkeypatch.setattr(classification, "N_DRAWS", 1)
    n = 200_000
    truth, fold = np.arange(n) % 2, np.zeros((1, n), dtype=int)
    right = np.eye(2, dtype=np.float32)[truth][None]
    for groups in (None, np.arange(n)[::-1]):
        start = time.process_time()
        assert in_folds(truth, right, fold, groups)["auc"] == (1.0, 1.0)
        assert time.process_time() - start < 10


def test_folds_without_a_class_do_not_lift_macro_f1() -> None:
    """Donors of one class each: where one class is told alone, a fold is all right or all wrong; together, neither."""
    truth = np.repeat([0, 0, 0, 1, 1], 4)
    told = np.tile(np.array([0.7, 0.3], dtype=np.float32), (20, 1))[None]
    found = in_folds(truth, told, np.repeat(np.arange(5), 4)[None], np.repeat(np.arange(5), 4))
    assert by_scikit_learn(truth, told[0])["macro_f1"] == pytest.approx(0.375)
    low, high = found["macro_f1"]
    assert low < 0.375 < high == 1.0  # all donors drawn are of the one class
    assert measure_counts(np.array([[12, 0], [8, 0]])) == pytest.approx({"accuracy": 0.6, "macro_f1": 0.375})


def test_intervals_follow_the_seed() -> None:
    cells = two_seeds(50, 2)
    assert in_folds(*cells) == in_folds(*cells)
    assert in_folds(*cells, seed=1) != in_folds(*cells)


def test_repeats_are_not_replicates() -> None:
    truth, probabilities, fold = two_seeds(50, 2)
    many = in_folds(truth, np.repeat(probabilities[:1], 4, axis=0), np.repeat(fold[:1], 4, axis=0))
    one = in_folds(truth, probabilities[:1], fold[:1])
    for name in METRICS:
        assert many[name] == pytest.approx(one[name], abs=1e-12)


def test_donors_are_drawn_whole() -> None:
    """Cells of a donor that are all alike count for one; groups of one cell each are no groups."""
    truth, probabilities, fold = two_seeds(30, 2)
    few = in_folds(truth, probabilities, fold)
    alike = [np.repeat(truth, 20), np.repeat(probabilities, 20, axis=1), np.repeat(fold, 20, axis=1)]
    by_donor, by_cell = in_folds(*alike, np.repeat(np.arange(30), 20)), in_folds(*alike)
    for name in METRICS:
        assert by_donor[name] == pytest.approx(few[name], abs=1e-6)
        assert np.ptp(by_donor[name]) > 3 * np.ptp(by_cell[name])
    assert in_folds(truth, probabilities, fold, np.arange(30)) == few


def test_two_donors_have_no_interval() -> None:
    truth, probabilities, fold = two_seeds(30, 2)
    assert np.isnan(list(in_folds(truth, probabilities, fold, np.arange(30) % 2).values())).all()
    assert not np.isnan(list(in_folds(truth, probabilities, fold, np.arange(30) % 3).values())).any()


def test_perfect_predictions_have_an_interval_of_one() -> None:
    truth = np.arange(30) % 3
    right = np.eye(3, dtype=np.float32)[truth][None]
    fold = (np.arange(30) // 10)[None]
    assert in_folds(truth, right, fold) == dict.fromkeys(METRICS, (1.0, 1.0))


def test_a_missing_area_has_no_interval() -> None:
    """Every fold has one class only."""
    truth = np.repeat([0, 1], 10)
    _, probabilities = predictions(20, 2)
    found = in_folds(truth, probabilities[None], truth[None])
    assert np.isnan(found["auc"]).all()
    assert not np.isnan(found["accuracy"]).any()


# --- summaries ------------------------------------------------------------------------------------------------------


def measured() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for task, method, n_cells in product(["b", "a"], ["model", "majority"], [100, 20]):
        for seed in range(1 if method == "majority" else 3):
            for fold, metric in product(range(2), METRICS):
                value = np.nan if metric == "auc" and task == "a" and fold == 1 else rng.random()
                row = {"task": task, "unit": "cell", "method": method, "n_cells": n_cells, "repeat": seed, "fold": fold}
                rows.append(row | {"metric": metric, "value": value, "n": 10 + fold + seed})
    return pd.DataFrame(rows)


def pooled() -> pd.DataFrame:
    """Accuracy and macro F1 of all folds together: no mean of theirs."""
    table = measured().query("fold == 0 and metric != 'auc'").drop(columns=["fold", "n"])
    return table.assign(value=np.random.default_rng(1).random(len(table))).sample(frac=1, random_state=0)


def test_areas_are_averaged_over_folds_then_seeds_and_all_else_over_seeds() -> None:
    metrics, whole = measured(), pooled()
    found = summarize(metrics, whole)
    by = ["task", "unit", "method", "n_cells", "metric"]
    assert list(found) == [*by, "mean", "sd", "n_repeats", "n_folds", "n"]
    in_order = metrics[by].drop_duplicates().reset_index(drop=True)
    pd.testing.assert_frame_equal(found[by], in_order)
    for row in found.itertuples():
        here = metrics[np.logical_and.reduce([metrics[name] == getattr(row, name) for name in by])]
        of_seeds = [
            np.nanmean([value for seed, value in zip(here["repeat"], here["value"], strict=True) if seed == at])
            for at in range(row.n_repeats)
        ]
        if row.metric != "auc":
            same = whole[np.logical_and.reduce([whole[name] == getattr(row, name) for name in by])]
            of_seeds = [same.loc[same["repeat"] == at, "value"].item() for at in range(row.n_repeats)]
        assert row.n_folds == row.n_repeats * (1 if row.metric == "auc" and row.task == "a" else 2)
        assert row.n_repeats == here["repeat"].nunique() == (1 if row.method == "majority" else 3)
        assert row.mean == pytest.approx(np.mean(of_seeds))
        assert row.sd == pytest.approx(np.std(of_seeds, ddof=1) if len(of_seeds) > 1 else np.nan, nan_ok=True)
        assert row.n == 2 * 10 + 1 + 2 * (row.n_repeats - 1)  # the folds of the seed that scores most


def test_values_that_were_never_measured_stay_missing() -> None:
    metrics = measured()
    metrics.loc[metrics["metric"] == "auc", "value"] = np.nan
    found = summarize(metrics, pooled())
    is_area = found["metric"] == "auc"
    assert found.loc[is_area, ["mean", "sd"]].isna().all(axis=None)
    assert (found.loc[is_area, "n_folds"] == 0).all()
    assert found.loc[~is_area, "mean"].notna().all()
