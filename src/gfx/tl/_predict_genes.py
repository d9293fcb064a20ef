"""Classes of genes, predicted by a trained model in other cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from gfx import _docs, _log
from gfx._core.statistics import moments
from gfx._keys import predicted_genes_keys
from gfx._provenance import mask_name, record
from gfx.tl._prepare import claim_gene_columns, groups_and_rest, prepare, put
from gfx.tl._trained_model import classifier_of, load_trained

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData

    from gfx.models import Model


@_docs.shared(running=_docs.RUNNING, output=_docs.OUTPUT)
def predict_genes(
    adata: AnnData | MuData,
    model: str | Path | Model,
    *,
    layer: str | None = None,
    groupby: str | None = None,
    mask_obs: str | np.ndarray | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> AnnData | MuData | None:
    """Predict classes of genes with a model that was taught them :cite:p:`Theodoris2023`.

    Every gene of every cell is scored, and its score is the mean over cells: of all, and of each group with `groupby`,
    for a gene may be sensitive to its dosage in one tissue or stage and not in another. Genes that the model was
    taught with are marked: their scores say what it remembers, not what it predicts.

    Cost: one forward pass over the cells, as :func:`gfx.tl.embed`; sums of groups × genes of the model × classes.

    Parameters
    ----------
    adata
        Cells by genes, raw counts in `X` or `layer`, or tokens from :func:`gfx.pp.tokenize`.
    model
        A folder that :func:`gfx.tl.classify_genes` wrote, or another checkpoint with a head on tokens.
    layer
        Layer with the raw counts; `None`: `X`.
    groupby
        Column of `obs`: score the genes in each group of cells as well.
    mask_obs
        Cells to use: a boolean column of `obs`, or an array.
    {running}
    {output}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.varm['gfx_predicted_genes' | key_added]` : :class:`numpy.ndarray` (float32, `(n_vars, n_classes)`)
        Probability of each class, mean over cells; NaN where no cell has the gene.
    `.varm['gfx_predicted_genes_sd' | key_added + '_sd']` : :class:`numpy.ndarray` (float32, `(n_vars, n_classes)`)
        Its standard deviation over cells.
    `.varm['gfx_predicted_genes_groups' | key_added + '_groups']` : :class:`numpy.ndarray` (float32, 3 dimensions)
        With `groupby`, `(n_vars, n_groups, n_classes)`: the mean over the cells of each group.
    `.varm['gfx_predicted_genes_groups_n_cells' | ...]` : :class:`numpy.ndarray` (int32, `(n_vars, n_groups)`)
        With `groupby`: cells behind each of them.
    `.var['gfx_predicted_genes' | key_added]` : :class:`pandas.Series` (category)
        The most probable class.
    `.var['gfx_predicted_genes_n_cells' | key_added + '_n_cells']` : :class:`pandas.Series` (int32)
        Cells behind a score.
    `.var['gfx_predicted_genes_learnt' | key_added + '_learnt']` : :class:`pandas.Series` (bool)
        Whether the model was taught the gene's class; all `False` for a checkpoint that does not say.
    `.uns['gfx_predicted_genes' | key_added]` : :class:`dict`
        `params`; `tasks`, the names of the classes; with `groupby`, `groups`.

    Raises
    ------
    ValueError
        A model that does not classify genes, no raw counts, tokens of another vocabulary, or a column of `var` that
        would be written over.
    KeyError
        No such column in `obs`.

    Examples
    --------
    >>> import gfx, tempfile
    >>> adata = gfx.datasets.toy()
    >>> labels = {"first": adata.var_names[:40], "second": adata.var_names[40:80]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     gfx.tl.classify_genes(adata, labels, method="linear_probe", n_seeds=1, folder=folder)
    ...     gfx.tl.predict_genes(adata, folder, groupby="cell_type")
    >>> adata.varm["gfx_predicted_genes_groups"].shape
    (300, 2, 2)
    """
    keys = predicted_genes_keys(key_added)
    found, teaching = load_trained(model, "genes")
    cells = prepare(adata, found, layer=layer, mod=mod, copy=copy, slot=keys.uns, function="tl.predict_genes")
    claim_gene_columns(cells.adata, (keys.var, keys.var_n_cells, keys.var_learnt), keys.uns)
    lengths = cells.lengths(mask_obs)
    names, group = groups_and_rest(cells.adata, groupby)

    from gfx._engine.class_scores import of_genes

    classifier = classifier_of(found, device=device, dtype=dtype)
    sums = of_genes(
        classifier,
        cells.tokens.ids,
        lengths,
        found.vocabulary,
        group=group,
        n_groups=len(names) + 1,
        batch_size=batch_size,
    )
    n, mean, sd = moments(sums.sum(axis=1))
    scores = cells.per_gene(mean)
    taught = found.vocabulary.resolve([gene for genes in teaching.get("taught", {}).values() for gene in genes])
    (task, classes), *_ = classifier.head.tasks.items()
    predicted = np.where(np.isnan(scores[:, 0]), -1, np.nan_to_num(scores).argmax(axis=1))
    result: dict[str, object] = {
        "params": record(
            "tl.predict_genes",
            **cells.provenance(classifier),
            groupby=groupby,
            mask_obs=mask_name(mask_obs),
        ),
        "tasks": {task: np.array(classes, dtype=object)},
    }
    of_groups: dict[str, np.ndarray | None] = dict.fromkeys((keys.varm_groups, keys.varm_groups_n_cells))
    if names:
        result["groups"] = np.array(names, dtype=object)
        n_group, mean_group, _ = moments(sums[:, : len(names)])
        of_groups = {
            keys.varm_groups: cells.per_gene(mean_group.transpose(1, 0, 2)),
            keys.varm_groups_n_cells: cells.cells_per_gene(n_group[..., 0].T),
        }
    adata = cells.adata
    put(adata.varm, of_groups, is_ours=keys.uns in adata.uns)
    adata.varm[keys.varm], adata.varm[keys.varm_sd] = scores, cells.per_gene(sd)
    adata.var[keys.var] = pd.Categorical.from_codes(predicted, categories=classes)
    adata.var[keys.var_n_cells] = cells.cells_per_gene(n[:, 0])
    adata.var[keys.var_learnt] = np.isin(cells.gene_tokens, taught)
    adata.uns[keys.uns] = result
    _log.info(
        f"scored {int((predicted >= 0).sum()):,} genes with {found.name!r}"
        + (f" in {len(names)} groups of {groupby!r}" if names else "")
        + f": added {keys.varm!r} (adata.varm, adata.var)"
    )
    return cells.result
