"""Effects of perturbed genes beside those of random ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx.get import deletion_cells_df, deletion_df, random_sets_df
from gfx.pl._figure import axes_for, figure_of, show_if_wanted
from gfx.pl._rows import draw_random, few_short_ticks, label_rows, place

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from mudata import MuData


def deletion(
    adata: AnnData | MuData,
    *,
    key: str | None = None,
    state: str | None = None,
    n_top: int | None = None,
    min_cells: int = 10,
    cmap: str = "viridis",
    figsize: tuple[float, float] | None = None,
    ax: Axes | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> Axes:
    """Draw how far cells move when genes are perturbed, beside random genes of the same rank in the same cells.

    A row a perturbation, the largest z on top. Grey: the random sets, a point each, with a bar from their 5th to their
    95th percentile. The diamond is the mean over cells of the perturbation, the thin line reaches from the 5th to the
    95th percentile of its cells. Only a diamond outside the grey says anything about the gene. Its colour tells how
    high the genes stand in the ranking; white if no cell has them.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.delete_genes`, :func:`gfx.tl.overexpress_genes` or :func:`gfx.tl.shift_genes`.
    key
        The `key_added` of that call, or its default name.
    state
        With states: draw the movement towards this one; `None` takes the goal.
    n_top
        Perturbations to draw, the largest z first; `None` draws all.
    min_cells
        Perturbations in fewer cells are left out.
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
    The axes. Its data: :func:`gfx.get.deletion_df`, :func:`gfx.get.random_sets_df` and
    :func:`gfx.get.deletion_cells_df`.

    Raises
    ------
    KeyError
        No such result or no such state.
    ValueError
        No perturbation has enough cells.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ["CD3D", "MS4A1"], model="mini", null=10)
    >>> ax = gfx.pl.deletion(adata, show=False)
    >>> ax.get_xlabel()
    'shift of the cell (1 - cosine)'
    """
    import matplotlib as mpl

    table = deletion_df(adata, key=key, min_cells=min_cells, mod=mod)
    cells = deletion_cells_df(adata, key=key, mod=mod)
    random = random_sets_df(adata, key=key, mod=mod) if "z" in table else None
    table, cells, random, value, label = _choose(table, cells, random, state)
    table = table[table[f"{value}_mean"].notna()]
    if table.empty:
        msg = f"There is nothing to draw: no perturbation was made in at least {min_cells} cells (`min_cells`)."
        raise ValueError(msg)
    table = table.head(n_top) if n_top is not None else table
    (ax,) = axes_for(None if ax is None else [ax], 1, figsize or (7.2, max(2.6, 1.3 + 0.36 * len(table))))
    colour, jitter = mpl.colormaps[cmap], np.random.default_rng(0)  # the same picture every time
    prefix = "toward_" if value == "toward" else ""
    for row, effect in enumerate(table.to_dict("records")):
        mean = effect[f"{value}_mean"]
        if random is not None:
            of = random.loc[random["perturbation"] == effect["perturbation"], f"{prefix}difference"]
            draw_random(ax, row, mean + of.to_numpy(), jitter)
        values = cells.loc[cells["perturbation"] == effect["perturbation"], value]
        ax.plot(np.percentile(values, [5, 95]), [row, row], color="0.25", linewidth=0.9, zorder=2)
        ranked = np.isfinite(effect["rank_mean"])
        face = colour(effect["rank_mean"]) if ranked else "white"
        ax.scatter(mean, row, marker="D", s=42, color=[face], edgecolors="black", linewidths=0.8, zorder=3)
    label_rows(
        ax,
        [f"{name} ({n:,})" for name, n in zip(table["perturbation"], table["n_cells"], strict=True)],
        [place(z, p) for z, p in zip(table[f"{prefix}z"], table[f"{prefix}p"], strict=True)]
        if random is not None
        else [],
    )
    ax.axvline(0, color="0.3", linewidth=0.8, linestyle=":", zorder=0)
    few_short_ticks(ax)
    ax.set_xlabel(label)
    ax.set_ylabel("perturbed genes (cells)")
    ax.spines[["top", "right"]].set_visible(False)
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), colour)
    bar = figure_of(ax).colorbar(scale, ax=ax, shrink=0.8, aspect=12, pad=0.02)
    bar.set_ticks([0, 1], labels=["top", "last"])
    bar.set_label("mean rank of the genes")
    bar.ax.invert_yaxis()
    show_if_wanted(show=show)
    return ax


def _choose(
    table: pd.DataFrame, cells: pd.DataFrame, random: pd.DataFrame | None, state: str | None
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame | None, str, str]:
    """Take the rows of the wanted state, if there are states; say what is drawn."""
    if "state" not in table:
        if state is not None:
            msg = f"`state={state!r}`, but genes were perturbed without states. Give `groupby=`, `start=` and `goal=`."
            raise KeyError(msg)
        return table, cells, random, "shift", "shift of the cell (1 - cosine)"
    chosen = table.loc[table["role"] == "goal", "state"].iloc[0] if state is None else state
    if chosen not in set(table["state"]):
        msg = f"Did not find the state {chosen!r}. Present: {sorted(set(table['state']))}."
        raise KeyError(msg)
    table, cells = table[table["state"] == chosen], cells[cells["state"] == chosen]
    random = None if random is None else random[random["state"] == chosen]
    return table, cells, random, "toward", f"movement towards {chosen} (change of cosine)"
