"""What a result has to be held against: random genes of the same rank, a random network, and no network at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gfx._core.matched_sets import draw_matched_sets
from gfx._core.statistics import rank_trend, spearman
from gfx.tl._gene_sets import set_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.perturb import EditEffects
    from gfx.tl._cell_states import States
    from gfx.tl._experiment import Experiment

#: Random sets for each perturbation, unless another number is asked for, and cells that each is perturbed in at most.
N_RANDOM_SETS, CELLS_PER_SET = 100, 8

#: Random genes of all ranks, perturbed by the model and by a network with random weights.
N_RANK_SAMPLE = 200

#: Cells of each perturbation that the network with random weights sees.
TWIN_CELLS = 50

#: Streams of random numbers: what is drawn for one thing must not depend on what else is asked for.
AXIS, TWIN, SETS, BOOTSTRAP = range(4)


def stream(seed: int, use: int, genes: Sequence[int] = ()) -> np.random.Generator:
    """Random numbers for one use and one set of genes, whatever others there are."""
    return np.random.default_rng([seed, use, *sorted(int(gene) for gene in genes)])


# --- random sets of genes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomSets:
    """Random sets beside each perturbation, and what they did.

    Parameters
    ----------
    sets
        Tokens of every random set.
    perturbation
        Number of the perturbation that each set is for, ascending, int `(n_sets,)`.
    cell, which
        Cell and set of each run, int `(n_runs,)`.
    shift, rank
        Of each run, `(n_runs,)`.
    toward
        Movement towards each state, `(n_runs, n_states)`.
    """

    sets: list[np.ndarray]
    perturbation: np.ndarray
    cell: np.ndarray
    which: np.ndarray
    shift: np.ndarray
    rank: np.ndarray
    toward: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[RandomSets]) -> RandomSets:
        """Put the sets of several parts of the perturbations together."""
        first = np.cumsum([0, *(len(part.sets) for part in parts)])
        whole = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("perturbation", "cell", "shift", "rank", "toward")
        }
        which = np.concatenate([part.which + start for part, start in zip(parts, first, strict=False)])
        return cls(sets=[genes for part in parts for genes in part.sets], which=which, **whole)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean of each set over its runs, in float64."""
        return _mean_by(self.which, values, len(self.sets))

    def of_each(self, n: int, values: np.ndarray) -> list[np.ndarray]:
        """Cut one value a set into one array a perturbation."""
        return np.split(values, np.searchsorted(self.perturbation, np.arange(1, n)))


def run_random_sets(
    experiment: Experiment,
    sets: Sequence[np.ndarray],
    cells_of: Sequence[np.ndarray],
    numbers: range,
    *,
    n_sets: int,
    goals: np.ndarray | None,
    n_states: int,
    seed: int,
) -> tuple[RandomSets, EditEffects]:
    """Perturb, beside each of the numbered sets, random sets of neighbouring rank in the same cells.

    Without `goals`, movements towards the `n_states` states are NaN.
    """
    tokens, vocabulary = experiment.cells.tokens, experiment.cells.model.vocabulary
    random, perturbation, cell, which = [], [], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for at in numbers:
        drawn = draw_matched_sets(
            tokens.ids,
            tokens.lengths,
            sets[at],
            cells_of[at],
            vocabulary,
            n_sets=n_sets,
            cells_per_set=CELLS_PER_SET,
            rng=stream(seed, SETS, sets[at]),
        )
        cell.append(drawn.cell)
        which.append(drawn.which + len(random))
        random += list(drawn.sets)
        perturbation += [at] * len(drawn.sets)
    cell, which, of = np.concatenate(cell), np.concatenate(which), np.array(perturbation, dtype=np.int64)
    effects = experiment.measure(
        experiment.edits(random, cell, which),
        split=False,
        goals=goals,
        gene_groups=of[which] - numbers.start,
        n_groups=len(numbers),
        keep_vectors=any(len(sets[at]) > 1 for at in numbers),
        description="random genes",
    )
    toward = np.full((len(cell), n_states), np.nan, np.float32) if goals is None else effects.toward
    return RandomSets(random, of, cell, which, effects.shift, effects.rank, toward), effects


def random_set_table(
    random: RandomSets, shift: np.ndarray, names: Sequence[str], vocabulary: Vocabulary
) -> pd.DataFrame:
    """One row a random set: its mean shift, and that less the perturbation's in the same cells."""
    beside = random.perturbation[random.which]
    return pd.DataFrame(
        {
            "perturbation": np.asarray(names, dtype=object)[random.perturbation],
            "genes": np.array([set_name(genes, vocabulary) for genes in random.sets], dtype=object),
            "n_cells": np.bincount(random.which, minlength=len(random.sets)),
            "rank_mean": random.mean(random.rank),
            "shift_mean": random.mean(random.shift),
            "difference": random.mean(random.shift - shift[random.cell, beside]),
        }
    )


