"""Principal components found in some cells, and the places of others along them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sklearn.decomposition import PCA

if TYPE_CHECKING:
    import numpy as np


def principal_components(learnt: np.ndarray, rest: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Find at most `n` components of `learnt`, and place both along them, `(n_cells, n)` each."""
    pca = PCA(min(n, *learnt.shape), random_state=seed).fit(learnt)
    return pca.transform(learnt), pca.transform(rest)
