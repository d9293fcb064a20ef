"""Cell embeddings."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from gfx._docs import shared
from gfx.tl._prepare import open_store, prepare, vectors_of

if TYPE_CHECKING:
    from pathlib import Path

    from gfx._types import Data, ModelLike, Pooling


@shared()
def embed(
    adata: Data,
    *,
    model: ModelLike | None = None,
    layer: str | None = None,
    hidden_layer: int = -2,
    pooling: Pooling = "auto",
    store: str | Path | None = None,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> Data | None:
    """Embed cells with a Geneformer model :cite:p:`Theodoris2023`.

    Each cell is embedded as one vector, which can be used in `scanpy.pp.neighbors(adata, use_rep="X_gfx")` and all
    subsequent analyses. The vector of a cell depends neither on the order of the cells nor on the other cells, except
    for rounding errors of about 1e-6 in float32 and 0.05 in bfloat16 (the values themselves are of the order of 1). Set
    ``gfx.settings.dtype = "float32"`` if results of two machines must agree.

    The cost is one forward pass through the network layers up to `hidden_layer`. Apart from the result itself, memory
    does not grow with the number of cells.

    Parameters
    ----------
    {adata}
    {model}
    {layer}
    {hidden_layer}
    {pooling}
    {store}
    {key_added}
    {mod}
    {copy}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.obsm['X_gfx' | key_added]` : :class:`numpy.ndarray` (float32, `(n_obs, hidden_size)`)
        The embedding of each cell; NaN for cells without any gene that the model knows.
    `.uns['X_gfx' | key_added]['params']` : :class:`dict`
        How the embedding was made: model, checksums, and arguments.

    Raises
    ------
    ValueError
        There are no raw counts, the model does not know the genes, the tokens belong to another vocabulary, the model
        does not have this network layer, its states are beyond what the precision can hold, or a slot of the result
        already holds something else.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.embed(adata, model="mini")
    >>> adata.obsm["X_gfx"].shape
    (60, 128)
    """
    from gfx._engine.run import run, tell_finished

    cells = prepare(adata, model, function="tl.embed", layer=layer, key_added=key_added, mod=mod, copy=copy)
    job = cells.embedding("cells", cells.network(hidden_layer), cells.pooling(pooling))
    params = cells.provenance(job.task.network) | {"hidden_layer": hidden_layer, "pooling": job.task.pooling}
    kept = None if store is None else open_store(store, "tl.embed", cells, params)
    tell_finished([job], kept)
    vectors = vectors_of(run([job], description="embedding", store=kept), len(cells.tokens))["cells"]
    is_empty = cells.tokens.lengths == 0
    if n_infinite := int((~np.isfinite(vectors).all(axis=1) & ~is_empty).sum()):
        msg = (
            f"The states of {n_infinite:,} of {len(vectors):,} cells are beyond what {params['dtype']} can hold. Set "
            '`gfx.settings.dtype = "float32"`; if it is that already, the weights of this model are damaged.'
        )
        raise ValueError(msg)
    if n_empty := int(is_empty.sum()):
        warnings.warn(
            f"{n_empty} of {len(vectors)} cells have no gene that the model knows; their embedding is NaN. "
            "Leave them out before `scanpy.pp.neighbors`.",
            UserWarning,
            stacklevel=2,
        )
    done = f"embedded {len(vectors):,} cells with {cells.model.name!r} in {params['dtype']}"
    cells.slots.write(done, params=params, obsm={"": vectors})
    return cells.result
