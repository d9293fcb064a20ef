"""Classes of genes: labels, scores against a slow reference, what is held out, what they are held against."""

from __future__ import annotations

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
from sklearn.metrics import roc_auc_score

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

tune = partial(gfx.tl.classify_genes, n_splits=2, n_repeats=1, controls=None)
probe = partial(tune, method="linear_probe")
CPU = torch.device("cpu")
ONE_STEP = {"max_steps": 1, "save_strategy": "no"}
STRENGTH = 0.1


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
    "genes that no cell has": (
        {"a": ["TOY10", "TOY13"], "b": ["TOY15", "TOY70"]},
        ValueError,
        r"has 0 genes that these cells express \(of 2 given\)",
    ),
    "names that read alike": ({1: genes(1, 20), "1": genes(20, 40), "2": genes(40, 60)}, ValueError, "read '1'"),
    "a column of one class": ("dosage", ValueError, r"two classes at least, found \['x'\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_labels_that_cannot_be_used(wrong: str, cells: ad.AnnData, toy_model: Model, slots: Any) -> None:
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
    metrics = metrics[metrics["metric"] == "auc"].set_index(["unit", "repeat", "fold"])
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
        assert summary.loc[(unit, "auc"), "n_repeats"] == 2
    assert summary.loc[("gene", "auc"), "n"] == len(names)
    assert summary.loc[("occurrence", "auc"), "n"] == sum(map(len, reference.states.values()))


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


def test_a_head_of_few_cells_is_fitted_on_the_first_ones(cells: ad.AnnData, toy_model: Model, tmp_path: Path) -> None:
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


def test_expression_baseline_of_few_cells_is_fitted_on_these(
    cells: ad.AnnData, toy_model: Model, toy_slow: Any
) -> None:
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


def test_max_cells_draws_the_cells_to_use(cells: ad.AnnData, toy_model: Model, toy_slow: Any) -> None:
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


@pytest.mark.parametrize("start", [0, 8, 16])
def test_few_cells_may_have_no_training_gene(start: int, cells: ad.AnnData, toy_model: Model) -> None:
    rare = cells.var_names[:200][(detected(cells)[:200] > 0) & (detected(cells)[:200] < 3)][start : start + 8]
    probe(cells, {"a": rare[:4], "b": rare[4:]}, model=toy_model, learning_curve=[2])
    curve = gfx.get.learning_curve_df(cells)
    assert curve[curve["metric"] == "accuracy"]["mean"].between(0, 1).all()


# --- fine-tuning ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(toy_cells: Any, toy_model: Model, watch: Any) -> tuple[ad.AnnData, list[tuple[Any, Any, Any]]]:
    """A whole result of fine-tuning, of one step, and its trainings."""
    cells = toy_cells(24)
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = watch(monkeypatch)
        method = FineTuning(training=ONE_STEP | {"learning_rate": 1e-2})
        tune(cells, ODD_EVEN, model=toy_model, controls=CONTROLS, method=method, rng=3)  # the toy was drawn with 0
    return cells, seen


def test_fine_tuning_never_sees_a_label_held_out(tuned: Any, toy_model: Model) -> None:
    cells, trainings = tuned
    assert len(trainings) == 4  # the model and random weights, in two folds
    tokens = toy_model.vocabulary.resolve(cells.var_names)
    fold, given = cells.varm["gfx_gene_class_fold"][:, 0], cells.var["gfx_gene_class"].cat.codes
    for number, (examples, *_) in enumerate(trainings):
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


def test_scores_of_fine_tuning_are_those_of_the_classifier_trained_without_the_unit(tuned: Any, toy_slow: Any) -> None:
    cells, trainings = tuned
    fold = pd.Series(cells.varm["gfx_gene_class_fold"][:, 0], cells.var_names)
    scores: dict[str, list[np.ndarray]] = {}
    for at, (*_, classifier) in enumerate(trainings[::2]):  # random weights are between them
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


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_of_layers_that_are_trained_and_random_weights_have_none(
    cells: ad.AnnData, toy_model: Model, trainings: list[tuple[Any, Any, Any]]
) -> None:
    """Layers with random weights beside adapters would make a control that is easier to beat."""
    pytest.importorskip("peft")
    training = ONE_STEP | {"max_steps": 2, "learning_rate": 0.01}
    method = FineTuning(freeze_layers=2, adapter="lora", training=training)
    tune(cells, ODD_EVEN, model=toy_model, controls=CONTROLS, method=method, rng=3)
    for number, (*_, classifier) in enumerate(trainings):
        start = encoder_of(toy_model.folder)
        if number % 2:
            untaught = random_encoder(toy_model.config, seed=3, n_layers=3, device=CPU, dtype=torch.float32)
            start = {f"bert.{name}": tensor for name, tensor in untaught.state_dict().items()}
        state = classifier.state_dict()
        moved = {name for name, tensor in start.items() if not torch.equal(state[name], tensor)}
        blocks = {int(name.split(".")[3]) for name in moved if name.startswith("bert.encoder")}
        assert blocks == ({0, 1, 2} if number % 2 else {2})
        assert ("bert.embeddings.word_embeddings.weight" in moved) == (number % 2 == 1)


def test_fine_tuning_remembers_its_training_set(cells: ad.AnnData, toy_model: Model, tmp_path: Path) -> None:
    """What is odd and what is even, the network can only remember."""
    units = genes_of(cells, ODD_EVEN, toy_model)
    choices = {"freeze_layers": 0, "n_epochs": 25, "learning_rate": 5e-3, "batch_size": 4}
    learner = learners_of(units, tmp_path, FineTuning(**choices, training={"save_strategy": "no"}))[0]
    network = learner.fit(units.everything(0), tmp_path)
    found = units.scores(network, np.arange(len(units)))
    assert np.mean(found.argmax(axis=1) == units.truth[units.unit, 0]) > 0.95


def test_lost_names_are_noticed_before_anything_is_trained(
    cells: ad.AnnData, toy_model: Model, trainings: list[tuple[Any, Any, Any]]
) -> None:
    gfx.pp.tokenize(cells, model=toy_model)
    cells.var_names = [f"probe{at}" for at in range(cells.n_vars)]
    with pytest.raises(ValueError, match="knows none of the genes here"):
        tune(cells, ODD_EVEN, model=toy_model, method=FineTuning(training=ONE_STEP))
    assert trainings == []


def test_hyperparameters_are_evaluated_on_training_genes(
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
