"""Training examples: hidden genes, known classes, batches, and the order of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gfx._engine.examples import NOTHING, LabelledCells, MaskedCells, Padded, SimilarLengths

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.engine.conftest import MakeRows, Rows, Toy

    from gfx._core.vocabulary import Vocabulary

LONGEST = 20


def all_cells(rows: Rows, vocabulary: Vocabulary, seed: int = 0, **how: object) -> MaskedCells:
    return MaskedCells(rows, np.arange(len(rows)), vocabulary, seed=seed, **how)


def restored(shown: dict[str, np.ndarray]) -> np.ndarray:
    """Put what is hidden back."""
    return np.where(shown["labels"] == NOTHING, shown["input_ids"], shown["labels"])


def as_lists(shown: dict[str, np.ndarray]) -> dict[str, list]:
    return {name: np.asarray(values).tolist() for name, values in shown.items()}


def seen(cells: MaskedCells, order: Iterable[int], **loading: int) -> dict[int, dict[str, list]]:
    """What a loader shows of each index."""
    order = list(order)
    loaded = DataLoader(cells, sampler=order, collate_fn=list, **loading)
    shown = [as_lists(cell) for batch in loaded for cell in batch]
    return dict(zip(order, shown, strict=True))


# --- what is chosen and what becomes of it --------------------------------------------------------------------------


def test_labels_are_the_chosen_genes_and_all_else_stays(vocabulary: Vocabulary, make_rows: MakeRows) -> None:
    rows = make_rows(vocabulary, 500)
    cells = all_cells(rows, vocabulary)
    for at, row in enumerate(rows):
        shown = cells[at]
        chosen = shown["labels"] != NOTHING
        np.testing.assert_array_equal(shown["labels"][chosen], row[chosen])
        np.testing.assert_array_equal(shown["input_ids"][~chosen], row[~chosen])
        assert not vocabulary.is_special[row[chosen]].any()
        np.testing.assert_array_equal(shown["position_ids"], np.arange(len(row)))


def test_every_cell_has_something_to_predict(vocabulary: Vocabulary, make_rows: MakeRows) -> None:
    rows = make_rows(vocabulary, 400, n_genes=3)
    for seed in range(3):
        cells = all_cells(rows, vocabulary, seed)
        assert all((cells[at]["labels"] != NOTHING).any() for at in range(400))


def is_share(hits: np.ndarray, of: np.ndarray, share: float) -> bool:
    """Within four standard errors."""
    return abs((hits & of).sum() / of.sum() - share) < 4 * np.sqrt(share * (1 - share) / of.sum())


@pytest.fixture(scope="module")
def three_thousand(toy_vocabulary: Vocabulary, make_rows: MakeRows) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Tokens of cells of more than 30 genes in one row, and how they are shown."""
    rows = make_rows(toy_vocabulary, 3000)
    cells = all_cells(rows, toy_vocabulary)
    long = np.flatnonzero(rows.lengths > 32)  # here the gene that each cell gets at least does not count
    shown = [cells[at] for at in long]
    joined = {name: np.concatenate([cell[name] for cell in shown]) for name in shown[0]}
    return np.concatenate([rows[at] for at in long]), joined


def test_shares_of_masked_replaced_and_kept_genes(three_thousand: tuple, toy_vocabulary: Vocabulary) -> None:
    """15 % are chosen; of these 80 % masked, 10 % another gene, 10 % as they are."""
    tokens, shown = three_thousand
    chosen, is_gene = shown["labels"] != NOTHING, ~toy_vocabulary.is_special[tokens]
    assert is_share(chosen, is_gene, 0.15)
    assert is_share(shown["input_ids"] == toy_vocabulary.mask, chosen, 0.8)
    same = shown["input_ids"] == tokens
    assert is_share(same, chosen, 0.1 + 0.1 / toy_vocabulary.n_genes)  # drawn from all, the same one included
    replaced = shown["input_ids"][chosen & ~same & (shown["input_ids"] != toy_vocabulary.mask)]
    assert not toy_vocabulary.is_special[replaced].any()
    assert len(np.unique(replaced)) > 0.9 * toy_vocabulary.n_genes


def test_all_ranks_are_chosen_alike(three_thousand: tuple, toy_vocabulary: Vocabulary) -> None:
    tokens, shown = three_thousand
    chosen, is_gene = shown["labels"] != NOTHING, ~toy_vocabulary.is_special[tokens]
    for first, last in ((1, 6), (6, 16), (16, 31)):
        band = is_gene & (shown["position_ids"] >= first) & (shown["position_ids"] < last)
        assert is_share(chosen, band, 0.15)


def test_all_chosen_genes_are_masked_for_evaluation(vocabulary: Vocabulary, make_rows: MakeRows) -> None:
    rows = make_rows(vocabulary, 300)
    some, every = all_cells(rows, vocabulary), all_cells(rows, vocabulary, hide_all=True)
    for at in range(300):
        shown = every[at]
        np.testing.assert_array_equal(shown["labels"], some[at]["labels"])
        chosen = shown["labels"] != NOTHING
        assert (shown["input_ids"][chosen] == vocabulary.mask).all()
        np.testing.assert_array_equal(shown["input_ids"][~chosen], rows[at][~chosen])


