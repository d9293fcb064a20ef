"""Batches of cells of similar length, so that little padding is computed; and batches under way in other threads."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from concurrent.futures import Future

T = TypeVar("T")


def batches_by_length(lengths: np.ndarray, max_tokens: int, *, mixed_tokens: int | None = None) -> list[np.ndarray]:
    """Cut cells into batches, longest cells first, so that memory runs out at once or never.

    Parameters
    ----------
    lengths
        Tokens of each cell, int `(n_cells,)`; cells of length 0 are left out.
    max_tokens
        Cells times longest cell of a batch stays within this; a longer cell makes a batch of its own.
    mixed_tokens
        Cells of different lengths share a batch only until it has so many tokens.

    Returns
    -------
    Row numbers of each batch; every cell that has tokens is in exactly one.
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    descending = -lengths[order]
    batches, start = [], 0
    while start < len(order):
        longest = -int(descending[start])
        limits = [max_tokens // longest]
        if mixed_tokens is not None:
            n_alike = int(np.searchsorted(descending, -longest, "right")) - start
            limits.append(max(n_alike, mixed_tokens // longest))
        n = max(1, min(limits))
        batches.append(order[start : start + n])
        start += n
    return batches


def pieces(rows: np.ndarray, size: int = 1024) -> list[np.ndarray]:
    """Cut rows into pieces of so many, for instance so that nothing about all of them is in memory at once."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def ahead(futures: Iterable[tuple[T, Future[Any]]], most: int) -> Iterator[tuple[T, Any]]:
    """Give what is computed with its result, in order; no more than `most` are under way or wait to be taken."""
    waiting: deque[tuple[T, Future[Any]]] = deque()
    try:
        for submitted in futures:
            waiting.append(submitted)
            if len(waiting) >= most:
                what, future = waiting.popleft()
                yield what, future.result()
        while waiting:
            what, future = waiting.popleft()
            yield what, future.result()
    finally:
        for _, future in waiting:
            future.cancel()
