"""Where genes go that are moved by quartiles of the ranking, or by a fold change of their counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gfx._core.edits import GONE, find_places, quartile_ranks
from gfx._tokens import counts_by_token

if TYPE_CHECKING:
    from gfx.tl._prepare import Prepared
    from gfx.tl.perturbation._experiment import NewRanks


def check_change(by: object) -> tuple[str, float]:
    """Read how genes are moved, such as ``("quartiles", -1)``, or say what is wrong with it."""
    is_pair = isinstance(by, tuple | list) and len(by) == 2 and by[0] in {"quartiles", "fold_change"}
    is_number = is_pair and isinstance(by[1], int | float | np.number) and not isinstance(by[1], bool)
    if not is_number:
        msg = f"`by` is ('quartiles', n) or ('fold_change', x), found {by!r}."
        raise ValueError(msg)
    unit, change = by
    if unit == "quartiles" and abs(change) not in {1, 2, 3}:
        msg = f"Genes move by 1, 2 or 3 quartiles, or by fewer than 0 to inhibit them; found {change!r}."
        raise ValueError(msg)
    if unit == "fold_change" and not (0 < change < np.inf and change != 1):
        msg = (
            f"A fold change multiplies counts: a positive number other than 1, found {change!r}. "
            "To take a gene out, call `gfx.tl.delete_genes`."
        )
        raise ValueError(msg)
    return unit, change if unit == "quartiles" else float(change)


def rank_finder(cells: Prepared, unit: str, change: float) -> NewRanks:
    """Make what finds the ranks that genes move to, from the cell of each run and its genes."""
    if unit == "fold_change":
        return _by_fold_change(cells, change)
    tokens, vocabulary = cells.tokens, cells.model.vocabulary

    def by_quartiles(cell: np.ndarray, genes: np.ndarray) -> np.ndarray:
        return quartile_ranks(find_places(tokens.padded(cell), genes), tokens.lengths[cell], change, vocabulary)

    return by_quartiles


def _by_fold_change(cells: Prepared, fold_change: float) -> NewRanks:
    """Rank genes whose counts are multiplied among the other genes of their cell as they are."""
    vocabulary, lengths = cells.model.vocabulary, cells.tokens.lengths
    # Not stacked: that would hold them twice.
    blocks = [counts for _, counts, _ in counts_by_token(cells.adata, vocabulary, cells.tokens.source)]
    first = np.cumsum([0, *(block.shape[0] for block in blocks)])

    def ranks(cell: int, genes: np.ndarray) -> list[int]:
        block = int(np.searchsorted(first, cell, side="right")) - 1
        counts, row = blocks[block], cell - first[block]
        part = slice(*counts.indptr[row : row + 2])
        tokens, values = counts.indices[part], counts.data[part]
        tokens, values = tokens[values > 0], values[values > 0]
        is_moved = np.isin(tokens, genes)
        # The ranking of `pp.tokenize`, in its arithmetic to the last bit: by value, ties by token.
        values = np.where(is_moved, values * fold_change, values) / vocabulary.medians[tokens]
        order = np.lexsort((tokens, -values))
        n_unmoved_before = np.cumsum(~is_moved[order])
        n_read = int(lengths[cell]) - vocabulary.n_specials
        rank = {int(tokens[order[place]]): place for place in np.flatnonzero(is_moved[order])}
        # Genes that fall behind the end of the model's input are gone.
        places = [rank.get(int(gene), n_read) for gene in genes]
        return [GONE if place >= n_read else int(n_unmoved_before[place]) for place in places]

    def by_fold_change(cell: np.ndarray, genes: np.ndarray) -> np.ndarray:
        of_runs = [ranks(int(row), of_run) for row, of_run in zip(cell, genes, strict=True)]
        return np.array(of_runs, dtype=np.int64).reshape(genes.shape)

    return by_fold_change
