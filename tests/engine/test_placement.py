"""Nothing stays on the host that belongs on the model's device: a device of its own, played on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gfx._core.edits import Edits, single_deletions
from gfx._core.screening import wanted_places
from gfx._engine.attention import Pairs, sum_attention
from gfx._engine.class_scores import of_cells, of_occurrences, probabilities, probabilities_and_squares
from gfx._engine.classifier import Head, make_classifier
from gfx._engine.examples import LabelledCells, Padded
from gfx._engine.first_order import estimate_deletions
from gfx._engine.perturb import run_edits
from gfx._engine.pooling import embed_cells, mean_genes, sum_genes, sums_of_genes


def embed_genes(*cells, n_groups, **chosen):
    """Mean hidden state of each gene, and numbers of cells."""
    slots = n_groups * len(cells[-1])
    means, counts = mean_genes(*sums_of_genes([sum_genes(*cells, n_groups=n_groups, **chosen)], slots), n_groups)
    return means[:-1], counts[:-1]


def attention_of(encoder, ids, lengths, vocabulary):
    """Sums of attention, with pairs and without some genes."""
    genes = np.flatnonzero(~vocabulary.is_special)
    numbers = np.full(len(vocabulary), -1)
    numbers[genes[:60]] = np.arange(60)
    unit = np.arange(len(lengths)) % 2
    run = encoder, ids, lengths, vocabulary
    found = sum_attention(*run, unit=unit, n_units=2, pairs=Pairs(numbers, numbers, (0, 3)))
    found |= {"each": sum_attention(*run, unit=unit, n_units=2, pairs=Pairs(numbers, numbers, None))["pairs"]}
    # Cells of the deleted genes alone would have nothing left.
    without = sum_attention(
        *run[:2], np.where(lengths > 4, lengths, 0), vocabulary, unit=unit, n_units=2, deleted=genes[:2]
    )
    return found | {f"{name} without": values for name, values in without.items()}


def is_far(tensor):
    return getattr(tensor, "is_far", False)


class FarDevice(TorchFunctionMode):
    """Plays a device with a memory of its own, and refuses what CUDA refuses.

    Far is what was made there (``device=``), moved there (``.to(device)``), or computed from what is far. Far and near
    tensors meet only as single numbers or as an index, and numpy sees near ones only.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        to_device = any(isinstance(leaf, torch.device) for leaf in leaves)
        if name in {"numpy", "__array__", "tolist"} and is_far(args[0]):
            msg = f"{name}: the tensor is on the device; use Tensor.cpu() first"
            raise TypeError(msg)
        places = {is_far(tensor) for tensor in tensors if tensor.ndim}
        if len(places) > 1 and name not in {"__getitem__", "to", "cpu", "copy_"}:
            msg = f"{name}: expected all tensors to be on the same device"
            raise RuntimeError(msg)
        result = func(*args, **kwargs)
        if name == "__getitem__":
            far = is_far(args[0])
        else:
            far = name != "cpu" and (to_device or any(is_far(tensor) for tensor in tensors))
        if name in {"to", "cpu"}:  # on the CPU these give back the same tensor
            result = result.view_as(result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not any(leaf is tensor for tensor in tensors):
                leaf.is_far = far
        return result


def make_far(model):
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.is_far = True
    return model


def far_encoder(toy, **kwargs):
    return make_far(toy.encoder(**kwargs))


def check(near, far):
    for expected, found in zip(near, far, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_cells_and_genes(toy):
    cells, group = (toy.ids, toy.lengths, toy.vocabulary), np.arange(len(toy.ids)) % 2

    def results(encoder):
        yield from (embed_cells(encoder, *cells, how=how) for how in toy.poolings)
        yield from embed_genes(encoder, *cells, group=group, n_groups=2)

    near = list(results(toy.encoder()))
    with FarDevice():
        check(near, results(far_encoder(toy)))


def edits(toy, operator):
    """Two sets in each cell that has tokens; three genes that no cell has make full cells lose their last ones."""
    genes = np.flatnonzero(~toy.vocabulary.is_special)
    absent = np.setdiff1d(genes, np.unique(toy.ids))
    sets = [absent[:3], genes[:1]] if operator == "overexpress" else [genes[:1], genes[1:2]]
    cells = np.flatnonzero(toy.lengths > toy.vocabulary.n_specials + 1)
    assert toy.lengths.max() + 3 > toy.model.max_length
    cell, which = np.tile(cells, 2), np.repeat([0, 1], len(cells))
    return Edits(operator, sets, cell, which, np.full((len(cell), 1), 4) if operator == "shift" else None)


def everything(toy, encoder, some, **wanted):
    """All that can be measured of edits, and with goals of each set."""
    return run_edits(
        encoder,
        toy.ids,
        toy.lengths,
        toy.vocabulary,
        some,
        **(
            {
                "goals": np.eye(3, 16),
                "gene_groups": some.which,
                "keep_vectors": True,
                "split": True,
                "positions": "close",
            }
            | wanted
        ),
    )


@pytest.mark.parametrize("operator", ["delete", "overexpress", "shift"])
def test_edits(toy, operator):
    some = edits(toy, operator)

    def results(encoder):
        for how in (*toy.poolings, "genes"):
            yield from everything(toy, encoder, some, how=how).values()
        yield from everything(toy, encoder, some, how="mean", positions="keep", goals=np.ones((2, 3, 16))).values()
        yield from everything(toy, encoder, some, how="mean", split=False, gene_groups=None).values()

    near = list(results(toy.encoder()))
    with FarDevice():
        check(near, results(far_encoder(toy)))


def test_attention(toy):
    def results(encoder):
        return attention_of(encoder, toy.ids, toy.lengths, toy.vocabulary).values()

    near = list(results(toy.encoder()))
    with FarDevice():
        check(near, results(far_encoder(toy)))


CPU = torch.device("cpu")
MISPLACED = {
    "made on the host": lambda far: far + torch.ones(3),
    "made from numpy": lambda far: far * torch.from_numpy(np.ones(3)),
    "used for a sum": lambda far: torch.zeros(3).index_add_(0, torch.arange(3, device=CPU), far),
    "read by numpy": lambda far: far.numpy(),
}


@pytest.mark.parametrize("mistake", MISPLACED)
def test_misplaced_tensors_are_noticed(mistake):
    with FarDevice():
        far = torch.ones(3, device=CPU)
        assert far.cpu().numpy().sum() == 3
        assert is_far(far)
        assert not is_far(far.cpu())
        with pytest.raises((RuntimeError, TypeError), match="device"):
            MISPLACED[mistake](far)


def test_a_near_encoder_is_noticed(toy):
    """The encoder reads tokens that were put on the device: near weights do not go with them."""
    with FarDevice(), pytest.raises(RuntimeError, match="same device"):
        embed_cells(toy.encoder(), toy.ids, toy.lengths, toy.vocabulary, how="mean")


def test_new_tensors_name_their_device(toy):
    """Tensors made without saying where would land on this other device, and fail or hold nothing."""
    encoder = toy.encoder()
    cells = toy.ids, toy.lengths, toy.vocabulary
    with torch.device("meta"):
        embed_cells(encoder, *cells, how="mean")
        embed_genes(encoder, *cells, group=np.zeros(len(toy.ids), dtype=np.int64), n_groups=1)
        for operator in ("delete", "overexpress", "shift"):
            for split in (True, False):
                everything(toy, encoder, edits(toy, operator), how="mean", split=split)
        attention_of(encoder, *cells)


@pytest.mark.parametrize("positions", ["keep", "close"])
def test_screens(toy, positions):
    every_gene = single_deletions(
        toy.ids, wanted_places(toy.ids, toy.lengths, ~toy.vocabulary.is_special, toy.vocabulary)
    )
    cells = toy.ids, toy.lengths, toy.vocabulary, every_gene
    goals = np.random.default_rng(0).standard_normal((2, toy.model.hidden_size))
    given = {"positions": positions, "goals": goals}

    def results(encoder):
        for pooling in (*toy.poolings, "genes"):
            yield from run_edits(encoder, *cells, how=pooling, **given).values()
        seeds = [(0, row) for row in range(len(toy.ids))]
        for pooling in toy.poolings:
            yield from estimate_deletions(encoder, *cells, how=pooling, n_probes=2, seeds=seeds, **given).values()

    near = list(results(toy.encoder()))
    with FarDevice():
        check(near, results(far_encoder(toy)))


# --- classifiers ----------------------------------------------------------------------------------------------------


def classifier(toy, pooling):
    """Classifier of genes, or of cells in two tasks; in evaluation, so that no dropout is drawn."""
    tasks = {"stage": ["early", "mid", "late"], "type": ["healthy", "sick"]}
    head = Head("genes", "gene", {"type": tasks["type"]}) if pooling == "gene" else Head("cells", pooling, tasks)
    return make_classifier(toy.model.weights, toy.model.config, head, seed=0, n_layers=toy.model.n_layers).eval()


def scores(toy, model):
    """All that is computed with classifiers that are trained."""
    cells = toy.ids, toy.lengths
    if model.head.of == "cells":
        yield of_cells(model, *cells, toy.vocabulary)
        return
    group = np.arange(len(toy.ids)) % 2
    how = {"forward": probabilities_and_squares, "width": 2 * model.head.n_logits}
    yield from sum_genes(model, *cells, toy.vocabulary, group=group, n_groups=2, **how).values()
    wanted = np.arange(len(toy.vocabulary)) % 3 == 0
    yield from of_occurrences(model, *cells, wanted, probabilities, description="")


def labelled(toy, model):
    """Cells with random classes, some without, as one batch."""
    of_token = np.where(np.arange(len(toy.vocabulary)) % 3, np.arange(len(toy.vocabulary)) % 2, -100)
    of_cell = np.stack([np.arange(len(toy.ids)) % 3, np.where(np.arange(len(toy.ids)) % 4, 1, -100)], axis=1)
    of_genes = model.head.of == "genes"
    labels = {"of_token": of_token} if of_genes else {"of_cell": of_cell}
    cells = LabelledCells(toy.tokens, np.flatnonzero(toy.lengths), **labels)
    return Padded(toy.vocabulary, of_cells=not of_genes)([cells[at] for at in range(len(cells))])


CLASSIFIERS = ["gene", "cls", "mean", "pooler"]


@pytest.mark.parametrize("pooling", CLASSIFIERS)
def test_scores_of_classifiers(toy, pooling):
    near = list(scores(toy, classifier(toy, pooling)))
    model = make_far(classifier(toy, pooling))
    with FarDevice():
        check(near, scores(toy, model))


@pytest.mark.parametrize("pooling", CLASSIFIERS)
def test_losses_of_classifiers(toy, pooling):
    """A batch is made near, and moved by the Trainer."""
    model = classifier(toy, pooling)
    batch = labelled(toy, model)
    expected = model(**batch)
    far = make_far(classifier(toy, pooling))
    with FarDevice():
        found = far(**{name: values.to(CPU) for name, values in batch.items()})
        assert is_far(found.loss)
        assert is_far(found.logits)
        assert found.loss.item() == expected.loss.item() > 0
        with pytest.raises(RuntimeError, match="same device"):
            far(**batch)


@pytest.mark.parametrize("pooling", CLASSIFIERS)
def test_new_tensors_of_classifiers_name_their_device(toy, pooling):
    model = classifier(toy, pooling)
    batch = labelled(toy, model)
    expected, near = model(**batch).loss.item(), list(scores(toy, model))
    with torch.device("meta"):
        found = model(**batch).loss
        check(near, scores(toy, model))
    assert found.item() == expected
