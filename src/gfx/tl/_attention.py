"""Attention: what genes receive and give, from gene to gene, and how heads distribute it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby as runs_of
from operator import itemgetter
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from gfx._adata import shortened
from gfx._core.arguments import check_seed, check_whole
from gfx._core.attention import BANDS, OF_GENES, AttentionSums
from gfx._docs import shared
from gfx._log import info
from gfx._results import mask_name
from gfx.tl._gene_pairs import find_pairs, pair_matrices
from gfx.tl._gene_sets import find_genes
from gfx.tl._prepare import check_controls, donors, groups_and_rest, prepare

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import EllipsisType

    from gfx._engine.attention import Pairs
    from gfx._engine.run import Job, Network
    from gfx._types import Data, Mask, ModelLike
    from gfx.tl._prepare import Prepared

CONTROLS = ("random_weights",)

#: Cells that the random-weights model reads: this share of them, but not fewer than so many.
SHARE_OF_CONTROL, FEWEST_OF_CONTROL = 0.25, 100

#: Cells as they are, without the deleted genes, and the change of each cell.
STATES = ("intact", "deleted", "change")


class Units(NamedTuple):
    """Cells whose attention is added up together: each donor of each group, and last the cells without a group.

    `groups` are the names of all groups; `group` and `donor` those of each unit, and `of_cell` the unit of each cell.
    """

    groups: list[str]
    group: np.ndarray
    donor: np.ndarray | None
    of_cell: np.ndarray

    def __len__(self) -> int:
        return len(self.group)


@shared()
def attention(
    adata: Data,
    *,
    model: ModelLike | None = None,
    layer: str | None = None,
    mask_obs: Mask | None = None,
    groupby: str | None = None,
    donor_key: str | None = None,
    deleted: str | Iterable[str] | None = None,
    genes: Iterable[str] | EllipsisType | None = None,
    heads: Literal["mean", "each"] | Sequence[tuple[int, int]] = "mean",
    n_neighbors: int = 50,
    controls: Iterable[str] | None = CONTROLS,
    rng: int = 0,
    key_added: str | None = None,
    mod: str | None = None,
    copy: bool = False,
) -> Data | None:
    """Measure which genes and ranks each attention head attends to :cite:p:`Theodoris2023`.

    A gene *receives* in a cell the mean attention weight that all positions of the cell give to it, and it *gives* the
    sum of its own attention weights to other genes; the rest goes to itself and to special tokens. Results are means
    over the cells that express the gene. Each is given together with the value under uniform attention in the same
    cells, because in cells with few genes each gene receives more. By default a random-weights model reads a quarter of
    the cells, too, because much of attention follows from the rank of a gene alone.

    With `groupby`, results are also computed for each group; compare two with
    :func:`gfx.get.attention_difference_df`. With `deleted`, each cell is also read without these genes, while all
    others keep their positions, which shows where the attention goes that they received. With `genes`, attention from
    gene to gene is kept as well: :func:`gfx.get.attention_pairs_df`.

    Attention shows which genes a model attends to, not which gene regulates which: in published comparisons it added
    nothing to what expression tells about regulation :cite:p:`Kendiukhov2026`. Measure it on your own cells with
    :func:`gfx.get.attention_edges_df`.

    The cost is one forward pass in float32 through all layers, a quarter more for the control, and one more with
    `deleted`. Weights are summed as they are computed, so memory does not depend on the number of cells: 32 bytes × all
    heads × genes of the model × groups and donors, and 24 bytes for each pair of genes. ``genes=...`` also takes 4
    bytes for each pair of genes of a cell, and reads the cells several times if all pairs need more than 1 GB.

    Parameters
    ----------
    {adata}
    {model}
    {layer}
    {mask_obs}
    {groupby}
    donor_key
        Column of `obs` with the donor of each cell. Differences between groups then have intervals and tests over
        donors. Without donors there are intervals over cells, which are not replicates.
    deleted
        Genes that are deleted together. Only cells that have all of them are read. The groups of the result are
        then ``"intact"``, ``"deleted"`` and ``"change"``, in each cell that of the ratio to uniform attention, which
        is 1, so `groupby` cannot be used as well.
    genes
        Genes between which attention is kept, all pairs of them. With `...`, the genes that each gene attends to most,
        among the pairs that at least 10 cells have.
    heads
        Whether the attention between `genes` is the ``"mean"`` over all heads, or that of ``"each"`` head; or the heads
        whose mean it is, as pairs of network layer and head, both counted from 1.
    n_neighbors
        Number of genes kept for each gene with ``genes=...``.
    controls
        ``"random_weights"``: a random-weights model reads a quarter of the cells, or 100 if that is more. `None` runs
        no control.
    {rng}
    {key_added}
    {mod}
    {copy}

    Returns
    -------
    `None`, or an updated copy if `copy=True`. Heads are ordered by network layer, `n` of them. Sets:

    `.varm['gfx_attention' | key_added]` : :class:`numpy.ndarray` (float32, `(n_vars, n)`)
        Attention that each gene receives from each head; NaN for genes that no cell expresses.
    `.varm['gfx_attention_given' | ...]` : :class:`numpy.ndarray` (float32, `(n_vars, n)`)
        Attention that each gene gives to other genes. Standard deviations over the cells are in `..._sd` and
        `..._given_sd`.
    `.varm['gfx_attention_random' | ...]` : :class:`numpy.ndarray` (float32, `(n_vars, n)`)
        Attention that each gene receives in the random-weights model; in its cells it would be
        `.var['..._random_uniform']` if attention were uniform. With `deleted`, also `..._random_change`,
        how much its ratio to uniform attention changes.
    `.varm['gfx_attention_to_deleted' | ...]` : :class:`numpy.ndarray` (float32, `(n_vars, n)`)
        With `deleted`, attention that each gene gives to these genes in intact cells.
    `.varm['gfx_attention_groups' | ...]` : :class:`numpy.ndarray` (float32, `(n_vars, n_groups, n)`)
        Attention received in each group or, with donors, from the cells of each donor in each group. Likewise
        `..._groups_sd`, `..._groups_given`, `..._groups_given_sd`; and `(n_vars, n_groups)`, `..._groups_uniform`,
        `..._groups_given_uniform` and int32 `..._groups_n_cells`.
    `.var['gfx_attention_n_cells' | ...]` : :class:`pandas.Series` (int32)
        Number of cells that express the gene.
    `.var['gfx_attention_uniform' | ...]` : :class:`pandas.Series` (float32)
        Attention that the gene would receive if attention were uniform, and in `..._given_uniform` that it would give.
    `.var['gfx_attention_rank' | ...]` : :class:`pandas.Series` (float32)
        Mean rank of the gene, 0 for the first gene of a cell.
    `.varp['gfx_attention' | ...]` : :class:`scipy.sparse.csr_matrix` (float32, `(n_vars, n_vars)`)
        With `genes`, the mean attention that the gene of the row gives to that of the column, over the cells that have
        both; `..._uniform`, if attention were uniform; int32 `..._n_cells`, the number of cells; and
        `..._coexpression`, for named genes, the Pearson correlation of the logarithms of their normalised counts over
        all cells used.
    `.uns['gfx_attention' | ...]` : :class:`dict`
        `params`; `n_layers` (number of network layers), `n_heads` and `n_cells`. `ranks`, float32
        `(n_layers, n_heads, n_ranks)`, the attention that genes of each rank receive (0 is the first gene of a cell);
        `ranks_uniform` and `ranks_n_cells`, `(n_ranks,)`. For all cells and each group, in the order of `of`:
        `entropy`, `distance` and `special`, float32 `(1 + n, n_layers, n_heads)`, `distance_uniform` and `of_n_cells`,
        and `bands`, float32 `(1 + n, n_layers, n_heads, n_bands, n_bands)`, attention from band to band of ranks, with
        `bands_uniform` and `n_in_band`. The same of the random-weights model in `random`. `groups` and `donors` name
        the units of `varm`. With ``heads="each"``, `pairs` of all heads, float32 `(n, n_genes, n_genes)`, and
        `pairs_genes`, their names.

    Raises
    ------
    ValueError
        There are no raw counts, the model does not know the genes, no cell has the deleted ones, no cell has a group,
        there are no such heads, pairs of the genes do not fit in memory, the tokens belong to another vocabulary, or a
        slot of the result already holds something else.
    KeyError
        `obs` has no such column.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> genes = ["CD3D", "CD3E", "MS4A1"]
    >>> gfx.tl.attention(adata, model="mini", groupby="cell_type", genes=genes)
    >>> adata.varm["gfx_attention"].shape, adata.varm["gfx_attention_groups"].shape
    ((300, 16), (300, 2, 16))
    """
    from gfx._engine.run import networks, run

    controls, seed = check_controls(controls, CONTROLS), check_seed(rng)
    n_neighbors = check_whole(n_neighbors, "n_neighbors", 1) if genes is ... else None
    cells = prepare(adata, model, function="tl.attention", layer=layer, key_added=key_added, mod=mod, copy=copy)
    cells.slots.claim(reads=[("obs", name) for name in (groupby, donor_key, mask_obs)])
    lengths, gone = cells.lengths(mask_obs), np.zeros(0, dtype=np.int64)
    if deleted is not None:
        if groupby is not None:
            msg = "`deleted` makes groups of its own; choose the cells of one group with `mask_obs`, not `groupby`."
            raise ValueError(msg)
        gone = find_genes(deleted, cells.model.vocabulary, "deleted")
        lengths = _cells_with(gone, lengths, cells)
    units = _find_units(cells, groupby, donor_key, lengths)
    network = replace(cells.network(-1), dtype="float32")
    shape = network.n_layers, int(network.config["num_attention_heads"])
    numbers = _find_heads(heads, shape)
    pairs = [] if genes is None else find_pairs(genes, cells, lengths, numbers, shape[0] * shape[1])
    of_control = seed if "random_weights" in controls else None
    jobs = _jobs(network, cells, lengths, units, deleted=gone, pairs=pairs, seed=of_control)
    sums: dict[str, AttentionSums] = {}
    with networks():
        cells.announce(jobs, network, None)
        for job, results in runs_of(run(jobs, description="reading attention"), key=itemgetter(0)):
            n_units = len(units) * (len(STATES) if job.task.deleted else 1)
            sums[job.name] = AttentionSums.of((found for _, _, found in results), n_units, len(cells.model.vocabulary))
    means = {name: of_job.means(np.arange(len(units))) for name, of_job in sums.items() if name in _MEASURED}
    varm, var = _of_genes(cells, sums, means, units)
    varp, uns = {}, _of_heads(sums["attention"], means, units, shape)
    if pairs:
        parts = [of_job for name, of_job in sums.items() if name != "random_weights"]
        varp, of_pairs = pair_matrices(cells, pairs, parts, lengths, n_neighbors)
        uns |= of_pairs
    params = {"mask_obs": mask_name(mask_obs), "groupby": groupby, "donor_key": donor_key, "controls": list(controls)}
    named = heads if isinstance(heads, str) else [f"{of // shape[1] + 1}.{of % shape[1] + 1}" for of in numbers]
    params |= {"heads": named, "rng": seed}
    params |= {"n_neighbors": n_neighbors, "deleted": cells.model.vocabulary.ids[gone].tolist() if len(gone) else None}
    n_cells = jobs[0].n_cells
    cells.slots.write(
        f"read the attention of {shape[0]} layers × {shape[1]} heads of {cells.model.name!r} in {n_cells:,} cells",
        params=cells.provenance(network) | params,
        varm=varm,
        var=var,
        varp=varp,
        uns={"n_layers": shape[0], "n_heads": shape[1], "n_cells": n_cells} | uns,
    )
    return cells.result


def _cells_with(genes: np.ndarray, lengths: np.ndarray, cells: Prepared) -> np.ndarray:
    """Keep the cells that have all of the genes, and another one."""
    has_all = (cells.tokens.places(genes) >= 0).all(axis=1)
    kept = np.where(has_all & (cells.tokens.lengths > cells.model.vocabulary.n_specials + len(genes)), lengths, 0)
    if not kept.any():
        names = cells.model.vocabulary.symbols[genes].tolist()
        why = f" {cells.behind}" if cells.are_cut(genes, lengths).any() else ""
        msg = f"No cell that is used has the deleted genes {names} and at least one other gene.{why}"
        raise ValueError(msg)
    return kept


def _find_units(cells: Prepared, groupby: str | None, donor_key: str | None, lengths: np.ndarray) -> Units:
    """Read groups and donors; a group of which no cell is used is left out."""
    names, group = groups_and_rest(cells.adata, groupby)
    donor = np.zeros(len(group), dtype=object) if donor_key is None else donors(cells.adata, donor_key)
    used = lengths > 0
    occupied = np.unique(group[used])
    if empty := [name for number, name in enumerate(names) if number not in occupied]:
        info(f"No cell that is used belongs to {shortened(empty)} of `groupby={groupby!r}`: left out.")
    group = np.searchsorted(occupied, group)
    names = [names[number] for number in occupied if number < len(names)]
    donor_names, donor_number = np.unique(donor.astype(str), return_inverse=True)
    kept, of_used = np.unique(group[used] * len(donor_names) + donor_number[used], return_inverse=True)
    of_cell = np.zeros(len(group), dtype=np.int64)
    of_cell[used] = of_used
    of_units = None if donor_key is None else donor_names[kept % len(donor_names)]
    return Units(names, kept // len(donor_names), of_units, of_cell)


def _find_heads(heads: Literal["mean", "each"] | Sequence[tuple[int, int]], shape: tuple[int, int]) -> list[int] | None:
    """Count the chosen heads from 0, layer by layer; `None` stands for each of them."""
    n_layers, n_heads = shape
    if isinstance(heads, str) or not isinstance(heads, Iterable):
        if heads not in {"mean", "each"}:
            msg = f"`heads` is 'mean', 'each', or a list of pairs such as `[(1, 3)]`, found {heads!r}."
            raise ValueError(msg)
        return None if heads == "each" else list(range(n_layers * n_heads))
    numbers = []
    for pair in heads:
        is_pair = isinstance(pair, Sequence | np.ndarray) and len(pair) == 2
        is_whole = is_pair and all(isinstance(number, int | np.integer) for number in pair)
        layer, head = map(int, pair) if is_whole else (None, None)
        if layer not in range(1, n_layers + 1) or head not in range(1, n_heads + 1):
            msg = f"`heads` has {pair!r}; pairs are a network layer, 1 to {n_layers}, and a head, 1 to {n_heads}."
            raise ValueError(msg)
        numbers.append((layer - 1) * n_heads + head - 1)
    if not numbers:
        msg = "`heads` is empty. Leave it out for the mean over all heads."
        raise ValueError(msg)
    return sorted(set(numbers))


def _jobs(
    network: Network,
    cells: Prepared,
    lengths: np.ndarray,
    units: Units,
    *,
    deleted: np.ndarray,
    pairs: Sequence[Pairs],
    seed: int | None,
) -> list[Job]:
    """Make the jobs: the model with the first part of the pairs, one for each other part, and random weights."""
    from gfx._engine.run import CELLS_PER_SUM, Job, by_length
    from gfx._engine.tasks import Attention

    def job(name: str, network: Network, lengths: np.ndarray, of_pairs: Pairs | None, deleted: tuple[int, ...]) -> Job:
        blocks = by_length(lengths, CELLS_PER_SUM)
        task = Attention(network, cells.model.vocabulary, len(units), deleted, of_pairs)
        passes = [2 * len(block) for block in blocks] if deleted else None
        return Job(name, task, cells.tokens, blocks, lambda number: {"unit": units.of_cell[blocks[number]]}, passes)

    gone = tuple(deleted.tolist())
    first, *others = pairs or [None]
    jobs = [job("attention", network, lengths, first, gone)]
    jobs += [job(f"pairs {number}", network, lengths, part, ()) for number, part in enumerate(others)]
    if seed is not None:
        rows = np.flatnonzero(lengths)
        n_drawn = min(len(rows), max(FEWEST_OF_CONTROL, round(SHARE_OF_CONTROL * len(rows))))
        drawn = cells.lengths_of(np.random.default_rng(seed).permutation(rows)[:n_drawn])
        jobs.append(job("random_weights", network.randomized(seed), drawn, None, gone))
    return jobs


# --- results ---------------------------------------------------------------------------------------------------------


#: Jobs whose means over all cells are part of the result.
_MEASURED = ("attention", "random_weights")


def _of_genes(
    cells: Prepared,
    sums: Mapping[str, AttentionSums],
    means_of: Mapping[str, Mapping[str, np.ndarray]],
    units: Units,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Lay out what is known of genes, over all cells and in each unit, for `varm` and `var`."""
    found, means = sums["attention"], means_of["attention"]
    parts = {"": "received", "sd": "received_sd", "given": "given", "given_sd": "given_sd", "to_deleted": "to_deleted"}
    varm = {part: cells.per_gene(means[name]) for part, name in parts.items() if name in means}
    has_states = len(found.cells) > len(units)
    if units.groups or units.donor is not None or has_states:
        each = [found.means(np.array([unit])) for unit in range(len(found.cells))]
        parts |= {"uniform": "uniform", "given_uniform": "given_uniform"}
        for part in ("", "sd", "uniform", "given", "given_sd", "given_uniform"):
            stacked = np.stack([of_unit[parts[part]] for of_unit in each], axis=1)
            varm[f"groups_{part}" if part else "groups"] = cells.per_gene(stacked)
        varm["groups_n_cells"] = cells.cells_per_gene(np.stack([of_unit["n_with_gene"] for of_unit in each], axis=1))
    var = {name: cells.per_gene(means[name]) for name in OF_GENES}
    if random := means_of.get("random_weights"):
        varm["random"], var["random_uniform"] = (cells.per_gene(random[name]) for name in ("received", "uniform"))
        if has_states:
            without = sums["random_weights"].means(np.arange(len(units)) + len(units))
            ratios = (of["received"] / of["uniform"][:, None] for of in (without, random))
            varm["random_change"] = cells.per_gene(np.subtract(*ratios))
    return varm, {"n_cells": cells.cells_per_gene(means["n_with_gene"])} | var


