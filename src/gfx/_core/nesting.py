"""How deeply tuples of a pickle are nested, found without reading it.

Readers of pickles crash, or never end, when they take a tuple of tuples of tuples as a key.
"""

from __future__ import annotations

import pickletools
import warnings
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Tuples in tuples, at most; those of tensors have three levels.
DEEPEST = 10

_SIZES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@contextmanager
def without_odd_warnings() -> Iterator[None]:
    """Keep Python from warnings about text that it finds where there is no pickle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", SyntaxWarning)
        yield


@without_odd_warnings()
def check_nesting(stream: IO[bytes]) -> None:
    """Walk through one pickle, and raise `UnpicklingError` if its tuples are nested too deeply, or it is broken."""
    depths: list[int] = []  # of the tuples on the stack; 0 for all else
    marks: list[int] = []
    memo: dict[int, int] = {}
    try:
        for opcode, given, _ in pickletools.genops(stream):
            if opcode.name in {"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"}:
                memo[len(memo) if given is None else given] = depths[-1]
            elif opcode.name in {"GET", "BINGET", "LONG_BINGET"}:
                depths.append(memo[given])
            elif opcode.name == "MARK":
                marks.append(len(depths))
            else:
                before = [each.name for each in opcode.stack_before]
                start = len(depths) - len(before)
                if "mark" in before:
                    start = marks.pop() - before.index("mark")
                if start < 0:
                    raise IndexError
                is_tuple = opcode.name == "TUPLE" or opcode.name in _SIZES
                depth = 1 + max(depths[start:], default=0) if is_tuple else 0
                depths[start:] = [depth] * sum(each.name != "mark" for each in opcode.stack_after)
                if depth > DEEPEST:
                    msg = "tuples are nested too deeply"
                    raise UnpicklingError(msg)
    except (LookupError, MemoryError, OverflowError, ValueError) as error:
        raise UnpicklingError(str(error)) from None
