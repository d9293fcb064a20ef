"""Tables of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._docs import shared
from gfx._results import find

if TYPE_CHECKING:
    from gfx._types import Data


def _by_head(values: np.ndarray, inner: dict[str, np.ndarray]) -> pd.DataFrame:
    """One row a network layer, head and inner entry of `values`, `(n_layers, n_heads, n)`, beside uniform attention."""
    n_layers, n_heads, n = values.shape
    table = pd.DataFrame(
        {
            "layer": np.repeat(np.arange(1, n_layers + 1), n_heads * n),
            "head": np.tile(np.repeat(np.arange(1, n_heads + 1), n), n_layers),
            **{name: np.tile(column, n_layers * n_heads) for name, column in inner.items()},
            "attention": values.ravel(),
        }
    )
    return table.assign(ratio=table["attention"] / table["uniform"])


@shared()
def attention_df(adata: Data, *, key: str | None = None, min_cells: int = 1, mod: str | None = None) -> pd.DataFrame:
    """Tabulate the attention that each gene receives, one row per gene, network layer and head.

    Parameters
    ----------
    {after_attention}
    {key}
    {min_cells}
    {mod}

    Returns
    -------
    Columns `gene`; `layer` (network layer) and `head`, both counted from 1; `attention`, the mean over the cells that
    express the gene; `uniform`, the attention that the gene would receive under uniform attention; `ratio`, which is
    `attention` divided by `uniform`; and `n_cells`.

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
    ['gene', 'layer', 'head', 'attention', 'uniform', 'ratio', 'n_cells']
    """
    result = find(adata, "tl.attention", key=key, mod=mod)
    n_cells = result.read("var", "n_cells").to_numpy()
    seen = n_cells >= max(min_cells, 1)
    n_layers, n_heads = np.shape(result.uns["entropy"])
    values = np.asarray(result.read("varm"))[seen].T.reshape(n_layers, n_heads, seen.sum())
    genes = {
        "number": np.arange(seen.sum()),
        "gene": result.adata.var_names.to_numpy()[seen],
        "uniform": result.read("var", "uniform").to_numpy()[seen],
        "n_cells": n_cells[seen],
    }
    table = _by_head(values, genes).sort_values("number", kind="stable", ignore_index=True)
    return table[["gene", "layer", "head", "attention", "uniform", "ratio", "n_cells"]]


@shared()
def attention_ranks_df(adata: Data, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate attention by the rank of the attended gene, one row a network layer, head and rank.

    Parameters
    ----------
    {after_attention}
    {key}
    {mod}

    Returns
    -------
    Columns `layer` and `head` (from 1), `rank` (1 is the highest), `attention`, `uniform` (what uniform attention would
    give), `ratio` of the two, and `n_cells`, the cells that have a gene of this rank.

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
    uns = find(adata, "tl.attention", key=key, mod=mod).uns
    values, uniform = np.asarray(uns["ranks"]), np.asarray(uns["ranks_uniform"])
    ranks = {"rank": np.arange(1, len(uniform) + 1), "uniform": uniform, "n_cells": np.asarray(uns["ranks_n_cells"])}
    return _by_head(values, ranks)[["layer", "head", "rank", "attention", "uniform", "ratio", "n_cells"]]


@shared()
def attention_heads_df(adata: Data, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate how each head distributes its attention, one row a network layer and head.

    Parameters
    ----------
    {after_attention}
    {key}
    {mod}

    Returns
    -------
    Columns `layer` and `head` (from 1); `entropy`, relative to that of uniform attention: 1 for uniform attention, 0
    for attention to one position; `special`, the fraction of attention to `<cls>` and `<eos>`.

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
    uns = find(adata, "tl.attention", key=key, mod=mod).uns
    layer, head = np.indices(np.shape(uns["entropy"])) + 1
    columns = {"layer": layer, "head": head, "entropy": uns["entropy"], "special": uns["special"]}
    return pd.DataFrame({name: np.ravel(values) for name, values in columns.items()})
