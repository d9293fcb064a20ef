"""Plots of perturbed genes: effects on cells and on other genes, compared with random sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gfx._docs import shared
from gfx.get import deletion_cells_df, deletion_df, gene_effects_df, random_sets_df, rank_trend_df, synergy_df
from gfx.pl._style import (
    ABOVE,
    BAND,
    GUIDE,
    axes_for,
    check_drawable,
    figure_of,
    finish,
    folded,
    label_points,
    set_label,
    show_power_of_ten,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

    from gfx._types import Data

#: Random sets drawn in a row at most; the bar is over all of them.
_MAX_POINTS = 200

#: Rows up to which each has the height of a line of text and some room; with more, lines are close and small.
_MOST_ROWS = 25

#: Width of z and p at the end of a row, in inches.
_NOTE = 1.3

#: Random sets.
_POINTS = {"color": "0.6", "alpha": 0.55, "linewidths": 0, "zorder": 1.5}

#: The spread of perturbed cells.
_LINE = {"color": GUIDE, "linewidth": 1.5, "zorder": 2}

_MEASURES = {"on_shifts": "shifts", "on_vectors": "displacements"}


# --- rows of effects ------------------------------------------------------------------------------------------------


#: Begins the examples of all plots here; the documentation runs it once.
_EXAMPLE = """
>>> import gfx
>>> adata = gfx.datasets.ifnb()[::56].copy()
>>> genes = ["ISG15", "B2M", "FTL"]
>>> pairs = [("ISG15", "B2M"), ("ISG15", "FTL"), ("B2M", "FTL")]
>>> gfx.tl.delete_genes(adata, genes + pairs, model="mini", n_random=10)
"""


@shared(example=_EXAMPLE)
def deletion(
    adata: Data,
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
) -> Axes | None:
    """Draw the shift of cells when genes are perturbed, in excess of random gene sets of the same rank.

    Each row shows a perturbation; rows are sorted by z-score. The excess is the shift minus the mean shift when random
    sets are perturbed in the same cells, so that 0 is the effect of any genes of that rank. Grey points are the random
    sets, and the grey bar reaches from their 5th to their 95th percentile. The diamond is the mean of the perturbed
    cells, and the thin line reaches from the 5th to the 95th percentile of these cells. Only a diamond outside the grey
    bar says anything about the gene. The colour of the diamond is the mean rank of the perturbed genes; it is white if
    no cell expresses them. Without random sets, the shift itself is drawn.

    Parameters
    ----------
    {after_perturbing}
    {key}
    state
        With states: draw the shift toward this state. `None` draws the goal.
    n_top
        Number of perturbations to draw, starting with the largest z-score. `None` draws all.
    {min_cells_of_sets}
    {cmap}
    {figsize}
    {ax}
    {mod}
    {show}

    Returns
    -------
    The axes, unless the figure is shown. Their data: :func:`gfx.get.deletion_df`, :func:`gfx.get.random_sets_df` and
    :func:`gfx.get.deletion_cells_df`.

    Raises
    ------
    KeyError
        No such result or no such state.
    ValueError
        No perturbation has enough cells.

    Examples
    --------
    {example}
    >>> gfx.pl.deletion(adata)
    """
    import matplotlib as mpl

    table = deletion_df(adata, key=key, min_cells=min_cells, mod=mod)
    cells = deletion_cells_df(adata, key=key, mod=mod)
    random = random_sets_df(adata, key=key, mod=mod) if "z" in table else None
    drawn, over = ("shift", "") if random is None else ("excess shift", " over random sets")
    measure, prefix, label = "shift", "", f"{drawn}{over} (1 - cosine)"
    if "state" in table:
        state = table.loc[table["role"] == "goal", "state"].iloc[0] if state is None else state
        if state not in set(table["state"]):
            msg = f"Did not find the state {state!r}. Present: {sorted(set(table['state']))}."
            raise KeyError(msg)
        table, cells = table[table["state"] == state], cells[cells["state"] == state]
        random = None if random is None else random[random["state"] == state]
        measure, prefix, label = "toward", "toward_", f"{drawn} toward {state}{over} (cosine)"
    elif state is not None:
        msg = f"`state={state!r}`, but genes were perturbed without states. Give `groupby=`, `start=` and `goal=`."
        raise KeyError(msg)
    table = _drawn(table, f"{measure}_mean", n_top, min_cells)
    (panel,) = axes_for(ax, 1, figsize or _size(table, 7.2))
    colours = mpl.colormaps[cmap]
    faces = [colours(rank) if np.isfinite(rank) else "white" for rank in table["rank_mean"]]
    spread = [0.05, 0.95]
    of_cells = cells.groupby("perturbation")[measure].quantile(spread).unstack()
    of_cells = of_cells.reindex(index=table["perturbation"], columns=spread)  # cells may be gone since
    _draw_rows(panel, table, measure, random, prefix=prefix, ends=of_cells.to_numpy(), faces=faces)
    panel.set(xlabel=folded(label, panel), ylabel="perturbed genes\n(cells)")
    _explain_rows(panel, "5th to 95th percentile of these cells", has_random=random is not None)
    figure = figure_of(panel)
    # Only a constrained layout leaves room for the text on the right by itself.
    needs_room = random is not None and not figure.get_constrained_layout()
    bar = figure.colorbar(
        mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), colours),
        ax=panel,
        shrink=min(0.8, 8 / (len(table) + 2)),
        aspect=12,
        pad=min(0.5, _NOTE * figure.dpi / panel.bbox.width) if needs_room else 0.02,
    )
    bar.set_ticks([0, 1], labels=["first", "last"])
    bar.set_label("mean rank of the genes")
    bar.ax.invert_yaxis()
    return finish(panel, given=ax, show=show)


@shared(example=_EXAMPLE)
def synergy(
    adata: Data,
    *,
    key: str | None = None,
    n_top: int | None = None,
    min_cells: int = 10,
    figsize: tuple[float, float] | None = None,
    ax: Sequence[Axes] | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> list[Axes] | None:
    """Draw the effect of genes perturbed together beyond their single effects, compared with random sets.

    A row is a set, a panel a measure of the effect beyond single effects (see :func:`gfx.get.synergy_df`). Random sets
    have such an effect, too, so that 0 is the mean of rank-matched random sets in the same cells. Grey points are these
    random sets, and the grey bar reaches from their 5th to their 95th percentile. The diamond is the mean over cells,
    the line its 95 % interval. Without random sets, 0 is the sum of the single effects.

    Parameters
    ----------
    adata
        After perturbing tuples of genes.
    {key}
    n_top
        Number of sets to draw, those with the largest z-score first. `None` draws all.
    {min_cells_of_sets}
    {figsize}
    {two_axes}
    {mod}
    {show}

    Returns
    -------
    The axes, one a measure, unless the figure is shown. Their data: :func:`gfx.get.synergy_df` and
    :func:`gfx.get.random_sets_df`.

    Raises
    ------
    KeyError
        No such result, or no genes perturbed together in it.
    ValueError
        No set has enough cells.

    Examples
    --------
    {example}
    >>> gfx.pl.synergy(adata)
    """
    table = _drawn(synergy_df(adata, key=key, min_cells=min_cells, mod=mod), "on_vectors_mean", n_top, min_cells)
    random = random_sets_df(adata, key=key, mod=mod) if table["on_vectors_z"].notna().any() else None
    if random is not None:
        random = random.drop_duplicates(["perturbation", "genes", "difference"])  # one row a set, whatever the states
    axes = axes_for(ax, 2, figsize or _size(table, 9.6))
    for panel, (measure, beyond) in zip(axes, _MEASURES.items(), strict=True):
        ends = table[[f"{measure}_low", f"{measure}_high"]].to_numpy()
        _draw_rows(panel, table, measure, random, prefix=f"{measure}_", ends=ends, faces=["white"] * len(table))
        over = "" if random is None else ", over random sets"
        panel.set_xlabel(f"shift beyond the sum of {beyond}{over}\n(1 - cosine)")
    axes[1].tick_params(axis="y", labelleft=False)
    axes[0].set_ylabel("perturbed together\n(cells)")
    _explain_rows(axes[0], "95 % interval of the mean", has_random=random is not None)
    return finish(axes, given=ax, show=show)


def _drawn(table: pd.DataFrame, effect: str, n_top: int | None, min_cells: int) -> pd.DataFrame:
    table = table[table[effect].notna()]
    check_drawable(table, f"no perturbation was made in at least {min_cells} cells (`min_cells`)")
    return table[:n_top]


def _size(table: pd.DataFrame, width: float) -> tuple[float, float]:
    """Size of a new figure, in inches: long names are beside its width, not in it."""
    n_rows, longest = len(table), max(map(len, _names(table)))
    height = 1.6 + (0.36 if n_rows <= _MOST_ROWS else 0.2) * max(n_rows, 4)  # the label of the axis fits
    return width + 0.085 * max(0, longest - 14), height


def _names(table: pd.DataFrame) -> list[str]:
    """Name the rows, with the number of cells."""
    return [f"{set_label(name)} ({n:,})" for name, n in zip(table["perturbation"], table["n_cells"], strict=True)]


def _draw_rows(
    ax: Axes, table: pd.DataFrame, measure: str, random: pd.DataFrame | None, *, prefix: str, **looks: Any
) -> None:
    """Draw a row for each perturbation: its mean as a diamond, a line between two ends, and its random sets in grey.

    With random sets, everything is drawn relative to their mean effect in the same cells. `looks` are the colours of
    the diamonds (`faces`) and the ends of the lines (`ends`). Names are on the left, the first row on top; with random
    sets, z and p are on the right.
    """
    jitter = np.random.default_rng(0)  # the same picture every time
    size = "small" if len(table) <= _MOST_ROWS else "x-small"
    for row, effect in enumerate(table.to_dict("records")):
        mean, z, p = effect[f"{measure}_mean"], effect.get(f"{prefix}z", np.nan), effect.get(f"{prefix}p", np.nan)
        of_random = 0.0
        if random is not None:
            of_row = random["perturbation"] == effect["perturbation"]
            differences = random.loc[of_row, f"{prefix}difference"].dropna().to_numpy()
            of_random = mean + differences.mean() if len(differences) else np.nan
            if len(differences):
                _draw_random(ax, row, differences - differences.mean(), jitter)
        ax.plot(looks["ends"][row] - of_random, [row, row], **_LINE)
        _draw_means(ax, mean - of_random, row, [looks["faces"][row]])
        note = f"z {round(z, 1) + 0.0:+.1f}" + (f", p {p:.2g}" if np.isfinite(p) else "") if np.isfinite(z) else ""
        if note or np.isnan(of_random):
            where = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
            ax.annotate(note or "no random sets", (1.01, row), fontsize=size, **where)
    names = _names(table)
    ax.set_yticks(range(len(names)), names, fontsize=size if len(names) > _MOST_ROWS else None)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.axvline(0, color=GUIDE, linewidth=0.8, linestyle=":", zorder=0)
    ax.locator_params(axis="x", nbins=5)
    show_power_of_ten(ax, room=18)


def _draw_random(ax: Axes, row: int, values: np.ndarray, jitter: np.random.Generator) -> None:
    low, high = np.percentile(values, [5, 95])
    ax.barh(row, high - low, left=low, height=0.62, color=BAND, linewidth=0, zorder=0.5)
    points = values if len(values) <= _MAX_POINTS else jitter.choice(values, _MAX_POINTS, replace=False)
    ax.scatter(points, row + jitter.uniform(-0.25, 0.25, len(points)), s=5, **_POINTS)


def _draw_means(ax: Axes, x: ArrayLike, y: ArrayLike, faces: Any, label: str | None = None) -> None:
    """Draw the mean effects of perturbations as diamonds."""
    import matplotlib as mpl

    edge = mpl.rcParams["axes.edgecolor"]
    ax.scatter(x, y, color=faces, marker="D", s=40, edgecolors=edge, linewidths=0.9, zorder=3, label=label)


def _explain_rows(ax: Axes, interval: str, *, has_random: bool) -> None:
    """Draw the legend, above the rows."""
    if has_random:
        ax.scatter([], [], s=14, label="rank-matched random sets", **_POINTS)
        ax.plot([], [], linewidth=9, color=BAND, label="their 5th to 95th percentile")
    _draw_means(ax, [], [], "white", label="mean of the perturbed cells")
    ax.plot([], [], label=interval, **_LINE)
    ax.legend(**ABOVE)


# --- clouds of points -----------------------------------------------------------------------------------------------


@shared(example=_EXAMPLE)
def gene_effects(
    adata: Data,
    perturbation: str,
    *,
    targets: Mapping[str, Sequence[str]] | None = None,
    key: str | None = None,
    n_top: int = 10,
    min_cells: int = 10,
    figsize: tuple[float, float] | None = None,
    ax: Axes | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Draw the shift of each other gene, against its shift when random sets are perturbed instead.

    On the dashed line are genes with the same ratio of the two as the median gene (excess 0); what is specific to the
    perturbation is above it. The genes with the largest excess are named, as far as there is room. Without random sets,
    the number of cells takes their place.

    Parameters
    ----------
    {after_perturbing}
    perturbation
        Its name, such as ``"GATA4"`` or ``"GATA4+TBX5"``.
    targets
        Sets of genes to colour, such as ``{"direct targets": ["MYH6", "MYH7"]}``.
    {key}
    n_top
        Number of genes to name.
    {min_perturbed_cells}
    {figsize}
    {ax}
    {mod}
    {show}

    Returns
    -------
    The axes, unless the figure is shown. Their data: :func:`gfx.get.gene_effects_df`.

    Raises
    ------
    KeyError
        No such result or perturbation.
    ValueError
        No gene is in enough cells.

    Examples
    --------
    {example}
    >>> gfx.pl.gene_effects(adata, "ISG15")
    """
    from matplotlib.ticker import LogFormatterSciNotation

    table = gene_effects_df(adata, perturbation, key=key, min_cells=min_cells, mod=mod)
    has_random = "random_shift" in table
    x = "random_shift" if has_random else "n_cells"
    table = table[(table["shift"] > 0) & (table[x] > 0)]
    check_drawable(table, f"no gene is in at least {min_cells} cells (`min_cells`)")
    (panel,) = axes_for(ax, 1, figsize or (5.2, 4.6))
    panel.scatter(table[x], table["shift"], s=8, color="0.6", alpha=0.6, linewidths=0, zorder=1)
    if has_random:
        ends = np.array([table[x].min(), table[x].max()])
        median = 2 ** np.log2(table["shift"].astype(float) / table[x]).median()  # where the excess is 0
        panel.plot(
            ends, median * ends, color=GUIDE, linewidth=0.9, linestyle="--", zorder=2, label="as the median gene"
        )
    for number, (name, genes) in enumerate((targets or {}).items()):
        members = table[table["gene"].isin(list(genes))]
        look = {"s": 26, "color": f"C{number}", "edgecolors": "white", "linewidths": 0.5, "zorder": 3}
        panel.scatter(members[x], members["shift"], label=f"{name} ({len(members)})", **look)
    panel.set_xscale("log", subs=(2, 4))  # labels of more would run into each other
    panel.xaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(1.5, 0)))
    panel.set_yscale("log")
    panel.set_xlabel("its shift when random sets are perturbed (1 - cosine)" if has_random else "cells with the gene")
    panel.set_ylabel(f"shift of a gene when\n{set_label(perturbation)} is perturbed (1 - cosine)")
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, fontsize="small")
    named = table.head(n_top)
    label_points(panel, named["gene"].tolist(), named[x].to_numpy(), named["shift"].to_numpy())
    return finish(panel, given=ax, show=show)


