"""Classes of cells from columns of `obs`, and the donors that must not be torn apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gfx import _log
from gfx._adata import obs_column
from gfx._core.folds import folds
from gfx.tl._cross_validation import NOTHING
from gfx.tl._prepare import classes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gfx.tl._prepare import Prepared


@dataclass(frozen=True)
class CellTask:
    """Cells with a class.

    Parameters
    ----------
    cells
        All cells, and the model.
    tasks
        Names of the classes of each task, a column of `obs`, sorted by name: files keep no other order.
    first
        The task that the user named first: folds have their share of its classes.
    truth
        Class of each cell in each task, int64 `(n_obs, n_tasks)`, -100 for none.
    rows
        Cells to use, in the order in which they are taken, int64 `(n_cells,)`.
    donor
        Donor of each cell, int64 `(n_obs,)`, or `None`.
    """

    cells: Prepared
    tasks: dict[str, list[str]]
    first: str
    truth: np.ndarray
    rows: np.ndarray
    donor: np.ndarray | None

    def of(self, task: str) -> np.ndarray:
        """Class of each cell in a task, int64 `(n_obs,)`."""
        return self.truth[:, list(self.tasks).index(task)]

    def donors(self, rows: np.ndarray) -> np.ndarray | None:
        """Donor of some cells."""
        return None if self.donor is None else self.donor[rows]

    def folds(self, n_splits: int, seed: int) -> np.ndarray:
        """Fold of each cell, int16 `(n_obs,)`, -1 for those that are not used."""
        out = np.full(len(self.truth), -1, dtype=np.int16)
        rows = np.sort(self.rows)
        out[rows] = folds(self.of(self.first)[rows], n_splits, seed, self.donors(rows))
        return out


def find_cell_task(
    cells: Prepared,
    groupby: str | Iterable[str],
    split_by: str | None,
    lengths: np.ndarray,
    *,
    max_cells: int | None,
    n_splits: int,
    rng: int,
) -> CellTask:
    """Read the classes, and draw the cells to use among those that have one.

    Raises
    ------
    KeyError
        No such column of `obs`.
    ValueError
        Fewer than two classes, a class with fewer cells than folds, fewer donors than folds, cells without a donor,
        classes or donors that read alike.
    """
    columns = [groupby] if isinstance(groupby, str) else [str(column) for column in groupby]
    if not columns or len(set(columns)) < len(columns):
        msg = f"`groupby` names columns of `obs`, each once; found {columns}."
        raise ValueError(msg)
    if split_by in columns:
        msg = f"`split_by={split_by!r}` is among the columns to learn: held-out donors would have no class of theirs."
        raise ValueError(msg)
    codes, names = {}, {}
    for column in columns:
        if "/" in column:
            msg = f"The column {column!r} has a '/', which files cannot hold in a name. Rename it in `obs`."
            raise ValueError(msg)
        names[column], codes[column] = classes(obs_column(cells.adata, column), f"adata.obs[{column!r}]")
    has_class = np.any([code >= 0 for code in codes.values()], axis=0) & (lengths > 0)
    rows = np.random.default_rng(rng).permutation(np.flatnonzero(has_class))[:max_cells]
    tasks, truth = {}, []
    for column in sorted(columns):
        here = codes[column][rows]
        counts = np.bincount(here[here >= 0], minlength=len(names[column]))
        present = np.flatnonzero(counts)
        tasks[column] = [names[column][at] for at in present]
        _check_classes(column, tasks[column], counts[present], n_splits)
        renumbered = np.full(len(names[column]) + 1, NOTHING, dtype=np.int64)
        renumbered[present] = np.arange(len(present))
        truth.append(renumbered[codes[column]])
    donor = None if split_by is None else _donors(cells, split_by, rows, n_splits)
    task = CellTask(cells, tasks, columns[0], np.stack(truth, axis=1), rows, donor)
    if donor is None:
        _log.info(
            "No `split_by`: cells of one donor are on both sides of every fold, so results say little about other "
            "donors. Name the column of `obs` with the donor, if there is one."
        )
    else:
        _tell_of_single_donors(task)
    return task


def _check_classes(column: str, names: list[str], counts: np.ndarray, n_splits: int) -> None:
    if len(names) < 2:
        msg = f"`adata.obs[{column!r}]` has {len(names)} class among the cells to use, {names}; two are needed."
        raise ValueError(msg)
    few = [f"{name!r} ({n})" for name, n in zip(names, counts.tolist(), strict=True) if n < n_splits]
    if few:
        msg = (
            f"Classes of {column!r} with fewer cells than the {n_splits} folds of `n_splits`: {', '.join(few)}. Leave "
            "them out with `mask_obs`, or set them to missing in that column."
        )
        raise ValueError(msg)


def _donors(cells: Prepared, split_by: str, rows: np.ndarray, n_splits: int) -> np.ndarray:
    names, donor = classes(obs_column(cells.adata, split_by), f"adata.obs[{split_by!r}]")
    n_missing = int((donor[rows] < 0).sum())
    if n_missing:
        msg = (
            f"{n_missing:,} of {len(rows):,} cells have no {split_by!r}, so they may be of a donor held out. "
            "Leave them out with `mask_obs`."
        )
        raise ValueError(msg)
    present = np.unique(donor[rows])
    if len(present) < n_splits:
        found = [names[at] for at in present]
        remedy = f"`n_splits={len(present)}`" if len(present) > 1 else "no `split_by`, which says less"
        msg = (
            f"`adata.obs[{split_by!r}]` has {len(present)} donors, {found}, fewer than the {n_splits} folds of "
            f"`n_splits`; a donor is held out as a whole. Use {remedy}."
        )
        raise ValueError(msg)
    return donor


def _tell_of_single_donors(task: CellTask) -> None:
    """Say which classes a single donor has: they are never learnt and predicted in one fold."""
    for column, of_task in task.tasks.items():
        truth = task.of(column)[task.rows]
        donor = task.donors(task.rows)
        single = [name for at, name in enumerate(of_task) if len(np.unique(donor[truth == at])) == 1]
        if single:
            _log.info(f"Of one donor only, so held out together with all that could teach it: {single} of {column!r}")
