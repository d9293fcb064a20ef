"""A model on disk: its configuration, weights file and vocabulary, checked to belong together."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfx._core.checkpoint import check_shapes, check_size, encoder_shapes, plain_names, read_configuration
from gfx._core.manifest import file_sha256
from gfx._core.vocabulary import Vocabulary
from gfx._log import info, shows_progress
from gfx._settings import settings
from gfx.models._registry import EMBEDDED_FOLDER, ModelCard, VocabularyCard, default_store
from gfx.models._vocabulary_file import VOCABULARY_FILE, check_no_pointer, vocabulary_in

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gfx.models._registry import Registry, Store

_SAFE_WEIGHTS, _OLD_WEIGHTS = "model.safetensors", "pytorch_model.bin"
_LAYER = re.compile(r"encoder\.layer\.(\d{1,9})\.")


@dataclass(frozen=True, eq=False)
class Model:
    """A model on disk, to give wherever `model=` is taken. Its weights are read when a tool runs it.

    Parameters
    ----------
    name
        Published name, ``"mini"``, or the folder's name.
    folder
        Where it lies.
    weights
        Its weights file.
    config
        The fields of its `config.json` that say what the network is; others are not read.
    vocabulary
        The genes it knows.
    """

    name: str
    folder: Path
    weights: Path
    config: Mapping[str, Any] = field(repr=False)
    vocabulary: Vocabulary

    def __repr__(self) -> str:
        return (
            f"Model({self.name!r}: {self.n_layers} layers of width {self.hidden_size}, "
            f"reads up to {self.max_length:,} tokens of {self.vocabulary!r})"
        )

    @property
    def max_length(self) -> int:
        """Longest input in tokens, special tokens included."""
        return self.config["max_position_embeddings"]

    @property
    def n_layers(self) -> int:
        """Number of network layers."""
        return self.config["num_hidden_layers"]

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.config["hidden_size"]

    @property
    def n_heads(self) -> int:
        """Attention heads per layer."""
        return self.config["num_attention_heads"]

    @cached_property
    def weights_sha256(self) -> str:
        """Fingerprint of the weights file."""
        return file_sha256(self.weights)

    @property
    def config_sha256(self) -> str:
        """Fingerprint of the configuration; the same weights with another activation are another network."""
        return hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode()).hexdigest()

    def provenance(self) -> dict[str, str]:
        """Which model and vocabulary a result came from."""
        return {
            "model": self.name,
            "weights_sha256": self.weights_sha256,
            "config_sha256": self.config_sha256,
            "vocabulary": self.vocabulary.name,
            "vocabulary_sha256": self.vocabulary.sha256,
        }


def load(name: str | Path | Model | None = None, *, vocabulary: str | Path | Vocabulary | None = None) -> Model:
    """Find a model, fetch it if need be, and check that its parts belong together.

    Functions with a `model` parameter call this themselves. Load a model yourself to look at it, or to name the
    vocabulary of a folder of your own. No weights are loaded into memory. The cost is well under a second, more when a
    published model is used for the first time in a session and its files are hashed.

    Parameters
    ----------
    name
        A published name (:func:`available` lists them) in upper or lower case, or a folder in Hugging Face layout
        (`config.json`, and `model.safetensors` or `pytorch_model.bin`). A folder that has the name of a published
        model is given as a :class:`~pathlib.Path` or with its path, such as ``"./V2-104M"``. `None` uses
        `gfx.settings.model`, or, if that is not set, the embedded `mini`.
    vocabulary
        For a folder without a vocabulary: ``"V1"`` or ``"V2"``, a folder that holds `vocabulary.tsv.gz` or the
        published dictionaries, or a vocabulary. Only its number of tokens and its special tokens can then be checked.
        `None` uses the vocabulary in the folder of the model; if there is one, any other is refused.

    Returns
    -------
    :class:`Model`, accepted wherever `model=` is.

    Raises
    ------
    ValueError
        No such model; the folder lacks a part; or the parts do not belong together: a vocabulary of another size
        than the model's table, other special tokens, another padding token, or not the one beside the model.
    RuntimeError
        The model has to be fetched and cannot be.

    Examples
    --------
    >>> import gfx
    >>> model = gfx.models.load("mini")
    >>> model.name
    'mini'
    >>> model.vocabulary.has_cls
    True
    """
    if isinstance(name, Model):
        if vocabulary is not None:
            msg = f"{name!r} has its vocabulary. For another, load its folder: `gfx.models.load(model.folder, ...)`."
            raise ValueError(msg)
        return name
    if name is None:
        name = settings.model
    if name is None:
        name = EMBEDDED_FOLDER.name
        if shows_progress():  # the message is shown once
            _announce_embedded(name)
    store = default_store()
    registry = store.registry
    card = registry.find(name) if isinstance(name, str) else None
    if isinstance(card, VocabularyCard):
        models = [other.name for other in registry.models.values() if other.vocabulary == card.name]
        msg = f"{card.name!r} is a vocabulary, not a model. Models that read it: {', '.join(models)}."
        raise ValueError(msg)
    folder = _local_folder(name, registry) if card is None else store.fetch(card.name)
    config = _read_config(folder)
    weights = _find_weights(folder)
    _check_weights(weights, config)
    beside = vocabulary_in(folder, registry)
    given = beside if vocabulary is None else _given_vocabulary(store, vocabulary)
    if given is None:
        msg = (
            f"{folder} holds no vocabulary: neither `{VOCABULARY_FILE}` nor the published dictionaries "
            "(`token_dictionary*.pkl`, `gene_median_dictionary*.pkl`). Say which one the model was trained with, such "
            f'as `gfx.models.load(folder, vocabulary="V1")`; its table has {registry.family(config["vocab_size"])}.'
        )
        raise ValueError(msg)
    name = folder.resolve().name if card is None else card.name
    model = Model(name=name, folder=folder, weights=weights, config=config, vocabulary=given)
    _check_vocabulary(model, card, registry, beside)
    return model


@cache
def _announce_embedded(name: str) -> None:
    """Say once which model runs where none is named; every result's `params` name it, too."""
    info(
        f"No model named: using the embedded {name!r}. Name a published one with `model=` or `gfx.settings.model`, "
        'such as "V2-104M"; `gfx.models.available()` lists them.'
    )


