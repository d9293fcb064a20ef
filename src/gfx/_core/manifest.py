"""Manifests: what stored results depend on, written beside them and compared before a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

#: Results hardly depend on these: a run goes on where only they differ.
VERSIONS = {"gfx_version": "gfx", "torch_version": "torch"}


def plain_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest as JSON reads it back: lists for tuples, text for paths and for whatever else JSON lacks."""
    return json.loads(json.dumps(manifest, default=str))


def compare_manifests(stored: Mapping[str, Any], requested: Mapping[str, Any], *, holder: str, advice: str) -> str:
    """Check that a run may go on with what was stored when it began.

    Returns the text of a warning that names the versions of gfx and torch, if only these differ, else an empty text.
    Any other difference is a `ValueError` that lists all of them, such as "/data/run holds a screen" (`holder`) with
    another model; `advice` ends it.
    """
    requested = plain_manifest(requested)
    changed = sorted(key for key in {*stored, *requested} - {*VERSIONS} if stored.get(key) != requested.get(key))
    if changed:
        lines = "\n".join(f"- {key}: {stored.get(key)!r}, now {requested.get(key)!r}" for key in changed)
        msg = f"{holder} with another {', '.join(changed)}, which cannot go on with these:\n{lines}\n{advice}"
        raise ValueError(msg)
    versions = [
        f"{library} {stored[key]} (now {requested[key]})"
        for key, library in VERSIONS.items()
        if key in stored and key in requested and stored[key] != requested[key]
    ]
    if not versions:
        return ""
    return f"{holder} that began with {' and '.join(versions)}; it goes on, but results may differ in the last digits."


def fingerprint(*arrays: np.ndarray | Iterable[np.ndarray]) -> str:
    """Summarize arrays, whole or in pieces, for a manifest: sha256 of shapes and values."""
    sha = hashlib.sha256()
    for array in chain.from_iterable([given] if isinstance(given, np.ndarray) else given for given in arrays):
        sha.update(f"{array.shape}{array.dtype}".encode())
        sha.update(
            "\0".join(map(str, array)).encode() if array.dtype == object else np.ascontiguousarray(array).tobytes()
        )
    return sha.hexdigest()


def file_sha256(path: Path) -> str:
    """Hash a file; asked again in the same process, only if the file has changed since."""
    path = path.resolve()
    state = path.stat()
    return _hash(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
