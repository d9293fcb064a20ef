"""Cut genes or cells into folds: alike in their classes, and donors whole."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

if TYPE_CHECKING:
    from collections.abc import Iterator


def folds(classes: np.ndarray, n_splits: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Say in which fold each gene or cell is held out, int16 `(n,)`.

    Parameters
    ----------
    classes
        Class of each, int `(n,)`: each fold has its share of every class, as far as groups allow.
    groups
        Donor of each, int `(n,)`: all cells of a donor are in one fold. `None`: each stands for itself.
    """
    if groups is None:
        splitter = StratifiedKFold(n_splits, shuffle=True, random_state=seed)
    else:
        splitter = StratifiedGroupKFold(n_splits, shuffle=True, random_state=seed)
    out = np.full(len(classes), -1, dtype=np.int16)
    with warnings.catch_warnings():
        # A class smaller than the number of folds cannot be in each of them; who may not have one checks that before.
        warnings.filterwarnings("ignore", "The least populated class")
        for fold, (_, held_out) in enumerate(splitter.split(classes, classes, groups)):
            out[held_out] = fold
    return out


def validation_part(classes: np.ndarray, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Choose about a tenth of the training cells to stop by, bool `(n,)`: whole donors, if there are two or more."""
    if groups is not None and len(donors := np.unique(groups)) > 1:
        n_parts = min(10, len(donors), int(np.unique(classes, return_counts=True)[1].max()))
        if n_parts < 2:  # no class has two cells to share out
            return groups == np.random.default_rng(seed).choice(donors)
        return folds(classes, n_parts, seed, groups) == 0
    # Rare classes cannot be in every part; what is left over is cut at random.
    number = np.unique(classes, return_inverse=True)[1]
    rare = np.bincount(number)[number] < 10
    part = np.zeros(len(classes), dtype=bool)
    rng = np.random.default_rng(seed)
    part[rare] = rng.random(rare.sum()) < 0.1
    if (~rare).any():
        part[~rare] = folds(classes[~rare], 10, seed) == 0
    if not part.any():
        part[rng.integers(len(part))] = True
    return part


def each_fold(fold: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Go through the folds that have members: number, which to learn from, and which are held out."""
    for at in np.unique(fold[fold >= 0]).tolist():
        yield at, (fold >= 0) & (fold != at), fold == at
