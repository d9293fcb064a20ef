"""Pickled dictionaries of text and numbers, followed instruction by instruction without running anything in them.

Python's own reader, even of a whitelist of classes, reserves memory for whatever length a file states, and crashes on
deeply nested keys. Here time and memory are bounded by the size of the file: keys are text, and tuples hold no tuples.
"""

from __future__ import annotations

import pickletools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gfx._core.nesting import without_odd_warnings

if TYPE_CHECKING:
    from collections.abc import Callable

#: Each takes some 100 bytes and a microsecond; the largest published dictionary has a seventh of them.
MOST_INSTRUCTIONS = 5_000_000

_NUMBER = re.compile(r"[iuf][1248]")


class NotPlainError(Exception):
    """Something in a pickle that is no plain value; the text names it."""


@without_odd_warnings()
def read_plain(pickled: bytes) -> object:
    """Read text, numbers and dictionaries of them; what else a pickle asks for is a :class:`NotPlainError`.

    A pickle that is broken is a `ValueError`, `LookupError`, `TypeError` or `AttributeError`.
    """
    reader = _Reader()
    for number, (opcode, given, _) in enumerate(pickletools.genops(pickled)):
        if number == MOST_INSTRUCTIONS:
            msg = f"more than {number:,} instructions"
            raise NotPlainError(msg)
        if opcode.name in _VALUES:
            reader.stack.append(given)
        elif opcode.name in _INSTRUCTIONS:
            _INSTRUCTIONS[opcode.name](reader, given)
        elif opcode.name == "STOP":
            break
        elif opcode.name not in {"PROTO", "FRAME"}:
            raise NotPlainError(opcode.name.lower())
    return reader.stack.pop()


# --- what a pickle may ask for --------------------------------------------------------------------------------------


def _number_format(code: object, *_: object) -> np.dtype:
    """Stand in for `numpy.dtype`: the format of one number, no more.

    The real one also makes objects, records and dates, whose state is more than a number.
    """
    if not (isinstance(code, str) and _NUMBER.fullmatch(code)):
        msg = f"numpy.dtype({code!r})"
        raise NotPlainError(msg)
    return np.dtype(code)


def _number(number_format: object, raw: bytes) -> int | float:
    """Stand in for the function that rebuilds numpy scalars; gives Python's own int or float."""
    if not isinstance(number_format, np.dtype):
        msg = f"a number in the format of a {type(number_format).__name__}"
        raise NotPlainError(msg)
    return np.frombuffer(raw, dtype=number_format, count=1)[0].item()


_ADMITTED = {
    "numpy dtype": _number_format,
    "numpy.core.multiarray scalar": _number,
    "numpy._core.multiarray scalar": _number,
}


# --- its instructions -----------------------------------------------------------------------------------------------


@dataclass
class _Reader:
    """The stack, marks on it, values to come back to, and whether the one dictionary is among them."""

    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    has_begun: bool = False

    def pop(self, n: int) -> list[Any]:
        values = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return values

    def pop_to_mark(self) -> list[Any]:
        return self.pop(len(self.stack) - self.marks.pop())

    def remember(self, place: int | None) -> None:
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]

    def fill(self, items: list[Any]) -> None:
        target, keys = self.stack[-1], items[::2]
        if type(target) is not dict:
            msg = f"items in a {type(target).__name__}"
            raise NotPlainError(msg)
        for key in keys:
            if type(key) is not str:
                msg = f"a key of type {type(key).__name__}"
                raise NotPlainError(msg)
        target.update(zip(keys, items[1::2], strict=True))

    def start(self, _: object) -> None:
        if self.has_begun:
            msg = "a dictionary in a dictionary"
            raise NotPlainError(msg)
        self.has_begun = True
        self.stack.append({})

    def start_with(self, _: object) -> None:
        items = self.pop_to_mark()
        self.start(None)
        self.fill(items)

    def make_tuple(self, values: list[Any]) -> None:
        if any(isinstance(value, tuple | dict) for value in values):
            msg = "a tuple of tuples or dictionaries"
            raise NotPlainError(msg)
        self.stack.append(tuple(values))

    def find(self, name: str | None) -> None:
        name = " ".join(self.pop(2)) if name is None else name
        if name not in _ADMITTED:
            raise NotPlainError(name.replace(" ", ".")[:200])
        self.stack.append(_ADMITTED[name])

    def call(self, _: object) -> None:
        function, arguments = self.pop(2)
        if type(arguments) is not tuple:
            msg = f"a call with a {type(arguments).__name__}"
            raise NotPlainError(msg)
        self.stack.append(function(*arguments))

    def set_byte_order(self, _: object) -> None:
        number_format, state = self.pop(2)
        order = state[1]
        self.stack.append(number_format.newbyteorder(order if order in {"<", ">"} else "="))


#: Instructions that put a value on the stack.
_VALUES = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "FLOAT", "BINFLOAT", "STRING", "UNICODE"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
    }
)

_INSTRUCTIONS: dict[str, Callable[[_Reader, Any], None]] = {
    **dict.fromkeys(("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"), _Reader.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), lambda reader, place: reader.stack.append(reader.memo[place])),
    "NONE": lambda reader, _: reader.stack.append(None),
    "NEWTRUE": lambda reader, _: reader.stack.append(True),
    "NEWFALSE": lambda reader, _: reader.stack.append(False),
    "MARK": lambda reader, _: reader.marks.append(len(reader.stack)),
    "EMPTY_DICT": _Reader.start,
    "DICT": _Reader.start_with,
    "SETITEM": lambda reader, _: reader.fill(reader.pop(2)),
    "SETITEMS": lambda reader, _: reader.fill(reader.pop_to_mark()),
    "EMPTY_TUPLE": lambda reader, _: reader.make_tuple([]),
    "TUPLE1": lambda reader, _: reader.make_tuple(reader.pop(1)),
    "TUPLE2": lambda reader, _: reader.make_tuple(reader.pop(2)),
    "TUPLE3": lambda reader, _: reader.make_tuple(reader.pop(3)),
    "TUPLE": lambda reader, _: reader.make_tuple(reader.pop_to_mark()),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), _Reader.find),
    "REDUCE": _Reader.call,
    "BUILD": _Reader.set_byte_order,
}
