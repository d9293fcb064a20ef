"""Tables of perturbed genes: cells, single cells, other genes, sets of genes, and their random controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._core.arguments import did_you_mean
from gfx._core.edits import PARTS
from gfx._core.statistics import donors_against_random, false_discovery_rate, over_donors, rank_sum, rank_trend
from gfx._docs import shared
from gfx._results import PERTURBATIONS, find

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gfx._results import Slots
    from gfx._types import Data

#: Columns that describe the perturbation, not its effect: they stay where too few cells were perturbed.
_DESCRIPTIVE = ("perturbation", "n_cells", "n_donors", "state", "role", "detection", "expression_mean", "logfc")

#: Columns that compare with random sets.
_RANDOM = ("random_mean", "random_sd", "n_random", "random_n_cells", "z", "p", "fdr")

#: Non-target genes that each target is matched with, and more where several are equally near.
N_MATCHED = 10


def _find(data: Data, key: str | None, mod: str | None) -> Slots:
    return find(data, *PERTURBATIONS, key=key, mod=mod)


@shared()
def deletion_df(
    adata: Data,
    *,
    key: str | None = None,
    min_cells: int = 10,
    min_donors: int = 2,
    mod: str | None = None,
) -> pd.DataFrame:
    """Tabulate the effect of each perturbation on cells, compared with random genes of the same rank.

    The table has one row per perturbation, or with states one row per perturbation and state. It is sorted by z-score
    in descending order: perturbing any gene shifts the embedding, so only an effect beyond that of random genes of the
    same rank in the same cells is informative. With states, perturbations are sorted by the z-score of the shift toward
    the goal, and the rows of the other states follow that of the goal.

    Parameters
    ----------
    {after_perturbing}
    {key}
    min_cells, min_donors
        Effects of perturbations in fewer than `min_cells` cells are NaN, and so are statistics over fewer than
        `min_donors` donors.
    {mod}

    Returns
    -------
    Columns:

    - `perturbation`; `n_cells`, the number of perturbed cells;
    - `shift_mean` and `shift_sd`: mean and standard deviation over these cells of the shift (1 - cosine between the
      embedding before and after); with the control ``"parts"`` `composition_mean`, `position_mean` and `context_mean`,
      the parts of `shift_mean`, which add up to it; `rank_mean`, the mean rank of the genes (0 is the first gene of a
      cell, 1 the last);
    - with random sets, which are rank-matched random gene sets perturbed in the same cells: `random_mean`,
      `shift_mean` minus the mean excess over them, each taken in the cells of that set; `random_sd`, the standard
      deviation over sets of the difference from the perturbation in the same cells; `n_random`, the number of sets;
      `random_n_cells`, the median number of cells of a set (with one or two cells, only large effects are detectable);
      `z`, the z-score: `shift_mean` minus `random_mean`, divided by `random_sd`; `p`,
      the two-sided p-value: the fraction of leave-one-out z-scores that are at least as extreme, among the random sets
      of all perturbations with the same number of genes; `fdr`, the false discovery rate: p-values adjusted over
      perturbations by the method of Benjamini and Hochberg; `random_weights_shift_mean`, the mean shift in a
      random-weights model, in a quarter of these cells, ten at most;
    - `detection`, the fraction of cells with the gene (for a set, the mean over its genes); `expression_mean`, the mean
      logarithm of normalised counts; with states `logfc`, the log2 fold change from start to goal as scanpy
      computes it, about 30 or -30 for a gene that no cell of one of them has;
    - with states, `state` and `role` (start, goal, alternative), and columns that begin with `toward_`, which contain
      the same statistics for the shift toward the state (change of the cosine to its centroid); with the control
      ``"centroids"`` also `toward_without_mean`, the mean shift toward the centroid of cells without the perturbed
      genes;
    - with `donor_key`, statistics of the excess, which is the effect minus the mean effect of random sets in the same
      cells: `n_donors`; the mean over donors `donor_mean` with its 95 % interval `donor_low` to `donor_high`;
      `donor_p`, the p-value of a test of whether this mean differs from that of random genes, given the variance
      between donors and between genes; `donor_fdr`. Without random sets, mean and interval are those of the effect
      itself, and there is no test. With states, all of these columns refer to the shift toward the state.

    ``attrs["note"]`` says what the replicates of the p-values are.

    Raises
    ------
    KeyError
        No such result.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ["CD3D", "MS4A1"], model="mini", n_random=10)
    >>> table = gfx.get.deletion_df(adata)
    >>> table.columns[:7].tolist()
    ['perturbation', 'n_cells', 'shift_mean', 'shift_sd', 'composition_mean', 'position_mean', 'context_mean']
    """
    result = _find(adata, key, mod)
    table = result.uns["table"].reset_index(drop=True)
    measure, prefix, groups = "shift", "", ["perturbation"]
    if "state_table" in result.uns:
        table = table.merge(result.uns["state_table"].drop(columns="n_cells"), on="perturbation", how="left")
        measure, prefix, groups = "toward", "toward_", ["perturbation", "state"]
    else:
        table = table.drop(columns="logfc")
    if "donors" in result.uns:
        table = table.join(_over_donors(result, table.set_index(groups), measure, prefix, min_donors))
    table = _with_fdr(table, min_cells)
    if not (table["n_random"] > 0).any():
        table = table.drop(columns=[column for column in table if column.removeprefix("toward_") in _RANDOM])
        if table["random_weights_shift_mean"].isna().all():
            table = table.drop(columns="random_weights_shift_mean")
    z = f"{prefix}z"
    by = z if z in table and table[z].notna().any() else f"{measure}_mean"
    # A perturbation is where its goal belongs; its other states follow.
    ranked = (table[table["role"] == "goal"] if prefix else table).sort_values(by, ascending=False, kind="stable")
    place = {name: number for number, name in enumerate(ranked["perturbation"])}
    table = table.iloc[np.argsort(table["perturbation"].map(place), kind="stable")].reset_index(drop=True)
    table.attrs["note"] = str(result.uns["note"])
    return table


def _with_fdr(table: pd.DataFrame, min_cells: int) -> pd.DataFrame:
    """Set effects in few cells to NaN, and adjust each p-value over perturbations, separately for each state."""
    effects = [column for column in table if column not in _DESCRIPTIVE and table[column].dtype.kind == "f"]
    table.loc[table["n_cells"] < min_cells, effects] = np.nan
    states = table["state"] if "state" in table else np.zeros(len(table))
    for p in [column for column in table if column == "p" or column.endswith("_p")]:
        fdr = table.groupby(states, observed=True)[p].transform(lambda values: false_discovery_rate(values.to_numpy()))
        table.insert(table.columns.get_loc(p) + 1, f"{p.removesuffix('p')}fdr", fdr)
    return table


def _over_donors(result: Slots, table: pd.DataFrame, measure: str, prefix: str, min_donors: int) -> pd.DataFrame:
    """Intervals and tests over donors, in the order of the table, which is indexed by perturbation (and state)."""
    has_random = "random_sets" in result.uns
    donors = result.uns["donor_states" if prefix else "donors"].groupby([*table.index.names], observed=True)
    by_group = dict(list(donors[f"{measure}_{'excess' if has_random else 'mean'}"]))
    rows = []
    for group, row in zip(table.index, table.to_dict("records"), strict=True):
        values = by_group.get(group if prefix else (group,), pd.Series(dtype=float)).to_numpy(dtype=np.float64)
        *interval, n = over_donors(values)
        p = donors_against_random(values, row[f"{prefix}random_sd"], row[f"{prefix}n_random"]) if has_random else np.nan
        rows.append((n, *((*interval, p) if n >= min_donors else [np.nan] * 4)))
    return pd.DataFrame(rows, columns=["n_donors", "donor_mean", "donor_low", "donor_high", "donor_p"])


@shared()
def deletion_cells_df(adata: Data, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate the effect on every cell, one row a cell and perturbation (and state).

    Parameters
    ----------
    {after_perturbing}
    {key}
    {mod}

    Returns
    -------
    Columns `cell`, `perturbation`, `shift` (1 - cosine), and, with the control ``"parts"``, its parts `composition`,
    `position` and `context`, which add up to it; with states `state` and `toward`, the change of the cosine to the
    centroid of the state. Cells that were not perturbed are left out.

    Raises
    ------
    KeyError
        No such result.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, "CD3D", model="mini", controls=["parts"])
    >>> gfx.get.deletion_cells_df(adata).columns.tolist()
    ['cell', 'perturbation', 'shift', 'composition', 'position', 'context']
    """
    result = _find(adata, key, mod)
    shift = result.read("obsm")
    cell, perturbation = np.nonzero(~np.isnan(shift))
    table = pd.DataFrame(
        {
            "cell": result.adata.obs_names.to_numpy()[cell],
            "perturbation": np.array(result.names("perturbations"), dtype=object)[perturbation],
            "shift": shift[cell, perturbation],
        }
    )
    if result.has("obsm", "parts"):
        parts = result.read("obsm", "parts")[cell, perturbation]
        table = table.assign(**{part: parts[:, number] + 0.0 for number, part in enumerate(PARTS)})
    if not (states := result.names("states")):
        return table
    toward = result.read("obsm", "states")[cell, perturbation]
    of_states = [table.assign(state=state, toward=toward[:, number]) for number, state in enumerate(states)]
    return pd.concat(of_states, ignore_index=True)


