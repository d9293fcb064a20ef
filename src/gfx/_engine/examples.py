"""Training examples: cells with hidden genes or known classes, one by one, in batches, and in which order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gfx._core.vocabulary import Vocabulary

#: Share of genes chosen in a cell, and what becomes of the chosen ones (the rest stay as they are).
MASKED_SHARE, MASK_TOKEN_SHARE, RANDOM_TOKEN_SHARE = 0.15, 0.8, 0.1

#: Batches that are put together from the same cells: enough for batches of one length, few enough to stay random.
BATCHES_SORTED_TOGETHER = 50

#: Label of a position where nothing is to be predicted.
NOTHING = -100


class TokenRows(Protocol):
    """Tokens of cells: `rows[cell]` is an unsigned integer array, `rows.lengths` int32 `(n_cells,)`."""

    lengths: np.ndarray

    def __getitem__(self, cell: int) -> np.ndarray: ...


class MaskedCells(Dataset[dict[str, np.ndarray]]):
    """Cells with some genes masked: 15 % of a cell's genes, one at least and never a special token.

    An index names a cell in an epoch: `epoch * n_cells + cell`. Each draws its own random numbers, so that batches,
    workers, processes and resumed runs all see the same genes masked.

    Parameters
    ----------
    rows, cells
        Tokens of all cells, and which of them to take, int `(n_cells,)`.
    longest
        Longer cells are thinned to that many tokens drawn at random, in their order: cutting their end off would hide
        the same genes every time. Half of them keep their ranks as positions, so that all positions are learnt; half
        are ranked anew, like the same cells sequenced less deeply.
    hide_all
        Every chosen gene becomes `<mask>`, for evaluation. Otherwise 80 % do, 10 % become another gene, 10 % stay: a
        model is right about these by copying.
    cell_vector
        Computes the vector of a cell that `<cls>` is compared with, float32 `(hidden_size,)`, from its tokens, or from
        those that are left where it is thinned; `None` if no objective needs it.
    """

    def __init__(
        self,
        rows: TokenRows,
        cells: np.ndarray,
        vocabulary: Vocabulary,
        *,
        seed: int,
        longest: int | None = None,
        hide_all: bool = False,
        cell_vector: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.rows, self.cells, self.vocabulary = rows, cells, vocabulary
        self.genes = np.flatnonzero(~vocabulary.is_special)
        self.seed, self.longest, self.hide_all, self.cell_vector = seed, longest, hide_all, cell_vector
        #: Tokens of each cell as it is shown, int32 `(n_cells,)`.
        self.lengths = np.minimum(rows.lengths[cells], longest or np.iinfo(np.int32).max)

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, number = divmod(index, len(self.cells))
        cell = self.cells[number]
        rng = np.random.default_rng((self.seed, epoch, int(cell)))
        whole = self.rows[cell].astype(np.int64)
        kept, positions = self._thinned(whole, rng)
        row = whole[kept]
        draw = rng.random(len(row))
        draw[self.vocabulary.is_special[row]] = 1.0
        chosen = draw <= min(max(MASKED_SHARE, draw.min()), 1.0 - 1e-9)
        example = {"input_ids": row, "labels": np.where(chosen, row, NOTHING), "position_ids": positions}
        if self.cell_vector is not None:
            example["cell_vector"] = self.cell_vector(row)  # before genes are masked
        fate = rng.random(len(row))
        replaced = chosen & (fate >= MASK_TOKEN_SHARE) & (fate < MASK_TOKEN_SHARE + RANDOM_TOKEN_SHARE)
        row[chosen & (self.hide_all | (fate < MASK_TOKEN_SHARE))] = self.vocabulary.mask
        if not self.hide_all:
            row[replaced] = rng.choice(self.genes, size=int(replaced.sum()))
        return example

    def _thinned(self, row: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Choose the tokens to show, and their positions."""
        if self.longest is None or len(row) <= self.longest:
            return np.arange(len(row)), np.arange(len(row))
        shown = self.vocabulary.is_special[row]
        shown[rng.choice(np.flatnonzero(~shown), self.longest - int(shown.sum()), replace=False)] = True
        kept = np.flatnonzero(shown)
        return kept, kept if rng.random() < 0.5 else np.arange(len(kept))


class LabelledCells(Dataset[dict[str, np.ndarray]]):
    """Cells with known classes of their genes or of themselves.

    `rows` are the tokens of all cells, and `cells` those to take, int `(n_cells,)`. Classes are those of each token,
    int `(n_tokens,)`, or those of each cell in each task, int `(n_obs, n_tasks)`; -100 is none.
    """

    def __init__(
        self,
        rows: TokenRows,
        cells: np.ndarray,
        *,
        of_token: np.ndarray | None = None,
        of_cell: np.ndarray | None = None,
    ) -> None:
        self.rows, self.cells, self.lengths = rows, cells, rows.lengths[cells]
        self.of_token, self.of_cell = of_token, of_cell

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        cell = self.cells[index % len(self.cells)]  # the index names the epoch, too, see SimilarLengths
        row = self.rows[cell].astype(np.int64)
        labels = cast("np.ndarray", self.of_cell)[cell] if self.of_token is None else self.of_token[row]
        return {"input_ids": row, "labels": labels}


class Padded:
    """Put examples into one batch of tensors; labels are those `of_cells`, one for each task, or one for each token."""

    def __init__(self, vocabulary: Vocabulary, *, of_cells: bool = False) -> None:
        self.is_special = torch.from_numpy(vocabulary.is_special)
        self.fill = {"input_ids": vocabulary.pad, "position_ids": 0}
        if not of_cells:
            self.fill["labels"] = NOTHING

    def __call__(self, examples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        batch = {}
        for name in examples[0]:
            values = [torch.as_tensor(example[name]) for example in examples]
            batch[name] = (
                pad_sequence(values, batch_first=True, padding_value=self.fill[name])
                if name in self.fill
                else torch.stack(values)
            )
        ids = batch["input_ids"]
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        is_token = torch.arange(ids.shape[1]) < lengths[:, None]
        return batch | {"attention_mask": is_token.long(), "is_gene": is_token & ~self.is_special[ids]}


class SimilarLengths(Sampler[int]):
    """All cells in random order, neighbours of similar length, another order in each epoch.

    The order follows from seed and epoch alone. The index names both, see :class:`MaskedCells`.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        # A small corpus has several blocks, too: sorted as a whole, it would give the same batches in every epoch.
        n_batches = min(BATCHES_SORTED_TOGETHER, len(order) // (4 * self.batch_size))
        block_size = max(1, n_batches) * self.batch_size
        for start in range(0, len(order), block_size):
            block = order[start : start + block_size]
            block = block[np.argsort(-self.lengths[block], kind="stable")]
            batches = [block[first : first + self.batch_size] for first in range(0, len(block), self.batch_size)]
            is_last = len(block) < block_size
            # Not from long to short, which would train on long cells first. A smaller batch comes last, or all behind
            # it would be cut elsewhere.
            shuffled = rng.permutation(len(batches) - is_last)
            for number in [*shuffled, len(batches) - 1] if is_last else shuffled:
                yield from (self.epoch * len(order) + batches[number]).tolist()
