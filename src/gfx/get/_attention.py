"""Tables of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from gfx._adata import group_name
from gfx._core.arguments import check_choice
from gfx._core.attention import band_of, breadth, diversity, key_profile
from gfx._core.statistics import (
    between_groups,
    false_discovery_rate,
    matched_shares,
    rank_sum,
    resampled,
    retrieval,
)
from gfx._docs import shared
from gfx._results import find

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gfx._results import Slots
    from gfx._types import Data

#: What heads are described by.
STATISTICS = ("entropy", "distance", "special")

#: How the slots of what a gene receives and gives begin.
_PREFIXES = {"received": "", "given": "given_"}

#: Significance of a gene set.
_ALPHA = 0.05


def _table(columns: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """One row an entry of columns that are broadcast to one shape; beside uniform attention, the ratio to it."""
    values = np.broadcast_arrays(*columns.values())
    table = pd.DataFrame({name: column.ravel() for name, column in zip(columns, values, strict=True)})
    if "uniform" in table:
        table.insert(table.columns.get_loc("uniform") + 1, "ratio", table["attention"] / table["uniform"])
    return table


def _heads(result: Slots) -> np.ndarray:
    """Network layer and head of each head, from 1, `(2, n_layers, n_heads)`."""
    return np.indices((int(result.uns["n_layers"]), int(result.uns["n_heads"]))) + 1


def _by_gene(result: Slots, seen: np.ndarray, columns: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """One row a gene that is `seen` and head; columns are `(n_genes, n_heads)`, or `(n_genes,)` of all heads."""
    layer, head = _heads(result).reshape(2, -1)
    of_genes = {name: values if values.ndim == 2 else values[:, None] for name, values in columns.items()}
    return _table({"gene": result.adata.var_names.to_numpy()[seen, None], "layer": layer, "head": head} | of_genes)


def _row_of(result: Slots, group: str | None) -> int:
    """Find the entry of `uns` for a group, or for all cells."""
    if group is None:
        return 0
    names = result.names("of")[1:]
    if (name := group_name(group, names)) not in names:
        msg = f"The result {result.key!r} has the groups {names}, found `group={group!r}`."
        raise ValueError(msg)
    return 1 + names.index(name)


def _units(result: Slots, group: str) -> np.ndarray:
    """Numbers of the units of `varm` that make up a group."""
    if "groups" not in result.uns:
        msg = f"The result {result.key!r} has no groups. Run `gfx.tl.attention(adata, groupby=...)`."
        raise ValueError(msg)
    names = np.array(result.names("groups"), dtype=object)
    if (name := group_name(group, names)) not in names:
        msg = f"The result {result.key!r} has the groups {list(dict.fromkeys(names[names != '']))}, found {group!r}."
        raise ValueError(msg)
    return np.flatnonzero(names == name)


@shared()
def attention_df(
    adata: Data,
    *,
    statistic: Literal["received", "given"] = "received",
    group: str | None = None,
    key: str | None = None,
    min_cells: int = 1,
    mod: str | None = None,
) -> pd.DataFrame:
    """Tabulate the attention that each gene receives or gives, one row per gene, network layer and head.

    Parameters
    ----------
    {after_attention}
    {statistic_of_attention}
    {group}
    {key}
    {min_cells}
    {mod}

    Returns
    -------
    Columns `gene`; `layer` (network layer) and `head`, both counted from 1; `attention`, the mean over the cells that
    express the gene, and `sd`, the population standard deviation over these; `uniform`, what it would be if attention
    were uniform; `ratio`, which is `attention` divided by `uniform`; and `n_cells`. For all cells also `rank`, the mean
    rank of the gene, counted from 1; `random`, the attention received in the random-weights model, if that control was
    run; and `to_deleted`, after a deletion, the attention that the gene gives to the deleted genes.

    Raises
    ------
    KeyError
        No such result.
    ValueError
        Another statistic, or no such group.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.attention(adata, model="mini")
    >>> gfx.get.attention_df(adata).columns.tolist()
    ['gene', 'layer', 'head', 'attention', 'sd', 'uniform', 'ratio', 'n_cells', 'rank', 'random']
    """
    result = find(adata, "tl.attention", key=key, mod=mod)
    values = _of_genes(result, statistic, group)
    if group is None:
        values["rank"] = result.read("var", "rank").to_numpy() + 1
        others = ("random", "to_deleted") if statistic == "received" else ("to_deleted",)
        values |= {name: result.read("varm", name) for name in others if result.has("varm", name)}
    seen = values["n_cells"] >= max(min_cells, 1)
    return _by_gene(result, seen, {name: value[seen] for name, value in values.items()})


def _of_genes(result: Slots, statistic: str, group: str | None) -> dict[str, np.ndarray]:
    """Read what genes receive or give, over all cells or those of a group: means, deviations, uniform, and numbers."""
    prefix = _prefix(statistic)
    if group is None:
        mean, sd = (result.read("varm", f"{prefix}{end}".removesuffix("_")) for end in ("", "sd"))
        uniform, n = (result.read("var", name).to_numpy() for name in (f"{prefix}uniform", "n_cells"))
        return {"attention": mean, "sd": sd, "uniform": uniform, "n_cells": n}
    units = _units(result, group)
    n, *values = _of_groups(result, prefix)
    n = n[:, units]
    weight = n / np.maximum(n.sum(axis=1, keepdims=True), 1)
    mean, sd, uniform = (np.nan_to_num(of_units[:, units].astype(np.float64)) for of_units in values)
    total = np.einsum("gu,guh->gh", weight, mean)
    return {
        "attention": total,
        "sd": np.sqrt(np.einsum("gu,guh->gh", weight, sd**2 + (mean - total[:, None]) ** 2)),
        "uniform": (weight * uniform).sum(axis=1),
        "n_cells": n.sum(axis=1),
    }


def _of_groups(result: Slots, prefix: str) -> list[np.ndarray]:
    """Read numbers of cells of all units, and means, deviations and uniform attention of what a prefix names."""
    parts = ("groups_n_cells", *(f"groups_{prefix}{end}".removesuffix("_") for end in ("", "sd", "uniform")))
    return [result.read("varm", part) for part in parts]


def _prefix(statistic: str) -> str:
    """Say how the slots begin that hold what genes receive or give."""
    check_choice(statistic, "statistic", _PREFIXES)
    return _PREFIXES[statistic]


@shared()
def attention_ranks_df(adata: Data, *, key: str | None = None, mod: str | None = None) -> pd.DataFrame:
    """Tabulate attention by the rank of the attended gene, one row a network layer, head and rank.

    Parameters
    ----------
    {after_attention}
    {key}
    {mod}

    Returns
    -------
    Columns `layer` and `head` (from 1), `rank` (1 is the highest), `attention`, `uniform` (what uniform attention would
    give), `ratio` of the two, and `n_cells`, the cells that have a gene of this rank.

    Raises
    ------
    KeyError
        No such result.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.attention(adata, model="mini")
    >>> gfx.get.attention_ranks_df(adata)["rank"].min()
    np.int64(1)
    """
    result = find(adata, "tl.attention", key=key, mod=mod)
    layer, head = _heads(result)[..., None]
    values, uniform, n = (np.asarray(result.uns[name]) for name in ("ranks", "ranks_uniform", "ranks_n_cells"))
    of_ranks = {"rank": np.arange(1, len(uniform) + 1), "attention": values, "uniform": uniform, "n_cells": n}
    return _table({"layer": layer, "head": head} | of_ranks)


@shared()
def attention_bands_df(
    adata: Data, *, group: str | None = None, key: str | None = None, mod: str | None = None
) -> pd.DataFrame:
    """Tabulate attention between bands of ranks, one row a network layer, head, and pair of bands.

    Parameters
    ----------
    {after_attention}
    {group}
    {key}
    {mod}

    Returns
    -------
    Columns `layer` and `head` (from 1); `gives` and `receives`, bands of ranks such as ``"1–5"``, or ``"special"`` for
    the special tokens; `attention`, the sum of the attention that a position of the first band gives to all positions
    of the second, mean over positions; `uniform` and `ratio`; `random`, in the random-weights model, if that control
    was run; and `n_positions`. Bands that no cell has are left out.

    Raises
    ------
    KeyError
        No such result.
    ValueError
        No such group.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.attention(adata, model="mini")
    >>> bands = gfx.get.attention_bands_df(adata)
    >>> bands.groupby(["layer", "head", "gives"])["attention"].sum().round(3).unique()
    array([1.], dtype=float32)
    """
    result = find(adata, "tl.attention", key=key, mod=mod)
    row, uns = _row_of(result, group), result.uns
    n, names = np.asarray(uns["n_in_band"])[row], np.array(result.names("band_names"), dtype=object)
    used = np.flatnonzero(n)
    pairs = used[:, None], used
    attention, uniform = (np.asarray(uns[name])[row][..., *pairs] for name in ("bands", "bands_uniform"))
    layer, head = _heads(result)[..., None, None]
    columns = {"layer": layer, "head": head, "gives": names[used, None], "receives": names[used]}
    columns |= {"attention": attention, "uniform": uniform}
    if "random" in uns:
        columns["random"] = np.asarray(uns["random"]["bands"])[0][..., *pairs]
    return _table(columns | {"n_positions": n[used, None]})


@shared()
def attention_heads_df(
    adata: Data,
    *,
    gene_sets: Mapping[str, Iterable[str]] | None = None,
    group: str | None = None,
    min_cells: int = 10,
    key: str | None = None,
    mod: str | None = None,
) -> pd.DataFrame:
    """Tabulate how each head distributes its attention, or whether it attends to sets of genes.

    With `gene_sets`, a rank-sum test compares the attention that the genes of a set receive, relative to uniform
    attention, with that of all other genes. Heads attend to ranks, and sets of genes differ in rank, so most of what it
    finds is rank. Each gene is therefore also compared with the 50 genes of most similar rank and detection, less what
    a quadratic fit to these two explains, and the same is done in the random-weights model.

    Parameters
    ----------
    {after_attention}
    gene_sets
        Sets of genes by name, such as ``{"TF": [...], "central": [...]}``, as in `var_names`. Genes that fewer than
        `min_cells` cells have are left out.
    {group}
    {min_cells}
    {key}
    {mod}

    Returns
    -------
    Without `gene_sets` one row a head. Columns `layer` and `head` (from 1); `entropy`, relative to that of uniform
    attention: 1 for uniform attention, 0 for attention to one position; `distance`, the mean distance in ranks of
    attention from gene to gene, and `distance_uniform`; `special`, the fraction of attention to `<cls>` and `<eos>`;
    and, if that control was run, the same in the random-weights model: `entropy_random`, `distance_random` and
    `special_random`.

    With `gene_sets` one row a head and set. Columns `layer`, `head`, `gene_set`; `n_genes`; `auc`, the probability that
    a gene of the set receives more than one of the other genes, with `p` of the rank-sum test and `fdr` over all rows;
    `auc_matched`, the probability that it receives more than a gene of similar rank and detection, with `p_matched` of
    a t-test and `fdr_matched`; and, if that control was run, `auc_random` and `auc_matched_random`, the same
    in the random-weights model, and `remains`, whether `fdr_matched` is below 0.05 and `auc_matched` is farther from
    0.5, above or below, than that of any head of the random-weights model.

    Raises
    ------
    KeyError
        No such result.
    ValueError
        A set has fewer than two genes that enough cells have, or leaves fewer than two others; no such group; or
        `group` together with `gene_sets`, which are for all cells.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.attention(adata, model="mini")
    >>> gfx.get.attention_heads_df(adata).shape
    (16, 9)
    >>> t_cells = {"T cells": ["CD3D", "CD3E", "CD2"]}
    >>> sets = gfx.get.attention_heads_df(adata, gene_sets=t_cells)
    >>> sets.columns[:6].tolist()
    ['layer', 'head', 'gene_set', 'n_genes', 'auc', 'p']
    """
    result = find(adata, "tl.attention", key=key, mod=mod)
    if gene_sets is not None:
        if group is not None:
            msg = (
                "`gene_sets` are compared over all cells. Run `gfx.tl.attention` with `mask_obs` for those of a group."
            )
            raise ValueError(msg)
        return _gene_set_table(result, gene_sets, min_cells)
    row, uns = _row_of(result, group), result.uns
    layer, head = _heads(result)
    columns = {"layer": layer, "head": head}
    columns |= {name: np.asarray(uns[name])[row] for name in (*STATISTICS, "distance_uniform")}
    if "random" in uns:
        columns |= {f"{name}_random": np.asarray(uns["random"][name])[0] for name in STATISTICS}
    return _table(columns)


def _gene_set_table(result: Slots, gene_sets: Mapping[str, Iterable[str]], min_cells: int) -> pd.DataFrame:
    """Compare what genes of each set receive from each head with what other genes receive."""
    n_cells, rank = (result.read("var", name).to_numpy() for name in ("n_cells", "rank"))
    seen = n_cells >= max(min_cells, 1)
    if not isinstance(gene_sets, Mapping) or not gene_sets:
        msg = f"`gene_sets` are sets of genes by name, such as `{{'TF': [...]}}`, found {gene_sets!r}."
        raise TypeError(msg)
    names = result.adata.var_names[seen]
    parts = {"": ("", "uniform")} | ({"_random": ("random", "random_uniform")} if result.has("varm", "random") else {})
    ratios = {
        suffix: result.read("varm", part)[seen] / result.read("var", uniform).to_numpy()[seen, None]
        for suffix, (part, uniform) in parts.items()
    }
    similar = np.column_stack([np.log(rank[seen] + 1), np.log(n_cells[seen])])
    layer, head = _heads(result).reshape(2, -1)
    tables = []
    for name, genes in gene_sets.items():
        in_set = names.isin([genes] if isinstance(genes, str) else list(genes))
        if in_set.sum() < 2 or (~in_set).sum() < 2:
            msg = (
                f"The gene set {name!r} has {in_set.sum()} of the {seen.sum():,} genes that at least {min_cells} cells "
                "have, and needs two or more, as `adata.var_names` spells them, and two or more others."
            )
            raise ValueError(msg)
        columns = {"layer": layer, "head": head, "gene_set": name, "n_genes": int(in_set.sum())}
        for suffix, values in ratios.items():
            known = ~np.isnan(values[:, 0])
            tested = values[known], in_set[known]
            columns[f"auc{suffix}"], columns[f"p{suffix}"] = rank_sum(*tested)
            columns[f"auc_matched{suffix}"], columns[f"p_matched{suffix}"] = matched_shares(*tested, similar[known])
        tables.append(pd.DataFrame(columns))
    table = pd.concat(tables, ignore_index=True)
    for p, fdr in (("p", "fdr"), ("p_matched", "fdr_matched")):
        table[fdr] = false_discovery_rate(table[p].to_numpy())
    if "_random" in ratios:
        largest = (table["auc_matched_random"] - 0.5).abs().groupby(table["gene_set"]).transform("max")
        table["remains"] = (table["fdr_matched"] < _ALPHA) & ((table["auc_matched"] - 0.5).abs() > largest)
    order = ["layer", "head", "gene_set", "n_genes", "auc", "p", "fdr", "auc_matched", "p_matched", "fdr_matched"]
    order += ["auc_random", "auc_matched_random", "remains"]
    return table[[name for name in order if name in table]]


@shared()
def attention_layers_df(
    adata: Data, *, group: str | None = None, key: str | None = None, mod: str | None = None
) -> pd.DataFrame:
    """Tabulate how network layers differ: how wide a range of ranks heads attend to, and how different heads are.

    Parameters
    ----------
    {after_attention}
    {group}
    {key}
    {mod}

    Returns
    -------
    One row a network layer. Columns `layer`; `entropy`, `distance` and `special`, means over its heads, see
    :func:`gfx.get.attention_heads_df`; `breadth`, over how many bands of ranks its heads spread their attention,
    relative to uniform attention, mean over heads; `diversity`, how much its heads differ in the bands that they attend
    to, as Jensen-Shannon divergence in bits: 0 if all are the same; `top`, attention to the first 100 genes relative to
    uniform attention; and, if that control was run, the same in the random-weights model: `entropy_random` and so on.

    Raises
    ------
    KeyError
        No such result.
    ValueError
        No such group.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.attention(adata, model="mini")
    >>> gfx.get.attention_layers_df(adata)["layer"].tolist()
    [1, 2, 3, 4]
    """
    result = find(adata, "tl.attention", key=key, mod=mod)
    row, uns = _row_of(result, group), result.uns
    table = {"layer": np.arange(1, int(uns["n_layers"]) + 1)}
    for suffix, of, at in (("", uns, row), ("_random", uns.get("random"), 0)):
        if of is None:
            continue
        table |= {f"{name}{suffix}": np.asarray(of[name])[at].mean(axis=1) for name in STATISTICS}
        n = np.asarray(of["n_in_band"])[at]
        heads = key_profile(np.asarray(of["bands"])[at], n)  # (n_layers, n_heads, n_bands)
        uniform = key_profile(np.asarray(of["bands_uniform"])[at], n)
        table[f"breadth{suffix}"] = breadth(heads).mean(axis=1) / breadth(uniform)
        table[f"diversity{suffix}"] = diversity(heads)
        top = slice(0, band_of(np.array([100]))[0])
        table[f"top{suffix}"] = heads[..., top].sum(axis=-1).mean(axis=1) / uniform[top].sum()
    return pd.DataFrame(table)


@shared()
def attention_difference_df(
    adata: Data,
    *,
    group: str | None = None,
    reference: str | None = None,
    statistic: Literal["received", "given"] = "received",
    min_cells: int = 10,
    key: str | None = None,
    mod: str | None = None,
) -> pd.DataFrame:
    """Compare the attention of genes between two groups, or before and after a deletion, gene by gene and head by head.

    Parameters
    ----------
    {after_attention}
    group, reference
        The two groups: differences are `group` - `reference`. After a deletion, leave both out.
    {statistic_of_attention}
    {min_cells_of_groups}
    {key}
    {mod}

    Returns
    -------
    Columns `gene`, `layer`, `head` (from 1); `ratio` and `reference`, attention in the two groups divided by uniform
    attention, because each gene of a shallow cell receives more; `difference` of these, with its 95 % interval, `low`
    and `high`; `n_cells` and `n_cells_reference`. After a deletion also `random`, the difference in the random-weights
    model, and `to_deleted`, the attention that the gene gave to the deleted genes. After `donor_key=`, means are over
    donors, and so is the interval, paired if most donors are in both groups, with `p` and `fdr` of the t-test and
    `n_donors`. Otherwise the interval is over cells, which are not replicates: it says how well the difference between
    these cells is known, not what other donors would show. Between two groups it takes uniform attention as known, so
    that it is approximate, and mostly too wide, where cells of a group differ in depth.

    Raises
    ------
    KeyError
        No such result.
    ValueError
        The result has no such groups, or another statistic.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.attention(adata, model="mini", groupby="cell_type")
    >>> difference = gfx.get.attention_difference_df(
    ...     adata, group="B cell", reference="T cell"
    ... )
    >>> difference.columns[:6].tolist()
    ['gene', 'layer', 'head', 'ratio', 'reference', 'difference']
    """
    result, prefix = find(adata, "tl.attention", key=key, mod=mod), _prefix(statistic)
    is_change, names = "deleted" in result.uns["params"], result.names("of")[1:]
    if is_change:
        if group is not None or reference is not None:
            msg = "This result compares cells with and without deleted genes. Leave `group` and `reference` out."
            raise ValueError(msg)
        group, reference = "deleted", "intact"
    elif group is None or reference is None or group_name(group, names) == group_name(reference, names):
        msg = f"`group` and `reference` are two different groups of {names}, found {group!r} and {reference!r}."
        raise ValueError(msg)
    units = {of: _units(result, of) for of in (group, reference, *(["change"] if is_change else []))}
    n, mean, sd, uniform = (
        {of: values[:, number] for of, number in units.items()} for values in _of_groups(result, prefix)
    )
    mean, sd = ({of: values / uniform[of][..., None] for of, values in each.items()} for each in (mean, sd))
    if is_change:  # of the mean ratios, as groups are compared, with the deviations over cells
        mean["change"] = mean[group] - mean[reference]
    donors = None
    if "donors" in result.uns:
        named = np.array(result.names("donors"), dtype=object)
        donors = {of: named[number] for of, number in units.items()}
    seen = np.minimum(n[group].sum(axis=1), n[reference].sum(axis=1)) >= max(min_cells, 1)
    n, mean, sd = ({of: values[seen] for of, values in each.items()} for each in (n, mean, sd))
    columns = between_groups(mean, sd, n, group=group, reference=reference, donors=donors)
    columns |= {"n_cells": n[group].sum(axis=1), "n_cells_reference": n[reference].sum(axis=1)}
    table = _by_gene(result, seen, columns)
    if "p" in table:
        table["fdr"] = false_discovery_rate(table["p"].to_numpy())
    if is_change:
        if statistic == "received" and result.has("varm", "random_change"):
            table["random"] = result.read("varm", "random_change")[seen].ravel()
        table["to_deleted"] = result.read("varm", "to_deleted")[seen].ravel()
    return table


@shared()
def attention_pairs_df(
    adata: Data, *, genes: str | Iterable[str] | None = None, key: str | None = None, mod: str | None = None
) -> pd.DataFrame:
    """Tabulate the attention from gene to gene, one row a pair, the strongest of each gene first.

    Parameters
    ----------
    {after_attention}
    genes
        Genes whose attention to others is wanted, as in `var_names`. `None` takes all.
    {key}
    {mod}

    Returns
    -------
    Columns `gene`, which gives the attention, and `attends_to`; `attention`, the mean over the cells that have both and
    over the heads that were chosen; `uniform`, what it would be if attention were uniform; `expected`, what genes of
    the same two bands of ranks give to each other; `ratio`, which is `attention` divided by `expected`; `n_cells`; and
    `coexpression`, for pairs of named genes, the Pearson correlation of the logarithms of their normalised counts over
    all cells used, also those without the genes.

    Raises
    ------
    KeyError
        No such result, or it has no pairs.
    ValueError
        A gene that gives no attention here.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.attention(adata, model="mini", genes=["CD3D", "CD3E", "MS4A1"])
    >>> sorted(gfx.get.attention_pairs_df(adata, genes="CD3D")["attends_to"])
    ['CD3D', 'CD3E', 'MS4A1']
    """
    result = find(adata, "tl.attention", key=key, mod=mod)
    table = _pair_table(result)
    if genes is not None:
        wanted = [genes] if isinstance(genes, str) else list(genes)
        missing = sorted(set(wanted) - set(table["gene"]))
        if missing:
            msg = f"The result {result.key!r} has no attention given by {missing[:10]}: {_WITH_PAIRS}"
            raise ValueError(msg)
        table = table[table["gene"].isin(wanted)]
    order = np.lexsort([-table["attention"], table["row"]])
    return table.iloc[order].drop(columns=["row", "column"]).reset_index(drop=True)


_WITH_PAIRS = "run `gfx.tl.attention(adata, genes=...)`, or with a list of genes that cells have."


def _pair_table(result: Slots) -> pd.DataFrame:
    """Read all pairs of a result, with their `row` and `column` in the AnnData."""
    if not result.has("varp"):
        msg = f"The result {result.key!r} has no attention from gene to gene: {_WITH_PAIRS}"
        raise KeyError(msg)
    attention, uniform, n_cells = (result.read("varp", part).tocoo() for part in ("", "uniform", "n_cells"))
    row, column = attention.row, attention.col
    names, rank = result.adata.var_names.to_numpy(), result.read("var", "rank").to_numpy()
    table = pd.DataFrame({"row": row, "column": column, "gene": names[row], "attends_to": names[column]})
    table["attention"], table["uniform"] = attention.data, uniform.data
    table["expected"] = table["uniform"] * _by_bands(result)[band_of(rank[row] + 1), band_of(rank[column] + 1)]
    table["ratio"] = table["attention"] / table["expected"]
    table["n_cells"] = n_cells.data
    if result.has("varp", "coexpression"):
        table["coexpression"] = result.read("varp", "coexpression").tocoo().data
    return table


def _by_bands(result: Slots) -> np.ndarray:
    """Attention between bands of ranks, divided by uniform attention, mean over the heads whose pairs are kept."""
    bands, heads = np.asarray(result.uns["bands"])[0], result.uns["params"]["heads"]
    bands = bands.reshape(-1, *bands.shape[2:])
    if not isinstance(heads, str):
        layers_and_heads = [tuple(map(int, str(name).split("."))) for name in heads]
        bands = bands[[(layer - 1) * int(result.uns["n_heads"]) + head - 1 for layer, head in layers_and_heads]]
    with np.errstate(invalid="ignore", divide="ignore"):
        return bands.mean(axis=0) / np.asarray(result.uns["bands_uniform"])[0]


@shared()
def attention_edges_df(
    adata: Data,
    edges: pd.DataFrame,
    *,
    min_cells: int = 10,
    key: str | None = None,
    mod: str | None = None,
) -> pd.DataFrame:
    """Ask whether attention finds known edges, such as those from transcription factors to their targets.

    All genes named in :func:`gfx.tl.attention` are candidates for each source. They are ranked by attention, in both
    directions, and by what needs no attention: co-expression, and the ranks of the two genes alone. A ranking that
    finds edges has an AUROC above 0.5 and an early precision above 1. Sources are replicates: results are means over
    sources, with intervals by resampling them.

    Parameters
    ----------
    {after_attention}
    edges
        Columns `source` and `target`, genes as in `var_names`.
    min_cells
        Pairs that fewer cells have are no candidates.
    {key}
    {mod}

    Returns
    -------
    One row a ranking, the best first. Columns `score`, which is ``"attention"``, ``"coexpression"`` (absolute value)
    or ``"ranks"``, the attention expected from the bands of ranks of two genes; `direction`, whether the ``"source"``
    or the ``"target"`` gives the attention; `layer` and `head` (from 1), with ``heads="each"``, else missing: the mean
    over heads; `auroc`, with `auroc_low` and `auroc_high`; `early_precision`, the fraction of edges among as many
    candidates as there are edges, relative to chance, with `early_precision_low` and `early_precision_high`; and
    `n_sources` and `n_edges`, the sources that have both edges and other candidates, and their edges.

    Raises
    ------
    KeyError
        No such result, it has no pairs, or `edges` has no such columns.
    ValueError
        Pairs are not those of named genes, or fewer than two sources have both edges and other candidates.

    Examples
    --------
    >>> import gfx
    >>> import pandas as pd
    >>> adata = gfx.datasets.toy()
    >>> genes = ["CD3D", "CD3E", "CD2", "MS4A1", "CD79A", "CD79B"]
    >>> gfx.tl.attention(adata, model="mini", genes=genes)
    >>> edges = pd.DataFrame({"source": ["CD3D", "MS4A1"], "target": ["CD3E", "CD79A"]})
    >>> gfx.get.attention_edges_df(adata, edges, min_cells=1).columns[:4].tolist()
    ['score', 'direction', 'layer', 'head']
    """
    missing = {"source", "target"} - set(edges.columns)
    if missing:
        msg = f"`edges` needs the columns 'source' and 'target', found {edges.columns.tolist()}."
        raise KeyError(msg)
    result = find(adata, "tl.attention", key=key, mod=mod)
    table, uns = _pair_table(result), result.uns
    if "n_neighbors" in uns["params"]:
        msg = "Edges are looked for among named genes: run `gfx.tl.attention(adata, genes=[...])`."
        raise ValueError(msg)
    genes = pd.Index(pd.unique(pd.concat([table["gene"], table["attends_to"]])))
    at = genes.get_indexer(table["gene"]), genes.get_indexer(table["attends_to"])

    def square(values: np.ndarray) -> np.ndarray:
        """Lay out pairs as genes that give × genes that receive; NaN where there is no such pair."""
        out = np.full((len(genes), len(genes)), np.nan)
        out[at] = values
        return out

    known = edges[edges["source"].isin(genes) & edges["target"].isin(genes)]
    is_edge = np.zeros((len(genes), len(genes)), dtype=bool)
    is_edge[genes.get_indexer(known["source"]), genes.get_indexer(known["target"])] = True
    is_candidate = np.nan_to_num(square(table["n_cells"])) >= max(min_cells, 1)
    np.fill_diagonal(is_candidate, val=False)
    given = [
        ("attention", pd.NA, pd.NA, square(table["attention"])),
        ("ranks", pd.NA, pd.NA, square(table["expected"])),
    ]
    if "pairs" in uns:
        order = pd.Index(result.names("pairs_genes")).get_indexer(genes)
        of_heads = np.asarray(uns["pairs"])[:, order[:, None], order]
        layer, head = _heads(result).reshape(2, -1)
        given += [("attention", *which) for which in zip(layer, head, of_heads, strict=True)]
    rankings = [
        (score, direction, layer, head, values if direction == "source" else values.T)
        for score, layer, head, values in given
        for direction in ("source", "target")
    ]
    if "coexpression" in table:
        rankings.append(("coexpression", "", pd.NA, pd.NA, np.abs(square(table["coexpression"]))))
    auroc, precision = retrieval(np.stack([ranking[-1] for ranking in rankings]), is_edge, is_candidate)
    n_sources = auroc.shape[1]
    if n_sources < 2:
        msg = (
            f"{n_sources} sources of `edges` have both a target and another candidate among the named genes, in at "
            f"least {min_cells} cells each; at least two are needed. {len(known):,} of {len(edges):,} edges are "
            "between named genes, as `adata.var_names` spells them."
        )
        raise ValueError(msg)
    out = pd.DataFrame([ranking[:-1] for ranking in rankings], columns=["score", "direction", "layer", "head"])
    for name, values in (("auroc", auroc), ("early_precision", precision)):
        out[name], out[f"{name}_low"], out[f"{name}_high"] = resampled(values, np.random.default_rng(0))
    n_edges, n_candidates = (is_edge & is_candidate).sum(axis=1), is_candidate.sum(axis=1)
    out["n_sources"], out["n_edges"] = n_sources, int(n_edges[n_edges < n_candidates].sum())  # with others beside
    out = out.astype({"layer": "Int64", "head": "Int64"})
    return out.sort_values("auroc", ascending=False, ignore_index=True, kind="stable")