@shared(example=_EXAMPLE)
def rank_trend(
    adata: Data,
    *,
    key: str | None = None,
    min_cells: int = 10,
    figsize: tuple[float, float] | None = None,
    ax: Sequence[Axes] | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> list[Axes] | None:
    """Draw the effect of random genes against their rank, in the model and in a model with random weights.

    Grey points are random genes, each perturbed in one random cell, with a fitted line and a band of two standard
    deviations of the residuals on either side. Diamonds are the perturbations at their mean rank, with as many names as
    there is room for. If both panels look alike and the diamonds lie in the band, effects reflect the rank of a gene,
    not which gene it is.

    Parameters
    ----------
    {after_perturbing}
    {key}
    {min_cells_of_sets}
    {figsize}
    {two_axes}
    {mod}
    {show}

    Returns
    -------
    The two axes, of the model and of the random-weights model, unless the figure is shown. Their data:
    :func:`gfx.get.rank_trend_df` and :func:`gfx.get.deletion_df`.

    Raises
    ------
    KeyError
        There is no such result, or it contains no random genes of all ranks.

    Examples
    --------
    {example}
    >>> gfx.pl.rank_trend(adata)
    """
    sample = rank_trend_df(adata, key=key, mod=mod)
    table = deletion_df(adata, key=key, min_cells=min_cells, mod=mod).drop_duplicates("perturbation")
    axes = axes_for(ax, 2, figsize or (8.4, 3.6))
    line, labels = np.linspace(0, 1, 50), []
    for panel, prefix, title in zip(axes, ("", "random_weights_"), ("model", "random weights"), strict=True):
        drawn = sample[sample[f"{prefix}shift"] > 0]
        panel.scatter(drawn["rank"], drawn[f"{prefix}shift"], s=8, color="0.6", alpha=0.6, linewidths=0, zorder=1)
        trend = sample.attrs[f"{prefix}trend"]
        middle = trend["intercept"] + trend["slope"] * line
        panel.plot(line, np.exp(middle), color=GUIDE, linewidth=1, zorder=2)
        low, high = (np.exp(middle + side * trend["sd"]) for side in (-2, 2))
        panel.fill_between(line, low, high, color=BAND, linewidth=0, zorder=0)
        effect = f"{prefix}shift_mean"
        known = table.reindex(columns=["perturbation", "rank_mean", effect])  # none, if all are in too few cells
        known = known[(known[effect] > 0) & known["rank_mean"].notna()]
        _draw_means(panel, known["rank_mean"], known[effect], "white")
        panel.set_yscale("log")
        panel.set(xlim=(-0.02, 1.02), title=title, xlabel="rank of the gene (0 first, 1 last)")
        names = known["perturbation"].map(set_label).tolist()
        labels.append((names, known["rank_mean"].to_numpy(), known[effect].to_numpy()))
    axes[0].set_ylabel("shift of the cell (1 - cosine)")
    for panel, of_panel in zip(axes, labels, strict=True):
        label_points(panel, *of_panel)
    return finish(axes, given=ax, show=show)
