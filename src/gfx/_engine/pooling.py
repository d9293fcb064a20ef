"""From hidden states to one vector per cell or per gene."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from gfx._engine.device import sum_dtype
from gfx._engine.forward import run_cells, states

if TYPE_CHECKING:
    from collections.abc import Callable

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
    report: Callable[[float], None] | None = None,
) -> np.ndarray:
    """Embed cells, float32 `(n_cells, d)`; NaN for cells without tokens."""
    out = np.full((len(lengths), encoder.config.hidden_size), np.nan, dtype=np.float32)
    special = special_tokens(vocabulary, encoder.device)
    for batch in run_cells(encoder, ids, lengths, batch_size=batch_size, report=report, description="embedding"):
        is_gene = batch.valid & ~special[batch.tokens]
        out[batch.rows] = pool(batch.output, is_gene, how).cpu().numpy()
    return out


def sum_genes(
    encoder: BertModel,
    ids: np.ndarray,
    lengths: np.ndarray,
    vocabulary: Vocabulary,
    *,
    group: np.ndarray,
    n_groups: int,
    forward: Callable[..., torch.Tensor] = states,
    width: int | None = None,
    report: Callable[[float], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Add up the hidden states of each gene, or what else `forward` makes of it, over the cells of each group.

    Parameters
    ----------
    group
        Group of each cell, int `(n_cells,)`; -1 leaves the cell out.
    width
        Size `d` of the values of one gene; `None` is that of hidden states.

    Returns
    -------
    Sums, float64 `(n_groups * n_tokens, d)`, and numbers of cells, int64 `(n_groups * n_tokens,)`, group by group.
    """
    device, n_tokens = encoder.device, len(vocabulary)
    width = width or encoder.config.hidden_size
    sums = torch.zeros(n_groups * n_tokens, width, dtype=sum_dtype(device), device=device)
    counts = torch.zeros(n_groups * n_tokens, dtype=torch.int64, device=device)
    special = special_tokens(vocabulary, device)
    lengths = np.where(group >= 0, lengths, 0)
    for batch in run_cells(encoder, ids, lengths, forward=forward, report=report, description="adding up genes"):
        is_gene = batch.valid & ~special[batch.tokens]
        row = torch.from_numpy(group[batch.rows]).to(device)[:, None] * n_tokens + batch.tokens
        sums.index_add_(0, row[is_gene], batch.output[is_gene].to(sums.dtype))
        counts += torch.bincount(row[is_gene], minlength=n_groups * n_tokens)
    return sums.double().cpu().numpy(), counts.cpu().numpy()


def mean_genes(sums: np.ndarray, counts: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Turn sums of :func:`sum_genes` into means, float32 `(n_groups, n_tokens, d)`; NaN where no cell has the gene.

    Numbers of cells, int64 `(n_groups, n_tokens)`, are returned beside them.
    """
    means = np.divide(sums, counts[:, None], out=np.full_like(sums, np.nan), where=counts[:, None] > 0)
    return means.astype(np.float32).reshape(n_groups, -1, sums.shape[1]), counts.reshape(n_groups, -1)
