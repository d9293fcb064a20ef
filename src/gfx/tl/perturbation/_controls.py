"""Controls of perturbations: rank-matched random gene sets, and a model with random weights."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._core.matched_sets import draw_matched_sets
from gfx._core.statistics import rank_trend, spearman

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gfx.tl.perturbation._experiment import Experiment, Runs

#: Random sets of a perturbation, and cells that each is perturbed in, at most.
N_SETS, CELLS_PER_SET = 50, 8

#: Random genes of all ranks, perturbed by the model and by the random-weights model.
N_RANK_SAMPLE = 100

#: Cells of each perturbation that the random-weights model sees, and their largest share of all.
CELLS_OF_RANDOM_WEIGHTS, SHARE_OF_RANDOM_WEIGHTS = 10, 0.25

#: Streams of random numbers: what is drawn for one purpose must not depend on what else is asked for.
AXIS, RANDOM_WEIGHTS, SETS, BOOTSTRAP = range(4)


def stream(seed: int, use: int, genes: Sequence[int] = ()) -> np.random.Generator:
    """Random numbers for one use and one set of genes, whatever others there are."""
    return np.random.default_rng([seed, use, *sorted(int(gene) for gene in genes)])


def random_set_runs(
    experiment: Experiment,
    sets: Sequence[np.ndarray],
    cells_of: Sequence[np.ndarray],
    *,
    n_sets: int | None,
    seed: int,
) -> Runs:
    """Draw, for each perturbation, random sets of neighbouring rank in the same cells.

    If their number is not given, they take as many passes as the perturbation itself, less those of the random-weights
    model, or fewer.
    """
    tokens, vocabulary = experiment.cells.tokens, experiment.cells.model.vocabulary
    random, rows_of, n_drawn = [], [], []
    for genes, rows in zip(sets, cells_of, strict=True):
        n, n_cells = n_sets, CELLS_PER_SET
        if n_sets is None:
            n_runs = len(rows) - _n_of_random_weights(rows)
            n = min(N_SETS, n_runs)
            n_cells = min(n_runs // max(n, 1), CELLS_PER_SET)
        drawn = draw_matched_sets(
            tokens,
            genes,
            rows,
            vocabulary,
            n_sets=n,
            cells_per_set=n_cells,
            rng=stream(seed, SETS, genes),
        )
        random += map(np.array, drawn)
        rows_of += drawn.values()
        n_drawn.append(len(drawn))
    return experiment.runs(random, rows_of, np.repeat(np.arange(len(sets)), n_drawn), len(sets))


def random_weights_runs(
    experiment: Experiment, sets: Sequence[np.ndarray], cells_of: Sequence[np.ndarray], seed: int
) -> tuple[Runs, Runs]:
    """Draw random genes of all ranks, one run each, and some cells of each perturbation.

    The model runs the random genes alone, because it perturbs all cells of a perturbation anyway; the random-weights
    model runs both, the perturbations after the random genes.
    """
    cell, genes = _genes_of_all_ranks(experiment, stream(seed, RANDOM_WEIGHTS))
    chosen = [
        stream(seed, RANDOM_WEIGHTS, genes).choice(rows, _n_of_random_weights(rows), replace=False)
        for genes, rows in zip(sets, cells_of, strict=True)
    ]
    genes, cell = list(genes[:, None]), list(cell[:, None])
    return experiment.runs(genes, cell), experiment.runs([*genes, *sets], [*cell, *chosen])


def _n_of_random_weights(rows: np.ndarray) -> int:
    """Count the cells of a perturbation that the random-weights model sees."""
    return min(CELLS_OF_RANDOM_WEIGHTS, ceil(SHARE_OF_RANDOM_WEIGHTS * len(rows)))


def _genes_of_all_ranks(experiment: Experiment, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw cells, and in each a gene at any rank: rows and tokens, `(n,)`."""
    tokens, vocabulary = experiment.cells.tokens, experiment.cells.model.vocabulary
    n_genes = experiment.lengths - vocabulary.n_specials
    usable = np.flatnonzero(n_genes > 1)  # one gene alone leaves nothing to compare
    if not len(usable):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    cell = rng.choice(usable, N_RANK_SAMPLE)
    place = vocabulary.first_gene + rng.integers(n_genes[cell])
    return cell, tokens.values[tokens.begins[cell] + place].astype(np.int64)


def compare_networks(
    perturbed: Runs, model: Runs, random: Runs, goal: int | None
) -> tuple[list[tuple[str, str, str, float, int]], pd.DataFrame]:
    """Compare the model with the random-weights model in the same runs, see :func:`random_weights_runs`.

    Returns rows of the table of controls: how the shift follows the rank in both networks, and how far their rankings
    agree. And one row for each random gene of all ranks: `rank`, and its effects in both networks.
    """
    n = len(model.sets)
    same = perturbed.find(random.which[n:] - n, random.cell[n:])  # runs of the model in the same cells
    sizes = np.array([len(genes) for genes in perturbed.sets])
    # Larger sets shift cells more in any network, which looks like agreement: compare sets of the commonest size.
    alike = n + np.flatnonzero(sizes == np.bincount(sizes).argmax())
    sample, rows = pd.DataFrame({"rank": model["rank"]}), []
    for measure in ("shift",) if goal is None else ("shift", "toward"):
        of_model = np.concatenate([model.effect(measure, goal), perturbed.effect(measure, goal)[same]])
        means = [random.mean(values) for values in (of_model, random.effect(measure, goal))]
        sample[measure], sample[f"random_weights_{measure}"] = (mean[:n] for mean in means)
        of_sets = [mean[alike] for mean in means]
        n_known = int(np.isfinite(of_sets[0]).sum())
        rows.append(("random_weights", measure, "spearman", spearman(*(mean[:n] for mean in means)), n))
        rows.append(("random_weights", measure, "spearman_perturbations", spearman(*of_sets), n_known))
    for control, prefix, column in (("random_weights", "rank_", "random_weights_shift"), ("rank", "", "shift")):
        trend = rank_trend(sample["rank"].to_numpy(), sample[column].to_numpy())
        rows += [(control, "shift", f"{prefix}{name}", trend[name], trend["n"]) for name in ("spearman", "slope")]
    return rows, sample
