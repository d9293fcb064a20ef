"""Mean ROC curves of a model and of what it is held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx.get import classification_df, roc_df
from gfx.pl._classification import CHANCE, looks_of, rows_of, rows_of_unit, spelled
from gfx.pl._figure import axes_for, show_if_wanted

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from mudata import MuData


def roc(
    adata: AnnData | MuData,
    *,
    task: str | None = None,
    unit: str | None = None,
    class_name: str | None = None,
    key: str | None = None,
    figsize: tuple[float, float] | None = None,
    ax: Axes | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> Axes:
    """Draw the mean ROC curve of the model beside those of random weights and of baselines.

    The line is the mean true positive rate over folds and seeds, the band one standard deviation of these to either
    side. Red: the model. Grey: the same network with random weights. Other colours: baselines without a network. The
    dotted diagonal is chance. The legend gives the AUC, mean over folds, then mean and standard deviation over seeds.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.classify_genes` or :func:`gfx.tl.classify_cells`.
    task
        Which classes, ``"labels"`` or the column they came from; `None` takes the only ones.
    unit
        ``"gene"``, ``"occurrence"`` or ``"cell"``; `None` is genes, or cells.
    class_name
        The class scored against all others; `None` is the mean of all curves, or with two classes the second one.
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
    The axes. Its data: :func:`gfx.get.roc_df` and, for the AUC, :func:`gfx.get.classification_df`. With one of several
    classes the legend has no AUC, for that is over all of them.

    Raises
    ------
    KeyError
        No such result, task, unit or class, or several results or tasks and none said.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.classify_cells(adata, "cell_type", model="mini", method="linear_probe", n_repeats=1)
    >>> gfx.pl.roc(adata, show=False).get_xlabel()
    'false positive rate'
    """
    table = rows_of_unit(rows_of(roc_df(adata, key=key, mod=mod), "task", task), unit)
    classes = [str(name) for name in table["class"].unique()]
    if class_name is not None:
        table = rows_of(table, "class", class_name, "class_name")
    summary = classification_df(adata, key=key, mod=mod)
    chosen = table.iloc[0]
    summary = summary[(summary["task"] == chosen["task"]) & (summary["unit"] == chosen["unit"])]
    methods = [method for method in summary["method"].unique() if method in set(table["method"]) and method != CHANCE]
    told = class_name is None or len(classes) == 1
    auc = summary[summary["metric"] == "auc"].set_index("method")
    (ax,) = axes_for(None if ax is None else [ax], 1, figsize or (4.6, 4.6))
    ax.plot([0, 1], [0, 1], color="0.3", linewidth=0.9, linestyle=":", zorder=1)
    for method, look in looks_of(methods).items():
        # First over classes, so that a curve is one fold of one seed.
        curves = table[table["method"] == method].groupby(["seed", "fold", "fpr"])["tpr"].mean()
        curves = curves.unstack("fpr")
        mean, sd = curves.mean().to_numpy(), curves.std().to_numpy()
        label = spelled(method)
        if told and method in auc.index:
            label += f" {auc.at[method, 'mean']:.2f}"
            label += f" ± {auc.at[method, 'sd']:.2f}" if np.isfinite(auc.at[method, "sd"]) else ""
        ax.plot(curves.columns, mean, label=label, **look)
        if len(curves) > 1:
            low, high = np.clip([mean - sd, mean + sd], 0, 1)
            ax.fill_between(curves.columns, low, high, color=look["color"], alpha=0.15, linewidth=0, zorder=1)
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="false positive rate", ylabel="true positive rate")
    ax.set_aspect("equal")
    one = class_name or (classes[0] if len(classes) == 1 else None)
    ax.set_title(f"{one} against all others" if one else f"mean of {len(classes)} classes", fontsize="medium")
    ax.legend(title="AUC" if told else None, loc="lower right", frameon=False, fontsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    show_if_wanted(show=show)
    return ax
