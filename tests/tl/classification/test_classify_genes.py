"""Classes of genes: labels, scores against a slow reference, what is held out, what they are held against."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score, roc_curve

import gfx
from gfx._engine import fine_tuning
from gfx._engine.encoder import random_encoder
from gfx.models import FineTuning
from gfx.tl._baselines import describe_genes
from gfx.tl._prepare import prepare
from gfx.tl.classification._cross_validation import CONTROLS
from gfx.tl.classification._learners import LinearMethod, expression_of_genes, make_learners
from gfx.tl.classification._training import settle_method
from gfx.tl.classification._units import Split, Units, draw_genes

if TYPE_CHECKING:
    from pathlib import Path

    from gfx.models import Model

probe = partial(gfx.tl.classify_genes, method="linear_probe", n_splits=2, n_repeats=1, controls=None)
#: Fields of a fine-tuning among the arguments of a call.
CHOICES = ("training", "freeze_layers", "adapter", "patience", "class_weight", "n_epochs", "n_trials")


def tune(adata: ad.AnnData, what: Any, **how: Any) -> None:
    """Fine-tune in two folds, with some choices."""
    choices = {name: how.pop(name) for name in CHOICES if name in how}
    how = {"n_splits": 2, "n_repeats": 1, "controls": None, "method": FineTuning(**choices)} | how
    gfx.tl.classify_genes(adata, what, **how)


CPU = torch.device("cpu")
ONE_STEP = {"max_steps": 1, "save_strategy": "no"}
STRENGTH = 0.1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 on every CPU; few draws of bootstraps, and no penalty to choose: both are tested in the core."""
    monkeypatch.setattr("gfx._engine.device.has_fast_bfloat16", lambda *_, **__: False)
    monkeypatch.setattr("gfx._core.classification.N_DRAWS", 5)
    monkeypatch.setattr("gfx._core.linear_head._best_strength", lambda *_: STRENGTH)


def genes(start: int, stop: int, step: int = 1) -> list[str]:
    return [f"TOY{n}" for n in range(start, stop, step)]


#: Classes that have nothing to do with the genes; neighbours in the vocabulary are of different classes.
ODD_EVEN = {"even": genes(2, 81, 2), "odd": genes(1, 81, 2)}


def detected(cells: ad.AnnData) -> np.ndarray:
    return np.asarray((cells.X > 0).sum(axis=0)).ravel()


def table(adata: ad.AnnData, key: str = "gfx_gene_class") -> pd.DataFrame:
    """All that is told of each gene, by name."""
    columns = [name for name in adata.var if name.startswith(key)]
    parts = [pd.DataFrame(np.asarray(adata.varm[name]), adata.var_names) for name in adata.varm if name.startswith(key)]
    return pd.concat([adata.var[columns], *parts], axis=1)


# --- labels ---------------------------------------------------------------------------------------------------------


def test_a_mapping_and_a_column_say_the_same(cells: ad.AnnData, toy_model: Model) -> None:
    cells.var["kind"] = pd.Series({gene: name for name, some in ODD_EVEN.items() for gene in some})
    assert cells.var["kind"].isna().sum() == 125
    probe(cells, ODD_EVEN, model=toy_model, key_added="mapping")
    probe(cells, "kind", model=toy_model, key_added="column")
    for name in ("mapping", "mapping_sd", "mapping_fold"):
        np.testing.assert_array_equal(cells.varm[name], cells.varm[name.replace("mapping", "column")])
    for name in ("mapping", "mapping_predicted", "mapping_n_cells"):
        pd.testing.assert_series_equal(
            cells.var[name], cells.var[name.replace("mapping", "column")], check_names=False, obj=name
        )
    assert [*cells.uns["mapping"]["tasks"]] == ["labels"]
    assert [*cells.uns["column"]["tasks"]] == ["kind"]
    assert cells.uns["column"]["tasks"]["kind"].tolist() == ["even", "odd"]
    assert set(cells.uns["column"]["metrics"]["task"]) == {"kind"}


def test_a_categorical_column_keeps_the_order_of_its_categories(cells: ad.AnnData, toy_model: Model) -> None:
    kind = pd.Series({gene: name for name, some in ODD_EVEN.items() for gene in some}).reindex(cells.var_names)
    cells.var["kind"] = pd.Categorical(kind, categories=["odd", "none", "even"])
    probe(cells, "kind", model=toy_model)
    assert cells.uns["gfx_gene_class"]["tasks"]["kind"].tolist() == ["odd", "even"]
    assert cells.var["gfx_gene_class"].cat.categories.tolist() == ["odd", "even"]


@pytest.mark.parametrize("how", ["text", "categories"])
def test_blank_text_is_no_class(how: str, cells: ad.AnnData, toy_model: Model) -> None:
    """As a table reads that was filled in by hand, or read from CSV without missing values."""
    kind = pd.Series({gene: name for name, some in ODD_EVEN.items() for gene in some}).reindex(cells.var_names)
    cells.var["missing"] = kind
    blank = kind.where(kind.notna(), np.where(np.arange(cells.n_vars) % 2, "", "  "))
    cells.var["blank"] = blank if how == "text" else pd.Categorical(blank)
    probe(cells, "missing", model=toy_model, key_added="one")
    probe(cells, "blank", model=toy_model, key_added="other")
    assert cells.uns["other"]["tasks"]["blank"].tolist() == ["even", "odd"]
    assert table(cells, "one").equals(table(cells, "other").set_axis(table(cells, "one").columns, axis=1))


def test_values_of_a_column_that_read_alike(cells: ad.AnnData, toy_model: Model, slots: Any) -> None:
    cells.var["kind"] = pd.Series(dict(zip(genes(1, 61), [1, "1", 2] * 20, strict=True)), dtype=object)
    before = slots(cells)
    with pytest.raises(ValueError, match=r"`adata\.var\['kind'\]` has values .*\(int, str\) that read .*: \['1'\]"):
        probe(cells, "kind", model=toy_model)
    assert slots(cells) == before


def test_a_column_of_truth_values(cells: ad.AnnData, toy_model: Model) -> None:
    cells.var["sensitive"] = np.arange(cells.n_vars) % 3 == 0
    probe(cells, "sensitive", model=toy_model)
    assert cells.uns["gfx_gene_class"]["tasks"]["sensitive"].tolist() == ["False", "True"]
    given = cells.var["gfx_gene_class"]
    assert (given.dropna() == cells.var["sensitive"].astype(str)[given.notna()]).all()


def test_genes_are_found_by_any_of_their_names(cells: ad.AnnData, toy_model: Model) -> None:
    def named(gene: str) -> str:
        n = int(gene[3:])
        return [gene, f"ENSG{n:011d}", f"ENSG{n:011d}.7", f"OLDTOY{n}", gene.lower()][n % 5]

    probe(cells, ODD_EVEN, model=toy_model, key_added="symbols")
    other = {name: iter([named(gene) for gene in some]) for name, some in ODD_EVEN.items()}
    other["odd"] = [*other["odd"], "ENSG00000999999", "TOY3"]  # the retired name of TOY1, and one more time TOY3
    probe(cells, other, model=toy_model, key_added="others")
    assert table(cells, "symbols").equals(table(cells, "others").set_axis(table(cells, "symbols").columns, axis=1))


