"""Plots of classified genes and cells: ROC curves, confusion, learning curves, and scores of genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gfx._docs import shared
from gfx.get import classification_df, confusion_df, gene_scores_df, learning_curve_df, roc_df
from gfx.pl._style import BESIDE, GUIDE, LEGEND, axes_for, check_drawable, figure_of, finish, folded, label_column

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd
    from matplotlib.axes import Axes

    from gfx._types import Data

#: Lines of the model and its controls; of other baselines the colours, none of them the model's red.
_LOOKS = {
    "model": {"color": "C3", "linewidth": 2, "zorder": 4},
    "random_weights": {"color": "0.6", "linewidth": 1.4, "zorder": 2},
    "majority": {"color": GUIDE, "linewidth": 0.9, "linestyle": ":", "zorder": 1},
}
_COLOURS = ("C0", "C1", "C4", "C5", "C8", "C9")

#: Labels of metrics on axes.
_METRICS = {"auc": "AUC", "accuracy": "accuracy", "macro_f1": "macro F1"}

#: Classes whose shares are written into the squares of a confusion matrix, and sizes of training sets on an axis; with
#: more there is no room.
_MOST_WRITTEN, _MOST_TICKS = 12, 8

#: Half the width of a strip of genes, and where the names beside it begin, if strips are 1 apart.
_HALF, _NAMES = 0.2, 0.28

#: Room for names before the first sorted gene and behind the last one, and their distance, as shares of all genes.
_ROOM, _OFF = 0.28, 0.04


#: Begins the examples of all plots here; the documentation runs it once.
_EXAMPLE = """
>>> import gfx
>>> adata = gfx.datasets.ifnb()
>>> adata = adata[adata.obs["cell_type"] == "CD14 Mono"][::20].copy()
>>> targets = "ISG15 IFI6 IFI35 IFI44 IFI44L IFIT1 IFIT2 IFIT3 IFITM1 IFITM2"
>>> targets += " IFITM3 MX1 MX2 OAS1 OAS2 OAS3 RSAD2 HERC5 EPSTI1 TNFSF10 LY6E"
>>> regulators = "STAT1 STAT2 STAT3 IRF1 IRF7 IRF9 JUN JUNB JUND FOS FOSB ATF3"
>>> regulators += " ATF4 NFKB1 CEBPB CEBPD KLF2 KLF4 KLF6 SPI1 MAFB XBP1"
>>> labels = {"target": targets.split(), "regulator": regulators.split()}
>>> gfx.tl.classify_genes(
...     adata,
...     labels,
...     model="mini",
...     method="linear_probe",
...     n_repeats=2,
...     learning_curve=[10, 20],
... )
"""


# --- performance ----------------------------------------------------------------------------------------------------


@shared(example=_EXAMPLE)
def roc(
    adata: Data,
    *,
    task: str | None = None,
    unit: str | None = None,
    class_name: str | None = None,
    key: str | None = None,
    figsize: tuple[float, float] | None = None,
    ax: Axes | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Draw the mean ROC curves of the model, of random weights and of baselines, for held-out genes or cells.

    A line is the mean true positive rate over folds and repeats, its band one standard deviation of these to either
    side. Red: the model. Grey: the model with random weights. Other colours: baselines without a model. The dotted
    diagonal is chance. The legend gives the AUC, its mean over folds and repeats, with its 95 % interval over genes,
    cells or donors.

    Parameters
    ----------
    {after_classifying}
    {task}
    {unit}
    class_name
        The class scored against all others. `None` draws the mean over classes, or with two classes the second one.
    {key}
    {figsize}
    {ax}
    {mod}
    {show}

    Returns
    -------
    The axes, unless the figure is shown. Their data: :func:`gfx.get.roc_df` and, for the AUC,
    :func:`gfx.get.classification_df`. With one of several classes the legend has no AUC, because that is over all of
    them.

    Raises
    ------
    KeyError
        No such result, task, unit or class, or several results or tasks and none given.
    ValueError
        Everything that a fold holds out is of one class.

    Examples
    --------
    {example}
    >>> gfx.pl.roc(adata)
    """
    table = roc_df(adata, key=key, mod=mod)
    check_drawable(table, "everything that a fold holds out is of one class, so there is no ROC curve")
    table = _of_unit(_select(table, "task", task), unit)
    classes = [str(name) for name in table["class"].unique()]
    if class_name is not None:
        table = _select(table, "class", class_name)
    summary = classification_df(adata, key=key, mod=mod)
    summary = summary[(summary["task"] == table["task"].iloc[0]) & (summary["unit"] == table["unit"].iloc[0])]
    methods = [method for method in summary["method"].unique() if method in set(table["method"]) - {"majority"}]
    has_auc = class_name is None or len(classes) == 1
    auc = summary[summary["metric"] == "auc"].set_index("method")
    (panel,) = axes_for(ax, 1, figsize or (4.6, 4.6))
    panel.plot([0, 1], [0, 1], **_LOOKS["majority"])
    for method, look in _looks(methods).items():
        # First over classes, so that a curve is one fold of one repeat.
        curves = table[table["method"] == method].groupby(["repeat", "fold", "fpr"])["tpr"].mean().unstack("fpr")
        mean, sd = curves.mean().to_numpy(), curves.std().to_numpy()
        label = method.replace("_", " ")
        if has_auc and method in auc.index:
            value, low, high = auc.loc[method, ["mean", "low", "high"]]
            label += f" {value:.2f}" + (f" ({low:.2f}–{high:.2f})" if np.isfinite(low) else "")
        band = np.clip([mean - sd, mean + sd], 0, 1) if len(curves) > 1 else None
        _line_with_band(panel, curves.columns, mean, band, label=label, **look)
    panel.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="false positive rate", ylabel="true positive rate")
    panel.set_aspect("equal")
    single = class_name or (classes[0] if len(classes) == 1 else None)
    title = f"{single} against all others" if single else f"mean of {len(classes)} classes"
    panel.set_title(folded(title, panel), fontsize="medium")
    has_interval = has_auc and auc.reindex(methods)["low"].notna().any()
    of_legend = "AUC (95 % interval)" if has_interval else "AUC" if has_auc else None
    panel.legend(loc="lower right", title=of_legend, title_fontsize="small", **LEGEND)
    return finish(panel, given=ax, show=show)


