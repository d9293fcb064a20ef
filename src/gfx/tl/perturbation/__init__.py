"""Genes perturbed in silico: deleted, brought to the front, or moved in the ranking."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from gfx._docs import TEXTS, shared
from gfx._results import TABLE
from gfx.tl.perturbation._perturb import CONTROLS, perturb

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from gfx._types import Data, ModelLike
    from gfx.tl._gene_sets import Genes

__all__ = ["delete_genes", "overexpress_genes", "shift_genes"]

RETURNS = """
Returns
-------
`None`, or an updated copy if `copy=True`. Sets, with one column a perturbation in the order of `genes`:

`.obsm['{key}' | key_added]` : :class:`numpy.ndarray` (float32, `(n_obs, n_perturbations)`)
    Shift of each cell; NaN for cells that were not perturbed, because they lack a gene or are not of state `start`.
`.obsm['{key}_parts' | key_added + '_parts']` : :class:`numpy.ndarray` (float32, `(n_obs, n_perturbations, 3)`)
    With the control ``"parts"``, the composition, position and context part of each shift, which add up to it.
`.obsm['{key}_states' | key_added + '_states']` : :class:`numpy.ndarray` (float32, 3 dimensions)
    With states, `(n_obs, n_perturbations, n_states)`: change of the cosine to the centroid of each state, in the
    order of `states` in `uns`.
`.varm['{key}' | key_added]` : :class:`numpy.ndarray` (float32, `(n_vars, n_perturbations)`)
    Shift of each other gene, averaged over the perturbed cells that express it; NaN if there is no such cell.
`.varm['{key}_sd' | key_added + '_sd']` : :class:`numpy.ndarray` (float32, `(n_vars, n_perturbations)`)
    Standard deviation of the shift of each other gene over these cells.
`.varm['{key}_n_cells' | key_added + '_n_cells']` : :class:`numpy.ndarray` (int32, `(n_vars, n_perturbations)`)
    Number of these cells.
`.varm['{key}_null' | key_added + '_null']` : :class:`numpy.ndarray` (float32, `(n_vars, n_perturbations)`)
    With random sets, the mean shift of each gene when the random sets are perturbed.
`.uns['{key}' | key_added]` : :class:`dict`
    `params`; `perturbations` (names) and `ensembl_ids`; `states`; `table` and `state_table`, see
    :func:`gfx.get.deletion_df`; `synergy`, see :func:`gfx.get.synergy_df`; `random_sets` and `random_states`, see
    :func:`gfx.get.random_sets_df`; `genes_of_all_ranks`, see :func:`gfx.get.rank_trend_df`; `donors` and
    `donor_states`; `controls`, see :func:`gfx.get.controls_df`; `note`, which says what the replicates of the
    p-values are.

Raises
------
ValueError
    The model does not know a gene, a gene or set is given twice, `start` is given without `goal`, there are no raw
    counts, the tokens belong to another vocabulary, a value is not one of the choices, or the store holds another
    call.
KeyError
    There is no such column in `obs`, or no such state in this column.
TypeError
    Genes are not given as names.
OSError
    The store cannot be written; finished blocks are kept.
