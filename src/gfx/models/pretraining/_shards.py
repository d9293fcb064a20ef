"""Cells as tokens on disk: one file for each source, written once and memory-mapped ever after."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np

from gfx import _log
from gfx._adata import match_genes
from gfx._core.encodings import Encodings
from gfx._core.ranking import rank_cells
from gfx.models.pretraining._sources import each_source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gfx._core.vocabulary import Vocabulary
    from gfx.models.pretraining._sources import Source

#: Counted up whenever the same cells would be written as other tokens; shards made before are then made anew.
ENCODING = 1

#: A cell of one gene has no context to learn from.
FEWEST_GENES = 2

#: Shards that a process maps at a time.
MOST_OPEN = 128


def encode_sources(sources: Sequence[Source], vocabulary: Vocabulary, max_length: int, folder: Path) -> TokenShards:
    """Write the cells of each source as tokens, unless that was done before; returns the cells of all, in their order.

    Cells with fewer than two genes of the vocabulary are left out, and lower-ranked genes cut off at `max_length`
    tokens, special ones included. A shard appears under its name when it is whole, so that a call that was stopped, or
    that met a source it cannot use, leaves the others for the next one. Several processes may do the same at the same
    time.

    Cost: one pass over the sources that are new; a block of cells in memory; on disk 2 bytes a token, or 4 for a
    vocabulary of more than 65,536 tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The same genes and medians may be found under other names.
    names = [vocabulary.symbols.tolist(), sorted(vocabulary.aliases.items())]
    encoding = hashlib.sha256(json.dumps([ENCODING, max_length, vocabulary.sha256, names]).encode()).hexdigest()

    def encode(source: Source) -> Path:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(source.name).stem)[:100]
        content = hashlib.sha256(f"{source.fingerprint} {encoding}".encode()).hexdigest()[:12]
        path = folder / f"{stem}-{content}.npy"
        try:
            _read_account(path)
        except FileNotFoundError:
            _write_shard(path, source, vocabulary, max_length)
        except ValueError as error:
            _log.info(f"{error} This is done now.")
            _write_shard(path, source, vocabulary, max_length)
        return path

    shards = TokenShards(list(each_source(sources, encode, f"The cells of the others are kept as tokens in {folder}.")))
    if not len(shards):
        msg = f"No cell has more than one gene of the vocabulary {vocabulary.name!r}: there is nothing to learn from."
        raise ValueError(msg)
    return shards


