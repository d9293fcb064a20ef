"""Tables of classified genes and cells: performance, ROC curves, confusion, and scores of genes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._adata import gene_column, gene_names, group_name
from gfx._docs import shared
from gfx._results import CLASSIFICATIONS, find

if TYPE_CHECKING:
    from gfx._results import Slots
    from gfx._types import Data

_HELD_OUT, _PREDICTED = "tl.classify_genes", "tl.predict_genes"

#: Begins the examples of all tables of performance.
_EXAMPLE = """
>>> import gfx
>>> adata = gfx.datasets.toy()
>>> gfx.tl.classify_cells(
...     adata, "cell_type", model="mini", method="linear_probe", n_repeats=1
... )
"""


@shared(example=_EXAMPLE)
def classification_df(adata: Data, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate how well held-out genes or cells are classified, by the model and by its controls.

    For each task, unit and metric, the first row is the model, followed by the random-weights model and by baselines
    that need no model. Pretraining contributes only what the first row has in excess of the others.

    Parameters
    ----------
    {after_classifying}
    {key}
    {mod}

    Returns
    -------
    One row for each combination of task, unit, metric and method, for the largest training set (for smaller training
    sets, see :func:`gfx.get.learning_curve_df`). Columns:

    - `task`: ``"labels"``, or the column of `var` or `obs` with the classes;
    - `unit`: what is scored, ``"gene"`` (mean over the cells that express it), ``"occurrence"`` (a gene in a cell) or
      ``"cell"``;
    - `method`: ``"model"``; ``"random_weights"``, the same architecture without pretraining; baselines without a model;
      ``"majority"``, which always predicts the most frequent class;
    - `n_cells`: maximum number of training cells;
    - `metric`: ``"auc"``, ``"accuracy"`` or ``"macro_f1"``;
    - `mean`: mean over repeats. Accuracy and macro F1 are computed over the predictions of all folds of a repeat
      together; AUC is the mean over the folds with more than one class, because scores of the models of different folds
      are not comparable; `sd`: standard deviation over repeats, NaN with only one repeat;
    - `low` and `high`: 95 % bootstrap interval over genes, donors or cells; NaN for occurrences;
    - `n_repeats`: number of repeats; `n_folds`: number of folds, in all repeats, from which the value was computed;
      `n`: number of scored genes, occurrences or cells.

    ``attrs["note"]`` says what was held out.

    Raises
    ------
    KeyError
        There is no such result, or there are several and `key` is not given.

    Examples
    --------
    {example}
    >>> table = gfx.get.classification_df(adata)
    >>> table.loc[0, ["task", "unit", "method"]].tolist()
    ['cell_type', 'cell', 'model']
    """
    uns = find(adata, *CLASSIFICATIONS, key=key, mod=mod).uns
    table = _in_order(uns["summary"])
    most = table.groupby(["task", "unit", "method", "metric"], observed=True)["n_cells"].transform("max")
    table = table[table["n_cells"] == most].reset_index(drop=True)
    table.attrs["note"] = str(uns["note"])
    return table


