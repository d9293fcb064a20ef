"""AnnData or MuData in, what the core needs out: the modality, the counts row by row, the genes' tokens."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import pandas as pd
from scipy import sparse

from gfx._core.arguments import did_you_mean
from gfx._core.batching import ahead
from gfx._core.gene_names import Species, foreign_species, name_kind, no_gene, numbered, shared_prefix
from gfx._core.scales import UNDO, recover_counts, scale_of

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from anndata import AnnData

    from gfx._core.scales import Scale
    from gfx._core.vocabulary import Vocabulary
    from gfx._types import Data, Mask

T = TypeVar("T")

Counts = Literal["raw", "normalized", "log1p", "estimated"]
COUNTS: tuple[str, ...] = ("raw", "normalized", "log1p", "estimated")

#: Below these the genes are taken for another species or another kind of id.
MIN_GENES = 10
MIN_SHARE = 0.1

#: log1p of any depth normalisation in use (a million at most) stays below this.
_LOG_CEILING = 15.0

#: Estimated counts below this are 0, the nearest whole number.
DETECTED = 0.5

#: What tables write where they have no gene; in a column full of them they are no symbols.
_NO_NAME = frozenset({"", "nan", "na", "<na>", "none", "null", "-", "."})

#: Column of `var` in which 10x says what each row counts; its words, and those of others, for genes and for all else.
_FEATURE_TYPES = "feature_types"
_GENE_TYPES = frozenset({"gene expression", "gene", "genes", "gex", "rna"})
_OTHER_TYPES = ("antibody", "antigen", "crispr", "multiplex", "hashtag", "peak", "custom", "vdj", "atac", "adt", "hto")

#: Numbers behind the name of a gene are guides, and no repetitions, where genes have as many on average.
_GUIDES_PER_GENE = 2


# --- containers ----------------------------------------------------------------------------------------------------


def pick(data: Data, mod: str | None) -> AnnData:
    """Find the AnnData to work on: `data` itself, or the modality `mod` of a MuData."""
    classes = type(data).__mro__  # by their names, so that mudata need not load
    if any(cls.__module__.partition(".")[0] == "mudata" and cls.__name__ == "MuData" for cls in classes):
        names = list(data.mod)
        if mod is None and len(names) != 1:
            msg = f"This MuData has {len(names)} modalities; say which one holds RNA counts: `mod=` one of {names}."
            raise ValueError(msg)
        if mod is not None and mod not in names:
            msg = f"Did not find modality {mod!r} in this MuData. Present: {names}."
            raise KeyError(msg)
        return data.mod[names[0] if mod is None else mod]
    if mod is not None:
        msg = f"`mod={mod!r}` is for MuData; found {type(data).__name__}. Leave `mod` out."
        raise TypeError(msg)
    if not (hasattr(data, "obs_names") and hasattr(data, "obsm")):
        msg = f"Expected an AnnData or MuData, found {type(data).__name__}."
        raise TypeError(msg)
    return data


def copied(data: Data, *, copy: bool) -> Data:
    """Return `data` to work on, or a copy of it; a file-backed object is not copied in memory by accident."""
    if getattr(data, "isbacked", False) and (copy or getattr(data, "is_view", False)):
        what = "`copy=True` does not work on a file-backed object" if copy else "A view of a file cannot hold results"
        msg = f"{what}. Call `.to_memory()` first, and work on what it returns."
        raise ValueError(msg)
    return data.copy() if copy else data


def shortened(names: Sequence[object]) -> str:
    """List names in a message: the first ten, and how many more there are."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return f"{list(names[:10])}{more}"


def group_name(value: object, names: Container[str]) -> str:
    """Name a group as its column does: as text, where 0, "0" and "0.0" are one number, whole or stored as a float."""
    text = str(value)
    whole = text.removesuffix(".0")
    same = (text, whole, f"{whole}.0") if whole.lstrip("-").isdecimal() else (text,)
    return next((name for name in same if name in names), text)


def obs_column(adata: AnnData, key: str) -> pd.Series:
    """Read a column of `obs`, or say which ones there are."""
    return column_of(adata.obs, key, "adata.obs")


def column_of(frame: pd.DataFrame, key: str, where: str) -> pd.Series:
    """Read a column of a table, into memory if it is a lazily read one, or say which ones there are."""
    if not isinstance(key, str | int):
        msg = f"A column of `{where}` is named by text, found {key!r} of type {type(key).__name__}."
        raise TypeError(msg)
    if (n := list(frame.columns).count(key)) > 1:
        msg = f"`{where}` has {n} columns named {key!r}. Rename all but one."
        raise ValueError(msg)
    if not n:
        names = sorted(map(str, frame.columns))
        msg = f"Did not find {key!r} in `{where}`.{did_you_mean(str(key), names)} Present: {names}."
        raise KeyError(msg)
    return frame[key] if isinstance(frame, pd.DataFrame) else frame[[key]].to_memory()[key]


