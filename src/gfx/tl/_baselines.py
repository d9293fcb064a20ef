"""Baselines, which need no model: detection, expression, rank and fold change of genes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx import _log
from gfx._core.batching import pieces
from gfx._core.edits import ranks_of
from gfx._core.statistics import correlate_with_baselines, divided
from gfx._tokens import CountsNotAtHandError, counts_by_token

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from scipy.sparse import csr_array

    from gfx.tl._prepare import Prepared
    from gfx.tl._states import States

#: What counts are scaled to before the logarithm.
TARGET_SUM = 1e4

#: What scanpy adds to means before it divides them.
PSEUDOCOUNT = 1e-9

#: Columns of a table of controls.
CONTROL_COLUMNS = ("control", "measure", "statistic", "value", "n")


def find_baselines(
    cells: Prepared, lengths: np.ndarray, states: States | None, wanted: np.ndarray
) -> dict[str, np.ndarray]:
    """Describe every gene without the model, `(n_tokens,)` each; NaN where that is not known.

    In the cells that have `lengths`: `detection`, the share of cells whose encoding has the gene; `expression`, the
    mean logarithm of its normalised counts; `rank`, its mean rank where it is detected, 0 the first gene of a cell. And
    for the `wanted` tokens `logfc`, the log2 fold change from start to goal, as scanpy defines it.
    """
    detection, mean_rank = _detection_and_rank(cells, lengths)
    expression = fold = np.full(len(detection), np.nan)
    try:
        expression, fold = _expression(cells, lengths > 0, states, wanted)
    except CountsNotAtHandError as problem:
        _log.info(f"Expression is missing from the baselines, because there are no counts to read: {problem.args[0]}")
    return {"detection": detection, "expression": expression, "rank": mean_rank, "logfc": fold}


def baselines_of_sets(baselines: Mapping[str, np.ndarray], sets: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Means over the genes of each set."""
    return {name: np.array([values[genes].mean() for genes in sets], float) for name, values in baselines.items()}


def describe_genes(cells: Prepared, lengths: np.ndarray) -> np.ndarray:
    """Describe every gene by its detection and mean rank and, where counts are at hand, mean and variance of its log.

    Float64 `(n_tokens, 2 or 4)`; the rank of a gene that no cell has is 1, behind all others. `lengths` are numbers of
    tokens, 0 for cells to leave out.
    """
    detection, rank = _detection_and_rank(cells, lengths)
    columns = [detection, np.nan_to_num(rank, nan=1.0)]
    try:
        sums, n_cells = np.zeros((2, len(detection))), 0
        for rows, logs in log_counts(cells):
            chosen = logs[lengths[rows] > 0]
            n_cells += chosen.shape[0]
            sums += [np.asarray(values.sum(axis=0)).ravel() for values in (chosen, chosen.power(2))]
        mean, square = sums / max(n_cells, 1)
        columns += [mean, np.maximum(square - mean**2, 0)]
    except CountsNotAtHandError as problem:
        _log.info(f"Expression is missing from the baseline, because there are no counts to read: {problem.args[0]}")
    return np.column_stack(columns)


def log_counts(cells: Prepared) -> Iterator[tuple[slice, csr_array]]:
    """Walk over the cells' log-normalised counts by token, in blocks of rows."""
    for rows, counts, depth in counts_by_token(cells.adata, cells.model.vocabulary, cells.tokens.source):
        scale = np.divide(TARGET_SUM, depth, out=np.zeros_like(depth), where=depth > 0)
        yield rows, counts.multiply(scale[:, None]).log1p().tocsr()


def _detection_and_rank(cells: Prepared, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the cells that have each token, and its mean rank there from 0 to 1; NaN where none has it."""
    vocabulary, n_tokens = cells.model.vocabulary, len(cells.model.vocabulary)
    n_cells, ranks = np.zeros(n_tokens, dtype=np.int64), np.zeros(n_tokens)
    for rows in pieces(np.flatnonzero(lengths > 0)):
        ids = cells.tokens.padded(rows)
        cell, place = np.nonzero((np.arange(ids.shape[1]) < lengths[rows][:, None]) & ~vocabulary.is_special[ids])
        rank = ranks_of(place[:, None], lengths[rows][cell], vocabulary)
        n_cells += np.bincount(ids[cell, place], minlength=n_tokens)
        ranks += np.bincount(ids[cell, place], rank, minlength=n_tokens)
    return n_cells / max((lengths > 0).sum(), 1), divided(ranks, n_cells)


def _expression(
    cells: Prepared, perturbed: np.ndarray, states: States | None, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean log expression of every gene in the perturbed cells, and fold changes of the wanted ones."""
    vocabulary = cells.model.vocabulary
    total, of_states = np.zeros(len(vocabulary)), np.zeros((2, len(vocabulary)))
    for rows, logs in log_counts(cells):
        total += np.asarray(logs[perturbed[rows]].sum(axis=0)).ravel()
        if states is not None:
            for sums, state in zip(of_states, (states.is_start, states.is_goal), strict=True):
                np.add(sums, np.asarray(logs[state[rows]].sum(axis=0)).ravel(), out=sums)
    mean = total / max(perturbed.sum(), 1)
    fold = np.full(len(vocabulary), np.nan)
    if states is not None:
        n_cells = np.array([states.is_start.sum(), states.is_goal.sum()])
        if n_cells.min() > 1:  # scanpy compares no single cells
            start, goal = np.expm1(of_states[:, wanted] / n_cells[:, None]) + PSEUDOCOUNT
            fold[wanted] = np.log2(goal / start)  # as scanpy defines it: of means alone
    return mean, fold


def compare_with_baselines(
    effects: Mapping[str, np.ndarray], baselines: Mapping[str, np.ndarray]
) -> list[tuple[str, str, str, float, int]]:
    """Correlate rankings of genes with the baselines, alone and given the others: rows of a table of controls."""
    return [
        (row["baseline"], measure, f"{prefix}spearman", row[f"{prefix}spearman"], row[f"{prefix}n"])
        for measure, effect in effects.items()
        for row in correlate_with_baselines(effect, baselines)
        for prefix in ("", "partial_")
    ]
