"""One run: perturbations, what they are held against, and the tables of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gfx._core.edits import find_places
from gfx._core.statistics import moments
from gfx.tl._baselines import compare_with_baselines, find_baselines
from gfx.tl._controls import (
    AXIS,
    RandomSets,
    random_set_table,
    random_state_table,
    run_random_sets,
    run_twin,
    stream,
)
from gfx.tl._experiment import Experiment
from gfx.tl._perturbation_tables import CellEffects, donor_tables, effect_table, places_among, state_table
from gfx.tl._synergy import excess_of_random_sets, find_synergy, synergy_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from gfx._core.synergy import Synergy
    from gfx._core.vocabulary import Vocabulary
    from gfx.tl._baselines import Baselines
    from gfx.tl._cell_states import States
    from gfx.tl._controls import Twin
    from gfx.tl._gene_sets import GeneSets

Centroids = Literal["whole", "without"]

#: Runs that are held at a time, with the cell before and after each where genes are perturbed together.
MOST_RUNS = 100_000


@dataclass(frozen=True)
class Found:
    """All that a run writes: effects of cells, moments of genes (see :func:`_moments`), tables."""

    effects: CellEffects
    genes: tuple[np.ndarray, ...]
    random_genes: tuple[np.ndarray, ...] | None
    uns: dict[str, Any]


def run(
    experiment: Experiment,
    sets: GeneSets,
    states: States | None,
    *,
    centroids: Centroids,
    donor: np.ndarray | None,
    n_random: int,
    seed: int,
) -> Found:
    n_obs, n_states = experiment.cells.adata.n_obs, 0 if states is None else len(states.names)
    controls: dict[str, Any] = {}
    goals = whole = None
    if states is not None:
        goals, whole, controls["state_axis"] = _goals(experiment, states, sets, centroids, donor, seed=seed)
    cells_of = [experiment.where(genes) for genes in sets.tokens]
    effects = CellEffects.empty(n_obs, len(sets), n_states)
    parts = []
    for numbers in _blocks([len(rows) for rows in cells_of]):
        cell = np.concatenate([cells_of[at] for at in numbers])
        which = np.repeat(numbers, [len(cells_of[at]) for at in numbers])
        runs = experiment.measure(
            experiment.edits(sets.tokens, cell, which),
            goals=goals,
            gene_groups=which - numbers.start,
            n_groups=len(numbers),
            keep_vectors=any(len(sets.tokens[at]) > 1 for at in numbers),
        )
        effects.fill(runs, cell, which)
        part = _Part(_moments(runs.genes), find_synergy(experiment, sets.tokens, cell, which, runs))
        if n_random:
            part = _beside_random_sets(
                experiment,
                part,
                sets,
                cells_of,
                numbers,
                n_sets=n_random,
                goals=whole if centroids == "whole" else None,
                n_states=n_states,
                seed=seed,
            )
        parts.append(part)
    uns: dict[str, Any] = {
        "perturbations": np.array(sets.names, dtype=object),
        "ensembl_ids": np.array(sets.ensembl_ids, dtype=object),
        "note": _note(None if donor is None else donor[experiment.lengths > 0], n_random),
    }
    random = RandomSets.join([part.random for part in parts]) if n_random else None
    twin = None
    if n_random:
        twin = run_twin(experiment, sets.tokens, cells_of, states=states, whole=whole, seed=seed)
        controls |= twin.report
        uns["genes_of_all_ranks"] = twin.sample
    together = {at: found for part in parts for at, found in part.together.items()}
    excess = {measure: np.concatenate([part.excess[measure] for part in parts]) for measure in (parts[0].excess or {})}
    wanted = [*sets.tokens, *([] if twin is None else [twin.genes])]
    baselines = find_baselines(experiment.cells, experiment.lengths, states, np.unique(np.concatenate(wanted)))
    vocabulary = experiment.cells.model.vocabulary
    uns |= _tables(sets, states, effects, baselines=baselines, random=random, twin=twin, vocabulary=vocabulary)
    controls["baselines"] = _baseline_table(sets, states, uns, baselines, twin)
    uns["controls"] = controls
    if donor is not None:
        uns |= donor_tables(sets.names, states, effects, donor, random)
    if together:
        if random is not None:
            uns["random_sets"] = uns["random_sets"].assign(
                **{f"{measure}_difference": values for measure, values in excess.items()}
            )
        uns["synergy"] = synergy_table(sets, together, excess, random, donor=donor, seed=seed)
    return Found(
        effects,
        _side_by_side([part.genes for part in parts]),
        _side_by_side([part.random_genes for part in parts]) if n_random else None,
        uns,
    )


@dataclass(frozen=True)
class _Part:
    """What some of the perturbations gave: moments of genes, sets against their genes; and the same of random sets."""

    genes: tuple[np.ndarray, ...]
    together: dict[int, tuple[np.ndarray, Synergy]]
    random: RandomSets | None = None
    random_genes: tuple[np.ndarray, ...] | None = None
    excess: dict[str, np.ndarray] | None = None


def _blocks(n_runs: list[int]) -> list[range]:
    """Cut the perturbations into runs of them that fit in memory."""
    blocks, start, n = [], 0, 0
    for at, more in enumerate(n_runs):
        if at > start and n + more > MOST_RUNS:
            blocks.append(range(start, at))
            start, n = at, 0
        n += more
    return [*blocks, range(start, len(n_runs))]


def _beside_random_sets(
    experiment: Experiment,
    part: _Part,
    sets: GeneSets,
    cells_of: list[np.ndarray],
    numbers: range,
    **wanted: Any,
) -> _Part:
    random, runs = run_random_sets(experiment, sets.tokens, cells_of, numbers, **wanted)
    of_random = find_synergy(experiment, random.sets, random.cell, random.which, runs)
    return replace(
        part,
        random=random,
        random_genes=_moments(runs.genes),
        excess=excess_of_random_sets(part.together, of_random, random),
    )


def _goals(
    experiment: Experiment,
    states: States,
    sets: GeneSets,
    centroids: Centroids,
    donor: np.ndarray | None,
    *,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, dict[str, object]]:
    """Find the means of states for each perturbation, those of whole cells, and whether start and goal are apart."""
    from gfx._engine.perturb import Edits

    vectors = experiment.embed_states(states)
    axis = states.axis(vectors, donor, stream(seed, AXIS))
    whole = states.centroids(vectors)
    if centroids == "whole":
        return whole, whole, axis
    tokens, vocabulary = experiment.cells.tokens, experiment.cells.model.vocabulary
    in_a_state = np.where(states.group >= 0, tokens.lengths, 0)
    everywhere = Experiment(experiment.cells, experiment.encoder, "delete", experiment.hold, experiment.how, in_a_state)
    goals = np.repeat(whole[None], len(sets), axis=0)
    for at, genes in enumerate(sets.tokens):
        # Cells that have some genes of a set lose these.
        there = (find_places(tokens.ids, genes) >= 0).sum(axis=1)
        rows = np.flatnonzero((there > 0) & (in_a_state - vocabulary.n_specials > there))
        without = vectors.copy()
        edits = Edits("delete", [genes], rows, np.zeros(len(rows), dtype=np.int64))
        without[rows] = everywhere.measure(edits, split=False, keep_vectors=True).vectors[:, 1]
        goals[at] = states.centroids(without)
    return goals, whole, axis


def _tables(
    sets: GeneSets,
    states: States | None,
    effects: CellEffects,
    *,
    baselines: Baselines,
    random: RandomSets | None,
    twin: Twin | None,
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
    weights = np.full(n, np.nan) if twin is None else twin.shift
    places = places_among(differences, sizes, n_cells)
    tables["table"] = effect_table(sets.names, effects, baselines.of(sets.tokens), weights, places)
    if states is None:
        return tables
    of_states = [none] * len(states.names)
    if random is not None:
        tables["random_states"] = random_state_table(random, effects.toward, states, tables["random_sets"])
        by_state = tables["random_states"]["toward_difference"].to_numpy().reshape(len(states.names), -1)
        of_states = [random.of_each(n, values) for values in by_state]
    tables["states"] = np.array(states.names, dtype=object)
    places = [places_among(values, sizes, n_cells) for values in of_states]
    tables["state_table"] = state_table(sets.names, states, effects, places)
    return tables


def _baseline_table(
    sets: GeneSets, states: States | None, uns: Mapping[str, Any], baselines: Baselines, twin: Twin | None
) -> pd.DataFrame:
    """Hold effects against what is known without a model: those of genes of all ranks, else of the perturbations."""
    if twin is not None:
        effects = {"shift": twin.sample["shift"].to_numpy()}
        if states is not None:
            effects["toward goal"] = twin.sample["toward_goal"].to_numpy()
        return compare_with_baselines(effects, baselines.of(list(twin.genes[:, None])))
    single = [at for at, genes in enumerate(sets.tokens) if len(genes) == 1]
    effects = {"shift": uns["table"]["shift_mean"].to_numpy()[single]}
    if states is not None:
        to_goal = uns["state_table"].loc[uns["state_table"]["role"] == "goal", "toward_mean"]
        effects["toward goal"] = to_goal.to_numpy()[single]
    return compare_with_baselines(effects, baselines.of([sets.tokens[at] for at in single]))


def _note(donor: np.ndarray | None, n_random: int) -> str:
    """Say what p-values there are, and over what."""
    if not n_random:
        return "Cells are not replicates, and nothing else was run to compare with: no p-value is given."
    told = "Cells are not replicates: p and fdr compare with random sets of genes of neighbouring rank"
    if donor is None:
        return f"{told}; name the donors with `donor_key=` for tests over them, too."
    n = len(set(donor))
    return f"{told}, donor_p with these and over {n} donor{'s' * (n > 1)}."


def _moments(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn sum, sum of squares and number into number, mean and standard deviation; NaN where there is none."""
    n, mean, sd = moments(sums)
    return n.astype(np.int32), mean.astype(np.float32), sd.astype(np.float32)


def _side_by_side(parts: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    return tuple(np.concatenate(moments, axis=1) for moments in zip(*parts, strict=True))
