"""Which genes share cells: vectors of genes, and the place of a cell among all cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gfx._core.vocabulary import Vocabulary

#: Cells that the components are taken from at most; more change them little.
MOST_CELLS = 50_000

#: Genes in a smaller share of cells get no vector: what they share is chance.
RAREST = 3e-4


@dataclass(frozen=True)
class Coexpression:
    """Principal components of cells by genes.

    A cell's profile has, for each of its genes, an approximate logarithm of the normalised count. Tokens hold no
    counts, but a gene's rank tells about how many times its median it was counted: the first gene of `n` about `n`
    times, the last one once. Genes found in few cells weigh more, by the fourth root of their frequency. Profiles
    have length 1, so that depth is no direction of its own.

    Parameters
    ----------
    vectors
        Direction of each token among the components, unit length or zero, float32 `(n_tokens, size)`.
    loadings
        What a gene adds to a cell's place, float32 `(n_tokens, size)`.
    weights
        Weight of each token in a profile, float32 `(n_tokens,)`; 0 for special tokens and the rarest genes.
    centre
        Place of the mean profile, float32 `(size,)`.
    frequency
        Share of cells with each token, float64 `(n_tokens,)`.
    vocabulary
        Medians and special tokens.
    """

    vectors: np.ndarray
    loadings: np.ndarray
    weights: np.ndarray
    centre: np.ndarray
    frequency: np.ndarray
    vocabulary: Vocabulary

    def place(self, row: np.ndarray) -> np.ndarray:
        """Find the place of a cell, given its tokens, among all cells; float32 `(size,)`."""
        genes, values = _profile(row, self.vocabulary)
        length = np.linalg.norm(values)
        return (values @ self.loadings[genes] / max(length, 1e-12) - self.centre).astype(np.float32)


def find_coexpression(
    tokens: Sequence[np.ndarray], cells: np.ndarray, vocabulary: Vocabulary, size: int, seed: int
) -> Coexpression:
    """Take the first `size` principal components of the cells' profiles.

    Cost: a randomised singular value decomposition of at most 50,000 cells by all genes, dense in float32 while it
    is centred: 4 bytes a cell and gene.
    """
    from sklearn.utils.extmath import randomized_svd

    rng = np.random.default_rng(seed)
    if len(cells) > MOST_CELLS:
        cells = np.sort(rng.choice(cells, MOST_CELLS, replace=False))
    profiles = profile_matrix(tokens, cells, vocabulary)
    frequency = np.asarray((profiles > 0).mean(axis=0)).ravel()
    weights = (np.maximum(frequency, RAREST) ** -0.25 * (frequency > RAREST)).astype(np.float32)
    weighted = (profiles @ sparse.diags_array(weights)).toarray()
    mean = weighted.mean(axis=0)
    weighted -= mean
    n_components = min(size, *weighted.shape)
    _, _, components = randomized_svd(weighted, n_components=n_components, n_iter=4, random_state=seed)
    directions = np.zeros((len(vocabulary), size), np.float32)  # few cells have fewer components: the rest stays 0
    directions[:, :n_components] = components.T
    norm = np.linalg.norm(directions, axis=1, keepdims=True) * (weights > 0)[:, None]
    return Coexpression(
        vectors=np.divide(directions, norm, out=np.zeros_like(directions), where=norm > 0),
        loadings=directions * weights[:, None],
        weights=weights,
        centre=(mean @ directions).astype(np.float32),
        frequency=frequency,
        vocabulary=vocabulary,
    )


def profile_matrix(tokens: Sequence[np.ndarray], cells: np.ndarray, vocabulary: Vocabulary) -> sparse.csr_array:
    """Profiles of cells, each of length 1, not yet weighted by the genes' frequency; float32 cells × tokens."""
    genes, values, starts = [], [], [0]
    for cell in cells:
        found, value = _profile(tokens[cell], vocabulary)
        genes.append(found)
        values.append(value / max(np.linalg.norm(value), 1e-12))
        starts.append(starts[-1] + len(found))
    return sparse.csr_array(
        (np.concatenate(values).astype(np.float32), np.concatenate(genes), np.array(starts)),
        shape=(len(cells), len(vocabulary)),
    )


def _profile(row: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Genes of a cell and the approximate logarithm of their normalised counts."""
    genes = row[~vocabulary.is_special[row]].astype(np.int64)
    times = (len(genes) + 1) / np.arange(1, len(genes) + 1)
    return genes, np.log1p(vocabulary.medians[genes] * times)