def test_classes_stay_in_their_order(cells: ad.AnnData, toy_model: Model) -> None:
    probe(cells, ODD_EVEN, model=toy_model, key_added="one")
    probe(cells, dict(reversed(ODD_EVEN.items())), model=toy_model, key_added="other")
    assert cells.uns["one"]["tasks"]["labels"].tolist() == ["even", "odd"]
    assert cells.uns["other"]["tasks"]["labels"].tolist() == ["odd", "even"]
    np.testing.assert_array_equal(cells.varm["one_fold"], cells.varm["other_fold"])
    np.testing.assert_allclose(cells.varm["one"], cells.varm["other"][:, ::-1], atol=1e-4)
    assert cells.var["one"].astype(object).equals(cells.var["other"].astype(object))
    curves = {key: set(cells.uns[key]["roc"]["class"]) for key in ("one", "other")}
    assert curves == {"one": {"odd"}, "other": {"even"}}


WRONG = {
    "unknown genes": (
        {"a": genes(1, 9), "b": ["TOY9", "TOI10", "MYGENE", "TOY11"]},
        ValueError,
        r"does not know \['TOI10', 'MYGENE'\].*Did you mean 'TOY10'.*vocabulary 'toy'.*`unknown='drop'`",
    ),
    "two classes": ({"a": genes(1, 9), "b": genes(8, 16)}, ValueError, r"'TOY8' \(ENSG00000000008\).*'a' and 'b'"),
    "two classes by an alias": (
        {"a": genes(1, 9), "b": ["OLDTOY8", *genes(9, 16)]},
        ValueError,
        r"'TOY8' \(ENSG00000000008\) is in two classes, 'a' and 'b'",
    ),
    "two classes by a retired name": (
        {"a": genes(1, 9), "b": ["ENSG00000999999", *genes(9, 16)]},
        ValueError,
        r"'TOY1' \(ENSG00000000001\) is in two classes",
    ),
    "fewer genes than folds": (
        {"a": genes(1, 9), "b": ["TOY11"]},
        ValueError,
        r"'b' has 1 genes .*\(of 1 given\), fewer than the 2 folds",
    ),
    "fewer genes than folds, some in no cell": (
        {"a": genes(1, 9), "b": ["TOY11", "TOY10", "TOY13"]},
        ValueError,
        r"'b' has 1 genes that these cells express \(of 3 given\)",
    ),
    "one class": ({"a": genes(1, 9)}, ValueError, r"two classes at least, found \['a'\]"),
    "no class": ({}, ValueError, "two classes at least"),
    "a class without genes": ({"a": genes(1, 9), "b": []}, ValueError, "'b' has no gene that the model knows"),
    "a text for a list": ({"a": genes(1, 9), "b": "TOY9"}, TypeError, "'b' is a list of genes, found the text 'TOY9'"),
    "a list for a mapping": (genes(1, 9), TypeError, "`labels` maps classes to genes.*found a list"),
    "nothing": (None, TypeError, "found a NoneType"),
    "no such column": ("dosag", KeyError, r"Did not find 'dosag' in `adata\.var`\. Did you mean 'dosage'\?"),
    "a column of one class": ("dosage", ValueError, r"two classes at least, found \['x'\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_labels_that_make_no_sense(wrong: str, cells: ad.AnnData, toy_model: Model, slots: Any) -> None:
    labels, error, text = WRONG[wrong]
    cells.var["dosage"] = pd.Series("x", index=genes(1, 50))
    before = slots(cells)
    with pytest.raises(error, match=text):
        probe(cells, labels, model=toy_model)
    assert slots(cells) == before


def test_a_column_may_name_a_gene_twice_but_not_in_two_classes(cells: ad.AnnData, toy_model: Model) -> None:
    cells.var["kind"] = pd.Series({gene: name for name, some in ODD_EVEN.items() for gene in some})
    cells.var_names = [*cells.var_names[:-1], "OLDTOY1"]
    cells.var.loc["OLDTOY1", "kind"] = "odd"
    probe(cells, "kind", model=toy_model)
    np.testing.assert_array_equal(*cells[:, ["TOY1", "OLDTOY1"]].varm["gfx_gene_class"])
    cells.var.loc["OLDTOY1", "kind"] = "even"
    with pytest.raises(ValueError, match=r"'TOY1' .* is in two classes, 'even' and 'odd'"):
        probe(cells, "kind", model=toy_model)


def test_unknown_genes_can_be_dropped(cells: ad.AnnData, toy_model: Model, capsys: pytest.CaptureFixture) -> None:
    probe(cells, ODD_EVEN, model=toy_model, key_added="without")
    capsys.readouterr()
    probe(cells, ODD_EVEN | {"odd": ["MYGENE", *ODD_EVEN["odd"], "UNKNOWN1"]}, model=toy_model, unknown="drop")
    assert "2 of 42 genes of 'odd' are not known to the model" in capsys.readouterr().out
    assert table(cells).equals(table(cells, "without").set_axis(table(cells).columns, axis=1))
    with pytest.raises(ValueError, match="'even' has no gene that the model knows"):
        probe(cells, ODD_EVEN | {"even": ["MYGENE"]}, model=toy_model, unknown="drop")
    with pytest.raises(ValueError, match="`unknown` is one of"):
        probe(cells, ODD_EVEN, model=toy_model, unknown="ignore")


def test_genes_that_no_cell_has_are_left_out(cells: ad.AnnData, toy_model: Model, toy_slow: Any) -> None:
    probe(cells, ODD_EVEN, model=toy_model)
    in_cells = {str(toy_model.vocabulary.symbols[token]) for row in toy_slow.tokens(cells) for token in row}
    labelled = {gene for some in ODD_EVEN.values() for gene in some}
    absent = sorted(labelled - in_cells)
    assert len(absent) > 2
    out = cells[:, absent]
    assert (out.varm["gfx_gene_class_fold"] == -1).all()
    assert np.isnan(out.varm["gfx_gene_class"]).all()
    assert np.isnan(out.varm["gfx_gene_class_sd"]).all()
    assert (out.var["gfx_gene_class_n_cells"] == 0).all()
    assert out.var["gfx_gene_class"].tolist() == ["odd" if gene in ODD_EVEN["odd"] else "even" for gene in absent]
    assert out.var["gfx_gene_class_predicted"].isna().all()
    rest = cells[:, sorted(labelled & in_cells)]
    assert (rest.varm["gfx_gene_class_fold"] >= 0).all()
    assert not np.isnan(rest.varm["gfx_gene_class"]).any()
    assert set(gfx.get.gene_scores_df(cells, min_cells=0)["gene"]) == set(rest.var_names)


def test_labels_of_genes_that_no_cell_has(cells: ad.AnnData, toy_model: Model) -> None:
    with pytest.raises(ValueError, match=r"has 0 genes that these cells express \(of 2 given\)"):
        probe(cells, {"a": ["TOY10", "TOY13"], "b": ["TOY15", "TOY70"]}, model=toy_model)


def test_classes_whose_names_read_alike(cells: ad.AnnData, toy_model: Model) -> None:
    with pytest.raises(ValueError, match="'1'"):
        probe(cells, {1: genes(1, 20), "1": genes(20, 40), "2": genes(40, 60)}, model=toy_model)


def test_classes_of_two_genes(cells: ad.AnnData, toy_model: Model) -> None:
    """Of which one is left to learn from, and nothing to choose a penalty by."""
    labels = {"a": ["TOY1", "TOY2"], "b": ["TOY5", "TOY6"]}
    probe(cells, labels, model=toy_model, controls=CONTROLS)
    assert not np.isnan(cells[:, ["TOY1", "TOY2", "TOY5", "TOY6"]].varm["gfx_gene_class"]).any()


# --- scores against a slow reference --------------------------------------------------------------------------------


class ByHand:
    """States of each gene, cell by cell, and a head on their means; `fold` by gene."""

    def __init__(self, slow: Any, cells: ad.AnnData, labels: dict[str, list[str]]) -> None:
        self.class_of = {gene: at for at, some in enumerate(labels.values()) for gene in some}
        states: dict[str, list[np.ndarray]] = {}
        for row in slow.tokens(cells):
            for token, state in zip(row, slow.states(row), strict=True):
                gene = str(slow.vocabulary.symbols[token])
                if gene in self.class_of:
                    states.setdefault(gene, []).append(state)
        self.states = {gene: np.array(some) for gene, some in states.items()}

    def predict(self, fold: dict[str, int]) -> dict[str, np.ndarray]:
        """Probabilities of each gene in each of its cells, by the head that was not taught with its fold."""
        found = {}
        for at in set(fold.values()):
            taught = [gene for gene in self.states if fold[gene] != at]
            means = np.array([self.states[gene].mean(axis=0) for gene in taught])
            centre, scale = means.mean(axis=0), np.sqrt(means.var(axis=0).mean())
            head = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=500)
            head.fit((means - centre) / scale, [self.class_of[gene] for gene in taught])
            for gene in self.states:
                if fold[gene] == at:
                    found[gene] = head.predict_proba((self.states[gene] - centre) / scale)
        return found


def auc(truth: list[int], probabilities: np.ndarray) -> float:
    if probabilities.shape[1] == 2:
        return roc_auc_score(truth, probabilities[:, 1])
    return float(np.mean([roc_auc_score(np.array(truth) == at, score) for at, score in enumerate(probabilities.T)]))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_scores_are_those_of_a_plain_loop(n_classes: int, cells: ad.AnnData, any_model: Model, slow: Any) -> None:
    labels = {f"class{at}": genes(1 + at, 101, n_classes) for at in range(n_classes)}
    gfx.tl.classify_genes(cells, labels, model=any_model, method="linear_probe", n_splits=3, n_repeats=2, controls=None)
    reference = ByHand(slow, cells, labels)
    names = list(reference.states)
    at = cells.var_names.get_indexer(names)
    truth = [reference.class_of[gene] for gene in names]
    folds = cells.varm["gfx_gene_class_fold"][at]
    assert folds.shape == (len(names), 2)
    by_seed = [reference.predict(dict(zip(names, fold, strict=True))) for fold in folds.T]
    means = np.array([[found[gene].mean(axis=0) for gene in names] for found in by_seed])
    np.testing.assert_allclose(cells.varm["gfx_gene_class"][at], means.mean(axis=0), atol=1e-4)
    spread = np.mean([[found[gene].std(axis=0) for gene in names] for found in by_seed], axis=0)
    np.testing.assert_allclose(cells.varm["gfx_gene_class_sd"][at], spread, atol=1e-4)
    assert cells.var["gfx_gene_class_n_cells"].iloc[at].tolist() == [len(reference.states[gene]) for gene in names]
    assert cells.var["gfx_gene_class"].iloc[at].tolist() == [f"class{number}" for number in truth]
    predicted = means.mean(axis=0).argmax(axis=1)
    assert cells.var["gfx_gene_class_predicted"].iloc[at].tolist() == [f"class{number}" for number in predicted]

    metrics = cells.uns["gfx_gene_class"]["metrics"]
    metrics = metrics[metrics["metric"] == "auc"].set_index(["unit", "seed", "fold"])
    expected: dict[tuple[str, int, int], float] = {}
    for seed, fold in enumerate(folds.T):
        for number in range(3):
            held = np.flatnonzero(fold == number)
            expected["gene", seed, number] = auc([truth[i] for i in held], means[seed][held])
            each = [by_seed[seed][names[i]] for i in held]
            occurrences = [truth[i] for i, some in zip(held, each, strict=True) for _ in some]
            expected["occurrence", seed, number] = auc(occurrences, np.concatenate(each))
            assert metrics.loc[("occurrence", seed, number), "n"] == len(occurrences)
            assert metrics.loc[("gene", seed, number), "n"] == len(held)
    for place, value in expected.items():
        assert metrics.loc[place, "value"] == pytest.approx(value, abs=1e-3), place
    summary = gfx.get.classification_df(cells).set_index(["unit", "metric"])
    for unit in ("gene", "occurrence"):
        seeds = [np.mean([expected[unit, seed, number] for number in range(3)]) for seed in range(2)]
        assert summary.loc[(unit, "auc"), "mean"] == pytest.approx(np.mean(seeds), abs=1e-3)
        assert summary.loc[(unit, "auc"), "sd"] == pytest.approx(np.std(seeds, ddof=1), abs=1e-3)
        assert summary.loc[(unit, "auc"), "n_seeds"] == 2
    assert summary.loc[("gene", "auc"), "n"] == len(names)
    assert summary.loc[("occurrence", "auc"), "n"] == sum(map(len, reference.states.values()))


def test_tables_are_those_of_the_scores_written(cells: ad.AnnData, toy_model: Model) -> None:
    probe(cells, ODD_EVEN, model=toy_model, n_splits=3)
    scored = cells[:, cells.varm["gfx_gene_class_fold"][:, 0] >= 0]
    truth = (scored.var["gfx_gene_class"] == "odd").to_numpy().astype(int)
    scores, fold = scored.varm["gfx_gene_class"], scored.varm["gfx_gene_class_fold"][:, 0]
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-6)
    parts = [(truth[fold == at], scores[fold == at], at) for at in range(3)]
    expected = {
        "auc": [roc_auc_score(known, found[:, 1]) for known, found, _ in parts],
        "accuracy": [np.mean(known == found.argmax(axis=1)) for known, found, _ in parts],
        "macro_f1": [f1_score(known, found.argmax(axis=1), average="macro") for known, found, _ in parts],
    }
    metrics = cells.uns["gfx_gene_class"]["metrics"]
    summary = gfx.get.classification_df(cells)
    told = scores.argmax(axis=1)
    whole = {"accuracy": np.mean(truth == told), "macro_f1": f1_score(truth, told, average="macro")}
    for metric, values in expected.items():
        rows = metrics[(metrics["metric"] == metric) & (metrics["unit"] == "gene")]
        np.testing.assert_allclose(rows.sort_values("fold")["value"], values, atol=1e-6)
        row = summary[(summary["metric"] == metric) & (summary["unit"] == "gene")].iloc[0]
        assert row["mean"] == pytest.approx(whole.get(metric, np.mean(values)))
        assert row["low"] < row["mean"] < row["high"]
        assert np.isnan(row["sd"])  # one seed
    assert summary[summary["unit"] == "occurrence"][["low", "high"]].isna().all(axis=None)
    counts = pd.crosstab(scored.var["gfx_gene_class"], scored.var["gfx_gene_class_predicted"], dropna=False)
    for row in gfx.get.confusion_df(cells).itertuples():
        assert row.n == counts.loc[row.true, row.predicted]
        assert row.share == pytest.approx(row.n / counts.loc[row.true].sum())
    curves = gfx.get.roc_df(cells)
    assert set(curves["unit"]) == {"gene", "occurrence"}
    for known, found, at in parts:
        curve = curves[(curves["fold"] == at) & (curves["unit"] == "gene")]
        fpr, tpr, _ = roc_curve(known, found[:, 1])
        np.testing.assert_allclose(curve["tpr"].iloc[1:], np.interp(np.linspace(0, 1, 101), fpr, tpr)[1:])
        assert np.trapezoid(curve["tpr"], curve["fpr"]) == pytest.approx(expected["auc"][at], abs=0.02)


