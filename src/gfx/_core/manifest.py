"""Manifests: what stored results depend on, written beside them as a whole, and compared before a run goes on."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from scipy.sparse import csr_array

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


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file that is there as a whole or not at all, also where several processes write it."""
    part = file.with_name(f".{file.name}-{uuid4().hex[:8]}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


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


def fingerprint_of_rows(blocks: Iterable[tuple[slice, csr_array]]) -> str:
    """Summarize a matrix that is read in blocks of rows: one sha256, in whatever form and blocks it is stored."""
    parts = [hashlib.sha256() for _ in range(3)]
    for _, block in blocks:
        rows = block.copy()  # blocks may share their values with the matrix of the user
        rows.sum_duplicates()
        rows.eliminate_zeros()
        kinds = (np.diff(rows.indptr), np.int64), (rows.indices, np.int64), (rows.data, np.float64)
        for part, (values, dtype) in zip(parts, kinds, strict=True):
            part.update(values.astype(dtype).tobytes())
    return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()
