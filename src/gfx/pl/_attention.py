"""Attention per block and head, and by rank of the attended gene."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx.get import attention_heads_df, attention_ranks_df
from gfx.pl._figure import axes_for, figure_of, show_if_wanted

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from mudata import MuData

_N_BINS = 40


def attention(
    adata: AnnData | MuData,
    *,
    key: str | None = None,
    min_cells: int = 10,
    cmap: str = "viridis",
    figsize: tuple[float, float] | None = None,
    ax: Sequence[Axes] | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> list[Axes]:
    """Draw how evenly each head attends, and which ranks it attends to.

    Left: entropy of each head's attention, 1 when it looks at all genes alike. Right: attention by rank of the attended
    gene, divided by what even attention would give (the dotted line); a thin line is a head, a thick one its block.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.attention`.
    key
        The `key_added` of that call.
    min_cells
        Ranks that fewer cells reach are left out.
    cmap
        Colour map of the left panel.
    figsize
        Size of a new figure in inches.
    ax
        Two axes to draw on; `None` makes a figure.
    mod
        Modality of a MuData.
    show
        Call `matplotlib.pyplot.show`; `None` follows scanpy's setting.

    Returns
    -------
    The two axes. Their data: :func:`gfx.get.attention_heads_df` and :func:`gfx.get.attention_ranks_df`.

    Raises
    ------
    KeyError
        No such result.
    ValueError
        Another number of axes than two, or no rank that enough cells reach.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.attention(adata, model="mini")
    >>> heads, ranks = gfx.pl.attention(adata, show=False)
    >>> heads.get_xlabel(), heads.get_ylabel()
    ('head', 'block (layer)')
    """
    import matplotlib as mpl

    heads, ranks = attention_heads_df(adata, key=key, mod=mod), attention_ranks_df(adata, key=key, mod=mod)
    ranks = ranks[ranks["n_cells"] >= min_cells]
    if ranks.empty:
        msg = f"No rank is reached by {min_cells} cells; lower `min_cells`."
        raise ValueError(msg)
    n_blocks, n_heads = int(heads["block"].max()), int(heads["head"].max())
    if figsize is None:
        figsize = (6.8 + 0.35 * n_heads, 3.6)
    left, right = axes_for(ax, 2, figsize, widths=(1.4 + 0.35 * n_heads, 5))
    image = left.imshow(
        heads["entropy"].to_numpy().reshape(n_blocks, n_heads), cmap=cmap, vmax=1, aspect="auto", origin="lower"
    )
    left.set_xticks(range(n_heads), [str(head) for head in range(1, n_heads + 1)])
    left.set_yticks(range(n_blocks), [str(block) for block in range(1, n_blocks + 1)])
    left.set_xlabel("head")
    left.set_ylabel("block (layer)")
    left.set_title("evenness of attention", fontsize="medium")
    figure_of(left).colorbar(image, ax=left, label="entropy / log(length)")

    colours = mpl.colormaps["tab10" if n_blocks <= 10 else "tab20"](np.arange(n_blocks) % 20)
    for block, colour in zip(range(1, n_blocks + 1), colours, strict=True):
        of_block = ranks[ranks["block"] == block]
        for _, of_head in of_block.groupby("head"):
            right.plot(*_profile(of_head), color=colour, linewidth=0.6, alpha=0.5)
        right.plot(*_profile(of_block), color=colour, linewidth=2, label=str(block))
    right.axhline(1, color="0.3", linewidth=0.8, linestyle=":")
    right.set_xscale("log")
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter("{x:g}")
    right.xaxis.set_major_formatter("{x:g}")
    right.set_xlabel("rank of the attended gene (1 = top)")
    right.set_ylabel("attention / even attention")
    right.set_title("attention by rank", fontsize="medium")
    right.legend(title="block", fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    show_if_wanted(show=show)
    return [left, right]


def _profile(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbouring ranks in bins of equal width on the logarithm, weighted by cells."""
    edges = np.geomspace(1, frame["rank"].max() + 1, _N_BINS)
    at = np.digitize(frame["rank"], edges)
    cells = frame["n_cells"].to_numpy()
    weight = np.bincount(at, cells)
    filled = weight > 0
    rank = np.bincount(at, cells * frame["rank"].to_numpy())[filled] / weight[filled]
    ratio = np.bincount(at, cells * frame["ratio"].to_numpy())[filled] / weight[filled]
    return rank, ratio
