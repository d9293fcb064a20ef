"""Labelled cells, one by one and in batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from gfx._engine.labelled_cells import LabelledCells, PaddedWithLabels
from gfx._engine.masking import NOTHING, SimilarLengths

if TYPE_CHECKING:
    from tests.engine.conftest import Toy

CELLS = np.array([5, 0, 12, 3, 8])


def classes_of_tokens(toy: Toy) -> np.ndarray:
    classes = np.random.default_rng(0).integers(0, 3, len(toy.vocabulary))
    classes[toy.vocabulary.is_special] = NOTHING
    classes[np.flatnonzero(~toy.vocabulary.is_special)[::4]] = NOTHING
    return classes


def classes_of_cells(toy: Toy) -> np.ndarray:
    return np.random.default_rng(1).integers(-1, 3, (len(toy.ids), 2)) * [1, 2]


def of_genes(toy: Toy, rows: np.ndarray = CELLS) -> LabelledCells:
    return LabelledCells(toy.ids, toy.lengths, rows, of_token=classes_of_tokens(toy))


def of_cells(toy: Toy, rows: np.ndarray = CELLS) -> LabelledCells:
    return LabelledCells(toy.ids, toy.lengths, rows, of_cell=classes_of_cells(toy))


def test_a_cell_has_its_tokens_and_the_classes_of_its_genes(toy: Toy) -> None:
    cells, classes = of_genes(toy), classes_of_tokens(toy)
    assert len(cells) == 5
    assert cells.lengths.tolist() == toy.lengths[CELLS].tolist()
    for at, row in enumerate(CELLS):
        expected = toy.cells()[row]
        assert cells[at]["input_ids"].tolist() == expected
        assert cells[at]["input_ids"].dtype == np.int64
        assert cells[at]["labels"].tolist() == [classes[token] for token in expected]


def test_a_cell_has_its_class_in_each_task(toy: Toy) -> None:
    cells = of_cells(toy)
    for at, row in enumerate(CELLS):
        assert cells[at]["input_ids"].tolist() == toy.cells()[row]
        assert cells[at]["labels"].tolist() == classes_of_cells(toy)[row].tolist()


@pytest.mark.parametrize("make", [of_genes, of_cells])
def test_an_index_names_the_epoch_too(toy: Toy, make: type) -> None:
    cells = make(toy)
    order = SimilarLengths(cells.lengths, 2, seed=0)
    order.epoch = 3
    seen = list(order)
    assert sorted(seen) == [15, 16, 17, 18, 19]
    for index in seen:
        for name, values in cells[index - 15].items():
            np.testing.assert_array_equal(cells[index][name], values)


def test_what_a_cell_gives_is_its_own(toy: Toy) -> None:
    """Writing into it changes no token of the cell."""
    before = toy.ids.copy()
    of_genes(toy)[0]["input_ids"][:] = 1
    np.testing.assert_array_equal(toy.ids, before)


@pytest.mark.parametrize("make", [of_genes, of_cells])
def test_a_batch_is_padded_at_the_end(toy: Toy, make: type) -> None:
    vocabulary = toy.vocabulary
    cells = make(toy)
    parts = [cells[at] for at in (3, 0, 4)]
    batch = PaddedWithLabels(vocabulary, of_genes=make is of_genes)(parts)
    longest = max(len(part["input_ids"]) for part in parts)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "is_gene"}
    assert {name: (value.shape, value.dtype) for name, value in batch.items() if name != "labels"} == {
        "input_ids": ((3, longest), torch.int64),
        "attention_mask": ((3, longest), torch.int64),
        "is_gene": ((3, longest), torch.bool),
    }
    assert batch["labels"].dtype == torch.int64
    for at, part in enumerate(parts):
        n = len(part["input_ids"])
        tokens = part["input_ids"].tolist()
        rest = longest - n
        assert batch["input_ids"][at].tolist() == tokens + [vocabulary.pad] * rest
        assert batch["attention_mask"][at].tolist() == [1] * n + [0] * rest
        assert batch["is_gene"][at].tolist() == [toy.is_gene(token) for token in tokens] + [False] * rest
        behind = [NOTHING] * rest if make is of_genes else []
        assert batch["labels"][at].tolist() == part["labels"].tolist() + behind


def test_special_tokens_are_no_genes(toy: Toy) -> None:
    cells = of_genes(toy)
    batch = PaddedWithLabels(toy.vocabulary, of_genes=True)([cells[at] for at in range(5)])
    special = torch.from_numpy(toy.vocabulary.is_special)[batch["input_ids"]]
    assert not (batch["is_gene"] & special).any()
    n_special = toy.vocabulary.n_specials
    assert batch["is_gene"].sum(dim=1).tolist() == (toy.lengths[CELLS] - n_special).tolist()
    assert (batch["labels"][special] == NOTHING).all()
    assert (batch["labels"] != NOTHING).any()


def test_the_classes_are_not_those_of_another_batch(toy: Toy) -> None:
    """A cell is the same in whatever batch it comes."""
    cells = of_cells(toy)
    together = PaddedWithLabels(toy.vocabulary, of_genes=False)([cells[at] for at in range(5)])
    for at in range(5):
        alone = PaddedWithLabels(toy.vocabulary, of_genes=False)([cells[at]])
        n = alone["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask", "is_gene"):
            assert torch.equal(together[name][at, :n], alone[name][0])
        assert torch.equal(together["labels"][at], alone["labels"][0])
