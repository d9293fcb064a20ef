"""What genes perturbed together do beyond what they do one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx.get import random_sets_df, synergy_df
from gfx.pl._figure import axes_for, show_if_wanted
from gfx.pl._rows import draw_random, few_short_ticks, label_rows, place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from mudata import MuData

_TITLES = {
    "on_shifts": "beyond the sum of shifts",
    "on_vectors": "beyond the sum of displacements",
}


def synergy(
    adata: AnnData | MuData,
    *,
    key: str | None = None,
    n_top: int | None = None,
    min_cells: int = 10,
    figsize: tuple[float, float] | None = None,
    ax: Sequence[Axes] | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> list[Axes]:
    """Draw what genes perturbed together do beyond what they do one by one, beside random sets.

    A row a set, a panel a measure (see :func:`gfx.get.synergy_df`). Grey: random sets of genes of neighbouring rank in
    the same cells, a point each, with a bar from their 5th to their 95th percentile: they have an excess, too. The
    diamond is the mean over cells, the line its 95 % interval.

    Parameters
    ----------
    adata
        After perturbing tuples of genes.
    key
        The `key_added` of that call, or its default name.
    n_top
        Sets to draw, the largest z first; `None` draws all.
    min_cells
        Sets in fewer cells are left out.
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
    The axes, one a measure. Their data: :func:`gfx.get.synergy_df` and :func:`gfx.get.random_sets_df`.

    Raises
    ------
    KeyError
        No such result, or no genes perturbed together in it.
    ValueError
        No set has enough cells.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ("CD3D", "CD3E"), model="mini", null=10)
    >>> len(gfx.pl.synergy(adata, show=False))
    2
    """
    table = synergy_df(adata, key=key, min_cells=min_cells, mod=mod)
    table = table[table["on_vectors_mean"].notna()]
    if table.empty:
        msg = f"There is nothing to draw: no set was perturbed in at least {min_cells} cells (`min_cells`)."
        raise ValueError(msg)
    table = table.head(n_top) if n_top is not None else table
    random = random_sets_df(adata, key=key, mod=mod) if table["on_vectors_z"].notna().any() else None
    if random is not None:
        random = random.drop_duplicates(["perturbation", "genes", "difference"])  # one row a set, whatever the states
    axes = axes_for(ax, 2, figsize or (9.6, max(2.8, 1.6 + 0.4 * len(table))))
    jitter = np.random.default_rng(0)
    for panel, (measure, title) in zip(axes, _TITLES.items(), strict=True):
        for row, excess in enumerate(table.to_dict("records")):
            mean = excess[f"{measure}_mean"]
            if random is not None:
                of = random.loc[random["perturbation"] == excess["perturbation"], f"{measure}_difference"]
                draw_random(panel, row, mean + of.to_numpy(), jitter)
            interval = [excess[f"{measure}_low"], excess[f"{measure}_high"]]
            panel.plot(interval, [row, row], color="black", linewidth=1.2, zorder=2)
            panel.scatter(mean, row, marker="D", s=36, color="white", edgecolors="black", linewidths=1, zorder=3)
        names = [f"{name} ({n:,})" for name, n in zip(table["perturbation"], table["n_cells"], strict=True)]
        notes = [place(z, p) for z, p in zip(table[f"{measure}_z"], table[f"{measure}_p"], strict=True)]
        label_rows(panel, names if panel is axes[0] else [""] * len(names), notes)
        panel.axvline(0, color="0.3", linewidth=0.8, linestyle=":", zorder=0)
        few_short_ticks(panel)
        panel.set_title(title)
        panel.set_xlabel("excess of the shift (1 - cosine)")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("genes perturbed together (cells)")
    show_if_wanted(show=show)
    return axes
