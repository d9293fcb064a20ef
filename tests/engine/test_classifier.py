"""The classifier against transformers' own, its losses by hand, and how it is written and read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification

from gfx._core.linear_head import LinearHead
from gfx._engine.classifier import (
    HEAD_FIELD,
    Classifier,
    Head,
    freeze,
    head_of,
    load_classifier,
    make_classifier,
    save_classifier,
    set_head,
    weigh_classes,
)
from gfx._engine.encoder import random_encoder
from gfx._engine.examples import NOTHING, LabelledCells, Padded

if TYPE_CHECKING:
    from pathlib import Path

    from tests.engine.conftest import Toy

CPU = torch.device("cpu")
GENES = Head("genes", "gene", {"labels": ["tolerant", "sensitive", "unknown"]})
TASKS = {"stage": ["early", "mid", "late"], "type": ["healthy", "sick"]}
HEADS = {pooling: Head("cells", pooling, TASKS) for pooling in ("cls", "mean", "pooler")} | {"gene": GENES}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

Batch = dict[str, torch.Tensor]


def classifier(toy: Toy, head: Head, seed: int = 0, *, random: bool = False, **config: Any) -> Classifier:
    settings = toy.model.config | config
    return make_classifier(toy.model.weights, settings, head, seed=seed, n_layers=toy.model.n_layers, random=random)


def batch_of(toy: Toy, head: Head, seed: int = 0) -> Batch:
    """All cells with tokens, and random classes for two of three genes, or for most cells."""
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(toy.lengths)
    if head.of == "genes":
        of_token = rng.integers(0, head.n_logits, len(toy.vocabulary))
        of_token[toy.vocabulary.is_special | (rng.random(len(of_token)) < 1 / 3)] = NOTHING
        cells = LabelledCells(toy.tokens, rows, of_token=of_token)
    else:
        sizes = list(map(len, head.tasks.values()))
        of_cell = rng.integers(0, sizes, (len(toy.ids), len(sizes)))
        of_cell[rng.random(of_cell.shape) < 0.2] = NOTHING
        cells = LabelledCells(toy.tokens, rows, of_cell=of_cell)
    return Padded(toy.vocabulary, of_cells=head.of == "cells")([cells[at] for at in range(len(cells))])


def same_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# --- heads ----------------------------------------------------------------------------------------------------------


def test_logits_stand_side_by_side() -> None:
    head = HEADS["mean"]
    assert head.slices == {"stage": slice(0, 3), "type": slice(3, 5)}
    assert head.n_logits == 5
    logits = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0))
    found = head.probabilities(logits)
    assert found.dtype == torch.float32
    for part in head.slices.values():
        raised = np.exp(logits[..., part].double().numpy())
        np.testing.assert_allclose(found[..., part], raised / raised.sum(axis=-1, keepdims=True), atol=1e-6)
        np.testing.assert_allclose(found[..., part].sum(dim=-1), 1, atol=1e-6)
    assert head.probabilities(logits.bfloat16()).dtype == torch.float32


TWO, THREE = {"0": "no", "1": "yes"}, {"1": "b", "0": "a", "10": "z", "2": "c"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["BertForTokenClassification"]}, Head("genes", "gene", {"label": ["LABEL_0", "LABEL_1"]})),
        (
            {"architectures": ["BertForTokenClassification"], "id2label": TWO},
            Head("genes", "gene", {"label": ["no", "yes"]}),
        ),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": THREE},
            Head("cells", "pooler", {"label": ["a", "b", "c", "z"]}),
        ),
        (
            {"architectures": ["BertForSequenceClassification"]},
            Head("cells", "pooler", {"label": ["LABEL_0", "LABEL_1"]}),
        ),
        ({"architectures": ["BertForMaskedLM"], "id2label": TWO}, None),
        ({"architectures": None}, None),
        ({}, None),
        (
            {
                "architectures": ["Classifier"],
                "id2label": TWO,
                HEAD_FIELD: {"of": "cells", "pooling": "cls", "tasks": {"t": ["p", "q"]}},
            },
            Head("cells", "cls", {"t": ["p", "q"]}),
        ),
    ],
)
def test_heads_of_configurations(config: dict[str, Any], expected: Head | None) -> None:
    assert head_of(config) == expected


def test_heads_of_published_files(toy: Toy, tmp_path: Path) -> None:
    """As transformers writes them, which leaves out what it takes for granted."""
    assert head_of(toy.model.config) is None
    for kind, names in ((BertForTokenClassification, None), (BertForSequenceClassification, ["a", "b", "c"])):
        config = BertConfig(**toy.model.config, **({} if names is None else {"id2label": dict(enumerate(names))}))
        kind(config).save_pretrained(tmp_path)
        head = head_of(json.loads((tmp_path / "config.json").read_text()))
        assert head.tasks == {"label": names or ["LABEL_0", "LABEL_1"]}
        assert head.of == ("genes" if kind is BertForTokenClassification else "cells")


# --- the same as transformers ---------------------------------------------------------------------------------------


def theirs(toy: Toy, ours: Classifier, **config: Any) -> BertForTokenClassification | BertForSequenceClassification:
    """Make transformers' classifier with the same weights."""
    kind = BertForTokenClassification if ours.head.of == "genes" else BertForSequenceClassification
    model = kind(BertConfig(**(toy.model.config | config), num_labels=ours.head.n_logits))
    model.load_state_dict(
        {name.replace("pooler.", "bert.pooler."): tensor for name, tensor in ours.state_dict().items()}
    )
    return model


