"""States of cells, perturbed ones and goals, and whether they are separable in the embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gfx._adata import group_name, shortened
from gfx._core.arguments import did_you_mean
from gfx._core.statistics import LOWEST_AUC, axis_auc
from gfx.tl._prepare import groups

if TYPE_CHECKING:
    from gfx.tl._prepare import Prepared


@dataclass(frozen=True)
class States:
    """Cell states: their names, the state of each cell (-1 for none), and which one is perturbed and wanted."""

    names: list[str]
    group: np.ndarray
    start: str
    goal: str

    def role(self, name: str) -> str:
        """Role of a state in the comparison."""
        return {self.start: "start", self.goal: "goal"}.get(name, "alternative")

    @property
    def is_start(self) -> np.ndarray:
        """Which cells are perturbed, bool `(n_obs,)`."""
        return self.group == self.names.index(self.start)

    @property
    def is_goal(self) -> np.ndarray:
        """Which cells are where the others should go, bool `(n_obs,)`."""
        return self.group == self.names.index(self.goal)

    def centroids(self, vectors: np.ndarray) -> np.ndarray:
        """Mean embedding of each state, float64 `(n_states, d)`."""
        group = np.where(np.isnan(vectors[:, 0]), -1, self.group)
        empty = [name for number, name in enumerate(self.names) if not (group == number).any()]
        if empty:
            msg = f"No cell of the states {empty} has a gene that the model knows; leave these cells out."
            raise ValueError(msg)
        return np.stack([vectors[group == n].mean(axis=0, dtype=np.float64) for n in range(len(self.names))])

    def axis(self, vectors: np.ndarray, donor: np.ndarray | None, rng: np.random.Generator) -> dict[str, object]:
        """Measure whether start and goal are separable in held-out cells, or donors."""
        rows = (self.is_start | self.is_goal) & ~np.isnan(vectors[:, 0])
        area, n_folds = axis_auc(vectors[rows], self.is_goal[rows], None if donor is None else donor[rows], rng)
        return {"auc": area, "n_folds": n_folds, "held_out": "cells" if donor is None else "donors"}

    def warning(self, axis: dict[str, object]) -> str | None:
        """Say what is wrong with an axis along which the states are hardly separable."""
        if np.isnan(axis["auc"]):
            return (
                f"Whether {self.start!r} and {self.goal!r} are separable could not be tested: no {axis['held_out']} "
                "can be held out with some of both states left on either side. Shifts along the line between them may "
                f"reflect differences between {axis['held_out']}."
            )
        if axis["auc"] >= LOWEST_AUC:
            return None
        return (
            f"Held-out {axis['held_out']} of {self.start!r} and {self.goal!r} are hardly separable along the line "
            f"between their centroids (AUC {axis['auc']:.2f}; chance is 0.5): shifts toward the goal mean little."
        )


def find_states(cells: Prepared, groupby: str | None, start: str | None, goal: str | None) -> States | None:
    """Read the states from `obs`; `None` if there are none asked for."""
    if groupby is None and start is None and goal is None:
        return None
    if groupby is None or start is None or goal is None:
        given = {"groupby": groupby, "start": start, "goal": goal}
        msg = f"`groupby`, `start` and `goal` go together; found {given}."
        raise ValueError(msg)
    names, group = groups(cells.adata, groupby)
    start, goal = (group_name(state, names) for state in (start, goal))
    occupied = np.unique(group[group >= 0])
    kept = [names[number] for number in occupied]  # categories without cells are no states
    for role, state in (("start", start), ("goal", goal)):
        if state not in names:
            hint = did_you_mean(state, names)
            msg = f"Did not find {role}={state!r} in `adata.obs[{groupby!r}]`.{hint} Present: {shortened(names)}."
            raise KeyError(msg)
        if state not in kept:
            msg = f"No cell is of the state {role}={state!r}. States with cells: {shortened(kept)}."
            raise ValueError(msg)
    if start == goal:
        msg = f"`start` and `goal` are both {start!r}; a cell cannot shift toward its own state."
        raise ValueError(msg)
    return States(kept, np.where(group >= 0, np.searchsorted(occupied, group), -1), start, goal)
