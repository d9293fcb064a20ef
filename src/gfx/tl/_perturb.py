"""Perturb genes, hold the effects against their controls, and write both."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gfx import _log
from gfx._adata import obs_column
from gfx._core.edits import find_places
from gfx._keys import perturbation_keys
from gfx._provenance import record
from gfx.tl._cell_states import find_states
from gfx.tl._controls import (
    AXIS,
    N_RANDOM_SETS,
    RandomSets,
    compare_with_baselines,
    find_baselines,
    random_set_table,
    random_state_table,
    run_random_sets,
    run_twin,
    stream,
)
from gfx.tl._experiment import Experiment
from gfx.tl._gene_sets import find_gene_sets
from gfx.tl._perturbation_tables import CellEffects, donor_tables, effect_table, places_among, state_table
from gfx.tl._prepare import prepare
from gfx.tl._synergy import excess_of_random_sets, find_synergy, synergy_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

    from gfx._core.edits import Edit
    from gfx._core.synergy import Synergy
    from gfx._core.vocabulary import Vocabulary
    from gfx._keys import PerturbationKeys
    from gfx.models import Model
    from gfx.tl._cell_states import States
    from gfx.tl._controls import Baselines, Twin
    from gfx.tl._gene_sets import Genes, GeneSets
    from gfx.tl._prepare import Prepared

Null = Literal["rank"] | int | None
Pooling = Literal["auto", "mean", "cls", "genes"]
Centroids = Literal["whole", "without"]

#: Finds where moved genes go, from the cell of each edit and its genes.
NewRanks = "Callable[[np.ndarray, np.ndarray], np.ndarray]"


def perturb(
    adata: AnnData | MuData,
    genes: Genes,
    *,
    function: str,
    kind: Edit,
    operator: str,
    model: str | Path | Model | None,
    layer: str | None,
    groupby: str | None,
    start: str | None,
    goal: str | None,
    centroids: Centroids,
    null: Null,
    donor_key: str | None,
    hidden_layer: int,
    pooling: Pooling,
    rng: int | np.random.Generator | None,
    key_added: str | None,
    mod: str | None,
    copy: bool,
    new_ranks: Callable[[Prepared], NewRanks] | None = None,
    **noted: object,
) -> AnnData | MuData | None:
    """Do what `tl.delete_genes` and its sisters say; called by these alone, for whom it warns.

    Parameters
    ----------
    operator
        The name of what is done, or ``"hold"`` to let every other gene keep its position.
    new_ranks
        Makes, of the prepared cells, the function that finds where moved genes go.
    noted
        What else belongs into the record.
    """
    n_random = _number_of_random_sets(null)
    _check_choice("operator", operator, (kind, "hold"))
    _check_choice("centroids", centroids, ("whole", "without"))
    keys = perturbation_keys(function, key_added)
    cells = prepare(adata, model, layer=layer, mod=mod, copy=copy, slot=keys.uns, function=function)
    states = find_states(cells, groupby, start, goal)
    donor = None if donor_key is None else _donors(cells, donor_key)
    perturbed = np.ones(cells.adata.n_obs, dtype=bool) if states is None else states.is_start
    lengths = np.where(perturbed, cells.tokens.lengths, 0)
    sets = find_gene_sets(genes, cells.model.vocabulary, _detected(cells, lengths))
    _check_room(sets, cells)
    how = _comparison(cells, pooling)
    experiment = Experiment(
        cells=cells,
        encoder=cells.encoder(hidden_layer, dtype="float32"),
        kind=kind,
        hold=operator == "hold",
        how=how,
        lengths=lengths,
        new_ranks=None if new_ranks is None else new_ranks(cells),
    )
    found = _run(
        experiment,
        sets,
        states,
        centroids=centroids,
        donor=donor,
        n_random=n_random,
        seed=int(np.random.default_rng(rng).integers(2**63)),
    )
    found.uns["params"] = record(
        function,
        **cells.provenance(experiment.encoder),
        hidden_layer=hidden_layer,
        pooling=how,
        operator=operator,
        groupby=groupby,
        start=start,
        goal=goal,
        centroids=None if states is None else centroids,
        null=null,
        donor_key=donor_key,
        rng=rng if isinstance(rng, int | np.integer) else None,
        **noted,
    )
    _warn(found, states, function)
    _write(cells, keys, found)
    _log.info(
        f"{len(sets)} perturbation{'s' * (len(sets) > 1)} in up to {int(found.uns['table']['n_cells'].max()):,} cells "
        f"with {cells.model.name!r}: added {keys.obsm!r} (adata.obsm, adata.varm, adata.uns). {found.uns['note']}"
        f"{_first_control(found.uns['controls'])}"
    )
    return cells.result


# --- what is asked for ---------------------------------------------------------------------------------------------


def _check_choice(name: str, given: object, choices: tuple[str, ...]) -> None:
    if given not in choices:
        msg = f"`{name}` is one of {list(choices)}, found {given!r}."
        raise ValueError(msg)


def _number_of_random_sets(null: Null) -> int:
    if null is None or null == "rank":
        return 0 if null is None else N_RANDOM_SETS
    if isinstance(null, bool) or not isinstance(null, int | np.integer) or null < 3:
        msg = f"`null` is 'rank', a number of random sets of at least 3, or None; found {null!r}."
        raise ValueError(msg)
    return int(null)


def _comparison(cells: Prepared, pooling: Pooling) -> Literal["cls", "mean", "genes"]:
    """Choose how cells are compared; V1 compares gene by gene, as it was published."""
    _check_choice("pooling", pooling, ("auto", "mean", "cls", "genes"))
    if pooling == "genes":
        return "genes"
    how = cells.pooling(pooling)
    return "genes" if pooling == "auto" and how == "mean" else how


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


# --- runs ----------------------------------------------------------------------------------------------------------

#: Runs that are held at a time, with the cell before and after each where genes are perturbed together.
MOST_RUNS = 100_000


@dataclass(frozen=True)
class _Found:
    """All that a run writes: effects of cells, moments of genes (see :func:`_moments`), tables."""

    effects: CellEffects
    genes: tuple[np.ndarray, ...]
    random_genes: tuple[np.ndarray, ...] | None
    uns: dict[str, Any]


def _run(
    experiment: Experiment,
    sets: GeneSets,
    states: States | None,
    *,
    centroids: Centroids,
    donor: np.ndarray | None,
    n_random: int,
    seed: int,
) -> _Found:
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
    return _Found(
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
    from gfx._engine.pooling import embed_cells

    tokens, vocabulary = experiment.cells.tokens, experiment.cells.model.vocabulary
    how = "cls" if experiment.how == "cls" else "mean"
    in_a_state = np.where(states.group >= 0, tokens.lengths, 0)
    vectors = embed_cells(experiment.encoder, tokens.ids, in_a_state, vocabulary, how=how)
    axis = states.axis(vectors, donor, stream(seed, AXIS))
    whole = states.centroids(vectors)
    if centroids == "whole":
        return whole, whole, axis
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


def _first_control(controls: Mapping[str, Any]) -> str:
    """Say at once how far the ranking is that of a network which has learnt nothing."""
    twin = controls.get("random_weights, shift")
    if twin is None or np.isnan(twin["spearman"]):
        return ""
    return (
        f" Over random genes, Spearman {twin['spearman']:+.2f} with a network of random weights: read "
        "`gfx.get.controls_df`, then `gfx.get.deletion_df`."
    )


# --- out -----------------------------------------------------------------------------------------------------------


def _warn(found: _Found, states: States | None, function: str) -> None:
    table = found.uns["table"]
    absent = table.loc[table["n_cells"] == 0, "perturbation"].tolist()
    doubts = []
    if absent:
        where = "" if states is None else f" of the state {states.start!r}"
        shown = absent[:10] + ["..."] * (len(absent) > 10)
        doubts.append(f"No cell{where} has the genes of {shown} and others beside them; their effects are NaN.")
    if states is not None and (doubt := states.doubt(found.uns["controls"]["state_axis"])):
        doubts.append(doubt)
    for doubt in doubts:
        warnings.warn(doubt, UserWarning, stacklevel=4)


def _write(cells: Prepared, keys: PerturbationKeys, found: _Found) -> None:
    """Write arrays and tables; what an earlier run left that does not belong to this one goes."""
    n, means, sd = found.genes
    varm: Mapping[str, np.ndarray | None] = {
        keys.varm: cells.per_gene(means),
        keys.varm_sd: cells.per_gene(sd),
        keys.varm_n_cells: cells.cells_per_gene(n),
        keys.varm_null: None if found.random_genes is None else cells.per_gene(_of_enough(*found.random_genes[:2])),
    }
    effects = found.effects
    obsm = {
        keys.obsm: effects.shift,
        keys.obsm_parts: effects.parts,
        keys.obsm_states: effects.toward if effects.toward.shape[2] else None,
    }
    for held, slots in ((cells.adata.obsm, obsm), (cells.adata.varm, varm)):
        for key, values in slots.items():
            if values is not None:
                held[key] = values
            elif key in held:
                del held[key]
    cells.adata.uns[keys.uns] = found.uns


#: A gene's shift under random sets is known from as many runs, or not at all.
FEWEST_RUNS = 5


def _of_enough(n: np.ndarray, means: np.ndarray) -> np.ndarray:
    return np.where(n >= FEWEST_RUNS, means, np.nan)


def _moments(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn sum, sum of squares and number into number, mean and standard deviation; NaN where there is none."""
    total, squares, n = sums
    mean, square = (np.divide(values, n, out=np.full(n.shape, np.nan), where=n > 0) for values in (total, squares))
    sd = np.sqrt(np.maximum(square - mean**2, 0))
    return n.astype(np.int32), mean.astype(np.float32), sd.astype(np.float32)


def _side_by_side(parts: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    return tuple(np.concatenate(moments, axis=1) for moments in zip(*parts, strict=True))
