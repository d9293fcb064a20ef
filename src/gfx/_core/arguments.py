"""What users give: whole numbers, seeds among them, Python and numpy integers alike and no booleans; and names."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable


def check_whole(value: object, name: str, least: float = -np.inf) -> int:
    """Return a whole number as a Python integer; refuse other types, and numbers below `least`."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        msg = f"`{name}` is a whole number, found {value!r}."
        raise TypeError(msg)
    if value < least:
        msg = f"`{name}` is {least} or more, found {value}."
        raise ValueError(msg)
    return int(value)


def check_seed(seed: object) -> int:
    """Return the seed of random numbers as a Python integer: a repeated call has to draw the same numbers again."""
    return check_whole(seed, "rng", 0)


def check_choice(value: object, name: str, choices: Iterable[object]) -> None:
    """Refuse a value that is none of the choices."""
    choices = list(choices)
    if value not in choices:
        msg = f"`{name}` is one of {choices}, found {value!r}."
        raise ValueError(msg)


def did_you_mean(name: str, known: Iterable[str], n: int = 1) -> str:
    """Ask in a message for the known names that come close to one that is not known; "" if none does."""
    close = difflib.get_close_matches(name, known, n)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
