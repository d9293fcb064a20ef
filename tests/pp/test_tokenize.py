"""`pp.tokenize`: the official tokens, the same tokens from every container, and nothing written on failure."""

from __future__ import annotations

import json
import re

import anndata as ad
import dask.array as da
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import sparse_dataset
from scipy import sparse

import gfx
from gfx._tokens import find_tokens, make_tokens


@pytest.fixture(scope="module")
def toy(toy_vocabulary, as_model):
    return as_model(toy_vocabulary)


def ragged(adata, key="gfx_tokens"):
    return [row[row > 0].tolist() for row in adata.obsm[key]]


def padded(tokens):
    return tokens.padded(np.arange(len(tokens)))


def snapshot(data) -> dict:
    """Everything that a failed call could have changed."""
    seen = {"obs": data.obs.copy(), "var": data.var.copy(), "X": data.X.copy(), "is_view": data.is_view}
    seen |= {
        f"{slot}/{key}": value
        for slot in ("obsm", "varm", "obsp", "varp", "layers")
        for key, value in getattr(data, slot).items()
    }
    return seen | {"uns": json.dumps(data.uns, default=str)}


def assert_untouched(data, before: dict) -> None:
    after = snapshot(data)
    assert set(after) == set(before)
    for key, value in before.items():
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(value, after[key])
        elif sparse.issparse(value):
            assert (type(value), value.dtype, value.shape) == (type(after[key]), after[key].dtype, after[key].shape)
            for part in ("data", "indices", "indptr"):
                np.testing.assert_array_equal(getattr(value, part), getattr(after[key], part))
        else:
            np.testing.assert_array_equal(value, after[key])


# --- the official software ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_tokens(golden):
    return json.loads((golden / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def official(official_v1, official_v2, as_model):
    return {"V1": as_model(official_v1, 2048, "V1"), "V2": as_model(official_v2, 4096, "V2")}


def golden_cells(golden_tokens, drop=()) -> ad.AnnData:
    """The golden input; `drop` leaves out columns that the official software drops and we recognise."""
    names = golden_tokens["genes"]
    cells = ad.AnnData(
        sparse.csr_matrix(np.array(golden_tokens["counts"], dtype=np.float32)),
        obs=pd.DataFrame(golden_tokens["obs"], index=[f"cell{i}" for i in range(8)]),
        var=pd.DataFrame({"ensembl_id": names}, index=names),
    )
    return cells[:, [name not in drop for name in names]].copy()


#: The official software drops these; V1's has no symbols. See docs/differences.md.
DROPPED = {"V1": ("ENSG00000000971.12", "SCYL3", "PACE1"), "V2": ("ENSG00000000971.12",)}


@pytest.mark.parametrize("family", ["V1", "V2"])
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.array])
def test_official_tokens(golden_tokens, official, family, form):
    cells = golden_cells(golden_tokens, DROPPED[family])
    cells.X = form(cells.X.toarray())
    gfx.pp.tokenize(cells, model=official[family], gene_ids="ensembl_id", n_counts="n_counts")
    # The official software leaves out cell 2 (filter_pass is 0) and cell 5 (empty); we keep every row.
    kept = [0, 1, 3, 4, 6, 7]
    expected = golden_tokens["expected"][family]
    assert [ragged(cells)[i] for i in kept] == expected["input_ids"]
    assert cells.obs["gfx_tokens_n"].iloc[kept].tolist() == expected["length"]


def test_departure_versioned_ids_are_recognised(golden_tokens, official):
    cells, without = golden_cells(golden_tokens), golden_cells(golden_tokens, DROPPED["V2"])
    for adata in (cells, without):
        gfx.pp.tokenize(adata, model=official["V2"])
    token = official["V2"].vocabulary.token_of["ENSG00000000971"]
    column = golden_tokens["genes"].index("ENSG00000000971.12")
    measured = np.array(golden_tokens["counts"])[:, column] > 0
    assert measured.any()
    # Only where the plain id is not among the genes anyway does its token come from the versioned one.
    assert "ENSG00000000971" not in golden_tokens["genes"]
    for is_measured, ours, theirs in zip(measured, ragged(cells), ragged(without), strict=True):
        assert (token in ours) == is_measured
        assert [t for t in ours if t != token] == theirs