@shared()
def gene_effects_df(
    adata: Data,
    perturbation: str | None = None,
    *,
    key: str | None = None,
    min_cells: int = 10,
    mod: str | None = None,
) -> pd.DataFrame:
    """Tabulate the shift of each other gene, compared with its shift when random genes are perturbed.

    Some genes shift under any perturbation, and some perturbations shift all genes. The excess corrects for both.

    Parameters
    ----------
    {after_perturbing}
    perturbation
        Its name, such as ``"GATA4"`` or ``"GATA4+TBX5"``. `None` tabulates all perturbations.
    {key}
    {min_perturbed_cells}
    {mod}

    Returns
    -------
    Columns `perturbation`, `gene`, `shift` (1 - cosine, mean over cells), `shift_sd`, its population standard deviation
    over these cells, and `n_cells`. With random sets, `random_shift`, the mean shift of the gene when these are
    perturbed, NaN if fewer than five of their cells have the gene; and `excess`, the log2 ratio of `shift` to
    `random_shift` less its median over genes: 1 means twice as much beyond random sets as the median gene. Sorted by
    `excess`, or else by `shift`, descending.

    Raises
    ------
    KeyError
        No such result, or no such perturbation in it.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, "CD3D", model="mini", n_random=10)
    >>> gfx.get.gene_effects_df(adata, "CD3D").columns.tolist()
    ['perturbation', 'gene', 'shift', 'shift_sd', 'n_cells', 'random_shift', 'excess']
    """
    result = _find(adata, key, mod)
    names = result.names("perturbations")
    if perturbation is not None and perturbation not in names:
        shown = names[:10] + ["..."] * (len(names) > 10)
        hint = did_you_mean(perturbation, names)
        msg = f"Did not find the perturbation {perturbation!r}.{hint} Present: {shown}."
        raise KeyError(msg)
    slots = {"shift": "", "shift_sd": "sd", "n_cells": "n_cells"}
    if result.has("varm", "null"):
        slots["random_shift"] = "null"
    values = {column: result.read("varm", part) for column, part in slots.items()}
    tables = []
    for name in names if perturbation is None else [perturbation]:
        number = names.index(name)
        has_enough = values["n_cells"][:, number] >= max(min_cells, 1)
        columns = {column: of_all[has_enough, number] for column, of_all in values.items()}
        genes = result.adata.var_names.to_numpy()[has_enough]
        table = pd.DataFrame({"perturbation": name, "gene": genes, **columns})
        if "random_shift" in table:
            table["excess"] = _excess(table["shift"].to_numpy(), table["random_shift"].to_numpy())
        by = "excess" if "excess" in table else "shift"
        tables.append(table.sort_values(by, ascending=False, kind="stable"))
    return pd.concat(tables, ignore_index=True)