"""

#: Parameters that all functions of this module share, before and after those of their own.
PARAMETERS = {
    "input": "model layer states start goal",
    "controls": "controls_of_perturbations n_random donor_key",
    "output": "hidden_layer pooling_of_shifts store rng key_added mod copy",
}


def _shared(function: str) -> dict[str, str]:
    """Texts that the docstrings of all functions here share; slots are called by the default name of the function."""
    parameters = {group: "\n".join(TEXTS[name] for name in names.split()) for group, names in PARAMETERS.items()}
    return {**parameters, "returns": RETURNS.replace("{key}", TABLE[function].default)}


@shared(**_shared("tl.delete_genes"))
def delete_genes(
    adata: Data,
    genes: Genes,
    *,
    model: ModelLike = None,
    layer: str | None = None,
    groupby: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    positions: Literal["close", "keep"] = "close",
    controls: Iterable[str] | None = CONTROLS,
    n_random: int | None = None,
    donor_key: str | None = None,
    hidden_layer: int = -2,
    pooling: Literal["auto", "mean", "cls", "genes"] = "auto",
    store: str | Path | None = None,
    rng: int = 0,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> Data | None:
    """Delete genes from cells and measure which cells and which other genes shift :cite:p:`Theodoris2023`.

    A gene is removed from the encoding of each cell that expresses it, and the model reads the cell again. The shift of
    the cell, and of each other gene, is 1 - cosine between its embedding before and after; it is 0 if nothing changed.
    With states, the change of the cell's cosine to the centroid of each state is given as well; it is positive if the
    cell shifted toward that state.

    The effect is what the model expects of a cell without the gene, not what an experiment would measure. Deleting any
    gene shifts the embedding: the gene's own vector is removed from the mean of the cell (*composition*), every gene
    behind it moves up by one rank (*position*), and the hidden states of the other genes change because the gene is
    missing (*context*). Each effect is therefore compared with the effects of rank-matched random gene sets in the same
    cells: the z-score is the difference from their mean effect in standard deviations.

    The effect of a set of genes is compared with the effects of its single genes in the same cells, see
    :func:`gfx.get.synergy_df`. To delete all genes in turn, or to learn only how far cells shift, use
    :func:`gfx.tl.screen_genes`, which does not measure the other genes.

    Cost: one forward pass for each perturbation and each cell in which it is possible. The parts of the shift need one
    more, except with ``positions="keep"``. For sets of genes, each gene is also perturbed by itself: a pair needs three
    times as many passes. Random sets and the random-weights model together need at most as many passes as the
    perturbations, without their parts, and 500 more. A call of 500 passes or more says how long it will take. Memory:
    seven numbers for each cell and perturbation, and four for each gene and perturbation.

    Parameters
    ----------
    {adata}
    genes
        Symbols or Ensembl ids. Each gene is deleted by itself; the genes of a tuple are deleted together. `...` stands
        for every gene that the cells express: ``("GATA4", ...)`` deletes GATA4 together with every other gene in turn.
        For all pairs of a list, pass ``itertools.combinations(genes, 2)``.
    {input}
    positions
        ``"close"``: the genes behind a deleted gene move up by one position, as in the published method. ``"keep"``:
        the gene is removed from attention and from the mean, and all other genes keep their positions.
    {controls}
    {output}

    {returns}

    Warns
    -----
    UserWarning
        The result takes 2 GB of memory or more; no cell expresses all genes of a perturbation, or all cells have them
        behind what the model reads; or start and goal are hardly separable.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ["CD3D", ("CD3D", "CD3E")], model="mini", n_random=20)
    >>> adata.obsm["gfx_delete"].shape
    (60, 2)
    >>> table = gfx.get.deletion_df(adata).set_index("perturbation")
    >>> table.loc[["CD3D", "CD3D+CD3E"], "n_random"].tolist()
    [20, 20]
    """
    return perturb("delete", **locals())


@shared(**_shared("tl.overexpress_genes"))
def overexpress_genes(
    adata: Data,
    genes: Genes,
    *,
    model: ModelLike = None,
    layer: str | None = None,
    groupby: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    positions: Literal["close", "keep"] = "close",
    controls: Iterable[str] | None = CONTROLS,
    n_random: int | None = None,
    donor_key: str | None = None,
    hidden_layer: int = -2,
    pooling: Literal["auto", "mean", "cls", "genes"] = "auto",
    store: str | Path | None = None,
    rng: int = 0,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> Data | None:
    """Bring genes to the front of cells and measure which cells and which other genes shift :cite:p:`Theodoris2023`.

    A gene is moved to the first position of every cell, as if its relative expression were the highest; if the cell
    does not express the gene, it is inserted. If the cell already fills the model's input, its last genes are then cut
    off, and the perturbed cell is compared with the unperturbed cell without these last genes. Everything else is as in
    :func:`gfx.tl.delete_genes`; *composition* is the change of the gene's own vector in the mean of the cell.

    Random sets are matched as follows. If the cell expresses the gene, random genes have a similar rank. If it does
    not, random genes are not expressed in the cell either, and are detected in about as many cells as the gene.

    Cost: as for :func:`gfx.tl.delete_genes`, and one more pass for cells whose last genes are cut off.

    Parameters
    ----------
    {adata}
    genes
        Symbols or Ensembl ids. Each gene is brought to the front by itself; the genes of a tuple are brought to the
        front together, in the order of the tuple. `...` stands for every gene that the cells express.
    {input}
    positions
        ``"close"``: the other genes move down, as in the published method. ``"keep"``: they keep their positions.
    {controls}
    {output}

    {returns}

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.overexpress_genes(adata, "PAX5", model="mini", n_random=20)
    >>> adata.obsm["gfx_overexpress"].shape
    (60, 1)
    """
    return perturb("overexpress", **locals())


@shared(**_shared("tl.shift_genes"))
def shift_genes(
    adata: Data,
    genes: Genes,
    *,
    by: tuple[Literal["quartiles", "fold_change"], float],
    model: ModelLike = None,
    layer: str | None = None,
    groupby: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    controls: Iterable[str] | None = CONTROLS,
    n_random: int | None = None,
    donor_key: str | None = None,
    hidden_layer: int = -2,
    pooling: Literal["auto", "mean", "cls", "genes"] = "auto",
    store: str | Path | None = None,
    rng: int = 0,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> Data | None:
    """Move genes up or down in the ranking of cells that have them, and measure which cells and other genes shift.

    A weaker perturbation than deletion or overexpression: a gene is activated or inhibited by quartiles of the cell's
    ranking, or by a fold change of its counts. The official software documents the former but refuses it. Everything
    else is as in :func:`gfx.tl.delete_genes`; *composition* is the change of the gene's own vector in the mean of the
    cell.

    Cost: as :func:`gfx.tl.delete_genes`; for fold changes, the counts of all cells are read once more and kept in
    memory, sparse, during the call.

    Parameters
    ----------
    {adata}
    genes
        Symbols or Ensembl ids, each by itself; the genes of a tuple move together. `...` stands for every gene that the
        cells have.
    by
        ``("quartiles", n)``: move by `n` quartiles of the ranking, above 0 toward the front (activate), below 0 toward
        the end (inhibit). A gene lands in the middle of its new quartile; beyond the first or last one, at the very
        front or end. ``("fold_change", x)``: multiply the counts of the gene and rank the cell again: above 1 it rises,
        below 1 it falls. In cells with more genes than the model reads, a gene that falls behind the last of them is
        removed, and none takes its place.
    {input}
    {controls}
    {output}

    {returns}

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.shift_genes(
    ...     adata, ["CD3D", "CD3E"], model="mini", by=("quartiles", -1), n_random=20
    ... )
    >>> adata.obsm["gfx_shift"].shape
    (60, 2)
    """
    return perturb("shift", **locals())
