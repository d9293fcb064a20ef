"""What all plots share: the axes they draw on, how they end, and names of points."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Steps in which names are moved apart at most.
_STEPS = 500


def axes_for(
    given: Axes | Sequence[Axes] | None, n: int, figsize: tuple[float, float], widths: Sequence[float] | None = None
) -> list[Axes]:
    """Return the axes to draw on: those given, or `n` of a new figure side by side."""
    import matplotlib.pyplot as plt

    if given is None:
        _, axes = plt.subplots(1, n, figsize=figsize, layout="constrained", squeeze=False, width_ratios=widths)
        return list(axes[0])
    axes = [given] if isinstance(given, plt.Axes) else list(given)
    if len(axes) != n:
        msg = f"This plot draws on {n} axes, found {len(axes)}."
        raise ValueError(msg)
    return axes


def figure_of(ax: Axes) -> Figure:
    """Return the figure that an axes belongs to."""
    return ax.get_figure(root=True)


def finish(*axes: Axes, show: bool | None) -> None:
    """Take off the frame and show the figure if asked to; `None` follows scanpy's setting where scanpy is loaded."""
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    scanpy = sys.modules.get("scanpy")
    if show or (show is None and scanpy is not None and scanpy.settings.autoshow):
        import matplotlib.pyplot as plt

        plt.show()


def label_points(
    ax: Axes,
    names: Sequence[str],
    x: np.ndarray,
    y: np.ndarray,
    *,
    others: np.ndarray | None = None,
    column: float | None = None,
) -> None:
    """Write names beside points, each with a line to its point; names without room are left out, the last ones first.

    Scales and limits have to be final, because names are placed on the page.

    Parameters
    ----------
    others
        Points without names, which no name may cover either, `(n, 2)`.
    column
        Where names stand in one column beside all points, which leave it free.
    """
    if not len(names):
        return
    from adjustText import adjust_text

    points = np.column_stack([x, y])
    if others is not None:
        points = np.vstack([points, others])
    starts = points if column is None else np.column_stack([np.full(len(names), column), y])
    side = "center" if column is None else "left" if column > np.min(x) else "right"
    labels = [
        ax.annotate(name, point, xytext=start, fontsize="small", ha=side, va="center", zorder=4)
        for name, point, start in zip(names, points, starts, strict=False)
    ]
    figure_of(ax).draw_without_rendering()  # the layout moves axes
    # In a column, names move apart and are not pulled back to their points.
    apart = {"only_move": "y", "avoid_self": False, "force_pull": (0, 0), "expand": (1, 1.2)}
    around = {"x": points[:, 0], "y": points[:, 1], "expand": (1.15, 1.7)}  # points have a size
    _, lines = adjust_text(
        labels,
        target_x=x,
        target_y=y,
        ax=ax,
        iter_lim=_STEPS,  # not a time limit: the same picture every time
        min_arrow_len=0,
        arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.5, "shrinkB": 2},
        **(around if column is None else apart),
    )
    placed, pixels = [], ax.transData.transform(points)
    for label, line in zip(labels, lines, strict=True):
        box = label.get_window_extent().padded(-1)  # letters do not fill their line
        covers = ((pixels > box.min) & (pixels < box.max)).all(axis=1).any()
        if covers or any(map(box.overlaps, placed)):
            label.remove()
            line.remove()
        else:
            placed.append(box)
