"""Typed settings, read once from ``GFX_*`` environment variables."""

from __future__ import annotations

import os
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
        msg = f"Expected a whole number above 0, found {value!r}."
        raise ValueError(msg)
    return int(text)


def _verbosity(value: object) -> int:
    text = str(value).strip()
    if text not in map(str, LEVELS):
        msg = f"`verbosity` is one of {sorted(LEVELS)}, found {value!r}."
        raise ValueError(msg)
    return int(text)


@dataclass
class Settings:
    """What holds for a whole session; every field can be given as an argument where it matters.

    Each field is read once from the environment variable of the same name with ``GFX_`` in front.
    """

    model: str | None = None
    """Model used where none is named: a published name or a folder. `None`: the embedded `mini`."""
    device: str | None = None
    """Where the model runs, such as ``"cpu"`` or ``"cuda:0"``. `None`: CUDA, then MPS, then the CPU."""
    batch_tokens: int | None = None
    """Padded tokens in one forward pass. `None`: chosen by device. Halved by itself when memory runs out."""
    cache_dir: Path | None = None
    """Where fetched checkpoints are kept. `None`: the system's cache folder."""
    offline: bool = False
    """Never open a connection; say instead which file to put where."""
    verbosity: int = 2
    """0 errors, 1 warnings, 2 what was done (default), 3 hints, 4 details."""

    def __setattr__(self, name: str, value: Any) -> None:
        convert = {
            "model": lambda v: None if v is None else str(v),
            "device": lambda v: None if v is None else str(v),
            "batch_tokens": lambda v: None if v is None else _whole(v),
            "cache_dir": lambda v: None if v is None else Path(v).expanduser(),
            "offline": _truth,
            "verbosity": _verbosity,
        }
        if name not in convert:
            msg = f"gfx has no setting {name!r}; it has {', '.join(convert)}."
            raise AttributeError(msg)
        object.__setattr__(self, name, convert[name](value))
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
        if value == "":
            continue
        try:
            setattr(found, field.name, value)
        except ValueError as error:
            msg = f"The environment variable {variable}={value} cannot be used. {error}"
            raise ValueError(msg) from None
    return found


settings = _from_environment()
