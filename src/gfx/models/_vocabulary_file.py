"""The vocabulary beside a model of ours: one compressed table that any program reads."""

from __future__ import annotations

import gzip
import io
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx._core.vocabulary import Vocabulary, plain_id

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY_FILE = "vocabulary.tsv.gz"


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
