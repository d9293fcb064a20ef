"""Check whether a model can read cells, and report as a table."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._adata import (
    ANOTHER_ORDER,
    COUNTS,
    GeneMatch,
    better_column,
    genes_problem,
    keeps_order,
    named_better,
    open_counts,
    pick,
    read_counts,
    usable_calls,
)
from gfx._core.arguments import check_choice
from gfx._core.gene_names import Species, foreign_species, name_kinds, plain_date, without_genome
from gfx._core.ranking import rank_cells
from gfx._core.scales import SCALES, UNDO, survey, worse
from gfx._core.vocabulary import plain_id
from gfx._docs import shared
from gfx._log import info
from gfx.pp._tokenize import LOW_SHARE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

    from gfx._adata import CountMatrix, Counts
    from gfx._core.vocabulary import Vocabulary
    from gfx._types import Data, ModelLike

#: Cells with fewer recognised genes than this are hard to separate.
_FEW_GENES = 200

_KINDS = {"none": "without a name", "Ensembl": "Ensembl ids", "number": "numbers", "symbol": "symbols"}


@shared()
def check(
    adata: Data,
    *,
    model: ModelLike | None = None,
    layer: str | None = None,
    use_raw: bool = False,
    gene_ids: str | None = None,
    counts: Counts = "raw",
    mod: str | None = None,
) -> pd.DataFrame:
    """Check whether a model can read these cells: their values, genes and lengths.

    Call this function before any other on new data. It prints its findings as a table and writes nothing. It reads
    every row once, a block of rows at a time.

    Parameters
    ----------
    adata
        Cells × genes.
    {model}
    {layer}
    {use_raw}
    {gene_ids}
    counts
        What the values are, as in :func:`gfx.pp.tokenize`.
    {mod}

    Returns
    -------
    A table with one row per finding and the text columns `check` (what was checked), `status` (``"ok"``,
    ``"warning"``, or ``"error"`` where :func:`gfx.pp.tokenize` would stop), `found` and `advice`.

    Raises
    ------
    KeyError
        There is no such layer, column or modality.
    ValueError
        There is no `X` or `raw`; the matrix is damaged; no variable is of the type gene expression
        (`var["feature_types"]`); or a MuData has several modalities and `mod` is not given.

    Examples
    --------
    >>> import scanpy as sc
    >>> import gfx
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> findings = gfx.pp.check(adata, model="mini", use_raw=True, counts="log1p")
    >>> findings["found"][0]
    'log-normalised counts in `adata.raw.X`, up to 6.489'
    """
    from gfx.models import load

    cells = pick(adata, mod)
    matrix = open_counts(cells, layer=layer, use_raw=use_raw, gene_ids=gene_ids)
    loaded = load(model)
    vocabulary = loaded.vocabulary
    match = GeneMatch.of(matrix.names, vocabulary)
    check_choice(counts, "counts", COUNTS)
    seen = _look(matrix, match, vocabulary, counts)
    better = better_column(cells.raw.var if use_raw else cells.var, match, vocabulary, gene_ids)
    findings = [
        _about_values(cells, matrix, seen, counts),
        _about_names(match, vocabulary),
        _about_others(matrix, match),
        *_about_genes(match, vocabulary, seen, better),
        *_about_cells(seen.n_detected, loaded.max_length - vocabulary.n_specials),
    ]
    table = pd.DataFrame(findings, columns=["check", "status", "found", "advice"], dtype=object)
    info(f"{cells.n_obs:,} cells × {len(matrix.names):,} genes in `{matrix.where}`, for {loaded!r}")
    info(_as_text(table))
    return table


@dataclass
class _Seen:
    """What one walk over the rows showed."""

    n_detected: np.ndarray  # known genes of each cell
    of_genes: np.ndarray  # sum of the counts of each gene
    scale: str = "empty"
    problem: str | None = None  # why the values cannot be read, as `pp.tokenize` says it
    highest: float = 0.0


def _look(matrix: CountMatrix, match: GeneMatch, vocabulary: Vocabulary, counts: Counts) -> _Seen:
    seen = _Seen(np.zeros(matrix.x.shape[0], dtype=np.int32), np.zeros(len(match.names)))
    for rows, stored in matrix.blocks():
        read = read_counts(stored, counts, matrix.where)
        scale = worse(seen.scale, read.scale)
        if read.problem and (scale != seen.scale or not seen.problem):
            seen.problem = " ".join(read.problem)
        seen.scale = scale
        seen.highest = max(seen.highest, survey(np.nan_to_num(stored.data, posinf=0.0))[1])
        block = read.counts
        if read.problem:  # values that are not what was said still show which genes were detected
            values = np.nan_to_num(block.data, posinf=0.0, neginf=0.0).clip(min=0)
            block.data = UNDO[read.scale](values) if read.scale in UNDO else values
        seen.n_detected[rows] = rank_cells(block, match.tokens, vocabulary, vocabulary.n_specials + 1).n_detected
        seen.of_genes += np.bincount(block.indices, block.data, minlength=len(match.names))
    return seen


Finding = tuple[str, str, str, str]


def _finding(check: str, found: str, advice: str, status: str = "warning", *, when: object = True) -> Finding:
    """Make a row of the table, with advice and status where the advice is needed, else ``"ok"`` and no advice."""
    return (check, status, found, advice) if when and advice else (check, "ok", found, "")


def _about_values(adata: AnnData, matrix: CountMatrix, seen: _Seen, counts: Counts) -> Finding:
    found = f"{SCALES[seen.scale]} in `{matrix.where}`, up to {seen.highest:.4g}"
    if seen.problem:
        return _finding("values", found, f"{seen.problem} {usable_calls(adata, matrix, counts)}".strip(), "error")
    if seen.scale == "empty":
        return _finding("values", found, "There is nothing to rank.")
    if seen.scale == "counts":
        advice = "Only 0 and 1: ranks need counts, not whether a gene was seen."
        return _finding("values", found, advice, when=seen.highest == 1)
    return _finding("values", found, ANOTHER_ORDER, when=not keeps_order(seen.scale, counts))


def _about_names(match: GeneMatch, vocabulary: Vocabulary) -> Finding:
    species = foreign_species(match.names)
    # Single symbols that are written like another species' are odd human ones.
    kinds = name_kinds(match.names).rename(
        lambda kind: "symbol" if isinstance(kind, Species) and not kind.is_sure and kind != species else kind
    )
    kinds = kinds.groupby(level=0, sort=False).sum()
    words = [f"{n:,} {kind.name if isinstance(kind, Species) else _KINDS[kind]}" for kind, n in kinds.items()]
    mixed = "mixed: " if len(kinds.drop("none", errors="ignore")) > 1 else ""
    foreign = [k.name for k in kinds.index if isinstance(k, Species) and k.is_sure and not k.may_be(vocabulary.species)]
    advice = f"The {' and '.join(foreign)} genes are left out."
    return _finding("gene names", mixed + ", ".join(words), advice, when=foreign)


def _about_others(matrix: CountMatrix, match: GeneMatch) -> Finding:
    found = ", ".join(filter(None, [matrix.genes.left_out, match.left_out]))
    return _finding("not genes", found or "0 columns that are no genes", "They are left out.", "ok", when=found)


def _about_genes(
    match: GeneMatch, vocabulary: Vocabulary, seen: _Seen, better: tuple[str, int] | None
) -> Iterator[Finding]:
    problem = genes_problem(match, vocabulary)
    advice = named_better(better)
    known = f"{match.n_known:,} of {len(match.names):,} genes known to the vocabulary {vocabulary.name!r}"
    yield _finding("genes", known, (advice + (problem or "")).strip(), "error" if problem else "warning")
    total = seen.of_genes.sum()
    share = seen.of_genes[match.known].sum() / total if total else 0.0
    most = [i for i in np.argsort(-seen.of_genes, kind="stable") if not match.known[i] and seen.of_genes[i] > 0][:3]
    others = ", ".join(str(match.names[i]) or "genes without a name" for i in most)
    found = f"{share:.1%} of the counts belong to known genes" + f"; of the others, most to {others}" * bool(most)
    yield _finding("share of counts", found, "The model sees little of these cells.", when=share < LOW_SHARE)
    names = [(str(name).strip(), without_genome(str(name).strip())) for name in match.names]
    n = sum(name != bare for name, bare in names)
    yield _finding("prefixes", f"{n:,} names with a genome in front", "It is left out.", "ok", when=n)
    n = sum(plain_id(bare) != bare.upper() for _, bare in names)
    yield _finding("id versions", f"{n:,} ids with a version", "It is left out.", "ok", when=n)
    n = match.n_repeated - len(match.unique)
    yield _finding("repeated genes", f"{n:,} columns repeat a gene", "They are summed.", "ok", when=n)
    examples = ", ".join(map(str, match.names[match.unique[:3]]))
    advice = f"Such as {examples}: summed with the gene. Leave them out if they are guides or proteins."
    found = f"{len(match.unique):,} names made unique by a number"
    yield _finding("unique names", found, advice, "ok", when=len(match.unique))
    dates = [str(name) for name in match.names[~match.known] if plain_date(str(name))]
    advice = f"{', '.join(dates[:10])}: spreadsheets turned symbols into dates; write the symbols that were meant."
    yield _finding("dates", f"{len(dates):,} names that are dates and may mean several genes", advice, when=dates)


def _about_cells(n_detected: np.ndarray, room: int) -> Iterator[Finding]:
    if n_detected.size == 0:
        yield _finding("cells", "no cells", "There is nothing to tokenize.")
        return
    median, empty, cut = int(np.median(n_detected)), int((n_detected == 0).sum()), int((n_detected > room).sum())
    found = f"{median:,} known genes in the median cell, {n_detected.min():,} to {n_detected.max():,}"
    advice = "So few genes hardly separate cells; a whole transcriptome has thousands."
    yield _finding("genes per cell", found, advice, when=median < _FEW_GENES)
    advice = "Their rows will be empty; `scanpy.pp.filter_cells` leaves them out."
    yield _finding("empty cells", f"{empty:,} cells without a known gene", advice, when=empty)
    found, advice = f"{cut:,} cells with more than {room:,} known genes", "Their lowest-ranked genes will be cut."
    yield _finding("long cells", found, advice, "warning" if cut > n_detected.size / 2 else "ok", when=cut)


def _as_text(table: pd.DataFrame) -> str:
    """Lay the findings out with one line each, and the advice below."""
    status, check = (table[key].str.len().max() for key in ("status", "check"))
    indent = " " * (status + check + 4)
    layout = {"width": 118, "initial_indent": indent, "subsequent_indent": indent, "break_on_hyphens": False}
    lines = []
    for row in table.itertuples(index=False):
        lines.append(f"{row.status:<{status}}  {row.check:<{check}}  {row.found}")
        if row.advice:
            lines.append(textwrap.fill(row.advice, **layout))
    return "\n".join(lines)
