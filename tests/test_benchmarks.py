"""The benchmarks of quality measure what they say; the scripts run on small data."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_distances

import gfx
from gfx._engine import run as run_cells
from gfx.tl.perturbation import _controls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from tests.conftest import ToyCells

    from gfx._core.vocabulary import Vocabulary

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> object:
    """Import a script of `benchmarks/` as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def cells(script: object) -> ModuleType:
    return script("embedding_quality")


@pytest.fixture
def genes(script: object) -> ModuleType:
    return script("gene_embedding_quality")


@pytest.fixture
def masked(script: object) -> ModuleType:
    return script("masked_gene_quality")


@pytest.fixture
def folder_of_cells(tmp_path: Path, toy_cells: ToyCells) -> Path:
    """Two files of toy cells, the first with markers of its types."""
    for seed, name in enumerate(("one", "two")):
        adata = toy_cells(90, seed=seed)
        x = adata.X.toarray()
        for at, label in enumerate("abc"):
            x[np.ix_(np.flatnonzero(adata.obs["cell_type"] == label), range(20 * at, 20 * at + 20))] += 5
        adata.X = type(adata.X)(x)
        del adata.obs["donor"]
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    return tmp_path


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    capsys.readouterr()
    module.main()
    return capsys.readouterr().out


# --- cell embeddings ------------------------------------------------------------------------------------------------


def test_variants_are_what_embed_makes(cells: ModuleType, toy_cells: ToyCells, toy_folder: Path) -> None:
    model = gfx.models.load(toy_folder)
    adata = toy_cells()
    ids, lengths = cells.tokens(adata, model)
    for (how, layer), vectors in cells.embed_variants(model, ids, lengths).items():
        gfx.tl.embed(adata, model=model, hidden_layer=layer, pooling=how)
        np.testing.assert_allclose(vectors, adata.obsm["X_gfx"], atol=1e-5)
    gfx.tl.embed(adata, model=model)
    how, layer = cells.default_variant(model)
    assert adata.uns["X_gfx"]["params"]["pooling"] == how
    assert adata.uns["X_gfx"]["params"]["hidden_layer"] == layer


def test_twins_differ_and_are_drawn_by_their_seed(cells: ModuleType, toy_folder: Path, tmp_path: Path) -> None:
    model = gfx.models.load(toy_folder)
    prints = [cells.random_twin(model, tmp_path / str(at), seed).weights_sha256 for at, seed in enumerate((0, 0, 1))]
    assert prints[0] == prints[1] != prints[2]


def test_held_out_cells_are_not_learnt_from(cells: ModuleType, folder_of_cells: Path, toy_folder: Path) -> None:
    model = gfx.models.load(toy_folder)
    rows = np.array([0, 5, 7])
    corpus, held_out = cells.read_corpus(folder_of_cells, model, cells.HeldOut({"two": rows}))
    assert list(held_out) == ["two"]
    assert held_out["two"].obs_names.tolist() == [f"cell{row}" for row in rows]
    assert [(corpus.source == name).sum() for name in ("one", "two")] == [90, 87]
    everything, _ = cells.read_corpus(folder_of_cells, model, cells.HeldOut({}))
    np.testing.assert_array_equal(corpus.ids, np.delete(everything.ids, 90 + rows, axis=0))
    with pytest.raises(ValueError, match="three"):
        cells.read_corpus(folder_of_cells, model, cells.HeldOut({"three": rows}))


