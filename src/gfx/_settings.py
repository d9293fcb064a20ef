"""Typed settings, read once from ``GFX_*`` environment variables."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfx._log import LEVELS, set_verbosity

if TYPE_CHECKING:
    from collections.abc import Iterator


def _truth(value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in {"1", "true", "yes", "on"}:
        return True
    if text in {"", "0", "false", "no", "off"}:
        return False
    msg = f"Expected a truth value such as 1 or 0, found {value!r}."
    raise ValueError(msg)


def _whole(value: object) -> int:
    text = str(value).strip()
    if not text.isdecimal() or int(text) < 1:
        msg = f"`batch_tokens`: Expected a whole number above 0, found {value!r}."
        raise ValueError(msg)
    return int(text)


def _devices(value: object) -> str | tuple[str, ...]:
    given = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    names = [str(name).strip() for name in given]
    if unknown := [name for name in names if name and not _DEVICE.fullmatch(name)]:
        msg = (
            f"`device` is a device of torch such as 'cpu', 'cuda', 'cuda:0' or 'mps', found {unknown[0]!r}. "
            "`None` takes a GPU where there is one."
        )
        raise ValueError(msg)
    if not names or not all(names) or len(set(names)) < len(names):
        msg = f"`device` is a device such as 'cuda:0', or several different ones, found {value!r}."
        raise ValueError(msg)
    return names[0] if len(names) == 1 else tuple(names)


def _dtype(value: object) -> str:
    if value not in DTYPES:
        msg = f"`dtype` is one of {list(DTYPES)} or None, found {value!r}."
        raise ValueError(msg)
    return value


def _client(value: object) -> object:
    if not (hasattr(value, "submit") and hasattr(value, "ncores")):
        msg = f"`client` is a dask.distributed.Client or None, found {value!r} of type {type(value).__name__}."
        raise TypeError(msg)
    return value


def _verbosity(value: object) -> int:
    text = str(value).strip()
    if text not in map(str, LEVELS):
        msg = f"`verbosity` is one of {sorted(LEVELS)}, found {value!r}."
        raise ValueError(msg)
    return int(text)


#: Kinds of devices on which torch runs models, and which one of several.
_DEVICE = re.compile(r"(?:cpu|cuda|mps|xpu|hpu|npu|mlu|xla)(?::\d+)?")

#: Precisions of a forward pass.
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Settings:
    """Settings of a session: which model runs, where, and how precisely.

    Each field except `client` is read once from the environment variable of the same name with ``GFX_`` in front.
    Change a field for the whole session by assigning to it, and for some lines with :meth:`override`.
    """

    model: str | None = None
    """Model used where none is named: a published name or a folder. `None`: the embedded `mini`."""
    device: str | tuple[str, ...] | None = None
    """Where the model runs, such as ``"cpu"`` or ``"cuda:0"``; several devices, such as ``["cuda:0", "cuda:1"]`` or
    ``"cuda:0,cuda:1"``, share the cells. `None`: CUDA, then MPS, then the CPU."""
    dtype: str | None = None
    """Precision of forward passes, ``"float32"``, ``"bfloat16"`` or ``"float16"``. `None`: bfloat16 for embeddings
    where it is faster, else float32; float32 for perturbations, because rounding hides the shifts of single genes."""
    batch_tokens: int | None = None
    """Padded tokens in one forward pass; on a CPU, in all passes that run at the same time, of at most 4,096 tokens
    each. `None`: chosen by device. Halved automatically when memory runs out."""
    client: Any = None
    """A `dask.distributed.Client`: blocks of cells run on its workers, which must find the model under the same path.
    `None`: this process runs them."""
    cache_dir: Path | None = None
    """Where fetched checkpoints are kept. `None`: the system's cache folder, else a temporary one."""
    offline: bool = False
    """Never open a connection; say instead which file to put where."""
    verbosity: int = 2
    """0 errors, 1 warnings, 2 what was done. 3 and 4, which scanpy has as well, print no more than 2."""

    def __setattr__(self, name: str, value: Any) -> None:
        convert = {
            "model": str,
            "device": _devices,
            "dtype": _dtype,
            "client": _client,
            "batch_tokens": _whole,
            "cache_dir": lambda path: Path(path).expanduser(),
            "offline": _truth,
            "verbosity": _verbosity,
        }
        if name not in convert:
            msg = f"gfx has no setting {name!r}; it has {', '.join(convert)}."
            raise AttributeError(msg)
        is_unset = value is None and getattr(Settings, name) is None  # `None` is the default of this field
        object.__setattr__(self, name, None if is_unset else convert[name](value))
        if name == "verbosity":
            set_verbosity(self.verbosity)

    @contextmanager
    def override(self, **values: Any) -> Iterator[Settings]:
        """Change settings inside a ``with`` block and restore them afterwards."""
        before = {name: getattr(self, name) for name in values}
        try:
            for name, value in values.items():
                setattr(self, name, value)
            yield self
        finally:
            for name, value in before.items():
                setattr(self, name, value)


def _from_environment() -> Settings:
    found = Settings()
    for field in fields(Settings):
        variable = f"GFX_{field.name.upper()}"
        value = os.environ.get(variable, "")
        if value and field.name != "client":  # an object, which no variable can name
            try:
                setattr(found, field.name, value)
            except ValueError as error:
                msg = f"The environment variable {variable}={value} cannot be used. {error}"
                raise ValueError(msg) from None
    return found


settings = _from_environment()
