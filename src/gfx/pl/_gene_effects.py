"""How far other genes move, beside how far they move anyway."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from gfx.get import gene_effects_df
from gfx.pl._figure import axes_for, show_if_wanted
from gfx.pl._labels import name_points

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from mudata import MuData

#: Letters that fit beside the axes.
_WIDEST = 60


def gene_effects(
    adata: AnnData | MuData,
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
) -> Axes:
    """Draw how far each other gene moves, against how far it moves when random genes are perturbed instead.

    On the line lie genes that move by as much more, or less, than always as the median gene; what is special about the
    perturbation is above it. The genes farthest above are named, as far as there is room. Without random sets, the
    number of cells takes their place.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.delete_genes`, :func:`gfx.tl.overexpress_genes` or :func:`gfx.tl.shift_genes`.
    perturbation
        Its name, such as ``"GATA4"`` or ``"GATA4+TBX5"``.
    targets
        Sets of genes to show in colour, such as ``{"direct targets": ["MYH6", "MYH7"]}``.
    key
        The `key_added` of that call, or its default name.
    n_top
        Genes to name.
    min_cells
        Genes seen together with the perturbed ones in fewer cells are left out.
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
    The axes. Its data: :func:`gfx.get.gene_effects_df`.

    Raises
    ------
    KeyError
        No such result or perturbation.
    ValueError
        No gene is seen in enough cells.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, "CD3D", model="mini", null=10)
    >>> gfx.pl.gene_effects(adata, "CD3D", show=False).get_ylabel()
    'shift of a gene with CD3D perturbed (1 - cosine)'
    """
    table = gene_effects_df(adata, perturbation, key=key, min_cells=min_cells, mod=mod)
    beside = "random_shift" if "random_shift" in table else "n_cells"
    table = table[(table["shift"] > 0) & (table[beside] > 0)]
    if table.empty:
        msg = f"There is nothing to draw: no gene is seen in at least {min_cells} cells (`min_cells`)."
        raise ValueError(msg)
    (ax,) = axes_for(None if ax is None else [ax], 1, figsize or (5.2, 4.6))
    ax.scatter(table[beside], table["shift"], s=8, color="0.6", alpha=0.6, linewidths=0, zorder=1)
    if beside == "random_shift":
        ends = np.array([table[beside].min(), table[beside].max()])
        usual = 2 ** np.log2(table["shift"].astype(float) / table[beside]).median()  # where the excess is 0
        ax.plot(ends, usual * ends, color="0.3", linewidth=0.9, linestyle="--", zorder=2, label="as the median gene")
    for number, (name, genes) in enumerate((targets or {}).items()):
        mine = table[table["gene"].isin(list(genes))]
        ax.scatter(
            mine[beside],
            mine["shift"],
            s=26,
            color=f"C{number}",
            edgecolors="white",
            linewidths=0.5,
            zorder=3,
            label=f"{name} ({len(mine)})",
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel(
        "its shift with random genes perturbed (1 - cosine)" if beside == "random_shift" else "cells with the gene"
    )
    measured = f"shift of a gene with {perturbation} perturbed"
    # Sets of genes have long names.
    fits = len(measured) < _WIDEST - 12
    ax.set_ylabel(f"{measured} (1 - cosine)" if fits else f"{textwrap.fill(measured, _WIDEST)}\n(1 - cosine)")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    named = table.head(n_top)
    name_points(ax, named["gene"].tolist(), named[beside].to_numpy(), named["shift"].to_numpy())
    show_if_wanted(show=show)
    return ax
