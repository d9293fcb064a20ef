"""What a screen says of genes, against a few lines of numpy and pandas, and of data where the truth is known."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gfx._core.screening import (
    ALIKE,
    CHECKED,
    CHECKED_TOP,
    FEWEST_ALIKE,
    NEIGHBOURS,
    TOP,
    GeneSums,
    agreement,
    draw_checked,
    excess_over_neighbours,
    standing_out,
    wanted_places,
)
from gfx._core.vocabulary import SPECIALS, Vocabulary


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# --- which tokens -----------------------------------------------------------------------------------------------------


def make_vocabulary(n_genes: int, *, with_cls: bool) -> Vocabulary:
    specials = list(SPECIALS if with_cls else SPECIALS[:2])
    return Vocabulary(
        name="test",
        ids=np.array(specials + [f"ENSG{n:011d}" for n in range(n_genes)], dtype=object),
        medians=np.array([np.nan] * len(specials) + [1.0] * n_genes),
        symbols=np.full(len(specials) + n_genes, "", dtype=object),
    )


@st.composite
def cells_of_genes(draw) -> tuple[Vocabulary, list[list[int]], set[int]]:
    """A vocabulary, genes of each cell, and genes to delete."""
    vocabulary = make_vocabulary(12, with_cls=draw(st.booleans()))
    genes = np.flatnonzero(~vocabulary.is_special).tolist()
    cells = draw(st.lists(st.lists(st.sampled_from(genes), unique=True, max_size=8), min_size=1, max_size=5))
    return vocabulary, cells, draw(st.sets(st.sampled_from(genes)))


@given(cells_of_genes())
def test_wanted_places(given_cells: tuple[Vocabulary, list[list[int]], set[int]]) -> None:
    """Genes asked for, in cells that have another one; never a special token, nor what stands behind the end."""
    vocabulary, cells, genes = given_cells
    front, behind = ([vocabulary.cls], [vocabulary.eos]) if vocabulary.has_cls else ([], [])
    laid_out = [[*front, *cell, *behind] if cell else [] for cell in cells]
    ids = np.full((len(cells), 12), max(genes, default=vocabulary.pad), dtype=np.uint16)  # no padding to lean on
    for row, cell in zip(ids, laid_out, strict=True):
        row[: len(cell)] = cell
    lengths = np.array([len(cell) for cell in laid_out], dtype=np.int32)
    found = wanted_places(ids, lengths, np.isin(np.arange(len(vocabulary)), list(genes)), vocabulary)
    assert found.dtype == bool
    assert found.shape == ids.shape
    for row, cell, whole in zip(found, cells, laid_out, strict=True):
        expected = [at for at, token in enumerate(whole) if token in genes and len(cell) > 1]
        assert np.flatnonzero(row).tolist() == expected


def test_special_tokens_are_no_genes_even_if_asked_for() -> None:
    vocabulary = make_vocabulary(4, with_cls=True)
    ids = np.array([[vocabulary.cls, 4, 5, vocabulary.eos]], dtype=np.uint16)
    found = wanted_places(ids, np.array([4]), np.ones(len(vocabulary), dtype=bool), vocabulary)
    assert found.tolist() == [[False, True, True, False]]


# --- excess over neighbours ---------------------------------------------------------------------------------------


def excess_of_cells(values: np.ndarray) -> np.ndarray:
    """Runs of cells one after the other, laid out again as a row each."""
    cell = np.repeat(np.arange(len(values)), values.shape[1])
    return excess_over_neighbours(values.ravel(), cell).reshape(values.shape)


def naive_excess(values: np.ndarray) -> np.ndarray:
    """One gene at a time: at the ends the genes on the one side count twice, for there are none on the other."""
    out = np.full(values.shape, np.nan)
    for row, cell in zip(out, values, strict=True):
        places = [at for at, value in enumerate(cell) if not np.isnan(value)]
        if len(places) <= NEIGHBOURS:
            continue
        for number, at in enumerate(places):
            around = [abs(other) for other in range(number - NEIGHBOURS, number + NEIGHBOURS + 1)]
            around = [2 * (len(places) - 1) - other if other >= len(places) else other for other in around]
            row[at] = float(cell[at]) - np.median([float(cell[places[other]]) for other in around])
    return out


@pytest.mark.parametrize("n_genes", [NEIGHBOURS + 1, NEIGHBOURS + 2, 2 * NEIGHBOURS + 1, 90])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_excess_over_neighbours(rng: np.random.Generator, n_genes: int, dtype: type) -> None:
    values = rng.lognormal(size=(3, n_genes + 15)).astype(dtype)
    for row in values:  # special tokens, padding, and genes that are not screened lie between
        row[rng.permutation(n_genes + 15)[:15]] = np.nan
    before = values.copy()
    found = excess_of_cells(values)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(np.isnan(found), np.isnan(values))
    np.testing.assert_allclose(found, naive_excess(values))
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("n_genes", [0, 1, NEIGHBOURS])
def test_cells_of_few_genes_have_no_neighbours_to_compare_with(n_genes: int) -> None:
    values = np.full((2, 30), np.nan)
    values[0, :n_genes] = 1
    values[1, : NEIGHBOURS + 1] = 1
    found = excess_of_cells(values)
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(found[1, : NEIGHBOURS + 1], 0)


def test_a_trend_with_the_rank_goes_and_a_gene_that_does_more_stays(rng: np.random.Generator) -> None:
    trend = np.geomspace(1, 0.1, 400)
    values = np.tile(trend, (2, 1))
    values[0, 200] += 0.05
    found = excess_of_cells(values)
    inner = slice(NEIGHBOURS, -NEIGHBOURS)
    np.testing.assert_allclose(found[1, inner], 0, atol=1e-12)
    assert found[0, 200] == pytest.approx(0.05, abs=0.002)  # itself is one of the 41
    assert np.abs(np.delete(found[0, inner], 200 - NEIGHBOURS)).max() < 0.006  # its neighbours hardly notice


# --- sums over cells --------------------------------------------------------------------------------------------------

entries = st.lists(
    st.tuples(st.integers(0, 4), st.integers(-1, 2), st.floats(-100, 100, width=32) | st.just(float("nan"))),
    max_size=40,
)


def as_table(block: list[tuple[int, int, float]]) -> pd.DataFrame:
    table = pd.DataFrame(block, columns=["token", "group", "value"])
    return table.astype({"token": np.int64, "group": np.int64, "value": np.float32})


@given(st.lists(entries, max_size=4), st.randoms(use_true_random=False))
def test_sums_over_cells(blocks: list[list[tuple[int, int, float]]], random) -> None:
    """Those of pandas, in whatever blocks and order values come; NaN and cells without a group count for nothing."""
    sums, shuffled = GeneSums(5, 3), GeneSums(5, 3)
    every = [entry for block in blocks for entry in block]
    for block in blocks:
        sums.add("x", *(column.to_numpy() for _, column in as_table(block).items()))
    random.shuffle(every)
    table = as_table(every)
    shuffled.add("x", *(column.to_numpy() for _, column in table.items()))
    counted = table[(table["group"] >= 0) & table["value"].notna()].astype({"value": np.float64})
    expected = counted.groupby(["token", "group"])["value"].agg(["count", "mean", "std"])
    index = pd.MultiIndex.from_product([range(5), range(3)])
    expected = expected.reindex(index)
    for found in (sums, shuffled):
        assert found.n("x").dtype == np.int64
        np.testing.assert_array_equal(found.n("x").ravel(), expected["count"].fillna(0))
        np.testing.assert_allclose(found.mean("x").ravel(), expected["mean"], atol=1e-9)
        np.testing.assert_allclose(found.sd("x").ravel(), expected["std"], atol=1e-4)


def test_sums_of_different_things_do_not_mix() -> None:
    sums = GeneSums(2, 1)
    sums.add("a", np.array([0, 0, 1]), np.zeros(3, dtype=int), np.array([1.0, 3.0, 5.0]))
    sums.add("b", np.array([0]), np.zeros(1, dtype=int), np.array([7.0]))
    assert sums.mean("a")[:, 0].tolist() == [2, 5]
    assert sums.sd("a")[0, 0] == pytest.approx(2**0.5)
    assert np.isnan(sums.sd("a")[1, 0])  # one value has no spread
    assert sums.mean("b")[0, 0] == 7
    assert np.isnan(sums.mean("b")[1, 0])
    assert np.isnan(sums.sd("b")[1, 0])
    assert not sums.n("never added").any()
    assert np.isnan(sums.mean("never added")).all()


# --- who stands out ---------------------------------------------------------------------------------------------------


def genes_alike(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Excess, rank and number of cells of genes that do nothing."""
    return rng.normal(size=n), rng.uniform(size=n), rng.integers(10, 1000, size=n)


