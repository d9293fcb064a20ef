"""Sources of cells: files and AnnData objects, read block by block and never as a whole."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gfx._adata import (
    CountMatrix,
    by_scale,
    check_place,
    name_place,
    open_counts,
    places_of_counts,
    read_counts,
    read_genes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pandas as pd
    from anndata import AnnData
    from scipy import sparse


T = TypeVar("T")

_FORMATS = (
    "A source is an h5ad file, a zarr store or an AnnData: read other formats with scanpy, such as "
    "`scanpy.read_10x_mtx`, and give what it returns."
)


@dataclass(frozen=True)
class Source:
    """One file or AnnData with raw counts; `name` is that of the file, and `gene_ids` names its genes."""

    name: str
    place: Path | AnnData
    gene_ids: str | None
    layer: str | None = None
    use_raw: bool = False

    @contextmanager
    def open(self) -> Iterator[tuple[CountMatrix, pd.DataFrame]]:
        """Open counts and the whole `var`; whatever fails meanwhile is raised as an error that names the source."""
        with ExitStack() as stack:
            try:
                if isinstance(self.place, Path):
                    yield self._open_file(_group(self.place, stack))
                else:
                    counts = open_counts(self.place, layer=self.layer, use_raw=self.use_raw, gene_ids=self.gene_ids)
                    yield counts, (self.place.raw if self.use_raw else self.place).var
            except SourceError:
                raise
            except OSError as error:
                msg = f"{self.name}: cannot be read to its end ({error}). Was it copied or fetched completely?"
                raise SourceError(msg) from error
            except (KeyError, NotImplementedError, TypeError, ValueError) as error:
                text = error.args[0] if error.args else error  # str() of a KeyError puts quotes around its text
                msg = f"{self.name}: {text}"
                raise SourceError(msg) from error

    @cached_property
    def fingerprint(self) -> str:
        """Hash by which a source is recognised: of path, size and time of a file, of the content of an AnnData."""
        elsewhere = (self.layer, self.use_raw) if self.layer or self.use_raw else ""
        digest = hashlib.sha256(f"{self.gene_ids!r}{elsewhere}".encode())
        if isinstance(self.place, Path):
            for file in sorted(self.place.rglob("*")) if self.place.is_dir() else [self.place]:
                state = file.stat()
                digest.update(repr((str(file.resolve()), state.st_size, state.st_mtime_ns)).encode())
            return digest.hexdigest()
        with self.open() as (counts, _):
            digest.update("\n".join(map(str, counts.names)).encode())
            for block in self.raw_blocks(counts):
                for part in (block.data, block.indices, block.indptr):
                    digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def raw_blocks(self, counts: CountMatrix) -> Iterator[sparse.csr_array]:
        """Iterate over cells in blocks of rows, each checked to be raw counts."""
        for _, stored in counts.blocks():
            read = read_counts(stored, "raw", counts.where)
            if read.problem:
                with ExitStack() as stack:
                    is_file = isinstance(self.place, Path)
                    places = _places(_group(self.place, stack)) if is_file else places_of_counts(self.place)
                    places.pop(counts.argument)  # its first cells may hold counts
                    usable = [f"`{place}`" if place else "no argument" for place in by_scale(places)["counts"]]
                remedy = f"with {' or '.join(usable)}" if usable else "nowhere in it, as far as its first cells show"
                msg = f"{read.problem[0]} Raw counts are needed; this source has them {remedy}."
                raise ValueError(msg)
            yield read.counts

    def _open_file(self, group: Any) -> tuple[CountMatrix, pd.DataFrame]:
        import anndata as ad

        argument, where = name_place(self.layer, use_raw=self.use_raw)
        name, places = f"`{argument}`" if argument else "`X`", _places(group)
        holder = group["raw"] if self.use_raw and "raw" in group else group
        if not places:
            msg = f"no counts were found where anndata writes them. {_FORMATS}"
            raise ValueError(msg)
        if argument not in places or "var" not in holder:
            others = [f"`{place}`" if place else "no argument" for place in places]
            missing = "no `var`" if argument in places else f"no {name}"
            msg = f"{missing} in this file. It has counts, or other values, with {' or '.join(others)}."
            raise ValueError(msg)
        var = ad.io.read_elem(holder["var"])
        _check_chunks(places[argument], where.removeprefix("adata."))
        return CountMatrix(places[argument], read_genes(var, self.gene_ids), where, argument), var


class SourceError(ValueError):
    """A source that cannot be used; the message begins with its name."""


def find_sources(
    sources: str | Path | AnnData | Sequence[str | Path | AnnData],
    gene_ids: str | None,
    *,
    layer: str | None = None,
    use_raw: bool = False,
) -> list[Source]:
    """Turn what a user gives into sources; opens none."""
    if isinstance(sources, str | Path) or hasattr(sources, "obs_names"):
        sources = [sources]
    check_place(layer, use_raw=use_raw)
    if not sources:
        msg = "`sources` is empty: give at least one file or AnnData to learn from."
        raise ValueError(msg)
    missing = [str(place) for place in sources if isinstance(place, str | Path) and not Path(place).exists()]
    if missing:
        msg = f"{len(missing)} of {len(sources)} sources do not exist: {', '.join(missing[:5])}."
        raise FileNotFoundError(msg)
    return [
        Source(Path(place).name, Path(place), gene_ids, layer, use_raw)
        if isinstance(place, str | Path)
        else Source(f"source {number}", place, gene_ids, layer, use_raw)
        for number, place in enumerate(sources)
    ]


def each_source(sources: Sequence[Source], work: Callable[[Source], T], kept: str = "") -> Iterator[T]:
    """Do the work on every source that can be used; then raise an error that names all those that cannot.

    `kept` is what the message says of what was done for the others.
    """
    errors = []
    for source in sources:
        try:
            yield work(source)
        except SourceError as error:
            errors.append(f"\n- {error}")
    if errors:
        rest = f" {kept}" if kept and len(errors) < len(sources) else ""
        msg = f"{len(errors)} of {len(sources)} sources cannot be used.{rest}{''.join(errors)}"
        raise ValueError(msg)


def _group(path: Path, stack: ExitStack) -> Any:
    """Open an h5ad file or a zarr store."""
    if path.is_dir():
        if not any((path / name).exists() for name in ("zarr.json", ".zgroup")):
            n = len(list(path.glob("*.h5ad")))
            remedy = f"Name the {n} h5ad file{'s' * (n > 1)} in it, as a list." if n else _FORMATS
            msg = f"this folder is no zarr store. {remedy}"
            raise ValueError(msg)
        import zarr

        return zarr.open_group(path, mode="r")
    import h5py

    if path.suffix != ".h5ad" and not h5py.is_hdf5(path):
        msg = f"this is no h5ad file. {_FORMATS}"
        raise ValueError(msg)
    return stack.enter_context(h5py.File(path, "r"))


def _places(group: Any) -> dict[str, object]:
    """List the matrices of a file that may hold counts, as :func:`gfx._adata.places_of_counts` does."""
    import anndata as ad

    paths = {"": "X"} | {f"layer={key!r}": f"layers/{key}" for key in sorted(group.get("layers", ()))}
    paths |= {"use_raw=True": "raw/X"}
    stored = {argument: group[path] for argument, path in paths.items() if path in group}
    # Sparse matrices are groups, dense ones are arrays.
    return {
        argument: ad.io.sparse_dataset(x) if hasattr(x, "keys") else x
        for argument, x in stored.items()
        if not hasattr(x, "keys") or "indptr" in x
    }


def _check_chunks(x: Any, where: str) -> None:
    """Refuse a sparse matrix in a zarr store that was not copied to its end: missing chunks are read as zeros."""
    for name in ("data", "indices") if hasattr(x, "group") else ():
        n_present, n_chunks = (getattr(x.group[name], n, 0) for n in ("nchunks_initialized", "nchunks"))
        if n_present < n_chunks:
            msg = (
                f"{n_chunks - n_present} of {n_chunks} chunks of `{where}/{name}` are not on disk. Was the folder "
                "copied or fetched completely?"
            )
            raise ValueError(msg)
