"""The published models and vocabularies, as `registry.toml` lists them, and the cache that holds fetched ones."""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path, PurePosixPath
from shutil import rmtree
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import uuid4

import pandas as pd

from gfx._core.scratch import can_write, scratch_folder
from gfx._locks import InUseError, held
from gfx._log import info, shows_progress
from gfx._settings import settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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


def megabytes(size: int) -> str:
    """Bytes in words."""
    return f"{size / 1e6:,.1f} MB"


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
    return Registry(base_url=content["base_url"], models=models, vocabularies=vocabularies)


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


def file_sha256(path: Path) -> str:
    """Hash a file; asked again in the same process, only if the file has changed since."""
    path = path.resolve()
    state = path.stat()
    return _hash(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash(path: Path, _size: int, _changed: int) -> str:
    import pooch

    return pooch.file_hash(path, alg="sha256")


def default_store() -> Store:
    """Use the cache and the connection that the settings allow."""
    folder = settings.cache_dir
    if folder is None:
        import pooch

        folder = Path(pooch.os_cache("gfx"))
        if not (folder.is_dir() or can_write(folder)):
            folder = scratch_folder() / "models"
    return Store(registry=published(), folder=folder, offline=settings.offline)


@dataclass(frozen=True)
class Store:
    """One folder per model or vocabulary, each complete in itself; a file is asked for `attempts` times."""

    registry: Registry
    folder: Path
    offline: bool = False
    attempts: int = 3

    def folder_of(self, card: ModelCard | VocabularyCard) -> Path:
        """Where the files of a card belong."""
        return EMBEDDED_FOLDER if isinstance(card, ModelCard) and card.embedded else self.folder / card.name

    def holds(self, card: ModelCard | VocabularyCard) -> bool:
        """Whether all files are there in their full size; hashes are checked when they are used."""
        return all(_bytes(self.folder_of(card) / file.name) == file.size for file in card.files)

    def fetch(self, name: str) -> Path:
        """Make sure that the files of a model or vocabulary are there and whole; return their folder."""
        card = self.registry.get(name)
        folder = self.folder_of(card)
        if card.files:
            _clean(folder)
        missing = []
        for file in card.files:
            path = folder / file.name
            if _bytes(path) != file.size or file_sha256(path) != file.sha256:
                missing.append(file)
        if missing and self.offline:
            self._fail(f"{card.name} is not complete in the cache, and gfx is offline.", missing, folder)
        if missing:
            info(f"Fetching {card.name} ({megabytes(sum(file.size for file in missing))}) into {folder}.")
            self._download(missing, folder)
        return folder

    def _download(self, missing: Sequence[FileEntry], folder: Path) -> None:
        """Fetch into a folder of this process beside the target; several processes may fetch at once."""
        own = folder / f"{_PART}{uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with held(_lock_of(own)):
                try:
                    self._download_into(own, missing, folder)
                finally:
                    rmtree(own, ignore_errors=True)
        except OSError as error:
            problem = f"Could not write to the cache: {error}. `gfx.settings.cache_dir` or GFX_CACHE_DIR names another."
            self._fail(problem, missing, folder)

    def _download_into(self, own: Path, missing: Sequence[FileEntry], folder: Path) -> None:
        import pooch
        from requests import RequestException

        cache = pooch.create(
            path=own,
            base_url=self.registry.base_url,
            registry={file.name: f"sha256:{file.sha256}" for file in missing},
            urls={file.name: file.url(self.registry.base_url) for file in missing},
            retry_if_failed=self.attempts - 1,
        )
        over_http = pooch.HTTPDownloader(progressbar=shows_progress(), chunk_size=1 << 20)
        for number, file in enumerate(missing):
            try:
                fetched = Path(cache.fetch(file.name, downloader=over_http))
                fetched.chmod(0o644)  # pooch's temporary files are the user's alone; a cache may be shared
                fetched.replace(folder / file.name)
                continue
            except RequestException as error:
                cause = error  # the error below all that were raised because of it, such as that of a socket
                while cause.__context__ is not None:
                    cause = cause.__context__
                problem = f"Could not fetch {file.name}: {cause}."
            except ValueError:
                problem = (
                    f"What was sent as {file.name} is not the published file: its sha256 differs. It was not kept."
                )
            self._fail(problem, missing[number:], folder)

    def _fail(self, problem: str, missing: Sequence[FileEntry], folder: Path) -> NoReturn:
        lines = [problem, "To put the missing files there by hand:"]
        for file in missing:
            path = folder / file.name
            present = "" if _bytes(path) is None else f" (the file there now, {_bytes(path):,} bytes, is another one)"
            lines += [
                f"- {file.url(self.registry.base_url)}",
                f"  to {path}{present}",
                f"  {file.size:,} bytes, sha256 {file.sha256}",
            ]
        raise RuntimeError("\n".join(lines)) from None

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
            sizes = [size for file in card.files if (size := _bytes(self.folder / card.name / file.name)) is not None]
            if sizes:
                rows[card.name] = (self.holds(card), round(sum(sizes) / 1e6, 1), str(self.folder_of(card)))
        index = pd.Index(list(rows), name="name", dtype=object)
        return pd.DataFrame(list(rows.values()), columns=["complete", "megabytes", "folder"], index=index)


#: Begins the names of folders that files are fetched into.
_PART = "tmp-"


def _lock_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.lock")


def _clean(folder: Path) -> None:
    """Delete what processes left that were killed while they fetched; those that still run have theirs locked."""
    for part in {path.with_name(path.name.removesuffix(".lock")) for path in folder.glob(f"{_PART}*")}:
        try:
            with held(_lock_of(part)) as is_locked:
                if is_locked:
                    rmtree(part, ignore_errors=True)
        except InUseError:
            pass


def _bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
