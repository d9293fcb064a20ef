"""What classifiers say of genes and cells, against one cell at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from gfx import settings
from gfx._engine.class_scores import of_cells, of_occurrences, probabilities, probabilities_and_squares
from gfx._engine.classifier import Classifier, Head, load_classifier, make_classifier, save_classifier
from gfx._engine.forward import states
from gfx._engine.pooling import sum_genes, sums_of_genes

if TYPE_CHECKING:
    from pathlib import Path

    from tests.engine.conftest import Toy

    from gfx.models import Model


GENES = Head("genes", "gene", {"labels": ["tolerant", "sensitive", "unknown"]})
TASKS = {"stage": ["early", "mid", "late"], "type": ["healthy", "sick"]}
POOLINGS = ("cls", "mean", "pooler")

#: Of probabilities; see the tolerances of states in `test_pooling.py`.
SAME, SAME_IN_BFLOAT16 = 1e-5, 0.03


def classifier(toy: Toy, head: Head, dtype: torch.dtype = torch.float32) -> Classifier:
    model = make_classifier(toy.model.weights, toy.model.config, head, seed=0, n_layers=toy.model.n_layers)
    return model.to(dtype).eval()


def one_by_one(model: Classifier, toy: Toy) -> list[np.ndarray]:
    """Probabilities of the positions of a cell, or of the cell, without padding; float64."""
    found = []
    for cell in toy.cells():
        if not cell:
            found.append(np.zeros((0, model.head.n_logits)))
            continue
        is_gene = torch.tensor([[toy.is_gene(token) for token in cell]])
        with torch.no_grad():
            logits = model(torch.tensor([cell]), is_gene=is_gene).logits[0].double().numpy()
        parts = [np.exp(logits[..., part]) for part in model.head.slices.values()]
        found.append(np.concatenate([part / part.sum(axis=-1, keepdims=True) for part in parts], axis=-1))
    return found


def wanted_tokens(toy: Toy) -> np.ndarray:
    """Some genes, and all that are no genes: padding is no occurrence."""
    wanted = np.random.default_rng(0).random(len(toy.vocabulary)) < 0.4
    wanted[toy.vocabulary.is_special] = True
    return wanted


def occurrences(toy: Toy, wanted: np.ndarray, values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = [
        (cell, token, values[cell][place])
        for cell, tokens in enumerate(toy.cells())
        for place, token in enumerate(tokens)
        if wanted[token]
    ]
    return tuple(map(np.array, zip(*rows, strict=True)))


# --- occurrences ----------------------------------------------------------------------------------------------------


def test_probabilities_of_occurrences_are_those_of_single_cells(toy: Toy) -> None:
    model, wanted = classifier(toy, GENES), wanted_tokens(toy)
    found = of_occurrences(model, toy.ids, toy.lengths, wanted, probabilities, description="")
    expected = occurrences(toy, wanted, one_by_one(model, toy))
    assert [values.dtype for values in found] == [np.int64, np.int64, np.float32]
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[2], expected[2], atol=SAME)
    assert np.ptp(expected[2], axis=0).min() > 0.1


def test_states_of_occurrences_are_those_of_the_published_model(toy: Toy) -> None:
    """For a linear head on the encoder as it is."""
    wanted = wanted_tokens(toy)
    found = of_occurrences(toy.encoder(-2), toy.ids, toy.lengths, wanted, states, description="")
    of_cells = [toy.reference.states(cell, -2) if cell else None for cell in toy.cells()]
    expected = occurrences(toy, wanted, of_cells)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[2], expected[2], atol=1e-5)


def test_occurrences_do_not_depend_on_batches(toy: Toy) -> None:
    model, wanted = classifier(toy, GENES), wanted_tokens(toy)
    cell, token, values = of_occurrences(model, toy.ids, toy.lengths, wanted, probabilities, description="")
    with settings.override(batch_tokens=70):
        found = of_occurrences(model, toy.ids, toy.lengths, wanted, probabilities, description="")
    np.testing.assert_array_equal(found[0], cell)
    np.testing.assert_array_equal(found[1], token)
    np.testing.assert_allclose(found[2], values, atol=SAME)
    order = np.random.default_rng(0).permutation(len(toy.ids))
    found = of_occurrences(model, toy.ids[order], toy.lengths[order], wanted, probabilities, description="")
    back = np.argsort(order[found[0]], kind="stable")
    np.testing.assert_array_equal(order[found[0]][back], cell)
    np.testing.assert_array_equal(found[1][back], token)
    np.testing.assert_allclose(found[2][back], values, atol=SAME)


def test_genes_that_no_cell_has_have_no_occurrence(toy: Toy) -> None:
    model = classifier(toy, GENES)
    wanted = ~np.isin(np.arange(len(toy.vocabulary)), np.concatenate(toy.cells()))
    assert wanted.any()
    cell, token, values = of_occurrences(model, toy.ids, toy.lengths, wanted, probabilities, description="")
    assert len(cell) == len(token) == 0
    assert values.shape == (0, 3)


# --- genes ----------------------------------------------------------------------------------------------------------


def of_genes(model: Classifier, ids, lengths, vocabulary, *, group: np.ndarray, n_groups: int) -> np.ndarray:
    """Sum, sum of squares and number of cells, `(3, n_groups, n_tokens, n_classes)`."""
    how = {"forward": probabilities_and_squares, "width": 2 * model.head.n_logits}
    result = sum_genes(model, ids, lengths, vocabulary, group=group, n_groups=n_groups, **how)
    assert result["sum"].dtype == np.float64
    sums, n = sums_of_genes([result], n_groups * len(vocabulary))
    of_classes = sums.reshape(n_groups, len(vocabulary), 2, -1).transpose(2, 0, 1, 3)
    counts = np.broadcast_to(n.reshape(n_groups, -1, 1), of_classes.shape[1:])
    return np.stack([*of_classes, counts])


def sums_by_hand(model: Classifier, toy: Toy, group: np.ndarray, n_groups: int) -> np.ndarray:
    sums = np.zeros((3, n_groups, len(toy.vocabulary), model.head.n_logits))
    for cell, values, at in zip(toy.cells(), one_by_one(model, toy), group, strict=True):
        for token, value in zip(cell, values, strict=True):
            if toy.is_gene(token):
                sums[:, at, token] += [value, value**2, np.ones_like(value)]
    return sums


def test_sums_over_the_cells_of_a_group(toy: Toy) -> None:
    model = classifier(toy, GENES)
    group = np.array([0, 1, 3, 0, 0, 1, 3] * 2)
    found = of_genes(model, toy.ids, toy.lengths, toy.vocabulary, group=group, n_groups=4)
    np.testing.assert_allclose(found, sums_by_hand(model, toy, group, 4), atol=1e-4)
    assert (found[:, 2] == 0).all()  # a group without cells
    assert (found[:, :, toy.vocabulary.is_special] == 0).all()
    everywhere = of_genes(model, toy.ids, toy.lengths, toy.vocabulary, group=np.zeros_like(group), n_groups=1)
    np.testing.assert_allclose(found.sum(axis=1), everywhere[:, 0], atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, SAME), (torch.bfloat16, SAME_IN_BFLOAT16)])
@pytest.mark.parametrize("batch_tokens", [1, 150])
def test_genes_do_not_depend_on_batches_and_order(
    toy: Toy, batch_tokens: int, dtype: torch.dtype, tolerance: float
) -> None:
    model = classifier(toy, GENES, dtype)
    group = np.arange(len(toy.ids)) % 2
    order = np.random.default_rng(0).permutation(len(toy.ids))
    expected = of_genes(model, toy.ids, toy.lengths, toy.vocabulary, group=group, n_groups=2)
    with settings.override(batch_tokens=batch_tokens):
        cells = toy.ids[order], toy.lengths[order], toy.vocabulary
        found = of_genes(model, *cells, group=group[order], n_groups=2)
    np.testing.assert_array_equal(found[2], expected[2])
    most = expected[2].max()
    np.testing.assert_allclose(found[0], expected[0], atol=tolerance * most)
    np.testing.assert_allclose(found[1], expected[1], atol=2 * tolerance * most)


# --- cells ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
def test_probabilities_of_cells_are_those_of_single_cells(toy: Toy, pooling: str) -> None:
    model = classifier(toy, Head("cells", pooling, TASKS))
    found = of_cells(model, toy.ids, toy.lengths, toy.vocabulary)
    assert found.dtype == np.float32
    assert found.shape == (len(toy.ids), 5)
    is_empty = toy.lengths == 0
    assert is_empty.any()
    assert np.isnan(found[is_empty]).all()
    expected = [values for values, empty in zip(one_by_one(model, toy), is_empty, strict=True) if not empty]
    np.testing.assert_allclose(found[~is_empty], expected, atol=SAME)
    np.testing.assert_allclose(found[~is_empty].sum(axis=1), 2, atol=1e-5)  # one for each task
    assert np.ptp(found[~is_empty], axis=0).min() > 0.02


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, SAME), (torch.bfloat16, SAME_IN_BFLOAT16)])
def test_cells_do_not_depend_on_each_other(toy: Toy, dtype: torch.dtype, tolerance: float, pooling: str) -> None:
    model = classifier(toy, Head("cells", pooling, TASKS), dtype)
    with settings.override(batch_tokens=1):
        expected = of_cells(model, toy.ids, toy.lengths, toy.vocabulary)
    for batch_tokens in (100, None):
        with settings.override(batch_tokens=batch_tokens):
            found = of_cells(model, toy.ids, toy.lengths, toy.vocabulary)
        np.testing.assert_allclose(found, expected, atol=tolerance)
    order = np.random.default_rng(0).permutation(len(toy.ids))
    found = of_cells(model, toy.ids[order], toy.lengths[order], toy.vocabulary)
    np.testing.assert_allclose(found, expected[order], atol=tolerance)


def test_cells_of_length_zero_are_left_out(toy: Toy) -> None:
    """Length 0 leaves a cell out, whatever its tokens."""
    model = classifier(toy, Head("cells", "mean", TASKS))
    lengths = np.where(np.arange(len(toy.ids)) % 2, toy.lengths, 0).astype(np.int32)
    found = of_cells(model, toy.ids, lengths, toy.vocabulary)
    expected = of_cells(model, toy.ids, toy.lengths, toy.vocabulary)
    np.testing.assert_allclose(found[1::2], expected[1::2], atol=SAME)
    assert np.isnan(found[::2]).all()


def test_tokens_behind_the_end_of_a_cell_do_not_matter(toy: Toy) -> None:
    noise = np.random.default_rng(0).integers(0, len(toy.vocabulary), toy.ids.shape).astype(toy.ids.dtype)
    noisy = np.where(np.arange(toy.ids.shape[1]) < toy.lengths[:, None], toy.ids, noise)
    wanted, group = wanted_tokens(toy), np.zeros(len(toy.ids), dtype=np.int64)
    of_gene, of_mean = classifier(toy, GENES), classifier(toy, Head("cells", "mean", TASKS))
    found, expected = (
        [
            of_cells(of_mean, ids, toy.lengths, toy.vocabulary),
            of_genes(of_gene, ids, toy.lengths, toy.vocabulary, group=group, n_groups=1),
            *of_occurrences(of_gene, ids, toy.lengths, wanted, probabilities, description=""),
        ]
        for ids in (noisy, toy.ids)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=SAME)


def test_logits_of_a_cell_without_genes_are_the_bias(toy_model: Model) -> None:
    """`<cls>` and `<eos>` alone: the head's bias is what is left, and no NaN."""
    vocabulary, head = toy_model.vocabulary, Head("cells", "mean", TASKS)
    model = make_classifier(toy_model.weights, toy_model.config, head, seed=0, n_layers=toy_model.n_layers).eval()
    with torch.no_grad():
        model.classifier.bias.copy_(torch.arange(5) / 5)
    ids = np.array([[vocabulary.cls, vocabulary.eos]], dtype=np.uint16)
    found = of_cells(model, ids, np.array([2], dtype=np.int32), vocabulary)
    expected = head.probabilities(model.classifier.bias.detach())
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_a_classifier_that_was_written_predicts_the_same(toy: Toy, tmp_path: Path) -> None:
    model = classifier(toy, Head("cells", "mean", TASKS))
    save_classifier(model, tmp_path)
    read = load_classifier(
        tmp_path / "model.safetensors", model.config.to_dict(), device=torch.device("cpu"), dtype=torch.float32
    )
    cells = toy.ids, toy.lengths, toy.vocabulary
    np.testing.assert_allclose(of_cells(read, *cells), of_cells(model, *cells), atol=1e-6)


def test_no_gradient_is_kept(toy: Toy) -> None:
    """Of a classifier that was just trained, too."""
    model = classifier(toy, GENES)
    assert all(parameter.requires_grad for parameter in model.parameters())
    of_genes(model, toy.ids, toy.lengths, toy.vocabulary, group=np.zeros(len(toy.ids), dtype=np.int64), n_groups=1)
    of_cells(classifier(toy, Head("cells", "cls", TASKS)), toy.ids, toy.lengths, toy.vocabulary)
    assert all(parameter.grad is None for parameter in model.parameters())
