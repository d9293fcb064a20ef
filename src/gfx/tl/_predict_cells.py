"""Classes of cells, predicted by a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from gfx import _docs, _log
from gfx._keys import predicted_cells_keys
from gfx._provenance import mask_name, record
from gfx.tl._prepare import claim_task_columns, drop_task_columns, prepare
from gfx.tl._trained_model import classifier_of, load_trained

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData

    from gfx.models import Model


@_docs.shared(running=_docs.RUNNING, output=_docs.OUTPUT)
def predict_cells(
    adata: AnnData | MuData,
    model: str | Path | Model,
    *,
    layer: str | None = None,
    mask_obs: str | np.ndarray | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> AnnData | MuData | None:
    """Predict classes of cells with a model that was taught them :cite:p:`Theodoris2023`.

    A classifier knows no other classes than its own: it names cells of a type that it never saw, too. What it is worth
    on donors held out, its card in the folder says.

    Cost: one forward pass over the cells, as :func:`gfx.tl.embed`.

    Parameters
    ----------
    adata
        Cells by genes, raw counts in `X` or `layer`, or tokens from :func:`gfx.pp.tokenize`.
    model
        A folder that :func:`gfx.tl.classify_cells` wrote; or the published ``"V1-10M_cardiomyopathies"``, or another
        checkpoint of the official software, which reads the cell from its first gene.
    layer
        Layer with the raw counts; `None`: `X`.
    mask_obs
        Cells to use: a boolean column of `obs`, or an array.
    {running}
    {output}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.obsm['gfx_predicted_cells' | key_added]` : :class:`numpy.ndarray` (float32, `(n_obs, n_classes)`)
        Probability of each class of each task, in the order of `uns`; NaN for cells that were left out.
    `.obs['gfx_predicted_cells_...' | key_added + '_...']` : :class:`pandas.Series` (category)
        For each task, whose name ends this one's, the most probable class.
    `.uns['gfx_predicted_cells' | key_added]` : :class:`dict`
        `params`; `tasks`, the names of the classes of each.

    Raises
    ------
    ValueError
        A model that does not classify cells, no raw counts, tokens of another vocabulary, or a column of `obs` that
        would be written over.

    Examples
    --------
    >>> import gfx, tempfile
    >>> adata = gfx.datasets.toy()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     gfx.tl.classify_cells(adata, "cell_type", method="linear_probe", n_seeds=1, folder=folder)
    ...     gfx.tl.predict_cells(adata, folder)
    >>> adata.obs["gfx_predicted_cells_cell_type"].cat.categories.tolist()
    ['B cell', 'T cell']
    """
    keys = predicted_cells_keys(key_added)
    found, _ = load_trained(model, "cells")
    cells = prepare(adata, found, layer=layer, mod=mod, copy=copy, slot=keys.uns, function="tl.predict_cells")
    lengths = cells.lengths(mask_obs)

    from gfx._engine.class_scores import of_cells

    classifier = classifier_of(found, device=device, dtype=dtype)
    claim_task_columns(cells.adata, classifier.head.tasks, keys)
    scores = of_cells(classifier, cells.tokens.ids, lengths, found.vocabulary, batch_size=batch_size)
    tasks = classifier.head.tasks
    adata = cells.adata
    drop_task_columns(adata, tasks, keys)
    adata.obsm[keys.obsm] = scores
    for task, part in classifier.head.slices.items():
        best = np.where(np.isnan(scores[:, 0]), -1, np.nan_to_num(scores[:, part]).argmax(axis=1))
        adata.obs[keys.of(task)] = pd.Categorical.from_codes(best, categories=tasks[task])
    adata.uns[keys.uns] = {
        "params": record("tl.predict_cells", **cells.provenance(classifier), mask_obs=mask_name(mask_obs)),
        "tasks": {task: np.array(classes, dtype=object) for task, classes in tasks.items()},
    }
    _log.info(
        f"classified {int((~np.isnan(scores[:, 0])).sum()):,} cells with {found.name!r}: added {keys.obsm!r} "
        f"(adata.obsm) and {', '.join(repr(keys.of(task)) for task in tasks)} (adata.obs)"
    )
    return cells.result
