"""Tokens of an AnnData: made from counts, or read back from where `pp.tokenize` put them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gfx._adata import COUNTS, match_genes, obs_column, open_counts, row_blocks, to_counts
from gfx._core.ranking import rank_encode
from gfx._keys import token_keys

if TYPE_CHECKING:
    from anndata import AnnData

    from gfx._adata import Counts, GeneMatch
    from gfx._core.vocabulary import Vocabulary


@dataclass(frozen=True)
class Tokens:
    """Rank value encodings of cells.

    Parameters
    ----------
    ids
        uint16 `(n_cells, longest)`, padded with 0 on the right.
    lengths
        int32 `(n_cells,)`, special tokens included; 0 for a cell without any known gene.
    """

    ids: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class TokenReport:
    """What was recognised while counts became tokens."""

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
    matrix = open_counts(adata, layer=layer, use_raw=use_raw, gene_ids=gene_ids)
    match = match_genes(matrix.names, vocabulary)
    totals = None if n_counts is None else obs_column(adata, n_counts).to_numpy(dtype=np.float64)
    n_specials = 2 if vocabulary.has_cls else 0
    lengths = np.zeros(matrix.n_cells, dtype=np.int32)
    blocks: list[tuple[slice, np.ndarray]] = []
    known_counts = all_counts = 0.0
    n_truncated = 0
    known = match.known.astype(np.float64)
    for rows, stored in row_blocks(matrix.x):
        block = to_counts(stored, counts, matrix.where)
        ids, lengths[rows] = rank_encode(block, match.tokens, vocabulary, max_length)
        blocks.append((rows, ids))
        recognised = block @ known
        total = np.asarray(block.sum(axis=1)).ravel() if totals is None else totals[rows]
        known_counts += float(recognised.sum())
        all_counts += float(total.sum())
        n_truncated += int((lengths[rows] == max_length).sum()) if ids.size else 0
    dtype = blocks[0][1].dtype if blocks else np.uint16
    ids = np.zeros((matrix.n_cells, int(lengths.max(initial=0))), dtype=dtype)
    while blocks:  # give each block back as soon as it is copied
        rows, block_ids = blocks.pop()
        ids[rows, : block_ids.shape[1]] = block_ids
    report = TokenReport(
        match=match,
        counts_share=known_counts / all_counts if all_counts else 0.0,
        n_empty=int((lengths <= n_specials).sum()),
        n_truncated=n_truncated,
    )
    return Tokens(ids=ids, lengths=lengths), report


def find_tokens(
    adata: AnnData, vocabulary: Vocabulary, max_length: int, *, layer: str | None = None, tokens_key: str | None = None
) -> Tokens:
    """Read the tokens that `pp.tokenize` wrote; make them on the fly where there are none.

    Raises
    ------
    ValueError
        The stored tokens belong to another vocabulary, or are longer than the model reads.
    """
    keys = token_keys(tokens_key)
    if keys.obsm not in adata.obsm:
        if tokens_key is not None:
            msg = (
                f"Did not find {tokens_key!r} in `adata.obsm`. Run `gfx.pp.tokenize(adata, key_added={tokens_key!r})` "
                f"first. Present: {sorted(adata.obsm)}."
            )
            raise KeyError(msg)
        return make_tokens(adata, vocabulary, max_length, layer=layer)[0]
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
    ids = np.asarray(adata.obsm[keys.obsm])
    lengths = (ids != vocabulary.pad).sum(axis=1).astype(np.int32)
    if ids.shape[1] and lengths.max() > max_length:
        msg = (
            f"The tokens in `adata.obsm[{keys.obsm!r}]` are up to {lengths.max()} long, this model reads {max_length}. "
            "Run `gfx.pp.tokenize(adata, model=...)` with the same model first."
        )
        raise ValueError(msg)
    return Tokens(ids=ids, lengths=lengths)
