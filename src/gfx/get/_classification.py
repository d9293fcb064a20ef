"""Tables of classes that were learnt: how well, against what, and what is taken for what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gfx._adata import pick
from gfx._provenance import made_by

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from mudata import MuData

_FUNCTIONS = ("tl.classify_genes", "tl.classify_cells")

#: Methods that stand before the baselines, and the one that stands behind them.
_FIRST, _LAST = ("model", "random_weights"), "majority"


def find_only(
    data: AnnData | MuData, functions: Sequence[str], *, key: str | None, mod: str | None
) -> tuple[AnnData, str, Mapping[str, Any]]:
    """Return the AnnData, the slot in `uns` and the result there: the one named `key`, or the only one there is.

    Raises
    ------
    KeyError
        There is none that one of these functions wrote, or several that could be meant.
    """
    adata = pick(data, mod)
    there = sorted(name for name, entry in adata.uns.items() if made_by(entry) in functions)
    calls = " or ".join(f"`gfx.{function}`" for function in functions)
    if key is None:
        if not there:
            msg = f"Did not find a result of {calls} in `adata.uns`. Run one of them first."
            raise KeyError(msg)
        if len(there) > 1:
            msg = f"There are several results of {calls}; say which one: `key=` one of {there}."
            raise KeyError(msg)
        return adata, there[0], adata.uns[there[0]]
    if key in there:
        return adata, key, adata.uns[key]
    writer = made_by(adata.uns.get(key))
    wrong = (
        f"Did not find {key!r} in `adata.uns`."
        if writer is None
        else f"`adata.uns[{key!r}]` was written by {writer!r}, not by {calls}."
    )
    msg = f"{wrong} Results of {calls} here: {there}.{'' if there else ' Run one of them first.'}"
    raise KeyError(msg)


def classification_df(adata: AnnData | MuData, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate how well classes are told apart in genes or cells held out, by the model and by what it is held against.

    For each task, unit and metric the model comes first, then the same network with random weights, then methods that
    need no model. What the model has learnt is the distance between its row and these.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.classify_genes` or :func:`gfx.tl.classify_cells`.
    key
        The `key_added` of that call, or its default name; `None` takes the only result there is.
    mod
        Modality of a MuData.

    Returns
    -------
    One row a task, unit, metric and method, trained on as many cells as were allowed (for fewer see
    :func:`gfx.get.learning_curve_df`). Columns:

    - `task`: the classes that were learnt, ``"labels"`` or a column of `var` or `obs`;
    - `unit`: what is scored, ``"gene"`` (mean over its cells), ``"occurrence"`` (a gene in a cell) or ``"cell"``;
    - `method`: ``"model"``; ``"random_weights"``, a network of the same shape that has learnt nothing before;
      baselines without a network; ``"majority"``, always the commonest class;
    - `n_cells`: cells trained on at most;
    - `metric`: ``"auc"``, ``"accuracy"`` or ``"macro_f1"``;
    - `mean`: over seeds; accuracy and macro F1 of all that a seed held out, AUC as the mean over its folds that have
      more than one class, for scores of two folds' models do not compare; `sd`: over seeds, NaN with one;
    - `low` and `high`: 95 % bootstrap interval over genes, donors or cells; NaN for occurrences;
    - `n_seeds`; `n_folds`, the folds of all seeds that a value comes from; `n`, the genes, occurrences or cells scored.

    ``attrs["note"]`` says what was held out.

    Raises
    ------
    KeyError
        No such result, or several and no `key`.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.classify_cells(adata, "cell_type", model="mini", method="linear_probe", n_repeats=1)
    >>> table = gfx.get.classification_df(adata)
    >>> table.loc[0, ["task", "unit", "method"]].tolist()
    ['cell_type', 'cell', 'model']
    """
    _, _, found = find_only(adata, _FUNCTIONS, key=key, mod=mod)
    table = found["summary"]
    most = table.groupby(["task", "unit", "method", "metric"], observed=True)["n_cells"].transform("max")
    table = _in_order(table[table["n_cells"] == most])
    table.attrs["note"] = str(found["note"])
    return table


