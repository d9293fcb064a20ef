"""Files that are downloaded once, compared with their published SHA-256, and kept in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit
from uuid import uuid4

from gfx._core.manifest import file_sha256
from gfx._core.scratch import can_write, scratch_folder
from gfx._locks import InUseError, held
from gfx._log import info, shows_progress
from gfx._settings import settings

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Begins the names of folders that files are downloaded into.
_PART = "tmp-"


@dataclass(frozen=True)
class RemoteFile:
    """A published file: the name that it is kept under, its address, SHA-256 and, where it is known, size in bytes."""

    name: str
    url: str
    sha256: str
    size: int | None = None

    def is_at(self, path: Path) -> bool:
        """Whether this very file lies there."""
        size = size_of(path)
        return size is not None and self.size in (None, size) and file_sha256(path) == self.sha256


def cache_folder() -> Path:
    """Find the folder that downloads are kept in: that of the settings, or of the system."""
    if settings.cache_dir is not None:
        return settings.cache_dir
    import pooch

    folder = Path(pooch.os_cache("gfx"))
    return folder if folder.is_dir() or can_write(folder) else scratch_folder() / "downloads"


def fetch(title: str, files: Sequence[RemoteFile], folder: Path, *, offline: bool, attempts: int = 3) -> None:
    """Make sure that files are in a folder and whole; each is asked for `attempts` times.

    Raises `RuntimeError` with the address, size and hash of whatever is missing then.
    """
    _clean(folder)
    missing = [file for file in files if not file.is_at(folder / file.name)]
    if not missing:
        return
    if offline:
        _fail(f"{title} is not complete in the cache, and gfx is offline.", missing, folder)
    sizes = [file.size for file in missing]
    size = "" if None in sizes else f" ({megabytes(sum(sizes))})"
    info(f"Downloading {title}{size} from {urlsplit(missing[0].url).netloc} into {folder}.")
    own = folder / f"{_PART}{uuid4().hex}"  # of this process: several may download at once
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with held(_lock_of(own)):
            try:
                _download(missing, own, folder, attempts)
            finally:
                rmtree(own, ignore_errors=True)
    except OSError as error:
        problem = f"Could not write to the cache: {error}. `gfx.settings.cache_dir` or GFX_CACHE_DIR names another."
        _fail(problem, missing, folder)


def _download(missing: Sequence[RemoteFile], own: Path, folder: Path, attempts: int) -> None:
    import pooch
    from requests import RequestException

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
