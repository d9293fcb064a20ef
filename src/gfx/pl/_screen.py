"""Plots of a screen, and of effects against their false discovery rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from gfx._docs import shared
from gfx._results import PERTURBATIONS, find
from gfx.get import deletion_df, screen_df
from gfx.get._screen import FDR, WIDTH
from gfx.pl._style import (
    ABOVE,
    BAND,
    GUIDE,
    axes_for,
    check_drawable,
    finish,
    folded,
    label_points,
    set_label,
    show_power_of_ten,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes

    from gfx._types import Data

_LABELS = {
    "shift": "excess shift over {others} (1 - cosine)",
    "toward": "excess shift toward {goal} over {others} (cosine)",
}

#: Genes to either side that the drawn band is smoothed over.
_ABOUT = 50

#: Points of the threshold of a volcano plot that names keep off; closer to each other than a name is wide.
_N_ON_LINE = 40

#: Distance of a title from its panel, in points: one line or two of a legend lie between them.
_ABOVE_LEGEND = 18, 32


#: Begins the examples of both plots; the documentation runs it once.
_EXAMPLE = """
>>> import gfx
>>> adata = gfx.datasets.ifnb()
>>> adata = adata[adata.obs["cell_type"] == "CD14 Mono"][::8]
>>> adata = adata[:, adata.X.getnnz(axis=0) >= 20].copy()  # in 20 cells
>>> gfx.tl.screen_genes(
...     adata,
...     model="mini",
...     groupby="condition",
...     start="stimulated",
...     goal="control",
...     method=gfx.tl.FirstOrder(n_probes=0),
...     controls=["random_weights"],
... )
"""


@shared(example=_EXAMPLE)
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

    Grey genes lie within three robust standard deviations of genes that are similar in rank and number of cells (a
    z-score of 3); red genes lie beyond. Filled red genes are also significant (FDR 0.1) compared with a model with
    random weights. Each gene has limits of its own, `shift_low` and `shift_high` of the table; the band is their median
    over 101 genes of similar rank, so a gene in few cells may be grey beyond it. The genes with the largest absolute
    z-score are named, as far as there is room.

    Parameters
    ----------
    {after_screening}
    groups
        Groups of the `groupby` of that call, a panel each. `None` draws all cells.
    effect
        ``"shift"`` or ``"toward"``. `None` is ``"toward"`` if there is a goal.
    {n_names}
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
    {example}
    >>> gfx.pl.screen(adata)
    """
    panels = [groups] if isinstance(groups, str) or not isinstance(groups, Iterable) else list(groups)
    tables = [screen_df(adata, group, key=key, min_cells=min_cells, names=names, mod=mod) for group in panels]
    for table in tables:
        check_drawable(table, f"no gene is in at least {min_cells} cells (`min_cells`)")
    effect = _effect(tables[0], effect)
    n_columns = 2 if len(panels) == 4 else min(len(panels), 3)
    default = (5.2 * n_columns, 4.2 * -(-len(panels) // n_columns))
    axes = axes_for(ax, len(panels), figsize or default, n_columns=n_columns)
    labels = []
    for panel, group, table in zip(axes, panels, tables, strict=True):
        rank, excess, z = (table[name].to_numpy() for name in ("rank_mean", f"{effect}_excess", f"{effect}_z"))
        low, high = (table[f"{effect}_{side}"].to_numpy() for side in ("low", "high"))
        beyond = (excess < low) | (excess > high)
        significant = beyond & (np.asarray(table.get(f"{effect}_fdr", z * np.nan)) <= FDR)
        within = {"s": 6, "color": "0.7", "linewidths": 0, "zorder": 1, "label": f"z-score within ±{WIDTH}"}
        panel.scatter(rank[~beyond], excess[~beyond], **within)
        along = np.argsort(rank, kind="stable")
        along = along[np.isfinite(low[along])]
        if len(along):
            edges = _smooth(low[along]), _smooth(high[along])
            band = {"color": BAND, "linewidth": 0, "zorder": 0, "label": "usual range at this rank"}
            panel.fill_between(rank[along], *edges, **band)
        look = {"s": 18, "edgecolors": "C3", "linewidths": 0.8, "zorder": 2}
        alone = beyond & ~significant
        panel.scatter(rank[alone], excess[alone], facecolors="none", label=f"z-score beyond ±{WIDTH}", **look)
        if f"{effect}_fdr" in table:
            label = f"beyond ±{WIDTH} and FDR ≤ {FDR}"
            panel.scatter(rank[significant], excess[significant], facecolors="C3", label=label, **look)
        panel.axhline(0, color=GUIDE, linewidth=0.6, zorder=1)
        title = table.attrs.get("start", "all cells") if group is None else str(group)
        panel.set(xlim=(-0.02, 1.02), xlabel="mean rank of the gene (0 first, 1 last)")
        panel.set_title(folded(title, panel), fontsize="medium", pad=_ABOVE_LEGEND[1])
        panel.margins(y=0.12)
        far = np.flatnonzero(beyond)
        far = far[np.argsort(-np.abs(z[far]), kind="stable")[:n_names]]
        unnamed = np.setdiff1d(np.flatnonzero(beyond), far)
        others = np.column_stack([rank[unnamed], excess[unnamed]])
        labels.append((table["gene"].to_numpy()[far].tolist(), rank[far], excess[far], others))
    label = _LABELS[effect].format(goal=tables[0].attrs.get("goal"), others="genes of similar rank")
    for panel in axes[::n_columns]:
        panel.set_ylabel(folded(label.replace(" over ", "\nover "), panel, along="y"))
    axes[0].legend(columnspacing=1, handletextpad=0.3, **ABOVE)
    for panel, (genes, x, y, others) in zip(axes, labels, strict=True):
        label_points(panel, genes, x, y, others=others)
    return finish(axes, given=ax, show=show)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Take the median of each value and those around it."""
    half = min(_ABOUT, len(values) // 8)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, half, mode="reflect"), 2 * half + 1)
    return np.median(windows, axis=1)


# --- effects of screens and of perturbations ------------------------------------------------------------------------


@shared(example=_EXAMPLE)
def volcano(
    adata: Data,
    group: str | None = None,
    *,
    effect: str | None = None,
    fdr: float = FDR,
    n_names: int = 15,
    names: str | None = None,
    key: str | None = None,
    min_cells: int = 10,
    figsize: tuple[float, float] | None = None,
    ax: Axes | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Draw a volcano plot of a screen or of perturbations: the excess of each gene against its false discovery rate.

    Genes above the dashed line have a smaller FDR than the threshold, and are red if their excess is positive, blue if
    it is negative. The genes with the smallest FDR are named, as far as there is room off that line. The p-values come
    from random sets or from a random-weights model, so they have a smallest value, and many genes may lie on one line
    at the top. An FDR that is too small for a floating-point number is drawn as a triangle above all others. Genes
    without an FDR, which are in too few cells, are left out.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.screen_genes`, :func:`gfx.tl.delete_genes`, :func:`gfx.tl.overexpress_genes` or
        :func:`gfx.tl.shift_genes`, with their default controls.
    group
        A group of a screen. `None` draws all cells.
    effect
        ``"shift"`` or ``"toward"``, the shift toward the goal. `None` is ``"toward"`` if there is a goal.
    fdr
        Threshold of the false discovery rate.
    {n_names}
    names
        Column of `var` with the gene names of a screen. `None` uses `var_names`.
    {key}
    {min_cells}
    {figsize}
    {ax}
    {mod}
    {show}

    Returns
    -------
    The axes, unless the figure is shown. Their data: :func:`gfx.get.screen_df` or :func:`gfx.get.deletion_df`; of the
    latter, the difference of mean effect and mean random effect, or with donors `donor_mean` and `donor_fdr`.

    Raises
    ------
    KeyError
        No such result, group or effect, several results and no `key`, or no such column in `var`.
    ValueError
        No gene has an FDR, or `group` was given for perturbations.

    Examples
    --------
    {example}
    >>> gfx.pl.volcano(adata)
    """
    result = find(adata, *PERTURBATIONS, "tl.screen_genes", key=key, mod=mod)
    how = {"key": result.key, "min_cells": min_cells, "mod": mod}
    if result.function == "tl.screen_genes":
        table, null = screen_df(adata, group, names=names, **how), "genes of similar rank"
    elif group is None:
        table, null = deletion_df(adata, **how).rename(columns={"perturbation": "gene"}), "random sets"
    else:
        msg = (
            f"`group={group!r}`, but `gfx.{result.function}` has no groups. Perturb the cells of one with `mask_obs=`."
        )
        raise ValueError(msg)
    effect = _effect(table, effect)
    table = _tested(table, effect)
    check_drawable(table, "no gene has an FDR. It takes the default controls, and genes in enough cells")
    gene, x, values = table["gene"].map(set_label), table["excess"].to_numpy(), table["fdr"].to_numpy()
    is_zero, threshold = values == 0, -np.log10(fdr)
    y = -np.log10(np.where(is_zero, 1, values))
    y[is_zero] = 1.15 * max(threshold, *y)
    (panel,) = axes_for(ax, 1, figsize or (5.2, 4.4))
    colours = np.where(values > fdr, "0.6", np.where(x > 0, "C3", "C0"))
    panel.scatter(x[~is_zero], y[~is_zero], c=colours[~is_zero], s=14, linewidths=0, zorder=2)
    if is_zero.any():
        look = {"s": 32, "marker": "^", "linewidths": 0, "zorder": 2}
        panel.scatter(x[is_zero], y[is_zero], c=colours[is_zero], **look)
        panel.scatter([], [], color="0.6", label="FDR too small for a number", **look)
    panel.axhline(threshold, color=GUIDE, linewidth=0.9, linestyle="--", zorder=1, label=f"FDR {fdr:g}")
    panel.axvline(0, color=GUIDE, linewidth=0.8, linestyle=":", zorder=1)
    panel.set_xlabel(folded(_LABELS[effect].format(goal=table.attrs["goal"], others=null), panel))
    panel.set(ylim=(-0.04 * y.max(), 1.12 * max(threshold, *y)), ylabel="$-$log$_{10}$ FDR")
    if group is not None:
        panel.set_title(folded(str(group), panel), fontsize="medium", pad=_ABOVE_LEGEND[0])
    panel.margins(x=0.12)
    show_power_of_ten(panel, room=14)
    panel.legend(**ABOVE)
    named, others = np.split(np.lexsort((-np.abs(x), values)), [n_names])
    unnamed = np.column_stack([x[others], y[others]])
    line = np.column_stack([np.linspace(*panel.get_xlim(), _N_ON_LINE), np.full(_N_ON_LINE, threshold)])
    label_points(panel, gene.iloc[named].tolist(), x[named], y[named], others=np.vstack([unnamed, line]))
    return finish(panel, given=ax, show=show)


def _effect(table: pd.DataFrame, effect: str | None) -> str:
    """Check the name of an effect; `None` is the shift toward the goal, if there is one."""
    effects = [name for name in ("toward", "shift") if f"{name}_mean" in table]
    if effect is not None and effect not in effects:
        msg = f"Did not find the effect {effect!r}. Present: {effects}."
        raise KeyError(msg)
    return effects[0] if effect is None else effect


def _tested(table: pd.DataFrame, effect: str) -> pd.DataFrame:
    """Return `gene`, `excess` and `fdr` of the genes that have an FDR, of a screen or of perturbations."""
    attrs = {"goal": table.attrs.get("goal")}
    if f"{effect}_excess" in table:
        excess, fdr = table[f"{effect}_excess"], f"{effect}_fdr"
    else:
        if "role" in table:
            table = table[table["role"] == "goal"]
            attrs["goal"] = next(iter(table["state"]), None)
        prefix = "toward_" if effect == "toward" else ""
        excess, fdr = table[f"{effect}_mean"] - table.get(f"{prefix}random_mean", np.nan), f"{prefix}fdr"
        if "donor_fdr" in table and effect == _effect(table, None):
            excess, fdr = table["donor_mean"], "donor_fdr"
    tested = table[["gene"]].assign(excess=excess, fdr=table.get(fdr, np.nan)).dropna()
    tested.attrs = attrs
    return tested