def naive_standing_out(excess: np.ndarray, rank: np.ndarray, n_cells: np.ndarray) -> np.ndarray:
    """All genes are alike here: no more than 101."""
    others = [np.delete(excess, at) for at in range(len(excess))]
    centre = np.array([np.median(one) for one in others])
    spread = np.array([stats.norm.ppf(0.75) ** -1 * np.median(np.abs(one - np.median(one))) for one in others])
    return (excess - centre) / spread


def test_z_is_robust_and_a_gene_is_not_its_own_null(rng: np.random.Generator) -> None:
    excess, rank, n_cells = genes_alike(rng, ALIKE + 1)
    z, centre, spread = standing_out(excess, rank, n_cells)
    np.testing.assert_allclose(z, naive_standing_out(excess, rank, n_cells))
    excess[7] = 1e6
    far, of_far, about_far = standing_out(excess, rank, n_cells)
    assert (of_far[7], about_far[7]) == (centre[7], spread[7])  # what it does does not change what it is held against
    assert far[7] == pytest.approx((1e6 - centre[7]) / spread[7])


def test_alike_is_alike_in_rank_and_in_number_of_cells(rng: np.random.Generator) -> None:
    """Excesses that follow both stand out nowhere; one that belongs elsewhere does."""
    _, rank, n_cells = genes_alike(rng, 2000)
    usual = 10 * stats.rankdata(rank) / 2000 + 10 * stats.rankdata(n_cells) / 2000
    excess = usual + rng.normal(size=2000)
    z, centre, _ = standing_out(excess, rank, n_cells)
    for of in (rank, n_cells):
        assert np.corrcoef(excess, of)[0, 1] > 0.5
        assert abs(np.corrcoef(z, of)[0, 1]) < 0.25
    assert np.median(np.abs(centre - usual)) < 0.5
    low, high = np.argmin(np.abs(usual - 5)), np.argmin(np.abs(usual - 15))
    excess[[low, high]] = 15, 5
    z, *_ = standing_out(excess, rank, n_cells)
    assert z[low] > 4
    assert z[high] < -4


