"""Contextual gene embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from gfx._results import mask_name
from gfx.tl._prepare import groups_and_rest, prepare

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData

    from gfx.models import Model


def embed_genes(
    adata: AnnData | MuData,
    *,
    model: str | Path | Model | None = None,
    layer: str | None = None,
    groupby: str | None = None,
    mask_obs: str | np.ndarray | None = None,
    hidden_layer: int = -2,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> AnnData | MuData | None:
    """Embed genes in the context of the cells that express them :cite:p:`Theodoris2023`.

    A gene has another hidden state in every cell; its embedding is their mean, over all cells or over each group. As
    with :func:`gfx.tl.embed`, bfloat16 rounds; use ``dtype="float32"`` where two machines must agree.

    Cost: one forward pass over the cells, as :func:`gfx.tl.embed`; one running sum of groups × genes of the model ×
    width, however many cells there are.

    Parameters
    ----------
    adata
        Cells by genes, raw counts in `X` or `layer`, or tokens from :func:`gfx.pp.tokenize`.
    model
        Published name, folder, or what :func:`gfx.models.load` returned. `None`: `gfx.settings.model`, else `mini`.
    layer
        Layer with the raw counts; `None`: `X`.
    groupby
        Column of `obs`: embed the genes in each group of cells as well. Cells without a group count for the overall
        embedding only.
    mask_obs
        Cells to use: a boolean column of `obs`, or an array.
    hidden_layer
        Which hidden states: -1 the last block's, -2 those of the block before, 0 the embedding's.
    batch_size
        Cells in a forward pass at most; `None`: as many as fit a number of tokens, halved when memory runs out.
    device
        Such as ``"cpu"`` or ``"cuda:0"``. `None`: the setting, else what is there.
    dtype
        Precision of the forward pass. `None`: bfloat16 where it is fast (CUDA, and CPUs with AMX), else float32 (the
        reference).
    key_added
        Where to store the result; see below.
    mod
        Modality of a MuData.
    copy
        Work on a copy and return it.

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.varm['gfx_genes' | key_added]` : :class:`numpy.ndarray` (float32, `(n_vars, hidden_size)`)
        Mean over all cells that have the gene; NaN where none does.
    `.var['gfx_genes_n_cells' | key_added + '_n_cells']` : :class:`pandas.Series` (int32)
        Cells behind each mean.
    `.varm['gfx_genes_groups' | ...]` : :class:`numpy.ndarray` (float32, `(n_vars, n_groups, hidden_size)`)
        With `groupby`: the mean over the cells of each group, in the order of `uns`.
    `.varm['gfx_genes_groups_n_cells' | ...]` : :class:`numpy.ndarray` (int32, `(n_vars, n_groups)`)
        With `groupby`: cells behind each of them.
    `.uns['gfx_genes' | key_added]` : :class:`dict`
        `params`: how it was made; with `groupby` also `groups`: their names.

    Raises
    ------
    ValueError
        No raw counts, unknown genes, or tokens of another vocabulary.
    KeyError
        No such column in `obs`.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.embed_genes(adata, model="mini", groupby="cell_type")
    >>> adata.varm["gfx_genes"].shape, adata.varm["gfx_genes_groups"].shape
    ((300, 128), (300, 2, 128))
    """
    from gfx._engine.pooling import embed_genes as run

    cells = prepare(adata, model, function="tl.embed_genes", layer=layer, key_added=key_added, mod=mod, copy=copy)
    cells.slots.claim(reads=[("obs", groupby), ("obs", mask_obs)])
    lengths = cells.lengths(mask_obs)
    names, group = groups_and_rest(cells.adata, groupby)
    encoder = cells.encoder(hidden_layer, device=device, dtype=dtype)
    means, counts = run(
        encoder,
        cells.tokens.ids,
        lengths,
        cells.model.vocabulary,
        group=group,
        n_groups=len(names) + 1,
        batch_size=batch_size,
    )
    n_cells = counts.sum(axis=0)
    overall = (np.nan_to_num(means) * counts[..., None]).sum(axis=0) / np.maximum(n_cells, 1)[:, None]
    overall[n_cells == 0] = np.nan
    by_group: dict[str, np.ndarray] = {}
    if names:
        by_group["groups"] = cells.per_gene(means[: len(names)].transpose(1, 0, 2))
        by_group["groups_n_cells"] = cells.cells_per_gene(counts[: len(names)].T)
    genes_n_cells = cells.cells_per_gene(n_cells)
    cells.slots.write(
        f"embedded {(genes_n_cells > 0).sum():,} genes with {cells.model.name!r}"
        + (f", also in each of {len(names)} groups of {groupby!r}" if names else ""),
        params=cells.provenance(encoder)
        | {"hidden_layer": hidden_layer, "pooling": "gene", "groupby": groupby, "mask_obs": mask_name(mask_obs)},
        varm={"": cells.per_gene(overall), **by_group},
        var={"n_cells": genes_n_cells},
        uns={"groups": np.array(names, dtype=object)} if names else None,
    )
    return cells.result
