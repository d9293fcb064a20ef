"""Public data that are downloaded when they are first asked for."""

from __future__ import annotations

import tarfile
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from gfx._docs import shared
from gfx._downloads import RemoteFile, cache_folder, fetch
from gfx._settings import settings

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

_10X = "https://cf.10xgenomics.com/samples"

PBMC3K = RemoteFile(
    name="pbmc3k_filtered_gene_bc_matrices.tar.gz",
    url=f"{_10X}/cell-exp/1.1.0/pbmc3k/pbmc3k_filtered_gene_bc_matrices.tar.gz",
    sha256="847d6ebd9a1ec9a768f2be7e40ca42cbfe75ebeb6d76a4c24167041699dc28b5",
    size=7_621_991,
)
#: With the hash that squidpy pins.
VISIUM_HEART = RemoteFile(
    name="V1_Human_Heart_filtered_feature_bc_matrix.h5",
    url=f"{_10X}/spatial-exp/1.1.0/V1_Human_Heart/V1_Human_Heart_filtered_feature_bc_matrix.h5",
    sha256="a7274ea2ff2717693b200e614c288c174f02925b6d82c98221871a08e52d415b",
)

#: What both say of their results and errors.
_TEXTS = {
    "contents": """
        raw counts in `X` (CSR, float32), symbols as `var_names`, made unique, `var["ensembl_id"]`, and source and
        licence in `uns["source"]`.
        """,
    "errors": """
        RuntimeError
            The file could not be downloaded or written, came with other bytes, or `gfx.settings.offline`
            (`GFX_OFFLINE=1`) is set. The text names its address, its hash, and where to put it by hand.
        """,
}


@shared(**_TEXTS)
def pbmc3k() -> AnnData:
    """Download and read 2,700 peripheral blood mononuclear cells of a healthy donor, by 10x Genomics.

    The cells of many tutorials, so that results can be compared. The embedded model was not trained on them. They have
    no labels; :func:`ifnb` has, and needs no network.

    The first call downloads 7.6 MB and compares them with their SHA-256; later calls read the file that is kept in
    `gfx.settings.cache_dir` (`GFX_CACHE_DIR`), else in the system's cache folder, in about a second.

    Source: `3k PBMCs from a Healthy Donor
    <https://www.10xgenomics.com/datasets/3-k-pbm-cs-from-a-healthy-donor-1-standard-1-1-0>`__, 10x Genomics, 2016,
    licence CC BY 4.0; the chemistry is that of :cite:t:`Zheng2017`.

    Returns
    -------
    2,700 cells × 32,738 genes:
    {contents}

    Raises
    ------
    {errors}

    Examples
    --------
    >>> import gfx
    >>> gfx.datasets.pbmc3k().shape  # doctest: +SKIP
    (2700, 32738)
    """
    source = "10x Genomics, 3k PBMCs from a Healthy Donor, https://www.10xgenomics.com/datasets/"
    return _read("pbmc3k", PBMC3K, f"{source}3-k-pbm-cs-from-a-healthy-donor-1-standard-1-1-0, CC BY 4.0")


@shared(**_TEXTS)
def visium_heart() -> AnnData:
    """Download and read 4,247 spots of a section of a human heart, by 10x Genomics (Visium).

    A spot is 55 µm wide and covers several cells, so its ranks and its embedding are those of a mixture: use it to try
    things out on heart tissue, and single cells or nuclei for findings about cells. It comes without coordinates, image
    and labels.

    The first call downloads about 12 MB and compares them with their SHA-256; later calls read the file that is kept in
    `gfx.settings.cache_dir` (`GFX_CACHE_DIR`), else in the system's cache folder.

    Source: `Human Heart <https://www.10xgenomics.com/datasets/human-heart-1-standard-1-1-0>`__, 10x Genomics, 2020,
    licence CC BY 4.0.

    Returns
    -------
    4,247 spots × 36,601 genes:
    {contents}

    Raises
    ------
    {errors}

    Examples
    --------
    >>> import gfx
    >>> gfx.datasets.visium_heart().shape  # doctest: +SKIP
    (4247, 36601)
    """
    source = "10x Genomics, Human Heart (Visium), https://www.10xgenomics.com/datasets/human-heart-1-standard-1-1-0"
    return _read("visium_heart", VISIUM_HEART, f"{source}, CC BY 4.0")


def _read(title: str, file: RemoteFile, source: str) -> AnnData:
    """Read a file of 10x Genomics, after it has been fetched."""
    import anndata as ad

    folder = cache_folder() / "datasets"
    fetch(title, [file], folder, offline=settings.offline)
    read = _read_tar if file.name.endswith(".tar.gz") else _read_h5
    counts, ids, symbols, barcodes = read(folder / file.name)
    var = pd.DataFrame({"ensembl_id": ids}, index=ids)
    adata = ad.AnnData(counts, obs=pd.DataFrame(index=barcodes), var=var, uns={"source": source})
    adata.var_names = symbols
    adata.var_names_make_unique()
    return adata


def _read_tar(path: Path) -> tuple[csr_matrix, np.ndarray, np.ndarray, np.ndarray]:
    """Read counts, Ensembl ids, symbols and barcodes, as Cell Ranger 1 and 2 wrote them in text files."""
    from scipy.io import mmread

    with tarfile.open(path) as tar:
        files = {PurePosixPath(member.name).name: member for member in tar}
        genes = pd.read_csv(tar.extractfile(files["genes.tsv"]), sep="\t", header=None, dtype=str, na_filter=False)
        barcodes = pd.read_csv(tar.extractfile(files["barcodes.tsv"]), header=None, dtype=str)
        counts = csr_matrix(mmread(tar.extractfile(files["matrix.mtx"])).T, dtype=np.float32)
    return counts, genes[0].to_numpy(), genes[1].to_numpy(), barcodes[0].to_numpy()


def _read_h5(path: Path) -> tuple[csr_matrix, np.ndarray, np.ndarray, np.ndarray]:
    """Read the same as Cell Ranger 3 and later, and Space Ranger, wrote it in HDF5."""
    import h5py

    with h5py.File(path) as file:
        matrix = file["matrix"]
        parts = matrix["data"][:].astype(np.float32), matrix["indices"][:], matrix["indptr"][:]
        counts = csr_matrix(parts, shape=matrix["shape"][:][::-1])
        ids, symbols, barcodes = (matrix[name].asstr()[:] for name in ("features/id", "features/name", "barcodes"))
    return counts, ids, symbols, barcodes
