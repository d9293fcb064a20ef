"""From the effects of single runs to arrays of cells, and to one row a perturbation, state or donor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._core.statistics import against_random

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gfx._engine.perturb import EditEffects
    from gfx.tl._cell_states import States
    from gfx.tl._controls import RandomSets

PARTS = ("composition", "position", "context")


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
    def of(cls, effects: EditEffects, cell: np.ndarray, which: np.ndarray, n_obs: int, n_sets: int) -> CellEffects:
        """Lay the effects of runs out by cell and perturbation."""

        def lay_out(values: np.ndarray) -> np.ndarray:
            out = np.full((n_obs, n_sets, *values.shape[1:]), np.nan, dtype=np.float32)
            out[cell, which] = values
            return out

        return cls(*(lay_out(getattr(effects, name)) for name in cls.__dataclass_fields__))


def effect_table(
    names: Sequence[str],
    effects: CellEffects,
    baselines: Mapping[str, np.ndarray],
    random_weights: np.ndarray,
    random_sets: pd.DataFrame,
) -> pd.DataFrame:
    """One row a perturbation: how far cells move, why, and what that has to be held against."""
    columns: dict[str, object] = {"perturbation": np.asarray(names, dtype=object), "n_cells": _count(effects.shift)}
    columns |= {"shift_mean": _mean(effects.shift), "shift_sd": _sd(effects.shift)}
    columns |= {f"{part}_mean": _mean(effects.parts[..., at]) for at, part in enumerate(PARTS)}
    columns["rank_mean"] = _mean(effects.rank)
    table = pd.DataFrame(columns)
    differences = [
        random_sets.loc[random_sets["perturbation"] == name, "difference"].to_numpy()
        if len(random_sets)
        else np.empty(0)
        for name in names
    ]
    table = pd.concat([table, _beside_random(table["shift_mean"].to_numpy(), differences)], axis=1)
    return table.assign(
        shift_random_weights=random_weights,
        detection=baselines["detection"],
        expression_mean=baselines["expression"],
        logfc=baselines["logfc"],
    )


def state_table(
    names: Sequence[str],
    states: States,
    effects: CellEffects,
    random_sets: pd.DataFrame,
    random_states: np.ndarray,
) -> pd.DataFrame:
    """One row a perturbation and state: whether cells move towards it, why, and beside random sets."""
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
        differences = [
            random_states[(random_sets["perturbation"] == name).to_numpy(), at, 1] if len(random_sets) else np.empty(0)
            for name in names
        ]
        beside = _beside_random(table["toward_mean"].to_numpy(), differences).add_prefix("toward_")
        parts.append(pd.concat([table, beside], axis=1))
    together = pd.concat(parts)
    order = np.argsort(np.tile(np.arange(len(names)), len(states.names)), kind="stable")
    return together.iloc[order].reset_index(drop=True)


def random_state_table(random_sets: pd.DataFrame, states: States, moved: np.ndarray) -> pd.DataFrame:
    """One row a random set and state: its movement towards the state, and that less the perturbation's."""
    return pd.concat(
        [
            random_sets[["perturbation", "genes"]].assign(
                state=state, toward_mean=moved[:, at, 0], toward_difference=moved[:, at, 1]
            )
            for at, state in enumerate(states.names)
        ],
        ignore_index=True,
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

    def excess(values: np.ndarray, of_random: np.ndarray) -> np.ndarray:
        if random is None:
            return np.full(len(rows), np.nan)
        beside = random.perturbation[random.which]
        return _by_donor(rows, beside, donor[random.cell], values[random.cell, beside] - of_random)

    moved = None if random is None else random.effects
    tables = {
        "donors": shown.assign(
            shift_mean=mean(effects.shift), shift_excess=excess(effects.shift, None if moved is None else moved.shift)
        )
    }
    if states is not None:
        tables["donor_states"] = pd.concat(
            [
                shown.assign(
                    state=state,
                    toward_mean=mean(effects.toward[:, :, at]),
                    toward_excess=excess(effects.toward[:, :, at], None if moved is None else moved.toward[:, at]),
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


def _beside_random(effect: np.ndarray, differences: Sequence[np.ndarray]) -> pd.DataFrame:
    """Tell what random sets do in the same cells, and the place of the effect among them."""
    places = [against_random(one) for one in differences]
    n = np.array([len(one) for one in differences], dtype=np.int64)
    mean = np.array([one.mean() if len(one) else np.nan for one in differences])
    sd = np.array([one.std(ddof=1) if len(one) > 1 else np.nan for one in differences])
    return pd.DataFrame(
        {
            "random_mean": effect + mean,
            "random_sd": sd,
            "n_random": n,
            "z": [z for z, _ in places],
            "p": [p for _, p in places],
        }
    )


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
