"""Files and objects to learn from: read block by block, named when they cannot be used."""

from __future__ import annotations

import os
import re

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy import sparse

import gfx
from gfx.models.pretraining._sources import SourceError, each_source, find_sources


@pytest.fixture
def cells():
    counts = np.random.default_rng(0).poisson(1.0, (500, 40)).astype(np.float32)
    adata = ad.AnnData(sparse.csr_matrix(counts))
    adata.var_names = [f"ENSG{n:011d}" for n in range(40)]
    adata.var["other"] = [f"G{n}" for n in range(40)]
    return adata


def read(source):
    with source.open() as (counts, _):
        return sparse.vstack(list(source.raw_blocks(counts))).toarray()


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_files_are_read_as_they_were_written(cells, tmp_path, kind, suffix):
    expected = cells.X.toarray()
    cells.X = {"csr": cells.X, "csc": cells.X.tocsc(), "dense": expected}[kind]
    path = tmp_path / f"cells{suffix}"
    cells.write_h5ad(path) if suffix == ".h5ad" else cells.write_zarr(path)
    (source,) = find_sources(str(path), "other")
    np.testing.assert_array_equal(read(source), expected)
    with source.open() as (counts, _):
        assert counts.names[:2].tolist() == ["G0", "G1"]


def test_a_file_is_closed_again(cells, tmp_path):
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    (source,) = find_sources(path, None)
    read(source)
    with h5py.File(path, "r+") as file:  # refused while anybody reads it
        file["X/data"][:] = -1.0
    with pytest.raises(SourceError, match=r"^cells\.h5ad: `adata\.X` holds negative values"):
        read(source)


def test_missing_files_are_named_at_once(tmp_path, cells):
    with pytest.raises(FileNotFoundError, match=r"1 of 2 sources do not exist: .*nowhere\.h5ad"):
        find_sources([cells, tmp_path / "nowhere.h5ad"], None)


def test_a_file_that_was_cut_off(cells, tmp_path):
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"^cells\.h5ad: cannot be read to its end .*copied or fetched completely"):
        read(*find_sources(path, None))


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
def test_a_zarr_store_that_lacks_a_chunk(cells, tmp_path):
    """It would be read as zeros, that is as other cells."""
    path = tmp_path / "cells.zarr"
    cells.write_zarr(path)
    chunk = max((path / "X" / "data").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else -1)
    chunk.unlink()
    with pytest.raises(SourceError, match=r"^cells\.zarr: 1 of \d+ chunks of `X/data` are not on disk"):
        read(*find_sources(path, None))


def test_counts_that_are_only_in_a_layer(cells, tmp_path):
    path = tmp_path / "cells.h5ad"
    cells.layers["counts"] = cells.X
    cells.X = None
    cells.write_h5ad(path)
    with pytest.raises(SourceError, match=r"^cells\.h5ad: no `X` in this file.*with `layer='counts'`\."):
        read(*find_sources(path, None))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["matrix.mtx.gz", "barcodes.tsv.gz"], r"this folder is no zarr store\. A source is .*`scanpy\.read_10x_mtx`"),
        (["a.h5ad", "b.h5ad", "notes.txt"], r"this folder is no zarr store\. Name the 2 h5ad files in it, as a list\."),
    ],
)
def test_folders_that_are_no_stores(tmp_path, files, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match=message):
        read(*find_sources(tmp_path, None))


def test_files_of_other_formats(tmp_path):
    (tmp_path / "cells.csv").write_text("gene,cell\n1,2\n")
    with h5py.File(tmp_path / "cells.h5", "w") as file:
        file.create_group("matrix")  # as 10x Genomics writes
    messages = {"cells.csv": "this is no h5ad file", "cells.h5": "no counts were found where anndata writes them"}
    for name, message in messages.items():
        with pytest.raises(SourceError, match=rf"^{re.escape(name)}: {message}\. .*read other formats with scanpy"):
            read(*find_sources(tmp_path / name, None))


