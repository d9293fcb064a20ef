"""Statistics of effects: compared with random sets of genes, over donors, and with baselines without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: Coverage of the intervals.
COVERAGE = 0.95

#: Folds of the cross-validation of the state axis, and the AUC below which held-out cells of two states are hardly
#: separable along it.
N_FOLDS, LOWEST_AUC = 5, 0.6

#: Observations that a ranking has to have before it is correlated with anything.
FEWEST_RANKED = 10

#: Genes that each gene of a set is compared with, and ranks that are the same but for rounding.
N_SIMILAR, _TIE = 50, 1e-6

#: Resamples of a bootstrap.
N_DRAWS = 1_000


def add_up(results: Iterable[Mapping[str, np.ndarray]], n_slots: int) -> dict[str, np.ndarray]:
    """Add up results of blocks: `sum`, float64 `(n_slots, d)`, and `n`, int64 `(n_slots,)`, of the slots that each has.

    So is whatever else they hold, of which later ones may have fewer rows.
    """
    totals = {"sum": np.zeros((0, 0)), "n": np.zeros(n_slots, dtype=np.int64)}
    for result in results:
        if not totals["sum"].size:
            totals["sum"] = np.zeros((n_slots, result["sum"].shape[1]))
        for name, values in result.items():
            if name in {"sum", "n"}:
                totals[name][result["slot"]] += values
            elif name in totals:
                totals[name][: len(values)] += values
            elif name != "slot":
                totals[name] = values.copy()
    return totals


def moments(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn sum, sum of squares and number, `(3, ...)`, into number, mean and standard deviation; NaN where none."""
    total, squares, n = sums
    mean, square = divided(total, n), divided(squares, n)
    return n, mean, np.sqrt(np.maximum(square - mean**2, 0))


