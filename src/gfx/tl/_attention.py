"""Attention that genes and ranks receive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gfx._results import mask_name
from gfx.tl._prepare import prepare

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from anndata import AnnData
    from mudata import MuData

    from gfx.models import Model


def attention(
    adata: AnnData | MuData,
    *,
    model: str | Path | Model | None = None,
    layer: str | None = None,
    mask_obs: str | np.ndarray | None = None,
    device: str | None = None,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> AnnData | MuData | None:
    """Read which genes and ranks the model attends to, per block and head :cite:p:`Theodoris2023`.

    In each cell, the attention that a gene receives is the weight it gets from an average position; over cells, the
    mean over those that have the gene. Beside it stands what even attention would give (the mean of 1 / length), for
    the genes of short cells receive more by arithmetic alone. Attention says where a model looks, not what regulates
    what: published comparisons found no regulatory information in it beyond what expression shows.

    Cost: one forward pass with plain attention in float32, a few times slower than :func:`gfx.tl.embed`. Memory does
    not depend on the number of cells: weights are summed as each block computes them.

    Parameters
    ----------
    adata
        Cells by genes, raw counts in `X` or `layer`, or tokens from :func:`gfx.pp.tokenize`.
    model
        Published name, folder, or what :func:`gfx.models.load` returned. `None`: `gfx.settings.model`, else `mini`.
    layer
        Layer with the raw counts; `None`: `X`.
    mask_obs
        Cells to use: a boolean column of `obs`, or an array.
    device
        Such as ``"cpu"`` or ``"cuda:0"``. `None`: the setting, else what is there.
    key_added
        Where to store the result; see below.
    mod
        Modality of a MuData.
    copy
        Work on a copy and return it.

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.varm['gfx_attention' | key_added]` : :class:`numpy.ndarray` (float32, `(n_vars, n_blocks * n_heads)`)
        Weight that each gene receives, the heads of the first block first; NaN where no cell has the gene.
    `.var['gfx_attention_n_cells' | key_added + '_n_cells']` : :class:`pandas.Series` (int32)
        Cells behind each mean.
    `.var['gfx_attention_uniform' | key_added + '_uniform']` : :class:`pandas.Series` (float32)
        What even attention would give.
    `.uns['gfx_attention' | key_added]` : :class:`dict`
        `params`; `n_blocks`, `n_heads`, `n_cells`; `ranks`, float32 `(n_blocks, n_heads, n_ranks)`: weight by rank of
        the attended gene (0 is the top gene); `ranks_uniform`, `ranks_n_cells`, `(n_ranks,)`; `special`, float32
        `(n_blocks, n_heads)`: share that goes to `<cls>` and `<eos>`; `entropy`, float32 `(n_blocks, n_heads)`: 1 for
        even attention, 0 for attention to one position.

    Raises
    ------
    ValueError
        No raw counts, unknown genes, or tokens of another vocabulary.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.attention(adata, model="mini")
    >>> adata.varm["gfx_attention"].shape
    (300, 16)
    """
    from gfx._engine.attention import attention_sums

    cells = prepare(adata, model, function="tl.attention", layer=layer, key_added=key_added, mod=mod, copy=copy)
    lengths = cells.lengths(mask_obs)
    encoder = cells.encoder(-1, device=device, dtype="float32", attention="eager")
    sums = attention_sums(encoder, cells.tokens.ids, lengths, cells.model.vocabulary)
    n_blocks, n_heads = sums.entropy.shape
    n_used = int((lengths > 0).sum())
    cells.slots.write(
        f"read the attention of {n_blocks} layers × {n_heads} heads of {cells.model.name!r} in {n_used:,} cells",
        params=cells.provenance(encoder) | {"mask_obs": mask_name(mask_obs)},
        varm={"": cells.per_gene(sums.genes.reshape(len(sums.genes), -1))},
        var={"n_cells": cells.cells_per_gene(sums.n_cells), "uniform": cells.per_gene(sums.uniform)},
        uns={
            "n_blocks": n_blocks,
            "n_heads": n_heads,
            "n_cells": n_used,
            "ranks": sums.ranks,
            "ranks_uniform": sums.ranks_uniform,
            "ranks_n_cells": sums.n_rank_cells,
            "special": sums.special,
            "entropy": sums.entropy,
        },
    )
    return cells.result
