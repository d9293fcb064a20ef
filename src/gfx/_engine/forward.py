"""One generator runs cells through an encoder, in batches of similar length."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from gfx import _log
from gfx._core.batching import batches_by_length
from gfx._engine.device import batch_tokens, halving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import BertModel

#: Where there is one, it is told the number of cells of each batch that is finished, and no bar is shown for batches.
batch_listener: ContextVar[Callable[[int], object] | None] = ContextVar("batch_listener", default=None)


class Batch(NamedTuple):
    """Some cells and what a forward pass made of them.

    `rows` are the numbers of the cells, `(b,)`. On the device: `tokens`, int64 `(b, l)`; `valid`, which positions are
    no padding, bool `(b, l)`; and `output`, what the forward pass returned: by default hidden states, `(b, l, d)`.
    """

    rows: np.ndarray
    tokens: torch.Tensor
    valid: torch.Tensor
    output: Any


def states(encoder: BertModel, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Run the encoder, `(b, l)` -> `(b, l, d)`."""
    return encoder(input_ids=tokens, attention_mask=mask_of(valid)).last_hidden_state


def mask_of(valid: torch.Tensor) -> torch.Tensor | None:
    """Say which positions may be attended to; a batch without padding needs no mask."""
    return None if bool(valid.all()) else valid.long()


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
    max_pairs: int | None = None,
    forward: Callable[[BertModel, torch.Tensor, torch.Tensor], Any] = states,
    description: str = "cells",
) -> Iterator[Batch]:
    """Yield what `forward` makes of all cells that have tokens, longest cells first.

    `max_pairs` limits the padded pairs of positions in a batch, for a `forward` that makes something for each pair;
    `description` is that of the progress bar.
    """
    device, listener = encoder.device, batch_listener.get()

    def run(rows: np.ndarray) -> Batch:
        tokens, valid = put_cells(ids, lengths, rows, device)
        return Batch(rows, tokens, valid, forward(encoder, tokens, valid))

    is_hidden = listener is not None or not _log.shows_progress()
    shown = {"desc": description, "unit": "cell", "leave": False, "delay": 1, "disable": is_hidden}
    with tqdm(total=int((lengths > 0).sum()), **shown) as bar:
        for rows, batch in halving(batches_by_length(lengths, batch_tokens(device), max_pairs), run):
            yield batch
            (listener or bar.update)(len(rows))
