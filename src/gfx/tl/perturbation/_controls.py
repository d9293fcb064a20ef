"""Controls of perturbations: rank-matched random gene sets, and a model with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._core.matched_sets import draw_matched_sets
from gfx._core.statistics import rank_trend, spearman
from gfx.tl._gene_sets import set_name
from gfx.tl.perturbation._experiment import Runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.run import Network
    from gfx.tl._states import States
    from gfx.tl.perturbation._experiment import Experiment

#: Cells that each random set is perturbed in at most.
CELLS_PER_SET = 8

#: Random genes of all ranks, perturbed by the model and by the random-weights model.
N_RANK_SAMPLE = 200

#: Cells of each perturbation that the random-weights model sees.
CELLS_OF_RANDOM_WEIGHTS = 50

#: Streams of random numbers: what is drawn for one purpose must not depend on what else is asked for.
AXIS, RANDOM_WEIGHTS, SETS, BOOTSTRAP = range(4)


def stream(seed: int, use: int, genes: Sequence[int] = ()) -> np.random.Generator:
    """Random numbers for one use and one set of genes, whatever others there are."""
    return np.random.default_rng([seed, use, *sorted(int(gene) for gene in genes)])


# --- random sets of genes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomSets:
    """Rank-matched random gene sets of each perturbation.

    Parameters
    ----------
    runs
        Their runs.
    perturbation
        Number of the perturbation that each set is matched to, ascending, int `(n_sets,)`.
    """

    runs: Runs
    perturbation: np.ndarray

    @property
    def beside(self) -> np.ndarray:
        """Number of the perturbation that each run is compared with, int `(n_runs,)`."""
        return self.perturbation[self.runs.which]

    def of_each(self, n: int, values: np.ndarray) -> list[np.ndarray]:
        """Cut one value a set into one array for each of `n` perturbations."""
        return np.split(values, np.searchsorted(self.perturbation, np.arange(1, n)))


def draw_random_sets(
    experiment: Experiment,
    sets: Sequence[np.ndarray],
    cells_of: Sequence[np.ndarray],
    *,
    n_sets: int,
    seed: int,
) -> RandomSets:
    """Draw, for each set, random sets of neighbouring rank in the same cells."""
    tokens, vocabulary = experiment.cells.tokens, experiment.cells.model.vocabulary
    random, perturbation, cell, which = [], [], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number, (genes, rows) in enumerate(zip(sets, cells_of, strict=True)):
        drawn = draw_matched_sets(
            tokens.ids,
            tokens.lengths,
            genes,
            rows,
            vocabulary,
            n_sets=n_sets,
            cells_per_set=CELLS_PER_SET,
            rng=stream(seed, SETS, genes),
        )
        cell.append(drawn.cell)
        which.append(drawn.which + len(random))
        random += list(drawn.sets)
        perturbation += [number] * len(drawn.sets)
    of_set = np.array(perturbation, dtype=np.int64)
    which = np.concatenate(which)
    # Shifts of other genes are added up for each perturbation, over all of its random sets.
    return RandomSets(Runs(random, np.concatenate(cell), which, of_set[which], len(sets)), of_set)


def random_set_table(
    random: RandomSets, shift: np.ndarray, names: Sequence[str], vocabulary: Vocabulary
) -> pd.DataFrame:
    """One row a random set: its mean shift, and that less the perturbation's in the same cells."""
    runs = random.runs
    return pd.DataFrame(
        {
            "perturbation": np.asarray(names, dtype=object)[random.perturbation],
            "genes": np.array([set_name(genes, vocabulary) for genes in runs.sets], dtype=object),
            "n_cells": np.bincount(runs.which, minlength=len(runs.sets)),
            "rank_mean": runs.mean(runs["rank"]),
            "shift_mean": runs.mean(runs["shift"]),
            "difference": runs.mean(runs["shift"] - shift[runs.cell, random.beside]),
        }
    )


