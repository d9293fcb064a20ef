"""Classes of genes, learnt from some and predicted for others."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from gfx import _docs, _log
from gfx._core.folds import folds
from gfx._keys import gene_class_keys
from gfx._provenance import mask_name, record
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
from gfx.tl._gene_labels import find_gene_labels
from gfx.tl._gene_run import GeneRun, draw_task
from gfx.tl._prepare import check_choice, claim_gene_columns, prepare

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from anndata import AnnData
    from mudata import MuData

    from gfx._keys import GeneClassKeys
    from gfx.models import Model
    from gfx.tl._gene_labels import GeneLabels
    from gfx.tl._gene_learners import GeneTask

#: Blocks that learn when the first ones are frozen: in the paper two of six, for dosage sensitivity.
LEARNING_BLOCKS = 2


@_docs.shared(model=_docs.MODEL, method=_docs.METHOD, folds=_docs.FOLDS, adapter=_docs.ADAPTER, output=_docs.OUTPUT)
def classify_genes(
    adata: AnnData | MuData,
    labels: Mapping[str, Iterable[str]] | str,
    *,
    model: str | Path | Model | None = None,
    layer: str | None = None,
    mask_obs: str | np.ndarray | None = None,
    unknown: Literal["raise", "drop"] = "raise",
    method: Literal["fine_tune", "linear_probe"] = "fine_tune",
    folder: str | Path | None = None,
    n_splits: int = 5,
    n_seeds: int = 5,
    max_cells: int = 10_000,
    learning_curve: Sequence[int] | None = None,
    baselines: bool = True,
    freeze_layers: int | None = None,
    adapter: Literal["lora", "lora-8bit", "lora-4bit"] | None = None,
    n_trials: int = 0,
    training: Mapping[str, Any] | None = None,
    rng: int = 0,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> AnnData | MuData | None:
    """Learn classes of genes from some of them, and predict those of others :cite:p:`Theodoris2023`.

    Are genes sensitive to their dosage, central in their network? Labelled genes are cut into folds; the classes of
    those in a fold are predicted, in every cell that has them, by heads that were taught with the other folds and never
    saw their labels. A gene's score is its mean probability over cells. This is done `n_seeds` times, with other folds
    each time.

    Beside the model stand, unless `baselines` is off, in the same folds: the same with a network of random weights,
    none of which is frozen; logistic regression on how often, at which rank, how much and how variably a gene is
    expressed in these cells, for classes of genes may differ in that alone; and the majority class. Prefer a model only
    where it is better than all of them.

    ``method="fine_tune"`` trains the network with a head on each gene: by default as in the paper, one pass over the
    cells at a rate of 5e-5 that rises over 500 steps (three fifths of the steps if there are fewer than 833) and falls
    linearly, AdamW with weight decay 1e-3, batches of 12 cells, all blocks but the last two frozen. ``"linear_probe"``
    leaves the network as it is and fits logistic regression on each gene's mean state, in the block before the last;
    states are computed once for all folds and seeds, which is what a CPU is fast enough for. Its one network of random
    weights serves all seeds.

    Cost: ``"fine_tune"`` is `n_splits` × `n_seeds` trainings, twice that with `baselines`, and one more with `folder`;
    for a first look, ``n_seeds=1, baselines=False``. ``"linear_probe"`` is one pass over the cells, a second with
    `baselines`; states of all occurrences of labelled genes are held in memory, in float32. The device is that of
    `gfx.settings.device`, else what is there.

    Parameters
    ----------
    adata
        Cells by genes, raw counts in `X` or `layer`, or tokens from :func:`gfx.pp.tokenize`.
    labels
        Classes and their genes, as symbols or Ensembl ids, such as ``{"insensitive": [...], "sensitive": [...]}``; or a
        column of `var`, empty for genes without a class. With two classes, scores and curves are those of the second.
    {model}
    mask_obs
        Cells to use: a boolean column of `obs`, or an array. Relevant cells need fewer examples.
    unknown
        What to do with genes in `labels` that the model does not know: ``"raise"`` an error, or ``"drop"`` them.
    {method}
    folder
        Where a model taught with all labels is kept, for :func:`gfx.tl.predict_genes`. A stopped call that is repeated
        with the same folder goes on where it was, if it fine-tunes; a linear head, which takes one pass over the cells,
        begins again. The folder is new, empty, or that of such a call. `None` keeps no model.
    {folds}
    max_cells
        Cells to learn from and to predict in, drawn at random among those that have a labelled gene.
    learning_curve
        Numbers of cells to learn from besides; predicted is in all cells to use, so that results compare.
    baselines
        Also run what the model is held against.
    freeze_layers
        Blocks that stay as they are in fine-tuning, from the first on. `None`: all but the last two.
    {adapter}
    n_trials
        Trials of a search with optuna for rate, weight decay, schedule and warm-up before each training, on some of its
        own training genes. 0 searches nothing.
    training
        Arguments of :class:`transformers.TrainingArguments` that replace ours, such as
        ``{"learning_rate": 1e-4, "num_train_epochs": 2, "bf16": True}``.
    rng
        Seed of the choice of cells, the folds, and the training.
    {output}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.varm['gfx_gene_class' | key_added]` : :class:`numpy.ndarray` (float32, `(n_vars, n_classes)`)
        Probability of each class, mean over cells and seeds, by heads that never saw the gene's label; NaN for genes
        without one. :func:`gfx.tl.predict_genes` scores all others.
    `.varm['gfx_gene_class_sd' | key_added + '_sd']` : :class:`numpy.ndarray` (float32, `(n_vars, n_classes)`)
        Standard deviation over cells, mean over seeds.
    `.varm['gfx_gene_class_fold' | key_added + '_fold']` : :class:`numpy.ndarray` (int16, `(n_vars, n_seeds)`)
        The fold in which a gene was held out; -1 for genes without a class, or in none of the cells.
    `.var['gfx_gene_class' | key_added]` : :class:`pandas.Series` (category)
        The class given.
    `.var['gfx_gene_class_predicted' | key_added + '_predicted']` : :class:`pandas.Series` (category)
        The most probable class.
    `.var['gfx_gene_class_n_cells' | key_added + '_n_cells']` : :class:`pandas.Series` (int32)
        Cells behind a score.
    `.uns['gfx_gene_class' | key_added]` : :class:`dict`
        `params`; `tasks`, the names of the classes; `metrics`, every measure of every fold, macro F1 over the classes
        in it, and `summary`, see :func:`gfx.get.classification_df`; `roc`, see :func:`gfx.get.roc_df`; `confusion`, see
        :func:`gfx.get.confusion_df`; `note`. Each measure is there per gene, and per occurrence of a gene in a cell as
        it was published, where genes count by how many cells have them.

    Raises
    ------
    ValueError
        Genes that the model does not know, a gene in two classes, a class with fewer genes than folds in these cells,
        classes that read alike, no raw counts, a value outside the choices, a column of `var` that would be written
        over, or a folder that holds another run or something else.
    KeyError
        No such column in `var` or `obs`.
    ImportError
        `adapter` or `n_trials` without what they need.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> labels = {"often": adata.var_names[:40], "seldom": adata.var_names[-40:]}
    >>> gfx.tl.classify_genes(adata, labels, model="mini", method="linear_probe", n_seeds=1)
    >>> adata.varm["gfx_gene_class"].shape
    (300, 2)
    """
    keys = gene_class_keys(key_added)
    check_choice("method", method, METHODS)
    if isinstance(labels, str) and labels in (keys.var, keys.var_predicted, keys.var_n_cells):
        msg = f"The labels in `adata.var[{labels!r}]` would be written over. Choose another name with `key_added=`."
        raise ValueError(msg)
    check_numbers(n_splits=n_splits, n_seeds=n_seeds, max_cells=max_cells, n_trials=n_trials, rng=rng)
    cells = prepare(adata, model, layer=layer, mod=mod, copy=copy, slot=keys.uns, function="tl.classify_genes")
    claim_gene_columns(cells.adata, (keys.var, keys.var_predicted, keys.var_n_cells), keys.uns)
    check_folder(folder, cells.model)
    _ = cells.gene_tokens  # or fail before hours of training
    given = find_gene_labels(cells, labels, unknown)
    if freeze_layers is None and method == "fine_tune":
        freeze_layers = max(cells.model.n_blocks - LEARNING_BLOCKS, 0)
    recipe = settle_recipe(
        cells.model,
        method,
        of="genes",
        freeze_layers=freeze_layers,
        adapter=adapter,
        n_trials=n_trials,
        patience=None,
        training=training,
    )
    task = draw_task(cells, given, cells.lengths(mask_obs), max_cells=max_cells, n_splits=n_splits, rng=rng)
    n_cells = sizes(learning_curve, len(task.rows), len(task.rows))
    params = record(
        "tl.classify_genes",
        **cells.model.provenance(),
        **cells.tokens.source,
        method=method,
        dtype=precision(method),
        mask_obs=mask_name(mask_obs),
        n_splits=n_splits,
        n_seeds=n_seeds,
        n_cells=len(task.rows),
        hidden_layer=HIDDEN_LAYER if method == "linear_probe" else -1,
        rng=rng,
        **(recipe.noted() if method == "fine_tune" else {}),
    )
    run = GeneRun(task, method, recipe, n_cells, baselines=baselines, rng=rng)
    with nullcontext(folder) if folder is not None else tempfile.TemporaryDirectory() as place:
        if folder is not None:
            run.keep_to_plan(Path(place), params)
        fold = np.stack([folds(task.labels.truth, n_splits, rng + seed) for seed in range(n_seeds)])
        learners = run.learners(Path(place) / UNFINISHED)
        evaluation, spread = run.evaluate(learners, fold)
        tables = evaluation.tables(n_cells[-1], np.random.default_rng(rng))
        if folder is not None:
            run.teach_all(learners[0], Path(place), tables["summary"], params)
    scores = evaluation.mean_probabilities(given.task, "model", n_cells[-1])
    _write(task, given, keys, scores=scores, spread=spread, fold=fold, tables=tables, params=params)
    _tell(tables["summary"], task, keys.uns)
    return cells.result


def _write(
    task: GeneTask,
    given: GeneLabels,
    keys: GeneClassKeys,
    *,
    scores: np.ndarray,
    spread: np.ndarray,
    fold: np.ndarray,
    tables: Mapping[str, pd.DataFrame],
    params: Mapping[str, Any],
) -> None:
    cells, labels = task.cells, task.labels
    adata, tokens = cells.adata, cells.gene_tokens

    def by_gene(labelled: np.ndarray, values: np.ndarray, fill: float) -> np.ndarray:
        """Lay out values of some tokens over the genes of the AnnData."""
        out = np.full((len(cells.model.vocabulary) + 1, *values.shape[1:]), fill, dtype=np.float64)
        out[labelled] = values
        return out[tokens]  # a gene that the model does not know, -1, finds the row behind the last token

    classes = by_gene(given.tokens, given.truth, -1), by_gene(labels.tokens, scores.argmax(axis=1), -1)
    n_cells = np.bincount(task.gene, minlength=len(labels.tokens))
    adata.varm[keys.varm] = by_gene(labels.tokens, scores, np.nan).astype(np.float32)
    adata.varm[keys.varm_sd] = by_gene(labels.tokens, spread, np.nan).astype(np.float32)
    adata.varm[keys.varm_fold] = by_gene(labels.tokens, fold.T, -1).astype(np.int16)
    for column, codes in zip((keys.var, keys.var_predicted), classes, strict=True):
        adata.var[column] = pd.Categorical.from_codes(codes.astype(np.int64), categories=labels.classes)
    adata.var[keys.var_n_cells] = by_gene(labels.tokens, n_cells, 0).astype(np.int32)
    adata.uns[keys.uns] = {
        "params": dict(params),
        "tasks": {labels.task: np.array(labels.classes, dtype=object)},
        **tables,
        "note": (
            "Intervals are over genes; standard deviations over seeds, which draw the folds anew. Per occurrence, "
            "genes that more cells have count more."
        ),
    }


def _tell(summary: pd.DataFrame, task: GeneTask, slot: str) -> None:
    full = summary[(summary["n_cells"] == len(task.rows)) & (summary["metric"] == "auc") & (summary["unit"] == "gene")]
    figures = ", ".join(f"{row.method.replace('_', ' ')} {row.mean:.2f}" for row in full.itertuples())
    _log.info(
        f"classified {len(task.labels.tokens):,} genes in {len(task.rows):,} cells; AUC over genes held out: "
        f"{figures}. Added {slot!r} (adata.varm, adata.var, adata.uns)"
    )
