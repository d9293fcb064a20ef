"""What an effect is worth: against random sets of genes, over donors, beside what is known without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Share of the intervals.
COVERAGE = 0.95

#: Folds of the cross-validated state axis.
N_FOLDS = 5

#: Fewer observations say nothing about what a ranking follows.
FEWEST_RANKED = 10

#: Draws of a bootstrap.
N_DRAWS = 1_000


def moments(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn sum, sum of squares and number, `(3, ...)`, into number, mean and standard deviation; NaN where none."""
    total, squares, n = sums
    mean, square = (np.divide(values, n, out=np.full(n.shape, np.nan), where=n > 0) for values in (total, squares))
    return n, mean, np.sqrt(np.maximum(square - mean**2, 0))


# --- against random sets -------------------------------------------------------------------------------------------


def against_random(differences: np.ndarray) -> tuple[float, np.ndarray]:
    """Place an effect among those of random sets, and each of these among the others.

    The replicates are sets of genes, not cells. Noise of the few cells behind each is part of their spread, so z is
    rather too small than too large.

    Parameters
    ----------
    differences
        Effect of each random set less that of the perturbed one, in the same cells.

    Returns
    -------
    z of the effect: its distance from the mean random set in standard deviations of random sets, above 0 for an effect
    above theirs; and z of each random set among the others, which is what z looks like by chance. NaN with fewer than
    three sets, or where they do not differ.
    """
    values = differences[~np.isnan(differences)].astype(np.float64)
    n = len(values)
    if n < 3 or np.ptp(values) == 0:
        return np.nan, np.zeros(0)
    total, squares = values.sum(), ((values - values.mean()) ** 2).sum()
    others = (total - values) / (n - 1)
    # Squares about the mean of the others: one value less, and the mean moves.
    left = squares - (values - values.mean()) ** 2 * n / (n - 1)
    spread = np.sqrt(np.maximum(left, 0) / (n - 2))
    each = np.divide(values - others, spread, out=np.full(n, np.nan), where=spread > 0)
    return float(-values.mean() / values.std(ddof=1)), each[~np.isnan(each)]


def by_chance(z: np.ndarray, random_z: np.ndarray) -> np.ndarray:
    """Two-sided p of each z among those of random sets, pooled; NaN for NaN, and where there are none.

    Pooled over perturbations, for what a z of random sets looks like is alike beside each, while 100 sets beside one
    cannot tell rare from very rare. No p is below 2 / (number of random sets + 1).
    """
    out = np.full(len(z), np.nan)
    known = ~np.isnan(z)
    if known.any() and (~np.isnan(random_z)).any():
        pool = np.sort(random_z[~np.isnan(random_z)])
        above = len(pool) - np.searchsorted(pool, z[known], side="left")
        below = np.searchsorted(pool, z[known], side="right")
        out[known] = np.minimum(1.0, 2 * (1 + np.minimum(above, below)) / (len(pool) + 1))
    return out


