"""Rank-matched random gene sets: the null of a perturbation, in the same cells."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gfx._core.encodings import Encodings
    from gfx._core.vocabulary import Vocabulary

#: Ranks that count as neighbouring: this many, or this share of the cell's genes if that is more.
NEAR_RANKS, NEAR_SHARE = 10, 0.025

#: Genes of neighbouring detection, where the perturbed one is absent and has no rank.
NEAR_IN_DETECTION = 100

#: Cells that random sets are looked for in at most; the estimate of a mean needs no more.
MOST_CELLS = 1_000

#: Draws that may fail for each set that is found.
PATIENCE = 10


def draw_matched_sets(
    tokens: Encodings,
    genes: np.ndarray,
    cells: np.ndarray,
    vocabulary: Vocabulary,
    *,
    n_sets: int,
    cells_per_set: int,
    rng: np.random.Generator,
) -> dict[tuple[int, ...], np.ndarray]:
    """Draw rank-matched random sets: rows of the cells in which all genes of a set match, by the tokens of the set.

    `genes` are the tokens to match, `(n_genes,)`, and `cells` the rows in which they are perturbed. A set is drawn from
    a random cell, so those that fit many cells are drawn more often. Each is one replicate: a gene shifts cells in its
    own way, so the same gene is followed through its cells, and not another one drawn in each. A gene that a cell lacks
    is matched by genes that it lacks, too, and that are detected about as often. There are fewer sets than
    `n_sets`, in fewer than `cells_per_set` cells, where little matches. The order of `genes` is that of each set, and
    changes nothing else.
    """
    order = np.argsort(genes)
    given, genes = np.argsort(order), genes[order]
    if len(cells) > MOST_CELLS:
        cells = np.sort(rng.choice(cells, MOST_CELLS, replace=False))
    first, n = vocabulary.first_gene, tokens.lengths[cells] - vocabulary.n_specials
    rows = tokens.padded(cells)[:, first:].astype(np.int64)
    ranks = np.full((len(cells), len(vocabulary)), -1, dtype=np.int16)  # the longest input is 4,096 tokens
    np.put_along_axis(ranks, rows, np.arange(rows.shape[1], dtype=np.int16)[None], axis=1)
    ranks[:, vocabulary.is_special] = -1
    near = np.maximum(NEAR_RANKS, np.ceil(NEAR_SHARE * n).astype(int))
    candidates = [_candidates(ranks, gene) for gene in genes]
    sets: dict[tuple[int, ...], np.ndarray] = {}
    known: set[frozenset[int]] = set()  # the same genes in another order are no other replicate
    for _ in range(n_sets * PATIENCE if len(cells) else 0):
        if len(sets) == n_sets:
            break
        row = rng.integers(len(cells))
        drawn = _draw_one(rows[row, : n[row]], ranks[row], genes, candidates, near=near[row], rng=rng)
        if drawn is None or frozenset(drawn) in known:
            continue
        known.add(frozenset(drawn))
        # Matched by rank or by absence, as in the cell that it was drawn from.
        own, other = ranks[:, genes].astype(int), ranks[:, drawn].astype(int)
        is_near = (own >= 0) & (other >= 0) & (abs(other - own) <= near[:, None])
        is_present = ranks[row, genes] >= 0
        fitting = np.flatnonzero(np.where(is_present, is_near, (own < 0) & (other < 0)).all(axis=1))
        sets[tuple(drawn[number] for number in given)] = np.sort(
            cells[rng.choice(fitting, min(cells_per_set, len(fitting)), replace=False)]
        )
    return sets


def _candidates(ranks: np.ndarray, gene: int) -> np.ndarray:
    """Genes detected in about as many of the cells as this one, without itself."""
    n_cells = (ranks >= 0).sum(axis=0)
    detected = np.flatnonzero(n_cells > 0)
    by_detection = detected[np.argsort(n_cells[detected], kind="stable")]
    middle = int(np.searchsorted(n_cells[by_detection], n_cells[gene]))
    half = ceil(NEAR_IN_DETECTION / 2)
    similar = by_detection[max(0, middle - half) : middle + half + 1]
    return similar[similar != gene]


def _draw_one(
    row: np.ndarray,
    ranks: np.ndarray,
    genes: np.ndarray,
    candidates: list[np.ndarray],
    *,
    near: int,
    rng: np.random.Generator,
) -> tuple[int, ...] | None:
    """Draw for each gene one within `near` ranks in a cell, or if it is absent, one of its candidates that is as well.

    The cell is given as its genes by rank (`row`), and the rank of every token, -1 if it is absent. `None` if no gene
    is left to draw.
    """
    drawn: list[int] = []
    for gene, similar in zip(genes, candidates, strict=True):
        rank = int(ranks[gene])
        pool = row[max(0, rank - near) : rank + near + 1] if rank >= 0 else similar[ranks[similar] < 0]
        pool = np.setdiff1d(pool, [*genes, *drawn])
        if not len(pool):
            return None
        drawn.append(int(pool[rng.integers(len(pool))]))
    return tuple(drawn)
