"""A model of one's own, from counts to embeddings."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import gfx
from gfx.models import build_vocabulary, load, pretrain
from gfx.models._pretrain import _keep_to_plan

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "hidden_dropout_prob": 0.0,
    "initializer_range": 0.2,  # wide, so that so narrow a model learns at once
}
QUICK = {
    "per_device_train_batch_size": 16,
    "logging_steps": 1,
    "save_steps": 5,
    "eval_steps": 10,
    "warmup_steps": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
}


def gene_ids(n, start=1):
    return [f"ENSG{number:011d}" for number in range(start, start + n)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models wait for their threads longer than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def structured():
    """240 cells of six types, each with 10 genes of its own beside noise: who sees the others knows the hidden one."""
    rng = np.random.default_rng(0)
    types = np.arange(240) % 6
    rate = np.full((240, 60), 0.02)
    for kind in range(6):
        rate[np.ix_(types == kind, np.arange(10 * kind, 10 * kind + 10))] = 4.0
    adata = ad.AnnData(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)))
    adata.var_names = gene_ids(60)
    adata.obs_names = [f"cell{at}" for at in range(240)]
    adata.obs["type"] = pd.Categorical([f"type{kind}" for kind in types])
    return adata


@pytest.fixture(scope="module")
def trained(structured, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "own"
    with gfx.settings.override(verbosity=0):
        returned = pretrain(
            [structured], folder, config=TINY, curriculum=[(24, 2), (48, 14)], training=QUICK, held_out=0.2
        )
    assert returned == folder
    return folder


# --- training -------------------------------------------------------------------------------------------------------


def report(folder):
    return json.loads((folder / "pretraining.json").read_text())


def test_it_learns_what_ranks_do_not_say(trained):
    found = report(trained)
    losses = [entry["loss"] for entry in found["history"] if "loss" in entry]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert found["masked_gene"]["top_10"] > found["rank_baseline"]["top_10"] + 0.2
    assert found["masked_gene"]["top_1"] > found["rank_baseline"]["top_1"]
    assert found["cells"] + found["held_out"] == 240
    assert found["held_out"] == 48


def test_the_folder_loads_and_embeds(trained, structured):
    model = load(trained)
    assert model.name == "own"
    assert model.n_blocks == 1
    assert model.vocabulary.sha256 == build_vocabulary([structured]).sha256
    adata = structured.copy()
    gfx.tl.embed(adata, model=trained, hidden_layer=-1, dtype="float32")
    vectors = adata.obsm["X_gfx"] - adata.obsm["X_gfx"].mean(axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = (vectors @ vectors.T - 2 * np.eye(240)).argmax(axis=1)
    same = adata.obs["type"].to_numpy() == adata.obs["type"].to_numpy()[nearest]
    assert same.mean() > 0.9  # <cls> tells the types apart


def weights(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def quick_run(structured, folder, **kwargs):
    with gfx.settings.override(verbosity=0):
        return pretrain(
            structured[:80].copy(), folder, config=TINY, curriculum=[(24, 1), (48, 2)], training=QUICK, **kwargs
        )


def test_the_same_seed_gives_the_same_model(structured, tmp_path):
    first, second, other = (
        weights(quick_run(structured, tmp_path / name, rng=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    for name, tensor in first.items():
        np.testing.assert_allclose(second[name], tensor, atol=1e-6, err_msg=name)
    words = "bert.embeddings.word_embeddings.weight"
    assert abs(first[words] - other[words]).max() > 0.01


class Stopped(BaseException):
    """What ends a run from outside, like Ctrl-C."""


def test_a_stopped_run_goes_on(structured, tmp_path, monkeypatch):
    """Stopped in its second stage: the first is not trained again, the second goes on from its checkpoint."""
    from gfx._engine.training import MaskedGeneModel

    steps, forward = [], MaskedGeneModel.forward

    def counted(self, *args, **kwargs):
        if self.training:
            steps.append(1)
            if len(steps) == 13:
                raise Stopped
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MaskedGeneModel, "forward", counted)
    with pytest.raises(Stopped):
        quick_run(structured, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()  # nothing that looks like a model
    quick_run(structured, tmp_path / "run")
    # 76 cells in batches of 16: 5 steps, then 10; 12 were done, of these 10 in checkpoints.
    assert len(steps) == 13 + 5
    assert [entry["step"] for entry in report(tmp_path / "run")["history"] if "loss" in entry] == [
        *range(1, 6),
        *range(1, 11),
    ]
    assert load(tmp_path / "run").n_blocks == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"training": QUICK | {"learning_rate": 1e-3}}, "another training,"),
        ({"training": None}, "another training,"),
        ({"config": TINY | {"hidden_size": 16}}, "another config,"),
        ({"curriculum": [(24, 2)], "rng": 1}, "another curriculum, seed,"),
    ],
)
def test_a_folder_is_trained_in_one_way(structured, trained, changes, text):
    before = (trained / "model.safetensors").read_bytes()
    same = {"config": TINY, "curriculum": [(24, 2), (48, 14)], "training": QUICK, "held_out": 0.2}
    with gfx.settings.override(verbosity=0), pytest.raises(ValueError, match=f"holds a run with {text}"):
        pretrain([structured], trained, **(same | changes))
    assert (trained / "model.safetensors").read_bytes() == before


def test_a_plan_is_the_same_when_it_is_read_back(tmp_path):
    plan = {"curriculum": ((24, 1),), "training": {"logging_dir": tmp_path, "betas": (0.9, 0.99)}}
    _keep_to_plan(tmp_path, plan)
    _keep_to_plan(tmp_path, plan)
    with pytest.raises(ValueError, match="another training,"):
        _keep_to_plan(tmp_path, plan | {"training": {"logging_dir": tmp_path, "betas": (0.9, 0.95)}})


def test_start_from_coexpression(structured, tmp_path):
    """Genes of one type start alike."""
    folder = quick_run(structured, tmp_path, start_from="coexpression", held_out=0.1)
    words = weights(folder)["bert.embeddings.word_embeddings.weight"][4:64]
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    alike = words @ words.T
    same_type = np.kron(np.eye(6), np.ones((10, 10))).astype(bool)
    assert alike[same_type & ~np.eye(60, dtype=bool)].mean() > alike[~same_type].mean() + 0.2


def test_a_vocabulary_that_was_made_before(structured, tmp_path):
    vocabulary = build_vocabulary([structured], name="mine", genes=structured.var_names[:40])
    folder = quick_run(structured, tmp_path, vocabulary=vocabulary)
    assert load(folder).vocabulary.sha256 == vocabulary.sha256
    assert load(folder).vocabulary.name == "mine"


@pytest.mark.parametrize("held_out", [0.0, 1.0])
def test_both_parts_need_cells(structured, tmp_path, held_out):
    with pytest.raises(ValueError, match=rf"`held_out={held_out}` keeps \d+ of 80 cells"):
        quick_run(structured, tmp_path, held_out=held_out)


def test_a_source_without_the_vocabularys_genes(structured, tmp_path):
    first = structured[:20, :30].copy()
    first.var_names = gene_ids(30, 5000)
    vocabulary = build_vocabulary([structured])
    with pytest.raises(ValueError, match=r"source 1: no gene of the vocabulary 'own'.*'ENSG00000005000'"):
        pretrain([structured, first], tmp_path, vocabulary=vocabulary, config=TINY, training=QUICK)


def test_nothing_is_said_when_nothing_is_to_be_said(structured, tmp_path, capsys):
    quick_run(structured, tmp_path)
    assert capsys.readouterr().out == ""


def test_cells_of_one_gene_teach_nothing(structured, tmp_path):
    counts = structured.X.toarray()
    counts[:, 1:] = 0
    alone = ad.AnnData(sparse.csr_matrix(counts), var=structured.var)
    with pytest.raises(ValueError, match="No cell has more than one gene of the vocabulary"):
        pretrain([alone], tmp_path, config=TINY, training=QUICK)
