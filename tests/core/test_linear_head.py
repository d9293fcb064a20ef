"""A linear head is scikit-learn's logistic regression on scaled features, written for features as they are."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from gfx._core.folds import folds
from gfx._core.linear_head import STRENGTHS, LinearHead, fit_linear_head


def blobs(n_classes: int, n: int = 150, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes that overlap and are not equally frequent; features of different centre and scale, float32."""
    rng = np.random.default_rng(seed)
    classes = np.sort(rng.choice(n_classes, n, p=np.arange(1, n_classes + 1) / np.arange(1, n_classes + 1).sum()))
    features = rng.normal(size=(n, 6)) + rng.normal(size=(n_classes, 6))[classes] * 0.7
    features = features * 10.0 ** np.array([-2, -1, 0, 0, 1, 2]) + np.arange(6) * 3
    order = rng.permutation(n)
    return features[order].astype(np.float32), classes[order]


def scaled(features: np.ndarray, *, one_unit: bool) -> np.ndarray:
    x = features.astype(np.float64)
    return (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0).mean()) if one_unit else StandardScaler().fit_transform(x)


@pytest.mark.parametrize("class_weight", ["balanced", None])
@pytest.mark.parametrize("one_unit", [True, False])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_probabilities_are_those_of_scikit_learn(n_classes: int, one_unit: bool, class_weight: str | None) -> None:
    features, classes = blobs(n_classes)
    head = fit_linear_head(features, classes, n_classes, one_unit=one_unit, strength=0.1, class_weight=class_weight)
    x = scaled(features, one_unit=one_unit)
    expected = LogisticRegression(C=0.1, class_weight=class_weight, max_iter=500).fit(x, classes).predict_proba(x)
    found = head.probabilities(features)
    assert found.dtype == np.float32
    assert head.weight.shape == (n_classes, 6)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected[:, 0]) > 0.2


def test_scales_for_each_feature_or_for_all_are_not_the_same() -> None:
    features, classes = blobs(2)
    by_unit = [fit_linear_head(features, classes, 2, one_unit=one, strength=0.1) for one in (True, False)]
    assert abs(by_unit[0].probabilities(features) - by_unit[1].probabilities(features)).max() > 0.1


def test_logits_of_a_mean_are_the_mean_of_logits() -> None:
    features, classes = blobs(3)
    head = fit_linear_head(features, classes, 3, one_unit=True, strength=1.0)
    few = features[:20].astype(np.float64)
    logits = few @ head.weight.T + head.bias
    np.testing.assert_allclose(few.mean(axis=0) @ head.weight.T + head.bias, logits.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(
        head.probabilities(few), np.exp(logits) / np.exp(logits).sum(1, keepdims=True), atol=1e-6
    )


@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_centre_and_scale_of_features_do_not_matter(shift: float) -> None:
    features, classes = blobs(3)
    x = features.astype(np.float64)
    expected = fit_linear_head(x, classes, 3, one_unit=True, strength=0.1).probabilities(x)
    moved = fit_linear_head(x * 7 + shift, classes, 3, one_unit=True, strength=0.1).probabilities(x * 7 + shift)
    np.testing.assert_allclose(moved, expected, atol=1e-4)


def test_a_class_without_training_examples_is_never_predicted() -> None:
    features, classes = blobs(3)
    gapped = np.array([0, 2, 4])[classes]
    found = fit_linear_head(features, gapped, 6, one_unit=False, strength=0.1).probabilities(features)
    expected = fit_linear_head(features, classes, 3, one_unit=False, strength=0.1).probabilities(features)
    np.testing.assert_allclose(found[:, [0, 2, 4]], expected, atol=1e-6)
    assert found[:, [1, 3, 5]].max() < 1e-6
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)


def test_a_single_class_is_always_predicted() -> None:
    features = np.random.default_rng(0).normal(size=(10, 4)) * 1e3
    found = fit_linear_head(features, np.full(10, 2), 4, one_unit=True, inner_folds=np.arange(10) % 2)
    np.testing.assert_array_equal(found.probabilities(features), np.tile([0, 0, 1, 0], (10, 1)))


def test_all_classes_are_equally_probable_without_training_examples() -> None:
    """A task that no training cell has a class of."""
    head = fit_linear_head(np.zeros((0, 4)), np.zeros(0, dtype=int), 3, one_unit=True, strength=0.1)
    found = head.probabilities(np.random.default_rng(0).normal(size=(5, 4)))
    np.testing.assert_allclose(found, 1 / 3, atol=1e-7)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -1e4 / 3])
