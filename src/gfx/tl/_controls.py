"""What a result has to be held against: random genes of the same rank, a random network, and no network at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gfx import _log
from gfx._core.matched_sets import draw_matched_sets
from gfx._core.statistics import beside_baselines, rank_trend, spearman
from gfx._tokens import counts_by_token

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gfx._engine.perturb import EditEffects
    from gfx.tl._cell_states import States
    from gfx.tl._experiment import Experiment
    from gfx.tl._prepare import Prepared

#: Random sets for each perturbation, unless another number is asked for, and cells that each is perturbed in at most.
N_RANDOM_SETS, CELLS_PER_SET = 100, 8

#: Random genes of all ranks, perturbed by the model and by a network with random weights.
N_RANK_SAMPLE = 200

#: Cells of each perturbation that the network with random weights sees.
TWIN_CELLS = 50

#: What counts are scaled to before the logarithm.
TARGET_SUM = 1e4


# --- random sets of genes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomSets:
    """Random sets beside each perturbation, and what they did.

    Parameters
    ----------
    sets
        Tokens of every random set.
    perturbation
        The perturbation that each set is for, int `(n_sets,)`.
    cell, which
        Cell and set of each run, int `(n_runs,)`.
    effects
        Of these runs.
    """

    sets: list[np.ndarray]
    perturbation: np.ndarray
    cell: np.ndarray
    which: np.ndarray
    effects: EditEffects


def run_random_sets(
    experiment: Experiment,
    sets: Sequence[np.ndarray],
    cells_of: Sequence[np.ndarray],
    *,
    n_sets: int,
    goals: np.ndarray | None,
    rng: np.random.Generator,
) -> RandomSets:
    """Perturb, beside each set, random sets of neighbouring rank in the same cells."""
    tokens, vocabulary = experiment.cells.tokens, experiment.cells.model.vocabulary
    random, perturbation, cell, which = [], [], [], []
    for at, (genes, rows) in enumerate(zip(sets, cells_of, strict=True)):
        drawn = draw_matched_sets(
            tokens.ids,
            tokens.lengths,
            genes,
            rows,
            vocabulary,
            n_sets=n_sets,
            cells_per_set=CELLS_PER_SET,
            rng=rng,
        )
        cell.append(drawn.cell)
        which.append(drawn.which + len(random))
        random += list(drawn.sets)
        perturbation += [at] * len(drawn.sets)
    cell, which = (np.concatenate([*parts, np.zeros(0, np.int64)]).astype(np.int64) for parts in (cell, which))
    of = np.array(perturbation, dtype=np.int64)
    effects = experiment.measure(
        experiment.edits(random, cell, which),
        split=False,
        goals=goals if goals is None or goals.ndim == 2 else goals[of],
        gene_groups=of[which],
        n_groups=len(sets),
        keep_vectors=any(len(genes) > 1 for genes in sets),
        description="random genes",
    )
    return RandomSets(random, of, cell, which, effects)


def compare_with_random(
    random: RandomSets, shift: np.ndarray, toward: np.ndarray, names: Sequence[str], set_names: Sequence[str]
) -> tuple[pd.DataFrame, np.ndarray]:
    """Set each random set beside its perturbation, in the cells that both were perturbed in.

    Parameters
    ----------
    shift, toward
        Effects of the perturbations, `(n_obs, n_perturbations)` and `(n_obs, n_perturbations, n_states)`.
    names, set_names
        Of the perturbations and of the random sets.

    Returns
    -------
    One row a random set; and its movement towards each state, mean and difference, `(n_sets, n_states, 2)`.
    """
    beside = random.perturbation[random.which]
    n = np.bincount(random.which, minlength=len(random.sets))

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(random.which, values.astype(np.float64), minlength=len(random.sets)) / n

    moved = random.effects.shift
    table = pd.DataFrame(
        {
            "perturbation": np.asarray(names, dtype=object)[random.perturbation],
            "genes": np.asarray(set_names, dtype=object),
            "n_cells": n,
            "rank_mean": mean(random.effects.rank),
            "shift_mean": mean(moved),
            "difference": mean(moved - shift[random.cell, beside]),
        }
    )
    states = (
        np.stack(
            [
                np.column_stack([mean(moved), mean(moved - toward[random.cell, beside, at])])
                for at, moved in enumerate(random.effects.toward.T)
            ],
            axis=1,
        )
        if toward.shape[2]
        else np.zeros((len(table), 0, 2))
    )
    return table, states


# --- ranks and a random network ------------------------------------------------------------------------------------


def run_twin(
    experiment: Experiment, sets: Sequence[np.ndarray], cells_of: Sequence[np.ndarray], rng: np.random.Generator
) -> tuple[dict[str, Any], np.ndarray, pd.DataFrame]:
    """Perturb random genes of all ranks, and some cells of each perturbation, with random weights, too.

    Returns
    -------
    How effects follow the rank in both networks, and how far their rankings agree; the mean shift of each perturbation
    with random weights, `(n_sets,)`; and the random genes, a row each.
    """
    from gfx._engine.encoder import random_encoder

    encoder, seed = experiment.encoder, int(rng.integers(2**31))
    twin = random_encoder(
        experiment.cells.model.config,
        n_blocks=encoder.config.num_hidden_layers,
        seed=seed,
        device=encoder.device,
        dtype=encoder.dtype,
    )
    cell, genes = _genes_of_all_ranks(experiment, rng)
    some = [rng.choice(rows, min(TWIN_CELLS, len(rows)), replace=False) for rows in cells_of]
    all_sets = [*genes[:, None], *sets]
    edits = experiment.edits(
        all_sets,
        np.concatenate([cell, *some]),
        np.concatenate([np.arange(len(genes)), np.repeat(np.arange(len(sets)) + len(genes), [len(r) for r in some])]),
    )
    ours = experiment.measure(edits, split=False, description="genes of all ranks")
    theirs = experiment.measure(edits, encoder=twin, split=False, description="random weights")
    n = np.bincount(edits.which, minlength=len(all_sets))
    model, random = (
        np.divide(
            np.bincount(edits.which, found.shift.astype(np.float64), minlength=len(n)),
            n,
            out=np.full(len(n), np.nan),
            where=n > 0,
        )
        for found in (ours, theirs)
    )
    of_all_ranks = slice(0, len(genes))
    sample = pd.DataFrame(
        {"rank": ours.rank[of_all_ranks], "shift": model[of_all_ranks], "shift_random_weights": random[of_all_ranks]}
    )
    report = {
        "rank_trend": rank_trend(sample["rank"].to_numpy(), sample["shift"].to_numpy()),
        "rank_trend_random_weights": rank_trend(sample["rank"].to_numpy(), sample["shift_random_weights"].to_numpy()),
        "random_weights_seed": seed,
        "random_weights_spearman": spearman(model[of_all_ranks], random[of_all_ranks]),
        "random_weights_spearman_perturbations": spearman(model[len(genes) :], random[len(genes) :]),
    }
    return report, random[len(genes) :], sample


def _genes_of_all_ranks(experiment: Experiment, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw cells, and in each a gene at any rank: rows and tokens, `(n,)`."""
    tokens, vocabulary = experiment.cells.tokens, experiment.cells.model.vocabulary
    n_genes = experiment.lengths - vocabulary.n_specials
    usable = np.flatnonzero(n_genes > 1)  # one gene alone leaves nothing to compare
    if not len(usable):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    cell = rng.choice(usable, N_RANK_SAMPLE)
    place = vocabulary.first_gene + rng.integers(n_genes[cell])
    return cell, tokens.ids[cell, place].astype(np.int64)


