"""Classes of cells, learnt from some and predicted for others."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from gfx import _docs, _log
from gfx._keys import cell_class_keys
from gfx._provenance import mask_name, record
from gfx.tl._cell_labels import find_cell_task
from gfx.tl._cell_run import CellRun
from gfx.tl._cross_validation import (
    HIDDEN_LAYER,
    METHODS,
    UNFINISHED,
    check_folder,
    check_numbers,
    precision,
    settle_recipe,
    sizes,
)
from gfx.tl._prepare import check_choice, claim_task_columns, drop_task_columns, prepare

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from anndata import AnnData
    from mudata import MuData

    from gfx._core.evaluation import Evaluation
    from gfx._keys import CellClassKeys
    from gfx.models import Model
    from gfx.tl._cell_labels import CellTask


@_docs.shared(model=_docs.MODEL, method=_docs.METHOD, folds=_docs.FOLDS, adapter=_docs.ADAPTER, output=_docs.OUTPUT)
def classify_cells(
    adata: AnnData | MuData,
    groupby: str | Iterable[str],
    *,
    split_by: str | None = None,
    model: str | Path | Model | None = None,
    layer: str | None = None,
    mask_obs: str | np.ndarray | None = None,
    method: Literal["fine_tune", "linear_probe"] = "fine_tune",
    pooling: Literal["auto", "mean", "cls"] = "auto",
    class_weight: Literal["balanced"] | None = "balanced",
    folder: str | Path | None = None,
    n_splits: int = 5,
    n_seeds: int = 5,
    max_cells: int | None = None,
    learning_curve: Sequence[int] | None = None,
    baselines: bool = True,
    freeze_layers: int = 0,
    adapter: Literal["lora", "lora-8bit", "lora-4bit"] | None = None,
    n_trials: int = 0,
    patience: int | None = 2,
    training: Mapping[str, Any] | None = None,
    rng: int = 0,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> AnnData | MuData | None:
    """Learn classes of cells from some of them, and predict those of others :cite:p:`Theodoris2023`.

    Cells are cut into folds, whole donors with `split_by`; the classes of the cells in a fold are predicted by heads
    that were taught with the other folds. This is done `n_seeds` times, with other folds each time, unless there are as
    many folds as donors: then standard deviations over seeds say nothing of the folds. Several columns at once are
    several tasks: one network, with a head for each.

    Beside the model stand, unless `baselines` is off, in the same folds: the same with a network of random weights,
    none of which is frozen; logistic regression on log counts of 2,000 highly variable genes, and on 50 principal
    components of them, both found among the cells to learn from; and the majority class. Prefer a model only where it
    is better than all of them.

    ``method="fine_tune"`` trains the network with a head on the cell: at a rate of 5e-5 that rises over 500 steps
    (three fifths of the steps if there are fewer than 833) and falls linearly, AdamW with weight decay 1e-3, batches of
    12 cells, up to ten passes. A tenth of the cells to learn from, or of their donors, choose the best pass and end it
    early. ``"linear_probe"`` leaves the network as it is and fits logistic regression on the embedding of
    :func:`gfx.tl.embed`, computed once for all folds and seeds: what a CPU is fast enough for. Networks of random
    weights are drawn anew by each seed.

    Cost: ``"fine_tune"`` is `n_splits` × `n_seeds` trainings, twice that with `baselines`, and one more with `folder`;
    for a first look, ``n_seeds=1, baselines=False``. ``"linear_probe"`` is one pass over the cells, and with
    `baselines` one more for each seed. Log counts of all cells are held in memory for the baselines, as sparse as they
    are. Intervals measure everything that was held out 200 times more, in every seed and for every method: on a CPU,
    some seconds per 10,000 cells. The device is that of `gfx.settings.device`, else what is there; one device trains.

    Parameters
    ----------
    adata
        Cells by genes, raw counts in `X` or `layer`, or tokens from :func:`gfx.pp.tokenize`.
    groupby
        Column of `obs` with the class of each cell, or several; cells without one, missing or blank, are left out of
        that task.
    split_by
        Column of `obs` with the donor, or batch, of each cell: its cells are never on both sides of a fold. Without,
        results say little about other donors.
    {model}
    mask_obs
        Cells to use: a boolean column of `obs`, or an array.
    {method}
    pooling
        What a head reads: ``"cls"``, the state of `<cls>`; ``"mean"``, the mean over genes; ``"auto"``, `<cls>` where
        the family has one.
    class_weight
        ``"balanced"``: classes count alike in training, and in the baselines; `None`: cells count alike.
    folder
        Where a model taught with all cells is kept, for :func:`gfx.tl.predict_cells`. A stopped call that is repeated
        with the same folder goes on where it was, if it fine-tunes; a linear head, which takes one pass over the cells,
        begins again. The folder is new, empty, or that of such a call. `None` keeps no model.
    {folds}
    max_cells
        Cells to use at most, drawn at random; `None` uses all.
    learning_curve
        Numbers of cells to learn from besides, drawn anew in each fold; what is held out stays the same.
    baselines
        Also run what the model is held against.
    freeze_layers
        Blocks that stay as they are in fine-tuning, from the first on.
    {adapter}
    n_trials
        Trials of a search with optuna for rate, weight decay, schedule and warm-up before each training, judged on the
        cells that choose the best pass. 0 searches nothing.
    patience
        Passes without a lower loss on these cells before training ends; `None` goes through all passes.
    training
        Arguments of :class:`transformers.TrainingArguments` that replace ours, such as
        ``{"learning_rate": 1e-4, "num_train_epochs": 3, "bf16": True}``.
    rng
        Seed of the choice of cells, the folds, and the training.
    {output}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.obsm['gfx_cell_class' | key_added]` : :class:`numpy.ndarray` (float32, `(n_obs, n_classes)`)
        Probability of each class of each task, in the order of `uns`, mean over seeds, by heads that never saw the
        cell, or its donor; NaN for cells without a class.
    `.obsm['gfx_cell_class_fold' | key_added + '_fold']` : :class:`numpy.ndarray` (int16, `(n_obs, n_seeds)`)
        The fold in which a cell was held out; -1 for cells without a class.
    `.obs['gfx_cell_class_...' | key_added + '_...']` : :class:`pandas.Series` (category)
        For each column of `groupby`, whose name ends this one's, the most probable class.
    `.uns['gfx_cell_class' | key_added]` : :class:`dict`
        `params`; `tasks`, the names of the classes of each column; `metrics`, every measure of every fold, macro F1
        over the classes in it, and `summary`, see :func:`gfx.get.classification_df`; `roc`, see
        :func:`gfx.get.roc_df`; `confusion`, see :func:`gfx.get.confusion_df`; `note`.

    Raises
    ------
    ValueError
        A class with fewer cells than folds, fewer donors than folds, cells without a donor, classes that read alike, no
        raw counts, a value outside the choices, a column of `obs` that would be written over, or a folder that holds
        another run or something else.
    KeyError
        No such column in `obs`.
    ImportError
        `adapter` or `n_trials` without what they need.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.classify_cells(adata, "cell_type", model="mini", method="linear_probe", n_seeds=1)
    >>> adata.obsm["gfx_cell_class"].shape
    (60, 2)
    >>> bool((adata.obs["gfx_cell_class_cell_type"] == adata.obs["cell_type"]).mean() > 0.9)
    True
    """
    keys = cell_class_keys(key_added)
    check_choice("method", method, METHODS)
    check_choice("class_weight", class_weight, (None, "balanced"))
    numbers = {"n_splits": n_splits, "n_seeds": n_seeds, "max_cells": max_cells, "n_trials": n_trials, "rng": rng}
    check_numbers(**numbers, patience=patience)
    cells = prepare(adata, model, layer=layer, mod=mod, copy=copy, slot=keys.uns, function="tl.classify_cells")
    check_folder(folder, cells.model)
    how = cells.pooling(pooling)
    recipe = settle_recipe(
        cells.model,
        method,
        of="cells",
        freeze_layers=freeze_layers,
        adapter=adapter,
        n_trials=n_trials,
        patience=patience,
        training=training,
    )
    task = find_cell_task(
        cells, groupby, split_by, cells.lengths(mask_obs), max_cells=max_cells, n_splits=n_splits, rng=rng
    )
    claim_task_columns(cells.adata, task.tasks, keys, reads=(*task.tasks, split_by))
    fold = np.stack([task.folds(n_splits, rng + seed) for seed in range(n_seeds)])
    left = [(of_seed >= 0).sum() - np.bincount(of_seed[of_seed >= 0]) for of_seed in fold]
    n_cells = sizes(learning_curve, round(float(np.mean(left))), int(np.min(left)))
    params = record(
        "tl.classify_cells",
        **cells.model.provenance(),
        **cells.tokens.source,
        groupby=list(task.tasks),
        split_by=split_by,
        method=method,
        dtype=precision(method),
        pooling=how,
        class_weight=class_weight,
        mask_obs=mask_name(mask_obs),
        n_splits=n_splits,
        n_seeds=n_seeds,
        n_cells=len(task.rows),
        hidden_layer=HIDDEN_LAYER if method == "linear_probe" else -1,
        rng=rng,
        **(recipe.noted() if method == "fine_tune" else {}),
    )
    run = CellRun(task, method, recipe, n_cells, baselines=baselines, rng=rng, pooling=how, class_weight=class_weight)
    with nullcontext(folder) if folder is not None else tempfile.TemporaryDirectory() as place:
        if folder is not None:
            run.keep_to_plan(Path(place), params)
        learners = run.learners(Path(place) / UNFINISHED)
        evaluation = run.evaluate(learners, fold)
        tables = evaluation.tables(n_cells[-1], np.random.default_rng(rng))
        if folder is not None:
            run.teach_all(learners[0], Path(place), tables["summary"], params)
    _write(task, keys, evaluation, n_cells[-1], fold=fold, tables=tables, params=params)
    _tell(tables["summary"], task, n_cells[-1], keys.uns)
    return cells.result


def _write(
    task: CellTask,
    keys: CellClassKeys,
    evaluation: Evaluation,
    n_cells: int,
    *,
    fold: np.ndarray,
    tables: Mapping[str, pd.DataFrame],
    params: Mapping[str, Any],
) -> None:
    adata = task.cells.adata
    scores = [evaluation.mean_probabilities(column, "model", n_cells) for column in task.tasks]
    drop_task_columns(adata, task.tasks, keys)
    adata.obsm[keys.obsm] = np.hstack(scores)
    adata.obsm[keys.obsm_fold] = fold.T.astype(np.int16)
    for (column, classes), found in zip(task.tasks.items(), scores, strict=True):
        best = np.where(np.isnan(found[:, 0]), -1, np.nan_to_num(found).argmax(axis=1))
        adata.obs[keys.of(column)] = pd.Categorical.from_codes(best, categories=classes)
    units = "cells; cells of one donor are no replicates" if task.donor is None else "donors"
    is_same = task.donor is not None and len(np.unique(task.donor[task.rows])) == params["n_splits"]
    draw = "hold out the same donors, one by one" if is_same else "draw the folds anew"
    adata.uns[keys.uns] = {
        "params": dict(params),
        "tasks": {column: np.array(classes, dtype=object) for column, classes in task.tasks.items()},
        **tables,
        "note": f"Intervals are over {units}. Standard deviations are over seeds, which {draw}.",
    }


def _tell(summary: pd.DataFrame, task: CellTask, n_cells: int, slot: str) -> None:
    full = summary[(summary["n_cells"] == n_cells) & (summary["metric"] == "macro_f1")]
    figures = "; ".join(
        f"{column}: "
        + ", ".join(
            f"{row.method.replace('_', ' ')} {row.mean:.2f}" for row in full[full["task"] == column].itertuples()
        )
        for column in task.tasks
    )
    what = "cells" if task.donor is None else "donors"
    _log.info(
        f"classified {len(task.rows):,} cells; macro F1 over {what} held out: {figures}. "
        f"Added {slot!r} (adata.obsm, adata.obs, adata.uns)"
    )
