"""Cells as tokens on disk: one Arrow file for each source, written once, and read in place ever after."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
import pyarrow as pa

from gfx import _log
from gfx._adata import match_genes
from gfx._core.ranking import rank_encode
from gfx.models.pretraining._sources import each_source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gfx._core.vocabulary import Vocabulary
    from gfx.models.pretraining._sources import Source

#: Counted up whenever the same cells would be written as other tokens; shards made before are then made anew.
ENCODING = 1

#: A cell of one gene has no context to learn from.
FEWEST_GENES = 2


def encode_sources(sources: Sequence[Source], vocabulary: Vocabulary, max_length: int, folder: Path) -> TokenShards:
    """Write the cells of each source as tokens, unless that was done before.

    Cells with fewer than two genes of the vocabulary are left out. A shard appears under its name when it is whole,
    so that a call that was stopped, or that met a source it cannot use, leaves the others for the next one. Several
    processes may do the same at the same time.

    Cost: one pass over the sources that are new; a block of cells in memory; on disk 2 bytes a token, or 4 for a
    vocabulary of more than 65,536 tokens.

    Parameters
    ----------
    max_length
        Longest encoding, special tokens included; lower-ranked genes are cut off.
    folder
        Where the shards are kept; made if need be.

    Returns
    -------
    The cells of all sources, in the order given.

    Raises
    ------
    ValueError
        Sources that cannot be used, all of them by name; no cell to learn from; `max_length` below two genes.
    """
    if max_length < vocabulary.n_specials + FEWEST_GENES:
        msg = (
            f"`max_length={max_length}` leaves no room for {FEWEST_GENES} genes beside {vocabulary.n_specials} special "
            "tokens; a cell of one gene has no context to learn from."
        )
        raise ValueError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    how = _encoding_sha256(vocabulary, max_length)

    def encode(source: Source) -> Path:
        path = folder / _shard_name(source, how)
        if not _is_whole(path):
            _write_shard(path, source, vocabulary, max_length)
        return path

    shards = TokenShards(each_source(sources, encode, f"The cells of the others are kept as tokens in {folder}."))
    if not len(shards):
        msg = f"No cell has more than one gene of the vocabulary {vocabulary.name!r}: there is nothing to learn from."
        raise ValueError(msg)
    return shards


class TokenShards:
    """Cells as tokens, read from the disk when they are asked for.

    Reaches worker processes as paths, which they open for themselves. In memory are 4 bytes a cell.

    Parameters
    ----------
    paths
        Files that :func:`encode_sources` wrote; their cells follow one another.

    Raises
    ------
    ValueError
        A file is damaged or no shard; the message names it.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [Path(path).absolute() for path in paths]
        shards = [_open_shard(path) for path in self.paths]
        #: What the sources are called.
        self.names = [shard.name for shard in shards]
        #: Cells of each source that are here, and that were left out, int64 `(n_sources,)`.
        self.n_cells = np.array([shard.n_cells for shard in shards], dtype=np.int64)
        self.n_left_out = np.array([shard.n_left_out for shard in shards], dtype=np.int64)
        #: Fingerprint of all tokens in their order, wherever the files are and whenever they were written.
        self.content_sha256 = hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()
        self._blocks = [block for shard in shards for block in shard.blocks]
        block_lengths = [np.diff(begins) for begins, _ in self._blocks]
        #: Tokens of each cell, special ones included, int32 `(n_cells,)`.
        self.lengths = np.concatenate([np.zeros(0, np.int32), *block_lengths])
        self._first_cells = np.cumsum([0, *map(len, block_lengths)]).tolist()

    def __len__(self) -> int:
        return self._first_cells[-1]

    def __getitem__(self, cell: int) -> np.ndarray:
        """Return the tokens of a cell: a view of the file, unsigned, not to be written to."""
        cell = range(len(self))[cell]
        block = bisect_right(self._first_cells, cell) - 1
        begins, tokens = self._blocks[block]
        at = cell - self._first_cells[block]
        return tokens[begins[at] : begins[at + 1]]

    def __reduce__(self) -> tuple[type[TokenShards], tuple[list[Path]]]:
        return TokenShards, (self.paths,)

    @cached_property
    def source_of(self) -> np.ndarray:
        """Position of each cell's source in `names`, int32 `(n_cells,)`."""
        return np.repeat(np.arange(len(self.names), dtype=np.int32), self.n_cells)


# --- one shard ------------------------------------------------------------------------------------------------------


class ShardError(ValueError):
    """A file is not a whole shard."""


@dataclass(frozen=True)
class _Shard:
    """What is in a file: for each block where its cells begin, `(n_cells + 1,)`, and their tokens, one row."""

    name: str
    n_left_out: int
    sha256: str
    blocks: list[tuple[np.ndarray, np.ndarray]]

    @property
    def n_cells(self) -> int:
        return sum(len(begins) - 1 for begins, _ in self.blocks)


