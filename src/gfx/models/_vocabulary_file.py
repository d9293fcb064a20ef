"""Vocabularies on disk: our own, one compressed table that any program reads, and the published dictionaries.

The published dictionaries are pickles, and are read as plain values and as nothing else.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gfx._core.manifest import file_sha256
from gfx._core.pickles import NotPlainError, read_plain
from gfx._core.vocabulary import SPECIALS, Vocabulary, plain_id

if TYPE_CHECKING:
    from pathlib import Path

    from gfx.models._registry import Registry

VOCABULARY_FILE = "vocabulary.tsv.gz"

#: Bytes of a vocabulary, unpacked, or of a dictionary, at most.
LARGEST_TABLE = 1 << 26

#: Columns of our table that are always there, and others.
_COLUMNS = ["token", "id", "symbol", "median", "aliases"]
_MORE_COLUMNS = ("n_cells", "gene_type")


def vocabulary_in(folder: Path, registry: Registry) -> Vocabulary | None:
    """Read the vocabulary that lies in a folder, if any: our table, or the published dictionaries."""
    if (folder / VOCABULARY_FILE).is_file():
        return read_vocabulary(folder / VOCABULARY_FILE)
    tokens, medians = (_only(folder, f"{name}*.pkl") for name in ("token_dictionary", "gene_median_dictionary"))
    if tokens is None or medians is None:
        return None
    symbols, mapping = (_only(folder, f"{name}*.pkl") for name in ("gene_name_id_dict", "ensembl_mapping_dict"))
    files = (tokens, medians, symbols, mapping)
    hashes = tuple(None if file is None else file_sha256(file) for file in files)
    cards = registry.vocabularies.values()
    known = [card.name for card in cards if {*hashes[:2]} <= {file.sha256 for file in card.files}]
    return _published(known[0] if known else folder.resolve().name, files, hashes)


@lru_cache(maxsize=4)
def _published(name: str, files: tuple[Path | None, ...], _hashes: tuple[str | None, ...]) -> Vocabulary:
    """Read dictionaries again only if they have changed since: it takes most of a second."""
    tokens, medians, symbols, mapping = files
    return read_published_vocabulary(name, tokens, medians, symbols=symbols, mapping=mapping)


def _only(folder: Path, pattern: str) -> Path | None:
    paths = sorted(folder.glob(pattern))
    if len(paths) > 1:
        names = [path.name for path in paths]
        msg = f"{folder} holds several {pattern}: {names}. Keep the one that the model was trained with."
        raise ValueError(msg)
    return paths[0] if paths else None


# --- our table ------------------------------------------------------------------------------------------------------


def write_vocabulary(vocabulary: Vocabulary, folder: Path) -> Path:
    """Write `vocabulary.tsv.gz`: token, id, symbol, median, aliases, and, where known, number of cells and gene type.

    The same bytes for the same vocabulary.
    """
    aliases: dict[str, list[str]] = {}
    for alias, target in vocabulary.aliases.items():
        aliases.setdefault(target, []).append(alias)
    table = pd.DataFrame(
        {
            "id": vocabulary.ids,
            "symbol": vocabulary.symbols,
            "median": vocabulary.medians,
            "aliases": ["|".join(sorted(aliases.get(name, ()))) for name in vocabulary.ids],
        }
    )
    for column, values in (("n_cells", vocabulary.n_cells), ("gene_type", vocabulary.gene_types)):
        if values is not None:
            table[column] = values
    text = f"#{vocabulary.name}\n" + table.to_csv(sep="\t", index_label="token", lineterminator="\n")
    path = folder / VOCABULARY_FILE
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


def read_vocabulary(path: Path) -> Vocabulary:
    """Read what :func:`write_vocabulary` wrote; anything else is a `ValueError` that names the file."""
    try:
        with gzip.open(path) as file:
            content = file.read(LARGEST_TABLE + 1)
        if len(content) > LARGEST_TABLE:
            msg = f"it unpacks to more than {LARGEST_TABLE:,} bytes"
            raise ValueError(msg)
        return _parse(content.decode())
    except (EOFError, ValueError, OverflowError, zlib.error, gzip.BadGzipFile, csv.Error) as error:
        msg = f"{path} is no vocabulary that gfx wrote ({error}). Copy or fetch it again."
        raise ValueError(msg) from None


def _parse(text: str) -> Vocabulary:
    name, _, body = text.partition("\n")
    if not name.startswith("#"):
        msg = "its first line is no name behind '#'"
        raise ValueError(msg)
    rows = csv.reader(io.StringIO(body, newline=""), delimiter="\t")
    columns = next(rows, [])
    if columns[: len(_COLUMNS)] != _COLUMNS or not set(columns[len(_COLUMNS) :]) <= set(_MORE_COLUMNS):
        msg = f"its columns are {', '.join(columns)[:100]!r}, not {', '.join(_COLUMNS)}"
        raise ValueError(msg)
    table: dict[str, list[str]] = {column: [] for column in columns}
    add = [values.append for values in table.values()]
    for number, row in enumerate(rows):
        if len(row) != len(columns) or row[0] != str(number):
            msg = f"the row of token {number} is {row[:3]}, of {len(row)} columns"
            raise ValueError(msg)
        for append, value in zip(add, row, strict=True):
            append(value)
    aliases = {
        plain_id(alias): target
        for target, names in zip(table["id"], table["aliases"], strict=True)
        for alias in names.split("|")
        if alias
    }
    texts = {column: np.array(table.get(column, []), dtype=object) for column in ("id", "symbol", "gene_type")}
    return Vocabulary(
        name=name.removeprefix("#"),
        ids=texts["id"],
        medians=np.array([float(median or "nan") for median in table["median"]], dtype=np.float64),
        symbols=texts["symbol"],
        aliases=aliases,
        n_cells=np.array([int(n) for n in table["n_cells"]], dtype=np.int64) if "n_cells" in table else None,
        gene_types=texts["gene_type"] if "gene_type" in table else None,
    )


# --- the published dictionaries -------------------------------------------------------------------------------------

_LFS_POINTER = b"version https://git-lfs"


def read_dictionary(path: Path, values: tuple[type, ...] = (str, int, float)) -> dict[str, Any]:
    """Read a pickled dictionary of text to `values` without running anything in it; anything else is refused."""
    check_no_pointer(path, "the dictionary itself")
    if path.stat().st_size > LARGEST_TABLE:
        msg = f"{path} was refused: it has more than {LARGEST_TABLE:,} bytes, far more than a gene dictionary needs."
        raise ValueError(msg)
    try:
        content = read_plain(path.read_bytes())
    except NotPlainError as refused:
        msg = (
            f"{path} was refused: its pickle asks for {refused}, a gene dictionary holds text and numbers only. "
            "Pickles can run any program when they are read; do not open this one with anything else."
        )
        raise ValueError(msg) from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        msg = f"{path} is not a readable pickle ({type(error).__name__}: {error}). Copy or fetch it again."
        raise ValueError(msg) from error
    if type(content) is not dict:
        msg = f"{path} was refused: it holds a {type(content).__name__}, a gene dictionary was expected."
        raise ValueError(msg)
    for key, value in content.items():
        if type(value) not in values:
            msg = (
                f"{path} was refused: it maps {key[:50]!r} to a {type(value).__name__}; "
                f"this dictionary maps str to {' or '.join(kind.__name__ for kind in values)}."
            )
            raise ValueError(msg)
        if type(value) is int and abs(value) >> 63:
            msg = f"{path} was refused: it maps {key[:50]!r} to a number of {value.bit_length()} bits."
            raise ValueError(msg)
    return content


def check_no_pointer(path: Path, what: str) -> None:
    """Refuse the note that git leaves where git-lfs was not installed, instead of the file."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            msg = f"{path} is a git-lfs pointer, not {what}. Run `git lfs pull` where it came from."
            raise ValueError(msg)


