"""Table of the targets of perturbed genes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

from gfx._adata import pick
from gfx._core.statistics import auc, false_discovery_rate
from gfx.get._deletion import gene_effects_df

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from mudata import MuData

_COLUMNS = ["perturbation", "targets", "others", "effect", "n_targets", "n_others"]
_COLUMNS += ["median_targets", "median_others", "auc", "p"]

#: Genes beside each target that are most like it without being targets.
N_MATCHED = 10


def target_effects_df(
    adata: AnnData | MuData,
    targets: Mapping[str, Sequence[str]],
    *,
    perturbation: str | None = None,
    key: str | None = None,
    min_cells: int = 10,
    mod: str | None = None,
) -> pd.DataFrame:
    """Ask whether known targets of a gene move farther than other genes when it is perturbed :cite:p:`Theodoris2023`.

    The paper compared direct with indirect targets of GATA4 and TBX5, and both with housekeeping genes, by rank-sum
    tests over genes. A gene seen in many cells, or one that moves whatever is done, is no evidence: so effects are
    those beyond random perturbations where these were run, and each set is also compared with genes seen in about as
    many cells that move about as far under random perturbations.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.delete_genes`, :func:`gfx.tl.overexpress_genes` or :func:`gfx.tl.shift_genes`.
    targets
        Sets of genes by name, such as ``{"direct": [...], "indirect": [...]}``, as they are called in `var_names`.
    perturbation
        Its name; `None` for all of them.
    key
        The `key_added` of that call, or its default name.
    min_cells
        Genes seen together with the perturbed ones in fewer cells are left out.
    mod
        Modality of a MuData.

    Returns
    -------
    One row a perturbation and comparison: `perturbation`, `targets` and `others`, the sets compared (``"all other
    genes"``, ``"matched genes"``, or another set of `targets`); `n_targets`, `n_others`; `median_targets`,
    `median_others`, medians of `effect` (``"excess"`` over random perturbations, else ``"shift"``); `auc`, the
    probability that a target moves farther than another gene; `p`, two-sided Wilcoxon rank-sum over genes; `fdr`,
    Benjamini-Hochberg over all rows. NaN where a set has fewer than two genes.

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
    >>> gfx.tl.delete_genes(adata, "CD3D", model="mini", null=10)
    >>> gfx.get.target_effects_df(adata, {"complex": ["CD3E", "CD3G", "CD247"]})["others"].tolist()
    ['all other genes', 'matched genes']
    """
    effects = gene_effects_df(adata, perturbation, key=key, min_cells=min_cells, mod=mod)
    effect = "excess" if "excess" in effects else "shift"
    effects = effects.dropna(subset=[effect])
    sets = _check_targets(targets, pick(adata, mod))
    rows = []
    for name, genes in effects.groupby("perturbation", sort=False):
        is_target = {label: genes["gene"].isin(members).to_numpy() for label, members in sets.items()}
        in_any = np.logical_or.reduce(list(is_target.values()))
        values, alike = genes[effect].to_numpy(dtype=np.float64), _what_is_matched(genes)
        labels = list(sets)
        for at, label in enumerate(labels):
            mine = is_target[label]
            comparisons = {"all other genes": ~in_any, "matched genes": _matched(mine, ~in_any, alike)}
            comparisons |= {other: is_target[other] & ~mine for other in labels[at + 1 :]}
            rows += [
                {"perturbation": name, "targets": label, "others": other, "effect": effect}
                | _compare(values[mine], values[rest])
                for other, rest in comparisons.items()
            ]
    table = pd.DataFrame(rows, columns=_COLUMNS)
    return table.assign(fdr=false_discovery_rate(table["p"].to_numpy(dtype=np.float64)))


def _check_targets(targets: Mapping[str, Sequence[str]], adata: AnnData) -> dict[str, set[str]]:
    if not hasattr(targets, "items") or not targets:
        msg = '`targets` maps names to genes, such as {"direct": ["MYH6", "MYH7"]}; found ' + f"{targets!r}."
        raise ValueError(msg)
    sets = {str(label): set(map(str, genes)) for label, genes in targets.items()}
    for label, genes in sets.items():
        if not genes & set(adata.var_names):
            msg = (
                f"None of the {len(genes)} genes of {label!r}, such as {sorted(genes)[:3]}, is in `adata.var_names`, "
                f"such as {adata.var_names[:3].tolist()}. Give them as they are called there."
            )
            raise ValueError(msg)
    return sets


def _what_is_matched(genes: pd.DataFrame) -> np.ndarray:
    """Ranks from 0 to 1 by the number of cells, and by the shift under random sets if there are any, `(n_genes, n)`."""
    columns = ["n_cells"] + ["random_shift"] * ("random_shift" in genes)
    return genes[columns].rank(pct=True).to_numpy()


def _matched(mine: np.ndarray, rest: np.ndarray, alike: np.ndarray) -> np.ndarray:
    """Genes of `rest` nearest to some target in what is matched, bool `(n_genes,)`."""
    out = np.zeros(len(mine), dtype=bool)
    candidates = np.flatnonzero(rest)
    for at in np.flatnonzero(mine):
        apart = abs(alike[candidates] - alike[at]).sum(axis=1)
        nearest = np.argsort(apart, kind="stable")[:N_MATCHED]
        out[candidates[nearest]] = True
    return out


def _compare(mine: np.ndarray, others: np.ndarray) -> dict[str, float]:
    enough = min(len(mine), len(others)) > 1
    return {
        "n_targets": len(mine),
        "n_others": len(others),
        "median_targets": float(np.median(mine)) if len(mine) else np.nan,
        "median_others": float(np.median(others)) if len(others) else np.nan,
        "auc": auc(mine, others) if enough else np.nan,
        "p": float(stats.ranksums(mine, others).pvalue) if enough else np.nan,
    }
