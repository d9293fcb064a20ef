"""One generator runs cells through an encoder, in batches of similar length."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from gfx import _log
from gfx._engine.blocks import blocks_of, embed
from gfx._engine.device import halving, n_workers, passes, workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import BertModel

#: Where there is one, it is told the number of passes of each batch that is finished, and no bar is shown for batches.
batch_listener: ContextVar[Callable[[int], object] | None] = ContextVar("batch_listener", default=None)


def tell(n_passes: int) -> None:
    """Tell the listener, if there is one, that a batch of so many passes is finished."""
    if (listener := batch_listener.get()) is not None:
        listener(n_passes)


class Batch(NamedTuple):
    """Some cells and what a forward pass made of them.

    `rows` are the numbers of the cells, `(b,)`. On the device: `tokens`, int64 `(b, l)`; `valid`, which positions are
    no padding, bool `(b, l)`; and `output`, what the forward pass returned: by default hidden states, `(b, l, d)`.
    """

    rows: np.ndarray
    tokens: torch.Tensor
    valid: torch.Tensor
    output: Any


def states(encoder: BertModel, tokens: torch.Tensor, valid: torch.Tensor, *, only_first: bool = False) -> torch.Tensor:
    """Run the encoder, `(b, l)` -> `(b, l, d)`; `(b, 1, d)` of the first position alone, which costs a layer less."""
    blocks, padding = blocks_of(encoder), None if bool(valid.all()) else valid
    hidden = embed(encoder, tokens)
    for block in blocks[: len(blocks) - only_first]:
        hidden = block.run(hidden, valid=padding)
    if only_first:
        return blocks[-1].run_first(hidden, valid=padding) if blocks else hidden[:, :1]
    return hidden


def put_cells(
    ids: np.ndarray, lengths: np.ndarray, rows: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put some cells on the device: tokens, int64 `(b, l)`, and which positions are not padding, bool `(b, l)`."""
    longest = int(lengths[rows].max())
    tokens = torch.from_numpy(ids[rows, :longest].astype(np.int64)).to(device)
    return tokens, torch.arange(longest, device=device) < torch.from_numpy(lengths[rows]).to(device)[:, None]


@torch.inference_mode()
def run_cells(
    encoder: BertModel,
    ids: np.ndarray,
    lengths: np.ndarray,
    *,
    forward: Callable[[BertModel, torch.Tensor, torch.Tensor], Any] = states,
    description: str = "cells",
) -> Iterator[Batch]:
    """Yield what `forward` makes of all cells that have tokens, longest cells first.

    On a CPU each of several workers runs a batch of its own. `description` is that of the progress bar.
    """
    device, listener = encoder.device, batch_listener.get()

    @torch.inference_mode()  # which holds for one thread only
    def run(rows: np.ndarray) -> Batch:
        tokens, valid = put_cells(ids, lengths, rows, device)
        return Batch(rows, tokens, valid, forward(encoder, tokens, valid))

    bar = _log.progress(int((lengths > 0).sum()), description, "cell", is_hidden=listener is not None)
    with bar, workers(n_workers(device)) as mapped:
        for rows, batch in halving(passes(lengths, device), run, mapped):
            yield batch
            (listener or bar.update)(len(rows))
