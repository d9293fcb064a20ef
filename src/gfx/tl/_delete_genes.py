"""Genes deleted in silico."""

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

_FUNCTION = "tl.delete_genes"


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
def delete_genes(
    adata: AnnData | MuData,
    genes: Genes,
    *,
    model: str | Path | Model | None = None,
    layer: str | None = None,
    groupby: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    centroids: Literal["whole", "without"] = "whole",
    operator: Literal["delete", "hold"] = "delete",
    null: Null = "rank",
    donor_key: str | None = None,
    hidden_layer: int = -2,
    pooling: Literal["auto", "mean", "cls", "genes"] = "auto",
    rng: int | np.random.Generator | None = 0,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> AnnData | MuData | None:
    """Delete genes from cells and measure what moves :cite:p:`Theodoris2023`.

    A gene is taken out of the encodings of the cells that express it, the model reads them again, and each cell and
    each other gene is compared with before: shift = 1 - cosine, 0 when nothing moved. With states, the change of the
    cell's cosine to the mean of each state is given too; above 0 the cell moved towards it.

    The effect says what the model expects of a cell without the gene, not what an experiment would do. Part of it is
    no biology: the gene's own vector leaves the mean (*composition*), and every gene behind it moves up by one
    (*position*); the rest is what the network makes of its absence (*context*). And every gene moves a cell somehow.
    So each effect stands beside random genes of the same rank in the same cells: `z` says how far it is from theirs.

    Sets of genes are compared with their genes one by one in the same cells, see :func:`gfx.get.synergy_df`.

    Runs in float32, for the shifts of single genes drown in the rounding of shorter formats.

    Cost: two forward passes for each cell and perturbation that applies to it, one with ``operator="hold"``. With
    `null`, up to 800 for random sets and 100 for random weights more a perturbation, and 400 for genes of all ranks.
    Sets are run gene by gene, too, their random sets likewise: for a pair, thrice the passes. Memory: seven numbers a
    cell and perturbation, four a gene and perturbation, and where genes are deleted together the vectors of 100,000
    runs.

    Parameters
    ----------
    adata
        Cells by genes, raw counts in `X` or `layer`, or tokens from :func:`gfx.pp.tokenize`.
    genes
        Symbols or Ensembl ids, each deleted by itself; a tuple of them is deleted together. `...` stands for every
        gene that the cells have: ``("GATA4", ...)`` is GATA4 with every other gene. All pairs of a list are
        ``itertools.combinations(genes, 2)``.
    {model}
    {states}
    {centroids}
    operator
        ``"delete"``: the encoding closes up behind the gene. ``"hold"``: the gene is taken out of attention and of
        the mean, and no other gene changes its position.
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

    Warns
    -----
    UserWarning
        No cell has the genes of a perturbation; or start and goal can hardly be told apart.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ["CD3D", ("CD3D", "CD3E")], model="mini")
    >>> adata.obsm["gfx_delete"].shape
    (60, 2)
    >>> gfx.get.deletion_df(adata)[["perturbation", "n_random"]].sort_values("perturbation").values.tolist()
    [['CD3D', 100], ['CD3D+CD3E', 100]]
    """
    return perturb(
        adata,
        genes,
        function=_FUNCTION,
        kind="delete",
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