@shared(example=_EXAMPLE)
def learning_curve_df(adata: Data, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate how well held-out genes or cells are classified after training on few and on more cells.

    Parameters
    ----------
    {after_classifying}
    {key}
    {mod}

    Returns
    -------
    The rows and columns of :func:`gfx.get.classification_df`, and one more row for each smaller training set, sorted by
    `n_cells`. There, `low` and `high` are NaN.

    Raises
    ------
    KeyError
        No such result, or several and no `key`.

    Examples
    --------
    {example}
    >>> gfx.get.learning_curve_df(adata)["method"].iloc[0]
    'model'
    """
    return _in_order(find(adata, *CLASSIFICATIONS, key=key, mod=mod).uns["summary"])


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Sort rows: task, unit and metric as they first appear, and within each the model before all other methods."""
    ranks = {"model": 0, "random_weights": 1, "majority": 3}  # other baselines stand before the majority, by name
    method = table["method"].map(lambda name: f"{ranks.get(name, 2)} {name}")
    keys = [pd.factorize(table[column])[0] for column in ("metric", "unit", "task")]
    order = np.lexsort([table["n_cells"], pd.factorize(method, sort=True)[0], *keys])  # the last key counts most
    return table.iloc[order].reset_index(drop=True)


@shared(example=_EXAMPLE)
def roc_df(adata: Data, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate ROC curves, one for each fold and repeat.

    Parameters
    ----------
    {after_classifying}
    {key}
    {mod}

    Returns
    -------
    Columns `task`, `unit` and `method` as in :func:`gfx.get.classification_df`; `repeat` and `fold`;
    `class`, the class that is scored against all others, the second one where there are two; `fpr`, 101 false positive
    rates from 0 to 1; `tpr`, the true positive rate there.

    Raises
    ------
    KeyError
        No such result, or several and no `key`.

    Examples
    --------
    {example}
    >>> gfx.get.roc_df(adata).columns.tolist()
    ['task', 'unit', 'method', 'repeat', 'fold', 'class', 'fpr', 'tpr']
    """
    return find(adata, *CLASSIFICATIONS, key=key, mod=mod).uns["roc"].reset_index(drop=True).copy()


@shared(example=_EXAMPLE)
def confusion_df(adata: Data, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate the confusion matrix of held-out genes or cells.

    Parameters
    ----------
    {after_classifying}
    {key}
    {mod}

    Returns
    -------
    One row a pair of classes, also of pairs that never occur. Columns `task`, `unit` and `method` as in
    :func:`gfx.get.classification_df`; `true` and `predicted`, the classes; `n`, the number of genes or cells, mean over
    repeats; `share`, its fraction of the true class, NaN if that is empty.

    Raises
    ------
    KeyError
        No such result, or several and no `key`.

    Examples
    --------
    {example}
    >>> gfx.get.confusion_df(adata).columns.tolist()
    ['task', 'unit', 'method', 'true', 'predicted', 'n', 'share']
    """
    table = find(adata, *CLASSIFICATIONS, key=key, mod=mod).uns["confusion"].reset_index(drop=True).copy()
    total = table.groupby(["task", "unit", "method", "true"], observed=True)["n"].transform("sum")
    table["share"] = table["n"] / total.where(total > 0)
    return table


@shared()
def gene_scores_df(
    adata: Data,
    group: str | None = None,
    *,
    key: str | None = None,
    min_cells: int = 10,
    names: str | None = None,
    mod: str | None = None,
) -> pd.DataFrame:
    """Tabulate the class probabilities of each gene, one row a gene.

    After :func:`gfx.tl.classify_genes` these are labelled genes, each scored by models that were trained without it.
    After :func:`gfx.tl.predict_genes` they are all genes in the model's vocabulary; those that it was trained on are
    marked, because their scores are no predictions.

    Parameters
    ----------
    {after_scoring}
    {group}
    {key}
    {min_cells}
    {names}
    {mod}

    Returns
    -------
    Columns:

    - `gene`;
    - `label`, the given class, or after :func:`gfx.tl.predict_genes` `in_training`, whether the gene was in the
      training set;
    - `predicted`, the class with the highest score; `n_cells`, the number of cells the gene was scored in;
    - for each class `score_<class>`, its mean probability over these cells, and without `group` `sd_<class>`, the
      population standard deviation (after :func:`gfx.tl.classify_genes`, its mean over repeats).

    Sorted by the score of the last class, descending. ``attrs["task"]`` names the task, ``attrs["classes"]`` its
    classes.

    Raises
    ------
    KeyError
        No such result or group, several results and no `key`, or no such column in `var`.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> t_cell = ["CD3D", "CD3E", "CD3G", "CD2", "IL7R", "TRAT1", "CD5", "CD27"]
    >>> b_cell = ["MS4A1", "CD79A", "CD79B", "CD19", "BANK1", "BLK", "HLA-DRA", "CD74"]
    >>> labels = {"T": t_cell, "B": b_cell}
    >>> gfx.tl.classify_genes(
    ...     adata, labels, model="mini", method="linear_probe", n_repeats=1
    ... )
    >>> gfx.get.gene_scores_df(adata).columns.tolist()
    ['gene', 'label', 'predicted', 'n_cells', 'score_T', 'sd_T', 'score_B', 'sd_B']
    """
    result = find(adata, _HELD_OUT, _PREDICTED, key=key, mod=mod)
    held_out = result.function == _HELD_OUT
    ((task, classes),) = result.uns["tasks"].items()
    classes = [str(name) for name in classes]

    def categorical(part: str) -> pd.Categorical:
        """Read classes in their order, all of them: subsetting an AnnData drops those that none of its genes has."""
        return pd.Categorical(result.read("var", part).astype(object), categories=classes)

    columns = {"gene": gene_names(gene_column(result.adata.var, names))}
    if held_out:
        columns["label"] = categorical("")
    else:
        columns["in_training"] = result.read("var", "in_training").to_numpy()
    if group is None:
        columns["predicted"] = categorical("predicted" if held_out else "")
        columns["n_cells"] = result.read("var", "n_cells").to_numpy()
        parts = {"score": result.read("varm"), "sd": result.read("varm", "sd")}
    else:
        number = _group_number(group, result)
        scores, n_cells = (result.read("varm", part)[:, number] for part in ("groups", "groups_n_cells"))
        best = np.where(np.isnan(scores).any(axis=1), -1, scores.argmax(axis=1))
        columns |= {"predicted": pd.Categorical.from_codes(best, classes), "n_cells": n_cells}
        parts = {"score": scores}
    columns |= {f"{part}_{name}": parts[part][:, at] for at, name in enumerate(classes) for part in parts}
    table = pd.DataFrame(columns)
    table = table[table["n_cells"] >= max(min_cells, 1)]
    table = table.sort_values(f"score_{classes[-1]}", ascending=False, kind="stable", ignore_index=True)
    table.attrs |= {"task": task, "classes": classes}
    return table


def _group_number(group: str, result: Slots) -> int:
    """Find the number of a group, or say what there is."""
    groups = result.names("groups")
    if (name := group_name(group, groups)) in groups:
        return groups.index(name)
    msg = f"Did not find the group {group!r}. Present: {groups}."
    if result.function == _HELD_OUT:
        msg = (
            f"`adata.uns[{result.key!r}]` is of `gfx.{_HELD_OUT}`, which scores genes in all cells. Leave `group` out."
        )
    elif not groups:
        msg = f"`adata.uns[{result.key!r}]` has no groups. Give `groupby=` to `gfx.{_PREDICTED}`, or leave `group` out."
    raise KeyError(msg)
