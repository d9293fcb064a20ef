"""Finished blocks of cells on disk, from which a stopped run goes on."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from gfx import _log
from gfx._core.checkpoint import read_json
from gfx._core.manifest import compare_manifests, plain_manifest
from gfx._locks import InUseError, held

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: Version of the layout; a store of another one is not read.
FORMAT = 4

#: Attributes of the store and of a block: what was asked for, and checksums of the block's arrays.
MANIFEST, CHECKSUMS = "gfx", "crc32"

#: How zarr and its codecs say that an array is torn or gone.
_DAMAGED = (ValueError, RuntimeError, LookupError, OSError, TypeError, AttributeError, ArithmeticError, MemoryError)

#: Bytes of an array that are always read; a larger one has a hundredth of its bytes on disk at least.
_ALWAYS_READ, _LARGEST_RATIO = 1 << 30, 100


class RunStoreError(ValueError):
    """A store that holds something else than what was asked for."""


@dataclass(frozen=True)
class RunStore:
    """What tasks made of blocks of cells: a zarr group ``<job>/<number of the block>`` with its arrays.

    A block is written beside its place and then moved there, so that it is there as a whole or not at all; one that
    does not match its checksums is run again.
    """

    path: Path

    @classmethod
    def open(cls, path: str | Path, manifest: Mapping[str, Any]) -> RunStore:
        """Open a store that was begun with the same manifest, which is all that results depend on, or begin one.

        A store of other cells, models or settings is refused; other versions of gfx or torch are a warning.
        """
        path, manifest = Path(path), plain_manifest({"format": FORMAT, **manifest})
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with cls(path).held():
                    _begin(path, manifest)
            except OSError as error:
                msg = f"Could not begin a store at {path}: {error.strerror}. Nothing was left there."
                raise OSError(error.errno, msg) from None
        stored = cls.existing(path, advice="Give `store` a path where nothing is.")[1]
        try:
            differing_versions = compare_manifests(
                stored, manifest, holder=f"{path} holds a run", advice="Give another `store`, or call as before."
            )
        except ValueError as problem:
            raise RunStoreError(*problem.args) from None
        if differing_versions:
            _log.warn(differing_versions)
        return cls(path)

    @classmethod
    def existing(cls, path: str | Path, *, advice: str) -> tuple[RunStore, dict[str, Any]]:
        """Open a store that exists and read its manifest; `advice` ends the message if there is none."""
        path = Path(path)
        try:
            stored = _attributes(path).get(MANIFEST)
        except _DAMAGED:
            stored = None
        if not isinstance(stored, dict):
            msg = f"{path} is no store of gfx. {advice}"
            raise RunStoreError(msg)
        return cls(path), stored

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the store to this process; one that another process has is refused."""
        try:
            with held(self.path.with_name(f"{self.path.name}.lock")):
                yield
        except InUseError as owner:
            msg = f"{self.path} is in use by {owner}. Wait until that has ended, or give another `store`."
            raise RunStoreError(msg) from None

    def finished(self, job: str) -> set[int]:
        """List the blocks of a job that are there."""
        folder = self.path / job
        return {int(block.name) for block in folder.iterdir() if block.name.isdecimal()} if folder.exists() else set()

    def read(self, job: str, number: int) -> dict[str, np.ndarray] | None:
        """Read the arrays of a block; `None` if they are damaged."""
        try:
            folder = self.path / job / str(number)
            checksums = _attributes(folder)[CHECKSUMS]
            result = {name: _read_array(folder / name) for name in checksums}
            intact = all(checksums[name] == _checksum(values) for name, values in result.items())
        except _DAMAGED:
            return None
        return result if intact else None

    def write(self, job: str, number: int, result: Mapping[str, np.ndarray]) -> None:
        """Write the arrays of a block."""
        place = self.path / job / str(number)
        part = place.with_name(f"{number}.part")
        try:
            for former in (part, place):
                if former.exists():
                    shutil.rmtree(former)
            checksums = {name: _checksum(values) for name, values in result.items()}
            group = zarr.create_group(part, attributes={CHECKSUMS: checksums}, zarr_format=3)
            for name, values in result.items():
                chunks = tuple(max(1, n) for n in values.shape)
                group.create_array(name, data=values, chunks=chunks, compressors=[ZstdCodec(level=1)])
            part.rename(place)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            msg = (
                f"Could not write to {self.path}: {error.strerror}. The blocks of cells that were finished before are "
                "kept; call again with the same `store` to go on from there."
            )
            raise OSError(error.errno, msg) from None


def _begin(path: Path, manifest: dict[str, Any]) -> None:
    """Begin a store beside its place, and move it there, unless another process has begun one meanwhile."""
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was stopped while it began
    try:
        if not path.exists():
            zarr.create_group(part, attributes={MANIFEST: manifest}, zarr_format=3)
            part.rename(path)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _attributes(folder: Path) -> dict[str, Any]:
    """Read the attributes of a group."""
    description = read_json(folder / "zarr.json")
    if description["node_type"] != "group":
        msg = f"{folder} is no group"
        raise ValueError(msg)
    return description["attributes"]


def _read_array(folder: Path) -> np.ndarray:
    """Read an array that was written here; what its description claims is checked before zarr believes it."""
    description = read_json(folder / "zarr.json")
    shape, codecs = description["shape"], [codec["name"] for codec in description["codecs"]]
    size = prod(shape) * np.dtype(description["data_type"]).itemsize
    chunks = [file for file in (folder / "c", *folder.glob("c/**/*")) if file.is_file()]  # one, or none for zeros
    on_disk = sum(chunk.stat().st_size for chunk in chunks)
    is_ours = description["zarr_format"] == 3 and codecs == ["bytes", "zstd"]
    is_small = size <= max(_ALWAYS_READ, _LARGEST_RATIO * on_disk)
    if not (is_ours and is_small and all(_unpacked_size(chunk) == size for chunk in chunks)):
        msg = f"{folder} claims {shape}"
        raise ValueError(msg)
    return np.asarray(zarr.open_array(folder, mode="r", zarr_format=3)[...])


def _unpacked_size(chunk: Path) -> int:
    """Read from the header of a zstd frame how many bytes it unpacks to, which are reserved whatever comes then."""
    with chunk.open("rb") as file:
        head = file.read(18)
    magic, flags = head[:4], head[4]
    is_single = flags >> 5 & 1
    width = (is_single, 2, 4, 8)[flags >> 6]
    start = 5 + (not is_single) + (0, 1, 2, 4)[flags & 3]
    size = int.from_bytes(head[start : start + width], "little") + (256 if width == 2 else 0)
    return size if magic == b"\x28\xb5\x2f\xfd" and width else -1


def _checksum(values: np.ndarray) -> int:
    return crc32(f"{values.shape}{values.dtype}".encode() + np.ascontiguousarray(values).tobytes())