def test_held_out_cells_are_those_that_pretraining_names(
    cells: ModuleType, folder_of_cells: Path, tmp_path: Path
) -> None:
    two = ad.read_h5ad(folder_of_cells / "two.h5ad")
    x = two.X.toarray()
    x[3] = 0  # nothing to learn from: pretraining does not count this cell
    two.X = type(two.X)(x)
    two.write_h5ad(folder_of_cells / "two.h5ad")
    folder = tmp_path / "run"
    with gfx.settings.override(verbosity=0):
        gfx.models.pretrain(
            sorted(folder_of_cells.glob("*.h5ad")),
            folder,
            gene_ids="ensembl_id",
            curriculum=[(32, 0.1)],
            held_out=0.3,
            config={"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
        )
    from gfx.models.pretraining._shards import TokenShards

    named = cells.read_held_out(folder / "pretraining.json")
    model = gfx.models.load(folder)
    corpus, held_out = cells.read_corpus(folder_of_cells, model, named)
    assert len(corpus.ids) == 179 - sum(adata.n_obs for adata in held_out.values())
    trained_on = TokenShards(sorted(folder.glob("tokens/*"), key=lambda path: "two" in path.name))
    at = 90 + named.rows["two"][-1]
    expected, length = cells.tokens(held_out["two"][-1:].copy(), model)
    np.testing.assert_array_equal(trained_on[at], expected[0, : length[0]])


def test_log_counts_are_of_all_genes_and_sum_doubles(
    cells: ModuleType, toy_cells: ToyCells, toy_vocabulary: Vocabulary
) -> None:
    adata = toy_cells(5)
    adata.var["ensembl_id"] = [adata.var["ensembl_id"].iloc[0], *adata.var["ensembl_id"].iloc[:-1]]
    x = adata.X.toarray()
    expected = np.log1p(1e4 * (x[:, 0] + x[:, 1]) / x.sum(axis=1))
    found = cells.log_counts(adata, toy_vocabulary)
    np.testing.assert_allclose(found[:, [toy_vocabulary.first_gene + 3]].toarray()[:, 0], expected, rtol=1e-5)


def test_mean_of_gene_vectors_weighs_by_rank(cells: ModuleType, toy_vocabulary: Vocabulary) -> None:
    vectors = np.random.default_rng(0).normal(size=(len(toy_vocabulary), 3)).astype(np.float32)
    cls, eos = toy_vocabulary.cls, toy_vocabulary.eos
    ids = np.array([[cls, 10, 20, eos, 0], [cls, 30, 40, 50, eos]])
    plain = cells.mean_vectors(ids, vectors, toy_vocabulary, by_rank=False)
    np.testing.assert_allclose(plain, [vectors[[10, 20]].mean(0), vectors[[30, 40, 50]].mean(0)], rtol=1e-5)
    ranked = cells.mean_vectors(ids, vectors, toy_vocabulary, by_rank=True)
    np.testing.assert_allclose(ranked[0], (vectors[10] + 0.5 * vectors[20]) / 1.5, rtol=1e-5)


def test_batch_mixing_is_one_by_chance_and_zero_apart(cells: ModuleType) -> None:
    rng = np.random.default_rng(0)
    labels, batch = np.repeat(["a", "b"], 200), np.tile(["x", "y"], 200)
    x = rng.normal(size=(400, 5)) + 10
    assert cells.batch_mixing(cosine_distances(x), labels, batch) == pytest.approx(1, abs=0.05)
    x[batch == "x", 0] += 100
    assert cells.batch_mixing(cosine_distances(x), labels, batch) == 0
    # Types that are parted are no fault, though one batch holds most of one type.
    uneven = np.where(labels == "a", rng.choice(["x", "y"], 400, p=[0.9, 0.1]), rng.choice(["x", "y"], 400))
    x = rng.normal(size=(400, 5)) + np.where(labels == "a", 10, -10)[:, None]
    assert cells.batch_mixing(cosine_distances(x), labels, uneven) == pytest.approx(1, abs=0.08)
    assert cells.batch_mixing(cosine_distances(x), batch, batch) is None


def test_batches_name_only_what_other_batches_know(cells: ModuleType) -> None:
    labels = np.repeat(["a", "b", "c"], 40)
    batch = np.where(labels == "c", "x", np.tile(["x", "y"], 60))
    x = np.eye(3)[np.repeat([0, 1, 2], 40)] + 0.01 * np.random.default_rng(0).normal(size=(120, 3))
    distances = cosine_distances(x)
    assert cells.shared_types(labels, batch) == ["a", "b"]
    # `c` is in one batch alone: its cells cannot be named and do not count.
    assert cells.transfer(distances, labels, batch, seed=0) == 1
    assert cells.transfer(distances, labels, None, seed=0) == 1
    shuffled = np.random.default_rng(0).permutation(labels)
    assert cells.transfer(distances, shuffled, None, seed=0) < 0.6


def test_part_of_the_cells_keeps_every_type(cells: ModuleType) -> None:
    labels = np.repeat(["a", "b", "c"], [2000, 600, 11])
    part = cells.some_of_each(labels, 100)
    assert len(part) <= 100
    assert dict(zip(*np.unique(labels[part], return_counts=True), strict=True))["c"] >= cells.MIN_CELLS
    assert len(set(part)) == len(part)


TOGETHER = "held-out cells of the corpus"


def test_embedding_quality_runs(
    cells: ModuleType,
    folder_of_cells: Path,
    toy_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(cells, "N_SEEDS", 2)
    monkeypatch.setattr(cells, "TWIN_CELLS", 60)
    monkeypatch.setattr(cells, "N_VARIABLE", 100)  # of 205
    held_out = tmp_path / "held_out.npz"
    np.savez(held_out, one=np.arange(40), two=np.arange(40))
    arguments = ("--corpus", folder_of_cells, "--held-out", held_out, "--model", toy_folder)
    report = json.loads(run(cells, monkeypatch, capsys, folder_of_cells, *arguments))
    assert report["corpus_cells"] == 100
    sets = report["sets"]
    assert {name: one["cells"] for name, one in sets.items()} == {"one": 90, "two": 90, TOGETHER: 80}
    assert sets[TOGETHER]["cell_types"] == 2 * sets["one"]["cell_types"]  # a type in two files counts as two
    for one in report["sets"].values():
        assert one["held_out"] == "five folds"
        assert one["cells_for_random_weights"] == 60
        if one is not sets[TOGETHER]:  # where types of two files look alike
            assert one["embeddings"][cells.PCA_SAME]["macro_f1"] > 0.9  # the markers are plain to see
            assert one["embeddings"][cells.SVD_PLACE]["macro_f1"] > 0.9
        # The model is as random as its twins.
        assert not one["above_svd_mean"]


def test_without_a_corpus_the_report_says_what_is_left_out(
    cells: ModuleType,
    folder_of_cells: Path,
    toy_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(cells, "N_SEEDS", 1)
    monkeypatch.setattr(cells, "N_VARIABLE", 100)
    report = json.loads(run(cells, monkeypatch, capsys, folder_of_cells, "--model", toy_folder))
    assert "skipped" in report["held_out_cells"]
    assert all(one["above_svd_mean"] is None for one in report["sets"].values())
    assert not {cells.PCA_CORPUS, cells.SVD_MEAN} & set(report["sets"]["one"]["embeddings"])


# --- gene embeddings ------------------------------------------------------------------------------------------------


def test_retrieval_is_the_area_under_the_curve(genes: ModuleType) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(600, 8)).astype(np.float32)
    rows = np.arange(0, 600, 50)
    vectors[rows] += 1
    similarity = genes.cosines(vectors, np.arange(600), rows)
    areas = []
    for i, row in enumerate(rows):
        others = np.delete(similarity, i, axis=1).mean(axis=1)
        asked = np.append(np.setdiff1d(np.arange(600), rows), row)
        areas.append(roc_auc_score(asked == row, others[asked]))
    matched, unmatched = genes.retrieval(similarity, rows, np.zeros(600, dtype=int))
    assert unmatched == pytest.approx(np.mean(areas), abs=1e-6)
    assert len(matched) == genes.N_SEEDS
    assert matched.mean() == pytest.approx(unmatched, abs=0.02)
    assert matched.std() > 0


def test_matching_takes_away_what_frequency_alone_explains(genes: ModuleType) -> None:
    frequency = np.linspace(0, 1, 2000)
    rows = np.sort(np.random.default_rng(0).choice(np.arange(1000, 2000), 20, replace=False))
    similarity = -np.abs(frequency[:, None] - frequency[rows])
    matched, unmatched = genes.retrieval(similarity, rows, genes.strata(frequency))
    assert unmatched > 0.7
    assert matched.mean() == pytest.approx(0.5, abs=0.1)


def test_correlations_are_pearsons(
    genes: ModuleType, cells: ModuleType, toy_cells: ToyCells, toy_vocabulary: Vocabulary
) -> None:
    counts = cells.log_counts(toy_cells(), toy_vocabulary)
    tokens, columns = np.arange(10, 60), np.array([12, 40])
    expected = np.corrcoef(counts[:, tokens].toarray().T)[:, columns - 10]
    np.testing.assert_allclose(genes.correlations(counts, tokens, columns), expected, atol=1e-4)


def test_families_hold_what_their_name_says(genes: ModuleType) -> None:
    vocabulary = gfx.models.load("mini").vocabulary
    found = {name: set(vocabulary.symbols[tokens]) for name, tokens in genes.family_members(vocabulary).items()}
    assert all(len(members) >= genes.MIN_MEMBERS for members in found.values())
    assert {"CD3D", "CD3E", "CD3G", "CD247"} <= found["T-cell receptor, CD3 and CD8"]
    assert {"HLA-DRA", "HLA-DPB1", "CD74"} <= found["MHC class II"]
    assert {"RPL3", "RPS6", "RPLP0", "RPL13A", "RPS4X"} <= found["cytosolic ribosome"]
    assert not {"RPS6KA1", "RPL7L1", "RPS19BP1"} & found["cytosolic ribosome"]
    assert {"COX4I1", "COX5B", "COX7A2", "COX7A2L", "COX8A"} <= found["cytochrome c oxidase"]
    assert not {"COX15", "COX17", "COX20", "COX10", "COX11"} & found["cytochrome c oxidase"]
    assert not {"PSMG1", "PSME1"} & found["proteasome"]
    assert not {"TRADD", "TRAF2"} & found["T-cell receptor, CD3 and CD8"]
    assert not {"HBEGF", "HBP1", "HBS1L"} & found["haemoglobins"]
    assert not {"HSPG2", "DNAJC1"} & found["heat-shock proteins"]
    assert not {"IFIH1"} - found["interferon-induced"]


def test_sets_that_repeat_a_larger_one_are_left_out(
    genes: ModuleType, toy_vocabulary: Vocabulary, tmp_path: Path
) -> None:
    lines = ["set\tgene_name\tensembl_id"]
    sets = {"LARGE": range(1, 21), "PART": range(1, 9), "OTHER": range(18, 31), "SOME_HOUSEKEEPING": range(40, 90)}
    lines += [f"{name}\tTOY{n}\tENSG{n:011d}" for name, members in sets.items() for n in members]
    table = tmp_path / "sets.tsv"
    table.write_text("\n".join(lines))
    found = genes.listed_sets(table, toy_vocabulary)
    assert {name: len(tokens) for name, tokens in found.items()} == {"LARGE": 20, "OTHER": 13}


def test_gene_embedding_quality_runs(
    genes: ModuleType, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source = shared / "data" / "cells" / "train" / "zheng2017_sorted_garnett.h5ad"
    (tmp_path / source.name).symlink_to(source)
    few = tmp_path / "cells" / "few.h5ad"
    few.parent.mkdir()
    ad.read_h5ad(source)[:60].write_h5ad(few)
    arguments = ("--corpus", tmp_path, "--genes-dir", shared / "data" / "genes", "--data", few)
    report = json.loads(run(genes, monkeypatch, capsys, *arguments))
    near = report["neighbours"][genes.WORDS]["HLA-DRA"]
    assert {"HLA-DRB1", "HLA-DPA1"} <= set(near)
    assert report["neighbours"][genes.CONTEXT]["COL1A1"] is None  # no blood cell makes it
    means = report["retrieval"]["means"]["families"]
    assert means[genes.WORDS]["matched"] > 0.6
    assert means[genes.TWIN]["matched"] == pytest.approx(0.5, abs=0.1)
    lines = genes.markdown(report).splitlines()
    assert any(line.startswith("| MHC class II | HLA-DRA |") for line in lines)


# --- masked genes ---------------------------------------------------------------------------------------------------


def test_tally_counts_places_and_loss(masked: ModuleType) -> None:
    p = np.array([[0.5, 0.2, 0.15, 0.1, 0.05]])
    tally = masked.Tally()
    tally.add(p, np.array([0, 0]), np.array([2, 0]), np.array([1]))
    found = tally.report()
    assert found["top_1"] == 0.5
    assert found["top_10"] == 1
    assert found["loss"] == pytest.approx(-np.log([0.15, 0.5]).mean(), abs=1e-4)
    assert found["loss_unseen"] == pytest.approx(-np.log([0.15 / 0.8, 0.5 / 0.8]).mean(), abs=1e-4)
    # Without the shown genes the masked one is first.
    tally = masked.Tally()
    tally.add(p, np.array([0]), np.array([2]), np.array([0, 1]))
    assert (tally.report()["top_1"], tally.report()["top_1_unseen"]) == (0, 1)
    # One row of probabilities, or one for each masked gene: the same.
    one, many = masked.Tally(), masked.Tally()
    one.add(p, np.array([0, 0]), np.array([3, 4]), np.array([0, 1]))
    many.add(np.repeat(p, 2, axis=0), np.array([0, 1]), np.array([3, 4]), np.array([0, 1]))
    assert one.report() == many.report()
    # Of equal genes each is first half of the time, at ten equal ones none counts as first.
    assert masked.places(np.full((1, 10), 0.1), np.array([0.1]))[0] == 4.5


def test_masks_cover_genes_alone_and_do_not_change(
    masked: ModuleType, cells: ModuleType, toy_cells: ToyCells, toy_folder: Path
) -> None:
    model = gfx.models.load(toy_folder)
    ids, lengths = cells.tokens(toy_cells(20), model)
    special = model.vocabulary.is_special
    twice = [list(masked.masked_cells(ids, lengths, special)) for _ in range(2)]
    for (row, at), (_, again), length in zip(*twice, lengths, strict=True):
        np.testing.assert_array_equal(at, again)
        assert len(row) == length
        assert not special[row[at]].any()
        assert len(at) == max(1, round(0.15 * (~special[row]).sum()))


def test_masked_gene_quality_runs(
    masked: ModuleType,
    folder_of_cells: Path,
    toy_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    held_out = tmp_path / "held_out.npz"
    np.savez(held_out, one=np.arange(30))
    for way, n in ((("--held-out", held_out), 30), (("--data", folder_of_cells), 45)):
        arguments = ("--corpus", folder_of_cells, *way, "--model", toy_folder)
        report = json.loads(run(masked, monkeypatch, capsys, *arguments))
        one = report["sets"]["one"]
        assert one["cells"] == n
        assert len({row["n"] for name, row in one.items() if name != "cells"}) == 1
        for row in one.values():
            if row != n:
                assert row["loss_unseen"] < row["loss"]
        # A random model knows nothing: worse than frequencies, which know the markers.
        assert one[masked.CELL_TYPE]["loss"] < one[masked.CORPUS]["loss"] < one[masked.MODEL]["loss"]


# --- tokenizing -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as on Linux")
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_tokenizing_is_timed_beside_a_loop_of_the_same_tokens(
    script: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tokenizing = script("bench_tokenize")
    for name, value in {"N_GENES": 300, "N_DETECTED": 40, "INPUT_SIZE": 32, "N_PLAIN": 20, "REPEATS": 1}.items():
        monkeypatch.setattr(tokenizing, name, value)
    monkeypatch.setattr(tokenizing, "memory_of_process", tokenizing.measure_memory)
    with gfx.settings.override(verbosity=0):
        tokenizing.main(60)
    report = json.loads(capsys.readouterr().out)
    assert report["plain_loop"]["cells_with_our_tokens"] == 1
    assert set(report["files"]) == set(tokenizing.FILES)
    memory = [report["memory"], *(of_file["memory"] for of_file in report["files"].values())]
    assert all(of_process["tokens_mb"] == memory[0]["tokens_mb"] > 0 for of_process in memory)


# --- screens --------------------------------------------------------------------------------------------------------


def test_named_deletions_are_timed_beside_a_screen_of_the_same_genes(
    script: object, toy_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    screen = script("screen")
    for which in screen.NAMED:
        out = run(screen, monkeypatch, capsys, "--measure", which, "--folder", toy_folder, "--length", 12)
        report = json.loads(out.strip().splitlines()[-1])
        assert report["deletions"] == 2 * 4  # a quarter of the ten genes, in each of four cells
        assert report["times_screen"] == pytest.approx(report["seconds"] / report["seconds_screen"])


# --- perturbation validation ----------------------------------------------------------------------------------------


@pytest.fixture
def validation(script: object) -> ModuleType:
    return script("perturbation_validation")


def test_lineages_are_told_from_the_names_of_types(validation: ModuleType) -> None:
    types = np.array(["CD4 T", "CD8 T", "B", "CD14 Monocytes", "FCGR3A Monocytes", "NK", "Dendritic"])
    assert validation.lineage_of(types).tolist() == ["T", "T", "B", "monocytes", "monocytes", "NK", ""]


def test_other_lineages_are_weighted_by_their_cells(validation: ModuleType) -> None:
    of_gene = pd.DataFrame(
        {"own": [True, False, False, False], "n_cells": [9, 10, 30, 2], "z": [2.0, 1.0, 3.0, np.nan]}
    ).assign(shift_mean=[0.3, 0.1, 0.2, 0.9], random_weights_shift_mean=0.0, expression_mean=1.0)
    found = validation.compare_lineages(of_gene)
    assert found["z_own"] == 2
    assert found["z_others"] == pytest.approx(2.5)
    assert found["shift_others"] == pytest.approx(0.175)


def test_blood_is_asked_by_lineage(validation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adata = gfx.datasets.toy()
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).map({"T cell": "CD4 T", "B cell": "B"})
    (tmp_path / "cells/eval").mkdir(parents=True)
    adata.write_h5ad(tmp_path / "cells/eval/pbmc3k_10x.h5ad")
    for name, value in {
        "N_CELLS": 14,
        "LINEAGES": {"T": ("CD4 T",), "B": ("B",)},
        "MARKERS": {"T": ("CD3D", "CD3E"), "B": ("CD79A", "absent")},
    }.items():
        monkeypatch.setattr(validation, name, value)
    monkeypatch.setattr(_controls, "N_RANK_SAMPLE", 20)
    monkeypatch.setattr(_controls, "N_SETS", 3)
    report = validation.blood(tmp_path, "mini", None)
    assert [row["gene"] for row in report["markers"]] == ["CD3D", "CD3E", "CD79A"]
    assert report["own lineage above others, z"]["genes"] <= 3
    for name in ("T", "B"):
        assert {
            "rank: shift, spearman",
            "random_weights: shift, spearman_perturbations",
            "detection: shift, partial_spearman",
        } <= set(report[f"controls in {name}"])


# --- attention ------------------------------------------------------------------------------------------------------


def test_attention_is_timed_beside_loops_that_it_agrees_with(script: object, monkeypatch, capsys) -> None:
    attention = script("attention")
    monkeypatch.setattr(attention, "LENGTHS", (12,))
    monkeypatch.setattr(attention, "N_TOKENS", dict.fromkeys(attention.N_TOKENS, 48))
    monkeypatch.setattr(attention, "N_NAMED", 5000)
    monkeypatch.setattr(attention, "run_alone", lambda which, *given: run_here(attention, capsys, which, *given))
    report = json.loads(run(attention, monkeypatch, capsys))["12"]
    assert report["largest_difference"] < 1e-5
    assert set(report["times_naive"]) == set(attention.NAIVE)
    assert report["times_without_pairs"] > 0


def run_here(attention: ModuleType, capsys: pytest.CaptureFixture, which: str, *given: object) -> dict[str, float]:
    attention.measure(which, *given)
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1]) | {"more_mb": 1.0}


def test_random_sets_calibrate_both_tests_of_attention(script: object, monkeypatch: pytest.MonkeyPatch) -> None:
    validation = script("attention_validation")
    for name, value in {"MIN_CELLS": 5, "N_RANDOM_SETS": 3, "SIZE_OF_SETS": 10}.items():
        monkeypatch.setattr(validation, name, value)
    adata = gfx.datasets.toy()
    genes = adata.var_names[:12].tolist()
    gfx.tl.attention(adata, model="mini", genes=genes, heads="each")
    report = validation.sets_of_genes(adata, {"some": genes})
    assert report["some"]["heads"] == 16
    assert report["some"]["genes"] == 12
    calibration = report["random sets of highly ranked genes: p below 0.05"]
    assert all(0 <= share <= 1 for share in calibration.values())
    edges = pd.DataFrame([(one, other) for one in genes[:8] for other in genes[8:]], columns=["source", "target"])
    found = validation.find_edges(adata, edges)["judged"]
    assert {row["score"] for row in found} == {"attention", "ranks", "coexpression"}
    assert all(row["n_sources"] == 4 for row in found)


# --- the four lines -------------------------------------------------------------------------------------------------


def test_four_lines_are_timed_and_their_passes_counted(
    script: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run_cells, "_compute", run_cells._compute)  # the script counts there
    adata = gfx.datasets.toy()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    out = run(script("laptop"), monkeypatch, capsys, tmp_path / "cells.h5ad", "--cells", 12)
    report = json.loads(out[out.index("{\n") :])
    assert report["cells"] == report["embed"]["passes"] == 12
    assert report["attention"]["passes"] == 2 * 12  # of few cells, random weights read all
    alone, controlled = report["delete_genes, no controls"]["passes"], report["delete_genes"]["passes"]
    assert 2 <= alone < controlled <= 3 * alone + 500
    assert report["embed"]["share_of_peak"] >= 0


# --- classifiers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tasks(script: object) -> ModuleType:
    return script("paper_gene_tasks")


@pytest.fixture
def classifiers(script: object) -> ModuleType:
    return script("classification")


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the files of `tmp_path / "served"` on this machine."""
    (tmp_path / "served").mkdir()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_genes_in_two_classes_are_in_neither(tasks: ModuleType) -> None:
    table = pd.DataFrame(
        [
            ("t", "b", "G1"),
            ("t", "a", "G2"),
            ("t", "b", "G3"),
            ("t", "a", "G3"),
            ("other", "a", "G1"),
            ("t", "b", "G1"),
        ],
        columns=["task", "class", "ensembl_id"],
    )
    assert tasks.read_labels(table, "t") == {"b": ["G1"], "a": ["G2"]}


def test_what_is_fetched_has_its_hash(tasks: ModuleType, address: str, tmp_path: Path) -> None:
    (tmp_path / "served" / "labels.csv").write_text("task,class,ensembl_id\n")
    digest = hashlib.sha256((tmp_path / "served" / "labels.csv").read_bytes()).hexdigest()
    fetched = tasks.local(f"{address}/labels.csv#sha256={digest}")
    assert fetched.read_bytes() == (tmp_path / "served" / "labels.csv").read_bytes()
    (tmp_path / "served" / "labels.csv").unlink()
    assert tasks.local(f"{address}/labels.csv#sha256={digest}") == fetched  # is there already
    (tmp_path / "served" / "labels.csv").write_text("something else")
    with pytest.raises(ValueError, match="does not match"):
        tasks.local(f"{address}/labels.csv#sha256={'0' * 64}")
    with pytest.raises(SystemExit, match="without its hash"):
        tasks.local(f"{address}/labels.csv")
    assert tasks.local("here.csv") == Path("here.csv")


def test_paper_gene_tasks_run_on_official_tokens(
    tasks: ModuleType,
    toy_cells: ToyCells,
    toy_folder_v1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Tokens that the official software wrote give what the same cells give when gfx tokenizes them."""
    cells = toy_cells(30)
    gfx.pp.tokenize(cells, model=toy_folder_v1)
    lengths = cells.obs["gfx_tokens_n"]
    rows = [row[:n].tolist() for row, n in zip(cells.obsm["gfx_tokens"], lengths, strict=True)]
    folder = tmp_path / "some.dataset"
    folder.mkdir()
    table = pa.table({"input_ids": rows, "length": lengths.to_numpy()})
    file = folder / "data-00000-of-00001.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for place in (folder, file):
        read = tasks.read_dataset(place, gfx.models.load(toy_folder_v1), 12)
        at = read.obs_names.astype(int)
        assert read.n_obs == len(set(at)) == 12
        np.testing.assert_array_equal(read.obs["gfx_tokens_n"], lengths.iloc[at])
        longest = int(lengths.iloc[at].max())
        np.testing.assert_array_equal(read.obsm["gfx_tokens"], cells.obsm["gfx_tokens"][at, :longest])

    ids = cells.var["ensembl_id"].astype(str)
    labels = pd.DataFrame(
        {
            "task": "n1_network",
            "class": np.where(np.arange(80) % 2, "n1_peripheral", "n1_central"),
            "ensembl_id": ids.iloc[:80].to_numpy(),
        }
    )
    loci = pd.DataFrame({"task": "bivalent_vs_lys4_only", "class": np.tile(["bivalent", "lys4_only"], 20)})
    wide = pd.DataFrame({"task": f"{loci['task'][0]}_genomewide", "class": np.tile(["bivalent", "lys4_only"], 60)})
    for table in (loci, wide):
        table["ensembl_id"] = ids.iloc[: len(table)].to_numpy()
    pd.concat([labels, loci, wide]).to_csv(tmp_path / "labels.csv", index=False)
    given = tmp_path / "labels.csv", folder, "--model", toy_folder_v1, "--seeds", 2
    names = "n1_network", "bivalent_vs_lys4_only_genomewide"
    how = "--method", "linear_probe", "--learning-curve", 8
    out = run(tasks, monkeypatch, capsys, *given, *how, "--tasks", *names)
    report = json.loads(out[out.index("{\n") :])
    network, genome = (report[name] for name in names)
    assert network["cells"] == 30
    assert set(network["learning curve, per gene"]) == {"8", "30"}
    assert 0 <= network["model, per gene"]["auc"] <= 1
    assert network["published, V1-10M fine-tuned"]["auc"] == 0.81
    assert {"random_weights, per gene", "expression, per gene"} <= set(network)
    n_seen = np.isin(ids.iloc[40:120], read.var_names).sum()  # 40 are learnt, and not told
    assert 70 < genome["genes"] <= n_seen == 80
    assert 0 <= genome["model, per gene"]["auc"] <= 1


def test_folds_are_weighted_by_the_points_of_their_curves(tasks: ModuleType) -> None:
    metrics = pd.DataFrame({"metric": "auc", "unit": "occurrence", "method": "model", "repeat": 0, "fold": [0, 1]})
    metrics["value"] = [0.6, 0.9]
    roc = pd.DataFrame({"unit": "occurrence", "method": "model", "repeat": 0, "fold": [0, 0, 1, 1, 1, 1]})
    roc["tpr"] = [0.0, 0.0, 0.0, 0.5, 0.7, 0.7]
    assert tasks.over_folds(metrics, roc) == {"mean": 0.825, "sd": 0.13}


def test_classification_runs(
    classifiers: ModuleType,
    toy_cells: ToyCells,
    toy_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "cells" / "eval").mkdir(parents=True)
    (tmp_path / "cells" / "train").mkdir()
    (tmp_path / "genes").mkdir()
    cells = toy_cells(120)
    cells.write_h5ad(tmp_path / "cells" / "eval" / "some.h5ad")
    cells.write_h5ad(tmp_path / "cells" / "train" / "some.h5ad")
    labels = pd.DataFrame({"task": classifiers.TASK, "class": np.tile(["a", "b"], 40)})
    labels["ensembl_id"] = cells.var["ensembl_id"].astype(str).to_numpy()[:80]
    labels.to_csv(tmp_path / "genes" / "paper_gene_labels.csv.gz", index=False)
    monkeypatch.setattr(classifiers, "SETS", {"toy": ("eval/some", "cell_type", "donor", (20,))})
    monkeypatch.setattr(classifiers, "MODEL", toy_folder)
    given = tmp_path, "--seeds", 2, "--cells", 24, "--naive-cells", 12, "--length", 30
    out = run(classifiers, monkeypatch, capsys, *given)
    report = json.loads(out[out.index("{\n") :])
    assert report["toy"]["folds"] == 4
    assert {"model, 90 cells", "model, 20 cells", "random_weights, 90 cells"} <= set(report["toy"])
    speed = report["speed"]
    assert speed["linear head, 24 cells"]["cells_per_s"] > 0
    assert 0 <= speed["naive loop, 12 cells"]["occurrence"] <= 1
