"""Plots of attention."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import numpy as np

from gfx._docs import shared
from gfx.get import (
    attention_bands_df,
    attention_difference_df,
    attention_heads_df,
    attention_pairs_df,
    attention_ranks_df,
)
from gfx.pl._style import BESIDE, GUIDE, LEGEND, axes_for, check_drawable, figure_of, finish, folded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd
    from matplotlib.axes import Axes

    from gfx._types import Data

_N_BINS = 40

#: Ticks at powers of 2 on an axis, about.
_MOST_POWERS = 6

#: Around heads that stand out.
_FRAME = {"fill": False, "edgecolor": "k", "linewidth": 1.8}

#: Heads in a matrix up to which its cells hold numbers.
_MOST_NUMBERS = 36

#: Statistics of heads: what the colours mean.
_LABELS = {
    "entropy": "entropy / log(length)",
    "distance": "mean distance in ranks",
    "special": "attention to special tokens",
    "auc": "AUC against other genes",
    "auc_matched": "AUC against matched genes",
}


#: Begins the examples of all plots here; the documentation runs it once.
_EXAMPLE = """
>>> import gfx
>>> adata = gfx.datasets.ifnb()[::56].copy()
>>> genes = ["ISG15", "IFI6", "IFITM3", "B2M", "FTL", "HLA-B", "ACTB", "RPL13"]
>>> gfx.tl.attention(adata, model="mini", groupby="condition", genes=genes)
"""


@shared(example=_EXAMPLE)
def attention(
    adata: Data,
    *,
    key: str | None = None,
    min_cells: int = 10,
    cmap: str = "viridis",
    figsize: tuple[float, float] | None = None,
    ax: Sequence[Axes] | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> list[Axes] | None:
    """Draw how uniformly each head attends, and to which ranks.

    Left: entropy of each head's attention relative to that of uniform attention, which is 1. Right: attention by rank
    of the attended gene, divided by uniform attention (dotted line). A thin line is a head, a thick one the mean of a
    network layer.

    Parameters
    ----------
    {after_attention}
    {key}
    min_cells
        Ranks that fewer cells than this have are left out.
    {cmap}
    {figsize}
    {two_axes}
    {mod}
    {show}

    Returns
    -------
    The two axes, unless the figure is shown. Their data: :func:`gfx.get.attention_heads_df` and
    :func:`gfx.get.attention_ranks_df`.

    Raises
    ------
    KeyError
        No such result.
    ValueError
        Another number of axes than two, or no rank that enough cells have.

    Examples
    --------
    {example}
    >>> gfx.pl.attention(adata)
    """
    import matplotlib as mpl
    from matplotlib.lines import Line2D

    heads, ranks = attention_heads_df(adata, key=key, mod=mod), attention_ranks_df(adata, key=key, mod=mod)
    ranks = ranks[ranks["n_cells"] >= min_cells]
    check_drawable(ranks, f"no rank is in at least {min_cells} cells (`min_cells`)")
    n_layers, n_heads = heads["layer"].max(), heads["head"].max()
    axes = axes_for(ax, 2, figsize or (6.8 + 0.35 * n_heads, 3.6), widths=(1.4 + 0.35 * n_heads, 5))
    left, right = axes
    _matrix(left, heads, "entropy", cmap=cmap, title="uniformity of attention", vmin=0, vmax=1)
    figure_of(left).colorbar(left.images[0], ax=left, label=_LABELS["entropy"], location="bottom")

    colours = mpl.colormaps["tab10" if n_layers <= 10 else "tab20"](np.arange(n_layers) % 20)
    for colour, (layer, of_layer) in zip(colours, ranks.groupby("layer"), strict=True):
        for _, of_head in of_layer.groupby("head"):
            right.plot(*_profile(of_head), color=colour, linewidth=0.6, alpha=0.5)
        right.plot(*_profile(of_layer), color=colour, linewidth=2, label=f"layer {layer}, mean")
    right.axhline(1, color=GUIDE, linewidth=0.8, linestyle=":", label="uniform attention")
    right.set_xscale("log")
    right.set_yscale("log", base=2)
    _tick_powers_of_2(right)
    right.xaxis.set_major_formatter("{x:g}")
    right.set(xlabel="rank of the attended gene (1 is the highest)", ylabel="attention / uniform attention")
    right.set_title("attention by rank", fontsize="medium")
    *means, uniform = right.get_legend_handles_labels()[0]
    head = Line2D([], [], color=GUIDE, linewidth=0.6, label="a head of a layer")
    right.legend(handles=[*means, head, uniform], ncols=-(-n_layers // 10), **BESIDE)
    return finish(axes, given=ax, show=show)


def _tick_powers_of_2(ax: Axes) -> None:
    """Put ticks at powers of 2, or of 4 and so on where these are many, and write them as fractions."""
    low, high = np.log2(ax.get_ylim())
    step = max(1, round((high - low) / _MOST_POWERS))
    ticks = 2.0 ** (step * np.arange(np.ceil(low / step), np.floor(high / step) + 1))
    ax.set_yticks(ticks, [str(Fraction(tick)) for tick in ticks])
    ax.set_yticks([], minor=True)


def _profile(table: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Average neighbouring ranks in bins of equal width on the logarithm, weighted by cells."""
    bins = np.digitize(table["rank"], np.geomspace(1, table["rank"].max() + 1, _N_BINS))
    sums = table[["rank", "ratio"]].mul(table["n_cells"], axis=0).assign(n_cells=table["n_cells"]).groupby(bins).sum()
    return sums["rank"] / sums["n_cells"], sums["ratio"] / sums["n_cells"]


