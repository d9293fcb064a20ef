"""Table of genes with the classes that they were given and are given by a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._adata import gene_column, gene_names
from gfx._keys import gene_class_keys, predicted_genes_keys
from gfx.get._classification import find_only

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

_HELD_OUT, _PREDICTED = "tl.classify_genes", "tl.predict_genes"


def gene_scores_df(
    adata: AnnData | MuData,
    group: str | None = None,
    *,
    key: str | None = None,
    min_cells: int = 10,
    names: str | None = None,
    mod: str | None = None,
) -> pd.DataFrame:
    """Tabulate how much each gene looks like each class, one row a gene.

    After :func:`gfx.tl.classify_genes` these are labelled genes, scored by models that never saw their label. After
    :func:`gfx.tl.predict_genes` they are all genes that the model knows; those whose label it has learnt are marked,
    for their scores tell less.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.classify_genes` or :func:`gfx.tl.predict_genes`.
    group
        A group of the `groupby` of :func:`gfx.tl.predict_genes`; `None` is all cells.
    key
        The `key_added` of that call, or its default name; `None` takes the only result there is.
    min_cells
        Genes scored in fewer cells are left out.
    names
        Column of `var` with names of genes; `None` is `var_names`.
    mod
        Modality of a MuData.

    Returns
    -------
    Columns:

    - `gene`;
    - `label`, the class it was given, or after :func:`gfx.tl.predict_genes` `learnt`, whether the model was trained on
      its label;
    - `predicted`, the class of the highest score; `n_cells`, the cells it was scored in;
    - for each class `score_<class>`, its mean probability over these cells, and without `group` `sd_<class>`, the
      standard deviation.

    Rows fall with the score of the last class. ``attrs["task"]`` names the task, ``attrs["classes"]`` its classes.

    Raises
    ------
    KeyError
        No such result or group, several results and no `key`, or no such column in `var`.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> t_cell = ["CD3D", "CD3E", "CD3G", "CD2", "IL7R", "TRAT1", "CD5", "CD27"]
    >>> b_cell = ["MS4A1", "CD79A", "CD79B", "CD19", "BANK1", "BLK", "HLA-DRA", "CD74"]
    >>> labels = {"T": t_cell, "B": b_cell}
    >>> gfx.tl.classify_genes(adata, labels, model="mini", method="linear_probe", n_repeats=1)
    >>> gfx.get.gene_scores_df(adata).columns.tolist()
    ['gene', 'label', 'predicted', 'n_cells', 'score_T', 'sd_T', 'score_B', 'sd_B']
    """
    adata, slot, found = find_only(adata, (_HELD_OUT, _PREDICTED), key=key, mod=mod)
    held_out = found["params"]["function"] == _HELD_OUT
    keys = gene_class_keys(slot) if held_out else predicted_genes_keys(slot)
    ((task, classes),) = found["tasks"].items()
    classes = [str(name) for name in classes]
    columns: dict[str, object] = {"gene": gene_names(gene_column(adata.var, names))}
    if held_out:
        columns["label"] = _categorical(adata.var[keys.var], classes)
        predicted = adata.var[keys.var_predicted]
    else:
        columns["learnt"] = adata.var[keys.var_learnt].to_numpy()
        predicted = adata.var[keys.var]
    if group is None:
        columns["predicted"] = _categorical(predicted, classes)
        n_cells, scores = adata.var[keys.var_n_cells].to_numpy(), np.asarray(adata.varm[keys.varm])
        parts = {"score": scores, "sd": np.asarray(adata.varm[keys.varm_sd])}
    else:
        at = _number_of(group, [str(name) for name in found.get("groups", [])], slot, held_out=held_out)
        n_cells, scores = (np.asarray(adata.varm[one])[:, at] for one in (keys.varm_groups_n_cells, keys.varm_groups))
        best = np.where(np.isnan(scores).any(axis=1), -1, scores.argmax(axis=1))
        columns["predicted"] = pd.Categorical.from_codes(best, classes)
        parts = {"score": scores}
    columns["n_cells"] = n_cells
    for at, name in enumerate(classes):
        columns |= {f"{part}_{name}": values[:, at] for part, values in parts.items()}
    table = pd.DataFrame(columns)
    table = table[table["n_cells"] >= max(min_cells, 1)]
    table = table.sort_values(f"score_{classes[-1]}", ascending=False, kind="stable").reset_index(drop=True)
    table.attrs |= {"task": task, "classes": classes}
    return table


def _categorical(values: pd.Series, classes: list[str]) -> pd.Categorical:
    """Return classes in their order, all of them: subsetting an AnnData drops those that none of its genes has."""
    return pd.Categorical(values.astype(object), categories=classes)


def _number_of(group: str, groups: list[str], slot: str, *, held_out: bool) -> int:
    """Find the place of a group, or say why there is none."""
    if group in groups:
        return groups.index(group)
    if held_out:
        msg = f"`adata.uns[{slot!r}]` is of `gfx.{_HELD_OUT}`, which scores genes in all cells. Leave `group` out."
    elif not groups:
        msg = f"`adata.uns[{slot!r}]` has no groups. Give `groupby=` to `gfx.{_PREDICTED}`, or leave `group` out."
    else:
        msg = f"Did not find the group {group!r}. Present: {groups}."
    raise KeyError(msg)