def test_folds_hold_each_gene_out_once_and_share_the_classes(cells: ad.AnnData, toy_model: Model) -> None:
    labels = {"few": genes(1, 60, 6), "many": genes(2, 120, 2)}
    probe(cells, labels, model=toy_model, n_splits=4, n_repeats=3)
    scored = cells[:, ~np.isnan(cells.varm["gfx_gene_class"][:, 0])]
    assert (cells.varm["gfx_gene_class_fold"] >= 0).all(axis=1).sum() == scored.n_vars > 60
    folds, given = scored.varm["gfx_gene_class_fold"], scored.var["gfx_gene_class"].astype(str)
    for of_seed in folds.T:
        counts = pd.crosstab(given.to_numpy(), of_seed)
        assert [*counts.columns] == [0, 1, 2, 3]
        assert (counts.max(axis=1) - counts.min(axis=1) <= 1).all()
    assert len({tuple(of_seed) for of_seed in folds.T}) == 3


# --- nothing leaks --------------------------------------------------------------------------------------------------


def genes_of(cells: ad.AnnData, labels: Any, model: Model, rows: np.ndarray | None = None) -> Units:
    """Labelled genes in all cells, or in some."""
    prepared = prepare(cells, model, function="tl.classify_genes", layer=None, mod=None, copy=False)
    lengths = prepared.lengths(None) if rows is None else prepared.lengths_of(rows)
    return draw_genes(prepared, labels, "raise", lengths, max_cells=1000, n_splits=2, rng=0)


