"""What the tools that perturb genes share: understand the call, run it, warn, and write."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gfx import _log
from gfx._adata import obs_column
from gfx._keys import perturbation_keys
from gfx._provenance import record
from gfx.tl._cell_states import find_states
from gfx.tl._controls import N_RANDOM_SETS
from gfx.tl._experiment import Experiment
from gfx.tl._gene_sets import find_gene_sets
from gfx.tl._perturbation_run import run
from gfx.tl._prepare import check_choice, prepare, put

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
    from gfx.tl._perturbation_run import Centroids, Found
    from gfx.tl._prepare import Prepared

    #: Finds where moved genes go, from the cell of each edit and its genes.
    NewRanks = Callable[[np.ndarray, np.ndarray], np.ndarray]

Null = Literal["rank"] | int | None
Pooling = Literal["auto", "mean", "cls", "genes"]


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
    check_choice("operator", operator, (kind, "hold"))
    check_choice("centroids", centroids, ("whole", "without"))
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
    found = run(
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
    _warn(found, states)
    _write(cells, keys, found)
    _log.info(
        f"{len(sets)} perturbation{'s' * (len(sets) > 1)} in up to {int(found.uns['table']['n_cells'].max()):,} cells "
        f"with {cells.model.name!r}: added {keys.obsm!r} (adata.obsm, adata.varm, adata.uns). {found.uns['note']}"
        f"{_first_control(found.uns['controls'])}"
    )
    return cells.result


# --- what is asked for ---------------------------------------------------------------------------------------------


def _number_of_random_sets(null: Null) -> int:
    if null is None or null == "rank":
        return 0 if null is None else N_RANDOM_SETS
    if isinstance(null, bool) or not isinstance(null, int | np.integer) or null < 3:
        msg = f"`null` is 'rank', a number of random sets of at least 3, or None; found {null!r}."
        raise ValueError(msg)
    return int(null)


def _comparison(cells: Prepared, pooling: Pooling) -> Literal["cls", "mean", "genes"]:
    """Choose how cells are compared; V1 compares gene by gene, as it was published."""
    check_choice("pooling", pooling, ("auto", "mean", "cls", "genes"))
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


def _warn(found: Found, states: States | None) -> None:
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


def _write(cells: Prepared, keys: PerturbationKeys, found: Found) -> None:
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
        put(held, slots, is_ours=keys.uns in cells.adata.uns)
    cells.adata.uns[keys.uns] = found.uns


#: A gene's shift under random sets is known from as many runs, or not at all.
FEWEST_RUNS = 5


def _of_enough(n: np.ndarray, means: np.ndarray) -> np.ndarray:
    return np.where(n >= FEWEST_RUNS, means, np.nan)
