"""The model that is fine-tuned: a BERT encoder with a linear head on each gene, or on the cell."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from torch.nn import functional
from transformers import BertConfig
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.models.bert.modeling_bert import BertModel, BertPooler, BertPreTrainedModel

from gfx._core.checkpoint import HEAD_FIELD
from gfx._engine.encoder import bert_config, load_encoder, random_encoder, read_tensors
from gfx._engine.examples import NOTHING
from gfx._engine.pooling import pool
from gfx._engine.surroundings import quiet_surroundings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np

#: Architectures of classifiers that others wrote, and what each classifies.
_OTHERS: dict[str, tuple[Literal["genes", "cells"], Literal["gene", "pooler"]]] = {
    "BertForTokenClassification": ("genes", "gene"),
    "BertForSequenceClassification": ("cells", "pooler"),
}


@dataclass(frozen=True)
class Head:
    """What a classifier predicts, and from which states.

    Parameters
    ----------
    of
        Whether each gene of a cell is classified, or the cell.
    pooling
        ``"gene"``: every state by itself. Of a cell, ``"cls"``: the state of `<cls>`; ``"mean"``: the mean over genes;
        ``"pooler"``: the first state through BERT's pooler, as the official software does.
    tasks
        Names of the classes of each task. All logits stand side by side, in this order.
    """

    of: Literal["genes", "cells"]
    pooling: Literal["gene", "cls", "mean", "pooler"]
    tasks: dict[str, list[str]]

    @property
    def slices(self) -> dict[str, slice]:
        """Where the logits of each task are."""
        slices, start = {}, 0
        for task, classes in self.tasks.items():
            slices[task] = slice(start, start + len(classes))
            start += len(classes)
        return slices

    @property
    def n_logits(self) -> int:
        """Number of classes of all tasks together."""
        return sum(map(len, self.tasks.values()))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax over the classes of each task, float32 `(..., n_logits)`."""
        return torch.cat([logits[..., part].float().softmax(dim=-1) for part in self.slices.values()], dim=-1)


def head_of(config: Mapping[str, Any]) -> Head | None:
    """Read the head of a checkpoint, ours or one of the official software; `None` if it has none."""
    if HEAD_FIELD in config:
        return _read_head(config[HEAD_FIELD])
    architecture = next(iter(config.get("architectures") or ()), None)
    if architecture not in _OTHERS:
        return None
    names = {
        int(number): str(name) for number, name in (config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}).items()
    }
    return Head(*_OTHERS[architecture], {"label": [names[number] for number in sorted(names)]})


def _read_head(written: Mapping[str, Any]) -> Head:
    return Head(**{**written, "tasks": dict(written["tasks"])})


