"""Genes activated or inhibited in silico: moved up or down in the ranking."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from gfx import _docs
from gfx._core.edits import GONE, find_places, quartile_ranks
from gfx._keys import PERTURBATIONS
from gfx._tokens import counts_by_token
from gfx.tl._perturb import perturb

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData

    from gfx.models import Model
    from gfx.tl._gene_sets import Genes
    from gfx.tl._perturb import NewRanks, Null
    from gfx.tl._prepare import Prepared

_FUNCTION = "tl.shift_genes"


@_docs.shared(
    model=_docs.MODEL,
    states=_docs.STATES,
    controls=_docs.CONTROLS,
    readout=_docs.READOUT,
    output=_docs.OUTPUT,
    slots=_docs.perturbation_slots(PERTURBATIONS[_FUNCTION]),
    errors=_docs.PERTURBATION_ERRORS,
)
def shift_genes(
    adata: AnnData | MuData,
    genes: Genes,
    *,
    quartiles: int | None = None,
    fold_change: float | None = None,
    model: str | Path | Model | None = None,
    layer: str | None = None,
    groupby: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    null: Null = "rank",
    donor_key: str | None = None,
    hidden_layer: int = -2,
    pooling: Literal["auto", "mean", "cls", "genes"] = "auto",
    rng: int | np.random.Generator | None = 0,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> AnnData | MuData | None:
    """Move genes up or down in the ranking of cells that have them, and measure what moves.

    Between deleting and overexpressing: a gene is activated or inhibited by quartiles of the cell's ranking, or by a
    fold change of its counts. What the published software announced and never had :cite:p:`Theodoris2023`. Everything
    else is as in :func:`gfx.tl.delete_genes`; *composition* is the change of the gene's own vector in the mean.

    Cost: that of :func:`gfx.tl.delete_genes`; with `fold_change`, the counts of all cells are read once more and kept
    in memory, sparse, until the call is done.

    Parameters
    ----------
    adata
        Cells by genes, raw counts in `X` or `layer`, or tokens from :func:`gfx.pp.tokenize`.
    genes
        Symbols or Ensembl ids, each by itself; a tuple of them is moved together. `...` stands for every gene that
        the cells have.
    quartiles
        Quartiles to move by: above 0 towards the front (activate), below 0 towards the end (inhibit). A gene lands in
        the middle of its new quartile; beyond the first or the last, at the very end.
    fold_change
        Multiply the gene's counts and rank the cell anew: above 1 it rises, below 1 it falls. In cells with more genes
        than the model reads, a gene that falls behind the last of them is gone, and none moves up for it.
    {model}
    {states}
    {controls}
    {readout}
    {output}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets, with one column a perturbation in the order of `genes`:

    {slots}

    Raises
    ------
    {errors}

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.shift_genes(adata, ["CD3D", "CD3E"], quartiles=-1, model="mini", null=20)
    >>> adata.obsm["gfx_shift"].shape
    (60, 2)
    """
    if (quartiles is None) == (fold_change is None):
        msg = f"Give either `quartiles` or `fold_change`; found {quartiles!r} and {fold_change!r}."
        raise ValueError(msg)
    if quartiles is not None and (not isinstance(quartiles, int | np.integer) or not 1 <= abs(quartiles) <= 3):
        msg = f"`quartiles` is 1, 2 or 3, or below 0 to inhibit; found {quartiles!r}."
        raise ValueError(msg)
    if fold_change is not None and not (0 < fold_change < np.inf and fold_change != 1):
        msg = (
            f"`fold_change` multiplies counts: a positive number other than 1, found {fold_change!r}. "
            "To take a gene out, call `gfx.tl.delete_genes`."
        )
        raise ValueError(msg)

    def new_ranks(cells: Prepared) -> NewRanks:
        if quartiles is not None:
            return lambda cell, genes: _by_quartiles(cells, cell, genes, quartiles)
        return _ByFoldChange(cells, fold_change)

    return perturb(
        adata,
        genes,
        function=_FUNCTION,
        kind="shift",
        operator="shift",
        model=model,
        layer=layer,
        groupby=groupby,
        start=start,
        goal=goal,
        centroids="whole",
        null=null,
        donor_key=donor_key,
        hidden_layer=hidden_layer,
        pooling=pooling,
        rng=rng,
        key_added=key_added,
        mod=mod,
        copy=copy,
        new_ranks=new_ranks,
        quartiles=quartiles,
        fold_change=fold_change,
    )


def _by_quartiles(cells: Prepared, cell: np.ndarray, genes: np.ndarray, quartiles: int) -> np.ndarray:
    tokens = cells.tokens
    places = find_places(tokens.ids[cell], genes)
    return quartile_ranks(places, tokens.lengths[cell], quartiles, cells.model.vocabulary)


class _ByFoldChange:
    """Ranks of genes whose counts are multiplied, among the genes of their cell as they are."""

    def __init__(self, cells: Prepared, fold_change: float) -> None:
        self.fold_change, self.vocabulary = fold_change, cells.model.vocabulary
        self.tokens = cells.tokens
        blocks = [counts for _, counts, _ in counts_by_token(cells.adata, self.vocabulary, cells.tokens.source)]
        self.blocks, self.first = blocks, np.cumsum([0, *(block.shape[0] for block in blocks)])

    def __call__(self, cell: np.ndarray, genes: np.ndarray) -> np.ndarray:
        ranks = [self._ranks(int(row), of_edit) for row, of_edit in zip(cell, genes, strict=True)]
        return np.array(ranks, dtype=np.int64).reshape(genes.shape)

    def _ranks(self, cell: int, genes: np.ndarray) -> np.ndarray:
        block = int(np.searchsorted(self.first, cell, side="right")) - 1
        counts, row = self.blocks[block], cell - self.first[block]
        part = slice(counts.indptr[row], counts.indptr[row + 1])
        tokens, values = counts.indices[part], counts.data[part]
        tokens, values = tokens[values > 0], values[values > 0]
        moved = np.isin(tokens, genes)
        # The ranking of `pp.tokenize`, in its arithmetic to the last bit: by value, ties by token.
        values = np.where(moved, values * self.fold_change, values) / self.vocabulary.medians[tokens]
        order = np.lexsort((tokens, -values))
        ranking, is_moved = tokens[order], moved[order]
        before = np.cumsum(~is_moved)
        n_read = int(self.tokens.lengths[cell]) - self.vocabulary.n_specials
        where = {int(ranking[at]): int(at) for at in np.flatnonzero(is_moved)}
        return np.array([self._goes(where.get(int(gene)), before, n_read) for gene in genes])

    @staticmethod
    def _goes(at: int | None, before: np.ndarray, n_read: int) -> int:
        """How many unmoved genes stand before one, or that it falls behind what the model reads."""
        return GONE if at is None or at >= n_read else int(before[at])
