"""Classes of genes, as the user gives them: class by class, or a column of `var`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from gfx import _log
from gfx._adata import gene_column
from gfx.tl._gene_sets import refuse_unknown, unknown_genes
from gfx.tl._prepare import check_choice, classes

if TYPE_CHECKING:
    from gfx._core.vocabulary import Vocabulary
    from gfx.tl._prepare import Prepared

Labels = Mapping[str, Iterable[str]] | str

#: What a task is called whose labels come from no column.
TASK = "labels"


@dataclass(frozen=True)
class GeneLabels:
    """Genes with a class.

    Parameters
    ----------
    task
        What the classes are called together.
    classes
        Their names.
    tokens
        The genes, int64 `(n_genes,)`, ascending.
    truth
        Class of each, int64 `(n_genes,)`.
    """

    task: str
    classes: list[str]
    tokens: np.ndarray
    truth: np.ndarray

    def seen(self, is_seen: np.ndarray, n_splits: int) -> GeneLabels:
        """Leave out genes that no cell has, bool `(n_genes,)`; each class needs one in every fold."""
        if not is_seen.all():
            _log.info(f"{(~is_seen).sum():,} of {len(is_seen):,} labelled genes are in none of the cells")
        left = GeneLabels(self.task, self.classes, self.tokens[is_seen], self.truth[is_seen])
        sizes = np.bincount(left.truth, minlength=len(self.classes))
        if sizes.min() < n_splits:
            at = int(sizes.argmin())
            given = int((self.truth == at).sum())
            msg = (
                f"The class {self.classes[at]!r} has {sizes[at]} genes that these cells express (of {given} given), "
                f"fewer than the {n_splits} folds of `n_splits`: each fold holds some of every class out. Give more "
                f"genes or cells, or `n_splits={max(2, sizes[at])}`."
            )
            raise ValueError(msg)
        return left


def find_gene_labels(cells: Prepared, labels: Labels, unknown: Literal["raise", "drop"]) -> GeneLabels:
    """Find the token and the class of each gene.

    Raises
    ------
    ValueError
        Genes that the model does not know, a gene in two classes, fewer than two classes, a class without genes,
        classes that read alike.
    KeyError
        No such column of `var`.
    TypeError
        Neither a mapping nor the name of a column.
    """
    check_choice("unknown", unknown, ("raise", "drop"))
    if isinstance(labels, str) and "/" in labels:
        msg = f"The column {labels!r} has a '/', which files cannot hold in a name. Rename it in `var`."
        raise ValueError(msg)
    if isinstance(labels, str):
        given, task = _of_column(cells, labels), labels
    elif isinstance(labels, Mapping):
        given, task = _of_mapping(labels, cells.model.vocabulary, unknown), TASK
    else:
        msg = (
            "`labels` maps classes to genes, such as {'sensitive': [...], 'insensitive': [...]}, or is the name of a "
            f"column of `var`; found a {type(labels).__name__}."
        )
        raise TypeError(msg)
    if len(given) < 2:
        msg = f"`labels` needs two classes at least, found {list(given)}."
        raise ValueError(msg)
    names = list(given)
    class_of: dict[int, int] = {}
    vocabulary = cells.model.vocabulary
    for at, tokens in enumerate(given.values()):
        for token in tokens:
            if class_of.setdefault(token, at) != at:
                name = str(vocabulary.symbols[token] or vocabulary.ids[token])
                msg = (
                    f"The gene {name!r} ({vocabulary.ids[token]}) is in two classes, {names[class_of[token]]!r} and "
                    f"{names[at]!r}. Keep it in one, or leave it out."
                )
                raise ValueError(msg)
    tokens = np.array(sorted(class_of), dtype=np.int64)
    return GeneLabels(task, names, tokens, np.array([class_of[token] for token in tokens.tolist()], dtype=np.int64))


def _of_column(cells: Prepared, column: str) -> dict[str, list[int]]:
    names, codes = classes(gene_column(cells.adata.var, column), f"adata.var[{column!r}]")
    tokens = cells.gene_tokens
    n_unknown = int(((codes >= 0) & (tokens < 0)).sum())
    if n_unknown:
        _log.info(f"{n_unknown:,} of {(codes >= 0).sum():,} labelled genes are not known to the model")
    found = {name: tokens[(codes == at) & (tokens >= 0)].tolist() for at, name in enumerate(names)}
    return {name: genes for name, genes in found.items() if genes}


def _of_mapping(
    labels: Mapping[str, Iterable[str]], vocabulary: Vocabulary, unknown: Literal["raise", "drop"]
) -> dict[str, list[int]]:
    found = {}
    for name, genes in labels.items():
        if isinstance(genes, str):
            msg = f"The class {name!r} is a list of genes, found the text {genes!r}."
            raise TypeError(msg)
        names = [str(gene) for gene in genes]
        if unknown == "raise":
            refuse_unknown(names, vocabulary, " To go on without such genes: `unknown='drop'`.")
        elif missing := unknown_genes(names, vocabulary):
            _log.info(f"{len(missing):,} of {len(names):,} genes of {name!r} are not known to the model")
        if str(name) in found:
            msg = f"Two classes read {str(name)!r}; give each a name of its own."
            raise ValueError(msg)
        tokens = vocabulary.resolve(names)
        found[str(name)] = tokens[tokens >= 0].tolist()
        if not found[str(name)]:
            msg = f"The class {name!r} has no gene that the model knows; it was given {names[:3]}."
            raise ValueError(msg)
    return found
