"""Table of the genes of a screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from gfx._adata import gene_column, gene_names, group_name
from gfx._core.checkpoint import SIZES
from gfx._core.manifest import fingerprint
from gfx._core.screening import standing_out
from gfx._core.statistics import by_chance, false_discovery_rate
from gfx._docs import shared
from gfx._results import find

if TYPE_CHECKING:
    from pathlib import Path

    from gfx._run_store import RunStore
    from gfx._types import Data

#: Genes in fewer cells are not tested, whatever genes a table shows.
FEWEST_CELLS = 10

#: Half the width of the band of genes that do not stand out, as a z-score.
WIDTH = 3

#: False discovery rate up to which an effect is called a hit, unless another one is asked for.
FDR = 0.1

#: What is measured, what tables are sorted by first.
_MEASURES = ("toward", "shift")

_RANDOM = "random_weights_"

_FUNCTION = "tl.screen_genes"


@shared()
def screen_df(
    adata: Data,
    group: str | None = None,
    *,
    key: str | None = None,
    min_cells: int = 10,
    names: str | None = None,
    mod: str | None = None,
) -> pd.DataFrame:
    """Tabulate a screen, one row per gene.

    The table is sorted by z-score in descending order: deleting any gene shifts the embedding, so only an effect beyond
    that of genes of similar rank in the same cells is informative. With a goal, genes whose deletion shifts cells
    toward it come first, and those whose deletion shifts cells away from it last.

    Parameters
    ----------
    {after_screening}
    {group}
    {key}
    min_cells
        Genes in fewer cells than this are left out of the table. The statistics do not depend on it.
    {names}
    {mod}

    Returns
    -------
    Columns:

    - `gene`; `n_cells`, the number of cells with the gene; `rank_mean`, its mean rank in them (0 is the first gene of a
      cell, 1 the last);
    - `shift_mean` and `shift_sd`: mean and standard deviation, over these cells, of the shift of a cell when the gene
      is deleted (1 - cosine between the embedding before and after);
    - `shift_excess`: the excess, which is the shift minus the median shift of the 41 genes around the rank of the
      deleted gene in the same cell, averaged over those of these cells with more than 20 screened genes;
      NaN if these are fewer than 10, unless they are all cells with the gene;
    - `shift_z`: the z-score, which is the excess minus the median excess of the 100 genes most similar in mean rank and
      number of cells, divided by the spread of these genes (median absolute deviation, scaled to a standard deviation);
      `shift_low` and `shift_high`, the values of the excess at which z is -3 and 3;
    - `shift_p`: the two-sided p-value, which is the fraction of the z-scores of all genes of a random-weights model in
      the same cells that are at least as extreme; `shift_fdr`, the false discovery rate: p-values adjusted by the
      method of Benjamini and Hochberg;
    - with a goal, `toward_mean` and so on: the same statistics of the change of a cell's cosine to the centroid of the
      goal, positive for a shift toward it;
    - with random weights, `random_weights_shift_mean` and `random_weights_toward_mean`: means in the random-weights
      model;
    - without `group`, `detection`, the fraction of the screened cells with the gene; `expression_mean`, the mean
      logarithm of its normalised counts in these cells; with a goal, `logfc`, the log2 fold change from start to goal
      as scanpy computes it, about -30 for a gene that no cell of the goal has;
    - after ``method="first_order"``, `exact_n_cells`, `exact_shift_mean` and `exact_toward_mean`: exact results in some
      of the cells, for up to 50 genes with the most extreme z-scores; 0 and NaN for all other genes. A gene is run in 5
      to 20 cells, in which twice the standard error of its mean is about its distance from genes of similar rank.

    z-score, p-value and FDR are computed for all genes with an excess in at least 10 cells, whatever `min_cells` is;
    they are NaN for rarer genes. ``attrs["approx"]`` says whether effects are estimates, ``attrs["note"]`` explains
    z-scores and p-values, and ``attrs["start"]`` and ``attrs["goal"]`` are the states.

    Raises
    ------
    KeyError
        There is no such result, group, or column in `var`.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy(30)
    >>> genes = ["CD3D", "CD3E", "CD79A", "MS4A1"]
    >>> gfx.tl.screen_genes(
    ...     adata, genes=genes, model="mini", groupby="cell_type", controls=None
    ... )
    >>> gfx.get.screen_df(adata, "B cell").columns[3:8].tolist()
    ['shift_mean', 'shift_sd', 'shift_excess', 'shift_low', 'shift_high']
    """
    result = find(adata, "tl.screen_genes", key=key, mod=mod)
    if group is None:
        table = result.read("varm").reset_index(drop=True)
    else:
        groups = result.names("groups")
        if (name := group_name(group, groups)) not in groups:
            msg = f"Did not find the group {group!r}. Present: {groups}."
            raise KeyError(msg)
        values = result.read("varm", "groups")[:, groups.index(name)]
        table = pd.DataFrame(values, columns=result.names("columns"))
        table["n_cells"] = table["n_cells"].fillna(0).astype(np.int32)
    table.insert(0, "gene", gene_names(gene_column(result.adata.var, names)))
    measures = [measure for measure in _MEASURES if f"{measure}_mean" in table]
    tested = table[table["n_cells"] >= FEWEST_CELLS]
    for measure in measures:
        statistics = _statistics(tested, measure).reindex(table.index)
        after = table.columns.get_loc(f"{measure}_excess") + 1
        for number, name in enumerate(statistics):
            table.insert(after + number, name, statistics[name])
    table = table[table["n_cells"] >= min_cells]
    table = table.drop(columns=[column for column in table if column.startswith(_RANDOM) and "excess" in column])
    z = f"{measures[0]}_z"
    by = z if table[z].notna().any() else f"{measures[0]}_mean"
    table = table.sort_values(by, ascending=False, kind="stable", na_position="last", ignore_index=True)
    params = result.uns["params"]
    table.attrs |= {"note": str(result.uns["note"]), "approx": bool(result.uns["approx"])}
    table.attrs |= {role: str(params[role]) for role in ("start", "goal") if role in params}
    return table


def _statistics(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Compare each gene with similar ones, and its z-score with those in a model with random weights."""
    rank, n_cells = table["rank_mean"].to_numpy(), table["n_cells"].to_numpy()
    excess = f"{measure}_excess"
    z, centre, spread = standing_out(table[excess].to_numpy(dtype=np.float64), rank, n_cells)
    statistics = {"low": centre - WIDTH * spread, "high": centre + WIDTH * spread, "z": z}
    if _RANDOM + excess in table:
        random_z, *_ = standing_out(table[_RANDOM + excess].to_numpy(dtype=np.float64), rank, n_cells)
        statistics["p"] = by_chance(z, random_z)
        statistics["fdr"] = false_discovery_rate(statistics["p"])
    return pd.DataFrame(statistics, index=table.index).add_prefix(f"{measure}_")


