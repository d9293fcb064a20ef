"""Scores of genes in cells, and of cells, by a classifier; and states of genes, which a linear one reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from gfx._engine.device import sum_dtype
from gfx._engine.forward import run_cells, states
from gfx._engine.pooling import special_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import BertModel

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.classifier import Classifier


def probabilities(model: Classifier, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Probability of each class for each position, float32 `(b, l, n_logits)`."""
    return model.head.probabilities(model.read_out(states(model.bert, tokens, valid)))


def probabilities_and_squares(model: Classifier, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Probabilities and their squares side by side, as precise as their sums, `(b, l, 2 * n_logits)`."""
    values = probabilities(model, tokens, valid).to(sum_dtype(model.device))
    return torch.cat([values, values**2], dim=-1)


def of_occurrences(
    model: Classifier | BertModel,
    ids: np.ndarray,
    lengths: np.ndarray,
    wanted: np.ndarray,
    forward: Callable[..., torch.Tensor],
    *,
    description: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep what `forward` makes of the wanted tokens, bool `(n_tokens,)`, in every cell that has them.

    Returns the cell and the token of each occurrence, int64 `(n,)`, in the order of cells and ranks; and the values,
    float32 `(n, k)`, all of which are in memory.
    """
    chosen = torch.from_numpy(wanted).to(model.device)
    cells, tokens, values = [], [], []
    for batch in run_cells(model, ids, lengths, forward=forward, description=description):
        kept = batch.valid & chosen[batch.tokens]
        cells.append(np.repeat(batch.rows, kept.sum(dim=1).cpu().numpy()))
        tokens.append(batch.tokens[kept].cpu().numpy())
        values.append(batch.output[kept].float().cpu().numpy())
    cell = np.concatenate(cells)
    order = np.argsort(cell, kind="stable")
    return cell[order], np.concatenate(tokens)[order], np.concatenate(values)[order]


def of_cells(model: Classifier, ids: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Probability of each class of each task, float32 `(n_cells, n_logits)`; NaN for cells without tokens."""
    special = special_tokens(vocabulary, model.device)

    def forward(model: Classifier, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        hidden = states(model.bert, tokens, valid, only_first=model.head.pooling != "mean")
        return model.head.probabilities(model.read_out(hidden, valid & ~special[tokens]))

    out = np.full((len(lengths), model.head.n_logits), np.nan, dtype=np.float32)
    for batch in run_cells(model, ids, lengths, forward=forward, description="classifying cells"):
        out[batch.rows] = batch.output.cpu().numpy()
    return out