# --- the same whoever asks ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker:UserWarning")  # on a machine of one core
def test_masking_depends_on_seed_epoch_and_cell_alone(toy_vocabulary: Vocabulary, make_rows: MakeRows) -> None:
    """Not from the size of batches, the order, the number of workers, or the cells beside it."""
    rows = make_rows(toy_vocabulary, 40)
    cells = all_cells(rows, toy_vocabulary, longest=LONGEST)
    both_epochs = np.arange(80)
    expected = seen(cells, both_epochs, batch_size=5)
    order = np.random.default_rng(0).permutation(both_epochs).tolist()
    assert seen(cells, order, batch_size=7) == expected
    assert seen(cells, order, batch_size=3, num_workers=2) == expected
    every_third = MaskedCells(rows, np.arange(0, 40, 3), toy_vocabulary, seed=0, longest=LONGEST)
    for at, cell in enumerate(range(0, 40, 3)):
        for epoch in (0, 1):
            assert as_lists(every_third[epoch * len(every_third) + at]) == expected[epoch * 40 + cell]
    torch.manual_seed(5)
    assert seen(cells, both_epochs, batch_size=5) == expected


def test_another_epoch_and_another_seed_mask_other_genes(toy_vocabulary: Vocabulary, make_rows: MakeRows) -> None:
    rows = make_rows(toy_vocabulary, 40)
    cells, other_seed = all_cells(rows, toy_vocabulary), all_cells(rows, toy_vocabulary, seed=1)
    labels = {
        name: [shown["labels"].tolist() for shown in several]
        for name, several in {
            "first": [cells[at] for at in range(40)],
            "second epoch": [cells[40 + at] for at in range(40)],
            "other seed": [other_seed[at] for at in range(40)],
        }.items()
    }
    for name in ("second epoch", "other seed"):
        same = [a == b for a, b in zip(labels["first"], labels[name], strict=True)]
        assert np.mean(same) < 0.3  # cells of two genes have little choice


# --- thinning -------------------------------------------------------------------------------------------------------


def test_long_cells_are_thinned_in_order(vocabulary: Vocabulary, make_rows: MakeRows) -> None:
    rows = make_rows(vocabulary, 400)
    cells = all_cells(rows, vocabulary, longest=LONGEST)
    assert cells.lengths.tolist() == np.minimum(rows.lengths, LONGEST).tolist()
    kept_ranks, from_the_end = [], []
    for at, whole in enumerate(rows):
        shown = cells[at]
        row = restored(shown)
        assert len(row) == cells.lengths[at]
        ranks = [whole.tolist().index(token) for token in row]
        assert ranks == sorted(set(ranks))
        assert (shown["labels"] != NOTHING).any()
        if vocabulary.has_cls:
            assert (row[0], row[-1]) == (vocabulary.cls, vocabulary.eos)
        positions = shown["position_ids"].tolist()
        if len(whole) <= LONGEST:
            assert positions == list(range(len(whole)))
            continue
        assert positions in (ranks, list(range(LONGEST)))
        kept_ranks.append(positions == ranks)
        if len(whole) > 40:
            from_the_end.append(max(ranks[:-1]) > 22)
    assert abs(np.mean(kept_ranks) - 0.5) < 4 * 0.5 / np.sqrt(len(kept_ranks))
    assert np.mean(from_the_end) > 0.9  # genes at the end of a long cell are learnt from, too


def test_the_cell_vector_is_that_of_what_a_thinned_cell_shows(toy_vocabulary: Vocabulary, make_rows: MakeRows) -> None:
    """Of all tokens that are left, also those hidden in what is shown."""
    rows = make_rows(toy_vocabulary, 50)

    def cell_vector(row: np.ndarray) -> np.ndarray:
        return np.array([len(row), row.sum()], dtype=np.float32)

    cells = all_cells(rows, toy_vocabulary, longest=LONGEST, cell_vector=cell_vector)
    assert (rows.lengths > LONGEST).any()
    for at in range(len(rows)):
        cell = cells[at]
        left = np.where(cell["labels"] == NOTHING, cell["input_ids"], cell["labels"])
        assert cell["cell_vector"].tolist() == [min(rows.lengths[at], LONGEST), left.sum()]
    assert "cell_vector" not in all_cells(rows, toy_vocabulary)[0]


# --- batches --------------------------------------------------------------------------------------------------------


def test_padding(vocabulary: Vocabulary, make_rows: MakeRows) -> None:
    rows = make_rows(vocabulary, 8)
    cells = [all_cells(rows, vocabulary)[at] for at in range(8)]
    batch = Padded(vocabulary)(cells)
    is_gene = batch.pop("is_gene")
    assert torch.equal(is_gene, ~torch.from_numpy(vocabulary.is_special)[batch["input_ids"]])
    assert {name: value.dtype for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids", "attention_mask"), torch.int64
    )
    assert {value.shape for value in batch.values()} == {(8, rows.lengths.max())}
    assert batch["attention_mask"].sum(1).tolist() == rows.lengths.tolist()
    for at, cell in enumerate(cells):
        for name, values in cell.items():
            np.testing.assert_array_equal(batch[name][at, : len(values)], values)
        assert (batch["input_ids"][at, rows.lengths[at] :] == vocabulary.pad).all()
        assert (batch["labels"][at, rows.lengths[at] :] == NOTHING).all()


