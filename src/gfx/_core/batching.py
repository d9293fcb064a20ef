"""Batches of cells of similar length, so that little padding is computed."""

from __future__ import annotations

import numpy as np


def batches_by_length(
    lengths: np.ndarray, max_tokens: int, max_cells: int | None = None, max_pairs: int | None = None
) -> list[np.ndarray]:
    """Cut cells into batches, longest cells first, so that memory runs out at once or never.

    Parameters
    ----------
    lengths
        Tokens of each cell, int `(n_cells,)`; cells of length 0 are left out.
    max_tokens
        Cells times longest cell of a batch stays within this; a longer cell makes a batch of its own.
    max_cells
        Cells in a batch at most.
    max_pairs
        Pairs of positions: cells times the square of the longest cell stays within this, too.

    Returns
    -------
    Row numbers of each batch; every cell that has tokens is in exactly one.

    Raises
    ------
    ValueError
        A limit below 1.
    """
    if any(limit is not None and limit < 1 for limit in (max_tokens, max_cells, max_pairs)):
        msg = (
            "A batch holds at least one cell and one token; "
            f"found {max_cells} cells, {max_tokens} tokens, {max_pairs} pairs at most."
        )
        raise ValueError(msg)
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    batches = []
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        n = max_tokens // longest
        if max_cells is not None:
            n = min(n, max_cells)
        if max_pairs is not None:
            n = min(n, max_pairs // longest**2)
        n = max(n, 1)
        batches.append(order[start : start + n])
        start += n
    return batches
