"""Tables of what perturbed genes are held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from gfx.get._perturbation import find_perturbation

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData


def random_sets_df(adata: AnnData | MuData, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate the random sets of genes beside each perturbation, one row a set (and state).

    Parameters
    ----------
    adata
        After :func:`gfx.tl.delete_genes`, :func:`gfx.tl.overexpress_genes` or :func:`gfx.tl.shift_genes` with `null`.
    key
        The `key_added` of that call, or its default name.
    mod
        Modality of a MuData.

    Returns
    -------
    Columns `perturbation`; `genes`, the random set; `n_cells`, those it was perturbed in; `rank_mean`; `shift_mean`;
    `difference`, its shift less that of the perturbation in the same cells; where genes were perturbed together,
    `on_shifts_difference` and `on_vectors_difference`, the same of the excess over single genes (see
    :func:`gfx.get.synergy_df`); with states `state`, `toward_mean` and `toward_difference`.

    Raises
    ------
    KeyError
        No such result, or one without random sets.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, "CD3D", model="mini", null=10)
    >>> gfx.get.random_sets_df(adata).columns.tolist()
    ['perturbation', 'genes', 'n_cells', 'rank_mean', 'shift_mean', 'difference']
    """
    found = find_perturbation(adata, key=key, mod=mod)
    if "random_sets" not in found.uns:
        msg = "This result has no random sets of genes: it was made with `null=None`. Leave `null` out to have them."
        raise KeyError(msg)
    table = found.uns["random_sets"].reset_index(drop=True).copy()
    if "random_states" not in found.uns:
        return table
    # In the order of the sets, for the symbols of two sets may be the same.
    columns = ["state", "toward_mean", "toward_difference"]
    of_states = [
        table.assign(**{column: rows[column].to_numpy() for column in columns})
        for _, rows in found.uns["random_states"].groupby("state", sort=False, observed=True)
    ]
    return pd.concat(of_states).sort_index(kind="stable").reset_index(drop=True)


def controls_df(adata: AnnData | MuData, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate what a ranking of perturbed genes has to be held against.

    Read it before the ranking. If effects follow the rank of the gene, a list of strong genes is a list of highly
    expressed ones. If a network with random weights ranks genes alike, what was learnt has no part in it. If
    detection or expression tell the effect, no model was needed. If start and goal cannot be told apart, nothing
    moves from one to the other.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.delete_genes`, :func:`gfx.tl.overexpress_genes` or :func:`gfx.tl.shift_genes`.
    key
        The `key_added` of that call, or its default name.
    mod
        Modality of a MuData.

    Returns
    -------
    Columns `control`, `effect` (what of the cell: ``"shift"`` or ``"toward goal"``), `statistic`, `value`, `n`. The
    controls:

    - ``"rank"`` and ``"rank, random weights"``: Spearman of the shift with the rank of the gene, over random genes of
      all ranks, in the model and in a network with random weights;
    - ``"random weights"``: Spearman of the shifts in both networks, over these genes, and over the perturbations;
    - ``"state axis"``: area under the ROC curve of start against goal along the line between them, in cells or donors
      held out;
    - ``"detection"``, ``"expression"``, ``"rank of gene"``, ``"logfc"``: Spearman with the effect over perturbations
      and random sets, alone and given the other three.

    Raises
    ------
    KeyError
        No such result.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ["CD3D", "MS4A1"], model="mini", null=10)
    >>> gfx.get.controls_df(adata)["control"].head(3).tolist()
    ['rank', 'rank, random weights', 'random weights']
    """
    found = find_perturbation(adata, key=key, mod=mod)
    controls = found.uns["controls"]
    rows = []

    def add(control: str, effect: str, statistic: str, value: float, n: float) -> None:
        rows.append({"control": control, "effect": effect, "statistic": statistic, "value": float(value), "n": int(n)})

    if "rank_trend" in controls:
        sample = controls["rank_trend"]["n"]
        add("rank", "shift", "Spearman", controls["rank_trend"]["spearman"], sample)
        twin = controls["rank_trend_random_weights"]
        add("rank, random weights", "shift", "Spearman", twin["spearman"], twin["n"])
        add("random weights", "shift", "Spearman", controls["random_weights_spearman"], sample)
        of_perturbations = controls["random_weights_spearman_perturbations"]
        add("random weights", "shift", "Spearman over perturbations", of_perturbations, len(found.names))
    if "state_axis" in controls:
        axis = controls["state_axis"]
        add("state axis", "toward goal", f"AUC, {axis['held_out']} held out", axis["auc"], axis["n_folds"])
    for row in controls["baselines"].itertuples():
        name = "rank of gene" if row.baseline == "rank" else row.baseline
        add(name, row.effect, "Spearman", row.spearman, row.n)
        add(name, row.effect, "partial Spearman", row.partial_spearman, row.n)
    return pd.DataFrame(rows, columns=["control", "effect", "statistic", "value", "n"])
