"""How much each gene looks like a class, and which genes are told apart best and worst."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx.get import gene_scores_df
from gfx.pl._figure import axes_for, figure_of, show_if_wanted

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from mudata import MuData

#: Half the width of a strip, and where the names beside it begin, if strips are 1 apart.
_HALF, _NAMES = 0.2, 0.28

#: Room for names before the first gene and behind the last one, and how far they stand off, as shares of all genes.
_ROOM, _OFF = 0.28, 0.04

#: Lines of names in points.
_LINE = 10.0


def gene_scores(
    adata: AnnData | MuData,
    group: str | None = None,
    *,
    class_name: str | None = None,
    n_names: int = 5,
    names: str | None = None,
    key: str | None = None,
    min_cells: int = 10,
    figsize: tuple[float, float] | None = None,
    ax: Axes | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> Axes:
    """Draw how much each gene looks like a class: genes held out by label, or predicted genes by score.

    After :func:`gfx.tl.classify_genes`: a strip a label, a point a gene, scored by models that never saw its label. Red
    genes are taken for another class than their label says. The highest and lowest genes of each strip are named: those
    told with most confidence, and those most wrong.

    After :func:`gfx.tl.predict_genes`: all genes from the highest score to the lowest. Blue strokes below mark genes
    whose label the model has learnt; named are the highest and lowest of the others.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.classify_genes` or :func:`gfx.tl.predict_genes`.
    group
        A group of the `groupby` of :func:`gfx.tl.predict_genes`; `None` is all cells.
    class_name
        The class whose score is drawn; `None` is the last one.
    n_names
        How many genes to name at either end; fewer where there is no room.
    names
        Column of `var` with their names; `None` is `var_names`.
    key
        The `key_added` of that call, or its default name; `None` takes the only result there is.
    min_cells
        Genes scored in fewer cells are left out.
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
    The axes. Its data: :func:`gfx.get.gene_scores_df`.

    Raises
    ------
    KeyError
        No such result, group or class, several results and no `key`, or no such column in `var`.
    ValueError
        No gene was scored in enough cells.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> t_cell = ["CD3D", "CD3E", "CD3G", "CD2", "IL7R", "TRAT1", "CD5", "CD27"]
    >>> b_cell = ["MS4A1", "CD79A", "CD79B", "CD19", "BANK1", "BLK", "HLA-DRA", "CD74"]
    >>> labels = {"T": t_cell, "B": b_cell}
    >>> gfx.tl.classify_genes(adata, labels, model="mini", method="linear_probe", n_repeats=1)
    >>> gfx.pl.gene_scores(adata, min_cells=1, show=False).get_ylabel()
    "probability of 'B'"
    """
    table = gene_scores_df(adata, group, key=key, min_cells=min_cells, names=names, mod=mod)
    if table.empty:
        msg = f"There is nothing to draw: no gene was scored in at least {min_cells} cells (`min_cells`)."
        raise ValueError(msg)
    classes = table.attrs["classes"]
    class_name = classes[-1] if class_name is None else class_name
    if class_name not in classes:
        msg = f"Did not find the class {class_name!r}. Present: {classes}."
        raise KeyError(msg)
    score = f"score_{class_name}"
    table = table.sort_values(score, ascending=False, kind="stable")
    held_out = "label" in table
    wide = min(2.1 * len(classes) + 2.2, 16) if held_out else 6.4
    (ax,) = axes_for(None if ax is None else [ax], 1, figsize or (wide, 4.6))
    if len(classes) == 2:
        ax.axhline(0.5, color="0.3", linewidth=0.8, linestyle=":", zorder=0)
    ax.set(ylim=(-0.03, 1.03), ylabel=f"probability of {class_name!r}")
    draw = _draw_strips if held_out else _draw_sorted
    columns = draw(ax, table, score, n_names)
    if group is not None:
        ax.set_title(group)
    ax.spines[["top", "right"]].set_visible(False)
    for column in columns:
        _name_in_column(ax, *column)
    show_if_wanted(show=show)
    return ax


def _draw_strips(ax: Axes, table: pd.DataFrame, score: str, n_names: int) -> list[tuple]:
    """Draw genes by their label; return what to name, and where."""
    jitter = np.random.default_rng(0)  # the same picture every time
    classes, columns = table.attrs["classes"], []
    for strip, label in enumerate(classes):
        genes = table[table["label"] == label]
        y = genes[score].to_numpy()
        ends = _ends(len(genes), n_names)
        x = jitter.uniform(-_HALF, _HALF, len(genes))
        x[ends] = np.abs(x[ends])  # named genes stand on the side of their names
        x += strip
        wrong = (genes["predicted"] != label).to_numpy()
        for some, colour in ((~wrong, "0.6"), (wrong, "C3")):
            ax.scatter(x[some], y[some], s=12, color=colour, alpha=0.8, linewidths=0, zorder=2)
        columns.append((genes["gene"].to_numpy()[ends], x[ends], y[ends], strip + _NAMES))
    ax.set_xticks(range(len(classes)), [f"{label}\n({np.sum(table['label'] == label):,} genes)" for label in classes])
    ax.set(xlim=(-0.4, len(classes) - 0.3), xlabel="label of the gene")
    for colour, label in (("0.6", "predicted as labelled"), ("C3", "otherwise")):
        ax.scatter([], [], s=12, color=colour, linewidths=0, label=label)
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return columns


def _draw_sorted(ax: Axes, table: pd.DataFrame, score: str, n_names: int) -> list[tuple]:
    """Draw genes from the highest score to the lowest; return what to name, and where."""
    import matplotlib as mpl

    n, genes, learnt = len(table), table["gene"].to_numpy(), table["learnt"].to_numpy(dtype=bool)
    x, y = np.arange(1, n + 1), table[score].to_numpy()
    size = 6 if n > 500 else 14
    ax.scatter(x, y, s=size, color="0.6", linewidths=0, label=f"all genes ({n:,})", zorder=2)
    below = np.full(learnt.sum(), -0.07)  # beside the points, which may be too many to tell colours apart
    ax.plot(
        x[learnt],
        below,
        linestyle="none",
        marker="|",
        markersize=9,
        markeredgewidth=0.7,
        alpha=0.6,
        color="C0",
        label=f"learnt ({learnt.sum():,})",
        zorder=2,
    )
    ticks = mpl.ticker.MaxNLocator(4, integer=True).tick_values(0, n)
    ax.set_xticks([tick for tick in ticks if 0 <= tick <= n])
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set(xlim=(-_ROOM * n, (1 + _ROOM) * n), ylim=(-0.11, 1.03), xlabel="genes by score, the highest first")
    ax.spines["bottom"].set_bounds(0, n)
    ax.legend(frameon=False, fontsize="small", loc="upper right")
    new = np.flatnonzero(~learnt)
    sides = (new[:n_names], -_OFF * n), (new[n_names:][::-1][:n_names], (1 + _OFF) * n)
    return [(genes[some], x[some], y[some], column) for some, column in sides]


def _ends(n: int, n_names: int) -> np.ndarray:
    """First and last places of n, the outermost first."""
    inwards = np.stack([np.arange(n), np.arange(n)[::-1]], axis=1)[: min(n_names, -(-n // 2))].ravel()
    return inwards[np.sort(np.unique(inwards, return_index=True)[1])]


def _name_in_column(ax: Axes, names: Sequence[str], x: np.ndarray, y: np.ndarray, column: float) -> None:
    """Write names one below the other, each with a line to its point; the last ones are left out if there is no room.

    Scales and limits have to be final, for places are found on the page.
    """
    figure_of(ax).draw_without_rendering()  # the layout moves axes
    page = figure_of(ax).dpi / 72
    low, high = ax.get_window_extent().intervaly / page
    n = min(len(names), int((high - low) // _LINE))
    if n <= 0:
        return
    height = ax.transData.transform(np.column_stack([x[:n], y[:n]]))[:, 1] / page
    order = np.argsort(height, kind="stable")
    lines = height[order]
    # Upwards as far as the one below asks for, then down again from the top.
    for at in range(n):
        lines[at] = max(lines[at], low + _LINE / 2 if at == 0 else lines[at - 1] + _LINE)
    for at in reversed(range(n)):
        lines[at] = min(lines[at], high - _LINE / 2 if at == n - 1 else lines[at + 1] - _LINE)
    back = ax.transData.inverted()
    for at, line in zip(order, lines, strict=True):
        is_right = column > x[at]
        to = back.transform((0, line * page))[1]
        ax.annotate(
            names[at],
            (x[at], y[at]),
            xytext=(column, to),
            ha="left" if is_right else "right",
            va="center",
            fontsize="small",
            zorder=4,
            arrowprops={
                "arrowstyle": "-",
                "color": "0.5",
                "linewidth": 0.5,
                "relpos": (0 if is_right else 1, 0.5),  # from the end of the name that is nearer
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )
