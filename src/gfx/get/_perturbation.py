"""Find what perturbing genes left in an AnnData."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gfx._adata import pick
from gfx._keys import PERTURBATIONS, perturbation_keys
from gfx._provenance import made_by
from gfx.get._result import find_result

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from mudata import MuData

    from gfx._keys import PerturbationKeys


@dataclass(frozen=True)
class PerturbationResult:
    """A finished result: where it lies, its names, and its tables."""

    adata: AnnData
    function: str
    keys: PerturbationKeys
    uns: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """Perturbations, in the order of the columns."""
        return [str(name) for name in self.uns["perturbations"]]

    @property
    def states(self) -> list[str]:
        """Names of the states; empty if there are none."""
        return [str(name) for name in self.uns.get("states", [])]

    def obsm(self, slot: str) -> np.ndarray:
        """Read an array of cells."""
        return np.asarray(self.adata.obsm[getattr(self.keys, slot)])

    def varm(self, slot: str) -> np.ndarray:
        """Read an array of genes."""
        return np.asarray(self.adata.varm[getattr(self.keys, slot)])

    def number_of(self, perturbation: str) -> int:
        """Find the column of a perturbation."""
        if perturbation not in self.names:
            close = difflib.get_close_matches(perturbation, self.names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            shown = self.names[:10] + ["..."] * (len(self.names) > 10)
            msg = f"Did not find the perturbation {perturbation!r}.{hint} Present: {shown}."
            raise KeyError(msg)
        return self.names.index(perturbation)


def find_perturbation(data: AnnData | MuData, *, key: str | None, mod: str | None) -> PerturbationResult:
    """Return the result named `key`; `None` takes the one under a default name, or else the only one there is.

    Raises
    ------
    KeyError
        There is none, or several that could be meant.
    """
    adata = pick(data, mod)
    there = {name: made_by(entry) for name, entry in adata.uns.items() if made_by(entry) in PERTURBATIONS}
    usual = {default: function for function, default in PERTURBATIONS.items()}
    slot = key
    if key is None:
        meant = sorted(name for name, function in there.items() if usual.get(name) == function) or sorted(there)
        if len(meant) > 1:
            msg = f"There are several results; say which one: `key=` one of {meant}."
            raise KeyError(msg)
        slot = meant[0] if meant else perturbation_keys("tl.delete_genes").uns
    function = there.get(slot) or usual.get(slot, "tl.delete_genes")
    adata, uns = find_result(data, slot, function, key=key, mod=mod)
    return PerturbationResult(adata, function, perturbation_keys(function, slot), uns)
