"""One call: perturbations, their controls, and the tables of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gfx._core.edits import find_places
from gfx._core.statistics import moments
from gfx.tl._baselines import CONTROL_COLUMNS, compare_with_baselines, find_baselines
from gfx.tl._prepare import vectors_of
from gfx.tl.perturbation._controls import (
    AXIS,
    RandomWeightsControl,
    draw_random_sets,
    random_set_table,
    random_state_table,
    random_weights_control,
    stream,
)
from gfx.tl.perturbation._experiment import Experiment
from gfx.tl.perturbation._synergy import synergy_table
from gfx.tl.perturbation._tables import CellEffects, donor_tables, effect_table, places_among, state_table

if TYPE_CHECKING:
    from collections.abc import Collection

    from gfx._core.vocabulary import Vocabulary
    from gfx._run_store import RunStore
    from gfx.tl._baselines import Baselines
    from gfx.tl._gene_sets import GeneSets
    from gfx.tl._states import States
    from gfx.tl.perturbation._controls import RandomSets
    from gfx.tl.perturbation._experiment import Runs


@dataclass(frozen=True)
class Results:
    """All that a call writes: effects on cells, moments of the shifts of genes (see :func:`_moments`), and tables.

    Beside it, whether the states are separable.
    """

    effects: CellEffects
    genes: tuple[np.ndarray, ...]
    random_genes: tuple[np.ndarray, ...] | None
    uns: dict[str, Any]
    axis: dict[str, Any] | None


def run_perturbations(
    experiment: Experiment,
    sets: GeneSets,
    states: States | None,
    *,
    controls: Collection[str],
    n_random: int,
    donor: np.ndarray | None,
    seed: int,
    store: RunStore | None,
) -> Results:
    """Run perturbations and their controls.

    Parameters
    ----------
    controls
        Names of the controls to run.
    donor
        Donor of each cell, `(n_obs,)`.
    """
    from gfx._engine.run import networks, run

    vocabulary = experiment.cells.model.vocabulary
    cells_of = [experiment.where(genes) for genes in sets.tokens]
    weights = random_weights_control(experiment, sets.tokens, cells_of, seed) if "random_weights" in controls else None
    with networks():
        goals = _Goals()
        if states is not None:
            goals = _goals(experiment, states, sets, controls, weights, donor=donor, seed=seed, store=store)
        perturbed = experiment.runs(sets.tokens, cells_of, group=True)
        tables = {"perturbations": perturbed}
        jobs = [experiment.job("perturbations", perturbed, goals=goals.of_sets, together=True, split=True)]
        random = None
        if "random_sets" in controls:
            random = draw_random_sets(experiment, sets.tokens, cells_of, n_sets=n_random, seed=seed)
            tables["random_sets"] = random.runs
            jobs.append(experiment.job("random_sets", random.runs, goals=goals.whole, together=True))
        if weights is not None:
            tables |= {"model": weights.model, "random_weights": weights.random}
            jobs.append(experiment.job("model", weights.model, goals=goals.whole))
            jobs.append(
                experiment.job("random_weights", weights.random, network=weights.network, goals=goals.random_weights)
            )
        for job, cells, result in run(jobs, description="perturbing", store=store):
            tables[job.name].add(cells, result)

    n_states = 0 if states is None else len(states.names)
    effects = CellEffects.of(perturbed, experiment.cells.adata.n_obs, len(sets), n_states)
    uns: dict[str, Any] = {
        "perturbations": np.array(sets.names, dtype=object),
        "ensembl_ids": np.array(sets.ensembl_ids, dtype=object),
        "note": _note(None if donor is None else donor[experiment.lengths > 0], has_random_sets=random is not None),
    }
    rows = []
    if weights is not None:
        rows, uns["genes_of_all_ranks"] = weights.compare(states)
    baselines = None
    if "baselines" in controls:
        wanted = [*sets.tokens, *([] if weights is None else [weights.genes])]
        baselines = find_baselines(experiment.cells, experiment.lengths, states, np.unique(np.concatenate(wanted)))
    uns |= _tables(
        sets, states, effects, perturbed, baselines=baselines, random=random, weights=weights, vocabulary=vocabulary
    )
    if baselines is not None:
        known = {row[:3] for row in rows}  # the rank in the perturbed cell says more than the mean rank of the gene
        rows += [row for row in _baseline_rows(sets, states, uns, baselines, weights) if row[:3] not in known]
    if states is not None:
        rows.append(("state_axis", "toward", "auc", goals.axis["auc"], goals.axis["n_folds"]))
    uns["controls"] = pd.DataFrame(rows, columns=list(CONTROL_COLUMNS))
    if donor is not None:
        uns |= donor_tables(sets.names, states, effects, donor, random)
    if "together" in perturbed.effects:
        uns["synergy"], differences = synergy_table(sets, perturbed, random, donor=donor, seed=seed)
        if random is not None:
            uns["random_sets"] = uns["random_sets"].assign(**differences)
    random_genes = None if random is None else _moments(random.runs.gene_sums)
    return Results(effects, _moments(perturbed.gene_sums), random_genes, uns, goals.axis)


@dataclass(frozen=True)
class _Goals:
    """Vectors of the states, `(n_states, d)`.

    Parameters
    ----------
    whole, random_weights
        Means of the cells as they are, in the model and in the random-weights model.
    of_sets
        Those that perturbations are compared with: the former, or with the control "centroids" for each set
        `(n_sets, 2 n_states, d)`: behind them the means of cells without the genes of the set.
    axis
        Whether start and goal are separable.
    """

    whole: np.ndarray | None = None
    random_weights: np.ndarray | None = None
    of_sets: np.ndarray | None = None
    axis: dict[str, Any] | None = None


def _goals(
    experiment: Experiment,
    states: States,
    sets: GeneSets,
    controls: Collection[str],
    weights: RandomWeightsControl | None,
    *,
    donor: np.ndarray | None,
    seed: int,
    store: RunStore | None,
) -> _Goals:
    from gfx._engine.run import run

    jobs = [experiment.embedding("states", states)]
    if weights is not None:
        jobs.append(experiment.embedding("states_random_weights", states, weights.network))
    vectors = vectors_of(run(jobs, description="embedding states", store=store), experiment.cells.adata.n_obs)
    whole = of_sets = states.centroids(vectors["states"])
    if "centroids" in controls:
        of_sets = _centroids_without_genes(experiment, states, sets, vectors["states"], store=store)
    return _Goals(
        whole=whole,
        random_weights=None if weights is None else states.centroids(vectors["states_random_weights"]),
        of_sets=of_sets,
        axis=states.axis(vectors["states"], donor, stream(seed, AXIS)),
    )


def _centroids_without_genes(
    experiment: Experiment, states: States, sets: GeneSets, vectors: np.ndarray, *, store: RunStore | None
) -> np.ndarray:
    """Find the means of states, and behind them those of cells without each set, `(n_sets, 2 n_states, d)`."""
    from gfx._engine.run import run

    tokens, vocabulary = experiment.cells.tokens, experiment.cells.model.vocabulary
    in_a_state = np.where(states.group >= 0, tokens.lengths, 0)
    rows_of = []
    for genes in sets.tokens:  # cells that have some genes of a set lose these
        n_present = (find_places(tokens.ids, genes) >= 0).sum(axis=1)
        rows_of.append(np.flatnonzero((n_present > 0) & (in_a_state - vocabulary.n_specials > n_present)))
    deletion = Experiment(
        experiment.cells, experiment.network, "delete", experiment.positions, experiment.pooling, in_a_state
    )
    runs = deletion.runs(sets.tokens, rows_of)
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


def _tables(
    sets: GeneSets,
    states: States | None,
    effects: CellEffects,
    runs: Runs,
    *,
    baselines: Baselines | None,
    random: RandomSets | None,
    weights: RandomWeightsControl | None,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    """Lay out perturbations, states and random sets, a row each."""
    n, sizes = len(sets), [len(genes) for genes in sets.tokens]
    none = [np.zeros(0)] * n
    tables: dict[str, Any] = {}
    differences, n_cells = none, none
    if random is not None:
        tables["random_sets"] = random_set_table(random, effects.shift, sets.names, vocabulary)
        differences = random.of_each(n, tables["random_sets"]["difference"].to_numpy())
        n_cells = random.of_each(n, tables["random_sets"]["n_cells"].to_numpy())
    places = places_among(differences, sizes, n_cells)
    tables["table"] = effect_table(
        sets.names,
        effects,
        None if baselines is None else baselines.of(sets.tokens),
        np.full(n, np.nan) if weights is None else weights.shift_of_sets,
        places,
    )
    if states is None:
        return tables
    of_states = [none] * len(states.names)
    if random is not None:
        tables["random_states"] = random_state_table(random, effects.toward, states, tables["random_sets"])
        by_state = tables["random_states"]["toward_difference"].to_numpy().reshape(len(states.names), -1)
        of_states = [random.of_each(n, values) for values in by_state]
    tables["states"] = np.array(states.names, dtype=object)
    places = [places_among(values, sizes, n_cells) for values in of_states]
    tables["state_table"] = state_table(sets.names, states, effects, places, runs)
    return tables


def _baseline_rows(
    sets: GeneSets,
    states: States | None,
    uns: dict[str, Any],
    baselines: Baselines,
    weights: RandomWeightsControl | None,
) -> list[tuple[str, str, str, float, int]]:
    """Compare effects with the baselines: those of random genes of all ranks, else of the perturbed single genes."""
    if weights is not None:
        sample, genes = uns["genes_of_all_ranks"], list(weights.genes[:, None])
        effects = {measure: sample[measure].to_numpy() for measure in ("shift", "toward") if measure in sample}
        return compare_with_baselines(effects, baselines.of(genes))
    single = [number for number, genes in enumerate(sets.tokens) if len(genes) == 1]
    effects = {"shift": uns["table"]["shift_mean"].to_numpy()[single]}
    if states is not None:
        to_goal = uns["state_table"].loc[uns["state_table"]["role"] == "goal", "toward_mean"]
        effects["toward"] = to_goal.to_numpy()[single]
    return compare_with_baselines(effects, baselines.of([sets.tokens[number] for number in single]))


def _note(donor: np.ndarray | None, *, has_random_sets: bool) -> str:
    """Say what p-values there are, and over what."""
    if not has_random_sets:
        return "Cells are not replicates, and no random sets were run to compare with: there are no p-values."
    note = "Cells are not replicates: p and fdr compare with rank-matched random gene sets"
    if donor is None:
        return f"{note}; name the donors with `donor_key=` for tests over donors as well."
    n = len(set(donor))
    return f"{note}, donor_p also over {n} donor{'s' * (n > 1)}."


def _moments(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn sum, sum of squares and number into number, mean and standard deviation; NaN where there is none."""
    n, mean, sd = moments(sums)
    return n.astype(np.int32), mean.astype(np.float32), sd.astype(np.float32)
