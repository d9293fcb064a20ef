"""Genes perturbed together, compared with each of them by itself in the same cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._core.statistics import over_cells, over_donors
from gfx.tl.perturbation._controls import BOOTSTRAP, stream
from gfx.tl.perturbation._tables import places_among

if TYPE_CHECKING:
    from gfx.tl._gene_sets import GeneSets
    from gfx.tl.perturbation._controls import RandomSets
    from gfx.tl.perturbation._experiment import Runs

#: Two measures of the excess of a set over its genes: on shifts, as the 2023 paper has it, and on displacements.
MEASURES = {"on_shifts": ("together", "summed"), "on_vectors": ("displaced", "composed")}


def synergy_table(
    sets: GeneSets, runs: Runs, random: RandomSets | None, *, donor: np.ndarray | None, seed: int
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """One row a set of several genes that some cell has: together, summed, the excess by both measures and its z-score.

    Beside it, by measure, the excess of each random set less that of its perturbation in the same cells.
    """
    excess = {measure: runs[whole] - runs[parts] for measure, (whole, parts) in MEASURES.items()}
    differences = {} if random is None else {m: _difference(runs, random, m, excess[m]) for m in MEASURES}
    numbers = [number for number in np.unique(runs.which) if len(sets.tokens[number]) > 1]
    rows = []
    for number in numbers:
        own = np.flatnonzero(runs.which == number)
        row = {
            "perturbation": sets.names[number],
            "n_cells": len(own),
            **{
                f"{name}_mean": runs[name][own].mean(dtype=np.float64)
                for name in ("together", "summed", "displaced", "composed")
            },
            "interval_over": "cells" if donor is None else "donors",
        }
        rng = stream(seed, BOOTSTRAP, sets.tokens[number])
        for measure in MEASURES:
            values = excess[measure][own]
            if donor is None:
                interval = over_cells(values, rng)
            else:
                interval = over_donors(pd.Series(values).groupby(donor[runs.cell[own]]).mean().to_numpy())
            row[f"{measure}_mean"] = float(np.mean(values, dtype=np.float64))
            row |= {f"{measure}_low": interval.low, f"{measure}_high": interval.high}
        rows.append(row)
    table = pd.DataFrame(rows)
    for measure in MEASURES:
        none = [np.zeros(0)] * len(sets)
        of_sets = none if random is None else random.of_each(len(sets), differences[measure])
        sizes = [len(sets.tokens[number]) for number in numbers]
        places = places_among([of_sets[number] for number in numbers], sizes, [np.zeros(0)] * len(numbers))
        behind = table.columns.get_loc(f"{measure}_high") + 1
        table.insert(behind, f"{measure}_z", places["z"])
        table.insert(behind + 1, f"{measure}_p", places["p"])
    return table, {f"{measure}_difference": values for measure, values in differences.items()}


def _difference(runs: Runs, random: RandomSets, measure: str, excess: np.ndarray) -> np.ndarray:
    """Excess of each random set less that of its perturbation in the same cells, `(n_sets,)`; NaN for single genes."""
    whole, parts = (random.runs.effects.get(name) for name in MEASURES[measure])
    if whole is None:
        return np.full(len(random.runs.sets), np.nan)
    own = pd.Series(excess, pd.MultiIndex.from_arrays([runs.which, runs.cell]))
    of_perturbation = own.reindex(pd.MultiIndex.from_arrays([random.beside, random.runs.cell])).to_numpy()
    return random.runs.mean(whole - parts - of_perturbation)
