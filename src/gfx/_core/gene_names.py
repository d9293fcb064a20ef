"""Kinds of gene names, and the species whose genes are written like them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Iterable

_ENSEMBL = re.compile(r"^ENS([A-Z]{3,4})?G\d{11}")
_SPECIES = {"MUS": "mouse", "RNO": "rat", "DAR": "zebrafish", "MMU": "macaque", "SSC": "pig", "BTA": "cow"}
#: Gata4 and mt-Nd1 are mouse or rat; human symbols with small letters, such as C1orf112, do not start like this.
_RODENT_SYMBOL = re.compile(r"^[A-Z][a-z]+[A-Za-z0-9.-]*[0-9a-z]$|^mt-[A-Z]")
_FISH_SYMBOL = re.compile(r"^[a-z][a-z0-9.:_-]*$")


class Species(NamedTuple):
    """A species that is not human, and whether Ensembl ids say so or only the way symbols are written."""

    name: str
    is_sure: bool

    def may_be(self, other: Species | None) -> bool:
        """Whether both can be the same species: "mouse or rat" can be mouse; `None` is human."""
        return other is not None and (self.name in other.name or other.name in self.name)


def name_kind(name: str) -> str | Species:
    """Sort a gene name: ``"none"``, ``"Ensembl"``, ``"number"``, ``"symbol"``, or the species it belongs to."""
    if not name:
        return "none"
    if name.startswith("ENSG0"):
        return "Ensembl"
    if ensembl := _ENSEMBL.match(name.upper()):
        letters = ensembl[1]
        return Species(_SPECIES.get(letters, f"foreign (ENS{letters}G...)"), is_sure=True) if letters else "Ensembl"
    if name.isdigit():
        return "number"
    if _RODENT_SYMBOL.match(name):
        return Species("mouse or rat", is_sure=False)
    return Species("zebrafish or frog", is_sure=False) if _FISH_SYMBOL.match(name) else "symbol"


def name_kinds(names: Iterable[str]) -> pd.Series:
    """Count the kinds of names, the most frequent first."""
    return pd.Series([name_kind(str(name)) for name in names], dtype=object).value_counts()


def foreign_species(names: Iterable[str]) -> Species | None:
    """Name the species when more than half of the genes are not written as human ones."""
    kinds = name_kinds(names).drop("none", errors="ignore")
    foreign = kinds[[isinstance(kind, Species) for kind in kinds.index]]
    return foreign.index[0] if foreign.sum() > kinds.sum() / 2 else None
