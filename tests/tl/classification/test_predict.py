"""Predictions of trained models: against transformers, cell by cell; other people's checkpoints; what a folder says."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel

import gfx
from gfx._engine import tasks
from gfx.models import FineTuning
from gfx.models._vocabulary_file import write_vocabulary

if TYPE_CHECKING:
    from pathlib import Path

    import anndata as ad

    from gfx._core.vocabulary import Vocabulary
    from gfx.models import Model

LABELS = {"odd": [f"TOY{n}" for n in range(1, 81, 2)], "even": [f"TOY{n}" for n in range(2, 81, 2)]}
QUICK = {"n_splits": 2, "n_repeats": 1, "controls": None}
TUNED = QUICK | {"method": FineTuning(training={"max_steps": 2, "learning_rate": 1e-2})}
PROBED = QUICK | {"method": "linear_probe"}

predict_genes, predict_cells = gfx.tl.predict_genes, gfx.tl.predict_cells


def with_a_task(cells: ad.AnnData) -> ad.AnnData:
    cells.obs["a_stage"] = pd.Categorical(np.where(np.arange(cells.n_obs) % 4 < 2, "old", "young"))
    return cells


@pytest.fixture(scope="module")
def teach(toy_cells: Any, toy_model: Model, toy_model_v1: Model, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a classifier, taught once: of genes or cells, probed or tuned, with <cls> or without."""
    taught: dict[tuple[str, str, str], Path] = {}

    def make(of: str, how: str, family: str = "v2") -> Path:
        if (of, how, family) not in taught:
            folder = tmp_path_factory.mktemp("taught") / f"{of}_{how}_{family}"
            cells = with_a_task(toy_cells(24))
            model, settings = {"v1": toy_model_v1, "v2": toy_model}[family], {"probed": PROBED, "tuned": TUNED}[how]
            if of == "genes":
                gfx.tl.classify_genes(cells, LABELS, model=model, folder=folder, **settings)
            else:
                columns = ["cell_type", "a_stage"] if of == "two tasks" else "cell_type"
                gfx.tl.classify_cells(cells, columns, model=model, folder=folder, **settings)
            taught[of, how, family] = folder
        return taught[of, how, family]

    return make


@pytest.fixture
def others(toy_cells: Any) -> ad.AnnData:
    """Cells that no model was taught with."""
    return toy_cells(30, seed=8)


# --- genes ----------------------------------------------------------------------------------------------------------


