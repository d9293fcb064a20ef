"""The genes a model knows: token, non-zero median, symbol, aliases; and the special tokens."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from gfx._core.gene_names import foreign_species, human_genes, plain_date, without_genome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gfx._core.gene_names import Species

PAD, MASK, CLS, EOS = "<pad>", "<mask>", "<cls>", "<eos>"
SPECIALS = (PAD, MASK, CLS, EOS)

#: An Ensembl id with a version behind it, such as ENSG00000136574.12, or a number that made it unique (the _PAR_Y
#: suffix stays part of the id).
_VERSIONED = re.compile(r"^(ENS[A-Z]*\d{11})[.-]\d+$")


def plain_id(name: str) -> str:
    """Upper-case a gene name, and strip a human genome in front of it and the version of an Ensembl id."""
    name = without_genome(name.strip()).upper()
    versioned = _VERSIONED.match(name)
    return versioned.group(1) if versioned else name


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a model knows of each token, in arrays of one row per token."""

    name: str  # what people call it, such as "V2" or "mini"
    ids: np.ndarray  # Ensembl id or special token, `(n_tokens,)`; the position is the token
    medians: np.ndarray  # non-zero median of depth-normalised counts, float64 `(n_tokens,)`; NaN for special tokens
    symbols: np.ndarray  # gene symbol, empty where unknown
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names, in capitals, to ids of this vocabulary
    n_cells: np.ndarray | None = None  # cells with the gene when medians were taken, int64; 0 for special tokens
    gene_types: np.ndarray | None = None  # such as "protein_coding", empty where unknown

    def __post_init__(self) -> None:
        n = len(self.ids)
        columns = {name: getattr(self, name) for name in ("ids", "medians", "symbols", "n_cells", "gene_types")}
        lengths = {name: len(column) for name, column in columns.items() if column is not None}
        if set(lengths.values()) != {n}:
            found = ", ".join(f"{length} {name}" for name, length in lengths.items())
            msg = f"Vocabulary {self.name!r} has {found}; one of each per token is needed."
            raise ValueError(msg)
        if len(self.token_of) != n:
            msg = f"Vocabulary {self.name!r} names a gene twice: {n} tokens, {len(self.token_of)} different ids."
            raise ValueError(msg)
        specials = [special for special in SPECIALS if special in self.token_of]
        if specials not in ([*SPECIALS], [PAD, MASK]):
            msg = (
                f"Vocabulary {self.name!r} lacks special tokens: found {specials}. "
                f"It needs {PAD} and {MASK}, and {CLS} and {EOS} both or neither."
            )
            raise ValueError(msg)
        unusable = ~self.is_special & ~(np.isfinite(self.medians) & (self.medians > 0))
        if unusable.any():
            examples = self.ids[unusable][:3].tolist()
            msg = f"Vocabulary {self.name!r}: {unusable.sum()} genes have no positive median, such as {examples}."
            raise ValueError(msg)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Vocabulary({self.name!r}, {self.n_genes:,} genes, {'with' if self.has_cls else 'without'} <cls>)"

    @cached_property
    def token_of(self) -> dict[str, int]:
        """Ensembl id or special token -> token."""
        return {str(name): token for token, name in enumerate(self.ids)}

    @cached_property
    def is_special(self) -> np.ndarray:
        """Which tokens are not genes, bool `(n_tokens,)`."""
        return np.isin(self.ids, SPECIALS)

    @cached_property
    def _token_of_name(self) -> dict[str, int]:
        """Every name that leads to a gene, in capitals and without version."""
        genes = {plain_id(str(name)): token for token, name in enumerate(self.ids) if not self.is_special[token]}
        symbols = {str(symbol).upper(): token for token, symbol in enumerate(self.symbols) if symbol}
        # Published mappings win over symbols, as in the official software: retired ids move to their successors.
        aliases = {key: self.token_of[target] for key, target in self.aliases.items() if target in self.token_of}
        # Wherever the model's own files know a name, they win over other names of the human genes.
        others = {name: self.token_of[gene] for name, gene in human_genes().items() if gene in self.token_of}
        return others | genes | symbols | aliases

    @cached_property
    def n_with_symbol(self) -> Mapping[str, int]:
        """Number of genes with each symbol; a few symbols are shared."""
        return Counter(map(str, self.symbols))

    @cached_property
    def species(self) -> Species | None:
        """Species whose genes these are; `None` if they are human."""
        return foreign_species(self.ids[~self.is_special])

    @property
    def n_genes(self) -> int:
        """Number of genes, special tokens not counted."""
        return int((~self.is_special).sum())

    @property
    def pad(self) -> int:
        """Padding token."""
        return self.token_of[PAD]

    @property
    def mask(self) -> int:
        """Mask token."""
        return self.token_of[MASK]

    @property
    def cls(self) -> int | None:
        """Token that stands for the cell in front of its genes, if the family has one."""
        return self.token_of.get(CLS)

    @property
    def eos(self) -> int | None:
        """Token behind the last gene, if the family has one."""
        return self.token_of.get(EOS)

    @property
    def has_cls(self) -> bool:
        """Whether cells are written as ``<cls> genes <eos>`` (V2) and not as genes alone (V1)."""
        return self.cls is not None

    @property
    def n_specials(self) -> int:
        """Special tokens in a cell: `<cls>` and `<eos>`, or none."""
        return 2 if self.has_cls else 0

    @property
    def first_gene(self) -> int:
        """Position of a cell's first gene: behind `<cls>`, or at the front."""
        return 1 if self.has_cls else 0

    @property
    def token_dtype(self) -> np.dtype:
        """Smallest unsigned integers that hold every token."""
        return np.dtype(np.uint16 if len(self) - 1 <= np.iinfo(np.uint16).max else np.uint32)

    def resolve(self, names: Iterable[str]) -> np.ndarray:
        """Find the token of each gene name, int32 `(n_names,)`; -1 where the model does not know the gene.

        Names are Ensembl ids with or without version, retired ids, current and former symbols and aliases, in any case,
        and dates into which spreadsheets turned symbols, where one gene is meant.
        """
        return np.fromiter((self._token_of(name) for name in names), dtype=np.int32)

    def _token_of(self, name: str) -> int:
        known = self._token_of_name
        if name not in known:
            name = plain_id(str(name))
        if name in known:
            return known[name]
        date = plain_date(name)
        return -1 if date is None else known.get(date, -1)

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of tokens and medians: what decides whether two encodings may be compared."""
        digest = hashlib.sha256()
        digest.update("\n".join(self.ids.tolist()).encode())
        digest.update(np.ascontiguousarray(self.medians, dtype="<f8").tobytes())
        return digest.hexdigest()