def read_published_vocabulary(
    name: str, tokens: Path, medians: Path, *, symbols: Path | None = None, mapping: Path | None = None
) -> Vocabulary:
    """Merge the published dictionaries into one vocabulary.

    They map Ensembl ids and special tokens to `tokens`, Ensembl ids to non-zero `medians`, gene `symbols` to Ensembl
    ids, and (`mapping`) symbols, synonyms and retired ids to the Ensembl ids they stand for today. Genes without a
    token are left out.
    """
    token_of = read_dictionary(tokens, values=(int,))
    if set(token_of.values()) != set(range(len(token_of))):
        msg = f"{tokens} does not number its {len(token_of):,} entries from 0 on; it is no token dictionary."
        raise ValueError(msg)
    ids = np.array(sorted(token_of, key=token_of.__getitem__), dtype=object)
    median_of = read_dictionary(medians, values=(int, float))
    without = [gene for gene in ids if gene not in median_of and gene not in SPECIALS]
    if without:
        msg = (
            f"{len(without):,} of the {len(ids):,} genes of {tokens} have no median in {medians}, "
            f"such as {without[:3]}; the two belong to different families."
        )
        raise ValueError(msg)
    gene_of_symbol = {} if symbols is None else read_dictionary(symbols, values=(str,))
    # Genes that have no symbol are named by their id there.
    symbol_of = {gene: symbol for symbol, gene in gene_of_symbol.items() if symbol != gene}
    targets = {} if mapping is None else read_dictionary(mapping, values=(str,))
    try:
        return Vocabulary(
            name=name,
            ids=ids,
            medians=np.array([np.nan if gene in SPECIALS else median_of[gene] for gene in ids], dtype=np.float64),
            symbols=np.array([symbol_of.get(gene, "") for gene in ids], dtype=object),
            aliases={
                key.upper(): gene
                for key, gene in targets.items()
                if gene in token_of and gene not in SPECIALS and key != gene
            },
        )
    except ValueError as error:
        msg = f"{tokens} and {medians} make no vocabulary: {error}"
        raise ValueError(msg) from None
