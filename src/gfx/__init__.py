"""Geneformer for AnnData: tokenize raw counts, embed cells and genes, delete genes in silico, read attention."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

from gfx._settings import settings

if TYPE_CHECKING:
    from gfx import datasets, get, models, pl, pp, tl

__version__ = version("scgfx")
__all__ = ["__version__", "datasets", "get", "models", "pl", "pp", "settings", "tl"]

_SUBMODULES = frozenset({"datasets", "get", "models", "pl", "pp", "tl"})


def __getattr__(name: str) -> object:
    # PEP 562: `import gfx` stays quick; a submodule loads when it is first used.
    if name in _SUBMODULES:
        return importlib.import_module(f"gfx.{name}")
    msg = f"module 'gfx' has no attribute {name!r}; it offers {', '.join(__all__)}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return __all__
