"""Folds: every member held out once, classes in their shares, donors whole; and the cells to stop by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold

from gfx._core.folds import each_fold, folds, validation_part


@st.composite
def labelled(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Classes, each with as many members as folds or more; number of folds; seed."""
    n_splits = draw(st.integers(2, 6))
    sizes = draw(st.lists(st.integers(n_splits, 25), min_size=1, max_size=4))
    order = np.random.default_rng(draw(st.integers(0, 99)))
    return order.permutation(np.repeat(np.arange(len(sizes)), sizes)), n_splits, draw(st.integers(0, 99))


@given(labelled())
@examples(max_examples=50, deadline=None)
def test_each_member_is_held_out_once_and_each_fold_has_its_share(drawn: tuple[np.ndarray, int, int]) -> None:
    classes, n_splits, seed = drawn
    found = folds(classes, n_splits, seed)
    assert found.dtype == np.int16
    assert set(found.tolist()) == set(range(n_splits))
    for at in np.unique(classes):
        counts = np.bincount(found[classes == at], minlength=n_splits)
        assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(folds(classes, n_splits, seed), found)


@st.composite
def of_donors(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Classes, donors of very different size and composition, number of folds, seed."""
    n_splits = draw(st.integers(2, 5))
    sizes = draw(st.lists(st.integers(1, 30), min_size=n_splits, max_size=15))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    donor = np.repeat(np.arange(len(sizes)) * 7, sizes)  # numbers need not follow each other
    sick = rng.random(len(sizes))[donor // 7]
    classes = (rng.random(len(donor)) < sick).astype(np.int64)
    add = np.repeat([0, 1], n_splits)  # at least as many members as folds
    return np.append(classes, add), np.append(donor, np.zeros_like(add)), n_splits, draw(st.integers(0, 99))


@given(of_donors())
@examples(max_examples=50, deadline=None)
def test_donors_are_whole_and_no_fold_is_empty(drawn: tuple[np.ndarray, np.ndarray, int, int]) -> None:
    classes, donor, n_splits, seed = drawn
    found = folds(classes, n_splits, seed, donor)
    assert set(found.tolist()) == set(range(n_splits))
    for at in np.unique(donor):
        assert len(np.unique(found[donor == at])) == 1
    np.testing.assert_array_equal(folds(classes, n_splits, seed, donor), found)


def test_donors_of_one_class_each_are_shared_out() -> None:
    """Five healthy and five sick donors in five folds: one of each in every fold."""
    donor = np.repeat(np.arange(10), [9, 12, 10, 11, 8, 10, 10, 9, 12, 11])
    is_sick = donor >= 5
    for seed in range(5):
        found = folds(is_sick.astype(int), 5, seed, donor)
        for fold in range(5):
            here = np.unique(donor[found == fold])
            assert sorted(here >= 5) == [False, True]


def test_the_first_seed_is_that_of_the_official_software() -> None:
    classes = np.random.default_rng(3).integers(0, 3, 117)
    expected = np.full(117, -1)
    official = StratifiedKFold(n_splits=5, shuffle=True, random_state=0)
    for fold, (_, held_out) in enumerate(official.split(np.zeros(117), classes)):
        expected[held_out] = fold
    np.testing.assert_array_equal(folds(classes, 5, 0), expected)


@pytest.mark.parametrize("with_donors", [False, True])
def test_other_seeds_are_other_folds(with_donors: bool) -> None:
    classes = np.arange(60) % 2
    donor = np.arange(60) // 3 if with_donors else None
    found = {folds(classes, 5, seed, donor).tobytes() for seed in range(5)}
    assert len(found) == 5


def test_other_seeds_are_other_folds_of_donors_that_differ() -> None:
    """Donors of other sizes and classes each: which of them are held out together is drawn, and sizes stay alike."""
    sizes = np.arange(20, 44, 2)
    donor = np.repeat(np.arange(12), sizes)
    classes = (np.random.default_rng(0).random(len(donor)) < np.linspace(0.2, 0.8, 12)[donor]).astype(int)
    cuts = set()
    for seed in range(6):
        found = folds(classes, 4, seed, donor)
        cuts.add(frozenset(frozenset(np.unique(donor[found == fold]).tolist()) for fold in range(4)))
        for at in (0, 1):
            of_class = classes == at
            shares = np.bincount(found[of_class], minlength=4) / of_class.sum()
            largest = np.bincount(donor[of_class]).max() / of_class.sum()
            assert np.abs(shares - 0.25).max() < largest  # no fold has a donor too many
    assert len(cuts) == 6


def test_a_large_donor_is_not_always_the_validation_set() -> None:
    donor = np.repeat(np.arange(10), [500, *[50] * 9])
    classes = np.random.default_rng(0).integers(0, 2, len(donor))
    stopped = [np.unique(donor[validation_part(classes, seed, donor)]).tolist() for seed in range(30)]
    assert {len(donors) for donors in stopped} == {1}
    assert sum(donors == [0] for donors in stopped) < 12


def test_each_fold_with_members_is_visited() -> None:
    fold = np.array([3, -1, 0, 3, 0, 7, -1], dtype=np.int16)
    found = list(each_fold(fold))
    assert [at for at, _, _ in found] == [0, 3, 7]
    for at, train, held in found:
        assert held.tolist() == [one == at for one in fold]
        assert (train | held).tolist() == [one >= 0 for one in fold]
        assert not (train & held).any()


# --- cells to stop by -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(10, 60), min_size=1, max_size=4), st.integers(0, 99))
@examples(max_examples=30, deadline=None)
def test_about_a_tenth_of_every_class(sizes: list[int], seed: int) -> None:
    classes = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    part = validation_part(classes, seed)
    assert part.dtype == bool
    for at, size in enumerate(sizes):
        assert size // 10 <= part[classes == at].sum() <= -(-size // 10)
    np.testing.assert_array_equal(validation_part(classes, seed), part)


def test_a_tenth_of_ten_or_more_donors() -> None:
    donor = np.repeat(np.arange(40), 5)
    classes = np.arange(200) % 2
    for seed in range(5):
        part = validation_part(classes, seed, donor)
        assert part.sum() == 20
        assert set(np.bincount(donor[part])) <= {0, 5}
    assert len({validation_part(classes, seed, donor).tobytes() for seed in range(5)}) > 1


@pytest.mark.parametrize("n_donors", [2, 3, 7])
def test_the_validation_set_is_one_of_a_few_donors(n_donors: int) -> None:
    donor = np.random.default_rng(0).permutation(np.repeat(np.arange(n_donors), 12))
    part = validation_part(np.arange(len(donor)) % 2, 0, donor)
    assert len(np.unique(donor[part])) == 1
    assert part.sum() == 12


def test_one_donor_is_cut_like_cells_without_donor() -> None:
    classes = np.random.default_rng(0).integers(0, 3, 100)
    expected = validation_part(classes, 4)
    assert 0 < expected.sum() < 100
    np.testing.assert_array_equal(validation_part(classes, 4, np.full(100, 9)), expected)


def test_rare_classes_are_cut_at_random() -> None:
    """Four cells of ten parts: in one part of ten on average, beside a class that is cut evenly; labels may be -100."""
    classes = np.repeat([5, -100], [200, 4])
    parts = np.array([validation_part(classes, seed) for seed in range(400)])
    assert set(parts[:, :200].sum(axis=1)) == {20}
    rare = parts[:, 200:].mean(axis=0)
    np.testing.assert_allclose(rare, 0.1, atol=5 * np.sqrt(0.1 * 0.9 / 400))
    assert len(np.unique(parts[:, 200:].sum(axis=1))) > 1


def test_the_validation_set_has_a_cell_where_all_classes_are_rare() -> None:
    for seed in range(50):
        part = validation_part(np.array([0, 0, 1, 1, 2]), seed)
        assert 0 < part.sum() < 5


@pytest.mark.parametrize("n_rare", [1, 3, 9])
def test_rare_classes_of_many_donors(n_rare: int) -> None:
    """Fewer cells than parts, in one class or in all: nothing to warn a user of, nothing to fail of."""
    donor = np.repeat(np.arange(12), 10)
    classes = (np.arange(120) < n_rare).astype(int)
    part = validation_part(classes, 0, donor)
    assert set(np.bincount(donor[part])) <= {0, 10}
    assert 0 < part.sum() <= 20
    few = np.repeat([0, 1], n_rare)
    part = validation_part(few, 0, np.arange(2 * n_rare))
    assert 0 < part.sum() < 2 * n_rare