def _local_folder(name: str | Path, registry: Registry) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if str(name) != folder.name or isinstance(name, Path):
        msg = f"{folder} is not a folder. Give the folder that holds `config.json` and the weights."
    else:
        msg = f"{registry.unknown(name)} There is no folder of that name either."
    raise ValueError(msg)


def _file_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())[:10]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        msg = (
            f"{folder} holds no `config.json`, so it is no model in Hugging Face layout. Found: {_file_names(folder)}."
        )
        raise ValueError(msg)
    return read_configuration(path)


def _find_weights(folder: Path) -> Path:
    for path in (folder / _SAFE_WEIGHTS, folder / _OLD_WEIGHTS):
        if path.is_file():
            check_no_pointer(path, "the weights themselves")
            return path
    msg = f"{folder} holds neither `{_SAFE_WEIGHTS}` nor `{_OLD_WEIGHTS}`. Found: {_file_names(folder)}."
    raise ValueError(msg)


def _given_vocabulary(store: Store, given: str | Path | Vocabulary) -> Vocabulary:
    if isinstance(given, Vocabulary):
        return given
    card = store.registry.find(given) if isinstance(given, str) else None
    folder = store.fetch(card.name) if isinstance(card, VocabularyCard) else Path(given).expanduser()
    vocabulary = vocabulary_in(folder, store.registry) if folder.is_dir() else None
    if vocabulary is None:
        msg = (
            f"`vocabulary` is {' or '.join(map(repr, store.registry.vocabularies))}, or a folder that holds "
            f"`{VOCABULARY_FILE}` or the published dictionaries; found {str(given)!r}."
        )
        raise ValueError(msg)
    return vocabulary


def _check_weights(path: Path, config: Mapping[str, Any]) -> None:
    """Compare the weights file with the configuration, without loading the weights."""
    if path.name == _OLD_WEIGHTS:
        check_size(path, config)
        return  # a pickle: only torch reads it, with weights_only=True, when the model runs
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as weights:
            names = plain_names(weights.keys())
            shapes = {name: tuple(weights.get_slice(stored).get_shape()) for name, stored in names.items()}
    except (SafetensorError, ValueError) as error:
        msg = f"{path} is not a readable safetensors file ({error}). Copy or fetch it again."
        raise ValueError(msg) from error
    layers = sorted({int(match[1]) for name in shapes if (match := _LAYER.match(name))})
    n_layers = config["num_hidden_layers"]
    if layers != list(range(n_layers)):
        msg = f"{path} holds layers {layers}, `config.json` beside it asks for {n_layers}."
        raise ValueError(msg)
    check_shapes(path, shapes, encoder_shapes(config, n_layers), "a BERT encoder")


def _check_vocabulary(model: Model, card: ModelCard | None, registry: Registry, beside: Vocabulary | None) -> None:
    vocabulary, rows, pad = model.vocabulary, model.config["vocab_size"], model.config["pad_token_id"]
    missing = [special for special in (card.specials if card else ()) if special not in vocabulary.token_of]
    remedy = "Load the model with the vocabulary it was trained with."
    if len(vocabulary) != rows:
        msg = (
            f"The vocabulary {vocabulary.name!r} does not belong to the model {model.name!r}: the model's table has "
            f"{registry.family(rows)}; the vocabulary has {registry.family(len(vocabulary))}. {remedy}"
        )
    elif vocabulary.pad != pad:
        msg = (
            f"The vocabulary {vocabulary.name!r} pads with token {vocabulary.pad}, the model {model.name!r} with "
            f"{pad}. {remedy}"
        )
    elif missing:
        msg = f"The model {model.name!r} needs {', '.join(missing)}, which the vocabulary {vocabulary.name!r} lacks."
    elif beside is not None and vocabulary.sha256 != beside.sha256:
        # Of the same size, it would give genes the vectors of others.
        msg = (
            f"The vocabulary {vocabulary.name!r} is not the one beside the model {model.name!r}, {beside.name!r}: "
            "genes, their order or their medians differ. Leave `vocabulary` out to use the model's own."
        )
    else:
        return
    raise ValueError(msg)