def test_cell_vectors_are_batched(toy_vocabulary: Vocabulary, make_rows: MakeRows) -> None:
    rows = make_rows(toy_vocabulary, 3)
    cells = all_cells(rows, toy_vocabulary, cell_vector=lambda row: np.full(4, len(row), dtype=np.float32))
    batch = Padded(toy_vocabulary)([cells[at] for at in range(3)])
    assert batch["cell_vector"].dtype == torch.float32
    assert batch["cell_vector"].tolist() == [[length] * 4 for length in rows.lengths]


def epoch_of(order: SimilarLengths, epoch: int) -> np.ndarray:
    order.epoch = epoch
    return np.array(list(order))


def test_each_epoch_has_every_cell_once_in_an_order_of_its_own() -> None:
    lengths = np.random.default_rng(0).integers(2, 500, 333).astype(np.int32)
    order, again, other = (SimilarLengths(lengths, 8, seed) for seed in (0, 0, 1))
    assert len(order) == 333
    state = torch.get_rng_state()
    epochs = [epoch_of(order, epoch) for epoch in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    for epoch, found in enumerate(epochs):
        assert sorted(found.tolist()) == list(range(333 * epoch, 333 * (epoch + 1)))  # names the epoch, too
        np.testing.assert_array_equal(epoch_of(again, epoch), found)
        assert (epoch_of(other, epoch) != found).mean() > 0.9
    assert (epochs[0] != epochs[1] - 333).mean() > 0.9
    np.testing.assert_array_equal(epoch_of(order, 1), epochs[1])  # whatever was asked before


def test_neighbours_are_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(2, 500, 800).astype(np.int32)

    def padded(found: np.ndarray) -> int:
        batches = lengths[found].reshape(-1, 8)
        return int((batches.max(axis=1)[:, None] - batches).sum())

    assert padded(epoch_of(SimilarLengths(lengths, 8, 0), 0)) < 0.2 * padded(np.arange(800))


# --- known classes --------------------------------------------------------------------------------------------------

CELLS = np.array([5, 0, 12, 3, 8])


def classes_of_tokens(toy: Toy) -> np.ndarray:
    classes = np.random.default_rng(0).integers(0, 3, len(toy.vocabulary))
    classes[toy.vocabulary.is_special] = NOTHING
    classes[np.flatnonzero(~toy.vocabulary.is_special)[::4]] = NOTHING
    return classes


def classes_of_cells(toy: Toy) -> np.ndarray:
    return np.random.default_rng(1).integers(-1, 3, (len(toy.ids), 2)) * [1, 2]


def of_genes(toy: Toy, rows: np.ndarray = CELLS) -> LabelledCells:
    return LabelledCells(toy.tokens, rows, of_token=classes_of_tokens(toy))


def of_cells(toy: Toy, rows: np.ndarray = CELLS) -> LabelledCells:
    return LabelledCells(toy.tokens, rows, of_cell=classes_of_cells(toy))


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


def test_examples_are_copies_of_the_tokens(toy: Toy) -> None:
    """Writing into it changes no token of the cell."""
    before = toy.ids.copy()
    of_genes(toy)[0]["input_ids"][:] = 1
    np.testing.assert_array_equal(toy.ids, before)


@pytest.mark.parametrize("make", [of_genes, of_cells])
def test_a_batch_is_padded_at_the_end(toy: Toy, make: type) -> None:
    vocabulary = toy.vocabulary
    cells = make(toy)
    parts = [cells[at] for at in (3, 0, 4)]
    batch = Padded(vocabulary, of_cells=make is of_cells)(parts)
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
    batch = Padded(toy.vocabulary)([cells[at] for at in range(5)])
    special = torch.from_numpy(toy.vocabulary.is_special)[batch["input_ids"]]
    assert not (batch["is_gene"] & special).any()
    n_special = toy.vocabulary.n_specials
    assert batch["is_gene"].sum(dim=1).tolist() == (toy.lengths[CELLS] - n_special).tolist()
    assert (batch["labels"][special] == NOTHING).all()
    assert (batch["labels"] != NOTHING).any()


def test_a_cell_is_the_same_in_every_batch(toy: Toy) -> None:
    """A cell is the same in whatever batch it comes."""
    cells = of_cells(toy)
    together = Padded(toy.vocabulary, of_cells=True)([cells[at] for at in range(5)])
    for at in range(5):
        alone = Padded(toy.vocabulary, of_cells=True)([cells[at]])
        n = alone["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask", "is_gene"):
            assert torch.equal(together[name][at, :n], alone[name][0])
        assert torch.equal(together["labels"][at], alone["labels"][0])
