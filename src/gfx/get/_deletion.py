"""Tables of deleted genes."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._keys import delete_keys
from gfx.get._result import find_result

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

_FUNCTION = "tl.delete_genes"


def deletion_df(adata: AnnData | MuData, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate what deleting genes did to cells, one row a perturbation, or a perturbation and state.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.delete_genes`.
    key
        The `key_added` of that call.
    mod
        Modality of a MuData.

    Returns
    -------
    Columns `perturbation`; `n_cells`, cells with all its genes; `shift_mean` and `shift_sd` over these cells (1 -
    cosine); `rank_mean`, where the genes stood on average (0 the first gene of a cell, 1 its last). With states also
    `state`, `role` (start, goal, alternative), and `toward_mean` and `toward_sd`, the change of the cosine to it.

    Raises
    ------
    KeyError
        No such result.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ["CD3D", "MS4A1"], model="mini")
    >>> gfx.get.deletion_df(adata).columns.tolist()
    ['perturbation', 'n_cells', 'shift_mean', 'shift_sd', 'rank_mean']
    """
    _, result = find_result(adata, delete_keys(key).uns, _FUNCTION, key=key, mod=mod)
    table = result["table"].reset_index(drop=True)
    if "state_table" not in result:
        return table.copy()
    return table.merge(result["state_table"].drop(columns="n_cells"), on="perturbation", how="left")


def deletion_cells_df(adata: AnnData | MuData, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate the effect on every cell, one row a cell and perturbation (and state).

    Parameters
    ----------
    adata
        After :func:`gfx.tl.delete_genes`.
    key
        The `key_added` of that call.
    mod
        Modality of a MuData.

    Returns
    -------
    Columns `cell`, `perturbation`, `shift`; with states `state` and `toward`. Cells that lack a gene are left out.

    Raises
    ------
    KeyError
        No such result.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, "CD3D", model="mini")
    >>> gfx.get.deletion_cells_df(adata).columns.tolist()
    ['cell', 'perturbation', 'shift']
    """
    keys = delete_keys(key)
    found, result = find_result(adata, keys.uns, _FUNCTION, key=key, mod=mod)
    names = np.asarray(result["perturbations"], dtype=object)
    shift = np.asarray(found.obsm[keys.obsm])
    cell, perturbation = np.nonzero(~np.isnan(shift))
    frame = pd.DataFrame(
        {
            "cell": found.obs_names.to_numpy()[cell],
            "perturbation": names[perturbation],
            "shift": shift[cell, perturbation],
        }
    )
    if "states" not in result:
        return frame
    toward = np.asarray(found.obsm[keys.obsm_states])
    states = np.asarray(result["states"], dtype=object)
    parts = [frame.assign(state=state, toward=toward[cell, perturbation, at]) for at, state in enumerate(states)]
    return pd.concat(parts, ignore_index=True)


def gene_effects_df(
    adata: AnnData | MuData,
    perturbation: str | None = None,
    *,
    key: str | None = None,
    min_cells: int = 1,
    mod: str | None = None,
) -> pd.DataFrame:
    """Tabulate how far each remaining gene moved, the farthest first.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.delete_genes`.
    perturbation
        Its name, such as ``"GATA4"`` or ``"GATA4+TBX5"``; `None` for all of them.
    key
        The `key_added` of that call.
    min_cells
        Genes seen together with the deleted ones in fewer cells are left out.
    mod
        Modality of a MuData.

    Returns
    -------
    Columns `perturbation`, `gene`, `shift` (1 - cosine, mean over cells), `n_cells`.

    Raises
    ------
    KeyError
        No such result, or no such perturbation in it.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, "CD3D", model="mini")
    >>> gfx.get.gene_effects_df(adata, "CD3D").columns.tolist()
    ['perturbation', 'gene', 'shift', 'n_cells']
    """
    keys = delete_keys(key)
    found, result = find_result(adata, keys.uns, _FUNCTION, key=key, mod=mod)
    names = [str(name) for name in result["perturbations"]]
    if perturbation is not None and perturbation not in names:
        close = difflib.get_close_matches(perturbation, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        msg = f"Did not find the perturbation {perturbation!r}.{hint} Present: {names}."
        raise KeyError(msg)
    shift, n_cells = np.asarray(found.varm[keys.varm]), np.asarray(found.varm[keys.varm_n_cells])
    parts = []
    for at, name in enumerate(names):
        if perturbation not in (None, name):
            continue
        seen = n_cells[:, at] >= max(min_cells, 1)
        part = pd.DataFrame(
            {
                "perturbation": name,
                "gene": found.var_names.to_numpy()[seen],
                "shift": shift[seen, at],
                "n_cells": n_cells[seen, at],
            }
        )
        parts.append(part.sort_values("shift", ascending=False, kind="stable"))
    return pd.concat(parts, ignore_index=True)
