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
    """Return the result named `key`; `None` takes that of `tl.delete_genes`, or else the only one there is.

    Raises
    ------
    KeyError
        There is none, or several and none of them is that of `tl.delete_genes` under its own name.
    """
    adata = pick(data, mod)
    there = {name: made_by(entry) for name, entry in adata.uns.items() if made_by(entry) in PERTURBATIONS}
    slot = perturbation_keys("tl.delete_genes").uns if key is None else key
    if key is None and slot not in there and there:
        if len(there) > 1:
            msg = f"There are several results; say which one: `key=` one of {sorted(there)}."
            raise KeyError(msg)
        (slot,) = there
    usual = {default: function for function, default in PERTURBATIONS.items()}
    function = there.get(slot) or usual.get(slot, "tl.delete_genes")
    adata, uns = find_result(data, slot, function, key=key, mod=mod)
    return PerturbationResult(adata, perturbation_keys(function, slot), uns)