def _excess(shift: np.ndarray, random: np.ndarray) -> np.ndarray:
    """log2 ratio to the shift under random sets, less its median; NaN where one of them is 0 or unknown."""
    usable = (shift > 0) & (random > 0)
    ratio = np.full(len(shift), np.nan)
    ratio[usable] = np.log2(shift[usable].astype(np.float64) / random[usable])
    return ratio - np.median(ratio[usable]) if usable.any() else ratio


@shared()
def target_effects_df(
    adata: Data,
    targets: Mapping[str, Sequence[str]],
    *,
    perturbation: str | None = None,
    key: str | None = None,
    min_cells: int = 10,
    mod: str | None = None,
) -> pd.DataFrame:
    """Test whether known targets of a gene shift more than other genes when it is perturbed :cite:p:`Theodoris2023`.

    The paper compared direct with indirect targets of GATA4 and TBX5, and both with housekeeping genes, by rank-sum
    tests over genes. Such a test also responds to genes that are in many cells, or that shift under any perturbation.
    The effect tested is therefore the excess over random sets where these were run, and each set is also compared with
    matched genes: for each target, the ten or more other genes that are in the most similar number of cells and, where
    random sets were run, shift to the most similar extent when these are perturbed.

    Parameters
    ----------
    {after_perturbing}
    targets
        Sets of genes by name, such as ``{"direct": [...], "indirect": [...]}``, as they are called in `var_names`.
    perturbation
        Its name. `None` tests all perturbations.
    {key}
    {min_perturbed_cells}
    {mod}

    Returns
    -------
    One row a perturbation and comparison: `perturbation`, `targets` and `others`, the sets compared (``"all other
    genes"``, ``"matched genes"``, or another set of `targets`); `n_targets`, `n_others`; `median_targets`,
    `median_others`, medians of `effect`, which is ``"excess"`` or ``"shift"`` of :func:`gfx.get.gene_effects_df`;
    `auc`, the probability that a target has a larger effect than another gene; `p`, two-sided Wilcoxon rank-sum test
    over genes, exact if a set has at most eight genes and no effects are tied; `fdr`, p adjusted over all rows by
    Benjamini and Hochberg. NaN where a set has fewer than two genes.

    Raises
    ------
    KeyError
        No such result or perturbation.
    ValueError
        `targets` is empty, or none of a set's genes is among `var_names`.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, "CD3D", model="mini", n_random=10)
    >>> targets = {"complex": ["CD3E", "CD3G", "CD247"]}
    >>> gfx.get.target_effects_df(adata, targets)["others"].tolist()
    ['all other genes', 'matched genes']
    """
    effects = gene_effects_df(adata, perturbation, key=key, min_cells=min_cells, mod=mod)
    effect = "excess" if "excess" in effects else "shift"
    effects = effects.dropna(subset=[effect])
    sets = _check_targets(targets, _find(adata, key, mod).adata.var_names)
    rows = []
    for name, genes in effects.groupby("perturbation", sort=False):
        values = genes[effect].to_numpy(dtype=np.float64)
        matched_by = genes[["n_cells", *(["random_shift"] if "random_shift" in genes else [])]]
        ranks = matched_by.rank().to_numpy()
        is_target = {label: genes["gene"].isin(members).to_numpy() for label, members in sets.items()}
        in_none = ~np.logical_or.reduce(list(is_target.values()))
        labels = list(sets)
        for number, label in enumerate(labels):
            members = is_target[label]
            comparisons = {"all other genes": in_none, "matched genes": _matched(members, in_none, ranks)}
            comparisons |= {other: is_target[other] & ~members for other in labels[number + 1 :]}
            rows += [
                {"perturbation": name, "targets": label, "others": other, "effect": effect}
                | _compare(values[members], values[compared])
                for other, compared in comparisons.items()
            ]
    columns = ["perturbation", "targets", "others", "effect", *_compare(np.zeros(0), np.zeros(0))]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(fdr=false_discovery_rate(table["p"].to_numpy(dtype=np.float64)))