def _of_heads(
    found: AttentionSums, means_of: Mapping[str, Mapping[str, np.ndarray]], units: Units, shape: tuple[int, int]
) -> dict[str, object]:
    """Lay out what is known of heads, over all cells and in each group, for `uns`, and name the units of `varm`."""
    n, every = len(units), np.arange(len(units))
    rows = {name: every[units.group == number] for number, name in enumerate(units.groups)}
    of_units = [[*units.groups, ""][group] for group in units.group] if units.groups else [""] * n
    if len(found.cells) > n:
        rows = {STATES[0]: every, STATES[1]: every + n}
        of_units = [state for state in STATES for _ in range(n)]
    uns: dict[str, object] = {"of": np.array(["all", *rows], dtype=object), "band_names": np.array(BANDS, dtype=object)}
    if rows or units.donor is not None:
        uns["groups"] = np.array(of_units, dtype=object)
    if units.donor is not None:
        uns["donors"] = np.tile(units.donor.astype(object), len(of_units) // n)
    uns |= _stacked([means_of["attention"], *(found.means(of_group) for of_group in rows.values())], shape)
    if "random_weights" in means_of:
        uns["random"] = _stacked([means_of["random_weights"]], shape)
    by_rank = found.by_rank()
    return uns | by_rank | {"ranks": by_rank["ranks"].T.reshape(*shape, -1)}


def _stacked(means: Sequence[Mapping[str, np.ndarray]], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Lay out means of heads, one entry for all cells and for each group."""
    stacked = {name: np.stack([of[name] for of in means]) for name in ("entropy", "distance", "special", "bands")}
    by_head = {name: values.reshape(len(means), *shape, *values.shape[2:]) for name, values in stacked.items()}
    others = {name: np.stack([of[name] for of in means]) for name in ("distance_uniform", "bands_uniform", "n_in_band")}
    return by_head | others | {"of_n_cells": np.stack([of["n_cells"] for of in means])}
