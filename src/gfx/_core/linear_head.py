"""A linear classifier on fixed features: logistic regression by scikit-learn, kept as one matrix."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Inverse strengths of the penalty to choose from, where one is chosen.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)

_MOST_STEPS = 500

#: Logit of a class that no training example had: next to impossible, and finite.
_NEVER = -1e4


@dataclass(frozen=True)
class LinearHead:
    """Logits are `features @ weight.T + bias`, float64 `(n_classes, n_features)` and `(n_classes,)`."""

    weight: np.ndarray
    bias: np.ndarray

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Probability of each class, float32 `(n, n_classes)`."""
        return softmax(features @ self.weight.T + self.bias, axis=1).astype(np.float32)


def fit_linear_head(
    features: np.ndarray,
    classes: np.ndarray,
    n_classes: int,
    *,
    one_unit: bool,
    strength: float | None = None,
    inner_folds: np.ndarray | None = None,
    class_weight: str | None = "balanced",
) -> LinearHead:
    """Fit logistic regression on features that were centred and scaled, and put centre and scale into its weights.

    Parameters
    ----------
    features, classes
        `(n, n_features)`, and int `(n,)` from 0 to `n_classes - 1`; classes may be absent.
    one_unit
        Features are of one kind, such as states or components: one scale for all keeps what varies little from counting
        as much as what varies much. Otherwise each has its own.
    strength
        Inverse strength of the penalty. `None` chooses among :data:`STRENGTHS` by the log loss in `inner_folds`, the
        fold of each, `(n,)`.
    class_weight
        ``"balanced"``: classes count alike, however many members they have; `None`: members count alike.
    """
    present = np.unique(classes)
    head = LinearHead(np.zeros((n_classes, features.shape[1])), np.full(n_classes, _NEVER))
    if len(present) < 2:  # without any, all classes are equally probable
        head.bias[present if len(present) else slice(None)] = 0.0
        return head
    centre = features.mean(axis=0, dtype=np.float64)
    variance = features.var(axis=0, dtype=np.float64)
    scale = np.sqrt(np.full_like(variance, variance.mean()) if one_unit else variance)
    scale[scale <= 1e-12 * np.abs(centre)] = 1.0  # a feature that is constant, but for last bits, says nothing
    scaled = (features - centre) / scale
    settings = {"max_iter": _MOST_STEPS, "class_weight": class_weight}
    with warnings.catch_warnings():
        # Classes that a line separates have no end to converge to; the last step serves.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if strength is None:
            strength = _best_strength(scaled, classes, inner_folds, settings)
        model = LogisticRegression(C=strength, **settings).fit(scaled, classes)
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:  # of two classes, scikit-learn keeps the difference
        weight, bias = np.stack([-weight[0], weight[0]]) / 2, np.array([-bias[0], bias[0]]) / 2
    head.weight[present] = weight / scale
    head.bias[present] = bias - head.weight[present] @ centre
    return head


def _best_strength(
    scaled: np.ndarray, classes: np.ndarray, inner_folds: np.ndarray | None, settings: Mapping[str, object]
) -> float:
    """Choose the strength of the lowest log loss in the folds that have every class on both sides."""
    numbers = () if inner_folds is None else np.unique(inner_folds)
    splits = [(np.flatnonzero(inner_folds != at), np.flatnonzero(inner_folds == at)) for at in numbers]
    n_present = len(np.unique(classes))
    whole = [split for split in splits if all(len(np.unique(classes[part])) == n_present for part in split)]
    if not whole:
        return STRENGTHS[(len(STRENGTHS) - 1) // 2]
    search = LogisticRegressionCV(Cs=list(STRENGTHS), cv=whole, scoring="neg_log_loss", refit=True, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names of arguments to come; the values are what we ask for
        return float(np.ravel(search.fit(scaled, classes).C_).mean())
