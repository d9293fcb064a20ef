"""The cache of fetched checkpoints: pooch downloads, and nothing is used whose hash was not checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from gfx._log import info, shows_progress
from gfx._settings import settings
from gfx.models._registry import EMBEDDED_FOLDER, ModelCard, megabytes, published

if TYPE_CHECKING:
    from gfx.models._registry import FileEntry, Registry, VocabularyCard

_CHUNK = 1 << 20


def file_sha256(path: Path) -> str:
    """Hash a file; asked again in the same process, only if the file has changed since."""
    path = path.resolve()
    state = path.stat()
    return _hash(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def default_store() -> Store:
    """Use the cache and the connection that the settings allow."""
    folder = settings.cache_dir
    if folder is None:
        import pooch

        folder = pooch.os_cache("gfx")
    return Store(registry=published(), folder=folder, offline=settings.offline)


@dataclass(frozen=True)
class Store:
    """One folder per model or vocabulary, each complete in itself.

    Parameters
    ----------
    registry
        What can be fetched, and from where.
    folder
        Where fetched files are kept.
    offline
        Open no connection.
    attempts
        How often a file is asked for before giving up, with growing pauses.
    """

    registry: Registry
    folder: Path
    offline: bool = False
    attempts: int = 3

    def folder_of(self, card: ModelCard | VocabularyCard) -> Path:
        """Where the files of a card belong."""
        return EMBEDDED_FOLDER if isinstance(card, ModelCard) and card.embedded else self.folder / card.name

    def holds(self, card: ModelCard | VocabularyCard) -> bool:
        """Whether all files are there in their full size; hashes are checked when they are used."""
        return not any(_size(self.folder_of(card) / file.name) != file.size for file in card.files)

    def fetch(self, name: str) -> Path:
        """Make sure that the files of a model or vocabulary are there and whole; return their folder."""
        card = self.registry.get(name)
        folder = self.folder_of(card)
        wanting = [file for file in card.files if not _is_whole(folder / file.name, file)]
        if wanting and self.offline:
            problem = f"{card.name} is not complete in the cache, and gfx is offline."
            raise self._trouble(problem, wanting, folder)
        if wanting:
            info(f"Fetching {card.name} ({megabytes(sum(file.size for file in wanting))}) into {folder}.")
        for file in wanting:
            self._download(file, folder)
        return folder

    def _download(self, file: FileEntry, folder: Path) -> None:
        import pooch
        from requests import RequestException

        over_http = pooch.HTTPDownloader(progressbar=shows_progress(), chunk_size=_CHUNK)

        def readable_by_all(url: str, part: str, files: pooch.Pooch) -> None:
            over_http(url, part, files)
            Path(part).chmod(0o644)  # a temporary file is the user's alone; a cache may be shared

        files = pooch.create(
            path=folder,
            base_url=self.registry.base_url,
            registry={file.name: f"sha256:{file.sha256}"},
            urls={file.name: file.url(self.registry.base_url)},
            retry_if_failed=self.attempts - 1,
        )
        # pooch writes beside the target and moves only what has the right hash: several processes may fetch at once.
        try:
            files.fetch(file.name, downloader=readable_by_all)
        except RequestException as error:
            problem = f"Could not fetch {file.name}: {error}."
            raise self._trouble(problem, [file], folder) from error
        except ValueError as error:
            problem = f"What was sent as {file.name} is not the published file: its sha256 differs. It was not kept."
            raise self._trouble(problem, [file], folder) from error
        except OSError as error:
            problem = f"Could not write to the cache: {error}. `gfx.settings.cache_dir` or GFX_CACHE_DIR names another."
            raise self._trouble(problem, [file], folder) from error

    def _trouble(self, problem: str, wanting: list[FileEntry], folder: Path) -> RuntimeError:
        lines = [problem, "To put the missing files there by hand:"]
        for file in wanting:
            path = folder / file.name
            found = "" if _size(path) is None else f" (the file there now, {_size(path):,} bytes, is another one)"
            lines += [
                f"- {file.url(self.registry.base_url)}",
                f"  to {path}{found}",
                f"  {file.size:,} bytes, sha256 {file.sha256}",
            ]
        return RuntimeError("\n".join(lines))

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
            found = [size for file in card.files if (size := _size(self.folder / card.name / file.name)) is not None]
            if found:
                rows[card.name] = (self.holds(card), round(sum(found) / 1e6, 1), str(self.folder_of(card)))
        index = pd.Index(list(rows), name="name", dtype=object)
        return pd.DataFrame(list(rows.values()), columns=["complete", "megabytes", "folder"], index=index)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _is_whole(path: Path, file: FileEntry) -> bool:
    return _size(path) == file.size and file_sha256(path) == file.sha256