def random_state_table(
    random: RandomSets, toward: np.ndarray, states: States, random_sets: pd.DataFrame
) -> pd.DataFrame:
    """One row a random set and state: its shift toward the state, and that less the perturbation's."""
    runs = random.runs
    return pd.concat(
        [
            random_sets[["perturbation", "genes"]].assign(
                state=state,
                toward_mean=runs.mean(runs["toward"][:, number]),
                toward_difference=runs.mean(runs["toward"][:, number] - toward[runs.cell, random.beside, number]),
            )
            for number, state in enumerate(states.names)
        ],
        ignore_index=True,
    )


# --- random weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomWeightsControl:
    """The same runs with the model and with random weights: random genes of all ranks, and some of each perturbation.

    Parameters
    ----------
    network
        The random-weights model.
    model, random
        Runs of both networks, the same ones; their first sets are the random genes.
    genes
        Tokens of the random genes, `(n_genes,)`.
    """

    network: Network
    model: Runs
    random: Runs
    genes: np.ndarray

    @property
    def shift_of_sets(self) -> np.ndarray:
        """Mean shift of each perturbation with random weights, over some of its cells, `(n_sets,)`."""
        return self.random.mean(self.random["shift"])[len(self.genes) :]

    def compare(self, states: States | None) -> tuple[list[tuple[str, str, str, float, int]], pd.DataFrame]:
        """Compare both networks.

        Returns
        -------
        Rows of the table of controls: how the shift follows the rank in both networks, and how far their rankings
        agree. And one row for each random gene of all ranks: `rank`, and its effects in both networks.
        """
        n, sets = len(self.genes), self.model.sets[len(self.genes) :]
        effects = {"shift": [runs["shift"] for runs in (self.model, self.random)]}
        if states is not None:
            goal = states.names.index(states.goal)
            effects["toward"] = [runs["toward"][:, goal] for runs in (self.model, self.random)]
        sample = pd.DataFrame({"rank": self.model["rank"][:n]})
        rows = []
        alike = _of_one_size(sets)
        for measure, values in effects.items():
            means = [runs.mean(of_runs) for runs, of_runs in zip((self.model, self.random), values, strict=True)]
            sample[measure], sample[f"random_weights_{measure}"] = (mean[:n] for mean in means)
            of_sets = [mean[n:][alike] for mean in means]
            agreement = spearman(*(mean[:n] for mean in means)), spearman(*of_sets)
            rows.append(("random_weights", measure, "spearman", agreement[0], n))
            rows.append(
                ("random_weights", measure, "spearman_perturbations", agreement[1], int(np.isfinite(of_sets[0]).sum()))
            )
        for control, prefix, column in (("random_weights", "rank_", "random_weights_shift"), ("rank", "", "shift")):
            trend = rank_trend(sample["rank"].to_numpy(), sample[column].to_numpy())
            rows += [(control, "shift", f"{prefix}{name}", trend[name], trend["n"]) for name in ("spearman", "slope")]
        return rows, sample


def random_weights_control(
    experiment: Experiment, sets: Sequence[np.ndarray], cells_of: Sequence[np.ndarray], seed: int
) -> RandomWeightsControl:
    """Draw random genes of all ranks, some cells of each perturbation, and random weights."""
    rng = stream(seed, RANDOM_WEIGHTS)
    network = experiment.network.randomized(int(rng.integers(2**31)))
    cell, genes = _genes_of_all_ranks(experiment, stream(seed, RANDOM_WEIGHTS))
    chosen = [
        stream(seed, RANDOM_WEIGHTS, one).choice(rows, min(CELLS_OF_RANDOM_WEIGHTS, len(rows)), replace=False)
        for one, rows in zip(sets, cells_of, strict=True)
    ]
    all_sets, rows_of = [*genes[:, None], *sets], [*cell[:, None], *chosen]
    model, random = experiment.runs(all_sets, rows_of), experiment.runs(all_sets, rows_of)
    return RandomWeightsControl(network, model, random, genes)


def _of_one_size(sets: Sequence[np.ndarray]) -> np.ndarray:
    """Find the sets of the commonest size: larger ones shift cells more in any network, which looks like agreement."""
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
