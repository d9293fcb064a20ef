"""Plot of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx._docs import shared
from gfx.get import attention_heads_df, attention_ranks_df
from gfx.pl._style import axes_for, figure_of, finish

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes

    from gfx._types import Data

_N_BINS = 40


@shared()
def attention(
    adata: Data,
    *,
    key: str | None = None,
    min_cells: int = 10,
    cmap: str = "viridis",
    figsize: tuple[float, float] | None = None,
    ax: Sequence[Axes] | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> list[Axes]:
    """Draw how uniformly each head attends, and to which ranks.

    Left: relative entropy of each head's attention, 1 for uniform attention. Right: attention by rank of the attended
    gene, divided by uniform attention (dotted line). A thin line is a head, a thick one the mean of a network layer.

    Parameters
    ----------
    {after_attention}
    {key}
    min_cells
        Ranks that fewer cells than this have are left out.
    {cmap}
    {figsize}
    {two_axes}
    {mod}
    {show}

    Returns
    -------
    The two axes. Their data: :func:`gfx.get.attention_heads_df` and :func:`gfx.get.attention_ranks_df`.

    Raises
    ------
    KeyError
        No such result.
    ValueError
        Another number of axes than two, or no rank that enough cells have.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.attention(adata, model="mini")
    >>> heads, ranks = gfx.pl.attention(adata, show=False)
    >>> heads.get_xlabel(), heads.get_ylabel()
    ('head', 'network layer')
    """
    import matplotlib as mpl

    heads, ranks = attention_heads_df(adata, key=key, mod=mod), attention_ranks_df(adata, key=key, mod=mod)
    ranks = ranks[ranks["n_cells"] >= min_cells]
    if ranks.empty:
        msg = f"There is nothing to draw: no rank is in at least {min_cells} cells (`min_cells`)."
        raise ValueError(msg)
    entropy = heads.pivot(index="layer", columns="head", values="entropy")
    n_layers, n_heads = entropy.shape
    axes = axes_for(ax, 2, figsize or (6.8 + 0.35 * n_heads, 3.6), widths=(1.4 + 0.35 * n_heads, 5))
    left, right = axes
    image = left.imshow(entropy.to_numpy(), cmap=cmap, vmax=1, aspect="auto", origin="lower")
    left.set_xticks(range(n_heads), entropy.columns.astype(str))
    left.set_yticks(range(n_layers), entropy.index.astype(str))
    left.set(xlabel="head", ylabel="network layer")
    left.set_title("uniformity of attention", fontsize="medium")
    figure_of(left).colorbar(image, ax=left, label="entropy / log(length)")

    colours = mpl.colormaps["tab10" if n_layers <= 10 else "tab20"](np.arange(n_layers) % 20)
    for colour, (layer, of_layer) in zip(colours, ranks.groupby("layer"), strict=True):
        for _, of_head in of_layer.groupby("head"):
            right.plot(*_profile(of_head), color=colour, linewidth=0.6, alpha=0.5)
        right.plot(*_profile(of_layer), color=colour, linewidth=2, label=str(layer))
    right.axhline(1, color="0.3", linewidth=0.8, linestyle=":")
    right.set_xscale("log")
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter("{x:g}")
    right.xaxis.set_major_formatter("{x:g}")
    right.set(xlabel="rank of the attended gene (1 is the highest)", ylabel="attention / uniform attention")
    right.set_title("attention by rank", fontsize="medium")
    right.legend(title="layer", fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    finish(right, show=show)
    return axes


def _profile(table: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Average neighbouring ranks in bins of equal width on the logarithm, weighted by cells."""
    bins = np.digitize(table["rank"], np.geomspace(1, table["rank"].max() + 1, _N_BINS))
    sums = table[["rank", "ratio"]].mul(table["n_cells"], axis=0).assign(n_cells=table["n_cells"]).groupby(bins).sum()
    return sums["rank"] / sums["n_cells"], sums["ratio"] / sums["n_cells"]
