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
    from collections.abc import Sequence

#: Inverse strengths of the penalty to choose from, where one is chosen.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)

_MOST_STEPS = 500


@dataclass(frozen=True)
class LinearHead:
    """Logits are `features @ weight.T + bias`.

    Parameters
    ----------
    weight, bias
        float64 `(n_classes, n_features)` and `(n_classes,)`; a class that was never seen has the lowest logit.
    """

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
        Inverse strength of the penalty. `None` chooses among :data:`STRENGTHS` by the log loss in `inner_folds`.
    inner_folds
        Fold of each, `(n,)`.
    class_weight
        ``"balanced"``: classes count alike, however many members they have; `None`: members count alike.
    """
    present = np.unique(classes)
    if not len(present):  # nothing to learn from: all are as probable
        return LinearHead(np.zeros((n_classes, features.shape[1])), np.zeros(n_classes))
    if len(present) == 1:
        return _always(int(present[0]), n_classes, features.shape[1])
    centre = features.mean(axis=0, dtype=np.float64)
    variance = features.var(axis=0, dtype=np.float64)
    scale = np.sqrt(np.full_like(variance, variance.mean()) if one_unit else variance)
    scale[scale <= 1e-12 * np.abs(centre)] = 1.0  # of a constant, but for last bits, nothing is learnt
    scaled = (features - centre) / scale
    fitted = {"max_iter": _MOST_STEPS, "class_weight": class_weight}
    if strength is None:
        splits = [
            (np.flatnonzero(inner_folds != at), np.flatnonzero(inner_folds == at)) for at in np.unique(inner_folds)
        ]
        whole = [split for split in splits if all(len(np.unique(classes[part])) == len(present) for part in split)]
        strength = _best_strength(scaled, classes, whole, fitted) if whole else STRENGTHS[(len(STRENGTHS) - 1) // 2]
    with warnings.catch_warnings():
        # Classes that a line can tell apart have no end to converge to; the last step serves.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=strength, **fitted).fit(scaled, classes)
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:  # of two classes, scikit-learn keeps the difference
        weight, bias = np.stack([-weight[0], weight[0]]) / 2, np.array([-bias[0], bias[0]]) / 2
    weight = weight / scale
    bias = bias - weight @ centre
    head = _always(int(present[0]), n_classes, features.shape[1])
    head.weight[present], head.bias[present] = weight, bias
    return head


def _best_strength(
    scaled: np.ndarray, classes: np.ndarray, splits: Sequence[tuple[np.ndarray, np.ndarray]], fitted: dict[str, object]
) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", FutureWarning)  # names of arguments to come; the values are what we ask for
        search = LogisticRegressionCV(Cs=list(STRENGTHS), cv=splits, scoring="neg_log_loss", refit=True, **fitted)
        return float(np.ravel(search.fit(scaled, classes).C_).mean())


#: Logit of a class that no training example had: next to impossible, and finite.
_NEVER = -1e4


def _always(only: int, n_classes: int, n_features: int) -> LinearHead:
    bias = np.full(n_classes, _NEVER)
    bias[only] = 0.0
    return LinearHead(np.zeros((n_classes, n_features)), bias)
