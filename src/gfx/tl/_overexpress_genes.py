"""Genes overexpressed in silico."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from gfx import _docs
from gfx._keys import PERTURBATIONS
from gfx.tl._perturb import perturb

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from anndata import AnnData
    from mudata import MuData

    from gfx.models import Model
    from gfx.tl._gene_sets import Genes
    from gfx.tl._perturb import Null

_FUNCTION = "tl.overexpress_genes"


@_docs.shared(
    model=_docs.MODEL,
    states=_docs.STATES,
    centroids=_docs.CENTROIDS,
    controls=_docs.CONTROLS,
    readout=_docs.READOUT,
    output=_docs.OUTPUT,
    slots=_docs.perturbation_slots(PERTURBATIONS[_FUNCTION]),
    errors=_docs.PERTURBATION_ERRORS,
)
def overexpress_genes(
    adata: AnnData | MuData,
    genes: Genes,
    *,
    model: str | Path | Model | None = None,
    layer: str | None = None,
    groupby: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    centroids: Literal["whole", "without"] = "whole",
    operator: Literal["overexpress", "hold"] = "overexpress",
    null: Null = "rank",
    donor_key: str | None = None,
    hidden_layer: int = -2,
    pooling: Literal["auto", "mean", "cls", "genes"] = "auto",
    rng: int | np.random.Generator | None = 0,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> AnnData | MuData | None:
    """Bring genes to the front of cells and measure what moves :cite:p:`Theodoris2023`.

    A gene becomes the first of every cell, as if it were expressed more than any other; a cell that lacks it gets it
    inserted. Where a cell fills the model's input, its last genes fall off, and the cell is compared with itself
    without them. Everything else is as in :func:`gfx.tl.delete_genes`; *composition* is the change of the gene's own
    vector in the mean of the cell.

    Random sets beside a perturbation are drawn so: where the cell has the gene, among its genes of neighbouring rank;
    where it lacks it, among genes that it lacks and that are detected about as often.

    Cost: two forward passes for each cell and perturbation, one with ``operator="hold"``; a third for cells that lose
    genes at the end. With `null`, as much more as for :func:`gfx.tl.delete_genes`.

    Parameters
    ----------
    adata
        Cells by genes, raw counts in `X` or `layer`, or tokens from :func:`gfx.pp.tokenize`.
    genes
        Symbols or Ensembl ids, each by itself; a tuple of them is brought to the front together, in its order. `...`
        stands for every gene that the cells have.
    {model}
    {states}
    {centroids}
    operator
        ``"overexpress"``: the other genes give way. ``"hold"``: they keep their positions.
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
    >>> gfx.tl.overexpress_genes(adata, "PAX5", model="mini", null=20)
    >>> adata.obsm["gfx_overexpress"].shape
    (60, 1)
    """
    return perturb(
        adata,
        genes,
        function=_FUNCTION,
        kind="overexpress",
        operator=operator,
        model=model,
        layer=layer,
        groupby=groupby,
        start=start,
        goal=goal,
        centroids=centroids,
        null=null,
        donor_key=donor_key,
        hidden_layer=hidden_layer,
        pooling=pooling,
        rng=rng,
        key_added=key_added,
        mod=mod,
        copy=copy,
    )
