"""The published models and vocabularies, as `registry.toml` lists them, and the cache that holds fetched ones."""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pandas as pd

from gfx._downloads import RemoteFile, cache_folder, fetch, megabytes, size_of
from gfx._settings import settings
from gfx.models._hugging_face import HUGGING_FACE, copies_in, endpoint, hub_cache

if TYPE_CHECKING:
    from collections.abc import Mapping

REGISTRY_FILE = Path(__file__).with_name("registry.toml")
#: The model inside the package.
EMBEDDED_FOLDER = Path(__file__).with_name("mini")


@dataclass(frozen=True)
class FileEntry:
    """One published file; `size` in bytes."""

    path: str
    revision: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """Name on disk."""
        return PurePosixPath(self.path).name


@dataclass(frozen=True, repr=False)
class VocabularyCard:
    """What is known of a published vocabulary without fetching it."""

    name: str
    description: str
    licence: str
    n_tokens: int
    specials: tuple[str, ...]
    files: tuple[FileEntry, ...]

    def __repr__(self) -> str:
        return (
            f"{self.name}: {self.description}\n"
            f"  tokens   {self.n_tokens:,}, with {' '.join(self.specials)}\n"
            f"  size     {megabytes(sum(file.size for file in self.files))}\n"
            f"  licence  {self.licence}"
        )


@dataclass(frozen=True, repr=False)
class ModelCard:
    """What is known of a model without fetching it.

    `input_size` counts tokens, special tokens included; `files` includes those of its vocabulary.
    """

    name: str
    description: str
    licence: str
    parameters: int
    n_layers: int
    hidden_size: int
    input_size: int
    vocabulary: str
    specials: tuple[str, ...]
    files: tuple[FileEntry, ...]
    size: int
    also_known_as: tuple[str, ...] = ()
    embedded: bool = False

    def __repr__(self) -> str:
        return (
            f"{self.name}: {self.description}\n"
            f"  parameters  {self.parameters:,} in {self.n_layers} layers of width {self.hidden_size}\n"
            f"  input       up to {self.input_size:,} tokens a cell, with {' '.join(self.specials)}\n"
            f"  vocabulary  {self.vocabulary}\n"
            f"  size        {megabytes(self.size)}\n"
            f"  licence     {self.licence}"
        )


@dataclass(frozen=True)
class Registry:
    """All cards by name, and the repository on Hugging Face that has their files."""

    repository: str
    models: Mapping[str, ModelCard]
    vocabularies: Mapping[str, VocabularyCard]

    def find(self, name: str) -> ModelCard | VocabularyCard | None:
        """Find a card by its name or another name of the same model, in any case."""
        return self._by_name().get(name.casefold())

    def get(self, name: str) -> ModelCard | VocabularyCard:
        """Find a card, or raise `ValueError` with what comes close."""
        card = self.find(name)
        if card is None:
            raise ValueError(self.unknown(name))
        return card

    def unknown(self, name: str) -> str:
        """Say that a name is not known, and which ones are."""
        by_name = self._by_name()
        close = difflib.get_close_matches(name.casefold(), by_name, n=3, cutoff=0.5)
        meant = list(dict.fromkeys(by_name[match].name for match in close))
        suggestion = f" Did you mean {' or '.join(map(repr, meant))}?" if meant else ""
        return (
            f"No published model or vocabulary is called {name!r}.{suggestion} "
            f"Models: {', '.join(self.models)}; vocabularies: {', '.join(self.vocabularies)}."
        )

    def family(self, n_tokens: int) -> str:
        """Say in words whose vocabulary has that many tokens."""
        names = [card.name for card in self.vocabularies.values() if card.n_tokens == n_tokens]
        return f"{n_tokens:,} tokens" + (f", as {' or '.join(names)} has" if names else "")

    def _by_name(self) -> dict[str, ModelCard | VocabularyCard]:
        others = {other.casefold(): card for card in self.models.values() for other in card.also_known_as}
        return others | {name.casefold(): card for name, card in (self.models | self.vocabularies).items()}


@lru_cache(maxsize=1)
def published() -> Registry:
    """Read what this version of gfx knows; the embedded model is listed with them."""
    content = tomllib.loads(REGISTRY_FILE.read_text(encoding="utf-8"))
    vocabularies = {
        name: VocabularyCard(name=name, **_fields(entry)) for name, entry in content["vocabularies"].items()
    }
    models = {}
    if (EMBEDDED_FOLDER / "config.json").is_file():
        models[EMBEDDED_FOLDER.name] = _embedded_card(content["embedded"])
    for name, entry in content["models"].items():
        vocabulary = vocabularies[entry["vocabulary"]]
        fields = _fields(entry)
        fields["files"] += vocabulary.files
        size = sum(file.size for file in fields["files"])
        models[name] = ModelCard(name=name, specials=vocabulary.specials, size=size, **fields)
    return Registry(repository=content["repository"], models=models, vocabularies=vocabularies)


def _fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Turn an entry of the file into fields of a card."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    revision = fields.pop("revision")
    return fields | {"files": tuple(FileEntry(revision=revision, **file) for file in entry["files"])}