def cell_mask(adata: AnnData, mask_obs: Mask | None) -> np.ndarray:
    """Turn a boolean `obs` column, array or series by cell name into a mask, bool `(n_obs,)`."""
    if mask_obs is None:
        return np.ones(adata.n_obs, dtype=bool)
    if isinstance(mask_obs, str):
        mask = obs_column(adata, mask_obs)
    elif isinstance(mask_obs, pd.Series):  # its own names say which cell is meant, not its order
        mask = mask_obs.reindex(adata.obs_names)
    else:
        mask = np.asarray(mask_obs)
    n_missing = int(np.sum(pd.isna(mask)))
    if n_missing:
        msg = f"`mask_obs` is one truth value per cell; {n_missing:,} of {mask.size:,} are missing."
        raise ValueError(msg)
    if not pd.api.types.is_bool_dtype(mask) or mask.shape != (adata.n_obs,):
        msg = (
            f"`mask_obs` is one truth value per cell: expected bool of shape ({adata.n_obs},), "
            f"found {mask.dtype} of shape {mask.shape}."
        )
        raise ValueError(msg)
    mask = np.asarray(mask, dtype=bool)
    if not mask.any():
        msg = "`mask_obs` selects no cell."
        raise ValueError(msg)
    return mask


# --- counts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CountMatrix:
    """Counts of genes where the user said they are."""

    x: object  # cells × columns: numpy, scipy sparse, dask, or a dataset on disk
    genes: Genes  # what its columns are
    where: str  # how to call this matrix in a message
    argument: str  # the argument of functions that names it, such as "layer='counts'"; "" for `X`

    @property
    def names(self) -> np.ndarray:
        """Names of the genes to look up, `(n_genes,)`."""
        return self.genes.names[self.genes.is_gene]

    def blocks(self) -> Iterator[tuple[slice, sparse.csr_array]]:
        """Walk over the counts of genes in blocks of rows, as :func:`row_blocks` does."""
        if self.x.shape[1] != len(self.genes.is_gene):
            _refuse_damaged(f"it has {self.x.shape[1]:,} columns, and {len(self.genes.is_gene):,} genes are named")
        for rows, block in row_blocks(self.x):
            yield rows, block if self.genes.is_gene.all() else block[:, self.genes.is_gene]


def check_place(layer: str | None, *, use_raw: bool) -> None:
    """Refuse two places for the counts."""
    if use_raw and layer is not None:
        msg = f"Give either `layer={layer!r}` or `use_raw=True`, not both."
        raise ValueError(msg)


def name_place(layer: str | None, *, use_raw: bool) -> tuple[str, str]:
    """Name a matrix: by the argument of functions that gives it, "" for `X`, and as messages do."""
    if use_raw:
        return "use_raw=True", "adata.raw.X"
    return ("", "adata.X") if layer is None else (f"layer={layer!r}", f"adata.layers[{layer!r}]")


def open_counts(
    adata: AnnData, *, layer: str | None = None, use_raw: bool = False, gene_ids: str | None = None
) -> CountMatrix:
    """Find the counts and the gene names that belong to them; reads no values."""
    check_place(layer, use_raw=use_raw)
    if use_raw and adata.raw is None:
        msg = "`use_raw=True`, but this object has no `.raw`. Name the layer that holds the counts instead."
        raise ValueError(msg)
    layers = sorted(key for key in adata.layers if key is not None)
    if layer is not None and layer not in layers:
        msg = f"Did not find {layer!r} in `adata.layers`. Present: {layers}."
        raise KeyError(msg)
    _check_parent(adata, layer)
    holder, name = (adata.raw, "adata.raw") if use_raw else (adata, "adata")
    x = holder.X if layer is None else adata.layers[layer]
    argument, where = name_place(layer, use_raw=use_raw)
    if x is None:
        msg = f"`{where}` is empty. Name the layer that holds the counts: `layer=` one of {layers}."
        raise ValueError(msg)
    return CountMatrix(x=x, genes=read_genes(holder.var, gene_ids, f"{name}.var"), where=where, argument=argument)


@dataclass(frozen=True)
class Genes:
    """What the rows of `var` are: the one place where it is decided what counts as a gene."""

    names: np.ndarray  # empty where there is no name or no gene, `(n_vars,)`
    is_gene: np.ndarray  # bool `(n_vars,)`
    others: Mapping[str, int]  # kinds of what is no gene, and how many of each

    @property
    def left_out(self) -> str:
        """Say what is no gene, such as ``"12 Antibody Capture, 92 spike-ins"``."""
        return ", ".join(f"{n:,} {kind}" for kind, n in self.others.items())


