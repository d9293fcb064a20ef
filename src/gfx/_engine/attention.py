"""Attention, added up by genes, ranks and pairs of genes as it is computed, some queries at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch

from gfx._core.attention import BAND_STARTS, BANDS, OF_GENES, OF_HEADS, add_pairs, even_distance
from gfx._engine.blocks import blocks_of, embed, scores_are_small
from gfx._engine.device import sum_dtype
from gfx._engine.forward import run_cells
from gfx._engine.pooling import GeneSums, special_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import BertModel

    from gfx._core.vocabulary import Vocabulary

#: Scores of a block of queries that are held at once: on a CPU the number that was measured to be fastest, elsewhere
#: one that takes few calls.
_SCORES = {"cpu": 1 << 20}
_SCORES_ELSEWHERE = 1 << 25

#: Queries in a block from which on products are fast.
_FEWEST_QUERIES = 128

#: Score of padding, whose weight is 0, as is its product with the score.
_LOWEST = -1e30

#: Columns of what keys are added up by: their band; 1 for those to be deleted; for genes 1 and their rank, both
#: negative before a block of queries and 0 in it; and 1 for every key. Multiples of 16 columns are multiplied fast.
_DELETED, _SIGN, _RANK, _ANY = range(len(BANDS), len(BANDS) + 4)
_COLUMNS = 16


@dataclass(frozen=True)
class Pairs:
    """Pairs of genes whose attention is kept.

    Parameters
    ----------
    gives, receives
        Number of each token among the genes that attend and among those attended to, -1 for none, `(n_tokens,)`.
    heads
        Heads whose mean is kept, numbers layer by layer; `None` keeps each head of each layer.
    """

    gives: np.ndarray
    receives: np.ndarray
    heads: Sequence[int] | None

    def n_kept(self, n_heads: int) -> int:
        """Count what is kept of each pair: each of all heads, or the mean of some."""
        return n_heads if self.heads is None else 1

    def zeros(self, n_heads: int) -> np.ndarray:
        """Make room for sums over cells: see :class:`gfx._core.attention.AttentionSums`."""
        return np.zeros((self.gives.max() + 1, self.receives.max() + 1, self.n_kept(n_heads) + 2))


class PairsOfCell(NamedTuple):
    """Pairs in one cell: positions of its genes that attend and of those attended to, and attention between them.

    The former are known on the host, too, which cuts them into blocks of queries. Of one layer, `heads` add to a mean
    of `n_heads`, of all layers; `None` are all heads of the layer, each by itself.
    """

    at: np.ndarray
    gives: torch.Tensor
    receives: torch.Tensor
    sums: torch.Tensor  # (n_kept, n_gives, n_receives)
    heads: list[int] | None = None
    n_heads: int = 1

    def of_layer(self, pairs: Pairs, layer: int, n_heads: int) -> PairsOfCell | None:
        """Take the heads that a layer adds, and where to; `None` if it adds none."""
        if pairs.heads is None:
            return self._replace(sums=self.sums[layer * n_heads : (layer + 1) * n_heads])
        heads = [head - layer * n_heads for head in pairs.heads if head // n_heads == layer]
        return self._replace(heads=heads, n_heads=len(pairs.heads)) if heads else None

    def add(self, weights: torch.Tensor, share: torch.Tensor, start: int) -> None:
        """Add weights of a block of queries, `(heads, rows, l)`, times the share of each, `(heads, rows, 1)`."""
        low, high = np.searchsorted(self.at, [start, start + weights.shape[1]]).tolist()
        rows = self.gives[low:high] - start
        if self.heads is None:
            found = weights[:, rows].mul_(share[:, rows])
        else:
            if len(self.heads) < len(weights):
                weights, share = weights[self.heads], share[self.heads]
            found = torch.einsum("hrl,hr->rl", weights[:, rows], share[:, rows, 0] / self.n_heads)[None]
        self.sums[:, low:high] += found[:, :, self.receives]


class Places(NamedTuple):
    """What positions of cells are: `is_gene`, their `rank`, and `columns`, by which keys are added up.

    Bool and float32 `(n, l)`; float32 `(n, l, 16)`, zero for padding.
    """

    is_gene: torch.Tensor
    rank: torch.Tensor
    columns: torch.Tensor

    def of_cell(self, cell: int, length: int) -> Places:
        return Places(*(values[cell : cell + 1, :length] for values in self))


class LayerSums(NamedTuple):
    """Attention of one layer in some cells, `n` of them with up to `l` tokens, added up over queries or keys.

    `received`, by each key from all queries; `given`, by each gene to other genes; and `to_deleted`, by each query,
    `(n, heads, l)`. Sums over queries of `entropy`, `(n, heads)`; over pairs of genes of `distance`, in ranks,
    `(n, heads)`; and by bands, `(n, heads, n_bands, n_bands)`.
    """

    received: torch.Tensor
    given: torch.Tensor
    to_deleted: torch.Tensor
    entropy: torch.Tensor
    distance: torch.Tensor
    bands: torch.Tensor

    @classmethod
    def zeros(cls, projected: torch.Tensor) -> LayerSums:
        n, longest, _, heads, _ = projected.shape
        shapes = [(longest,)] * 3 + [()] * 2 + [(len(BANDS), len(BANDS))]
        return cls(*(projected.new_zeros(n, heads, *shape) for shape in shapes))

    def of_cell(self, cell: int, heads: slice, length: int) -> LayerSums:
        of_cell = [values[cell : cell + 1, heads] for values in self]
        return LayerSums(*(values[..., :length] for values in of_cell[:3]), *of_cell[3:])


class CellSums(NamedTuple):
    """What :func:`read_attention` makes of cells; `H` heads, layer by layer.

    `received`, from an average position, `given` and `to_deleted`, `(n, l, H)`; `entropy` of an average position over
    the logarithm of the length, `distance` and `special`, `(n, H)`; `bands`, `(n, H, n_bands, n_bands)`; `n_in_band`,
    positions of each band, `(n, n_bands)`; and pairs, cell by cell, if any are kept.
    """

    received: torch.Tensor
    given: torch.Tensor
    to_deleted: torch.Tensor
    entropy: torch.Tensor
    distance: torch.Tensor
    special: torch.Tensor
    bands: torch.Tensor
    n_in_band: torch.Tensor
    pairs: list[PairsOfCell]


def find_places(
    tokens: torch.Tensor, valid: torch.Tensor, is_special: torch.Tensor, first_gene: int, is_deleted: torch.Tensor
) -> Places:
    """Say what the positions of cells are, `(n, l)`; `is_special` and `is_deleted` are looked up by token."""
    is_gene = valid & ~is_special[tokens]
    rank = torch.arange(tokens.shape[1], device=tokens.device) - first_gene
    starts = torch.tensor(BAND_STARTS, device=tokens.device)
    band = torch.where(is_gene, torch.bucketize(rank + 1, starts, right=True), 0)
    columns = torch.nn.functional.one_hot(band, _COLUMNS).float() * valid[..., None]
    columns[..., _DELETED] = (valid & is_deleted[tokens]).float()
    columns[..., _SIGN] = is_gene
    columns[..., _RANK] = is_gene * rank
    columns[..., _ANY] = valid
    return Places(is_gene, rank.float().expand_as(tokens), columns)


def read_attention(
    encoder: BertModel,
    tokens: torch.Tensor,
    valid: torch.Tensor,
    *,
    is_special: torch.Tensor,
    first_gene: int,
    is_deleted: torch.Tensor,
    without: bool = False,
    pairs: Pairs | None = None,
) -> CellSums:
    """Run cells and keep what their attention sums to, layer by layer.

    `is_deleted` are tokens whose place is watched; `without` takes them out of the cells, while all others stay where
    they are: their own rows of the result are then 0.
    """
    places = find_places(tokens, valid, is_special, first_gene, is_deleted)
    stays = order = None
    if without:
        stays = valid & ~is_deleted[tokens]
        order = torch.argsort((~stays).to(torch.uint8), dim=1, stable=True)[:, : int(stays.sum(1).max())]
        tokens, valid = tokens.gather(1, order), stays.gather(1, order)
        columns = places.columns.gather(1, order[..., None].expand(-1, -1, _COLUMNS)) * valid[..., None]
        places = Places(places.is_gene.gather(1, order) & valid, places.rank.gather(1, order), columns)
    position = None if order is None else encoder.embeddings.position_embeddings.weight[order]
    hidden, blocks, layers = embed(encoder, tokens, position), blocks_of(encoder), []
    n_heads = encoder.config.num_attention_heads
    kept = [] if pairs is None else _empty_pairs(tokens, valid, pairs, len(blocks) * n_heads)
    for number, block in enumerate(blocks):
        of_layer = [of_cell.of_layer(cast("Pairs", pairs), number, n_heads) for of_cell in kept]
        is_last = block is blocks[-1]  # after which nothing is read
        attended, sums = attend_and_sum(block.project(hidden), valid, places, of_layer, sums_only=is_last)
        layers.append(sums)
        if attended is not None:
            hidden = block.finish(hidden, attended)
    received, given, to_deleted, entropy, distance, bands = (
        torch.stack(values, dim=1).flatten(1, 2) for values in zip(*layers, strict=True)
    )
    n = valid.sum(1)
    received = received / n[:, None, None]
    of_positions = [values.transpose(1, 2) for values in (received, given, to_deleted)]
    if stays is not None and order is not None:  # back to where they were
        whole = received.new_zeros(*stays.shape, received.shape[1])
        index = order[..., None].expand(-1, -1, whole.shape[2])
        of_positions = [whole.scatter(1, index, values * valid[..., None]) for values in of_positions]
    special = (received * ~places.is_gene[:, None]).sum(2)
    received, given, to_deleted = of_positions
    return CellSums(
        received,
        given,
        to_deleted,
        entropy=entropy / (n * torch.log(n.clamp(min=2)))[:, None],
        distance=distance / bands[..., 1:, 1:].sum((-2, -1)),
        special=special,
        bands=bands,
        n_in_band=places.columns[..., : len(BANDS)].sum(1),
        pairs=kept,
    )


def _empty_pairs(tokens: torch.Tensor, valid: torch.Tensor, pairs: Pairs, n_heads: int) -> list[PairsOfCell]:
    """Find the genes of pairs in each cell, and make room for the attention between them."""
    found = []
    numbers = [torch.from_numpy(values).to(tokens.device) for values in (pairs.gives, pairs.receives)]
    for cell, is_token in zip(tokens, valid, strict=True):
        gives, receives = ((is_token & (number[cell] >= 0)).nonzero()[:, 0] for number in numbers)
        room = torch.zeros(pairs.n_kept(n_heads), len(gives), len(receives), device=cell.device)
        found.append(PairsOfCell(gives.cpu().numpy(), gives, receives, room))
    return found


def attend_and_sum(
    projected: torch.Tensor,
    valid: torch.Tensor,
    places: Places,
    pairs: Sequence[PairsOfCell | None] = (),
    *,
    sums_only: bool = False,
) -> tuple[torch.Tensor | None, LayerSums]:
    """Attend, `(n, l, 3, heads, d)` -> `(n, l, heads, d)`, and add the weights up; adds to `pairs`, one a cell.

    With `sums_only` values are not mixed, which is a good part of the cost.
    """
    attended, sums = None if sums_only else torch.zeros_like(projected[:, :, 0]), LayerSums.zeros(projected)
    if projected.device.type == "cpu":
        n_heads = projected.shape[3]
        for cell, length in enumerate(valid.sum(1).cpu().tolist()):
            one, where = slice(cell, cell + 1), places.of_cell(cell, length)
            # As many heads at a time as leave each the queries that products are fast with; pairs need all.
            together = n_heads if pairs else max(1, _SCORES["cpu"] // (_FEWEST_QUERIES * length))
            for first in range(0, n_heads, together):
                some = slice(first, first + together)
                what = projected[one, :length, :, some], None, where, pairs[one]
                mixed = None if attended is None else attended[one, :length, some]
                _attend_by_queries(*what, attended=mixed, sums=sums.of_cell(cell, some, length))
    else:
        _attend_by_queries(projected, None if bool(valid.all()) else valid, places, pairs, attended=attended, sums=sums)
    return attended, sums


def _attend_by_queries(
    projected: torch.Tensor,
    valid: torch.Tensor | None,
    places: Places,
    pairs: Sequence[PairsOfCell | None],
    *,
    attended: torch.Tensor | None,
    sums: LayerSums,
) -> None:
    """Attend some queries of some cells at a time; fills the outputs of :func:`attend_and_sum`."""
    query, key, value = projected.transpose(1, 3).unbind(2)  # (n, heads, l, d) each
    # Powers of 2 take two thirds of the time of powers of e.
    query = query * (math.log2(math.e) * query.shape[-1] ** -0.5)
    are_small = scores_are_small(query, key)
    n, heads, length, _ = value.shape
    key = key.transpose(-1, -2).contiguous()
    columns = places.columns[:, None].expand(-1, heads, -1, -1)
    # A copy in any case, for it is written to.
    value = columns.clone() if attended is None else torch.cat([value, columns], dim=-1)
    mixed = value.new_empty(n, heads, length, value.shape[-1])
    by_column, ranks = mixed[..., -_COLUMNS:], value[..., -_COLUMNS:][..., _SIGN : _RANK + 1]
    to_itself, score, within = value.new_empty(3, n, heads, length)
    most = _SCORES.get(projected.device.type, _SCORES_ELSEWHERE)
    rows = min(length, max(1, most // (n * heads * length)))
    # Two blocks of memory serve all blocks of queries: asking for new ones takes longer than filling them.
    room = projected.new_empty(2, n * heads * rows * length)
    for start in range(0, length, rows):
        part = slice(start, min(start + rows, length))
        scores, weights = (of[: n * heads * (part.stop - start) * length].view(n, heads, -1, length) for of in room)
        torch.matmul(query[:, :, part], key, out=scores)
        if valid is not None:
            scores.masked_fill_(~valid[:, None, None], _LOWEST)
        if not are_small:
            scores.sub_(scores.amax(-1, keepdim=True))
        torch.exp2(scores, out=weights)
        ranks[:, :, part] = 0
        mixed[:, :, part] = weights @ value
        # What each query's weights are multiplied by; queries that are padding count for nothing.
        share = places.columns[:, None, part, _ANY, None] / by_column[:, :, part, _ANY, None]
        sums.received.add_((share.transpose(-1, -2) @ weights)[:, :, 0])
        for cell, of_cell in enumerate(pairs):
            if of_cell is not None:
                of_cell.add(weights[cell], share[cell], start)
        to_itself[:, :, part] = weights.diagonal(start, -2, -1)
        score[:, :, part] = scores.mul_(weights).sum(-1)
        within[:, :, part] = (weights[..., part] * _distances_within(places, part)[:, None]).sum(-1)
        ranks[:, :, part] = -columns[:, :, part, _SIGN : _RANK + 1]
    total = by_column[..., _ANY].clone()
    mixed.div_(total[..., None])
    to_itself, score, within = (values.div_(total) for values in (to_itself, score, within))
    if attended is not None:
        attended[:] = mixed[..., :-_COLUMNS].transpose(1, 2)
    is_query, is_gene = places.columns[:, None, :, _ANY], places.is_gene[:, None]
    by_band = by_column[..., : len(BANDS)]
    to_genes = by_band[..., 1:].sum(-1)
    sums.given[:] = (to_genes - to_itself) * is_gene
    sums.to_deleted[:] = by_column[..., _DELETED] * is_query
    sums.bands[:] = places.columns[:, None, :, : len(BANDS)].transpose(-1, -2) @ by_band
    sums.entropy[:] = math.log(2) * ((total.log2() - score) * is_query).sum(2)
    # Ranks rise along a cell: a distance is a difference of ranks, of the opposite sign for genes before the query.
    distance = by_column[..., _RANK] - places.rank[:, None] * by_column[..., _SIGN] + within
    sums.distance[:] = (distance * is_gene).sum(2)


def _distances_within(places: Places, part: slice) -> torch.Tensor:
    """Distances in ranks from the queries of a block to the genes in it, `(n, rows, rows)`."""
    rank = places.rank[:, part]
    return (rank[..., None] - rank[:, None]).abs_().mul_(places.is_gene[:, None, part])


def sum_attention(
    encoder: BertModel,
    ids: np.ndarray,
    lengths: np.ndarray,
    vocabulary: Vocabulary,
    *,
    unit: np.ndarray,
    n_units: int,
    deleted: Sequence[int] = (),
    pairs: Pairs | None = None,
) -> dict[str, np.ndarray]:
    """Add up attention over the cells of each unit.

    Memory: sums of units × tokens × heads, of pairs, and what a pass takes.

    Parameters
    ----------
    unit
        Unit of each cell, int `(n_cells,)`.
    deleted
        Tokens that are taken out of the cells, while all others stay where they are. There are then three times as many
        units: of the cells as they are, without these genes, and, for genes, of what changes: attention received and
        given as ratios to uniform attention, of which there is more in a cell with fewer genes.

    Returns
    -------
    What :meth:`gfx._core.attention.AttentionSums.of` adds up, float64.
    """
    device, dtype = encoder.device, sum_dtype(encoder.device)
    special = special_tokens(vocabulary, device)
    is_deleted = torch.zeros_like(special)
    is_deleted[list(deleted)] = True
    n_heads = encoder.config.num_hidden_layers * encoder.config.num_attention_heads
    n_states, n_bands = 3 if len(deleted) else 1, len(BANDS)
    shapes = {"heads": (3, n_heads), "cells": (2,), "bands": (n_heads, n_bands, n_bands)}
    shapes |= {"bands_uniform": (n_bands, n_bands), "n_in_band": (n_bands,)}
    totals = {
        name: torch.zeros(n_states * n_units, *shape, dtype=dtype, device=device) for name, shape in shapes.items()
    }
    genes = GeneSums(n_states * n_units, len(vocabulary), (5 if len(deleted) else 4) * n_heads + 3, device)
    n_ranks = max(int(lengths.max(initial=0)) - vocabulary.n_specials, 0)
    ranks = torch.zeros(n_ranks, n_heads + 2, dtype=dtype, device=device)
    kept = None if pairs is None else pairs.zeros(n_heads)
    read = partial(read_attention, is_special=special, first_gene=vocabulary.first_gene, is_deleted=is_deleted)

    def forward(encoder: BertModel, tokens: torch.Tensor, valid: torch.Tensor) -> list[CellSums]:
        intact = read(encoder, tokens, valid, pairs=pairs)
        return [intact] if n_states == 1 else [intact, read(encoder, tokens, valid, without=True)]

    for batch in run_cells(encoder, ids, lengths, forward=forward):
        of_cell = torch.from_numpy(unit[batch.rows]).to(device)
        is_gene = batch.valid & ~special[batch.tokens]
        rank = (torch.arange(batch.tokens.shape[1], device=device) - vocabulary.first_gene).expand_as(batch.tokens)
        intact, *others = batch.output
        values = _of_genes(intact, rank, dtype)
        genes.add(of_cell, batch.tokens, is_gene, _columns(values, with_deleted=bool(others)))
        by_rank = torch.cat([values["received"], values["uniform"], torch.ones_like(values["rank"])], dim=-1)
        ranks.index_add_(0, rank[is_gene], by_rank[is_gene])
        _add_cells(totals, of_cell, intact, is_gene)
        for without in others:
            stays = is_gene & ~is_deleted[batch.tokens]
            after = _of_genes(without, rank, dtype)
            genes.add(of_cell + n_units, batch.tokens, stays, _columns(after, with_deleted=True))
            changes = {name: value - values[name] for name, value in after.items()} | _changes_of_ratios(values, after)
            genes.add(of_cell + 2 * n_units, batch.tokens, stays, _columns(changes, with_deleted=True))
            _add_cells(totals, of_cell + n_units, without, stays)
        if pairs is None or kept is None:
            continue
        for cell, n_tokens, of_pairs in zip(batch.tokens, intact.n_in_band.sum(1), intact.pairs, strict=False):
            gives, receives = (
                number[cell[places].cpu().numpy()]
                for number, places in zip((pairs.gives, pairs.receives), of_pairs[1:3], strict=True)
            )
            add_pairs(kept, gives, receives, of_pairs.sums.cpu().numpy(), 1 / float(n_tokens))
    found = {name: total.cpu().double().numpy() for name, total in (totals | {"ranks": ranks}).items()}
    if kept is not None:
        found["pairs"] = kept
    return genes.sums() | found


def _of_genes(sums: CellSums, rank: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Take what is added up for each gene of each cell, `(n, l, H)` or `(n, l, 1)`."""
    n_in_band = sums.n_in_band.to(dtype)
    n_tokens, n_genes = n_in_band.sum(1)[:, None, None], n_in_band[:, 1:].sum(1)[:, None, None]
    rank = rank[..., None].to(dtype)
    return {
        "received": sums.received.to(dtype),
        "given": sums.given.to(dtype),
        "to_deleted": sums.to_deleted.to(dtype),
        "uniform": (1 / n_tokens).expand_as(rank),
        "given_uniform": ((n_genes - 1) / n_tokens).expand_as(rank),
        "rank": rank,
    }


