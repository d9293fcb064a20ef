"""What goes into `uns`: how a result was made, in values that h5ad and zarr accept."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from importlib.metadata import version
from pathlib import PurePath

import numpy as np


def storable(value: object) -> object:
    """Turn a value into what `write_h5ad` accepts, or raise `TypeError`."""
    match value:
        case None | bool() | int() | float():
            return value
        case Enum():
            return value.value
        case str():
            return str(value)
        case PurePath():
            return value.name  # a whole path would tell of somebody's disk
        case np.generic():
            return value.item()
        case np.ndarray():
            return value
        case Mapping():
            return {str(k): storable(v) for k, v in value.items()}
        case set() | frozenset():
            return [storable(v) for v in sorted(value)]
        case list() | tuple():
            return [storable(v) for v in value]
        case _:
            msg = f"Cannot store a {type(value).__name__} in `.uns`."
            raise TypeError(msg)


def record(function: str, **params: object) -> dict[str, object]:
    """Note the function, the version of gfx and the parameters that a result came from.

    `None` is left out: it would come back from a file as a missing entry or as text, depending on the format.
    """
    noted = {"gfx_version": version("scgfx"), "function": function} | params
    return {key: storable(value) for key, value in noted.items() if value is not None}