def read_genes(var: pd.DataFrame, gene_ids: str | None, where: str = "adata.var") -> Genes:
    """Read the names of the genes in `var`, and tell them from proteins, guides, hashtags, peaks and spike-ins.

    A column of feature types says so, as 10x writes it; else, and for spike-ins, the names themselves.
    """
    if not isinstance(gene_ids, str | int | None):
        msg = (
            f"`gene_ids` is the name of a column of `{where}`, found a {type(gene_ids).__name__}. Put the names of "
            "genes into a column, one for each gene, and give its name."
        )
        raise TypeError(msg)
    names = gene_names(gene_column(var, gene_ids, where))
    is_there = list(var.columns).count(_FEATURE_TYPES) == 1
    types = gene_names(gene_column(var, _FEATURE_TYPES, where)) if is_there else np.full(len(names), "")
    words = [str(kind).strip().lower() for kind in types]
    is_typed = not _GENE_TYPES.isdisjoint(words)
    if not is_typed and any(word.startswith(_OTHER_TYPES) for word in words):
        msg = (
            f"`{where}[{_FEATURE_TYPES!r}]` has no row of 'Gene Expression', only {sorted(set(types) - {''})}. Give "
            "the object, or the modality of a MuData (`mod=`), that holds the counts of genes."
        )
        raise ValueError(msg)
    is_other = np.array([is_typed and word != "" and word not in _GENE_TYPES for word in words], dtype=bool)
    kinds = np.where(is_other, types, "")
    for texts in (names,) if gene_ids is None else (names, gene_names(var.index)):
        kinds = np.where(kinds == "", [no_gene(text) or "" for text in texts], kinds)
    is_gene = kinds == ""
    return Genes(np.where(is_gene, names, ""), is_gene, Counter(kinds[~is_gene].tolist()))


def gene_column(var: pd.DataFrame, gene_ids: str | None, where: str = "adata.var") -> pd.Index | pd.Series:
    """Read the names of the genes: the column `gene_ids` of `var`, or its index."""
    return var.index if gene_ids is None else column_of(var, gene_ids, where)


def gene_names(names: pd.Index | pd.Series) -> np.ndarray:
    """Return names as text, empty where a table has none."""
    # Through objects: of a text column, pandas 3 keeps missing values as numbers.
    texts = [str(name) for name in names.astype(object)]
    none = np.asarray(names.isna()) | np.array([text.strip().lower() in _NO_NAME for text in texts], dtype=bool)
    return np.where(none, "", np.array(texts, dtype=object))


#: Values that are read from disk together, and of a dense matrix those that are looked at together.
_SPARSE_PIECE, _DENSE_PIECE = 1 << 21, 1 << 23

#: Runs of rows that are looked at where a look at all would take too long, and rows in each.
_RUNS, _RUN = 4, 32


