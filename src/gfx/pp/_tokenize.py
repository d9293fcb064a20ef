"""Cells as ranked genes, written into the object."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pandas as pd

from gfx._adata import ANOTHER_ORDER
from gfx._docs import shared
from gfx._log import info
from gfx._results import claim
from gfx._tokens import make_tokens, recognised, vocabulary_mark

if TYPE_CHECKING:
    from gfx._adata import Counts
    from gfx._tokens import Report
    from gfx._types import Data, ModelLike
    from gfx.models import Model

#: Below this share of counts a warning says that the model sees little of the cells.
LOW_SHARE = 0.5


@shared()
def tokenize(
    adata: Data,
    *,
    model: ModelLike | None = None,
    layer: str | None = None,
    use_raw: bool = False,
    gene_ids: str | None = None,
    counts: Counts = "raw",
    n_counts: str | None = None,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> Data | None:
    """Encode each cell as the ranked list of its genes, the most characteristic first.

    Detected genes are sorted in descending order of their count divided by the gene's non-zero median in the training
    cells of the model. Ties are broken by the order of the model's tokens (ascending Ensembl ids in the published
    vocabularies), so the result depends neither on the order of the columns nor on how the matrix is stored. Columns of
    the same gene are summed first. Dividing a cell by its depth does not change the order of its genes.

    Functions of `gfx.tl` use stored tokens, and stop if the counts in some cells are no longer those of the tokens.
    Cells and genes may be left out, and counts be normalised in place. If no tokens are stored, they tokenize the cells
    themselves. Call this function to tokenize only once for several functions, to see how many genes are recognised, or
    if the counts are not in `X`.

    The cost is a few seconds per 100,000 cells. Counts in a file are read in blocks, so only a small part of them is in
    memory at a time. Stored tokens take 2 bytes × the tokens of the longest cell, for each cell: 4 kB at most for
    models that read 2,048 tokens, 8 kB for those that read 4,096. Tokens that the functions of `gfx.tl` make themselves
    take 2 bytes for each detected gene. The first call after installation compiles code, which
    takes a few seconds.

    Parameters
    ----------
    adata
        Cells × genes. The matrix may be dense, sparse, a dask array, or in a file; a CSC matrix in `X` is converted to
        CSR in memory.
    {model}
    {layer}
    {use_raw}
    {gene_ids}
    counts
        What the values are. ``"raw"``: integer counts; other values are refused. ``"normalized"``: counts that were
        only divided by the depth of the cell. ``"log1p"``: log(1 + x) of such normalized counts, with the natural
        logarithm. ``"normalized"`` and ``"log1p"`` give the same tokens as the raw counts, because they keep the order
        of genes within a cell; scaled, regressed or integrated values do not keep it. ``"estimated"``: counts that
        other software corrected or estimated, or FPKM, ranked as they are, with 0 for values below 0.5. Their order is
        not that of the counts, nor is that of such values divided by depth (``"normalized"``), such as TPM, or of
        logarithms of these (``"log1p"``); the log and the report say so.
    n_counts
        Column of `obs` with the total counts of each cell, for objects with a subset of the measured genes. The total
        counts affect only the share of counts in the report, not the ranks. `None` uses the sums of the matrix.
    {key_added}
    {mod}
    {copy}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.obsm['gfx_tokens' | key_added]` : :class:`numpy.ndarray` (uint16, `(n_obs, longest)`)
        Tokens, padded with 0 on the right (uint32 for a vocabulary above 65,536 tokens). In model families with special
        tokens, each row begins with ``<cls>`` and ends with ``<eos>``. The row of a cell without any recognised gene is
        empty.
    `.obs['gfx_tokens_n' | f'{key_added}_n']` : :class:`pandas.Series` (int32)
        Number of tokens of each cell, including special tokens.
    `.obs['gfx_tokens_vocabulary' | f'{key_added}_vocabulary']` : :class:`pandas.Series` (category)
        The vocabulary of each cell, by the beginning of its checksum: joined tokens of two vocabularies are refused.
    `.uns['gfx_tokens' | key_added]['params']` : :class:`dict`
        The model, its vocabulary, and the arguments.
    `.uns['gfx_tokens' | key_added]['report']` : :class:`dict`
        Numbers of recognised genes, summed columns, empty cells and truncated cells, the share of recognised counts,
        what the values are and whether they keep the order of the counts, which columns are no genes, and a fingerprint
        of the names of the genes.

    Raises
    ------
    ValueError
        The values are not what `counts` says, or are NaN, infinite or negative; the genes are of another species; fewer
        than ten genes are recognised, or fewer than a tenth of the genes in the data or in the vocabulary (whichever
        has fewer genes); `n_counts` is below the sum of a cell; or a slot of the result already holds something else.
    KeyError
        There is no such layer, column or modality.

    See Also
    --------
    gfx.pp.check : The same findings as a table; it writes nothing.

    Examples
    --------
    This object holds only log-normalised values, which rank the genes of a cell in the same order as the raw counts.

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
    tokens, report = make_tokens(slots.adata, loaded.vocabulary, loaded.max_length, **source, padded=True)
    _tell(report, loaded)
    slots.write(
        f"tokenized {report['n_cells']:,} cells",
        params=loaded.provenance() | {"max_length": loaded.max_length} | source,
        obsm={"": tokens.values.reshape(len(tokens), tokens.lengths.max(initial=0))},
        obs={"n": tokens.lengths, "vocabulary": pd.Categorical([vocabulary_mark(loaded.vocabulary)] * len(tokens))},
        uns={"report": report},
    )
    return slots.returned


def _tell(report: Report, model: Model) -> None:
    """Log what was recognised, and warn where it is little."""
    info(recognised(report, model.vocabulary))
    if not report["keeps_order"]:
        info(f"The values are {report['values']}. {ANOTHER_ORDER}")
    if report["n_genes_repeated"]:
        info(f"{report['n_genes_repeated']:,} columns are of the same gene as another one; their counts were summed.")
    if report["n_genes_made_unique"]:
        info(
            f"{report['n_genes_made_unique']:,} columns are named after a gene with a number behind it, such as CD3E-1 "
            "where names were made unique: summed with that gene. If they are guides or proteins, leave them out."
        )
    if report["n_cells_empty"]:
        info(f"{report['n_cells_empty']:,} cells have no recognised gene: their rows are empty.")
    if report["n_cells_truncated"]:
        room = model.max_length - model.vocabulary.n_specials
        info(f"{report['n_cells_truncated']:,} cells have more than {room:,} recognised genes: cut after these.")
    if report["share_of_counts"] < LOW_SHARE and report["n_cells_empty"] < report["n_cells"]:
        msg = (
            f"Only {report['share_of_counts']:.0%} of the counts belong to genes that the model knows. `gfx.pp.check` "
            "reports details; another column of `adata.var` may name more genes (`gene_ids=`)."
        )
        warnings.warn(msg, UserWarning, stacklevel=3)