def learners_of(units: Units, folder: Path, method: Any = "linear_probe") -> list[Any]:
    """The model, random weights, expression and the majority."""
    return make_learners(units, settle_method(method, units.prepared.model, "genes"), CONTROLS, folder, rng=0)


def split_of(units: Units, train: np.ndarray, n_cells: int | None = None) -> Split:
    """Train with some genes, bool `(n_genes,)`, and hold out the others."""
    return Split(np.flatnonzero(train), np.flatnonzero(~train), n_cells or len(units.rows), seed=0, fold=0)


def test_labels_held_out_cannot_change_their_own_scores(cells: ad.AnnData, toy_model: Model) -> None:
    """Two neighbours of different classes in one fold change their labels; the folds stay as they are."""
    probe(cells, ODD_EVEN, model=toy_model, n_splits=3, key_added="before")
    fold = pd.Series(cells.varm["before_fold"][:, 0], cells.var_names)
    seen = [gene for gene in genes(1, 81) if fold[gene] >= 0]
    pairs = [
        (one, other)
        for one, other in pairwise(seen[2:])
        if fold[one] == fold[other] == 1 and (one in ODD_EVEN["odd"]) != (other in ODD_EVEN["odd"])
    ][::2]
    assert len(pairs) > 2
    changed = {gene for pair in pairs for gene in pair}
    labels = {name: sorted(set(some) ^ changed) for name, some in ODD_EVEN.items()}
    probe(cells, labels, model=toy_model, n_splits=3, key_added="after")
    np.testing.assert_array_equal(cells.varm["after_fold"], cells.varm["before_fold"])
    assert (cells[:, sorted(changed)].var["after"] != cells[:, sorted(changed)].var["before"]).all()
    same = fold == 1
    np.testing.assert_array_equal(cells.varm["after"][same], cells.varm["before"][same])
    for others in (0, 2):
        at = fold == others
        assert (cells.varm["after"][at] != cells.varm["before"][at]).all()


def test_no_method_sees_a_label_held_out(cells: ad.AnnData, toy_model: Model, tmp_path: Path) -> None:
    units = genes_of(cells, ODD_EVEN, toy_model)
    train = np.arange(len(units)) % 3 > 0
    learners = learners_of(units, tmp_path)
    assert [learner.name for learner in learners] == ["model", "random_weights", "expression", "majority"]
    split = split_of(units, train)
    before = [learner.predict(split) for learner in learners]
    units.truth[~train] = 1 - units.truth[~train]
    for learner, expected in zip(learners, before, strict=True):
        np.testing.assert_array_equal(learner.predict(split), expected)
    units.truth[train] = 0
    units.truth[np.flatnonzero(train)[:3]] = 1
    for learner, expected in zip(learners, before, strict=True):
        assert not np.allclose(learner.predict(split), expected)


def test_few_cells_are_the_first_ones(cells: ad.AnnData, toy_model: Model, tmp_path: Path) -> None:
    """Heads of the learning curve know nothing of other cells, and tell all of them."""
    units = genes_of(cells, ODD_EVEN, toy_model)
    train, known = np.arange(len(units)) % 2 > 0, np.isin(units.cell, range(5))
    few = replace(units, rows=units.rows[:5], unit=units.unit[known], cell=units.cell[known])
    probe_of_all, probe_of_few = (learners_of(some, tmp_path)[0] for some in (units, few))
    split = split_of(units, train, 5)
    (head,), (expected,) = (one.heads(split, *one.features(split)[:2]) for one in (probe_of_all, probe_of_few))
    np.testing.assert_allclose(head.weight, expected.weight, rtol=1e-5)
    (everything,) = probe_of_all.heads(split, *probe_of_all.features(split_of(units, train))[:2])
    assert not np.allclose(head.weight, everything.weight, rtol=0.1)
    assert len(probe_of_all.predict(split_of(units, train, 5))) == (~train)[units.unit].sum()


# --- what it is held against ----------------------------------------------------------------------------------------


