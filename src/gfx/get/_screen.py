"""Tables of a screen: genes, and what its ranking is held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._adata import gene_column, gene_names
from gfx._core.screening import standing_out
from gfx._core.statistics import by_chance, false_discovery_rate
from gfx._keys import screen_keys
from gfx.get._result import find_result

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

#: How wide the band of genes that do not stand out is, as a z.
WIDTH = 3

#: What is measured, in the order of interest where there is both.
_MEASURES = ("toward", "shift")

_RANDOM = "random_weights_"


def screen_df(
    adata: AnnData | MuData,
    group: str | None = None,
    *,
    key: str | None = None,
    min_cells: int = 10,
    names: str | None = None,
    mod: str | None = None,
) -> pd.DataFrame:
    """Tabulate a screen, one row a gene.

    The gene that stands out most comes first: not what moves cells most, but what moves them most beside genes of
    neighbouring rank in the same cells. With a goal, what moves them towards it comes first, what moves them away from
    it last.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.screen_genes`.
    group
        A group of the `groupby` of that call; `None` is all cells that were screened.
    key
        The `key_added` of that call.
    min_cells
        Genes in fewer cells are left out.
    names
        Column of `var` with names of genes; `None` is `var_names`.
    mod
        Modality of a MuData.

    Returns
    -------
    Columns:

    - `gene`; `n_cells`, the cells that have it; `rank_mean`, where it stands in them (0 the first gene of a cell, 1 its
      last);
    - `shift_mean` and `shift_sd`: mean and standard deviation over these cells of their shift without the gene (1 -
      cosine);
    - `shift_excess`: the mean over these cells of that shift less the median of the 41 genes about its rank;
    - `shift_z`: how far the excess lies from the median of the 100 genes most alike in mean rank and number of cells,
      in robust standard deviations; `shift_low` and `shift_high`, the excesses at which z is -3 and 3;
    - `shift_p`: two-sided, the place of z among those that all genes have in a network with random weights, in the same
      cells; `shift_fdr`, adjusted by Benjamini and Hochberg;
    - with a goal, `toward_mean` and so on: the same of the change of a cell's cosine to the goal, above 0 where it
      moves there;
    - with `null`, `random_weights_shift_mean` and `random_weights_toward_mean`: means in that network;
    - without `group`, `detection`, the share of the screened cells that have the gene; `expression_mean`, the mean
      logarithm of its normalised counts in them; with a goal `logfc`, its log2 fold change from start to goal;
    - after ``method="first_order"``, `exact_n_cells`, `exact_shift_mean` and `exact_toward_mean`: exact results in some
      of the cells, for the genes that stand out most; 0 and NaN for the others.

    ``attrs["approx"]`` says whether there are estimates, ``attrs["note"]`` what z and p are, ``attrs["start"]`` and
    ``attrs["goal"]`` the states.

    Raises
    ------
    KeyError
        No such result or group, or no such column in `var`.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.screen_genes(adata, model="mini", method="first_order", groupby="cell_type", n_probes=2)
    >>> gfx.get.screen_df(adata, "B cell").columns[3:8].tolist()
    ['shift_mean', 'shift_sd', 'shift_excess', 'shift_low', 'shift_high']
    """
    keys = screen_keys(key)
    adata, found = find_result(adata, keys.uns, "tl.screen_genes", key=key, mod=mod)
    table = adata.varm[keys.varm].reset_index(drop=True)
    if group is not None:
        groups = [str(name) for name in found.get("groups", [])]
        if group not in groups:
            msg = f"Did not find the group {group!r}. Present: {groups}."
            raise KeyError(msg)
        values = np.asarray(adata.varm[keys.varm_groups])[:, groups.index(group)]
        table = pd.DataFrame(values, columns=[str(name) for name in found["columns"]])
        table["n_cells"] = table["n_cells"].fillna(0).astype(np.int32)
    table.insert(0, "gene", gene_names(gene_column(adata.var, names)))
    table = table[table["n_cells"] >= min_cells]
    measures = [measure for measure in _MEASURES if f"{measure}_mean" in table]
    for measure in measures:
        _insert_statistics(table := table.copy(), measure)
    z = f"{measures[0]}_z"
    by = z if table[z].notna().any() else f"{measures[0]}_mean"
    table = table.sort_values(by, ascending=False, kind="stable", na_position="last").reset_index(drop=True)
    table = table.drop(columns=[column for column in table if column.startswith(_RANDOM) and "excess" in column])
    table.attrs |= {"note": str(found["note"]), "approx": bool(found["approx"])}
    table.attrs |= {role: str(found["params"][role]) for role in ("start", "goal") if role in found["params"]}
    return table


def _insert_statistics(table: pd.DataFrame, measure: str) -> None:
    """Insert band, z, p and fdr behind the excess."""
    rank, n_cells = table["rank_mean"].to_numpy(), table["n_cells"].to_numpy()
    excess = f"{measure}_excess"
    z, centre, spread = standing_out(table[excess].to_numpy(dtype=np.float64), rank, n_cells)
    statistics = {"low": centre - WIDTH * spread, "high": centre + WIDTH * spread, "z": z}
    if _RANDOM + excess in table:
        by_random, *_ = standing_out(table[_RANDOM + excess].to_numpy(dtype=np.float64), rank, n_cells)
        statistics["p"] = by_chance(z, by_random)
        statistics["fdr"] = false_discovery_rate(statistics["p"])
    for at, (name, values) in enumerate(statistics.items(), start=table.columns.get_loc(excess) + 1):
        table.insert(at, f"{measure}_{name}", values)


def screen_controls_df(adata: AnnData | MuData, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate what the ranking of a screen is held against.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.screen_genes`.
    key
        The `key_added` of that call.
    mod
        Modality of a MuData.

    Returns
    -------
    Columns `control`, `measure` (``"shift"`` or ``"toward"``), `statistic`, `value` and `n`. Controls:

    - ``"random_weights"``: Spearman over genes of mean effects with those of a network with random weights, in the same
      cells; near 1, the ranking owes nothing to what the model has learnt;
    - ``"rank"``, ``"detection"``, ``"expression"``, ``"logfc"``: Spearman over genes of mean effects with these, and
      partial, given the others;
    - ``"exact"``, after estimates: Spearman of these with exact results over the genes of a cell, and recall, the share
      of its 50 largest effects among its 100 largest estimates; means over `n` cells;
    - ``"state_axis"``, with a goal: how well held-out cells of start and goal can be told apart (AUC, chance 0.5),
      over `n` folds.

    Raises
    ------
    KeyError
        No such result.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.screen_genes(adata, model="mini", method="first_order", n_probes=2)
    >>> gfx.get.screen_controls_df(adata)["control"].unique().tolist()
    ['random_weights', 'rank', 'detection', 'expression', 'exact']
    """
    _, found = find_result(adata, screen_keys(key).uns, "tl.screen_genes", key=key, mod=mod)
    return found["controls"].reset_index(drop=True).copy()
