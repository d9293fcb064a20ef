"""Tables of perturbed genes: cells, single cells, other genes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._core.edits import PARTS
from gfx._core.statistics import donors_beside_random, false_discovery_rate, over_donors
from gfx.get._perturbation import find_perturbation

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData
    from mudata import MuData

    from gfx.get._perturbation import PerturbationResult

#: Columns that say what was run, not what came out: they stay where there are too few cells to say anything else.
_SAID_ANYWAY = ("perturbation", "n_cells", "n_donors", "state", "role", "detection", "expression_mean", "logfc")


def deletion_df(
    adata: AnnData | MuData,
    *,
    key: str | None = None,
    min_cells: int = 10,
    min_donors: int = 2,
    mod: str | None = None,
) -> pd.DataFrame:
    """Tabulate what perturbing genes did to cells, one row a perturbation, or a perturbation and state.

    The largest `z` comes first: not what moves cells most, but what moves them most beside random genes of the same
    rank in the same cells. With states, the largest `toward_z` to the goal, and below each perturbation its states.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.delete_genes`, :func:`gfx.tl.overexpress_genes` or :func:`gfx.tl.shift_genes`.
    key
        The `key_added` of that call, or its default name, such as ``"gfx_overexpress"``.
    min_cells, min_donors
        With fewer cells, effects of a perturbation are NaN; with fewer donors, what is over donors.
    mod
        Modality of a MuData.

    Returns
    -------
    Columns:

    - `perturbation`; `n_cells`, cells in which it was done;
    - `shift_mean` and `shift_sd` over these cells (1 - cosine); `composition_mean`, `position_mean`, `context_mean`,
      which add up to `shift_mean`; `rank_mean`, where the genes stood (0 the first gene of a cell, 1 its last);
    - with `null`, random sets of genes of neighbouring rank in the same cells: `random_mean`, where their mean effect
      lies beside `shift_mean`; `random_sd`, the spread over sets of the difference from the perturbation in the cells
      of each; `n_random`, how many there are, and `random_n_cells`, the median number of cells behind one (with one
      or two, only large effects can be told); `z`, the distance of the effect from theirs in these standard
      deviations; `p`, two-sided, the place of z among the z of random sets of all perturbations of that size, each
      taken among the others beside its own; `fdr`, Benjamini-Hochberg over perturbations; `shift_random_weights`, the
      shift in a network with random weights;
    - `detection`, the share of cells with the gene, for a set the mean of its genes; `expression_mean`, mean
      logarithm of normalised counts; with states `logfc`, log2 fold change from start to goal;
    - with states `state` and `role` (start, goal, alternative), and the same as of the shift for the change of the
      cosine to the state, in columns that begin with `toward_`;
    - with `donor_key`, of the effect's excess over random sets: `n_donors`, the mean over donors `donor_mean` with
      its 95 % interval `donor_low` and `donor_high`, and `donor_p`, whether that mean stands out from those of random
      genes, given the spread of both genes and donors; `donor_fdr`. Without `null`, mean and interval are of the
      effect itself, and there is no test. With states, all of this is of the change of the cosine to the state.

    ``attrs["note"]`` says what the p-values are over.

    Raises
    ------
    KeyError
        No such result.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ["CD3D", "MS4A1"], model="mini", null=10)
    >>> table = gfx.get.deletion_df(adata)
    >>> table.columns[:7].tolist()
    ['perturbation', 'n_cells', 'shift_mean', 'shift_sd', 'composition_mean', 'position_mean', 'context_mean']
    """
    found = find_perturbation(adata, key=key, mod=mod)
    table = found.uns["table"].reset_index(drop=True).copy()
    if found.states:
        states = found.uns["state_table"].reset_index(drop=True).drop(columns="n_cells")
        table = table.merge(states, on="perturbation", how="left")
    else:
        table = table.drop(columns="logfc")
    if "donors" in found.uns:
        table = pd.concat([table, _over_donors(table, found, min_donors)], axis=1)
    few = table["n_cells"] < min_cells
    table.loc[few, [column for column in table if column not in _SAID_ANYWAY and table[column].dtype.kind == "f"]] = (
        np.nan
    )
    for prefix in ("", "toward_"):
        if f"{prefix}z" in table:
            _insert_fdr(table, f"{prefix}p", f"{prefix}fdr")
    if "donor_p" in table:
        _insert_fdr(table, "donor_p", "donor_fdr")
    if not (table["n_random"] > 0).any():
        table = table.drop(columns=[c for c in table if c.removeprefix("toward_") in _OF_RANDOM_SETS])
    table = _sorted(table)
    table.attrs["note"] = str(found.uns["note"])
    return table


_OF_RANDOM_SETS = ("random_mean", "random_sd", "n_random", "random_n_cells", "z", "p", "fdr", "shift_random_weights")


def _insert_fdr(table: pd.DataFrame, p: str, name: str) -> None:
    """Adjust p-values over perturbations, those of each state by themselves."""
    of = table["state"] if "state" in table and p != "p" else pd.Series("", index=table.index)
    adjusted = pd.Series(np.nan, index=table.index)
    for _, rows in table.groupby(of, sort=False):
        # The effect on the cell itself is in a row of each state: a perturbation counts once.
        once = rows.drop_duplicates("perturbation")
        values = dict(zip(once["perturbation"], false_discovery_rate(once[p].to_numpy()), strict=True))
        adjusted[rows.index] = rows["perturbation"].map(values)
    table.insert(table.columns.get_loc(p) + 1, name, adjusted)


def _over_donors(table: pd.DataFrame, found: PerturbationResult, min_donors: int) -> pd.DataFrame:
    """Intervals and tests over donors, in the rows of the table.

    With random sets all is of the excess over them, NaN where none were found; without, there are intervals of the
    effect itself and no test, for there is nothing to test it against.
    """
    on = ["perturbation", "state"] if found.states else ["perturbation"]
    donors = found.uns["donor_states" if found.states else "donors"]
    effect, prefix = ("toward", "toward_") if found.states else ("shift", "")
    of = dict(list(donors.groupby(on, observed=True)))
    column = f"{effect}_excess" if "random_sets" in found.uns else f"{effect}_mean"
    rows = []
    for row in table.to_dict("records"):
        values = of.get(tuple(row[name] for name in on), donors.iloc[:0])[column].to_numpy(dtype=np.float64)
        interval = over_donors(values)
        told = {"donor_mean": interval.mean, "donor_low": interval.low, "donor_high": interval.high, "donor_p": np.nan}
        if "random_sets" in found.uns:
            told["donor_p"] = donors_beside_random(values, row[f"{prefix}random_sd"], row[f"{prefix}n_random"])
        enough = interval.n >= min_donors
        rows.append({"n_donors": interval.n, **{name: value if enough else np.nan for name, value in told.items()}})
    return pd.DataFrame(rows, index=table.index)


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    """Largest z first, or effect where there is none; the states of a perturbation stay together."""
    prefix = "toward_" if "state" in table else ""
    has_z = f"{prefix}z" in table and table[f"{prefix}z"].notna().any()
    by = f"{prefix}z" if has_z else f"{prefix or 'shift_'}mean"
    of_perturbation = table[table["role"] == "goal"] if "state" in table else table
    order = of_perturbation.sort_values(by, ascending=False, kind="stable", na_position="last")["perturbation"]
    place: Callable = dict(zip(order, range(len(order)), strict=True)).get
    return table.sort_values("perturbation", key=lambda names: names.map(place), kind="stable").reset_index(drop=True)


def deletion_cells_df(adata: AnnData | MuData, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate the effect on every cell, one row a cell and perturbation (and state).

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
    Columns `cell`, `perturbation`, `shift`, and `composition`, `position` and `context`, which add up to it; with
    states `state` and `toward`. Cells that were not perturbed are left out.

    Raises
    ------
    KeyError
        No such result.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, "CD3D", model="mini", null=None)
    >>> gfx.get.deletion_cells_df(adata).columns.tolist()
    ['cell', 'perturbation', 'shift', 'composition', 'position', 'context']
    """
    found = find_perturbation(adata, key=key, mod=mod)
    names = np.asarray(found.names, dtype=object)
    shift, parts = found.obsm("obsm"), found.obsm("obsm_parts")
    cell, perturbation = np.nonzero(~np.isnan(shift))
    frame = pd.DataFrame(
        {
            "cell": found.adata.obs_names.to_numpy()[cell],
            "perturbation": names[perturbation],
            "shift": shift[cell, perturbation],
            **{part: parts[cell, perturbation, at] + 0.0 for at, part in enumerate(PARTS)},
        }
    )
    if not found.states:
        return frame
    toward = found.obsm("obsm_states")
    of_states = [
        frame.assign(state=state, toward=toward[cell, perturbation, at]) for at, state in enumerate(found.states)
    ]
    return pd.concat(of_states, ignore_index=True)


def gene_effects_df(
    adata: AnnData | MuData,
    perturbation: str | None = None,
    *,
    key: str | None = None,
    min_cells: int = 10,
    mod: str | None = None,
) -> pd.DataFrame:
    """Tabulate how far each other gene moved, the farthest beside random perturbations first.

    Some genes move whatever is done to a cell, and some perturbations move all genes. `excess` takes off both: it is
    the logarithm to base 2 of the gene's shift over its shift when random genes are perturbed, less the median over
    genes.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.delete_genes`, :func:`gfx.tl.overexpress_genes` or :func:`gfx.tl.shift_genes`.
    perturbation
        Its name, such as ``"GATA4"`` or ``"GATA4+TBX5"``; `None` for all of them.
    key
        The `key_added` of that call, or its default name.
    min_cells
        Genes seen together with the perturbed ones in fewer cells are left out.
    mod
        Modality of a MuData.

    Returns
    -------
    Columns `perturbation`, `gene`, `shift` (1 - cosine, mean over cells), `shift_sd`, `n_cells`; with random sets
    `random_shift`, the mean under these, over the runs in cells that have the gene, NaN if there are fewer than five,
    and `excess`, 1 for a gene that moves twice as far beyond these as the median gene. Sorted by `excess`, else by
    `shift`.

    Raises
    ------
    KeyError
        No such result, or no such perturbation in it.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, "CD3D", model="mini", null=10)
    >>> gfx.get.gene_effects_df(adata, "CD3D").columns.tolist()
    ['perturbation', 'gene', 'shift', 'shift_sd', 'n_cells', 'random_shift', 'excess']
    """
    found = find_perturbation(adata, key=key, mod=mod)
    chosen = range(len(found.names)) if perturbation is None else [found.number_of(perturbation)]
    shift, sd, n_cells = (found.varm(slot) for slot in ("varm", "varm_sd", "varm_n_cells"))
    has_random = found.keys.varm_null in found.adata.varm
    parts = []
    for at in chosen:
        seen = n_cells[:, at] >= max(min_cells, 1)
        part = pd.DataFrame(
            {
                "perturbation": found.names[at],
                "gene": found.adata.var_names.to_numpy()[seen],
                "shift": shift[seen, at],
                "shift_sd": sd[seen, at],
                "n_cells": n_cells[seen, at],
            }
        )
        if has_random:
            random = found.varm("varm_null")[seen, at]
            part = part.assign(random_shift=random, excess=_excess(part["shift"].to_numpy(), random))
        parts.append(part.sort_values("excess" if has_random else "shift", ascending=False, kind="stable"))
    return pd.concat(parts, ignore_index=True)


def _excess(shift: np.ndarray, random: np.ndarray) -> np.ndarray:
    """log2 ratio to the shift under random sets, less its median; NaN where one of them is 0 or unknown."""
    usable = (shift > 0) & (random > 0)
    ratio = np.full(len(shift), np.nan)
    ratio[usable] = np.log2(shift[usable].astype(np.float64) / random[usable])
    return ratio - np.median(ratio[usable]) if usable.any() else ratio
