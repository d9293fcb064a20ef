"""What plots of learnt classes share: which rows they draw, and how a method looks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd

_MODEL, _RANDOM, CHANCE = "model", "random_weights", "majority"

#: Baselines without a network; red is the model's.
_COLOURS = ("C0", "C1", "C4", "C5", "C8", "C9")


def rows_of(table: pd.DataFrame, column: str, wanted: str | None, argument: str | None = None) -> pd.DataFrame:
    """Keep the rows with one value of a column: the one wanted, or the only one there is."""
    present = [str(value) for value in table[column].unique()]
    argument = argument or column
    if wanted is None and len(present) > 1:
        msg = f"There are several values of {column!r}; say which one: `{argument}=` one of {present}."
        raise KeyError(msg)
    if wanted is not None and wanted not in present:
        msg = f"Did not find the {column} {wanted!r}. Present: {present}."
        raise KeyError(msg)
    return table if wanted is None else table[table[column] == wanted]


def rows_of_unit(table: pd.DataFrame, unit: str | None) -> pd.DataFrame:
    """Keep the rows of genes, cells or occurrences; `None` takes genes or cells, whichever were classified."""
    present = set(table["unit"])
    usual = next((one for one in ("gene", "cell") if one in present), None)
    return rows_of(table, "unit", unit or usual)


def looks_of(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return colour, width and place of the line of each method, in the order of the legend."""
    others = iter(range(1000))
    looks = {}
    for method in methods:
        if method == _MODEL:
            looks[method] = {"color": "C3", "linewidth": 2, "zorder": 4}
        elif method == _RANDOM:
            looks[method] = {"color": "0.6", "linewidth": 1.4, "zorder": 2}
        elif method == CHANCE:
            looks[method] = {"color": "0.3", "linewidth": 0.9, "linestyle": ":", "zorder": 1}
        else:
            looks[method] = {"color": _COLOURS[next(others) % len(_COLOURS)], "linewidth": 1.4, "zorder": 3}
    return looks


def spelled(method: str) -> str:
    """Spell a method for a legend."""
    return method.replace("_", " ")
