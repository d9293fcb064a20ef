"""Models: which there are, where they are kept, how they are loaded and trained."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from gfx.models._load import Model, load
from gfx.models._methods import FineTuning, LinearProbe
from gfx.models._registry import default_store

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from gfx.models._registry import ModelCard, VocabularyCard
    from gfx.models.pretraining._pretrain import pretrain
    from gfx.models.pretraining._vocabulary import GeneSummary, build_vocabulary, summarize_genes
    from gfx.tl.classification._classify import fine_tune_cells, fine_tune_genes

__all__ = [
    "FineTuning",
    "GeneSummary",
    "LinearProbe",
    "Model",
    "available",
    "build_vocabulary",
    "cached",
    "fetch",
    "fine_tune_cells",
    "fine_tune_genes",
    "info",
    "load",
    "pretrain",
    "summarize_genes",
]

#: Modules of what learns from cells; they are loaded on demand. Fine-tuning reads cells as tools do, so it lives there.
_TRAINING = {
    "GeneSummary": "models.pretraining._vocabulary",
    "build_vocabulary": "models.pretraining._vocabulary",
    "fine_tune_cells": "tl.classification._classify",
    "fine_tune_genes": "tl.classification._classify",
    "pretrain": "models.pretraining._pretrain",
    "summarize_genes": "models.pretraining._vocabulary",
}


def __getattr__(name: str) -> object:
    # Training is loaded when it is asked for.
    if name in _TRAINING:
        return getattr(import_module(f"gfx.{_TRAINING[name]}"), name)
    msg = f"module 'gfx.models' has no attribute {name!r}; it offers {', '.join(__all__)}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return __all__


def available() -> pd.DataFrame:
    """List the models that can be named: the embedded one and every published one.

    Opens no connection.

    Returns
    -------
    One row a model, by name: `parameters`; `input_size` in tokens, special tokens included; `vocabulary`; `specials`,
    its special tokens; `licence`; `megabytes` on disk, vocabulary included; `cached`, whether its files are there;
    `description`.

    Examples
    --------
    >>> import gfx
    >>> models = gfx.models.available()
    >>> models.loc["V2-104M", "vocabulary"]
    'V2'
    >>> models.index[models["parameters"] > 300_000_000].tolist()
    ['V2-316M']
    """
    return default_store().available()


def info(name: str) -> ModelCard | VocabularyCard:
    """Show what is known of a model or vocabulary, without fetching it.

    Parameters
    ----------
    name
        A name that :func:`available` lists, ``"V1"`` or ``"V2"``, in upper or lower case.

    Returns
    -------
    Its card; print it, or read its fields.

    Raises
    ------
    ValueError
        No such name; the text suggests what comes close.

    Examples
    --------
    >>> import gfx
    >>> gfx.models.info("V1-10M")
    V1-10M: The model of the 2023 paper; the smallest published one, and the one to compare with older results.
      parameters  10,288,722 in 6 layers of width 256
      input       up to 2,048 tokens a cell, with <pad> <mask>
      vocabulary  V1
      size        44.6 MB
      licence     Apache-2.0
    """
    return default_store().registry.get(name)


def fetch(name: str) -> Path:
    """Fetch a published model or vocabulary into the cache, unless it is there.

    Files that the Hugging Face cache has already are linked from there (or copied, on Windows without the right to make
    links); the others are downloaded. Every file is checked against its published SHA-256, wherever it comes from, also
    one that was put there by hand. A broken transfer is started again; several processes may fetch the same model at
    once. The cost is the transfer the first time, and after that hashing the files once a session.

    The variables of `huggingface_hub` are honoured: `HF_HUB_CACHE` and `HF_HOME` say where its cache is, and
    `HF_ENDPOINT` names a mirror to download from.

    Parameters
    ----------
    name
        A name that :func:`available` lists, ``"V1"`` or ``"V2"``, in upper or lower case.

    Returns
    -------
    The folder that holds the model and the dictionaries of its vocabulary. It lies in `gfx.settings.cache_dir`
    (`GFX_CACHE_DIR`), else in the system's cache folder.

    Raises
    ------
    ValueError
        No such name.
    RuntimeError
        The files could not be fetched or written, came with other bytes than published, or `gfx.settings.offline`
        (`GFX_OFFLINE=1`) is set. The text names each missing file, its address, size, hash, and where to put it by
        hand.

    Examples
    --------
    >>> import gfx
    >>> (gfx.models.fetch("mini") / "config.json").is_file()
    True
    """
    return default_store().fetch(name)


def cached() -> pd.DataFrame:
    """List the models and vocabularies in the cache.

    Returns
    -------
    One row each, by name: `complete`, whether all files are there; `megabytes` on disk; `folder`.

    Examples
    --------
    >>> import gfx
    >>> gfx.models.cached().columns.tolist()
    ['complete', 'megabytes', 'folder']
    """
    return default_store().cached()
