"""The published gene dictionaries: pickles, read as plain values and as nothing else."""

from __future__ import annotations

import pickle
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from gfx._core.vocabulary import SPECIALS, Vocabulary

if TYPE_CHECKING:
    from pathlib import Path

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


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the note that git leaves where git-lfs was not installed, and not the file itself."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def read_dictionary(path: Path, values: tuple[type, ...] = (str, int, float)) -> dict[str, Any]:
    """Read a pickled dictionary of text to `values` without running anything in it.

    Raises
    ------
    ValueError
        The file is no pickle, is broken, or holds anything but a dictionary of plain values.
    """
    if is_lfs_pointer(path):
        msg = f"{path} is a git-lfs pointer, not the dictionary itself. Run `git lfs pull` where it came from."
        raise ValueError(msg)
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


def read_published_vocabulary(
    name: str, tokens: Path, medians: Path, *, symbols: Path | None = None, mapping: Path | None = None
) -> Vocabulary:
    """Merge the published dictionaries into one vocabulary.

    Parameters
    ----------
    name
        What to call it.
    tokens
        Ensembl id or special token to token.
    medians
        Ensembl id to non-zero median; genes without a token are left out.
    symbols
        Gene symbol to Ensembl id.
    mapping
        Symbols, synonyms and retired ids to the Ensembl ids they stand for today.

    Raises
    ------
    ValueError
        Tokens are not 0, 1, 2, ..., or a gene has no median.
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
    symbol_of = (
        {} if symbols is None else {gene: symbol for symbol, gene in read_dictionary(symbols, values=(str,)).items()}
    )
    targets = {} if mapping is None else read_dictionary(mapping, values=(str,))
    return Vocabulary(
        name=name,
        ids=ids,
        medians=np.array([np.nan if gene in SPECIALS else median_of[gene] for gene in ids], dtype=np.float64),
        # Genes that have no symbol are named by their id there.
        symbols=np.array([symbol if (symbol := symbol_of.get(gene, "")) != gene else "" for gene in ids], dtype=object),
        aliases={
            key.upper(): gene
            for key, gene in targets.items()
            if gene in token_of and gene not in SPECIALS and key != gene
        },
    )