#: What a store and a result of one screen agree in.
_OF_ONE_SCREEN = (
    *("weights_sha256", "config_sha256", "vocabulary_sha256", "dtype", "hidden_layer", "pooling", "method"),
    *("n_probes", "positions", "start", "goal", "rng"),
)


@shared()
def screen_cells(
    adata: Data,
    store: str | Path,
    *,
    measure: Literal["shift", "toward"] = "shift",
    key: str | None = None,
    mod: str | None = None,
) -> sparse.csr_matrix:
    """Read the effect of each gene in each cell from the store of a screen.

    Use it to see in which cells a gene matters, or to compare cells that no column of `obs` grouped at the time of the
    screen. Means over cells are in :func:`gfx.get.screen_df`. Memory: up to three numbers for each gene of each cell.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.screen_genes` with `store`; the same cells and genes in the same order.
    store
        The path that was given to it.
    measure
        ``"shift"``: cosine shift of the cell without the gene. ``"toward"``: change of its cosine to the goal, above 0
        where the cell shifts toward it.
    {key}
    {mod}

    Returns
    -------
    Effects, float32 `(n_obs, n_vars)`. An entry is stored for each gene that was deleted from a cell, even where its
    effect is 0, and none for all others. Two columns of `adata` that are one gene to the model have the same entries.

    Raises
    ------
    ValueError
        No store of a screen; one of other cells, other genes, or another call; damaged or unfinished blocks; or a
        measure that the screen does not have.
    KeyError
        No such result.

    Examples
    --------
    >>> import tempfile
    >>> import gfx
    >>> adata = gfx.datasets.toy(20)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = f"{folder}/screen.zarr"
    ...     gfx.tl.screen_genes(
    ...         adata, genes="CD3D", store=store, model="mini", controls=None
    ...     )
    ...     shifts = gfx.get.screen_cells(adata, store)
    >>> shifts.shape == adata.shape
    True
    """
    from gfx._run_store import RunStore, RunStoreError

    result = find(adata, _FUNCTION, key=key, mod=mod)
    n_cells = result.read("varm")["n_cells"].to_numpy()
    opened, manifest = RunStore.existing(store, advice="Give the `store` of the screen.")
    if manifest.get("function") != _FUNCTION:
        msg = f"{store} holds a run of `gfx.{manifest.get('function')}`, not of `gfx.{_FUNCTION}`."
        raise RunStoreError(msg)
    if manifest.get("cells") != fingerprint(result.adata.obs_names.to_numpy(dtype=object)):
        msg = f"{store} holds effects in other cells. Read it before cells are left out, reordered or renamed."
        raise RunStoreError(msg)
    params = result.uns["params"]
    if differing := [name for name in _OF_ONE_SCREEN if str(params.get(name)) != str(manifest.get(name))]:
        msg = f"{store} holds a screen with another {', '.join(differing)} than the result {result.key!r}."
        raise RunStoreError(msg)
    measures = [name for name in _MEASURES if f"{name}_mean" in result.read("varm")]
    if measure not in measures:
        msg = f"`measure` is one of {measures} in this screen, found {measure!r}."
        raise ValueError(msg)
    genes = opened.read("genes", 0) or {}
    names, tokens = genes.get("names", np.zeros(0)), genes.get("token", np.zeros(0))
    if names.size and names.tobytes().hex() != fingerprint(result.adata.var_names.to_numpy(dtype=object)):
        msg = f"{store} holds effects of other genes. Read it before genes are left out, reordered or renamed."
        raise RunStoreError(msg)
    if not names.size or tokens.shape != (result.adata.n_vars,) or not _are_tokens(tokens, lowest=-1):
        msg = f"{store} does not say which genes its effects are of: it is damaged. Call `gfx.tl.screen_genes` again."
        raise RunStoreError(msg)
    effects = _effects(opened, measure, n_obs=result.adata.n_obs)
    columns = np.where(tokens < effects.shape[1], tokens, -1)  # the last column is empty
    effects = effects[:, columns]
    effects.sort_indices()
    if not np.array_equal(effects.getnnz(axis=0), n_cells):
        msg = (
            f"{store} lacks effects that the result {result.key!r} is made of, or has others: blocks are damaged, or "
            "another call wrote them. Call `gfx.tl.screen_genes` with this `store` again."
        )
        raise RunStoreError(msg)
    return effects


