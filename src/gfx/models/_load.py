"""A model on disk: its configuration, weights file and vocabulary, checked to belong together."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfx._core.vocabulary import Vocabulary
from gfx._log import info, shows_progress
from gfx._settings import settings
from gfx.models._dictionaries import is_lfs_pointer, read_published_vocabulary
from gfx.models._registry import EMBEDDED_FOLDER, ModelCard, VocabularyCard, default_store, file_sha256
from gfx.models._vocabulary_file import VOCABULARY_FILE, read_vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gfx.models._registry import Registry, Store

_SAFE_WEIGHTS, _OLD_WEIGHTS = "model.safetensors", "pytorch_model.bin"
_BLOCK = re.compile(r"encoder\.layer\.(\d+)\.")


@dataclass(frozen=True, eq=False)
class Model:
    """A model on disk, ready to be named wherever `model=` is taken.

    Holds no weights; they are read when a tool runs the model.

    Parameters
    ----------
    name
        Published name, ``"mini"``, or the folder's name.
    folder
        Where it lies.
    weights
        Its weights file.
    config
        Content of its `config.json`.
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
            f"Model({self.name!r}: {self.n_blocks} layers of width {self.hidden_size}, "
            f"reads up to {self.max_length:,} tokens of {self.vocabulary!r})"
        )

    @property
    def max_length(self) -> int:
        """Longest input in tokens, special tokens included."""
        return self.config["max_position_embeddings"]

    @property
    def n_blocks(self) -> int:
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

    def provenance(self) -> dict[str, str]:
        """Which model and vocabulary a result came from."""
        return {
            "model": self.name,
            "weights_sha256": self.weights_sha256,
            "vocabulary": self.vocabulary.name,
            "vocabulary_sha256": self.vocabulary.sha256,
        }


