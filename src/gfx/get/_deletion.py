"""Tables of perturbed genes: cells, single cells, other genes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._core.statistics import false_discovery_rate, over_donors
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
    - with `null`, `random_mean` and `random_sd`, the shift by random sets of genes of neighbouring rank in the same
      cells, mean and spread over sets; `n_random`; `z`, `p` (empirical, two-sided) and `fdr` (Benjamini-Hochberg over
      perturbations) of the effect among them; `shift_random_weights`, by a network with random weights;
    - `detection`, the share of cells with the genes; `expression_mean`, mean logarithm of normalised counts; with
      states `logfc`, log2 fold change from start to goal;
    - with states `state` and `role` (start, goal, alternative), and the same as of the shift for the change of the
      cosine to the state, in columns that begin with `toward_`;
    - with `donor_key`, `n_donors`, and over donors `donor_mean`, `donor_low`, `donor_high` (95 %) and `donor_p`, of the
      effect's excess over random sets (of the change of cosine to the state itself where there are none), and
      `donor_fdr`.

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


_OF_RANDOM_SETS = ("random_mean", "random_sd", "n_random", "z", "p", "fdr", "shift_random_weights")


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
    """Intervals and tests over donors, in the rows of the table."""
    on = ["perturbation", "state"] if found.states else ["perturbation"]
    donors = found.uns["donor_states" if found.states else "donors"]
    effect = "toward" if found.states else "shift"
    of = dict(list(donors.groupby(on, observed=True)))
    rows = []
    for names in table[on].itertuples(index=False, name=None):
        mine = of.get(names, donors.iloc[:0])
        excess = mine[f"{effect}_excess"].to_numpy(dtype=np.float64)
        # A shift is above 0 by its nature: without random sets it has nothing to be tested against.
        compared = not np.isnan(excess).all()
        interval = over_donors(excess if compared else mine[f"{effect}_mean"].to_numpy(dtype=np.float64))
        enough = interval.n >= min_donors
        rows.append(
            {
                "n_donors": len(mine),
                "donor_mean": interval.mean if enough else np.nan,
                "donor_low": interval.low if enough else np.nan,
                "donor_high": interval.high if enough else np.nan,
                "donor_p": interval.p if enough and (compared or effect == "toward") else np.nan,
            }
        )
    return pd.DataFrame(rows, index=table.index)


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    """Largest z first, or effect where there is none; the states of a perturbation stay together."""
    prefix = "toward_" if "state" in table else ""
    by = f"{prefix}z" if f"{prefix}z" in table else f"{prefix or 'shift_'}mean"
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
            **{
                part: parts[cell, perturbation, at] + 0.0
                for at, part in enumerate(("composition", "position", "context"))
            },
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

    Some genes move whatever is done to a cell. `excess` takes off how far a gene moves when random genes of the same
    rank are perturbed in the same cells.

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
    `random_shift`, the same under these, and `excess`. Sorted by `excess`, else by `shift`.

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
            part = part.assign(random_shift=random, excess=part["shift"] - random)
        parts.append(part.sort_values("excess" if has_random else "shift", ascending=False, kind="stable"))
    return pd.concat(parts, ignore_index=True)
