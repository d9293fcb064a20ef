"""Statistics of a screen: sums over cells, excess over genes of neighbouring rank, and which genes stand out."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage, stats
from scipy.spatial import KDTree

from gfx._core.statistics import moments, of_sample

if TYPE_CHECKING:
    from gfx._core.vocabulary import Vocabulary

#: Genes on either side in the order of a cell that a gene is compared with.
NEIGHBOURS = 20

#: Genes alike in rank and in number of cells, among which one may stand out; with fewer than 20 none does.
ALIKE, FEWEST_ALIKE = 100, 20

#: The fraction of the genes of a cell with the largest estimates, and the fraction with the largest exact effects.
TOP, TOP_EXACT = 0.1, 0.2

#: Shifts toward the goal whose estimates correlate less with exact results than this, over the genes of a cell, are
#: warned of.
LOWEST_AGREEMENT = 0.9

#: Genes of a cell whose estimates are checked, and how many of them are top genes, if there are enough others.
CHECKED, CHECKED_TOP = 30, 10


def wanted_places(ids: np.ndarray, lengths: np.ndarray, genes: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Find the tokens that are to be deleted, bool `(n_cells, longest)`: another gene has to be left.

    `genes` says which tokens to delete at all, bool `(n_tokens,)`.
    """
    enough = lengths - vocabulary.n_specials > 1
    return genes[ids] & ~vocabulary.is_special[ids] & (np.arange(ids.shape[1]) < (lengths * enough)[:, None])


