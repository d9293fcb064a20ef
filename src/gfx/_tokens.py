"""Tokens of an AnnData: made from counts, or read back from where `pp.tokenize` put them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from gfx._adata import (
    COUNTS,
    GeneMatch,
    keeps_order,
    match_genes,
    obs_column,
    open_counts,
    read_counts,
    read_leniently,
    some_rows,
    to_counts,
    usable_calls,
)
from gfx._core.arguments import check_choice
from gfx._core.encodings import Encodings
from gfx._core.manifest import fingerprint
from gfx._core.ranking import rank_cells
from gfx._core.scales import SCALES, worse
from gfx._log import info
from gfx._results import TABLE, Slots, made_by

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from anndata import AnnData

    from gfx._adata import CountMatrix, Counts
    from gfx._core.vocabulary import Vocabulary

#: What was recognised: numbers, and a text of what is no gene.
Report = dict[str, int | float | str]

_FUNCTION = "pp.tokenize"
_DEFAULT = TABLE[_FUNCTION].default

#: What a record of tokens says about the counts they were made from.
_SOURCE = ("layer", "use_raw", "gene_ids", "counts", "max_length")


@dataclass(frozen=True)
class Tokens(Encodings):
    """Rank value encodings of cells, and what they were made from, as far as recorded."""

    source: Mapping[str, Any] = field(default_factory=dict)  # layer, use_raw, gene_ids, counts, max_length


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
    padded: bool = False,
) -> tuple[Tokens, Report]:
    """Encode all cells, a block of rows at a time, and report what was recognised; writes nothing.

    The cells lie one behind the other, or, `padded`, in rows that are all as long as the longest cell.
    """
    check_choice(counts, "counts", COUNTS)
    if n_counts is not None and counts != "raw":
        msg = f"`n_counts={n_counts!r}` counts molecules, `counts={counts!r}` are none. Leave `n_counts` out."
        raise ValueError(msg)
    matrix = open_counts(adata, layer=layer, use_raw=use_raw, gene_ids=gene_ids)
    match = match_genes(matrix.names, vocabulary, (adata.raw if use_raw else adata).var, gene_ids)
    totals = None if n_counts is None else _totals(adata, n_counts)
    n_cells = matrix.x.shape[0]
    lengths = np.zeros(n_cells, dtype=np.int32)
    blocks: list[tuple[slice, Encodings]] = []
    known_counts = all_counts = 0.0
    n_truncated, scale = 0, "empty"
    for rows, stored in matrix.blocks():
        read = read_counts(stored, counts, matrix.where)
        if read.problem:
            msg = f"{' '.join(read.problem)} {usable_calls(adata, matrix, counts)}".strip()
            raise ValueError(msg)
        scale = worse(scale, read.scale)
        ranked = rank_cells(read.counts, match.tokens, vocabulary, max_length)
        encoded = Encodings.of(ranked.tokens, ranked.lengths)
        blocks.append((rows, encoded if padded else encoded.without_padding()))
        lengths[rows] = ranked.lengths
        n_truncated += int((ranked.n_detected > max_length - vocabulary.n_specials).sum())
        known_counts += ranked.known_totals.sum()
        if totals is not None:
            _check_totals(adata, totals, rows, ranked.totals, n_counts)
        all_counts += (ranked.totals if totals is None else totals[rows]).sum()
    source = {"layer": layer, "use_raw": use_raw, "gene_ids": gene_ids, "counts": counts, "max_length": max_length}
    room = np.full(n_cells, lengths.max(initial=0), dtype=np.int64) if padded else lengths.astype(np.int64)
    tokens = Tokens(np.zeros(room.sum(), dtype=vocabulary.token_dtype), np.cumsum(room) - room, lengths, source)
    while blocks:  # give each block back as soon as it is copied
        rows, encoded = blocks.pop()
        for cell, row in zip(range(rows.start, rows.stop), encoded, strict=True):
            tokens[cell][:] = row
    report = {
        "n_cells": n_cells,
        "n_cells_empty": int((lengths == 0).sum()),
        "n_cells_truncated": n_truncated,
        "values": SCALES[scale],
        "keeps_order": keeps_order(scale, counts),
        "n_genes": len(match.names),
        "names_sha256": _of_names(matrix),
        "n_genes_recognised": match.n_known,
        "n_genes_repeated": match.n_repeated,
        "n_genes_made_unique": len(match.unique),
        "not_genes": ", ".join(filter(None, [matrix.genes.left_out, match.left_out])),
        "share_of_counts": float(known_counts / all_counts) if all_counts else 0.0,
    }
    return tokens, report


def recognised(report: Report, vocabulary: Vocabulary) -> str:
    """Say how many genes and counts the vocabulary holds, for the log."""
    others = f" Columns that are no genes were left out: {report['not_genes']}." if report["not_genes"] else ""
    return (
        f"{report['n_genes_recognised']:,} of {report['n_genes']:,} genes are in the vocabulary "
        f"{vocabulary.name!r}; they hold {report['share_of_counts']:.1%} of the counts.{others}"
    )


def _totals(adata: AnnData, key: str) -> np.ndarray:
    """Read the total counts of all cells, float64 `(n_obs,)`."""
    column = obs_column(adata, key)
    if not pd.api.types.is_numeric_dtype(column.dtype):
        msg = f"`adata.obs[{key!r}]` holds {column.dtype}, not numbers: `n_counts` names the total counts of each cell."
        raise TypeError(msg)
    totals = column.to_numpy(dtype=np.float64, na_value=np.nan)
    usable = np.isfinite(totals) & (totals >= 0)
    if not usable.all():
        msg = (
            f"`adata.obs[{key!r}]` is not a positive number for the cells {adata.obs_names[~usable][:3].tolist()}. "
            "Leave `n_counts` out to compute them."
        )
        raise ValueError(msg)
    return totals


def _check_totals(adata: AnnData, totals: np.ndarray, rows: slice, own: np.ndarray, key: str) -> None:
    """Refuse total counts of cells that are below the sums `own` of the counts in these rows."""
    less = np.flatnonzero(totals[rows] < own * (1 - 1e-6))
    if less.size:
        cell = rows.start + less[0]
        msg = (
            f"`adata.obs[{key!r}]` is {totals[cell]:g} for cell {adata.obs_names[cell]!r}, whose counts alone sum to "
            f"{own[less[0]]:g}: these are not the total counts of the cells. Leave `n_counts` out to compute them."
        )
        raise ValueError(msg)


class CountsNotAtHandError(ValueError):
    """The counts that tokens were made from are no longer where they were."""


def counts_by_token(
    adata: AnnData, vocabulary: Vocabulary, source: Mapping[str, Any]
) -> Iterator[tuple[slice, csr_array, np.ndarray]]:
    """Walk over the counts that tokens with this `source` came from: rows, counts `(n_rows, n_tokens)`, totals.

    Raises `CountsNotAtHandError` where they are no longer there, such as after normalisation.
    """
    try:
        place = {name: source[name] for name in ("layer", "use_raw", "gene_ids") if name in source}
        matrix = open_counts(adata, **place)
        to_token = _columns_to_tokens(matrix, vocabulary)
        for rows, stored in matrix.blocks():
            block = to_counts(stored, source.get("counts", "raw"), matrix.where)
            yield rows, block @ to_token, np.asarray(block.sum(axis=1), dtype=np.float64).ravel()
    except (KeyError, ValueError) as problem:
        raise CountsNotAtHandError(*problem.args) from problem


def _columns_to_tokens(matrix: CountMatrix, vocabulary: Vocabulary) -> csr_array:
    """Make the matrix that adds columns up by token, `(n_columns, n_tokens)`."""
    tokens = GeneMatch.of(matrix.names, vocabulary).tokens
    known = np.flatnonzero(tokens >= 0)
    return csr_array((np.ones(len(known)), (known, tokens[known])), shape=(len(tokens), len(vocabulary)))


def find_tokens(adata: AnnData, vocabulary: Vocabulary, max_length: int, *, layer: str | None = None) -> Tokens:
    """Read the tokens that `pp.tokenize` wrote for this model; make them on the fly where there are none at all.

    Raises `ValueError` where all stored tokens belong to another vocabulary or layer, are longer than the model reads,
    were cut shorter, or are not those of the counts; where those that fit are damaged; and, on the fly, where values or
    genes are not the model's.
    """
    problems = []
    others = [key for key in adata.uns if made_by(adata.uns[key]) == _FUNCTION and key != _DEFAULT]
    for key in (_DEFAULT, *others):  # the default one even if its record got lost
        slots, where = Slots(adata, _FUNCTION, key), f"The tokens in `adata.obsm[{key!r}]`"
        if not slots.has("obsm"):
            continue
        params = slots.uns["params"] if made_by(adata.uns.get(key)) else {}
        problem = _another_kind(where, params, vocabulary, layer) or _mixed_vocabularies(where, slots, vocabulary)
        if problem is None:
            stored = _stored(slots, vocabulary)
            problem = _another_length(where, params, stored.lengths, max_length) or _other_counts(
                where, slots, stored, vocabulary
            )
        if problem is None:
            if key != _DEFAULT:
                info(f"Tokens read from {key!r} (adata.obsm): they were made for this model's vocabulary.")
            source = {name: params[name] for name in _SOURCE if name in params}
            return Tokens(stored.values, stored.begins, stored.lengths, source)
        problems.append(problem)
    if problems:
        wanted = "" if layer is None else f", layer={layer!r}"
        msg = (
            f"{' '.join(problems)} Run `gfx.pp.tokenize(adata, model=...{wanted})` with the same model first; with "
            "`key_added=`, tokens of several models stay side by side."
        )
        raise ValueError(msg)
    tokens, report = make_tokens(adata, vocabulary, max_length, layer=layer)
    info(f"Tokens made on the fly: {recognised(report, vocabulary)}")
    return tokens


def _another_kind(where: str, params: Mapping[str, Any], vocabulary: Vocabulary, layer: str | None) -> str | None:
    """Say what is wrong where tokens were made for another vocabulary or from another layer."""
    if not {"vocabulary", "vocabulary_sha256", "max_length"} <= set(params):
        return (
            f"{where} have no full record of how they were made: `anndata.concat` drops `uns` unless called with "
            '`uns_merge="same"`, and then keeps what all tables agree on.'
        )
    if params["vocabulary_sha256"] != vocabulary.sha256:
        return f"{where} were made for the vocabulary {params['vocabulary']!r}, this model reads {vocabulary.name!r}."
    if layer is not None and params.get("layer") != layer:
        made_from = params.get("layer", "raw" if params.get("use_raw") else "X")
        return f"{where} were made from {made_from!r}, you asked for layer {layer!r}."
    return None


def vocabulary_mark(vocabulary: Vocabulary) -> str:
    """Name a vocabulary in each row of tokens, so that a join cannot mix two: the beginning of its checksum."""
    return vocabulary.sha256[:12]


def _mixed_vocabularies(where: str, slots: Slots, vocabulary: Vocabulary) -> str | None:
    """Say what is wrong where some cells were tokenized for another vocabulary than the record says."""
    if not slots.has("obs", "vocabulary"):
        return None
    marks = slots.read("obs", "vocabulary").dropna().astype(str)  # cells that joined without tokens are told below
    n_others = int((marks != vocabulary_mark(vocabulary)).sum())
    if n_others == 0:
        return None
    return (
        f"{where} were made for another vocabulary in {n_others:,} of {slots.adata.n_obs:,} cells: `anndata.concat` "
        f'with `uns_merge="first"` keeps one record for all (see `adata.obs[{slots.name("vocabulary")!r}]`).'
    )


def _another_length(where: str, params: Mapping[str, Any], lengths: np.ndarray, max_length: int) -> str | None:
    """Say what is wrong where tokens were made for a model that reads more, or fewer."""
    longest, cut_at = lengths.max(initial=0), params["max_length"]
    if longest > max_length:
        return f"{where} are up to {longest} long, this model reads {max_length}."
    if cut_at < max_length and longest == cut_at:
        return f"{where} were cut at {cut_at}, this model reads {max_length}."
    return None


#: How far values whose logarithm or division by depth was undone may be from the order of their counts, relative.
_ROUNDING = 0.02

#: Share of a cell's genes that may differ where genes were left out or renamed: a symbol may be that of another gene
#: than the id was, and of two columns of a gene one may be gone.
_RENAMED = 0.05


def _other_counts(where: str, slots: Slots, tokens: Encodings, vocabulary: Vocabulary) -> str | None:
    """Say what is wrong where the counts that tokens were made from were replaced, by a look at some cells.

    Tokens are their own fingerprint: each gene that is still a column of the object must be detected, and those in
    front must have the higher values. So cells and genes may be left out, and counts be normalised or logarithms,
    without harm. Values that are no counts in any form, such as scaled ones, are not compared.
    """
    params, report = slots.uns["params"], slots.uns.get("report", {})
    place = {name: params[name] for name in ("layer", "use_raw", "gene_ids") if name in params}
    n_cells, others, to_token = 0, [], None
    try:
        for rows, matrix in some_rows(slots.adata, **place):
            if to_token is None:
                tolerance = 0 if report.get("names_sha256") == _of_names(matrix) else _RENAMED
                to_token = _columns_to_tokens(matrix, vocabulary)
                has_column = np.bincount(to_token.indices, minlength=len(vocabulary)) > 0
            for block_rows, stored in matrix.blocks():
                first = rows.start + block_rows.start
                values, is_ordered = read_leniently(stored, params.get("counts", "raw"))
                if values is None:
                    return None
                values = (values @ to_token).toarray() / np.where(vocabulary.is_special, 1, vocabulary.medians)
                for cell, of_cell in enumerate(values, start=first):
                    is_cut = len(tokens[cell]) >= params["max_length"]
                    genes = tokens[cell][~vocabulary.is_special[tokens[cell]]]
                    genes = genes[has_column[genes]]
                    n = _n_misfits(genes, of_cell, is_cut=is_cut, is_ordered=is_ordered, tolerance=tolerance)
                    if n > tolerance * max(len(genes), 1 / _RENAMED):
                        others.append(cell)
                n_cells += len(values)
    except (KeyError, NotImplementedError, TypeError, ValueError):
        return None  # the counts are no longer there
    if not others:
        return None
    return (
        f"{where} are not those of the counts in `{matrix.where}`, which were changed since: of {n_cells:,} cells "
        f"looked at, {len(others):,} do not fit, such as {str(slots.adata.obs_names[others[0]])!r}. If the tokens are "
        "right and these values are others, keep the counts in a layer and tokenize from there (`layer=`)."
    )


def _of_names(matrix: CountMatrix) -> str:
    """Fingerprint of the names of all genes, in any order."""
    return fingerprint(np.sort(matrix.names))


def _n_misfits(genes: np.ndarray, values: np.ndarray, *, is_cut: bool, is_ordered: bool, tolerance: float) -> int:
    """Count the genes by which an encoding differs from that of a cell, by the value of each token over its median."""
    own = values[genes]
    n = int((own <= 0).sum())
    if is_ordered:
        rest = values.copy()
        rest[genes] = 0
        n += int(((own[1:] > own[:-1] * (1 + _ROUNDING)) & (own[:-1] > 0)).sum())
        if not is_cut:
            n += int((rest > 0).sum())
        elif len(genes):
            n += int((rest > np.quantile(own, tolerance) * (1 + _ROUNDING)).sum())
    return n


def _stored(slots: Slots, vocabulary: Vocabulary) -> Encodings:
    """Read tokens, and refuse what is not as it was written."""
    where = f"`adata.obsm[{slots.key!r}]`"
    ids = np.asarray(slots.read("obsm"))
    if ids.dtype.kind == "f":  # an outer join fills with NaN
        ids = np.where(np.isnan(ids), vocabulary.pad, ids)
    whole = ids.dtype.kind in "iu" or (ids.dtype.kind == "f" and np.array_equal(ids, np.trunc(ids)))
    if not whole or ids.min(initial=0) < 0 or ids.max(initial=0) >= len(vocabulary):
        found = f"{ids.dtype}" + (f" from {ids.min():g} to {ids.max():g}" if ids.dtype.kind in "iuf" else "")
        msg = (
            f"{where} holds {found}: tokens of the vocabulary {vocabulary.name!r} are whole numbers from 0 to "
            f"{len(vocabulary) - 1}. Run `gfx.pp.tokenize` again."
        )
        raise ValueError(msg)
    if ids.dtype.kind == "f":
        ids = ids.astype(vocabulary.token_dtype)
    lengths = (ids != vocabulary.pad).sum(axis=1)
    if slots.has("obs", "n") and not np.array_equal(slots.read("obs", "n"), lengths):
        n = int((slots.read("obs", "n") != lengths).sum())
        msg = (
            f"The tokens of {n:,} cells in {where} have been cut, as `anndata.concat` does with tables of different "
            f"width; `adata.obs[{slots.name('n')!r}]` says how many there were. Use `join='outer'` or run "
            "`gfx.pp.tokenize` again."
        )
        raise ValueError(msg)
    return Encodings.of(ids, lengths)
