"""Tables of learnt classes, against what was stored; the results are made up, no model runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import gfx

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Classified, ToyCells

METHODS = ["model", "random_weights", "expression", "majority"]
LABELS = {"labels": ["tolerant", "sensitive"]}
CELLS = {"cell_type": ["a", "b", "c"], "condition": ["sick", "healthy"]}
TABLES = ["classification_df", "roc_df", "confusion_df", "learning_curve_df"]


@pytest.fixture(scope="module")
def genes(toy_cells: ToyCells, classified: Classified) -> ad.AnnData:
    adata = classified(toy_cells(), "tl.classify_genes", tasks=LABELS)
    adata.var["gene_name"] = [f"name of {name}" for name in adata.var_names]
    return adata


@pytest.fixture(scope="module")
def cells(toy_cells: ToyCells, classified: Classified) -> ad.AnnData:
    return classified(toy_cells(), "tl.classify_cells", key="mine", tasks=CELLS)


@pytest.fixture(scope="module")
def predicted(toy_cells: ToyCells, classified: Classified) -> ad.AnnData:
    tasks = {"role": ["z", "y", "x"]}
    return classified(toy_cells(), "tl.predict_genes", tasks=tasks, groups=["first", "second"])


# --- how well -------------------------------------------------------------------------------------------------------


def test_the_model_stands_before_its_controls(genes: ad.AnnData, cells: ad.AnnData) -> None:
    for adata, slot, blocks in (
        (genes, "gfx_gene_class", [("labels", "gene"), ("labels", "occurrence")]),
        (cells, "mine", [("cell_type", "cell"), ("condition", "cell")]),
    ):
        table = gfx.get.classification_df(adata)
        columns = ["task", "unit", "method", "n_cells", "metric", "mean", "sd", "low", "high", "n_repeats", "n"]
        assert table.columns.tolist() == columns
        assert table.index.tolist() == list(range(len(table)))
        rows = [
            (*block, metric, method)
            for block in blocks
            for metric in ("auc", "accuracy", "macro_f1")
            for method in METHODS
        ]
        assert list(table[["task", "unit", "metric", "method"]].itertuples(index=False, name=None)) == rows
        assert (table["n_cells"] == 2000).all()
        stored = adata.uns[slot]["summary"]
        assert stored["method"].iloc[0] != "model"  # it was sorted here
        by = ["task", "unit", "method", "metric"]
        expected = stored[stored["n_cells"] == 2000].set_index(by).loc[pd.MultiIndex.from_frame(table[by])]
        np.testing.assert_array_equal(table["mean"], expected["mean"])
        np.testing.assert_array_equal(table["low"], expected["low"])
        assert table["low"].isna().tolist() == (table["unit"] == "occurrence").tolist()
    assert gfx.get.classification_df(genes).attrs["note"] == "genes were held out in 5 folds."


def test_baselines_stand_in_order_of_their_names(cells: ad.AnnData) -> None:
    adata = cells.copy()
    stored = adata.uns["mine"]["summary"]
    adata.uns["mine"]["summary"] = pd.concat(
        [
            stored.replace({"method": {"expression": "pca"}}),
            stored[stored["method"] == "expression"].replace("expression", "hvg"),
        ]
    )
    table = gfx.get.classification_df(adata)
    assert table["method"].unique().tolist() == ["model", "random_weights", "hvg", "pca", "majority"]


def test_a_method_trained_on_fewer_cells_only_stays(cells: ad.AnnData) -> None:
    adata = cells.copy()
    stored = adata.uns["mine"]["summary"]
    adata.uns["mine"]["summary"] = stored[(stored["method"] != "expression") | (stored["n_cells"] < 2000)]
    table = gfx.get.classification_df(adata)
    assert table.groupby("method")["n_cells"].unique().map(list).to_dict() == {
        "model": [2000],
        "random_weights": [2000],
        "expression": [500],
        "majority": [2000],
    }


def test_learning_curve_has_the_rows_of_fewer_cells_too(genes: ad.AnnData) -> None:
    table = gfx.get.learning_curve_df(genes)
    assert len(table) == len(genes.uns["gfx_gene_class"]["summary"]) == 3 * len(gfx.get.classification_df(genes))
    assert table["n_cells"].tolist() == [100, 500, 2000] * (len(table) // 3)
    assert table["method"].tolist()[:12] == [method for method in METHODS for _ in range(3)]
    largest = table[table["n_cells"] == 2000].reset_index(drop=True)
    pd.testing.assert_frame_equal(largest, gfx.get.classification_df(genes))
    stored = genes.uns["gfx_gene_class"]["summary"]
    row = table.query("unit == 'occurrence' and metric == 'accuracy' and method == 'model' and n_cells == 100")
    same = stored.query("unit == 'occurrence' and metric == 'accuracy' and method == 'model' and n_cells == 100")
    assert row["mean"].item() == same["mean"].item()
    assert table.loc[table["n_cells"] < 2000, ["low", "high"]].isna().all(axis=None)


def test_roc_is_the_stored_table(genes: ad.AnnData) -> None:
    table = gfx.get.roc_df(genes)
    assert table.columns.tolist() == ["task", "unit", "method", "repeat", "fold", "class", "fpr", "tpr"]
    pd.testing.assert_frame_equal(table, genes.uns["gfx_gene_class"]["roc"])
    assert table["class"].unique().tolist() == ["sensitive"]


def test_shares_are_of_the_true_class(cells: ad.AnnData) -> None:
    adata = cells.copy()
    stored = adata.uns["mine"]["confusion"] = cells.uns["mine"]["confusion"].copy()
    stored.loc[(stored["task"] == "cell_type") & (stored["true"] == "b") & (stored["method"] == "model"), "n"] = 0.0
    table = gfx.get.confusion_df(adata)
    pd.testing.assert_frame_equal(table.drop(columns="share"), stored)
    n_without = 0
    for row in table.itertuples():
        alike = stored.query("task == @row.task and method == @row.method and true == @row.true")
        total = sum(alike["n"])
        n_without += total == 0
        assert row.share == pytest.approx(row.n / total if total else np.nan, nan_ok=True)
    assert n_without == 3
    assert table["share"].isna().sum() == 3
    rows = table.query("task == 'condition' and method == 'model' and true == 'sick'")
    assert rows["share"].sum() == pytest.approx(1)
    assert rows["predicted"].tolist() == ["sick", "healthy"]
    assert rows["share"].tolist()[1] == 0  # a pair that never occurs is there


def test_shares_of_tasks_with_classes_of_the_same_name(toy_cells: ToyCells, classified: Classified) -> None:
    adata = classified(toy_cells(), "tl.classify_cells", tasks={"one": ["no", "yes"], "other": ["no", "yes", "unsure"]})
    table = gfx.get.confusion_df(adata)
    np.testing.assert_allclose(table.groupby(["task", "method", "true"])["share"].sum(), 1)


# --- genes ----------------------------------------------------------------------------------------------------------


def test_scores_of_genes_held_out(genes: ad.AnnData) -> None:
    table = gfx.get.gene_scores_df(genes)
    scores = ["score_tolerant", "sd_tolerant", "score_sensitive", "sd_sensitive"]
    assert table.columns.tolist() == ["gene", "label", "predicted", "n_cells", *scores]
    n_cells = genes.var["gfx_gene_class_n_cells"]
    assert set(table["gene"]) == set(genes.var_names[n_cells >= 10])
    assert 0 < len(table) == genes.n_vars - 10
    assert table["score_sensitive"].is_monotonic_decreasing
    assert table.index.tolist() == list(range(len(table)))
    at = genes.var_names.get_indexer(table["gene"])
    np.testing.assert_array_equal(table[["score_tolerant", "score_sensitive"]], genes.varm["gfx_gene_class"][at])
    np.testing.assert_array_equal(table[["sd_tolerant", "sd_sensitive"]], genes.varm["gfx_gene_class_sd"][at])
    assert table["label"].tolist() == genes.var["gfx_gene_class"].iloc[at].tolist()
    assert table["predicted"].tolist() == genes.var["gfx_gene_class_predicted"].iloc[at].tolist()
    assert table["n_cells"].tolist() == n_cells.iloc[at].tolist()
    assert table.attrs == {"task": "labels", "classes": ["tolerant", "sensitive"]}


def test_genes_in_few_cells_are_left_out_and_those_without_a_score_always(genes: ad.AnnData) -> None:
    assert len(gfx.get.gene_scores_df(genes, min_cells=5)) == genes.n_vars - 6
    assert len(gfx.get.gene_scores_df(genes, min_cells=0)) == genes.n_vars - 6
    assert gfx.get.gene_scores_df(genes, min_cells=0)["score_sensitive"].notna().all()
    assert gfx.get.gene_scores_df(genes, min_cells=10_000).empty


def test_genes_of_the_same_score_keep_their_order(genes: ad.AnnData) -> None:
    adata = genes.copy()
    score = np.random.default_rng(0).integers(0, 3, adata.n_vars) / 2
    adata.varm["gfx_gene_class"] = np.column_stack([1 - score, score]).astype(np.float32)
    expected = sorted(range(adata.n_vars - 10), key=lambda at: (-score[at], at))
    assert gfx.get.gene_scores_df(adata)["gene"].tolist() == adata.var_names[expected].tolist()


def test_names_of_genes(genes: ad.AnnData) -> None:
    expected = [f"name of {name}" for name in gfx.get.gene_scores_df(genes)["gene"]]
    assert gfx.get.gene_scores_df(genes, names="gene_name")["gene"].tolist() == expected
    with pytest.raises(KeyError, match="Did you mean 'gene_name'"):
        gfx.get.gene_scores_df(genes, names="gene_nam")


def test_classes_keep_their_order_in_a_part_of_the_genes(genes: ad.AnnData) -> None:
    part = genes[:, (genes.var["gfx_gene_class"] == "sensitive").to_numpy()].copy()
    assert part.var["gfx_gene_class"].cat.categories.tolist() == ["sensitive"]
    table = gfx.get.gene_scores_df(part)
    assert table["label"].cat.categories.tolist() == ["tolerant", "sensitive"]
    assert set(table["label"]) == {"sensitive"}


def test_scores_of_predicted_genes(predicted: ad.AnnData) -> None:
    table = gfx.get.gene_scores_df(predicted)
    scores = ["score_z", "sd_z", "score_y", "sd_y", "score_x", "sd_x"]
    assert table.columns.tolist() == ["gene", "in_training", "predicted", "n_cells", *scores]
    assert table["score_x"].is_monotonic_decreasing
    assert not table["score_y"].is_monotonic_decreasing
    at = predicted.var_names.get_indexer(table["gene"])
    np.testing.assert_array_equal(table["in_training"], predicted.var["gfx_predicted_genes_in_training"].iloc[at])
    assert table["in_training"].nunique() == 2
    assert table["predicted"].tolist() == predicted.var["gfx_predicted_genes"].iloc[at].tolist()
    np.testing.assert_array_equal(table["score_y"], predicted.varm["gfx_predicted_genes"][at, 1])


@pytest.mark.parametrize(("at", "group"), [(0, "first"), (1, "second")])
def test_gene_scores_of_a_group(predicted: ad.AnnData, at: int, group: str) -> None:
    table = gfx.get.gene_scores_df(predicted, group, min_cells=3).set_index("gene")
    assert table.columns.tolist() == ["in_training", "predicted", "n_cells", "score_z", "score_y", "score_x"]
    n_cells = pd.Series(predicted.varm["gfx_predicted_genes_groups_n_cells"][:, at], predicted.var_names)
    assert set(table.index) == set(n_cells.index[n_cells >= 3])
    assert table["n_cells"].tolist() == n_cells[table.index].tolist()
    assert table["score_x"].is_monotonic_decreasing
    values = predicted.varm["gfx_predicted_genes_groups"][predicted.var_names.get_indexer(table.index), at]
    np.testing.assert_array_equal(table[["score_z", "score_y", "score_x"]], values)
    assert table["predicted"].tolist() == ["zyx"[best] for best in values.argmax(axis=1)]


def test_a_group_that_does_not_exist_is_an_error(
    genes: ad.AnnData, predicted: ad.AnnData, toy_cells, classified
) -> None:
    with pytest.raises(KeyError, match=r"Did not find the group 'third'. Present: \['first', 'second'\]"):
        gfx.get.gene_scores_df(predicted, "third")
    with pytest.raises(KeyError, match=r"scores genes in all cells. Leave `group` out"):
        gfx.get.gene_scores_df(genes, "first")
    with pytest.raises(KeyError, match=r"Give `groupby=` to `gfx.tl.predict_genes`"):
        gfx.get.gene_scores_df(classified(toy_cells(), "tl.predict_genes"), "first")


# --- which result ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("get", TABLES)
def test_tables_are_of_the_default_key_or_of_the_only_result(
    toy_cells: ToyCells, classified: Classified, cells: ad.AnnData, get: str
) -> None:
    read = getattr(gfx.get, get)
    adata = toy_cells()
    with pytest.raises(
        KeyError, match=r"`gfx.tl.classify_genes` or `gfx.tl.classify_cells` in .*Run one of them first"
    ):
        read(adata)
    classified(adata, "tl.predict_genes")  # not one of those that tell how well
    with pytest.raises(KeyError, match="Run one of them first"):
        read(adata)
    classified(adata, "tl.classify_cells", key="mine", tasks=CELLS)
    pd.testing.assert_frame_equal(read(adata), read(cells))
    classified(adata, "tl.classify_genes", tasks=LABELS)
    assert read(adata)["task"].unique().tolist() == ["labels"]  # under its default name
    pd.testing.assert_frame_equal(read(adata, key="mine"), read(cells))
    assert read(adata, key="gfx_gene_class")["task"].unique().tolist() == ["labels"]
    classified(adata, "tl.classify_cells", tasks=CELLS)
    with pytest.raises(KeyError, match=r"choose one with `key=`: \['gfx_cell_class', 'gfx_gene_class', 'mine'\]"):
        read(adata)
    del adata.uns["gfx_cell_class"]
    with pytest.raises(KeyError, match=r"Did not find 'other' in .*: \['gfx_gene_class', 'mine'\]"):
        read(adata, key="other")
    with pytest.raises(KeyError, match=r"'gfx_predicted_genes'.* was written by `gfx.tl.predict_genes`, not by"):
        read(adata, key="gfx_predicted_genes")


def test_gene_scores_are_of_the_default_key_or_of_the_only_result(toy_cells: ToyCells, classified: Classified) -> None:
    adata = classified(toy_cells(), "tl.classify_cells")
    with pytest.raises(KeyError, match=r"`gfx.tl.classify_genes` or `gfx.tl.predict_genes` in .*Run one of them first"):
        gfx.get.gene_scores_df(adata)
    with pytest.raises(KeyError, match=r"written by `gfx.tl.classify_cells`, not by .*Run one of them first"):
        gfx.get.gene_scores_df(adata, key="gfx_cell_class")
    classified(adata, "tl.predict_genes", key="mine")
    assert "in_training" in gfx.get.gene_scores_df(adata)
    classified(adata, "tl.classify_genes")
    assert "label" in gfx.get.gene_scores_df(adata)  # under its default name
    assert "in_training" in gfx.get.gene_scores_df(adata, key="mine")
    assert "label" in gfx.get.gene_scores_df(adata, key="gfx_gene_class")


# --- files, copies, containers --------------------------------------------------------------------------------------


def test_tables_are_the_same_after_a_file(
    genes: ad.AnnData, cells: ad.AnnData, predicted: ad.AnnData, tmp_path: Path
) -> None:
    for adata in (genes, cells, predicted):
        adata.write_h5ad(tmp_path / "cells.h5ad")
        read = ad.read_h5ad(tmp_path / "cells.h5ad")
        names = [*TABLES, "gene_scores_df"] if adata is genes else TABLES if adata is cells else ["gene_scores_df"]
        for name in names:
            before, after = getattr(gfx.get, name)(adata), getattr(gfx.get, name)(read)
            pd.testing.assert_frame_equal(after, before, check_column_type=False)
            assert after.attrs == before.attrs
    after = gfx.get.gene_scores_df(read, "second")
    pd.testing.assert_frame_equal(after, gfx.get.gene_scores_df(predicted, "second"), check_column_type=False)


def test_tables_are_copies(genes: ad.AnnData) -> None:
    before = genes.copy()
    for name in [*TABLES, "gene_scores_df"]:
        table = getattr(gfx.get, name)(genes)
        for column in table:
            table[column] = 0
    for name in ("summary", "roc", "confusion"):
        pd.testing.assert_frame_equal(genes.uns["gfx_gene_class"][name], before.uns["gfx_gene_class"][name])
    np.testing.assert_array_equal(genes.varm["gfx_gene_class"], before.varm["gfx_gene_class"])


def test_mudata(genes: ad.AnnData, as_mudata) -> None:
    other = genes[:, :5].copy()
    other.var_names = [f"other {name}" for name in other.var_names]
    mdata = as_mudata({"rna": genes, "other": other})
    for name in [*TABLES, "gene_scores_df"]:
        read = getattr(gfx.get, name)
        pd.testing.assert_frame_equal(read(mdata, mod="rna"), read(genes))
        with pytest.raises(ValueError, match="`mod=` one of"):
            read(mdata)
