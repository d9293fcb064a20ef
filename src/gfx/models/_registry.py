"""The published models and vocabularies, as `registry.toml` lists them."""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

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

    def url(self, base_url: str) -> str:
        """Where it is published."""
        return f"{base_url}/{self.revision}/{self.path}"


@dataclass(frozen=True, repr=False)
class VocabularyCard:
    """What is known of a published vocabulary without fetching it."""

    name: str
    description: str
    licence: str
    n_tokens: int
    specials: tuple[str, ...]
    files: tuple[FileEntry, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.size for file in self.files)

    def __repr__(self) -> str:
        return _lines(
            f"{self.name}: {self.description}",
            tokens=f"{self.n_tokens:,}, with {' '.join(self.specials)}",
            size=megabytes(self.size),
            licence=self.licence,
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
    n_blocks: int
    hidden_size: int
    input_size: int
    vocabulary: str
    specials: tuple[str, ...]
    files: tuple[FileEntry, ...]
    size: int
    also_known_as: tuple[str, ...] = ()
    embedded: bool = False

    def __repr__(self) -> str:
        return _lines(
            f"{self.name}: {self.description}",
            parameters=f"{self.parameters:,} in {self.n_blocks} blocks of width {self.hidden_size}",
            input=f"up to {self.input_size:,} tokens a cell, with {' '.join(self.specials)}",
            vocabulary=self.vocabulary,
            size=megabytes(self.size),
            licence=self.licence,
        )


def megabytes(size: int) -> str:
    """Bytes in words."""
    return f"{size / 1e6:,.1f} MB"


def _lines(title: str, **rows: str) -> str:
    width = max(map(len, rows)) + 2
    return "\n".join([title, *(f"  {label:<{width}}{text}" for label, text in rows.items())])


@dataclass(frozen=True)
class Registry:
    """All cards by name, and the address that their files' paths begin with."""

    base_url: str
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
        cards = {**self.models, **self.vocabularies}
        others = {other.casefold(): card for card in self.models.values() for other in card.also_known_as}
        return others | {name.casefold(): card for name, card in cards.items()}


@lru_cache(maxsize=1)
def published() -> Registry:
    """Read what this version of gfx knows; the embedded model is listed with them."""
    return read_registry(REGISTRY_FILE)


def read_registry(path: Path) -> Registry:
    """Read a registry file."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    vocabularies = {
        name: VocabularyCard(
            name=name,
            description=entry["description"],
            licence=entry["licence"],
            n_tokens=entry["n_tokens"],
            specials=tuple(entry["specials"]),
            files=_files(entry),
        )
        for name, entry in content["vocabularies"].items()
    }
    models = {}
    if (EMBEDDED_FOLDER / "config.json").is_file():
        models[EMBEDDED_FOLDER.name] = _embedded_card(content["embedded"])
    for name, entry in content["models"].items():
        vocabulary = vocabularies[entry["vocabulary"]]
        files = _files(entry) + vocabulary.files
        models[name] = ModelCard(
            name=name,
            description=entry["description"],
            licence=entry["licence"],
            parameters=entry["parameters"],
            n_blocks=entry["n_blocks"],
            hidden_size=entry["hidden_size"],
            input_size=entry["input_size"],
            vocabulary=vocabulary.name,
            specials=vocabulary.specials,
            files=files,
            size=sum(file.size for file in files),
            also_known_as=tuple(entry["also_known_as"]),
        )
    return Registry(base_url=content["base_url"], models=models, vocabularies=vocabularies)


def _files(entry: Mapping[str, Any]) -> tuple[FileEntry, ...]:
    return tuple(FileEntry(revision=entry["revision"], **file) for file in entry["files"])


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
        n_blocks=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        input_size=config["max_position_embeddings"],
        vocabulary=EMBEDDED_FOLDER.name,
        specials=tuple(entry["specials"]),
        files=(),
        size=sum(file.stat().st_size for file in EMBEDDED_FOLDER.iterdir() if file.is_file()),
        embedded=True,
    )