def test_a_fingerprint_tells_changes(cells, tmp_path):
    def fingerprint(place, gene_ids=None):
        return find_sources(place, gene_ids)[0].fingerprint

    first = fingerprint(cells)
    assert fingerprint(cells.copy()) == first != fingerprint(cells, "other")
    cells.X[0, 0] += 1
    assert fingerprint(cells) != first
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    before = fingerprint(path)
    assert fingerprint(path) == before
    os.utime(path, ns=(0, 0))
    assert fingerprint(path) != before


def test_all_unusable_sources_are_named(cells, tmp_path):
    """Work goes on behind a source that cannot be used."""
    done = []

    def work(source):
        done.append(read(source).sum())

    negative = cells.copy()
    negative.X = -negative.X
    with pytest.raises(ValueError, match=r"(?s)^2 of 4 sources cannot be used\. Kept\.\n- source 0: .*\n- source 2: "):
        list(each_source(find_sources([negative, cells, negative, cells], None), work, "Kept."))
    assert done == [cells.X.sum()] * 2


@pytest.fixture
def of_cellxgene(cells):
    """Raw counts in `raw`, of more genes than `X` has, and logarithms in `X`."""
    adata = cells[:, 3:].copy()
    adata.raw = cells
    adata.X = adata.X.log1p() if sparse.issparse(adata.X) else np.log1p(adata.X)
    return adata


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
@pytest.mark.parametrize("place", ["memory", "cells.h5ad", "cells.zarr"])
def test_counts_in_raw_are_named_by_the_error_and_read_when_said(of_cellxgene, cells, tmp_path, place):
    source = of_cellxgene
    if place != "memory":
        source = tmp_path / place
        of_cellxgene.write_h5ad(source) if source.suffix == ".h5ad" else of_cellxgene.write_zarr(source)
    for call in (
        lambda **where: gfx.models.summarize_genes(source, **where),
        lambda **where: gfx.models.build_vocabulary(source, min_cells=1, **where),
        lambda **where: gfx.models.pretrain(source, tmp_path / "model", **where),
    ):
        with pytest.raises(ValueError, match=r"`adata\.X` holds fractions.*are needed; .*with `use_raw=True`"):
            call()
    summary = gfx.models.summarize_genes(source, use_raw=True)
    assert summary == gfx.models.summarize_genes(cells)
    (opened,) = find_sources(source, None, use_raw=True)
    np.testing.assert_array_equal(read(opened), read(*find_sources(cells, None)))
    assert opened.fingerprint != find_sources(source, "other", use_raw=True)[0].fingerprint


@pytest.mark.parametrize("place", ["memory", "file"])
def test_counts_in_a_layer_are_read_when_said(cells, tmp_path, place):
    adata = cells.copy()
    adata.layers["counts"] = adata.X
    adata.X = adata.X * 0.3
    source = adata
    if place == "file":
        source = tmp_path / "cells.h5ad"
        adata.write_h5ad(source)
    with pytest.raises(ValueError, match=r"has them with `layer='counts'`\."):
        gfx.models.summarize_genes(source)
    assert gfx.models.summarize_genes(source, layer="counts") == gfx.models.summarize_genes(cells)
    with pytest.raises(ValueError, match=r"Did not find|no `layer='other'` in this file.*`layer='counts'`"):
        gfx.models.summarize_genes(source, layer="other")
    with pytest.raises(ValueError, match="not both"):
        gfx.models.summarize_genes(source, layer="counts", use_raw=True)


def test_a_model_is_pretrained_on_counts_in_raw(toy_cells, toy_vocabulary, tmp_path):
    cells = toy_cells()
    logs = cells[:, 50:].copy()
    logs.raw = cells
    logs.X = logs.X.log1p()
    small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    for name, source, where in (("plain", cells, {}), ("raw", logs, {"use_raw": True})):
        for vocabulary in (None, toy_vocabulary):
            folder = tmp_path / f"{name}-{vocabulary}"
            gfx.models.pretrain(
                source,
                folder,
                vocabulary=vocabulary,
                gene_ids="ensembl_id",
                config=small,
                curriculum=[(64, 1)],
                **where,
            )
    for kind in (None, toy_vocabulary):
        plain, raw = (gfx.models.load(tmp_path / f"{name}-{kind}") for name in ("plain", "raw"))
        assert plain.vocabulary.sha256 == raw.vocabulary.sha256
        assert plain.weights_sha256 == raw.weights_sha256
