"""Run edited cells and compare them with the cells before.

One engine for named perturbations and for screens. An edited copy of a cell is made by index arithmetic on the device.
Every distinct pair of token and position among many copies is embedded and projected once; copies of one length run
together without padding; where `<cls>` is compared, the last network layer computes it alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch.nn import functional

from gfx._core.batching import batches_by_length
from gfx._core.edits import Edits, pad_sets, ranks_of
from gfx._engine.blocks import WithoutKey, blocks_of, embed
from gfx._engine.device import batch_tokens, halving, n_workers, passes, sum_dtype, workers
from gfx._engine.edited import edit_cells, find_positions, place_edits
from gfx._engine.forward import put_cells, tell
from gfx._engine.pooling import pool, special_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import BertModel

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.edited import EditedCells, PlacedEdits
    from gfx._types import Positions

#: How far a cell is shifted: `<cls>`, the mean of its genes, or the mean over its genes of each one's own shift.
Comparison = Literal["cls", "mean", "genes"]

#: Passes of a CPU whose copies share their first projections, in batches of tokens.
_SHARED_BATCHES = 8

#: Genes that a cell loses, one at a time, for their attention to be derived from that of the whole cell.
_FEWEST_LOST = 8


def unknown_effects(n_edits: int, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Make arrays of effects to be filled, float32 `(n_edits, *shape)`: NaN, as edits of cells without tokens stay."""
    return {name: np.full((n_edits, *shape), np.nan, np.float32) for name, shape in shapes.items()}


def n_passes(*, split: bool, positions: Positions) -> int:
    """Count the passes that a perturbation of a cell takes: where others close up, its parts take a second one."""
    return 2 if split and positions == "close" else 1