def described(cells: ad.AnnData, slow: Any, names: list[str]) -> np.ndarray:
    """Detection, mean rank from 0 to 1, mean and variance of log counts, with plain loops."""
    ranks: dict[str, list[float]] = {gene: [] for gene in names}
    for row in slow.tokens(cells):
        of_genes = [str(slow.vocabulary.symbols[token]) for token in row if slow.is_gene(token)]
        for place, gene in enumerate(of_genes):
            if gene in ranks:
                ranks[gene].append(place / (len(of_genes) - 1))
    dense = np.asarray(cells.X.todense(), dtype=np.float64)
    logs = pd.DataFrame(np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4), columns=cells.var_names)
    return np.array(
        [
            [len(ranks[gene]) / len(dense), np.mean(ranks[gene]), logs[gene].mean(), logs[gene].var(ddof=0)]
            if ranks[gene]
            else [0, 1, logs[gene].mean(), logs[gene].var(ddof=0)]
            for gene in names
        ]
    )


def test_genes_are_described_as_by_hand(cells: ad.AnnData, any_model: Model, slow: Any) -> None:
    prepared = prepare(cells, any_model, function="tl.classify_genes", layer=None, mod=None, copy=False)
    names = genes(1, 201)
    tokens = any_model.vocabulary.resolve(names)
    found = describe_genes(prepared, prepared.lengths(None))[tokens]
    np.testing.assert_allclose(found, described(cells, slow, names), atol=1e-6)
    some = np.arange(24) % 3 > 0
    found = describe_genes(prepared, prepared.lengths(some))[tokens]
    np.testing.assert_allclose(found, described(cells[some], slow, names), atol=1e-6)


def test_expression_and_majority_are_those_by_hand(cells: ad.AnnData, toy_model: Model, toy_slow: Any) -> None:
    labels = {"one": genes(1, 41), "two": genes(41, 101)}
    probe(cells, labels, model=toy_model, n_splits=3, controls=CONTROLS)
    fold = pd.Series(cells.varm["gfx_gene_class_fold"][:, 0], cells.var_names)
    names = [gene for gene in cells.var_names if fold[gene] >= 0]
    features, held = described(cells, toy_slow, names), fold[names].to_numpy()
    truth = np.array([gene in labels["two"] for gene in names])
    areas, right = [], []
    for at in range(3):
        train = held != at
        centre, scale = features[train].mean(axis=0), features[train].std(axis=0)
        head = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=500)
        head.fit((features[train] - centre) / scale, truth[train])
        areas.append(roc_auc_score(truth[~train], head.decision_function((features[~train] - centre) / scale)))
        right.extend(truth[~train])
    summary = gfx.get.classification_df(cells).set_index(["unit", "metric", "method"])["mean"]
    assert summary["gene", "auc", "expression"] == pytest.approx(np.mean(areas), abs=1e-6)
    assert summary["gene", "auc", "majority"] == summary["occurrence", "auc", "majority"] == 0.5
    assert summary["gene", "accuracy", "majority"] == pytest.approx(np.mean(right))


def fit_by_hand(features: np.ndarray, truth: np.ndarray, weight: str | None) -> Any:
    """Logistic regression on scaled features: probabilities of other features."""
    centre, scale = features.mean(axis=0), features.std(axis=0)
    head = LogisticRegression(C=STRENGTH, class_weight=weight, max_iter=500).fit((features - centre) / scale, truth)
    return lambda others: head.predict_proba((others - centre) / scale)


@pytest.mark.parametrize("method", ["fine_tune", "linear_probe"])
def test_expression_weighs_classes_as_the_model_does(
    cells: ad.AnnData, toy_model: Model, toy_slow: Any, tmp_path: Path, method: str
) -> None:
    """Or accuracy and macro F1 of the two would not compare where classes are of unlike sizes."""
    units = genes_of(cells, {"few": genes(1, 31), "many": genes(31, 141)}, toy_model)
    expression = learners_of(units, tmp_path, method)[2]
    names = [str(toy_model.vocabulary.symbols[token]) for token in units.where]
    features = described(cells, toy_slow, names)
    train = np.arange(len(names)) % 3 > 0
    found = expression.predict(split_of(units, train))
    weight = "balanced" if method == "linear_probe" else None
    expected = fit_by_hand(features[train], units.truth[train, 0], weight)(features)
    np.testing.assert_allclose(found, expected[units.unit[(~train)[units.unit]]], atol=1e-4)


def test_expression_of_few_cells_is_what_is_learnt_from(cells: ad.AnnData, toy_model: Model, toy_slow: Any) -> None:
    """On a learning curve, genes to tell are described in all cells, as the model tells them in all."""
    units = genes_of(cells, {"few": genes(1, 61), "many": genes(61, 141)}, toy_model)
    names = [str(toy_model.vocabulary.symbols[token]) for token in units.where]
    in_few, in_all = (described(cells[rows], toy_slow, names) for rows in (units.rows[:8], units.rows))
    train = np.arange(len(names)) % 3 > 0
    expression = LinearMethod("expression", units, expression_of_genes(units), None, one_unit=False)
    found = expression.predict(split_of(units, train, 8))
    tell = fit_by_hand(in_few[train], units.truth[train, 0], None)
    held = units.unit[(~train)[units.unit]]
    np.testing.assert_allclose(found, tell(in_all)[held], atol=1e-4)
    assert abs(tell(in_all) - tell(in_few)).max() > 0.01


def test_classes_of_expression_are_found_by_expression(cells: ad.AnnData, toy_model: Model) -> None:
    ordered = cells.var_names[:200][np.argsort(-detected(cells)[:200], kind="stable")]
    labels = {"rare": ordered[90:130], "common": ordered[10:50]}
    probe(cells, labels, model=toy_model, n_splits=4, controls=CONTROLS)
    summary = gfx.get.classification_df(cells).set_index(["unit", "metric", "method"])["mean"]
    assert summary["gene", "auc", "expression"] > 0.95
    assert summary["gene", "auc", "majority"] == 0.5
    assert summary["gene", "auc", "expression"] >= summary["gene", "auc", "random_weights"]


def test_labels_drawn_at_random_are_not_predicted(cells: ad.AnnData, toy_model: Model) -> None:
    drawn = np.random.default_rng(1).permutation(genes(1, 161))
    labels = {"heads": drawn[:80], "tails": drawn[80:]}
    gfx.tl.classify_genes(cells, labels, model=toy_model, method="linear_probe", n_splits=3, n_repeats=2)
    summary = gfx.get.classification_df(cells)
    areas = summary[(summary["metric"] == "auc") & (summary["unit"] == "gene")].set_index("method")["mean"]
    assert [*areas.index] == ["model", "random_weights", "expression", "majority"]
    assert areas.between(0.35, 0.65).all(), areas


