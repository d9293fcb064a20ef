"""Find a finished result, or say which call makes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gfx._adata import pick

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData


def _made_by(value: object) -> str | None:
    """Which function of ours wrote this; `None` for what others keep in `uns`."""
    params = value.get("params") if isinstance(value, Mapping) else None
    return params.get("function") if isinstance(params, Mapping) else None


def find_result(
    data: AnnData | MuData, slot: str, function: str, *, key: str | None, mod: str | None
) -> tuple[AnnData, Mapping[str, Any]]:
    """Return the AnnData and `uns[slot]`, if `function` wrote it."""
    adata = pick(data, mod)
    result = adata.uns.get(slot)
    call = f"gfx.{function}(adata{', ...' if 'delete' in function else ''}{f', key_added={key!r}' if key else ''})"
    made_by = _made_by(result)
    if made_by is None:
        ours = sorted(name for name, value in adata.uns.items() if _made_by(value) == function)
        msg = f"Did not find {slot!r} in `adata.uns`. Run `{call}` first. Results of `gfx.{function}` here: {ours}."
        raise KeyError(msg)
    if made_by != function:
        msg = f"`adata.uns[{slot!r}]` was written by {made_by!r}, not by `gfx.{function}`. Run `{call}`."
        raise KeyError(msg)
    return adata, result
