"""What the checkpoint of a Geneformer has to be: fields of its configuration, and tensors by name and shape.

Folders come from anywhere, and what they say decides which objects are made, and how large. So they are compared with
this before any is.
"""

from __future__ import annotations

import json
from math import isfinite, prod
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

#: Whole numbers, with the lowest and the highest that are read.
SIZES = {
    "vocab_size": (3, 1 << 24),
    "max_position_embeddings": (1, 1 << 20),
    "num_hidden_layers": (1, 1000),
    "hidden_size": (1, 1 << 16),
    "num_attention_heads": (1, 1 << 16),
    "intermediate_size": (1, 1 << 18),
    "type_vocab_size": (1, 1000),
    "pad_token_id": (0, 1 << 24),
}

#: Other numbers, with the lowest and the highest.
NUMBERS = {
    "hidden_dropout_prob": (0, 1),
    "attention_probs_dropout_prob": (0, 1),
    "classifier_dropout": (0, 1),
    "layer_norm_eps": (1e-30, 1),
    "initializer_range": (0, 1000),
}

ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "mish", "relu", "relu2", "silu", "swish", "tanh")

#: Fields that need not be there, with what they are then, as in `transformers.BertConfig`.
DEFAULTS: dict[str, Any] = {
    "intermediate_size": 3072,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "hidden_act": "gelu",
    "tie_word_embeddings": True,
}

#: Fields of the network; a configuration has those of its classifier besides.
FIELDS = frozenset({*SIZES, *NUMBERS, *DEFAULTS})

#: Field with the head of a classifier that gfx wrote, and what each head classifies by.
HEAD_FIELD = "classifier_head"
POOLINGS = {"genes": ("gene",), "cells": ("cls", "mean", "pooler")}

#: Bytes of a file of JSON, at most; classifiers list their classes there.
LARGEST_JSON = 1 << 24


def read_json(file: Path, kind: type = dict) -> Any:
    """Read JSON that is named fields, or of another kind; anything else is a `ValueError` that names the file."""
    if file.stat().st_size > LARGEST_JSON:
        msg = f"{file} has {file.stat().st_size:,} bytes, far more than such a file needs. Copy or fetch it again."
        raise ValueError(msg)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        msg = f"{file} is not readable ({error}). Copy or fetch it again."
        raise ValueError(msg) from None
    if not isinstance(content, kind):
        msg = f"{file} holds a {type(content).__name__}, not a {kind.__name__}. Copy or fetch it again."
        raise ValueError(msg)
    return content


def read_configuration(file: Path) -> dict[str, Any]:
    """Read the fields of a `config.json` that say what the network is, each checked; all others are left out."""
    found = {name: value for name, value in read_json(file).items() if value is not None}
    if found.get("model_type") != "bert":
        msg = f"{file} describes a {found.get('model_type')!r} model; Geneformer models are of type 'bert'."
        raise ValueError(msg)
    missing = [name for name in SIZES if name not in found and name not in DEFAULTS]
    if missing:
        msg = f"{file} does not say {', '.join(missing)}."
        raise ValueError(msg)
    config = DEFAULTS | {name: found[name] for name in FIELDS & set(found)}
    try:
        check_fields(config)
        if found.get("position_embedding_type", "absolute") != "absolute":
            msg = f"`position_embedding_type` is {found['position_embedding_type']!r}; Geneformer has absolute ones."
            raise ValueError(msg)
        config |= _read_classes(found)
    except ValueError as error:
        msg = f"{file} describes no Geneformer: {error}"
        raise ValueError(msg) from None
    return {"model_type": "bert", **config}