def test_without_counts_expression_is_described_by_ranks(cells: ad.AnnData, toy_model: Model) -> None:
    gfx.pp.tokenize(cells, model=toy_model)
    probe(cells, ODD_EVEN, model=toy_model, controls=CONTROLS, key_added="with")
    cells.X = None
    probe(cells, ODD_EVEN, model=toy_model, controls=CONTROLS, key_added="without")
    tables = [cells.uns[key]["summary"].set_index(["method", "unit", "metric"])["mean"] for key in ("with", "without")]
    assert [*tables[0].index] == [*tables[1].index]
    differ = {place[0] for place in tables[0].index if tables[0][place] != tables[1][place]}
    assert differ == {"expression"}


# --- what does not matter, and what does ----------------------------------------------------------------------------


def test_the_order_of_cells_does_not_matter(cells: ad.AnnData, toy_model: Model) -> None:
    shuffled = cells[np.random.default_rng(3).permutation(cells.n_obs)].copy()
    for adata in (cells, shuffled):
        probe(adata, ODD_EVEN, model=toy_model, controls=CONTROLS)
        assert not np.isnan(adata.varm["gfx_gene_class"][0]).any()
    np.testing.assert_array_equal(shuffled.varm["gfx_gene_class_fold"], cells.varm["gfx_gene_class_fold"])
    for name in ("gfx_gene_class", "gfx_gene_class_sd"):
        np.testing.assert_allclose(shuffled.varm[name], cells.varm[name], atol=1e-4)
    tables = [adata.uns["gfx_gene_class"]["metrics"]["value"] for adata in (cells, shuffled)]
    np.testing.assert_allclose(*tables, atol=0.02)


def test_genes_without_labels_do_not_matter(cells: ad.AnnData, toy_model: Model) -> None:
    labels = {"even": genes(2, 61, 2), "odd": genes(1, 61, 2)}
    probe(cells, labels, model=toy_model)
    more = sparse.csr_matrix((24, 3), dtype=np.float32)
    fresh = pd.DataFrame(index=["UNKNOWN11", "UNKNOWN12", "UNKNOWN13"])
    extra = ad.AnnData(
        sparse.hstack([more, cells.X], format="csr"), cells.obs, pd.concat([fresh, cells.var[["ensembl_id"]]])
    )
    probe(extra, labels, model=toy_model)
    assert table(extra[:, cells.var_names]).equals(table(cells))
    assert np.isnan(extra[:, fresh.index].varm["gfx_gene_class"]).all()


def test_another_seed_draws_other_folds_and_the_same_one_none(cells: ad.AnnData, toy_model: Model) -> None:
    for key, rng in (("one", 0), ("again", np.int64(0)), ("other", 7)):
        probe(cells, ODD_EVEN, model=toy_model, controls=CONTROLS, rng=rng, key_added=key)
    for name in ("", "_sd", "_fold"):
        np.testing.assert_array_equal(cells.varm[f"one{name}"], cells.varm[f"again{name}"])
    for name in ("metrics", "summary", "roc", "confusion"):
        pd.testing.assert_frame_equal(cells.uns["one"][name], cells.uns["again"][name])
    assert (cells.varm["one_fold"] != cells.varm["other_fold"]).any()


def test_the_users_random_numbers_stay_as_they_were(cells: ad.AnnData, toy_model: Model) -> None:
    def drawn() -> list[float]:
        return [float(torch.rand(1)), np.random.rand()]

    for call in (partial(probe, controls=CONTROLS), partial(tune, training=ONE_STEP)):
        torch.manual_seed(3)
        np.random.seed(3)
        expected = drawn()
        torch.manual_seed(3)
        np.random.seed(3)
        call(cells, ODD_EVEN, model=toy_model)
        assert drawn() == expected


def test_cells_to_use(cells: ad.AnnData, toy_model: Model, toy_slow: Any) -> None:
    labels = {"even": genes(2, 161, 2), "odd": genes(1, 161, 2)}
    probe(cells, labels, model=toy_model, max_cells=10)
    assert cells.uns["gfx_gene_class"]["params"]["n_cells"] == 10
    in_cells = [{str(toy_slow.vocabulary.symbols[token]) for token in row} for row in toy_slow.tokens(cells)]
    has = np.array([[gene in some for gene in cells.var_names[:160]] for some in in_cells])
    n_cells = cells.var["gfx_gene_class_n_cells"].to_numpy()[:160]
    drawn = np.linalg.lstsq(has.T.astype(float), n_cells.astype(float), rcond=None)[0]
    np.testing.assert_allclose(np.sort(drawn), np.repeat([0.0, 1.0], [14, 10]), atol=1e-6)  # ten cells explain it
    cells.obs["chosen"] = drawn > 0.5
    probe(cells, labels, model=toy_model, mask_obs="chosen", key_added="mask")
    np.testing.assert_array_equal(cells.varm["gfx_gene_class_fold"], cells.varm["mask_fold"])
    np.testing.assert_allclose(cells.varm["gfx_gene_class"], cells.varm["mask"], atol=1e-4)
    assert cells.uns["mask"]["params"]["mask_obs"] == "chosen"


def test_cells_without_a_labelled_gene_are_not_drawn(cells: ad.AnnData, toy_model: Model) -> None:
    rare = cells.var_names[:200][(detected(cells)[:200] > 0) & (detected(cells)[:200] < 3)]
    probe(cells, {"a": rare[:8:2], "b": rare[1:8:2]}, model=toy_model)
    has_one = np.asarray((cells[:, rare[:8]].X > 0).sum(axis=1)).ravel() > 0
    assert 0 < cells.uns["gfx_gene_class"]["params"]["n_cells"] <= has_one.sum() < 20


def test_learning_curve(cells: ad.AnnData, toy_model: Model) -> None:
    probe(cells, ODD_EVEN, model=toy_model, key_added="plain")
    probe(cells, ODD_EVEN, model=toy_model, controls=CONTROLS, learning_curve=[16, 8, 24])
    curve = gfx.get.learning_curve_df(cells, key="gfx_gene_class")
    for _, rows in curve.groupby(["unit", "method", "metric"]):
        assert rows["n_cells"].tolist() == [8, 16, 24]
        assert rows["n"].nunique() == 1  # all cells are predicted in, so that results compare
    few = curve[curve["n_cells"] < 24]
    assert few[["low", "high"]].isna().all(axis=None)
    np.testing.assert_array_equal(cells.varm["gfx_gene_class"], cells.varm["plain"])  # of all cells
    full = gfx.get.classification_df(cells, key="gfx_gene_class")
    assert set(full["n_cells"]) == {24}
    areas = few[(few["metric"] == "auc") & (few["method"] == "model")]["mean"]
    assert areas.nunique() > 1


@pytest.mark.parametrize("start", [0, 8, 16])
def test_few_cells_may_have_no_gene_to_learn_from(start: int, cells: ad.AnnData, toy_model: Model) -> None:
    rare = cells.var_names[:200][(detected(cells)[:200] > 0) & (detected(cells)[:200] < 3)][start : start + 8]
    probe(cells, {"a": rare[:4], "b": rare[4:]}, model=toy_model, learning_curve=[2])
    curve = gfx.get.learning_curve_df(cells)
    assert curve[curve["metric"] == "accuracy"]["mean"].between(0, 1).all()


