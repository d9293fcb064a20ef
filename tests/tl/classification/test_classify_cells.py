"""Classes of cells: folds and donors, scores against a slow reference, several tasks, what they are held against."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import gfx
from gfx._engine.classifier import Classifier
from gfx.models import FineTuning, LinearProbe
from gfx.tl.classification import _learners
from gfx.tl.classification._cross_validation import CONTROLS

if TYPE_CHECKING:
    from pathlib import Path

    from gfx.models import Model

tune = partial(gfx.tl.classify_cells, n_splits=2, n_repeats=1, controls=None)
probe = partial(tune, method="linear_probe")
ONE_STEP = {"max_steps": 1}


@pytest.fixture
def typed(cells: ad.AnnData) -> ad.AnnData:
    """Cells whose types a, b and c have genes of their own."""
    dense = np.asarray(cells.X.todense())
    for at, name in enumerate("abc"):
        mine = (cells.obs["cell_type"] == name).to_numpy()
        dense[np.ix_(mine, np.arange(20 * at, 20 * at + 20))] += 30
    cells.X = type(cells.X)(dense)
    return cells


def written(adata: ad.AnnData, key: str = "gfx_cell_class") -> pd.DataFrame:
    """All that is told of each cell, by name."""
    parts = [pd.DataFrame(np.asarray(adata.obsm[name]), adata.obs_names) for name in adata.obsm if name.startswith(key)]
    return pd.concat([adata.obs[[name for name in adata.obs if name.startswith(key)]], *parts], axis=1)


# --- folds and donors -----------------------------------------------------------------------------------------------


def test_a_donor_is_never_on_both_sides(cells: ad.AnnData, toy_model: Model) -> None:
    donors = np.array([f"d{n}" for n in [0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 5, 6, 6, 6, 7, 7]])
    cells.obs["sample"] = np.random.default_rng(0).permutation(donors)
    probe(cells, "condition", donor_key="sample", model=toy_model, n_splits=3, n_repeats=4)
    for of_seed in cells.obsm["gfx_cell_class_fold"].T:
        assert set(of_seed) == {0, 1, 2}
        assert (pd.Series(of_seed).groupby(cells.obs["sample"].to_numpy()).nunique() == 1).all()
    assert len({tuple(of_seed) for of_seed in cells.obsm["gfx_cell_class_fold"].T}) > 1
    found = cells.uns["gfx_cell_class"]
    assert found["params"]["donor_key"] == "sample"
    assert "over donors" in found["note"]


def test_repeats_draw_random_weights_and_training_cells_where_folds_are_donors(
    cells: ad.AnnData, toy_model: Model
) -> None:
    """Donor by donor every seed holds out the same: random weights and cells of a learning curve are still drawn."""
    cells.obs["sample"] = np.repeat(["d1", "d2", "d3", "d4"], 6)
    how = {"donor_key": "sample", "n_splits": 4, "n_repeats": 3, "controls": CONTROLS, "learning_curve": [8]}
    probe(cells, "condition", model=toy_model, **how)
    found = cells.uns["gfx_cell_class"]
    assert "same donors" in found["note"]
    losses = found["metrics"][found["metrics"]["metric"] == "auc"].pivot_table(
        index="repeat", columns=["method", "n_cells"], values="value"
    )
    assert losses[("model", 18)].nunique() == 1
    assert losses[("random_weights", 18)].nunique() == 3
    assert losses[("model", 8)].nunique() == 3


def test_a_call_without_donors_says_what_its_results_do_not_show(
    cells: ad.AnnData, toy_model: Model, capsys: pytest.CaptureFixture
) -> None:
    probe(cells, "cell_type", model=toy_model)
    assert "No `donor_key`: cells of one donor are on both sides" in capsys.readouterr().out
    assert "cells of one donor are not replicates" in cells.uns["gfx_cell_class"]["note"]
    cells.obs["rare"] = np.where(np.arange(24) < 2, "once", cells.obs["cell_type"].astype(str))
    with pytest.warns(UserWarning, match=r"Classes that only one donor has.*has them: 'rare': \['once'\]\."):
        probe(cells, "rare", donor_key="donor", model=toy_model)
    said = capsys.readouterr().out
    assert "No `donor_key`" not in said


@pytest.mark.filterwarnings("ignore:Classes that only one donor has")
def test_a_class_of_one_donor_is_left_out_of_all_measures(cells: ad.AnnData, toy_model: Model) -> None:
    cells.obs["rare"] = np.where(cells.obs["donor"] == "d1", "once", cells.obs["cell_type"].astype(str))
    probe(cells, "rare", donor_key="donor", model=toy_model, controls=CONTROLS, n_splits=4)
    scores, fold = cells.obsm["gfx_cell_class"], cells.obsm["gfx_cell_class_fold"][:, 0]
    is_once = (cells.obs["rare"] == "once").to_numpy()
    np.testing.assert_array_equal(np.isnan(scores[:, 0]), is_once)
    assert cells.obs["gfx_cell_class_rare"].isna().tolist() == is_once.tolist()
    names = cells.uns["gfx_cell_class"]["tasks"]["rare"].tolist()
    truth = cells.obs["rare"].map(names.index).to_numpy(dtype=int)
    expected = (scores.argmax(axis=1) == truth)[~is_once].mean()
    summary = gfx.get.classification_df(cells)
    found = summary[(summary["method"] == "model") & (summary["metric"] == "accuracy")]
    assert found["mean"].item() == pytest.approx(expected)
    assert (summary["n"] == (~is_once).sum()).all()
    assert set(cells.uns["gfx_cell_class"]["metrics"]["fold"]) == set(fold[~is_once])
    assert cells.uns["gfx_cell_class"]["confusion"].query("true == 'once'")["n"].sum() == 0


def test_intervals_are_over_donors(cells: ad.AnnData, toy_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one donor or two nothing follows, however many cells they have, and whoever else is in the table."""
    monkeypatch.setattr("gfx._core.classification.N_DRAWS", 40)
    probe(cells, "cell_type", donor_key="donor", model=toy_model, key_added="four")
    probe(
        cells,
        "cell_type",
        donor_key="donor",
        mask_obs=cells.obs["donor"].isin(["d1", "d2"]).to_numpy(),
        model=toy_model,
        key_added="two",
    )
    four, two = (gfx.get.classification_df(cells, key=key) for key in ("four", "two"))
    assert (four["low"] < four["high"]).all()
    assert two[["low", "high"]].isna().all(axis=None)


