"""Pickles, followed instruction by instruction without running anything in them.

Python's own reader, even of a whitelist of classes, reserves memory for whatever length a file states, and readers of
all kinds crash, or never end, when they take a tuple of tuples of tuples as a key. Here time and memory are bounded by
the size of the file.
"""

from __future__ import annotations

import pickletools
import re
import warnings
from pickle import UnpicklingError
from typing import IO, TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

#: Each takes some 100 bytes and a microsecond; the largest published dictionary has a seventh of them.
MOST_INSTRUCTIONS = 5_000_000

#: Tuples in tuples, at most, and values in a tuple of a plain pickle; numpy's numbers have two levels of nine values.
DEEPEST, LONGEST = 10, 20


class NotPlainError(UnpicklingError):
    """Something in a pickle that is not admitted; the text names it."""


def read_plain(pickled: bytes) -> object:
    """Read text, numbers and one dictionary of them; what else a pickle asks for is a :class:`NotPlainError`.

    A pickle that is broken is a `ValueError`, `LookupError`, `TypeError` or `AttributeError`.
    """
    return _follow(pickled, _plain_value)


def check_nesting(stream: IO[bytes]) -> None:
    """Walk through one pickle, and raise :class:`NotPlainError` if its tuples are nested too deeply.

    A pickle that is broken is a `ValueError`, `LookupError`, `ArithmeticError` or `MemoryError`.
    """
    _follow(stream, _depth)


def _follow(pickled: bytes | IO[bytes], make: Callable[[str, Any, list[Any]], Any]) -> Any:
    """Follow a pickle to its end and return what it leaves.

    `make` is given the name of an instruction, what stands behind it in the file, and what it takes from the stack, and
    returns what it puts there.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[object, Any] = {}
    with warnings.catch_warnings():  # about text where there is no pickle
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", SyntaxWarning)
        for number, (opcode, given, _) in enumerate(pickletools.genops(pickled)):
            if number == MOST_INSTRUCTIONS:
                _refuse(f"more than {number:,} instructions")
            name = opcode.name
            if name in _PUT:
                memo[len(memo) if given is None else given] = stack[-1]
            elif name in _GET:
                stack.append(memo[given])
            elif name == "MARK":
                marks.append(len(stack))
            else:
                n_taken, has_mark, n_put = _EFFECTS[name]
                start = (marks.pop() if has_mark else len(stack)) - n_taken
                if start < 0:
                    msg = f"{name.lower()} finds nothing to take"
                    raise IndexError(msg)
                taken = stack[start:]
                if name == "STOP":
                    return taken[0]
                made = make(name, given, taken)
                stack[start:] = [made] * n_put
    return None  # `genops` ends with a stop, or an error


_PUT = frozenset({"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"})
_GET = frozenset({"GET", "BINGET", "LONG_BINGET"})


def _effect(opcode: pickletools.OpcodeInfo) -> tuple[int, bool, int]:
    """Tell how many values an instruction takes, below the mark if it takes all above one, and how many it puts."""
    before, mark = opcode.stack_before, pickletools.markobject
    return before.index(mark) if mark in before else len(before), mark in before, len(opcode.stack_after)


_EFFECTS = {opcode.name: _effect(opcode) for opcode in pickletools.opcodes}
_TUPLES = frozenset({"EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"})


def _refuse(what: str) -> NoReturn:
    raise NotPlainError(what)


# --- how deeply tuples are nested -----------------------------------------------------------------------------------


def _depth(name: str, _given: object, taken: list[int]) -> int:
    depth = max(taken, default=0) + (name in _TUPLES)
    if depth > DEEPEST:
        _refuse("deeply nested tuples")
    return depth


# --- plain values ---------------------------------------------------------------------------------------------------

#: Instructions that put a value on the stack.
_VALUES = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "FLOAT", "BINFLOAT", "STRING", "UNICODE"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
    }
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "PROTO": None, "FRAME": None}

_NUMBER = re.compile(r"[iuf][1248]")


def _plain_value(name: str, given: Any, taken: list[Any]) -> Any:
    if name in _VALUES:
        return given
    if name in _CONSTANTS:
        return _CONSTANTS[name]
    if name in _TUPLES:
        return _tuple(taken)
    match name:
        case "EMPTY_DICT" | "DICT":
            return _filled({}, taken)
        case "SETITEM" | "SETITEMS":
            return _filled(taken[0], taken[1:])
        case "GLOBAL" | "STACK_GLOBAL":
            return _function(" ".join(taken) if given is None else given)
        case "REDUCE":
            return _call(*taken)
        case "BUILD":
            return _in_byte_order(*taken)
    return _refuse(name.lower())


def _tuple(values: list[Any]) -> tuple[Any, ...]:
    if len(values) > LONGEST:
        _refuse(f"a tuple of {len(values):,} values")
    if any(isinstance(value, tuple | dict) for value in values):
        _refuse("a tuple of tuples or dictionaries")
    return tuple(values)


def _filled(target: Any, items: list[Any]) -> dict[str, Any]:
    keys, values = items[::2], items[1::2]
    if type(target) is not dict:
        _refuse(f"items in a {type(target).__name__}")
    for key in keys:
        if type(key) is not str:
            _refuse(f"a key of type {type(key).__name__}")
    if any(type(value) is dict for value in values):
        _refuse("a dictionary in a dictionary")
    target.update(zip(keys, values, strict=True))
    return target


def _number_format(code: object, *_: object) -> np.dtype:
    """Stand in for `numpy.dtype`: the format of one number, no more.

    The real one also makes objects, records and dates, whose state is more than a number.
    """
    if not (isinstance(code, str) and _NUMBER.fullmatch(code)):
        _refuse(f"numpy.dtype({str(code)[:50]!r})")
    return np.dtype(code)


def _number(number_format: object, raw: bytes) -> int | float:
    """Stand in for the function that rebuilds numpy scalars; gives Python's own int or float."""
    if not isinstance(number_format, np.dtype):
        _refuse(f"a number in the format of a {type(number_format).__name__}")
    return np.frombuffer(raw, dtype=number_format, count=1)[0].item()


_ADMITTED: dict[str, Callable[..., Any]] = {
    "numpy dtype": _number_format,
    "numpy.core.multiarray scalar": _number,
    "numpy._core.multiarray scalar": _number,
}


def _function(name: str) -> Callable[..., Any]:
    if name not in _ADMITTED:
        _refuse(name.replace(" ", ".")[:200])
    return _ADMITTED[name]


def _call(function: Any, arguments: object) -> Any:
    if type(arguments) is not tuple:
        _refuse(f"a call with a {type(arguments).__name__}")
    return function(*arguments)


def _in_byte_order(number_format: Any, state: Any) -> np.dtype:
    order = state[1]
    return number_format.newbyteorder(order if order in {"<", ">"} else "=")
