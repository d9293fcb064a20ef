"""What the functions that perturb genes share: understand the call, run it with its controls, warn, and write."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gfx._adata import shortened
from gfx._core.arguments import check_choice, check_seed, check_whole
from gfx._core.batching import pieces
from gfx._core.manifest import fingerprint
from gfx._core.statistics import moments
from gfx.tl._baselines import CONTROL_COLUMNS, baselines_of_sets, compare_with_baselines, find_baselines
from gfx.tl._gene_sets import find_gene_sets
from gfx.tl._prepare import check_controls, donors, open_store, prepare
from gfx.tl._states import find_states
from gfx.tl.perturbation import _controls, _tables
from gfx.tl.perturbation._controls import AXIS, RANDOM_WEIGHTS, stream
from gfx.tl.perturbation._experiment import Experiment, Runs, embed_states
from gfx.tl.perturbation._shift import check_change, rank_finder

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    from gfx._engine.run import Job
    from gfx._run_store import RunStore
    from gfx._types import Data, ModelLike, PoolingOfShifts, Positions
    from gfx.tl._gene_sets import Genes, GeneSets
    from gfx.tl._prepare import Prepared
    from gfx.tl._states import States

#: Controls that run unless others are asked for, and all there are.
CONTROLS = ("parts", "random_sets", "random_weights", "baselines")
ALL_CONTROLS = (*CONTROLS, "centroids")

#: A gene's shift under random sets is known from as many runs, or not at all.
FEWEST_RUNS = 5

#: Bytes of a result from which on a call says so.
LARGE_RESULT = 2e9


def perturb(
    operator: str,
    adata: Data,
    genes: Genes,
    *,
    model: ModelLike,
    layer: str | None,
    groupby: str | None,
    start: str | None,
    goal: str | None,
    controls: Iterable[str] | None,
    n_random: int | None,
    donor_key: str | None,
    hidden_layer: int,
    pooling: PoolingOfShifts,
    store: str | Path | None,
    rng: int,
    key_added: str | None,
    mod: str | None,
    copy: bool,
    positions: Positions = "close",
    by: tuple[str, float] | None = None,
) -> Data | None:
    """Do what :func:`gfx.tl.delete_genes` and its sisters say, which pass all of their arguments; it warns for them."""
    function = f"tl.{operator}_genes"
    change = check_change(by) if operator == "shift" else None
    check_choice(positions, "positions", ("close", "keep"))
    controls = check_controls(controls, ALL_CONTROLS)
    seed = check_seed(rng)
    n_random = None if n_random is None else check_whole(n_random, "n_random", 3)
    if "centroids" in controls and goal is None:
        msg = '`controls="centroids"` recomputes the centroids of states: give `groupby`, `start` and `goal`.'
        raise ValueError(msg)
    cells = prepare(adata, model, function=function, layer=layer, mod=mod, copy=copy, key_added=key_added)
    states = find_states(cells, groupby, start, goal)
    donor = None if donor_key is None else donors(cells.adata, donor_key)
    lengths = cells.tokens.lengths if states is None else np.where(states.is_start, cells.tokens.lengths, 0)
    sets = _find_sets(genes, cells, lengths)
    _say_size(cells.adata.n_obs, len(sets), 0 if states is None else len(states.names), has_parts="parts" in controls)
    experiment = Experiment(
        cells=cells,
        network=cells.network(hidden_layer, "float32"),
        operator=operator,
        positions=positions,
        pooling=cells.comparison(pooling),
        lengths=lengths,
        new_ranks=None if change is None else rank_finder(cells, *change),
    )
    params = {
        **cells.provenance(experiment.network),
        "hidden_layer": hidden_layer,
        "pooling": experiment.pooling,
        "positions": positions,
        "groupby": groupby,
        "start": None if states is None else states.start,
        "goal": None if states is None else states.goal,
        "controls": list(controls),
        "n_random": n_random if "random_sets" in controls else None,
        "donor_key": donor_key,
        "rng": seed,
    }
    if change is not None:
        params["by"] = list(map(str, change))
    if store is not None:
        # Tables are made anew: which donor a cell is of, and whether baselines are compared, changes no run.
        of_runs = {name: value for name, value in params.items() if name != "donor_key"}
        of_runs["controls"] = [name for name in controls if name != "baselines"]
        of_runs["genes"] = fingerprint(*sets.tokens)
        of_runs["perturbed_cells"] = fingerprint(lengths)
        of_runs["states"] = None if states is None else fingerprint(states.group, np.array(states.names, dtype=object))
        store = open_store(store, function, cells, of_runs)
    runs, axis = _run(experiment, sets, states, controls, n_random=n_random, donor=donor, seed=seed, store=store)
    uns = _make_tables(experiment, sets, states, runs, axis, baselines="baselines" in controls, donor=donor, seed=seed)
    _warn(experiment, sets, uns["table"], states, axis)
    _write(cells, runs, uns, params, n_states=0 if states is None else len(states.names))
    return cells.result


def _find_sets(genes: Genes, cells: Prepared, lengths: np.ndarray) -> GeneSets:
    """Find the sets of genes; one that leaves no other gene in what the model reads is refused."""
    vocabulary = cells.model.vocabulary
    is_detected = np.zeros(len(vocabulary), dtype=bool)
    for rows in pieces(np.flatnonzero(lengths > 0)):
        is_detected[cells.tokens.padded(rows)] = True
    sets = find_gene_sets(genes, vocabulary, np.flatnonzero(is_detected & ~vocabulary.is_special))
    room, largest = cells.model.max_length - vocabulary.n_specials, max(map(len, sets.tokens))
    if largest >= room:
        msg = f"A set of {largest} genes leaves no other to compare: {cells.model.name!r} reads {room} genes a cell."
        raise ValueError(msg)
    return sets


def _say_size(n_obs: int, n_sets: int, n_states: int, *, has_parts: bool) -> None:
    """Warn of a result that may not fit into memory, before anything runs: a number for each cell, set and effect."""
    size = 4 * n_obs * n_sets * (1 + 3 * has_parts + n_states)
    if size >= LARGE_RESULT:
        warnings.warn(
            f"{n_sets:,} perturbations of {n_obs:,} cells are stored by cell and take {size / 1e9:.0f} GB of memory. "
            "`gfx.tl.screen_genes` deletes every gene and keeps means over cells; or give fewer genes or cells.",
            UserWarning,
            stacklevel=4,
        )


# --- runs ----------------------------------------------------------------------------------------------------------


def _run(
    experiment: Experiment,
    sets: GeneSets,
    states: States | None,
    controls: Collection[str],
    *,
    n_random: int | None,
    donor: np.ndarray | None,
    seed: int,
    store: RunStore | None,
) -> tuple[dict[str, Runs], dict[str, Any] | None]:
    """Run perturbations and their controls: runs by their role, and whether the states are separable."""
    from gfx._engine.run import networks, run

    sets_of, cells_of = sets.tokens, [experiment.where(genes) for genes in sets.tokens]
    networks_of = {"model": experiment.network}
    runs = {"perturbations": experiment.runs(sets_of, cells_of, np.arange(len(sets)), len(sets))}
    if "random_sets" in controls:
        runs["random_sets"] = _controls.random_set_runs(experiment, sets_of, cells_of, n_sets=n_random, seed=seed)
    if "random_weights" in controls:
        weights = int(stream(seed, RANDOM_WEIGHTS).integers(2**31))
        networks_of["random_weights"] = experiment.network.randomized(weights)
        runs["model"], runs["random_weights"] = _controls.random_weights_runs(experiment, sets_of, cells_of, seed)

    def make_jobs(goals: Mapping[str, np.ndarray]) -> list[Job]:
        return [
            experiment.job(
                name,
                table,
                network=networks_of.get(name),
                goals=goals.get(name, goals.get("model")),
                together=table.perturbation is not None,
                split=name == "perturbations" and "parts" in controls,
            )
            for name, table in runs.items()
        ]

    with networks(store):
        n_embedded = 0 if states is None else int((states.group >= 0).sum()) * len(networks_of)
        if "centroids" in controls:
            n_embedded += n_embedded // len(networks_of) * len(sets)
        jobs, goals, axis = make_jobs({}), {}, None
        experiment.cells.announce(jobs, experiment.network, store, n_embedded)
        if states is not None:
            vectors = embed_states(experiment.cells, networks_of, experiment.pooling, states.group >= 0, store)
            goals = {name: states.centroids(of_network) for name, of_network in vectors.items()}
            axis = states.axis(vectors["model"], donor, stream(seed, AXIS))
            if "centroids" in controls:
                goals["perturbations"] = _centroids_without_genes(experiment, states, sets, vectors["model"], store)
            jobs = make_jobs(goals)
        for job, cells, result in run(jobs, description="perturbing", store=store):
            runs[job.name].add(cells, result)
    return runs, axis


def _centroids_without_genes(
    experiment: Experiment, states: States, sets: GeneSets, vectors: np.ndarray, store: RunStore | None
) -> np.ndarray:
    """Find the means of states, and after them those of cells without each set, `(n_sets, 2 n_states, d)`."""
    from gfx._engine.run import run

    tokens, vocabulary = experiment.cells.tokens, experiment.cells.model.vocabulary
    in_a_state = np.where(states.group >= 0, tokens.lengths, 0)
    rows_of = []
    for genes in sets.tokens:  # cells that have some genes of a set lose these
        n_present = (tokens.places(genes) >= 0).sum(axis=1)
        rows_of.append(np.flatnonzero((n_present > 0) & (in_a_state - vocabulary.n_specials > n_present)))
    runs = experiment.runs(sets.tokens, rows_of)
    deletion = replace(experiment, operator="delete", new_ranks=None)
    job = deletion.job("centroids", runs, keep_vectors=True)
    for _, cells, result in run([job], description="embedding states without genes", store=store):
        runs.add(cells, result)
    whole, goals = states.centroids(vectors), []
    for number in range(len(sets)):
        without = vectors.copy()
        own = runs.which == number
        if own.any():
            without[runs.cell[own]] = runs["vectors"][own]
        goals.append(np.concatenate([whole, states.centroids(without)]))
    return np.stack(goals)


# --- results -------------------------------------------------------------------------------------------------------


def _make_tables(
    experiment: Experiment,
    sets: GeneSets,
    states: States | None,
    runs: Mapping[str, Runs],
    axis: dict[str, Any] | None,
    *,
    baselines: bool,
    donor: np.ndarray | None,
    seed: int,
) -> dict[str, Any]:
    """Make the tables of a call, by their name in `uns`."""
    cells, names = experiment.cells, np.array(sets.names, dtype=object)
    perturbed, random = runs["perturbations"], runs.get("random_sets")
    uns: dict[str, Any] = {
        "perturbations": names,
        "ensembl_ids": np.array(sets.ensembl_ids, dtype=object),
        "note": _note(None if donor is None else donor[experiment.lengths > 0], has_random_sets=random is not None),
    }
    rows, random_genes, random_weights = [], [], np.nan
    if "model" in runs:
        random_genes, weights = runs["model"].sets, runs["random_weights"]
        goal = None if states is None else states.names.index(states.goal)
        rows, uns["genes_of_all_ranks"] = _controls.compare_networks(perturbed, runs["model"], weights, goal)
        random_weights = weights.mean(weights["shift"])[len(random_genes) :]
    known = of_sets = None
    if baselines:
        wanted = np.unique(np.concatenate([*sets.tokens, *random_genes]))
        known = find_baselines(cells, experiment.lengths, states, wanted)
        of_sets = baselines_of_sets(known, sets.tokens)
    if random is not None:
        uns["random_sets"] = _tables.random_set_table(random, perturbed, names, cells.model.vocabulary)
    uns["table"] = _tables.effect_table(names, perturbed, random, random_weights, of_sets)
    if states is not None:
        if random is not None:
            uns["random_states"] = _tables.random_state_table(uns["random_sets"], random, perturbed, states)
        uns["states"] = np.array(states.names, dtype=object)
        uns["state_table"] = _tables.state_table(names, states, perturbed, random)
    if known is not None:
        effects, compared = uns.get("genes_of_all_ranks"), random_genes
        if effects is None:
            effects, compared = _effects_of_single_genes(sets, uns)
        effects = {measure: effects[measure].to_numpy() for measure in ("shift", "toward") if measure in effects}
        present = {row[:3] for row in rows}  # the rank in the perturbed cell says more than the mean rank of the gene
        compared_rows = compare_with_baselines(effects, baselines_of_sets(known, compared))
        rows += [row for row in compared_rows if row[:3] not in present]
    if states is not None:
        rows.append(("state_axis", "toward", "auc", axis["auc"], axis["n_folds"]))
    uns["controls"] = pd.DataFrame(rows, columns=list(CONTROL_COLUMNS))
    if donor is not None:
        uns |= _tables.donor_tables(names, states, perturbed, random, donor)
    if "together" in perturbed.effects:
        uns["synergy"], differences = _tables.synergy_table(names, perturbed, random, donor=donor, seed=seed)
        if random is not None:
            uns["random_sets"] = uns["random_sets"].assign(**differences)
    return uns


def _effects_of_single_genes(sets: GeneSets, uns: Mapping[str, Any]) -> tuple[pd.DataFrame, list[np.ndarray]]:
    """Mean effects of the perturbed single genes on the shift and toward the goal, and their tokens."""
    single = [number for number, genes in enumerate(sets.tokens) if len(genes) == 1]
    effects = pd.DataFrame({"shift": uns["table"]["shift_mean"]})
    if "state_table" in uns:
        effects["toward"] = uns["state_table"].query("role == 'goal'")["toward_mean"].to_numpy()
    return effects.iloc[single], [sets.tokens[number] for number in single]


def _note(donor: np.ndarray | None, *, has_random_sets: bool) -> str:
    """Say what p-values there are, and over what."""
    if not has_random_sets:
        return "Cells are not replicates, and no random sets were run to compare with: there are no p-values."
    note = "Cells are not replicates: p and fdr compare with rank-matched random gene sets"
    if donor is None:
        return f"{note}; name the donors with `donor_key=` for tests over donors as well."
    n = len(set(donor))
    return f"{note}, donor_p also over {n} donor{'s' * (n > 1)}."


def _warn(
    experiment: Experiment, sets: GeneSets, table: pd.DataFrame, states: States | None, axis: dict[str, Any] | None
) -> None:
    absent = np.flatnonzero(table["n_cells"] == 0)
    if absent.size:
        cells, lengths = experiment.cells, experiment.lengths
        tokens = np.unique(np.concatenate([sets.tokens[number] for number in absent]))
        detected = tokens[cells.are_cut(tokens, lengths)]
        cut = [number for number in absent if np.isin(sets.tokens[number], detected).all()]
        where = "" if states is None else f" of the state {states.start!r}"
        shown = shortened([sets.names[number] for number in absent])
        warning = f"No cell{where} has the genes of {shown}, together with another gene; these effects are NaN."
        if cut:
            warning += f" Of {shortened([sets.names[number] for number in cut])}: {cells.behind}"
        warnings.warn(warning, UserWarning, stacklevel=4)
    if states is not None and (warning := states.warning(axis)):
        warnings.warn(warning, UserWarning, stacklevel=4)


def _write(
    cells: Prepared, runs: Mapping[str, Runs], uns: dict[str, Any], params: Mapping[str, object], *, n_states: int
) -> None:
    perturbed, table, n_obs = runs["perturbations"], uns["table"], cells.adata.n_obs
    n, mean, sd = moments(perturbed.gene_sums)
    random = None
    if "random_sets" in runs:
        n_random, random_mean, _ = moments(runs["random_sets"].gene_sums)
        random = cells.per_gene(np.where(n_random >= FEWEST_RUNS, random_mean, np.nan))
    cells.slots.write(
        f"{len(table)} perturbation{'s' * (len(table) > 1)} in up to {int(table['n_cells'].max()):,} cells with "
        f"{cells.model.name!r}",
        params=params,
        uns=uns,
        hint=_hint(uns["controls"]),
        obsm={
            "": perturbed.by_cell(perturbed["shift"], n_obs),
            "parts": perturbed.by_cell(perturbed["parts"], n_obs) if "parts" in perturbed.effects else None,
            "states": perturbed.by_cell(perturbed["toward"][:, :n_states], n_obs) if n_states else None,
        },
        varm={
            "": cells.per_gene(mean),
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
    return f"Spearman with random weights: {correlation.iloc[0]:+.2f}. {read}"
