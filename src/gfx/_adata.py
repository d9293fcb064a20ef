"""AnnData or MuData in, what the core needs out: the modality, the counts row by row, the genes' tokens."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData
    from mudata import MuData

    from gfx._core.vocabulary import Vocabulary

Counts = Literal["raw", "normalized", "log1p"]
COUNTS: tuple[str, ...] = ("raw", "normalized", "log1p")

#: Below these the genes are taken for another species or another kind of id.
MIN_GENES = 10
MIN_SHARE = 0.1

#: log1p of any depth normalisation in use (a million at most) stays below this.
_LOG_CEILING = 15.0


# --- containers ----------------------------------------------------------------------------------------------------


def is_mudata(data: object) -> bool:
    """Recognise MuData without importing it."""
    return any(cls.__module__.partition(".")[0] == "mudata" and cls.__name__ == "MuData" for cls in type(data).__mro__)


def pick(data: AnnData | MuData, mod: str | None) -> AnnData:
    """Find the AnnData to work on: `data` itself, or the modality `mod` of a MuData."""
    if is_mudata(data):
        names = list(data.mod)
        if mod is None and len(names) == 1:
            return data.mod[names[0]]
        if mod is None:
            msg = f"This MuData has {len(names)} modalities; say which one holds RNA counts: `mod=` one of {names}."
            raise ValueError(msg)
        if mod not in names:
            msg = f"Did not find modality {mod!r} in this MuData. Present: {names}."
            raise KeyError(msg)
        return data.mod[mod]
    if mod is not None:
        msg = f"`mod={mod!r}` is for MuData; found {type(data).__name__}. Leave `mod` out."
        raise TypeError(msg)
    if not (hasattr(data, "obs_names") and hasattr(data, "obsm")):
        msg = f"Expected an AnnData or MuData, found {type(data).__name__}."
        raise TypeError(msg)
    return data


def copied(data: AnnData | MuData, *, copy: bool) -> AnnData | MuData:
    """Return `data` to work on, or a copy of it; a file-backed object cannot be copied in memory by accident."""
    if not copy:
        return data
    if getattr(data, "isbacked", False):
        msg = "`copy=True` does not work on a file-backed object. Call `.to_memory()` first, or leave `copy` out."
        raise ValueError(msg)
    return data.copy()


def obs_column(adata: AnnData, key: str) -> pd.Series:
    """Read a column of `obs`, or say which ones there are."""
    return _column(adata.obs, key, "adata.obs")


def _column(frame: pd.DataFrame, key: str, where: str) -> pd.Series:
    if key not in frame.columns:
        close = difflib.get_close_matches(str(key), [str(c) for c in frame.columns])
        hint = f" Did you mean {close[0]!r}?" if close else ""
        msg = f"Did not find {key!r} in `{where}`.{hint} Present: {sorted(map(str, frame.columns))}."
        raise KeyError(msg)
    return frame[key]


def cell_mask(adata: AnnData, mask_obs: str | np.ndarray | None) -> np.ndarray:
    """Turn a boolean `obs` column or array into a mask, bool `(n_obs,)`."""
    if mask_obs is None:
        return np.ones(adata.n_obs, dtype=bool)
    mask = obs_column(adata, mask_obs).to_numpy() if isinstance(mask_obs, str) else np.asarray(mask_obs)
    if mask.dtype != bool or mask.shape != (adata.n_obs,):
        msg = (
            f"`mask_obs` is one truth value per cell: expected bool of shape ({adata.n_obs},), "
            f"found {mask.dtype} of shape {mask.shape}."
        )
        raise ValueError(msg)
    if not mask.any():
        msg = "`mask_obs` selects no cell."
        raise ValueError(msg)
    return mask


# --- counts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CountMatrix:
    """Counts where the user said they are.

    Parameters
    ----------
    x
        Cells × genes: numpy, scipy sparse, dask, or a dataset on disk.
    names
        Gene names to look up, `(n_columns,)`.
    where
        How to call this matrix in a message.
    """

    x: object
    names: np.ndarray
    where: str

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.x.shape[0]


def open_counts(
    adata: AnnData, *, layer: str | None = None, use_raw: bool = False, gene_ids: str | None = None
) -> CountMatrix:
    """Find the counts and the gene names that belong to them; reads no values."""
    if use_raw and layer is not None:
        msg = f"Give either `layer={layer!r}` or `use_raw=True`, not both."
        raise ValueError(msg)
    if use_raw:
        if adata.raw is None:
            msg = "`use_raw=True`, but this object has no `.raw`. Name the layer that holds the counts instead."
            raise ValueError(msg)
        x, var, where = adata.raw.X, adata.raw.var, "adata.raw.X"
    elif layer is not None:
        layers = [key for key in adata.layers if key is not None]
        if layer not in layers:
            msg = f"Did not find {layer!r} in `adata.layers`. Present: {sorted(layers)}."
            raise KeyError(msg)
        x, var, where = adata.layers[layer], adata.var, f"adata.layers[{layer!r}]"
    else:
        x, var, where = adata.X, adata.var, "adata.X"
    if x is None:
        msg = f"`{where}` is empty. Name the layer that holds the counts: `layer=` one of {sorted(adata.layers)}."
        raise ValueError(msg)
    if gene_ids is None:
        names = var.index
    else:
        names = _column(var, gene_ids, "adata.raw.var" if use_raw else "adata.var")
    return CountMatrix(x=x, names=np.asarray(names.astype(str), dtype=object), where=where)


def row_blocks(x: object, size: int = 2048) -> Iterator[tuple[slice, sparse.csr_array]]:
    """Walk over any matrix in blocks of rows, each a CSR array; nobody else looks at the matrix type."""
    if getattr(x, "format", None) == "csc" and sparse.issparse(x):
        x = x.tocsr()  # once, not per block
    for start in range(0, x.shape[0], size):
        rows = slice(start, min(start + size, x.shape[0]))
        block = x[rows]
        if hasattr(block, "compute"):
            block = block.compute()
        yield rows, sparse.csr_array(block)


def to_counts(block: sparse.csr_array, counts: Counts, where: str) -> sparse.csr_array:
    """Check the stored values of a block and undo a logarithm the user told us of.

    Raises
    ------
    ValueError
        Negative, missing or infinite values; fractions where raw counts were promised.
    """
    if counts not in COUNTS:
        msg = f"`counts` is one of {list(COUNTS)}, found {counts!r}."
        raise ValueError(msg)
    values = block.data
    if values.size == 0:
        return block
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        found = "NaN" if np.isnan(values).any() else "infinite"
        msg = f"`{where}` holds {found} values. Counts are finite; name the layer that holds them with `layer=`."
        raise ValueError(msg)
    if values.dtype.kind != "u" and values.min() < 0:
        msg = (
            f"`{where}` holds negative values (as low as {values.min():.3g}): scaled or batch-corrected data. "
            "Ranks need raw counts: name the layer that holds them with `layer=`, or `use_raw=True`."
        )
        raise ValueError(msg)
    if counts == "raw" and values.dtype.kind == "f" and not _whole(values):
        raise ValueError(_not_raw(values, where))
    if counts == "log1p":
        if values.max() > _LOG_CEILING and _whole(values):
            msg = (
                f"`{where}` holds whole numbers up to {values.max():.0f}; these are counts, not their logarithms. "
                'Leave `counts="log1p"` out.'
            )
            raise ValueError(msg)
        block = block.copy()
        block.data = np.expm1(block.data.astype(np.float64))
    return block


def _whole(values: np.ndarray) -> bool:
    return values.dtype.kind in "iub" or bool((values == np.rint(values)).all())


def looks_log1p(values: np.ndarray) -> bool:
    """Whether stored values look like log1p of counts: fractions, none larger than a logarithm can be."""
    return values.size > 0 and not _whole(values) and values.min() >= 0 and values.max() <= _LOG_CEILING


def _not_raw(values: np.ndarray, where: str) -> str:
    found = f"`{where}` holds fractions, such as {values[values != np.rint(values)][0]:.4g}, not raw counts"
    if looks_log1p(values):
        return (
            f"{found}; the largest value is {values.max():.3g}, so these look like log-normalised counts. "
            "If the raw counts are in a layer, name it with `layer=`. If they are lost, call "
            '`gfx.pp.tokenize(adata, counts="log1p")`: the order of genes in a cell survives `log1p` and any scaling '
            "of the cell, so the tokens are those of the counts."
        )
    return (
        f"{found}; these look like normalised counts. If the raw counts are in a layer, name it with `layer=`. "
        'If each cell was only divided by its depth, call `gfx.pp.tokenize(adata, counts="normalized")`: '
        "dividing a cell by a number keeps its order of genes."
    )


# --- genes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneMatch:
    """Which columns a model knows.

    Parameters
    ----------
    tokens
        Token of each column, -1 where unknown, int32 `(n_columns,)`.
    names
        The names that were looked up.
    """

    tokens: np.ndarray
    names: np.ndarray

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

    def unknown_examples(self, n: int = 5) -> list[str]:
        """Return some names without token."""
        return [str(name) for name in self.names[~self.known][:n]]


def match_genes(names: Sequence[str] | np.ndarray, vocabulary: Vocabulary) -> GeneMatch:
    """Look genes up by Ensembl id, symbol, alias or retired id; other species are not mistaken for human.

    Raises
    ------
    ValueError
        Mouse genes, or too few recognised genes.
    """
    names = np.asarray(names, dtype=object)
    match = GeneMatch(tokens=vocabulary.resolve(names), names=names)
    species = foreign_species(names)
    if species is not None:
        examples = [str(n) for n in names[:5]]
        msg = (
            f"These are {species} genes, such as {examples}; the vocabulary {vocabulary.name!r} holds human genes. "
            "Map them to human one-to-one orthologues first and give their Ensembl ids with `gene_ids=`."
        )
        raise ValueError(msg)
    if match.n_known < min(MIN_GENES, len(vocabulary)) or match.n_known < MIN_SHARE * min(len(names), vocabulary.n_genes):
        known = [str(i) for i in vocabulary.ids[~vocabulary.is_special][:3]]
        symbols = [str(s) for s in vocabulary.symbols[~vocabulary.is_special] if s][:3]
        msg = (
            f"Only {match.n_known:,} of {len(names):,} genes are in the vocabulary {vocabulary.name!r}. "
            f"Yours look like {match.unknown_examples()}; the model knows {known} or {symbols}. "
            "If Ensembl ids or symbols are in a column of `adata.var`, name it with `gene_ids=`."
        )
        raise ValueError(msg)
    return match


_MOUSE_SYMBOL = re.compile(r"^[A-Z][a-z]+[A-Za-z0-9.-]*[0-9a-z]$|^mt-[A-Z]")
_OTHER_SPECIES = {"ENSMUSG": "mouse", "ENSRNOG": "rat", "ENSDARG": "zebrafish", "ENSMMUG": "macaque"}


def foreign_species(names: np.ndarray) -> str | None:
    """Name the species when most genes are not written as human ones: ENSMUSG..., or Gata4 instead of GATA4."""
    texts = [str(name) for name in names]
    for prefix, species in _OTHER_SPECIES.items():
        if sum(text.upper().startswith(prefix) for text in texts) > len(texts) / 2:
            return species
    lettered = [text for text in texts if not text.upper().startswith("ENS")]
    if len(lettered) > len(texts) / 2:
        title_case = sum(bool(_MOUSE_SYMBOL.match(text)) for text in lettered)
        if title_case > len(lettered) / 2:
            return "mouse (or rat)"
    return None
