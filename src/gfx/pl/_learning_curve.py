"""How much is learnt from how many cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gfx.get import learning_curve_df
from gfx.pl._classification import looks_of, rows_of, rows_of_unit, spelled
from gfx.pl._figure import axes_for, show_if_wanted

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from mudata import MuData

_LABELS = {"auc": "AUC", "accuracy": "accuracy", "macro_f1": "macro F1"}

#: Numbers of cells that have room below the axis, all of them.
_MOST_TICKS = 8


def learning_curve(
    adata: AnnData | MuData,
    *,
    task: str | None = None,
    unit: str | None = None,
    metric: str = "auc",
    key: str | None = None,
    figsize: tuple[float, float] | None = None,
    ax: Axes | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> Axes:
    """Draw how well classes are told apart against the number of cells trained on.

    A line a method: the mean over seeds, with one standard deviation of these to either side. Where the model's line is
    flat, more cells would not help; where a baseline's meets it, the model is of use for small data only.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.classify_genes` or :func:`gfx.tl.classify_cells`.
    task
        Which classes, ``"labels"`` or the column they came from; `None` takes the only ones.
    unit
        ``"gene"``, ``"occurrence"`` or ``"cell"``; `None` is genes, or cells.
    metric
        ``"auc"``, ``"accuracy"`` or ``"macro_f1"``.
    key
        The `key_added` of that call, or its default name; `None` takes the only result there is.
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
    The axes. Its data: :func:`gfx.get.learning_curve_df`.

    Raises
    ------
    KeyError
        No such result, task, unit or metric, or several results or tasks and none said.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.classify_cells(adata, "cell_type", model="mini", method="linear_probe", n_repeats=1)
    >>> gfx.pl.learning_curve(adata, show=False).get_xlabel()
    'cells trained on'
    """
    table = rows_of_unit(rows_of(learning_curve_df(adata, key=key, mod=mod), "task", task), unit)
    table = rows_of(table, "metric", metric)
    (ax,) = axes_for(None if ax is None else [ax], 1, figsize or (5.2, 3.8))
    for method, look in looks_of(table["method"].unique()).items():
        of_method = table[table["method"] == method]
        n_cells, mean, sd = (of_method[column].to_numpy() for column in ("n_cells", "mean", "sd"))
        ax.plot(n_cells, mean, marker="o", markersize=4, label=spelled(method), **look)
        ax.fill_between(n_cells, mean - sd, mean + sd, color=look["color"], alpha=0.15, linewidth=0, zorder=1)
    ax.set_xscale("log")
    numbers = sorted(table["n_cells"].unique())
    if len(numbers) <= _MOST_TICKS:
        ax.set_xticks(numbers, [f"{n:,}" for n in numbers])
        ax.minorticks_off()
    else:
        ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set(xlabel="cells trained on", ylabel=f"{_LABELS.get(metric, metric)} ({table['unit'].iloc[0]}s)")
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.spines[["top", "right"]].set_visible(False)
    show_if_wanted(show=show)
    return ax
