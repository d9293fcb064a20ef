"""Every gene deleted in silico, one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from gfx._core.arguments import check_choice, check_seed, check_whole
from gfx._core.batching import pieces
from gfx._core.manifest import fingerprint
from gfx._core.screening import LOWEST_AGREEMENT, wanted_places
from gfx._docs import shared
from gfx._results import mask_name
from gfx.tl._baselines import find_baselines
from gfx.tl._gene_sets import find_gene_sets
from gfx.tl._prepare import check_controls, groups, open_store, prepare
from gfx.tl._states import find_states
from gfx.tl.perturbation._experiment import embed_states
from gfx.tl.screen import _run
from gfx.tl.screen._run import MODEL, RANDOM, Plan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import EllipsisType

    from gfx._core.screening import GeneSums
    from gfx._engine.tasks import Screen
    from gfx._run_store import RunStore
    from gfx._types import Data, Mask, ModelLike
    from gfx.tl._prepare import Prepared
    from gfx.tl._states import States

__all__ = ["FirstOrder", "screen_genes"]

_FUNCTION = "tl.screen_genes"

#: Controls that run unless others are asked for.
CONTROLS = ("random_weights", "baselines")

#: Cells of the start that show whether states are separable.
AXIS_CELLS = 1000

#: Streams of random numbers.
_PROBES, _WEIGHTS, _CHECK, _CANDIDATES, _AXIS = range(5)


@dataclass(frozen=True)
class FirstOrder:
    """Estimate effects of deletions by derivatives, see :func:`gfx.tl.screen_genes`.

    Parameters
    ----------
    n_probes
        Number of random directions for each cell along which shifts are estimated; each needs two passes. With 0, only
        shifts toward the goal are estimated, which is fastest and requires a goal.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy(20)
    >>> gfx.tl.screen_genes(
    ...     adata,
    ...     genes=["CD3D", "MS4A1"],
    ...     model="mini",
    ...     method=gfx.tl.FirstOrder(n_probes=4),
    ...     controls=None,
    ... )
    >>> gfx.get.screen_df(adata).attrs["approx"]
    True
    """

    n_probes: int = 8

    def __post_init__(self) -> None:
        check_whole(self.n_probes, "n_probes", 0)


@shared()
def screen_genes(
    adata: Data,
    *,
    genes: Iterable[str] | EllipsisType | None = None,
    model: ModelLike = None,
    layer: str | None = None,
    mask_obs: Mask = None,
    groupby: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    method: Literal["exact", "first_order"] | FirstOrder = "exact",
    positions: Literal["close", "keep"] = "close",
    controls: Iterable[str] | None = CONTROLS,
    hidden_layer: int = -2,
    pooling: Literal["auto", "mean", "cls", "genes"] = "auto",
    store: str | Path | None = None,
    rng: int = 0,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> Data | None:
    """Delete every gene of every cell in turn and find those that matter most :cite:p:`Theodoris2023`.

    Each gene that a cell expresses is removed from the encoding of the cell, and the model reads the cell again. The
    shift of the cell is 1 - cosine between its embedding before and after. With a goal, the change of the cosine
    between the cell and the centroid of the goal measures whether the cell shifts toward this state. Deleting any gene
    shifts the embedding, and deleting a highly ranked gene shifts it most. Each effect is therefore compared with the
    effects of genes of similar rank in the same cells (`excess`), and with a random-weights model. Read the result with
    :func:`gfx.get.screen_df`. Follow up the genes that stand out with :func:`gfx.tl.delete_genes`, which computes the
    same shifts and, in addition, statistics over donors, the parts of each shift, shifts toward other states, and
    effects of sets of genes.

    ``method="first_order"`` estimates the effects of all genes of a cell at once, from derivatives with respect to a
    weight of each gene (1 if the gene is kept, 0 if it is deleted). Shifts toward a goal are estimated with one
    backward pass. For shifts the first derivative is 0, because the cosine of a cell to itself is at its maximum; they
    are half the square of the rate at which the direction of the cell's vector changes, which is measured along random
    directions (probes). These estimates are noisy in single cells, but unbiased, so means over many cells are accurate.
    In some cells a sample of the genes is also deleted exactly, and the result reports how well the estimates agree
    with the exact effects. Up to 50 genes with the most extreme z-scores are also deleted exactly, each in 5 to 20
    cells: in more cells, the less it stands out.

    Cost: ``"exact"`` needs one forward pass for each gene of each cell; ``"first_order"`` needs one pass for each cell,
    two more for each probe, and two more for the goal. The exact deletions that check the estimates may take half as
    many passes as the estimates, but at least 300 and at most 1,500 in all (a backward pass counts as two). The
    random-weights model needs one more screen by derivatives. With a goal, the cells of the goal are embedded, and up
    to 1,000 cells of the start. Memory: two bytes for each gene and cell for tokens, and some numbers for each gene and
    group; with a goal, also one vector for each cell.

    Parameters
    ----------
    {adata}
    genes
        Symbols or Ensembl ids of the genes to screen; `None` or `...` screens every gene. Each gene is compared with
        the other screened genes of similar rank. If few genes are screened, the ranks of these genes are less similar,
        and no excess is computed in cells with 20 or fewer screened genes.
    {model}
    {layer}
    {mask_obs}
    groupby
        Column of `obs` with groups of cells. Without `start` and `goal`, effects are also averaged within each group.
    start, goal
        Screen the cells of the state `start` of `groupby`, and measure shifts toward the centroid of `goal`.
    method
        ``"exact"``: run the model for each deletion. ``"first_order"``: estimate the effects from derivatives; to
        choose the number of probes, pass a :class:`gfx.tl.FirstOrder`.
    {positions}
    controls
        ``"random_weights"``: also screen a random-weights model, by derivatives, which is needed for p-values and FDR.
        ``"baselines"``: detection, expression and fold change of each gene. `None`: no control.
    {hidden_layer}
    pooling
        ``"cls"``: the embedding of a cell is the hidden state of `<cls>`. ``"mean"``: it is the mean over the genes.
        ``"genes"``, only with ``method="exact"``: the shift of a cell is the mean of the shifts of its other genes.
        ``"auto"``: ``"cls"`` where the model family has this token, else ``"mean"``.
    store
        Path of a zarr store in which finished blocks of cells are kept, with the effects in each cell. If an
        interrupted call is repeated with the same path, it continues and gives the same result.
        :func:`gfx.get.screen_cells` reads the effects in each cell.
    {rng}
    {key_added}
    {mod}
    {copy}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.varm['gfx_screen' | key_added]` : :class:`pandas.DataFrame` (`(n_vars, n_columns)`)
        One row per gene, with statistics over the screened cells that express the gene: `n_cells`, `rank_mean`,
        `shift_mean`, `shift_sd`, `shift_excess`; with a goal, `toward_mean` and so on; with random weights, means and
        excesses in that model, `random_weights_shift_mean` and so on; with baselines, `detection`, `expression_mean`,
        `logfc`; with first-order estimates, `exact_n_cells`, `exact_shift_mean`, `exact_toward_mean`.
        :func:`gfx.get.screen_df` explains these columns and adds z-scores and p-values. For genes that no cell
        expresses or that the model does not know, `n_cells` is 0 and the other columns are NaN.
    `.varm['gfx_screen_groups' | key_added + '_groups']` : :class:`numpy.ndarray` (float32, 3 dimensions)
        With `groupby` but without `start` and `goal`, the same for each group, `(n_vars, n_groups, n_columns)`; `uns`
        holds the names of groups and columns.
    `.uns['gfx_screen' | key_added]` : :class:`dict`
        `params`; `approx`, whether effects are estimates; `controls`, see :func:`gfx.get.controls_df`; `groups` and
        `columns`, the names along the second and third dimension of the array of groups; `note`, which explains
        z-scores and p-values.

    Raises
    ------
    ValueError
        The model does not know a gene, `start` is given without `goal`, there are no raw counts, a value is not one of
        the choices, or the store holds another screen.
    KeyError
        There is no such column in `obs`, or no such state in this column.
    OSError
        The store cannot be written; finished blocks are kept.

    Warns
    -----
    UserWarning
        Start and goal are hardly separable, or estimates agree poorly with exact results.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy(30)
    >>> genes = ["CD3D", "CD3E", "CD79A", "MS4A1"]
    >>> gfx.tl.screen_genes(
    ...     adata, genes=genes, model="mini", groupby="cell_type", controls=None
    ... )
    >>> gfx.get.screen_df(adata).columns[:6].tolist()
    ['gene', 'n_cells', 'rank_mean', 'shift_mean', 'shift_sd', 'shift_excess']
    """
    from gfx._engine.run import networks
    from gfx._engine.tasks import Screen

    if not isinstance(method, FirstOrder):
        check_choice(method, "method", ("exact", "first_order"))
    is_exact, n_probes = method == "exact", method.n_probes if isinstance(method, FirstOrder) else FirstOrder().n_probes
    check_choice(positions, "positions", ("close", "keep"))
    controls, rng = check_controls(controls, CONTROLS), check_seed(rng)
    if n_probes == 0 and goal is None:
        msg = (
            "`FirstOrder(n_probes=0)` estimates no shifts, and without a goal there is nothing else to measure. Give "
            "probes; or `groupby`, `start` and `goal`."
        )
        raise ValueError(msg)
    cells = prepare(adata, model, function=_FUNCTION, layer=layer, mod=mod, copy=copy, key_added=key_added)
    states = None if start is None and goal is None else find_states(cells, groupby, start, goal)
    names, group = [], np.full(cells.adata.n_obs, -1)
    if groupby is not None and states is None:
        names, group = groups(cells.adata, groupby)
    task = Screen(
        network=cells.network(hidden_layer, "float32"),
        vocabulary=cells.model.vocabulary,
        is_exact=is_exact,
        positions=positions,
        pooling=cells.comparison(pooling),
        genes=_genes(genes, cells),
        goals=None,
        n_probes=min(int(n_probes), cells.model.hidden_size - 1),
        seed=_seed(rng, _PROBES),
    )
    _check_pooling(task)
    lengths = cells.lengths(mask_obs)
    if states is not None:
        lengths = np.where(states.is_start, lengths, 0)
    tasks = {MODEL: task}
    if "random_weights" in controls:
        tasks[RANDOM] = replace(
            task,
            network=task.network.randomized(_seed(rng, _WEIGHTS)),
            is_exact=False,
            pooling="mean" if task.pooling == "genes" else task.pooling,
        )
    plan = Plan(
        tokens=cells.tokens,
        n_deletions=_count_deletions(lengths, cells, task.genes),
        tasks=tasks,
        measures=["shift"] if states is None else ["shift", "toward"],
        group=group,
        n_groups=len(names),
    )
    params = {
        **cells.provenance(task.network),
        "hidden_layer": hidden_layer,
        "pooling": task.pooling,
        "method": "exact" if is_exact else "first_order",
        "positions": positions,
        "n_probes": None if is_exact and RANDOM not in tasks else task.n_probes,
        "controls": list(controls),
        "start": None if states is None else states.start,
        "goal": None if states is None else states.goal,
        "rng": rng,
    }
    if store is not None:
        store = _open_store(store, plan, cells, states, params | {"groupby": None if states is None else groupby})
    agreement, exact = [], None
    with networks(store):
        axis = None
        if states is not None:
            goals, axis = _goals(plan, cells, states, store, rng)
            plan = plan.toward(goals)
        check_rng = np.random.default_rng(_seed(rng, _CHECK))
        jobs = _run.make_jobs(plan)
        cells.announce(jobs, task.network, store, 0 if is_exact else 2 * plan.passes_per_check)
        sums, of_checked = _run.run_screen(
            plan, jobs, store, check_rng.permutation(plan.number)[: 0 if is_exact else plan.n_checked]
        )
        if not is_exact:
            agreement = _run.check_estimates(plan, of_checked, store, check_rng)
            exact = _run.run_candidates(plan, sums, store, np.random.default_rng(_seed(rng, _CANDIDATES)))
    table = _run.gene_columns(plan, sums, 0)
    if "baselines" in controls:
        _add_baselines(table, cells, lengths, states)
    if exact is not None:
        _add_exact(table, plan, exact)
    compared = _run.control_table(table, plan.measures_of(MODEL), agreement, axis)
    _warn(states, axis, compared)
    params |= {"groupby": groupby, "mask_obs": mask_name(mask_obs)}
    _write(cells, plan, table, sums, names=names, params=params, controls=compared)
    return cells.result


# --- what is asked for ---------------------------------------------------------------------------------------------


def _seed(rng: int, use: int) -> int:
    return int(np.random.default_rng([rng, use]).integers(2**31))


def _check_pooling(task: Screen) -> None:
    """Refuse what cannot be measured."""
    if task.pooling == "genes" and not task.is_exact:
        msg = "`pooling='genes'` has no estimates. Use `pooling='mean'`, or `method='exact'`."
        raise ValueError(msg)
    if task.pooling == "cls" and task.network.n_layers == 0:
        msg = (
            "`hidden_layer=0` is the input of the first network layer, where `<cls>` is the same in every cell: no "
            "deletion shifts it. Use `pooling='mean'`, or a later layer such as `hidden_layer=1`."
        )
        raise ValueError(msg)


def _genes(genes: Iterable[str] | EllipsisType | None, cells: Prepared) -> np.ndarray:
    """Find the tokens to delete, bool `(n_tokens,)`."""
    vocabulary = cells.model.vocabulary
    if genes is None or genes is ...:
        return ~vocabulary.is_special
    genes = [genes] if isinstance(genes, str) or not isinstance(genes, Iterable) else list(genes)
    if any(isinstance(gene, tuple) for gene in genes):
        msg = "A screen deletes genes one at a time; for genes together, call `gfx.tl.delete_genes(adata, genes)`."
        raise ValueError(msg)
    tokens = find_gene_sets(genes, vocabulary, np.zeros(0, np.int64)).tokens
    return np.isin(np.arange(len(vocabulary)), np.concatenate(tokens))


def _count_deletions(lengths: np.ndarray, cells: Prepared, genes: np.ndarray) -> np.ndarray:
    """Count the genes to delete in each cell, int64 `(n_obs,)`: 0 where there is none, or no other one is left."""
    n_deletions = np.zeros(len(lengths), dtype=np.int64)
    for rows in pieces(np.flatnonzero(lengths > 0)):
        ids = cells.tokens.padded(rows)
        n_deletions[rows] = wanted_places(ids, lengths[rows], genes, cells.model.vocabulary).sum(axis=1)
    if not n_deletions.any():
        why = f" {cells.behind}" if cells.are_cut(np.flatnonzero(genes), lengths).any() else ""
        msg = f"No cell that is screened has any of the genes and at least one other gene.{why}"
        raise ValueError(msg)
    return n_deletions


def _goals(
    plan: Plan, cells: Prepared, states: States, store: RunStore | None, rng: int
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Find the centroid of the goal in each network, and whether start and goal are separable in the model."""
    axis_rng = np.random.default_rng(_seed(rng, _AXIS))
    has_tokens = cells.tokens.lengths > 0
    if not (states.is_goal & has_tokens).any():
        msg = f"No cell of the state {states.goal!r} has a gene that the model knows."
        raise ValueError(msg)
    # Whether states are separable is known from some cells of the start; random weights need none.
    on_axis = np.zeros(len(has_tokens), dtype=bool)
    on_axis[axis_rng.permutation(np.flatnonzero(states.is_start & has_tokens))[:AXIS_CELLS]] = True
    goals, axis = {}, {}
    for name, task in plan.tasks.items():
        rows = states.is_goal | on_axis if name == MODEL else states.is_goal
        vectors = embed_states(cells, {name: task.network}, task.pooling, rows, store)[name]
        goals[name] = vectors[states.is_goal & has_tokens].mean(axis=0, dtype=np.float64)[None]
        if name == MODEL:
            axis = states.axis(vectors, None, axis_rng)
    return goals, axis


def _open_store(
    store: str | Path, plan: Plan, cells: Prepared, states: States | None, params: Mapping[str, object]
) -> RunStore:
    # Effects in cells are the same whatever groups and baselines they are compared with.
    of_runs = {
        **params,
        "controls": [name for name in params["controls"] if name != "baselines"],
        "cells_per_block": plan.cells_per_block,
        "screened_cells": fingerprint(plan.lengths),
        "genes": fingerprint(plan.tasks[MODEL].genes),
        "states": None if states is None else fingerprint(states.group, np.array(states.names, dtype=object)),
    }
    opened = open_store(store, _FUNCTION, cells, of_runs)
    # For those who read effects by cell: the token of each gene of the AnnData, and which genes these are.
    names = np.frombuffer(bytes.fromhex(fingerprint(cells.adata.var_names.to_numpy(dtype=object))), dtype=np.uint8)
    genes = {"token": cells.gene_tokens, "names": names}
    stored = opened.read("genes", 0) or {}
    if any(not np.array_equal(stored.get(name), genes[name]) for name in genes):
        with opened.held():
            opened.write("genes", 0, genes)
    return opened


# --- out -----------------------------------------------------------------------------------------------------------


def _add_baselines(table: pd.DataFrame, cells: Prepared, lengths: np.ndarray, states: States | None) -> None:
    known = find_baselines(cells, lengths, states, np.flatnonzero(table["n_cells"] > 0))
    table["detection"], table["expression_mean"] = known["detection"], known["expression"]
    if states is not None:
        table["logfc"] = known["logfc"]


def _add_exact(table: pd.DataFrame, plan: Plan, exact: GeneSums) -> None:
    table["exact_n_cells"] = exact.n("shift")[:, 0]
    for measure in plan.measures:
        table[f"exact_{measure}_mean"] = exact.mean(measure)[:, 0]


def _warn(states: States | None, axis: dict[str, object] | None, controls: pd.DataFrame) -> None:
    if states is not None and (warning := states.warning(axis)):
        warnings.warn(warning, UserWarning, stacklevel=3)
    # Estimates of shifts in single cells are noisy by design; those of shifts toward a goal are not.
    exact = controls.query("control == 'exact' and statistic == 'spearman' and measure == 'toward'")
    for value in exact["value"]:
        if value < LOWEST_AGREEMENT:
            warnings.warn(
                f"Estimates of shifts toward the goal correlate with exact results only at Spearman {value:.2f} within "
                "cells. Use `method='exact'`.",
                UserWarning,
                stacklevel=3,
            )


def _write(
    cells: Prepared,
    plan: Plan,
    table: pd.DataFrame,
    sums: GeneSums,
    *,
    names: list[str],
    params: Mapping[str, object],
    controls: pd.DataFrame,
) -> None:
    note = "z is the distance from genes of similar rank and number of cells in this screen"
    if RANDOM in plan.tasks:
        note += "; p and fdr say how often a random-weights model gives such a z in the same cells."
    else:
        note += "; without a random-weights model there are no p-values."
    uns = {"approx": not plan.tasks[MODEL].is_exact, "controls": controls, "note": note}
    of_groups = None
    if names:
        tables = [_of_genes(_run.gene_columns(plan, sums, 1 + number), cells) for number in range(len(names))]
        uns |= {"groups": np.array(names, dtype=object), "columns": np.array(tables[0].columns, dtype=object)}
        of_groups = np.stack([of_group.to_numpy(dtype=np.float32) for of_group in tables], axis=1)
    cells.slots.write(
        f"{int(table['n_cells'].sum()):,} deletions in {len(plan.number):,} cells with {cells.model.name!r}",
        params=params,
        uns=uns,
        hint=_hint(controls),
        varm={"": _of_genes(table, cells), "groups": of_groups},
    )


def _of_genes(table: pd.DataFrame, cells: Prepared) -> pd.DataFrame:
    """One row a gene of the AnnData, from one row a token."""
    of_genes = {"i": cells.cells_per_gene, "f": cells.per_gene}
    values = {name: of_genes[column.dtype.kind](column.to_numpy()) for name, column in table.items()}
    return pd.DataFrame(values, index=cells.adata.var_names)


def _hint(controls: pd.DataFrame) -> str:
    """Say at once how far the ranking is that of random weights, and that of the rank."""
    spearman = controls[(controls["statistic"] == "spearman") & controls["control"].isin([RANDOM, "rank"])].dropna()
    shift = spearman[spearman["measure"] == "shift"]
    values = [f"with {row.control.replace('_', ' ')} {row.value:+.2f}" for row in shift.itertuples()]
    summary = f"Spearman {', '.join(values)}. " if values else ""
    return f"{summary}Read `gfx.get.controls_df`, then `gfx.get.screen_df`."