def of_sample(variance: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Turn variances of populations into standard deviations of samples; NaN for fewer than two."""
    return np.sqrt(divided(variance * n, n - 1))


def divided(sums: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Divide sums by numbers, of the same shape or one that is broadcast to it; NaN where these are 0."""
    sums, n = np.broadcast_arrays(sums, n)
    return np.divide(sums, n, out=np.full(sums.shape, np.nan), where=n > 0)


# --- against random sets -------------------------------------------------------------------------------------------


def against_random(differences: np.ndarray) -> tuple[float, np.ndarray]:
    """Compare an effect with those of random sets, from the `differences` of these to it in the same cells.

    Returns z of the effect, its distance from the mean random set in standard deviations of random sets, positive for a
    larger effect; and the leave-one-out z of each random set, the null distribution of z. NaN with fewer than three
    sets, or where they do not differ. The replicates are sets of genes, not cells. The spread of random sets includes
    the noise of the few cells behind each, so z is conservative. See :func:`tail` for z from different numbers of sets.
    """
    values = differences[~np.isnan(differences)].astype(np.float64)
    n = len(values)
    if n < 3 or np.ptp(values) == 0:
        return np.nan, np.zeros(0)
    total, squares = values.sum(), ((values - values.mean()) ** 2).sum()
    others = (total - values) / (n - 1)
    # Squares about the mean of the others: one value less, and the mean moves.
    squares_of_others = squares - (values - values.mean()) ** 2 * n / (n - 1)
    spread = np.sqrt(np.maximum(squares_of_others, 0) / (n - 2))
    null = np.divide(values - others, spread, out=np.full(n, np.nan), where=spread > 0)
    return float(-values.mean() / values.std(ddof=1)), null[~np.isnan(null)]


def tail(z: np.ndarray | float, n: np.ndarray | int) -> np.ndarray | float:
    """Put z that come from `n` random sets each on one scale: from few sets, large ones are frequent by chance.

    Of normal effects, z is Student's t with `n` - 1 degrees of freedom, widened by the error of the mean of the sets.
    """
    return np.sign(z) * stats.norm.isf(stats.t.sf(np.abs(z) / np.sqrt(1 + 1 / n), n - 1))


def by_chance(z: np.ndarray, random_z: np.ndarray) -> np.ndarray:
    """Two-sided p-value of each z: the fraction of the z of random sets that are at least as extreme.

    The null is pooled over perturbations, on the scale of :func:`tail`, because 50 sets of one alone would bound p at
    2 / 51. No p is below 2 / (number of random sets + 1). NaN for NaN, and without random sets.
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
    """Adjust p-values by Benjamini and Hochberg; NaN stays NaN and does not count as a test."""
    out = np.full(len(p), np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        out[tested] = stats.false_discovery_control(p[tested])
    return out


# --- over replicates -----------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """Mean over replicates, its 95 % interval, and their number; NaN where there are too few replicates."""

    mean: float
    low: float
    high: float
    n: int


def over_donors(values: np.ndarray) -> Interval:
    """Mean of one value per donor, with Student's t over donors."""
    values = values[~np.isnan(values)].astype(np.float64)
    n = len(values)
    mean = float(values.mean()) if n else np.nan
    if n < 2 or not np.ptp(values) > 0:
        return Interval(mean, np.nan, np.nan, n)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(COVERAGE)
    return Interval(mean, float(low), float(high), n)


def donors_against_random(values: np.ndarray, random_sd: float, n_random: int) -> float:
    """Test over donors whether a gene differs from random genes: p of Welch's t-test.

    `values` are its excess over the mean random set, one a donor. No gene behaves exactly like the average gene, so a
    test of its donors alone calls every gene special, given enough donors. The mean over donors is therefore compared
    with one more random gene: the variance of that side is the spread between random sets, of one more set and of their
    mean.
    """
    values = values[~np.isnan(values)].astype(np.float64)
    if len(values) < 2 or n_random < 3 or not random_sd > 0:
        return np.nan
    of_donors = (values.mean(), values.std(ddof=1), len(values))
    of_genes = (0, random_sd * np.sqrt(n_random + 1), n_random)
    return float(stats.ttest_ind_from_stats(*of_donors, *of_genes, equal_var=False).pvalue)


def bootstrapped(values: np.ndarray, rng: np.random.Generator) -> Interval:
    """Mean with its bootstrap interval. Without a p-value: cells, for instance, are not replicates."""
    values = values[~np.isnan(values)].astype(np.float64)
    n = len(values)
    mean = float(values.mean()) if n else np.nan
    if n < 2:
        return Interval(mean, np.nan, np.nan, n)
    _, low, high = resampled(values[None], rng)
    return Interval(mean, float(low[0]), float(high[0]), n)


def between_groups(
    mean: Mapping[str, np.ndarray],
    sd: Mapping[str, np.ndarray],
    n: Mapping[str, np.ndarray],
    *,
    group: str,
    reference: str,
    donors: Mapping[str, np.ndarray] | None,
) -> dict[str, np.ndarray]:
    """Compare values of genes between two groups, over donors if there are any, else over cells.

    Parameters
    ----------
    mean, sd, n
        For each group, over the cells of each unit that have a gene: mean and standard deviation,
        `(n_genes, n_units, n_values)`, and number, `(n_genes, n_units)`. Units are donors, or one for the whole group.
        If there is also `"change"`, it holds the differences within each cell.
    donors
        The donor of each unit, for each group.

    Returns
    -------
    `ratio` and `reference`, the means of the groups, `difference`, `low` and `high`, its interval, and with donors `p`
    and `n_donors`, `(n_genes, n_values)`. If most donors are in both groups, these are compared with themselves.
    """
    if donors is None:
        of_cells = {of: _Sample(mean[of][:, 0], sd[of][:, 0], n[of][:, 0, None]) for of in n}
        found = _compare(of_cells[group], of_cells[reference], of_cells.get("change"))
        return {name: values for name, values in found.items() if name != "p"}  # cells are not replicates
    both, at, there = np.intersect1d(donors[group], donors[reference], return_indices=True)
    values = {of: np.where(n[of][..., None] > 0, mean[of], np.nan) for of in n}
    n_all = len(np.union1d(donors[group], donors[reference]))
    if "change" in n or (len(both) > 1 and 2 * len(both) > n_all):
        first, second = values[group][:, at], values[reference][:, there]
        change = values["change"] if "change" in n else first - second
        has_both = np.isfinite(change)
        one, other = (_Sample.of(np.where(has_both, side, np.nan)) for side in (first, second))
        found = _compare(one, other, _Sample.of(change))
        return found | {"n_donors": has_both.sum(axis=1)}
    one, other = (_Sample.of(values[of]) for of in (group, reference))
    in_both = (np.isfinite(values[group][:, at]) & np.isfinite(values[reference][:, there])).sum(axis=1)
    return _compare(one, other, None) | {"n_donors": (one.n + other.n).astype(int) - in_both}  # each counts once


class _Sample(NamedTuple):
    """Mean, standard deviation (of the sample itself) and number of observations."""

    mean: np.ndarray
    sd: np.ndarray
    n: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> _Sample:
        """Describe values along the second axis, NaN left out."""
        known = np.isfinite(values)
        n, mean, sd = moments(np.stack([np.where(known, power, 0).sum(1) for power in (values, values**2, known)]))
        return cls(mean, sd, n)

    @property
    def square_error(self) -> np.ndarray:
        """Square of the standard error of the mean; NaN for fewer than two observations."""
        return divided(self.sd**2, self.n - 1)


def _compare(one: _Sample, other: _Sample, change: _Sample | None) -> dict[str, np.ndarray]:
    """Compare two samples by Welch's t-test, or by that of their paired differences."""
    if change is None:
        difference = one.mean - other.mean
        first, second = one.square_error, other.square_error
        with np.errstate(invalid="ignore", divide="ignore"):
            df = (first + second) ** 2 / (first**2 / (one.n - 1) + second**2 / (other.n - 1))
        error = np.sqrt(first + second)
    else:
        difference, error, df = change.mean, np.sqrt(change.square_error), change.n - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2 * stats.t.sf(np.abs(difference) / error, df)
    half = stats.t.ppf((1 + COVERAGE) / 2, np.where(df > 0, df, np.nan)) * error
    means = {"ratio": one.mean, "reference": other.mean, "difference": difference}
    return means | {"low": difference - half, "high": difference + half, "p": p}


# --- rankings ------------------------------------------------------------------------------------------------------


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation over the pairs that are finite; NaN for fewer than three, or where one side is constant."""
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both].astype(np.float64), y[both].astype(np.float64)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(stats.spearmanr(x, y).statistic)


def partial_spearman(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """Rank correlation of x and y after regressing the ranks of `given`, `(n, n_given)`, out of their ranks.

    NaN where no more observations are left than there are variables to take out.
    """
    values = np.column_stack([x, y, given.reshape(len(x), -1)]).astype(np.float64)
    values = values[np.isfinite(values).all(axis=1)]
    if len(values) < values.shape[1] + 2:
        return np.nan
    ranks = stats.rankdata(values, axis=0)
    others = np.column_stack([np.ones(len(ranks)), ranks[:, 2:]])
    residuals = ranks[:, :2] - others @ np.linalg.lstsq(others, ranks[:, :2], rcond=None)[0]
    if residuals.std(axis=0).min() < 1e-9 * len(ranks):
        return np.nan
    return float(np.corrcoef(*residuals.T)[0, 1])


def correlate_with_baselines(effect: np.ndarray, baselines: Mapping[str, np.ndarray]) -> list[dict[str, float | str]]:
    """Correlate a ranking with each baseline, alone and given the other baselines, over `n` and `partial_n` genes."""
    known = {name: values for name, values in baselines.items() if np.isfinite(values).any()}
    partial_n = int(np.isfinite(np.column_stack([effect, *known.values()])).all(axis=1).sum())
    rows: list[dict[str, float | str]] = []
    for name, values in known.items():
        n = int((np.isfinite(effect) & np.isfinite(values)).sum())
        others = [other for key, other in known.items() if key != name]
        given = np.column_stack(others) if others else np.zeros((len(effect), 0))
        row: dict[str, float | str] = {"baseline": name, "spearman": np.nan, "partial_spearman": np.nan}
        if n >= FEWEST_RANKED:
            row["spearman"] = spearman(effect, values)
        if partial_n >= FEWEST_RANKED:
            row["partial_spearman"] = partial_spearman(effect, values, given)
        rows.append(row | {"n": n, "partial_n": partial_n})
    return rows


def rank_trend(rank: np.ndarray, shift: np.ndarray) -> dict[str, float]:
    """Fit how the effect of a random gene depends on its rank from 0 to 1.

    A line through the natural logarithms of shifts: `spearman`; `intercept` and `slope`; `sd` of the residuals; `n`.
    """
    usable = np.isfinite(rank) & (shift > 0)
    rank, logs = rank[usable].astype(np.float64), np.log(shift[usable].astype(np.float64))
    if len(rank) < 3 or np.ptp(rank) == 0:
        return dict.fromkeys(("spearman", "intercept", "slope", "sd"), np.nan) | {"n": len(rank)}
    line = stats.linregress(rank, logs)
    residuals = logs - line.intercept - line.slope * rank
    fit = {"intercept": float(line.intercept), "slope": float(line.slope), "sd": float(residuals.std(ddof=2))}
    return {"spearman": spearman(rank, logs)} | fit | {"n": len(rank)}


def rank_sum(values: np.ndarray, in_set: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compare the genes of a set with all others, column by column of `(n_genes, n)`.

    Returns the probability that one of the set has the larger value, ties counted half, and p of the rank-sum test,
    `(n,)`; NaN for fewer than two on either side.
    """
    n, n_others = int(in_set.sum()), int((~in_set).sum())
    if min(n, n_others) < 2:
        unknown = np.full((2, values.shape[1]), np.nan)
        return unknown[0], unknown[1]
    values = values.astype(np.float64)
    area, p = np.empty((2, values.shape[1]))
    tied = (np.diff(np.sort(values, axis=0), axis=0) == 0).any(axis=0)
    for columns in filter(np.any, (tied, ~tied)):  # scipy tests none exactly if there are ties in one of them
        test = stats.mannwhitneyu(values[in_set][:, columns], values[~in_set][:, columns], axis=0)
        area[columns], p[columns] = test.statistic / (n * n_others), test.pvalue
    return area, p


def matched_shares(values: np.ndarray, in_set: np.ndarray, similar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compare each gene of a set with the genes outside it that are most similar, column by column of `(n_genes, n)`.

    `similar` are properties of genes, `(n_genes, n_properties)`, which are divided by their standard deviations before
    distances are taken. Values are ranked, and what a quadratic fit to the properties of the similar genes explains is
    taken out of these and of the gene itself: those most similar to a gene at an end of the scale lie on one side of
    it. Returns the mean fraction of the similar genes that are left with a smaller value, ties counted half, and p of a
    t-test that this is one half, `(n,)`; NaN for fewer than two on either side. Fractions deviate at least as uniform
    ones do, so that two or three genes which agree by chance are no proof.
    """
    from scipy.spatial import KDTree

    n, n_others = int(in_set.sum()), int((~in_set).sum())
    if min(n, n_others) < 2:
        unknown = np.full((2, values.shape[1]), np.nan)
        return unknown[0], unknown[1]
    deviation = similar.std(axis=0)
    scaled = similar / np.where(deviation > 0, deviation, 1)
    _, nearest = KDTree(scaled[~in_set]).query(scaled[in_set], k=np.arange(1, min(N_SIMILAR, n_others) + 1))
    ranks = stats.rankdata(values.astype(np.float64), axis=0)
    others, own = ranks[~in_set][nearest], ranks[in_set]  # (n, n_similar, n_values) and (n, n_values)
    around = scaled[~in_set][nearest] - scaled[in_set][:, None]
    design = np.concatenate([np.ones((*around.shape[:2], 1)), around, around**2], axis=2)
    fitted = np.linalg.pinv(design) @ others  # the first row is what is expected of the gene itself
    left, own = others - design @ fitted, (own - fitted[:, 0])[:, None]
    share = (left < own - _TIE).mean(axis=1) + (np.abs(left - own) <= _TIE).mean(axis=1) / 2
    error = np.maximum(share.std(axis=0, ddof=1), 12**-0.5) / np.sqrt(n)
    return share.mean(axis=0), 2 * stats.t.sf(np.abs(share.mean(axis=0) - 0.5) / error, n - 1)


def retrieval(values: np.ndarray, is_edge: np.ndarray, is_candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measure for each source how well rankings of its targets, `(n, n_sources, n_targets)`, find its edges.

    Returns the area under the ROC curve, and the fraction of edges among as many of the first candidates as there are
    edges, divided by their fraction among all candidates, `(n, n)` for those sources that have both edges and other
    candidates. Where candidates tie, both are means over all their orders.
    """
    areas, precisions = [], []
    for source, (edges, candidates) in enumerate(zip(is_edge, is_candidate, strict=True)):
        hits = edges[candidates]
        n, n_others = int(hits.sum()), int((~hits).sum())
        if not n or not n_others:
            continue
        scores = values[:, source, candidates].astype(np.float64)
        ranks = stats.rankdata(scores, axis=1)
        areas.append((ranks[:, hits].sum(axis=1) - n * (n + 1) / 2) / (n * n_others))
        last = np.sort(scores, axis=1)[:, -n, None]
        above, tied = scores > last, scores == last
        left = (n - above.sum(axis=1)) / tied.sum(axis=1)
        found = (above & hits).sum(axis=1) + left * (tied & hits).sum(axis=1)
        precisions.append(found / n / (n / len(hits)))
    area, precision = (np.array(found).T.reshape(len(values), -1) for found in (areas, precisions))
    return area, precision


def resampled(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of rows of replicates, `(n, n_replicates)`, with their bootstrap intervals, `(n,)` each."""
    how = {"n_resamples": N_DRAWS, "confidence_level": COVERAGE, "method": "percentile", "axis": 1, "random_state": rng}
    interval = stats.bootstrap((values,), np.mean, batch=max(1, 10_000_000 // values.size), **how).confidence_interval
    return values.mean(axis=1), interval.low, interval.high


# --- states --------------------------------------------------------------------------------------------------------


def axis_auc(
    vectors: np.ndarray, is_goal: np.ndarray, donor: np.ndarray | None, rng: np.random.Generator
) -> tuple[float, int]:
    """Test whether held-out cells of two states are separable along the line between the means of the states.

    `vectors` `(n_cells, d)` are of the cells of both states, `is_goal` `(n_cells,)` says which are of the goal. With
    the `donor` of each cell, whole donors are held out; `None` holds out random cells, which is weaker evidence.
    Returns the mean area under the ROC curve over the folds that hold out cells of both states (0.5 is chance), and the
    number of these folds; NaN and 0 if there is none.
    """
    from gfx._core.folds import each_fold, folds  # loads scikit-learn, which tables do without

    unit = np.arange(len(is_goal)) if donor is None else np.unique(donor, return_inverse=True)[1]
    n_units = min(len(np.unique(unit[state])) for state in (is_goal, ~is_goal))
    if n_units < 2:
        return np.nan, 0
    seed = int(rng.integers(2**31))
    fold = folds(is_goal.astype(np.int64), min(N_FOLDS, n_units), seed, None if donor is None else unit)
    areas = []
    for _, training, held_out in each_fold(fold):
        if all((part & state).any() for part in (held_out, training) for state in (is_goal, ~is_goal)):
            axis = vectors[training & is_goal].mean(axis=0) - vectors[training & ~is_goal].mean(axis=0)
            areas.append(auc(vectors[held_out & is_goal] @ axis, vectors[held_out & ~is_goal] @ axis))
    return (float(np.mean(areas)), len(areas)) if areas else (np.nan, 0)


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counted half."""
    # In float64: ranks keep the precision of what is ranked, and sums of ranks in float32 are off.
    positive, negative = positive.astype(np.float64), negative.astype(np.float64)
    return float(stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))


# --- vectors -------------------------------------------------------------------------------------------------------


def principal_components(
    training: np.ndarray, held_out: np.ndarray, n: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fit at most `n` components to the training set, and project both sets onto them, `(n_cells, n)` each."""
    from sklearn.decomposition import PCA  # tables do without

    pca = PCA(min(n, *training.shape), random_state=seed).fit(training)
    return pca.transform(training), pca.transform(held_out)


def synergy(
    before: np.ndarray, together: np.ndarray, singles: np.ndarray, shift: np.ndarray, single_shifts: np.ndarray
) -> dict[str, np.ndarray]:
    """Compare a gene set with its genes in the same cells.

    A cosine is not linear: 1 - cosine grows with the square of a small displacement, so two genes with the same
    displacement have four times the shift of one, not twice. The sum of displacements takes that into account: it
    expects that two genes displace a cell in the same direction.

    Cells are given `before` and with all genes perturbed (`together`), `(n_cells, d)`, and with one at a time
    (`singles`), `(n_genes, n_cells, d)`, and their shifts, `(n_cells,)` and `(n_genes, n_cells)`. Returned are, for
    each cell: `together`, its shift, and `summed`, the sum of its `single_shifts`, the measure of the 2023 paper;
    `displaced`, 1 - cosine of its vector before and after, which is `together` unless shifts are means over genes, and
    `composed`, the same if the displacements of the vector, one gene at a time, simply added up.
    """
    sum_of_displacements = before + (singles - before).sum(axis=0)
    return {
        "together": shift,
        "summed": single_shifts.sum(axis=0),
        "displaced": _cosine_shift(before, together),
        "composed": _cosine_shift(before, sum_of_displacements),
    }


def _cosine_shift(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    before, after = before.astype(np.float64), after.astype(np.float64)
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    return 1 - (before * after).sum(axis=1) / lengths