@pytest.mark.parametrize("planted", [8.0, -8.0])
def test_a_planted_gene_stands_out_beside_many_others_that_do(rng: np.random.Generator, planted: float) -> None:
    excess, rank, n_cells = genes_alike(rng, 2000)
    at = rng.permutation(2000)[:200]
    excess[at] = planted
    z, *_ = standing_out(excess, rank, n_cells)
    assert (z[at] * np.sign(planted)).min() > 3
    assert np.abs(np.median(np.delete(z, at))) < 0.3
    assert (np.abs(np.delete(z, at)) > 3).mean() < 0.01


def test_genes_that_do_nothing_hardly_ever_lie_beyond_the_band(rng: np.random.Generator) -> None:
    """Normal noise in 0.27 % of genes, and a little more, for median and spread are of 100; uniform noise never."""
    _, rank, n_cells = genes_alike(rng, 5000)
    z, *_ = standing_out(rng.normal(size=5000), rank, n_cells)
    assert 0.001 < (np.abs(z) > 3).mean() < 0.01
    assert np.nanstd(z) == pytest.approx(1, abs=0.1)
    z, *_ = standing_out(rng.uniform(-1, 1, size=5000), rank, n_cells)
    assert (np.abs(z) > 3).mean() < 0.001
    assert np.abs(z).max() > 1  # it is a scale, not a constant


