"""Cells with known classes, of their genes or of themselves, one by one and in batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from gfx._engine.masking import NOTHING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gfx._core.vocabulary import Vocabulary


class LabelledCells(Dataset):
    """Cells to learn from.

    Parameters
    ----------
    ids, lengths
        Tokens `(n_obs, longest)` and lengths `(n_obs,)` of all cells.
    cells
        Which of them to take, int `(n_cells,)`.
    of_token
        Where genes are classified: class of each token, int `(n_tokens,)`, -100 for those without.
    of_cell
        Where cells are classified: class of each cell in each task, int `(n_obs, n_tasks)`, -100 for none.
    """

    def __init__(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        cells: np.ndarray,
        *,
        of_token: np.ndarray | None = None,
        of_cell: np.ndarray | None = None,
    ) -> None:
        self.ids, self.cells = ids, cells
        self.lengths = lengths[cells]
        self.of_token, self.of_cell = of_token, of_cell

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        at = index % len(self.cells)  # the order of cells names the epoch, too, see SimilarLengths
        cell = self.cells[at]
        row = self.ids[cell, : self.lengths[at]].astype(np.int64)
        labels = self.of_cell[cell] if self.of_token is None else self.of_token[row]
        return {"input_ids": row, "labels": labels}


class PaddedWithLabels:
    """Put labelled cells of different lengths into one batch of tensors."""

    def __init__(self, vocabulary: Vocabulary, *, of_genes: bool) -> None:
        self.pad, self.is_special, self.of_genes = vocabulary.pad, vocabulary.is_special, of_genes

    def __call__(self, cells: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        longest = max(len(cell["input_ids"]) for cell in cells)
        ids = np.full((len(cells), longest), self.pad, dtype=np.int64)
        mask = np.zeros((len(cells), longest), dtype=np.int64)
        width = longest if self.of_genes else len(cells[0]["labels"])
        labels = np.full((len(cells), width), NOTHING, dtype=np.int64)
        for at, cell in enumerate(cells):
            n = len(cell["input_ids"])
            ids[at, :n], mask[at, :n] = cell["input_ids"], 1
            labels[at, : len(cell["labels"])] = cell["labels"]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batch["is_gene"] = (mask == 1) & ~self.is_special[ids]
        return {name: torch.from_numpy(values) for name, values in batch.items()}
