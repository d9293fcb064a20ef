"""Make a vocabulary from cells, read block by block, or from summaries of cells that were made elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from gfx._adata import gene_column, gene_names
from gfx._core.vocabulary import SPECIALS, Vocabulary, plain_id
from gfx.models.pretraining._gene_summary import GeneSummary, GrowingSummary, Piece
from gfx.models.pretraining._sources import SourceError, each_source, find_sources

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from anndata import AnnData

    from gfx.models.pretraining._sources import OpenSource, Source

#: Depth to which counts are normalised before medians are taken, as for the published dictionaries.
TARGET_SUM = 10_000

#: ENSA is a symbol; an Ensembl id goes on with a number.
_ENSEMBL_ID = re.compile(r"ENS[A-Z]*\d{11}")


def summarize_genes(
    sources: str | Path | AnnData | GeneSummary | Sequence[str | Path | AnnData | GeneSummary],
    *,
    gene_ids: str | None = None,
    gene_types: str | Mapping[str, str] | None = None,
    max_values: int = 100_000_000,
) -> GeneSummary:
    """Summarize what is seen of each gene in some cells: one part of a vocabulary.

    For cells that lie on several machines: summarize them where they are, :meth:`~gfx.models.GeneSummary.save` each
    summary, and give the files to :func:`gfx.models.build_vocabulary`. The result is that of all sources at once.

    Cost: one pass over the sources. In memory are 4 bytes for each of `max_values` values, twice that while they are
    put in order, and one block of cells; sketches take some kilobytes a gene.

    Parameters
    ----------
    sources
        Paths of `.h5ad` or `.zarr` files, or AnnData objects, with raw counts in `X`, read block by block; summaries,
        or paths of `.npz` files that hold them.
    gene_ids
        Column of `var` with Ensembl ids; `None` for `var_names`. Genes without an id are left out.
    gene_types
        Column of `var` with the type of each gene, such as ``"protein_coding"``, or a mapping of Ensembl ids to types.
    max_values
        Up to so many non-zero values, of all genes together, medians are exact; beyond, they are within 0.5 %.

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
    GeneSummary(300 genes, 10,850 detections, exact)
    >>> gfx.models.summarize_genes([adata], gene_ids="ensembl_id", max_values=1_000)
    GeneSummary(300 genes, 10,850 detections, medians within 0.5%)
    """
    return _summarize(sources, gene_ids, gene_types, max_values, wanted=None)


def build_vocabulary(
    sources: str | Path | AnnData | GeneSummary | Sequence[str | Path | AnnData | GeneSummary],
    *,
    name: str = "own",
    gene_ids: str | None = None,
    genes: Sequence[str] | None = None,
    gene_types: str | Mapping[str, str] | None = None,
    min_cells: int = 10,
    max_values: int = 100_000_000,
) -> Vocabulary:
    """Build a vocabulary from raw counts: the genes detected often enough and their non-zero medians.

    The median of a gene is taken over the cells that detect it, of counts normalised to 10,000 per cell over all
    genes. Special tokens are those of the V2 family. Tokens follow ascending Ensembl ids. The order of the sources,
    and whether they were summarized before, makes no difference.

    Cost: one pass over the sources. In memory are 4 bytes for each of `max_values` values, twice that while they are
    put in order, and one block of cells; sketches take some kilobytes a gene.

    Parameters
    ----------
    sources
        Paths of `.h5ad` or `.zarr` files, or AnnData objects, with raw counts in `X`, read block by block; summaries
        from :func:`gfx.models.summarize_genes`, or paths of `.npz` files that hold them.
    name
        What to call the vocabulary.
    gene_ids
        Column of `var` with Ensembl ids; `None` for `var_names`. Genes without an id are left out.
    genes
        Ensembl ids to choose from, such as the protein-coding genes; `None` for all.
    gene_types
        Column of `var` with the type of each gene, such as ``"protein_coding"``, or a mapping of Ensembl ids to types.
    min_cells
        Genes detected in fewer cells are left out.
    max_values
        Up to so many non-zero values, of all genes together, medians are exact; beyond, they are within 0.5 %. Where a
        summary was made with fewer, its number holds.

    Returns
    -------
    The vocabulary, with the sources' own symbols as symbols and aliases, and the number of cells that detect each gene.

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
    >>> gfx.models.build_vocabulary([adata], name="toy", gene_ids="ensembl_id", min_cells=1)
    Vocabulary('toy', 300 genes, with <cls>)
    """
    if min_cells < 1:
        msg = f"`min_cells={min_cells}`: a gene that no cell detects has no median; give 1 or more."
        raise ValueError(msg)
    wanted = None if genes is None else {plain_id(gene) for gene in genes}
    summary = _summarize(sources, gene_ids, gene_types, max_values, wanted)
    kept = summary.n_cells >= min_cells
    if wanted is not None:  # a summary made before knows others, too
        kept &= np.array([gene in wanted for gene in summary.ids], dtype=bool)
    if not kept.any():
        msg = (
            f"None of {len(summary.ids):,} genes is left: `min_cells={min_cells}`, the most cells that detect one are "
            f"{summary.n_cells.max(initial=0):,}; `genes` {'chooses from all' if genes is None else 'names others'}."
        )
        raise ValueError(msg)
    return _to_vocabulary(summary, kept, name, gene_types if isinstance(gene_types, Mapping) else {})


def _to_vocabulary(summary: GeneSummary, kept: np.ndarray, name: str, given_types: Mapping[str, str]) -> Vocabulary:
    ids = summary.ids[kept].tolist()
    symbols = [_most_often(summary.symbols.get(gene)) for gene in ids]
    taken = set(symbols)
    given = {plain_id(gene): kind for gene, kind in given_types.items()}
    types = [given.get(gene) or _most_often(summary.gene_types.get(gene)) for gene in ids]
    none = [""] * len(SPECIALS)
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


def _most_often(names: Mapping[str, int] | None) -> str:
    """Choose the name seen most often; of several, the last by alphabet, so that the order does not matter."""
    return max(names, key=lambda name: (names[name], name)) if names else ""


def _summarize(
    sources: str | Path | AnnData | GeneSummary | Sequence[str | Path | AnnData | GeneSummary],
    gene_ids: str | None,
    gene_types: str | Mapping[str, str] | None,
    max_values: int,
    wanted: Collection[str] | None,
) -> GeneSummary:
    if max_values < 0:
        msg = f"`max_values={max_values}` is a number of values to keep; give 0 or more."
        raise ValueError(msg)
    if isinstance(gene_types, Mapping):
        gene_types = {plain_id(gene): kind for gene, kind in gene_types.items()}
        wrong = [gene for gene, kind in gene_types.items() if not isinstance(kind, str)]
        if wrong:
            msg = (
                f"`gene_types` maps Ensembl ids to text; {wrong[0]!r} has {gene_types[wrong[0]]!r}. Leave out unknowns."
            )
            raise TypeError(msg)
    elif not isinstance(gene_types, str | None):
        msg = f"`gene_types` is a column of `var` or a mapping of Ensembl ids, found {type(gene_types).__name__}."
        raise TypeError(msg)
    growing = GrowingSummary(max_values)

    def add(source: Source) -> None:
        if isinstance(source.place, GeneSummary):
            growing.add_summary(source.place)
        elif isinstance(source.place, Path) and source.place.suffix == ".npz":
            try:
                growing.add_summary(GeneSummary.load(source.place))
            except ValueError as error:  # begins with the file's name
                raise SourceError(*error.args) from error
        else:
            with source.open() as opened:
                _add_cells(growing, opened, gene_types, wanted)

    found = find_sources([sources] if isinstance(sources, GeneSummary) else sources, gene_ids)
    each_source(found, add, kept="")
    return growing.finish()


def _add_cells(
    growing: GrowingSummary,
    opened: OpenSource,
    gene_types: str | Mapping[str, str] | None,
    wanted: Collection[str] | None,
) -> None:
    """Add the cells of one source, a block at a time."""
    ids = [plain_id(str(gene)) for gene in opened.counts.names]
    columns = [i for i, gene in enumerate(ids) if _ENSEMBL_ID.match(gene) and (wanted is None or gene in wanted)]
    if not columns:
        msg = (
            f"no gene to learn from. Genes look like {[str(name) for name in opened.counts.names[:3]]}; "
            "name the column of `var` that holds Ensembl ids with `gene_ids=`."
        )
        raise ValueError(msg)
    if isinstance(gene_types, str):
        types = gene_names(gene_column(opened.var, gene_types))
    else:
        types = [(gene_types or {}).get(gene, "") for gene in ids]
    symbols = gene_names(opened.var.index)
    for i in columns:
        symbol = symbols[i].upper()
        is_symbol = symbol and plain_id(symbol) != ids[i]
        growing.add_names(ids[i], {symbol: 1} if is_symbol else {}, {types[i]: 1} if types[i] else {})
    positions = [growing.add_gene(ids[i]) for i in columns]
    # Columns of the same gene are summed.
    selector = sparse.csr_array((np.ones(len(columns)), (columns, positions)), shape=(len(ids), len(growing.position)))
    for block in opened.blocks():
        growing.add(_normalised(block, selector))


def _normalised(block: sparse.csr_array, selector: sparse.csr_array) -> Piece:
    """Choose genes from a block of counts and normalise them to the depth of the whole cell."""
    depth = block @ np.ones(block.shape[1])
    scale = np.divide(TARGET_SUM, depth, out=np.zeros_like(depth), where=depth > 0)
    chosen = block @ selector
    chosen.data *= np.repeat(scale, np.diff(chosen.indptr))
    chosen.eliminate_zeros()
    by_gene = chosen.tocsc()
    counts = np.diff(by_gene.indptr)
    genes = np.flatnonzero(counts)
    return Piece(genes, counts[genes].astype(np.int64), by_gene.data.astype(np.float32))
