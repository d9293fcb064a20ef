"""Where files go that can be made anew, if there is no home to keep them in; and compiled functions, which need one."""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


@cache
def scratch_folder() -> Path:
    """Make a folder among temporary files that is this user's alone, as compiled code has to be; warns once."""
    folder = Path(tempfile.gettempdir()) / f"gfx-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    state = folder.lstat()
    is_private = stat.S_ISDIR(state.st_mode) and not state.st_mode & 0o077
    if hasattr(os, "getuid") and not (is_private and state.st_uid == os.getuid()):
        folder = Path(tempfile.mkdtemp(prefix="gfx-"))
    warnings.warn(
        f"There is no folder of the user's to write to: compiled code and fetched models are kept in {folder}, which "
        "may be emptied. Set HOME, or NUMBA_CACHE_DIR and GFX_CACHE_DIR, to keep them.",
        UserWarning,
        stacklevel=2,
    )
    return folder


def can_write(folder: Path) -> bool:
    """Whether a folder can be written to, or made where it should be."""
    if str(folder).startswith("~"):  # there is no home
        return False
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return there.is_dir() and os.access(there, os.W_OK)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function as `numba.njit` does, once for all processes: what it is compiled to is kept on disk."""
    import numba

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        beside = Path(function.__code__.co_filename).parent / "__pycache__"
        of_user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - it never raises
        # numba fills in its settings when it is imported, which its types do not tell.
        kept: str = numba.config.CACHE_DIR  # type: ignore[attr-defined]
        if not (kept or can_write(beside) or can_write(Path(of_user))):
            numba.config.CACHE_DIR = str(scratch_folder() / "numba")  # type: ignore[attr-defined]
        return numba.njit(cache=True, **options)(function)

    return compile_
