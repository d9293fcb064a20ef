"""Contextual gene embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx._core.manifest import fingerprint
from gfx._docs import shared
from gfx._results import mask_name
from gfx.tl._prepare import groups_and_rest, open_store, prepare

if TYPE_CHECKING:
    from pathlib import Path

    from gfx._types import Data, Mask, ModelLike


@shared()
def embed_genes(
    adata: Data,
    *,
    model: ModelLike | None = None,
    layer: str | None = None,
    groupby: str | None = None,
    mask_obs: Mask | None = None,
    hidden_layer: int = -2,
    store: str | Path | None = None,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> Data | None:
    """Embed genes in the context of the cells that express them :cite:p:`Theodoris2023`.

    A gene has a different hidden state in every cell. Its embedding is the mean of these over all cells and, with
    `groupby`, over each group. As with :func:`gfx.tl.embed`, set ``gfx.settings.dtype = "float32"`` where results of
    two machines must agree.

    The cost is one forward pass over the cells, as for :func:`gfx.tl.embed`. Memory holds one sum of groups × genes of
    the model × width, however many cells there are.

    Parameters
    ----------
    {adata}
    {model}
    {layer}
    {groupby}
    {mask_obs}
    {hidden_layer}
    {store}
    {key_added}
    {mod}
    {copy}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.varm['gfx_genes' | key_added]` : :class:`numpy.ndarray` (float32, `(n_vars, hidden_size)`)
        Mean hidden state of each gene over all cells that express it; NaN for genes that no cell expresses.
    `.var['gfx_genes_n_cells' | key_added + '_n_cells']` : :class:`pandas.Series` (int32)
        Number of these cells.
    `.varm['gfx_genes_groups' | ...]` : :class:`numpy.ndarray` (float32, `(n_vars, n_groups, hidden_size)`)
        With `groupby`, the mean over the cells of each group, in the order of `uns`.
    `.varm['gfx_genes_groups_n_cells' | ...]` : :class:`numpy.ndarray` (int32, `(n_vars, n_groups)`)
        With `groupby`, the number of these cells.
    `.uns['gfx_genes' | key_added]` : :class:`dict`
        `params`, how the embedding was made; with `groupby` also `groups`, the names of the groups.

    Raises
    ------
    ValueError
        There are no raw counts, the model does not know the genes, the tokens belong to another vocabulary, or a slot
        to write holds something else.
    KeyError
        `obs` has no such column.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.embed_genes(adata, model="mini", groupby="cell_type")
    >>> adata.varm["gfx_genes"].shape, adata.varm["gfx_genes_groups"].shape
    ((300, 128), (300, 2, 128))
    """
    from gfx._engine.pooling import mean_genes
    from gfx._engine.tasks import GeneEmbedding

    cells = prepare(adata, model, function="tl.embed_genes", layer=layer, key_added=key_added, mod=mod, copy=copy)
    cells.slots.claim(reads=[("obs", groupby), ("obs", mask_obs)])
    lengths = cells.lengths(mask_obs)
    names, group = groups_and_rest(cells.adata, groupby)
    task = GeneEmbedding(cells.network(hidden_layer), cells.model.vocabulary, len(names) + 1)
    params = cells.provenance(task.network) | {"hidden_layer": hidden_layer, "groupby": groupby}
    kept = None
    if store is not None:
        of_cells = {"groups": fingerprint(np.where(lengths > 0, group, -1))}
        kept = open_store(store, "tl.embed_genes", cells, params | of_cells)
    sums = cells.sums_of_genes(task, lengths, group, description="embedding genes", store=kept)
    means, counts = mean_genes(*sums, task.n_groups)
    by_group: dict[str, np.ndarray] = {}
    if names:
        by_group["groups"] = cells.per_gene(means[: len(names)].transpose(1, 0, 2))
        by_group["groups_n_cells"] = cells.cells_per_gene(counts[: len(names)].T)
    n_cells = cells.cells_per_gene(counts[-1])
    cells.slots.write(
        f"embedded {(n_cells > 0).sum():,} genes with {cells.model.name!r}"
        + (f", also in each of {len(names)} groups of {groupby!r}" if names else ""),
        params=params | {"pooling": "gene", "mask_obs": mask_name(mask_obs)},
        varm={"": cells.per_gene(means[-1]), **by_group},
        var={"n_cells": n_cells},
        uns={"groups": np.array(names, dtype=object)} if names else None,
    )
    return cells.result
