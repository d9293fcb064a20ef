"""How classifiers are trained: choices that a user passes as one object, as scikit-learn passes an estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression on the states of the pretrained network, which stays as it is.

    States are computed once, in one pass over the cells, so that a CPU is fast enough.

    Parameters
    ----------
    class_weight
        ``"balanced"``: classes count alike, however many members they have; `None`: members count alike.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> probe = gfx.models.LinearProbe(class_weight=None)
    >>> gfx.tl.classify_cells(adata, "cell_type", method=probe, n_repeats=1)
    """

    class_weight: Literal["balanced"] | None = "balanced"


@dataclass(frozen=True)
class FineTuning:
    """Training of the network together with a head on genes or cells.

    The defaults are those of the 2023 paper: AdamW with weight decay 1e-3, batches of 12 cells, and a learning rate
    that increases during the first 500 steps (or the first three fifths of all steps, if there are fewer than 833) and
    then decreases linearly.

    Parameters
    ----------
    freeze_layers
        Number of network layers, counted from the first, whose weights are not trained. `None`: all but the last two
        layers for classifiers of genes, no layer for classifiers of cells.
    learning_rate
        Highest learning rate. `None`: 5e-5, or 5e-4 with an adapter.
    n_epochs
        Largest number of passes over the training cells. `None`: 1 for genes, 10 for cells.
    batch_size
        Number of cells per update of the weights.
    adapter
        ``"lora"`` trains low-rank adapters :cite:p:`Hu2022` instead of the weights of the layers that are not frozen,
        with the package `peft`. ``"lora-8bit"`` and ``"lora-4bit"`` also keep the network in 8 or 4 bits during
        training, with the package `bitsandbytes`, on CUDA only. After training, the adapters are added to the weights,
        so that the result is a model like any other.
    patience
        For classifiers of cells: training ends after this number of passes without a lower loss on the validation set,
        which is 10 % of the training cells or donors; `None` makes all passes. Classifiers of genes make all passes and
        have no validation set.
    n_trials
        Number of trials of a search for learning rate, weight decay, learning-rate schedule and warm-up with optuna
        before each training. Trials are evaluated on part of the training set of the same training. 0 makes no search.
    class_weight
        ``"balanced"``: all classes have the same weight in the loss. `None`: all genes or cells have the same weight.
        ``"auto"``: ``"balanced"`` for cells, and `None` for genes, as in the paper.
    training
        Further arguments of :class:`transformers.TrainingArguments`, such as ``{"bf16": True}``. They replace the
        values that gfx sets.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> quick = gfx.models.FineTuning(n_epochs=1, freeze_layers=3)
    >>> gfx.tl.classify_cells(
    ...     adata, "cell_type", method=quick, n_splits=2, n_repeats=1, controls=None
    ... )
    """

    freeze_layers: int | None = None
    learning_rate: float | None = None
    n_epochs: float | None = None
    batch_size: int = 12
    adapter: Literal["lora", "lora-8bit", "lora-4bit"] | None = None
    patience: int | None = 2
    n_trials: int = 0
    class_weight: Literal["auto", "balanced"] | None = "auto"
    training: Mapping[str, Any] | None = None