def load(name: str | Path | Model | None = None, *, vocabulary: str | Path | Vocabulary | None = None) -> Model:
    """Find a model, fetch it if need be, and check that its parts belong together.

    Tools do this themselves with what their `model` is given; load a model yourself to look at it, or to use a folder
    of your own whose vocabulary must be named. Loads no weights into memory. Costs well under a second, more when a
    published model is used for the first time in a session and its files are hashed.

    Parameters
    ----------
    name
        A published name (:func:`available` lists them) in any case, or a folder in Hugging Face layout
        (`config.json`, and `model.safetensors` or `pytorch_model.bin`). A folder that is called like a published
        model is given as a :class:`~pathlib.Path` or with its path, such as ``"./V2-104M"``. `None`: what
        `gfx.settings.model` says, else the embedded `mini`.
    vocabulary
        For models whose vocabulary does not lie beside them: ``"V1"`` or ``"V2"``, a folder that holds
        `vocabulary.tsv.gz` or the published dictionaries, or a vocabulary. `None`: what lies beside the model. Where
        one lies beside the model, another one is refused; for a folder without, only the number of tokens and the
        special tokens can be checked.

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
    return load_from(default_store(), name, vocabulary)


def load_from(store: Store, name: str | Path | Model | None, vocabulary: str | Path | Vocabulary | None) -> Model:
    """Load with the given store; see :func:`load`."""
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
    card = store.registry.find(name) if isinstance(name, str) else None
    if isinstance(card, VocabularyCard):
        models = [other.name for other in store.registry.models.values() if other.vocabulary == card.name]
        msg = f"{card.name!r} is a vocabulary, not a model. Models that read it: {', '.join(models)}."
        raise ValueError(msg)
    folder = _local_folder(name, store.registry) if card is None else store.fetch(card.name)
    config = _read_config(folder)
    weights = _find_weights(folder)
    beside = _vocabulary_in(folder, store.registry)
    if vocabulary is not None:
        given = _given_vocabulary(store, vocabulary)
    elif beside is not None:
        given = beside
    else:
        msg = (
            f"{folder} holds no vocabulary: neither `{VOCABULARY_FILE}` nor the published dictionaries "
            "(`token_dictionary*.pkl`, `gene_median_dictionary*.pkl`). Say which one the model was trained with, "
            f'such as `gfx.models.load(folder, vocabulary="V1")`; its table has '
            f"{store.registry.family(config['vocab_size'])}."
        )
        raise ValueError(msg)
    model = Model(
        name=folder.resolve().name if card is None else card.name,
        folder=folder,
        weights=weights,
        config=config,
        vocabulary=given,
    )
    _check_weights(model)
    _check_vocabulary(model, card, store.registry)
    _check_beside(model, beside)
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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        entries = sorted(entry.name for entry in folder.iterdir())[:10]
        msg = f"{folder} holds no `config.json`, so it is no model in Hugging Face layout. Found: {entries}."
        raise ValueError(msg)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is not readable ({error}). Copy or fetch it again."
        raise ValueError(msg) from error
    if config.get("model_type") != "bert":
        msg = f"{path} describes a {config.get('model_type')!r} model; Geneformer models are of type 'bert'."
        raise ValueError(msg)
    needed = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads")
    missing = [key for key in needed if key not in config]
    if missing:
        msg = f"{path} does not say {', '.join(missing)}."
        raise ValueError(msg)
    return config


def _find_weights(folder: Path) -> Path:
    for name in (_SAFE_WEIGHTS, _OLD_WEIGHTS):
        path = folder / name
        if path.is_file():
            if is_lfs_pointer(path):
                msg = f"{path} is a git-lfs pointer, not the weights themselves. Run `git lfs pull` where it came from."
                raise ValueError(msg)
            return path
    entries = sorted(entry.name for entry in folder.iterdir())[:10]
    msg = f"{folder} holds neither `{_SAFE_WEIGHTS}` nor `{_OLD_WEIGHTS}`. Found: {entries}."
    raise ValueError(msg)


def _given_vocabulary(store: Store, given: str | Path | Vocabulary) -> Vocabulary:
    if isinstance(given, Vocabulary):
        return given
    card = store.registry.find(given) if isinstance(given, str) else None
    folder = store.fetch(card.name) if isinstance(card, VocabularyCard) else Path(given).expanduser()
    vocabulary = _vocabulary_in(folder, store.registry) if folder.is_dir() else None
    if vocabulary is None:
        msg = (
            f"`vocabulary` is {' or '.join(map(repr, store.registry.vocabularies))}, or a folder that holds "
            f"`{VOCABULARY_FILE}` or the published dictionaries; found {str(given)!r}."
        )
        raise ValueError(msg)
    return vocabulary


def _vocabulary_in(folder: Path, registry: Registry) -> Vocabulary | None:
    """Read the vocabulary that lies in a folder: our table, or the published dictionaries."""
    if (folder / VOCABULARY_FILE).is_file():
        return read_vocabulary(folder / VOCABULARY_FILE)
    tokens = _only(folder, "token_dictionary*.pkl")
    medians = _only(folder, "gene_median_dictionary*.pkl")
    if tokens is None or medians is None:
        return None
    hashes = {file_sha256(tokens), file_sha256(medians)}
    known = [card.name for card in registry.vocabularies.values() if hashes <= {file.sha256 for file in card.files}]
    return read_published_vocabulary(
        known[0] if known else folder.resolve().name,
        tokens,
        medians,
        symbols=_only(folder, "gene_name_id_dict*.pkl"),
        mapping=_only(folder, "ensembl_mapping_dict*.pkl"),
    )


def _only(folder: Path, pattern: str) -> Path | None:
    paths = sorted(folder.glob(pattern))
    if len(paths) > 1:
        names = [path.name for path in paths]
        msg = f"{folder} holds several {pattern}: {names}. Keep the one that the model was trained with."
        raise ValueError(msg)
    return paths[0] if paths else None


def _check_weights(model: Model) -> None:
    """Compare the shapes in the weights file with the configuration, without loading the weights."""
    if model.weights.name == _OLD_WEIGHTS:
        return  # a pickle: only torch reads it, with weights_only=True, when the model runs
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(model.weights, framework="numpy") as weights:
            shapes = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        msg = f"{model.weights} is not a readable safetensors file ({error}). Copy or fetch it again."
        raise ValueError(msg) from error
    config = model.config
    expected = {
        "word": (config["vocab_size"], config["hidden_size"]),
        "position": (config["max_position_embeddings"], config["hidden_size"]),
    }
    for table, shape in expected.items():
        shapes_of = [shapes[key] for key in shapes if key.endswith(f"embeddings.{table}_embeddings.weight")]
        if shapes_of != [shape]:
            msg = (
                f"{model.weights} and `config.json` beside it do not belong together: the {table} table is "
                f"{shapes_of[0] if shapes_of else 'absent'}, expected {shape}."
            )
            raise ValueError(msg)
    blocks = {int(match[1]) for key in shapes if (match := _BLOCK.search(key))}
    if blocks != set(range(model.n_blocks)):
        msg = f"{model.weights} holds layers {sorted(blocks)}, `config.json` beside it asks for {model.n_blocks}."
        raise ValueError(msg)


def _check_vocabulary(model: Model, card: ModelCard | None, registry: Registry) -> None:
    vocabulary, rows = model.vocabulary, model.config["vocab_size"]
    if len(vocabulary) != rows:
        msg = (
            f"The vocabulary {vocabulary.name!r} does not belong to the model {model.name!r}: the model's table has "
            f"{registry.family(rows)}; the vocabulary has {registry.family(len(vocabulary))}. "
            "Load the model with the vocabulary it was trained with."
        )
        raise ValueError(msg)
    pad = model.config.get("pad_token_id", 0)
    if vocabulary.pad != pad:
        msg = (
            f"The vocabulary {vocabulary.name!r} pads with token {vocabulary.pad}, the model {model.name!r} with "
            f"{pad}. Load the model with the vocabulary it was trained with."
        )
        raise ValueError(msg)
    missing = [special for special in (card.specials if card else ()) if special not in vocabulary.token_of]
    if missing:
        msg = f"The model {model.name!r} needs {', '.join(missing)}, which the vocabulary {vocabulary.name!r} lacks."
        raise ValueError(msg)


def _check_beside(model: Model, beside: Vocabulary | None) -> None:
    """Refuse another vocabulary than the model's own: of the same size, it would give genes the vectors of others."""
    if beside is not None and model.vocabulary.sha256 != beside.sha256:
        msg = (
            f"The vocabulary {model.vocabulary.name!r} is not the one beside the model {model.name!r}, "
            f"{beside.name!r}: genes, their order or their medians differ. "
            "Leave `vocabulary` out to use the model's own."
        )
        raise ValueError(msg)
