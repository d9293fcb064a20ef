"""Cell embeddings."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

import numpy as np

from gfx.tl._prepare import prepare

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData

    from gfx.models import Model


def embed(
    adata: AnnData | MuData,
    *,
    model: str | Path | Model | None = None,
    layer: str | None = None,
    hidden_layer: int = -2,
    pooling: Literal["auto", "mean", "cls"] = "auto",
    batch_size: int | None = None,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> AnnData | MuData | None:
    """Embed cells with a Geneformer model :cite:p:`Theodoris2023`.

    Each cell becomes one vector, for `scanpy.pp.neighbors(adata, use_rep="X_gfx")` and everything after it. The
    encoder runs without its language-model head and only up to the wanted block. The vector of a cell does not depend
    on the batch size, the order of the cells or the other cells, to rounding: about 1e-6 in float32, 0.05 in bfloat16
    (values are of the order of 1). Use ``dtype="float32"`` where two machines must agree.

    Cost: with the embedded model about 60 cells of 700 genes per second on two CPU cores. Memory does not grow with
    the number of cells beyond the result.

    Parameters
    ----------
    adata
        Cells by genes, raw counts in `X` or `layer`, or tokens from :func:`gfx.pp.tokenize`.
    model
        Published name, folder, or what :func:`gfx.models.load` returned. `None`: `gfx.settings.model`, else `mini`.
    layer
        Layer with the raw counts; `None`: `X`.
    hidden_layer
        Which hidden states: -1 the last block's, -2 those of the block before, 0 the embedding's.
    pooling
        ``"cls"``: the state of `<cls>`. ``"mean"``: the mean over genes, special tokens left out. ``"auto"``: what
        the model's family does, `cls` where there is one.
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

    `.obsm['X_gfx' | key_added]` : :class:`numpy.ndarray` (float32, `(n_obs, hidden_size)`)
        The embedding; NaN for cells without any gene that the model knows.
    `.uns['X_gfx' | key_added]['params']` : :class:`dict`
        How it was made.

    Raises
    ------
    ValueError
        No raw counts, unknown genes, tokens of another vocabulary, or a layer the model does not have.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.embed(adata, model="mini")
    >>> adata.obsm["X_gfx"].shape
    (60, 128)
    """
    from gfx._engine.pooling import embed_cells

    cells = prepare(adata, model, function="tl.embed", layer=layer, key_added=key_added, mod=mod, copy=copy)
    how = cells.pooling(pooling)
    encoder = cells.encoder(hidden_layer, device=device, dtype=dtype)
    tokens = cells.tokens
    vectors = embed_cells(encoder, tokens.ids, tokens.lengths, cells.model.vocabulary, how=how, batch_size=batch_size)
    params = cells.provenance(encoder) | {"hidden_layer": hidden_layer, "pooling": how}
    n_empty = int(np.isnan(vectors[:, 0]).sum())
    if n_empty:
        warnings.warn(
            f"{n_empty} of {len(vectors)} cells have no gene that the model knows; their embedding is NaN. "
            "Leave them out before `scanpy.pp.neighbors`.",
            UserWarning,
            stacklevel=2,
        )
    done = f"embedded {len(vectors):,} cells with {cells.model.name!r} on {encoder.device.type} in {params['dtype']}"
    cells.slots.write(done, params=params, obsm={"": vectors})
    return cells.result