def row_blocks(x: object, size: int = 2048) -> Iterator[tuple[slice, sparse.csr_array]]:
    """Walk over any matrix in blocks of rows, each a CSR array; no other function looks at the matrix type.

    A CSC matrix is turned into CSR once, one on disk is read into memory for that. From other matrices on disk, rows
    are read while the caller works on those before. A block may share its values with `x`: do not change them.
    """
    first = 0
    for piece in _pieces(x):
        piece = _sorted_by_rows(piece)  # noqa: PLW2901 - once, not per block
        # A block of a dense matrix is looked at as a whole: keep it as small as a sparse one.
        step = size if sparse.issparse(piece) else max(1, min(size, _DENSE_PIECE // max(1, piece.shape[1])))
        for start in range(0, piece.shape[0], step):
            stop = min(start + step, piece.shape[0])
            yield slice(first + start, first + stop), _rows(piece, start, stop)
        first += piece.shape[0]


def some_rows(adata: AnnData, **place: object) -> Iterator[tuple[slice, CountMatrix]]:
    """Take the counts of some cells from all parts of the matrix; `place` as in :func:`open_counts`.

    This is cheap wherever the counts are. Of dask arrays only the first chunk is computed, and a CSC matrix on disk,
    all of which would have to be read, gives none.
    """
    matrix, n = None, adata.n_obs
    if not adata.is_view:  # all counts of a view would be copied
        matrix = open_counts(adata, **place)
        if sparse.issparse(matrix.x) and matrix.x.format in {"csr", "csc"}:
            _check_pointers(matrix.x.indptr, matrix.x.shape[matrix.x.format == "csc"], matrix.x.data, matrix.x.indices)
        elif getattr(matrix.x, "format", None) == "csc":
            return
        elif hasattr(matrix.x, "compute"):
            n = matrix.x.chunks[0][0]
    starts = np.unique(np.linspace(0, max(0, n - _RUN), _RUNS).astype(int)).tolist()
    for start, following in pairwise([*starts, n]):
        rows = slice(start, min(start + _RUN, following))
        yield rows, open_counts(adata[rows], **place) if matrix is None else replace(matrix, x=matrix.x[rows])


def _pieces(x: object) -> Iterator[object]:
    """Bring a matrix into memory, as many rows at a time as are best read together."""
    if sparse.issparse(x) or isinstance(x, np.ndarray):
        yield x
    elif getattr(x, "format", None) == "csc":
        data, indices, indptr = _arrays(x)
        yield _from_columns(data[()], indices[()], indptr, x.shape)
    elif hasattr(x, "compute"):  # dask: along its own chunks, so that none is computed twice
        for start, stop in pairwise(np.cumsum((0, *x.chunks[0]))):
            yield x[start:stop].compute()
    elif getattr(x, "format", None) == "csr":
        # Slices of the stored arrays: to index the matrix of anndata takes twice as long.
        data, indices, indptr = _arrays(x)
        _check_pointers(indptr, x.shape[0], data, indices)
        indptr = _signed(indptr)
        yield from _read_ahead(partial(_csr, (data, indices, indptr), x.shape[1]), indptr, _SPARSE_PIECE)
    else:
        begins = np.arange(x.shape[0] + 1) * max(1, x.shape[1])
        yield from _read_ahead(lambda start, stop: x[start:stop], begins, _DENSE_PIECE)


def _read_ahead(read: Callable[[int, int], T], begins: np.ndarray, most: int) -> Iterator[T]:
    """Read rows, at most `most` values together, in a thread that is one piece ahead; row `i` is at `begins[i]`."""
    with ThreadPoolExecutor(1) as pool:

        def submitted() -> Iterator[tuple[int, Future[T]]]:
            start = 0
            while start < len(begins) - 1:
                stop = max(start + 1, int(np.searchsorted(begins, begins[start] + most, side="right")) - 1)
                yield start, pool.submit(read, start, stop)
                start = stop

        for _, piece in ahead(submitted(), 2):
            yield piece


def _arrays(x: Any) -> tuple[Any, Any, np.ndarray]:
    """Find the arrays of a sparse matrix on disk, and read where its rows, or columns, begin."""
    if missing := {"data", "indices", "indptr"} - set(x.group):
        _refuse_damaged(f"it has no `{'` and no `'.join(sorted(missing))}`")
    return x.group["data"], x.group["indices"], np.asarray(x.group["indptr"][()])


def _sorted_by_rows(x: object) -> object:
    """Turn any sparse matrix into CSR, and check where its rows begin."""
    if not sparse.issparse(x):
        return x
    if x.format == "csc":
        return _from_columns(x.data, x.indices, x.indptr, x.shape)
    if x.format == "csr":
        _check_pointers(x.indptr, x.shape[0], x.data, x.indices)
    return x.tocsr()  # CSR itself if it is that


def _from_columns(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, shape: tuple[int, int]
) -> sparse.csr_array:
    """Turn the stored arrays of a CSC matrix into CSR."""
    _check_pointers(indptr, shape[1], data, indices)
    _check_indices(indices, shape[0])
    _check_numbers(data)
    return sparse.csc_array((_native(data), _signed(indices), _signed(indptr)), shape=shape).tocsr()


def _rows(x: object, start: int, stop: int) -> sparse.csr_array:
    """Take rows; those of a sparse matrix in memory without a copy."""
    if sparse.issparse(x):
        return _csr((x.data, x.indices, x.indptr), x.shape[1], start, stop)
    block = x[start:stop]
    if not isinstance(block, np.ndarray):
        msg = (
            f"Cannot read counts from a {type(block).__module__}.{type(block).__name__}. Use a numpy, scipy sparse or "
            "dask array, or one on disk."
        )
        raise NotImplementedError(msg)
    _check_numbers(block)
    if np.ma.is_masked(block):  # what is masked is not known
        block = block.astype(np.float64).filled(np.nan)
    return sparse.csr_array(_native(np.asarray(block)))


def _csr(stored: tuple[Any, Any, np.ndarray], n_columns: int, start: int, stop: int) -> sparse.csr_array:
    """Take rows of the stored arrays, and check that each value is in a column."""
    data, indices, indptr = stored
    part, indptr = slice(indptr[start], indptr[stop]), indptr[start : stop + 1]
    data, indices = data[part], indices[part]
    _check_indices(indices, n_columns)
    _check_numbers(data)
    data = _native(data)
    # Set, not given to the constructor, which copies what is a small part of a large array.
    block = sparse.csr_array((stop - start, n_columns), dtype=data.dtype)
    block.data, block.indices, block.indptr = data, _signed(indices), _signed(indptr) - int(indptr[0])
    return block


def _native(values: np.ndarray) -> np.ndarray:
    """Bring numbers into the byte order of this machine, and half precision into one that scipy knows."""
    return values.astype(np.float32 if values.dtype == np.float16 else values.dtype.newbyteorder("="), copy=False)


def _signed(indices: np.ndarray) -> np.ndarray:
    """Bring indices that were checked into a type that scipy knows."""
    return _native(indices) if indices.dtype.kind == "i" and indices.itemsize >= 4 else indices.astype(np.int64)


def _check_numbers(values: np.ndarray) -> None:
    if values.dtype.kind not in "biuf":
        msg = f"Counts are numbers, found values of type {values.dtype}."
        raise TypeError(msg)


# Compiled code follows indices without a look at them: one that points outside the matrix would end the interpreter.


def _check_pointers(indptr: np.ndarray, n: int, data: object, indices: object) -> None:
    """Refuse a sparse matrix whose rows, or columns, do not lie one behind the other within its values."""
    if data.shape != indices.shape or len(data.shape) != 1:
        _refuse_damaged(f"`data` and `indices` are not lists of the same size, but {data.shape} and {indices.shape}")
    if indptr.dtype.kind not in "iu" or indptr.shape != (n + 1,) or indptr[0] != 0 or indptr[-1] > data.shape[0]:
        _refuse_damaged(f"`indptr` does not lead through its {data.shape[0]:,} values")
    if (indptr[1:] < indptr[:-1]).any():
        _refuse_damaged("`indptr` falls")


def _check_parent(adata: AnnData, layer: str | None) -> None:
    """Refuse a view of a damaged sparse matrix: to take its cells and genes follows the indices, too."""
    if not adata.is_view or (parent := getattr(adata, "_adata_ref", None)) is None:
        return
    x = parent.X if layer is None else parent.layers[layer]
    if sparse.issparse(x) and x.format in {"csr", "csc"}:
        is_csc = x.format == "csc"
        _check_pointers(x.indptr, x.shape[is_csc], x.data, x.indices)
        if is_csc or not adata.var_names.equals(parent.var_names):  # whole rows are taken without a look at indices
            _check_indices(x.indices, x.shape[not is_csc])


def _check_indices(indices: np.ndarray, n: int) -> None:
    """Refuse indices outside a matrix that has `n` columns, or rows."""
    if indices.dtype.kind not in "iu":
        _refuse_damaged(f"`indices` are of type {indices.dtype}")
    lowest, highest = indices.min(initial=0), indices.max(initial=0)
    if lowest < 0 or (highest >= n and indices.size):
        _refuse_damaged(f"`indices` go from {lowest} to {highest}, and there are {n:,}")


def _refuse_damaged(what: str) -> None:
    msg = f"This matrix is damaged: {what}. Make the matrix, or copy the file, again from where it came from."
    raise ValueError(msg)


def to_counts(block: sparse.csr_array, counts: Counts, where: str) -> sparse.csr_array:
    """Return what :func:`read_counts` makes of a block, or raise a `ValueError` that says what is wrong with it."""
    read = read_counts(block, counts, where)
    if read.problem:
        raise ValueError(" ".join(read.problem))
    return read.counts


@dataclass(frozen=True)
class BlockOfCounts:
    """What a block of stored values was read as."""

    counts: sparse.csr_array  # the counts; where there is a problem, the values, summed by cell and column
    scale: Scale
    problem: tuple[str, str] | None  # what was found, and what to call instead


def read_counts(block: sparse.csr_array, counts: Counts, where: str) -> BlockOfCounts:
    """Check the stored values of a block, and undo the logarithm or the division by depth that `counts` names.

    Where each value of a cell is a whole multiple of the smallest, as division by depth leaves it, the whole numbers
    themselves come back, free of the rounding that logarithms and float32 brought. Of estimated counts, those below
    half a molecule are 0. A problem are negative, missing or infinite values, and values that are visibly not what
    `counts` says.
    """
    scale = scale_of(block)
    if counts != "raw" or scale not in {"counts", "empty"}:
        block = summed(block)
        scale = scale_of(block)
    problem = counts_problem(scale, counts, block.data, where)
    if problem or scale in {"counts", "empty"}:
        return BlockOfCounts(block, scale, problem)
    if counts == "estimated":
        block.data[block.data < DETECTED] = 0
        block.eliminate_zeros()
        return BlockOfCounts(block, scale, None)
    block.data = UNDO[counts](block.data)
    return BlockOfCounts(recover_counts(block), scale, None)


def read_leniently(block: sparse.csr_array, counts: Counts) -> tuple[sparse.csr_array | None, bool]:
    """Read values that were counts of this kind once, and may have been normalised since; and whether in their order.

    `None` are values that tell nothing, such as scaled ones. Of some, such as estimated counts, only those that are
    above 0 are known to be those that were.
    """
    block = summed(block)
    scale = scale_of(block)
    if scale in {"missing", "infinite", "negative"}:
        return None, False
    if scale in UNDO:
        block.data = UNDO[scale](block.data)
        block = recover_counts(block)
    return block, keeps_order(scale, counts)


def summed(block: sparse.csr_array) -> sparse.csr_array:
    """Return a copy in float64 in which each cell names a column once, and none with 0."""
    block = block.astype(np.float64, copy=True)  # first: sums of small integers would overflow
    block.sum_duplicates()
    block.eliminate_zeros()
    return block


#: How each scale of values is read, where it can be; a better way comes before a worse one.
READ_AS: dict[str, Counts] = {
    "counts": "raw",
    "log1p": "log1p",
    "normalized": "normalized",
    "estimated": "estimated",
    "estimated normalized": "normalized",
    "estimated log1p": "log1p",
    "few negative": "estimated",
}

_ACCEPTED: dict[str, frozenset[str]] = {
    "raw": frozenset({"empty", "counts"}),
    "normalized": frozenset({"empty", "counts", "normalized", "estimated", "estimated normalized"}),
    "log1p": frozenset({"empty", "log1p", "estimated", "estimated log1p"}),
    "estimated": frozenset({"empty", "counts", "estimated", "estimated normalized", "few negative"}),
}

#: What is said of values that :func:`keeps_order` says no of.
ANOTHER_ORDER = "Genes are ranked by these values; this is not the order of the counts."


def keeps_order(scale: Scale, counts: Counts) -> bool:
    """Whether values of this scale, read as `counts`, give the tokens of the raw counts."""
    return scale in {"empty", "counts"} or (scale in UNDO and counts != "estimated")


#: What values are that bear no mark of counts, by their scale.
_ESTIMATED: dict[str, str] = {
    "estimated": "estimated counts, as of SoupX, CellBender, decontX, alevin or kallisto, or FPKM",
    "estimated normalized": "TPM, or estimated counts divided by depth, for all cells have the same sum",
    "few negative": "estimated counts with a few small negative values, as CellBender and imputation leave them",
}


def counts_problem(scale: Scale, counts: Counts, values: np.ndarray, where: str) -> tuple[str, str] | None:
    """Say what is wrong with values of this scale where `counts` was promised, and what to call instead."""
    highest = values.max(initial=0)
    is_undetected = counts == "estimated" and 0 < highest < DETECTED
    if scale in _ACCEPTED[counts] and not is_undetected and (counts != "log1p" or highest <= _LOG_CEILING):
        return None
    remedy = "Raw counts, if the object has them, are in a layer (`layer=`) or in `raw` (`use_raw=True`)."
    base = scale.removeprefix("estimated ").removeprefix("log")
    example = next(iter(values[values != np.rint(values)]), highest)
    fractions = f"fractions, such as {example:.4g}, and up to {highest:.4g}"
    match scale:
        case "missing":
            found = "NaN values; counts are finite"
            remedy += (
                " Masked values count as NaN. An outer join of dense matrices with different genes makes NaN: join "
                'again with `anndata.concat(..., join="outer", fill_value=0)`, or with `join="inner"`.'
            )
        case "infinite":
            found = "infinite values; counts are finite"
        case "negative":
            lowest = np.nanmin(values)
            found = f"negative values (as low as {lowest:.3g}): scaled or batch-corrected data, its order of genes lost"
        case "counts":
            found = f"whole numbers up to {highest:.0f}: counts, not their logarithms"
            remedy = 'Leave `counts="log1p"` out.'
        case "log2" | "log10" | "estimated log2" | "estimated log10":
            found = f"logarithms of {'' if scale.startswith('log') else 'estimated '}counts to the base {base}"
            remedy += (
                f" If they are lost, multiply the values by `np.log({base})`, which makes natural logarithms, and say "
                "`counts='log1p'`."
            )
        case _ if is_undetected:
            found = f"values up to {highest:.3g}: estimated counts below {DETECTED} are 0, so all of them are"
            remedy += ' If they were divided by the depth of the cell, say `counts="normalized"`.'
        case "estimated log1p":
            found = f"{fractions}: logarithms of TPM or of estimated counts"
            remedy += (
                " If they are lost, say `counts='log1p'`, which ranks genes by TPM or the estimates. This is not the "
                "order of the counts."
            )
        case "log1p" | "normalized":
            kind = "log-normalised" if scale == "log1p" else "normalised"
            found = f"{fractions}: {kind} counts"
            remedy += (
                f" If they are lost, say `counts={scale!r}`: division of a cell by its depth, and the logarithm, keep "
                "the order of its genes, so the tokens are those of the counts."
            )
        case _:
            found = f"{fractions}, no multiples of one number: {_ESTIMATED[scale]}"
            threshold = f"; those below {DETECTED} are 0" if READ_AS[scale] == "estimated" else ""
            remedy += (
                f" If they are lost, say `counts={READ_AS[scale]!r}`, which ranks genes by these values{threshold}. "
                "This is not the order of the counts: estimates differ from them, and TPM and FPKM are divided by the "
                "length of the gene, too."
            )
            if highest <= _LOG_CEILING:
                remedy += " If the values are natural logarithms, say `counts='log1p'` instead."
    return f"`{where}` holds {found}.", remedy


def places_of_counts(adata: AnnData) -> dict[str, object]:
    """List the matrices that may hold counts, by the argument that names them; `X` needs none."""
    for layer in (None, *adata.layers):
        _check_parent(adata, layer)
    places = {"": adata.X} | {f"layer={key!r}": adata.layers[key] for key in adata.layers if key is not None}
    return places if adata.raw is None else places | {"use_raw=True": adata.raw.X}


def by_scale(places: Mapping[str, object]) -> dict[str, list[str]]:
    """Sort matrices by the scale of the values of their first cells; those that can be used alone, the best first."""
    found: dict[str, list[str]] = {scale: [] for scale in READ_AS}
    for place, x in places.items():
        try:
            block = None if x is None else next(row_blocks(x, 256), (None, None))[1]
        except (NotImplementedError, TypeError, ValueError):  # cannot be read, so cannot be used
            continue
        scale = None if block is None else scale_of(block)
        if scale in found:
            found[scale].append(place)
    return found


def usable_calls(adata: AnnData, matrix: CountMatrix, counts: Counts) -> str:
    """Name the calls that can use this object, by a look at the values of its first cells; "" if there are none.

    The one that could not read `matrix` as `counts` is none of them, whatever its first cells hold.
    """
    calls = {
        scale: [
            f"`gfx.pp.tokenize({', '.join(filter(None, ['adata', place, how != 'raw' and f'counts={how!r}']))})`"
            for place in places
            if (place, how) != (matrix.argument, counts)
        ]
        for (scale, places), how in zip(by_scale(places_of_counts(adata)).items(), READ_AS.values(), strict=True)
    }
    best = calls["counts"] or calls["log1p"] + calls["normalized"] or [call for of in calls.values() for call in of]
    return f"This object can be used with {' or '.join(best)}." if best else ""


# --- genes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneMatch:
    """Which columns a model knows."""

    tokens: np.ndarray  # token of each column, -1 where unknown, int32 `(n_columns,)`
    names: np.ndarray  # the names that were looked up
    unique: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))  # columns whose name a number made so
    guides: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))  # columns left out as probable guides
    foreign: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))  # columns left out, such as Cd3e

    @classmethod
    def of(cls, names: Iterable[str], vocabulary: Vocabulary) -> GeneMatch:
        """Look names up; those that were made unique, such as CD3E-1 beside CD3E, are the gene itself.

        Where genes have several such numbers each, they are no repetitions of genes but guides, and stay unknown. So do
        names that are written as another species' where the human gene, CD3E beside Cd3e, has a column of its own.
        """
        names = np.asarray(names, dtype=object)
        tokens = vocabulary.resolve(names)
        present = {str(name): token for name, token in zip(names, tokens.tolist(), strict=True) if token >= 0}
        foreign = [
            i
            for i in (np.flatnonzero(tokens >= 0) if vocabulary.species is None else ())
            if names[i] != (human := str(names[i]).upper())
            and human in present
            and isinstance(name_kind(str(names[i])), Species)
        ]
        tokens[foreign] = -1
        gene_of = {i: numbered(str(names[i])) for i in np.flatnonzero(tokens < 0)}
        found = np.array([i for i, gene in gene_of.items() if gene in present], dtype=int)
        if len(found) >= _GUIDES_PER_GENE * len({gene_of[i] for i in found}):
            return cls(tokens, names, guides=found, foreign=np.array(foreign, dtype=int))
        tokens[found] = [present[gene_of[i]] for i in found]
        return cls(tokens, names, unique=found, foreign=np.array(foreign, dtype=int))

    @property
    def left_out(self) -> str:
        """Say which columns are probably guides, or genes of another species."""
        kinds = {"numbered like guides": self.guides, "written like mouse genes": self.foreign}
        found = [f"{len(at):,} {kind}, such as {self.names[at[0]]!r}" for kind, at in kinds.items() if len(at)]
        return ", ".join(found)

    @property
    def known(self) -> np.ndarray:
        """Columns with a token, bool `(n_columns,)`."""
        return self.tokens >= 0

    @property
    def n_known(self) -> int:
        """Number of columns with a token."""
        return int(self.known.sum())

    @property
    def n_repeated(self) -> int:
        """Columns that carry a gene which an earlier column carries too."""
        return self.n_known - len(np.unique(self.tokens[self.known]))


