"""Classes of genes and of cells: classifiers evaluated by cross-validation, or trained on all labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gfx import _log
from gfx._adata import pick
from gfx._core.arguments import check_seed, check_whole
from gfx._docs import shared
from gfx._results import Slots, mask_name, record
from gfx._tokens import find_tokens
from gfx.models import load
from gfx.tl._prepare import Prepared, check_controls, prepare
from gfx.tl.classification._cross_validation import CONTROLS, cross_validate
from gfx.tl.classification._learners import make_learners
from gfx.tl.classification._trained import (
    UNFINISHED,
    check_folder,
    classification_params,
    keep_to_the_plan,
    train_on_all,
)
from gfx.tl.classification._training import settle_method
from gfx.tl.classification._units import draw_cells, draw_genes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gfx._types import Data, Mask, ModelLike, Pooling
    from gfx.models import FineTuning, LinearProbe
    from gfx.tl.classification._labels import GeneLabels
    from gfx.tl.classification._training import Method
    from gfx.tl.classification._units import Units

_ERRORS = """
KeyError
    There is no such column in `var` or `obs`.
ImportError
    The package that training, an adapter or the search for hyperparameters needs is not installed.
"""


@shared(errors=_ERRORS)
def classify_genes(
    adata: Data,
    labels: GeneLabels,
    *,
    model: ModelLike | None = None,
    layer: str | None = None,
    mask_obs: Mask | None = None,
    unknown: Literal["raise", "drop"] = "raise",
    method: Method = "fine_tune",
    controls: Sequence[str] | None = CONTROLS,
    n_splits: int = 5,
    n_repeats: int = 5,
    max_cells: int = 10_000,
    learning_curve: Sequence[int] | None = None,
    folder: str | Path | None = None,
    rng: int = 0,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> Data | None:
    """Measure how well a model predicts classes of genes, such as dosage sensitivity :cite:p:`Theodoris2023`.

    The labelled genes are split into folds. For the genes in a fold, a classifier that was trained on the other folds
    and has not seen their labels predicts the class of each gene in every cell that expresses it. The score of a gene
    is the mean of these probabilities over cells. To score genes without a label, train a classifier on all labels with
    `folder` or :func:`gfx.models.fine_tune_genes`, and use :func:`gfx.tl.predict_genes`.

    The model is compared with the same method on a random-weights model and with two baselines: logistic regression on
    detection, mean rank, and mean and variance of expression of each gene in these cells, because classes of genes may
    differ in their expression alone; and the majority class. Prefer a model only if it is better than all of these.

    Fine-tuning follows the 2023 paper: it makes one pass over the cells, and all network layers but the last two are
    frozen. A linear probe fits logistic regression on the mean hidden state of each gene; the same random-weights model
    is used in all repeats.

    Cost: fine-tuning needs `n_splits` × `n_repeats` trainings, twice as many with ``"random_weights"``, and one more
    with `folder`; for a first look, use ``n_repeats=1, controls=None``. A linear probe needs one pass over the cells
    and a second one for random weights. Memory holds the states of all occurrences of labelled genes, in float32.

    Parameters
    ----------
    {adata}
    {labels}
    {model}
    {layer}
    {mask_obs}
    {unknown}
    {method}
    {controls_of_classifiers}
    {n_splits}
    {n_repeats}
    {max_cells_with_labels}
    {learning_curve}
    {folder}
    {rng}
    {key_added}
    {mod}
    {copy}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.varm['gfx_gene_class' | key_added]` : :class:`numpy.ndarray` (float32, `(n_vars, n_classes)`)
        Probability of each class, averaged over cells and repeats, from classifiers that have not seen the gene's
        label; NaN for genes without a label.
    `.varm['gfx_gene_class_sd' | key_added + '_sd']` : :class:`numpy.ndarray` (float32, `(n_vars, n_classes)`)
        Standard deviation of the probability over cells, averaged over repeats.
    `.varm['gfx_gene_class_fold' | key_added + '_fold']` : :class:`numpy.ndarray` (int16, `(n_vars, n_repeats)`)
        The fold in which a gene was held out; -1 for genes without a class, and for genes that no cell expresses.
    `.var['gfx_gene_class' | key_added]` : :class:`pandas.Series` (category)
        The class given in `labels`.
    `.var['gfx_gene_class_predicted' | key_added + '_predicted']` : :class:`pandas.Series` (category)
        The most probable class.
    `.var['gfx_gene_class_n_cells' | key_added + '_n_cells']` : :class:`pandas.Series` (int32)
        Number of cells over which the score was averaged.
    `.uns['gfx_gene_class' | key_added]` : :class:`dict`
        `params`; `tasks`, the names of the classes; `metrics`, all performance measures of each fold (macro F1 is over
        the classes in the fold); `summary`, see :func:`gfx.get.classification_df`; `roc`, see :func:`gfx.get.roc_df`;
        `confusion`, see :func:`gfx.get.confusion_df`; `note`. Each measure is given per gene, and as in the paper per
        occurrence of a gene in a cell, so that a gene is weighted by the number of cells that express it.

    Raises
    ------
    ValueError
        The model does not know a gene, a gene is in two classes, these cells express fewer genes of a class than there
        are folds, two class names are equal as text, there are no raw counts, a value is not one of the choices, a slot
        already holds something else, or the folder holds another run or something else.
    {errors}

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> labels = {"often": adata.var_names[:40], "seldom": adata.var_names[-40:]}
    >>> gfx.tl.classify_genes(
    ...     adata, labels, model="mini", method="linear_probe", n_repeats=1
    ... )
    >>> adata.varm["gfx_gene_class"].shape
    (300, 2)
    """
    n_splits, n_repeats = check_whole(n_splits, "n_splits", 2), check_whole(n_repeats, "n_repeats", 1)
    max_cells, rng = check_whole(max_cells, "max_cells", 2), check_seed(rng)
    controls = check_controls(controls, CONTROLS)
    prepared = prepare(adata, model, function="tl.classify_genes", layer=layer, key_added=key_added, mod=mod, copy=copy)
    prepared.slots.claim(reads=[("var", labels), ("obs", mask_obs)])
    check_folder(folder, prepared.model)
    _ = prepared.gene_tokens  # or fail before hours of training
    method = settle_method(method, prepared.model, "genes")
    how = {"max_cells": max_cells, "n_splits": n_splits, "rng": rng}
    genes = draw_genes(prepared, labels, unknown, prepared.lengths(mask_obs), **how)
    how = {"n_splits": n_splits, "n_repeats": n_repeats, "rng": rng, "mask_obs": mask_name(mask_obs)}
    cross_validate(genes, method, controls=controls, learning_curve=learning_curve, folder=folder, **how)
    return prepared.result


@shared(errors=_ERRORS)
def classify_cells(
    adata: Data,
    groupby: str | Iterable[str],
    *,
    donor_key: str | None = None,
    model: ModelLike | None = None,
    layer: str | None = None,
    mask_obs: Mask | None = None,
    method: Method = "fine_tune",
    pooling: Pooling = "auto",
    controls: Sequence[str] | None = CONTROLS,
    n_splits: int = 5,
    n_repeats: int = 5,
    max_cells: int | None = None,
    learning_curve: Sequence[int] | None = None,
    folder: str | Path | None = None,
    rng: int = 0,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> Data | None:
    """Measure how well a model predicts classes of cells, such as their type or disease :cite:p:`Theodoris2023`.

    Cells are split into folds; with `donor_key`, all cells of a donor are in the same fold. The classes of the cells in
    a fold are predicted by a classifier that was trained on the other folds. If several columns are given, each is a
    task, and one network with one head for each task is trained. To annotate other cells, train a classifier on all
    labels with `folder` or :func:`gfx.models.fine_tune_cells`, and use :func:`gfx.tl.predict_cells`.

    The model is compared with the same method on random-weights models, whose weights are drawn anew in each repeat,
    and with baselines: logistic regression on log counts of 2,000 highly variable genes and on their first 50 principal
    components, both computed from the training cells only, and the majority class. Prefer a model only if it is better
    than all of these.

    In fine-tuning, 10 % of the training cells, or donors, form a validation set, which is used to stop training early
    and to choose the best of up to ten passes. A linear probe fits logistic regression on the embedding of
    :func:`gfx.tl.embed`.

    Cost: fine-tuning needs `n_splits` × `n_repeats` trainings, twice as many with ``"random_weights"``, and one more
    with `folder`; for a first look, use ``n_repeats=1, controls=None``. A linear probe needs one pass over the cells,
    and with ``"random_weights"`` one more for each repeat. For the baselines, memory holds the log counts of all cells
    as a sparse matrix. The bootstrap intervals take some seconds per 10,000 cells on a CPU.

    Parameters
    ----------
    {adata}
    {classes}
    donor_key
        Column of `obs` with the donor, or batch, of each cell. The cells of a donor are either all in the training set
        or all held out. Without `donor_key`, results say little about other donors. With as many folds as donors, all
        repeats have the same folds.
    {model}
    {layer}
    {mask_obs}
    {method}
    {pooling_of_head}
    {controls_of_classifiers}
    {n_splits}
    {n_repeats}
    {max_cells}
    {learning_curve}
    {folder}
    {rng}
    {key_added}
    {mod}
    {copy}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.obsm['gfx_cell_class' | key_added]` : :class:`numpy.ndarray` (float32, `(n_obs, n_classes)`)
        Probability of each class of each task, in the order of `tasks` in `uns`, averaged over repeats, from
        classifiers that have not seen the cell (with `donor_key`, its donor); NaN for cells without a class, and for
        those whose class no training set has, such as a class of one donor.
    `.obsm['gfx_cell_class_fold' | key_added + '_fold']` : :class:`numpy.ndarray` (int16, `(n_obs, n_repeats)`)
        The fold in which a cell was held out; -1 for cells without a class.
    `.obs['gfx_cell_class_...' | key_added + '_...']` : :class:`pandas.Series` (category)
        The most probable class, for each column of `groupby`; the name of the slot ends with the name of that column.
    `.uns['gfx_cell_class' | key_added]` : :class:`dict`
        `params`; `tasks`, the names of the classes of each column; `metrics`, all performance measures of each fold
        (macro F1 is over the classes that occur in the fold); `summary`, see :func:`gfx.get.classification_df`; `roc`,
        see :func:`gfx.get.roc_df`; `confusion`, see :func:`gfx.get.confusion_df`; `note`.

    Raises
    ------
    ValueError
        A class has fewer cells than there are folds, there are fewer donors than folds, a cell has no donor, each class
        is that of one donor alone, two class names are equal as text, there are no raw counts, a value is not one of
        the choices, a slot already holds something else, or the folder holds another run or something else.
    {errors}

    Warns
    -----
    UserWarning
        No training set has some of the classes, because only one donor has them.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.classify_cells(
    ...     adata, "cell_type", model="mini", method="linear_probe", n_repeats=1
    ... )
    >>> adata.obsm["gfx_cell_class"].shape
    (60, 2)
    >>> predicted = adata.obs["gfx_cell_class_cell_type"]
    >>> bool((predicted == adata.obs["cell_type"]).mean() > 0.9)
    True
    """
    n_splits, n_repeats = check_whole(n_splits, "n_splits", 2), check_whole(n_repeats, "n_repeats", 1)
    max_cells, rng = None if max_cells is None else check_whole(max_cells, "max_cells", 2), check_seed(rng)
    controls = check_controls(controls, CONTROLS)
    prepared = prepare(adata, model, function="tl.classify_cells", layer=layer, key_added=key_added, mod=mod, copy=copy)
    check_folder(folder, prepared.model)
    method, pooling = settle_method(method, prepared.model, "cells"), prepared.pooling(pooling)
    how = {"pooling": pooling, "max_cells": max_cells, "n_splits": n_splits, "rng": rng}
    cells = draw_cells(prepared, groupby, donor_key, prepared.lengths(mask_obs), **how)
    prepared.slots.claim(cells.tasks, reads=[("obs", name) for name in (*cells.tasks, donor_key, mask_obs)])
    if donor_key is None:
        _log.info(
            "No `donor_key`: cells of one donor are on both sides of every fold, so results say little about other "
            "donors. Name the column of `obs` with the donor, if there is one."
        )
    how = {"n_splits": n_splits, "n_repeats": n_repeats, "rng": rng, "mask_obs": mask_name(mask_obs)}
    how |= {"groupby": list(cells.tasks), "donor_key": donor_key, "pooling": pooling}
    cross_validate(cells, method, controls=controls, learning_curve=learning_curve, folder=folder, **how)
    return prepared.result


@shared(errors=_ERRORS)
def fine_tune_genes(
    adata: Data,
    labels: GeneLabels,
    folder: str | Path,
    *,
    model: ModelLike | None = None,
    layer: str | None = None,
    mask_obs: Mask | None = None,
    unknown: Literal["raise", "drop"] = "raise",
    method: Method = "fine_tune",
    max_cells: int = 10_000,
    rng: int = 0,
    mod: str | None = None,
) -> Path:
    """Train a classifier of genes on all labels, to score other genes with it :cite:p:`Theodoris2023`.

    It is not evaluated: :func:`gfx.tl.classify_genes` measures its performance by cross-validation.
    Cost: one training, or one pass over the cells for a linear probe. Nothing is written into `adata`.

    Parameters
    ----------
    {adata}
    {labels}
    {folder_of_model}
    {model}
    {layer}
    {mask_obs}
    {unknown}
    {method}
    {max_cells_with_labels}
    {rng}
    {mod}

    Returns
    -------
    The folder, which :func:`gfx.tl.predict_genes` and :func:`gfx.models.load` read.

    Raises
    ------
    ValueError
        Genes that the model does not know, a gene in two classes, class names that are equal as text, no raw counts, or
        a folder that holds another run or something else.
    {errors}

    Examples
    --------
    >>> import gfx, tempfile
    >>> adata = gfx.datasets.toy()
    >>> labels = {"first": adata.var_names[:40], "second": adata.var_names[40:80]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     classifier = gfx.models.fine_tune_genes(
    ...         adata, labels, folder, method="linear_probe"
    ...     )
    ...     gfx.tl.predict_genes(adata, classifier)
    >>> adata.varm["gfx_predicted_genes"].shape
    (300, 2)
    """
    max_cells, rng = check_whole(max_cells, "max_cells", 1), check_seed(rng)
    prepared = _read(adata, model, folder, function="models.fine_tune_genes", layer=layer, mod=mod)
    method = settle_method(method, prepared.model, "genes")
    how = {"max_cells": max_cells, "n_splits": 1, "rng": rng}
    genes = draw_genes(prepared, labels, unknown, prepared.lengths(mask_obs), **how)
    return _train(genes, method, folder, rng, mask_obs=mask_name(mask_obs))


@shared(errors=_ERRORS)
def fine_tune_cells(
    adata: Data,
    groupby: str | Iterable[str],
    folder: str | Path,
    *,
    donor_key: str | None = None,
    model: ModelLike | None = None,
    layer: str | None = None,
    mask_obs: Mask | None = None,
    method: Method = "fine_tune",
    pooling: Pooling = "auto",
    max_cells: int | None = None,
    rng: int = 0,
    mod: str | None = None,
) -> Path:
    """Train a classifier of cells on all labels, to annotate other cells with it :cite:p:`Theodoris2023`.

    It is not evaluated: :func:`gfx.tl.classify_cells` measures its performance by cross-validation.
    Cost: one training, or one pass over the cells for a linear probe. Nothing is written into `adata`.

    Parameters
    ----------
    {adata}
    {classes}
    {folder_of_model}
    donor_key
        Column of `obs` with the donor of each cell: the validation set of fine-tuning is then of whole donors.
    {model}
    {layer}
    {mask_obs}
    {method}
    {pooling_of_head}
    {max_cells}
    {rng}
    {mod}

    Returns
    -------
    The folder, which :func:`gfx.tl.predict_cells` and :func:`gfx.models.load` read.

    Raises
    ------
    ValueError
        Fewer than two classes, cells without a donor, class names that are equal as text, no raw counts, or a folder
        that holds another run or something else.
    {errors}

    Examples
    --------
    >>> import gfx, tempfile
    >>> adata = gfx.datasets.toy()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     classifier = gfx.models.fine_tune_cells(
    ...         adata, "cell_type", folder, method="linear_probe"
    ...     )
    ...     gfx.tl.predict_cells(adata, classifier)
    >>> adata.obs["gfx_predicted_cells_cell_type"].cat.categories.tolist()
    ['B cell', 'T cell']
    """
    max_cells, rng = None if max_cells is None else check_whole(max_cells, "max_cells", 1), check_seed(rng)
    prepared = _read(adata, model, folder, function="models.fine_tune_cells", layer=layer, mod=mod)
    method = settle_method(method, prepared.model, "cells")
    how = {"pooling": prepared.pooling(pooling), "max_cells": max_cells, "n_splits": 1, "rng": rng}
    cells = draw_cells(prepared, groupby, donor_key, prepared.lengths(mask_obs), **how)
    how = {"groupby": list(cells.tasks), "donor_key": donor_key, "pooling": cells.pooling}
    return _train(cells, method, folder, rng, mask_obs=mask_name(mask_obs), **how)


def _read(
    data: Data, model: ModelLike | None, folder: str | Path, *, function: str, layer: str | None, mod: str | None
) -> Prepared:
    """Find the cells, the model and the tokens; nothing will be written to the cells."""
    adata, loaded = pick(data, mod), load(model)
    check_folder(folder, loaded)
    tokens = find_tokens(adata, loaded.vocabulary, loaded.max_length, layer=layer)
    return Prepared(model=loaded, tokens=tokens, slots=Slots(adata, function, ""))


def _train(units: Units, method: FineTuning | LinearProbe, folder: str | Path, rng: int, **params: object) -> Path:
    place = Path(folder)
    how = record(units.prepared.slots.function, **classification_params(units, method, rng=rng, **params))
    keep_to_the_plan(place, units, method, how)
    train_on_all(make_learners(units, method, (), place / UNFINISHED, rng)[0], place, how, rng=rng)
    return place
