"""From hidden states to one vector per cell or per gene."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from gfx._core.statistics import add_up
from gfx._engine.device import sum_dtype
from gfx._engine.forward import run_cells, states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

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
    encoder: BertModel, ids: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary, *, how: Pooling
) -> np.ndarray:
    """Embed cells, float32 `(n_cells, d)`; NaN for cells without tokens."""
    out = np.full((len(lengths), encoder.config.hidden_size), np.nan, dtype=np.float32)
    special = special_tokens(vocabulary, encoder.device)
    forward = partial(states, only_first=how == "cls")
    for batch in run_cells(encoder, ids, lengths, forward=forward, description="embedding"):
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
) -> dict[str, np.ndarray]:
    """Add up the hidden states of each gene, or what else `forward` makes of it, over the cells of each group.

    Parameters
    ----------
    group
        Group of each cell, int `(n_cells,)`; -1 leaves the cell out.
    width
        Size `d` of the values of one gene; `None` is that of hidden states.

    Returns
    -------
    Of the slots ``group * n_tokens + token`` those that occur: `slot`, int64 `(n,)`, `sum`, float64 `(n, d)`, and the
    number of cells, `n`, int64 `(n,)`.
    """
    special = special_tokens(vocabulary, encoder.device)
    sums = GeneSums(n_groups, len(vocabulary), width or encoder.config.hidden_size, encoder.device)
    for batch in run_cells(encoder, ids, np.where(group >= 0, lengths, 0), forward=forward):
        is_gene = batch.valid & ~special[batch.tokens]
        sums.add(torch.from_numpy(group[batch.rows]).to(encoder.device), batch.tokens, is_gene, batch.output)
    return sums.sums()


class GeneSums:
    """Sums over cells of values of each gene, `width` numbers each, in each group."""

    def __init__(self, n_groups: int, n_tokens: int, width: int, device: torch.device) -> None:
        self.n_tokens = n_tokens
        self.total = torch.zeros(n_groups * n_tokens, width, dtype=sum_dtype(device), device=device)
        self.count = torch.zeros(n_groups * n_tokens, dtype=torch.int64, device=device)

    def add(self, group: torch.Tensor, tokens: torch.Tensor, is_gene: torch.Tensor, values: torch.Tensor) -> None:
        """Add cells of some groups, `(n,)`: their tokens, which of these are genes, and the values of all, `(n, l)`."""
        slot = (group[:, None] * self.n_tokens + tokens)[is_gene]
        self.total.index_add_(0, slot, values[is_gene].to(self.total.dtype))
        self.count.index_add_(0, slot, torch.ones_like(slot))

    def sums(self) -> dict[str, np.ndarray]:
        """Take what :func:`sum_genes` returns."""
        count = self.count.cpu().numpy()
        slot = np.flatnonzero(count)  # chosen here: the device may have no room for a second copy
        return {"slot": slot, "sum": self.total.cpu().double().numpy()[slot], "n": count[slot]}


def sums_of_genes(results: Iterable[Mapping[str, np.ndarray]], n_slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Add up results of :func:`sum_genes`: float64 `(n_slots, d)`, and numbers of cells, int64 `(n_slots,)`."""
    totals = add_up(results, n_slots)
    return totals["sum"], totals["n"]


def mean_genes(sums: np.ndarray, counts: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Turn what :func:`sums_of_genes` gives into means in each group and, last, in all; NaN where no cell has a gene.

    Means are float32 `(n_groups + 1, n_tokens, d)`; numbers of cells, int64, `(n_groups + 1, n_tokens)`.
    """
    sums, counts = sums.reshape(n_groups, -1, sums.shape[1]), counts.reshape(n_groups, -1)
    sums, counts = (np.concatenate([values, values.sum(axis=0, keepdims=True)]) for values in (sums, counts))
    means = np.full(sums.shape, np.nan, dtype=np.float32)
    return np.divide(sums, counts[..., None], out=means, where=counts[..., None] > 0), counts