@shared(example=_EXAMPLE)
def learning_curve(
    adata: Data,
    *,
    task: str | None = None,
    unit: str | None = None,
    metric: str = "auc",
    key: str | None = None,
    figsize: tuple[float, float] | None = None,
    ax: Axes | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Draw how well held-out genes or cells are classified, against the number of training cells.

    A line is a method: the mean over repeats, with one standard deviation to either side. Where the line of the model
    is flat, more cells would not help; where that of a baseline meets it, the model is of use for small data only.

    Parameters
    ----------
    {after_classifying}
    {task}
    {unit}
    metric
        ``"auc"``, ``"accuracy"`` or ``"macro_f1"``.
    {key}
    {figsize}
    {ax}
    {mod}
    {show}

    Returns
    -------
    The axes, unless the figure is shown. Their data: :func:`gfx.get.learning_curve_df`.

    Raises
    ------
    KeyError
        No such result, task, unit or metric, or several results or tasks and none given.

    Examples
    --------
    {example}
    >>> gfx.pl.learning_curve(adata)
    """
    table = _of_unit(_select(learning_curve_df(adata, key=key, mod=mod), "task", task), unit)
    table = _select(table, "metric", metric)
    (panel,) = axes_for(ax, 1, figsize or (5.2, 3.8))
    for method, look in _looks(table["method"].unique()).items():
        of_method = table[table["method"] == method]
        n_cells, mean, sd = (of_method[column].to_numpy() for column in ("n_cells", "mean", "sd"))
        look |= {"label": method.replace("_", " "), "marker": "o", "markersize": 4}
        _line_with_band(panel, n_cells, mean, (mean - sd, mean + sd), **look)
    panel.set_xscale("log")
    numbers = sorted(table["n_cells"].unique())
    if len(numbers) <= _MOST_TICKS:
        panel.set_xticks(numbers, [f"{n:,}" for n in numbers])
        panel.minorticks_off()
    else:
        panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.set(xlabel="training cells", ylabel=f"{_METRICS.get(metric, metric)} ({table['unit'].iloc[0]}s)")
    panel.legend(**BESIDE)
    return finish(panel, given=ax, show=show)


@shared(example=_EXAMPLE)
def confusion(
    adata: Data,
    *,
    task: str | None = None,
    method: str = "model",
    key: str | None = None,
    cmap: str = "viridis",
    figsize: tuple[float, float] | None = None,
    ax: Axes | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Draw the confusion matrix of held-out genes or cells.

    A row is a true class, with the number of its genes or cells; its squares add up to 1, so that large classes do not
    look better than small ones. Grey rows are empty.

    Parameters
    ----------
    {after_classifying}
    {task}
    method
        ``"model"``, ``"random_weights"`` or a baseline.
    {key}
    {cmap}
    {figsize}
    {ax}
    {mod}
    {show}

    Returns
    -------
    The axes, unless the figure is shown. Their data: :func:`gfx.get.confusion_df`.

    Raises
    ------
    KeyError
        No such result, task or method, or several results or tasks and none given.

    Examples
    --------
    {example}
    >>> gfx.pl.confusion(adata)
    """
    import matplotlib as mpl

    table = _select(_select(confusion_df(adata, key=key, mod=mod), "task", task), "method", method)
    classes = [str(name) for name in table["true"].unique()]
    shares, numbers = (
        table.pivot(index="true", columns="predicted", values=value).loc[classes, classes].to_numpy()
        for value in ("share", "n")
    )
    n_classes, longest = len(classes), max(map(len, classes))
    side = min(max(2.0, 0.46 * n_classes), 12)
    room = (side + 2.6 + 0.085 * longest, side + 0.8 + 0.06 * longest)  # squares and names
    (panel,) = axes_for(ax, 1, figsize or room)
    colours = mpl.colormaps[cmap].with_extremes(bad="lightgray")
    image = panel.imshow(np.ma.masked_invalid(shares), cmap=colours, vmin=0, vmax=1)
    if n_classes <= _MOST_WRITTEN:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:  # else it would be written as 0.00
                dark = np.dot(colours(share)[:3], (0.299, 0.587, 0.114)) < 0.5
                look = {"ha": "center", "va": "center", "fontsize": "small", "color": "w" if dark else "k"}
                panel.text(column, row, f"{share:.2f}", **look)
    panel.set_xticks(range(n_classes), classes)
    totals = zip(classes, numbers.sum(axis=1), strict=True)
    panel.set_yticks(range(n_classes), [f"{name} ({n:,.0f})" for name, n in totals])
    if n_classes > 2 or longest > 8:
        panel.tick_params(axis="x", rotation=45)
        for label in panel.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    panel.set(xlabel="predicted class", ylabel=f"true class ({table['unit'].iloc[0]}s)")
    figure_of(panel).colorbar(image, ax=panel, label="share of the true class", shrink=0.8)
    return finish(panel, given=ax, show=show)


def _select(table: pd.DataFrame, column: str, value: str | None) -> pd.DataFrame:
    """Keep the rows with one value of a column: the given one, or else the only one."""
    present = [str(name) for name in table[column].unique()]
    if value is None and len(present) > 1:
        msg = f"There are several values of {column!r}; choose one with `{column}=`: {present}."
        raise KeyError(msg)
    if value is not None and value not in present:
        msg = f"Did not find the {column} {value!r}. Present: {present}."
        raise KeyError(msg)
    return table[table[column].astype(str) == (value or present[0])]


def _of_unit(table: pd.DataFrame, unit: str | None) -> pd.DataFrame:
    """Keep the rows of genes, cells or occurrences; `None` takes genes or cells, whichever were classified."""
    usual = next((name for name in ("gene", "cell") if name in set(table["unit"])), None)
    return _select(table, "unit", unit or usual)


def _looks(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return colour, width and order of the line of each method, in the order of the legend."""
    baselines = [method for method in methods if method not in _LOOKS]
    looks = {
        method: {"color": _COLOURS[number % len(_COLOURS)], "linewidth": 1.4, "zorder": 3}
        for number, method in enumerate(baselines)
    }
    return {method: dict((looks | _LOOKS)[method]) for method in methods}


def _line_with_band(ax: Axes, x: Any, y: np.ndarray, band: Sequence[np.ndarray] | None, **look: Any) -> None:
    ax.plot(x, y, **look)
    if band is not None:
        ax.fill_between(x, *band, color=look["color"], alpha=0.15, linewidth=0, zorder=1)


# --- genes ----------------------------------------------------------------------------------------------------------


@shared(example=_EXAMPLE)
def gene_scores(
    adata: Data,
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
) -> Axes | None:
    """Draw the probability of a class for each gene: held-out genes by label, or predicted genes by score.

    After :func:`gfx.tl.classify_genes`: a strip is a label, a point a gene, scored by models that were trained without
    it. Red genes are predicted to be of another class than their label. The highest and lowest genes of each strip are
    named, which are the most confident predictions and the largest errors.

    After :func:`gfx.tl.predict_genes`: all genes, sorted by score, descending. Blue strokes at the bottom mark genes of
    the training set; the highest and lowest of all other genes are named.

    Parameters
    ----------
    {after_scoring}
    {group}
    class_name
        The class whose probability is drawn. `None` draws the last one.
    n_names
        Number of genes to name at either end; fewer where there is no room.
    {names}
    {key}
    {min_cells}
    {figsize}
    {ax}
    {mod}
    {show}

    Returns
    -------
    The axes, unless the figure is shown. Their data: :func:`gfx.get.gene_scores_df`.

    Raises
    ------
    KeyError
        No such result, group or class, several results and no `key`, or no such column in `var`.
    ValueError
        No gene was scored in enough cells.

    Examples
    --------
    {example}
    >>> gfx.pl.gene_scores(adata, min_cells=5)
    """
    table = gene_scores_df(adata, group, key=key, min_cells=min_cells, names=names, mod=mod)
    check_drawable(table, f"no gene was scored in at least {min_cells} cells (`min_cells`)")
    classes = table.attrs["classes"]
    class_name = classes[-1] if class_name is None else class_name
    if class_name not in classes:
        msg = f"Did not find the class {class_name!r}. Present: {classes}."
        raise KeyError(msg)
    score = f"score_{class_name}"
    table = table.sort_values(score, ascending=False, kind="stable")
    held_out = "label" in table
    width = min(2.1 * len(classes) + 2.2, 16) if held_out else 6.4
    (panel,) = axes_for(ax, 1, figsize or (width, 4.6))
    if len(classes) == 2:
        panel.axhline(0.5, color=GUIDE, linewidth=0.8, linestyle=":", zorder=0)
    panel.set(ylim=(-0.03, 1.03), ylabel=folded(f"probability of {class_name!r}", panel, along="y"))
    draw = _draw_strips if held_out else _draw_sorted
    columns = draw(panel, table, score, n_names)
    if group is not None:
        panel.set_title(folded(str(group), panel), fontsize="medium")
    for genes, x, y, column in columns:
        label_column(panel, genes, x, y, column)
    return finish(panel, given=ax, show=show)


def _draw_strips(ax: Axes, table: pd.DataFrame, score: str, n_names: int) -> list[tuple]:
    """Draw genes by their label; return what to name, and the column of the names."""
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
        for chosen, colour in ((~wrong, "0.6"), (wrong, "C3")):
            ax.scatter(x[chosen], y[chosen], s=12, color=colour, alpha=0.8, linewidths=0, zorder=2)
        columns.append((genes["gene"].to_numpy()[ends], x[ends], y[ends], strip + _NAMES))
    numbers = table["label"].value_counts()
    names = [f"{folded(label, ax, share=0.75 / len(classes))}\n({numbers.get(label, 0):,} genes)" for label in classes]
    ax.set_xticks(range(len(classes)), names)
    ax.set(xlim=(-0.4, len(classes) - 0.3), xlabel="label of the gene")
    for colour, label in (("0.6", "predicted as labelled"), ("C3", "otherwise")):
        ax.scatter([], [], s=12, color=colour, linewidths=0, label=label)
    ax.legend(**BESIDE)
    return columns


def _draw_sorted(ax: Axes, table: pd.DataFrame, score: str, n_names: int) -> list[tuple]:
    """Draw genes from the highest score to the lowest; return what to name, and the column of the names."""
    import matplotlib as mpl

    n, genes, trained = len(table), table["gene"].to_numpy(), table["in_training"].to_numpy(dtype=bool)
    x, y = np.arange(1, n + 1), table[score].to_numpy()
    ax.scatter(x, y, s=6 if n > 500 else 14, color="0.6", linewidths=0, label=f"all genes ({n:,})", zorder=2)
    below = np.full(trained.sum(), -0.07)  # at the bottom, because points may be too many to tell colours apart
    stroke = {"linestyle": "none", "marker": "|", "markersize": 9, "markeredgewidth": 0.7, "alpha": 0.6, "color": "C0"}
    ax.plot(x[trained], below, label=f"training set ({trained.sum():,})", zorder=2, **stroke)
    ticks = mpl.ticker.MaxNLocator(4, integer=True).tick_values(0, n)
    ax.set_xticks([tick for tick in ticks if 0 <= tick <= n])
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set(xlim=(-_ROOM * n, (1 + _ROOM) * n), ylim=(-0.11, 1.03), xlabel="genes by score, descending")
    ax.spines["bottom"].set_bounds(0, n)
    ax.legend(loc="upper right", **LEGEND)
    new = np.flatnonzero(~trained)
    sides = (new[:n_names], -_OFF * n), (new[n_names:][::-1][:n_names], (1 + _OFF) * n)
    return [(genes[side], x[side], y[side], column) for side, column in sides]


def _ends(n: int, n_names: int) -> np.ndarray:
    """First and last places of n, the outermost first."""
    inwards = np.stack([np.arange(n), np.arange(n)[::-1]], axis=1)[: min(n_names, -(-n // 2))].ravel()
    return inwards[np.sort(np.unique(inwards, return_index=True)[1])]
