"""Axes in, Axes out: a figure of our own only where none is given."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def axes_for(
    given: Sequence[Axes] | None, n: int, figsize: tuple[float, float], widths: Sequence[float] | None = None
) -> list[Axes]:
    """Return the axes to draw on: those given, or `n` of a new figure side by side."""
    import matplotlib.pyplot as plt

    if given is None:
        _, axes = plt.subplots(
            1, n, figsize=figsize, layout="constrained", squeeze=False, gridspec_kw={"width_ratios": widths or [1] * n}
        )
        return list(axes[0])
    axes = list(given)
    if len(axes) != n:
        msg = f"This plot draws on {n} axes, found {len(axes)}."
        raise ValueError(msg)
    return axes


def figure_of(ax: Axes) -> Figure:
    """Return the figure that an axes belongs to."""
    return ax.get_figure(root=True)


def show_if_wanted(*, show: bool | None) -> None:
    """Show the figure if asked to; `None` follows scanpy's setting where scanpy is loaded."""
    if show is None:
        scanpy = sys.modules.get("scanpy")
        show = scanpy is not None and scanpy.settings.autoshow
    if show:
        import matplotlib.pyplot as plt

        plt.show()
