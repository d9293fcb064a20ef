"""Classes of genes and of cells, as users give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from gfx import _log
from gfx._adata import gene_column, gene_names, obs_column
from gfx._core.arguments import check_choice
from gfx.tl._gene_sets import refuse_unknown, unknown_genes

if TYPE_CHECKING:
    import pandas as pd

    from gfx._core.vocabulary import Vocabulary
    from gfx.tl._prepare import Prepared

GeneLabels = Mapping[str, Iterable[str]] | str

#: Name of a task whose labels come from no column.
TASK = "labels"


# --- genes ----------------------------------------------------------------------------------------------------------


def find_gene_labels(
    prepared: Prepared, labels: GeneLabels, unknown: Literal["raise", "drop"]
) -> tuple[str, list[str], np.ndarray]:
    """Find the name of the task, the names of its classes, and the class of each token, int64 `(n_tokens,)`, or -1."""
    check_choice(unknown, "unknown", ("raise", "drop"))
    vocabulary = prepared.model.vocabulary
    if isinstance(labels, str):
        tokens_of, task = _genes_of_column(prepared, labels), labels
    elif isinstance(labels, Mapping):
        tokens_of, task = _genes_of_mapping(labels, vocabulary, unknown), TASK
    else:
        msg = (
            "`labels` maps classes to genes, such as {'sensitive': [...], 'insensitive': [...]}, or is the name of a "
            f"column of `var`; found a {type(labels).__name__}."
        )
        raise TypeError(msg)
    names = list(tokens_of)
    if len(names) < 2:
        msg = f"`labels` needs two classes at least, found {names}."
        raise ValueError(msg)
    class_of = np.full(len(vocabulary), -1, dtype=np.int64)
    for number, tokens in enumerate(tokens_of.values()):
        for token in tokens[class_of[tokens] >= 0]:
            msg = (
                f"The gene {str(vocabulary.symbols[token] or vocabulary.ids[token])!r} ({vocabulary.ids[token]}) is in "
                f"two classes, {names[class_of[token]]!r} and {names[number]!r}. Keep it in one, or leave it out."
            )
            raise ValueError(msg)
        class_of[tokens] = number
    return task, names, class_of


def _genes_of_column(prepared: Prepared, column: str) -> dict[str, np.ndarray]:
    _refuse_slash(column, "var")
    names, codes = classes(gene_column(prepared.adata.var, column), f"adata.var[{column!r}]")
    tokens, labelled = prepared.gene_tokens, codes >= 0
    known = labelled & (tokens >= 0)
    if not known[labelled].all():
        n_unknown = labelled.sum() - known.sum()
        _log.info(f"{n_unknown:,} of {labelled.sum():,} labelled genes are not known to the model")
    return {name: tokens[known & (codes == number)] for number, name in enumerate(names) if number in codes[known]}


def _genes_of_mapping(
    labels: Mapping[str, Iterable[str]], vocabulary: Vocabulary, unknown: Literal["raise", "drop"]
) -> dict[str, np.ndarray]:
    tokens_of: dict[str, np.ndarray] = {}
    for name, genes in labels.items():
        if isinstance(genes, str):
            msg = f"The class {name!r} is a list of genes, found the text {genes!r}."
            raise TypeError(msg)
        if str(name) in tokens_of:
            msg = f"Two classes read {str(name)!r}; give each a name of its own."
            raise ValueError(msg)
        if not isinstance(genes, Iterable):
            msg = f"The class {name!r} is a list of genes, found {genes!r} of type {type(genes).__name__}."
            raise TypeError(msg)
        given = [str(gene) for gene in genes]
        if unknown == "raise":
            refuse_unknown(given, vocabulary, " To go on without such genes: `unknown='drop'`.")
        elif missing := unknown_genes(given, vocabulary):
            _log.info(f"{len(missing):,} of {len(given):,} genes of {name!r} are not known to the model")
        tokens = vocabulary.resolve(given)
        tokens_of[str(name)] = tokens[tokens >= 0]
        if not (tokens >= 0).any():
            msg = f"The class {name!r} has no gene that the model knows; it was given {given[:3]}."
            raise ValueError(msg)
    return tokens_of


# --- cells ----------------------------------------------------------------------------------------------------------


def find_cell_labels(
    prepared: Prepared, groupby: str | Iterable[str], donor_key: str | None
) -> tuple[str, dict[str, tuple[list[str], np.ndarray]]]:
    """Read columns of `obs` as tasks: the one that the user named first, and the classes of each.

    Tasks are sorted by name because files keep no other order. Each has the names of its classes and the class of each
    cell, int64 `(n_obs,)`, -1 for none.
    """
    if not isinstance(groupby, Iterable):
        msg = f"`groupby` names columns of `obs`, found {groupby!r} of type {type(groupby).__name__}."
        raise TypeError(msg)
    columns = [groupby] if isinstance(groupby, str) else [str(column) for column in groupby]
    if not columns or len(set(columns)) < len(columns):
        msg = f"`groupby` names columns of `obs`, each once; found {columns}."
        raise ValueError(msg)
    if donor_key in columns:
        msg = (
            f"`donor_key={donor_key!r}` is among the columns of `groupby`: no class of a held-out donor would be known."
        )
        raise ValueError(msg)
    tasks = {}
    for column in columns:
        _refuse_slash(column, "obs")
        tasks[column] = classes(obs_column(prepared.adata, column), f"adata.obs[{column!r}]")
    return columns[0], dict(sorted(tasks.items()))


def check_classes_of_cells(column: str, names: list[str], counts: np.ndarray, n_splits: int) -> None:
    """Refuse a task of one class, and a class that is not in every fold."""
    if len(names) < 2:
        msg = f"`adata.obs[{column!r}]` has {len(names)} class among the cells to use, {names}; two are needed."
        raise ValueError(msg)
    few = [f"{name!r} ({n})" for name, n in zip(names, counts.tolist(), strict=True) if n < n_splits]
    if few:
        more = f" and {len(few) - 10:,} more" if len(few) > 10 else ""
        msg = (
            f"Classes of {column!r} with fewer cells than the {n_splits} folds of `n_splits`: "
            f"{', '.join(few[:10])}{more}. Leave them out with `mask_obs`, or set them to missing in that column."
            + (" Cut numbers into classes first, such as with `pandas.cut`." if more else "")
        )
        raise ValueError(msg)


def find_donors(prepared: Prepared, donor_key: str, rows: np.ndarray, n_splits: int) -> np.ndarray:
    """Read the donor of each cell, int64 `(n_obs,)`; every cell to use, `rows`, has one."""
    column = obs_column(prepared.adata, donor_key)
    column = column.where(gene_names(column) != "")  # "nan" is no donor
    names, donor = classes(column, f"adata.obs[{donor_key!r}]")
    n_missing = int((donor[rows] < 0).sum())
    if n_missing:
        msg = (
            f"{n_missing:,} of {len(rows):,} cells have no {donor_key!r}, so they may be of a held-out donor. "
            "Leave them out with `mask_obs`."
        )
        raise ValueError(msg)
    present = [names[number] for number in np.unique(donor[rows])]
    if len(present) < n_splits:
        remedy = f"`n_splits={len(present)}`" if len(present) > 1 else "no `donor_key`, which says less"
        msg = (
            f"`adata.obs[{donor_key!r}]` has {len(present)} donors, {present}, fewer than the {n_splits} folds of "
            f"`n_splits`; a donor is held out as a whole. Use {remedy}."
        )
        raise ValueError(msg)
    return donor


def _refuse_slash(column: str, element: str) -> None:
    if "/" in column:
        msg = f"The column {column!r} has a '/', which files cannot hold in a name. Rename it in `{element}`."
        raise ValueError(msg)


def classes(values: pd.Series, where: str) -> tuple[list[str], np.ndarray]:
    """Read a column as classes: their names, and the class of each row, int64, -1 for none.

    Blank text is no class: that is how tables that were written by hand, or read from CSV, leave a row out. Two values
    that are one as text are refused, because names of classes are text.
    """
    values = values.astype("category")
    column = values.cat.set_categories([name for name in values.cat.categories if str(name).strip()])
    column = column.cat.remove_unused_categories()
    names = [str(name) for name in column.cat.categories]
    alike = sorted({name for name in names if names.count(name) > 1})
    if alike:
        kinds = sorted({type(name).__name__ for name in column.cat.categories if str(name) in alike})
        msg = (
            f"`{where}` has values of several types ({', '.join(kinds)}) that read alike as text: {alike}. Write each "
            f"class in one way, as `{where}.astype(str)` does where no value is missing."
        )
        raise ValueError(msg)
    return names, column.cat.codes.to_numpy(dtype=np.int64)
