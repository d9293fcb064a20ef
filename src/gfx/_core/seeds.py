"""Whole numbers that users give, seeds among them: Python and numpy integers alike, and no booleans."""

from __future__ import annotations

import numpy as np


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