def gene_by_gene(
    folder: Path, slow: Any, adata: ad.AnnData, rows: Any = range(1000)
) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Mean, standard deviation and number of cells of each gene, by transformers, one cell at a time."""
    model, report = BertForTokenClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    scores: dict[str, list[np.ndarray]] = {}
    for at, row in enumerate(slow.tokens(adata)):
        if at in rows:
            with torch.no_grad():
                found = model.eval()(torch.tensor([row])).logits[0].softmax(dim=-1).numpy()
            for token, values in zip(row, found, strict=True):
                scores.setdefault(str(slow.vocabulary.symbols[token]), []).append(values)
    return {gene: (np.mean(some, axis=0), np.std(some, axis=0), len(some)) for gene, some in scores.items()}


@pytest.mark.parametrize("how", ["tuned", "probed"])
def test_genes_are_those_of_transformers_cell_by_cell(
    how: str, teach: Any, others: ad.AnnData, any_model: Model, slow: Any
) -> None:
    folder = teach("genes", how, "v2" if any_model.vocabulary.has_cls else "v1")
    predict_genes(others, folder)
    expected = gene_by_gene(folder, slow, others)
    nothing = (np.full(2, np.nan), np.full(2, np.nan), 0)
    means, spread, n_cells = zip(*(expected.get(gene, nothing) for gene in others.var_names), strict=True)
    np.testing.assert_allclose(others.varm["gfx_predicted_genes"], means, atol=1e-5)
    np.testing.assert_allclose(others.varm["gfx_predicted_genes_sd"], spread, atol=1e-4)
    assert others.var["gfx_predicted_genes_n_cells"].tolist() == [*n_cells]
    best = [None if np.isnan(mean[0]) else ["odd", "even"][mean.argmax()] for mean in means]
    assert others.var["gfx_predicted_genes"].astype(object).where(lambda x: x.notna(), None).tolist() == best
    assert others.uns["gfx_predicted_genes"]["tasks"]["labels"].tolist() == ["odd", "even"]
    assert np.nanstd(others.varm["gfx_predicted_genes"][:, 0]) > 0.01  # not all alike


def test_genes_in_each_group(teach: Any, others: ad.AnnData, toy_slow: Any) -> None:
    others.obs["part"] = pd.Categorical(
        np.select([np.arange(30) < 12, np.arange(30) < 25], ["small", "large"], None),
        categories=["small", "no", "large"],
    )
    predict_genes(others, teach("genes", "tuned"), groupby="part")
    assert others.uns["gfx_predicted_genes"]["groups"].tolist() == ["small", "no", "large"]
    by_group, n_cells = others.varm["gfx_predicted_genes_groups"], others.varm["gfx_predicted_genes_groups_n_cells"]
    for at, group in ((0, "small"), (2, "large")):
        expected = gene_by_gene(
            teach("genes", "tuned"), toy_slow, others, np.flatnonzero(others.obs["part"] == group).tolist()
        )
        for gene, mean, n in zip(others.var_names, by_group[:, at], n_cells[:, at], strict=True):
            assert n == (expected[gene][2] if gene in expected else 0)
            np.testing.assert_allclose(mean, expected[gene][0] if gene in expected else np.nan, atol=1e-5)
    assert np.isnan(by_group[:, 1]).all()
    assert not n_cells[:, 1].any()
    # Cells without a group count overall.
    assert (n_cells.sum(axis=1) <= others.var["gfx_predicted_genes_n_cells"]).all()
    assert n_cells.sum() < others.var["gfx_predicted_genes_n_cells"].sum()
    table = gfx.get.gene_scores_df(others, "large", min_cells=1).set_index("gene")["n_cells"]
    assert table.to_dict() == {gene: n for gene, n in zip(others.var_names, n_cells[:, 2], strict=True) if n}


def test_means_of_groups_add_up_to_the_mean(teach: Any, others: ad.AnnData) -> None:
    predict_genes(others, teach("genes", "tuned"), key_added="plain")
    predict_genes(others, teach("genes", "tuned"), groupby="cell_type", key_added="x")
    n = others.varm["x_groups_n_cells"]
    assert n.sum(axis=1).tolist() == others.var["x_n_cells"].tolist()
    weighted = (np.nan_to_num(others.varm["x_groups"]) * n[..., None]).sum(axis=1) / np.maximum(n.sum(axis=1), 1)[
        :, None
    ]
    seen = others.var["x_n_cells"].to_numpy() > 0
    np.testing.assert_allclose(others.varm["x"][seen], weighted[seen], atol=1e-6)
    np.testing.assert_allclose(others.varm["x"], others.varm["plain"], atol=1e-6)
    predict_genes(others, teach("genes", "tuned"), key_added="x")  # groups of an earlier run do not stay
    assert not [name for name in others.varm if name.startswith("x_groups")]
    assert "groups" not in others.uns["x"]


def test_genes_of_the_training_set_are_marked(teach: Any, others: ad.AnnData) -> None:
    others.var_names = [f"ENSG{int(name[3:]):011d}" if name.startswith("TOY") else name for name in others.var_names]
    predict_genes(others, teach("genes", "probed"))
    said = json.loads((teach("genes", "probed") / "classification.json").read_text())["taught"]
    assert [*said] == ["odd", "even"]
    taught = {gene for some in said.values() for gene in some}
    assert taught < {f"ENSG{n:011d}" for n in range(1, 81)}  # some are in no cell
    assert len(taught) > 60
    assert set(others.var_names[others.var["gfx_predicted_genes_in_training"]]) == taught
    table = gfx.get.gene_scores_df(others, min_cells=1)
    assert (table["gene"].isin(taught) == table["in_training"]).all()


def test_a_head_on_tokens_that_others_trained_is_read(
    others: ad.AnnData, toy_vocabulary: Vocabulary, toy_slow: Any, tmp_path: Path
) -> None:
    config = BertConfig(
        vocab_size=204,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
        num_labels=3,
        id2label={0: "low", 1: "mid", 2: "high"},
        label2id={"low": 0, "mid": 1, "high": 2},
    )
    torch.manual_seed(4)
    BertForTokenClassification(config).save_pretrained(tmp_path / "theirs")
    write_vocabulary(toy_vocabulary, tmp_path / "theirs")
    predict_genes(others, tmp_path / "theirs")
    assert others.uns["gfx_predicted_genes"]["tasks"]["label"].tolist() == ["low", "mid", "high"]
    assert not others.var["gfx_predicted_genes_in_training"].any()
    for gene, (mean, *_) in gene_by_gene(tmp_path / "theirs", toy_slow, others).items():
        if gene:
            at = others.var_names.get_loc(gene)
            np.testing.assert_allclose(others.varm["gfx_predicted_genes"][at], mean, atol=1e-5)


# --- cells ----------------------------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("of", "how"), [("cells", "probed"), ("two tasks", "tuned")])
def test_cells_are_those_of_transformers_cell_by_cell(
    of: str, how: str, teach: Any, others: ad.AnnData, slow: Any
) -> None:
    has_cls = slow.vocabulary.has_cls
    folder = teach(of, how, "v2" if has_cls else "v1")
    predict_cells(others, folder)
    bert = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    head = weights(folder)
    logits = []
    for row in slow.tokens(others):
        with torch.no_grad():
            states = bert(torch.tensor([row])).last_hidden_state[0]
        vector = states[0] if has_cls else states.mean(dim=0)  # V1 has genes alone
        logits.append(head["classifier.weight"] @ vector + head["classifier.bias"])
    logits = torch.stack(logits)
    parts = {"cell_type": slice(0, 3)} if of == "cells" else {"a_stage": slice(0, 2), "cell_type": slice(2, 5)}
    assert [*others.uns["gfx_predicted_cells"]["tasks"]] == [*parts]
    assert others.obsm["gfx_predicted_cells"].shape == (30, logits.shape[1])
    for task, part in parts.items():
        expected = logits[:, part].softmax(dim=-1).numpy()
        np.testing.assert_allclose(others.obsm["gfx_predicted_cells"][:, part], expected, atol=1e-5)
        names = {"cell_type": ["a", "b", "c"], "a_stage": ["old", "young"]}[task]
        assert others.uns["gfx_predicted_cells"]["tasks"][task].tolist() == names
        best = [names[at] for at in expected.argmax(axis=1)]
        assert others.obs[f"gfx_predicted_cells_{task}"].tolist() == best


def test_special_tokens_are_not_in_the_mean_over_genes(
    cells: ad.AnnData, others: ad.AnnData, toy_model: Model, toy_slow: Any, tmp_path: Path
) -> None:
    gfx.tl.classify_cells(cells, "cell_type", model=toy_model, pooling="mean", folder=tmp_path, **PROBED)
    predict_cells(others, tmp_path)
    x, new = (np.array([toy_slow.cell(row, "mean") for row in toy_slow.tokens(adata)]) for adata in (cells, others))
    expected = fitted(x, cells.obs["cell_type"].cat.codes.to_numpy())(new)
    np.testing.assert_allclose(others.obsm["gfx_predicted_cells"], expected, atol=1e-4)


def test_masked_and_empty_cells_have_no_prediction(teach: Any, others: ad.AnnData) -> None:
    predict_cells(others, teach("cells", "probed"), key_added="all")
    empty, masked = 4, np.arange(30) % 3 > 0
    others.X = type(others.X)(others.X.multiply(np.arange(30)[:, None] != empty))
    predict_cells(others, teach("cells", "probed"), mask_obs=masked)
    used = masked & (np.arange(30) != empty)
    np.testing.assert_allclose(others.obsm["gfx_predicted_cells"][used], others.obsm["all"][used], atol=1e-6)
    assert np.isnan(others.obsm["gfx_predicted_cells"][~used]).all()
    assert (others.obs["gfx_predicted_cells_cell_type"].isna() == ~used).all()
    assert others.uns["gfx_predicted_cells"]["params"]["mask_obs"] == "array"


def test_columns_of_tasks_of_an_earlier_call_are_dropped(teach: Any, others: ad.AnnData, slots: Any) -> None:
    others.obs["gfx_predicted_cells_mine"] = "mine"
    fresh = others.copy()
    predict_cells(fresh, teach("cells", "probed"))
    for of, columns in (("two tasks", ["a_stage", "cell_type"]), ("cells", ["cell_type"]), ("two tasks", None)):
        predict_cells(others, teach(of, {"cells": "probed", "two tasks": "tuned"}[of]))
        if columns is not None:
            ours = {name for name in others.obs if name.startswith("gfx_predicted_cells")}
            assert ours == {"gfx_predicted_cells_mine", *(f"gfx_predicted_cells_{task}" for task in columns)}
    predict_cells(others, teach("cells", "probed"))
    assert slots(others) == slots(fresh)
    others.obs["gfx_predicted_cells_a_stage"] = "mine"
    before = slots(others)
    with pytest.raises(ValueError, match=r"`adata\.obs\['gfx_predicted_cells_a_stage'\]` holds"):
        predict_cells(others, teach("two tasks", "tuned"))
    assert slots(others) == before


# --- several devices and workers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["predict_genes", "predict_cells", "classify_cells"])
def test_devices_and_workers_share_the_cells(
    name: str, teach: Any, others: ad.AnnData, toy_model: Model, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in ("CELLS_PER_BLOCK", "CELLS_PER_SUM"):
        monkeypatch.setattr(f"gfx._engine.run.{size}", 7)
    task = {"predict_genes": tasks.GeneClasses, "predict_cells": tasks.CellClasses}.get(name, tasks.CellEmbedding)
    run, devices = task.run, []
    monkeypatch.setattr(
        task, "run", lambda self, cells, device, *how: devices.append(device) or run(self, cells, device, *how)
    )
    calls = {
        "predict_genes": lambda: predict_genes(others, teach("genes", "probed"), groupby="cell_type", copy=True),
        "predict_cells": lambda: predict_cells(others, teach("two tasks", "tuned"), copy=True),
        "classify_cells": lambda: gfx.tl.classify_cells(others, "cell_type", model=toy_model, copy=True, **PROBED),
    }
    found = [calls[name]()]
    assert len(devices) == 5
    for places in ({"device": ["cpu", "cpu:0"]}, {"client": client}):
        with gfx.settings.override(**places):
            found.append(calls[name]())
    assert len(devices) == 15
    assert set(devices) == {torch.device("cpu"), torch.device("cpu:0")}
    for element in ("obsm", "varm"):
        alone, *shared = (getattr(adata, element) for adata in found)
        for key, part in itertools.product(alone, shared):
            np.testing.assert_allclose(part[key], alone[key], atol=1e-5, err_msg=key)


# --- what a linear probe leaves -------------------------------------------------------------------------------------


def fitted(x: np.ndarray, truth: np.ndarray) -> Any:
    centre, scale = x.mean(axis=0), np.sqrt(x.var(axis=0).mean())
    model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=500).fit((x - centre) / scale, truth)
    return lambda other: model.predict_proba((other - centre) / scale)


def test_the_folder_of_a_probe_holds_the_head_fitted_on_all_cells(
    teach: Any, cells: ad.AnnData, others: ad.AnnData, any_model: Model, slow: Any
) -> None:
    family, embed_as = ("v2", "cls") if any_model.vocabulary.has_cls else ("v1", "mean")
    x, new = (np.array([slow.cell(row, embed_as) for row in slow.tokens(adata)]) for adata in (cells, others))
    head = fitted(x, cells.obs["cell_type"].cat.codes.to_numpy())
    for adata, vectors in ((cells, x), (others, new)):
        predict_cells(adata, teach("cells", "probed", family))
        np.testing.assert_allclose(adata.obsm["gfx_predicted_cells"], head(vectors), atol=1e-4)


def test_the_folder_of_a_probe_holds_the_head_fitted_on_all_genes(teach: Any, cells: ad.AnnData, toy_slow: Any) -> None:
    states: dict[str, list[np.ndarray]] = {}
    for row in toy_slow.tokens(cells):
        for token, state in zip(row, toy_slow.states(row), strict=True):
            states.setdefault(str(toy_slow.vocabulary.symbols[token]), []).append(state)
    taught = [gene for gene in states if gene in {*LABELS["odd"], *LABELS["even"]}]
    head = fitted(
        np.array([np.mean(states[gene], axis=0) for gene in taught]), [gene in LABELS["even"] for gene in taught]
    )
    predict_genes(cells, teach("genes", "probed"))
    for gene, some in states.items():
        if gene:
            found = cells.varm["gfx_predicted_genes"][cells.var_names.get_loc(gene)]
            np.testing.assert_allclose(found, head(np.array(some)).mean(axis=0), atol=1e-4, err_msg=gene)


@pytest.mark.usefixtures("in_float32")
def test_a_trained_model_is_a_model_like_any_other(teach: Any, others: ad.AnnData, toy_model: Model) -> None:
    """Of a probe, the last block is the one before the last that it was fitted on."""
    gfx.tl.embed(others, model=toy_model, hidden_layer=-2, key_added="X_own")
    gfx.tl.embed(others, model=teach("cells", "probed"), hidden_layer=-1, key_added="X_probe")
    np.testing.assert_allclose(others.obsm["X_probe"], others.obsm["X_own"], atol=1e-5)
    gfx.tl.embed(others, model=teach("two tasks", "tuned"), key_added="X_tuned")
    assert others.obsm["X_tuned"].shape == (30, 16)
    assert not np.allclose(others.obsm["X_tuned"], others.obsm["X_own"], atol=1e-3)
    assert gfx.models.load(teach("genes", "tuned")).n_layers == 3
    assert gfx.models.load(teach("genes", "probed")).n_layers == 2
    gfx.tl.delete_genes(others, "TOY90", model=teach("genes", "tuned"), controls=None)


# --- what a folder says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["genes", "two tasks"])
@pytest.mark.parametrize("how", ["probed", "tuned"])
def test_notes_and_card_of_a_folder(of: str, how: str, teach: Any, toy_model: Model) -> None:
    folder = teach(of, how)
    said = json.loads((folder / "classification.json").read_text())
    assert said["start_from"] == toy_model.provenance()
    assert said["start_from"]["weights_sha256"] == hashlib.sha256(toy_model.weights.read_bytes()).hexdigest()
    assert said["params"]["method"] == {"probed": "linear_probe", "tuned": "fine_tune"}[how]
    assert said["params"]["n_splits"] == 2
    if of == "genes":
        assert said["params"]["function"] == "tl.classify_genes"
        ids = {name: {f"ENSG{int(gene[3:]):011d}" for gene in some} for name, some in LABELS.items()}
        assert all(set(some) < ids[name] for name, some in said["taught"].items())
    else:
        assert said["taught"] == {"n_cells": 24, "tasks": {"a_stage": ["old", "young"], "cell_type": ["a", "b", "c"]}}
    units = {"gene", "occurrence"} if of == "genes" else {"cell"}
    assert {row["unit"] for row in said["summary"]} == units
    assert all(0 <= row["mean"] <= 1 for row in said["summary"])

    card = (folder / "README.md").read_text()
    for part in (
        toy_model.name,
        toy_model.weights_sha256,
        toy_model.vocabulary.sha256,
        f"gfx.tl.classify_{'genes' if of == 'genes' else 'cells'}",
        "labels: odd, even" if of == "genes" else "a_stage: old, young",
        f"gfx.tl.predict_{'genes' if of == 'genes' else 'cells'}(adata, model=folder)",
    ):
        assert part in card, part
    for row in said["summary"]:
        assert f"| {row['task']} | {row['unit']} | model | {row['metric']} | {row['mean']:.3f} |" in card
    assert str(folder.parent) not in card + json.dumps(said)  # no paths of somebody's disk
    assert gfx.models.load(folder).vocabulary.sha256 == toy_model.vocabulary.sha256
    left = {path.name for path in folder.iterdir()}
    assert left - {"runs"} == {
        "README.md",
        "classification.json",
        "config.json",
        "model.safetensors",
        "plan.json",
        "vocabulary.tsv.gz",
    }


# --- models that cannot ---------------------------------------------------------------------------------------------


def test_models_without_the_right_head_are_refused(
    teach: Any, others: ad.AnnData, toy_model: Model, slots: Any, tmp_path: Path
) -> None:
    before = slots(others)
    for predict, of, other in ((predict_genes, "genes", "cells"), (predict_cells, "cells", "genes")):
        with pytest.raises(ValueError, match=rf"'toy' has no head that classifies.*gfx\.tl\.classify_{of}\("):
            predict(others, toy_model)
        with pytest.raises(ValueError, match=rf"classifies {other}, not {of}\. Use `gfx\.tl\.predict_{other}"):
            predict(others, teach(other, "probed"))
        with pytest.raises(ValueError, match="is not a folder"):
            predict(others, tmp_path / "nothing")
    assert slots(others) == before


def test_tokens_and_genes_of_another_vocabulary(
    teach: Any, others: ad.AnnData, toy_model_v1: Model, slots: Any
) -> None:
    mouse = others.copy()
    mouse.var_names = [f"ENSMUSG{n:011d}" for n in range(mouse.n_vars)]
    gfx.pp.tokenize(others, model=toy_model_v1)
    for predict, folder in ((predict_genes, teach("genes", "probed")), (predict_cells, teach("cells", "probed"))):
        for adata, text in ((others, r"made for the vocabulary 'toy-v1', this model reads 'toy'"), (mouse, "mouse")):
            before = slots(adata)
            with pytest.raises(ValueError, match=text):
                predict(adata, folder)
            assert slots(adata) == before


def test_a_head_of_other_classes_than_in_the_configuration_is_refused(
    teach: Any, others: ad.AnnData, tmp_path: Path
) -> None:
    folder = shutil.copytree(teach("cells", "probed"), tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    config["classifier_head"]["tasks"] = {"cell_type": ["a", "b"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'classifier\.weight' has shape \(3, 16\), \(2, 16\) in a classifier of"):
        predict_cells(others, folder)


def test_a_classifier_of_the_official_software_predicts_as_transformers_does(
    others: ad.AnnData, toy_vocabulary_v1: Vocabulary, slow_v1: Any, tmp_path: Path
) -> None:
    """Laid out as the published one: a pooler, a head of three classes without names, weights as a pickle."""
    config = BertConfig(
        architectures=["BertForSequenceClassification"],
        vocab_size=len(toy_vocabulary_v1),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_act="relu",
        initializer_range=0.3,
        num_labels=3,
        problem_type="single_label_classification",
    )
    torch.manual_seed(5)
    model, folder = BertForSequenceClassification(config).eval(), tmp_path / "official"
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    write_vocabulary(toy_vocabulary_v1, folder)
    predict_cells(others, folder)
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([row])).logits for row in slow_v1.tokens(others)]).softmax(dim=-1)
    np.testing.assert_allclose(others.obsm["gfx_predicted_cells"], expected.numpy(), atol=1e-5)
    assert expected.std(dim=0).min() > 0.01
    assert others.uns["gfx_predicted_cells"]["tasks"]["label"].tolist() == ["LABEL_0", "LABEL_1", "LABEL_2"]
    best = [f"LABEL_{number}" for number in expected.argmax(dim=1).tolist()]
    assert others.obs["gfx_predicted_cells_label"].tolist() == best
    with pytest.raises(ValueError, match="'official' classifies cells, not genes"):
        predict_genes(others, folder)
