"""Hugging Face: the address that files are downloaded from, and the cache that its own tools keep."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HUGGING_FACE = "https://huggingface.co"


def endpoint() -> str:
    """Find the address of Hugging Face, or of the mirror that `HF_ENDPOINT` names."""
    return (os.environ.get("HF_ENDPOINT") or HUGGING_FACE).rstrip("/")


def hub_cache() -> Path:
    """Find the cache where `huggingface_hub` does: in `HF_HUB_CACHE`, `HF_HOME` or the user's cache folder."""
    of_user = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{of_user}/huggingface")
    folder = os.environ.get("HF_HUB_CACHE", os.environ.get("HUGGINGFACE_HUB_CACHE", f"{home}/hub"))
    return Path(os.path.expandvars(os.path.expanduser(folder)))  # noqa: PTH111 - it never raises


def copies_in(cache: Path, repository: str, path: str, sha256: str) -> Iterator[Path]:
    """List where a file of a repository may lie in the cache: large files by hash, others below each revision."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    yield folder / "blobs" / sha256
    yield from sorted(folder.glob(f"snapshots/*/{path}"))
