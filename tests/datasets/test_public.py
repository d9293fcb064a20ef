"""Public data sets, fetched from a local server that has files of the same format."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy import sparse
from scipy.io import mmwrite

import gfx
from gfx.datasets import _public

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Hub

COUNTS = np.array([[0, 3, 0, 1], [2, 0, 0, 0], [0, 0, 5, 700]])
IDS = ["ENSG00000141510", "ENSG00000167286", "ENSG00000156738", "ENSG00000000001"]
SYMBOLS = ["TP53", "CD3D", "MS4A1", "TP53"]
BARCODES = ["AAAC-1", "AAAG-1", "AAAT-1"]


def as_tar(counts: sparse.spmatrix, ids: list[str], symbols: list[str], barcodes: list[str]) -> bytes:
    """Pack counts as Cell Ranger 1 does."""
    matrix = io.BytesIO()
    mmwrite(matrix, sparse.coo_matrix(counts.T, dtype=int))
    genes = "".join(f"{gene}\t{symbol}\n" for gene, symbol in zip(ids, symbols, strict=True))
    files = {
        "matrix.mtx": matrix.getvalue(),
        "genes.tsv": genes.encode(),
        "barcodes.tsv": "".join(f"{barcode}\n" for barcode in barcodes).encode(),
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        folder = tarfile.TarInfo("filtered_gene_bc_matrices/hg19")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder.name}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def as_h5(counts: sparse.spmatrix, ids: list[str], symbols: list[str], barcodes: list[str]) -> bytes:
    """Write counts as Space Ranger does: genes by spots, in compressed columns."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        matrix = file.create_group("matrix")
        columns = sparse.csc_matrix(counts.T)
        for name in ("data", "indices", "indptr"):
            matrix[name] = getattr(columns, name).astype(np.int32)
        matrix["shape"] = np.array(columns.shape, dtype=np.int32)
        matrix["barcodes"] = np.array(barcodes, dtype="S18")
        features = {
            "id": ids,
            "name": symbols,
            "feature_type": ["Gene Expression"] * len(ids),
            "genome": ["GRCh38"] * len(ids),
        }
        for name, values in features.items():
            matrix[f"features/{name}"] = np.array(values, dtype="S")
    return content.getvalue()


SETS = {"pbmc3k": ("PBMC3K", as_tar), "visium_heart": ("VISIUM_HEART", as_h5)}


@pytest.fixture
def cached_in(tmp_path: Path) -> Iterator[Path]:
    with gfx.settings.override(cache_dir=tmp_path / "cache"):
        yield tmp_path / "cache" / "datasets"