def _embedded_card(entry: Mapping[str, Any]) -> ModelCard:
    """Take the figures from the model itself, so that they cannot differ from it."""
    from safetensors import safe_open

    config = json.loads((EMBEDDED_FOLDER / "config.json").read_text(encoding="utf-8"))
    with safe_open(EMBEDDED_FOLDER / "model.safetensors", framework="numpy") as weights:
        parameters = sum(prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    return ModelCard(
        name=EMBEDDED_FOLDER.name,
        description=entry["description"],
        licence=entry["licence"],
        parameters=parameters,
        n_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        input_size=config["max_position_embeddings"],
        vocabulary=EMBEDDED_FOLDER.name,
        specials=tuple(entry["specials"]),
        files=(),
        size=sum(file.stat().st_size for file in EMBEDDED_FOLDER.iterdir() if file.is_file()),
        embedded=True,
    )


# --- sizes ----------------------------------------------------------------------------------------------------------


def _size(blocks: int, width: int, inner: int, *, tokens: int, dropout: float, head: int = 64) -> dict[str, Any]:
    return {
        "num_hidden_layers": blocks,
        "hidden_size": width,
        "num_attention_heads": width // head,
        "intermediate_size": inner,
        "max_position_embeddings": tokens,
        "hidden_act": "relu",
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }


#: The published sizes, and that of the embedded model, as fields of `transformers.BertConfig`. The embedded one has no
#: dropout: what is masked differs in every epoch, and drawing random numbers costs a CPU a tenth of its time.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "mini": _size(4, 128, 512, tokens=2048, dropout=0.0, head=32),
    "V1-10M": _size(6, 256, 512, tokens=2048, dropout=0.02),
    "gf-12L-30M": _size(12, 512, 1024, tokens=2048, dropout=0.02),
    "gf-12L-95M": _size(12, 512, 1024, tokens=4096, dropout=0.02),
    "gf-20L-95M": _size(20, 896, 1792, tokens=4096, dropout=0.02),
    "V2-104M": _size(12, 768, 3072, tokens=4096, dropout=0.1),
    "V2-316M": _size(18, 1152, 4608, tokens=4096, dropout=0.1),
}

# --- the cache ------------------------------------------------------------------------------------------------------


def default_store() -> Store:
    """Use the cache and the connection that the settings allow."""
    return Store(published(), cache_folder(), endpoint=endpoint(), hub_cache=hub_cache(), offline=settings.offline)


@dataclass(frozen=True)
class Store:
    """One folder per model or vocabulary, each complete in itself; a file is asked for `attempts` times."""

    registry: Registry
    folder: Path
    endpoint: str = HUGGING_FACE
    hub_cache: Path | None = None
    offline: bool = False
    attempts: int = 3

    def folder_of(self, card: ModelCard | VocabularyCard) -> Path:
        """Where the files of a card belong."""
        return EMBEDDED_FOLDER if isinstance(card, ModelCard) and card.embedded else self.folder / card.name

    def holds(self, card: ModelCard | VocabularyCard) -> bool:
        """Whether all files are there in their full size; hashes are checked when they are used."""
        return all(size_of(self.folder_of(card) / file.name) == file.size for file in card.files)

    def fetch(self, name: str) -> Path:
        """Make sure that the files of a model or vocabulary are there and whole; return their folder."""
        card = self.registry.get(name)
        folder = self.folder_of(card)
        fetch(card.name, self.files_of(card), folder, offline=self.offline, attempts=self.attempts)
        return folder

    def files_of(self, card: ModelCard | VocabularyCard) -> list[RemoteFile]:
        """List the files of a card: their addresses, and where the cache of Hugging Face may have them."""
        return [self._remote(file) for file in card.files]

    def _remote(self, file: FileEntry) -> RemoteFile:
        repository = self.registry.repository
        url = f"{self.endpoint}/{repository}/resolve/{file.revision}/{file.path}"
        copies = () if self.hub_cache is None else copies_in(self.hub_cache, repository, file.path, file.sha256)
        return RemoteFile(file.name, url, file.sha256, file.size, tuple(copies))

    def available(self) -> pd.DataFrame:
        """List all models."""
        return pd.DataFrame(
            {
                "parameters": card.parameters,
                "input_size": card.input_size,
                "vocabulary": card.vocabulary,
                "specials": " ".join(card.specials),
                "licence": card.licence,
                "megabytes": round(card.size / 1e6, 1),
                "cached": self.holds(card),
                "description": card.description,
            }
            for card in self.registry.models.values()
        ).set_index(pd.Index(list(self.registry.models), name="name"))

    def cached(self) -> pd.DataFrame:
        """List what is in the cache."""
        rows = {}
        for card in (*self.registry.models.values(), *self.registry.vocabularies.values()):
            sizes = [size for file in card.files if (size := size_of(self.folder / card.name / file.name)) is not None]
            if sizes:
                rows[card.name] = (self.holds(card), round(sum(sizes) / 1e6, 1), str(self.folder_of(card)))
        index = pd.Index(list(rows), name="name", dtype=object)
        return pd.DataFrame(list(rows.values()), columns=["complete", "megabytes", "folder"], index=index)
