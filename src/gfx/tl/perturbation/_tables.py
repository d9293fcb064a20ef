"""Tables of runs: one row a perturbation, state, donor, random set, or set of several genes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._core.edits import PARTS
from gfx._core.statistics import against_random, bootstrapped, by_chance, over_donors, tail
from gfx.tl._gene_sets import set_name
from gfx.tl.perturbation._controls import BOOTSTRAP, stream

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gfx._core.vocabulary import Vocabulary
    from gfx.tl._states import States
    from gfx.tl.perturbation._experiment import Runs

#: Two measures of the excess of a set over its genes: on shifts, as the 2023 paper has it, and on displacements.
SYNERGY = {"on_shifts": ("together", "summed"), "on_vectors": ("displaced", "composed")}


def effect_table(
    names: np.ndarray,
    perturbed: Runs,
    random: Runs | None,
    random_weights: np.ndarray,
    baselines: Mapping[str, np.ndarray] | None,
) -> pd.DataFrame:
    """One row a perturbation: how far cells shift, why, and what that is compared with."""
    mean = perturbed.mean(perturbed["shift"])
    return pd.DataFrame(
        {
            "perturbation": names,
            "n_cells": perturbed.n_cells,
            "shift_mean": mean,
            "shift_sd": perturbed.sd(perturbed["shift"]),
            **_means_of_parts(perturbed, perturbed.effects.get("parts")),
            "rank_mean": perturbed.mean(perturbed["rank"]),
            **compare_with_random(perturbed, mean, random, differences(random, perturbed, "shift")),
            "random_weights_shift_mean": random_weights,
            **{
                column: np.nan if baselines is None else baselines[name]
                for name, column in (("detection", "detection"), ("expression", "expression_mean"), ("logfc", "logfc"))
            },
        }
    )


def _means_of_parts(perturbed: Runs, parts: np.ndarray | None) -> dict[str, np.ndarray]:
    """Mean of each part of an effect, `(n_runs, 3)`, over cells; nothing where effects were not split."""
    return {} if parts is None else {f"{part}_mean": perturbed.mean(parts[:, at]) for at, part in enumerate(PARTS)}


def state_table(names: np.ndarray, states: States, perturbed: Runs, random: Runs | None) -> pd.DataFrame:
    """One row a perturbation and state: whether cells shift toward it, why, and compared with random sets."""
    tables = []
    for number, state in enumerate(states.names):
        toward, parts = perturbed.effect("toward", number), perturbed.effects.get("toward_parts")
        mean = perturbed.mean(toward)
        columns = {"mean": mean, "sd": perturbed.sd(toward)}
        columns |= _means_of_parts(perturbed, None if parts is None else parts[:, number])
        if perturbed["toward"].shape[1] > len(states.names):  # the control "centroids"
            columns["without_mean"] = perturbed.mean(perturbed.effect("toward", len(states.names) + number))
        columns |= compare_with_random(perturbed, mean, random, differences(random, perturbed, "toward", number))
        described = {"perturbation": names, "state": state, "role": states.role(state), "n_cells": perturbed.n_cells}
        tables.append(pd.DataFrame(described | {f"toward_{name}": values for name, values in columns.items()}))
    return pd.concat(tables).sort_index(kind="stable").reset_index(drop=True)


def differences(random: Runs | None, perturbed: Runs, measure: str, state: int | None = None) -> np.ndarray | None:
    """Effect of each random set less that of its perturbation in the same cells, `(n_sets,)`."""
    if random is None:
        return None
    return random.mean(random.effect(measure, state) - perturbed.effect(measure, state)[_same_cells(random, perturbed)])


def _same_cells(random: Runs, perturbed: Runs) -> np.ndarray:
    """Run of the perturbation in the same cell as each run of a random set, int `(n_runs,)`."""
    return perturbed.find(random.perturbation[random.which], random.cell)


def compare_with_random(
    perturbed: Runs, effect: np.ndarray | float, random: Runs | None, difference: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Compare the mean effect of each perturbation with its random sets: columns of a table.

    `difference` `(n_random_sets,)` is the effect of each random set less that of its perturbation in the same cells.
    """
    n = len(perturbed.sets)
    sets = {"number": [], "n_cells": [], "difference": []}
    if random is not None:
        sets = {"number": random.perturbation, "n_cells": random.n_cells, "difference": difference}
    groups = pd.DataFrame(sets, dtype=float).dropna().groupby("number")
    of_sets = groups["difference"].agg(["mean", "std", "count"]).reindex(range(n))
    z, place, null = np.full(n, np.nan), np.full(n, np.nan), {}
    for number, values in groups["difference"]:
        at, n_sets = int(number), len(values)
        z[at], of_random = against_random(values.to_numpy())
        if n_sets > 2:
            place[at], null[at] = tail(z[at], n_sets), tail(of_random, n_sets - 1)
    sizes, p = np.array([len(genes) for genes in perturbed.sets]), np.full(n, np.nan)
    for size in np.unique(sizes):  # what z is by chance is taken from random sets of the same size
        same = np.flatnonzero(sizes == size)
        pool = [null[number] for number in same if number in null]
        p[same] = by_chance(place[same], np.concatenate([np.zeros(0), *pool]))
    return {
        "random_mean": effect + of_sets["mean"].to_numpy(),
        "random_sd": of_sets["std"].to_numpy(),
        "n_random": of_sets["count"].fillna(0).to_numpy(dtype=np.int64),
        "random_n_cells": groups["n_cells"].median().reindex(range(n)).to_numpy(),
        "z": z,
        "p": p,
    }