def run_edits(
    encoder: BertModel,
    ids: np.ndarray,
    lengths: np.ndarray,
    vocabulary: Vocabulary,
    edits: Edits,
    *,
    how: Comparison,
    positions: Positions,
    split: bool = False,
    goals: np.ndarray | None = None,
    gene_groups: np.ndarray | None = None,
    keep_vectors: bool = False,
    in_full: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Perturb genes in a block of cells and measure how far each cell, and each of its other genes, shifts.

    A shift is split into three parts, which add up to it. *Composition*: only the perturbed genes' own vectors leave
    or change in the mean, nothing else changes; 0 where a cell is not a mean over its genes. *Context*: the network
    reads the cell without them, every other gene keeping its position. *Position*: the others close up.

    Memory: results of the edits, and of the genes three numbers a token and group, however many cells there are.

    Parameters
    ----------
    ids, lengths
        Tokens `(n_cells, longest)` and lengths `(n_cells,)` of the cells.
    how
        What is compared; towards states, ``"genes"`` is ``"mean"``.
    positions
        ``"close"``: the other genes close up. ``"keep"``: they keep their positions, and the position part is 0.
    split
        Find the parts, too; where the others close up that takes a second pass.
    goals
        Vectors of states, float `(n_states, d)`, or `(n_sets, n_states, d)` for other ones with each set.
    gene_groups
        Group of each edit, int `(n_edits,)`, to sum the shifts of the remaining genes in, -1 for none.
    keep_vectors
        Return the cell before and after each edit, too.
    in_full
        Edits whose parts and other genes are wanted, if any are, bool `(n_edits,)`; `None`: all.

    Returns
    -------
    Effects in the order of the edits, float32; NaN for edits of cells without tokens:

    `shift`
        1 - cosine of the cell before and after, `(n_edits,)`.
    `rank`
        Mean rank of the perturbed genes in the cell, 0 its first gene and 1 its last, `(n_edits,)`; NaN if it has none.
    `toward`
        Change of the cell's cosine to each state, `(n_edits, n_states)`.
    `parts`, `toward_parts`
        With `split`: composition, position and context of both, `(n_edits, 3)` and `(n_edits, n_states, 3)`.
    `vectors`
        With `keep_vectors`: the cell before and after, `(n_edits, 2, d)`.
    `gene_token`, `gene_group`, `gene_sums`
        With `gene_groups`: every token and group with shifts, `(n,)`, and their sum, sum of squares and number, float64
        `(3, n)`.
    """
    device, n_states = encoder.device, 0 if goals is None else goals.shape[-2]
    targets = None
    if goals is not None:
        targets = torch.from_numpy(np.asarray(goals, np.float32)).to(device, sum_dtype(device))
    edits = replace(edits, sets=pad_sets(edits.sets))
    effects = unknown_effects(len(edits), shift=(), rank=(), toward=(n_states,))
    if split:
        effects |= unknown_effects(len(edits), parts=(3,), toward_parts=(n_states, 3))
    if keep_vectors:
        effects |= unknown_effects(len(edits), vectors=(2, encoder.config.hidden_size))
    groups = group_of = None
    if gene_groups is not None:  # only those of these cells, for sums take memory
        groups = np.unique(gene_groups[gene_groups >= 0])
        number = np.where(gene_groups >= 0, np.searchsorted(groups, gene_groups), -1)
        group_of = torch.from_numpy(number).to(device)
        genes = torch.zeros(3, len(vocabulary) * len(groups), dtype=sum_dtype(device), device=device)
    limit, is_cpu = batch_tokens(device), device.type == "cpu"
    blocks = batches_by_length(np.where(np.isin(np.arange(len(lengths)), edits.cell), lengths, 0), limit)
    with workers(n_workers(device)) as mapped, torch.inference_mode():
        n_groups = 0 if groups is None else len(groups)
        reader = _Reader(encoder, vocabulary, mapped, effects, how, positions, targets, group_of, n_groups)
        for rows, cells in halving(blocks, lambda rows: reader.read(ids, lengths, rows)):
            numbers, row = edits.of_cells(rows)
            table, most = find_positions(cells.tokens, reader.special), encoder.config.max_position_embeddings
            placed = place_edits(edits, numbers, row, lengths=cells.lengths, table=table, most=most)
            effects["rank"][numbers] = ranks_of(placed.positions.cpu().numpy(), lengths[rows[row]], vocabulary)
            new_lengths = placed.new_lengths.cpu().numpy()
            is_wanted = np.ones(len(numbers), dtype=bool) if in_full is None else in_full[numbers]
            for is_full in (True, False):
                of_kind = np.where(is_wanted == is_full, new_lengths, 0)
                stretches = batches_by_length(of_kind, limit * (_SHARED_BATCHES if is_cpu else 1))
                perturb = partial(reader.perturb, cells, placed, numbers, in_full=is_full)
                for stretch, of_passes in halving(stretches, perturb):
                    tell(n_passes(split=split and is_full, positions=positions) * len(stretch))
                    for slot, shifts in filter(None, of_passes) if groups is not None and is_full else ():
                        for sums, values in zip(genes, (shifts, shifts**2, torch.ones_like(shifts)), strict=True):
                            sums.index_add_(0, slot, values)
    if groups is None:
        return effects
    sums = genes.cpu().double().numpy()
    (known,) = np.nonzero(sums[2])
    token, number = np.divmod(known, max(1, len(groups)))
    return effects | {"gene_token": token, "gene_group": groups[number], "gene_sums": sums[:, known]}


# --- passes of the network -----------------------------------------------------------------------------------------


class _Cells(NamedTuple):
    """Cells before any edit, on the device: states `(b, l, d)`, or of `<cls>` alone `(b, 1, d)`; vectors `(b, d)`."""

    tokens: torch.Tensor
    lengths: torch.Tensor
    is_gene: torch.Tensor
    states: torch.Tensor
    vectors: torch.Tensor


class _Copies(NamedTuple):
    """Tokens at positions, `(n, l)`, each the number of a distinct pair; these are embedded and projected."""

    pair: torch.Tensor
    inputs: torch.Tensor
    projected: torch.Tensor | None


@dataclass
class _Reader:
    """A network that reads cells and edited copies of them, and writes down how they differ.

    Fields are arguments of :func:`run_edits`, on the device; `mapped` maps a function over passes.
    """

    encoder: BertModel
    vocabulary: Vocabulary
    mapped: Callable[..., Iterator[Any]]
    effects: dict[str, np.ndarray]
    how: Comparison
    positions: Positions
    goals: torch.Tensor | None
    group_of: torch.Tensor | None
    n_groups: int

    def __post_init__(self) -> None:
        self.device, self.split = self.encoder.device, "parts" in self.effects
        self.blocks, self.special = blocks_of(self.encoder), special_tokens(self.vocabulary, self.device)
        self.measures_genes = self.group_of is not None
        self.only_first = self.how == "cls" and not self.measures_genes

    def lay_out(self, tokens: torch.Tensor, positions: torch.Tensor) -> _Copies:
        """Embed every distinct pair of token and position, and project it for the first network layer."""
        table = self.encoder.embeddings.position_embeddings.weight
        pairs, index = torch.unique(tokens * len(table) + positions, return_inverse=True)
        inputs = embed(self.encoder, pairs // len(table), table[pairs % len(table)])
        is_projected = len(self.blocks) > (self.how == "cls")
        return _Copies(index, inputs, self.blocks[0].project(inputs) if is_projected else None)

    def run(
        self,
        copies: _Copies,
        rows: torch.Tensor | slice,
        longest: int,
        valid: torch.Tensor | None,
        attended: torch.Tensor | None = None,
        *,
        only_first: bool,
    ) -> torch.Tensor:
        """Run some of the copies, `(n, l, d)`, or `(n, 1, d)` of `<cls>` alone (`only_first`).

        `attended` is what attention in the first network layer gives, if that is known.
        """
        index = copies.pair[rows, :longest]
        hidden = copies.inputs[index]
        for number, block in enumerate(self.blocks, start=1):
            if only_first and number == len(self.blocks):
                hidden = block.run_first(hidden, valid=valid)
            elif number > 1 or copies.projected is None:
                hidden = block.run(hidden, valid=valid)
            elif attended is not None:
                hidden = block.finish(hidden, attended.to(hidden.dtype))
            else:
                hidden = block.run(hidden, projected=copies.projected[index], valid=valid)
        return hidden[:, :1] if only_first else hidden

    def read(self, ids: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> _Cells:
        """Read whole cells."""
        tokens, valid = put_cells(ids, lengths, rows, self.device)
        tokens, lengths = torch.where(valid, tokens, self.vocabulary.pad), lengths[rows]
        copies = self.lay_out(tokens, torch.arange(tokens.shape[1], device=self.device).expand_as(tokens))
        shape = len(rows), 1 if self.only_first else tokens.shape[1], self.encoder.config.hidden_size
        states = torch.zeros(shape, dtype=self.encoder.dtype, device=self.device)

        @torch.inference_mode()  # which holds for one thread only
        def run(numbers: np.ndarray) -> None:
            longest, copy_rows = int(lengths[numbers].max()), torch.from_numpy(numbers).to(self.device)
            padding = valid[copy_rows, :longest] if lengths[numbers].min() < longest else None
            hidden = self.run(copies, copy_rows, longest, padding, only_first=self.only_first)
            states[copy_rows, : hidden.shape[1]] = hidden

        list(self.mapped(run, passes(lengths, self.device)))
        is_gene = valid & ~self.special[tokens]
        return _Cells(tokens, valid.sum(1), is_gene, states, self._vector(states, is_gene))

    def perturb(
        self, cells: _Cells, placed: PlacedEdits, numbers: np.ndarray, stretch: np.ndarray, *, in_full: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        """Run some edits, whose copies share their first projections, in as many passes as they need.

        Effects are written to the rows `numbers` of the edits, those of parts only `in_full`. So are other genes: for
        their sums each pass gives the slot of every one among tokens and groups, and its shift, both `(n,)`.
        """
        placed, numbers = placed.take(torch.from_numpy(stretch).to(self.device)), numbers[stretch]
        new_lengths, cell = placed.new_lengths.cpu().numpy(), placed.row.cpu().numpy()
        most = self.encoder.config.max_position_embeddings
        edited = edit_cells(cells.tokens[placed.row], placed, self.vocabulary, is_special=self.special, most=most)
        closed = torch.arange(edited.tokens.shape[1], device=self.device).expand_as(edited.tokens)
        split, measures_genes = self.split and in_full, self.measures_genes and in_full
        only_first = self.how == "cls" and not measures_genes
        kept_copies = self.lay_out(edited.tokens, edited.kept) if self.positions == "keep" or split else None
        closed_copies = self.lay_out(edited.tokens, closed) if self.positions == "close" else None
        lost = {} if kept_copies is None else self._without_keys(cells, placed, cell, new_lengths)

        @torch.inference_mode()  # which holds for one thread only
        def run(chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor] | None:
            length, rows = int(new_lengths[chosen].max()), torch.from_numpy(chosen).to(self.device)
            valid = torch.arange(length, device=self.device) < placed.new_lengths[rows, None]
            padding = valid if new_lengths[chosen].min() < length else None
            kept = closed = None
            if kept_copies is not None:
                is_one = (cell[chosen] == cell[chosen[0]]).all()
                without, gone = lost.get(cell[chosen[0]]) if is_one else None, placed.positions[rows, 0]
                attended = None
                if without is not None and without.can_lose(gone):
                    attended = without(gone, edited.source[rows, :length])
                is_part = self.how == "cls" and closed_copies is not None  # of which only the cell is compared
                kept = self.run(kept_copies, rows, length, padding, attended, only_first=only_first or is_part)
            if closed_copies is not None:
                closed = self.run(closed_copies, rows, length, padding, only_first=only_first)
            after = cast("torch.Tensor", kept if closed is None else closed)
            of_pass = edited.take(rows, length), placed.take(rows), numbers[chosen]
            kept = after if kept is None else kept
            how: dict[str, Any] = {"split": split, "measures_genes": measures_genes}
            return self._compare(cells, *of_pass, valid=valid, kept=kept, after=after, **how)

        return list(self.mapped(run, passes(new_lengths, self.device)))

    def _without_keys(
        self, cells: _Cells, placed: PlacedEdits, cell: np.ndarray, new_lengths: np.ndarray
    ) -> dict[int, WithoutKey]:
        """Attention in the first network layer of cells that lose many genes, one at a time, in place."""
        is_single = placed.operator == "delete" and placed.genes.shape[1] == 1
        if not is_single or len(self.blocks) <= (self.how == "cls") or bool((placed.positions < 0).any()):
            return {}
        lost = {}
        for row, edit, n_edits in zip(*np.unique(cell, return_index=True, return_counts=True), strict=True):
            n = int(new_lengths[edit]) + 1
            if n_edits >= _FEWEST_LOST and WithoutKey.fits(n, self.encoder.config.num_attention_heads):
                copies = self.lay_out(cells.tokens[row, :n], torch.arange(n, device=self.device))
                lost[row] = WithoutKey(cast("torch.Tensor", copies.projected)[copies.pair])
        return lost

    # --- comparisons -----------------------------------------------------------------------------------------------

    def _compare(
        self,
        cells: _Cells,
        edited: EditedCells,
        placed: PlacedEdits,
        numbers: np.ndarray,
        *,
        valid: torch.Tensor,
        kept: torch.Tensor,
        after: torch.Tensor,
        split: bool,
        measures_genes: bool,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Compare the edits of a pass with their cells; see :meth:`perturb`."""
        how, row = self.how, placed.row
        is_gene = valid & ~self.special[edited.tokens]
        is_other = is_gene & (edited.source >= 0)
        states, before = cells.states, cells.vectors[row]
        if edited.cut is not None and bool(edited.cut.any()):
            states = self._without_cut_genes(cells, row, edited.cut)
            before = self._vector(states, cells.is_gene[row] & ~edited.cut)
            row = torch.arange(len(row), device=self.device)
        stayed: torch.Tensor
        if measures_genes or how == "genes" or (split and how == "mean"):
            stayed = states[row[:, None], edited.source.clamp(min=0)]

        path = [before, self._vector(after, is_gene)]
        if split:
            # Only the perturbed genes' own vectors change; then the network reads; then the others close up.
            own = before if how == "cls" else self._vector(torch.where(is_other[..., None], stayed, kept), is_gene)
            path[1:1] = [own, self._vector(kept, is_gene)]
        if measures_genes or how == "genes":
            gene_shift = _apart(stayed.float(), after.float())
        if how == "genes":
            shifts = [_mean(gene_shift, is_other)]
            if split:
                in_context = shifts[0] if after is kept else _mean(_apart(stayed.float(), kept.float()), is_other)
                shifts = [torch.zeros_like(shifts[0]), in_context, *shifts]
        else:
            # What did not change is at 0, not at the rounding of a cosine.
            shifts = [torch.where((vector == before).all(-1), 0, _apart(before, vector)) for vector in path[1:]]
        measured = {"shift": shifts[-1], "vectors": torch.stack([before, path[-1]], dim=1)}
        if split:
            measured["parts"] = _parts(*shifts)
        if self.goals is not None:
            goals = self.goals[placed.which] if self.goals.ndim == 3 else self.goals[None]
            cosines = [functional.cosine_similarity(vector[:, None], goals, dim=-1) for vector in path]
            changes = [cosine - cosines[0] for cosine in cosines[1:]]
            measured["toward"] = changes[-1]
            if split:
                measured["toward_parts"] = _parts(*changes)
        # Now: results that wait for those of other passes would keep the memory around them from being used again.
        for name in measured.keys() & self.effects.keys():
            self.effects[name][numbers] = measured[name].float().cpu().numpy()
        if not measures_genes or self.group_of is None:
            return None
        group = self.group_of[torch.from_numpy(numbers).to(self.device)][:, None]
        counted = is_other & (group >= 0)
        slot = (edited.tokens * self.n_groups + group)[counted]
        return slot, gene_shift[counted].to(before.dtype)

    def _vector(self, hidden: torch.Tensor, is_gene: torch.Tensor) -> torch.Tensor:
        return pool(hidden, is_gene, "cls" if self.how == "cls" else "mean").to(sum_dtype(hidden.device))

    def _without_cut_genes(self, cells: _Cells, row: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
        """Read cells again without the genes that an insertion pushed off their end; states at their old positions."""
        states, tokens = cells.states[row], cells.tokens[row]
        chosen = cut.any(1).nonzero()[:, 0]
        position = torch.arange(tokens.shape[1], device=self.device)
        left = (position < cells.lengths[row][:, None])[chosen] & ~cut[chosen]
        n_left = left.sum(1)
        longest = int(n_left.max())
        order = torch.argsort((~left).to(torch.uint8), dim=1, stable=True)[:, :longest]
        valid = position[:longest] < n_left[:, None]
        tokens = torch.where(valid, tokens[chosen].gather(1, order), self.vocabulary.pad)
        copies = self.lay_out(tokens, position[:longest].expand_as(tokens))
        padding = None if bool(valid.all()) else valid
        again = self.run(copies, slice(None), longest, padding, only_first=self.only_first)
        places = order[:, : again.shape[1], None].expand_as(again)
        return states.index_copy(0, chosen, torch.zeros_like(states[chosen]).scatter(1, places, again))


def _apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return 1 - functional.cosine_similarity(one, other, dim=-1)


def _mean(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return (values * where).sum(1) / where.sum(1)


def _parts(own: torch.Tensor, kept: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Composition, position and context, from the effects on the way: own vectors, context, positions."""
    return torch.stack([own, total - kept, kept - own], dim=-1)
