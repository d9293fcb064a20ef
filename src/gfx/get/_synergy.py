"""Table of genes perturbed together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx._core.statistics import false_discovery_rate
from gfx.get._perturbation import find_perturbation

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData


def synergy_df(
    adata: AnnData | MuData, *, key: str | None = None, min_cells: int = 10, mod: str | None = None
) -> pd.DataFrame:
    """Tabulate what genes perturbed together do beyond what they do one by one :cite:p:`Theodoris2023`.

    Two measures, cell by cell. *On shifts*, as published: the shift together less the sum of the shifts. But 1 - cosine
    grows with the square of a small displacement: two genes that push a cell the same way by the same amount have four
    times the shift of one, and look cooperative. *On vectors*: the shift together less the shift if the displacements
    simply added up. Neither says anything until it is set beside random pairs of genes of neighbouring rank, which
    have both kinds of excess, too: `z` and `p` do that.

    Parameters
    ----------
    adata
        After perturbing tuples of genes, such as ``gfx.tl.delete_genes(adata, [("GATA4", "TBX5")])``.
    key
        The `key_added` of that call, or its default name.
    min_cells
        With fewer cells, the effects of a set are NaN.
    mod
        Modality of a MuData.

    Returns
    -------
    One row a set of several genes: `perturbation`, `n_cells`; `together_mean` and `summed_mean`, the shift of all at
    once and the sum of shifts; `displaced_mean` and `composed_mean`, how far the cell's vector moves, and would by the
    sum of displacements (`together_mean` and `displaced_mean` differ with ``pooling="genes"`` alone); for each measure
    `mean`, the excess, its 95 % interval `low` and `high`, and `z`, `p` and `fdr` among random sets, in columns that
    begin with `on_shifts_` and `on_vectors_`; `interval_over`, donors, or cells, which are not replicates. Largest
    `on_vectors_z` first.

    Raises
    ------
    KeyError
        No such result, or no set of several genes in it.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ("CD3D", "CD3E"), model="mini", null=10)
    >>> gfx.get.synergy_df(adata)["perturbation"].tolist()
    ['CD3D+CD3E']
    """
    found = find_perturbation(adata, key=key, mod=mod)
    if "synergy" not in found.uns:
        msg = (
            "No genes were perturbed together in any cell. Give tuples of genes, such as "
            '`gfx.tl.delete_genes(adata, [("GATA4", "TBX5")])`.'
        )
        raise KeyError(msg)
    table = found.uns["synergy"].reset_index(drop=True).copy()
    numbers = [column for column in table if table[column].dtype.kind == "f"]
    table.loc[table["n_cells"] < min_cells, numbers] = np.nan
    for measure in ("on_shifts", "on_vectors"):
        at = table.columns.get_loc(f"{measure}_p") + 1
        table.insert(at, f"{measure}_fdr", false_discovery_rate(table[f"{measure}_p"].to_numpy()))
    table = table.sort_values(
        ["on_vectors_z", "on_vectors_mean"], ascending=False, kind="stable", na_position="last"
    ).reset_index(drop=True)
    table.attrs["note"] = str(found.uns["note"])
    return table
