"""Attention added up over cells: bands of ranks, and means over genes, heads and bands from sums."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from gfx._core.scratch import compiled
from gfx._core.statistics import add_up, divided, moments

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: First rank of each band, counted from 1: about equally wide on a logarithm, and round numbers.
BAND_STARTS = (1, 6, 11, 21, 51, 101, 201, 501, 1001, 2001)

#: Kinds of positions whose attention to each other is added up: special tokens, and genes by bands of ranks.
BANDS = (
    "special",
    *(f"{first}–{following - 1}" for first, following in pairwise(BAND_STARTS)),
    f"{BAND_STARTS[-1]}–",
)

#: What is added up for each head and gene: attention received and given, their squares, and given to deleted genes.
OF_HEADS = ("received", "received_squared", "given", "given_squared", "to_deleted")

#: What is added up for each gene, the same for all heads.
OF_GENES = ("uniform", "given_uniform", "rank")


def even_distance(n_genes: Any) -> Any:
    """Mean distance in ranks of attention between one or more genes if it is uniform; that to itself counts as 0.

    Takes arrays of numpy and of torch.
    """
    return (n_genes**2 - 1) / (3 * n_genes)


@dataclass(frozen=True)
class AttentionSums:
    """Sums over the cells of each unit: a group, or the cells of one donor in a group. `H` heads, layer by layer.

    Parameters
    ----------
    genes
        For each gene, :data:`OF_HEADS` one after the other and :data:`OF_GENES`,
        `(n_units, n_tokens, 5 H + 3)`, or one `H` less where no genes are deleted.
    n_with_gene
        Cells that have each gene, `(n_units, n_tokens)`.
    heads
        Of each cell, the entropy of an average position's attention over the logarithm of the length, the mean distance
        in ranks of attention from gene to gene, and the attention of an average position to special tokens,
        `(n_units, 3, H)`.
    cells
        1, and the distance if attention is uniform, `(n_units, 2)`.
    bands, bands_uniform, n_in_band
        Attention that each position gives, by its own band and by that of whom it attends to,
        `(n_units, H, n_bands, n_bands)`; what it gives if attention is uniform, `(n_units, n_bands, n_bands)`; and the
        number of such positions, `(n_units, n_bands)`.
    ranks
        Over all cells, by the rank of the attended gene, 0 the first of a cell: attention that it receives, that if
        attention is uniform, and 1, `(n_ranks, H + 2)`.
    pairs
        From gene to gene: attention, one or all heads; that if it is uniform; and 1; `(n_gives, n_receives, n + 2)`.
        No genes unless they were asked for.
    """

    genes: np.ndarray
    n_with_gene: np.ndarray
    heads: np.ndarray
    cells: np.ndarray
    bands: np.ndarray
    bands_uniform: np.ndarray
    n_in_band: np.ndarray
    ranks: np.ndarray
    pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 2)))

    @classmethod
    def of(cls, results: Iterable[Mapping[str, np.ndarray]], n_units: int, n_tokens: int) -> AttentionSums:
        """Add up what :func:`gfx._engine.attention.sum_attention` gives for blocks of cells, the longest first."""
        totals = add_up(results, n_units * n_tokens)
        genes, n_with_gene = totals.pop("sum"), totals.pop("n")
        return cls(genes.reshape(n_units, n_tokens, -1), n_with_gene.reshape(n_units, n_tokens), **totals)

    def means(self, units: np.ndarray) -> dict[str, np.ndarray]:
        """Means over all cells of some units, float32; NaN where there are none.

        Returns
        -------
        `received`, `given` and, where genes are deleted, `to_deleted`, over the cells that have a gene,
        `(n_tokens, H)`, with the standard deviations `received_sd` and `given_sd` over these cells;
        `uniform`, `given_uniform`, `rank`, 0 the first gene of a cell, and the number of cells `n_with_gene`,
        `(n_tokens,)`; `entropy`, `distance` and `special`, `(H,)`; `distance_uniform` and `n_cells`, numbers;
        `bands`, over positions, `(H, n_bands, n_bands)`, `bands_uniform`, `(n_bands, n_bands)`, and `n_in_band`.
        """
        n_heads = self.heads.shape[2]
        n = self.n_with_gene[units].sum(axis=0)
        genes = self.genes[units].sum(axis=0)
        of_heads = np.split(genes[:, : -len(OF_GENES)], range(n_heads, genes.shape[1] - len(OF_GENES), n_heads), axis=1)
        sums = dict(zip(OF_HEADS, of_heads, strict=False))
        means: dict[str, np.ndarray] = {}
        for name in ("received", "given"):
            number = np.broadcast_to(n[:, None], sums[name].shape)
            _, means[name], means[f"{name}_sd"] = moments(np.stack([sums[name], sums[f"{name}_squared"], number]))
        if "to_deleted" in sums:
            means["to_deleted"] = divided(sums["to_deleted"], n[:, None])
        means |= dict(zip(OF_GENES, divided(genes[:, -len(OF_GENES) :], n[:, None]).T, strict=True))
        n_cells, distance = self.cells[units].sum(axis=0)
        of_cells = divided(self.heads[units].sum(axis=0), np.asarray(n_cells))
        means |= dict(zip(("entropy", "distance", "special"), of_cells, strict=True))
        means["distance_uniform"] = divided(distance, np.asarray(n_cells))
        n_in_band = self.n_in_band[units].sum(axis=0)
        means["bands"] = divided(self.bands[units].sum(axis=0), n_in_band[:, None])
        means["bands_uniform"] = divided(self.bands_uniform[units].sum(axis=0), n_in_band[:, None])
        counts = {"n_with_gene": n, "n_cells": n_cells, "n_in_band": n_in_band}
        return {name: np.asarray(mean, dtype=np.float32) for name, mean in means.items()} | {
            name: np.asarray(count, dtype=np.int64) for name, count in counts.items()
        }

    def by_rank(self) -> dict[str, np.ndarray]:
        """Means over the cells that have each rank.

        `ranks`, float32 `(n_ranks, H)`, `ranks_uniform` and the number of cells `ranks_n_cells`, `(n_ranks,)`.
        """
        means = divided(self.ranks[:, :-1], self.ranks[:, -1:]).astype(np.float32)
        return {"ranks": means[:, :-1], "ranks_uniform": means[:, -1], "ranks_n_cells": self.ranks[:, -1].astype(int)}

    def of_pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean attention from gene to gene over the cells that have both, `(n_gives, n_receives, n)`; NaN for none.

        With it what uniform attention would be, and the number of cells, `(n_gives, n_receives)`.
        """
        means = divided(self.pairs[..., :-1], self.pairs[..., -1:]).astype(np.float32)
        return means[..., :-1], means[..., -1], self.pairs[..., -1].astype(np.int32)


