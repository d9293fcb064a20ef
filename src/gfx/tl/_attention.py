"""Attention that genes and ranks receive."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gfx._docs import shared
from gfx._results import mask_name
from gfx.tl._prepare import prepare

if TYPE_CHECKING:
    from gfx._types import Data, Mask, ModelLike


@shared()
def attention(
    adata: Data,
    *,
    model: ModelLike | None = None,
    layer: str | None = None,
    mask_obs: Mask | None = None,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> Data | None:
    """Measure which genes and ranks the model attends to, by layer and head :cite:p:`Theodoris2023`.

    The attention that a gene receives in a cell is the mean attention weight that all positions of the cell give to it;
    the result is the mean over the cells that express the gene. In cells with few genes, each gene receives more
    attention, because the weights of a position sum to 1. The result is therefore compared with uniform attention,
    which is the mean of 1 / length over the same cells. Attention shows which genes a model attends to, not which gene
    regulates which: published comparisons found no regulatory information in attention beyond that in expression.

    The cost is one forward pass in float32 through all layers. Memory does not depend on the number of cells, because
    weights are summed as they are computed.

    Parameters
    ----------
    {adata}
    {model}
    {layer}
    {mask_obs}
    {key_added}
    {mod}
    {copy}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.varm['gfx_attention' | key_added]` : :class:`numpy.ndarray` (float32, `(n_vars, n_layers * n_heads)`)
        Attention that each gene receives from each head, starting with the heads of the first network layer; NaN for
        genes that no cell expresses.
    `.var['gfx_attention_n_cells' | key_added + '_n_cells']` : :class:`pandas.Series` (int32)
        Number of cells that express the gene.
    `.var['gfx_attention_uniform' | key_added + '_uniform']` : :class:`pandas.Series` (float32)
        Attention that the gene would receive if attention were uniform.
    `.uns['gfx_attention' | key_added]` : :class:`dict`
        `params`; `n_layers` (number of network layers), `n_heads` and `n_cells`; `ranks`, float32
        `(n_layers, n_heads, n_ranks)`, the attention that genes of each rank receive (0 is the first gene of a cell);
        `ranks_uniform` and `ranks_n_cells`, `(n_ranks,)`, the uniform attention and the number of cells for each rank;
        `special`, float32 `(n_layers, n_heads)`, the fraction of attention that `<cls>` and `<eos>` receive; `entropy`,
        float32 `(n_layers, n_heads)`, 1 for uniform attention and 0 for attention to a single position.

    Raises
    ------
    ValueError
        There are no raw counts, the model does not know the genes, the tokens belong to another vocabulary, or a slot
        of the result already holds something else.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.attention(adata, model="mini")
    >>> adata.varm["gfx_attention"].shape
    (300, 16)
    """
    from gfx._engine.attention import mean_attention
    from gfx._engine.run import CELLS_PER_SUM, Job, by_length, run
    from gfx._engine.tasks import Attention

    cells = prepare(adata, model, function="tl.attention", layer=layer, key_added=key_added, mod=mod, copy=copy)
    lengths = cells.lengths(mask_obs)
    network = replace(cells.network(-1), dtype="float32")
    task = Attention(network, cells.model.vocabulary)
    job = Job("attention", task, cells.tokens, by_length(lengths, CELLS_PER_SUM))
    results = (result for _, _, result in run([job], description="reading attention"))
    means = mean_attention(results, job.n_cells)
    n_layers, n_heads = means["entropy"].shape
    cells.slots.write(
        f"read the attention of {n_layers} layers × {n_heads} heads of {cells.model.name!r} in {job.n_cells:,} cells",
        params=cells.provenance(network) | {"mask_obs": mask_name(mask_obs)},
        varm={"": cells.per_gene(means["genes"].reshape(len(cells.model.vocabulary), -1))},
        var={"n_cells": cells.cells_per_gene(means["n_cells"]), "uniform": cells.per_gene(means["uniform"])},
        uns={
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_cells": job.n_cells,
            **{name: means[name] for name in ("ranks", "ranks_uniform", "ranks_n_cells", "special", "entropy")},
        },
    )
    return cells.result