def _check_targets(targets: Mapping[str, Sequence[str]], var_names: pd.Index) -> dict[str, set[str]]:
    if not hasattr(targets, "items") or not targets:
        msg = '`targets` maps names to genes, such as {"direct": ["MYH6", "MYH7"]}; found ' + f"{targets!r}."
        raise ValueError(msg)
    sets = {str(label): set(map(str, genes)) for label, genes in targets.items()}
    for label, genes in sets.items():
        if not genes & set(var_names):
            msg = (
                f"None of the {len(genes)} genes of {label!r}, such as {sorted(genes)[:3]}, is in `adata.var_names`, "
                f"such as {var_names[:3].tolist()}. Give them as they are called there."
            )
            raise ValueError(msg)
    return sets


def _matched(targets: np.ndarray, candidates: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Candidates that are nearest to a target by the ranks of what is matched, bool `(n_genes,)`.

    Of candidates that are equally near, all or none are taken: genes come in the order of their effects, so the first
    ones would be those with the largest.
    """
    matched = np.zeros(len(targets), dtype=bool)
    numbers = np.flatnonzero(candidates)
    for target in np.flatnonzero(targets):
        distance = abs(ranks[numbers] - ranks[target]).sum(axis=1)
        matched[numbers[distance <= np.sort(distance)[:N_MATCHED].max(initial=0)]] = True
    return matched


def _compare(targets: np.ndarray, others: np.ndarray) -> dict[str, float]:
    is_target = np.arange(len(targets) + len(others)) < len(targets)
    area, p = rank_sum(np.concatenate([targets, others])[:, None], is_target)
    return {
        "n_targets": len(targets),
        "n_others": len(others),
        "median_targets": float(np.median(targets)) if len(targets) else np.nan,
        "median_others": float(np.median(others)) if len(others) else np.nan,
        "auc": float(area[0]),
        "p": float(p[0]),
    }


@shared()
def synergy_df(adata: Data, *, key: str | None = None, min_cells: int = 10, mod: str | None = None) -> pd.DataFrame:
    """Tabulate the effect of genes perturbed together beyond their single effects :cite:p:`Theodoris2023`.

    There are two measures of the excess, which are computed in each cell. *On shifts*, as published: the shift with all
    genes perturbed minus the sum of the shifts with each gene perturbed by itself. But 1 - cosine grows with the square
    of a small displacement: two genes that displace a cell equally and in the same direction together have four times
    the shift of one gene, and look synergistic. *On vectors*: the shift with all genes perturbed minus the shift that
    would result if the displacements of the single genes simply added up. Random pairs of genes have an excess by both
    measures, too; the z-score and the p-value compare the excess with theirs.

    Parameters
    ----------
    adata
        After perturbing tuples of genes, such as ``gfx.tl.delete_genes(adata, [("GATA4", "TBX5")])``.
    {key}
    min_cells
        Effects of sets in fewer cells than this are NaN.
    {mod}

    Returns
    -------
    One row per set of several genes, with the columns `perturbation` and `n_cells`; `together_mean`, the mean shift
    with all genes perturbed, and `summed_mean`, the mean sum of the shifts with each gene perturbed by itself;
    `displaced_mean` and `composed_mean`, the mean of 1 - cosine for the cell's vector with all genes perturbed and with
    the summed displacements of the single genes (`together_mean` and `displaced_mean` differ only with
    ``pooling="genes"``). The columns of the two measures begin with `on_shifts_` and `on_vectors_`: `mean` is the
    excess; `low` to `high` is its 95 % interval; `z`, `p` and `fdr` compare the excess with that of rank-matched random
    sets as in :func:`gfx.get.deletion_df`. `interval_over` is ``"donors"``, or ``"cells"``, which are not replicates.
    The table is sorted by `on_vectors_z` in descending order.

    Raises
    ------
    KeyError
        There is no such result, or it contains no set of several genes.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ("CD3D", "CD3E"), model="mini", n_random=10)
    >>> gfx.get.synergy_df(adata)["perturbation"].tolist()
    ['CD3D+CD3E']
    """
    result = _find(adata, key, mod)
    if "synergy" not in result.uns:
        msg = (
            "No genes were perturbed together in any cell. Give tuples of genes, such as "
            '`gfx.tl.delete_genes(adata, [("GATA4", "TBX5")])`.'
        )
        raise KeyError(msg)
    table = _with_fdr(result.uns["synergy"].reset_index(drop=True).copy(), min_cells)
    table = table.sort_values(["on_vectors_z", "on_vectors_mean"], ascending=False, kind="stable", ignore_index=True)
    table.attrs["note"] = str(result.uns["note"])
    return table


@shared()
def controls_df(adata: Data, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate how far a ranking of perturbed genes is explained by controls.

    Read this table before the ranking itself. If effects follow the rank of the gene, a list of genes with large
    effects is merely a list of highly expressed genes. If a random-weights model ranks genes in the same way, the
    ranking does not depend on what the model has learned. If a baseline predicts the effects, no model was needed. If
    start and goal are not separable, a shift from one toward the other has no meaning.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.delete_genes`, :func:`gfx.tl.overexpress_genes`, :func:`gfx.tl.shift_genes` or
        :func:`gfx.tl.screen_genes`.
    {key}
    {mod}

    Returns
    -------
    Columns `control`; `measure`, ``"shift"`` (shift of the cell) or ``"toward"`` (shift toward the goal); `statistic`;
    `value`; and `n`, the number of genes, perturbations, folds or cells from which the value was computed. After
    perturbations, correlations are over 100 random genes of all ranks (if these were not run, over the perturbations);
    after a screen, they are over all genes. The rows of each control are:

    ``"random_weights"``
        `spearman`: rank correlation of the effects in the model with those in the random-weights model, in the same
        cells. After perturbations also `spearman_perturbations`, the same over those perturbations that have the most
        frequent number of genes; and `rank_spearman` and `rank_slope`, which are `spearman` and `slope` of ``"rank"``
        (see below) for the random-weights model.
    ``"rank"``, ``"detection"``, ``"expression"``, ``"logfc"``
        `spearman`: rank correlation of the effects with this baseline; `partial_spearman`: the same given the other
        baselines. Detection and expression are so similar that the partial correlation of each, given the other, is
        small. After perturbations, `spearman` of the shift with ``"rank"`` uses the rank in the perturbed cell, and
        `slope` is the slope of a line fitted to the natural logarithm of the shift, per rank from 0 (first gene) to 1
        (last gene).
    ``"exact"``
        After first-order estimates: `spearman`, the rank correlation of estimates with exact effects over the genes of
        a cell, and `precision`, the fraction of the largest 10 % of the estimates in a cell that are among the largest
        20 % of the exact effects, by absolute value. Both are means over `n` cells. In each cell they are estimated
        from 30 genes: at least 10 are drawn from the largest estimates and the rest from the others, and each gene is
        weighted by the inverse of its probability of being drawn.
    ``"state_axis"``
        With a goal, `auc`: area under the ROC curve for distinguishing start from goal along the line between their
        centroids, in held-out donors (without `donor_key`, in held-out cells), averaged over `n` folds; 0.5 is chance.
        A screen uses up to 1,000 cells of the start.

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


@shared()
def random_sets_df(adata: Data, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate the rank-matched random gene sets of each perturbation, one row a set (and state).

    Parameters
    ----------
    {after_perturbing}
    {key}
    {mod}

    Returns
    -------
    Columns `perturbation`; `genes`, the random set; `n_cells`, the cells it was perturbed in; `rank_mean`;
    `shift_mean`; `difference`, its shift less that of the perturbation in the same cells. Where genes were perturbed
    together, `on_shifts_difference` and `on_vectors_difference`, the same of the two measures of
    :func:`gfx.get.synergy_df`. With states `state`, `toward_mean` and `toward_difference`.

    Raises
    ------
    KeyError
        No such result, or one without random sets.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, "CD3D", model="mini", n_random=10)
    >>> gfx.get.random_sets_df(adata).columns.tolist()
    ['perturbation', 'genes', 'n_cells', 'rank_mean', 'shift_mean', 'difference']
    """
    result = _find(adata, key, mod)
    table = _table_of_control(result, "random_sets", "random gene sets")
    if "random_states" not in result.uns:
        return table
    of_states = result.uns["random_states"]  # the same sets in the same order, state after state
    repeated = pd.concat([table] * len(result.names("states")))
    columns = {name: of_states[name].to_numpy() for name in ("state", "toward_mean", "toward_difference")}
    return repeated.assign(**columns).sort_index(kind="stable").reset_index(drop=True)


