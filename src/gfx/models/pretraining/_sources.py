"""Sources of cells: files and AnnData objects, read block by block and never as a whole."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from gfx._adata import CountMatrix, open_counts, read_genes, to_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pandas as pd
    from anndata import AnnData
    from scipy import sparse


T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One file or AnnData with raw counts in `X`; `name` is that of the file, and `gene_ids` names its genes."""

    name: str
    place: Path | AnnData
    gene_ids: str | None

    @contextmanager
    def open(self) -> Iterator[tuple[CountMatrix, pd.DataFrame]]:
        """Open counts and the whole `var`; whatever fails meanwhile is raised as an error that names the source."""
        with ExitStack() as stack:
            try:
                if isinstance(self.place, Path):
                    yield _open_file(self.place, self.gene_ids, stack)
                else:
                    yield open_counts(self.place, gene_ids=self.gene_ids), self.place.var
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
        digest = hashlib.sha256(repr(self.gene_ids).encode())
        if isinstance(self.place, Path):
            for file in sorted(self.place.rglob("*")) if self.place.is_dir() else [self.place]:
                state = file.stat()
                digest.update(repr((str(file.resolve()), state.st_size, state.st_mtime_ns)).encode())
            return digest.hexdigest()
        with self.open() as (counts, _):
            digest.update("\n".join(map(str, counts.names)).encode())
            for block in raw_blocks(counts):
                for part in (block.data, block.indices, block.indptr):
                    digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


class SourceError(ValueError):
    """A source that cannot be used; the message begins with its name."""


def raw_blocks(counts: CountMatrix) -> Iterator[sparse.csr_array]:
    """Iterate over cells in blocks of rows, each checked to be raw counts."""
    for _, block in counts.blocks():
        yield to_counts(block, "raw", counts.where)


def find_sources(sources: str | Path | AnnData | Sequence[str | Path | AnnData], gene_ids: str | None) -> list[Source]:
    """Turn what a user gives into sources; opens none."""
    if isinstance(sources, str | Path) or hasattr(sources, "obs_names"):
        sources = [sources]
    if not sources:
        msg = "`sources` is empty: give at least one file or AnnData to learn from."
        raise ValueError(msg)
    missing = [str(place) for place in sources if isinstance(place, str | Path) and not Path(place).exists()]
    if missing:
        msg = f"{len(missing)} of {len(sources)} sources do not exist: {', '.join(missing[:5])}."
        raise FileNotFoundError(msg)
    return [
        Source(Path(place).name, Path(place), gene_ids)
        if isinstance(place, str | Path)
        else Source(f"source {number}", place, gene_ids)
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


def _open_file(path: Path, gene_ids: str | None, stack: ExitStack) -> tuple[CountMatrix, pd.DataFrame]:
    import anndata as ad

    if path.is_dir():
        import zarr

        group = zarr.open_group(path, mode="r")
    else:
        import h5py

        group = stack.enter_context(h5py.File(path, "r"))
    missing = [name for name in ("X", "var") if name not in group]
    if missing:
        layers = sorted(group["layers"]) if "layers" in group else []
        msg = f"no `{'` and no `'.join(missing)}` in this file; raw counts are read from `X`. Layers: {layers}."
        raise ValueError(msg)
    x = group["X"]
    if hasattr(x, "keys"):  # sparse matrices are groups, dense ones are arrays
        for name in ("data", "indices"):
            n_present, n_chunks = (getattr(x[name], n, 0) for n in ("nchunks_initialized", "nchunks"))
            if n_present < n_chunks:  # zarr reads a chunk that was not copied as zeros
                msg = (
                    f"{n_chunks - n_present} of {n_chunks} chunks of `X/{name}` are not on disk. Was the folder "
                    "copied or fetched completely?"
                )
                raise ValueError(msg)
        x = ad.io.sparse_dataset(x)
    var = ad.io.read_elem(group["var"])
    return CountMatrix(x=x, genes=read_genes(var, gene_ids), where="adata.X"), var