@compiled(nogil=True)
def add_pairs(
    table: np.ndarray, gives: np.ndarray, receives: np.ndarray, attention: np.ndarray, uniform: float
) -> None:
    """Add the pairs of one cell to those of all: see `pairs` of :class:`AttentionSums`.

    `attention` between the cell's genes, `(n, n_gives_of_cell, n_receives_of_cell)`, which have the numbers `gives` and
    `receives` in the table.
    """
    n = len(attention)
    for row, giver in enumerate(gives):
        for column, receiver in enumerate(receives):
            for kept in range(n):
                table[giver, receiver, kept] += attention[kept, row, column]
            table[giver, receiver, n] += uniform
            table[giver, receiver, n + 1] += 1


def strongest(values: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the `n` largest values of each row, in rows and columns; NaN is none of them, and ties take the first."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :n]  # NaN comes last
    rows = np.repeat(np.arange(len(values)), order.shape[1])
    columns = order.ravel()
    is_known = ~np.isnan(values[rows, columns])
    return rows[is_known], columns[is_known]


# --- bands of ranks --------------------------------------------------------------------------------------------------


def band_of(rank: np.ndarray) -> np.ndarray:
    """Find the number in :data:`BANDS` of the band of each rank, counted from 1; mean ranks are rounded down."""
    return np.searchsorted(BAND_STARTS, np.nan_to_num(rank, nan=1), side="right")


def key_profile(bands: np.ndarray, n_in_band: np.ndarray) -> np.ndarray:
    """Fraction of the attention from gene to gene that each band of ranks receives, `(..., n_bands)`, summing to 1.

    `bands` is the attention from band to band, `(..., n_bands, n_bands)`, and `n_in_band` the number of positions that
    give it; the first band, of special tokens, is left out.
    """
    received = np.einsum("...qk,q->...k", np.nan_to_num(bands[..., 1:, 1:]), n_in_band[1:].astype(np.float64))
    return received / received.sum(axis=-1, keepdims=True)


def breadth(profile: np.ndarray) -> np.ndarray:
    """Count the bands that a profile, `(..., n_bands)`, is spread over: two to the power of its entropy."""
    return 2 ** _bits(profile)


def diversity(profiles: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence between the profiles of the heads of each layer, in bits, `(..., n_heads, n_bands)`."""
    return _bits(profiles.mean(axis=-2)) - _bits(profiles).mean(axis=-1)


def _bits(profile: np.ndarray) -> np.ndarray:
    """Entropy of each profile, in bits."""
    return stats.entropy(profile, base=2, axis=-1)
