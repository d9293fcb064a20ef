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
    >>> gfx.tl.classify_cells(adata, "cell_type", method=gfx.models.LinearProbe(class_weight=None), n_repeats=1)
    """

    class_weight: Literal["balanced"] | None = "balanced"


@dataclass(frozen=True)
class FineTuning:
    """Training of the network together with a head on genes or cells.

    The defaults are those of the 2023 paper: AdamW with weight decay 1e-3, batches of 12 cells, a learning rate that
    rises over 500 steps (three fifths of the steps if there are fewer than 833) and falls linearly.

    Parameters
    ----------
    freeze_layers
        Network layers that stay as they are, from the first on. `None`: all but the last two for genes, none for cells.
    learning_rate
        Highest learning rate. `None`: 5e-5, and 5e-4 with an adapter.
    n_epochs
        Passes over the training cells, at most. `None`: 1 for genes, 10 for cells.
    batch_size
        Cells between two updates of the weights.
    adapter
        ``"lora"`` trains low-rank adapters of the weights :cite:p:`Hu2022` in layers that are not frozen, with `peft`;
        ``"lora-8bit"`` and ``"lora-4bit"`` hold the network in 8 or 4 bits meanwhile, with `bitsandbytes`, on CUDA
        only. The trained adapters are added to the weights, so that the result is a model like any other.
    patience
        For cells: passes without a lower loss on the validation set before training ends; `None` trains to the end.
        The validation set is 10 % of the training cells or donors. Genes are trained to the end, without one.
    n_trials
        Trials of a search with optuna for learning rate, weight decay, schedule and warm-up before each training,
        evaluated on part of its own training set. 0 searches nothing.
    class_weight
        ``"balanced"``: classes count alike in the loss; `None`: members count alike; ``"auto"``: balanced for cells,
        `None` for genes, as in the paper.
    training
        Further arguments of :class:`transformers.TrainingArguments`, such as ``{"bf16": True}``; they replace ours.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> quick = gfx.models.FineTuning(n_epochs=1, freeze_layers=3)
    >>> gfx.tl.classify_cells(adata, "cell_type", method=quick, n_splits=2, n_repeats=1, controls=None)
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