@pytest.mark.parametrize("points", [[1, 8], [8, 25], [-3]])
def test_learning_curves_of_cells_that_are_not_there(points: list[int], cells: ad.AnnData, toy_model: Model) -> None:
    with pytest.raises(ValueError, match=r"`learning_curve` has numbers of training cells, 2 to 24 here; found"):
        probe(cells, ODD_EVEN, model=toy_model, learning_curve=points)


ARGUMENTS = {
    "method": ({"method": "probe"}, ValueError, r"`method` is one of \['fine_tune', 'linear_probe'\], found 'probe'"),
    "n_splits": ({"n_splits": 1}, ValueError, "`n_splits` is 2 or more, found 1"),
    "n_splits, not whole": ({"n_splits": 2.5}, TypeError, "`n_splits` is a whole number, found 2.5"),
    "n_repeats": ({"n_repeats": 0}, ValueError, "`n_repeats` is 1 or more"),
    "max_cells": ({"max_cells": 1}, ValueError, "`max_cells` is 2 or more"),
    "n_trials": ({"method": FineTuning(n_trials=-1)}, ValueError, "`n_trials` is 0 or more"),
    "rng, a truth value": ({"rng": True}, TypeError, "`rng` is a whole number, found True"),
    "controls": ({"controls": ["random_sets"]}, ValueError, r"`controls` is one of .* found 'random_sets'"),
    "rng": ({"rng": 0.5}, TypeError, "`rng` is a whole number, found 0.5"),
    "blocks": ({"method": FineTuning(freeze_layers=4)}, ValueError, "`freeze_layers=4` is outside .* of 3 network"),
    "adapter of no block": (
        {"method": FineTuning(adapter="lora", freeze_layers=3)},
        ValueError,
        "`freeze_layers` freezes all 3",
    ),
    "adapter": ({"method": FineTuning(adapter="qlora")}, ValueError, "`adapter` is one of .* found 'qlora'"),
    "training": (
        {"method": FineTuning(training={"learning_rte": 1})},
        ValueError,
        "`training` takes no 'learning_rte'.* Did you mean 'learning_rate'",
    ),
}


@pytest.mark.parametrize("wrong", ARGUMENTS)
def test_arguments_that_make_no_sense(wrong: str, cells: ad.AnnData, toy_model: Model, slots: Any) -> None:
    arguments, error, text = ARGUMENTS[wrong]
    before = slots(cells)
    with pytest.raises(error, match=text):
        probe(cells, ODD_EVEN, model=toy_model, **arguments)
    assert slots(cells) == before


def test_a_column_that_files_cannot_hold_the_name_of(cells: ad.AnnData, toy_model: Model) -> None:
    cells.var["a/b"] = pd.Series({gene: name for name, some in ODD_EVEN.items() for gene in some})
    with pytest.raises(ValueError, match=r"'a/b' has a '/'"):
        probe(cells, "a/b", model=toy_model)


def test_the_column_of_labels_is_not_written_over(cells: ad.AnnData, toy_model: Model) -> None:
    kind = pd.Series({gene: name for name, some in ODD_EVEN.items() for gene in some}).reindex(cells.var_names)
    cells.var["kind"] = kind
    with pytest.raises(ValueError, match="key_added"):
        probe(cells, "kind", model=toy_model, key_added="kind")
    pd.testing.assert_series_equal(cells.var["kind"], kind, check_names=False)


@pytest.mark.parametrize("column", ["dosage", "dosage_predicted", "dosage_n_cells"])
def test_a_column_of_the_users_is_not_written_over(
    column: str, cells: ad.AnnData, toy_model: Model, slots: Any
) -> None:
    cells.var[column] = "mine"
    before = slots(cells)
    with pytest.raises(ValueError, match=rf"`adata\.var\['{column}'\]` holds .*`key_added=`"):
        probe(cells, ODD_EVEN, model=toy_model, key_added="dosage")
    assert slots(cells) == before
    del cells.var[column]
    for _ in range(2):  # our own of the first call are written over by the second
        probe(cells, ODD_EVEN, model=toy_model, key_added="dosage")


# --- fine-tuning ----------------------------------------------------------------------------------------------------


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """List the cells that each training is shown, and the classifier that comes out; trainings are real."""
    seen: list[tuple[Any, Any]] = []
    run = fine_tuning.fine_tune

    def watched(make: Any, cells: Any, *args: Any, **kwargs: Any) -> Any:
        classifier = run(make, cells, *args, **kwargs)
        seen.append((cells, classifier))
        return classifier

    monkeypatch.setattr(fine_tuning, "fine_tune", watched)
    return seen


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """See :func:`watch`."""
    return watch(monkeypatch)


@pytest.fixture(scope="module")
def tuned(toy_cells: Any, toy_model: Model) -> tuple[ad.AnnData, list[tuple[Any, Any]]]:
    """A whole result of fine-tuning, of one step, and its trainings."""
    cells = toy_cells(24)
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = watch(monkeypatch)
        training = ONE_STEP | {"learning_rate": 1e-2}
        tune(cells, ODD_EVEN, model=toy_model, controls=CONTROLS, training=training, rng=3)  # the toy was drawn with 0
    return cells, seen


def test_fine_tuning_never_sees_a_label_held_out(tuned: Any, toy_model: Model) -> None:
    cells, trainings = tuned
    assert len(trainings) == 4  # the model and random weights, in two folds
    tokens = toy_model.vocabulary.resolve(cells.var_names)
    fold, given = cells.varm["gfx_gene_class_fold"][:, 0], cells.var["gfx_gene_class"].cat.codes
    for number, (examples, _) in enumerate(trainings):
        shown = {}
        for at in range(len(examples)):
            example = examples[at]
            assert len(example["labels"]) == len(example["input_ids"])
            pairs = zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True)
            labels = {token: label for token, label in pairs if label != -100}
            assert labels  # cells without any would teach nothing
            assert all(shown.setdefault(token, label) == label for token, label in labels.items())
        taught = (fold >= 0) & (fold != number // 2)
        assert shown == dict(zip(tokens[taught].tolist(), given[taught].tolist(), strict=True))


def test_scores_of_fine_tuning_are_those_of_the_classifier_that_was_not_taught(tuned: Any, toy_slow: Any) -> None:
    cells, trainings = tuned
    fold = pd.Series(cells.varm["gfx_gene_class_fold"][:, 0], cells.var_names)
    scores: dict[str, list[np.ndarray]] = {}
    for at, (_, classifier) in enumerate(trainings[::2]):  # random weights are between them
        assert not classifier.training
        for row in toy_slow.tokens(cells):
            with torch.no_grad():
                found = classifier(torch.tensor([row])).logits[0].softmax(dim=-1).numpy()
            for token, values in zip(row, found, strict=True):
                gene = str(toy_slow.vocabulary.symbols[token])
                if gene and fold[gene] == at:
                    scores.setdefault(gene, []).append(values)
    part = cells[:, sorted(scores)]
    assert set(scores) == set(fold[fold >= 0].index)
    expected = np.array([np.mean(scores[gene], axis=0) for gene in part.var_names])
    np.testing.assert_allclose(part.varm["gfx_gene_class"], expected, atol=1e-5)
    spread = np.array([np.std(scores[gene], axis=0) for gene in part.var_names])
    np.testing.assert_allclose(part.varm["gfx_gene_class_sd"], spread, atol=1e-4)
    assert part.var["gfx_gene_class_n_cells"].tolist() == [len(scores[gene]) for gene in part.var_names]


def test_every_slot_of_fine_tuning(tuned: Any, tmp_path: Path) -> None:
    cells, _ = tuned
    scored = cells.varm["gfx_gene_class_fold"][:, 0] >= 0
    np.testing.assert_allclose(cells.varm["gfx_gene_class"][scored].sum(axis=1), 1, atol=1e-6)
    assert np.isnan(cells.varm["gfx_gene_class"][~scored]).all()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    read = ad.read_h5ad(tmp_path / "cells.h5ad")
    for get in (gfx.get.classification_df, gfx.get.roc_df, gfx.get.confusion_df, gfx.get.learning_curve_df):
        found, expected = get(read), get(cells)
        assert [*dict.fromkeys(expected["method"])] == ["model", "random_weights", "expression", "majority"]
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    pd.testing.assert_frame_equal(
        gfx.get.gene_scores_df(read), gfx.get.gene_scores_df(cells), check_dtype=False, check_categorical=False
    )


def encoder_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}


