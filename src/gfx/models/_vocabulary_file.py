"""Vocabularies on disk: our own, one compressed table that any program reads, and the published dictionaries.

The published dictionaries are pickles, and are read as plain values and as nothing else.
"""

from __future__ import annotations

import gzip
import io
import pickle
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gfx._core.vocabulary import SPECIALS, Vocabulary, plain_id
from gfx.models._registry import file_sha256

if TYPE_CHECKING:
    from pathlib import Path

    from gfx.models._registry import Registry

VOCABULARY_FILE = "vocabulary.tsv.gz"


def vocabulary_in(folder: Path, registry: Registry) -> Vocabulary | None:
    """Read the vocabulary that lies in a folder, if any: our table, or the published dictionaries."""
    if (folder / VOCABULARY_FILE).is_file():
        return read_vocabulary(folder / VOCABULARY_FILE)
    tokens, medians = (_only(folder, f"{name}*.pkl") for name in ("token_dictionary", "gene_median_dictionary"))
    if tokens is None or medians is None:
        return None
    symbols, mapping = (_only(folder, f"{name}*.pkl") for name in ("gene_name_id_dict", "ensembl_mapping_dict"))
    hashes = {file_sha256(tokens), file_sha256(medians)}
    known = [card.name for card in registry.vocabularies.values() if hashes <= {file.sha256 for file in card.files}]
    name = known[0] if known else folder.resolve().name
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
    """Read what :func:`write_vocabulary` wrote."""
    text = gzip.decompress(path.read_bytes()).decode()
    first, _, body = text.partition("\n")
    table = pd.read_csv(
        io.StringIO(body),
        sep="\t",
        dtype={"id": str, "symbol": str, "aliases": str, "n_cells": np.int64, "gene_type": str},
        keep_default_na=False,
        na_values={"median": [""]},
        float_precision="round_trip",
    )
    aliases = {
        plain_id(alias): target
        for target, names in zip(table["id"], table["aliases"], strict=True)
        for alias in names.split("|")
        if alias
    }
    return Vocabulary(
        name=first.removeprefix("#"),
        ids=table["id"].to_numpy(dtype=object),
        medians=table["median"].to_numpy(dtype=np.float64),
        symbols=table["symbol"].to_numpy(dtype=object),
        aliases=aliases,
        n_cells=table["n_cells"].to_numpy() if "n_cells" in table else None,
        gene_types=table["gene_type"].to_numpy(dtype=object) if "gene_type" in table else None,
    )


# --- the published dictionaries -------------------------------------------------------------------------------------

_LFS_POINTER = b"version https://git-lfs"
_NUMBER = re.compile(r"[iuf][1248]")


class _NumberFormat:
    """Stands in for `numpy.dtype` while a pickle is read: the format of one number, no more.

    The real one is not offered: it also makes objects, records and dates, whose state is more than a number.
    """

    def __init__(self, code: object, *_: object) -> None:
        if not (isinstance(code, str) and _NUMBER.fullmatch(code)):
            msg = f"numpy.dtype({code!r})"
            raise _NotPlainError(msg)
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        byte_order = state[1]
        if byte_order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(byte_order)


def _number(number_format: _NumberFormat, raw: bytes) -> int | float:
    """Stand in for the function that rebuilds numpy scalars; gives Python's own int or float."""
    return np.frombuffer(raw, dtype=number_format.dtype, count=1)[0].item()


class _NotPlainError(Exception):
    """Something in a pickle that is no plain value; the text names it."""


class _PlainUnpickler(pickle.Unpickler):
    """Rebuilds dict, str, int, float and numpy's numbers; whatever else a pickle asks for is refused, not run."""

    _ADMITTED = {  # noqa: RUF012
        ("numpy", "dtype"): _NumberFormat,
        ("numpy.core.multiarray", "scalar"): _number,
        ("numpy._core.multiarray", "scalar"): _number,
    }

    def find_class(self, module: str, name: str) -> object:
        try:
            return self._ADMITTED[module, name]
        except KeyError:
            msg = f"{module}.{name}"
            raise _NotPlainError(msg) from None


def read_dictionary(path: Path, values: tuple[type, ...] = (str, int, float)) -> dict[str, Any]:
    """Read a pickled dictionary of text to `values` without running anything in it; anything else is refused."""
    check_no_pointer(path, "the dictionary itself")
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file).load()
    except _NotPlainError as refused:
        msg = (
            f"{path} was refused: its pickle asks for {refused}, a gene dictionary holds text and numbers only. "
            "Pickles can run any program when they are read; do not open this one with anything else."
        )
        raise ValueError(msg) from None
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        msg = f"{path} is not a readable pickle ({type(error).__name__}: {error}). Copy or fetch it again."
        raise ValueError(msg) from error
    if type(content) is not dict:
        msg = f"{path} was refused: it holds a {type(content).__name__}, a gene dictionary was expected."
        raise ValueError(msg)
    for key, value in content.items():
        if type(key) is not str or type(value) not in values:
            msg = (
                f"{path} was refused: it maps {key!r} ({type(key).__name__}) to a {type(value).__name__}; "
                f"this dictionary maps str to {' or '.join(kind.__name__ for kind in values)}."
            )
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
