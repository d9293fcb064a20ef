"""Which class is taken for which."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx.get import confusion_df
from gfx.pl._classification import rows_of
from gfx.pl._figure import axes_for, figure_of, show_if_wanted

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from mudata import MuData

#: Classes whose shares are written into the squares; with more there is no room.
_MOST_WRITTEN = 12


def confusion(
    adata: AnnData | MuData,
    *,
    task: str | None = None,
    method: str = "model",
    key: str | None = None,
    cmap: str = "viridis",
    figsize: tuple[float, float] | None = None,
    ax: Axes | None = None,
    mod: str | None = None,
    show: bool | None = None,
) -> Axes:
    """Draw which class is taken for which, in genes or cells held out.

    A row is a true class, with the number of its genes or cells; its squares add up to 1. Grey rows have none. Large
    classes do not look better than small ones, as they would in numbers.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.classify_genes` or :func:`gfx.tl.classify_cells`.
    task
        Which classes, ``"labels"`` or the column they came from; `None` takes the only ones.
    method
        ``"model"``, ``"random_weights"`` or a baseline.
    key
        The `key_added` of that call, or its default name; `None` takes the only result there is.
    cmap
        Colour map of the shares.
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
    The axes. Its data: :func:`gfx.get.confusion_df`.

    Raises
    ------
    KeyError
        No such result, task or method, or several results or tasks and none said.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.classify_cells(adata, "cell_type", model="mini", method="linear_probe", n_repeats=1)
    >>> gfx.pl.confusion(adata, show=False).get_ylabel()
    'true class (cells)'
    """
    import matplotlib as mpl

    table = rows_of(rows_of(confusion_df(adata, key=key, mod=mod), "task", task), "method", method)
    classes = [str(name) for name in table["true"].unique()]
    shares, numbers = (
        table.pivot(index="true", columns="predicted", values=value).loc[classes, classes].to_numpy()
        for value in ("share", "n")
    )
    n_classes, of = len(classes), table["unit"].iloc[0]
    longest, side = max(map(len, classes)), min(max(2.0, 0.46 * n_classes), 12)
    figsize = figsize or (side + 2.6 + 0.085 * longest, side + 0.8 + 0.06 * longest)  # squares, and room for names
    (ax,) = axes_for(None if ax is None else [ax], 1, figsize)
    colours = mpl.colormaps[cmap].with_extremes(bad="lightgray")
    image = ax.imshow(np.ma.masked_invalid(shares), cmap=colours, vmin=0, vmax=1)
    if n_classes <= _MOST_WRITTEN:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:  # what would be written as 0.00 is no news
                dark = np.dot(colours(share)[:3], (0.299, 0.587, 0.114)) < 0.5
                ax.text(
                    column, row, f"{share:.2f}", ha="center", va="center", fontsize="small", color="w" if dark else "k"
                )
    ax.set_xticks(range(n_classes), classes)
    ax.set_yticks(
        range(n_classes), [f"{name} ({n:,.0f})" for name, n in zip(classes, numbers.sum(axis=1), strict=True)]
    )
    if n_classes > 2 or longest > 8:
        ax.tick_params(axis="x", rotation=45)
        for label in ax.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    ax.set(xlabel="predicted class", ylabel=f"true class ({of}s)")
    figure_of(ax).colorbar(image, ax=ax, label="share of the true class", shrink=0.8)
    show_if_wanted(show=show)
    return ax
