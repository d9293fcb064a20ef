"""Plot of a screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx._docs import shared
from gfx.get import screen_df
from gfx.pl._style import BAND, GUIDE, axes_for, finish, label_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from gfx._types import Data

_LABELS = {
    "shift": "excess shift over genes of similar rank (1 - cosine)",
    "toward": "excess shift toward {goal} over genes of similar rank (cosine)",
}

#: Genes to either side that the drawn band is smoothed over.
_ABOUT = 50


@shared()
def screen(
    adata: Data,
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
) -> list[Axes] | None:
    """Draw the excess of every gene of a screen against its rank.

    Grey genes lie within three robust standard deviations of genes that are similar in rank and number of cells; red
    genes lie beyond. Filled red genes are also significant (FDR 0.1) compared with a model with random weights. Each
    gene has limits of its own, `shift_low` and `shift_high` of the table; the band is their median over 101 genes of
    similar rank, so a gene in few cells may be grey beyond it. The genes with the largest absolute z-score are named,
    as far as there is room.

    Parameters
    ----------
    {after_screening}
    groups
        Groups of the `groupby` of that call, a panel each. `None` draws all cells.
    effect
        ``"shift"`` or ``"toward"``. `None` is ``"toward"`` if there is a goal.
    n_names
        Number of genes to name.
    {names}
    {key}
    {min_cells}
    {figsize}
    ax
        Axes to draw on, one for each panel. `None` makes a new figure.
    {mod}
    {show}

    Returns
    -------
    The axes, a panel each, unless the figure is shown. Their data: :func:`gfx.get.screen_df`.

    Raises
    ------
    KeyError
        No such result, group or effect, or no such column in `var`.
    ValueError
        No gene in enough cells, or a wrong number of axes.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy(30)
    >>> genes = ["CD3D", "CD3E", "CD79A", "MS4A1"]
    >>> gfx.tl.screen_genes(adata, genes=genes, model="mini", groupby="cell_type", controls=None)
    >>> [panel.get_title() for panel in gfx.pl.screen(adata, ["B cell", "T cell"], show=False)]
    ['B cell', 'T cell']
    """
    panels = [groups] if groups is None or isinstance(groups, str) else list(groups)
    tables = [screen_df(adata, group, key=key, min_cells=min_cells, names=names, mod=mod) for group in panels]
    if not all(map(len, tables)):
        msg = f"There is nothing to draw: no gene is in at least {min_cells} cells (`min_cells`)."
        raise ValueError(msg)
    effects = [name for name in ("toward", "shift") if f"{name}_mean" in tables[0]]
    effect = effects[0] if effect is None else effect
    if effect not in effects:
        msg = f"Did not find the effect {effect!r}. Present: {effects}."
        raise KeyError(msg)
    axes = axes_for(ax, len(panels), figsize or (5.2 * len(panels), 4.2))
    labels = []
    for panel, group, table in zip(axes, panels, tables, strict=True):
        rank, excess, z = (table[name].to_numpy() for name in ("rank_mean", f"{effect}_excess", f"{effect}_z"))
        low, high = (table[f"{effect}_{side}"].to_numpy() for side in ("low", "high"))
        beyond = (excess < low) | (excess > high)
        significant = beyond & (np.asarray(table.get(f"{effect}_fdr", z * np.nan)) <= 0.1)
        panel.scatter(rank[~beyond], excess[~beyond], s=6, color="0.7", linewidths=0, zorder=1)
        along = np.argsort(rank, kind="stable")
        along = along[np.isfinite(low[along])]
        if len(along):
            edges = _smooth(low[along]), _smooth(high[along])
            panel.fill_between(rank[along], *edges, color=BAND, linewidth=0, zorder=0)
        for genes, face in ((beyond & ~significant, "none"), (significant, "C3")):
            panel.scatter(rank[genes], excess[genes], s=18, facecolors=face, edgecolors="C3", linewidths=0.8, zorder=2)
        panel.axhline(0, color=GUIDE, linewidth=0.6, zorder=1)
        title = group or table.attrs.get("start", "all cells")
        panel.set(xlim=(-0.02, 1.02), xlabel="mean rank of the gene (0 first, 1 last)", title=title)
        panel.margins(y=0.12)
        far = np.flatnonzero(beyond)
        far = far[np.argsort(-np.abs(z[far]), kind="stable")[:n_names]]
        unnamed = np.setdiff1d(np.flatnonzero(beyond), far)
        others = np.column_stack([rank[unnamed], excess[unnamed]])
        labels.append((table["gene"].to_numpy()[far].tolist(), rank[far], excess[far], others))
    axes[0].set_ylabel(_LABELS[effect].format(goal=tables[0].attrs.get("goal")))
    for panel, (genes, x, y, others) in zip(axes, labels, strict=True):
        label_points(panel, genes, x, y, others=others)
    return finish(axes, given=ax, show=show)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Take the median of each value and those around it."""
    half = min(_ABOUT, len(values) // 8)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, half, mode="reflect"), 2 * half + 1)
    return np.median(windows, axis=1)
