"""Random sets of genes that stand where the perturbed ones stand, in the same cells: what chance looks like there."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gfx._core.vocabulary import Vocabulary

#: Ranks that count as neighbouring: this many, or this share of the cell's genes if that is more.
NEAR_RANKS, NEAR_SHARE = 10, 0.025

#: Genes of neighbouring detection, where the perturbed one is absent and has no rank.
NEAR_IN_DETECTION = 100

#: Cells that random sets are looked for in at most; the estimate of a mean needs no more.
MOST_CELLS = 1_000

#: Draws that may fail for each set that is found.
PATIENCE = 10


@dataclass(frozen=True)
class MatchedSets:
    """Random sets and the cells to perturb them in.

    Parameters
    ----------
    sets
        Tokens, int64 `(n_sets, n_genes)`.
    cell, which
        Row of the cell and number of the set, for each pair to run, int `(n_pairs,)`.
    """

    sets: np.ndarray
    cell: np.ndarray
    which: np.ndarray


def draw_matched_sets(
    ids: np.ndarray,
    lengths: np.ndarray,
    genes: np.ndarray,
    cells: np.ndarray,
    vocabulary: Vocabulary,
    *,
    n_sets: int,
    cells_per_set: int,
    rng: np.random.Generator,
) -> MatchedSets:
    """Draw sets whose genes stand near the given ones, each with the cells in which all of them do.

    A set is drawn from a random cell, so those that fit many cells are drawn more often. Each is one replicate: a gene
    moves cells in its own way, so the same gene is followed through its cells, and not another one drawn in each.
    A gene that a cell lacks is matched by genes that it lacks, too, and that are detected about as often.

    Parameters
    ----------
    ids, lengths
        Tokens of all cells `(n_cells, longest)`, and how many, `(n_cells,)`.
    genes
        The set to match, tokens `(n_genes,)`.
    cells
        Rows of the cells in which it is perturbed.
    n_sets, cells_per_set
        At most; fewer where little matches.
    """
    if len(cells) > MOST_CELLS:
        cells = np.sort(rng.choice(cells, MOST_CELLS, replace=False))
    rows, n = ids[cells].astype(np.int64), lengths[cells] - vocabulary.n_specials
    places = np.full((len(cells), len(vocabulary)), -1, dtype=np.int16)  # the longest input is 4,096 tokens
    np.put_along_axis(places, rows, np.arange(rows.shape[1], dtype=np.int16)[None], axis=1)
    places[:, vocabulary.is_special] = -1
    near = np.maximum(NEAR_RANKS, np.ceil(NEAR_SHARE * n).astype(int))
    candidates = [_candidates(places, gene) for gene in genes]
    found: dict[tuple[int, ...], np.ndarray] = {}
    known: set[frozenset[int]] = set()  # the same genes in another order are no other replicate
    for _ in range(n_sets * PATIENCE):
        if len(found) == n_sets or not len(cells):
            break
        at = rng.integers(len(cells))
        drawn = _draw_one(
            rows[at],
            places[at],
            genes,
            candidates,
            n=int(n[at]),
            near=int(near[at]),
            first=vocabulary.first_gene,
            rng=rng,
        )
        if drawn is None or frozenset(drawn) in known:
            continue
        known.add(frozenset(drawn))
        fits = np.ones(len(cells), dtype=bool)
        for gene, other in zip(genes, drawn, strict=True):
            mine, its = places[:, gene].astype(int), places[:, other].astype(int)
            # Matched by rank or by absence, as in the cell that it was drawn from.
            if places[at, gene] >= 0:
                fits &= (mine >= 0) & (its >= 0) & (abs(its - mine) <= near)
            else:
                fits &= (mine < 0) & (its < 0)
        fitting = np.flatnonzero(fits)
        some = rng.choice(fitting, min(cells_per_set, len(fitting)), replace=False)
        found[drawn] = np.sort(cells[some])
    sets = np.array(list(found), dtype=np.int64).reshape(len(found), len(genes))
    sizes = [len(some) for some in found.values()]
    pairs = np.concatenate([*found.values(), np.zeros(0, dtype=np.int64)]).astype(np.int64)
    return MatchedSets(sets=sets, cell=pairs, which=np.repeat(np.arange(len(found)), sizes))


def _candidates(places: np.ndarray, gene: int) -> np.ndarray:
    """Genes detected in about as many of the cells as this one, itself left out."""
    detected = (places >= 0).sum(axis=0)
    there = np.flatnonzero(detected > 0)
    by_detection = there[np.argsort(detected[there], kind="stable")]
    middle = int(np.searchsorted(detected[by_detection], detected[gene]))
    half = ceil(NEAR_IN_DETECTION / 2)
    some = by_detection[max(0, middle - half) : middle + half + 1]
    return some[some != gene]


def _draw_one(
    row: np.ndarray,
    places: np.ndarray,
    genes: np.ndarray,
    candidates: list[np.ndarray],
    *,
    n: int,
    near: int,
    first: int,
    rng: np.random.Generator,
) -> tuple[int, ...] | None:
    """Draw for each gene one that stands near it in this cell, or lacks as it does; `None` if there is none left."""
    drawn: list[int] = []
    for gene, absent_ones in zip(genes, candidates, strict=True):
        at = int(places[gene])
        if at >= 0:
            pool = row[max(first, at - near) : min(first + n, at + near + 1)]
        else:
            pool = absent_ones[places[absent_ones] < 0]
        pool = np.setdiff1d(pool, [*genes, *drawn])
        if not len(pool):
            return None
        drawn.append(int(pool[rng.integers(len(pool))]))
    return tuple(drawn)
