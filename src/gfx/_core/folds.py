"""Cut genes or cells into folds that are alike in their classes and hold donors whole."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
from sklearn.model_selection import StratifiedKFold

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Orders of donors that are tried, of which the one with the most similar folds is taken; of many it would be always
#: the same cut, where donors are few.
_N_ORDERS = 3


def folds(classes: np.ndarray, n_splits: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Choose the fold in which each gene or cell is held out, int16 `(n,)`.

    Each fold has its share of every class, int `(n,)`, as far as `groups` allow: the donor of each, int `(n,)`, all of
    whose cells are in one fold.
    """
    if groups is not None:
        return _folds_of_donors(classes, n_splits, seed, groups)
    splitter = StratifiedKFold(n_splits, shuffle=True, random_state=seed)
    out = np.full(len(classes), -1, dtype=np.int16)
    with warnings.catch_warnings():
        # A class smaller than the number of folds cannot be in each of them; callers for whom that matters check it.
        warnings.filterwarnings("ignore", "The least populated class")
        for fold, (_, held_out) in enumerate(splitter.split(classes, classes)):
            out[held_out] = fold
    return out


def _folds_of_donors(classes: np.ndarray, n_splits: int, seed: int, groups: np.ndarray) -> np.ndarray:
    """Put donors, in random order, each where its classes are rarest; take the order with the most similar folds.

    scikit-learn's StratifiedGroupKFold goes through donors by how uneven their classes are, which is the same order for
    every seed, so that its folds are not drawn.
    """
    donors, donor = np.unique(groups, return_inverse=True)
    names, number = np.unique(classes, return_inverse=True)
    counts = np.zeros((len(donors), len(names)))
    np.add.at(counts, (donor, number), 1)
    share = counts / counts.sum(axis=0)
    rng, best, least = np.random.default_rng(seed), np.zeros(0, dtype=np.int16), np.inf
    for _ in range(_N_ORDERS):
        fold, n_donors = np.empty(len(donors), dtype=np.int16), np.zeros(n_splits)
        in_fold = np.zeros((n_splits, len(names)))  # share of each class; squares have the least sum where all agree
        for drawn in rng.permutation(len(donors)):
            chosen = np.lexsort((rng.random(n_splits), n_donors, in_fold @ share[drawn]))[0]
            fold[drawn] = chosen
            in_fold[chosen] += share[drawn]
            n_donors[chosen] += 1
        if np.square(in_fold).sum() < least:
            best, least = fold, np.square(in_fold).sum()
    return best[donor]


def validation_part(classes: np.ndarray, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Choose about 10 % of the training cells for validation, bool `(n,)`: whole donors, if there are two or more."""
    if groups is not None and (n_donors := len(np.unique(groups))) > 1:
        return folds(classes, min(10, n_donors), seed, groups) == 0
    # Rare classes cannot be in every part: their cells are drawn at random.
    number = np.unique(classes, return_inverse=True)[1]
    rare = np.bincount(number)[number] < 10
    part = np.zeros(len(classes), dtype=bool)
    rng = np.random.default_rng(seed)
    part[rare] = rng.random(rare.sum()) < 0.1
    if not rare.all():
        part[~rare] = folds(classes[~rare], 10, seed) == 0
    if not part.any():
        part[rng.integers(len(part))] = True
    return part


def in_training(classes: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Which members have a class, int `(n,)`, that the training set of their fold, int `(n,)`, has too; bool `(n,)`.

    Where donors are held out whole, it may lack one.
    """
    out = np.zeros(len(fold), dtype=bool)
    for _, train, held_out in each_fold(fold):
        out[held_out] = (classes[held_out] >= 0) & np.isin(classes[held_out], classes[train])
    return out


def each_fold(fold: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Go through the folds that have members: number, training set and held-out set, bool `(n,)`."""
    for number in np.unique(fold[fold >= 0]).tolist():
        yield number, (fold >= 0) & (fold != number), fold == number
