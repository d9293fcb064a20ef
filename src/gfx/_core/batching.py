"""Batches of cells of similar length, so that little padding is computed."""

from __future__ import annotations

import numpy as np


def batches_by_length(lengths: np.ndarray, max_tokens: int, max_cells: int | None = None) -> list[np.ndarray]:
    """Cut cells into batches, longest cells first, so that memory runs out at once or never.

    Parameters
    ----------
    lengths
        Tokens of each cell, int `(n_cells,)`; cells of length 0 are left out.
    max_tokens
        Cells times longest cell of a batch stays within this; a longer cell makes a batch of its own.
    max_cells
        Cells in a batch at most.

    Returns
    -------
    Row numbers of each batch; every cell that has tokens is in exactly one.

    Raises
    ------
    ValueError
        `max_tokens` or `max_cells` below 1.
    """
    if max_tokens < 1 or (max_cells is not None and max_cells < 1):
        msg = f"A batch holds at least one cell and one token; found {max_cells} cells, {max_tokens} tokens at most."
        raise ValueError(msg)
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    batches = []
    start = 0
    while start < len(order):
        n = max(1, max_tokens // int(lengths[order[start]]))
        if max_cells is not None:
            n = min(n, max_cells)
        batches.append(order[start : start + n])
        start += n
    return batches