WRONG = {
    "no such column": (("cell_typ",), {}, KeyError, r"Did not find 'cell_typ' in `adata\.obs`\. Did you mean"),
    "no such donors": (("cell_type",), {"donor_key": "donr"}, KeyError, r"Did not find 'donr'.*Did you mean 'donor'"),
    "fewer donors than folds": (
        ("cell_type",),
        {"donor_key": "donor", "n_splits": 5},
        ValueError,
        r"has 4 donors, \['d1', 'd2', 'd3', 'd4'\], fewer than the 5 folds.*held out as a whole\. Use `n_splits=4`",
    ),
    "one donor": (("cell_type",), {"donor_key": "only"}, ValueError, r"has 1 donors, \['d'\].*Use no `donor_key`"),
    "cells without donor": (
        ("cell_type",),
        {"donor_key": "some"},
        ValueError,
        r"6 of 24 cells have no 'some', so they may be of a held-out donor.*`mask_obs`",
    ),
    "blank donors": (("cell_type",), {"donor_key": "blank"}, ValueError, "6 of 24 cells have no 'blank'"),
    "donors named nan": (("cell_type",), {"donor_key": "nan"}, ValueError, "6 of 24 cells have no 'nan'"),
    "classes that are donors": (
        ("of_donor",),
        {"donor_key": "donor"},
        ValueError,
        r"Classes that only one donor has.*'of_donor': \['1', '2', '3', '4'\]\. There are no others\. Give",
    ),
    "donors that read alike": (("cell_type",), {"donor_key": "alike"}, ValueError, r"'alike'.*read alike as text"),
    "few cells": (
        ("rare",),
        {"n_splits": 4},
        ValueError,
        r"Classes of 'rare' with fewer cells than the 4 folds of `n_splits`: 'x' \(3\), 'y' \(1\)",
    ),
    "few cells of a second task": ((["cell_type", "rare"],), {"n_splits": 4}, ValueError, r"Classes of 'rare'"),
    "one class": (("only",), {}, ValueError, r"has 1 class among the cells to use, \['d'\]; two are needed"),
    "no class": (("none",), {}, ValueError, r"has 0 class among the cells to use"),
    "twice": ((["cell_type", "cell_type"],), {}, ValueError, "`groupby` names columns of `obs`, each once"),
    "none": (([],), {}, ValueError, "`groupby` names columns"),
    "donors as classes": (("donor",), {"donor_key": "donor"}, ValueError, "`donor_key='donor'` is among the columns"),
    "patience": (("cell_type",), {"method": FineTuning(patience=0)}, ValueError, "`patience` is 1 or more"),
    "training that judges otherwise than it saves": (
        ("cell_type",),
        {"method": FineTuning(training={"save_strategy": "steps"})},
        ValueError,
        r"`training` sets \['save_strategy'\].*evaluated and saved alike\. Leave them out\. \(.*requires",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_columns_and_donors_that_cannot_be_used(wrong: str, cells: ad.AnnData, toy_model: Model, slots: Any) -> None:
    where, arguments, error, text = WRONG[wrong]
    at = np.arange(24)
    cells.obs["only"] = pd.Categorical(["d"] * 24)
    cells.obs["none"] = pd.Categorical([None] * 24, categories=["a", "b"])
    cells.obs["some"] = cells.obs["donor"].where(cells.obs["donor"] != "d3")
    cells.obs["blank"] = np.where(cells.obs["donor"] == "d3", "", cells.obs["donor"].astype(str))
    cells.obs["nan"] = np.where(cells.obs["donor"] == "d3", "nan", cells.obs["donor"].astype(str))
    cells.obs["of_donor"] = cells.obs["donor"].astype(str).str[1:]
    cells.obs["alike"] = pd.Series([1, "1", 2] * 8, cells.obs_names, dtype=object)
    cells.obs["rare"] = pd.Categorical(np.select([at < 3, at == 3, at < 8], ["x", "y", None], "z"))
    cells.obs["a/b"] = cells.obs["cell_type"]
    before = slots(cells)
    with pytest.raises(error, match=text):
        probe(cells, *where, model=toy_model, **arguments)
    assert slots(cells) == before


def test_cells_without_donor_can_be_left_out(cells: ad.AnnData, toy_model: Model) -> None:
    cells.obs["some"] = cells.obs["donor"].where(cells.obs["donor"] != "d3")
    known = cells.obs["some"].notna().to_numpy()
    probe(cells, "cell_type", donor_key="some", mask_obs=known, model=toy_model)
    out = written(cells)[~known]
    assert out["gfx_cell_class_cell_type"].isna().all()
    assert np.isnan(cells.obsm["gfx_cell_class"][~known]).all()
    assert (cells.obsm["gfx_cell_class_fold"][~known] == -1).all()
    assert (cells.obsm["gfx_cell_class_fold"][known] >= 0).all()


# --- scores against a slow reference --------------------------------------------------------------------------------


def head(x: np.ndarray, truth: np.ndarray, class_weight: str | None = "balanced") -> Any:
    """Logistic regression on features of one scale."""
    centre, scale = x.mean(axis=0), np.sqrt(x.var(axis=0).mean())
    model = LogisticRegression(C=0.1, class_weight=class_weight, max_iter=500).fit((x - centre) / scale, truth)
    return lambda other: model.predict_proba((other - centre) / scale)


@pytest.mark.parametrize("class_weight", ["balanced", None])
def test_a_linear_probe_is_logistic_regression_on_the_embedding(
    class_weight: str | None, cells: ad.AnnData, any_model: Model, slow: Any
) -> None:
    cells.obs["uneven"] = np.where(np.arange(24) % 6 == 0, "few", "many")
    embed_as = "cls" if any_model.vocabulary.has_cls else "mean"
    x = np.array([slow.cell(row, embed_as) for row in slow.tokens(cells)])
    how = {"method": LinearProbe(class_weight=class_weight), "n_splits": 3, "n_repeats": 2, "key_added": "uneven_class"}
    probe(cells, "uneven", model=any_model, **how)
    truth = (cells.obs["uneven"] == "many").to_numpy()
    expected = np.zeros((2, 24, 2))
    for seed, fold in enumerate(cells.obsm["uneven_class_fold"].T):
        for at in range(3):
            expected[seed, fold == at] = head(x[fold != at], truth[fold != at], class_weight)(x[fold == at])
    np.testing.assert_allclose(cells.obsm["uneven_class"], expected.mean(axis=0), atol=1e-4)
    best = np.array(["few", "many"])[expected.mean(axis=0).argmax(axis=1)]
    assert cells.obs["uneven_class_uneven"].tolist() == best.tolist()
    assert cells.uns["uneven_class"]["params"]["pooling"] == embed_as


@pytest.mark.usefixtures("in_float32")
def test_a_probe_reads_the_pooling_asked_for(cells: ad.AnnData, toy_model: Model, toy_model_v1: Model) -> None:
    for pooling in ("mean", "cls"):
        probe(cells, "cell_type", model=toy_model, pooling=pooling, key_added=pooling)
        gfx.tl.embed(cells, model=toy_model, pooling=pooling, key_added=f"X_{pooling}")
        x, fold = cells.obsm[f"X_{pooling}"], cells.obsm[f"{pooling}_fold"][:, 0]
        truth = cells.obs["cell_type"].cat.codes.to_numpy()
        for at in range(2):
            found = head(x[fold != at], truth[fold != at])(x[fold == at])
            # Fits stop at a gradient of 1e-4, and the states of another batch differ in the last bit.
            np.testing.assert_allclose(cells.obsm[pooling][fold == at], found, atol=1e-3)
    assert not np.allclose(cells.obsm["mean"], cells.obsm["cls"], atol=0.01)
    with pytest.raises(ValueError, match="'toy-v1' has no <cls> token"):
        probe(cells, "cell_type", model=toy_model_v1, pooling="cls")


def test_the_order_of_cells_and_of_categories_does_not_change_results(typed: ad.AnnData, toy_model: Model) -> None:
    probe(typed, "cell_type", model=toy_model)
    other = typed.copy()
    other.obs["cell_type"] = pd.Categorical(other.obs["cell_type"].astype(str), categories=["c", "unseen", "b", "a"])
    probe(other, "cell_type", model=toy_model)
    assert other.uns["gfx_cell_class"]["tasks"]["cell_type"].tolist() == ["c", "b", "a"]
    np.testing.assert_array_equal(other.obsm["gfx_cell_class_fold"], typed.obsm["gfx_cell_class_fold"])
    np.testing.assert_allclose(other.obsm["gfx_cell_class"], typed.obsm["gfx_cell_class"][:, ::-1], atol=1e-3)
    for rng, same in ((0, True), (5, False)):
        probe(typed, "cell_type", model=toy_model, rng=rng, key_added="again")
        assert np.array_equal(typed.obsm["again_fold"], typed.obsm["gfx_cell_class_fold"]) == same
        assert np.array_equal(typed.obsm["again"], typed.obsm["gfx_cell_class"]) == same


def test_max_cells_draws_the_cells_to_use(cells: ad.AnnData, toy_model: Model) -> None:
    probe(cells, "cell_type", model=toy_model, max_cells=15)
    used = cells.obsm["gfx_cell_class_fold"][:, 0] >= 0
    assert used.sum() == cells.uns["gfx_cell_class"]["params"]["n_cells"] == 15
    assert (np.isnan(cells.obsm["gfx_cell_class"]).all(axis=1) == ~used).all()
    assert (cells.obs["gfx_cell_class_cell_type"].isna() == ~used).all()
    part = cells[used].copy()
    probe(part, "cell_type", model=toy_model, key_added="part")
    np.testing.assert_array_equal(part.obsm["part_fold"], part.obsm["gfx_cell_class_fold"])
    np.testing.assert_allclose(part.obsm["part"], part.obsm["gfx_cell_class"], atol=1e-3)


def test_empty_cells_have_no_class(cells: ad.AnnData, toy_model: Model) -> None:
    cells.X = type(cells.X)(cells.X.multiply(np.arange(24)[:, None] != 3))
    probe(cells, "cell_type", model=toy_model)
    assert np.flatnonzero(np.isnan(cells.obsm["gfx_cell_class"][:, 0])).tolist() == [3]
    assert cells.obsm["gfx_cell_class_fold"][3, 0] == -1


def test_scores_improve_with_training_cells(
    typed: ad.AnnData, toy_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    fit = _learners.LinearMethod.heads

    def counted(self: Any, split: Any, train: np.ndarray, *features: Any) -> Any:
        sizes.append(len(train))
        return fit(self, split, train, *features)

    monkeypatch.setattr(_learners.LinearMethod, "heads", counted)
    probe(typed, "cell_type", model=toy_model, key_added="plain", n_repeats=8)
    sizes.clear()
    probe(typed, "cell_type", model=toy_model, learning_curve=[6, 3, 12], n_repeats=8)
    assert sizes == [3, 6, 12] * 16
    np.testing.assert_array_equal(typed.obsm["gfx_cell_class"], typed.obsm["plain"])  # of all cells
    curve = gfx.get.learning_curve_df(typed, key="gfx_cell_class")
    for metric, rows in curve.groupby("metric"):
        assert rows["n_cells"].tolist() == [3, 6, 12]
        assert rows["n"].tolist() == [24] * 3  # what is held out stays the same
        assert rows["mean"].iloc[0] < rows["mean"].iloc[2], metric
    assert curve[curve["n_cells"] < 12][["low", "high"]].isna().all(axis=None)
    assert set(gfx.get.classification_df(typed, key="gfx_cell_class")["n_cells"]) == {12}


# --- several tasks --------------------------------------------------------------------------------------------------


def add_a_task(cells: ad.AnnData) -> None:
    """A second column, without the class of three cells; and two others without one in the first."""
    cells.obs["a_stage"] = pd.Categorical(np.where(np.arange(24) % 4 < 2, "old", "young"))
    cells.obs.loc[["cell0", "cell3", "cell6"], "a_stage"] = np.nan
    cells.obs.loc[["cell1", "cell2"], "cell_type"] = np.nan


@pytest.fixture
def two_tasks(cells: ad.AnnData) -> ad.AnnData:
    """Cells with classes in two columns, some of them missing."""
    add_a_task(cells)
    return cells


def test_tasks_are_predicted_side_by_side(two_tasks: ad.AnnData, toy_model: Model, toy_slow: Any) -> None:
    probe(two_tasks, ["cell_type", "a_stage"], model=toy_model)
    found = two_tasks.uns["gfx_cell_class"]
    assert [*found["tasks"]] == ["a_stage", "cell_type"]  # in the order that files keep
    assert found["params"]["groupby"] == ["a_stage", "cell_type"]
    scores, fold = two_tasks.obsm["gfx_cell_class"], two_tasks.obsm["gfx_cell_class_fold"][:, 0]
    assert scores.shape == (24, 5)
    assert (fold >= 0).all()
    x = np.array([toy_slow.cell(row, "cls") for row in toy_slow.tokens(two_tasks)])
    for column, part in (("a_stage", slice(0, 2)), ("cell_type", slice(2, 5))):
        codes = two_tasks.obs[column].cat.codes.to_numpy()
        for at in range(2):
            train, held = (fold != at) & (codes >= 0), (fold == at) & (codes >= 0)
            np.testing.assert_allclose(scores[held, part], head(x[train], codes[train])(x[held]), atol=1e-4)
        assert np.isnan(scores[codes < 0, part]).all()
        predicted = two_tasks.obs[f"gfx_cell_class_{column}"]
        assert (predicted.isna() == (codes < 0)).all()
        best = np.array(found["tasks"][column])[scores[codes >= 0, part].argmax(axis=1)]
        assert predicted[codes >= 0].tolist() == best.tolist()
    summary = gfx.get.classification_df(two_tasks).set_index(["task", "metric"])
    assert summary["n"].to_dict() == {
        (task, metric): n
        for task, n in (("a_stage", 21), ("cell_type", 22))
        for metric in ("auc", "accuracy", "macro_f1")
    }


def test_the_first_task_named_decides_the_folds(two_tasks: ad.AnnData, toy_model: Model) -> None:
    probe(two_tasks, ["cell_type", "a_stage"], model=toy_model, n_splits=4, key_added="both")
    counts = pd.crosstab(two_tasks.obs["cell_type"].astype(str), two_tasks.obsm["both_fold"][:, 0])
    assert ((counts.max(axis=1) - counts.min(axis=1)) <= 1).all()


def test_tasks_keep_their_columns_in_files(two_tasks: ad.AnnData, toy_model: Model, tmp_path: Path) -> None:
    probe(two_tasks, ["cell_type", "a_stage"], model=toy_model, controls=CONTROLS, n_repeats=2)
    get = (gfx.get.classification_df, gfx.get.learning_curve_df, gfx.get.roc_df, gfx.get.confusion_df)
    expected = [read(two_tasks) for read in get]
    for table in expected:
        assert set(table["task"]) == {"a_stage", "cell_type"}
        assert [*dict.fromkeys(table["method"])] == ["model", "random_weights", "hvg", "pca", "majority"]
    for how in ("h5ad", "zarr"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="zarr|anndata")
            getattr(two_tasks, f"write_{how}")(tmp_path / f"cells.{how}")
            found = getattr(ad, f"read_{how}")(tmp_path / f"cells.{how}")
        tasks = {task: list(names) for task, names in found.uns["gfx_cell_class"]["tasks"].items()}
        assert [*tasks.items()] == [("a_stage", ["old", "young"]), ("cell_type", ["a", "b", "c"])]
        np.testing.assert_array_equal(found.obsm["gfx_cell_class"], two_tasks.obsm["gfx_cell_class"])
        start = 0
        for task, names in tasks.items():
            scores = found.obsm["gfx_cell_class"][:, start : start + len(names)]
            start += len(names)
            known = ~np.isnan(scores[:, 0])
            np.testing.assert_allclose(scores[known].sum(axis=1), 1, atol=1e-6)
            best = np.array(names)[scores[known].argmax(axis=1)]
            assert found.obs[f"gfx_cell_class_{task}"][known].tolist() == best.tolist()
        for read, table in zip(get, expected, strict=True):
            pd.testing.assert_frame_equal(read(found), table, check_dtype=False)
            assert read(found).attrs == table.attrs


def test_a_task_that_one_donor_has_does_not_stop_the_other(cells: ad.AnnData, toy_model: Model) -> None:
    """Where that donor is held out there is nothing to learn from, which is not the end of the other task."""
    cells.obs["severity"] = cells.obs["condition"].where(cells.obs["donor"] == "d1")
    with pytest.warns(UserWarning, match=r"has them: 'severity': \['healthy', 'sick'\]\."):
        probe(cells, ["cell_type", "severity"], donor_key="donor", model=toy_model, controls=CONTROLS)
    assert not np.isnan(cells.obsm["gfx_cell_class"][:, :3]).any()
    assert np.isnan(cells.obsm["gfx_cell_class"][:, 3:]).all()
    assert set(gfx.get.classification_df(cells)["task"]) == {"cell_type"}


def test_donors_of_one_class_each_held_out_one_by_one(cells: ad.AnnData, toy_model: Model, tmp_path: Path) -> None:
    """Sick and healthy people: no fold has both, so none has a curve; accuracy is there all the same."""
    cells.obs["state"] = cells.obs["donor"].map({"d1": "sick", "d2": "sick", "d3": "well", "d4": "well"})
    probe(cells, "state", donor_key="donor", model=toy_model, n_splits=4)
    summary = gfx.get.classification_df(cells).set_index("metric")["mean"]
    assert np.isnan(summary["auc"])
    right = cells.obs["gfx_cell_class_state"].astype(str) == cells.obs["state"].astype(str)
    assert summary["accuracy"] == pytest.approx(right.mean())
    assert gfx.get.roc_df(cells).empty
    with pytest.raises(ValueError, match="everything that a fold holds out is of one class"):
        gfx.pl.roc(cells)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert gfx.get.roc_df(ad.read_h5ad(tmp_path / "cells.h5ad")).empty


@pytest.mark.parametrize("is_view", [False, True])
def test_columns_of_tasks_of_an_earlier_call_are_dropped(
    is_view: bool, cells: ad.AnnData, toy_model: Model, slots: Any
) -> None:
    """One call after the other, under one name: the last one finds no column of the first in its way."""
    cells.obs["gfx_cell_class_mine"] = "mine"
    fresh = cells.copy()
    probe(fresh, "cell_type", model=toy_model)
    probe(cells, "cell_type", model=toy_model)
    whole, cells = cells, cells[:] if is_view else cells
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ad.ImplicitModificationWarning)  # a view becomes a copy
        probe(cells, "condition", model=toy_model)
    assert ("gfx_cell_class_cell_type" in whole.obs) == is_view
    ours = [name for name in cells.obs if name.startswith("gfx_cell_class")]
    assert ours == ["gfx_cell_class_mine", "gfx_cell_class_condition"]
    probe(cells, ["cell_type", "condition"], model=toy_model)
    probe(cells, "cell_type", model=toy_model)
    assert slots(cells) == slots(fresh)
    cells.obs["mine"] = cells.obs["condition"]
    before = slots(cells)
    with pytest.raises(ValueError, match=r"`adata\.obs\['gfx_cell_class_mine'\]` holds"):
        probe(cells, "mine", model=toy_model)
    assert slots(cells) == before


def test_result_columns_that_the_call_reads_are_not_written_over(
    cells: ad.AnnData, toy_model: Model, slots: Any
) -> None:
    probe(cells, "cell_type", model=toy_model)
    before = slots(cells)
    for groupby, donor_key in (("gfx_cell_class_cell_type", None), ("condition", "gfx_cell_class_cell_type")):
        with pytest.raises(ValueError, match=r"`adata\.obs\['gfx_cell_class_cell_type'\]` is an input of this call"):
            probe(cells, groupby, donor_key=donor_key, model=toy_model)
    assert slots(cells) == before
    probe(cells, "gfx_cell_class_cell_type", model=toy_model, key_added="again")


# --- what it is held against ----------------------------------------------------------------------------------------


def test_genes_and_components_of_counts_are_found_among_training_cells(
    cells: ad.AnnData, toy_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Genes are chosen, and components found, without the cells held out."""
    monkeypatch.setattr(_learners, "N_GENES", 40)
    monkeypatch.setattr(_learners, "N_COMPONENTS", 5)
    gfx.tl.classify_cells(cells, "cell_type", model=toy_model, method="linear_probe", n_splits=3, n_repeats=1)
    logs = ad.AnnData(cells.X.copy(), var=cells.var)
    sc.pp.normalize_total(logs, target_sum=1e4)
    sc.pp.log1p(logs)
    logs = logs[:, :200]  # what the model does not know counts for the depth alone
    truth, fold = cells.obs["cell_type"].cat.codes.to_numpy(), cells.obsm["gfx_cell_class_fold"][:, 0]
    expected: dict[str, list[float]] = {"hvg": [], "pca": []}
    chosen = []
    for at in range(3):
        train = fold != at
        learnt = logs[train].copy()
        learnt = learnt[:, np.asarray((learnt.X > 0).sum(axis=0)).ravel() > 0].copy()
        sc.pp.highly_variable_genes(learnt, n_top_genes=40)
        names = learnt.var_names[learnt.var["highly_variable"]]
        chosen.append(set(names))
        x = np.asarray(logs[:, names].X.todense())
        pca = PCA(5, random_state=0).fit(x[train])
        for name, features in (("hvg", x), ("pca", pca.transform(x))):
            found = head(features[train], truth[train])(features[~train])
            expected[name].append(
                np.mean([roc_auc_score(truth[~train] == number, found[:, number]) for number in range(3)])
            )
    assert chosen[0] != chosen[1]
    metrics = cells.uns["gfx_cell_class"]["metrics"]
    for name, areas in expected.items():
        rows = metrics[(metrics["method"] == name) & (metrics["metric"] == "auc")].sort_values("fold")
        np.testing.assert_allclose(rows["value"], areas, atol=1e-3, err_msg=name)


def test_types_with_genes_of_their_own_are_found_by_counts(typed: ad.AnnData, toy_model: Model) -> None:
    typed.obs["uneven"] = np.where(typed.obs["cell_type"] == "a", "a", "other")
    probe(typed, "uneven", model=toy_model, controls=CONTROLS, rng=3)  # the toy was drawn with seed 0
    summary = gfx.get.classification_df(typed).set_index(["metric", "method"])["mean"]
    assert summary["auc", "hvg"] == summary["auc", "pca"] == 1
    assert summary["accuracy", "majority"] == pytest.approx(2 / 3)
    assert summary["auc", "majority"] == 0.5
    assert summary["macro_f1", "majority"] == pytest.approx(0.4)
    assert summary["auc", "model"] != summary["auc", "random_weights"]


def test_without_counts_there_is_no_baseline_of_counts(
    cells: ad.AnnData, toy_model: Model, capsys: pytest.CaptureFixture
) -> None:
    gfx.pp.tokenize(cells, model=toy_model)
    cells.X = None
    probe(cells, "cell_type", model=toy_model, controls=CONTROLS)
    assert "The baselines of log counts are missing, because there are no counts to read" in capsys.readouterr().out
    assert set(gfx.get.classification_df(cells)["method"]) == {"model", "random_weights", "majority"}


# --- fine-tuning ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["balanced", None])
def tuned(
    request: Any, toy_cells: Any, toy_model: Model, watch: Any
) -> tuple[ad.AnnData, list[tuple[Any, Any, Any]], str | None]:
    """Two tasks after fine-tuning of one step, and its trainings; with baselines where classes count alike."""
    cells = toy_cells(24)
    add_a_task(cells)
    cells.obs["sample"] = [f"s{at // 3}" for at in range(24)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = watch(monkeypatch)
        tune(
            cells,
            ["cell_type", "a_stage"],
            donor_key="sample",
            model=toy_model,
            controls=None if request.param is None else CONTROLS,
            method=FineTuning(class_weight=request.param, training=ONE_STEP | {"learning_rate": 1e-2}),
        )
    return cells, seen, request.param


def test_fine_tuning_sees_no_cell_or_donor_held_out(tuned: Any) -> None:
    """Nor does a donor that chooses the best pass teach."""
    cells, trainings, class_weight = tuned
    n_networks = 1 if class_weight is None else 2  # random weights are trained beside the model, in each of two folds
    assert len(trainings) == 2 * n_networks
    fold, sample = cells.obsm["gfx_cell_class_fold"][:, 0], cells.obs["sample"]
    codes = cells.obs[["a_stage", "cell_type"]].apply(lambda column: column.cat.codes)
    for number, (learnt, judged, _) in enumerate(trainings):
        sides = [set(sample.iloc[part.cells]) for part in (learnt, judged)]
        assert all(sides)
        assert not sides[0] & sides[1]
        assert {*learnt.cells, *judged.cells} == {*np.flatnonzero(fold != number // n_networks)}
        for part in (learnt, judged):
            labels = np.array([part[at]["labels"] for at in range(len(part))])
            np.testing.assert_array_equal(np.where(labels == -100, -1, labels), codes.to_numpy()[part.cells])
    baselines = set() if class_weight is None else {"random_weights", "hvg", "pca", "majority"}
    assert set(gfx.get.classification_df(cells)["method"]) == {"model"} | baselines


def test_scores_of_fine_tuning_are_those_of_the_classifier_trained_without_the_unit(tuned: Any, toy_slow: Any) -> None:
    cells, trainings, class_weight = tuned
    fold, scores = cells.obsm["gfx_cell_class_fold"][:, 0], cells.obsm["gfx_cell_class"]
    rows = toy_slow.tokens(cells)
    for at, (learnt, _, classifier) in enumerate(trainings[:: len(trainings) // 2]):
        with torch.no_grad():
            states = [classifier.bert(torch.tensor([row])).last_hidden_state[0, 0] for row in rows]
            logits = classifier.classifier(torch.stack(states))
        for task, part in (("a_stage", slice(0, 2)), ("cell_type", slice(2, 5))):
            known = cells.obs[task].notna().to_numpy() & (fold == at)
            found = logits[:, part].softmax(dim=-1).numpy()
            np.testing.assert_allclose(scores[known, part], found[known], atol=1e-5)
            counts = cells.obs[task].iloc[learnt.cells].value_counts(sort=False).to_numpy()
            weights = np.ones(len(counts)) if class_weight is None else counts.sum() / (len(counts) * counts)
            np.testing.assert_allclose(classifier.class_weight[part], weights, rtol=1e-6)


def test_fine_tuning_finds_types_with_genes_of_their_own(
    typed: ad.AnnData, toy_model_v1: Model, trainings: list[tuple[Any, Any, Any]]
) -> None:
    """In cells held out, by a network without <cls>."""
    training = {"num_train_epochs": 12, "learning_rate": 5e-3, "per_device_train_batch_size": 4}
    method = FineTuning(patience=None, training=training)
    tune(typed, "cell_type", donor_key="donor", model=toy_model_v1, method=method)
    assert trainings[0][2].head.pooling == "mean"
    summary = gfx.get.classification_df(typed).set_index("metric")["mean"]
    assert summary["auc"] > 0.8
    assert json.loads(typed.uns["gfx_cell_class"]["params"]["training"]) == training


def test_training_ends_when_the_validation_loss_does_not_fall(
    cells: ad.AnnData, toy_model: Model, stop_in_step: Any
) -> None:
    """Labels drawn at random: the first passes are the best, and the last ones do not happen."""
    cells.obs["drawn"] = np.random.default_rng(0).permutation(["heads", "tails"] * 12)
    training = {"num_train_epochs": 6, "learning_rate": 3e-3, "warmup_steps": 0}
    steps = replace(stop_in_step, model=Classifier, forward=Classifier.forward)(-1)  # counts, and stops in none
    tune(cells, "drawn", model=toy_model, method=FineTuning(training=training, patience=None))
    assert len(steps) == 12  # a pass over each half is one batch
    tune(cells, "drawn", model=toy_model, method=FineTuning(training=training, patience=1))
    assert 12 + 4 <= len(steps) < 24
