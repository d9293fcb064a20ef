"""Run edited cells and compare them with the cells before.

One engine for named perturbations and for screens. An edited copy of a cell is made by index arithmetic on the device.
Every distinct pair of token and position among many copies is embedded and projected once; copies of one length run
together without padding; where `<cls>` is compared, the last network layer computes it alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.nn import functional

from gfx._core.batching import batches_by_length
from gfx._core.edits import Edits, pad_sets, ranks_of
from gfx._engine.blocks import WithoutKey, blocks_of, embed
from gfx._engine.device import batch_tokens, halving, sum_dtype, workers
from gfx._engine.edited import PlacedEdits, edit_cells, find_positions
from gfx._engine.pooling import pool, special_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import BertModel

    from gfx._core.edits import Positions
    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.edited import EditedCells

#: How far a cell is shifted: `<cls>`, the mean of its genes, or the mean over its genes of each one's own shift.
Comparison = Literal["cls", "mean", "genes"]

#: Tokens in a pass that a CPU still runs out of its cache; more are slower, and take more memory.
_CACHED_TOKENS = 4_096

#: Copies of different lengths are padded to share a pass until it has so many tokens.
_FILLED_TOKENS = 1_024

#: Passes on a CPU whose copies share their first projections, in batches of tokens.
_SHARED_BATCHES = 8

#: Genes that a cell loses, one at a time, for their attention to be derived from that of the whole cell.
_FEWEST_LOST = 8

#: Entries of the table of positions of all genes in the cells at hand.
_MOST_POSITIONS = 1 << 25


@dataclass(frozen=True)
class EditEffects:
    """Effects of edits, in the order of the edits; NaN for edits of cells without tokens.

    Parameters
    ----------
    shift
        Of the cell, 1 - cosine, float32 `(n_edits,)`.
    parts
        Composition, position and context, float32 `(n_edits, 3)`, which add up to `shift`; NaN if not asked for.
    toward
        Change of the cell's cosine to each state, float32 `(n_edits, n_states)`.
    toward_parts
        The same split, float32 `(n_edits, n_states, 3)`.
    rank
        Mean rank of the perturbed genes in the cell, 0 its first gene and 1 its last, float32 `(n_edits,)`; NaN if it
        has none of them.
    vectors
        The cell before and after, float32 `(n_edits, 2, d)`, if asked for.
    genes
        Sum, sum of squares and number of the shifts of each remaining gene, float64 `(3, n_tokens, n_groups)`, if
        asked for.
    """

    shift: np.ndarray
    parts: np.ndarray
    toward: np.ndarray
    toward_parts: np.ndarray
    rank: np.ndarray
    vectors: np.ndarray | None = None
    genes: np.ndarray | None = None

    @classmethod
    def missing(cls, n_edits: int, n_states: int, *, width: int | None = None) -> EditEffects:
        """All NaN, to be filled; with vectors if their `width` is given."""
        shapes = (n_edits,), (n_edits, 3), (n_edits, n_states), (n_edits, n_states, 3), (n_edits,)
        arrays = [np.full(shape, np.nan, np.float32) for shape in shapes]
        return cls(*arrays, vectors=None if width is None else np.full((n_edits, 2, width), np.nan, np.float32))


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
    n_groups: int = 0,
    keep_vectors: bool = False,
) -> EditEffects:
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
    gene_groups, n_groups
        Group of each edit, int `(n_edits,)`, to sum the shifts of the remaining genes in, -1 for none; and how many
        there are.
    keep_vectors
        Return the cell before and after each edit, too.
    """
    device, n_tokens = encoder.device, len(vocabulary)
    edits = replace(edits, sets=pad_sets(edits.sets))
    width = encoder.config.hidden_size if keep_vectors else None
    effects = EditEffects.missing(len(edits), 0 if goals is None else goals.shape[-2], width=width)
    if goals is not None:
        goals = torch.from_numpy(np.asarray(goals, dtype=np.float32)).to(device, sum_dtype(device))
    genes = torch.zeros(3, n_tokens * n_groups, dtype=sum_dtype(device), device=device)
    limit = batch_tokens(device)
    blocks = batches_by_length(
        np.where(np.isin(np.arange(len(lengths)), edits.cell), lengths, 0), limit, max(1, _MOST_POSITIONS // n_tokens)
    )
    is_cpu = device.type == "cpu"
    passes = _Passes(
        most=min(limit, _CACHED_TOKENS) if is_cpu else limit,
        filled=min(limit, _FILLED_TOKENS) if is_cpu else limit,
        at_a_time=max(1, limit // _CACHED_TOKENS) if is_cpu else 1,  # whatever the number of threads
    )
    n_workers = min(torch.get_num_threads(), passes.at_a_time) if is_cpu else 1
    with workers(n_workers) as mapped, torch.inference_mode():
        reader = _Reader(encoder, vocabulary, passes, mapped, only_first=how == "cls" and gene_groups is None)
        for rows, cells in halving(blocks, lambda rows: reader.read(ids, lengths, rows)):
            of_block, cell = edits.of_cells(rows)
            most = encoder.config.max_position_embeddings
            placed = PlacedEdits.of(edits, of_block, cell, lengths=cells.lengths, table=cells.positions, most=most)
            effects.rank[of_block] = ranks_of(placed.positions.cpu().numpy(), lengths[edits.cell[of_block]], vocabulary)
            comparison = _Comparison(
                reader,
                cells,
                placed,
                cell=cell,
                how=how,
                positions=positions,
                split=split,
                goals=goals,
                with_genes=gene_groups is not None,
            )
            stretches = batches_by_length(comparison.new_lengths, limit * (_SHARED_BATCHES if is_cpu else 1))
            for _, results in halving(stretches, comparison.run):
                for edits_of_pass, compared in results:
                    at = of_block[edits_of_pass]
                    _store(effects, at, compared)
                    if gene_groups is not None:
                        _add(genes, compared, torch.from_numpy(gene_groups[at]).to(device), n_groups)
    if gene_groups is None:
        return effects
    sums = genes.cpu().numpy().reshape(3, n_tokens, n_groups).astype(np.float64)
    return EditEffects(**{**vars(effects), "genes": sums})


# --- passes of the network -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Passes:
    """How copies are shared out to passes of the network.

    Parameters
    ----------
    most
        Padded tokens in a pass at most.
    filled
        Copies of different lengths are padded to share a pass until it has so many.
    at_a_time
        Passes that a stretch of copies has at least, if they are filled.
    """

    most: int
    filled: int
    at_a_time: int

    def of(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Numbers of the copies in each pass, longest copies first."""
        order = np.argsort(-lengths, kind="stable")
        descending = -lengths[order]
        most = min(self.most, max(self.filled, -(-int(lengths.sum()) // self.at_a_time)))
        passes, start = [], 0
        while start < len(order):
            longest = -int(descending[start])
            alike = int(np.searchsorted(descending, -longest, "right")) - start
            n = max(1, min(most // longest, max(alike, self.filled // longest)))
            passes.append(order[start : start + n])
            start += n
        return passes


@dataclass(frozen=True)
class _Cells:
    """Cells before any edit, on the device: tokens `(b, l)`, hidden states `(b, l, d)` or of `<cls>` alone."""

    tokens: torch.Tensor
    lengths: torch.Tensor
    is_gene: torch.Tensor
    states: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class _Copies:
    """Tokens at positions, `(n, l)`, as an index into distinct pairs that are embedded and projected."""

    index: torch.Tensor
    inputs: torch.Tensor
    projected: torch.Tensor | None


class _Reader:
    """An encoder that reads copies of cells."""

    def __init__(
        self,
        encoder: BertModel,
        vocabulary: Vocabulary,
        passes: _Passes,
        mapped: Callable[..., Iterator],
        *,
        only_first: bool,
    ) -> None:
        self.encoder, self.vocabulary, self.passes, self.mapped = encoder, vocabulary, passes, mapped
        self.blocks, self.only_first, self.device = blocks_of(encoder), only_first, encoder.device
        self.special = special_tokens(vocabulary, self.device)

    def lay_out(self, tokens: torch.Tensor, positions: torch.Tensor) -> _Copies:
        """Embed every distinct pair of token and position, and project it for the first network layer."""
        table = self.encoder.embeddings.position_embeddings.weight
        pairs, index = torch.unique(tokens * len(table) + positions, return_inverse=True)
        inputs = embed(self.encoder, pairs // len(table), table[pairs % len(table)])
        is_projected = len(self.blocks) > self.only_first
        return _Copies(index, inputs, self.blocks[0].project(inputs) if is_projected else None)

    def run(
        self,
        copies: _Copies,
        rows: torch.Tensor | slice,
        longest: int,
        valid: torch.Tensor | None,
        attended: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run some of the copies, `(n, l, d)`, or `(n, 1, d)` of `<cls>` alone.

        Parameters
        ----------
        valid
            As in :func:`gfx._engine.blocks.attend`.
        attended
            What attention in the first network layer gives, if that is known.
        """
        index = copies.index[rows, :longest]
        hidden = copies.inputs[index]
        for number, block in enumerate(self.blocks, start=1):
            if self.only_first and number == len(self.blocks):
                hidden = block.run_first(hidden, valid=valid)
            elif number > 1:
                hidden = block.run(hidden, valid=valid)
            elif attended is not None:
                hidden = block.finish(hidden, attended.to(hidden.dtype))
            else:
                hidden = block.run(hidden, projected=copies.projected[index], valid=valid)
        return hidden[:, :1] if self.only_first else hidden

    def read(self, ids: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> _Cells:
        """Read whole cells."""
        longest, device = int(lengths[rows].max()), self.device
        tokens = torch.from_numpy(ids[rows, :longest].astype(np.int64)).to(device)
        n = torch.from_numpy(lengths[rows].astype(np.int64)).to(device)
        valid = torch.arange(longest, device=device) < n[:, None]
        tokens = torch.where(valid, tokens, self.vocabulary.pad)
        copies = self.lay_out(tokens, torch.arange(longest, device=device).expand_as(tokens))
        width = self.encoder.config.hidden_size
        states = torch.zeros(
            len(rows), 1 if self.only_first else longest, width, dtype=self.encoder.dtype, device=device
        )

        @torch.inference_mode()  # which holds for one thread only
        def run(numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            its_lengths = lengths[rows[numbers]]
            some = torch.from_numpy(numbers).to(device)
            padding = valid[some, : its_lengths.max()] if its_lengths.min() < its_lengths.max() else None
            return some, self.run(copies, some, int(its_lengths.max()), padding)

        for some, hidden in self.mapped(run, self.passes.of(lengths[rows])):
            states[some, : hidden.shape[1]] = hidden
        is_gene = valid & ~self.special[tokens]
        return _Cells(tokens, n, is_gene, states, find_positions(tokens, self.special))


# --- comparisons ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Compared:
    """Effects of the edits in one pass, on the device; `tokens`, `is_other` and `gene_shift` are `(n, l)`."""

    shift: torch.Tensor
    parts: torch.Tensor | None
    toward: torch.Tensor | None
    toward_parts: torch.Tensor | None
    vectors: torch.Tensor
    tokens: torch.Tensor
    is_other: torch.Tensor
    gene_shift: torch.Tensor | None


class _Comparison:
    """The edits of a block of cells, ready to be run and compared."""

    def __init__(
        self,
        reader: _Reader,
        cells: _Cells,
        placed: PlacedEdits,
        *,
        cell: np.ndarray,
        how: Comparison,
        positions: Positions,
        split: bool,
        goals: torch.Tensor | None,
        with_genes: bool,
    ) -> None:
        self.reader, self.cells, self.placed, self.cell = reader, cells, placed, cell
        self.new_lengths = placed.new_lengths.cpu().numpy()
        self.how, self.positions, self.split = how, positions, split
        self.goals, self.with_genes = goals, with_genes
        self.before = self._vector(cells.states, cells.is_gene)

    def run(self, stretch: np.ndarray) -> list[tuple[np.ndarray, _Compared]]:
        """Run some edits, whose copies share their first projections, in as many passes as they need."""
        reader, device = self.reader, self.reader.device
        new_lengths, cell = self.new_lengths[stretch], self.cell[stretch]
        placed = self.placed.some(torch.from_numpy(stretch).to(device))
        most = reader.encoder.config.max_position_embeddings
        tokens = self.cells.tokens[placed.row]
        edited = edit_cells(tokens, placed, reader.vocabulary, is_special=reader.special, most=most)
        closed = torch.arange(edited.tokens.shape[1], device=device).expand_as(edited.tokens)
        kept_copies = reader.lay_out(edited.tokens, edited.kept) if self.positions == "keep" or self.split else None
        closed_copies = reader.lay_out(edited.tokens, closed) if self.positions == "close" else None
        lost = {} if kept_copies is None else self._without_keys(cell, new_lengths)

        @torch.inference_mode()  # which holds for one thread only
        def compare(numbers: np.ndarray) -> tuple[np.ndarray, _Compared]:
            its_lengths = new_lengths[numbers]
            length, is_padded = int(its_lengths.max()), its_lengths.min() < its_lengths.max()
            at = torch.from_numpy(numbers).to(device)
            valid = torch.arange(length, device=device) < placed.new_lengths[at, None]
            padding = valid if is_padded else None
            kept = closed = None
            if kept_copies is not None:
                is_one = (cell[numbers] == cell[numbers[0]]).all()
                without, gone = lost.get(cell[numbers[0]]) if is_one else None, placed.positions[at, 0]
                is_known = without is not None and without.can_lose(gone)
                attended = without(gone, edited.source[at, :length]) if is_known else None
                kept = reader.run(kept_copies, at, length, padding, attended)
            if closed_copies is not None:
                closed = reader.run(closed_copies, at, length, padding)
            after = kept if closed is None else closed
            return stretch[numbers], self._compare(edited, placed, at, valid=valid, kept=kept, after=after)

        return list(reader.mapped(compare, reader.passes.of(new_lengths)))

    def _without_keys(self, cells: np.ndarray, new_lengths: np.ndarray) -> dict[int, WithoutKey]:
        """Attention in the first network layer of cells that lose many genes, one at a time, in place."""
        reader, n_heads = self.reader, self.reader.encoder.config.num_attention_heads
        is_single = self.placed.operator == "delete" and self.placed.genes.shape[1] == 1
        if not is_single or len(reader.blocks) <= reader.only_first or bool((self.placed.positions < 0).any()):
            return {}
        lost = {}
        for cell, at, n_edits in zip(*np.unique(cells, return_index=True, return_counts=True), strict=True):
            n = int(new_lengths[at]) + 1
            if n_edits >= _FEWEST_LOST and WithoutKey.fits(n, n_heads):
                copies = reader.lay_out(self.cells.tokens[cell, :n], torch.arange(n, device=reader.device))
                lost[cell] = WithoutKey(copies.projected[copies.index])
        return lost

    def _compare(
        self,
        edited: EditedCells,
        placed: PlacedEdits,
        at: torch.Tensor,
        *,
        valid: torch.Tensor,
        kept: torch.Tensor | None,
        after: torch.Tensor,
    ) -> _Compared:
        length, how = valid.shape[1], self.how
        tokens, source = edited.tokens[at, :length], edited.source[at, :length]
        is_gene = valid & ~self.reader.special[tokens]
        is_other = is_gene & (source >= 0)
        row = placed.row[at]
        states, before = self.cells.states, self.before[row]
        if edited.cut is not None and bool(edited.cut[at].any()):
            states = self._without_cut_genes(row, edited.cut[at])
            before = self._vector(states, self.cells.is_gene[row] & ~edited.cut[at])
            row = torch.arange(len(row), device=row.device)
        stayed = None
        if self.with_genes or how == "genes" or (self.split and how == "mean"):
            stayed = states[row[:, None], source.clamp(min=0)]

        path = [before, self._vector(after, is_gene)]
        if self.split:
            # Only the perturbed genes' own vectors change; then the network reads; then the others close up.
            own = before if how == "cls" else self._vector(torch.where(is_other[..., None], stayed, kept), is_gene)
            path[1:1] = [own, self._vector(kept, is_gene)]
        gene_shift = _apart(stayed.float(), after.float()) if self.with_genes or how == "genes" else None
        if how == "genes":
            shifts = [_mean(gene_shift, is_other)]
            if self.split:
                is_same = after is kept
                on_the_way = shifts[0] if is_same else _mean(_apart(stayed.float(), kept.float()), is_other)
                shifts = [torch.zeros_like(shifts[0]), on_the_way, *shifts]
        else:
            # What did not change is at 0, not at the rounding of a cosine.
            shifts = [torch.where((vector == before).all(-1), 0, _apart(before, vector)) for vector in path[1:]]
        toward = toward_parts = None
        if self.goals is not None:
            goals = self.goals[placed.which[at]] if self.goals.ndim == 3 else self.goals[None]
            cosines = [functional.cosine_similarity(vector[:, None], goals, dim=-1) for vector in path]
            changes = [cosine - cosines[0] for cosine in cosines[1:]]
            toward, toward_parts = changes[-1], _parts(changes)
        return _Compared(
            shift=shifts[-1],
            parts=_parts(shifts),
            toward=toward,
            toward_parts=toward_parts,
            vectors=torch.stack([before, path[-1]], dim=1),
            tokens=tokens,
            is_other=is_other,
            gene_shift=gene_shift,
        )

    def _vector(self, hidden: torch.Tensor, is_gene: torch.Tensor) -> torch.Tensor:
        return pool(hidden, is_gene, "cls" if self.how == "cls" else "mean").to(sum_dtype(hidden.device))

    def _without_cut_genes(self, row: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
        """Read cells again without the genes that an insertion pushed off their end; states at their old positions."""
        states, tokens = self.cells.states[row], self.cells.tokens[row]
        some = cut.any(1).nonzero()[:, 0]
        width = torch.arange(tokens.shape[1], device=row.device)
        left = (width < self.cells.lengths[row][:, None])[some] & ~cut[some]
        n_left = left.sum(1)
        longest = int(n_left.max())
        order = torch.argsort((~left).to(torch.uint8), dim=1, stable=True)[:, :longest]
        valid = width[:longest] < n_left[:, None]
        tokens = torch.where(valid, tokens[some].gather(1, order), self.reader.vocabulary.pad)
        copies = self.reader.lay_out(tokens, width[:longest].expand_as(tokens))
        again = self.reader.run(copies, slice(None), longest, None if bool(valid.all()) else valid)
        at = order[:, : again.shape[1], None].expand_as(again)
        return states.index_copy(0, some, torch.zeros_like(states[some]).scatter(1, at, again))


def _apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return 1 - functional.cosine_similarity(one, other, dim=-1)


def _mean(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return (values * where).sum(1) / where.sum(1)


def _parts(path: list[torch.Tensor]) -> torch.Tensor | None:
    """Composition, position and context from the effect at each station of the way; `None` if there is but the last."""
    if len(path) == 1:
        return None
    own, kept, total = path
    return torch.stack([own, total - kept, kept - own], dim=-1)


def _store(effects: EditEffects, at: np.ndarray, compared: _Compared) -> None:
    for name in ("shift", "parts", "toward", "toward_parts", "vectors"):
        array, values = getattr(effects, name), getattr(compared, name)
        if array is not None and values is not None:
            array[at] = values.float().cpu().numpy()


def _add(genes: torch.Tensor, compared: _Compared, group: torch.Tensor, n_groups: int) -> None:
    """Add the shifts of the other genes to the sums of each token and group."""
    counted = compared.is_other & (group >= 0)[:, None]
    slot = (compared.tokens * n_groups + group[:, None])[counted]
    shifts = compared.gene_shift[counted].to(genes.dtype)
    for row, values in enumerate((shifts, shifts**2, torch.ones_like(shifts))):
        genes[row].index_add_(0, slot, values)


# --- to go with its callers ----------------------------------------------------------------------------------------