def random_state_table(
    random: RandomSets, toward: np.ndarray, states: States, random_sets: pd.DataFrame
) -> pd.DataFrame:
    """One row a random set and state: its movement towards the state, and that less the perturbation's."""
    beside = random.perturbation[random.which]
    return pd.concat(
        [
            random_sets[["perturbation", "genes"]].assign(
                state=state,
                toward_mean=random.mean(random.toward[:, at]),
                toward_difference=random.mean(random.toward[:, at] - toward[random.cell, beside, at]),
            )
            for at, state in enumerate(states.names)
        ],
        ignore_index=True,
    )


# --- ranks and a random network ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Twin:
    """What a network of the same shape with random weights makes of the same runs.

    Parameters
    ----------
    report
        How effects follow the rank in both networks, and how far their rankings agree.
    shift
        Mean shift of each perturbation with random weights, over some of its cells, `(n_sets,)`.
    sample
        Random genes of all ranks, a row each: `rank`, and the effects in both networks.
    genes
        Their tokens.
    """

    report: dict[str, Any]
    shift: np.ndarray
    sample: pd.DataFrame
    genes: np.ndarray


def run_twin(
    experiment: Experiment,
    sets: Sequence[np.ndarray],
    cells_of: Sequence[np.ndarray],
    *,
    states: States | None,
    whole: np.ndarray | None,
    seed: int,
) -> Twin:
    """Perturb random genes of all ranks, and some cells of each perturbation, in both networks.

    Parameters
    ----------
    whole
        Means of the states in the model; those in the other network are found here.
    """
    from gfx._engine.encoder import random_twin

    twin_seed = int(stream(seed, TWIN).integers(2**31))
    twin = random_twin(experiment.encoder, experiment.cells.model.config, twin_seed)
    twin_whole = None if states is None else states.centroids(experiment.embed_states(states, encoder=twin))
    cell, genes = _genes_of_all_ranks(experiment, stream(seed, TWIN))
    some = [
        stream(seed, TWIN, one).choice(rows, min(TWIN_CELLS, len(rows)), replace=False)
        for one, rows in zip(sets, cells_of, strict=True)
    ]
    all_sets = [*genes[:, None], *sets]
    edits = experiment.edits(
        all_sets,
        np.concatenate([cell, *some]),
        np.concatenate([np.arange(len(genes)), np.repeat(np.arange(len(sets)) + len(genes), [len(r) for r in some])]),
    )
    ours = experiment.measure(edits, goals=whole, split=False, description="genes of all ranks")
    theirs = experiment.measure(edits, encoder=twin, goals=twin_whole, split=False, description="random weights")

    effects = {"shift": (ours.shift, theirs.shift)}
    if states is not None:
        goal = states.names.index(states.goal)
        effects["toward goal"] = (ours.toward[:, goal], theirs.toward[:, goal])
    means = {name: [_mean_by(edits.which, values, len(all_sets)) for values in both] for name, both in effects.items()}
    sample = pd.DataFrame({"rank": ours.rank[: len(genes)]})
    for name, both in means.items():
        column = name.replace(" ", "_")
        sample[column], sample[f"{column}_random_weights"] = (values[: len(genes)] for values in both)
    alike = _of_one_size(sets)
    report = {
        "rank_trend": rank_trend(sample["rank"].to_numpy(), sample["shift"].to_numpy()),
        "rank_trend_random_weights": rank_trend(sample["rank"].to_numpy(), sample["shift_random_weights"].to_numpy()),
        "random_weights_seed": twin_seed,
    }
    for name, (model, random) in means.items():
        of_sets = [values[len(genes) :][alike] for values in (model, random)]
        report[f"random_weights, {name}"] = {
            "spearman": spearman(model[: len(genes)], random[: len(genes)]),
            "n": len(genes),
            "spearman_perturbations": spearman(*of_sets),
            "n_perturbations": int(np.isfinite(of_sets[0]).sum()),
        }
    return Twin(report, means["shift"][1][len(genes) :], sample, genes)


def _mean_by(which: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Mean of the values of each set, in float64; NaN for sets without any."""
    counts = np.bincount(which, minlength=n)
    sums = np.bincount(which, values.astype(np.float64), minlength=n)
    return np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0)


def _of_one_size(sets: Sequence[np.ndarray]) -> np.ndarray:
    """Find the sets of the commonest size: larger ones move cells more in any network, which looks like agreement."""
    sizes = np.array([len(genes) for genes in sets])
    return np.flatnonzero(sizes == np.bincount(sizes).argmax())


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
