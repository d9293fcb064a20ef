"""What was seen of each gene in some cells: enough for a vocabulary, of bounded size, and the same in any order."""

from __future__ import annotations

import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ddsketch.mapping import LogarithmicMapping
from ddsketch.store import DenseStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: How far a median that was read from a sketch may lie from the exact one, relative to it.
ACCURACY = 0.005

# A DDSketch counts values in buckets with fixed bounds. Its state therefore depends on which values were seen and on
# nothing else, so that parts merge to the same result in any order and grouping. What a t-digest or a KLL sketch holds
# depends on the order, too.
_MAPPING = LogarithmicMapping(ACCURACY)

#: Values that are sorted into buckets, or moved, together.
_PIECE = 1 << 20


@dataclass(frozen=True, eq=False)
class GeneSummary:
    """What was seen of each gene in some cells, from :func:`gfx.models.summarize_genes`.

    The distribution of a gene's non-zero values, counts normalised to 10,000 per cell, is exact as long as all values
    together are no more than `max_values`; beyond, it is a sketch (DDSketch) that gives medians within 0.5 %. Which
    of the two, and everything else, depends on the sources alone and not on the order or the parts in which they came.

    Parameters
    ----------
    ids
        Ensembl ids without version, ascending, `(n_genes,)`.
    n_cells
        Number of cells that detect each gene, int64 `(n_genes,)`.
    symbols
        Symbols of each gene, in capitals, and how many columns bear them; genes without any are left out.
    gene_types
        Types of each gene and how many columns bear them; genes without any are left out.
    max_values
        How many values are kept before they are sketched, 4 bytes each.
    values
        Non-zero values by gene, ascending within each gene, float32 `(n_cells.sum(),)`; `None` in a sketch.
    buckets
        How many values lie in which bucket of a gene's sketch; `None` where values are exact.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> sources = [adata[:30], adata[30:]]
    >>> first, second = (gfx.models.summarize_genes(one, gene_ids="ensembl_id") for one in sources)
    >>> first.merge(second) == gfx.models.summarize_genes(sources, gene_ids="ensembl_id")
    True
    """

    ids: np.ndarray
    n_cells: np.ndarray
    symbols: Mapping[str, Counter[str]]
    gene_types: Mapping[str, Counter[str]]
    max_values: int
    values: np.ndarray | None
    buckets: Buckets | None

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GeneSummary):
            return NotImplemented
        mine, theirs = self._arrays(), other._arrays()
        return mine.keys() == theirs.keys() and all(np.array_equal(mine[key], theirs[key]) for key in mine)

    def __repr__(self) -> str:
        how = "exact" if self.is_exact else f"medians within {ACCURACY:.1%}"
        return f"GeneSummary({len(self.ids):,} genes, {self.n_cells.sum():,} detections, {how})"

    @property
    def is_exact(self) -> bool:
        """Whether all values are kept, and medians are those of numpy."""
        return self.values is not None

    def medians(self) -> np.ndarray:
        """Take the median of each gene over the cells that detect it.

        The mean of the two middle values where their number is even. Each value that a sketch gives lies within 0.5 %
        of the one it stands for, and so does the mean of two.

        Returns
        -------
        float64 `(n_genes,)`, in counts per 10,000; NaN for genes that no cell detects.
        """
        medians = np.full(len(self.ids), np.nan)
        seen = np.flatnonzero(self.n_cells)
        if self.is_exact:
            n = self.n_cells[seen]
            start = np.cumsum(self.n_cells)[seen] - n
            medians[seen] = (self.values[start + (n - 1) // 2] + self.values[start + n // 2]) / np.float32(2)
            return medians
        genes, keys = self.buckets.genes_and_keys()
        edges = np.searchsorted(genes, np.arange(len(self.ids) + 1))
        for gene in seen.tolist():
            of_gene, n = slice(edges[gene], edges[gene + 1]), int(self.n_cells[gene])
            sketch = DenseStore()
            # The last key comes first, then the first: a store that knows its range grows no more.
            of_keys = np.roll(keys[of_gene], 1).tolist(), np.roll(self.buckets.counts[of_gene], 1).tolist()
            for key, count in zip(*of_keys, strict=True):
                sketch.add(key, count)
            middle = (_MAPPING.value(sketch.key_at_rank(rank)) for rank in ((n - 1) // 2, n // 2))
            medians[gene] = sum(middle) / 2
        return medians

    def merge(self, other: GeneSummary) -> GeneSummary:
        """Put two summaries together, of different cells; changes neither.

        Gives what one summary of all their sources would hold. If the two differ in `max_values`, the smaller holds.
        """
        growing = GrowingSummary(self.max_values)
        growing.add_summary(self)
        growing.add_summary(other)
        return growing.finish()

    def save(self, path: str | Path) -> Path:
        """Write to an `.npz` file, the same bytes for the same summary; returns its path.

        Raises
        ------
        ValueError
            The path does not end with `.npz`, by which summaries are told from cells.
        """
        path = Path(path)
        if path.suffix != ".npz":
            msg = f"Summaries of genes are kept in `.npz` files, found {path.name!r}. Save to {path.stem + '.npz'!r}."
            raise ValueError(msg)
        with path.open("wb") as file:  # a path would be opened by numpy under the same name, or under a longer one
            np.savez_compressed(file, **self._arrays())
        return path

    @classmethod
    def load(cls, path: str | Path) -> GeneSummary:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            The file holds no summary, or not all of it; nothing in it is run.
        """
        path = Path(path)
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        except (AttributeError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            msg = f"{path.name} is no readable summary of genes ({error}). Was it copied or fetched completely?"
            raise ValueError(msg) from error
        missing = sorted(_ALWAYS - arrays.keys())
        if missing or not (arrays.keys() >= _EXACT or arrays.keys() >= _SKETCH):
            msg = (
                f"{path.name} is no summary of genes, it holds {sorted(arrays)[:5]}. "
                "Make one with `gfx.models.summarize_genes(...).save(path)`."
            )
            raise ValueError(msg)
        if arrays["accuracy"] != ACCURACY:
            msg = (
                f"{path.name} was made to sketch to {arrays['accuracy']:.2%}, this version of gfx to {ACCURACY:.2%}. "
                "Summarize the cells again."
            )
            raise ValueError(msg)
        ids = arrays["ids"].astype(object)
        if arrays["n_cells"].sum() != (len(arrays["values"]) if "values" in arrays else arrays["bucket_count"].sum()):
            msg = f"{path.name} holds another number of values than it says: it was changed. Summarize the cells again."
            raise ValueError(msg)
        buckets = None
        if arrays.keys() >= _SKETCH:
            buckets = Buckets(_pairs(arrays["bucket_gene"], arrays["bucket_key"]), arrays["bucket_count"])
        return cls(
            ids=ids,
            n_cells=arrays["n_cells"],
            symbols=_read_names(ids, arrays, "symbol"),
            gene_types=_read_names(ids, arrays, "type"),
            max_values=int(arrays["max_values"]),
            values=arrays.get("values"),
            buckets=buckets,
        )

    def _arrays(self) -> dict[str, np.ndarray]:
        """Describe everything by plain arrays, in one order."""
        arrays = {
            "accuracy": np.float64(ACCURACY),
            "max_values": np.int64(self.max_values),
            "ids": self.ids.astype(str),
            "n_cells": self.n_cells,
            **_name_arrays(self.ids, self.symbols, "symbol"),
            **_name_arrays(self.ids, self.gene_types, "type"),
        }
        if self.is_exact:
            return arrays | {"values": self.values}
        genes, keys = self.buckets.genes_and_keys()
        return arrays | {
            "bucket_gene": genes.astype(np.int32),
            "bucket_key": keys.astype(np.int32),
            "bucket_count": self.buckets.counts,
        }


def _names_of(kind: str) -> tuple[str, str, str]:
    return f"{kind}_gene", f"{kind}_name", f"{kind}_times"


_ALWAYS = {"accuracy", "max_values", "ids", "n_cells", *_names_of("symbol"), *_names_of("type")}
_EXACT = {"values"}
_SKETCH = {"bucket_gene", "bucket_key", "bucket_count"}


def _name_arrays(ids: np.ndarray, names: Mapping[str, Counter[str]], kind: str) -> dict[str, np.ndarray]:
    rows = [
        (gene, name, times)
        for gene, gene_id in enumerate(ids)
        if gene_id in names
        for name, times in sorted(names[gene_id].items())
    ]
    genes, texts, times = zip(*rows, strict=True) if rows else ((), (), ())
    columns = (np.array(genes, np.int32), np.array(texts, np.str_), np.array(times, np.int64))
    return dict(zip(_names_of(kind), columns, strict=True))


def _read_names(ids: np.ndarray, arrays: Mapping[str, np.ndarray], kind: str) -> dict[str, Counter[str]]:
    names: dict[str, Counter[str]] = {}
    for gene, name, times in zip(*(arrays[key].tolist() for key in _names_of(kind)), strict=True):
        names.setdefault(ids[gene], Counter())[name] = times
    return names


# --- growing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Non-zero values of some genes, gene after gene.

    Parameters
    ----------
    genes
        Positions of the genes, each once.
    counts
        Number of values of each of these genes.
    values
        float32 `(counts.sum(),)`.
    """

    genes: np.ndarray
    counts: np.ndarray
    values: np.ndarray


class GrowingSummary:
    """A summary while cells are added; keeps at most `max_values` values beside those that were added last.

    Parameters
    ----------
    max_values
        More values than these are sketched.
    """

    def __init__(self, max_values: int) -> None:
        self.max_values = max_values
        self.position: dict[str, int] = {}
        self._symbols: dict[str, Counter[str]] = {}
        self._gene_types: dict[str, Counter[str]] = {}
        #: Number of values that are kept as they are at this moment.
        self.n_kept = 0
        self._pieces: list[Piece] = []
        self._buckets: Buckets | None = None

    def add_gene(self, gene: str) -> int:
        """Make a gene known, and tell its position."""
        return self.position.setdefault(gene, len(self.position))

    def add_names(self, gene: str, symbols: Mapping[str, int], gene_types: Mapping[str, int]) -> None:
        """Count what a gene is called, and of which type it is said to be."""
        for known, new in ((self._symbols, symbols), (self._gene_types, gene_types)):
            if new:
                known.setdefault(gene, Counter()).update(new)

    def add(self, piece: Piece) -> None:
        """Add values of known genes."""
        self._pieces.append(piece)
        self.n_kept += len(piece.values)
        if self.n_kept > self.max_values:
            self._sketch_all()

    def add_summary(self, summary: GeneSummary) -> None:
        """Add all that another summary holds."""
        self.max_values = min(self.max_values, summary.max_values)
        if self.n_kept > self.max_values:
            self._sketch_all()
        genes = np.array([self.add_gene(gene) for gene in summary.ids], dtype=np.intp)
        for gene in summary.ids:
            self.add_names(gene, summary.symbols.get(gene, {}), summary.gene_types.get(gene, {}))
        if summary.is_exact:
            for piece in _split(summary.values, summary.n_cells):
                self.add(Piece(genes[piece.genes], piece.counts, piece.values))
        else:
            self._sketch_all()
            self._buckets = self._buckets.plus(summary.buckets.moved(genes))

    def finish(self) -> GeneSummary:
        """Give the summary of all that was added."""
        ids = sorted(self.position)
        place = np.empty(len(ids), dtype=np.intp)
        place[[self.position[gene] for gene in ids]] = np.arange(len(ids))
        values, buckets = None, None
        if self._buckets is None:
            pieces = [Piece(place[piece.genes], piece.counts, piece.values) for piece in self._pieces]
            self._pieces.clear()
            values, n_cells = _join(pieces, len(ids))
            stop = np.cumsum(n_cells)
            for first, last in zip((stop - n_cells).tolist(), stop.tolist(), strict=True):
                values[first:last].sort()
        else:
            self._sketch_all()
            buckets = self._buckets.moved(place)
            n_cells = np.zeros(len(ids), dtype=np.int64)
            np.add.at(n_cells, buckets.genes_and_keys()[0], buckets.counts)
        return GeneSummary(
            np.array(ids, dtype=object), n_cells, self._symbols, self._gene_types, self.max_values, values, buckets
        )

    def _sketch_all(self) -> None:
        """Turn the values that are kept into counts of buckets."""
        if self._buckets is None:
            self._buckets = Buckets(np.empty(0, np.int64), np.empty(0, np.int64))
        for piece in _split(*_join(self._pieces, len(self.position))):
            genes = np.repeat(piece.genes, piece.counts)
            self._buckets = self._buckets.plus(Buckets.of(genes, bucket_keys(piece.values)))
        self.n_kept = 0


@dataclass(frozen=True)
class Buckets:
    """How many values lie in which bucket of which gene's sketch: what the library's store counts, for all genes.

    In two arrays, since a store of Python numbers for each of 20,000 genes takes several times their memory.

    Parameters
    ----------
    pairs
        Gene and key as one number, ascending, each once, int64 `(n_buckets,)`.
    counts
        Number of values, int64 `(n_buckets,)`.
    """

    pairs: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, genes: np.ndarray, keys: np.ndarray) -> Buckets:
        """Count values by gene and key."""
        return cls(*np.unique(_pairs(genes, keys), return_counts=True))

    def genes_and_keys(self) -> tuple[np.ndarray, np.ndarray]:
        """Take the pairs apart."""
        genes, keys = np.divmod(self.pairs, _KEYS)
        return genes, keys + _LOWEST_KEY

    def moved(self, places: np.ndarray) -> Buckets:
        """Give each gene its new position."""
        shift = (places - np.arange(len(places))) * _KEYS
        pairs = self.pairs + shift[self.pairs // _KEYS]
        order = np.argsort(pairs)
        return Buckets(pairs[order], self.counts[order])

    def plus(self, other: Buckets) -> Buckets:
        """Add the counts of both."""
        at = np.searchsorted(self.pairs, other.pairs)
        known = np.zeros(len(at), dtype=bool)
        inside = at < len(self.pairs)
        known[inside] = self.pairs[at[inside]] == other.pairs[inside]
        counts = self.counts.copy()
        counts[at[known]] += other.counts[known]
        new = ~known
        return Buckets(np.insert(self.pairs, at[new], other.pairs[new]), np.insert(counts, at[new], other.counts[new]))


#: Between these lie the keys of all positive float32, so that a gene and a key make one number.
_LOWEST_KEY, _KEYS = -(1 << 15), 1 << 16


def _pairs(genes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return genes.astype(np.int64) * _KEYS + (keys - _LOWEST_KEY)


def bucket_keys(values: np.ndarray) -> np.ndarray:
    """Find the bucket of each value, as the mapping's own `key` does for one, int64 `(n_values,)`."""
    return np.ceil(np.log(values.astype(np.float64)) / np.log(_MAPPING.gamma)).astype(np.int64)


def _join(pieces: list[Piece], n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Order values by gene, and count those of each; empties the list, so that each piece is let go once copied."""
    counts = np.zeros(n_genes, dtype=np.int64)
    for piece in pieces:
        counts[piece.genes] += piece.counts
    values = np.empty(counts.sum(), dtype=np.float32)
    free = np.cumsum(counts) - counts
    while pieces:
        piece = pieces.pop()
        before = np.cumsum(piece.counts) - piece.counts
        values[np.repeat(free[piece.genes] - before, piece.counts) + np.arange(len(piece.values))] = piece.values
        free[piece.genes] += piece.counts
    return values, counts


def _split(values: np.ndarray, counts: np.ndarray) -> Iterator[Piece]:
    """Cut values that are ordered by gene into pieces of whole genes."""
    stop = np.cumsum(counts)
    first, done = 0, 0
    while first < len(counts):
        last = max(first + 1, int(np.searchsorted(stop, done + _PIECE, side="right")))
        yield Piece(np.arange(first, last), counts[first:last], values[done : stop[last - 1]])
        first, done = last, int(stop[last - 1])
