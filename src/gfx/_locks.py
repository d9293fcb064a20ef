"""One process at a time: locks that end with their process, and say whose they are."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import contextmanager, suppress
from datetime import datetime
from threading import get_ident
from typing import TYPE_CHECKING

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import FileIO
    from pathlib import Path

#: Where nothing can be written, or a network drive has no locks, nothing is locked.
_NO_LOCKS = {getattr(errno, name) for name in ("EACCES", "EPERM", "EROFS", "ENOSPC", "ENOLCK", "ENOTSUP", "ENOSYS")}

#: Files that threads of this process have locked, by thread: it may lock them again.
_own: dict[Path, int] = {}


class InUseError(Exception):
    """A file that another process has locked; the text says which process."""


@contextmanager
def held(file: Path) -> Iterator[bool]:
    """Lock a file, with the name of this process in it, or raise :class:`InUseError`; it is deleted afterwards.

    Yields whether it is locked by this call: where nothing can be, or this thread has done so before, it is not.
    """
    file, thread = file.absolute(), get_ident()
    stream = None if _own.get(file) == thread or fcntl is None else _lock(file)
    if stream is None:
        yield False
        return
    _own[file] = thread
    try:
        yield True
    finally:
        del _own[file]
        file.unlink(missing_ok=True)
        stream.close()


def _lock(file: Path) -> FileIO | None:
    while True:
        try:
            stream = file.open("a+b", buffering=0)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            raise
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.seek(0)
            owner = stream.read(200).decode(errors="replace") or "another process"
            stream.close()
            if isinstance(error, BlockingIOError):
                raise InUseError(owner) from None
            if error.errno in _NO_LOCKS:
                return None
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                break
        stream.close()  # its former owner has deleted it meanwhile
    with suppress(OSError):  # a full disk: it is locked without a name
        stream.truncate(0)
        stream.write(
            f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%d %B %Y, %H:%M}".encode()
        )
    return stream
