"""Statistics against scipy or a few lines of numpy, and what they must say of data where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gfx._core.folds import folds
from gfx._core.statistics import (
    against_random,
    auc,
    axis_auc,
    bootstrapped,
    by_chance,
    correlate_with_baselines,
    donors_against_random,
    false_discovery_rate,
    matched_shares,
    over_donors,
    partial_spearman,
    rank_sum,
    rank_trend,
    resampled,
    retrieval,
    spearman,
    tail,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- against random sets -------------------------------------------------------------------------------------------


def naive_z(values, of=0.0):
    return (of - values.mean()) / np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1))


@pytest.mark.parametrize("n", [3, 5, 40])
@pytest.mark.parametrize("mean", [-3, -0.2, 0, 0.2, 3])
def test_z_among_random_sets(rng, n, mean):
    """Of the effect among all random sets, and of each of them among the others."""
    differences = rng.normal(mean, 1, n)
    z, each = against_random(differences)
    assert z == pytest.approx(naive_z(differences))
    np.testing.assert_allclose(each, [naive_z(np.delete(differences, at), differences[at]) for at in range(n)])
    with_gaps = np.insert(differences, [0, n // 2], np.nan)
    assert against_random(with_gaps)[0] == z
    np.testing.assert_array_equal(against_random(with_gaps)[1], each)
    other, of_others = against_random(-differences)
    assert other == pytest.approx(-z)
    np.testing.assert_allclose(of_others, -each)


def test_small_differences_far_from_nothing(rng):
    """Squares about the mean lose nothing to rounding; float32 is taken in float64."""
    differences = (1 + 1e-6 * rng.normal(size=50)).astype(np.float32)
    z, each = against_random(differences)
    exact = differences.astype(np.float64)
    assert z == pytest.approx(naive_z(exact), rel=1e-6)
    np.testing.assert_allclose(each, [naive_z(np.delete(exact, at), exact[at]) for at in range(50)], rtol=1e-6)


def test_random_sets_that_do_not_differ():
    for value in (0, 0.1):
        z, each = against_random(np.full(50, value))
        assert np.isnan(z)
        assert each.shape == (0,)
    z, each = against_random(np.array([1.0, 1.0, 1.0, 5.0]))  # the others of the last one do not differ
    assert z == pytest.approx(-1)
    np.testing.assert_allclose(each, [naive_z(np.array([1.0, 1.0, 5.0]), 1.0)] * 3)


@pytest.mark.parametrize("differences", [[], [0.3], [0.3, 0.4], [np.nan, np.nan, 1.0, 2.0]])
def test_too_few_random_sets(differences):
    z, each = against_random(np.array(differences, dtype=float))
    assert np.isnan(z)
    assert each.shape == (0,)


def test_z_is_a_t_deviate_where_the_perturbed_set_is_a_random_one(rng):
    """Divided by what the uncertain mean adds; so is the z of each random set among the others."""
    effects = rng.normal(5, 2, size=(2000, 21))
    found = [against_random(others - effect) for effect, *others in effects]
    for z, n in ((np.array([z for z, _ in found]), 20), (np.array([each[0] for _, each in found]), 19)):
        assert stats.kstest(z / np.sqrt(1 + 1 / n), stats.t(n - 1).cdf).pvalue > 0.01


def naive_p(z, pool):
    """Two-sided, itself counted on both sides."""
    at_least, at_most = 1 + sum(value >= z for value in pool), 1 + sum(value <= z for value in pool)
    return min(1, 2 * min(at_least, at_most) / (len(pool) + 1))


def test_p_is_the_fraction_of_random_sets_with_z_as_extreme(rng):
    pool = np.round(rng.normal(size=60), 1)  # with ties
    z = np.array([-9, -1.2, 0, 0.05, pool[0], pool.max(), 9, np.nan])
    p = by_chance(z, pool)
    np.testing.assert_allclose(p[:-1], [naive_p(value, pool) for value in z[:-1]])
    assert np.isnan(p[-1])
    assert p[0] == p[6] == pytest.approx(2 / 61)
    np.testing.assert_array_equal(by_chance(z, rng.permutation(pool)), p)


def test_no_p_is_below_what_the_number_of_random_sets_allows():
    assert by_chance(np.array([50.0, -50.0]), np.linspace(-2, 2, 399)).tolist() == [2 / 400] * 2
    assert by_chance(np.array([0.0]), np.zeros(5)).tolist() == [1]


def test_no_p_without_random_sets():
    assert np.isnan(by_chance(np.array([1.0, np.nan]), np.zeros(0))).all()
    assert np.isnan(by_chance(np.array([np.nan]), np.ones(5))).all()
    assert by_chance(np.zeros(0), np.ones(5)).shape == (0,)


def pooled(effects):
    """P of the first of each row among the others, by the z of the random sets of all rows."""
    found = [against_random(others - effect) for effect, *others in effects]
    return by_chance(np.array([z for z, _ in found]), np.concatenate([each for _, each in found]))


@pytest.mark.parametrize("n", [3, 10, 40, 100])
@pytest.mark.parametrize("law", ["normal", "exponential"])
def test_p_is_calibrated_where_the_perturbed_sets_are_random_ones(law, n):
    """P <= a in a share a of the cases, whatever the scale of the effects of each perturbation.

    Each random set is placed among one fewer than the perturbed one is: among very few, p is too large.
    """
    rng = np.random.default_rng(n)
    effects = getattr(rng, law)(size=(3000, n + 1)) * rng.lognormal(size=(3000, 1)) + rng.normal(size=(3000, 1))
    p = pooled(effects)
    for level in (0.01, 0.05, 0.2, 0.5):
        share, error = np.mean(p <= level), np.sqrt(level / 3000)
        assert share < level + 4 * error
        assert share > level - 4 * error or n == 3
    assert p.min() >= 2 / (3000 * n + 1)


def test_few_random_sets_for_each_of_many_perturbations_resolve_small_p_values(rng):
    """Alone, ten sets allow no p below 2 / 11."""
    effects = rng.normal(size=(200, 11))
    effects[:5, 0] += 12
    p = pooled(effects)
    assert p[:5].max() < 0.01
    assert np.median(p[5:]) == pytest.approx(0.5, abs=0.15)
    assert (false_discovery_rate(p)[:5] < 0.05).all()


def test_noise_of_few_cells_makes_z_smaller(rng):
    """Random sets are seen in few cells each: their spread holds noise that the perturbed one has not."""
    noisy = [against_random(rng.normal(-3, 1, 100) + rng.normal(0, 2, 100))[0] for _ in range(50)]
    exact = [against_random(rng.normal(-3, 1, 100))[0] for _ in range(50)]
    assert 0 < max(noisy) < min(exact)


def test_false_discovery_rate(rng):
    p = rng.random(30) ** 3
    order = np.argsort(p)
    expected = np.empty(30)
    smallest = 1.0
    for rank in range(30, 0, -1):
        smallest = min(smallest, p[order[rank - 1]] * 30 / rank)
        expected[order[rank - 1]] = smallest
    np.testing.assert_allclose(false_discovery_rate(p), expected)
    with_gaps = np.insert(p, [0, 10, 30], np.nan)
    found = false_discovery_rate(with_gaps)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(with_gaps))
    np.testing.assert_allclose(found[~np.isnan(found)], expected)  # what is missing is no test


def test_false_discovery_rate_of_nothing():
    assert false_discovery_rate(np.zeros(0)).shape == (0,)
    assert np.isnan(false_discovery_rate(np.full(3, np.nan))).all()


# --- over replicates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 12])
def test_over_donors(rng, n):
    values = rng.normal(0.4, 1, n)
    found = over_donors(np.insert(values, 1, np.nan))
    error = values.std(ddof=1) / np.sqrt(n)
    assert (found.mean, found.n) == (pytest.approx(values.mean()), n)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, n - 1, values.mean(), error))


def test_intervals_over_donors_hold_the_truth_as_often_as_they_say():
    found = [over_donors(values) for values in np.random.default_rng(0).normal(0.7, 2, (1500, 5))]
    assert np.mean([one.low <= 0.7 <= one.high for one in found]) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("over", [over_donors, lambda values: bootstrapped(values, np.random.default_rng(0))])
@pytest.mark.parametrize(("values", "mean"), [([], np.nan), ([np.nan], np.nan), ([np.nan, 0.5], 0.5)])
def test_too_few_replicates(over, values, mean):
    found = over(np.array(values, dtype=float))
    assert found.mean == pytest.approx(mean, nan_ok=True)
    assert found.n == (0 if np.isnan(mean) else 1)
    assert np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3])
def test_donors_that_do_not_differ(value):
    found = over_donors(np.full(3, value))
    assert found.mean == pytest.approx(value)
    assert found.n == 3
    assert np.isnan([found.low, found.high]).all()


def test_donors_compared_with_random_genes(rng):
    values = rng.normal(1.5, 0.5, 6)
    p = donors_against_random(np.insert(values, 2, np.nan), 0.8, 20)
    of_donors, of_genes = values.var(ddof=1) / 6, 0.8**2 + 0.8**2 / 20  # of one more gene, and of the mean of 20
    freedom = (of_donors + of_genes) ** 2 / (of_donors**2 / 5 + of_genes**2 / 19)
    assert p == pytest.approx(2 * stats.t.sf(values.mean() / np.sqrt(of_donors + of_genes), freedom))
    assert donors_against_random(-values, 0.8, 20) == pytest.approx(p)
    # Random genes that hardly differ leave the test of the donors, donors that hardly differ that of genes.
    assert donors_against_random(values, 1e-9, 20) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    genes = rng.normal(0, 0.8, 20)
    one = stats.ttest_ind(genes, [genes.mean() + 1.5]).pvalue
    assert donors_against_random(1.5 + 1e-9 * values, genes.std(ddof=1), 20) == pytest.approx(one)


@pytest.mark.parametrize(
    ("values", "random_sd", "n_random"),
    [([], 1, 9), ([0.3], 1, 9), ([0.3, np.nan], 1, 9), ([1, 2], np.nan, 9), ([1, 2], 0, 9), ([1, 2], 1, 2)],
)
def test_donors_that_cannot_be_tested(values, random_sd, n_random):
    assert np.isnan(donors_against_random(np.array(values, dtype=float), random_sd, n_random))


def donor_tests(rng, *, n_genes, n_random, n_donors, noise, effect=0.0):
    """P over donors compared with random genes, and p of the donors alone; all genes are of one distribution."""
    found = []
    for _ in range(n_genes):
        gene, *random = rng.normal(size=1 + n_random)
        # In each donor, gene and random genes have noise of their own.
        own = effect + gene + rng.normal(0, noise, n_donors)
        of_random = np.array(random) + rng.normal(0, noise, (n_donors, n_random))
        excess = own - of_random.mean(axis=1)
        spread = of_random.mean(axis=0).std(ddof=1)
        found.append((donors_against_random(excess, spread, n_random), stats.ttest_1samp(excess, 0).pvalue))
    return np.array(found).T


@pytest.mark.parametrize(
    ("noise", "n_random", "n_donors"),
    [(0.02, 5, 8), (0.02, 100, 3), (0.1, 20, 3), (0.1, 100, 8), (1, 5, 3), (1, 20, 8)],
)
def test_random_genes_are_not_special_in_any_number_of_donors(n_donors, n_random, noise):
    """A gene is never like the mean gene: the donors alone call nearly every one of them special."""
    rng = np.random.default_rng(n_donors)
    compared, alone = donor_tests(rng, n_genes=1000, n_random=n_random, n_donors=n_donors, noise=noise)
    assert np.mean(compared < 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)
    if noise <= 0.1:
        assert np.mean(alone < 0.05) > (0.9 if noise < 0.1 else 0.6)
        assert np.mean(compared < 0.05) > 0.025
        assert np.mean(compared < 0.5) == pytest.approx(0.5, abs=0.06)


def test_genes_that_differ_from_random_ones_are_detected(rng):
    compared, _ = donor_tests(rng, n_genes=200, n_random=100, n_donors=5, noise=0.3, effect=6)
    assert np.mean(compared < 0.05) > 0.95


def test_over_cells(rng):
    values = rng.exponential(size=400)
    found = bootstrapped(np.insert(values, 3, np.nan), np.random.default_rng(1))
    error = values.std() / 20
    assert (found.mean, found.n) == (pytest.approx(values.mean()), 400)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_the_same_random_numbers_give_the_same_interval(rng):
    values = rng.normal(size=50)
    one, same, other = (bootstrapped(values, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (one.low, one.high) == (same.low, same.high)
    assert (one.low, one.high) != (other.low, other.high)


# --- rankings ------------------------------------------------------------------------------------------------------


def test_spearman(rng):
    x = rng.integers(0, 8, 40).astype(float)  # with ties
    y = x + rng.normal(0, 3, 40)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert spearman(np.exp(x), -y) == pytest.approx(-spearman(x, y))
    gaps_x, gaps_y = x.copy(), y.copy()
    gaps_x[3], gaps_y[[5, 9]] = np.nan, [np.nan, np.inf]
    whole = np.delete(np.arange(40), [3, 5, 9])
    assert spearman(gaps_x, gaps_y) == pytest.approx(stats.spearmanr(x[whole], y[whole]).statistic)


@pytest.mark.parametrize(
    ("x", "y"),
    [([1, 2], [2, 1]), ([1, 2, 3, 4], [5, 5, 5, 5]), ([0.1] * 4, [1, 2, 3, 4]), ([1, 2, np.nan], [1, 2, 3]), ([], [])],
)
def test_no_rank_correlation(x, y):
    assert np.isnan(spearman(np.array(x, dtype=float), np.array(y, dtype=float)))


def naive_partial(x, y, given):
    """Recursion over variables, from the matrix of rank correlations."""
    if not given:
        return stats.spearmanr(x, y).statistic
    *others, last = given
    xy, xz, yz = (naive_partial(*pair, others) for pair in ((x, y), (x, last), (y, last)))
    return (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))


@pytest.mark.parametrize("n_given", [0, 1, 2, 3])
def test_partial_spearman(rng, n_given):
    given = rng.normal(size=(60, n_given))
    x = given.sum(axis=1) + rng.normal(size=60)
    y = np.round(given.sum(axis=1) + 0.5 * x + rng.normal(size=60), 1)
    expected = naive_partial(x, y, list(given.T))
    assert partial_spearman(x, y, given) == pytest.approx(expected)
    gaps = given.copy()
    x_gaps, y_gaps = x.copy(), y.copy()
    x_gaps[0], y_gaps[1] = np.nan, np.inf
    if n_given:
        gaps[2, -1] = np.nan
    left = slice(3 if n_given else 2, None)
    expected = naive_partial(x[left], y[left], list(given[left].T))
    assert partial_spearman(x_gaps, y_gaps, gaps) == pytest.approx(expected)


def test_what_a_third_variable_explains_is_no_partial_correlation(rng):
    cause = rng.normal(size=2000)
    x, y = cause + 0.5 * rng.normal(size=(2, 2000))
    assert spearman(x, y) > 0.7
    assert abs(partial_spearman(x, y, cause)) < 0.1


def test_no_partial_correlation(rng):
    x, y, given = rng.normal(size=20), rng.normal(size=20), rng.normal(size=(20, 2))
    assert np.isnan(partial_spearman(x[:5], y[:5], given[:5]))  # one degree of freedom is none to speak of
    assert not np.isnan(partial_spearman(x[:6], y[:6], given[:6]))
    assert np.isnan(partial_spearman(given[:, 0] * 3, y, given))  # nothing is left of x
    assert np.isnan(partial_spearman(x, np.exp(given[:, 1]), given))
    assert np.isnan(partial_spearman(x, y, np.full((20, 1), np.nan)))


def test_rankings_compared_with_baselines(rng):
    effect, detection, rank = rng.normal(size=(3, 40))
    effect += detection
    rank[:4] = np.nan
    rows = correlate_with_baselines(effect, {"detection": detection, "rank": rank, "logfc": np.full(40, np.nan)})
    assert [row["baseline"] for row in rows] == ["detection", "rank"]  # what is not known is not among them
    first, second = rows
    assert first["spearman"] == pytest.approx(stats.spearmanr(effect, detection).statistic)
    assert first["partial_spearman"] == pytest.approx(naive_partial(effect[4:], detection[4:], [rank[4:]]))
    assert second["spearman"] == pytest.approx(stats.spearmanr(effect[4:], rank[4:]).statistic)
    assert second["partial_spearman"] == pytest.approx(naive_partial(effect[4:], rank[4:], [detection[4:]]))
    assert (first["n"], second["n"]) == (40, 36)
    assert (first["partial_n"], second["partial_n"]) == (36, 36)  # those that all baselines know


@pytest.mark.parametrize("n", [9, 10])
def test_few_observations_are_no_ranking(rng, n):
    effect, detection, rank = rng.normal(size=(3, 30))
    effect[n:] = np.nan
    rows = correlate_with_baselines(effect, {"detection": detection, "rank": rank})
    assert [row["n"] for row in rows] == [n, n]
    for row, values, other in zip(rows, (detection, rank), (rank, detection), strict=True):
        found = [row["spearman"], row["partial_spearman"]]
        if n < 10:
            assert np.isnan(found).all()
        else:
            expected = [naive_partial(effect[:n], values[:n], given) for given in ([], [other[:n]])]
            assert found == pytest.approx(expected)


def test_one_baseline_alone(rng):
    effect, detection = rng.normal(size=(2, 40))
    (row,) = correlate_with_baselines(effect, {"detection": detection})
    assert row["partial_spearman"] == pytest.approx(row["spearman"])
    assert correlate_with_baselines(effect, {}) == []


def test_rank_trend_finds_a_planted_line(rng):
    rank = rng.random(4000)
    shift = np.exp(-3 - 2 * rank + rng.normal(0, 0.5, 4000))
    found = rank_trend(rank, shift)
    assert found["intercept"] == pytest.approx(-3, abs=0.05)
    assert found["slope"] == pytest.approx(-2, abs=0.1)
    assert found["sd"] == pytest.approx(0.5, abs=0.02)
    assert found["spearman"] == pytest.approx(stats.spearmanr(rank, shift).statistic)
    assert found["n"] == 4000


def test_rank_trend_without_noise_is_exact():
    rank = np.linspace(0, 1, 7)
    found = rank_trend(np.append(rank, [0.5, np.nan, 0.2, 0.3]), np.append(np.exp(1 - rank), [0, 1, -1, np.nan]))
    expected = {"spearman": -1, "intercept": 1, "slope": -1, "sd": 0, "n": 7}  # no logarithm of 0, of -1, of nothing
    assert found == pytest.approx(expected, abs=1e-12)


def test_rank_trend_of_few_genes(rng):
    rank, shift = rng.random(5), rng.exponential(size=5)
    slope, intercept = np.polyfit(rank, np.log(shift), 1)
    left = np.log(shift) - intercept - slope * rank
    found = rank_trend(rank, shift)
    assert (found["slope"], found["intercept"]) == (pytest.approx(slope), pytest.approx(intercept))
    assert found["sd"] == pytest.approx(np.sqrt((left**2).sum() / 3))  # two of five went into the line


@pytest.mark.parametrize(
    ("rank", "shift"), [([], []), ([0, 1], [1, 2]), ([0.3] * 7, range(1, 8)), ([0, 1, 2], [0] * 3)]
)
def test_no_rank_trend(rank, shift):
    found = rank_trend(np.array(rank, dtype=float), np.array(shift, dtype=float))
    assert np.isnan([found[name] for name in ("spearman", "intercept", "slope", "sd")]).all()
    assert found["n"] == sum(value > 0 for value in shift)


# --- states --------------------------------------------------------------------------------------------------------


def test_auc(rng):
    positive, negative = rng.integers(0, 6, 15), rng.integers(0, 4, 12)
    pairs = [(a > b) + 0.5 * (a == b) for a in positive for b in negative]
    assert auc(positive, negative) == pytest.approx(np.mean(pairs))
    assert auc(np.array([3, 4]), np.array([1, 2])) == 1


def states(rng, *, n_donors=10, n_cells=12, width=20, state=0.0, donor=0.0, mixed=False):
    """Cells of donors: a state effect along one axis, and a donor effect in a random direction."""
    of = np.repeat(np.arange(n_donors), n_cells)
    is_goal = np.arange(len(of)) % 2 == 0 if mixed else of % 2 == 0
    vectors = rng.normal(size=(len(of), width)) + donor * rng.normal(size=(n_donors, width))[of]
    vectors[:, 0] += state * is_goal
    return vectors, is_goal, of.astype(str).astype(object)


def mean_auc(n, *, by_donor, **kwargs):
    areas = []
    for seed in range(n):
        rng = np.random.default_rng(seed)
        vectors, is_goal, donor = states(rng, **kwargs)
        areas.append(axis_auc(vectors, is_goal, donor if by_donor else None, rng)[0])
    return np.mean(areas)


@pytest.mark.parametrize("by_donor", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_states_that_do_not_differ_are_not_separable(by_donor, mixed):
    assert mean_auc(60, by_donor=by_donor, mixed=mixed) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("by_donor", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_states_that_differ_are_separable(by_donor, mixed):
    assert mean_auc(10, by_donor=by_donor, mixed=mixed, state=5) > 0.98


def test_the_area_is_that_of_a_normal_shift():
    """Far more cells than dimensions: the axis is known, and the area is what the distance gives."""
    found = mean_auc(5, by_donor=False, n_cells=300, width=2, state=1.0)
    assert found == pytest.approx(stats.norm.cdf(1 / np.sqrt(2)), abs=0.02)


def test_donors_are_not_taken_for_states():
    """Each donor is in one state and looks like nobody else: random cells of it give it away, whole donors do not."""
    effect = {"donor": 3.0, "n_donors": 10}
    assert mean_auc(10, by_donor=False, **effect) > 0.9
    assert mean_auc(60, by_donor=True, **effect) == pytest.approx(0.5, abs=0.08)


def held_out_parts(is_goal, donor, n_folds, seed):
    """Folds of the package, with the seed that the axis draws."""
    seed = int(np.random.default_rng(seed).integers(2**31))
    unit = None if donor is None else np.unique(donor, return_inverse=True)[1]
    fold = folds(is_goal.astype(int), n_folds, seed, unit)
    return [fold == at for at in range(n_folds)]


@pytest.mark.parametrize(("n_donors", "n_folds"), [(2, 0), (3, 0), (4, 2), (5, 2), (6, 3), (30, 5)])
def test_folds_of_few_donors(rng, n_donors, n_folds):
    """Every fold that counts holds out a donor of each state and keeps one; every donor is held out in one."""
    area, n = axis_auc(*states(rng, n_donors=n_donors, state=5), rng)
    assert n == n_folds
    assert np.isnan(area) if n_folds == 0 else area > 0.9


def test_a_state_without_cells(rng):
    vectors, is_goal, donor = states(rng)
    for of in (donor, None):
        assert axis_auc(vectors, np.zeros_like(is_goal), of, rng) == (pytest.approx(np.nan, nan_ok=True), 0)


@pytest.mark.parametrize("by_donor", [True, False])
def test_the_axis_is_fitted_without_held_out_cells(rng, by_donor):
    """A naive cross-validation with the same folds gives the same area."""
    vectors, is_goal, donor = states(rng, state=1, donor=1)
    donor = donor if by_donor else None
    found, n = axis_auc(vectors, is_goal, donor, np.random.default_rng(7))
    areas = []
    for held in held_out_parts(is_goal, donor, 5, 7):
        axis = vectors[~held & is_goal].mean(axis=0) - vectors[~held & ~is_goal].mean(axis=0)
        scores = vectors @ axis
        pairs = [(a > b) for a in scores[held & is_goal] for b in scores[held & ~is_goal]]
        areas.append(np.mean(pairs))
    assert found == pytest.approx(np.mean(areas))
    assert n == len(areas) == 5


def test_the_area_of_scores_in_single_precision_is_exact(rng):
    """Sums of ranks in float32 are off by more than the area of a pair of cells."""
    scores = rng.normal(size=9000).astype(np.float32)
    positive, negative = scores[:5000], scores[5000:]
    below = np.searchsorted(np.sort(negative), positive).sum(dtype=np.int64)
    assert auc(positive, negative) == pytest.approx(below / (5000 * 4000), rel=1e-14)


def test_random_sets_without_z_are_no_sets() -> None:
    random_z = np.random.default_rng(0).standard_normal(100)
    with_missing = np.concatenate([random_z, np.full(50, np.nan)])
    np.testing.assert_array_equal(
        by_chance(np.array([5.0, 0.3]), with_missing), by_chance(np.array([5.0, 0.3]), random_z)
    )
    assert np.isnan(by_chance(np.array([5.0]), np.full(3, np.nan))).all()


@pytest.mark.parametrize("n", [3, 6, 50])
def test_p_is_uniform_whatever_the_number_of_random_sets(n):
    """Of a random gene compared with n sets, beside twenty genes that are compared with fifty."""
    rng = np.random.default_rng(0)
    p = []
    for _ in range(400):
        others = [against_random(rng.normal(size=50) - rng.normal()) for _ in range(20)]
        z, null = against_random(rng.normal(size=n) - rng.normal())
        pool = np.concatenate([tail(null, n - 1), *(tail(of_other, 49) for _, of_other in others)])
        p.append(by_chance(np.array([tail(z, n)]), pool)[0])
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(p) <= level) < level + 3 * np.sqrt(level * (1 - level) / len(p))


def test_ties_in_one_column_do_not_change_the_test_of_others(rng):
    """Small sets are tested exactly in columns without ties, whatever there is beside them."""
    values, in_set = rng.normal(size=(30, 6)), np.arange(30) < 4
    values[:, 2] = np.round(values[:, 2])
    area, p = rank_sum(values, in_set)
    for column, of_column in enumerate(values.T):
        found = stats.mannwhitneyu(of_column[in_set], of_column[~in_set])
        assert (area[column], p[column]) == pytest.approx((found.statistic / (4 * 26), found.pvalue))


def test_matched_genes_take_out_what_follows_from_rank():
    """Attention that depends on rank alone: random sets of high ranks look special, but not beside matched genes."""
    n, plain, matched = 1500, [], []
    rank = np.arange(n, dtype=float)
    weight = 1 / (rank + 50)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        similar = np.column_stack([np.log(rank + 1), rng.normal(size=n)])
        values = (-np.log(rank + 10) + 0.3 * rng.normal(size=n))[:, None]
        for _ in range(30):
            in_set = np.isin(rank, rng.choice(n, 40, replace=False, p=weight / weight.sum()))
            plain.append(rank_sum(values, in_set)[1][0])
            matched.append(matched_shares(values, in_set, similar)[1][0])
    assert np.mean(np.array(plain) < 0.05) > 0.9
    assert np.mean(np.array(matched) < 0.05) < 0.12
    assert 0.4 < np.mean(matched) < 0.6


def test_matched_genes_leave_what_does_not_follow_from_rank(rng):
    n = 1500
    similar = np.column_stack([np.log(np.arange(n) + 1), rng.normal(size=n)])
    values = (-np.log(np.arange(n) + 10) + 0.3 * rng.normal(size=n))[:, None]
    in_set = np.isin(np.arange(n), rng.choice(n, 40, replace=False))
    share, p = matched_shares(values + 0.3 * in_set[:, None], in_set, similar)
    assert share[0] > 0.65
    assert p[0] < 0.001


def test_retrieval_counts_ties_as_means_over_their_orders():
    values = np.array([[[3.0, 1.0, 1.0, 0.0]]])
    is_edge = np.array([[True, True, False, False]])
    areas, precision = retrieval(values, is_edge, np.ones((1, 4), dtype=bool))
    assert areas[0, 0] == pytest.approx((2 + 1.5) / 4)
    assert precision[0, 0] == pytest.approx((1 + 0.5) / 2 / 0.5)
    assert [found.shape for found in retrieval(values, ~is_edge & False, np.ones((1, 4), dtype=bool))] == [(1, 0)] * 2


def test_resampled_means_are_those_of_scipy(rng):
    values = rng.exponential(size=(3, 30))
    mean, low, high = resampled(values, np.random.default_rng(0))
    np.testing.assert_allclose(mean, values.mean(axis=1))
    for row, one in enumerate(values):
        expected = bootstrapped(one, np.random.default_rng(0))
        assert (low[row], high[row]) == pytest.approx((expected.low, expected.high), rel=0.05)
