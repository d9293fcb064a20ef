"""Every gene deleted in silico, one at a time."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from gfx import _docs, _log
from gfx._core.screening import wanted_places
from gfx._keys import screen_keys
from gfx._provenance import mask_name, record
from gfx._settings import settings
from gfx.tl._baselines import find_baselines
from gfx.tl._cell_states import find_states
from gfx.tl._gene_sets import find_gene_sets
from gfx.tl._prepare import check_choice, groups, pieces, prepare, put
from gfx.tl._screen_job import ScreenJob, networks
from gfx.tl._screen_run import (
    MODEL,
    RANDOM,
    Plan,
    check_estimates,
    control_table,
    do_candidates,
    fingerprint,
    gene_columns,
    run_screen,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData

    from gfx._core.screening import GeneSums
    from gfx._engine.perturb import Comparison
    from gfx._keys import ScreenKeys
    from gfx.models import Model
    from gfx.tl._cell_states import States
    from gfx.tl._prepare import Prepared
    from gfx.tl._screen_job import Method
    from gfx.tl._screen_run import Found
    from gfx.tl._screen_store import ScreenStore

_FUNCTION = "tl.screen_genes"

#: Estimates that agree less with exact results than this, over the genes of a cell, are warned of.
LOWEST_AGREEMENT = 0.9

#: Streams of random numbers.
_PROBES, _TWIN, _CHECK, _CANDIDATES, _AXIS = range(5)


@_docs.shared(model=_docs.MODEL, output=_docs.OUTPUT)
def screen_genes(
    adata: AnnData | MuData,
    *,
    genes: Iterable[str] | None = None,
    model: str | Path | Model | None = None,
    layer: str | None = None,
    mask_obs: str | np.ndarray | None = None,
    groupby: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    method: Literal["exact", "first_order"] = "exact",
    operator: Literal["hold", "delete"] = "hold",
    n_probes: int = 8,
    null: Literal["random_weights"] | None = "random_weights",
    hidden_layer: int = -2,
    pooling: Literal["auto", "mean", "cls", "genes"] = "auto",
    dtype: str | None = "float32",
    store: str | Path | None = None,
    client: Any | None = None,
    layers: bool = False,
    rng: int = 0,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> AnnData | MuData | None:
    """Delete every gene of every cell in turn, and find those that matter most :cite:p:`Theodoris2023`.

    Each gene that a cell expresses is taken out of its encoding, the model reads the cell again, and shift = 1 - cosine
    says how far it moved; with a goal, the change of its cosine to the mean cell of that state says whether it went
    there. Every gene moves a cell somehow, those at its front most. So each is held against the genes of neighbouring
    rank in the same cells, at no cost, for these are screened as well; and against a network with random weights,
    which tells what such a network does to any cells. Read the result with :func:`gfx.get.screen_df`, and take what
    stands out to :func:`gfx.tl.delete_genes`, which has donors, parts of the shift, other states, and pairs.

    ``method="first_order"`` estimates all genes of a cell at once, from derivatives with respect to how much of each
    gene is kept. Movements towards a goal follow from one pass backward. Shifts have no first order, the cosine of a
    cell to itself being highest where it is: they are half the square of how fast the cell's vector turns, measured
    along `n_probes` random directions; without bias, so that means over many cells are good where single cells are
    rough. Four cells are screened exactly as well, and the result says how well the estimates agree; the 50 genes that
    stand out most are done exactly in up to 20 cells.

    Cost: ``"exact"``, one forward pass for each gene of each cell; ``"first_order"``, about three for each cell, with
    shifts two more for each probe; with `null`, the same once more, and beside exact results that of a first-order
    screen. Memory: two bytes a gene and cell for tokens, some numbers a gene and group, and what is run at once;
    with a goal the vectors of the cells of both states, and with `layers` some thirty bytes a gene and cell, of which
    eight remain.

    Parameters
    ----------
    adata
        Cells by genes, raw counts in `X` or `layer`, or tokens from :func:`gfx.pp.tokenize`.
    genes
        Symbols or Ensembl ids to screen; `None` is every gene. Neighbours are then among these: few genes are held
        against genes that stand far from them, and where a cell has no more than 20 of them, against none, so that
        they have no z.
    {model}
    mask_obs
        Which cells to screen: a column of `obs`, or one truth value per cell.
    groupby
        Column of `obs`. By itself, genes are summed up in each of its groups, too.
    start, goal
        Screen the cells of the state `start` of `groupby`, and ask whether they move towards the mean of those of
        `goal`.
    method
        ``"exact"``, or ``"first_order"``, which has estimates.
    operator
        ``"hold"``: every other gene keeps its position. ``"delete"``: those behind move up by one, as in the
        published method; effects then follow the rank.
    n_probes
        Random directions for each cell, for estimates of shifts; also of those of the network with random weights. 0
        leaves shifts out where there is a goal, and costs least.
    null
        ``"random_weights"``: run a network of the same shape with random weights, with the same operator, by
        derivatives (``"genes"`` as ``"mean"``); `None`: do not.
    hidden_layer
        Which hidden states: -1 the last block's, -2 those of the block before, 0 the embedding's.
    pooling
        ``"cls"``: a cell is its `<cls>`. ``"mean"``: the mean over its genes. ``"genes"``, exact only: its shift is the
        mean of the shifts of its other genes. ``"auto"``: ``"cls"`` where the family has it, else ``"mean"``.
    dtype
        ``"float32"``, for small shifts drown in the rounding of shorter formats; ``"bfloat16"`` where speed is worth
        more. `None` is bfloat16 where it is fast.
    store
        Path of a zarr store in which blocks of cells are kept as they are finished, with the effect in each cell. When
        called again with the same path, a run that was stopped goes on, to the same result.
    client
        A `dask.distributed.Client`: blocks of cells run on its workers, one model each. Workers find the weights under
        the same path. For several GPUs of a machine, one worker each, as `dask_cuda.LocalCUDACluster` starts them.
    layers
        Write the effect in each cell into `layers`, too.
    rng
        Seed of probes, random weights, and the choice of cells.
    {output}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Sets:

    `.varm['gfx_screen' | key_added]` : :class:`pandas.DataFrame` (`(n_vars, n_columns)`)
        One row a gene, over the screened cells that have it: `n_cells`, `rank_mean`, `shift_mean`, `shift_sd`,
        `shift_excess` (beside its neighbours); with a goal, `toward_mean` and so on; with `null`, means and excesses in
        that network, `random_weights_shift_mean` and so on; `detection`, `expression_mean`, `logfc`; after estimates
        `exact_n_cells`, `exact_shift_mean`, `exact_toward_mean`. :func:`gfx.get.screen_df` explains them and adds z and
        p. NaN, and 0 cells, for genes that no cell has or that the model does not know.
    `.varm['gfx_screen_groups' | key_added + '_groups']` : :class:`numpy.ndarray` (float32, 3 dimensions)
        With `groupby` by itself, the same for each group, `(n_vars, n_groups, n_columns)`; names in `uns`.
    `.layers['gfx_screen' | key_added]` : :class:`scipy.sparse.csr_matrix` (float32, `(n_obs, n_vars)`)
        With `layers`, the shift of each cell without each gene; nothing is stored where a gene was not deleted, for the
        cell lacks it or it stands behind what the model reads.
    `.layers['gfx_screen_toward' | key_added + '_toward']` : :class:`scipy.sparse.csr_matrix` (float32)
        With `layers` and a goal, the change of the cell's cosine to it.
    `.uns['gfx_screen' | key_added]` : :class:`dict`
        `params`; `approx`, whether there are estimates; `controls`, see :func:`gfx.get.screen_controls_df`; `groups`
        and `columns`, names along the second and third dimension of the groups; `note`, what z and p are.

    Raises
    ------
    ValueError
        A gene that the model does not know, `start` without `goal`, no raw counts, a value outside the choices, or a
        store that holds another screen.
    KeyError
        No such column in `obs`, or no such state in it.
    OSError
        The store cannot be written; what was finished before is kept.

    Warns
    -----
    UserWarning
        Start and goal can hardly be told apart; or estimates agree badly with exact results.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.screen_genes(adata, model="mini", method="first_order", mask_obs=adata.obs["cell_type"] == "B cell")
    >>> table = gfx.get.screen_df(adata, min_cells=5)
    >>> table.columns[:6].tolist()
    ['gene', 'n_cells', 'rank_mean', 'shift_mean', 'shift_sd', 'shift_excess']
    """
    keys = screen_keys(key_added)
    _check(method, operator, n_probes, null=null, goal=goal)
    if not isinstance(rng, int | np.integer):
        msg = f"`rng` is a whole number, for a stopped run has to draw the same again; found {rng!r}."
        raise TypeError(msg)
    cells = prepare(adata, model, layer=layer, mod=mod, copy=copy, slot=keys.uns, function=_FUNCTION)
    states = None if start is None and goal is None else find_states(cells, groupby, start, goal)
    names, group = _groups(cells, groupby, states)
    how = _comparison(cells, pooling, method)
    lengths = cells.lengths(mask_obs)
    lengths = lengths if states is None else np.where(states.is_start, lengths, 0)
    job = _job(
        cells, method=method, operator=operator, how=how, n_probes=n_probes, hidden_layer=hidden_layer, dtype=dtype,
        seed=_seed(rng, _PROBES),
    )  # fmt: skip
    plan = _plan(cells, lengths, job, genes=genes, group=group, n_groups=len(names), states=states, null=null, rng=rng)
    noted = {
        "hidden_layer": hidden_layer,
        "pooling": how,
        "method": method,
        "operator": operator,
        "n_probes": n_probes if method == "first_order" or null is not None else None,
        "null": null,
        "groupby": groupby,
        "start": start,
        "goal": goal,
        "rng": int(rng),
    }
    kept = estimates = exact = None
    with networks():
        goals, axis = _goals(plan, cells, states, rng)
        if store is not None:
            kept = _open_store(store, plan, cells, states=states, goals=goals, noted=noted)
            goals = {name: kept.goals(name) for name in goals}
        plan = plan.towards(goals)
        found = run_screen(plan, kept, client, n_obs=cells.adata.n_obs, layers=layers)
        if method == "first_order":
            estimates = check_estimates(plan, client, np.random.default_rng(_seed(rng, _CHECK)))
            exact = do_candidates(plan, found, client, np.random.default_rng(_seed(rng, _CANDIDATES)))

    table = gene_columns(plan, found.whole, 0)
    _add_baselines(table, cells, lengths, states)
    controls = control_table(table, plan.measures_of(MODEL), axis=axis, estimates=estimates)
    _add_exact(table, plan, exact)
    uns = {
        "params": record(
            _FUNCTION,
            **cells.model.provenance(),
            **cells.tokens.source,
            dtype=plan.jobs[MODEL].dtype,
            mask_obs=mask_name(mask_obs),
            **noted,
        ),
        "approx": method == "first_order",
        "controls": controls,
        "note": _note(null),
    }
    _warn(states, axis, controls)
    _write(cells, keys, plan, found, table=table, names=names, uns=uns)
    _tell(cells, keys, plan, table, controls)
    return cells.result


# --- what is asked for ---------------------------------------------------------------------------------------------


def _check(method: str, operator: str, n_probes: int, *, null: str | None, goal: str | None) -> None:
    check_choice("method", method, ("exact", "first_order"))
    check_choice("operator", operator, ("hold", "delete"))
    check_choice("null", null, ("random_weights", None))
    if isinstance(n_probes, bool) or not isinstance(n_probes, int | np.integer) or n_probes < 0:
        msg = f"`n_probes` is a number of random directions, found {n_probes!r}."
        raise ValueError(msg)
    if n_probes == 0 and goal is None and (method == "first_order" or null is not None):
        msg = (
            "`n_probes=0` measures no shifts by derivatives, and without a goal there is nothing else. Give probes; or "
            "`groupby`, `start` and `goal`."
        )
        raise ValueError(msg)


def _seed(rng: int, use: int) -> int:
    return int(np.random.default_rng([int(rng), use]).integers(2**31))


def _groups(cells: Prepared, groupby: str | None, states: States | None) -> tuple[list[str], np.ndarray]:
    """Find groups to sum up by themselves; none where `groupby` has the states."""
    if groupby is None or states is not None:
        return [], np.full(cells.adata.n_obs, -1)
    return groups(cells.adata, groupby)


def _comparison(cells: Prepared, pooling: str, method: str) -> Literal["cls", "mean", "genes"]:
    check_choice("pooling", pooling, ("auto", "mean", "cls", "genes"))
    if pooling != "genes":
        return cells.pooling(pooling)
    if method == "first_order":
        msg = "`pooling='genes'` has no estimates. Use `pooling='mean'`, or `method='exact'`."
        raise ValueError(msg)
    return "genes"


def _job(
    cells: Prepared,
    *,
    how: Comparison,
    method: Method,
    hidden_layer: int,
    n_probes: int,
    dtype: str | None,
    **wanted: Any,
) -> ScreenJob:
    from gfx._engine.device import choose_device, choose_dtype, has_fast_bfloat16
    from gfx._engine.encoder import blocks_needed

    model, device = cells.model, choose_device(None)
    if dtype is None:
        may_round = method == "exact" and how != "cls"
        dtype = "bfloat16" if may_round and has_fast_bfloat16(device, own_attention=True) else "float32"
    chosen = str(choose_dtype(dtype, device)).removeprefix("torch.")
    return ScreenJob(
        weights=model.weights,
        config=model.config,
        n_blocks=blocks_needed(hidden_layer, model.n_blocks),
        vocabulary=model.vocabulary,
        method=method,
        how=how,
        n_probes=min(n_probes, model.hidden_size - 1),
        goals=None,
        dtype=chosen,
        device=None if settings.device is None else str(choose_device(None)),
        batch_tokens=settings.batch_tokens,
        **wanted,
    )


def _plan(
    cells: Prepared,
    lengths: np.ndarray,
    job: ScreenJob,
    *,
    genes: Iterable[str] | None,
    group: np.ndarray,
    n_groups: int,
    states: States | None,
    null: str | None,
    rng: int,
) -> Plan:
    vocabulary = cells.model.vocabulary
    chosen = ~vocabulary.is_special
    if genes is not None:
        genes = [genes] if isinstance(genes, str) else list(genes)
        if any(isinstance(gene, tuple) for gene in genes):
            msg = "A screen deletes genes one at a time; for genes together, call `gfx.tl.delete_genes(adata, genes)`."
            raise ValueError(msg)
        tokens = find_gene_sets(genes, vocabulary, np.zeros(0, np.int64)).tokens
        chosen = np.isin(np.arange(len(vocabulary)), np.concatenate(tokens))
    ids = cells.tokens.ids
    some = np.zeros(len(lengths), dtype=bool)
    for rows in pieces(np.flatnonzero(lengths > 0)):
        some[rows] = wanted_places(ids[rows], lengths[rows], chosen, vocabulary).any(axis=1)
    if not some.any():
        msg = "No cell that is screened has any of the genes and another one beside it."
        raise ValueError(msg)
    jobs = {MODEL: job}
    if null is not None:
        jobs[RANDOM] = job.by_random_weights(_seed(rng, _TWIN), None)
    return Plan(
        number=np.flatnonzero(some),
        lengths=lengths[some],
        ids=ids,
        genes=chosen,
        jobs=jobs,
        measures=["shift"] if states is None else ["shift", "toward"],
        group=group[some],
        n_groups=n_groups,
    )


def _goals(
    plan: Plan, cells: Prepared, states: States | None, rng: int
) -> tuple[dict[str, np.ndarray], dict[str, object] | None]:
    """Find the mean cell of the goal in each network, and whether start and goal can be told apart in the model."""
    from gfx._engine.pooling import embed_cells

    if states is None:
        return {}, None
    lengths = np.where(states.is_start | states.is_goal, cells.tokens.lengths, 0)
    goals, axis = {}, None
    for name, job in plan.jobs.items():
        how = "cls" if job.how == "cls" else "mean"
        vectors = embed_cells(job.encoder(), cells.tokens.ids, lengths, plan.vocabulary, how=how)
        there = states.is_goal & ~np.isnan(vectors[:, 0])
        if not there.any():
            msg = f"No cell of the state {states.goal!r} has a gene that the model knows."
            raise ValueError(msg)
        goals[name] = vectors[there].mean(axis=0, dtype=np.float64)[None]
        if name == MODEL:
            axis = states.axis(vectors, None, np.random.default_rng(_seed(rng, _AXIS)))
    return goals, axis


def _open_store(
    store: str | Path,
    plan: Plan,
    cells: Prepared,
    *,
    states: States | None,
    goals: Mapping[str, np.ndarray],
    noted: Mapping[str, object],
) -> ScreenStore:
    from gfx._engine.device import choose_device
    from gfx.tl._screen_store import ScreenStore

    ids, obs_names = cells.tokens.ids, cells.adata.obs_names[plan.number].to_numpy(dtype=object)
    # Effects in cells are the same whatever groups they are summed up in.
    effects = {name: value for name, value in noted.items() if name != "groupby" or states is not None}
    manifest = record(_FUNCTION, **cells.model.provenance(), **effects) | {
        "torch_version": version("torch"),
        "device": choose_device(None).type,
        "batch_tokens": plan.jobs[MODEL].batch_tokens,
        "dtype": plan.jobs[MODEL].dtype,
        "cells_per_block": plan.cells_per_block,
        "cells": fingerprint(obs_names, plan.lengths, (ids[rows] for rows in pieces(plan.number))),
        "genes": fingerprint(plan.genes),
        "states": None,
    }
    if states is not None:
        goal = pieces(np.flatnonzero(states.is_goal))
        names = np.array(states.names, dtype=object)
        manifest["states"] = fingerprint(states.group, names, (ids[rows] for rows in goal))
    return ScreenStore.open(
        store,
        manifest,
        names=list(plan.jobs),
        ids=ids,
        number=plan.number,
        obs_names=obs_names,
        gene_ids=plan.vocabulary.ids,
        goals=goals,
        cells_per_block=plan.cells_per_block,
    )


# --- out -----------------------------------------------------------------------------------------------------------


def _add_baselines(table: pd.DataFrame, cells: Prepared, lengths: np.ndarray, states: States | None) -> None:
    wanted = np.flatnonzero(table["n_cells"] > 0)
    known = find_baselines(cells, lengths, states, wanted)
    table["detection"], table["expression_mean"] = known.detection, known.expression
    if states is not None:
        table["logfc"] = known.logfc


def _add_exact(table: pd.DataFrame, plan: Plan, exact: GeneSums | None) -> None:
    if exact is None:
        return
    table["exact_n_cells"] = exact.n("shift")[:, 0]
    for measure in plan.measures:
        table[f"exact_{measure}_mean"] = exact.mean(measure)[:, 0]


def _note(null: str | None) -> str:
    told = "z is the distance from genes of like rank and number of cells in this screen"
    if null is None:
        return f"{told}; nothing else was run to compare with: no p-value is given."
    return f"{told}; p and fdr say how often such a z comes from a network with random weights in the same cells."


def _warn(states: States | None, axis: dict[str, object] | None, controls: pd.DataFrame) -> None:
    if states is not None and (doubt := states.doubt(axis)):
        warnings.warn(doubt, UserWarning, stacklevel=3)
    exact = controls[(controls["control"] == "exact") & (controls["statistic"] == "spearman")]
    # Shifts of single cells are rough by design; movements are not.
    for value in exact.loc[exact["measure"] == "toward", "value"]:
        if value < LOWEST_AGREEMENT:
            warnings.warn(
                f"Estimates of movements towards the goal agree with exact results only at Spearman {value:.2f} "
                "within cells. Use `method='exact'`.",
                UserWarning,
                stacklevel=3,
            )


def _write(
    cells: Prepared,
    keys: ScreenKeys,
    plan: Plan,
    found: Found,
    *,
    table: pd.DataFrame,
    names: list[str],
    uns: dict[str, Any],
) -> None:
    adata = cells.adata
    varm = {keys.varm: _of_genes(table, cells), keys.varm_groups: None}
    if names:
        tables = [gene_columns(plan, found.groups, at) for at in range(len(names))]
        uns |= {"groups": np.array(names, dtype=object), "columns": np.array(tables[0].columns, dtype=object)}
        arrays = [_of_genes(one, cells).to_numpy(dtype=np.float32) for one in tables]
        varm[keys.varm_groups] = np.stack(arrays, axis=1)
    measures = {keys.layer: "shift", keys.layer_toward: "toward"}
    layers = {
        key: _by_var(found.layers[name], cells) if name in found.layers else None for key, name in measures.items()
    }
    # All is made; only now something is written.
    for held, slots in ((adata.varm, varm), (adata.layers, layers)):
        put(held, slots, is_ours=keys.uns in adata.uns)
    adata.uns[keys.uns] = uns


def _of_genes(table: pd.DataFrame, cells: Prepared) -> pd.DataFrame:
    """One row a gene of the AnnData, from one row a token."""
    values = {}
    for name, column in table.items():
        if column.dtype.kind == "i":
            values[name] = cells.cells_per_gene(column.to_numpy())
        else:
            values[name] = cells.per_gene(column.to_numpy())
    return pd.DataFrame(values, index=cells.adata.var_names)


def _by_var(values: Any, cells: Prepared) -> Any:
    """Turn columns of tokens into those of the AnnData; of several columns with one gene, the first has it."""
    from scipy import sparse

    tokens, first = np.unique(cells.gene_tokens, return_index=True)
    known = tokens >= 0
    move = sparse.csr_array(
        (np.ones(known.sum(), np.float32), (tokens[known], first[known])),
        shape=(values.shape[1], cells.adata.n_vars),
    )
    found = sparse.csr_matrix(values @ move)
    found.sort_indices()
    return found


def _tell(cells: Prepared, keys: ScreenKeys, plan: Plan, table: pd.DataFrame, controls: pd.DataFrame) -> None:
    n_genes = int(table["n_cells"].sum())
    spearman = controls[controls["statistic"] == "spearman"].set_index(["control", "measure"])["value"]
    told = [
        f"{text} {spearman[control, measure]:+.2f} ({measure})"
        for control, text in ((RANDOM, "with a network of random weights"), ("rank", "with the rank"))
        for measure in plan.measures_of(MODEL)
        if (control, measure) in spearman
    ]
    _log.info(
        f"{n_genes:,} deletions in {len(plan.number):,} cells with {cells.model.name!r}: added {keys.varm!r} "
        f"(adata.varm, adata.uns). Spearman of genes: {', '.join(told)}. Read `gfx.get.screen_df`, "
        "`gfx.get.screen_controls_df`."
    )
