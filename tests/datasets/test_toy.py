from __future__ import annotations

import numpy as np
import pytest

import gfx

MARKERS = {"T cell": ["CD3D", "CD3E", "CD2"], "B cell": ["MS4A1", "CD79A", "CD74"]}


@pytest.fixture(scope="module")
def toy():
    return gfx.datasets.toy()


def test_shape_and_annotation(toy):
    assert toy.shape == (60, 300)
    assert toy.X.format == "csr"
    assert toy.X.dtype == np.float32
    assert toy.obs["cell_type"].value_counts().to_dict() == {"T cell": 30, "B cell": 30}
    assert toy.obs["donor"].nunique() == 3
    assert toy.var_names.is_unique
    assert toy.var["ensembl_id"].is_unique
    assert toy.obs_names.is_unique


def test_raw_counts(toy):
    assert (toy.X.data >= 1).all()
    assert (toy.X.data == toy.X.data.round()).all()


def test_the_embedded_model_knows_every_gene(toy):
    vocabulary = gfx.models.load("mini").vocabulary
    by_symbol, by_id = vocabulary.resolve(toy.var_names), vocabulary.resolve(toy.var["ensembl_id"])
    assert (by_symbol >= 0).all()
    np.testing.assert_array_equal(by_symbol, by_id)


def test_markers_are_high_in_their_type(toy):
    means = {kind: np.asarray(toy[toy.obs["cell_type"] == kind].X.mean(axis=0)).ravel() for kind in MARKERS}
    for kind, genes in MARKERS.items():
        (other,) = set(MARKERS) - {kind}
        for gene in genes:
            at = toy.var_names.get_loc(gene)
            assert means[kind][at] > 5 * means[other][at]


def test_seed(toy):
    assert (gfx.datasets.toy().X != toy.X).nnz == 0
    assert (gfx.datasets.toy(rng=1).X != toy.X).nnz > 0
    generator = np.random.default_rng(0)
    assert (gfx.datasets.toy(rng=generator).X != toy.X).nnz == 0
    assert (gfx.datasets.toy(rng=generator).X != toy.X).nnz > 0


@pytest.mark.parametrize(("n_cells", "n_genes"), [(7, 16), (10, 1000)])
def test_other_sizes(n_cells, n_genes):
    adata = gfx.datasets.toy(n_cells, n_genes)
    assert adata.shape == (n_cells, n_genes)
    assert adata.var_names.is_unique


def test_too_few_or_too_many_genes():
    with pytest.raises(ValueError, match="`n_genes=15` leaves no room for the 16 marker genes"):
        gfx.datasets.toy(n_genes=15)
    with pytest.raises(ValueError, match=r"`n_genes=1000000`, but the embedded model knows [\d,]+ genes"):
        gfx.datasets.toy(n_genes=1_000_000)
