"""Classes of genes and of cells, predicted by a trained classifier."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gfx._core.statistics import moments
from gfx._docs import shared
from gfx._results import mask_name
from gfx.tl._prepare import groups_and_rest, prepare, vectors_of
from gfx.tl.classification._cross_validation import predicted_classes
from gfx.tl.classification._trained import load_trained

if TYPE_CHECKING:
    from gfx._types import Data, Mask, ModelLike


@shared()
def predict_genes(
    adata: Data,
    model: ModelLike,
    *,
    layer: str | None = None,
    groupby: str | None = None,
    mask_obs: Mask | None = None,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> Data | None:
    """Predict classes of genes with a trained classifier :cite:p:`Theodoris2023`.

    Every gene is scored in every cell that expresses it, and the scores are averaged over all cells and, with
    `groupby`, over the cells of each group, because a gene may be dosage-sensitive in one tissue or stage and not in
    another. Genes of the training set are marked: the classifier has seen their labels.

    Cost: one forward pass over the cells, as :func:`gfx.tl.embed`; memory for groups × genes of the model × classes.

    Parameters
    ----------
    {adata}
    model
        A folder from :func:`gfx.models.fine_tune_genes` or :func:`gfx.tl.classify_genes`, or another checkpoint that
        classifies tokens (genes).
    {layer}
    groupby
        Column of `obs` with groups of cells. Genes are also scored in each group.
    {mask_obs}
    {key_added}
    {mod}
    {copy}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.varm['gfx_predicted_genes' | key_added]` : :class:`numpy.ndarray` (float32, `(n_vars, n_classes)`)
        Probability of each class, mean over cells; NaN where no cell has the gene.
    `.varm['gfx_predicted_genes_sd' | key_added + '_sd']` : :class:`numpy.ndarray` (float32, `(n_vars, n_classes)`)
        Standard deviation of the probability over cells.
    `.varm['gfx_predicted_genes_groups' | key_added + '_groups']` : :class:`numpy.ndarray` (float32, 3 dimensions)
        With `groupby`, `(n_vars, n_groups, n_classes)`: the mean over the cells of each group.
    `.varm['gfx_predicted_genes_groups_n_cells' | ...]` : :class:`numpy.ndarray` (int32, `(n_vars, n_groups)`)
        With `groupby`, the number of cells over which each of these means was computed.
    `.var['gfx_predicted_genes' | key_added]` : :class:`pandas.Series` (category)
        The most probable class.
    `.var['gfx_predicted_genes_n_cells' | key_added + '_n_cells']` : :class:`pandas.Series` (int32)
        Number of cells over which the score was averaged.
    `.var['gfx_predicted_genes_in_training' | key_added + '_in_training']` : :class:`pandas.Series` (bool)
        Whether the gene was in the training set; `False` for all genes if the checkpoint does not record this.
    `.uns['gfx_predicted_genes' | key_added]` : :class:`dict`
        `params`; `tasks`, the names of the classes; with `groupby`, `groups`.

    Raises
    ------
    ValueError
        The model does not classify genes, there are no raw counts, the tokens belong to another vocabulary, or a slot
        of the result already holds something else.
    KeyError
        No such column in `obs`.

    Examples
    --------
    >>> import gfx, tempfile
    >>> adata = gfx.datasets.toy()
    >>> labels = {"first": adata.var_names[:40], "second": adata.var_names[40:80]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     classifier = gfx.models.fine_tune_genes(
    ...         adata, labels, folder, method="linear_probe"
    ...     )
    ...     gfx.tl.predict_genes(adata, classifier, groupby="cell_type")
    >>> adata.varm["gfx_predicted_genes_groups"].shape
    (300, 2, 2)
    """
    from gfx._engine.tasks import GeneClasses

    loaded, head, trained_on = load_trained(model, "genes")
    cells = prepare(adata, loaded, function="tl.predict_genes", layer=layer, key_added=key_added, mod=mod, copy=copy)
    cells.slots.claim(reads=[("obs", groupby), ("obs", mask_obs)])
    lengths, vocabulary = cells.lengths(mask_obs), loaded.vocabulary
    names, group = groups_and_rest(cells.adata, groupby)
    task = GeneClasses(replace(cells.network(-1), classifies=True), vocabulary, len(names) + 1)
    sums, n = cells.sums_of_genes(task, lengths, group, description="scoring genes", store=None)
    sums = sums.reshape(task.n_groups, len(vocabulary), 2, head.n_logits).transpose(2, 0, 1, 3)
    sums = np.stack([*sums, np.broadcast_to(n.reshape(*sums.shape[1:3], 1), sums.shape[1:])])
    n, mean, sd = moments(sums.sum(axis=1))
    scores = cells.per_gene(mean)
    ((task_name, classes),) = head.tasks.items()
    predicted = predicted_classes(scores, head)[task_name]
    trained_on = vocabulary.resolve(trained_on)
    varm, uns = {"": scores, "sd": cells.per_gene(sd)}, {"tasks": {task_name: np.array(classes, dtype=object)}}
    done = f"scored {int((predicted.codes >= 0).sum()):,} genes with {loaded.name!r}"
    if names:
        n_group, mean_group, _ = moments(sums[:, : len(names)])
        varm["groups"] = cells.per_gene(mean_group.transpose(1, 0, 2))
        varm["groups_n_cells"] = cells.cells_per_gene(n_group[..., 0].T)
        uns["groups"] = np.array(names, dtype=object)
        done += f", also in each of {len(names)} groups of {groupby!r}"
    cells.slots.write(
        done,
        params=cells.provenance(task.network) | {"groupby": groupby, "mask_obs": mask_name(mask_obs)},
        varm=varm,
        var={
            "": predicted,
            "n_cells": cells.cells_per_gene(n[:, 0]),
            "in_training": np.isin(cells.gene_tokens, trained_on),
        },
        uns=uns,
    )
    return cells.result


@shared()
def predict_cells(
    adata: Data,
    model: ModelLike,
    *,
    layer: str | None = None,
    mask_obs: Mask | None = None,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> Data | None:
    """Predict classes of cells with a trained classifier :cite:p:`Theodoris2023`.

    Cells of a type absent from training still receive one of the known classes. The card in the classifier's folder
    gives its performance on held-out cells or donors, if it was evaluated.

    Cost: one forward pass over the cells, as :func:`gfx.tl.embed`.

    Parameters
    ----------
    {adata}
    model
        A folder from :func:`gfx.models.fine_tune_cells` or :func:`gfx.tl.classify_cells`; or the published
        ``"V1-10M_cardiomyopathies"``, or another checkpoint of the official software, whose head reads the hidden state
        of the first gene.
    {layer}
    {mask_obs}
    {key_added}
    {mod}
    {copy}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.obsm['gfx_predicted_cells' | key_added]` : :class:`numpy.ndarray` (float32, `(n_obs, n_classes)`)
        Probability of each class of each task, in the order of `uns`; NaN for cells that were left out.
    `.obs['gfx_predicted_cells_...' | key_added + '_...']` : :class:`pandas.Series` (category)
        The most probable class of each task, whose name is the end of the slot's name.
    `.uns['gfx_predicted_cells' | key_added]` : :class:`dict`
        `params`; `tasks`, the names of the classes of each.

    Raises
    ------
    ValueError
        A model that does not classify cells, no raw counts, tokens of another vocabulary, or a slot that holds
        something else.

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
    from gfx._engine.run import CELLS_PER_BLOCK, Job, by_length, run
    from gfx._engine.tasks import CellClasses

    loaded, head, _ = load_trained(model, "cells")
    cells = prepare(adata, loaded, function="tl.predict_cells", layer=layer, key_added=key_added, mod=mod, copy=copy)
    cells.slots.claim(head.tasks, reads=[("obs", mask_obs)])
    lengths = cells.lengths(mask_obs)
    task = CellClasses(replace(cells.network(-1), classifies=True), loaded.vocabulary)
    job = Job("cells", task, cells.tokens, by_length(lengths, CELLS_PER_BLOCK))
    (scores,) = vectors_of(run([job], description="classifying cells"), len(lengths)).values()
    cells.slots.write(
        f"classified {int((~np.isnan(scores[:, 0])).sum()):,} cells with {loaded.name!r}",
        params=cells.provenance(task.network) | {"mask_obs": mask_name(mask_obs)},
        obsm={"": scores},
        obs=predicted_classes(scores, head),
        uns={"tasks": {task: np.array(classes, dtype=object) for task, classes in head.tasks.items()}},
    )
    return cells.result