# --- what is known without a model ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baselines:
    """What every gene looks like in the cells that are perturbed, `(n_tokens,)` each; NaN where it is not known.

    Parameters
    ----------
    detection
        Share of the cells whose encoding has the gene.
    expression
        Mean logarithm of its normalised counts.
    rank
        Its mean rank where it is detected, 0 the first gene of a cell.
    logfc
        log2 fold change from start to goal, by scanpy.
    """

    detection: np.ndarray
    expression: np.ndarray
    rank: np.ndarray
    logfc: np.ndarray

    def of(self, sets: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Means over the genes of each set."""
        return {
            name: np.array([values[genes].mean() for genes in sets], dtype=np.float64)
            for name, values in vars(self).items()
        }


def find_baselines(cells: Prepared, lengths: np.ndarray, states: States | None, wanted: np.ndarray) -> Baselines:
    """Describe genes without the model.

    Parameters
    ----------
    lengths
        Tokens of each cell, 0 for those that are not perturbed.
    wanted
        Tokens to find the fold change of.
    """
    vocabulary, n_tokens = cells.model.vocabulary, len(cells.model.vocabulary)
    rows = np.flatnonzero(lengths > 0)
    ids = cells.tokens.ids[rows]
    at, place = np.nonzero((np.arange(ids.shape[1]) < lengths[rows][:, None]) & ~vocabulary.is_special[ids])
    n_genes = lengths[rows] - vocabulary.n_specials
    rank = (place - vocabulary.first_gene) / np.maximum(n_genes[at] - 1, 1)
    n_cells = np.bincount(ids[at, place], minlength=n_tokens)
    ranks = np.bincount(ids[at, place], rank, minlength=n_tokens)
    mean_rank = np.divide(ranks, n_cells, out=np.full(n_tokens, np.nan), where=n_cells > 0)
    nothing = np.full(n_tokens, np.nan)
    try:
        expression, fold = _expression(cells, lengths > 0, states, wanted)
    except (KeyError, ValueError) as problem:
        _log.info(f"Expression is not among the baselines, for the counts are not at hand: {problem.args[0]}")
        expression, fold = nothing, nothing
    return Baselines(n_cells / max(len(rows), 1), expression, mean_rank, fold)


def _expression(
    cells: Prepared, perturbed: np.ndarray, states: States | None, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean log expression of every gene in the perturbed cells, and fold changes of the wanted ones."""
    vocabulary = cells.model.vocabulary
    total = np.zeros(len(vocabulary))
    of_wanted = []
    for rows, counts, depth in counts_by_token(cells.adata, vocabulary, cells.tokens.source):
        scale = np.divide(TARGET_SUM, depth, out=np.zeros_like(depth), where=depth > 0)
        logs = counts.multiply(scale[:, None]).log1p().tocsr()
        total += np.asarray(logs[perturbed[rows]].sum(axis=0)).ravel()
        if states is not None:
            of_wanted.append(logs[:, wanted].tocsr())
    mean = total / max(perturbed.sum(), 1)
    fold = np.full(len(vocabulary), np.nan)
    if states is not None:
        fold[wanted] = _fold_changes(of_wanted, states)
    return mean, fold


def _fold_changes(logs: list[Any], states: States) -> np.ndarray:
    """log2 fold changes from start to goal, as scanpy takes them."""
    import anndata as ad
    import scanpy as sc
    from scipy import sparse

    rows = states.is_start | states.is_goal
    if min(states.is_start.sum(), states.is_goal.sum()) < 2:  # scanpy compares no single cells
        return np.full(logs[0].shape[1], np.nan)
    matrix = sparse.csr_matrix(sparse.vstack(logs)[rows])
    if not matrix.nnz:  # scanpy would take nothing but zeros for raw counts
        return np.zeros(matrix.shape[1])
    cells = ad.AnnData(matrix)
    cells.obs["state"] = pd.Categorical(np.where(states.is_goal[rows], "goal", "start"))
    cells.uns["log1p"] = {"base": None}
    sc.tl.rank_genes_groups(cells, "state", groups=["goal"], reference="start", method="t-test")
    table = sc.get.rank_genes_groups_df(cells, "goal").set_index("names")["logfoldchanges"]
    return table.reindex(cells.var_names).to_numpy(dtype=np.float64)


def compare_with_baselines(effects: dict[str, np.ndarray], baselines: dict[str, np.ndarray]) -> pd.DataFrame:
    """Tell how much of each ranking of genes the baselines give, alone and beside each other."""
    rows = [{"effect": name, **row} for name, effect in effects.items() for row in beside_baselines(effect, baselines)]
    return pd.DataFrame(rows, columns=["effect", "baseline", "spearman", "partial_spearman", "n"])