def false_discovery_rate(p: np.ndarray) -> np.ndarray:
    """Adjust p-values by Benjamini and Hochberg; what is NaN stays so and does not count as a test."""
    out = np.full(len(p), np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        out[tested] = stats.false_discovery_control(p[tested])
    return out


# --- over replicates -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """Mean over replicates, its 95 % interval, and p against 0; NaN where there are too few."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def over_donors(values: np.ndarray) -> Interval:
    """Mean of one value per donor, with Student's t over donors."""
    values = values[~np.isnan(values)].astype(np.float64)
    n = len(values)
    mean = float(values.mean()) if n else np.nan
    if n < 2 or not np.ptp(values) > 0:
        return Interval(mean, np.nan, np.nan, np.nan, n)
    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(COVERAGE)
    return Interval(mean, float(low), float(high), float(test.pvalue), n)


def donors_beside_random(values: np.ndarray, random_sd: float, n_random: int) -> float:
    """Ask over donors whether a gene is other than random genes: p of Student's t.

    A gene is never just like the average gene: a test of its donors alone would call every gene special, given enough
    of them. So its mean over donors has to stand out from random genes, too: the variance is that between donors, over
    their number, and that between random sets, of one more and of their mean. Degrees of freedom by Welch and
    Satterthwaite.

    Parameters
    ----------
    values
        Excess over the mean random set, one value per donor.
    random_sd, n_random
        Spread of the random sets, and how many there are.
    """
    values = values[~np.isnan(values)].astype(np.float64)
    n = len(values)
    if n < 2 or n_random < 3 or not random_sd > 0:
        return np.nan
    of_donors, of_genes = values.var(ddof=1) / n, random_sd**2 * (1 + 1 / n_random)
    freedom = (of_donors + of_genes) ** 2 / (of_donors**2 / (n - 1) + of_genes**2 / (n_random - 1))
    return float(2 * stats.t.sf(abs(values.mean()) / np.sqrt(of_donors + of_genes), freedom))


def over_cells(values: np.ndarray, rng: np.random.Generator) -> Interval:
    """Mean over cells with its bootstrap interval; no p, for cells are not replicates."""
    values = values[~np.isnan(values)].astype(np.float64)
    n = len(values)
    if n < 2:
        return Interval(float(values.mean()) if n else np.nan, np.nan, np.nan, np.nan, n)
    means = np.array([rng.choice(values, n).mean() for _ in range(N_DRAWS)])
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(float(values.mean()), float(low), float(high), np.nan, n)


# --- rankings ------------------------------------------------------------------------------------------------------


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation over what both know; NaN for fewer than three, or where one of them is constant."""
    both = np.isfinite(x) & np.isfinite(y)
    x, y = stats.rankdata(x[both]), stats.rankdata(y[both])
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return np.nan
    return float(np.corrcoef(x, y)[0, 1])


def partial_spearman(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """Rank correlation of what the ranks of `given`, `(n, n_given)`, leave unexplained of the ranks of x and y.

    NaN where no more observations are left than there are variables to take out.
    """
    given = given.reshape(len(x), -1)
    whole = np.isfinite(np.column_stack([x, y, given])).all(axis=1)
    if whole.sum() < given.shape[1] + 4:
        return np.nan
    ranks = [stats.rankdata(column) for column in (x[whole], y[whole], *given[whole].T)]
    others = np.column_stack([np.ones(whole.sum()), *ranks[2:]])
    left = [values - others @ np.linalg.lstsq(others, values, rcond=None)[0] for values in ranks[:2]]
    if min(rest.std() for rest in left) < 1e-9 * whole.sum():
        return np.nan
    return float(np.corrcoef(*left)[0, 1])


def beside_baselines(effect: np.ndarray, baselines: Mapping[str, np.ndarray]) -> list[dict[str, float | str]]:
    """Tell how much of a ranking each baseline gives by itself, and given the others."""
    known = {name: values for name, values in baselines.items() if np.isfinite(values).any()}
    rows = []
    for name, values in known.items():
        n = int((np.isfinite(effect) & np.isfinite(values)).sum())
        others = [other for key, other in known.items() if key != name]
        given = np.column_stack(others) if others else np.zeros((len(effect), 0))
        rows.append(
            {
                "baseline": name,
                "spearman": spearman(effect, values) if n >= FEWEST_RANKED else np.nan,
                "partial_spearman": partial_spearman(effect, values, given) if n >= FEWEST_RANKED else np.nan,
                "n": n,
            }
        )
    return rows


def rank_trend(rank: np.ndarray, shift: np.ndarray) -> dict[str, float]:
    """Fit how the effect of a random gene follows its rank: a line through the logarithms of shifts.

    Returns
    -------
    `spearman`; `intercept` and `slope` of the natural logarithm of the shift over the rank from 0 to 1; `sd` of what
    is left; `n`.
    """
    usable = np.isfinite(rank) & (shift > 0)
    rank, logs = rank[usable].astype(np.float64), np.log(shift[usable].astype(np.float64))
    if len(rank) < 3 or np.ptp(rank) == 0:
        return dict.fromkeys(("spearman", "intercept", "slope", "sd"), np.nan) | {"n": len(rank)}
    line = stats.linregress(rank, logs)
    left = logs - line.intercept - line.slope * rank
    return {
        "spearman": spearman(rank, logs),
        "intercept": float(line.intercept),
        "slope": float(line.slope),
        "sd": float(left.std(ddof=2)),
        "n": len(rank),
    }


# --- states --------------------------------------------------------------------------------------------------------


def axis_auc(
    vectors: np.ndarray, is_goal: np.ndarray, donor: np.ndarray | None, rng: np.random.Generator
) -> tuple[float, int]:
    """Ask whether held-out cells of two states can be told apart along the line between the states' means.

    Parameters
    ----------
    vectors
        Embedding of the cells of both states, `(n_cells, d)`.
    is_goal
        Which are of the goal.
    donor
        Donor of each cell: whole donors are held out. `None` holds out random cells, which says less.

    Returns
    -------
    Mean area under the ROC curve over the folds that hold cells of both states out (0.5 is chance), and the number of
    these folds; NaN and 0 if there is none.
    """
    areas = []
    for held in _folds(is_goal, donor, rng):
        fit = ~held
        if any(not (part & state).any() for part in (held, fit) for state in (is_goal, ~is_goal)):
            continue
        axis = vectors[fit & is_goal].mean(axis=0) - vectors[fit & ~is_goal].mean(axis=0)
        areas.append(auc(vectors[held & is_goal] @ axis, vectors[held & ~is_goal] @ axis))
    return (float(np.mean(areas)), len(areas)) if areas else (np.nan, 0)


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counted half."""
    return float(stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))


def _folds(is_goal: np.ndarray, donor: np.ndarray | None, rng: np.random.Generator) -> list[np.ndarray]:
    """Cut cells, or donors, into folds that each have their share of both states."""
    unit = np.arange(len(is_goal)) if donor is None else np.unique(donor, return_inverse=True)[1]
    mostly_goal = np.bincount(unit, is_goal) * 2 > np.bincount(unit)
    groups = [group for group in (np.flatnonzero(mostly_goal), np.flatnonzero(~mostly_goal)) if len(group)]
    n_folds = max(2, min(N_FOLDS, *(len(group) for group in groups)))
    fold = np.empty(len(mostly_goal), dtype=int)
    for group in groups:
        fold[group] = rng.permutation(len(group)) % n_folds
    return [fold[unit] == at for at in range(n_folds)]
