"""What all plots share: the axes they draw on, how they end, and names of points."""

from __future__ import annotations

import sys
import textwrap
from io import BytesIO
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

    Drawn = TypeVar("Drawn", Axes, list[Axes])

#: Greys that are legible on white and on black: of bands, and of lines that guide the eye.
BAND, GUIDE = ("0.5", 0.2), "0.5"

#: How legends look, and where those are that lie outside the axes.
LEGEND = {"frameon": False, "fontsize": "small"}
ABOVE = LEGEND | {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "ncols": 2}
BESIDE = LEGEND | {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}

#: Letters in an inch along the axes and in a line at most, lines of a text, and letters of the name of a set of genes.
_PER_INCH, _LONGEST, _MOST_LINES, _SET = 14, 60, 3, 28

#: Names next to points and steps in which they are moved apart at most.
_MOST_NAMES, _STEPS = 40, 200

#: In points: lines of names in a column, and how far names stay off the edge of the axes, which may be a line.
_LINE, _OFF_EDGE = 10.0, 3.0


def axes_for(
    given: Axes | Sequence[Axes] | None,
    n: int,
    figsize: tuple[float, float],
    widths: Sequence[float] | None = None,
    *,
    n_columns: int | None = None,
) -> list[Axes]:
    """Return the axes to draw on: those given, or `n` of a new figure side by side, in rows of `n_columns`."""
    import matplotlib.pyplot as plt

    if given is None:
        n_columns = n if n_columns is None else min(n, n_columns)
        shape = -(-n // n_columns), n_columns
        _, grid = plt.subplots(*shape, figsize=figsize, layout="constrained", squeeze=False, width_ratios=widths)
        for unused in grid.ravel()[n:]:
            unused.remove()
        axes = list(grid.ravel()[:n])
    else:
        axes = [given] if isinstance(given, plt.Axes) else list(given)
    if len(axes) != n:
        msg = f"This plot draws on {n} axes, found {len(axes)}."
        raise ValueError(msg)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return axes


def check_drawable(table: pd.DataFrame, reason: str) -> None:
    """Refuse to draw an empty table."""
    if table.empty:
        msg = f"There is nothing to draw: {reason}."
        raise ValueError(msg)


def show_power_of_ten(ax: Axes, *, room: float) -> None:
    """Write the power of ten of small numbers once, at the end of the horizontal axis, and leave it room in points."""
    ax.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=True)
    ax.xaxis.labelpad = room


def folded(text: str, ax: Axes, *, along: Literal["x", "y"] = "x", share: float = 1) -> str:
    """Break a text into lines that fit along the axes, or a share of them: names of groups and classes may be long."""
    length = ax.bbox.width if along == "x" else ax.bbox.height
    letters = int(share * min(length / figure_of(ax).dpi * _PER_INCH, _LONGEST))
    fold = textwrap.TextWrapper(width=max(letters, 12), max_lines=_MOST_LINES, placeholder=" …")
    return "\n".join(map(fold.fill, text.split("\n")))


def set_label(name: str) -> str:
    """Shorten the name of a set of many genes, which would leave no room for what is drawn: its first ones stay."""
    genes = name.split("+")
    n = max(1, int((np.cumsum([len(gene) + 1 for gene in genes]) < _SET - 5).sum()))
    return name if len(name) <= _SET or n == len(genes) else f"{'+'.join(genes[:n])} + {len(genes) - n} more"


def figure_of(ax: Axes) -> Figure:
    """Return the figure that an axes belongs to."""
    return ax.get_figure(root=True)


def finish(axes: Drawn, *, given: object, show: bool | None) -> Drawn | None:
    """Show the figure and return nothing, or return the axes that a plot drew on; see `show` in :mod:`gfx._docs`."""
    if show is None:
        scanpy = sys.modules.get("scanpy")
        show = given is None and (scanpy is None or scanpy.settings.autoshow)
    if not show:
        return axes
    import matplotlib.pyplot as plt

    plt.show()
    return None


def as_png(draw: Callable[[], Axes | Sequence[Axes]]) -> bytes:
    """Draw a new figure in matplotlib's own style, whatever the user's is, and close it."""
    import matplotlib.pyplot as plt

    others = set(plt.get_fignums())
    try:
        with plt.ioff(), plt.style.context("default"):
            figure, picture = figure_of(np.ravel(draw())[0]), BytesIO()
            figure.savefig(picture, format="png", dpi=150, bbox_inches="tight")  # also labels longer than an axis
    finally:
        for number in set(plt.get_fignums()) - others:  # also one that was begun before an error
            plt.close(number)
    return picture.getvalue()