def _n_columns(n_panels: int) -> int:
    """Lay out panels in rows that are not too wide for their letters to be read on a page."""
    return 2 if n_panels == 4 else n_panels if n_panels <= 3 else 3 if n_panels <= 9 else 6


def _matrix(ax: Axes, heads: pd.DataFrame, column: str, *, title: str, **how: object) -> None:
    """Draw one value a head: network layers from bottom to top, with numbers where there is room."""
    table = heads.pivot(index="layer", columns="head", values=column)
    values = table.to_numpy(dtype=float)
    image = ax.imshow(values, aspect="auto", origin="lower", **how)
    step = -(-max(values.shape) // 12)
    ax.set_xticks(range(0, values.shape[1], step), table.columns[::step].astype(str))
    ax.set_yticks(range(0, values.shape[0], step), table.index[::step].astype(str))
    ax.set(xlabel="head", ylabel="network layer")
    ax.set_title(title, fontsize="medium")
    if values.size <= _MOST_NUMBERS:
        for (row, column_number), value in np.ndenumerate(values):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = f"{value:.0f}" if abs(value) >= 10 else f"{value:.2f}"
            ax.text(
                column_number, row, text, ha="center", va="center", fontsize="x-small", color="w" if dark else "0.15"
            )


@shared(example=_EXAMPLE)
def attention_heads(
    adata: Data,
    *,
    statistic: Literal["entropy", "distance", "special", "auc", "auc_matched"] | None = None,
    gene_sets: Mapping[str, Iterable[str]] | None = None,
    group: str | None = None,
    min_cells: int = 10,
    key: str | None = None,
    cmap: str | None = None,
    figsize: tuple[float, float] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> list[Axes] | None:
    """Draw a statistic of each head, network layers × heads.

    Parameters
    ----------
    {after_attention}
    statistic
        Column of :func:`gfx.get.attention_heads_df`. `None` draws ``"entropy"`` or, with gene sets, ``"auc_matched"``.
    gene_sets
        Sets of genes by name, a matrix each. Heads that attend to a set more, or less, than expected from rank and
        detection, and more strongly so than any head of the random-weights model (`remains`), have a frame.
    {group}
    {min_cells}
    {key}
    {cmap}
    {figsize}
    ax
        Axes to draw on, one for each set. `None` makes a new figure.
    {mod}
    {show}

    Returns
    -------
    The axes, one a set, unless the figure is shown. Their data: :func:`gfx.get.attention_heads_df`.

    Raises
    ------
    KeyError
        No such result.
    ValueError
        No such statistic or group, or a set of too few genes.

    Examples
    --------
    {example}
    >>> interferon = ["ISG15", "IFI6", "IFIT1", "IFIT3", "MX1", "OAS1"]
    >>> ribosome = adata.var_names[adata.var_names.str.startswith(("RPL", "RPS"))]
    >>> gene_sets = {"interferon response": interferon, "ribosome": ribosome}
    >>> gfx.pl.attention_heads(adata, gene_sets=gene_sets)
    """
    from matplotlib.patches import Rectangle

    choices = ("entropy", "distance", "special") if gene_sets is None else ("auc_matched", "auc")
    statistic = choices[0] if statistic is None else statistic
    if statistic not in choices:
        msg = f"`statistic` is one of {list(choices)} {'without' if gene_sets is None else 'with'} `gene_sets`, "
        msg += f"found {statistic!r}."
        raise ValueError(msg)
    how = {"group": group, "min_cells": min_cells, "key": key, "mod": mod}
    table = attention_heads_df(adata, gene_sets=gene_sets, **how)
    n_layers, n_heads = table["layer"].max(), table["head"].max()
    tables = {"": table} if gene_sets is None else dict(iter(table.groupby("gene_set", sort=False)))
    n_columns = _n_columns(len(tables))
    size = 1.1 + 0.42 * min(n_heads, 12), 0.9 + 0.36 * min(n_layers, 12)
    n_rows = -(-len(tables) // n_columns)
    default = (1.2 + size[0] * n_columns, 0.2 + size[1] * n_rows + 0.6 * (gene_sets is not None))  # for the legend
    axes = axes_for(ax, len(tables), figsize or default, n_columns=n_columns)
    limits: dict[str, object] = {"cmap": cmap or "viridis", "vmin": 0}
    if statistic in {"entropy", "special"}:
        limits["vmax"] = 1
    if gene_sets is not None:
        far = max(0.1, float((table[statistic] - 0.5).abs().max()))
        limits = {"cmap": cmap or "RdBu_r", "vmin": 0.5 - far, "vmax": 0.5 + far}
    for panel, (name, of_set) in zip(axes, tables.items(), strict=True):
        _matrix(panel, of_set, statistic, title=folded(name or statistic, panel), **limits)
        if gene_sets is not None:
            for row in of_set[of_set.get("remains", of_set["fdr_matched"] < 0)].itertuples():
                panel.add_patch(Rectangle((row.head - 1.48, row.layer - 1.48), 0.96, 0.96, **_FRAME))
    if any(panel.patches for panel in axes):
        frame = Rectangle((0, 0), 1, 1, label="beyond matched genes\nand random weights", **_FRAME)
        # Below the label of the axis, whatever the height of the panel.
        place = {"loc": "upper left", "bbox_to_anchor": (0, 0), "borderaxespad": 4.2}
        axes[-1].legend(handles=[frame], handlelength=1, handleheight=1, **LEGEND, **place)
    figure_of(axes[0]).colorbar(axes[0].images[0], ax=axes, label=_LABELS[statistic])
    return finish(axes, given=ax, show=show)


@shared(example=_EXAMPLE)
def attention_bands(
    adata: Data,
    *,
    layers: Iterable[int] | None = None,
    group: str | None = None,
    min_positions: int = 100,
    key: str | None = None,
    cmap: str = "RdBu_r",
    figsize: tuple[float, float] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> list[Axes] | None:
    """Draw which ranks attend to which: attention from band to band of ranks, for each network layer.

    Colours are log2 of attention divided by uniform attention, mean over the heads of a layer: red where a band of
    ranks receives more from another one than if attention were uniform, blue where it receives less. The scale is that
    of genes; attention to and from special tokens may lie beyond it.

    Parameters
    ----------
    {after_attention}
    layers
        Network layers to draw, from 1. `None` draws all.
    {group}
    min_positions
        Bands with fewer positions, over all cells, are left out.
    {key}
    {cmap}
    {figsize}
    ax
        Axes to draw on, one for each layer. `None` makes a new figure.
    {mod}
    {show}

    Returns
    -------
    The axes, one a layer, unless the figure is shown. Their data: :func:`gfx.get.attention_bands_df`.

    Raises
    ------
    KeyError
        No such result.
    ValueError
        No such layer or group, or no band with so many positions.

    Examples
    --------
    {example}
    >>> gfx.pl.attention_bands(adata)
    """
    table = attention_bands_df(adata, group=group, key=key, mod=mod)
    there = table["layer"].unique().tolist()
    wanted = there if layers is None else [int(layer) for layer in layers]
    if not wanted or set(wanted) - set(there):
        msg = f"`layers` are of {there}, found {wanted}."
        raise ValueError(msg)
    enough = table.loc[table["n_positions"] >= min_positions, "gives"].unique()
    table = table[table["gives"].isin(enough) & table["receives"].isin(enough)]
    check_drawable(table, f"no band of ranks has {min_positions} positions (`min_positions`)")
    means = table.groupby(["layer", "gives", "receives"], sort=False)[["attention", "uniform"]].mean()
    logs = np.log2(means["attention"] / means["uniform"])
    genes = (logs.index.get_level_values("gives") != "special") & (logs.index.get_level_values("receives") != "special")
    far = max(0.5, float(logs[genes & logs.index.isin(wanted, level="layer")].abs().max()))
    n_columns = _n_columns(len(wanted))
    n_rows, n_bands = -(-len(wanted) // n_columns), len(enough)
    side = 1.2 + 0.24 * max(n_bands, 7)  # the labels of the axes fit
    default = (1 + side * n_columns, side * n_rows)
    axes = axes_for(ax, len(wanted), figsize or default, n_columns=n_columns)
    for number, (panel, layer) in enumerate(zip(axes, wanted, strict=True)):
        values = logs[layer].unstack("receives").loc[enough, enough]
        panel.imshow(values.to_numpy(), cmap=cmap, vmin=-far, vmax=far, aspect="auto")
        panel.set_xticks(range(n_bands), enough, rotation=90, fontsize="small")
        panel.set_yticks(range(n_bands), enough, fontsize="small")
        panel.set_title(f"network layer {layer}", fontsize="medium")
        if number % n_columns == 0:
            panel.set_ylabel("rank of the gene that attends")
        if number + n_columns >= len(wanted):
            panel.set_xlabel("rank of the attended gene")
    figure_of(axes[0]).colorbar(
        axes[0].images[0], ax=axes, label="log2 of attention / uniform attention", extend="both", shrink=1 / n_rows
    )
    return finish(axes, given=ax, show=show)


@shared(example=_EXAMPLE)
def attention_neighbors(
    adata: Data,
    gene: str,
    *,
    n: int = 15,
    sort_by: Literal["attention", "ratio"] = "attention",
    min_cells: int = 10,
    network: bool = False,
    key: str | None = None,
    figsize: tuple[float, float] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> list[Axes] | None:
    """Draw the genes that a gene attends to most, and the attention expected from their ranks alone.

    Parameters
    ----------
    {after_attention}
    gene
        Gene that gives the attention, as in `var_names`.
    n
        Number of genes to draw.
    sort_by
        ``"attention"``, or ``"ratio"``: attention divided by what is expected from the ranks of the two genes.
    min_cells
        Genes that fewer cells have together with `gene` are left out.
    network
        Whether to draw the network of these genes as well: arrows show the strongest attention of each gene to others
        of them, thicker arrows more attention.
    {key}
    {figsize}
    ax
        Axes to draw on, two with `network`. `None` makes a new figure.
    {mod}
    {show}

    Returns
    -------
    The axes, unless the figure is shown: the list and, with `network`, the network. Their data:
    :func:`gfx.get.attention_pairs_df`.

    Raises
    ------
    KeyError
        No such result, or it has no pairs.
    ValueError
        A gene that gives no attention to others here.

    Examples
    --------
    {example}
    >>> gfx.pl.attention_neighbors(adata, "ISG15", network=True)
    """
    if sort_by not in {"attention", "ratio"}:
        msg = f"`sort_by` is 'attention' or 'ratio', found {sort_by!r}."
        raise ValueError(msg)
    table = attention_pairs_df(adata, genes=gene, key=key, mod=mod)
    table = table[(table["attends_to"] != gene) & (table["n_cells"] >= min_cells)]
    table = table.sort_values(sort_by, ascending=False, kind="stable").head(n)
    check_drawable(table, f"{gene!r} attends to no other gene in {min_cells} cells (`min_cells`)")
    height = 1.1 + 0.24 * len(table)
    default = (4.2 + 4.2 * network, max(height, 3.8) if network else height)
    axes = axes_for(ax, 1 + network, figsize or default)
    listed, at = axes[0], np.arange(len(table))[::-1]
    listed.hlines(at, table["expected"], table["attention"], color="0.75", linewidth=1.5, zorder=1)
    listed.scatter(table["expected"], at, marker="|", s=70, color=GUIDE, label="expected from ranks", zorder=2)
    listed.scatter(table["attention"], at, s=26, color="C0", label="attention", zorder=3)
    listed.set_yticks(at, table["attends_to"])
    listed.set_xlim(left=0)
    listed.locator_params(axis="x", nbins=5)
    listed.set_xlabel(f"attention given by {gene}")
    listed.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, **LEGEND)
    if network:
        _draw_network(axes[1], adata, gene, table, key=key, mod=mod)
    return finish(axes, given=ax, show=show)


#: Arrows that each gene of a network gives to others of it.
_ARROWS = 2


def _draw_network(ax: Axes, adata: Data, gene: str, table: pd.DataFrame, *, key: str | None, mod: str | None) -> None:
    """Draw a gene, those that it attends to, and the strongest attention between these."""
    import networkx as nx

    names = [gene, *table["attends_to"]]
    pairs = attention_pairs_df(adata, key=key, mod=mod)
    pairs = pairs[pairs["gene"].isin(names) & pairs["attends_to"].isin(names) & (pairs["gene"] != pairs["attends_to"])]
    pairs = pairs[pairs["gene"] != gene].groupby("gene", sort=False).head(_ARROWS)
    graph = nx.DiGraph()
    graph.add_nodes_from(names)
    for row in (table, pairs):
        graph.add_weighted_edges_from(row[["gene", "attends_to", "attention"]].itertuples(index=False))
    place = nx.shell_layout(graph, nlist=[names[:1], names[1:]])
    weights = np.array([weight for *_, weight in graph.edges(data="weight")])
    own = [giver == gene for giver, _ in graph.edges]
    nx.draw_networkx_edges(
        graph,
        place,
        ax=ax,
        width=0.4 + 2.2 * weights / weights.max(),
        edge_color=["C0" if is_own else "0.7" for is_own in own],
        arrowsize=9,
        node_size=420,
        connectionstyle="arc3,rad=0.08",
    )
    nx.draw_networkx_labels(
        graph, place, ax=ax, font_size=8, bbox={"boxstyle": "round,pad=0.2", "facecolor": "w", "edgecolor": "0.6"}
    )
    ax.margins(0.15)
    ax.set_axis_off()
    ax.set_title("attention between them", fontsize="medium")


@shared(example=_EXAMPLE)
def attention_difference(
    adata: Data,
    *,
    group: str | None = None,
    reference: str | None = None,
    statistic: Literal["received", "given"] = "received",
    n: int = 20,
    min_cells: int = 20,
    key: str | None = None,
    figsize: tuple[float, float] | None = None,
    ax: Axes | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Draw the genes and heads whose attention differs most between two groups, or changes most after a deletion.

    Points are differences, lines their 95 % intervals over donors, or over cells where there are no donors. Genes are
    ordered by the end of the interval that is nearer to 0, so that what is known best comes first.

    Parameters
    ----------
    {after_attention}
    group, reference
        The two groups: differences are `group` - `reference`. After a deletion, leave both out.
    {statistic_of_attention}
    n
        Number of rows.
    {min_cells_of_groups}
    {key}
    {figsize}
    {ax}
    {mod}
    {show}

    Returns
    -------
    The axes, unless the figure is shown. Their data: :func:`gfx.get.attention_difference_df`.

    Raises
    ------
    KeyError
        No such result.
    ValueError
        The result has no such groups, or no gene is in enough cells of both.

    Examples
    --------
    {example}
    >>> groups = {"group": "stimulated", "reference": "control"}
    >>> gfx.pl.attention_difference(adata, **groups, min_cells=10)
    """
    how = {"statistic": statistic, "min_cells": min_cells, "key": key, "mod": mod}
    table = attention_difference_df(adata, group=group, reference=reference, **how)
    nearer = np.where(table["difference"] > 0, table["low"], -table["high"])
    table = table.iloc[np.argsort(-nearer, kind="stable")[:n]]
    table = table[table["low"].notna()]
    check_drawable(table, f"no gene has an interval with {min_cells} cells in each group (`min_cells`)")
    (panel,) = axes_for(ax, 1, figsize or (5, 1.3 + 0.24 * len(table)))
    at = np.arange(len(table))[::-1]
    colours = np.where(table["difference"] > 0, "C3", "C0")
    panel.hlines(at, table["low"], table["high"], colors=colours, linewidth=1.5)
    panel.scatter(table["difference"], at, c=colours, s=24, zorder=3)
    panel.axvline(0, color=GUIDE, linewidth=0.8, linestyle=":")
    labels = table["gene"].str.cat(table[["layer", "head"]].astype(str).agg(".".join, axis=1), sep="  ")
    panel.set_yticks(at, labels)
    over = "donors" if "n_donors" in table else "cells"
    of = "after - before the deletion" if group is None else f"{group} - {reference}"
    label = f"attention {statistic} / uniform attention\n{of}\n95 % interval over {over}"
    panel.set_xlabel(folded(label, panel))
    panel.set_title("gene and head (layer.head)", fontsize="medium", loc="left")
    return finish(panel, given=ax, show=show)
