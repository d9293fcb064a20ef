"""A classifier trained on all labels, without cross-validation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gfx import _docs
from gfx._adata import pick
from gfx._core.seeds import check_seed, check_whole
from gfx._results import Slots, mask_name, record
from gfx._tokens import find_tokens
from gfx.models import FineTuning, load
from gfx.tl._prepare import Prepared
from gfx.tl.classification import _texts
from gfx.tl.classification._trained import (
    UNFINISHED,
    check_folder,
    classification_params,
    classifier_of,
    keep_to_the_plan,
    train_on_all,
)
from gfx.tl.classification._training import settle_method
from gfx.tl.classification._units import draw_cells, draw_genes

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from anndata import AnnData
    from mudata import MuData

    from gfx.models import LinearProbe, Model
    from gfx.tl.classification._labels import GeneLabels
    from gfx.tl.classification._training import Method
    from gfx.tl.classification._units import Units


@_docs.shared(
    labels=_texts.LABELS, folder=_texts.OWN_FOLDER, unknown=_texts.UNKNOWN, method=_texts.METHOD, errors=_texts.ERRORS
)
def fine_tune_genes(
    adata: AnnData | MuData,
    labels: GeneLabels,
    folder: str | Path,
    *,
    model: str | Path | Model | None = None,
    layer: str | None = None,
    mask_obs: str | np.ndarray | None = None,
    unknown: Literal["raise", "drop"] = "raise",
    method: Method = "fine_tune",
    max_cells: int = 10_000,
    rng: int = 0,
    mod: str | None = None,
) -> Path:
    """Train a classifier of genes on all labels, to score other genes with it :cite:p:`Theodoris2023`.

    It is not evaluated: :func:`gfx.tl.classify_genes` measures by cross-validation what such a classifier is worth.
    Cost: one training, or one pass over the cells for a linear probe. Nothing is written into `adata`.

    Parameters
    ----------
    {adata}
    {labels}
    {folder}
    {model}
    {layer}
    {mask_obs}
    {unknown}
    {method}
    max_cells
        Cells to train on, drawn at random among those that have a labelled gene.
    {rng}
    {mod}

    Returns
    -------
    The folder, which :func:`gfx.tl.predict_genes` and :func:`gfx.models.load` read.

    Raises
    ------
    ValueError
        Genes that the model does not know, a gene in two classes, classes that read alike, no raw counts, or a folder
        that holds another run or something else.
    {errors}

    Examples
    --------
    >>> import gfx, tempfile
    >>> adata = gfx.datasets.toy()
    >>> labels = {"first": adata.var_names[:40], "second": adata.var_names[40:80]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     classifier = gfx.models.fine_tune_genes(adata, labels, folder, method="linear_probe")
    ...     gfx.tl.predict_genes(adata, classifier)
    >>> adata.varm["gfx_predicted_genes"].shape
    (300, 2)
    """
    max_cells, rng = check_whole(max_cells, "max_cells", 1), check_seed(rng)
    prepared = _read(adata, model, folder, function="models.fine_tune_genes", layer=layer, mod=mod)
    method = settle_method(method, prepared.model, "genes")
    lengths = prepared.lengths(mask_obs)
    genes = draw_genes(prepared, labels, unknown, lengths, max_cells=max_cells, n_splits=1, rng=rng)
    return _train(genes, method, folder, rng, mask_obs=mask_name(mask_obs))


@_docs.shared(
    groupby=_texts.GROUPBY, folder=_texts.OWN_FOLDER, method=_texts.METHOD, pooling=_texts.POOLING, errors=_texts.ERRORS
)
def fine_tune_cells(
    adata: AnnData | MuData,
    groupby: str | Iterable[str],
    folder: str | Path,
    *,
    donor_key: str | None = None,
    model: str | Path | Model | None = None,
    layer: str | None = None,
    mask_obs: str | np.ndarray | None = None,
    method: Method = "fine_tune",
    pooling: Literal["auto", "mean", "cls"] = "auto",
    max_cells: int | None = None,
    rng: int = 0,
    mod: str | None = None,
) -> Path:
    """Train a classifier of cells on all labels, to annotate other cells with it :cite:p:`Theodoris2023`.

    It is not evaluated: :func:`gfx.tl.classify_cells` measures by cross-validation what such a classifier is worth.
    Cost: one training, or one pass over the cells for a linear probe. Nothing is written into `adata`.

    Parameters
    ----------
    {adata}
    {groupby}
    {folder}
    donor_key
        Column of `obs` with the donor of each cell: the validation set of fine-tuning is then of whole donors.
    {model}
    {layer}
    {mask_obs}
    {method}
    {pooling}
    {max_cells}
    {rng}
    {mod}

    Returns
    -------
    The folder, which :func:`gfx.tl.predict_cells` and :func:`gfx.models.load` read.

    Raises
    ------
    ValueError
        Fewer than two classes, cells without a donor, classes that read alike, no raw counts, or a folder that holds
        another run or something else.
    {errors}

    Examples
    --------
    >>> import gfx, tempfile
    >>> adata = gfx.datasets.toy()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     classifier = gfx.models.fine_tune_cells(adata, "cell_type", folder, method="linear_probe")
    ...     gfx.tl.predict_cells(adata, classifier)
    >>> adata.obs["gfx_predicted_cells_cell_type"].cat.categories.tolist()
    ['B cell', 'T cell']
    """
    max_cells, rng = None if max_cells is None else check_whole(max_cells, "max_cells", 1), check_seed(rng)
    prepared = _read(adata, model, folder, function="models.fine_tune_cells", layer=layer, mod=mod)
    pooling = prepared.pooling(pooling)
    method = settle_method(method, prepared.model, "cells")
    how = {"pooling": pooling, "max_cells": max_cells, "n_splits": 1, "rng": rng}
    cells = draw_cells(prepared, groupby, donor_key, prepared.lengths(mask_obs), **how)
    how = {"groupby": list(cells.tasks), "donor_key": donor_key, "pooling": pooling, "mask_obs": mask_name(mask_obs)}
    return _train(cells, method, folder, rng, **how)


def _read(
    data: AnnData | MuData,
    model: str | Path | Model | None,
    folder: str | Path,
    *,
    function: str,
    layer: str | None,
    mod: str | None,
) -> Prepared:
    """Find the cells, the model and the tokens; nothing will be written to the cells."""
    adata, loaded = pick(data, mod), load(model)
    check_folder(folder, loaded)
    tokens = find_tokens(adata, loaded.vocabulary, loaded.max_length, layer=layer)
    return Prepared(model=loaded, tokens=tokens, slots=Slots(adata, function, ""))


def _train(units: Units, method: FineTuning | LinearProbe, folder: str | Path, rng: int, **params: object) -> Path:
    place, function = Path(folder), units.prepared.slots.function
    how = record(function, **classification_params(units, method, rng=rng, **params))
    keep_to_the_plan(place, units, method, how)
    train_on_all(classifier_of("model", units, method, place / UNFINISHED, rng), place, how, rng=rng)
    return place