def match_genes(
    names: Iterable[str], vocabulary: Vocabulary, var: pd.DataFrame | None = None, gene_ids: str | None = None
) -> GeneMatch:
    """Look genes up by Ensembl id, symbol, alias or retired id; other species are not mistaken for human.

    Raises `ValueError` for genes of another species, and for fewer recognised genes than ten, or than a tenth of the
    shorter list of genes; the message names a better column of `var`, from which the names came.
    """
    match = GeneMatch.of(names, vocabulary)
    if problem := genes_problem(match, vocabulary):
        better = None if var is None else better_column(var, match, vocabulary, gene_ids)
        msg = f"{named_better(better)}{problem}"
        raise ValueError(msg)
    return match


def better_column(
    var: pd.DataFrame, match: GeneMatch, vocabulary: Vocabulary, gene_ids: str | None
) -> tuple[str, int] | None:
    """Find a column of gene names, or the index, that the model knows clearly more of: how to name it, and how many."""
    places = {} if gene_ids is None else {"gene_ids=None": var.index}
    for key in var.columns:
        if key != gene_ids and list(var.columns).count(key) == 1:
            column = gene_column(var, key)
            if not pd.api.types.is_numeric_dtype(column.dtype):
                places[f"gene_ids={key!r}"] = column
    known = {how: int((vocabulary.resolve(gene_names(names)) >= 0).sum()) for how, names in places.items()}
    best = max(known, key=known.get, default=None)
    return (best, known[best]) if best is not None and known[best] > 1.1 * match.n_known else None


