"""Masked-gene training: which genes are hidden, what the loss is, what a stopped run leaves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM

from gfx import settings
from gfx._engine import training
from gfx._engine.training import Cells, MaskedGeneModel, MaskGenes, make_model, mask_genes, masked_accuracy

from_generator = np.random.default_rng
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
}


@pytest.fixture(params=["v1", "v2"])
def vocabulary(request):
    return request.getfixturevalue("toy_vocabulary_v1" if request.param == "v1" else "toy_vocabulary")


def encoded(vocabulary, n_cells, n_genes=60, seed=0):
    """Cells of 1 to `n_genes` genes, padded."""
    rng = from_generator(seed)
    genes = np.flatnonzero(~vocabulary.is_special)
    front, behind = ([vocabulary.cls], [vocabulary.eos]) if vocabulary.has_cls else ([], [])
    rows = [[*front, *rng.choice(genes, rng.integers(1, n_genes + 1), replace=False), *behind] for _ in range(n_cells)]
    ids = np.zeros((n_cells, max(map(len, rows))), dtype=np.uint16)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
    return Cells(ids, np.array([len(row) for row in rows], dtype=np.int32))


def hidden(vocabulary, cells, seed=0):
    genes = np.flatnonzero(~vocabulary.is_special)
    ids = cells.ids.astype(np.int64)
    masked, labels = mask_genes(ids, vocabulary, genes, from_generator(seed))
    return ids, masked, labels


def model_for(vocabulary, seed=0, **config):
    return make_model(
        vocabulary, SMALL | config, gene_vectors=None, gene_frequency=np.full(len(vocabulary), 0.1), seed=seed
    )


# --- masking --------------------------------------------------------------------------------------------------------


def test_special_tokens_and_padding_are_never_chosen(vocabulary):
    ids, masked, labels = hidden(vocabulary, encoded(vocabulary, 500))
    is_special = vocabulary.is_special[ids]
    assert (labels[is_special] == -100).all()
    assert (masked[is_special] == ids[is_special]).all()


def test_labels_are_the_chosen_genes_and_all_else_stays(vocabulary):
    ids, masked, labels = hidden(vocabulary, encoded(vocabulary, 500))
    chosen = labels != -100
    assert (labels[chosen] == ids[chosen]).all()
    assert (masked[~chosen] == ids[~chosen]).all()


def test_every_cell_has_something_to_predict(vocabulary):
    cells = encoded(vocabulary, 400, n_genes=3)
    for seed in range(3):
        _, _, labels = hidden(vocabulary, cells, seed)
        assert (labels != -100).any(axis=1).all()


def test_shares(vocabulary):
    """15 % are chosen; of these 80 % masked, 10 % another gene, 10 % as they are: within four standard errors."""
    ids, masked, labels = hidden(vocabulary, encoded(vocabulary, 3000))
    long = (~vocabulary.is_special[ids]).sum(axis=1) > 30  # here the gene that each cell gets at least does not count
    chosen, is_gene = labels[long] != -100, ~vocabulary.is_special[ids[long]]

    def is_share(hits, of, share):
        n = of.sum()
        return abs((hits & of).sum() / n - share) < 4 * np.sqrt(share * (1 - share) / n)

    assert is_share(chosen, is_gene, 0.15)
    assert is_share(masked[long] == vocabulary.mask, chosen, 0.8)
    same = masked[long] == ids[long]
    n_genes = vocabulary.n_genes
    assert is_share(same, chosen, 0.1 + 0.1 / n_genes)  # another gene is drawn from all, the same one included
    replaced = masked[long][chosen & ~same & (masked[long] != vocabulary.mask)]
    assert not vocabulary.is_special[replaced].any()
    assert len(np.unique(replaced)) > 0.9 * n_genes


def test_the_input_is_left_alone(vocabulary):
    cells = encoded(vocabulary, 20)
    before = cells.ids.copy()
    ids, _, _ = hidden(vocabulary, cells)
    np.testing.assert_array_equal(ids, before)


def test_collating(vocabulary):
    cells = encoded(vocabulary, 8)
    batch = MaskGenes(vocabulary, seed=0)([cells[at] for at in range(8)])
    assert {name: value.dtype for name, value in batch.items()} == dict.fromkeys(batch, torch.int64)
    assert batch["attention_mask"].sum(1).tolist() == cells.lengths.tolist()
    shown = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    np.testing.assert_array_equal(shown, cells.ids[:, : cells.lengths.max()])


def test_long_cells_are_thinned_in_order(vocabulary):
    cells = encoded(vocabulary, 50)
    collate = MaskGenes(vocabulary, seed=0, longest=20)
    batch = collate([cells[at] for at in range(50)])
    assert batch["input_ids"].shape[1] == 20
    shown = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"]).numpy()
    kept_ends = []
    for at, length in enumerate(batch["attention_mask"].sum(1)):
        row = shown[at, :length]
        whole = cells.ids[at, : cells.lengths[at]].tolist()
        assert len(row) == min(20, len(whole))
        places = [whole.index(token) for token in row]
        assert places == sorted(places)
        if vocabulary.has_cls:
            assert (row[0], row[-1]) == (vocabulary.cls, vocabulary.eos)
        if len(whole) > 30:
            kept_ends.append(max(places[:-1]) > 22)
    assert np.mean(kept_ends) > 0.8  # genes at the end of a long cell are learnt from, too


def test_masks_follow_the_seed(vocabulary):
    cells = [encoded(vocabulary, 8)[at] for at in range(8)]
    first, again, other = (MaskGenes(vocabulary, seed)(cells)["labels"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- loss -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(vocabulary):
    cells = encoded(vocabulary, 16)
    return MaskGenes(vocabulary, seed=0)([cells[at] for at in range(16)])


def test_loss_is_that_of_the_whole_model(vocabulary, batch):
    """Scoring only where a gene is hidden changes no number."""
    ours = model_for(vocabulary).eval()
    whole = BertForMaskedLM(ours.config).eval()
    whole.load_state_dict(ours.state_dict())
    with torch.no_grad():
        found, expected = ours(**batch), whole(**batch)
        everywhere = ours(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    chosen = batch["labels"] != -100
    torch.testing.assert_close(found.logits, expected.logits[chosen], atol=1e-5, rtol=0)
    torch.testing.assert_close(everywhere.logits, expected.logits, atol=1e-5, rtol=0)


def test_gradients_are_those_of_the_whole_model(vocabulary, batch):
    ours = model_for(vocabulary, cell_weight=0.0).train()
    whole = BertForMaskedLM(ours.config).train()
    whole.load_state_dict(ours.state_dict())
    ours(**batch).loss.backward()
    whole(**batch).loss.backward()
    gradients = dict(whole.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-6, rtol=1e-4, msg=name)


def test_the_first_position_predicts_the_cell(vocabulary, batch):
    """In training, the loss of predicting each chosen gene from position 0 is added, by hand here."""
    model = model_for(vocabulary, cell_weight=0.5).train()
    whole = BertForMaskedLM(model.config).eval()
    whole.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = model(**batch).loss.item()
        expected = whole(**batch)
    scores = torch.log_softmax(expected.logits[:, 0], dim=-1)
    cell = [-scores[row, token].item() for row, labels in enumerate(batch["labels"]) for token in labels if token >= 0]
    assert found == pytest.approx(expected.loss.item() + 0.5 * np.mean(cell), abs=1e-4)


def test_an_untrained_model_knows_the_frequencies(vocabulary):
    frequency = from_generator(0).random(len(vocabulary))
    model = make_model(vocabulary, SMALL, gene_vectors=None, gene_frequency=frequency, seed=0)
    np.testing.assert_allclose(model.cls.predictions.bias.detach(), np.log(frequency), atol=1e-6)


def test_gene_vectors_to_start_from(vocabulary):
    vectors = from_generator(0).normal(size=(len(vocabulary), 16)).astype(np.float32)
    model = make_model(vocabulary, SMALL, gene_vectors=vectors, gene_frequency=np.ones(len(vocabulary)), seed=0)
    random = model_for(vocabulary).bert.embeddings.word_embeddings.weight.detach()
    words = model.bert.embeddings.word_embeddings.weight.detach()
    special = vocabulary.is_special
    np.testing.assert_array_equal(words[~special], vectors[~special])
    np.testing.assert_array_equal(words[special], random[special])


def test_accuracy(vocabulary):
    """A model that always says the same: right as often as that gene is hidden."""
    cells = encoded(vocabulary, 60)
    favourite = np.flatnonzero(~vocabulary.is_special)[7]
    model = model_for(vocabulary)
    with torch.no_grad():
        model.cls.predictions.bias.zero_()
        model.cls.predictions.bias[favourite] = 1000.0
    found = masked_accuracy(model, cells, vocabulary, batch_size=7)
    order = np.argsort(cells.lengths, kind="stable")
    collate = MaskGenes(vocabulary, 0)
    labels = [
        collate([cells[at] for at in order[start : start + 7]])["labels"].numpy().ravel() for start in range(0, 60, 7)
    ]
    labels = np.concatenate(labels)
    labels = labels[labels != -100]
    assert found["n"] == len(labels)
    assert found["top_1"] == pytest.approx((labels == favourite).mean())
    assert found["top_1"] <= found["top_10"] <= 1


def test_rank_baseline(vocabulary):
    """Cells that all have the same genes in the same order are predicted from rank alone."""
    genes = np.flatnonzero(~vocabulary.is_special)[:20]
    front, behind = ([vocabulary.cls], [vocabulary.eos]) if vocabulary.has_cls else ([], [])
    ids = np.tile(np.array([*front, *genes, *behind], dtype=np.uint16), (30, 1))
    cells = Cells(ids, np.full(30, ids.shape[1], dtype=np.int32))
    found = training.rank_baseline(cells, cells, vocabulary, n_bins=1000)
    assert found["top_1"] == found["top_10"] == 1
    shuffled = encoded(vocabulary, 300)
    assert training.rank_baseline(shuffled, shuffled, vocabulary)["top_1"] < 0.1


# --- the Trainer around it ------------------------------------------------------------------------------------------


ARGUMENTS = {
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "save_steps": 4,
    "eval_steps": 4,
    "warmup_steps": 1,
    "use_cpu": True,
}


def run(vocabulary, folder, *, model=None, epochs=1, **arguments):
    """One stage on 64 cells: 8 steps of 8 cells an epoch."""
    model = model or model_for(vocabulary)
    with settings.override(verbosity=0):
        history = training.train(
            model,
            encoded(vocabulary, 64, n_genes=20),
            encoded(vocabulary, 8, n_genes=20, seed=1),
            vocabulary,
            folder,
            longest=22,
            epochs=epochs,
            arguments=ARGUMENTS | arguments,
            seed=0,
        )
    return model, history


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(found, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_training_follows_the_seed(toy_vocabulary, tmp_path):
    first, history = run(toy_vocabulary, tmp_path / "first")
    second, again = run(toy_vocabulary, tmp_path / "second")
    assert_same_weights(weights(second), weights(first))
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (history, again)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_accumulated_batches_have_the_loss_of_one(toy_vocabulary, tmp_path):
    """The sum over four batches is not taken for their mean."""
    _, one = run(toy_vocabulary, tmp_path / "one", learning_rate=0.0)
    _, four = run(
        toy_vocabulary,
        tmp_path / "four",
        learning_rate=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    losses = [np.mean([entry["loss"] for entry in history if "loss" in entry]) for history in (one, four)]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


class Stopped(BaseException):
    """What ends a run from outside, like Ctrl-C."""


def stop_in_step(monkeypatch, step):
    """Count steps of training, and stop in one of them."""
    steps, forward = [], MaskedGeneModel.forward

    def counted(self, *args, **kwargs):
        if self.training:
            steps.append(1)
            if len(steps) == step:
                raise Stopped
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MaskedGeneModel, "forward", counted)
    return steps


def test_a_stopped_stage_goes_on_from_its_last_checkpoint(toy_vocabulary, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_step(patch, 7)
        with pytest.raises(Stopped):
            run(toy_vocabulary, tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    steps = stop_in_step(monkeypatch, 1000)
    _, history = run(toy_vocabulary, tmp_path)
    assert len(steps) == 4
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 9))


def test_a_checkpoint_that_was_not_finished_is_passed_over(toy_vocabulary, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_step(patch, 11)
        with pytest.raises(Stopped):
            run(toy_vocabulary, tmp_path, epochs=2)
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()  # the last file of a checkpoint
    steps = stop_in_step(monkeypatch, 1000)
    run(toy_vocabulary, tmp_path, epochs=2)
    assert len(steps) == 16 - 4


def test_a_finished_stage_is_read_and_not_trained_again(toy_vocabulary, tmp_path, monkeypatch):
    trained, history = run(toy_vocabulary, tmp_path)
    steps = stop_in_step(monkeypatch, 1)
    again, log = run(toy_vocabulary, tmp_path, model=model_for(toy_vocabulary, seed=5))
    assert steps == []
    assert_same_weights(weights(again), weights(trained))
    assert log == json.loads(json.dumps(history))


def test_a_stage_stopped_while_it_was_finished_is_finished(toy_vocabulary, tmp_path):
    """The folder of the finished stage is there, its last file is not."""
    trained, _ = run(toy_vocabulary, tmp_path)
    expected = weights(trained)
    (tmp_path / "finished" / "history.json").unlink()
    (tmp_path / "finished" / "model.safetensors").write_bytes(b"half of it")
    again, _ = run(toy_vocabulary, tmp_path)
    assert_same_weights(weights(again), expected)
    assert (tmp_path / "finished" / "history.json").is_file()
