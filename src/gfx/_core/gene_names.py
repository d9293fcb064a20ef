"""Gene names: their kinds, the species they belong to, what is no gene, and other names of the same gene."""

from __future__ import annotations

import gzip
import re
from functools import cache
from importlib.resources import files
from os.path import commonprefix
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Iterable

_ENSEMBL = re.compile(r"^ENS([A-Z]{3,4})?G\d{11}")
_SPECIES = {"MUS": "mouse", "RNO": "rat", "DAR": "zebrafish", "MMU": "macaque", "SSC": "pig", "BTA": "cow"}
#: Gata4 and mt-Nd1 are mouse or rat; human symbols with small letters, such as C1orf112, do not start like this.
_RODENT_SYMBOL = re.compile(r"^[A-Z][a-z]+[A-Za-z0-9.-]*[0-9a-z]$|^mt-[A-Z]")
_FISH_SYMBOL = re.compile(r"^[a-z][a-z0-9.:_-]*$")
#: Genomes that tools put in front of names where cells of two species share a matrix, or always.
_HUMAN_GENOME = re.compile(r"^(?:GRCh3[78]|hg(?:19|38))[_.-]+(?=\w)", re.IGNORECASE)
_RODENT_GENOME = re.compile(r"^(?:(GRCm3[89]|mm(?:9|10|39))|(?:Rnor\w*|mRatBN7|rn[67]))[_.-]+(?=\w)", re.IGNORECASE)
#: What is counted beside genes, by how it is named. Genes such as ERCC1 and HTO1 are none of these.
_NO_GENE = {
    "spike-ins": r"ERCC[-_.]\d{5}",
    "proteins": r".+[-_.](?:TotalSeq|Total)[-_.]?[A-D]|.+[-_.](?:ADT|Ab|prot|protein)|(?:ADT|prot)[-_.].+",
    "hashtags": r"(?:.+[-_.])?(?:HTO|Hashtag)[-_. ]?\d*(?:[-_.].+)?",
    "guides": r".+[-_.](?:sg|g)RNA(?:[-_.]?\d+)?|(?:sg|g)RNA[-_.].+",
    "peaks": r"chr[\dXYM]+[:_-]\d+[_-]\d+",
}
_ANY_NO_GENE = re.compile("|".join(f"(?P<{kind.replace('-', '_')}>{how})" for kind, how in _NO_GENE.items()), re.I)
#: How scanpy and R make the second column of a name unique.
_NUMBERED = re.compile(r"^(.+)[-.](\d{1,3})$")
#: How spreadsheets write dates: 2-Sep and Sep-02, with or without a year; 2016-09-02; 9/2/2016 or 2/9/2016.
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_YEAR = r"(?:-(?:\d\d){1,2})?"
_DAY_FIRST = re.compile(rf"^(\d{{1,2}})-({'|'.join(_MONTHS)}){_YEAR}$")
_MONTH_FIRST = re.compile(rf"^({'|'.join(_MONTHS)})-(\d{{1,2}}){_YEAR}$")
_YEAR_FIRST = re.compile(r"^(?:19|20)\d\d[-/](0[1-9]|1[0-2])[-/]([0-3]\d)(?:[ T]00:00:00)?$")
_NUMBERS_ALONE = re.compile(r"^\d{1,2}/\d{1,2}/(?:\d\d){1,2}$")


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
    if rodent := _RODENT_GENOME.match(name):
        return Species("mouse" if rodent[1] else "rat", is_sure=True)
    name = without_genome(name)
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


def without_genome(name: str) -> str:
    """Strip the human genome that stands in front of a name, such as ``GRCh38_``."""
    return _HUMAN_GENOME.sub("", name)


def no_gene(name: str) -> str | None:
    """Name what a column counts that is no gene, such as ``"spike-ins"``; `None` for a gene."""
    found = _ANY_NO_GENE.fullmatch(name)
    return found.lastgroup.replace("_", "-") if found and found.lastgroup else None


def plain_date(name: str) -> str | None:
    """Write a date into which a spreadsheet has turned a symbol as its day and month, ``2-SEP``; `None` for no date.

    Where numbers alone do not tell the day from the month, the date stays as it is.
    """
    name = name.strip().upper()
    if found := _DAY_FIRST.match(name):
        day, month = found.groups()
    elif found := _MONTH_FIRST.match(name):
        month, day = found.groups()
    elif found := _YEAR_FIRST.match(name):
        month, day = _MONTHS[int(found[1]) - 1], found[2]
    else:
        return name if _NUMBERS_ALONE.match(name) else None
    return f"{int(day)}-{month}"


def numbered(name: str) -> str | None:
    """Return the name in front of a number, such as CD3E of ``CD3E-1``; `None` where there is none."""
    found = _NUMBERED.match(name)
    return found and found[1]


def shared_prefix(names: Iterable[str]) -> str:
    """Find what all names begin with, up to a character that separates parts, such as ``"rna_"``."""
    return re.split(r"[^_.:|-]*$", commonprefix(list(names)))[0]  # noqa: RUF071 - names are no paths


@cache
def human_genes() -> dict[str, str]:
    """Map current and former symbols, synonyms and retired ids, in capitals, to Ensembl ids of human genes."""
    table = gzip.decompress((files("gfx._core") / "gene_names.tsv.gz").read_bytes()).decode()
    rows = (line.split("\t") for line in table.splitlines())
    return {name: gene for gene, names in rows for name in names.split("|")}