def named_better(better: tuple[str, int] | None) -> str:
    """Say which column names more genes, if one does."""
    return "" if better is None else f"`{better[0]}` names {better[1]:,} genes that the model knows. "


def genes_problem(match: GeneMatch, vocabulary: Vocabulary) -> str | None:
    """Say why these genes cannot be the model's, and what to call; `None` if they can."""
    names = match.names
    fewest = min(MIN_GENES, vocabulary.n_genes)
    enough = match.n_known >= max(fewest, MIN_SHARE * min(len(names), vocabulary.n_genes))
    species = foreign_species(names)
    # How symbols are written is a hint, and matters only where they would be taken for those of the vocabulary.
    if species is not None and not species.may_be(vocabulary.species) and (enough or species.is_sure):
        kinds = [name_kind(str(name)) for name in names]
        examples = [str(name) for name, kind in zip(names, kinds, strict=True) if kind == species][:5]
        n_ours = int(match.known[[not isinstance(kind, Species) for kind in kinds]].sum())
        theirs = "human" if vocabulary.species is None else vocabulary.species.name
        alone = f"(keep these alone, `adata[:, ...]`, if the cells are {theirs})"
        beside = f", beside {n_ours:,} {theirs} ones {alone}" if n_ours else ""
        return (
            f"These are {species.name} genes, such as {examples}{beside}; the vocabulary "
            f"{vocabulary.name!r} holds {theirs} genes. "
            f"Map them to {theirs} one-to-one orthologues, put their Ensembl ids into a column of `adata.var`, "
            "and name it: `gfx.pp.tokenize(adata, gene_ids=...)`."
            + (" Human symbols are written in capitals." if vocabulary.species is None else "")
        )
    if enough:
        return None
    if match.known.all():
        return (
            f"There are only {len(names):,} genes, all known to the vocabulary {vocabulary.name!r}; at least {fewest} "
            "are needed, for a cell is read as the order of its genes. Give the cells with all their genes."
        )
    unknown = list(dict.fromkeys(str(name) for name in names[~match.known]))
    prefix = shared_prefix(unknown)
    if prefix and (vocabulary.resolve([name.removeprefix(prefix) for name in unknown]) >= 0).any():
        return (
            f"All unknown names begin with the prefix {prefix!r}, without which the model knows them. Strip it: "
            f"`adata.var_names = adata.var_names.str.removeprefix({prefix!r})`."
        )
    genes = ~vocabulary.is_special
    ids = [str(name) for name in vocabulary.ids[genes][:3]]
    symbols = [str(symbol) for symbol in vocabulary.symbols[genes] if symbol][:3]
    return (
        f"Only {match.n_known:,} of {len(names):,} genes are in the vocabulary {vocabulary.name!r}. "
        f"Yours look like {unknown[:5]}; the model knows {ids}, or {symbols}. "
        "If Ensembl ids or symbols are in a column of `adata.var`, name it: `gfx.pp.tokenize(adata, gene_ids=...)`."
    )