def learning_curve_df(adata: AnnData | MuData, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate how well classes are told apart after training on few cells, and on more.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.classify_genes` or :func:`gfx.tl.classify_cells`.
    key
        The `key_added` of that call, or its default name; `None` takes the only result there is.
    mod
        Modality of a MuData.

    Returns
    -------
    The rows and columns of :func:`gfx.get.classification_df`, and one row more for each smaller number of cells that
    was trained on, `n_cells`, in rising order. There, `low` and `high` are NaN.

    Raises
    ------
    KeyError
        No such result, or several and no `key`.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.classify_cells(adata, "cell_type", model="mini", method="linear_probe", n_repeats=1)
    >>> gfx.get.learning_curve_df(adata)["method"].iloc[0]
    'model'
    """
    _, _, found = find_only(adata, _FUNCTIONS, key=key, mod=mod)
    return _in_order(found["summary"])


def roc_df(adata: AnnData | MuData, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate ROC curves, one for each fold and seed.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.classify_genes` or :func:`gfx.tl.classify_cells`.
    key
        The `key_added` of that call, or its default name; `None` takes the only result there is.
    mod
        Modality of a MuData.

    Returns
    -------
    Columns `task`, `unit` and `method` as in :func:`gfx.get.classification_df`; `seed` and `fold`; `class`, the class
    that is scored against all others, the second one where there are two; `fpr`, the false positive rate, at 101 places
    from 0 to 1; `tpr`, the true positive rate there.

    Raises
    ------
    KeyError
        No such result, or several and no `key`.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.classify_cells(adata, "cell_type", model="mini", method="linear_probe", n_repeats=1)
    >>> gfx.get.roc_df(adata).columns.tolist()
    ['task', 'unit', 'method', 'seed', 'fold', 'class', 'fpr', 'tpr']
    """
    _, _, found = find_only(adata, _FUNCTIONS, key=key, mod=mod)
    return found["roc"].reset_index(drop=True).copy()


def confusion_df(adata: AnnData | MuData, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate which class is taken for which, in genes or cells held out.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.classify_genes` or :func:`gfx.tl.classify_cells`.
    key
        The `key_added` of that call, or its default name; `None` takes the only result there is.
    mod
        Modality of a MuData.

    Returns
    -------
    One row a pair of classes, those that never occur included. Columns `task`, `unit` and `method` as in
    :func:`gfx.get.classification_df`; `true` and `predicted`, the classes; `n`, the number of genes or cells, mean over
    seeds; `share`, of those of this true class, NaN if there are none.

    Raises
    ------
    KeyError
        No such result, or several and no `key`.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.classify_cells(adata, "cell_type", model="mini", method="linear_probe", n_repeats=1)
    >>> gfx.get.confusion_df(adata).columns.tolist()
    ['task', 'unit', 'method', 'true', 'predicted', 'n', 'share']
    """
    _, _, found = find_only(adata, _FUNCTIONS, key=key, mod=mod)
    table = found["confusion"].reset_index(drop=True).copy()
    total = table.groupby(["task", "unit", "method", "true"], observed=True)["n"].transform("sum")
    table["share"] = table["n"] / total.where(total > 0)
    return table


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Sort rows: task, unit and metric as they first appear, in each the model before all other methods."""
    methods = sorted(set(table["method"]) - {*_FIRST, _LAST})
    place = {method: at for at, method in enumerate([*_FIRST, *methods, _LAST])}
    keys = [pd.factorize(table[column])[0] for column in ("metric", "unit", "task")]
    order = np.lexsort([table["n_cells"], table["method"].map(place), *keys])  # the last key counts most
    return table.iloc[order].reset_index(drop=True)
