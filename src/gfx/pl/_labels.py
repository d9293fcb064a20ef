"""Names beside points, none upon another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx.pl._figure import figure_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

#: Sizes in points: letters of names (wide, high), and how far from its point a name needs a line to it.
_LETTER, _NEAR = (6.0, 9.5), 12

#: Where a name goes from its point, in points: right or left, and above or below.
_PLACES = [(x, y) for y in (4, -12, 16, -24, 28, -36, 40, -48) for x in (5, -5)]


def name_points(
    ax: Axes,
    names: Sequence[str],
    x: np.ndarray,
    y: np.ndarray,
    *,
    apart: float = 0,
    others: np.ndarray | None = None,
) -> None:
    """Write names beside points, the first ones first, where no earlier one stands; the rest is left out.

    Scales and limits have to be final, for places are found on the page.

    Parameters
    ----------
    apart
        Radius of the points, in points, that no name may cover.
    others
        Points without names that no name may cover either, `(n, 2)`.
    """
    if not len(names):
        return
    figure_of(ax).draw_without_rendering()  # the layout moves axes
    page = figure_of(ax).dpi / 72
    points = ax.transData.transform(np.column_stack([x, y])) / page
    inside = ax.get_window_extent().extents / page
    seen = points if others is None else np.vstack([points, ax.transData.transform(others) / page])
    taken = np.column_stack([seen - apart, seen + apart]) if apart else np.zeros((0, 4))
    for name, point, at in zip(names, points, zip(x, y, strict=True), strict=True):
        boxes = [_box(point, place, name) for place in _PLACES]
        free = [number for number, box in enumerate(boxes) if not _meets(taken, box)]
        # Some stand better beyond the edge than nowhere.
        within = [number for number in free if _is_within(boxes[number], inside)]
        chosen = (within or free)[:1]
        if not chosen:
            continue
        shift = _PLACES[chosen[0]]
        far = not -_NEAR <= shift[1] < _NEAR
        ax.annotate(
            name,
            at,
            xytext=shift,
            textcoords="offset points",
            ha="left" if shift[0] > 0 else "right",
            fontsize="small",
            zorder=4,
            arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.5, "shrinkA": 0} if far else None,
        )
        taken = np.vstack([taken, boxes[chosen[0]]])


def _box(point: np.ndarray, shift: tuple[float, float], name: str) -> np.ndarray:
    """Left, bottom, right and top of a name."""
    wide, high = _LETTER[0] * len(name), _LETTER[1]
    left = point[0] + shift[0] - (wide if shift[0] < 0 else 0)
    bottom = point[1] + shift[1] - 2  # letters that go below the line
    return np.array([left, bottom, left + wide, bottom + high])


def _meets(taken: np.ndarray, box: np.ndarray) -> bool:
    return bool(((taken[:, :2] < box[2:]) & (taken[:, 2:] > box[:2])).all(axis=1).any())


def _is_within(box: np.ndarray, edges: np.ndarray) -> bool:
    return bool((box[:2] >= edges[:2]).all() and (box[2:] <= edges[2:]).all())
