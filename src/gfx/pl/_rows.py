"""Effects in rows, each with the random sets that it is held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

#: Random sets drawn in a row at most; the bar is over all of them.
_MAX_POINTS = 200

NULL_COLOUR, EFFECT_COLOUR = "0.6", "black"


def draw_random(ax: Axes, row: float, values: np.ndarray, jitter: np.random.Generator) -> None:
    """Draw random sets as grey points, with a bar from their 5th to their 95th percentile and a line at the median."""
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, middle, high = np.percentile(values, [5, 50, 95])
    ax.barh(row, high - low, left=low, height=0.62, color="0.9", linewidth=0, zorder=0.5)
    ax.plot([middle, middle], [row - 0.31, row + 0.31], color=NULL_COLOUR, linewidth=1.2, zorder=1)
    points = values if len(values) <= _MAX_POINTS else jitter.choice(values, _MAX_POINTS, replace=False)
    at = row + jitter.uniform(-0.25, 0.25, len(points))
    ax.scatter(points, at, s=5, color=NULL_COLOUR, alpha=0.55, linewidths=0, zorder=1.5)


def label_rows(ax: Axes, labels: Sequence[str], notes: Sequence[str]) -> None:
    """Name the rows on the left, the first on top, and say of each on the right where it stands."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    for row, note in enumerate(notes):
        ax.annotate(
            note, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize="small", annotation_clip=False
        )


def few_short_ticks(ax: Axes) -> None:
    """Label few places on the axis of effects, with the power of ten once at its end: effects are small numbers."""
    ax.locator_params(axis="x", nbins=5)
    ax.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=True)
    ax.xaxis.labelpad = 16  # below the power of ten, however long the label is


def place(z: float, p: float) -> str:
    """Say where an effect stands among random sets; nothing where there are none."""
    if not np.isfinite(z):
        return ""
    return f"z {round(z, 1) + 0.0:+.1f}" + (f", p {p:.2g}" if np.isfinite(p) else "")