CELLS = Head("cells", "pooler", {"label": ["a", "b", "c", "d"]})


@pytest.mark.parametrize("head", [GENES, CELLS], ids=["genes", "cells"])
def test_logits_loss_and_gradients_are_those_of_transformers(toy: Toy, head: Head) -> None:
    ours = classifier(toy, head, **NO_DROPOUT)
    other = theirs(toy, ours, **NO_DROPOUT)
    batch = batch_of(toy, head)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["labels"] if head.of == "genes" else batch["labels"][:, 0]
    found, expected = ours.eval()(**batch), other.eval()(**given, labels=labels)
    is_cell = batch["attention_mask"] == 1
    for logits in (found.logits, ours(**given).logits):
        assert logits.shape == expected.logits.shape
        at = is_cell if head.of == "genes" else slice(None)
        torch.testing.assert_close(logits[at], expected.logits[at], atol=1e-5, rtol=0)
    assert ours(**given).loss is None
    assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    ours.train()(**batch).loss.backward()
    other.train()(**given, labels=labels).loss.backward()
    gradients = {name.replace("bert.pooler.", "pooler."): one.grad for name, one in other.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3, msg=name)


def test_transformers_reads_what_is_written_of_genes(toy: Toy, tmp_path: Path) -> None:
    ours = classifier(toy, GENES).eval()
    save_classifier(ours, tmp_path)
    read = BertForTokenClassification.from_pretrained(tmp_path).eval()
    batch = batch_of(toy, GENES)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    at = batch["attention_mask"] == 1
    with torch.no_grad():
        torch.testing.assert_close(read(**given).logits[at], ours(**given).logits[at], atol=1e-5, rtol=0)
    assert read.config.id2label == {0: "tolerant", 1: "sensitive", 2: "unknown"}
    assert read.config.label2id == {"tolerant": 0, "sensitive": 1, "unknown": 2}


# --- cells become vectors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean", "gene"])
def test_logits_are_linear_in_the_states_of_the_encoder(toy: Toy, pooling: str) -> None:
    """One cell at a time, by the published model; a mean over genes has no special tokens in it."""
    head = HEADS[pooling]
    model = classifier(toy, head).eval()
    weight, bias = model.classifier.weight.detach().double().numpy(), model.classifier.bias.detach().double().numpy()
    batch = batch_of(toy, head)
    batch.pop("labels")
    with torch.no_grad():
        found = model(**batch).logits.numpy()
    for logits, cell in zip(found, filter(None, toy.cells()), strict=True):
        states = toy.reference.states(cell, -1)
        genes = [at for at, token in enumerate(cell) if toy.is_gene(token)]
        vectors = {"cls": states[0], "mean": states[genes].mean(axis=0), "gene": states}[pooling]
        expected = vectors @ weight.T + bias
        np.testing.assert_allclose(logits[: len(cell)] if pooling == "gene" else logits, expected, atol=1e-4)