def _are_tokens(tokens: np.ndarray, *, lowest: int) -> bool:
    """Whether whole numbers can be those of genes: a table as wide as the highest is made of them."""
    highest = SIZES["vocab_size"][1]
    return tokens.dtype.kind in "iu" and bool(tokens.min(initial=0) >= lowest and tokens.max(initial=0) < highest)


def _effects(store: RunStore, measure: str, *, n_obs: int) -> sparse.csr_matrix:
    """Read the effects of all tokens, `(n_obs, n_tokens + 1)`, as far as blocks are intact."""
    from gfx._run_store import RunStoreError

    blocks = [store.read("model", number) for number in sorted(store.finished("model"))]
    blocks = [block for block in blocks if block is not None]
    none = np.zeros(0, dtype=np.int32)
    try:
        cell, token = (np.concatenate([none, *(block[name] for block in blocks)]) for name in ("cell", "token"))
        values = [block["shift"] if measure == "shift" else block["toward"][:, 0] for block in blocks]
        if not _are_tokens(token, lowest=0):
            msg = f"its tokens go from {token.min()} to {token.max()}"
            raise ValueError(msg)
        shape = n_obs, int(token.max(initial=0)) + 2
        return sparse.csr_matrix((np.concatenate([none.astype(np.float32), *values]), (cell, token)), shape=shape)
    except (LookupError, TypeError, ValueError) as error:
        msg = f"{store.path} holds blocks that are none of a screen ({error}). Call `gfx.tl.screen_genes` again."
        raise RunStoreError(msg) from None
