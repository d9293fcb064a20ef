"""Make a vocabulary from cells."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from gfx._adata import row_blocks, to_counts
from gfx._core.vocabulary import SPECIALS, Vocabulary, plain_id
from gfx.models._sources import find_sources

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData

#: Depth to which counts are normalised before medians are taken, as for the published dictionaries.
TARGET_SUM = 10_000

#: ENSA is a symbol; an Ensembl id goes on with a number.
_ENSEMBL_ID = re.compile(r"ENS[A-Z]*\d{11}")


def _opened(sources, gene_ids):
    for source in find_sources(sources, gene_ids):
        with source.open() as opened:
            yield source.name, opened.var.index, opened.counts


def build_vocabulary(
    sources: Sequence[str | Path | AnnData],
    *,
    name: str = "own",
    gene_ids: str | None = None,
    genes: Sequence[str] | None = None,
    min_cells: int = 10,
) -> Vocabulary:
    """Build a vocabulary from raw counts: the genes detected often enough and their non-zero medians.

    The median of a gene is taken over the cells that detect it, of counts normalised to 10,000 per cell over all
    genes. Special tokens are those of the V2 family. Tokens follow ascending Ensembl ids.

    Cost: one pass over the sources; all non-zero counts are held in memory as float32.

    Parameters
    ----------
    sources
        Paths of `.h5ad` or `.zarr` files, or AnnData objects, with raw counts in `X`.
    name
        What to call the vocabulary.
    gene_ids
        Column of `var` with Ensembl ids; `None` for `var_names`. Genes without an id are left out.
    genes
        Ensembl ids to choose from, such as the protein-coding genes; `None` for all.
    min_cells
        Genes detected in fewer cells are left out.

    Returns
    -------
    The vocabulary, with the sources' own symbols as symbols and aliases.

    Raises
    ------
    ValueError
        A source has no Ensembl ids or no raw counts (the message names it).

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.models.build_vocabulary([adata], name="toy", gene_ids="ensembl_id", min_cells=1)
    Vocabulary('toy', 300 genes, with <cls>)
    """
    wanted = None if genes is None else {plain_id(gene) for gene in genes}
    position: dict[str, int] = {}
    symbols: dict[str, dict[str, int]] = {}
    parts: list[sparse.csr_array] = []
    for source, var_names, matrix in _opened(sources, gene_ids):
        ids = [plain_id(str(gene)) for gene in matrix.names]
        columns = [i for i, gene in enumerate(ids) if _ENSEMBL_ID.match(gene) and (wanted is None or gene in wanted)]
        if not columns:
            msg = (
                f"{source}: no gene to learn from. Genes look like {[str(n) for n in matrix.names[:3]]}; "
                "name the column of `var` that holds Ensembl ids with `gene_ids=`."
            )
            raise ValueError(msg)
        for i in columns:
            position.setdefault(ids[i], len(position))
            symbol = str(var_names[i]).upper()
            if plain_id(symbol) != ids[i]:
                seen = symbols.setdefault(ids[i], {})
                seen[symbol] = seen.get(symbol, 0) + 1
        selector = sparse.csr_array(
            (np.ones(len(columns), np.float32), (columns, [position[ids[i]] for i in columns])),
            shape=(len(ids), max(position.values()) + 1),
        )
        for _, block in row_blocks(matrix.x):
            checked = to_counts(block, "raw", f"{source}: {matrix.where}")
            depth = np.asarray(checked.sum(axis=1)).ravel().astype(np.float64)
            scale = np.divide(TARGET_SUM, depth, out=np.zeros_like(depth), where=depth > 0)
            parts.append(sparse.csr_array((sparse.diags_array(scale) @ checked @ selector).astype(np.float32)))
    for part in parts:
        part.resize((part.shape[0], len(position)))
    values = sparse.vstack(parts, format="csc")
    del parts
    values.eliminate_zeros()
    n_cells = np.diff(values.indptr)
    kept = sorted(gene for gene, column in position.items() if n_cells[column] >= min_cells)
    medians = [float(np.median(values.data[values.indptr[c] : values.indptr[c + 1]])) for c in map(position.get, kept)]
    best = {gene: max(seen, key=lambda s, seen=seen: (seen[s], s)) for gene, seen in symbols.items()}
    taken = {best[gene] for gene in kept if gene in best}
    aliases = {}
    for gene in kept:
        for symbol in symbols.get(gene, ()):
            if symbol not in taken:
                aliases[symbol] = gene
    return Vocabulary(
        name=name,
        ids=np.array([*SPECIALS, *kept], dtype=object),
        medians=np.array([np.nan] * len(SPECIALS) + medians),
        symbols=np.array([""] * len(SPECIALS) + [best.get(gene, "") for gene in kept], dtype=object),
        aliases=aliases,
    )