def test_departure_symbols_and_aliases_are_recognised_in_v1(golden_tokens, official):
    cells, without = golden_cells(golden_tokens), golden_cells(golden_tokens, DROPPED["V1"])
    for adata in (cells, without):
        gfx.pp.tokenize(adata, model=official["V1"])
    vocabulary = official["V1"].vocabulary
    assert vocabulary.resolve(["SCYL3"]) == vocabulary.resolve(["ENSG00000000457"])
    counts = dict(zip(golden_tokens["genes"], np.array(golden_tokens["counts"]).T, strict=True))
    token = vocabulary.resolve(["SCYL3"])[0]
    detected = counts["SCYL3"] + counts["ENSG00000000457"] > 0
    assert [token in ours for ours in ragged(cells)] == detected.tolist()
    assert [token in ours for ours in ragged(without)] == (counts["ENSG00000000457"] > 0).tolist()


def test_departure_verbatim_repeats_are_summed(toy, toy_vocabulary):
    names = [f"TOY{n}" for n in range(1, 13)] + ["TOY1"]
    x = np.zeros((1, 13))
    x[0, [0, 12, 1]] = 5, 7, 3
    cells = ad.AnnData(x, var=pd.DataFrame({"names": names}, index=[str(i) for i in range(13)]))
    gfx.pp.tokenize(cells, model=toy, gene_ids="names")
    values = {4: 12 / toy_vocabulary.medians[4], 5: 3 / toy_vocabulary.medians[5]}
    assert ragged(cells) == [[2, *sorted(values, key=values.get, reverse=True), 3]]
    assert cells.uns["gfx_tokens"]["report"]["n_genes_repeated"] == 1


def test_departure_stored_zeros_are_not_detected(toy, toy_cells):
    cells = toy_cells(5)
    expected = cells.copy()
    cells.X.data[::3] = 0
    expected.X = sparse.csr_matrix(cells.X.toarray())
    assert expected.X.nnz < cells.X.nnz
    for adata in (cells, expected):
        gfx.pp.tokenize(adata, model=toy)
    assert ragged(cells) == ragged(expected)


def test_departure_ties_are_in_the_order_of_tokens(official):
    # Genes that share the filler median of the published dictionary tie whenever their counts are equal.
    vocabulary = official["V2"].vocabulary
    shared = np.flatnonzero(vocabulary.medians == 1.105969024047805)
    assert len(shared) == 72
    order = np.random.default_rng(0).permutation(shared)
    cells = ad.AnnData(np.ones((1, 72)), var=pd.DataFrame(index=vocabulary.ids[order].astype(str)))
    gfx.pp.tokenize(cells, model=official["V2"])
    assert ragged(cells) == [[2, *shared, 3]]


def test_departure_empty_cells_stay(golden_tokens, official):
    cells = golden_cells(golden_tokens)
    gfx.pp.tokenize(cells, model=official["V2"])
    assert ragged(cells)[5] == []
    assert cells.obs["gfx_tokens_n"].iloc[5] == 0
    assert cells.uns["gfx_tokens"]["report"]["n_cells_empty"] == 1


def test_departure_depth_plays_no_part(golden_tokens, official):
    cells = golden_cells(golden_tokens)
    gfx.pp.tokenize(cells, model=official["V2"])
    cells.obs["more"] = cells.obs["n_counts"] * np.linspace(1, 1.5, 8)
    gfx.pp.tokenize(cells, model=official["V2"], n_counts="more", key_added="other")
    np.testing.assert_array_equal(cells.obsm["other"], cells.obsm["gfx_tokens"])
    shares = [cells.uns[key]["report"]["share_of_counts"] for key in ("gfx_tokens", "other")]
    assert shares[1] < shares[0]


# --- what is written ------------------------------------------------------------------------------------------------


