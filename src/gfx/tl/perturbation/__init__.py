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
    With the control ``"parts"``, its composition, position and context part; they add up to the shift.
`.obsm['{key}_states' | key_added + '_states']` : :class:`numpy.ndarray` (float32, 3 dimensions)
    With states, `(n_obs, n_perturbations, n_states)`: change of the cosine to each state, in the order of `uns`.
`.varm['{key}' | key_added]` : :class:`numpy.ndarray` (float32, `(n_vars, n_perturbations)`)
    Shift of each other gene, mean over the cells that have it; NaN where none does.
`.varm['{key}_sd' | key_added + '_sd']` : :class:`numpy.ndarray` (float32, `(n_vars, n_perturbations)`)
    Its standard deviation over these cells.
`.varm['{key}_n_cells' | key_added + '_n_cells']` : :class:`numpy.ndarray` (int32, `(n_vars, n_perturbations)`)
    Number of these cells.
`.varm['{key}_null' | key_added + '_null']` : :class:`numpy.ndarray` (float32, `(n_vars, n_perturbations)`)
    With random sets, the mean shift of each gene when these are perturbed.
`.uns['{key}' | key_added]` : :class:`dict`
    `params`; `perturbations`, their names, and `ensembl_ids`; `states`; `table` and `state_table`, see
    :func:`gfx.get.deletion_df`; `synergy`, see :func:`gfx.get.synergy_df`; `random_sets` and `random_states`, see
    :func:`gfx.get.random_sets_df`; `genes_of_all_ranks`, see :func:`gfx.get.rank_trend_df`; `donors` and
    `donor_states`; `controls`, see :func:`gfx.get.controls_df`; `note`, what the p-values are over.

Raises
------
ValueError
    A gene that the model does not know, a gene or set given twice, `start` without `goal`, no raw counts, tokens of
    another vocabulary, a value outside the choices, or a store that holds another call.
KeyError
    No such column in `obs`, or no such state in it.
TypeError
    Genes that are no names.
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
    n_random: int = 100,
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

    A gene is removed from the encoding of each cell that expresses it, the model reads the cell again, and each cell
    and each other gene is compared with before: shift = 1 - cosine, 0 when nothing changed. With states, the change of
    the cell's cosine to the centroid of each state is given as well; above 0 the cell shifted toward that state.

    The effect is what the model expects of a cell without the gene, not what an experiment would measure. Deleting any
    gene shifts the embedding: its own vector leaves the mean of the cell (*composition*), every gene behind it moves up
    by one rank (*position*), and the network reads the rest differently (*context*). Each effect is therefore compared
    with rank-matched random gene sets in the same cells: the z-score is its distance from theirs.

    Sets of genes are compared with their genes one by one in the same cells, see :func:`gfx.get.synergy_df`. To delete
    all genes in turn, use :func:`gfx.tl.screen_genes`.

    Cost: two forward passes for each cell and perturbation that applies to it, one with ``positions="keep"``. Random
    sets take up to ``8 * n_random`` passes for each perturbation, random weights 50 for each and 400 for genes of all
    ranks. Sets also run gene by gene, their random sets likewise: for a pair, three times the passes. Memory: seven
    numbers for each cell and perturbation, four for each gene and perturbation.

    Parameters
    ----------
    {adata}
    genes
        Symbols or Ensembl ids, each deleted by itself; the genes of a tuple are deleted together. `...` stands for
        every gene that the cells have: ``("GATA4", ...)`` is GATA4 with every other gene. All pairs of a list are
        ``itertools.combinations(genes, 2)``.
    {input}
    positions
        ``"close"``: the genes behind a deleted one move up, as in the published method. ``"keep"``: the gene is removed
        from attention and from the mean, and every other gene keeps its position.
    {controls}
    {output}

    {returns}

    Warns
    -----
    UserWarning
        No cell has the genes of a perturbation; or start and goal are hardly separable.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ["CD3D", ("CD3D", "CD3E")], model="mini", n_random=20)
    >>> adata.obsm["gfx_delete"].shape
    (60, 2)
    >>> gfx.get.deletion_df(adata)[["perturbation", "n_random"]].sort_values("perturbation").values.tolist()
    [['CD3D', 20], ['CD3D+CD3E', 20]]
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
    n_random: int = 100,
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

    A gene becomes the first of every cell, as if it were expressed more than any other; in a cell that lacks it, it is
    inserted. Where a cell fills the model's input, its last genes are cut off, and the cell is compared with itself
    without them. Everything else is as in :func:`gfx.tl.delete_genes`; *composition* is the change of the gene's own
    vector in the mean of the cell.

    Random sets are matched as follows: where the cell has the gene, to genes of neighbouring rank; where the cell lacks
    it, to genes that it lacks as well and that are detected about as often.

    Cost: as :func:`gfx.tl.delete_genes`, and one more pass for cells that lose genes at their end.

    Parameters
    ----------
    {adata}
    genes
        Symbols or Ensembl ids, each by itself; the genes of a tuple are brought to the front together, in their order.
        `...` stands for every gene that the cells have.
    {input}
    positions
        ``"close"``: the other genes make room, as in the published method. ``"keep"``: they keep their positions.
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
    n_random: int = 100,
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

    Between deletion and overexpression: a gene is activated or inhibited by quartiles of the cell's ranking, or by a
    fold change of its counts, which the published software announced :cite:p:`Theodoris2023`. Everything else is as in
    :func:`gfx.tl.delete_genes`; *composition* is the change of the gene's own vector in the mean of the cell.

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
    >>> gfx.tl.shift_genes(adata, ["CD3D", "CD3E"], by=("quartiles", -1), model="mini", n_random=20)
    >>> adata.obsm["gfx_shift"].shape
    (60, 2)
    """
    return perturb("shift", **locals())
