"""Genes deleted in silico."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from gfx import _log
from gfx._keys import delete_keys
from gfx._provenance import record
from gfx.tl._prepare import groups, prepare

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData

    from gfx._core.vocabulary import Vocabulary
    from gfx.models import Model
    from gfx.tl._prepare import Prepared


def delete_genes(
    adata: AnnData | MuData,
    genes: str | tuple[str, ...] | Sequence[str | tuple[str, ...]],
    *,
    model: str | Path | Model | None = None,
    layer: str | None = None,
    groupby: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    hidden_layer: int = -2,
    pooling: Literal["auto", "mean", "cls"] = "auto",
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> AnnData | MuData | None:
    """Delete genes from cells and measure what moves :cite:p:`Theodoris2023`.

    A gene is taken out of the encodings of the cells that express it, the model reads them again, and each cell and
    each remaining gene is compared with before: shift = 1 - cosine, 0 when nothing moved. With states, the change of
    the cell's cosine to the mean of each state is given too; above 0 the cell moved towards it.

    The effect says what the model expects of a cell without the gene, not what an experiment would do. Everything
    behind a deleted gene moves up by one position, which shifts a cell by itself, the more the higher the gene stands:
    compare genes of similar `rank_mean`, and delete some random genes beside those of interest. Cells are not
    replicates: the spread is that of cells.

    Runs in float32, for the shifts of single genes drown in the rounding of shorter formats.

    Cost: one forward pass for each cell and perturbation that applies to it, and one for each such cell itself.
    Memory: genes of the model × perturbations, however many cells there are.

    Parameters
    ----------
    adata
        Cells by genes, raw counts in `X` or `layer`, or tokens from :func:`gfx.pp.tokenize`.
    genes
        Symbols or Ensembl ids, each deleted by itself; a tuple of them is deleted together.
    model
        Published name, folder, or what :func:`gfx.models.load` returned. `None`: `gfx.settings.model`, else `mini`.
    layer
        Layer with the raw counts; `None`: `X`.
    groupby
        Column of `obs` with cell states.
    start, goal
        Delete genes in the cells of state `start` and ask whether they move towards `goal`; all other states of
        `groupby` are alternatives. A state is the mean embedding of its cells, as they are.
    hidden_layer
        Which hidden states: -1 the last block's, -2 those of the block before, 0 the embedding's.
    pooling
        ``"cls"``: a cell's shift is that of `<cls>`. ``"mean"``: it is the mean of its remaining genes' shifts, and
        states are compared with the mean over genes. ``"auto"``: as the model's family does.
    key_added
        Where to store the result; see below.
    mod
        Modality of a MuData.
    copy
        Work on a copy and return it.

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets, with one column a perturbation in the order of `genes`:

    `.obsm['gfx_delete' | key_added]` : :class:`numpy.ndarray` (float32, `(n_obs, n_perturbations)`)
        Shift of each cell; NaN for cells that lack a gene or are not of state `start`.
    `.obsm['gfx_delete_states' | key_added + '_states']` : :class:`numpy.ndarray` (float32, 3 dimensions)
        With states, `(n_obs, n_perturbations, n_states)`: change of the cosine to each state, in the order of `uns`.
    `.varm['gfx_delete' | key_added]` : :class:`numpy.ndarray` (float32, `(n_vars, n_perturbations)`)
        Shift of each remaining gene, mean over the cells that have it; NaN where none does.
    `.varm['gfx_delete_n_cells' | key_added + '_n_cells']` : :class:`numpy.ndarray` (int32, `(n_vars, n_perturbations)`)
        Cells behind each of these means.
    `.uns['gfx_delete' | key_added]` : :class:`dict`
        `params`; `perturbations`, their names; `states`, the names of the states; `table`, one row a perturbation;
        with states `state_table`, one row a perturbation and state (see :func:`gfx.get.deletion_df`).

    Raises
    ------
    ValueError
        A gene that the model does not know, a gene or set given twice, `start` without `goal`, no raw counts, or
        tokens of another vocabulary.
    KeyError
        No such column in `obs`, or no such state in it.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ["CD3D", ("CD3D", "CD3E")], model="mini")
    >>> adata.obsm["gfx_delete"].shape
    (60, 2)
    >>> gfx.get.deletion_df(adata)["perturbation"].tolist()
    ['CD3D', 'CD3D+CD3E']
    """
    from gfx._engine.perturb import delete_genes as run
    from gfx._engine.pooling import embed_cells

    keys = delete_keys(key_added)
    cells = prepare(adata, model, layer=layer, mod=mod, copy=copy, slot=keys.uns, function="tl.delete_genes")
    vocabulary, tokens = cells.model.vocabulary, cells.tokens
    names, sets = _perturbations(genes, vocabulary)
    states = _states(cells, groupby, start, goal)
    how = cells.pooling(pooling)
    encoder = cells.encoder(hidden_layer, dtype="float32")
    lengths, centroids = tokens.lengths, None
    if states is not None:
        in_a_state = np.where(states.group >= 0, tokens.lengths, 0)
        vectors = embed_cells(encoder, tokens.ids, in_a_state, vocabulary, how=how)
        centroids = states.centroids(vectors)
        lengths = np.where(states.group == states.names.index(states.start), tokens.lengths, 0)
    effects = run(encoder, tokens.ids, lengths, vocabulary, sets, how=how, state_vectors=centroids)

    table = _table(names, effects.cells, effects.ranks)
    result: dict[str, object] = {
        "params": record(
            "tl.delete_genes",
            **cells.provenance(encoder),
            hidden_layer=hidden_layer,
            pooling=how,
            operator="delete",
            groupby=groupby,
            start=start,
            goal=goal,
        ),
        "perturbations": np.array(names, dtype=object),
        "table": table,
    }
    shift_genes = cells.per_gene(effects.genes)
    shift_genes_n_cells = cells.cells_per_gene(effects.n_gene_cells)
    if states is not None:
        result["states"] = np.array(states.names, dtype=object)
        result["state_table"] = _state_table(names, states, effects.states)
    absent = table.loc[table["n_cells"] == 0, "perturbation"].tolist()
    if absent:
        where = "" if states is None else f" of the state {states.start!r}"
        warnings.warn(
            f"No cell{where} has the genes of {absent} and others beside them; their effects are NaN.",
            UserWarning,
            stacklevel=2,
        )
    cells.adata.obsm[keys.obsm] = effects.cells
    if states is not None:
        cells.adata.obsm[keys.obsm_states] = effects.states
    elif keys.obsm_states in cells.adata.obsm:
        del cells.adata.obsm[keys.obsm_states]  # of an earlier run with states: it would not belong to this one
    cells.adata.varm[keys.varm] = shift_genes
    cells.adata.varm[keys.varm_n_cells] = shift_genes_n_cells
    cells.adata.uns[keys.uns] = result
    _log.info(
        f"{len(names)} deletion{'s' * (len(names) > 1)} in up to {int(table['n_cells'].max()):,} cells with "
        f"{cells.model.name!r}: added {keys.obsm!r} (adata.obsm, adata.varm)"
    )
    return cells.result


def _perturbations(
    genes: str | tuple[str, ...] | Sequence[str | tuple[str, ...]], vocabulary: Vocabulary
) -> tuple[list[str], list[np.ndarray]]:
    """Find the tokens of each perturbation, and name it."""
    if isinstance(genes, str) or (isinstance(genes, tuple) and all(isinstance(gene, str) for gene in genes)):
        genes = [genes]  # a tuple is deleted together, in a list or by itself
    given = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in genes]
    if not given or not all(given):
        msg = "`genes` is empty: give at least one gene, or a tuple of genes to delete together."
        raise ValueError(msg)
    sets = []
    for entry in given:
        tokens = vocabulary.resolve(entry)
        unknown = [gene for gene, token in zip(entry, tokens, strict=True) if token < 0]
        if unknown:
            symbols = [str(s) for s in vocabulary.symbols if s]
            close = difflib.get_close_matches(unknown[0].upper(), symbols, n=3)
            hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            msg = (
                f"The model does not know {unknown}.{hint} "
                f"Genes are given as symbols or Ensembl ids of the vocabulary {vocabulary.name!r}."
            )
            raise ValueError(msg)
        if len(set(tokens.tolist())) < len(tokens):
            msg = f"A gene is named twice in {entry}."
            raise ValueError(msg)
        sets.append(tokens)
    names = ["+".join(entry) for entry in given]
    seen: dict[frozenset[int], str] = {}
    for name, tokens in zip(names, sets, strict=True):
        key = frozenset(tokens.tolist())
        if key in seen:
            msg = f"{name!r} and {seen[key]!r} are the same perturbation; give it once."
            raise ValueError(msg)
        seen[key] = name
    return names, sets


@dataclass(frozen=True)
class _States:
    """Cell states: their names, the state of each cell (-1 for none), and which one is perturbed and wanted."""

    names: list[str]
    group: np.ndarray
    start: str
    goal: str

    def role(self, name: str) -> str:
        return {self.start: "start", self.goal: "goal"}.get(name, "alternative")

    def centroids(self, vectors: np.ndarray) -> np.ndarray:
        """Mean embedding of each state, float64 `(n_states, d)`."""
        has_vector = ~np.isnan(vectors[:, 0])
        rows = [has_vector & (self.group == at) for at in range(len(self.names))]
        empty = [name for name, row in zip(self.names, rows, strict=True) if not row.any()]
        if empty:
            msg = f"No cell of the states {empty} has a gene that the model knows; leave these cells out."
            raise ValueError(msg)
        return np.stack([vectors[row].mean(axis=0, dtype=np.float64) for row in rows])


def _states(cells: Prepared, groupby: str | None, start: str | None, goal: str | None) -> _States | None:
    if groupby is None and start is None and goal is None:
        return None
    if groupby is None or start is None or goal is None:
        given = {"groupby": groupby, "start": start, "goal": goal}
        msg = f"`groupby`, `start` and `goal` go together; found {given}."
        raise ValueError(msg)
    start, goal = str(start), str(goal)  # as the names of groups are, whatever the column holds
    names, group = groups(cells.adata, groupby)
    for role, state in (("start", start), ("goal", goal)):
        if state not in names:
            close = difflib.get_close_matches(state, names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            msg = f"Did not find {role}={state!r} in `adata.obs[{groupby!r}]`.{hint} Present: {names}."
            raise KeyError(msg)
    if start == goal:
        msg = f"`start` and `goal` are both {start!r}; a cell cannot move towards where it is."
        raise ValueError(msg)
    occupied = np.unique(group[group >= 0])
    kept = [names[at] for at in occupied]  # categories without cells are no states
    for role, state in (("start", start), ("goal", goal)):
        if state not in kept:
            msg = f"No cell is of the state {role}={state!r}. States with cells: {kept}."
            raise ValueError(msg)
    renumber = np.full(len(names) + 1, -1, dtype=np.int64)
    renumber[occupied] = np.arange(len(occupied))
    return _States(names=kept, group=renumber[group], start=start, goal=goal)


def _summary(values: np.ndarray) -> dict[str, float]:
    """Mean and spread over cells, in float64; NaN where there are too few."""
    values = values[~np.isnan(values)].astype(np.float64)
    return {
        "mean": values.mean() if len(values) else np.nan,
        "sd": values.std(ddof=1) if len(values) > 1 else np.nan,
    }


def _table(names: list[str], shift: np.ndarray, ranks: np.ndarray) -> pd.DataFrame:
    rows = []
    for at, name in enumerate(names):
        effect, rank = _summary(shift[:, at]), _summary(ranks[:, at])
        rows.append(
            {
                "perturbation": name,
                "n_cells": int((~np.isnan(shift[:, at])).sum()),
                "shift_mean": effect["mean"],
                "shift_sd": effect["sd"],
                "rank_mean": rank["mean"],
            }
        )
    return pd.DataFrame(rows)


def _state_table(names: list[str], states: _States, toward: np.ndarray) -> pd.DataFrame:
    rows = []
    for at, name in enumerate(names):
        for state_at, state in enumerate(states.names):
            values = toward[:, at, state_at]
            effect = _summary(values)
            rows.append(
                {
                    "perturbation": name,
                    "state": state,
                    "role": states.role(state),
                    "n_cells": int((~np.isnan(values)).sum()),
                    "toward_mean": effect["mean"],
                    "toward_sd": effect["sd"],
                }
            )
    return pd.DataFrame(rows)