def test_fine_tuning_starts_from_the_pretrained_weights(
    cells: ad.AnnData, toy_model: Model, tuned: Any, trainings: list[tuple[Any, Any]]
) -> None:
    # The toy itself was drawn with seed 0.
    tune(cells, ODD_EVEN, model=toy_model, training=ONE_STEP | {"learning_rate": 1e-12}, rng=3)
    pretrained = encoder_of(toy_model.folder)
    assert len(pretrained) > 40
    for _, classifier in trainings:
        for name, tensor in pretrained.items():
            torch.testing.assert_close(classifier.state_dict()[name], tensor, rtol=0, atol=1e-8)
    drawn = [name for name in pretrained if name.endswith("weight") and "LayerNorm" not in name]
    _, others = tuned
    for _, classifier in others[1::2]:  # random weights, which one step moves by less
        distances = [float((classifier.state_dict()[name] - pretrained[name]).abs().mean()) for name in drawn]
        assert min(distances) > 0.1


@pytest.mark.parametrize(("freeze_layers", "still"), [(None, {0}), (3, {0, 1, 2})])
def test_frozen_blocks_stay_as_they_are(
    freeze_layers: int | None, still: set[int], cells: ad.AnnData, toy_model: Model, trainings: list[tuple[Any, Any]]
) -> None:
    """By default all but the last two; embeddings learn."""
    training = ONE_STEP | {"max_steps": 2, "learning_rate": 0.01}
    tune(cells, ODD_EVEN, model=toy_model, freeze_layers=freeze_layers, training=training)
    pretrained = encoder_of(toy_model.folder)
    for _, classifier in trainings:
        state = classifier.state_dict()
        moved = {name for name, tensor in pretrained.items() if not torch.equal(state[name], tensor)}
        for block in range(3):
            here = {name for name in pretrained if f"layer.{block}." in name}
            assert here
            assert moved & here == (set() if block in still else here)
        assert "bert.embeddings.word_embeddings.weight" in moved
    noted = cells.uns["gfx_gene_class"]["params"]
    assert noted["freeze_layers"] == (1 if freeze_layers is None else freeze_layers)
    assert json.loads(noted["training"]) == training | {"per_device_train_batch_size": 12}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_random_weights_are_trained_whole(
    cells: ad.AnnData, toy_model: Model, trainings: list[tuple[Any, Any]], adapter: str | None
) -> None:
    """Frozen blocks, or blocks beside adapters, that nobody has taught would make them easier to beat."""
    if adapter:
        pytest.importorskip("peft")
    training = ONE_STEP | {"max_steps": 2, "learning_rate": 0.01}
    how = {"freeze_layers": 2, "adapter": adapter, "training": training, "rng": 3}
    tune(cells, ODD_EVEN, model=toy_model, controls=CONTROLS, **how)
    for number, (_, classifier) in enumerate(trainings):
        start = encoder_of(toy_model.folder)
        if number % 2:
            untaught = random_encoder(toy_model.config, seed=3, n_blocks=3, device=CPU, dtype=torch.float32)
            start = {f"bert.{name}": tensor for name, tensor in untaught.state_dict().items()}
        state = classifier.state_dict()
        moved = {name for name, tensor in start.items() if not torch.equal(state[name], tensor)}
        blocks = {int(name.split(".")[3]) for name in moved if name.startswith("bert.encoder")}
        assert blocks == ({0, 1, 2} if number % 2 else {2})
        assert ("bert.embeddings.word_embeddings.weight" in moved) == (adapter is None or number % 2 == 1)


def test_fine_tuning_learns_what_it_is_taught(cells: ad.AnnData, toy_model: Model, tmp_path: Path) -> None:
    """What is odd and what is even, the network can only remember."""
    units = genes_of(cells, ODD_EVEN, toy_model)
    choices = {"freeze_layers": 0, "n_epochs": 25, "learning_rate": 5e-3, "batch_size": 4}
    learner = learners_of(units, tmp_path, FineTuning(**choices, training={"save_strategy": "no"}))[0]
    network = learner.fit(units.everything(0), tmp_path)
    found = units.scores(network, np.arange(len(units)))
    assert np.mean(found.argmax(axis=1) == units.truth[units.unit, 0]) > 0.95


def test_lost_names_are_noticed_before_anything_is_trained(
    cells: ad.AnnData, toy_model: Model, trainings: list[tuple[Any, Any]]
) -> None:
    gfx.pp.tokenize(cells, model=toy_model)
    cells.var_names = [f"probe{at}" for at in range(cells.n_vars)]
    with pytest.raises(ValueError, match="knows none of the genes here"):
        tune(cells, ODD_EVEN, model=toy_model, training=ONE_STEP)
    assert trainings == []


def test_hyperparameters_are_judged_on_genes_to_learn_from(
    cells: ad.AnnData, toy_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    units = genes_of(cells, ODD_EVEN, toy_model)
    train = np.arange(len(units)) % 3 > 0
    seen: list[Any] = []

    def watched(make: Any, *search: Any, **how: Any) -> dict[str, Any]:
        seen.extend(search[:2])
        return {}

    monkeypatch.setattr(fine_tuning, "find_hyperparameters", watched)
    network = learners_of(units, tmp_path, FineTuning(n_trials=1, training=ONE_STEP))[0]
    network.fit(split_of(units, train), tmp_path)
    learnt, judged = ({*np.flatnonzero(part.of_token >= 0)} for part in seen)
    assert learnt
    assert judged
    assert not learnt & judged
    assert learnt | judged == {*units.where[train]}
