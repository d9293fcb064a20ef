"""One generator runs cells through an encoder, in batches of similar length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from gfx import _log
from gfx._core.batching import batches_by_length
from gfx._engine.device import batch_tokens, halving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import BertModel


@dataclass(frozen=True)
class Batch:
    """Some cells and what a forward pass made of them.

    Parameters
    ----------
    rows
        Which cells, `(b,)`.
    tokens
        int64 `(b, l)` on the device.
    valid
        Which positions are not padding, bool `(b, l)` on the device.
    output
        What the forward pass returned: by default hidden states, `(b, l, d)` on the device.
    """

    rows: np.ndarray
    tokens: torch.Tensor
    valid: torch.Tensor
    output: Any


def states(
    encoder: BertModel, tokens: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Run the encoder, `(b, l)` -> `(b, l, d)`.

    Without `positions`, `(b, l)`, every token stands where it is.
    """
    return encoder(input_ids=tokens, attention_mask=mask_of(valid), position_ids=positions).last_hidden_state


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
    batch_size: int | None = None,
    max_pairs: int | None = None,
    forward: Callable[[BertModel, torch.Tensor, torch.Tensor], Any] = states,
    report: Callable[[float], None] | None = None,
    description: str = "cells",
) -> Iterator[Batch]:
    """Yield what `forward` makes of all cells that have tokens, longest cells first.

    Parameters
    ----------
    ids, lengths
        Tokens `(n_cells, longest)` and lengths `(n_cells,)`.
    batch_size
        Cells in a batch at most; `None` leaves it to the number of tokens.
    max_pairs
        Padded pairs of positions in a batch at most; for a `forward` that makes something for each pair.
    forward
        Function of the encoder, tokens `(b, l)` and validity `(b, l)`.
    report
        Is told the finished share of the cells, from 0 to 1; `None` shows a bar instead, named by `description`.
    """
    device = encoder.device
    batches = batches_by_length(lengths, batch_tokens(device), batch_size, max_pairs)

    def run(rows: np.ndarray) -> Batch:
        tokens, valid = put_cells(ids, lengths, rows, device)
        return Batch(rows, tokens, valid, forward(encoder, tokens, valid))

    n_cells = int((lengths > 0).sum())
    hidden = report is not None or not _log.shows_progress()
    with tqdm(total=n_cells, desc=description, unit="cell", leave=False, delay=1, disable=hidden) as bar:
        n_finished = 0
        for rows, batch in halving(batches, run):
            yield batch
            bar.update(len(rows))
            n_finished += len(rows)
            if report is not None:
                report(n_finished / n_cells)
