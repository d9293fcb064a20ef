"""Every gene of a screen against its rank, and those that stand out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx.get import screen_df
from gfx.pl._figure import axes_for, show_if_wanted
from gfx.pl._labels import name_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from mudata import MuData

_LABELS = {
    "shift": "shift beyond genes of like rank (1 - cosine)",
    "toward": "towards {goal} beyond genes of like rank (cosine)",
}

#: Genes to either side that the drawn band is smoothed over.
_ABOUT = 50


def screen(
    adata: AnnData | MuData,
    groups: str | Sequence[str] | None = None,
    *,
    effect: str | None = None,
    n_names: int = 15,
    names: str | None = None,
    key: str | None = None,
    min_cells: int = 10,
    figsize: tuple[float, float] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> list[Axes]:
    """Draw what every gene does beside genes of neighbouring rank, against its rank.

    Grey: genes that lie among those alike in rank and number of cells, within three robust standard deviations.
    Coloured: genes beyond; filled, where a network with random weights hardly ever puts a gene so far out (fdr 0.1).
    Each gene has limits of its own, `shift_low` and `shift_high` of the table; the band is their median over 101 genes
    of neighbouring rank, so that a gene in few cells may be grey beyond it. The farthest genes are named, as far as
    there is room.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.screen_genes`.
    groups
        Groups of the `groupby` of that call, a panel each; `None` is all cells.
    effect
        ``"shift"`` or ``"toward"``; `None` is ``"toward"`` if there is a goal.
    n_names
        How many genes to name.
    names
        Column of `var` with their names; `None` is `var_names`.
    key
        The `key_added` of that call.
    min_cells
        Genes in fewer cells are left out.
    figsize
        Size of a new figure in inches.
    ax
        Axes to draw on, one for each panel; `None` makes a figure.
    mod
        Modality of a MuData.
    show
        Call `matplotlib.pyplot.show`; `None` follows scanpy's setting.

    Returns
    -------
    The axes, a panel each. Their data: :func:`gfx.get.screen_df`.

    Raises
    ------
    KeyError
        No such result, group or effect, or no such column in `var`.
    ValueError
        No gene in enough cells, or a wrong number of axes.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.screen_genes(adata, model="mini", method="first_order", groupby="cell_type", n_probes=2)
    >>> [panel.get_title() for panel in gfx.pl.screen(adata, ["B cell", "T cell"], show=False)]
    ['B cell', 'T cell']
    """
    panels = [groups] if groups is None or isinstance(groups, str) else list(groups)
    tables = [screen_df(adata, group, key=key, min_cells=min_cells, names=names, mod=mod) for group in panels]
    if not all(map(len, tables)):
        msg = f"There is nothing to draw: no gene is in at least {min_cells} cells (`min_cells`)."
        raise ValueError(msg)
    there = [name for name in ("toward", "shift") if f"{name}_mean" in tables[0]]
    effect = there[0] if effect is None else effect
    if effect not in there:
        msg = f"Did not find the effect {effect!r}. Present: {there}."
        raise KeyError(msg)
    given = [ax] if ax is not None and not isinstance(ax, list | tuple | np.ndarray) else ax
    axes = axes_for(given, len(panels), figsize or (5.2 * len(panels), 4.2))
    named = []
    for panel, group, table in zip(axes, panels, tables, strict=True):
        rank, excess, z = (table[name].to_numpy() for name in ("rank_mean", f"{effect}_excess", f"{effect}_z"))
        low, high = (table[f"{effect}_{side}"].to_numpy() for side in ("low", "high"))
        out = (excess < low) | (excess > high)
        rare = out & (np.asarray(table.get(f"{effect}_fdr", z * np.nan)) <= 0.1)
        panel.scatter(rank[~out], excess[~out], s=6, color="0.7", linewidths=0, zorder=1)
        along = np.argsort(rank, kind="stable")
        along = along[np.isfinite(low[along])]
        if len(along):
            edges = _smooth(low[along]), _smooth(high[along])
            panel.fill_between(rank[along], *edges, color="0.9", linewidth=0, zorder=0)
        for some, face in ((out & ~rare, "none"), (rare, "C3")):
            panel.scatter(rank[some], excess[some], s=18, facecolors=face, edgecolors="C3", linewidths=0.8, zorder=2)
        panel.axhline(0, color="0.4", linewidth=0.6, zorder=1)
        panel.set(
            xlim=(-0.02, 1.02),
            xlabel="mean rank of the gene (0 first, 1 last)",
            title=group or table.attrs.get("start", "all cells"),
        )
        panel.margins(y=0.12)
        panel.spines[["top", "right"]].set_visible(False)
        far = np.flatnonzero(out)
        far = far[np.argsort(-np.abs(z[far]), kind="stable")[:n_names]]
        unnamed = np.setdiff1d(np.flatnonzero(out), far)
        others = np.column_stack([rank[unnamed], excess[unnamed]])
        named.append((table["gene"].to_numpy()[far].tolist(), rank[far], excess[far], others))
    axes[0].set_ylabel(_LABELS[effect].format(goal=tables[0].attrs.get("goal")))
    for panel, (genes, x, y, others) in zip(axes, named, strict=True):
        name_points(panel, genes, x, y, apart=2.5, others=others)
    show_if_wanted(show=show)
    return axes


def _smooth(values: np.ndarray) -> np.ndarray:
    """Take the median of each value and those about it: a band that differs from gene to gene is a brush."""
    half = min(_ABOUT, len(values) // 8)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, half, mode="reflect"), 2 * half + 1)
    return np.median(windows, axis=1)