def check_fields(fields: Mapping[str, Any]) -> None:
    """Refuse values that make no network; the message names the field."""
    for name, value in fields.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        is_whole = is_number and isinstance(value, Integral)
        if name in SIZES:
            low, high = SIZES[name]
            if not (is_whole and low <= value <= high):
                msg = f"`{name}` is a whole number from {low:,} to {high:,}, found {_shown(value)}."
                raise ValueError(msg)
        elif name in NUMBERS:
            lowest, highest = NUMBERS[name]
            if not (is_number and isfinite(value) and lowest <= value <= highest):
                msg = f"`{name}` is a number from {lowest} to {highest}, found {_shown(value)}."
                raise ValueError(msg)
        elif name == "hidden_act" and value not in ACTIVATIONS:
            msg = f"`hidden_act` is one of {', '.join(ACTIVATIONS)}, found {_shown(value)}."
            raise ValueError(msg)
        elif name == "tie_word_embeddings" and not isinstance(value, bool):
            msg = f"`tie_word_embeddings` is true or false, found {_shown(value)}."
            raise ValueError(msg)
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    if width % heads:
        msg = f"{heads} heads (`num_attention_heads`) do not divide a width of {width} (`hidden_size`)."
        raise ValueError(msg)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _read_classes(found: Mapping[str, Any]) -> dict[str, Any]:
    """Read what a classifier says of its head and its classes."""
    classes: dict[str, Any] = {}
    architectures = found.get("architectures", [])
    if not (isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)):
        msg = f"`architectures` is a list of names, found {_shown(architectures)}."
        raise ValueError(msg)
    if architectures:
        classes["architectures"] = architectures
    if "id2label" in found:
        labels = found["id2label"]
        is_numbered = isinstance(labels, dict) and sorted(labels) == sorted(map(str, range(len(labels))))
        are_names = is_numbered and labels and all(isinstance(label, str | int) for label in labels.values())
        if not (are_names and len(set(map(str, labels.values()))) == len(labels)):
            msg = f"`id2label` numbers the classes from 0 on, each of another name, found {_shown(labels)}."
            raise ValueError(msg)
        classes["id2label"] = labels
    if HEAD_FIELD in found:
        head = found[HEAD_FIELD]
        try:
            is_known = head["pooling"] in POOLINGS[head["of"]] and len(head) == 3
            tasks = dict(head["tasks"])
            is_known = is_known and len(tasks) == len(head["tasks"]) and (len(tasks) == 1 or head["of"] == "cells")
            are_lists = all(isinstance(classes, list) and classes for classes in tasks.values())
            names = [name for task, classes in tasks.items() for name in (task, *classes)]
            is_head = is_known and names and are_lists and all(isinstance(name, str) for name in names)
            is_head = is_head and all(len(set(classes)) == len(classes) for classes in tasks.values())
        except (KeyError, TypeError, ValueError):
            is_head = False
        if not is_head:
            msg = f"`{HEAD_FIELD}` has what is classified, from which state, and classes by task; found {_shown(head)}."
            raise ValueError(msg)
        classes[HEAD_FIELD] = head
    return classes


# --- weights --------------------------------------------------------------------------------------------------------

_LINEAR = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")


def encoder_shapes(config: Mapping[str, Any], n_layers: int) -> dict[str, tuple[int, ...]]:
    """Name the weights of an encoder up to a layer, with their shapes."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {}
    sizes = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
    for table, size in sizes.items():
        shapes[f"embeddings.{table}_embeddings.weight"] = config[size], width

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def linear(name: str, n_out: int, n_in: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in), (n_out,)

    norm("embeddings.LayerNorm")
    for layer in (f"encoder.layer.{number}" for number in range(n_layers)):
        for name in _LINEAR:
            linear(f"{layer}.{name}", width, width)
        linear(f"{layer}.intermediate.dense", inner, width)
        linear(f"{layer}.output.dense", width, inner)
        norm(f"{layer}.attention.output.LayerNorm")
        norm(f"{layer}.output.LayerNorm")
    return shapes


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Map the names of weights without the prefix that whole models have to those in the file.

    What scales and shifts in a `LayerNorm` is called `gamma` and `beta` in old files, and in those of transformers 5.0.
    """
    plain: dict[str, str] = {}
    for name in names:
        own = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        own = own.replace("LayerNorm.beta", "LayerNorm.bias")
        if plain.setdefault(own, name) != name:
            msg = f"it has two weights {own!r}: {plain[own]!r} and {name!r}"
            raise ValueError(msg)
    return plain


def check_shapes(
    file: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Refuse weights that lack some of those expected, or have others of that name."""
    missing = [name for name in expected if name not in found]
    if missing:
        msg = f"{file} lacks {len(missing)} tensors of {what}, such as {missing[0]!r}."
        raise ValueError(msg)
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            msg = f"{file}: {name!r} has shape {tuple(found[name])}, {shape} in {what} as `config.json` describes it."
            raise ValueError(msg)


def check_size(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration of more weights than the file has room for, at two bytes each."""
    n_weights = sum(map(prod, encoder_shapes(config, config["num_hidden_layers"]).values()))
    size = file.stat().st_size
    if 2 * n_weights > size:
        msg = f"{file} has {size:,} bytes, `config.json` promises {n_weights:,} weights. Fetch both again."
        raise ValueError(msg)