def excess_over_neighbours(values: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Effect of each gene less the median of the genes of neighbouring rank in the same cell, float64 `(n,)`.

    NaN in cells with too few genes to compare with. `values` has one effect a run, NaN if it is not known, and `cell`
    the cell of each run, `(n,)`; the runs of a cell are together and in the order of its genes.
    """
    out = np.full(len(values), np.nan)
    known = np.flatnonzero(~np.isnan(values))
    for runs in np.split(known, np.flatnonzero(np.diff(cell[known])) + 1):
        if len(runs) > NEIGHBOURS:
            effects = values[runs].astype(np.float64)
            out[runs] = effects - ndimage.median_filter(effects, 2 * NEIGHBOURS + 1, mode="mirror")
    return out


class GeneSums:
    """Sums over cells of what was measured of genes, for each gene and group; adding takes no memory."""

    def __init__(self, n_tokens: int, n_groups: int) -> None:
        self.n_groups = n_groups
        self._sums: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros((3, n_tokens, n_groups)))

    def add(self, name: str, tokens: np.ndarray, group: np.ndarray, values: np.ndarray) -> None:
        """Add one value for each token and group, all `(n,)`; NaN and groups below 0 count for nothing."""
        sums = self._sums[name].reshape(3, -1)
        counted = (group >= 0) & ~np.isnan(values)
        slot = tokens[counted].astype(np.int64) * self.n_groups + group[counted]
        values = values[counted].astype(np.float64)
        added = [np.bincount(slot, weights, sums.shape[1]) for weights in (values, values**2, np.ones_like(values))]
        sums += np.stack(added)

    def n(self, name: str) -> np.ndarray:
        """How many values were added, int64 `(n_tokens, n_groups)`."""
        return self._sums[name][2].astype(np.int64)

    def mean(self, name: str) -> np.ndarray:
        """Their mean, `(n_tokens, n_groups)`; NaN where there is none."""
        return moments(self._sums[name])[1]

    def sd(self, name: str) -> np.ndarray:
        """Their standard deviation, of a sample, `(n_tokens, n_groups)`; NaN for fewer than two."""
        n, _, sd = moments(self._sums[name])
        return of_sample(sd**2, n)


def standing_out(
    excess: np.ndarray, rank: np.ndarray, n_cells: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the robust z of each gene among the 100 genes most alike in mean rank and number of cells.

    Median and median absolute deviation: a gene that stands out does not hide another. Arguments are of each gene,
    `(n,)`; genes with NaN are left out.

    Returns
    -------
    z, and the median and spread that it is counted in, all `(n,)`; NaN with too few genes, or where these do not
    differ.
    """
    z, centre, spread = np.full((3, len(excess)), np.nan)
    there = np.flatnonzero(~np.isnan(excess) & ~np.isnan(rank))
    # In an order of their own: which of two genes that are as much alike is the last one depends on it.
    there = there[np.lexsort((excess[there], n_cells[there], rank[there]))]
    if len(there) <= FEWEST_ALIKE:
        return z, centre, spread
    values = excess[there]
    places = np.column_stack([stats.rankdata(of[there].astype(np.float64)) for of in (rank, n_cells)])
    _, alike = KDTree(places).query(places, k=min(ALIKE + 1, len(there)))
    others = np.where(alike == np.arange(len(there))[:, None], np.nan, values[alike])  # a gene is not its own null
    centre[there] = np.nanmedian(others, axis=1)
    spread[there] = stats.median_abs_deviation(others, axis=1, nan_policy="omit", scale="normal")
    np.divide(excess - centre, spread, out=z, where=spread > 0)
    return z, centre, spread


def draw_checked(estimates: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the genes of a cell whose estimates are compared with exact results: top genes, and some of all others.

    `estimates` are `(n_measures, n_genes)`; a gene is a top gene if it is among the largest by any measure.

    Returns
    -------
    How many genes of the cell each drawn gene stands for, the inverse of its probability to be drawn, float64
    `(n_genes,)`; 0 for genes that were not drawn.
    """
    is_top = np.any([_is_top(of_measure) for of_measure in estimates], axis=0)
    top, others = (rng.permutation(np.flatnonzero(of)) for of in (is_top, ~is_top))
    n_top = min(len(top), max(CHECKED_TOP, CHECKED - len(others)))
    weight = np.zeros(len(is_top))
    for genes, n in ((top, n_top), (others, CHECKED - n_top)):
        weight[genes[:n]] = len(genes) / max(min(n, len(genes)), 1)
    return weight


def agreement(estimate: np.ndarray, exact: np.ndarray, weight: np.ndarray | None = None) -> tuple[float, float]:
    """Compare estimates with exact results over the genes of a cell: Spearman, and precision of the largest estimates.

    Spearman is a mean over pairs of genes: 1 where estimates and exact effects are in the same order, else -1, weighted
    by the distance of the estimates in rank; pairs with equal exact effects are left out. Precision is the fraction of
    the largest tenth of the estimates that is among the largest fifth of the exact effects, both by absolute value.
    Arguments are of each gene, `(n,)`. If exact effects of a sample are known, and NaN for all other genes, each gene
    counts as often as its `weight` says, and each pair by the product: both values estimate those of the whole cell.
    """
    known = ~np.isnan(exact)
    weight = np.ones(known.sum()) if weight is None else weight[known]
    effect = exact[known]
    if len(effect) < 3 or np.ptp(estimate[known]) == 0 or np.ptp(effect) == 0:
        return np.nan, np.nan
    rank = stats.rankdata(estimate.astype(np.float64))[known]
    by_rank, sign = (values[:, None] - values for values in (rank, effect))
    by_rank *= np.outer(weight, weight) * (sign != 0)
    correlation = (by_rank * np.sign(sign)).sum() / np.abs(by_rank).sum()
    mid_rank = (np.abs(effect) > np.abs(effect)[:, None]) @ weight + weight / 2  # half of those a gene stands for
    is_top = _is_top(estimate)[known]
    if not is_top.any():
        return float(correlation), np.nan
    return float(correlation), float(np.average(mid_rank[is_top] < TOP_EXACT * len(exact), weights=weight[is_top]))


def _is_top(estimate: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(-np.abs(estimate), kind="stable")) + 0.5 < TOP * len(estimate)