def random_set_table(random: Runs, perturbed: Runs, names: np.ndarray, vocabulary: Vocabulary) -> pd.DataFrame:
    """One row a random set: its mean shift, and that less the perturbation's in the same cells."""
    return pd.DataFrame(
        {
            "perturbation": names[random.perturbation],
            "genes": np.array([set_name(genes, vocabulary) for genes in random.sets], dtype=object),
            "n_cells": random.n_cells,
            "rank_mean": random.mean(random["rank"]),
            "shift_mean": random.mean(random["shift"]),
            "difference": differences(random, perturbed, "shift"),
        }
    )


def random_state_table(random_sets: pd.DataFrame, random: Runs, perturbed: Runs, states: States) -> pd.DataFrame:
    """One row a random set and state: its shift toward the state, and that less the perturbation's."""
    tables = [
        random_sets[["perturbation", "genes"]].assign(
            state=state,
            toward_mean=random.mean(random.effect("toward", number)),
            toward_difference=differences(random, perturbed, "toward", number),
        )
        for number, state in enumerate(states.names)
    ]
    return pd.concat(tables, ignore_index=True)


def donor_tables(
    names: np.ndarray, states: States | None, perturbed: Runs, random: Runs | None, donor: np.ndarray
) -> dict[str, pd.DataFrame]:
    """Means over the cells of each donor: the effect, and its excess over random sets in the same cells."""

    def by_donor(which: np.ndarray, cell: np.ndarray, values: np.ndarray) -> pd.Series:
        frame = pd.DataFrame({"perturbation": which, "donor": donor[cell], "value": values.astype(np.float64)})
        return frame.groupby(["perturbation", "donor"])["value"]

    def table(measure: str, state: int | None = None) -> pd.DataFrame:
        effect = perturbed.effect(measure, state)
        groups = by_donor(perturbed.which, perturbed.cell, effect)
        columns = {"n_cells": groups.size()} | ({} if state is None else {"state": states.names[state]})
        columns |= {f"{measure}_mean": groups.mean(), f"{measure}_excess": np.nan}
        if random is not None:
            excess = effect[_same_cells(random, perturbed)] - random.effect(measure, state)
            of_random = by_donor(random.perturbation[random.which], random.cell, excess)
            columns[f"{measure}_excess"] = of_random.mean().reindex(columns["n_cells"].index)
        rows = pd.DataFrame(columns).reset_index()
        return rows.assign(perturbation=names[rows["perturbation"]])

    tables = {"donors": table("shift")}
    if states is not None:
        of_states = [table("toward", number) for number in range(len(states.names))]
        tables["donor_states"] = pd.concat(of_states, ignore_index=True)
    return tables


def synergy_table(
    names: np.ndarray, perturbed: Runs, random: Runs | None, *, donor: np.ndarray | None, seed: int
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """One row a set of several genes that some cell has: together, summed, the excess by both measures and its z-score.

    Also returned, by measure: the excess of each random set less that of its perturbation in the same cells.
    """
    excess = {measure: perturbed[whole] - perturbed[parts] for measure, (whole, parts) in SYNERGY.items()}
    difference, compared = {}, {}
    for measure, (whole, parts) in SYNERGY.items():
        if random is not None:  # whose sets may all be single genes
            of_random = random[whole] - random[parts] if whole in random.effects else np.full(len(random), np.nan)
            of_random = random.mean(of_random - excess[measure][_same_cells(random, perturbed)])
            difference[f"{measure}_difference"] = of_random
        compared[measure] = compare_with_random(perturbed, np.nan, random, difference.get(f"{measure}_difference"))
    rows = []
    for number in np.unique(perturbed.which):
        if len(perturbed.sets[number]) == 1:
            continue
        own = np.flatnonzero(perturbed.which == number)
        row = {"perturbation": names[number], "n_cells": len(own)}
        for name in ("together", "summed", "displaced", "composed"):
            row[f"{name}_mean"] = perturbed[name][own].mean(dtype=np.float64)
        row["interval_over"] = "cells" if donor is None else "donors"
        rng = stream(seed, BOOTSTRAP, perturbed.sets[number])
        for measure in SYNERGY:
            values = excess[measure][own]
            if donor is None:
                interval = bootstrapped(values, rng)
            else:
                interval = over_donors(pd.Series(values).groupby(donor[perturbed.cell[own]]).mean().to_numpy())
            columns = {"mean": float(np.mean(values, dtype=np.float64)), "low": interval.low, "high": interval.high}
            columns |= {name: compared[measure][name][number] for name in ("z", "p")}
            row |= {f"{measure}_{name}": value for name, value in columns.items()}
        rows.append(row)
    return pd.DataFrame(rows), difference