def test_slots(toy, toy_cells):
    cells = toy_cells(20)
    x = cells.X.copy()
    assert gfx.pp.tokenize(cells, model=toy) is None
    tokens = cells.obsm["gfx_tokens"]
    assert (tokens.dtype, tokens.shape) == (np.uint16, (20, 64))
    assert cells.obs["gfx_tokens_n"].dtype == np.int32
    assert cells.obs["gfx_tokens_n"].tolist() == (tokens > 0).sum(axis=1).tolist()
    assert (tokens[:, 0] == 2).all()
    assert [row[-1] for row in ragged(cells)] == [3] * 20
    assert (set(cells.obsm), set(cells.uns), set(cells.layers) - {None}) == ({"gfx_tokens"}, {"gfx_tokens"}, set())
    assert cells.uns["gfx_tokens"]["params"] == {
        "gfx_version": gfx.__version__,
        "function": "pp.tokenize",
        **toy.provenance(),
        "max_length": 64,
        "use_raw": False,
        "counts": "raw",
    }
    report = cells.uns["gfx_tokens"]["report"]
    known = x[:, :200].sum() / x.sum()
    n_detected = (x[:, :200] > 0).sum(axis=1)
    assert report.pop("share_of_counts") == pytest.approx(known)
    assert re.fullmatch("[0-9a-f]{64}", report.pop("names_sha256"))
    assert report == {
        "n_cells": 20,
        "n_cells_empty": 0,
        "n_cells_truncated": int((n_detected > 62).sum()),
        "n_genes": 205,
        "n_genes_recognised": 200,
        "n_genes_repeated": 0,
        "n_genes_made_unique": 0,
        "values": "raw counts",
        "keeps_order": True,
        "not_genes": "",
    }
    assert 0 < report["n_cells_truncated"] < 20
    assert (x != cells.X).nnz == 0


def test_a_cell_that_just_fits_is_not_called_cut(toy_vocabulary, as_model):
    x = np.zeros((2, 12))
    x[0, :10] = 1
    x[1, :11] = 1
    cells = ad.AnnData(x, var=pd.DataFrame(index=[f"TOY{n}" for n in range(1, 13)]))
    gfx.pp.tokenize(cells, model=as_model(toy_vocabulary, 12))
    assert cells.obs["gfx_tokens_n"].tolist() == [12, 12]
    assert cells.uns["gfx_tokens"]["report"]["n_cells_truncated"] == 1


def test_key_added_and_copy(toy, toy_cells):
    cells = toy_cells(5)
    before = snapshot(cells)
    made = gfx.pp.tokenize(cells, model=toy, key_added="mine", copy=True)
    assert_untouched(cells, before)
    assert (set(made.obsm), set(made.uns)) == ({"mine"}, {"mine"})
    assert "mine_n" in made.obs
    with pytest.raises(ValueError, match=r"key_added='a/b'` has a '/'"):
        gfx.pp.tokenize(cells, model=toy, key_added="a/b")
    assert_untouched(cells, before)


def test_messages(toy, toy_cells, capsys):
    cells = toy_cells(20)
    cells.var_names = [*cells.var_names[:-5], "TOY1", "OLDTOY2", "x1", "x2", "x3"]
    cells.X.data[cells.X.indptr[3] : cells.X.indptr[4]] = 0
    with gfx.settings.override(verbosity=2):
        gfx.pp.tokenize(cells, model=toy)
    said = capsys.readouterr().out
    assert "202 of 205 genes are in the vocabulary 'toy'; they hold 9" in said
    assert "2 columns are of the same gene as another one; their counts were summed." in said
    assert "1 cells have no recognised gene: their rows are empty." in said
    assert "cells have more than 62 recognised genes: cut after these." in said
    assert "added 'gfx_tokens' (adata.obsm, .obs, .uns)" in said
    with gfx.settings.override(verbosity=1):
        gfx.pp.tokenize(cells, model=toy)
    assert capsys.readouterr().out == ""


def test_little_of_the_counts_recognised_is_a_warning(toy, toy_cells):
    cells = toy_cells(5)
    cells.X = sparse.csr_matrix(cells.X.toarray() + np.r_[np.zeros(200), np.full(5, 1000)])
    before = snapshot(cells)
    # Warnings are errors in these tests: even then nothing is left behind.
    with pytest.raises(UserWarning, match=r"Only \d% of the counts .*gene_ids="):
        gfx.pp.tokenize(cells, model=toy)
    assert_untouched(cells, before)


# --- containers -----------------------------------------------------------------------------------------------------

FORMS = {
    "csr_array": sparse.csr_array,
    "csc_matrix": sparse.csc_matrix,
    "csc_array": sparse.csc_array,
    "dense": lambda x: x.toarray(),
    "fortran": lambda x: np.asfortranarray(x.toarray()),
    "dask dense": lambda x: da.from_array(x.toarray(), chunks=(7, 50)),
    "dask csr": lambda x: da.from_array(x.toarray(), chunks=(7, -1)).map_blocks(sparse.csr_matrix),
}


