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


def made_by(result: object) -> str | None:
    """Tell which function of ours wrote an entry of `uns`; `None` for what others keep there."""
    params = result.get("params") if isinstance(result, Mapping) else None
    return params.get("function") if isinstance(params, Mapping) else None


def claim(uns: Mapping[str, object], slot: str, function: str) -> None:
    """Refuse to write where another function's result, or something of the user's, would be lost."""
    if slot in uns and made_by(uns[slot]) != function:
        writer = made_by(uns[slot])
        found = f"a result of `gfx.{writer}`" if writer else "something that gfx did not write"
        msg = f"`adata.uns[{slot!r}]` holds {found}. Choose another name with `key_added=`, or delete it first."
        raise ValueError(msg)


def mask_name(mask_obs: object) -> str | None:
    """Note which cells were used: the name of a column, or that an array said it."""
    return mask_obs if mask_obs is None or isinstance(mask_obs, str) else "array"
