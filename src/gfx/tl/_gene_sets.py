"""Which genes to perturb: alone, together, or each with all others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING

import numpy as np

from gfx._adata import shortened
from gfx._core.arguments import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gfx._core.vocabulary import Vocabulary

#: A gene, genes together, `...` for every gene in turn, or a gene with every other one, ``("GATA4", ...)``.
GeneSet = str | EllipsisType | tuple[str | EllipsisType, ...]
Genes = GeneSet | Iterable[GeneSet]


@dataclass(frozen=True)
class GeneSets:
    """Perturbations: how they are called, Ensembl ids joined by "+", and tokens."""

    names: list[str]
    ensembl_ids: list[str]
    tokens: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.names)


def find_gene_sets(genes: Genes, vocabulary: Vocabulary, detected: np.ndarray) -> GeneSets:
    """Find the tokens of each perturbation, and name it.

    Parameters
    ----------
    detected
        Tokens that the cells have, ascending: what `...` stands for.

    Raises
    ------
    ValueError
        A gene that the model does not know, a gene or a set given twice, or none at all.
    TypeError
        Something that is no name.
    """
    if isinstance(genes, str | EllipsisType) or _is_set(genes):
        genes = [genes]  # a tuple of names is one set, in a list or by itself
    if not isinstance(genes, Iterable) or isinstance(genes, Mapping) or getattr(genes, "ndim", 1) != 1:
        msg = f"`genes` are names of genes, or tuples of names, found {genes!r} of type {type(genes).__name__}."
        raise TypeError(msg)
    entries = [(entry,) if isinstance(entry, str | EllipsisType) else entry for entry in genes]
    for entry in entries:
        if not _is_set(entry):
            msg = f"Genes are names, or tuples of names; found {entry!r} of type {type(entry).__name__}."
            raise TypeError(msg)
    named = list(dict.fromkeys(name for entry in entries for name in entry if name is not ...))
    refuse_unknown(named, vocabulary)
    token_of = dict(zip(named, vocabulary.resolve(named).tolist(), strict=True))
    names, tokens = [], []
    for entry in entries:
        known = [name for name in entry if name is not ...]
        members = [token_of[name] for name in known]
        if len(entry) - len(known) > 1:
            msg = f"{entry!r} has `...` more than once; name the pairs, such as with itertools.combinations."
            raise ValueError(msg)
        if len(set(members)) < len(members):
            msg = f"A gene is named twice in {entry}."
            raise ValueError(msg)
        if ... in entry:
            others = [token for token in detected.tolist() if token not in members]
            names += ["+".join([*known, set_name([token], vocabulary)]) for token in others]
            tokens += [np.array([*members, token], dtype=np.int64) for token in others]
        else:
            names.append("+".join(known))
            tokens.append(np.array(members, dtype=np.int64))
    if not tokens or not all(map(len, tokens)):
        msg = "`genes` is empty: give at least one gene, or a tuple of genes to perturb together."
        raise ValueError(msg)
    seen: dict[frozenset[int], str] = {}
    for name, members in zip(names, tokens, strict=True):
        key = frozenset(members.tolist())
        if key in seen:
            msg = f"{name!r} and {seen[key]!r} are the same perturbation; give it once."
            raise ValueError(msg)
        seen[key] = name
    ids = ["+".join(vocabulary.ids[members].tolist()) for members in tokens]
    return GeneSets(names=names, ensembl_ids=ids, tokens=tokens)


def _is_set(genes: object) -> bool:
    return isinstance(genes, tuple) and all(isinstance(gene, str | EllipsisType) for gene in genes)


def set_name(tokens: Iterable[int], vocabulary: Vocabulary) -> str:
    """Call a set by its symbols; by Ensembl ids, too, where genes share a symbol, and alone where there is none."""
    return "+".join(_name(int(token), vocabulary) for token in tokens)


def _name(token: int, vocabulary: Vocabulary) -> str:
    symbol, name = str(vocabulary.symbols[token]), str(vocabulary.ids[token])
    if not symbol:
        return name
    return symbol if vocabulary.n_with_symbol[symbol] == 1 else f"{symbol} ({name})"


def find_genes(genes: str | Iterable[str], vocabulary: Vocabulary, name: str) -> np.ndarray:
    """Find the tokens of named genes, each once, in the order given."""
    names = [genes] if isinstance(genes, str) else list(genes)
    if not names:
        msg = f"`{name}` is empty: give at least one gene, as symbol or Ensembl id."
        raise ValueError(msg)
    for gene in names:
        if not isinstance(gene, str):
            msg = f"`{name}` holds names of genes, found {gene!r} of type {type(gene).__name__}."
            raise TypeError(msg)
    refuse_unknown(names, vocabulary)
    return np.array(list(dict.fromkeys(vocabulary.resolve(names).tolist())))


def unknown_genes(names: Sequence[str], vocabulary: Vocabulary) -> list[str]:
    """List the names that the model does not know, in their order."""
    return [name for name, token in zip(names, vocabulary.resolve(names), strict=True) if token < 0]


def refuse_unknown(names: Sequence[str], vocabulary: Vocabulary, remedy: str = "") -> None:
    """Name all genes that the model does not know at once."""
    unknown = unknown_genes(names, vocabulary)
    if unknown:
        symbols = [str(s) for s in vocabulary.symbols if s]
        n_genes = int((~vocabulary.is_special).sum())
        msg = (
            f"The model does not know {shortened(unknown)}.{did_you_mean(unknown[0].upper(), symbols, 3)} Its "
            f"vocabulary {vocabulary.name!r} has {n_genes:,} genes, by symbol or Ensembl id, and may lack some that "
            f"the cells express.{remedy}"
        )
        raise ValueError(msg)
