"""Delete every gene of a cell in turn, and see how far the cell moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.nn import functional

from gfx._core.screening import Screened
from gfx._engine.blocks import WithoutKey, blocks_of, embed
from gfx._engine.device import halving, sum_dtype, workers
from gfx._engine.pooling import pool, special_tokens

if TYPE_CHECKING:
    from transformers import BertModel

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.blocks import Block
    from gfx._engine.perturb import Comparison

Operator = Literal["delete", "hold"]

#: Tokens at once that a CPU still runs out of its cache; more are slower, and take more memory.
_CACHED_TOKENS = 4_096


@torch.inference_mode()
def screen_exactly(
    encoder: BertModel,
    ids: np.ndarray,
    wanted: np.ndarray,
    lengths: np.ndarray,
    vocabulary: Vocabulary,
    *,
    how: Comparison,
    operator: Operator,
    goals: np.ndarray | None = None,
    tokens_at_once: int,
) -> Screened:
    """Delete the wanted genes of each cell, one at a time.

    The edited copies of a cell are all of one length: no padding. They are gathered on the device from what the cell's
    tokens give at their own and at their new positions, so that the first block projects each token twice at most.
    Where `<cls>` is compared, the last block computes it alone.

    Parameters
    ----------
    ids, lengths
        Tokens `(n_cells, longest)` and lengths `(n_cells,)`.
    wanted
        From :func:`gfx._core.screening.wanted_places`.
    how, goals
        As in :func:`gfx._engine.perturb.measure_edits`; goals `(n_states, d)`.
    operator
        ``"delete"``: later genes move up. ``"hold"``: every other gene keeps its position.
    tokens_at_once
        Tokens in a forward pass at most.
    """
    device = encoder.device
    targets = None if goals is None else torch.from_numpy(np.asarray(goals)).to(device, sum_dtype(device))
    found = Screened.nothing(*ids.shape, 0 if goals is None else len(goals))
    blocks, special = blocks_of(encoder), special_tokens(vocabulary, device)
    most = min(tokens_at_once, _CACHED_TOKENS) if device.type == "cpu" else tokens_at_once
    at_a_time = tokens_at_once // most  # chunks, and how many a cell has at least, whatever the number of threads
    n_workers = min(torch.get_num_threads(), at_a_time) if device.type == "cpu" else 1
    with workers(n_workers) as mapped:
        for row in np.flatnonzero(wanted.any(axis=1)):
            tokens = torch.from_numpy(ids[row, : lengths[row]].astype(np.int64)).to(device)
            cell = _Cell(encoder, blocks, tokens, ~special[tokens], how=how, operator=operator, goals=targets)
            places = np.flatnonzero(wanted[row])
            at_once = max(1, min(most // len(tokens), -(-len(places) // at_a_time)))
            chunks = [places[start : start + at_once] for start in range(0, len(places), at_once)]
            # One after the other, a lack of memory is told once for them all.
            shared_out = [[chunk] for chunk in chunks] if n_workers > 1 else [chunks]
            for results in mapped(cell.without_each, shared_out):
                for at, (shift, toward) in results:
                    found.shift[row, at] = shift.float().cpu().numpy()
                    if toward is not None:
                        found.toward[row, at] = toward.float().cpu().numpy()
    return found


class _Cell:
    """One cell, ready to lose genes."""

    def __init__(
        self,
        encoder: BertModel,
        blocks: list[Block],
        tokens: torch.Tensor,
        is_gene: torch.Tensor,
        *,
        how: Comparison,
        operator: Operator,
        goals: torch.Tensor | None,
    ) -> None:
        self.blocks, self.is_gene, self.how, self.goals = blocks, is_gene, how, goals
        self.n, self.device = len(tokens), tokens.device
        positions = encoder.embeddings.position_embeddings.weight[: self.n]
        self.inputs = embed(encoder, tokens, positions)
        if operator == "delete":  # the second half: each token but the first where the one before it stands
            self.inputs = torch.cat([self.inputs, embed(encoder, tokens[1:], positions[:-1])])
        self.projected = blocks[0].project(self.inputs) if blocks else None
        heads = encoder.config.num_attention_heads
        is_closed = operator == "hold" and blocks and WithoutKey.fits(self.n, heads)
        self.lost = WithoutKey(self.projected) if is_closed else None
        self.moves = self.n - 1 if operator == "delete" else 0
        whole = torch.arange(self.n, device=self.device)[None]
        self.before = self._run(whole, None)
        self.vector = self._pooled(self.before, is_gene[None])
        self.cosines = None if goals is None else functional.cosine_similarity(self.vector, goals)

    @torch.inference_mode()  # which holds for one thread only
    def without_each(
        self, chunks: list[np.ndarray]
    ) -> list[tuple[np.ndarray, tuple[torch.Tensor, torch.Tensor | None]]]:
        """Lose each gene in turn, fewer at a time where memory runs out."""
        return list(halving(chunks, self.without))

    def without(self, places: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Lose each gene in turn: shift `(n,)` and change of cosines `(n, n_states)`."""
        gone = torch.from_numpy(places).to(self.device)[:, None]
        place = torch.arange(self.n - 1, device=self.device)[None]
        is_later = place >= gone
        source = place + is_later  # where each token stood
        after = self._run(source + self.moves * is_later, gone[:, 0])
        vector = self._pooled(after, self.is_gene[source])
        if self.how == "genes":
            apart = 1 - functional.cosine_similarity(self.before[0][source].float(), after.float(), dim=-1)
            is_other = self.is_gene[source]
            shift = (apart * is_other).sum(1) / is_other.sum(1)
        else:
            shift = 1 - functional.cosine_similarity(self.vector, vector)
            shift = torch.where((vector == self.vector).all(-1), 0, shift)
        if self.goals is None:
            return shift, None
        return shift, functional.cosine_similarity(vector[:, None], self.goals[None], dim=-1) - self.cosines

    def _run(self, source: torch.Tensor, gone: torch.Tensor | None) -> torch.Tensor:
        """Run copies made of rows of the inputs, `(n, l)` -> `(n, l, d)`, or `(n, 1, d)` of `<cls>` alone."""
        hidden = self.inputs[source]
        for number, block in enumerate(self.blocks, start=1):
            if self.how == "cls" and number == len(self.blocks):
                hidden = block.run_first(hidden)
            elif number > 1:
                hidden = block.run(hidden)
            elif self.lost is not None and gone is not None and self.lost.can_lose(gone):
                hidden = block.finish(hidden, self.lost(gone, source).to(hidden.dtype))
            else:
                hidden = block.run(hidden, projected=self.projected[source])
        return hidden

    def _pooled(self, hidden: torch.Tensor, is_gene: torch.Tensor) -> torch.Tensor:
        how = "mean" if self.how == "genes" else self.how
        return pool(hidden, is_gene, how).to(sum_dtype(self.device))