@pytest.fixture(scope="module")
def expected(toy, toy_cells):
    return padded(make_tokens(toy_cells(20), toy.vocabulary, toy.max_length)[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_every_matrix_gives_the_same_tokens(toy, toy_cells, expected, form, dtype):
    cells = toy_cells(20)
    cells.X = FORMS[form](cells.X.astype(dtype))
    gfx.pp.tokenize(cells, model=toy)
    np.testing.assert_array_equal(cells.obsm["gfx_tokens"], expected)
    del cells.obsm["gfx_tokens"]
    cells.layers["counts"] = cells.X
    cells.X = np.full(cells.shape, np.nan, dtype=np.float32)
    gfx.pp.tokenize(cells, model=toy, layer="counts")
    np.testing.assert_array_equal(cells.obsm["gfx_tokens"], expected)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int64", "uint64", "float16", "float64"])
@pytest.mark.parametrize("form", ["dense", "csr_array"])
def test_every_number_type_gives_the_same_tokens(toy, toy_cells, expected, form, dtype):
    if (form, dtype) == ("csr_array", "float16"):
        pytest.skip("scipy has no sparse matrix of float16")
    cells = toy_cells(20)
    x = cells.X.toarray().astype(dtype)
    cells.X = x if form == "dense" else sparse.csr_array(x)
    gfx.pp.tokenize(cells, model=toy)
    np.testing.assert_array_equal(cells.obsm["gfx_tokens"], expected)


@pytest.mark.parametrize("form", ["csr_matrix", "csc_matrix", "dense"])
def test_backed_h5ad(toy, toy_cells, expected, form, tmp_path):
    cells = toy_cells(20)
    cells.X = cells.X.toarray() if form == "dense" else getattr(sparse, form)(cells.X)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    size = (tmp_path / "cells.h5ad").stat().st_size
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    gfx.pp.tokenize(backed, model=toy)
    np.testing.assert_array_equal(backed.obsm["gfx_tokens"], expected)
    with pytest.raises(ValueError, match="to_memory"):
        gfx.pp.tokenize(backed, model=toy, copy=True)
    with pytest.raises(ValueError, match="to_memory"):
        gfx.pp.tokenize(backed[:3], model=toy)
    backed.file.close()
    assert (tmp_path / "cells.h5ad").stat().st_size == size


@pytest.mark.parametrize("form", ["csr_matrix", "csc_matrix", "dense"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
def test_zarr(toy, toy_cells, expected, form, tmp_path):
    cells = toy_cells(20)
    cells.X = cells.X.toarray() if form == "dense" else getattr(sparse, form)(cells.X)
    cells.write_zarr(tmp_path / "cells.zarr")
    group = zarr.open_group(tmp_path / "cells.zarr", mode="r")
    x = group["X"] if form == "dense" else sparse_dataset(group["X"])
    on_disk = ad.AnnData(obs=cells.obs, var=cells.var, layers={"counts": x})
    gfx.pp.tokenize(on_disk, model=toy, layer="counts")
    np.testing.assert_array_equal(on_disk.obsm["gfx_tokens"], expected)
    read = ad.read_zarr(tmp_path / "cells.zarr")
    gfx.pp.tokenize(read, model=toy)
    np.testing.assert_array_equal(read.obsm["gfx_tokens"], expected)


def test_view(toy, toy_cells, expected):
    cells = toy_cells(20)
    view = cells[3:11, ::-1]
    with pytest.warns(ad.ImplicitModificationWarning, match="view"):
        gfx.pp.tokenize(view, model=toy)
    assert not view.is_view
    n = view.obs["gfx_tokens_n"].max()
    np.testing.assert_array_equal(view.obsm["gfx_tokens"], expected[3:11, :n])
    assert (set(cells.obsm), "gfx_tokens_n" in cells.obs) == (set(), False)
    made = gfx.pp.tokenize(cells[3:11], model=toy, copy=True)
    np.testing.assert_array_equal(made.obsm["gfx_tokens"], expected[3:11, :n])


def test_mudata(toy, toy_cells, expected, as_mudata):
    other = toy_cells(20, seed=1)
    other.var_names = [f"other:{name}" for name in other.var_names]
    mdata = as_mudata({"rna": toy_cells(20), "other": other})
    made = gfx.pp.tokenize(mdata, model=toy, mod="rna", copy=True)
    assert (set(mdata["rna"].obsm), set(made["other"].obsm)) == (set(), set())
    np.testing.assert_array_equal(made["rna"].obsm["gfx_tokens"], expected)
    gfx.pp.tokenize(mdata, model=toy, mod="rna")
    np.testing.assert_array_equal(mdata["rna"].obsm["gfx_tokens"], expected)
    with pytest.raises(ValueError, match="2 modalities"):
        gfx.pp.tokenize(mdata, model=toy)


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(toy, toy_cells, suffix, tmp_path):
    cells = toy_cells(20)
    gfx.pp.tokenize(cells, model=toy, gene_ids="ensembl_id")
    path = tmp_path / f"cells.{suffix}"
    getattr(cells, f"write_{suffix}")(path)
    read = (ad.read_h5ad if suffix == "h5ad" else ad.read_zarr)(path)
    assert read.obsm["gfx_tokens"].dtype == np.uint16
    np.testing.assert_array_equal(read.obsm["gfx_tokens"], cells.obsm["gfx_tokens"])
    assert read.obs["gfx_tokens_n"].tolist() == cells.obs["gfx_tokens_n"].tolist()
    for part in ("params", "report"):
        assert dict(read.uns["gfx_tokens"][part]) == cells.uns["gfx_tokens"][part]
    # Tokens are ids, not columns: they survive a choice of genes, and a file.
    found = find_tokens(read[5:9, :3], toy.vocabulary, toy.max_length)
    assert [row.tolist() for row in found] == ragged(cells)[5:9]
    assert found.lengths.tolist() == cells.obs["gfx_tokens_n"].tolist()[5:9]


def test_no_cells(toy, toy_cells):
    cells = toy_cells(4)[:0].copy()
    gfx.pp.tokenize(cells, model=toy)
    assert cells.obsm["gfx_tokens"].shape == (0, 0)


# --- genes ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_gene_name(toy, toy_cells, expected):
    cells = toy_cells(20)
    ids = cells.var["ensembl_id"].tolist()
    mixed = [
        [name, f"{ensembl}.{n}", f"old{name.lower()}", ensembl][n % 4]
        for n, (name, ensembl) in enumerate(zip(cells.var_names, ids, strict=True))
    ]
    mixed[0] = "ENSG00000999999"  # retired
    cells.var["mixed"] = mixed
    cells.var["category"] = pd.Categorical(mixed)
    cells.var["versioned"] = [f"{ensembl}.3" for ensembl in ids]
    for column in ("ensembl_id", "mixed", "category", "versioned"):
        gfx.pp.tokenize(cells, model=toy, gene_ids=column)
        np.testing.assert_array_equal(cells.obsm["gfx_tokens"], expected)
        assert cells.uns["gfx_tokens"]["params"]["gene_ids"] == column


def test_columns_in_any_order(toy, toy_cells, expected):
    order = np.random.default_rng(0).permutation(205)
    cells = toy_cells(20)[:, order].copy()
    gfx.pp.tokenize(cells, model=toy)
    np.testing.assert_array_equal(cells.obsm["gfx_tokens"], expected)


@pytest.mark.parametrize("name", ["eval/pbmc3k_10x", "train/li2017_celllines", "other/celltypist_sample"])
def test_real_cells(real_cells, official, name):
    cells = real_cells(name)[:40].copy()
    for family, model in official.items():
        gfx.pp.tokenize(cells, model=model, gene_ids="ensembl_id", key_added=family)
        vocabulary = model.vocabulary
        tokens = vocabulary.resolve(cells.var["ensembl_id"].astype(str))
        for i in range(0, 40, 7):
            sums = np.zeros(len(vocabulary))
            row = cells.X[i].toarray().ravel()
            np.add.at(sums, tokens[tokens >= 0], row[tokens >= 0])
            genes = np.flatnonzero(sums)
            ranked = genes[np.lexsort((genes, -sums[genes] / vocabulary.medians[genes]))].tolist()
            room = model.max_length - (2 if vocabulary.has_cls else 0)
            plain = [2, *ranked[:room], 3] if vocabulary.has_cls else ranked[:room]
            assert ragged(cells, family)[i] == plain
        assert cells.uns[family]["report"]["share_of_counts"] > 0.85


def test_mouse_cells_are_refused(real_cells, official):
    mouse = real_cells("other/mouse_heart_1k_v2_10x")[:20].copy()
    before = snapshot(mouse)
    with pytest.raises(ValueError, match="These are mouse or rat genes"):
        gfx.pp.tokenize(mouse, model=official["V2"])
    with pytest.raises(ValueError, match="These are mouse genes"):
        gfx.pp.tokenize(mouse, model=official["V2"], gene_ids="ensembl_id")
    assert_untouched(mouse, before)


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("target", [None, 1e4, 1e6])
def test_logarithms_of_real_cells_give_the_tokens_of_their_counts(real_cells, official, dtype, target):
    cells = real_cells("eval/pbmc3k_10x")[:400].copy()
    gfx.pp.tokenize(cells, model=official["V2"])
    x = cells.X.astype(np.float64)
    if target is not None:
        x = sparse.csr_matrix(x.multiply(target / x.sum(axis=1)))
    cells.layers["normalized"] = x.astype(dtype)
    cells.layers["log1p"] = x.astype(dtype).log1p()
    for kind in ("log1p", "normalized"):
        gfx.pp.tokenize(cells, model=official["V2"], layer=kind, counts=kind, key_added=kind)
        np.testing.assert_array_equal(cells.obsm[kind], cells.obsm["gfx_tokens"])


def test_log_normalised_cells_of_scanpy(official):
    scanpy = pytest.importorskip("scanpy")
    cells = scanpy.datasets.pbmc68k_reduced()
    before = snapshot(cells)
    with pytest.raises(
        ValueError, match=r"negative values.*`gfx\.pp\.tokenize\(adata, use_raw=True, counts='log1p'\)`"
    ):
        gfx.pp.tokenize(cells, model=official["V2"])
    with pytest.raises(
        ValueError, match=r"log-normalised counts.*with `gfx\.pp\.tokenize\(adata, use_raw=True, counts"
    ):
        gfx.pp.tokenize(cells, model=official["V2"], use_raw=True)
    assert_untouched(cells, before)
    gfx.pp.tokenize(cells, model=official["V2"], use_raw=True, counts="log1p")
    report = cells.uns["gfx_tokens"]["report"]
    assert (report["n_genes"], report["n_genes_recognised"]) == (765, 737)
    assert cells.obs["gfx_tokens_n"].median() > 200


def spoiled(cells, what):
    match what:
        case "scaled":
            cells.X = cells.X.toarray() - cells.X.toarray().mean(axis=0)
        case "few genes":
            cells.var_names = [f"x{n}" for n in range(205)]
        case "layers":
            cells.layers["counts"] = cells.X.copy()
            cells.X = cells.X * 0.37
        case _:
            cells.X.data[7] = float(what)
    return cells


@pytest.mark.parametrize("function", [gfx.pp.tokenize, gfx.pp.check])
def test_values_of_another_place_are_advised_by_their_place(toy, toy_cells, function):
    cells = toy_cells(20)
    cells.raw = ad.AnnData(np.log1p(cells.X), var=cells.var)
    cells.layers["logs"] = cells.raw.X.copy()
    cells.X = cells.X.toarray() - 1

    def said(**arguments):
        if function is gfx.pp.check:
            return function(cells, model=toy, **arguments).set_index("check").loc["values", "advice"]
        with pytest.raises(ValueError, match="holds") as error:
            function(cells, model=toy, **arguments)
        return str(error.value)

    calls = [f"`gfx.pp.tokenize(adata, {place}, counts='log1p')`" for place in ("layer='logs'", "use_raw=True")]
    for arguments in ({}, {"layer": "logs"}, {"use_raw": True}):
        assert said(**arguments).endswith(f"This object can be used with {' or '.join(calls)}.")
        assert said(**arguments).count("gfx.pp.tokenize") == 2
    for arguments in ({"layer": "logs"}, {"use_raw": True}):
        gfx.pp.tokenize(cells, model=toy, counts="log1p", **arguments)


def test_a_call_that_failed_is_not_advised(toy, toy_cells):
    cells = ad.concat([toy_cells(60)] * 6, index_unique="-", merge="same")
    cells.X.data[-1] = 0.5
    for function in (gfx.pp.tokenize, lambda *_, **__: gfx.models.build_vocabulary(cells, gene_ids="ensembl_id")):
        with pytest.raises(ValueError, match=r"fractions, such as 0\.5") as error:
            function(cells, model=toy)
        assert not any(text in str(error.value) for text in ("can be used with", "no argument"))


@pytest.mark.parametrize(
    ("kind", "counts", "values"),
    [
        ("counts", "raw", "raw counts"),
        ("counts", "estimated", "raw counts"),
        ("normalized", "normalized", "counts divided by depth"),
        ("log1p", "log1p", "log-normalised counts"),
        ("estimates", "estimated", "estimated counts, or FPKM"),
        ("estimates", "normalized", "estimated counts, or FPKM"),
        ("normalized estimates", "normalized", "TPM, or estimated counts divided by depth"),
        ("logs of estimates", "log1p", "logarithms of TPM or estimated counts"),
    ],
)
def test_the_log_and_the_report_say_what_values_are(toy, toy_cells, capsys, kind, counts, values):
    cells = toy_cells(40)
    x = cells.X.toarray().astype(np.float64)
    if "estimates" in kind:
        x *= np.random.default_rng(0).beta(8, 2, x.shape)
    if kind.startswith(("normalized", "log")):
        x *= 1e4 / x.sum(axis=1, keepdims=True)
    cells.X = np.log1p(x) if kind.startswith("log") else x
    with gfx.settings.override(verbosity=2):
        gfx.pp.tokenize(cells, model=toy, counts=counts)
    report, is_in_order = cells.uns["gfx_tokens"]["report"], "estimates" not in kind
    assert (report["values"], report["keeps_order"]) == (values, is_in_order)
    said = f"The values are {values}. Genes are ranked by these values; this is not the order of the counts."
    assert (said in " ".join(capsys.readouterr().out.split())) == (not is_in_order)
    assert (gfx.pp.check(cells, model=toy, counts=counts)["status"][0] == "ok") == is_in_order


def test_estimates_that_were_divided_by_depth_keep_genes_below_one_half(toy, toy_cells):
    """Half a molecule is no threshold for shares of 10,000."""
    cells = toy_cells(40)
    x = cells.X.toarray() * np.random.default_rng(0).beta(8, 2, cells.shape)
    cells.X = (x / x.sum(axis=1, keepdims=True) * 100).astype(np.float32)
    with pytest.raises(ValueError, match=r"divided by depth.*`counts='normalized'`, which ranks genes by these val"):
        gfx.pp.tokenize(cells, model=toy)
    gfx.pp.tokenize(cells, model=toy, counts="normalized")
    linear = cells.obsm["gfx_tokens"].copy()
    assert (cells.obs["gfx_tokens_n"] - 2 == np.minimum((x[:, :200] > 0).sum(axis=1), 62)).all()
    cells.X = np.log1p(cells.X)
    gfx.pp.tokenize(cells, model=toy, counts="log1p")
    np.testing.assert_array_equal(cells.obsm["gfx_tokens"], linear)


@pytest.mark.parametrize(
    ("what", "arguments", "error", "text"),
    [
        ("nan", {}, ValueError, "`adata.X` holds NaN"),
        ("inf", {}, ValueError, "`adata.X` holds infinite"),
        ("-1", {}, ValueError, "negative values"),
        ("scaled", {"counts": "normalized"}, ValueError, "scaled or batch-corrected"),
        ("0.5", {}, ValueError, "fractions, such as 0.5"),
        ("layers", {}, ValueError, r"`gfx\.pp\.tokenize\(adata, layer='counts'\)`"),
        ("few genes", {}, ValueError, r"Only 0 of 205 genes.*\['x0', 'x1'.*gene_ids="),
        ("2", {"counts": "log1p"}, ValueError, "not their logarithms"),
        (
            "2",
            {"counts": "logs"},
            ValueError,
            r"`counts` is one of \['raw', .*'estimated'\], found 'logs'",
        ),
        ("2", {"layer": "nothing"}, KeyError, "Did not find 'nothing' in `adata.layers`"),
        ("2", {"gene_ids": "ensembl"}, KeyError, "Did you mean 'ensembl_id'"),
        ("2", {"use_raw": True}, ValueError, "no `.raw`"),
        ("2", {"mod": "rna"}, TypeError, "`mod='rna'` is for MuData"),
        ("2", {"n_counts": "depth"}, KeyError, "Did not find 'depth' in `adata.obs`"),
        ("2", {"n_counts": "cell_type"}, TypeError, "not numbers"),
        ("2", {"n_counts": "few"}, ValueError, r"is 3 for cell 'cell0', whose counts alone sum to \d+"),
        ("2", {"n_counts": "gap"}, ValueError, r"not a positive number for the cells \['cell1'\]"),
        ("2", {"n_counts": "minus"}, ValueError, "not a positive number"),
        ("2", {"n_counts": "few", "counts": "normalized"}, ValueError, "counts molecules"),
    ],
)
def test_failed_calls_leave_the_object_untouched(toy, toy_cells, what, arguments, error, text):
    cells = spoiled(toy_cells(20), what)
    cells.obs["few"] = 3
    cells.obs["gap"] = [1e6, np.nan] + [1e6] * 18
    cells.obs["minus"] = -1
    before = snapshot(cells)
    with pytest.raises(error, match=text):
        gfx.pp.tokenize(cells, model=toy, **arguments)
    assert_untouched(cells, before)


@pytest.mark.parametrize("backed", [None, "r"])
def test_a_file_whose_matrix_points_outside_itself_is_refused(toy, toy_cells, tmp_path, backed):
    """Compiled code would follow the indices and end the interpreter."""
    toy_cells(20).write_h5ad(tmp_path / "hostile.h5ad")
    with h5py.File(tmp_path / "hostile.h5ad", "r+") as file:
        file["X/indices"][3:9] = 2**31 - 1
    cells = ad.read_h5ad(tmp_path / "hostile.h5ad", backed=backed)
    for function in (gfx.pp.tokenize, gfx.pp.check):
        with pytest.raises(ValueError, match=r"damaged: `indices` go from \d+ to 2147483647, and there are 205"):
            function(cells, model=toy)
    assert set(cells.obsm) == set()
    if backed:
        cells.file.close()


# --- tokens for the tools -------------------------------------------------------------------------------------------


def test_tools_make_tokens_on_the_fly(toy, toy_cells, expected):
    cells = toy_cells(20)
    found = find_tokens(cells, toy.vocabulary, toy.max_length)
    np.testing.assert_array_equal(padded(found), expected)
    assert set(cells.obsm) == set()
    cells.layers["counts"] = cells.X.copy()
    cells.X = np.log1p(cells.X)
    with pytest.raises(ValueError, match=r"log-normalised.*with `gfx\.pp\.tokenize\(adata, layer='counts'\)`"):
        find_tokens(cells, toy.vocabulary, toy.max_length)
    np.testing.assert_array_equal(padded(find_tokens(cells, toy.vocabulary, 64, layer="counts")), expected)
    gfx.pp.tokenize(cells, model=toy, counts="log1p")
    np.testing.assert_array_equal(padded(find_tokens(cells, toy.vocabulary, 64)), expected)


def test_tools_refuse_tokens_of_another_kind(toy, toy_vocabulary_v1, toy_vocabulary, toy_cells):
    cells = toy_cells(20)
    cells.layers["counts"] = cells.X.copy()
    gfx.pp.tokenize(cells, model=toy, layer="counts")
    with pytest.raises(ValueError, match=r"made for the vocabulary 'toy', this model reads 'toy-v1'"):
        find_tokens(cells, toy_vocabulary_v1, 64)
    with pytest.raises(ValueError, match="up to 64 long, this model reads 32"):
        find_tokens(cells, toy_vocabulary, 32)
    with pytest.raises(ValueError, match="were cut at 64, this model reads 128"):
        find_tokens(cells, toy_vocabulary, 128)
    with pytest.raises(ValueError, match="made from 'counts', you asked for layer 'other'"):
        find_tokens(cells, toy_vocabulary, 64, layer="other")
    np.testing.assert_array_equal(
        padded(find_tokens(cells, toy_vocabulary, 64, layer="counts")), cells.obsm["gfx_tokens"]
    )
    del cells.uns["gfx_tokens"]
    with pytest.raises(ValueError, match=r"no full record.*`anndata\.concat` drops `uns` unless"):
        find_tokens(cells, toy_vocabulary, 64)


@pytest.mark.parametrize("family", ["V1", "V2"])
def test_other_names_of_the_same_genes_are_no_other_counts(real_cells, official, family):
    """A few symbols are those of other genes than their ids were."""
    model = official[family]
    named = real_cells("eval/pbmc3k_10x")[:200].copy()
    cells = named.copy()
    cells.var_names = named.var["ensembl_id"].astype(str).to_numpy()
    gfx.pp.tokenize(cells, model=model)
    before = padded(find_tokens(cells, model.vocabulary, model.max_length))
    cells.var_names = named.var_names
    with gfx.settings.override(verbosity=0):
        again = gfx.pp.tokenize(cells, model=model, copy=True)
    assert ragged(again) != ragged(cells)
    np.testing.assert_array_equal(padded(find_tokens(cells, model.vocabulary, model.max_length)), before)
    cells.X = cells.X[::-1].copy()
    with pytest.raises(ValueError, match="not those of the counts"):
        find_tokens(cells, model.vocabulary, model.max_length)


def test_a_folder_is_a_model(toy_folder, toy_cells, expected):
    cells = toy_cells(20)
    gfx.pp.tokenize(cells, model=toy_folder)
    np.testing.assert_array_equal(cells.obsm["gfx_tokens"], expected)
