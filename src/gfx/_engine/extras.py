"""Packages that a plain installation leaves out: the extra that brings each, and one error where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

#: Extra of pip that brings a package. On conda-forge each is installed by its own name.
EXTRA_WITH = {"accelerate": "train", "peft": "lora", "bitsandbytes": "quantized", "optuna": "search"}


def need(what: str, *packages: str) -> None:
    """Refuse `what`, which cannot be done without these packages, where one of them is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        extras = ",".join(EXTRA_WITH[name] for name in missing)
        msg = (
            f"{what} needs {' and '.join(missing)}: `pip install 'scgfx[{extras}]'` or "
            f"`conda install -c conda-forge {' '.join(missing)}`."
        )
        raise ImportError(msg)