def _encoding_sha256(vocabulary: Vocabulary, max_length: int) -> str:
    """Fingerprint of all that decides, beside the source, which tokens a cell becomes."""
    # The same genes and medians may be found under other names.
    names = [vocabulary.symbols.tolist(), sorted(vocabulary.aliases.items())]
    return hashlib.sha256(json.dumps([ENCODING, max_length, vocabulary.sha256, names]).encode()).hexdigest()


def _shard_name(source: Source, how: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(source.name).stem)[:100]
    return f"{stem}-{hashlib.sha256(f'{source.fingerprint} {how}'.encode()).hexdigest()[:12]}.arrow"


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        _open_shard(path)
    except ShardError as error:
        _log.info(f"{error} This is done now.")
        return False
    return True


def _write_shard(path: Path, source: Source, vocabulary: Vocabulary, max_length: int) -> None:
    column = pa.list_(pa.from_numpy_dtype(vocabulary.token_dtype))
    schema = pa.schema([pa.field("tokens", column)], metadata={"source": source.name})
    fewest = vocabulary.n_specials + FEWEST_GENES
    n_read = n_kept = 0
    all_lengths, all_tokens = hashlib.sha256(), hashlib.sha256()  # apart, so that it does not matter where blocks end
    part = path.with_suffix(f".{uuid4().hex}.part")
    try:
        with (
            closing(_encoded_blocks(source, vocabulary, max_length)) as blocks,
            pa.OSFile(str(part), "wb") as file,
            pa.ipc.new_file(file, schema) as shard,
        ):
            for encoded, lengths in blocks:
                kept = lengths >= fewest
                n_read += len(kept)
                n_kept += int(kept.sum())
                lengths, encoded = lengths[kept], encoded[kept]  # noqa: PLW2901 - what was left out is not needed
                tokens = encoded[np.arange(encoded.shape[1]) < lengths[:, None]]
                begins = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
                all_lengths.update(lengths.tobytes())
                all_tokens.update(tokens.tobytes())
                rows = pa.ListArray.from_arrays(begins, tokens, type=column)
                shard.write_batch(pa.record_batch([rows], schema=schema))
            # What is known only now stands at the end, with a block of no cells.
            sha256 = hashlib.sha256(all_lengths.digest() + all_tokens.digest()).hexdigest()
            account = {"n_read": str(n_read), "n_left_out": str(n_read - n_kept), "sha256": sha256}
            shard.write_batch(pa.record_batch([pa.array([], column)], schema=schema), custom_metadata=account)
        _put_in_place(part, path)
    finally:
        part.unlink(missing_ok=True)
    left_out = f"; {n_read - n_kept:,} with fewer than {FEWEST_GENES} genes left out" if n_kept < n_read else ""
    _log.info(f"{source.name}: {n_kept:,} cells written as tokens{left_out}")


def _encoded_blocks(source: Source, vocabulary: Vocabulary, max_length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read and encode; only what goes wrong in here is the source's fault, a full disk is not."""
    with source.open() as opened:
        tokens = match_genes(opened.counts.names, vocabulary).tokens
        for block in opened.blocks():
            yield rank_encode(block, tokens, vocabulary, max_length)


def _put_in_place(part: Path, path: Path) -> None:
    try:
        part.replace(path)
    except FileNotFoundError:
        if not path.exists():
            raise
        # Another process was faster, and took away what it found superfluous.
    for superfluous in path.parent.glob(f"{path.stem}.*.part"):  # left by a process that was killed
        superfluous.unlink(missing_ok=True)


def _open_shard(path: Path) -> _Shard:
    # What was read stays mapped when the file is closed, so that any number of shards may be open.
    with pa.memory_map(str(path)) as file:
        try:
            return _read_shard(pa.ipc.open_file(file))
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            msg = f"{path} is not a whole shard of tokens ({error}): it has to be deleted and made anew."
            raise ShardError(msg) from error


def _read_shard(reader: pa.RecordBatchFileReader) -> _Shard:
    last = reader.num_record_batches - 1
    account = reader.get_batch_with_custom_metadata(last).custom_metadata
    blocks = []
    for at in range(last):
        batch = reader.get_batch(at)
        batch.validate(full=True)  # cells that begin where they may; looks at no token
        rows = batch.column("tokens")
        blocks.append((rows.offsets.to_numpy(), rows.values.to_numpy()))
    return _Shard(
        name=reader.schema.metadata[b"source"].decode(),
        n_left_out=int(account[b"n_left_out"]),
        sha256=account[b"sha256"].decode(),
        blocks=blocks,
    )
