"""Made-up cells of two types."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from gfx.models import load

if TYPE_CHECKING:
    from anndata import AnnData

_MARKERS = {
    "T cell": ("CD3D", "CD3E", "CD3G", "CD2", "IL7R", "TRAT1", "CD5", "CD27"),
    "B cell": ("MS4A1", "CD79A", "CD79B", "CD19", "BANK1", "BLK", "HLA-DRA", "CD74"),
}


def toy(n_cells: int = 60, n_genes: int = 300, *, rng: int | np.random.Generator | None = 0) -> AnnData:
    """Make cells of two types, T and B, that express a few marker genes above a common background.

    For examples and tests; there is no biology in it beyond the markers.

    Parameters
    ----------
    n_cells
        Number of cells, half of each type.
    n_genes
        Number of genes, of those the embedded model knows.
    rng
        Seed or generator.

    Returns
    -------
    Raw counts in `X` (CSR, float32), symbols as `var_names`, `var["ensembl_id"]`, `obs["cell_type"]` and
    `obs["donor"]` (3 donors).

    Raises
    ------
    ValueError
        Fewer genes than markers, or more than the embedded model knows.

    Examples
    --------
    >>> import gfx
    >>> gfx.datasets.toy().shape
    (60, 300)
    """
    import anndata as ad

    markers = [gene for genes in _MARKERS.values() for gene in genes]
    if n_genes < len(markers):
        msg = f"`n_genes={n_genes}` leaves no room for the {len(markers)} marker genes."
        raise ValueError(msg)
    rng = np.random.default_rng(rng)
    vocabulary = load("mini").vocabulary
    marker_tokens = vocabulary.resolve(markers)
    others = np.setdiff1d(np.flatnonzero((vocabulary.symbols != "") & ~vocabulary.is_special), marker_tokens)
    if n_genes > len(markers) + len(others):
        msg = f"`n_genes={n_genes}`, but the embedded model knows {len(markers) + len(others):,} genes with a symbol."
        raise ValueError(msg)
    spread = others[np.linspace(0, len(others) - 1, n_genes - len(markers)).astype(int)]
    tokens = np.concatenate([marker_tokens, spread])
    types = np.array(list(_MARKERS))[np.arange(n_cells) % 2]
    rate = np.tile(rng.lognormal(0.0, 1.0, n_genes), (n_cells, 1))
    for at, gene in enumerate(markers):
        rate[:, at] = np.where([gene in _MARKERS[cell] for cell in types], 8.0, 0.1)
    counts = rng.poisson(rate * rng.lognormal(0.0, 0.3, (n_cells, 1)))
    return ad.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(
            {"cell_type": pd.Categorical(types), "donor": pd.Categorical([f"donor{i % 3}" for i in range(n_cells)])},
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(
            {"ensembl_id": vocabulary.ids[tokens].astype(str)}, index=vocabulary.symbols[tokens].astype(str)
        ),
    )