def _changes_of_ratios(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Subtract ratios to uniform attention, which is 1; 0 for a gene that no other is left to give to."""
    changes = {}
    for name, uniform in (("received", "uniform"), ("given", "given_uniform")):
        one, other = before[name] / before[uniform], after[name] / after[uniform]
        changes[name] = torch.where((before[uniform] > 0) & (after[uniform] > 0), other - one, 0)
        changes[uniform] = torch.ones_like(before[uniform])
    return changes


def _columns(values: dict[str, torch.Tensor], *, with_deleted: bool) -> torch.Tensor:
    """Lay out what is added up as :class:`gfx._core.attention.AttentionSums` reads it."""
    squares = {f"{name}_squared": values[name] ** 2 for name in ("received", "given")}
    names = [name for name in OF_HEADS if with_deleted or name != "to_deleted"]
    return torch.cat([(values | squares)[name] for name in (*names, *OF_GENES)], dim=-1)


def _add_cells(totals: dict[str, torch.Tensor], unit: torch.Tensor, sums: CellSums, is_gene: torch.Tensor) -> None:
    """Add what is known of whole cells to the totals of their units."""
    dtype = totals["cells"].dtype
    n_genes, n_in_band = is_gene.sum(1).to(dtype), sums.n_in_band.to(dtype)
    found = {
        "heads": torch.stack([sums.entropy, sums.distance, sums.special], dim=1),
        "cells": torch.stack([torch.ones_like(n_genes), even_distance(n_genes)], dim=1),
        "bands": sums.bands,
        "bands_uniform": n_in_band[:, :, None] * n_in_band[:, None] / n_in_band.sum(1)[:, None, None],
        "n_in_band": n_in_band,
    }
    for name, values in found.items():
        totals[name].index_add_(0, unit, values.to(dtype))
