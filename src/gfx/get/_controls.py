"""Table of what a ranking of perturbed genes is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gfx._docs import shared
from gfx._results import PERTURBATIONS, find

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData


@shared()
def controls_df(adata: AnnData | MuData, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate how far a ranking of perturbed genes is explained by controls.

    Read it before the ranking itself. If effects follow the rank of the gene, a list of strong genes is a list of
    highly expressed ones. If a model with random weights ranks genes alike, the ranking does not depend on what the
    model has learned. If a baseline predicts the effect, no model was needed. If start and goal are not separable, a
    shift from one toward the other has no meaning.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.delete_genes`, :func:`gfx.tl.overexpress_genes`, :func:`gfx.tl.shift_genes` or
        :func:`gfx.tl.screen_genes`.
    {key}
    {mod}

    Returns
    -------
    Columns `control`; `measure`, ``"shift"`` (of the cell) or ``"toward"`` (the goal); `statistic`; `value`; and `n`,
    the number of genes, perturbations, folds or cells behind the value. Perturbations are compared over 200 random
    genes of all ranks (without these, over the perturbations themselves), screens over all genes. By control:

    ``"random_weights"``
        `spearman`: rank correlation of the effects in the model with those in a model with random weights, in the same
        cells. Perturbations have more: `spearman_perturbations`, the same over the perturbations of the most frequent
        number of genes; `rank_spearman` and `rank_slope`, what ``"rank"`` has of the model, of random weights.
    ``"rank"``, ``"detection"``, ``"expression"``, ``"logfc"``
        `spearman`: rank correlation of the effects with this baseline; `partial_spearman`: the same given the other
        baselines. Detection and expression are nearly the same; given each other, little is left of either. For
        perturbations, `spearman` of the shift with the rank is with the rank in the perturbed cell, and `slope` that
        of a line through the natural logarithms of shifts, from the first gene of a cell to its last.
    ``"exact"``
        After first-order estimates: `spearman` of these with exact results over the genes of a cell, and `recall`, the
        fraction of its 50 largest effects that are among its 100 largest estimates; means over `n` cells.
    ``"state_axis"``
        With a goal, `auc`: area under the ROC curve for telling start from goal along the line between their centroids,
        in held-out donors (without `donor_key`, in held-out cells), over `n` folds; 0.5 is chance.

    Raises
    ------
    KeyError
        No such result.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ["CD3D", "MS4A1"], model="mini", n_random=10)
    >>> gfx.get.controls_df(adata)["control"].unique().tolist()
    ['random_weights', 'rank', 'detection', 'expression']
    """
    result = find(adata, *PERTURBATIONS, "tl.screen_genes", key=key, mod=mod)
    return result.uns["controls"].reset_index(drop=True).copy()
