"""A vocabulary from cells: which genes are detected in how many cells, and the median of each."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from gfx._adata import gene_column, gene_names
from gfx._core.arguments import check_whole
from gfx._core.gene_names import plain_date
from gfx._core.vocabulary import SPECIALS, Vocabulary, plain_id
from gfx.models.pretraining._sources import SourceError, each_source, find_sources

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from anndata import AnnData

    from gfx.models.pretraining._sources import Source

#: Depth to which counts are normalised before medians are taken, as for the published dictionaries.
TARGET_SUM = 10_000

#: ENSA is a symbol; an Ensembl id goes on with a number.
_ENSEMBL_ID = re.compile(r"ENS[A-Z]*\d{11}")

# --- histograms -----------------------------------------------------------------------------------------------------

#: Largest relative error of a median.
ACCURACY = 0.0005

# Bucket `key` holds values above growth ** (key - 1) and up to growth ** key. The value in between that is returned for
# all of them differs from none by more than ACCURACY. Bounds are fixed, so that histograms of parts can be added.
_GROWTH = (1 + ACCURACY) / (1 - ACCURACY)
_LOG_GROWTH = np.log(_GROWTH)

#: Keys of all positive float64; they are columns of a sparse matrix, so that unused ones cost nothing.
_FIRST_KEY, _LAST_KEY = (int(np.ceil(np.log(limit) / _LOG_GROWTH)) for limit in (5e-324, np.finfo(np.float64).max))
_N_BUCKETS = _LAST_KEY - _FIRST_KEY + 1


def _histogram(genes: np.ndarray, values: np.ndarray, n_genes: int) -> sparse.csr_array:
    """Count positive values by gene and bucket, int64 genes × buckets."""
    columns = np.ceil(np.log(values) / _LOG_GROWTH).astype(np.int32) - _FIRST_KEY
    ones = np.ones(len(values), np.int64)
    return sparse.coo_array((ones, (genes, columns)), shape=(n_genes, _N_BUCKETS)).tocsr()


@dataclass(frozen=True, eq=False)
class GeneSummary:
    """In how many cells each gene was detected, and at which values; from :func:`gfx.models.summarize_genes`.

    The distribution of a gene's non-zero values, counts normalised to 10,000 per cell, is kept as a histogram with
    buckets 0.1 % wide, so that medians are within 0.05 % of the exact ones. It depends on the cells alone and not on
    the order or the parts in which they came.

    Parameters
    ----------
    ids
        Ensembl ids without version, ascending, `(n_genes,)`.
    histogram
        Number of cells by gene and bucket, int64 genes × buckets.
    symbols
        Symbols of each gene, in capitals, and how many columns have them; genes without any are left out.
    gene_types
        Types of each gene and how many columns have them; genes without any are left out.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> sources = [adata[:30], adata[30:]]
    >>> first, second = (
    ...     gfx.models.summarize_genes(half, gene_ids="ensembl_id") for half in sources
    ... )
    >>> first.merge(second) == gfx.models.summarize_genes(
    ...     sources, gene_ids="ensembl_id"
    ... )
    True
    """

    ids: np.ndarray
    histogram: sparse.csr_array
    symbols: Mapping[str, Mapping[str, int]]
    gene_types: Mapping[str, Mapping[str, int]]

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GeneSummary):
            return NotImplemented
        arrays, others = self._arrays(), other._arrays()
        return all(np.array_equal(arrays[key], others[key]) for key in arrays)

    def __repr__(self) -> str:
        return f"GeneSummary({len(self.ids):,} genes, {self.n_cells.sum():,} detections)"

    @property
    def n_cells(self) -> np.ndarray:
        """Number of cells that detect each gene, int64 `(n_genes,)`."""
        return self.histogram.sum(axis=1)

    def medians(self) -> np.ndarray:
        """Take the median of each gene over the cells that detect it; of an even number, the mean of the middle two.

        float64 `(n_genes,)`, in counts per 10,000, within 0.05 %; NaN for genes that no cell detects.
        """
        n_cells = self.n_cells
        detected = n_cells > 0
        stops = np.cumsum(self.histogram.data)  # values are numbered gene after gene, ascending within each
        first = (np.cumsum(n_cells) - n_cells)[detected]
        middle = np.stack([first + (n_cells[detected] - 1) // 2, first + n_cells[detected] // 2])
        keys = self.histogram.indices[np.searchsorted(stops, middle, side="right")] + float(_FIRST_KEY)
        medians = np.full(len(self.ids), np.nan)
        medians[detected] = (np.exp(keys * _LOG_GROWTH) * 2 / (1 + _GROWTH)).mean(axis=0)
        return medians

    def merge(self, other: GeneSummary) -> GeneSummary:
        """Return the summary of the cells of both, which have to be different cells; changes neither."""
        ids, first, second = self.ids, self.histogram, other.histogram
        if not np.array_equal(ids, other.ids):  # as they are in all blocks of one source
            ids = np.array(sorted({*self.ids, *other.ids}), dtype=object)
            first, second = self._histogram_of(ids), other._histogram_of(ids)
        names = (_added(self.symbols, other.symbols), _added(self.gene_types, other.gene_types))
        return GeneSummary(ids, first + second, *names)

    def _histogram_of(self, ids: np.ndarray) -> sparse.csr_array:
        """Insert empty rows into the histogram, so that it has one for each of `ids`, ascending and more than ours."""
        n_entries = dict(zip(self.ids, np.diff(self.histogram.indptr), strict=True))
        starts = np.cumsum([0, *(n_entries.get(gene, 0) for gene in ids)])
        return sparse.csr_array((self.histogram.data, self.histogram.indices, starts), shape=(len(ids), _N_BUCKETS))

    def save(self, path: str | Path) -> Path:
        """Write to an `.npz` file, the same bytes for the same summary; returns its path.

        Raises
        ------
        ValueError
            The path does not end with `.npz`, by which summaries are recognised among files of cells.
        """
        path = Path(path)
        if path.suffix != ".npz":
            msg = f"Summaries of genes are kept in `.npz` files, found {path.name!r}. Save to {path.stem + '.npz'!r}."
            raise ValueError(msg)
        with path.open("wb") as file:  # numpy adds a suffix to some paths
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
            if arrays.keys() != {"accuracy", "ids", "n_cells", "bucket", "first_bucket", "names"}:
                msg = (
                    f"{path.name} is no summary of genes, it holds {sorted(arrays)[:5]}. "
                    "Make one with `gfx.models.summarize_genes(...).save(path)`."
                )
                raise SourceError(msg)
            if arrays["accuracy"] != ACCURACY:
                msg = (
                    f"{path.name} has medians within {arrays['accuracy']:.2%}, this version of gfx within "
                    f"{ACCURACY:.2%}. Summarize the cells again."
                )
                raise SourceError(msg)
            ids = arrays["ids"].astype(object)
            parts = tuple(arrays[key] for key in ("n_cells", "bucket", "first_bucket"))
            histogram = sparse.csr_array(parts, shape=(len(ids), _N_BUCKETS))
            histogram.check_format(full_check=True)
            symbols, gene_types = json.loads(str(arrays["names"]))
        except SourceError:
            raise
        except (AttributeError, EOFError, TokenError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            msg = f"{path.name} is no readable summary of genes ({error}). Was it copied or fetched completely?"
            raise SourceError(msg) from error
        return cls(ids, histogram, symbols, gene_types)

    def _arrays(self) -> dict[str, np.ndarray]:
        """Describe everything by plain arrays, in one order."""
        return {
            "accuracy": np.float64(ACCURACY),
            "ids": self.ids.astype(str),
            "n_cells": self.histogram.data,
            "bucket": self.histogram.indices.astype(np.int32),
            "first_bucket": self.histogram.indptr.astype(np.int64),
            "names": np.array(json.dumps([self.symbols, self.gene_types], sort_keys=True)),
        }


def _added(
    first: Mapping[str, Mapping[str, int]], second: Mapping[str, Mapping[str, int]]
) -> Mapping[str, Mapping[str, int]]:
    """Add up how often each gene has each name."""
    if not (first and second):  # blocks of cells bring no names
        return first or second
    total = {gene: Counter(names) for gene, names in first.items()}
    for gene, names in second.items():
        total.setdefault(gene, Counter()).update(names)
    return total


def _merged(parts: Iterable[GeneSummary]) -> GeneSummary:
    waiting: list[GeneSummary] = []
    for part in parts:
        # Each has at least twice the entries of the next: few wait, and an entry is added up few times.
        while waiting and waiting[-1].histogram.nnz < 2 * part.histogram.nnz:
            part = waiting.pop().merge(part)  # noqa: PLW2901 - the sum of both takes its place
        waiting.append(part)
    return reduce(GeneSummary.merge, reversed(waiting))


# --- from sources ---------------------------------------------------------------------------------------------------


def summarize_genes(
    sources: str | Path | AnnData | GeneSummary | Sequence[str | Path | AnnData | GeneSummary],
    *,
    layer: str | None = None,
    use_raw: bool = False,
    gene_ids: str | None = None,
    gene_types: str | Mapping[str, str] | None = None,
) -> GeneSummary:
    """Count in how many cells each gene is detected and at which values: one part of a vocabulary.

    Use it for cells that lie on several machines: summarize them where they are, :meth:`~gfx.models.GeneSummary.save`
    each summary, and give the files to :func:`gfx.models.build_vocabulary`. The result is that of all sources at once.

    Cost: one pass over the sources. Memory holds a block of cells, and a histogram for each gene with 12 bytes per bin
    in use: some kilobytes per gene for thousands of cells, and some tens of kilobytes for millions.

    Parameters
    ----------
    sources
        Paths of `.h5ad` or `.zarr` files, or AnnData objects, with raw counts, read block by block; summaries,
        or paths of `.npz` files that hold them.
    layer
        Layer of every source that holds the raw counts. `None` uses `X`.
    use_raw
        Whether to use the counts and the genes of `raw`, as in files of CELLxGENE whose `X` is normalized.
    gene_ids
        Column of `var` with Ensembl ids; `None` for `var_names`. Genes without an id are left out.
    gene_types
        Column of `var` with the type of each gene, such as ``"protein_coding"``, or a mapping of Ensembl ids to types.

    Returns
    -------
    The summary.

    Raises
    ------
    ValueError
        Some sources have no Ensembl ids or no raw counts, or cannot be read; the message names all of them.
    FileNotFoundError
        A source does not exist.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.models.summarize_genes([adata], gene_ids="ensembl_id")
    GeneSummary(300 genes, 10,850 detections)
    """
    place = {"layer": layer, "use_raw": use_raw, "gene_ids": gene_ids}
    return _summarize(sources, place, _by_plain_id(gene_types), chosen=None)


def build_vocabulary(
    sources: str | Path | AnnData | GeneSummary | Sequence[str | Path | AnnData | GeneSummary],
    *,
    name: str = "own",
    layer: str | None = None,
    use_raw: bool = False,
    gene_ids: str | None = None,
    genes: Sequence[str] | None = None,
    gene_types: str | Mapping[str, str] | None = None,
    min_cells: int = 10,
) -> Vocabulary:
    """Build a vocabulary from raw counts: the genes detected in enough cells, and their non-zero medians.

    Counts are normalised to a sum of 10,000 per cell over all genes. The median of a gene is computed over the cells in
    which it is detected, and is within 0.05 % of the exact median. Special tokens are those of the V2 family. Genes are
    numbered in ascending order of their Ensembl ids. The result does not depend on the order of the sources, or on
    whether they were summarized before.

    Cost: one pass over the sources. Memory holds a block of cells, and a histogram for each gene with 12 bytes per bin
    in use: some kilobytes per gene for thousands of cells, and some tens of kilobytes for millions.

    Parameters
    ----------
    sources
        Paths of `.h5ad` or `.zarr` files, or AnnData objects, with raw counts, read block by block; summaries
        from :func:`gfx.models.summarize_genes`, or paths of `.npz` files that hold them.
    name
        Name of the vocabulary.
    layer
        Layer of every source that holds the raw counts. `None` uses `X`.
    use_raw
        Whether to use the counts and the genes of `raw`, as in files of CELLxGENE whose `X` is normalized.
    gene_ids
        Column of `var` with Ensembl ids; `None` for `var_names`. Genes without an id are left out.
    genes
        Ensembl ids of the genes that may be included, such as the protein-coding genes. `None` allows all genes.
    gene_types
        Column of `var` with the type of each gene, such as ``"protein_coding"``, or a mapping of Ensembl ids to types.
    min_cells
        Genes detected in fewer cells than this are left out.

    Returns
    -------
    The vocabulary. Its symbols and aliases are the gene symbols in the sources, and it holds the number of cells in
    which each gene is detected.

    Raises
    ------
    ValueError
        Some sources have no Ensembl ids or no raw counts, or cannot be read (the message names all of them); no gene
        is left.
    FileNotFoundError
        A source does not exist.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.models.build_vocabulary(
    ...     [adata], name="toy", gene_ids="ensembl_id", min_cells=1
    ... )
    Vocabulary('toy', 300 genes, with <cls>)
    """
    if check_whole(min_cells, "min_cells") < 1:
        msg = f"`min_cells={min_cells}`: a gene that no cell detects has no median; give 1 or more."
        raise ValueError(msg)
    gene_types = _by_plain_id(gene_types)
    chosen = None if genes is None else {plain_id(gene) for gene in genes}
    if chosen is not None and not chosen:
        msg = "`genes` is empty: give the Ensembl ids of the genes that may be included, or `None` for all."
        raise ValueError(msg)
    place = {"layer": layer, "use_raw": use_raw, "gene_ids": gene_ids}
    summary = _summarize(sources, place, gene_types, chosen)
    kept = summary.n_cells >= min_cells
    if chosen is not None:  # a summary made before knows others, too
        kept &= np.array([gene in chosen for gene in summary.ids], dtype=bool)
    if not kept.any():
        msg = (
            f"None of {len(summary.ids):,} genes is left: `min_cells={min_cells}`, the most cells that detect one are "
            f"{summary.n_cells.max(initial=0):,}; `genes` {'chooses from all' if genes is None else 'names others'}."
        )
        raise ValueError(msg)
    ids = summary.ids[kept].tolist()
    symbols = [_most_frequent(summary.symbols.get(gene)) for gene in ids]
    given_types = gene_types if isinstance(gene_types, Mapping) else {}
    types = [given_types.get(gene) or _most_frequent(summary.gene_types.get(gene)) for gene in ids]
    none, taken = [""] * len(SPECIALS), set(symbols)
    return Vocabulary(
        name=name,
        ids=np.array([*SPECIALS, *ids], dtype=object),
        medians=np.concatenate([np.full(len(SPECIALS), np.nan), summary.medians()[kept]]),
        symbols=np.array(none + symbols, dtype=object),
        aliases={
            symbol: gene for gene in ids for symbol in sorted(summary.symbols.get(gene, ())) if symbol not in taken
        },
        n_cells=np.concatenate([np.zeros(len(SPECIALS), np.int64), summary.n_cells[kept]]),
        gene_types=np.array(none + types, dtype=object) if any(types) else None,
    )


def _most_frequent(names: Mapping[str, int] | None) -> str:
    """Choose the most frequent name; of several, the last by alphabet, so that the order does not matter."""
    return max(names, key=lambda name: (names[name], name)) if names else ""


def _by_plain_id(gene_types: str | Mapping[str, str] | None) -> str | dict[str, str] | None:
    if isinstance(gene_types, str | None):
        return gene_types
    if not isinstance(gene_types, Mapping):
        msg = f"`gene_types` is a column of `var` or a mapping of Ensembl ids, found {type(gene_types).__name__}."
        raise TypeError(msg)
    for gene, kind in gene_types.items():
        if not isinstance(kind, str):
            msg = f"`gene_types` maps Ensembl ids to text; {gene!r} has {kind!r}. Leave out unknowns."
            raise TypeError(msg)
    return {plain_id(gene): kind for gene, kind in gene_types.items()}


def _summarize(
    sources: str | Path | AnnData | GeneSummary | Sequence[str | Path | AnnData | GeneSummary],
    place: Mapping[str, Any],
    gene_types: str | Mapping[str, str] | None,
    chosen: Collection[str] | None,
) -> GeneSummary:
    def summary_of(source: Source) -> GeneSummary:
        if isinstance(source.place, GeneSummary):
            return source.place
        if isinstance(source.place, Path) and source.place.suffix == ".npz":
            return GeneSummary.load(source.place)
        return _merged(_blocks(source, gene_types, chosen))

    sources = find_sources([sources] if isinstance(sources, GeneSummary) else sources, **place)
    return _merged(each_source(sources, summary_of))


def _blocks(
    source: Source, gene_types: str | Mapping[str, str] | None, chosen: Collection[str] | None
) -> Iterator[GeneSummary]:
    """Summarize the names of the genes of one source, then its cells, a block at a time."""
    with source.open() as (matrix, of_columns):
        var = of_columns[matrix.genes.is_gene]
        ids = [plain_id(str(gene)) for gene in matrix.names]
        columns = [i for i, gene in enumerate(ids) if _ENSEMBL_ID.match(gene) and (chosen is None or gene in chosen)]
        if not columns:
            msg = (
                f"no gene to learn from. Genes look like {[str(name) for name in matrix.names[:3]]}; "
                "name the column of `var` that holds Ensembl ids with `gene_ids=`."
            )
            raise ValueError(msg)
        if isinstance(gene_types, str):
            types = gene_names(gene_column(var, gene_types))
        else:
            types = [(gene_types or {}).get(gene, "") for gene in ids]
        symbols = [symbol.upper() for symbol in gene_names(var.index)]
        names: tuple[dict[str, Counter[str]], ...] = ({}, {})
        for i in columns:
            for counted, name in zip(names, (symbols[i], types[i]), strict=True):
                if name and plain_id(name) != ids[i] and not plain_date(name):  # an id is no symbol, nor is a date
                    counted.setdefault(ids[i], Counter())[name] += 1
        genes, rows = np.unique([ids[i] for i in columns], return_inverse=True)
        genes = genes.astype(object)
        yield GeneSummary(genes, sparse.csr_array((len(genes), _N_BUCKETS), dtype=np.int64), *names)
        # Columns of the same gene are summed.
        selector = sparse.csr_array((np.ones(len(columns)), (columns, rows)), shape=(len(ids), len(genes)))
        for block in source.raw_blocks(matrix):
            depth = block @ np.ones(block.shape[1])
            counts = block @ selector
            counts.eliminate_zeros()
            values = counts.data * np.repeat(TARGET_SUM / np.maximum(depth, 1), np.diff(counts.indptr))
            yield GeneSummary(genes, _histogram(counts.indices, values, len(genes)), {}, {})