def publish(name: str, content: bytes, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have the server send that content, and pin its hash; returns its path there."""
    constant, _ = SETS[name]
    file = getattr(_public, constant)
    path = urlsplit(file.url).path[1:]
    hub.files[path] = content
    pinned = {"url": f"{hub.url}/{path}", "sha256": hashlib.sha256(content).hexdigest()}
    size = None if file.size is None else len(content)
    monkeypatch.setattr(_public, constant, replace(file, size=size, **pinned))
    return path


@pytest.mark.parametrize("name", SETS)
def test_counts_ids_and_symbols(name: str, cached_in: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = publish(name, SETS[name][1](sparse.csr_matrix(COUNTS), IDS, SYMBOLS, BARCODES), hub, monkeypatch)
    adata = getattr(gfx.datasets, name)()
    assert adata.X.format == "csr"
    assert adata.X.dtype == np.float32
    assert (adata.X.toarray() == COUNTS).all()
    assert adata.obs_names.tolist() == BARCODES
    assert adata.var["ensembl_id"].tolist() == IDS
    assert adata.var_names.tolist() == ["TP53", "CD3D", "MS4A1", "TP53-1"]
    assert adata.var.columns.tolist() == ["ensembl_id"]
    assert "10x Genomics" in adata.uns["source"]
    assert adata.uns["source"].endswith("CC BY 4.0")
    assert [file.name for file in cached_in.iterdir()] == [path.rpartition("/")[2]]
    adata.X.data[:] = 0
    with gfx.settings.override(offline=True):
        assert (getattr(gfx.datasets, name)().X.toarray() == COUNTS).all()
    assert hub.asked == {path: 1}
    adata.write_h5ad(cached_in / "written.h5ad")
    assert ad.read_h5ad(cached_in / "written.h5ad").uns["source"] == adata.uns["source"]


@pytest.mark.parametrize("name", SETS)
def test_other_bytes_than_pinned_are_refused(
    name: str, cached_in: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = SETS[name][1](sparse.csr_matrix(COUNTS), IDS, SYMBOLS, BARCODES)
    path = publish(name, content, hub, monkeypatch)
    hub.files[path] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(RuntimeError, match=r"(?s)is not the published file: its sha256 differs.*by hand"):
        getattr(gfx.datasets, name)()
    assert list(cached_in.iterdir()) == []


@pytest.mark.parametrize("name", SETS)
def test_offline_the_error_says_what_to_put_where(name: str, cached_in: Path) -> None:
    """With the real addresses and hashes."""
    file = getattr(_public, SETS[name][0])
    assert file.url.startswith("https://cf.10xgenomics.com/samples/")
    assert len(bytes.fromhex(file.sha256)) == 32
    with gfx.settings.override(offline=True), pytest.raises(RuntimeError, match="gfx is offline") as caught:
        getattr(gfx.datasets, name)()
    for part in (name, file.url, file.sha256, str(cached_in / file.name)):
        assert part in str(caught.value)


def test_a_file_put_there_by_hand_is_read(cached_in: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = publish("pbmc3k", as_tar(sparse.csr_matrix(COUNTS), IDS, SYMBOLS, BARCODES), hub, monkeypatch)
    cached_in.mkdir(parents=True)
    (cached_in / _public.PBMC3K.name).write_bytes(hub.files[path])
    assert gfx.datasets.pbmc3k().shape == COUNTS.shape
    assert not hub.asked


def test_cells_of_pbmc3k_packed_anew_are_those_of_another_copy(
    cached_in: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, shared: Path
) -> None:
    origin = ad.read_h5ad(shared / "data/cells/eval/pbmc3k_10x.h5ad")[:50].copy()
    names = origin.var["ensembl_id"].tolist(), origin.var_names.tolist(), origin.obs_names.tolist()
    publish("pbmc3k", as_tar(origin.X, *names), hub, monkeypatch)
    adata = gfx.datasets.pbmc3k()
    assert adata.shape == (50, 32738)
    assert (adata.X != origin.X).nnz == 0
    assert (adata.var["ensembl_id"].tolist(), adata.var_names.tolist(), adata.obs_names.tolist()) == names


def test_files_are_read_as_scanpy_reads_them(
    tmp_path: Path, cached_in: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import scanpy as sc

    for name, (_, pack) in SETS.items():
        publish(name, pack(sparse.csr_matrix(COUNTS), IDS, SYMBOLS, BARCODES), hub, monkeypatch)
    own = gfx.datasets.pbmc3k(), gfx.datasets.visium_heart()
    with tarfile.open(cached_in / _public.PBMC3K.name) as tar:
        tar.extractall(tmp_path, filter="data")
    from_text = sc.read_10x_mtx(tmp_path / "filtered_gene_bc_matrices/hg19")
    with pytest.warns(UserWarning, match="Variable names are not unique"):
        from_h5 = sc.read_10x_h5(cached_in / _public.VISIUM_HEART.name)
    from_h5.var_names_make_unique()
    for adata, expected in zip(own, (from_text, from_h5), strict=True):
        assert (adata.X != expected.X).nnz == 0
        assert adata.obs_names.equals(expected.obs_names.rename(None))
        assert adata.var_names.equals(expected.var_names.rename(None))
        assert adata.var["ensembl_id"].tolist() == expected.var["gene_ids"].tolist()
