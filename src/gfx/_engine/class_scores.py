"""What a classifier, or the encoder under a linear one, says of genes in cells and of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from gfx._engine.device import sum_dtype
from gfx._engine.forward import mask_of, run_cells
from gfx._engine.pooling import special_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import BertModel

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.classifier import Classifier


def probabilities(model: Classifier, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Probability of each class for each position, float32 `(b, l, n_logits)`."""
    return model.head.probabilities(model(tokens, mask_of(valid)).logits)


def of_occurrences(
    model: Classifier | BertModel,
    ids: np.ndarray,
    lengths: np.ndarray,
    wanted: np.ndarray,
    forward: Callable[..., torch.Tensor],
    *,
    description: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep what `forward` makes of some genes, wherever a cell has them.

    Memory: occurrences times what is kept of each, in float32.

    Parameters
    ----------
    wanted
        Which tokens, bool `(n_tokens,)`.

    Returns
    -------
    Cell and token of each occurrence, int64 `(n,)`, in the order of cells and ranks; and values, float32 `(n, k)`.
    """
    chosen = torch.from_numpy(wanted).to(model.device)
    cells, tokens, values = [], [], []
    for batch in run_cells(model, ids, lengths, forward=forward, description=description):
        here = batch.valid & chosen[batch.tokens]
        cells.append(np.repeat(batch.rows, here.sum(dim=1).cpu().numpy()))
        tokens.append(batch.tokens[here].cpu().numpy())
        values.append(batch.output[here].float().cpu().numpy())
    cell = np.concatenate(cells)
    order = np.argsort(cell, kind="stable")
    return cell[order], np.concatenate(tokens)[order], np.concatenate(values)[order]


def of_genes(
    model: Classifier,
    ids: np.ndarray,
    lengths: np.ndarray,
    vocabulary: Vocabulary,
    *,
    group: np.ndarray,
    n_groups: int,
    batch_size: int | None = None,
) -> np.ndarray:
    """Add up probabilities of every gene over the cells of each group.

    Memory: sums of groups × tokens × classes, however many cells there are.

    Returns
    -------
    Sum, sum of squares and number of cells, float64 `(3, n_groups, n_tokens, n_classes)`.
    """
    device, n_tokens, n_classes = model.device, len(vocabulary), model.head.n_logits
    sums = torch.zeros(3, n_groups * n_tokens, n_classes, dtype=sum_dtype(device), device=device)
    special = special_tokens(vocabulary, device)
    for batch in run_cells(
        model, ids, lengths, batch_size=batch_size, forward=probabilities, description="scoring genes"
    ):
        is_gene = batch.valid & ~special[batch.tokens]
        row = (torch.from_numpy(group[batch.rows]).to(device)[:, None] * n_tokens + batch.tokens)[is_gene]
        found = batch.output[is_gene].to(sums.dtype)
        for total, values in zip(sums, (found, found**2, torch.ones_like(found)), strict=True):
            total.index_add_(0, row, values)
    return sums.double().cpu().numpy().reshape(3, n_groups, n_tokens, n_classes)


def of_cells(
    model: Classifier,
    ids: np.ndarray,
    lengths: np.ndarray,
    vocabulary: Vocabulary,
    *,
    batch_size: int | None = None,
) -> np.ndarray:
    """Probability of each class of each task, float32 `(n_cells, n_logits)`; NaN for cells without tokens."""
    special = special_tokens(vocabulary, model.device)

    def forward(model: Classifier, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        is_gene = valid & ~special[tokens]
        return model.head.probabilities(model(tokens, mask_of(valid), is_gene=is_gene).logits)

    out = np.full((len(lengths), model.head.n_logits), np.nan, dtype=np.float32)
    for batch in run_cells(
        model, ids, lengths, batch_size=batch_size, forward=forward, description="classifying cells"
    ):
        out[batch.rows] = batch.output.cpu().numpy()
    return out
