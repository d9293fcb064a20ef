"""The model that is pretrained: its loss, what it starts from, how it is written and read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, BertForMaskedLM, BertForSequenceClassification

from gfx._engine.examples import NOTHING, MaskedCells, Padded
from gfx._engine.pretraining import MaskedGeneModel, make_model, masked_accuracy, read_model, save_model

if TYPE_CHECKING:
    from pathlib import Path

    from tests.engine.conftest import MakeRows

    from gfx._core.vocabulary import Vocabulary

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,  # wide, so that cells and genes differ visibly
}


def model_for(vocabulary: Vocabulary, seed: int = 0, **config: object) -> MaskedGeneModel:
    frequency = np.full(len(vocabulary), 0.1)
    return make_model(vocabulary, SMALL | config, gene_vectors=None, gene_frequency=frequency, seed=seed)


def plain(model: MaskedGeneModel) -> BertForMaskedLM:
    """Make the same model as published, which scores the vocabulary everywhere."""
    whole = BertForMaskedLM(model.config)
    whole.load_state_dict(model.state_dict())
    return whole


@pytest.fixture
def batch(vocabulary: Vocabulary, make_rows: MakeRows) -> dict[str, torch.Tensor]:
    """Cells of which some are thinned, so that positions matter."""
    cells = MaskedCells(make_rows(vocabulary, 16), np.arange(16), vocabulary, seed=0, longest=30)
    return Padded(vocabulary)([cells[at] for at in range(16)])


# --- loss -----------------------------------------------------------------------------------------------------------


def test_loss_is_that_of_the_whole_model(vocabulary: Vocabulary, batch: dict[str, torch.Tensor]) -> None:
    """Scoring only where a gene is hidden changes no number."""
    ours = model_for(vocabulary).eval()
    whole = plain(ours).eval()
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        found, expected, everywhere = ours(**batch), whole(**batch), ours(**unlabelled)
    assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    torch.testing.assert_close(found.logits, expected.logits[batch["labels"] != NOTHING], atol=1e-5, rtol=0)
    torch.testing.assert_close(everywhere.logits, expected.logits, atol=1e-5, rtol=0)


def test_gradients_are_those_of_the_whole_model(vocabulary: Vocabulary, batch: dict[str, torch.Tensor]) -> None:
    ours = model_for(vocabulary).train()
    whole = plain(ours).train()
    ours(**batch).loss.backward()
    whole(**batch).loss.backward()
    gradients = dict(whole.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_cls_is_compared_with_the_cell_vector(toy_vocabulary: Vocabulary, make_rows: MakeRows, weight: float) -> None:
    """In training, `<cls>` of the last but one layer is compared with the cell vector: here by hand."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(16, 16)).astype(np.float32)
    rows = make_rows(toy_vocabulary, 16)
    cells = MaskedCells(rows, np.arange(16), toy_vocabulary, seed=0, cell_vector=lambda row: vectors[row[1] % 16])
    batch = Padded(toy_vocabulary)([cells[at] for at in range(16)])
    model = model_for(toy_vocabulary)
    model.cell_weight = weight
    cell_vector = batch.pop("cell_vector")
    with torch.no_grad():
        expected = plain(model).eval()(**batch, output_hidden_states=True)
        cls = expected.hidden_states[1][:, 0].numpy()  # after the first of two blocks
        in_training, in_evaluation = (
            model.train()(**batch, cell_vector=cell_vector),
            model.eval()(**batch, cell_vector=cell_vector),
        )
    cosine = (
        (cls * cell_vector.numpy()).sum(1) / np.linalg.norm(cls, axis=1) / np.linalg.norm(cell_vector.numpy(), axis=1)
    )
    assert in_training.loss.item() == pytest.approx(expected.loss.item() + weight * np.mean(1 - cosine), abs=1e-4)
    assert in_evaluation.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)


# --- the start ------------------------------------------------------------------------------------------------------


def test_the_output_bias_starts_at_the_log_frequency(vocabulary: Vocabulary) -> None:
    frequency = np.random.default_rng(0).random(len(vocabulary))
    frequency[7] = 0.0
    model = make_model(vocabulary, SMALL, gene_vectors=None, gene_frequency=frequency, seed=0)
    expected = np.log(np.maximum(frequency, 1e-6))
    np.testing.assert_allclose(model.cls.predictions.bias.detach(), expected, atol=1e-6)


def test_gene_embeddings_start_at_given_vectors(vocabulary: Vocabulary) -> None:
    vectors = np.random.default_rng(0).normal(size=(len(vocabulary), 16)).astype(np.float32)
    model = make_model(vocabulary, SMALL, gene_vectors=vectors, gene_frequency=np.ones(len(vocabulary)), seed=0)
    random = model_for(vocabulary).bert.embeddings.word_embeddings.weight.detach()
    words = model.bert.embeddings.word_embeddings.weight.detach()
    special = vocabulary.is_special
    np.testing.assert_array_equal(words[~special], vectors[~special])
    np.testing.assert_array_equal(words[special], random[special])


def test_the_start_follows_the_seed_alone(toy_vocabulary: Vocabulary) -> None:
    torch.manual_seed(1)
    first = model_for(toy_vocabulary).state_dict()
    torch.manual_seed(2)
    again, other = model_for(toy_vocabulary).state_dict(), model_for(toy_vocabulary, seed=1).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    words = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(other[words], first[words])


