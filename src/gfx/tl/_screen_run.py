"""One screen: every block of cells, sums over them, estimates held against exact results, candidates done exactly."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse
from tqdm.auto import tqdm

from gfx import _log
from gfx._core.screening import GeneSums, agreement, beside_neighbours, standing_out, wanted_places
from gfx._core.statistics import beside_baselines, spearman
from gfx.tl._screen_job import CellBlock, run_in_order

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from gfx._core.screening import Screened
    from gfx._core.vocabulary import Vocabulary
    from gfx.tl._screen_job import ScreenJob
    from gfx.tl._screen_store import ScreenStore

#: Cells in a block, which is what a stopped run loses at most: some thousand passes each.
CELLS_PER_BLOCK = {"exact": 2, "first_order": 128}

#: Cells in which estimates are held against exact results.
CHECKED_CELLS = 4

#: Genes that are done exactly after estimates, and cells of each.
CANDIDATES, CELLS_PER_CANDIDATE = 50, 20

#: Genes in fewer cells are no candidates.
FEWEST_CELLS = 10

MODEL, RANDOM = "model", "random_weights"


@dataclass(frozen=True)
class Plan:
    """What is screened.

    Parameters
    ----------
    number, lengths
        Of the cells that are screened: which of the AnnData they are, and how many tokens they have, `(n_cells,)`.
    ids
        Tokens of all cells of the AnnData, `(n_obs, longest)`; they are not copied as a whole.
    genes
        Which tokens to delete, bool `(n_tokens,)`.
    jobs
        By network: the model, and one with random weights if that is wanted.
    measures
        What is measured: ``"shift"``, ``"toward"``.
    group, n_groups
        Group of each cell that is screened, -1 for none, and how many there are.
    """

    number: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    genes: np.ndarray
    jobs: dict[str, ScreenJob]
    measures: Sequence[str]
    group: np.ndarray
    n_groups: int

    @property
    def vocabulary(self) -> Vocabulary:
        return self.jobs[MODEL].vocabulary

    @property
    def cells_per_block(self) -> int:
        return CELLS_PER_BLOCK[self.jobs[MODEL].method]

    def some(self, rows: np.ndarray | slice) -> CellBlock:
        """Take some of the cells, no wider than they need."""
        number, lengths = self.number[rows], self.lengths[rows]
        ids = self.ids[number, : int(lengths.max(initial=0))]
        return CellBlock(number, ids, lengths, wanted_places(ids, lengths, self.genes, self.vocabulary))

    def rows_of_blocks(self) -> list[slice]:
        n = len(self.number)
        return [slice(start, min(start + self.cells_per_block, n)) for start in range(0, n, self.cells_per_block)]

    def towards(self, goals: Mapping[str, np.ndarray]) -> Plan:
        """Set the states that networks measure movements to."""
        return replace(self, jobs={name: replace(job, goals=goals.get(name)) for name, job in self.jobs.items()})

    def measures_of(self, name: str) -> list[str]:
        """Say what a network measures; without probes, the model measures no shifts."""
        return [m for m in self.measures if m != "shift" or self.jobs[name].measures_shifts]


@dataclass(frozen=True)
class Found:
    """What a screen found.

    Parameters
    ----------
    whole, groups
        Sums over all cells, and over those of each group.
    layers
        Effects by cell and token, `(n_obs, n_tokens)`, for each measure, if asked for.
    """

    whole: GeneSums
    groups: GeneSums
    layers: dict[str, sparse.csr_array]


def run_screen(plan: Plan, store: ScreenStore | None, client: Any | None, *, n_obs: int, layers: bool) -> Found:
    """Screen all blocks of cells, or read those that a store has, and add up what they give, in order."""
    n_tokens = len(plan.vocabulary)
    found = Found(GeneSums(n_tokens, 1), GeneSums(n_tokens, plan.n_groups), {})
    entries: dict[str, list[tuple[np.ndarray, ...]]] = {measure: [] for measure in plan.measures}
    with tqdm(
        total=len(plan.number),
        desc="screening",
        unit="cell",
        leave=False,
        delay=1,
        disable=not _log.shows_progress(),
    ) as bar:
        for rows, results in _each_block(plan, store, client):
            cells = plan.some(rows)
            for name, result in results.items():
                _add(found, plan, name, cells, group=plan.group[rows], result=result)
            if layers:
                for measure in plan.measures_of(MODEL):
                    entries[measure].append(_entries(cells, results[MODEL].of(measure)))
            bar.update(len(cells.number))
    for measure, blocks in entries.items():
        if blocks:
            cell, token, value = (np.concatenate(part) for part in zip(*blocks, strict=True))
            found.layers[measure] = sparse.coo_array((value, (cell, token)), shape=(n_obs, n_tokens)).tocsr()
    return found


def _each_block(
    plan: Plan, store: ScreenStore | None, client: Any | None
) -> Iterator[tuple[slice, dict[str, Screened]]]:
    """Yield what all networks make of each block, in order; what a store has is not run again."""
    every = plan.rows_of_blocks()

    def kept(number: int) -> dict[str, Screened]:
        if store is None:
            return {}
        wanted = plan.some(every[number]).wanted
        found = {name: store.read(name, number, wanted, plan.measures_of(name)) for name in plan.jobs}
        return {name: result for name, result in found.items() if result is not None}

    missing = {number: set(plan.jobs) - set(kept(number)) for number in range(len(every))}
    if store is not None and any(len(names) < len(plan.jobs) for names in missing.values()):
        n = sum(not names for names in missing.values())
        _log.info(f"{store.path} has {n:,} of {len(every):,} blocks of cells; going on.")
    tasks = [(number, name) for number in missing for name in plan.jobs if name in missing[number]]
    fresh = run_in_order(((plan.jobs[name], plan.some(every[number])) for number, name in tasks), client)
    for number, rows in enumerate(every):
        results = kept(number) if len(missing[number]) < len(plan.jobs) else {}
        for name in plan.jobs:
            if name in missing[number]:
                results[name] = next(fresh)
                if store is not None:
                    store.write(name, number, results[name], plan.measures_of(name))
        if lost := set(plan.jobs) - set(results):
            msg = f"{store.path} lost what it had of a block of cells ({', '.join(sorted(lost))}) while this ran."
            raise RuntimeError(msg)
        yield rows, results


def _add(found: Found, plan: Plan, name: str, cells: CellBlock, *, group: np.ndarray, result: Screened) -> None:
    """Add one block to the sums."""
    vocabulary = plan.vocabulary
    cell, place = np.nonzero(cells.wanted)
    tokens = cells.ids[cell, place]
    measured = {}
    if name == MODEL:
        n_others = np.maximum(cells.lengths[cell] - vocabulary.n_specials - 1, 1)
        measured["rank"] = (place - vocabulary.first_gene) / n_others
    for measure in plan.measures_of(name):
        values = result.of(measure)
        measured[f"{name}/{measure}"] = values[cell, place]
        measured[f"{name}/{measure}_excess"] = beside_neighbours(values)[cell, place]
    for what, values in measured.items():
        found.whole.add(what, tokens, np.zeros(len(cell), np.int64), values)
        if plan.n_groups:
            found.groups.add(what, tokens, group[cell], values)


def _entries(cells: CellBlock, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cell, place = np.nonzero(cells.wanted)
    return cells.number[cell].astype(np.int32), cells.ids[cell, place].astype(np.int32), values[cell, place]


# --- estimates and exact results -----------------------------------------------------------------------------------


def check_estimates(plan: Plan, client: Any | None, rng: np.random.Generator) -> dict[str, Any]:
    """Hold estimates against exact results in some of the cells.

    Returns
    -------
    `n_cells`; and of each measure, mean over cells of Spearman over the genes of the cell, and of the share of its 50
    largest effects that are among the 100 largest estimates.
    """
    rows = np.sort(rng.permutation(len(plan.number))[:CHECKED_CELLS])
    both = plan.jobs[MODEL], plan.jobs[MODEL].exactly()
    tasks = [(job, plan.some(rows[at : at + 1])) for at in range(len(rows)) for job in both]
    results = list(_with_bar(run_in_order(tasks, client), len(tasks), "exact beside estimates"))
    told: dict[str, Any] = {"n_cells": len(rows)}
    for measure in plan.measures_of(MODEL):
        values = [result.of(measure)[0] for result in results]
        each = np.array([agreement(*pair) for pair in zip(values[::2], values[1::2], strict=True)])
        told[f"{measure}_spearman"], told[f"{measure}_recall"] = _means(each)
    return told


def _with_bar(results: Iterable[Screened], n: int, description: str) -> Iterator[Screened]:
    quiet = not _log.shows_progress()
    yield from tqdm(results, total=n, desc=description, unit="block", leave=False, delay=1, disable=quiet)


def _means(values: np.ndarray) -> list[float]:
    there = ~np.isnan(values)
    return [float(column[row].mean()) if row.any() else np.nan for column, row in zip(values.T, there.T, strict=True)]


def do_candidates(plan: Plan, found: Found, client: Any | None, rng: np.random.Generator) -> GeneSums:
    """Delete the genes that stand out most exactly, in some of their cells."""
    sums, measure = found.whole, plan.measures[-1]
    n = sums.n(f"{MODEL}/{measure}")[:, 0]
    excess = np.where(n >= FEWEST_CELLS, sums.mean(f"{MODEL}/{measure}_excess")[:, 0], np.nan)
    out = np.abs(standing_out(excess, sums.mean("rank")[:, 0], n)[0])
    candidates = np.argsort(np.where(np.isnan(out), -1, out), kind="stable")[::-1][:CANDIDATES]
    candidates = candidates[~np.isnan(out[candidates])]
    exact = GeneSums(len(plan.vocabulary), 1)
    if len(candidates):
        occurrences = [
            np.sort(rng.permutation(n_there)[:CELLS_PER_CANDIDATE]) for n_there in sums.n("rank")[candidates, 0]
        ]
        row, token = _find_occurrences(plan, candidates, occurrences)
        blocks, job = list(_only(plan, row, token)), plan.jobs[MODEL].exactly()
        tasks = [(job, cells) for cells in blocks]
        results = _with_bar(run_in_order(tasks, client), len(tasks), "candidates, exactly")
        for cells, result in zip(blocks, results, strict=True):
            cell, place = np.nonzero(cells.wanted)
            for measure in plan.measures:
                values = result.of(measure)[cell, place]
                exact.add(measure, cells.ids[cell, place], np.zeros(len(cell), np.int64), values)
    return exact


def _only(plan: Plan, row: np.ndarray, token: np.ndarray) -> Iterator[CellBlock]:
    """Take cells a few at a time, in which only the given genes are to be deleted."""
    of_row = np.split(token[np.argsort(row, kind="stable")], np.cumsum(np.unique(row, return_counts=True)[1])[:-1])
    rows = np.unique(row)
    for start in range(0, len(rows), CELLS_PER_BLOCK["exact"]):
        cells = plan.some(rows[start : start + CELLS_PER_BLOCK["exact"]])
        genes = of_row[start : start + len(cells.number)]
        here = np.stack([np.isin(ids, some) for ids, some in zip(cells.ids, genes, strict=True)])
        yield replace(cells, wanted=cells.wanted & here)


def _find_occurrences(
    plan: Plan, tokens: np.ndarray, occurrences: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Find the cells in which tokens occur for the first time, the second, and so on: rows of the plan, and tokens."""
    which = np.full(len(plan.vocabulary), -1)
    which[tokens] = np.arange(len(tokens))
    seen = np.zeros(len(tokens), dtype=np.int64)
    found = []
    for rows in plan.rows_of_blocks():
        cells = plan.some(rows)
        of = np.where(cells.wanted, which[cells.ids], -1)
        row, place = np.nonzero(of >= 0)
        for at, wanted in enumerate(occurrences):
            there = row[of[row, place] == at]
            here = wanted[(wanted >= seen[at]) & (wanted < seen[at] + len(there))] - seen[at]
            found.append((rows.start + there[here], np.full(len(here), tokens[at])))
            seen[at] += len(there)
    row, token = zip(*found, strict=True)
    return np.concatenate(row), np.concatenate(token)


