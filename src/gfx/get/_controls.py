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
    Columns `control`, `effect` (``"shift"`` of the cell, or its movement ``"toward goal"``), `statistic`, `value`, `n`
    and `over`, what is counted by n. The controls:

    - ``"rank"`` and ``"rank, random weights"``: how the shift follows the rank of the gene, over random genes of all
      ranks, in the model and in a network with random weights; Spearman, and the slope of the fitted line through the
      natural logarithms of shifts, from the first gene of a cell to its last;
    - ``"random weights"``: Spearman of the effects in both networks, over these genes, and over the perturbations
      (those of the commonest number of genes, for larger sets move cells more in any network);
    - ``"state axis"``: area under the ROC curve of start against goal along the line between them, in cells or donors
      held out;
    - ``"detection"``, ``"expression"``, ``"rank of gene"``, ``"logfc"``: Spearman with the effect over genes of all
      ranks (over the perturbations where `null` was `None`), alone and given the others. Detection and expression say
      nearly the same: given each other, little is left of either.

    Raises
    ------
    KeyError
        No such result.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ["CD3D", "MS4A1"], model="mini", null=10)
    >>> gfx.get.controls_df(adata)["control"].unique()[:3].tolist()
    ['rank', 'rank, random weights', 'random weights']
    """
    found = find_perturbation(adata, key=key, mod=mod)
    controls = found.uns["controls"]
    rows = []

    def add(control: str, effect: str, statistic: str, value: float, *, n: float, over: str) -> None:
        told = {"control": control, "effect": effect, "statistic": statistic, "value": float(value), "n": int(n)}
        rows.append(told | {"over": over})

    of_all_ranks = "genes of all ranks"
    for name in ("rank", "rank, random weights"):
        trend = controls.get("rank_trend" + name.removeprefix("rank").replace(", ", "_").replace(" ", "_"))
        if trend is not None:
            add(name, "shift", "Spearman", trend["spearman"], n=trend["n"], over=of_all_ranks)
            add(name, "shift", "slope of the logarithm", trend["slope"], n=trend["n"], over=of_all_ranks)
    for effect in ("shift", "toward goal"):
        twin = controls.get(f"random_weights, {effect}")
        if twin is not None:
            add("random weights", effect, "Spearman", twin["spearman"], n=twin["n"], over=of_all_ranks)
            of_sets, n = twin["spearman_perturbations"], twin["n_perturbations"]
            add("random weights", effect, "Spearman", of_sets, n=n, over="perturbations")
    if "state_axis" in controls:
        axis = controls["state_axis"]
        add("state axis", "toward goal", "AUC", axis["auc"], n=axis["n_folds"], over=f"folds of {axis['held_out']}")
    over = of_all_ranks if "rank_trend" in controls else "perturbations"
    for row in controls["baselines"].itertuples():
        name = "rank of gene" if row.baseline == "rank" else row.baseline
        add(name, row.effect, "Spearman", row.spearman, n=row.n, over=over)
        add(name, row.effect, "partial Spearman", row.partial_spearman, n=row.n, over=over)
    return pd.DataFrame(rows, columns=["control", "effect", "statistic", "value", "n", "over"])


def rank_trend_df(adata: AnnData | MuData, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate the effects of random genes of all ranks, in the model and in a network with random weights.

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
    One row a random gene: `rank`, where it stands in its cell (0 the first gene, 1 the last), `shift`,
    `shift_random_weights`, and with states `toward_goal` and `toward_goal_random_weights`. ``attrs["trend"]`` and
    ``attrs["trend_random_weights"]`` hold the lines fitted to the natural logarithms of shifts: `intercept`, `slope`,
    `sd`.

    Raises
    ------
    KeyError
        No such result, or one without random genes.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, "CD3D", model="mini", null=10)
    >>> gfx.get.rank_trend_df(adata).columns.tolist()
    ['rank', 'shift', 'shift_random_weights']
    """
    found = find_perturbation(adata, key=key, mod=mod)
    if "genes_of_all_ranks" not in found.uns:
        msg = "This result has no genes of all ranks: it was made with `null=None`. Leave `null` out to have them."
        raise KeyError(msg)
    table = found.uns["genes_of_all_ranks"].reset_index(drop=True).copy()
    controls = found.uns["controls"]
    for name, trend in (("trend", "rank_trend"), ("trend_random_weights", "rank_trend_random_weights")):
        table.attrs[name] = {part: float(controls[trend][part]) for part in ("intercept", "slope", "sd")}
    return table
