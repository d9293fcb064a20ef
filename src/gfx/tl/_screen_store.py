"""A screen on disk: finished blocks of cells in a zarr store, from which a stopped run goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from gfx._core.screening import Screened
from gfx._keys import screen_keys

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Version of the layout; a store of another one is not read.
FORMAT = 1

#: Attribute of the store that says what it holds.
MANIFEST = screen_keys().uns

#: Cells whose tokens are written together: whole blocks.
_TOKENS_AT_ONCE = 1024


class ScreenStoreError(ValueError):
    """A store that holds something else than what was asked for."""


@dataclass(frozen=True)
class ScreenStore:
    """Effects of every gene in every cell, block by block of cells.

    `shift` and `toward` of each network lie in the places of the tokens they belong to, float32 `(n_cells, longest)`,
    NaN where nothing was measured; beside them `tokens`, `obs_names`, `gene_ids` of the tokens, and `goals`. A block of
    cells is one chunk, written as a whole and with a checksum: a chunk that is missing, torn or incomplete is a block
    that is still to do.
    """

    path: Path
    group: zarr.Group
    cells_per_block: int

    @classmethod
    def open(
        cls,
        path: str | Path,
        manifest: Mapping[str, Any],
        *,
        names: Sequence[str],
        ids: np.ndarray,
        number: np.ndarray,
        obs_names: np.ndarray,
        gene_ids: np.ndarray,
        goals: Mapping[str, np.ndarray],
        cells_per_block: int,
    ) -> ScreenStore:
        """Open a store that was begun with the same manifest, or begin one.

        Parameters
        ----------
        manifest
            All that results depend on.
        names
            What the networks are called.
        ids, number
            Tokens of all cells, `(n_obs, longest)`, and which of these are screened.
        goals
            Vectors of states in each network; those of a store that is there hold.

        Raises
        ------
        ScreenStoreError
            The path holds something else, or a screen of other cells, models or settings.
        """
        path = Path(path)
        manifest = json.loads(json.dumps({"format": FORMAT, **manifest}))
        if not path.exists():
            part = path.with_name(f"{path.name}.part")
            shutil.rmtree(part, ignore_errors=True)  # what a run left that was stopped while it began
            try:
                group = zarr.create_group(part)
                shape = len(number), ids.shape[1]
                like = {"chunks": (cells_per_block, ids.shape[1]), "compressors": [ZstdCodec(level=1), Crc32cCodec()]}
                stored = group.create_array("tokens", shape=shape, dtype=ids.dtype, **like)
                for start in range(0, len(number), _TOKENS_AT_ONCE):
                    stored[start : start + _TOKENS_AT_ONCE] = ids[number[start : start + _TOKENS_AT_ONCE]]
                for name in names:
                    for measure in ["shift", *(["toward"] if goals else [])]:
                        group.create_array(_array(name, measure), shape=shape, dtype="f4", fill_value=np.nan, **like)
                    if goals:
                        values = np.asarray(goals[name], dtype="f8")
                        group.create_array(f"goals/{name}", data=values, fill_value=np.nan, compressors=Crc32cCodec())
                with ad.settings.override(auto_shard_zarr_v3=False):
                    ad.io.write_elem(group, "obs_names", obs_names.astype(object))
                    ad.io.write_elem(group, "gene_ids", gene_ids.astype(object))
                group.attrs[MANIFEST] = manifest
                part.rename(path)
            except OSError as error:
                shutil.rmtree(part, ignore_errors=True)
                msg = f"Could not begin a store at {path}: {error.strerror}. Nothing was left there."
                raise OSError(error.errno, msg) from error
        return cls(path, _open(path, manifest), cells_per_block)

    def goals(self, name: str) -> np.ndarray:
        """Return the vectors of states that a network was begun with.

        Raises
        ------
        ScreenStoreError
            They are torn or gone: what is still to do would not go with what is done.
        """
        try:
            values = self.group[f"goals/{name}"][:]
        except (ValueError, RuntimeError, KeyError):  # how codecs say that a chunk is torn, and zarr, that it is gone
            values = np.array([np.nan])
        if np.isnan(values).any():
            msg = f"{self.path} is damaged: what cells should move towards cannot be read. Delete it, and begin anew."
            raise ScreenStoreError(msg)
        return values

    def read(self, name: str, number: int, wanted: np.ndarray, measures: Sequence[str]) -> Screened | None:
        """Read what a network made of a block of cells; `None` if that is still to do.

        Parameters
        ----------
        wanted
            Which places were to be measured, bool `(n_cells, longest)`.
        measures
            ``"shift"``, ``"toward"``: what has to be there.
        """
        rows = slice(number * self.cells_per_block, number * self.cells_per_block + len(wanted))
        found = Screened.nothing(*wanted.shape, int(_array(name, "toward") in self.group))
        for measure in measures:
            try:
                values = self.group[_array(name, measure)][rows][:, : wanted.shape[1]]
            except (ValueError, RuntimeError):  # how codecs say that a chunk is torn
                return None
            if np.isnan(values[wanted]).any():
                return None
            found.of(measure)[:] = values
        return found

    def write(self, name: str, number: int, found: Screened, measures: Sequence[str]) -> None:
        """Write what a network made of a block of cells.

        Raises
        ------
        OSError
            The disk is full, or gone; what was written before is kept.
        """
        rows = slice(number * self.cells_per_block, number * self.cells_per_block + len(found.shift))
        try:
            for measure in measures:
                stored = self.group[_array(name, measure)]
                values = found.of(measure)
                # The whole chunk, so that zarr need not read what may be torn.
                whole = np.full((len(values), stored.shape[1]), np.nan, dtype=np.float32)
                whole[:, : values.shape[1]] = values
                stored[rows] = whole
        except OSError as error:
            msg = (
                f"Could not write to {self.path}: {error.strerror}. The {number} blocks of cells before are kept; call "
                "again with the same `store` to go on from there."
            )
            raise OSError(error.errno, msg) from error


def _array(name: str, measure: str) -> str:
    return f"{name}/{measure}"


def _open(path: Path, manifest: Mapping[str, Any]) -> zarr.Group:
    try:
        group = zarr.open_group(path, mode="r+")
    except (FileNotFoundError, ValueError, OSError) as error:
        msg = f"{path} is no store of a screen. Give `store` a path where nothing is."
        raise ScreenStoreError(msg) from error
    there = group.attrs.get(MANIFEST)
    if not isinstance(there, dict):
        msg = f"{path} is a zarr store, but not one of a screen. Give `store` a path where nothing is."
        raise ScreenStoreError(msg)
    changed = sorted(key for key in {*there, *manifest} if there.get(key) != manifest.get(key))
    if changed:
        lines = "\n".join(f"- {key}: {there.get(key)!r}, now {manifest.get(key)!r}" for key in changed)
        msg = (
            f"{path} holds a screen with another {', '.join(changed)}; to mix the two would give neither:\n{lines}\n"
            "Give another `store`, or call as before."
        )
        raise ScreenStoreError(msg)
    return group
