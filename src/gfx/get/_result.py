"""Find a finished result, or say which call makes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gfx._adata import pick
from gfx._keys import PERTURBATIONS
from gfx._provenance import made_by

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from mudata import MuData


def find_result(
    data: AnnData | MuData, slot: str, function: str, *, key: str | None, mod: str | None
) -> tuple[AnnData, Mapping[str, Any]]:
    """Return the AnnData and `uns[slot]`, if `function` wrote it."""
    adata = pick(data, mod)
    result = adata.uns.get(slot)
    genes, named = ", ..." if function in PERTURBATIONS else "", key and key != PERTURBATIONS.get(function)
    call = f"gfx.{function}(adata{genes}{f', key_added={key!r}' if named else ''})"
    writer = made_by(result)
    if writer is None:
        ours = sorted(name for name, value in adata.uns.items() if made_by(value) == function)
        msg = f"Did not find {slot!r} in `adata.uns`. Run `{call}` first. Results of `gfx.{function}` here: {ours}."
        raise KeyError(msg)
    if writer != function:
        msg = f"`adata.uns[{slot!r}]` was written by {writer!r}, not by `gfx.{function}`. Run `{call}`."
        raise KeyError(msg)
    return adata, result
