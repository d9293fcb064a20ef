"""Co-expression: principal components of genes, and a vector of each cell along them."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

#: Normalised counts well below this one add to a profile in proportion, those above it by their logarithm.
COUNT_SCALE = 3.0

#: Components are divided by their standard deviation to this power: what tells similar cells apart is no large one.
WHITENING = 0.25

#: Cells for the mean cell vector, and for how much a gene of a rank adds to it.
CELLS_FOR_THE_MEAN = 2_000


@dataclass(frozen=True)
class Coexpression:
    """Principal components of cells by genes, and vectors of cells along them.

    A cell's profile has, for each of its genes, an approximate logarithm of the normalised count. Tokens hold no
    counts, but a gene's rank tells about how many times its median it was counted: the first gene of `n` about `n`
    times, the last one once. Profiles have length 1, so that depth is no direction of its own. Genes found in few
    cells weigh more, by the fourth root of their frequency. Components are scaled down by the fourth root of their
    standard deviation.

    A cell vector is a weighted mean of gene vectors, because attention computes such means. The weights, a constant of
    the gene times a power of its rank, are fitted to what genes add to the projection of a profile.
    """

    vectors: np.ndarray  # direction of each token among the components, unit length or zero, float32 `(n_tokens, size)`
    log_share: np.ndarray  # logarithm of each token's weight in a cell vector, float32 `(n_tokens,)`
    rank_slope: float  # a gene weighs by its rank to minus this power
    centre: np.ndarray  # vector of the mean cell, float32 `(size,)`, which is subtracted from those of cells
    is_special: np.ndarray  # tokens that are no genes, bool `(n_tokens,)`

    def cell_vector(self, row: np.ndarray) -> np.ndarray:
        """Compute the vector of a cell from its tokens, float32 `(size,)`."""
        genes = row[~self.is_special[row]]
        weights = np.exp(self.log_share[genes]) * np.arange(1, len(genes) + 1) ** -self.rank_slope
        return (weights @ self.vectors[genes] / weights.sum() - self.centre).astype(np.float32)


def find_coexpression(
    tokens: Sequence[np.ndarray], cells: np.ndarray, vocabulary: Vocabulary, size: int, seed: int
) -> Coexpression:
    """Take the first `size - 1` principal components of the cells' profiles.

    The last dimension stays 0: a model that starts from these vectors keeps there how much a gene weighs.

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
    weighted -= weighted.mean(axis=0)
    n_components = min(size - 1, *weighted.shape)
    _, deviations, components = randomized_svd(weighted, n_components=n_components, n_iter=4, random_state=seed)
    directions = np.zeros((len(vocabulary), size), np.float32)  # few cells have fewer components: the rest stays 0
    kept = deviations > 1e-6 * deviations[0]
    directions[:, : kept.sum()] = components[kept].T * (deviations[kept] / deviations[0]) ** -WHITENING
    norm = np.linalg.norm(directions, axis=1) * (weights > 0)
    sample = [tokens[cell] for cell in rng.permutation(cells)[:CELLS_FOR_THE_MEAN]]
    log_share, rank_slope = _fit_shares(sample, norm * weights, vocabulary)
    coexpression = Coexpression(
        vectors=np.divide(directions, norm[:, None], out=np.zeros_like(directions), where=norm[:, None] > 0),
        log_share=log_share,
        rank_slope=rank_slope,
        centre=np.zeros(size, np.float32),
        is_special=vocabulary.is_special,
    )
    return replace(coexpression, centre=np.mean([coexpression.cell_vector(row) for row in sample], axis=0))


def _fit_shares(rows: Sequence[np.ndarray], weights: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, float]:
    """Write weights of genes times what a profile holds as a constant of each gene times a power of its rank.

    The logarithm of what a profile holds is nearly linear in those of the gene's median and of its rank.
    """
    genes, values = zip(*(_profile(row, vocabulary) for row in rows), strict=True)
    log_times = np.concatenate([np.log(_times(len(cell))) for cell in genes])
    genes, values = np.concatenate(genes), np.concatenate(values)
    known = np.column_stack([np.log(vocabulary.medians[genes]), log_times, np.ones(len(genes))])
    adds = weights[genes] * values  # what adds much to a cell vector is to be fitted well
    (by_median, by_rank, _), *_ = np.linalg.lstsq(known * adds[:, None], np.log(values) * adds, rcond=None)
    used = weights > 0
    log_share = np.full(len(weights), -np.inf)
    log_share[used] = np.log(weights[used]) + by_median * np.log(vocabulary.medians[used])
    lowest = np.quantile(log_share[used], 0.01)  # next to nothing, yet nothing that a layer norm would drown in
    return np.maximum(log_share, lowest).astype(np.float32), float(by_rank)


def profile_matrix(tokens: Sequence[np.ndarray], cells: np.ndarray, vocabulary: Vocabulary) -> sparse.csr_array:
    """Profiles of cells, each of length 1, not yet weighted by gene; float32 cells × tokens."""
    genes, values = zip(*(_profile(tokens[cell], vocabulary) for cell in cells), strict=True)
    values = np.concatenate([value / max(np.linalg.norm(value), 1e-12) for value in values]).astype(np.float32)
    starts = np.cumsum([0, *map(len, genes)])
    return sparse.csr_array((values, np.concatenate(genes), starts), shape=(len(cells), len(vocabulary)))


def _profile(row: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Genes of a cell and the approximate logarithm of their normalised counts."""
    genes = row[~vocabulary.is_special[row]].astype(np.int64)
    return genes, np.log1p(vocabulary.medians[genes] * _times(len(genes)) / COUNT_SCALE)


def _times(n_genes: int) -> np.ndarray:
    """About how many times its median a gene was counted, by rank."""
    return (n_genes + 1) / np.arange(1, n_genes + 1)
