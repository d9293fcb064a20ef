"""From hidden states to one vector per cell or per gene."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from gfx._engine.device import sum_dtype
from gfx._engine.forward import run_cells

if TYPE_CHECKING:
    from transformers import BertModel

    from gfx._core.vocabulary import Vocabulary

Pooling = Literal["mean", "cls"]


def special_tokens(vocabulary: Vocabulary, device: torch.device) -> torch.Tensor:
    """Which tokens are not genes, bool `(n_tokens,)` on the device."""
    return torch.from_numpy(vocabulary.is_special).to(device)


def pool(hidden: torch.Tensor, is_gene: torch.Tensor, how: Pooling) -> torch.Tensor:
    """Cell vectors in float32, `(b, l, d)` -> `(b, d)`: the first position, or the mean over genes."""
    if how == "cls":
        return hidden[:, 0].float()
    weight = is_gene.float()
    return torch.einsum("bld,bl->bd", hidden.float(), weight) / weight.sum(1, keepdim=True).clamp(min=1)


def embed_cells(
    encoder: BertModel,
    ids: np.ndarray,
    lengths: np.ndarray,
    vocabulary: Vocabulary,
    *,
    how: Pooling,
    batch_size: int | None = None,
) -> np.ndarray:
    """Embed cells, float32 `(n_cells, d)`; NaN for cells without tokens."""
    out = np.full((len(lengths), encoder.config.hidden_size), np.nan, dtype=np.float32)
    special = special_tokens(vocabulary, encoder.device)
    for batch in run_cells(encoder, ids, lengths, batch_size=batch_size, description="embedding"):
        is_gene = batch.valid & ~special[batch.tokens]
        out[batch.rows] = pool(batch.output, is_gene, how).cpu().numpy()
    return out


def embed_genes(
    encoder: BertModel,
    ids: np.ndarray,
    lengths: np.ndarray,
    vocabulary: Vocabulary,
    *,
    group: np.ndarray,
    n_groups: int,
    batch_size: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean hidden state of each gene over the cells of each group.

    Memory: one running sum of groups × tokens × width, however many cells there are.

    Parameters
    ----------
    group
        Group of each cell, int `(n_cells,)`; -1 leaves the cell out.

    Returns
    -------
    Means, float32 `(n_groups, n_tokens, d)`, NaN where no cell has the gene; number of cells, int64
    `(n_groups, n_tokens)`.
    """
    device, width, n_tokens = encoder.device, encoder.config.hidden_size, len(vocabulary)
    sums = torch.zeros(n_groups * n_tokens, width, dtype=sum_dtype(device), device=device)
    counts = torch.zeros(n_groups * n_tokens, dtype=torch.int64, device=device)
    special = special_tokens(vocabulary, device)
    lengths = np.where(group >= 0, lengths, 0)
    for batch in run_cells(encoder, ids, lengths, batch_size=batch_size, description="embedding genes"):
        is_gene = batch.valid & ~special[batch.tokens]
        row = torch.from_numpy(group[batch.rows]).to(device)[:, None] * n_tokens + batch.tokens
        sums.index_add_(0, row[is_gene], batch.output[is_gene].to(sums.dtype))
        counts += torch.bincount(row[is_gene], minlength=n_groups * n_tokens)
    means = (sums / counts[:, None]).float().cpu().numpy().reshape(n_groups, n_tokens, width)
    return means, counts.cpu().numpy().reshape(n_groups, n_tokens)
