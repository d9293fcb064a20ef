"""Pairs of genes whose attention to each other is kept: which, in how much memory, and as sparse matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from gfx import _log
from gfx._adata import shortened
from gfx._core.attention import strongest
from gfx._tokens import CountsNotAtHandError
from gfx.tl._baselines import log_counts
from gfx.tl._gene_sets import find_genes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import EllipsisType

    from gfx._core.attention import AttentionSums
    from gfx._engine.attention import Pairs
    from gfx.tl._prepare import Prepared

#: Cells behind a pair of genes, where the strongest pairs of all genes are looked for.
FEWEST_CELLS = 10

#: Memory for pairs of genes, in bytes, at a time; named genes have to fit, all genes take several passes.
MOST_BYTES = 1 << 30


def find_pairs(
    genes: Iterable[str] | EllipsisType,
    cells: Prepared,
    lengths: np.ndarray,
    heads: list[int] | None,
    n_heads: int,
) -> list[Pairs]:
    """Lay out the pairs of genes to keep, in as many parts as memory takes.

    `heads` are those whose mean is kept, `None` for each of all `n_heads` by itself.
    """
    from gfx._engine.attention import Pairs

    n_tokens = len(cells.model.vocabulary)
    n_cells = np.zeros(n_tokens, dtype=np.int64)
    for row in np.flatnonzero(lengths):
        n_cells[cells.tokens[row]] += 1  # a cell has each gene once
    n_cells[cells.model.vocabulary.is_special] = 0
    if genes is ...:
        if heads is None:
            msg = '`heads="each"` keeps pairs of named genes. For all genes, name the heads whose mean is wanted.'
            raise ValueError(msg)
        tokens = np.flatnonzero(n_cells >= FEWEST_CELLS)
        if len(tokens) < 2:
            msg = f"`genes=...` keeps genes that at least {FEWEST_CELLS} cells have, found {len(tokens)}."
            raise ValueError(msg)
    else:
        tokens = find_genes(genes, cells.model.vocabulary, "genes")
        if len(tokens) < 2:
            msg = "`genes` names one gene; pairs are of two or more. Use `genes=...` for what it attends to among all."
            raise ValueError(msg)
        missing = cells.model.vocabulary.symbols[tokens[n_cells[tokens] == 0]]
        if not n_cells[tokens].any():
            why = f" {cells.behind}" if cells.are_cut(tokens, lengths).any() else ""
            msg = f"No cell that is used has any of the genes {shortened(missing)}.{why}"
            raise ValueError(msg)
        if len(missing):
            _log.info(f"No pairs for {shortened(missing)}: none of the cells has these genes.")
    bytes_per_pair = 8 * (2 + (n_heads if heads is None else 1))
    n_bytes = bytes_per_pair * len(tokens) ** 2
    if genes is not ... and n_bytes > MOST_BYTES:
        most = int((MOST_BYTES / bytes_per_pair) ** 0.5)
        each = " with `heads='each'`" if heads is None else ""
        msg = (
            f"Pairs of {len(tokens):,} genes{each} take {n_bytes / 1e9:.1f} GB. Name {most:,} genes or fewer, or use "
            "`genes=...`, which keeps the strongest pairs of all genes."
        )
        raise ValueError(msg)
    n_rows = max(1, MOST_BYTES // (bytes_per_pair * len(tokens)))
    receives = _numbers(tokens, n_tokens)
    return [
        Pairs(_numbers(tokens[start : start + n_rows], n_tokens), receives, heads)
        for start in range(0, len(tokens), n_rows)
    ]


def _tokens(numbers: np.ndarray) -> np.ndarray:
    """Take the tokens that have numbers, in the order of these."""
    tokens = np.flatnonzero(numbers >= 0)
    return tokens[np.argsort(numbers[tokens])]


def _numbers(tokens: np.ndarray, n_tokens: int) -> np.ndarray:
    """Count some tokens in their order, -1 for all others."""
    out = np.full(n_tokens, -1, dtype=np.int64)
    out[tokens] = np.arange(len(tokens))
    return out


def pair_matrices(
    cells: Prepared,
    pairs: Sequence[Pairs],
    parts: Sequence[AttentionSums],
    lengths: np.ndarray,
    n_neighbors: int | None,
) -> tuple[dict[str, sparse.csr_matrix], dict[str, object]]:
    """Lay out attention from gene to gene for `varp`: all pairs, or the strongest ones of each gene."""
    found, receives = [], _tokens(pairs[0].receives)
    for part, sums in zip(pairs, parts, strict=True):
        gives = _tokens(part.gives)
        means, uniform, n_cells = sums.of_pairs()
        mean = means.mean(axis=2)
        if n_neighbors is None:
            rows, columns = np.nonzero(n_cells)
        else:
            is_wanted = (gives[:, None] != receives) & (n_cells >= FEWEST_CELLS)
            rows, columns = strongest(np.where(is_wanted, mean, np.nan), n_neighbors)
        found.append((gives[rows], receives[columns], *(of[rows, columns] for of in (mean, uniform, n_cells))))
    givers, receivers, *values = map(np.concatenate, zip(*found, strict=True))
    n_vars, row_of = len(cells.gene_tokens), np.full(len(cells.model.vocabulary), -1)
    row_of[cells.gene_tokens[::-1]] = np.arange(n_vars)[::-1]  # the first row of a gene that has several
    row_of[cells.model.vocabulary.is_special] = -1
    rows, columns = row_of[givers], row_of[receivers]
    has_rows = (rows >= 0) & (columns >= 0)

    def matrix(values: np.ndarray) -> sparse.csr_matrix:
        return sparse.csr_matrix((values[has_rows], (rows[has_rows], columns[has_rows])), shape=(n_vars, n_vars))

    varp = dict(zip(("", "uniform", "n_cells"), map(matrix, values), strict=True))
    uns: dict[str, object] = {}
    if n_neighbors is None:
        try:
            correlation = _coexpression(cells, receives, lengths)
            numbers = pairs[0].receives
            varp["coexpression"] = matrix(correlation[numbers[givers], numbers[receivers]].astype(np.float32))
        except CountsNotAtHandError as problem:
            _log.info(f"Co-expression is missing, because there are no counts to read: {problem.args[0]}")
        if pairs[0].heads is None:
            there = row_of[receives] >= 0
            names = cells.adata.var_names[row_of[receives][there]]
            of_heads = means.transpose(2, 0, 1)[:, there][:, :, there]
            uns = {"pairs": of_heads, "pairs_genes": names.to_numpy(dtype=object)}
    return varp, uns


def _coexpression(cells: Prepared, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Pearson correlation between genes of their normalised counts' logarithms, over the cells that are used."""
    n, total, products = 0, np.zeros(len(tokens)), np.zeros((len(tokens), len(tokens)))
    for rows, logs in log_counts(cells):
        chosen = logs[lengths[rows] > 0][:, tokens].toarray()
        n += len(chosen)
        total += chosen.sum(axis=0)
        products += chosen.T @ chosen
    covariance = products / n - np.outer(total / n, total / n)
    deviation = np.sqrt(np.maximum(np.diag(covariance), 0))
    scale = np.outer(deviation, deviation)
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
