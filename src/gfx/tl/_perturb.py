"""Perturb genes, hold the effects against their controls, and write both."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from gfx import _log
from gfx._adata import obs_column
from gfx._core.edits import find_places
from gfx._keys import perturbation_keys
from gfx._provenance import record
from gfx.tl._cell_states import find_states
from gfx.tl._controls import (
    N_RANDOM_SETS,
    compare_with_baselines,
    compare_with_random,
    find_baselines,
    run_random_sets,
    run_twin,
)
from gfx.tl._experiment import Experiment
from gfx.tl._gene_sets import find_gene_sets, set_name
from gfx.tl._perturbation_tables import CellEffects, donor_tables, effect_table, random_state_table, state_table
from gfx.tl._prepare import prepare
from gfx.tl._synergy import excess_of_random_sets, find_synergy, synergy_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData

    from gfx._core.edits import Edit
    from gfx._keys import PerturbationKeys
    from gfx.models import Model
    from gfx.tl._cell_states import States
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
    seed, rng = rng, np.random.default_rng(rng)
    found = _run(experiment, sets, states, centroids=centroids, donor=donor, n_random=n_random, rng=rng)
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
        rng=seed if isinstance(seed, int | np.integer) else None,
        **noted,
    )
    _warn(found, states, function)
    _write(cells, keys, found)
    _log.info(
        f"{len(sets)} perturbation{'s' * (len(sets) > 1)} in up to {int(found.uns['table']['n_cells'].max()):,} cells "
        f"with {cells.model.name!r}: added {keys.obsm!r} (adata.obsm, adata.varm, adata.uns). {found.uns['note']}"
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
    if isinstance(null, bool) or not isinstance(null, int | np.integer) or null < 2:
        msg = f"`null` is 'rank', a number of random sets of at least 2, or None; found {null!r}."
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


@dataclass(frozen=True)
class _Found:
    """All that a run writes: effects of cells, sums over genes `(3, n_tokens, n_perturbations)`, tables."""

    effects: CellEffects
    genes: np.ndarray
    random_genes: np.ndarray | None
    uns: dict[str, Any]


def _run(
    experiment: Experiment,
    sets: GeneSets,
    states: States | None,
    *,
    centroids: Centroids,
    donor: np.ndarray | None,
    n_random: int,
    rng: np.random.Generator,
) -> _Found:
    n_obs, names = experiment.cells.adata.n_obs, sets.names
    controls: dict[str, Any] = {}
    goals = None
    if states is not None:
        goals, controls["state_axis"] = _goals(experiment, states, sets, centroids=centroids, donor=donor, rng=rng)
    cells_of = [experiment.where(genes) for genes in sets.tokens]
    cell, which = np.concatenate(cells_of), np.repeat(np.arange(len(sets)), [len(rows) for rows in cells_of])
    runs = experiment.measure(
        experiment.edits(sets.tokens, cell, which),
        goals=goals,
        gene_groups=which,
        n_groups=len(sets),
        keep_vectors=any(len(genes) > 1 for genes in sets.tokens),
    )
    effects = CellEffects.of(runs, cell, which, n_obs, len(sets))
    together = find_synergy(experiment, sets.tokens, cell, which, runs)

    uns: dict[str, Any] = {
        "perturbations": np.array(names, dtype=object),
        "ensembl_ids": np.array(sets.ensembl_ids, dtype=object),
        "note": _note(None if donor is None else donor[experiment.lengths > 0], n_random, states),
    }
    random, of_random = None, {}
    random_table, random_states = pd.DataFrame(), np.zeros((0, 0, 2))
    random_weights = np.full(len(sets), np.nan)
    if n_random:
        random = run_random_sets(experiment, sets.tokens, cells_of, n_sets=n_random, goals=goals, rng=rng)
        of_random = find_synergy(experiment, random.sets, random.cell, random.which, random.effects)
        called = [set_name(genes, experiment.cells.model.vocabulary) for genes in random.sets]
        random_table, random_states = compare_with_random(random, effects.shift, effects.toward, names, called)
        twin, random_weights, uns["genes_of_all_ranks"] = run_twin(experiment, sets.tokens, cells_of, rng)
        controls |= twin
    every = [*sets.tokens, *([] if random is None else random.sets)]
    baselines = find_baselines(experiment.cells, experiment.lengths, states, np.unique(np.concatenate(every)))
    uns["table"] = effect_table(names, effects, baselines.of(sets.tokens), random_weights, random_table)
    ranked = {"shift": np.concatenate([uns["table"]["shift_mean"], random_table.get("shift_mean", [])])}
    if states is not None:
        uns["states"] = np.array(states.names, dtype=object)
        uns["state_table"] = state_table(names, states, effects, random_table, random_states)
        at = states.names.index(states.goal)
        to_goal = uns["state_table"].query("role == 'goal'")["toward_mean"]
        ranked["toward goal"] = np.concatenate([to_goal, random_states[:, at, 0] if len(random_table) else []])
        if random is not None:
            uns["random_states"] = random_state_table(random_table, states, random_states)
    if random is not None:
        uns["random_sets"] = random_table
    controls["baselines"] = compare_with_baselines(ranked, baselines.of(every))
    uns["controls"] = controls
    if donor is not None:
        uns |= donor_tables(names, states, effects, donor, random)
    if together:
        excess = {} if random is None else excess_of_random_sets(together, of_random, random)
        for measure, differences in excess.items():
            random_table[f"{measure}_difference"] = differences
        uns["synergy"] = synergy_table(names, together, random_table, donor, rng)
    return _Found(effects, runs.genes, None if random is None else random.effects.genes, uns)


def _goals(
    experiment: Experiment,
    states: States,
    sets: GeneSets,
    *,
    centroids: Centroids,
    donor: np.ndarray | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, dict[str, object]]:
    """Find the means of states, with or without the perturbed genes, and whether start and goal are apart."""
    from gfx._engine.perturb import Edits
    from gfx._engine.pooling import embed_cells

    tokens, vocabulary = experiment.cells.tokens, experiment.cells.model.vocabulary
    how = "cls" if experiment.how == "cls" else "mean"
    in_a_state = np.where(states.group >= 0, tokens.lengths, 0)
    vectors = embed_cells(experiment.encoder, tokens.ids, in_a_state, vocabulary, how=how)
    axis = states.axis(vectors, donor, rng)
    whole = states.centroids(vectors)
    if centroids == "whole":
        return whole, axis
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
    return goals, axis


def _note(donor: np.ndarray | None, n_random: int, states: States | None) -> str:
    """Say what p-values there are, and over what."""
    told = ["p and fdr compare with random sets of genes of neighbouring rank"] if n_random else []
    if donor is not None and (n_random or states is not None):
        n = len(set(donor))
        told.append(f"donor_p is over {n} donor{'s' * (n > 1)}")
    elif not n_random:
        told.append("no p-value is given")
    if donor is None:
        told.append("name the donors with `donor_key=` for tests over them")
    return f"Cells are not replicates: {'; '.join(told)}."


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
    n, means, sd = _moments(found.genes)
    varm: Mapping[str, np.ndarray | None] = {
        keys.varm: cells.per_gene(means),
        keys.varm_sd: cells.per_gene(sd),
        keys.varm_n_cells: cells.cells_per_gene(n),
        keys.varm_null: None if found.random_genes is None else cells.per_gene(_moments(found.random_genes)[1]),
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


def _moments(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn sum, sum of squares and number into number, mean and standard deviation; NaN where there is none."""
    total, squares, n = sums
    mean, square = (np.divide(values, n, out=np.full(n.shape, np.nan), where=n > 0) for values in (total, squares))
    return n.astype(np.int64), mean, np.sqrt(np.maximum(square - mean**2, 0))
