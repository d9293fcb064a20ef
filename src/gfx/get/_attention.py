"""Tables of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._keys import attention_keys
from gfx.get._result import find_result

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

_FUNCTION = "tl.attention"


def attention_df(
    adata: AnnData | MuData, *, key: str | None = None, min_cells: int = 1, mod: str | None = None
) -> pd.DataFrame:
    """Tabulate the attention that each gene receives, one row a gene, block and head.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.attention`.
    key
        The `key_added` of that call.
    min_cells
        Genes seen in fewer cells are left out.
    mod
        Modality of a MuData.

    Returns
    -------
    Columns `gene`, `block` and `head` (from 1), `attention`, `uniform` (what even attention would give), `ratio` of
    the two, `n_cells`.

    Raises
    ------
    KeyError
        No such result.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.attention(adata, model="mini")
    >>> gfx.get.attention_df(adata).columns.tolist()
    ['gene', 'block', 'head', 'attention', 'uniform', 'ratio', 'n_cells']
    """
    keys = attention_keys(key)
    found, result = find_result(adata, keys.uns, _FUNCTION, key=key, mod=mod)
    n_blocks, n_heads = int(result["n_blocks"]), int(result["n_heads"])
    seen = found.var[keys.var].to_numpy() >= max(min_cells, 1)
    values = np.asarray(found.varm[keys.varm])[seen]
    uniform = np.repeat(found.var[keys.var_uniform].to_numpy()[seen], n_blocks * n_heads)
    n_genes = int(seen.sum())
    return pd.DataFrame(
        {
            "gene": np.repeat(found.var_names.to_numpy()[seen], n_blocks * n_heads),
            "block": np.tile(np.repeat(np.arange(1, n_blocks + 1), n_heads), n_genes),
            "head": np.tile(np.arange(1, n_heads + 1), n_genes * n_blocks),
            "attention": values.ravel(),
            "uniform": uniform,
            "ratio": values.ravel() / uniform,
            "n_cells": np.repeat(found.var[keys.var].to_numpy()[seen], n_blocks * n_heads),
        }
    )


def attention_ranks_df(adata: AnnData | MuData, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate the attention by rank of the attended gene, one row a block, head and rank.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.attention`.
    key
        The `key_added` of that call.
    mod
        Modality of a MuData.

    Returns
    -------
    Columns `block` and `head` (from 1), `rank` (from 1, the top gene), `attention`, `uniform`, `ratio` and `n_cells`,
    the cells that have so many genes.

    Raises
    ------
    KeyError
        No such result.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.attention(adata, model="mini")
    >>> gfx.get.attention_ranks_df(adata)["rank"].min()
    np.int64(1)
    """
    _, result = find_result(adata, attention_keys(key).uns, _FUNCTION, key=key, mod=mod)
    ranks = np.asarray(result["ranks"])
    n_blocks, n_heads, n_ranks = ranks.shape
    uniform = np.tile(np.asarray(result["ranks_uniform"]), n_blocks * n_heads)
    return pd.DataFrame(
        {
            "block": np.repeat(np.arange(1, n_blocks + 1), n_heads * n_ranks),
            "head": np.tile(np.repeat(np.arange(1, n_heads + 1), n_ranks), n_blocks),
            "rank": np.tile(np.arange(1, n_ranks + 1), n_blocks * n_heads),
            "attention": ranks.ravel(),
            "uniform": uniform,
            "ratio": ranks.ravel() / uniform,
            "n_cells": np.tile(np.asarray(result["ranks_n_cells"]), n_blocks * n_heads),
        }
    )


def attention_heads_df(adata: AnnData | MuData, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate how each head spends its attention, one row a block and head.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.attention`.
    key
        The `key_added` of that call.
    mod
        Modality of a MuData.

    Returns
    -------
    Columns `block` and `head` (from 1); `entropy`, 1 for even attention and 0 for attention to one position;
    `special`, the share that goes to `<cls>` and `<eos>`.

    Raises
    ------
    KeyError
        No such result.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.attention(adata, model="mini")
    >>> gfx.get.attention_heads_df(adata).shape
    (16, 4)
    """
    _, result = find_result(adata, attention_keys(key).uns, _FUNCTION, key=key, mod=mod)
    n_blocks, n_heads = int(result["n_blocks"]), int(result["n_heads"])
    return pd.DataFrame(
        {
            "block": np.repeat(np.arange(1, n_blocks + 1), n_heads),
            "head": np.tile(np.arange(1, n_heads + 1), n_blocks),
            "entropy": np.asarray(result["entropy"]).ravel(),
            "special": np.asarray(result["special"]).ravel(),
        }
    )
