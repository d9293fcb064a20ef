"""A baseline for masked genes: the genes most frequent at a rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.examples import MaskedCells, TokenRows

#: Bands of ranks, each a constant factor wide: among the first ranks each counts, among the last hundreds are alike.
N_BANDS = 64


def rank_baseline(rows: TokenRows, cells: np.ndarray, held_out: MaskedCells) -> dict[str, float]:
    """Predict the masked genes of held-out cells by their rank: the genes most frequent there in training cells.

    `rows` are tokens, and `cells` the training cells among them. ``top_1_unseen`` and ``top_10_unseen`` also leave out
    the genes that the cell shows, which cannot be masked: a harder baseline, because it uses the rest of the cell.
    """
    vocabulary = held_out.vocabulary
    counts, band = _frequency_by_rank(rows, cells, vocabulary, int(held_out.lengths.max(initial=1)))
    n_best = min(10, len(vocabulary) - 1)
    hits = {"top_1": 0, "top_10": 0, "top_1_unseen": 0, "top_10_unseen": 0}
    total = 0
    for cell in range(len(held_out)):
        shown = held_out[cell]
        masked = np.flatnonzero(shown["labels"] >= 0)
        scores = counts[band[masked]]
        for suffix in ("", "_unseen"):
            best = np.argpartition(-scores, n_best, axis=1)[:, :n_best]
            best = np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1), 1)
            is_hit = best == shown["labels"][masked][:, None]
            hits[f"top_1{suffix}"] += int(is_hit[:, 0].sum())
            hits[f"top_10{suffix}"] += int(is_hit.any(axis=1).sum())
            scores[:, shown["input_ids"]] = -1
        total += len(masked)
    return {name: n / total for name, n in hits.items()} | {"n": total}


def _frequency_by_rank(
    rows: TokenRows, cells: np.ndarray, vocabulary: Vocabulary, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Count tokens by band of ranks, int64 `(n_bands, n_tokens)`; and the band of each position."""
    width = max(width, int(rows.lengths[cells].max(initial=1)))
    edges = np.unique(np.geomspace(1, width + 1, N_BANDS).astype(int)) - 1
    band = (np.searchsorted(edges, np.arange(width) - vocabulary.first_gene, side="right") - 1).clip(0)
    counts = np.zeros((band.max() + 1, len(vocabulary)), dtype=np.int64)
    for cell in cells:
        row = rows[cell]
        counts[band[: len(row)], row] += 1  # a gene stands once in a cell
    counts[:, vocabulary.is_special] = 0
    return counts, band