class TokenShards:
    """Cells as tokens, read from the disk when they are asked for; 12 bytes a cell in memory.

    Worker processes receive the paths of the files that :func:`encode_sources` wrote and open them for themselves.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [Path(path).absolute() for path in paths]
        accounts = [_read_account(path) for path in self.paths]
        lengths = [of_shard for of_shard, _ in accounts]
        #: Names of the sources.
        self.names = [account["name"] for _, account in accounts]
        #: Number of cells of each source, int64 `(n_sources,)`.
        self.n_cells = np.array([len(of_shard) for of_shard in lengths], dtype=np.int64)
        #: Fingerprint of all tokens in their order, wherever the files are and whenever they were written.
        self.content_sha256 = hashlib.sha256("".join(account["sha256"] for _, account in accounts).encode()).hexdigest()
        #: Tokens of each cell, special ones included, int32 `(n_cells,)`.
        self.lengths = np.concatenate([np.zeros(0, np.int32), *lengths])
        self._begins = [np.concatenate([[0], np.cumsum(of_shard, dtype=np.int64)]) for of_shard in lengths]
        self._first_cells = np.cumsum([0, *self.n_cells]).tolist()
        # A mapped file takes a file descriptor, of which a process has few.
        self._tokens = lru_cache(MOST_OPEN)(lambda shard: np.asarray(np.load(self.paths[shard], mmap_mode="r")))

    def __len__(self) -> int:
        return self._first_cells[-1]

    def __getitem__(self, cell: int) -> np.ndarray:
        """Return the tokens of a cell: a view of the file, unsigned, not to be written to."""
        cell = range(len(self))[cell]
        shard = bisect_right(self._first_cells, cell) - 1
        begins, within = self._begins[shard], cell - self._first_cells[shard]
        return self._tokens(shard)[begins[within] : begins[within + 1]]

    def __reduce__(self) -> tuple[type[TokenShards], tuple[list[Path]]]:
        return TokenShards, (self.paths,)


# --- one shard ------------------------------------------------------------------------------------------------------

# A shard is three arrays in numpy's format, one behind the other in one file: all tokens, which is what `numpy.load`
# returns; the length of each cell; and a text in JSON with the source's name and a fingerprint of all tokens.


def _write_shard(path: Path, source: Source, vocabulary: Vocabulary, max_length: int) -> None:
    fewest = vocabulary.n_specials + FEWEST_GENES
    header = {"descr": np.lib.format.dtype_to_descr(vocabulary.token_dtype), "fortran_order": False, "shape": (0,)}
    n_read, kept_lengths = 0, [np.zeros(0, np.int32)]
    all_lengths, all_tokens = hashlib.sha256(), hashlib.sha256()  # apart, so that it does not matter where blocks end
    part = path.with_suffix(f".{uuid4().hex}.part")
    try:
        with closing(_encoded_blocks(source, vocabulary, max_length)) as blocks, part.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for encoded, lengths in blocks:
                n_read += len(lengths)
                kept = lengths[lengths >= fewest]
                tokens = Encodings.of(encoded[lengths >= fewest], kept).without_padding().values
                all_lengths.update(kept.tobytes())
                all_tokens.update(tokens.tobytes())
                kept_lengths.append(kept.astype(np.int32))
                file.write(tokens.tobytes())
            lengths = np.concatenate(kept_lengths)
            sha256 = hashlib.sha256(all_lengths.digest() + all_tokens.digest()).hexdigest()
            np.save(file, lengths)
            np.save(file, np.array(json.dumps({"name": source.name, "sha256": sha256})))
            file.seek(0)  # numpy leaves room for a larger number
            np.lib.format.write_array_header_1_0(file, header | {"shape": (int(lengths.sum(dtype=np.int64)),)})
        try:
            part.replace(path)
        except FileNotFoundError:
            if not path.exists():
                raise
            # Another process was faster, and took away what it found superfluous.
        for superfluous in path.parent.glob(f"{path.stem}.*.part"):  # left by a process that was killed
            superfluous.unlink(missing_ok=True)
    finally:
        part.unlink(missing_ok=True)
    n_left_out = n_read - len(lengths)
    left_out = f"; {n_left_out:,} with fewer than {FEWEST_GENES} genes left out" if n_left_out else ""
    _log.info(f"{source.name}: {len(lengths):,} cells written as tokens{left_out}")


def _encoded_blocks(source: Source, vocabulary: Vocabulary, max_length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read and encode; only what goes wrong in here is the source's fault, a full disk is not."""
    with source.open() as (counts, var):
        tokens = match_genes(counts.names, vocabulary, var, source.gene_ids).tokens
        for block in source.raw_blocks(counts):
            yield rank_cells(block, tokens, vocabulary, max_length)[:2]


def _read_account(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    """Read the lengths of a shard's cells and the name and fingerprint of its source; check that its tokens are there.

    A file that is damaged or no shard is a `ValueError` that names it.
    """
    try:
        tokens = np.load(path, mmap_mode="r")
        with path.open("rb") as file:
            file.seek(tokens.offset + tokens.nbytes)
            lengths, account = np.load(file), json.loads(str(np.load(file)))
        if lengths.min(initial=1) < 1 or lengths.sum(dtype=np.int64) != len(tokens):
            msg = f"cells of {lengths.sum(dtype=np.int64)} tokens in all, but {len(tokens)} tokens"
            raise ValueError(msg)
        return lengths, {key: account[key] for key in ("name", "sha256")}
    except FileNotFoundError:
        raise
    except (AttributeError, EOFError, KeyError, OSError, TokenError, TypeError, ValueError) as error:
        msg = f"{path} is not a whole shard of tokens ({error}): it has to be deleted and made anew."
        raise ValueError(msg) from error