@pytest.mark.parametrize("pooling", HEADS)
def test_padding_does_not_matter(toy: Toy, pooling: str) -> None:
    """Nor how long the longest cell is, nor what stands behind the end of a cell."""
    head = HEADS[pooling]
    model = classifier(toy, head).eval()
    batch = batch_of(toy, head)
    batch.pop("labels")
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, len(toy.vocabulary), batch["input_ids"].shape))
    noisy = batch | {"input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], noise)}
    with torch.no_grad():
        together, behind_noise = model(**batch).logits, model(**noisy).logits
        for at in range(len(together)):
            n = int(batch["attention_mask"][at].sum())
            alone = model(**{name: value[at : at + 1, :n] for name, value in batch.items()}).logits[0]
            for found in (together[at], behind_noise[at]):
                torch.testing.assert_close(found[:n] if pooling == "gene" else found, alone, atol=1e-5, rtol=0)


# --- loss -----------------------------------------------------------------------------------------------------------


def loss_by_hand(head: Head, logits: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> float:
    """Sum over tasks of the mean negative log-probability over what has a class, weighted by class."""
    labels = labels.reshape(-1, 1) if head.of == "genes" else labels
    logits = logits.reshape(-1, head.n_logits).astype(np.float64)
    total, start = 0.0, 0
    for at, classes in enumerate(head.tasks.values()):
        summed = counted = 0.0
        for row, truth in zip(logits[:, start : start + len(classes)], labels[:, at], strict=True):
            if truth != NOTHING:
                of_class = weight[start + truth]
                summed -= of_class * np.log(np.exp(row[truth]) / np.exp(row).sum())
                counted += of_class
        total += summed / counted if counted else 0.0
        start += len(classes)
    return total


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pooling", HEADS)
def test_loss_is_the_sum_over_tasks_of_weighted_means(toy: Toy, pooling: str, weighted: bool) -> None:
    head = HEADS[pooling]
    model = classifier(toy, head).eval()
    weight = np.ones(head.n_logits, dtype=np.float32)
    if weighted:
        weight = np.array([0.2, 3.0, 1.0, 0.0, 2.0], dtype=np.float32)[: head.n_logits]
        weigh_classes(model, weight)
    batch = batch_of(toy, head)
    with torch.no_grad():
        found = model(**batch)
    expected = loss_by_hand(head, found.logits.numpy(), batch["labels"].numpy(), weight)
    assert found.loss.item() == pytest.approx(expected, abs=1e-4)
    assert (batch["labels"] == NOTHING).any()


def test_class_weights_change_the_loss(toy: Toy) -> None:
    model, batch = classifier(toy, GENES).eval(), batch_of(toy, GENES)
    with torch.no_grad():
        plain = model(**batch).loss
        weigh_classes(model, np.full(3, 7.0, dtype=np.float32))
        assert model(**batch).loss.item() == pytest.approx(plain.item(), abs=1e-5)  # all alike
        weigh_classes(model, np.array([5.0, 1.0, 1.0], dtype=np.float32))
        assert abs(model(**batch).loss - plain) > 1e-3


@pytest.mark.parametrize("missing", ["stage", "type"])
def test_a_task_without_a_label_adds_nothing(toy: Toy, missing: str) -> None:
    head = HEADS["mean"]
    model, batch = classifier(toy, head, **NO_DROPOUT), batch_of(toy, head)
    at = list(TASKS).index(missing)
    batch["labels"][:, at] = NOTHING
    loss = model(**batch).loss
    loss.backward()
    is_missing = np.isin(np.arange(5), np.arange(5)[head.slices[missing]])
    for parameter in (model.classifier.weight, model.classifier.bias):
        assert (parameter.grad[is_missing] == 0).all()
        assert (parameter.grad[~is_missing] != 0).any()
    other = 1 - at
    part = head.slices[list(TASKS)[other]]
    alone = Head("cells", "mean", {"only": list(TASKS.values())[other]})
    logits, labels = model(**batch).logits.detach().numpy(), batch["labels"].numpy()
    expected = loss_by_hand(alone, logits[:, part], labels[:, other : other + 1], np.ones(3))
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pooling", ["gene", "mean"])
def test_a_batch_without_a_label_has_no_gradient(toy: Toy, pooling: str) -> None:
    model, batch = classifier(toy, HEADS[pooling]), batch_of(toy, HEADS[pooling])
    batch["labels"][:] = NOTHING
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


# --- the start ------------------------------------------------------------------------------------------------------


def test_the_encoder_is_the_pretrained_one(toy: Toy) -> None:
    """The official multi-task classifier starts from random weights instead."""
    pretrained, config = toy.encoder().state_dict(), toy.model.config
    for head in HEADS.values():
        model = classifier(toy, head)
        assert same_state(model.bert.state_dict(), pretrained)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert all(parameter.requires_grad for parameter in model.parameters())
        control = classifier(toy, head, seed=3, random=True)
        shape = {"n_layers": toy.model.n_layers, "device": CPU, "dtype": torch.float32}
        assert same_state(control.bert.state_dict(), random_encoder(config, seed=3, **shape).state_dict())
        words = "embeddings.word_embeddings.weight"
        assert not torch.equal(control.bert.state_dict()[words], pretrained[words])
        assert all(parameter.requires_grad for parameter in control.parameters())
        assert torch.equal(control.classifier.weight, classifier(toy, head, seed=3).classifier.weight)


def test_a_classifier_has_as_many_layers_as_wanted(toy: Toy) -> None:
    model = make_classifier(toy.model.weights, toy.model.config, GENES, seed=0, n_layers=2)
    assert same_state(model.bert.state_dict(), toy.encoder(-2).state_dict())
    assert model.config.num_hidden_layers == 2


def test_the_head_follows_the_seed_alone(toy: Toy) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = classifier(toy, CELLS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_state(classifier(toy, CELLS).state_dict(), first.state_dict())
    other = classifier(toy, CELLS, seed=1)
    assert not torch.equal(other.classifier.weight, first.classifier.weight)
    assert not torch.equal(other.pooler.dense.weight, first.pooler.dense.weight)


def test_a_fitted_head_predicts_the_same_within_the_network(toy: Toy) -> None:
    """On the states of a network, it says what it says within it."""
    rng = np.random.default_rng(0)
    linear = LinearHead(rng.normal(size=(3, 16)), rng.normal(size=3))
    model = classifier(toy, GENES).eval()
    set_head(model, linear.weight, linear.bias)
    cell = toy.cells()[0]
    with torch.no_grad():
        found = GENES.probabilities(model(torch.tensor([cell])).logits)[0]
    np.testing.assert_allclose(found, linear.probabilities(toy.reference.states(cell, -1)), atol=1e-5)
    assert model.classifier.weight.dtype == torch.float32
    assert model.classifier.weight.requires_grad


def test_frozen_blocks(toy: Toy) -> None:
    model = classifier(toy, GENES)
    freeze(model, 2)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    expected = {name for name, _ in model.named_parameters() if name.startswith(tuple(BLOCKS[:2]))}
    assert frozen == expected
    assert len(expected) == 2 * 16
    freeze(classifier(toy, GENES), 0)


BLOCKS = [f"bert.encoder.layer.{at}." for at in range(3)]


# --- written and read -----------------------------------------------------------------------------------------------


def read_back(folder: Path, dtype: torch.dtype = torch.float32) -> Classifier:
    (weights,) = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    config = json.loads((folder / "config.json").read_text())
    return load_classifier(weights, config, device=CPU, dtype=dtype)


@pytest.mark.parametrize("pooling", HEADS)
def test_a_classifier_is_read_as_it_was_written(toy: Toy, tmp_path: Path, pooling: str) -> None:
    model = classifier(toy, HEADS[pooling]).eval()
    weigh_classes(model, np.full(HEADS[pooling].n_logits, 2.0, dtype=np.float32))
    save_classifier(model, tmp_path)
    found = read_back(tmp_path)
    assert found.head == model.head
    assert list(found.head.tasks) == list(model.head.tasks)
    assert same_state(found.state_dict(), model.state_dict())
    assert not found.training
    assert not any(tensor.requires_grad or tensor.is_meta for tensor in [*found.parameters(), *found.buffers()])
    batch = batch_of(toy, HEADS[pooling])
    batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(found(**batch).logits, model(**batch).logits, atol=1e-6, rtol=0)


def test_it_is_read_in_the_precision_asked_for(toy: Toy, tmp_path: Path) -> None:
    model = classifier(toy, HEADS["mean"]).eval()
    save_classifier(model, tmp_path)
    found = read_back(tmp_path, torch.bfloat16)
    rounded = {name for name, parameter in found.named_parameters() if parameter.dtype == torch.bfloat16}
    assert rounded == {name for name, _ in found.named_parameters()} - {"classifier.weight", "classifier.bias"}
    batch = batch_of(toy, HEADS["mean"])
    with torch.no_grad():
        rough, exact = (model.head.probabilities(one(**batch).logits) for one in (found, model))
    assert 1e-5 < abs(rough - exact).max() < 0.05
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert {parameter.dtype for parameter in read_back(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize("pooling", ["gene", "cls", "mean"])
def test_a_large_centre_in_the_bias_is_not_rounded(toy: Toy, tmp_path: Path, pooling: str) -> None:
    """States that lie far from zero beside how they differ, as those of trained networks: the bias holds the centre."""
    head, draws = HEADS[pooling], np.random.default_rng(0)
    model = classifier(toy, head).eval()
    # A kept linear head reads states less their centre: here one of 30 in each of 16 places.
    weight = draws.normal(size=(head.n_logits, 16))
    centre = np.full(16, 30.0)
    with torch.no_grad():
        model.bert.encoder.layer[-1].output.LayerNorm.bias += 30
    set_head(model, weight, -weight @ centre)
    save_classifier(model, tmp_path)
    found = read_back(tmp_path, torch.bfloat16)
    batch = batch_of(toy, head)
    batch.pop("labels")
    with torch.no_grad():
        states = found.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.double()
        rough = head.probabilities(found(**batch).logits)
    if pooling != "gene":
        is_gene = batch["is_gene"].double()
        mean = (states * is_gene[..., None]).sum(dim=1) / is_gene.sum(dim=1, keepdim=True)
        states = mean if pooling == "mean" else states[:, 0]
    exact = head.probabilities((states - 30) @ torch.from_numpy(weight).T)
    torch.testing.assert_close(rough, exact, atol=1e-3, rtol=0)


def official(toy: Toy, folder: Path, kind: type, names: list[str]) -> Any:
    """Write a classifier of the official software, as its repository has it: pickled tensors."""
    model = kind(BertConfig(**toy.model.config, id2label=dict(enumerate(names)))).eval()
    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return model


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForTokenClassification])
def test_classifiers_of_the_official_software_are_read(toy: Toy, tmp_path: Path, kind: type) -> None:
    model = official(toy, tmp_path, kind, ["nf", "hcm", "dcm"])
    found = read_back(tmp_path)
    assert found.head.tasks == {"label": ["nf", "hcm", "dcm"]}
    batch = batch_of(toy, found.head)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, expected = found(**given).logits, model(**given).logits
    at = batch["attention_mask"] == 1 if kind is BertForTokenClassification else slice(None)
    torch.testing.assert_close(ours[at], expected[at], atol=1e-5, rtol=0)


def test_a_head_of_another_shape_is_refused(toy: Toy, tmp_path: Path) -> None:
    save_classifier(classifier(toy, HEADS["cls"]), tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    dict(config[HEAD_FIELD]["tasks"])["type"].append("dead")
    file.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"classifier\.\w+' has shape \(5(, 16)?,?\), \(6.* in a classifier of 6 classes"
    ):
        read_back(tmp_path)


@pytest.mark.parametrize(("pooling", "name"), [("gene", "classifier"), ("pooler", "pooler")])
def test_a_checkpoint_without_the_head_of_its_configuration_is_refused(
    toy: Toy, tmp_path: Path, pooling: str, name: str
) -> None:
    save_classifier(classifier(toy, HEADS[pooling]), tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if not key.startswith(name)}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"model\.safetensors lacks 2 tensors of a classifier of .*, such as '{name}\."
    ):
        read_back(tmp_path)


def test_a_checkpoint_without_a_block_is_refused(toy: Toy, tmp_path: Path) -> None:
    save_classifier(classifier(toy, GENES), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({key: one for key, one in load_file(file).items() if not key.startswith(BLOCKS[2])}, file)
    with pytest.raises(ValueError, match=r"lacks 16 tensors of a BERT encoder"):
        read_back(tmp_path)


def test_a_masked_model_is_no_classifier(toy: Toy, tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**toy.model.config)).save_pretrained(tmp_path)
    assert head_of(json.loads((tmp_path / "config.json").read_text())) is None


def test_the_order_of_tasks_is_kept(toy: Toy, tmp_path: Path) -> None:
    """Whatever their names: logits would be read as those of other tasks."""
    head = Head("cells", "mean", dict(reversed(TASKS.items())))
    model = classifier(toy, head)
    save_classifier(model, tmp_path)
    assert list(read_back(tmp_path).head.slices.items()) == list(model.head.slices.items())