_LINE_OF_LABEL = {"arrowstyle": "-", "color": GUIDE, "linewidth": 0.5, "shrinkB": 2}


def label_points(
    ax: Axes, names: Sequence[str], x: np.ndarray, y: np.ndarray, *, others: np.ndarray | None = None
) -> None:
    """Write names next to points, each with a line to its point; names without room are left out.

    No name covers a point, nor any of the `others` `(n, 2)`, which have no names, nor touches the edge of the axes. Of
    two names that overlap the first one stays, and the very first is given up last. Scales and limits have to be
    final, because names are placed on the page.
    """
    from adjustText import adjust_text

    points = np.column_stack([x, y])
    points = points if others is None else np.vstack([points, others])
    figure_of(ax).draw_without_rendering()  # the layout moves axes
    pixels = ax.transData.transform(points)
    inner = ax.bbox.padded(-_OFF_EDGE * figure_of(ax).dpi / 72)
    rows = np.array([row for row, width in enumerate(_widths(ax, names[:_MOST_NAMES])) if width <= inner.width], int)
    while len(rows):
        labels = [
            ax.annotate(
                names[row], points[row], xytext=points[row], fontsize="small", ha="center", va="center", zorder=4
            )
            for row in rows
        ]
        _, lines = adjust_text(
            labels,
            *points.T,
            target_x=points[rows, 0],
            target_y=points[rows, 1],
            ax=ax,
            expand=(1.15, 1.7),  # points have a size
            iter_lim=_STEPS,  # not a time limit: the same picture every time
            min_arrow_len=0,
            arrowprops=_LINE_OF_LABEL,
        )
        extents = [_move_into(label, inner) for label in labels]
        boxes = [extent.padded(-1) for extent in extents]  # letters do not fill their line
        fits = np.array(
            [
                not any(map(box.overlaps, boxes[:number]))
                and not ((pixels > extent.min) & (pixels < extent.max)).all(axis=1).any()
                for number, (box, extent) in enumerate(zip(boxes, extents, strict=True))
            ]
        )
        if fits.all():
            return
        for artist in (*labels, *lines):
            artist.remove()
        # Names that found room find more without the others. The first one stays for the last one, until it is alone.
        if not fits[0] and len(rows) > 1:
            fits[0], fits[-1] = True, False
        rows = rows[fits]


def _widths(ax: Axes, names: Sequence[str]) -> list[float]:
    """Measure names on the page."""
    label, widths = ax.text(0, 0, "", fontsize="small"), []
    for name in names:
        label.set_text(name)
        widths.append(label.get_window_extent().width)
    label.remove()
    return widths


def _move_into(label: Annotation, inner: Bbox) -> Bbox:
    """Move a label by as little as brings it into a box on the page, and return its own box."""
    extent = label.get_window_extent()
    move = np.maximum(inner.min - extent.min, 0) + np.minimum(inner.max - extent.max, 0)
    if move.any():
        place = label.axes.transData.transform(label.get_position())
        label.set_position(label.axes.transData.inverted().transform(place + move))
        extent = label.get_window_extent()
    return extent


def label_column(ax: Axes, names: Sequence[str], x: np.ndarray, y: np.ndarray, column: float) -> None:
    """Write names one below the other next to all points, each with a line to its point, the first ones that fit.

    In one dimension the places are exact, where adjustText leaves overlaps in a full column. Limits have to be final.
    """
    figure_of(ax).draw_without_rendering()  # the layout moves axes
    low, high = ax.get_window_extent().intervaly * 72 / figure_of(ax).dpi
    n = min(len(names), int((high - low) // _LINE))
    heights = low + (high - low) * (y[:n] - ax.get_ylim()[0]) / np.ptp(ax.get_ylim())
    order = np.argsort(heights, kind="stable")
    spaced = _LINE * np.arange(n)
    # Upwards as far as the one below asks for, then down again from the top.
    lines = np.maximum.accumulate(np.maximum(heights[order], low + _LINE / 2) - spaced) + spaced
    lines = np.minimum.accumulate((np.minimum(lines, high - _LINE / 2) - spaced)[::-1])[::-1] + spaced
    for row, line in zip(order, lines, strict=True):
        is_right = column > x[row]
        height = ax.get_ylim()[0] + (line - low) / (high - low) * np.ptp(ax.get_ylim())
        ends = {"relpos": (0 if is_right else 1, 0.5), "shrinkA": 1}  # from the end of the name that is nearer
        side = {"ha": "left" if is_right else "right", "va": "center", "fontsize": "small", "zorder": 4}
        ax.annotate(names[row], (x[row], y[row]), xytext=(column, height), arrowprops=_LINE_OF_LABEL | ends, **side)