@given(st.integers(0, 2**32 - 1), st.integers(FEWEST_ALIKE + 1, ALIKE + 1))
@settings(deadline=None, max_examples=25)
def test_order_and_units_do_not_matter(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    excess, rank = rng.standard_t(3, size=n), rng.permutation(n) / n
    n_cells = rng.integers(10, 20, size=n)
    order = rng.permutation(n)
    found = standing_out(excess, rank, n_cells)
    shuffled = standing_out(excess[order], rank[order], n_cells[order])
    for one, other in zip(found, shuffled, strict=True):
        np.testing.assert_allclose(other, one[order])
    scaled = standing_out(3 * excess - 5, rank * 100, n_cells * 7)
    np.testing.assert_allclose(scaled[0], found[0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(scaled[1], 3 * found[1] - 5, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(scaled[2], 3 * found[2], rtol=1e-6)


@pytest.mark.parametrize("n_ranks", [1500, 40])
def test_order_does_not_matter_where_a_hundred_are_chosen(rng: np.random.Generator, n_ranks: int) -> None:
    """Of genes that are as much alike, the same one is the last of the hundred, in any order of genes."""
    excess, rank, n_cells = genes_alike(rng, 1500)
    rank, order = np.floor(rank / rank.max() * (n_ranks - 1)), rng.permutation(1500)
    found = standing_out(excess, rank, n_cells)
    shuffled = standing_out(excess[order], rank[order], n_cells[order])
    for one, other in zip(found, shuffled, strict=True):
        np.testing.assert_array_equal(other, one[order])


def test_genes_that_were_not_measured_are_left_out(rng: np.random.Generator) -> None:
    excess, rank, n_cells = genes_alike(rng, 90)
    expected = standing_out(excess, rank, n_cells)
    at = [0, 40, 92]
    widened = [np.insert(of.astype(float), [0, 39, 90], np.nan) for of in (excess, rank)]
    widened.append(np.insert(n_cells, [0, 39, 90], 0))
    for found, want in zip(standing_out(*widened), expected, strict=True):
        assert np.isnan(found[at]).all()
        np.testing.assert_array_equal(np.delete(found, at), want)


@pytest.mark.parametrize("n", [0, 1, FEWEST_ALIKE])
def test_too_few_genes_say_nothing(rng: np.random.Generator, n: int) -> None:
    for found in standing_out(*genes_alike(rng, n)):
        assert found.shape == (n,)
        assert np.isnan(found).all()
    assert not np.isnan(standing_out(*genes_alike(rng, FEWEST_ALIKE + 1))[0]).any()


def test_genes_that_do_not_differ_say_nothing(rng: np.random.Generator) -> None:
    _, rank, n_cells = genes_alike(rng, 60)
    excess = np.full(60, 0.25)
    excess[3] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z, centre, spread = standing_out(excess, rank, n_cells)
    assert np.isnan(z).all()
    assert (centre == 0.25).all()
    assert (spread == 0).all()


# --- estimates --------------------------------------------------------------------------------------------------------


def test_agreement(rng: np.random.Generator) -> None:
    exact = rng.normal(size=300)
    estimate = exact + rng.normal(size=300)
    correlation, precision = agreement(estimate, exact)
    assert correlation == pytest.approx(stats.spearmanr(estimate, exact).statistic)
    largest = [sorted(range(300), key=lambda at: -abs(values[at])) for values in (estimate, exact)]
    assert precision == len(set(largest[0][:30]) & set(largest[1][:60])) / 30
    assert 0.5 < precision < 1
    assert agreement(exact, exact) == pytest.approx((1, 1))
    assert agreement(-exact, exact) == pytest.approx((-1, 1))  # the largest, whatever the sign


@pytest.mark.parametrize(
    ("estimate", "exact"), [([], []), ([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [0, 0, 0])]
)
def test_no_agreement_without_differences(estimate: list[float], exact: list[float]) -> None:
    assert np.isnan(agreement(np.array(estimate, dtype=float), np.array(exact, dtype=float))).all()


@pytest.mark.parametrize("n_genes", [5, CHECKED, CHECKED + 1, 60, 400])
def test_drawn_genes_stand_for_all(rng: np.random.Generator, n_genes: int) -> None:
    """Their weights are the inverse of their probability to be drawn, so that a sum over them is that over all."""
    estimates = rng.normal(size=(2, n_genes))
    weights = np.array([draw_checked(estimates, rng) for _ in range(2000)])
    is_drawn = weights > 0
    assert set(is_drawn.sum(axis=1)) == {min(n_genes, CHECKED)}
    np.testing.assert_allclose(weights.sum(axis=1), n_genes)
    frequency = is_drawn.mean(axis=0)
    np.testing.assert_allclose(frequency, 1 / weights.max(axis=0), atol=0.05)
    order = np.argsort(-np.abs(estimates), axis=1)
    is_top = np.isin(np.arange(n_genes), order[:, : round(TOP * n_genes)])
    assert (is_drawn[:, is_top].sum(axis=1) >= min(is_top.sum(), CHECKED_TOP)).all()


@pytest.mark.parametrize("noise", [0.1, 0.5, 2])
def test_agreement_in_a_sample_of_genes_is_that_of_the_whole_cell(rng: np.random.Generator, noise: float) -> None:
    """Without bias, within the error of many samples; and the same to the last bit where all agree."""
    exact = rng.standard_t(3, size=400)
    estimate, other = exact + noise * rng.standard_t(3, size=400), rng.normal(size=400)
    whole, sampled = agreement(estimate, exact), []
    for _ in range(500):
        weight = draw_checked(np.stack([estimate, other]), rng)
        of_drawn = np.where(weight > 0, exact, np.nan)
        sampled.append(agreement(estimate, of_drawn, weight))
        assert agreement(exact, of_drawn, weight)[0] == pytest.approx(1)
    error = stats.sem(sampled, nan_policy="omit")
    assert error.max() < 0.012
    np.testing.assert_array_less(np.abs(np.nanmean(sampled, axis=0) - whole), 3 * error + 0.003)
