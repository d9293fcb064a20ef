"""Effects of deleted genes, with their spread over cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx.get import deletion_cells_df, deletion_df
from gfx.pl._figure import axes_for, figure_of, show_if_wanted

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from mudata import MuData

#: Points drawn per perturbation at most; the boxes use all cells.
_MAX_POINTS = 300

#: Shifts below this are rounding; on the logarithmic axis they stand here.
_SMALLEST_SHIFT = 1e-7


def deletion(
    adata: AnnData | MuData,
    *,
    key: str | None = None,
    state: str | None = None,
    n_top: int | None = None,
    cmap: str = "viridis",
    figsize: tuple[float, float] | None = None,
    ax: Axes | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> Axes:
    """Draw how far cells move when genes are deleted, the largest mean effect on top.

    Boxes hold the middle half of the cells, with the median as a line and the mean as a diamond; whiskers reach from
    the 5th to the 95th percentile; points are single cells. The colour tells how high the deleted genes stand in the
    ranking: a deleted gene moves all genes behind it up by one position, which shifts a cell by itself, so compare
    boxes of similar colour. Shifts are drawn on a logarithmic axis, movements towards a state on a linear one.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.delete_genes`.
    key
        The `key_added` of that call.
    state
        With states: draw the movement towards this one; `None` takes the goal.
    n_top
        Perturbations to draw, the largest effects first; `None` draws all.
    cmap
        Colour map for the mean rank.
    figsize
        Size of a new figure in inches.
    ax
        Axes to draw on; `None` makes a figure.
    mod
        Modality of a MuData.
    show
        Call `matplotlib.pyplot.show`; `None` follows scanpy's setting.

    Returns
    -------
    The axes. Its data: :func:`gfx.get.deletion_df` and :func:`gfx.get.deletion_cells_df`.

    Raises
    ------
    KeyError
        No such result or no such state.
    ValueError
        No cell has any of the deleted genes.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ["CD3D", "MS4A1"], model="mini")
    >>> ax = gfx.pl.deletion(adata, show=False)
    >>> ax.get_xlabel()
    'shift of the cell (1 - cosine)'
    """
    import matplotlib as mpl

    table, cells = deletion_df(adata, key=key, mod=mod), deletion_cells_df(adata, key=key, mod=mod)
    if "state" in table:
        chosen = table.loc[table["role"] == "goal", "state"].iloc[0] if state is None else state
        if chosen not in set(table["state"]):
            msg = f"Did not find the state {chosen!r}. Present: {sorted(set(table['state']))}."
            raise KeyError(msg)
        table, cells = table[table["state"] == chosen], cells[cells["state"] == chosen]
        value, label = "toward", f"movement towards {chosen} (change of cosine)"
    elif state is not None:
        msg = f"`state={state!r}`, but genes were deleted without states. Run `gfx.tl.delete_genes(..., groupby=...)`."
        raise KeyError(msg)
    else:
        value, label = "shift", "shift of the cell (1 - cosine)"
        cells = cells.assign(shift=cells["shift"].clip(lower=_SMALLEST_SHIFT))
    table = table[table["n_cells"] > 0].sort_values(f"{value}_mean", ascending=False, kind="stable")
    if table.empty:
        msg = "There is nothing to draw: no cell has any of the deleted genes."
        raise ValueError(msg)
    table = table.head(n_top) if n_top is not None else table
    if figsize is None:
        figsize = (6.4, 1.2 + 0.36 * len(table))
    (ax,) = axes_for(None if ax is None else [ax], 1, figsize)
    colour = mpl.colormaps[cmap]
    jitter = np.random.default_rng(0)  # the same picture every time
    for place, row in enumerate(table.itertuples()):
        values = cells.loc[cells["perturbation"] == row.perturbation, value].to_numpy()
        points = values if len(values) <= _MAX_POINTS else jitter.choice(values, _MAX_POINTS, replace=False)
        ax.scatter(
            points,
            place + jitter.uniform(-0.28, 0.28, len(points)),
            s=4,
            color="0.6",
            alpha=0.5,
            linewidths=0,
            zorder=1,
        )
        ax.boxplot(
            values,
            positions=[place],
            orientation="horizontal",
            widths=0.55,
            whis=(5, 95),
            showfliers=False,
            showmeans=True,
            meanprops={"marker": "D", "markersize": 4, "markerfacecolor": "white", "markeredgecolor": "black"},
            patch_artist=True,
            boxprops={"facecolor": (*colour(row.rank_mean)[:3], 0.65), "linewidth": 0.8},
            medianprops={"color": "black"},
            whiskerprops={"linewidth": 0.8},
            capprops={"linewidth": 0.8},
            manage_ticks=False,
            zorder=2,
        )
    ax.set_yticks(range(len(table)), [f"{row.perturbation} ({row.n_cells:,})" for row in table.itertuples()])
    ax.set_ylim(len(table) - 0.4, -0.6)
    if value == "shift":
        ax.set_xscale("log")
    else:
        ax.axvline(0, color="0.3", linewidth=0.8, linestyle=":", zorder=0)
    ax.set_xlabel(label)
    ax.set_ylabel("deleted genes (cells)")
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), colour)
    bar = figure_of(ax).colorbar(scale, ax=ax, shrink=0.8, aspect=12)
    bar.set_ticks([0, 1], labels=["top", "last"])
    bar.set_label("mean rank of the deleted genes")
    bar.ax.invert_yaxis()
    show_if_wanted(show=show)
    return ax