def test_a_constant_feature_counts_for_nothing(constant: float) -> None:
    """Its mean may be off by a last bit; what it is elsewhere was never learnt."""
    features, classes = blobs(2)
    x = features.astype(np.float64)
    x[:, 2] = constant
    head = fit_linear_head(x, classes, 2, one_unit=False, strength=0.1)
    rest = [0, 1, 3, 4, 5]
    expected = fit_linear_head(x[:, rest], classes, 2, one_unit=False, strength=0.1).probabilities(x[:, rest])
    np.testing.assert_allclose(head.probabilities(x), expected, atol=1e-5)
    x[:, 2] += 0.5
    np.testing.assert_allclose(head.probabilities(x), expected, atol=1e-5)


def test_separable_classes_have_finite_weights() -> None:
    """No warning that the fit does not end, and no infinite weight."""
    classes = np.repeat([0, 1], 20)
    features = np.random.default_rng(0).normal(size=(40, 30)) + 100 * classes[:, None]
    head = fit_linear_head(features, classes, 2, one_unit=True, strength=1e6)
    assert np.isfinite(head.weight).all()
    np.testing.assert_array_equal(head.probabilities(features).argmax(axis=1), classes)


# --- strength of the penalty ----------------------------------------------------------------------------------------


def cross_validated(features: np.ndarray, classes: np.ndarray, fold: np.ndarray, one_unit: bool) -> list[float]:
    """Mean log loss over folds for each strength, one plain fit at a time."""
    x = scaled(features, one_unit=one_unit)
    losses = []
    for strength in STRENGTHS:
        of_folds = []
        for at in np.unique(fold):
            model = LogisticRegression(C=strength, class_weight="balanced", max_iter=500)
            model.fit(x[fold != at], classes[fold != at])
            of_folds.append(log_loss(classes[fold == at], model.predict_proba(x[fold == at]), labels=model.classes_))
        losses.append(np.mean(of_folds))
    return losses


@pytest.mark.parametrize(("n_classes", "one_unit", "seed"), [(2, True, 0), (2, False, 1), (2, True, 2), (4, True, 0)])
def test_the_strength_of_the_lowest_log_loss_is_chosen(n_classes: int, one_unit: bool, seed: int) -> None:
    features, classes = blobs(n_classes, seed=seed)
    inner = folds(classes, 5, seed)
    losses = cross_validated(features, classes, inner, one_unit)
    best = STRENGTHS[int(np.argmin(losses))]
    found = fit_linear_head(features, classes, n_classes, one_unit=one_unit, inner_folds=inner)
    expected = fit_linear_head(features, classes, n_classes, one_unit=one_unit, strength=best)
    np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-6, atol=1e-9)


def test_more_noise_is_penalised_more() -> None:
    """The choice does depend on what is there to learn."""
    rng = np.random.default_rng(0)
    classes = np.arange(80) % 2
    inner = folds(classes, 5, 0)
    norms = []
    for signal in (0.0, 3.0):
        features = rng.normal(size=(80, 40))
        features[:, 0] += signal * classes
        losses = cross_validated(features, classes, inner, one_unit=True)
        norms.append(int(np.argmin(losses)))
        head = fit_linear_head(features, classes, 2, one_unit=True, inner_folds=inner)
        expected = fit_linear_head(features, classes, 2, one_unit=True, strength=STRENGTHS[norms[-1]])
        np.testing.assert_allclose(head.weight, expected.weight, rtol=1e-6, atol=1e-9)
    assert norms[0] < norms[1]


def test_without_a_fold_of_all_classes_a_middle_strength_is_taken() -> None:
    """One gene of a class is in one part only: there is nothing to choose by."""
    features, classes = blobs(2)
    classes[:] = 0
    classes[3] = 1
    inner = np.arange(len(classes)) % 5
    found = fit_linear_head(features, classes, 2, one_unit=True, inner_folds=inner)
    expected = fit_linear_head(features, classes, 2, one_unit=True, strength=0.01)
    np.testing.assert_array_equal(found.weight, expected.weight)


def test_a_head_is_its_matrix() -> None:
    head = LinearHead(np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), np.array([0.0, 1.0, 0.0]))
    logits = np.array([[3.0, -1.0 * 2 + 1, 0.0], [0.0, 1.0, 0.0]])
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(head.probabilities(np.array([[3.0, -1.0], [0.0, 0.0]])), expected, atol=1e-7)