class _ExactLinear(nn.Linear):
    """A linear layer in float32, whatever the states are in: to round a bias that holds a centre moves logits."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states.float(), self.weight.float(), self.bias.float())


class Classifier(BertPreTrainedModel):
    """A BERT encoder with one linear head; several tasks have their rows in it.

    A position or cell without a label, -100, counts for nothing in the loss. Class weights, float `(n_logits,)`, weigh
    what a class counts.
    """

    config_class = BertConfig
    #: The loss is a mean over one batch, which the Trainer averages over accumulated batches and devices.
    accepts_loss_kwargs = False

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.head = _read_head(getattr(config, HEAD_FIELD))
        self.bert = BertModel(config, add_pooling_layer=False)
        self.pooler: Any = BertPooler(config) if self.head.pooling == "pooler" else None
        drop = config.classifier_dropout if config.classifier_dropout is not None else config.hidden_dropout_prob
        self.dropout = nn.Dropout(drop)
        self.classifier = _ExactLinear(config.hidden_size, self.head.n_logits)
        self.register_buffer("class_weight", torch.ones(self.head.n_logits), persistent=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_gene: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits `(b, l, n_logits)` of genes or `(b, n_logits)` of cells; labels `(b, l)` or `(b, n_tasks)`."""
        logits = self.read_out(self.bert(input_ids, attention_mask=attention_mask).last_hidden_state, is_gene)
        return TokenClassifierOutput(loss=None if labels is None else self._loss(logits, labels), logits=logits)

    def read_out(self, hidden: torch.Tensor, is_gene: torch.Tensor | None = None) -> torch.Tensor:
        """Turn states into logits; which positions are genes is needed for a mean over them."""
        match self.head.pooling:
            case "pooler":
                hidden = self.pooler(hidden)
            case "cls" | "mean":
                hidden = pool(hidden, cast("torch.Tensor", is_gene), self.head.pooling)
        return self.classifier(self.dropout(hidden))

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of each task over its labels, added up; one without a label in the batch adds 0."""
        labels = labels[..., None] if self.head.of == "genes" else labels
        total = logits.sum() * 0.0
        for task, part in enumerate(self.head.slices.values()):
            weight = self.class_weight[part].float()
            truth = labels[..., task].reshape(-1)
            scores = logits[..., part].float().reshape(len(truth), -1)
            summed = functional.cross_entropy(scores, truth, weight, ignore_index=NOTHING, reduction="sum")
            counted = torch.where(truth == NOTHING, 0.0, weight[truth.clamp(min=0)]).sum()
            total = total + summed / counted.clamp(min=torch.finfo(torch.float32).tiny)
        return total


@quiet_surroundings()
def make_classifier(
    weights: Path, config: Mapping[str, Any], head: Head, *, seed: int, n_layers: int, random: bool = False
) -> Classifier:
    """Put an untrained head on a pretrained encoder, or, as a control, on one with random weights; in float32."""
    settings = _settings(config, head, n_layers)
    torch.manual_seed(seed)
    cpu: dict[str, Any] = {"n_layers": n_layers, "device": torch.device("cpu"), "dtype": torch.float32}
    model = Classifier(settings)
    model.bert = random_encoder(config, seed=seed, **cpu) if random else load_encoder(weights, config, **cpu)
    model.bert.requires_grad_(requires_grad=True)
    return model


def weigh_classes(model: Classifier, weight: np.ndarray) -> None:
    """Set what each class counts in the loss, float `(n_logits,)`."""
    model.class_weight.copy_(torch.from_numpy(weight))


@torch.no_grad()
def set_head(model: Classifier, weight: np.ndarray, bias: np.ndarray) -> None:
    """Put in a head that was fitted elsewhere, `(n_logits, hidden_size)` and `(n_logits,)`."""
    model.classifier.weight.copy_(torch.from_numpy(weight))
    model.classifier.bias.copy_(torch.from_numpy(bias))


def freeze(model: Classifier, n_layers: int) -> None:
    """Leave the first blocks as they are; embeddings are trained, as with the official software."""
    for block in model.bert.encoder.layer[:n_layers]:
        block.requires_grad_(requires_grad=False)


def load_classifier(
    weights: Path, config: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype
) -> Classifier:
    """Read a trained classifier, ready to predict, its last layer in float32; pickled weights only as plain tensors."""
    head, n_layers = cast("Head", head_of(config)), config["num_hidden_layers"]
    with torch.device("meta"):
        model = Classifier(_settings(config, head, n_layers))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.startswith("bert.")}
    state = read_tensors(weights, shapes, f"a classifier of {head.n_logits} classes")
    model.bert = load_encoder(weights, config, n_layers=n_layers, device=device, dtype=dtype)
    model.class_weight = torch.ones(head.n_logits, device=device)
    rest = {name: state[name].to(device, torch.float32 if name.startswith("classifier.") else dtype) for name in shapes}
    model.load_state_dict(rest, strict=False, assign=True)
    return model.eval().requires_grad_(requires_grad=False)


@quiet_surroundings()
def save_classifier(model: Classifier, folder: Path) -> None:
    """Write a classifier; of one task, genes' is one that transformers reads by itself."""
    if len(model.head.tasks) == 1:
        (classes,) = model.head.tasks.values()
        model.config.id2label = dict(enumerate(classes))
        model.config.label2id = {name: number for number, name in enumerate(classes)}
    model.save_pretrained(folder)


def _settings(config: Mapping[str, Any], head: Head, n_layers: int) -> BertConfig:
    # Tasks as pairs: files keep no order of names.
    written = asdict(head) | {"tasks": [list(task) for task in head.tasks.items()]}
    foreign = {"architectures", "id2label"}
    fields = {name: value for name, value in config.items() if name not in foreign}
    return bert_config(fields, num_hidden_layers=n_layers, **{HEAD_FIELD: written})
