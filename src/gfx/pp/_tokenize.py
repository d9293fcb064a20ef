"""Cells as ranked genes, written into the object."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from gfx._log import info
from gfx._results import claim
from gfx._tokens import make_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData

    from gfx._adata import Counts
    from gfx._core.vocabulary import Vocabulary
    from gfx._tokens import TokenReport
    from gfx.models import Model

#: Below this share of counts a warning says that the model sees little of the cells.
LOW_SHARE = 0.5


def tokenize(
    adata: AnnData | MuData,
    *,
    model: str | Path | Model | None = None,
    layer: str | None = None,
    use_raw: bool = False,
    gene_ids: str | None = None,
    counts: Counts = "raw",
    n_counts: str | None = None,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> AnnData | MuData | None:
    """Write each cell as its detected genes, the most characteristic first.

    A gene's value in a cell is its count over the gene's non-zero median in the model's training cells; genes are
    sorted by it, descending. Equal values are in the order of the model's tokens (ascending Ensembl ids in the
    published vocabularies), so the tokens depend neither on the order of the columns nor on how the matrix is stored.
    Columns of the same gene are summed first. Dividing a cell by its depth changes no order, so it plays no part.

    Tools tokenize on the fly where nothing was written; call this to do it once, to see what is recognised, or when
    the counts are not in `X`.

    Costs about 20 seconds per million cells and core (2,000 genes a cell), and memory for the tokens: 2 bytes per
    cell and detected gene. The first call after installation compiles, which takes some seconds.

    Parameters
    ----------
    adata
        Cells × genes. A matrix may be dense, sparse, dask, or in a file; `X` in CSC order is turned into CSR in memory.
    model
        Whose genes, medians and input size to use: a published name, a folder, or what :func:`gfx.models.load`
        returns. `None`: `gfx.settings.model`, else the embedded `mini`.
    layer
        Layer that holds the counts. `None`: `X`.
    use_raw
        Take the counts and the genes of `adata.raw`.
    gene_ids
        Column of `var` that holds Ensembl ids or symbols. `None`: the index. Ensembl ids with or without version,
        symbols, aliases and retired ids may be mixed.
    counts
        What the values are. ``"raw"``: whole counts, anything else is refused. ``"normalized"``: counts that were only
        divided by the depth of the cell. ``"log1p"``: natural logarithms of these plus one. The last two give
        the tokens of the counts, because the order of genes in a cell survives both; not so after scaling, regression
        or integration.
    n_counts
        Column of `obs` with the total counts of each cell, for objects that hold a part of the measured genes. Used
        for the share of counts in the report only: ranks do not depend on it. `None`: the sums of the matrix.
    key_added
        Write to slots of this name; see below.
    mod
        Modality of a MuData that holds the RNA counts. `None`: the only one.
    copy
        Return an updated copy and leave `adata` as it is.

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.obsm['gfx_tokens' | key_added]` : :class:`numpy.ndarray` (uint16, `(n_obs, longest)`)
        Tokens, padded with 0 on the right (uint32 for a vocabulary above 65,536 tokens). Families with special tokens
        begin with ``<cls>`` and end with ``<eos>``. A cell without any recognised gene is an empty row.
    `.obs['gfx_tokens_n' | f'{key_added}_n']` : :class:`pandas.Series` (int32)
        Tokens of each cell, special tokens included.
    `.uns['gfx_tokens' | key_added]['params']` : :class:`dict`
        Model, vocabulary and arguments.
    `.uns['gfx_tokens' | key_added]['report']` : :class:`dict`
        How many genes and what share of counts were recognised, columns summed, cells empty and cells cut.

    Raises
    ------
    ValueError
        The values are not what `counts` says; NaN, infinite or negative values; genes of another species; fewer
        recognised genes than ten, or than a tenth of the shorter of the two gene lists; `n_counts` below the cell's
        own sum.
    KeyError
        No such layer, column or modality.

    See Also
    --------
    gfx.pp.check : The same findings as a table, nothing written.

    Examples
    --------
    Log-normalised values are all that is left in this object; they rank like the counts they came from.

    >>> import scanpy as sc
    >>> import gfx
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> gfx.pp.tokenize(adata, model="mini", use_raw=True, counts="log1p")
    >>> adata.obsm["gfx_tokens"].dtype
    dtype('uint16')
    >>> adata.uns["gfx_tokens"]["report"]["n_genes"]
    765
    """
    from gfx.models import load

    slots = claim(adata, "pp.tokenize", key_added, mod=mod, copy=copy).claim(reads=[("obs", n_counts)])
    source = {"layer": layer, "use_raw": use_raw, "gene_ids": gene_ids, "counts": counts, "n_counts": n_counts}
    loaded = load(model)
    tokens, report = make_tokens(slots.adata, loaded.vocabulary, loaded.max_length, **source)
    numbers = _numbers(report, n_cells=len(tokens.lengths))
    _tell(numbers, loaded.vocabulary, loaded.max_length)
    slots.write(
        f"tokenized {len(tokens.lengths):,} cells",
        params=loaded.provenance() | {"max_length": loaded.max_length} | source,
        obsm={"": tokens.ids},
        obs={"n": tokens.lengths},
        uns={"report": numbers},
    )
    return slots.returned


def _numbers(report: TokenReport, *, n_cells: int) -> dict[str, int | float]:
    """Turn the report into plain numbers that a file holds."""
    return {
        "n_cells": n_cells,
        "n_cells_empty": report.n_empty,
        "n_cells_truncated": report.n_truncated,
        "n_genes": len(report.match.names),
        "n_genes_recognised": report.match.n_known,
        "n_genes_repeated": report.match.n_repeated,
        "share_of_counts": report.counts_share,
    }


def _tell(numbers: dict[str, int | float], vocabulary: Vocabulary, max_length: int) -> None:
    share = numbers["share_of_counts"]
    info(
        f"{numbers['n_genes_recognised']:,} of {numbers['n_genes']:,} genes are in the vocabulary "
        f"{vocabulary.name!r}; they hold {share:.1%} of the counts."
    )
    if numbers["n_genes_repeated"]:
        info(f"{numbers['n_genes_repeated']:,} columns name a gene that another column names, too: summed.")
    if numbers["n_cells_empty"]:
        info(f"{numbers['n_cells_empty']:,} cells have no recognised gene: their rows are empty.")
    if numbers["n_cells_truncated"]:
        room = max_length - vocabulary.n_specials
        info(f"{numbers['n_cells_truncated']:,} cells have more than {room:,} recognised genes: cut after these.")
    if share < LOW_SHARE and numbers["n_cells_empty"] < numbers["n_cells"]:
        msg = (
            f"Only {share:.0%} of the counts belong to genes that the model knows. `gfx.pp.check` tells more; "
            "another column of `adata.var` may name more genes (`gene_ids=`)."
        )
        warnings.warn(msg, UserWarning, stacklevel=3)
