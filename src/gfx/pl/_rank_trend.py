"""How effects follow the rank of the gene, whatever the gene."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx.get import deletion_df, rank_trend_df
from gfx.pl._figure import axes_for, show_if_wanted
from gfx.pl._labels import name_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from mudata import MuData

_TITLES = {"shift": "model", "shift_random_weights": "random weights"}


def rank_trend(
    adata: AnnData | MuData,
    *,
    key: str | None = None,
    min_cells: int = 10,
    figsize: tuple[float, float] | None = None,
    ax: Sequence[Axes] | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> list[Axes]:
    """Draw the effect of random genes against their rank, in the model and in a network with random weights.

    Grey: random genes, each in one random cell, with the fitted line and twice its standard deviation. Diamonds are the
    perturbations, at their mean rank, named as far as there is room. If both panels look alike, and the diamonds lie in
    the band, effects tell where genes stand and not what they are.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.delete_genes`, :func:`gfx.tl.overexpress_genes` or :func:`gfx.tl.shift_genes` with `null`.
    key
        The `key_added` of that call, or its default name.
    min_cells
        Perturbations in fewer cells are left out.
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
    The axes: the model, and random weights. Their data: :func:`gfx.get.rank_trend_df` and :func:`gfx.get.deletion_df`.

    Raises
    ------
    KeyError
        No such result, or one without random genes.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ["CD3D", "MS4A1"], model="mini", null=10)
    >>> [panel.get_title() for panel in gfx.pl.rank_trend(adata, show=False)]
    ['model', 'random weights']
    """
    sample = rank_trend_df(adata, key=key, mod=mod)
    table = deletion_df(adata, key=key, min_cells=min_cells, mod=mod).drop_duplicates("perturbation")
    axes = axes_for(ax, 2, figsize or (8.4, 3.6))
    line, named = np.linspace(0, 1, 50), []
    for panel, (column, title) in zip(axes, _TITLES.items(), strict=True):
        drawn = sample[sample[column] > 0]
        panel.scatter(drawn["rank"], drawn[column], s=8, color="0.6", alpha=0.6, linewidths=0, zorder=1)
        trend = sample.attrs["trend" + column.removeprefix("shift")]
        middle = trend["intercept"] + trend["slope"] * line
        panel.plot(line, np.exp(middle), color="0.3", linewidth=1, zorder=2)
        low, high = (np.exp(middle + side * trend["sd"]) for side in (-2, 2))
        panel.fill_between(line, low, high, color="0.85", linewidth=0, zorder=0)
        effect = "shift_mean" if column == "shift" else column
        known = table[(table[effect] > 0) & table["rank_mean"].notna()]
        panel.scatter(
            known["rank_mean"],
            known[effect],
            marker="D",
            s=36,
            color="white",
            edgecolors="black",
            linewidths=1,
            zorder=3,
        )
        panel.set_yscale("log")
        panel.set_xlim(-0.02, 1.02)
        panel.set_title(title)
        panel.set_xlabel("rank of the gene (0 first, 1 last)")
        panel.spines[["top", "right"]].set_visible(False)
        named.append((known["perturbation"].tolist(), known["rank_mean"].to_numpy(), known[effect].to_numpy()))
    axes[0].set_ylabel("shift of the cell (1 - cosine)")
    for panel, of_panel in zip(axes, named, strict=True):
        name_points(panel, *of_panel, apart=4)
    show_if_wanted(show=show)
    return axes