# --- tables --------------------------------------------------------------------------------------------------------


def gene_columns(plan: Plan, sums: GeneSums, group: int) -> pd.DataFrame:
    """One row a token: what deleting it did in the cells of a group."""
    main = f"{MODEL}/{plan.measures_of(MODEL)[0]}"
    columns = {"n_cells": sums.n(main)[:, group], "rank_mean": sums.mean("rank")[:, group]}
    for name in plan.jobs:
        prefix = "" if name == MODEL else f"{name}_"
        for measure in plan.measures_of(name):
            columns[f"{prefix}{measure}_mean"] = sums.mean(f"{name}/{measure}")[:, group]
            if name == MODEL:
                columns[f"{measure}_sd"] = sums.sd(f"{name}/{measure}")[:, group]
            columns[f"{prefix}{measure}_excess"] = sums.mean(f"{name}/{measure}_excess")[:, group]
    return pd.DataFrame(columns)


def control_table(
    table: pd.DataFrame,
    measures: Sequence[str],
    *,
    axis: dict[str, Any] | None,
    estimates: dict[str, Any] | None,
) -> pd.DataFrame:
    """Hold the ranking of genes against what is known without the model, a row each.

    Parameters
    ----------
    table
        Genes, from :func:`gene_columns`, with baselines beside.
    axis
        Whether start and goal can be told apart.
    estimates
        From :func:`check_estimates`.
    """
    rows = []
    table = table[table["n_cells"] >= FEWEST_CELLS]
    for measure in measures:
        effect = table[f"{measure}_mean"].to_numpy()
        twin = f"{RANDOM}_{measure}_mean"
        if twin in table:
            known = np.isfinite(effect) & np.isfinite(table[twin])
            rows.append((RANDOM, measure, "spearman", spearman(effect, table[twin].to_numpy()), int(known.sum())))
        names = {"rank_mean": "rank", "detection": "detection", "expression_mean": "expression", "logfc": "logfc"}
        baselines = {name: table[column].to_numpy() for column, name in names.items() if column in table}
        for row in beside_baselines(effect, baselines):
            rows += [
                (row["baseline"], measure, statistic, row[statistic], row["n"])
                for statistic in ("spearman", "partial_spearman")
            ]
        for statistic in ("spearman", "recall"):
            if estimates is not None and f"{measure}_{statistic}" in estimates:
                value = estimates[f"{measure}_{statistic}"]
                rows.append(("exact", measure, statistic, value, estimates["n_cells"]))
    if axis is not None:
        rows.append(("state_axis", "toward", "auc", axis["auc"], axis["n_folds"]))
    return pd.DataFrame(rows, columns=["control", "measure", "statistic", "value", "n"])


def fingerprint(*arrays: np.ndarray | Iterable[np.ndarray]) -> str:
    """Tell arrays apart, whole or in pieces: sha256 of shapes and values."""
    sha = hashlib.sha256()
    for array in chain.from_iterable([given] if isinstance(given, np.ndarray) else given for given in arrays):
        sha.update(f"{array.shape}{array.dtype}".encode())
        sha.update(
            "\0".join(map(str, array)).encode() if array.dtype == object else np.ascontiguousarray(array).tobytes()
        )
    return sha.hexdigest()