# --- written and read -----------------------------------------------------------------------------------------------


def test_models_are_written_as_plain_masked_language_models(
    vocabulary: Vocabulary, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = model_for(vocabulary).eval()
    save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    assert "cell_weight" not in config
    read, ours = (
        AutoModelForMaskedLM.from_pretrained(tmp_path).eval(),
        read_model(tmp_path / "model.safetensors", model.config.to_dict()).eval(),
    )
    assert type(read) is BertForMaskedLM
    with torch.no_grad():
        expected = model(batch["input_ids"]).logits
        torch.testing.assert_close(read(batch["input_ids"]).logits, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours(batch["input_ids"]).logits, expected, atol=1e-6, rtol=0)


def test_a_checkpoint_in_half_precision_is_trained_in_float32(toy_folder: Path) -> None:
    """Updates of float16 weights would be lost in rounding."""
    file = toy_folder.parent / "half" / "model.safetensors"
    file.parent.mkdir(exist_ok=True)
    save_file(
        {name: tensor.half() for name, tensor in load_file(toy_folder / file.name).items()}, file, {"format": "pt"}
    )
    config = json.loads((toy_folder / "config.json").read_text()) | {"dtype": "float16"}
    (file.parent / "config.json").write_text(json.dumps(config))
    assert {parameter.dtype for parameter in read_model(file, config).parameters()} == {torch.float32}


def test_a_classifier_cannot_be_trained_further(toy_vocabulary: Vocabulary, tmp_path: Path) -> None:
    config = model_for(toy_vocabulary).config
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d tensors of a masked-gene model \(a classifier.*'cls\.predictions"):
        read_model(tmp_path / "model.safetensors", config.to_dict())


# --- accuracy -------------------------------------------------------------------------------------------------------


def test_accuracy_of_a_constant_prediction_is_the_frequency_of_that_gene(
    vocabulary: Vocabulary, make_rows: MakeRows
) -> None:
    """It is right as often as that gene is hidden."""
    held_out = MaskedCells(make_rows(vocabulary, 60), np.arange(60), vocabulary, seed=0, hide_all=True)
    favourite = np.flatnonzero(~vocabulary.is_special)[7]
    model = model_for(vocabulary)
    with torch.no_grad():
        model.cls.predictions.bias.zero_()
        model.cls.predictions.bias[favourite] = 1000.0
    labels = np.concatenate([held_out[at]["labels"] for at in range(60)])
    labels = labels[labels != NOTHING]
    found = masked_accuracy(model, held_out, batch_size=7)
    assert found["n"] == len(labels)
    assert found["top_1"] == pytest.approx((labels == favourite).mean())
    assert (labels == favourite).any()


def test_loss_and_accuracy_are_means_over_genes_one_cell_at_a_time(vocabulary: Vocabulary, make_rows: MakeRows) -> None:
    """By hand: sort the scores of each hidden gene, whatever the batches."""
    held_out = MaskedCells(make_rows(vocabulary, 40), np.arange(40), vocabulary, seed=0, hide_all=True)
    model = model_for(vocabulary)
    whole = plain(model).eval()
    losses, ranks = [], []
    for at in range(40):
        shown = held_out[at]
        with torch.no_grad():
            scores = whole(torch.from_numpy(shown["input_ids"][None])).logits[0].log_softmax(dim=-1).numpy()
        for position in np.flatnonzero(shown["labels"] != NOTHING):
            truth = shown["labels"][position]
            losses.append(-scores[position, truth])
            ranks.append(np.argsort(-scores[position]).tolist().index(truth))
    for batch_size in (1, 7, 100):
        found = masked_accuracy(model, held_out, batch_size=batch_size)
        assert found["n"] == len(losses)
        assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
        assert found["top_1"] == pytest.approx(np.mean(np.array(ranks) < 1))
        assert found["top_10"] == pytest.approx(np.mean(np.array(ranks) < 10))
    assert 0 < found["top_10"] < 1


def test_accuracy_without_the_genes_that_a_cell_shows(vocabulary: Vocabulary, make_rows: MakeRows) -> None:
    """A model that prefers genes by their number: right if all that stand before the hidden one are shown."""
    rows = make_rows(vocabulary, 40)
    held_out = MaskedCells(rows, np.arange(40), vocabulary, seed=0, hide_all=True)
    model = model_for(vocabulary)
    genes = np.flatnonzero(~vocabulary.is_special)
    preference = torch.full((len(vocabulary),), -1e4)
    preference[genes] = -100.0 * torch.arange(len(genes))
    with torch.no_grad():
        model.cls.predictions.bias.copy_(preference)
    hits = {1: 0, 10: 0}
    n = 0
    for cell in range(40):
        one = held_out[cell]
        left = [gene for gene in genes if gene not in one["input_ids"]]
        for truth in one["labels"][one["labels"] >= 0]:
            n += 1
            for k in hits:
                hits[k] += int(truth in left[:k])
    found = masked_accuracy(model, held_out, batch_size=7)
    assert found["n"] == n
    assert found["top_1_unseen"] == pytest.approx(hits[1] / n)
    assert found["top_10_unseen"] == pytest.approx(hits[10] / n)
    assert found["top_10_unseen"] >= found["top_10"]  # what is left out only stood in the way
    assert hits[10] > hits[1] > 0
