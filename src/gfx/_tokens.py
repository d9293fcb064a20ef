"""Tokens of an AnnData: made from counts, or read back from where `pp.tokenize` put them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._adata import COUNTS, match_genes, obs_column, open_counts, row_blocks, to_counts, usable_calls
from gfx._core.ranking import rank_cells
from gfx._keys import token_keys
from gfx._log import info

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_array

    from gfx._adata import Counts, GeneMatch
    from gfx._core.vocabulary import Vocabulary


@dataclass(frozen=True)
class Tokens:
    """Rank value encodings of cells.

    Parameters
    ----------
    ids
        uint16, or uint32 for a vocabulary that needs it, `(n_cells, longest)`, padded with 0 on the right.
    lengths
        int32 `(n_cells,)`, special tokens included; 0 for a cell without any known gene.
    """

    ids: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class TokenReport:
    """What was recognised while counts became tokens.

    Parameters
    ----------
    match
        Which columns the model knows.
    counts_share
        Share of all counts that belong to these, from 0 to 1.
    n_empty
        Cells without any known gene.
    n_truncated
        Cells with more known genes than the model reads.
    """

    match: GeneMatch
    counts_share: float
    n_empty: int
    n_truncated: int


def make_tokens(
    adata: AnnData,
    vocabulary: Vocabulary,
    max_length: int,
    *,
    layer: str | None = None,
    use_raw: bool = False,
    gene_ids: str | None = None,
    counts: Counts = "raw",
    n_counts: str | None = None,
) -> tuple[Tokens, TokenReport]:
    """Encode all cells, a block of rows at a time; writes nothing."""
    if counts not in COUNTS:
        msg = f"`counts` is one of {list(COUNTS)}, found {counts!r}."
        raise ValueError(msg)
    if n_counts is not None and counts != "raw":
        msg = f"`n_counts={n_counts!r}` counts molecules, `counts={counts!r}` are none. Leave `n_counts` out."
        raise ValueError(msg)
    matrix = open_counts(adata, layer=layer, use_raw=use_raw, gene_ids=gene_ids)
    match = match_genes(matrix.names, vocabulary)
    totals = None if n_counts is None else _totals(adata, n_counts)
    n_detected = np.zeros(matrix.n_cells, dtype=np.int32)
    lengths = np.zeros(matrix.n_cells, dtype=np.int32)
    blocks: list[tuple[slice, np.ndarray]] = []
    known_counts = all_counts = 0.0
    for rows, stored in row_blocks(matrix.x):
        block = _checked_counts(adata, stored, counts, matrix.where)
        ranked = rank_cells(block, match.tokens, vocabulary, max_length)
        blocks.append((rows, ranked.tokens))
        lengths[rows] = ranked.lengths
        n_detected[rows] = ranked.n_detected
        known_counts += ranked.known_totals.sum()
        if totals is not None:
            _check_totals(adata, totals, rows, ranked.totals, n_counts)
        all_counts += (ranked.totals if totals is None else totals[rows]).sum()
    dtype = blocks[0][1].dtype if blocks else np.uint16
    ids = np.zeros((matrix.n_cells, int(lengths.max(initial=0))), dtype=dtype)
    while blocks:  # give each block back as soon as it is copied
        rows, block_ids = blocks.pop()
        ids[rows, : block_ids.shape[1]] = block_ids
    report = TokenReport(
        match=match,
        counts_share=float(known_counts / all_counts) if all_counts else 0.0,
        n_empty=int((lengths == 0).sum()),
        n_truncated=int((n_detected > max_length - n_specials(vocabulary)).sum()),
    )
    return Tokens(ids=ids, lengths=lengths), report


def n_specials(vocabulary: Vocabulary) -> int:
    """Count the special tokens in a cell: ``<cls>`` and ``<eos>``, or none."""
    return 2 if vocabulary.has_cls else 0


def _checked_counts(adata: AnnData, stored: csr_array, counts: Counts, where: str) -> csr_array:
    try:
        return to_counts(stored, counts, where)
    except ValueError as problem:
        usable = usable_calls(adata)
        if not usable:
            raise
        msg = f"{problem} {usable}"
        raise ValueError(msg) from None


def _totals(adata: AnnData, key: str) -> np.ndarray:
    column = obs_column(adata, key)
    if not pd.api.types.is_numeric_dtype(column.dtype):
        msg = f"`adata.obs[{key!r}]` holds {column.dtype}, not numbers: `n_counts` names the total counts of each cell."
        raise TypeError(msg)
    totals = column.to_numpy(dtype=np.float64, na_value=np.nan)
    if not (np.isfinite(totals).all() and (totals >= 0).all()):
        wrong = adata.obs_names[~(totals >= 0) | ~np.isfinite(totals)][:3].tolist()
        msg = (
            f"`adata.obs[{key!r}]` is not a positive number for the cells {wrong}; total counts are. "
            "Leave `n_counts` out to compute them."
        )
        raise ValueError(msg)
    return totals


def _check_totals(adata: AnnData, totals: np.ndarray, rows: slice, own: np.ndarray, key: str) -> None:
    less = np.flatnonzero(totals[rows] < own * (1 - 1e-6))
    if less.size:
        cell = rows.start + less[0]
        msg = (
            f"`adata.obs[{key!r}]` is {totals[cell]:g} for cell {adata.obs_names[cell]!r}, whose counts alone sum to "
            f"{own[less[0]]:g}: these are not the total counts of the cells. Leave `n_counts` out to compute them."
        )
        raise ValueError(msg)


def find_tokens(
    adata: AnnData, vocabulary: Vocabulary, max_length: int, *, layer: str | None = None, tokens_key: str | None = None
) -> Tokens:
    """Read the tokens that `pp.tokenize` wrote; make them on the fly where there are none.

    Raises
    ------
    KeyError
        There are no tokens of the name `tokens_key`.
    ValueError
        The stored tokens belong to another vocabulary or layer, are longer than the model reads, or were cut shorter.
        On the fly: the values are no raw counts, or the genes are not the model's.
    """
    keys = token_keys(tokens_key)
    if keys.obsm not in adata.obsm:
        if tokens_key is not None:
            msg = (
                f"Did not find {tokens_key!r} in `adata.obsm`. Run `gfx.pp.tokenize(adata, key_added={tokens_key!r})` "
                f"first. Present: {sorted(adata.obsm)}."
            )
            raise KeyError(msg)
        tokens, report = make_tokens(adata, vocabulary, max_length, layer=layer)
        info(
            f"Tokens made on the fly: {report.match.n_known:,} of {len(report.match.names):,} genes are in the "
            f"vocabulary {vocabulary.name!r}; they hold {report.counts_share:.1%} of the counts."
        )
        return tokens
    params = adata.uns.get(keys.uns, {}).get("params", {})
    made_for = params.get("vocabulary_sha256")
    if made_for != vocabulary.sha256:
        msg = (
            f"The tokens in `adata.obsm[{keys.obsm!r}]` were made for the vocabulary "
            f"{params.get('vocabulary', 'of an unknown model')!r}, this model reads {vocabulary.name!r}. Run "
            "`gfx.pp.tokenize(adata, model=...)` with the same model first."
        )
        raise ValueError(msg)
    if layer is not None and params.get("layer") != layer:
        msg = (
            f"The tokens in `adata.obsm[{keys.obsm!r}]` were made from {params.get('layer', 'X')!r}, you asked for "
            f"layer {layer!r}. Run `gfx.pp.tokenize(adata, layer={layer!r})` first, or leave `layer` out."
        )
        raise ValueError(msg)
    cut_at = params.get("max_length")
    ids = np.asarray(adata.obsm[keys.obsm])
    lengths = (ids != vocabulary.pad).sum(axis=1).astype(np.int32)
    if ids.shape[1] and lengths.max(initial=0) > max_length:
        msg = (
            f"The tokens in `adata.obsm[{keys.obsm!r}]` are up to {lengths.max()} long, this model reads {max_length}. "
            "Run `gfx.pp.tokenize(adata, model=...)` with the same model first."
        )
        raise ValueError(msg)
    if cut_at is not None and cut_at < max_length and (lengths == cut_at).any():
        msg = (
            f"The tokens in `adata.obsm[{keys.obsm!r}]` were cut at {cut_at}, this model reads {max_length}. "
            "Run `gfx.pp.tokenize(adata, model=...)` with the same model first."
        )
        raise ValueError(msg)
    return Tokens(ids=ids, lengths=lengths)