@shared()
def rank_trend_df(adata: Data, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate the effects of random genes of all ranks, in the model and in a model with random weights.

    Parameters
    ----------
    {after_perturbing}
    {key}
    {mod}

    Returns
    -------
    One row a random gene in a random cell: `rank`, its rank in the cell (0 is the first gene, 1 the last); `shift` and,
    with states, `toward`, the shift toward the goal; `random_weights_shift` and `random_weights_toward`, the same in
    the model with random weights. ``attrs["trend"]`` and ``attrs["random_weights_trend"]`` hold the lines fitted to the
    natural logarithms of shifts: `intercept`, `slope`, and `sd` of the residuals.

    Raises
    ------
    KeyError
        No such result, or one without random genes.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, "CD3D", model="mini", n_random=10)
    >>> gfx.get.rank_trend_df(adata).columns.tolist()
    ['rank', 'shift', 'random_weights_shift']
    """
    table = _table_of_control(_find(adata, key, mod), "genes_of_all_ranks", "genes of all ranks")
    for prefix in ("", "random_weights_"):
        trend = rank_trend(table["rank"].to_numpy(), table[f"{prefix}shift"].to_numpy())
        table.attrs[f"{prefix}trend"] = {name: trend[name] for name in ("intercept", "slope", "sd")}
    return table


def _table_of_control(result: Slots, entry: str, description: str) -> pd.DataFrame:
    """Copy the table of a control, or say that the call ran without it."""
    if entry not in result.uns:
        msg = (
            f"The result {result.key!r} of `gfx.{result.function}` has no {description}, because that call ran without "
            "this control. Run it again with its default controls."
        )
        raise KeyError(msg)
    return result.uns[entry].reset_index(drop=True).copy()
