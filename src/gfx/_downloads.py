"""Files that are downloaded once, compared with their published SHA-256, and kept in a folder."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile, rmtree
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit
from uuid import uuid4

from gfx._core.manifest import file_sha256
from gfx._core.scratch import can_write, scratch_folder
from gfx._locks import InUseError, held
from gfx._log import info, shows_progress
from gfx._settings import settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Begins the names of folders that files are downloaded into.
_PART = "tmp-"


@dataclass(frozen=True)
class RemoteFile:
    """A published file: the name that it is kept under, its address, SHA-256 and, where it is known, size in bytes.

    `copies` are paths on this machine where it may lie as well.
    """

    name: str
    url: str
    sha256: str
    size: int | None = None
    copies: tuple[Path, ...] = ()

    def is_at(self, path: Path) -> bool:
        """Whether this very file lies there."""
        size = size_of(path)
        return size is not None and self.size in (None, size) and file_sha256(path) == self.sha256

    def copy(self) -> Path | None:
        """Find this very file elsewhere on this machine."""
        for path in self.copies:
            with suppress(PermissionError):
                if self.is_at(path):
                    return path.resolve()
        return None


def cache_folder() -> Path:
    """Find the folder that downloads are kept in: that of the settings, or of the system."""
    if settings.cache_dir is not None:
        return settings.cache_dir
    import pooch

    folder = Path(pooch.os_cache("gfx"))
    return folder if folder.is_dir() or can_write(folder) else scratch_folder() / "downloads"


def fetch(title: str, files: Sequence[RemoteFile], folder: Path, *, offline: bool, attempts: int = 3) -> None:
    """Make sure that files are in a folder and whole: linked to copies on this machine, or else downloaded.

    Each download is tried `attempts` times. `RuntimeError` tells the address, size and hash of what is missing then.
    """
    _clean(folder)
    missing = [file for file in files if not file.is_at(folder / file.name)]
    copies = {file: copy for file in missing if (copy := file.copy()) is not None}
    missing = [file for file in missing if file not in copies]
    if missing and offline:
        _fail(f"{title} is not complete in the cache, and gfx is offline.", missing, folder)
    if not (copies or missing):
        return
    own = folder / f"{_PART}{uuid4().hex}"  # of this process: several may download at once
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with held(_lock_of(own)):
            try:
                if copies:
                    _link(title, copies, own, folder)
                if missing:
                    _download(title, missing, own, folder, attempts=attempts)
            finally:
                rmtree(own, ignore_errors=True)
    except OSError as error:
        problem = f"Could not write to the cache: {error}. `gfx.settings.cache_dir` or GFX_CACHE_DIR names another."
        _fail(problem, [*copies, *missing], folder)


def _link(title: str, copies: Mapping[RemoteFile, Path], own: Path, folder: Path) -> None:
    origin = os.path.commonpath([copy.parent for copy in copies.values()])
    info(f"Linking {_in_words(title, [*copies])} into {folder}, from {origin}.")
    own.mkdir()
    for file, copy in copies.items():
        link = own / file.name
        try:
            link.symlink_to(copy)
        except OSError:  # Windows, where links are a privilege, and drives without links
            copyfile(copy, link)
        link.replace(folder / file.name)


def _download(title: str, missing: Sequence[RemoteFile], own: Path, folder: Path, *, attempts: int) -> None:
    import pooch
    from requests import RequestException

    info(f"Downloading {_in_words(title, missing)} into {folder}, from {urlsplit(missing[0].url).netloc}.")
    cache = pooch.create(
        path=own,
        base_url="",
        registry={file.name: f"sha256:{file.sha256}" for file in missing},
        urls={file.name: file.url for file in missing},
        retry_if_failed=attempts - 1,
    )
    over_http = pooch.HTTPDownloader(progressbar=shows_progress(), chunk_size=1 << 20)
    for number, file in enumerate(missing):
        try:
            downloaded = Path(cache.fetch(file.name, downloader=over_http))
            downloaded.chmod(0o644)  # pooch's temporary files are the user's alone; a cache may be shared
            downloaded.replace(folder / file.name)
            continue
        except RequestException as error:
            cause = error  # the error below all that were raised because of it, such as that of a socket
            while cause.__context__ is not None:
                cause = cause.__context__
            problem = f"Could not fetch {file.name}: {cause}."
        except ValueError:
            problem = f"What was sent as {file.name} is not the published file: its sha256 differs. It was not kept."
        _fail(problem, missing[number:], folder)


def _in_words(title: str, files: Sequence[RemoteFile]) -> str:
    sizes = [file.size for file in files]
    size = "" if None in sizes else f" ({megabytes(sum(sizes))})"
    return f"{files[0].name if len(files) == 1 else f'{len(files)} files'} of {title}{size}"


def _fail(problem: str, missing: Sequence[RemoteFile], folder: Path) -> NoReturn:
    lines = [problem, "To put the missing files there by hand:"]
    for file in missing:
        path = folder / file.name
        size = size_of(path)
        present = "" if size is None else f" (the file there now, {size:,} bytes, is another one)"
        bytes_ = "" if file.size is None else f"{file.size:,} bytes, "
        lines += [f"- {file.url}", f"  to {path}{present}", f"  {bytes_}sha256 {file.sha256}"]
    raise RuntimeError("\n".join(lines)) from None


def _lock_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.lock")


def _clean(folder: Path) -> None:
    """Delete what processes left that were killed in a download; those that still run have theirs locked."""
    for part in {path.with_name(path.name.removesuffix(".lock")) for path in folder.glob(f"{_PART}*")}:
        try:
            with held(_lock_of(part)) as is_locked:
                if is_locked:
                    rmtree(part, ignore_errors=True)
        except InUseError:
            pass


def size_of(path: Path) -> int | None:
    """Size of a file in bytes, or None where there is none."""
    return path.stat().st_size if path.is_file() else None


def megabytes(size: int) -> str:
    """Bytes in words."""
    return f"{size / 1e6:,.1f} MB"
