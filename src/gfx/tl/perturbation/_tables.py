"""From the effects of single runs to arrays of cells, and to one row a perturbation, state or donor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._core.edits import PARTS
from gfx._core.statistics import against_random, by_chance

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gfx.tl._states import States
    from gfx.tl.perturbation._controls import RandomSets
    from gfx.tl.perturbation._experiment import Runs


@dataclass(frozen=True)
class CellEffects:
    """Effects by cell and perturbation, float32; NaN where a cell was not perturbed.

    Parameters
    ----------
    shift
        `(n_obs, n_perturbations)`
    parts
        `(n_obs, n_perturbations, 3)`
    toward
        `(n_obs, n_perturbations, n_states)`
    toward_parts
        `(n_obs, n_perturbations, n_states, 3)`
    rank
        `(n_obs, n_perturbations)`
    """

    shift: np.ndarray
    parts: np.ndarray
    toward: np.ndarray
    toward_parts: np.ndarray
    rank: np.ndarray

    @classmethod
    def of(cls, runs: Runs, n_obs: int, n_sets: int, n_states: int) -> CellEffects:
        """Lay the effects of runs where their cell and perturbation are."""
        behind = {"shift": (), "parts": (3,), "toward": (n_states,), "toward_parts": (n_states, 3), "rank": ()}
        arrays = {name: np.full((n_obs, n_sets, *shape), np.nan, dtype=np.float32) for name, shape in behind.items()}
        for name, values in arrays.items():
            if name in runs.effects:
                effects = runs[name]
                values[runs.cell, runs.which] = effects[:, :n_states] if name.startswith("toward") else effects
        return cls(**arrays)


def effect_table(
    names: Sequence[str],
    effects: CellEffects,
    baselines: Mapping[str, np.ndarray] | None,
    random_weights: np.ndarray,
    beside: pd.DataFrame,
) -> pd.DataFrame:
    """One row a perturbation: how far cells shift, why, and what that is compared with."""
    columns: dict[str, object] = {"perturbation": np.asarray(names, dtype=object), "n_cells": _count(effects.shift)}
    columns |= {"shift_mean": _mean(effects.shift), "shift_sd": _sd(effects.shift)}
    columns |= {f"{part}_mean": _mean(effects.parts[..., at]) for at, part in enumerate(PARTS)}
    columns["rank_mean"] = _mean(effects.rank)
    table = pd.DataFrame(columns)
    table = pd.concat([table, beside_random(table["shift_mean"], beside)], axis=1)
    table["random_weights_shift_mean"] = random_weights
    for name, column in (("detection", "detection"), ("expression", "expression_mean"), ("logfc", "logfc")):
        table[column] = np.nan if baselines is None else baselines[name]
    return table


def state_table(
    names: Sequence[str], states: States, effects: CellEffects, beside: Sequence[pd.DataFrame], runs: Runs
) -> pd.DataFrame:
    """One row a perturbation and state: whether cells shift toward it, why, and beside random sets."""
    parts = []
    for at, state in enumerate(states.names):
        toward = effects.toward[:, :, at]
        table = pd.DataFrame(
            {
                "perturbation": np.asarray(names, dtype=object),
                "state": state,
                "role": states.role(state),
                "n_cells": _count(toward),
                "toward_mean": _mean(toward),
                "toward_sd": _sd(toward),
                **{
                    f"toward_{part}_mean": _mean(effects.toward_parts[:, :, at, number])
                    for number, part in enumerate(PARTS)
                },
            }
        )
        if runs["toward"].shape[1] > len(states.names):  # the control "centroids"
            without = np.full((len(effects.shift), len(names)), np.nan, dtype=np.float32)
            without[runs.cell, runs.which] = runs["toward"][:, len(states.names) + at]
            table["toward_without_mean"] = _mean(without)
        random = beside_random(table["toward_mean"], beside[at]).add_prefix("toward_")
        parts.append(pd.concat([table, random], axis=1))
    return pd.concat(parts).sort_index(kind="stable").reset_index(drop=True)


def places_among(
    differences: Sequence[np.ndarray], n_genes: Sequence[int], n_cells: Sequence[np.ndarray]
) -> pd.DataFrame:
    """Where each perturbation stands among its random sets, one row each.

    Parameters
    ----------
    differences
        Effect of each random set less that of the perturbation, one array a perturbation.
    n_genes
        Genes in each perturbation: what z is by chance is taken from random sets of the same size.
    n_cells
        Cells behind each random set, one array a perturbation.
    """
    found = [against_random(one) for one in differences]
    z, sizes = np.array([one for one, _ in found]), np.array(n_genes)
    p = np.full(len(z), np.nan)
    for size in np.unique(sizes):
        mine = np.flatnonzero(sizes == size)
        p[mine] = by_chance(z[mine], np.concatenate([found[at][1] for at in mine]))
    known = [one[~np.isnan(one)] for one in differences]
    return pd.DataFrame(
        {
            "mean": [one.mean() if len(one) else np.nan for one in known],
            "sd": [one.std(ddof=1) if len(one) > 1 else np.nan for one in known],
            "n": [len(one) for one in known],
            "n_cells": [
                float(np.median(cells)) if len(cells) and len(one) else np.nan
                for cells, one in zip(n_cells, known, strict=True)
            ],
            "z": z,
            "p": p,
        }
    )


def beside_random(effect: pd.Series, places: pd.DataFrame) -> pd.DataFrame:
    """Columns on random sets: what they do in the same cells, their spread about the perturbation, their number."""
    return pd.DataFrame(
        {
            "random_mean": effect + places["mean"],
            "random_sd": places["sd"],
            "n_random": places["n"],
            "random_n_cells": places["n_cells"],
            "z": places["z"],
            "p": places["p"],
        }
    )


def donor_tables(
    names: Sequence[str], states: States | None, effects: CellEffects, donor: np.ndarray, random: RandomSets | None
) -> dict[str, pd.DataFrame]:
    """Means over the cells of each donor: the effect, and its excess over random sets in the same cells."""
    cell, which = np.nonzero(~np.isnan(effects.shift))
    of = pd.DataFrame({"perturbation": which, "donor": donor[cell]}).groupby(["perturbation", "donor"], observed=True)
    rows = of.size().rename("n_cells").reset_index()
    shown = rows.assign(perturbation=np.asarray(names, dtype=object)[rows["perturbation"]])

    def mean(values: np.ndarray) -> np.ndarray:
        return _by_donor(rows, which, donor[cell], values[cell, which])

    def excess(values: np.ndarray, name: str, at: int | None = None) -> np.ndarray:
        if random is None:
            return np.full(len(rows), np.nan)
        of_random, cells = random.runs[name], random.runs.cell
        of_random = of_random if at is None else of_random[:, at]
        return _by_donor(rows, random.beside, donor[cells], values[cells, random.beside] - of_random)

    tables = {"donors": shown.assign(shift_mean=mean(effects.shift), shift_excess=excess(effects.shift, "shift"))}
    if states is not None:
        tables["donor_states"] = pd.concat(
            [
                shown.assign(
                    state=state,
                    toward_mean=mean(effects.toward[:, :, at]),
                    toward_excess=excess(effects.toward[:, :, at], "toward", at),
                )
                for at, state in enumerate(states.names)
            ],
            ignore_index=True,
        )
    return tables


def _by_donor(rows: pd.DataFrame, which: np.ndarray, donor: np.ndarray, values: np.ndarray) -> np.ndarray:
    frame = pd.DataFrame({"perturbation": which, "donor": donor, "value": values.astype(np.float64)})
    means = frame.groupby(["perturbation", "donor"], observed=True)["value"].mean()
    return means.reindex(pd.MultiIndex.from_frame(rows[["perturbation", "donor"]])).to_numpy()


def _count(values: np.ndarray) -> np.ndarray:
    return (~np.isnan(values)).sum(axis=0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over cells in float64; NaN where there is none."""
    n = _count(values)
    return np.divide(np.nansum(values, axis=0, dtype=np.float64), n, out=np.full(values.shape[1], np.nan), where=n > 0)


def _sd(values: np.ndarray) -> np.ndarray:
    """Take the standard deviation over cells; NaN for fewer than two."""
    n = _count(values)
    squares = np.nansum((values - _mean(values)) ** 2, axis=0, dtype=np.float64)
    return np.sqrt(np.divide(squares, n - 1, out=np.full(values.shape[1], np.nan), where=n > 1))
