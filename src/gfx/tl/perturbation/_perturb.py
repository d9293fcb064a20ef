"""What the functions that perturb genes share: understand the call, run it, warn, and write."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from gfx._adata import obs_column
from gfx._core.manifest import fingerprint
from gfx._core.seeds import check_seed, check_whole
from gfx.tl._gene_sets import find_gene_sets
from gfx.tl._prepare import check_choice, check_controls, open_store, prepare
from gfx.tl._states import find_states
from gfx.tl.perturbation._experiment import Experiment
from gfx.tl.perturbation._run import run_perturbations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

    from gfx._core.edits import Operator, Positions
    from gfx._run_store import RunStore
    from gfx.models import Model
    from gfx.tl._gene_sets import Genes, GeneSets
    from gfx.tl._prepare import Pooling, Prepared
    from gfx.tl._states import States
    from gfx.tl.perturbation._run import Results

    #: Finds where moved genes go, from the cell of each run and its genes.
    NewRanks = Callable[[np.ndarray, np.ndarray], np.ndarray]

#: Controls that run unless others are asked for, and all there are.
CONTROLS = ("random_sets", "random_weights", "baselines")
ALL_CONTROLS = (*CONTROLS, "centroids")

#: A gene's shift under random sets is known from as many runs, or not at all.
FEWEST_RUNS = 5


def perturb(
    adata: AnnData | MuData,
    genes: Genes,
    *,
    function: str,
    operator: Operator,
    positions: Positions,
    model: str | Path | Model | None,
    layer: str | None,
    groupby: str | None,
    start: str | None,
    goal: str | None,
    controls: Iterable[str] | None,
    n_random: int,
    donor_key: str | None,
    hidden_layer: int,
    pooling: Pooling,
    store: str | Path | None,
    rng: int,
    key_added: str | None,
    mod: str | None,
    copy: bool,
    new_ranks: Callable[[Prepared], NewRanks] | None = None,
    **params: object,
) -> AnnData | MuData | None:
    """Do what :func:`gfx.tl.delete_genes` and its sisters say; called by these alone, for whom it warns.

    Parameters
    ----------
    new_ranks
        Makes, of the prepared cells, the function that finds where moved genes go.
    params
        What else belongs into the record.
    """
    check_choice("positions", positions, ("close", "keep"))
    controls = check_controls(controls, ALL_CONTROLS)
    seed = check_seed(rng)
    n_random = check_whole(n_random, "n_random", 3)
    if "centroids" in controls and goal is None:
        msg = '`controls="centroids"` recomputes the centroids of states: give `groupby`, `start` and `goal`.'
        raise ValueError(msg)
    cells = prepare(adata, model, function=function, layer=layer, mod=mod, copy=copy, key_added=key_added)
    states = find_states(cells, groupby, start, goal)
    donor = None if donor_key is None else _donors(cells, donor_key)
    lengths = cells.tokens.lengths if states is None else np.where(states.is_start, cells.tokens.lengths, 0)
    sets = find_gene_sets(genes, cells.model.vocabulary, _detected(cells, lengths))
    _check_room(sets, cells)
    experiment = Experiment(
        cells=cells,
        network=cells.network(hidden_layer, "float32"),
        operator=operator,
        positions=positions,
        pooling=cells.comparison(pooling),
        lengths=lengths,
        new_ranks=None if new_ranks is None else new_ranks(cells),
    )
    params = {
        **cells.provenance(experiment.network),
        "hidden_layer": hidden_layer,
        "pooling": experiment.pooling,
        "positions": positions,
        "groupby": groupby,
        "start": start,
        "goal": goal,
        "controls": list(controls),
        "n_random": n_random if "random_sets" in controls else None,
        "donor_key": donor_key,
        "rng": seed,
        **params,
    }
    results = run_perturbations(
        experiment,
        sets,
        states,
        controls=controls,
        n_random=n_random,
        donor=donor,
        seed=seed,
        store=None
        if store is None
        else _open_store(store, function, experiment, sets=sets, states=states, params=params),
    )
    _warn(results, states)
    _write(cells, results, params)
    return cells.result


# --- what is asked for ---------------------------------------------------------------------------------------------


def _donors(cells: Prepared, donor_key: str) -> np.ndarray:
    """Read the donor of each cell, as text; every cell has one."""
    column = obs_column(cells.adata, donor_key)
    if column.isna().any():
        msg = f"`adata.obs[{donor_key!r}]` names no donor for {int(column.isna().sum()):,} cells. Leave these out."
        raise ValueError(msg)
    return column.astype(str).to_numpy(dtype=object)


def _check_room(sets: GeneSets, cells: Prepared) -> None:
    """Refuse sets that leave no other gene in what the model reads."""
    room = cells.model.max_length - cells.model.vocabulary.n_specials
    largest = max(sets.tokens, key=len)
    if len(largest) >= room:
        msg = (
            f"A set of {len(largest)} genes leaves no other to compare: {cells.model.name!r} reads {room} genes a cell."
        )
        raise ValueError(msg)


def _detected(cells: Prepared, lengths: np.ndarray) -> np.ndarray:
    vocabulary = cells.model.vocabulary
    return np.setdiff1d(cells.tokens.ids[lengths > 0], np.flatnonzero(vocabulary.is_special)).astype(np.int64)


def _open_store(
    store: str | Path,
    function: str,
    experiment: Experiment,
    *,
    sets: GeneSets,
    states: States | None,
    params: Mapping[str, object],
) -> RunStore:
    # Tables are made anew: which donor a cell is of, and whether baselines are compared, changes no run.
    of_runs = {name: value for name, value in params.items() if name != "donor_key"}
    of_runs["controls"] = [name for name in params["controls"] if name != "baselines"]
    of_runs["genes"] = fingerprint(*sets.tokens)
    of_runs["perturbed_cells"] = fingerprint(experiment.lengths)
    of_runs["states"] = None if states is None else fingerprint(states.group, np.array(states.names, dtype=object))
    return open_store(store, function, experiment.cells, of_runs)


# --- out -----------------------------------------------------------------------------------------------------------


def _warn(results: Results, states: States | None) -> None:
    table = results.uns["table"]
    absent = table.loc[table["n_cells"] == 0, "perturbation"].tolist()
    warned = []
    if absent:
        where = "" if states is None else f" of the state {states.start!r}"
        shown = absent[:10] + ["..."] * (len(absent) > 10)
        warned.append(f"No cell{where} has the genes of {shown} and others beside them; their effects are NaN.")
    if states is not None and (warning := states.warning(results.axis)):
        warned.append(warning)
    for warning in warned:
        warnings.warn(warning, UserWarning, stacklevel=4)


def _write(cells: Prepared, results: Results, params: Mapping[str, object]) -> None:
    n, means, sd = results.genes
    random = None
    if results.random_genes is not None:
        n_random, random_means, _ = results.random_genes
        random = cells.per_gene(np.where(n_random >= FEWEST_RUNS, random_means, np.nan))
    effects, table = results.effects, results.uns["table"]
    cells.slots.write(
        f"{len(table)} perturbation{'s' * (len(table) > 1)} in up to {int(table['n_cells'].max()):,} cells with "
        f"{cells.model.name!r}",
        params=params,
        uns=results.uns,
        hint=_hint(results.uns["controls"]),
        obsm={
            "": effects.shift,
            "parts": effects.parts,
            "states": effects.toward if effects.toward.shape[2] else None,
        },
        varm={
            "": cells.per_gene(means),
            "sd": cells.per_gene(sd),
            "n_cells": cells.cells_per_gene(n),
            "null": random,
        },
    )


def _hint(controls: pd.DataFrame) -> str:
    """Say at once how far the ranking is that of random weights."""
    row = controls[(controls["control"] == "random_weights") & (controls["statistic"] == "spearman")]
    correlation = row.loc[row["measure"] == "shift", "value"]
    read = "Read `gfx.get.controls_df`, then `gfx.get.deletion_df`."
    if correlation.isna().all():
        return read
    return f"Shifts of random genes correlate {correlation.iloc[0]:+.2f} (Spearman) with random weights. {read}"
