"""Genes perturbed together, against each of them by itself in the same cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._core.statistics import over_cells, over_donors
from gfx._core.synergy import synergy
from gfx.tl._controls import BOOTSTRAP, stream
from gfx.tl._perturbation_tables import places_among

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gfx._core.synergy import Synergy
    from gfx._engine.perturb import EditEffects
    from gfx.tl._controls import RandomSets
    from gfx.tl._experiment import Experiment
    from gfx.tl._gene_sets import GeneSets

#: Two measures of the excess of a set over its genes: on shifts, as the 2023 paper has it, and on displacements.
MEASURES = ("on_shifts", "on_vectors")


def find_synergy(
    experiment: Experiment,
    sets: Sequence[np.ndarray],
    cell: np.ndarray,
    which: np.ndarray,
    effects: EditEffects,
) -> dict[int, tuple[np.ndarray, Synergy]]:
    """Compare each set of several genes with its genes, cell by cell.

    Parameters
    ----------
    cell, which
        Cell and set of each run, `(n_runs,)`.
    effects
        Of these runs, vectors kept.

    Returns
    -------
    For the number of each such set, its cells and what was found there.
    """
    several = np.flatnonzero([len(sets[at]) > 1 for at in which]) if len(which) else np.zeros(0, dtype=np.int64)
    if not len(several):
        return {}
    # Each gene once in each cell, however many sets it is in.
    sizes = np.array([len(sets[at]) for at in which[several]])
    genes_of = np.concatenate([sets[at] for at in which[several]])
    wanted = np.column_stack([np.repeat(cell[several], sizes), genes_of])
    unique, index = np.unique(wanted, axis=0, return_inverse=True)
    genes, number = np.unique(unique[:, 1], return_inverse=True)
    singles = experiment.measure(
        experiment.edits(list(genes[:, None]), unique[:, 0], number),
        split=False,
        keep_vectors=True,
        description="genes one by one",
    )
    found, first = {}, np.cumsum([0, *sizes])
    for at in np.unique(which[several]):
        runs = np.flatnonzero(which[several] == at)
        of_genes = index.ravel()[first[runs][:, None] + np.arange(len(sets[at]))].T  # genes × cells
        vectors = effects.vectors[several[runs]]
        # Each displacement from its own start: inserting one gene cuts fewer off a full cell than inserting them all.
        moved = singles.vectors[of_genes, 1] - singles.vectors[of_genes, 0]
        found[int(at)] = (
            cell[several[runs]],
            synergy(
                vectors[:, 0],
                vectors[:, 1],
                vectors[:, 0] + moved,
                effects.shift[several[runs]],
                singles.shift[of_genes],
            ),
        )
    return found


def excess_of_random_sets(
    found: dict[int, tuple[np.ndarray, Synergy]], of_random: dict[int, tuple[np.ndarray, Synergy]], random: RandomSets
) -> dict[str, np.ndarray]:
    """Excess of each random set less that of its perturbation in the same cells, by measure; NaN for single genes."""
    out = {measure: np.full(len(random.sets), np.nan) for measure in MEASURES}
    for number, (its_cells, other) in of_random.items():
        cells, own = found[int(random.perturbation[number])]
        at = np.searchsorted(cells, its_cells)  # cells of a perturbation are in the order of the object
        for measure, differences in out.items():
            differences[number] = np.mean(getattr(other, measure) - getattr(own, measure)[at], dtype=np.float64)
    return out


def synergy_table(
    sets: GeneSets,
    found: dict[int, tuple[np.ndarray, Synergy]],
    excess_of_random: dict[str, np.ndarray],
    random: RandomSets | None,
    *,
    donor: np.ndarray | None,
    seed: int,
) -> pd.DataFrame:
    """One row a set: together, summed, the excess by both measures, its interval and its place among random sets."""
    numbers, none = sorted(found), [np.zeros(0)] * len(sets)
    rows = []
    for at in numbers:
        cells, excess = found[at]
        row = {
            "perturbation": sets.names[at],
            "n_cells": len(cells),
            **{
                f"{name}_mean": getattr(excess, name).mean(dtype=np.float64)
                for name in ("together", "summed", "displaced", "composed")
            },
            "interval_over": "cells" if donor is None else "donors",
        }
        rng = stream(seed, BOOTSTRAP, sets.tokens[at])
        for measure in MEASURES:
            values = getattr(excess, measure)
            if donor is None:
                interval = over_cells(values, rng)
            else:
                interval = over_donors(pd.Series(values).groupby(donor[cells]).mean().to_numpy())
            row[f"{measure}_mean"] = float(np.mean(values, dtype=np.float64))
            row |= {f"{measure}_low": interval.low, f"{measure}_high": interval.high}
        rows.append(row)
    table = pd.DataFrame(rows)
    for measure in MEASURES:
        differences = none if random is None else random.of_each(len(sets), excess_of_random[measure])
        sizes = [len(sets.tokens[at]) for at in numbers]
        places = places_among([differences[at] for at in numbers], sizes, [np.zeros(0)] * len(numbers))
        behind = table.columns.get_loc(f"{measure}_high") + 1
        table.insert(behind, f"{measure}_z", places["z"])
        table.insert(behind + 1, f"{measure}_p", places["p"])
    return table
