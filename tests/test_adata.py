"""Reading containers: modality, counts, gene names, rows."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace

import anndata as ad
import dask.array as da
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import sparse_dataset, write_elem
from scipy import sparse

from gfx._adata import (
    GeneMatch,
    cell_mask,
    copied,
    gene_names,
    genes_problem,
    match_genes,
    obs_column,
    open_counts,
    pick,
    row_blocks,
    to_counts,
    usable_calls,
)
from gfx.models import build_vocabulary

# --- containers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mdata(toy_cells, as_mudata):
    other = toy_cells(8, seed=1)
    other.var_names = [f"other:{name}" for name in other.var_names]
    return as_mudata({"rna": toy_cells(8), "other": other})


def test_pick(toy_cells, mdata, as_mudata):
    adata = toy_cells(5)
    assert pick(adata, None) is adata
    assert pick(mdata, "rna") is mdata.mod["rna"]
    assert pick(as_mudata({"rna": adata}), None) is adata
    with pytest.raises(ValueError, match=r"2 modalities.*`mod=` one of \['rna', 'other'\]"):
        pick(mdata, None)
    with pytest.raises(KeyError, match=r"Did not find modality 'atac'.*'rna', 'other'"):
        pick(mdata, "atac")
    with pytest.raises(TypeError, match="`mod='rna'` is for MuData; found AnnData"):
        pick(adata, "rna")
    with pytest.raises(TypeError, match="Expected an AnnData or MuData, found DataFrame"):
        pick(pd.DataFrame(), None)


def test_copied(toy_cells, tmp_path):
    adata = toy_cells(5)
    assert copied(adata, copy=False) is adata
    assert copied(adata, copy=True) is not adata
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert copied(backed, copy=False) is backed
    with pytest.raises(ValueError, match=r"`copy=True` does not work on a file-backed.*to_memory"):
        copied(backed, copy=True)
    with pytest.raises(ValueError, match=r"view of a file cannot hold results.*to_memory"):
        copied(backed[:2], copy=False)
    backed.file.close()


def test_obs_column(toy_cells):
    adata = toy_cells(5)
    assert obs_column(adata, "condition").tolist() == ["sick", "healthy", "sick", "healthy", "sick"]
    with pytest.raises(KeyError, match=r"Did not find 'conditions' in `adata.obs`. Did you mean 'condition'"):
        obs_column(adata, "conditions")


def test_cell_mask(toy_cells):
    adata = toy_cells(4)
    adata.obs["wanted"] = [True, False, True, False]
    assert cell_mask(adata, None).tolist() == [True] * 4
    assert cell_mask(adata, "wanted").tolist() == [True, False, True, False]
    assert cell_mask(adata, np.array([False, True, False, False])).tolist() == [False, True, False, False]
    for wrong in ["condition", np.array([0, 1, 0, 1]), np.array([True])]:
        with pytest.raises(ValueError, match=r"expected bool of shape \(4,\), found"):
            cell_mask(adata, wrong)
    with pytest.raises(ValueError, match="selects no cell"):
        cell_mask(adata, np.zeros(4, dtype=bool))


def test_cell_mask_that_may_hold_missing_values(toy_cells):
    adata = toy_cells(4)
    adata.obs["wanted"] = pd.array([True, False, True, False], dtype="boolean")
    for mask in ["wanted", adata.obs["wanted"].iloc[::-1], adata.obs["wanted"].array]:
        found = cell_mask(adata, mask)
        assert found.dtype == bool
        assert found.tolist() == [True, False, True, False]
    plain = adata.obs["wanted"].astype(bool)
    adata.obs["unknown"] = pd.array([True, None, True, None], dtype="boolean")
    for mask in ["unknown", adata.obs["unknown"], adata.obs["unknown"].array, plain.iloc[:2]]:
        with pytest.raises(ValueError, match="one truth value per cell; 2 of 4 are missing"):
            cell_mask(adata, mask)


# --- where counts and names are -------------------------------------------------------------------------------------


def test_open_counts(toy_cells):
    adata = toy_cells(6)
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata[:, :20].copy()
    assert open_counts(adata).where == "adata.X"
    assert open_counts(adata, layer="counts").where == "adata.layers['counts']"
    raw = open_counts(adata, use_raw=True, gene_ids="ensembl_id")
    assert (raw.where, raw.x.shape) == ("adata.raw.X", (6, 20))
    assert raw.names[:2].tolist() == ["ENSG00000000001", "ENSG00000000002"]
    view = open_counts(adata[2:5, 100:], use_raw=True)
    assert (view.x.shape, view.names[0]) == ((3, 20), "TOY1")


def test_open_counts_says_what_is_missing(toy_cells):
    adata = toy_cells(6)
    with pytest.raises(ValueError, match=r"has no `\.raw`"):
        open_counts(adata, use_raw=True)
    with pytest.raises(KeyError, match=r"Did not find 'counts' in `adata.layers`. Present: \[\]"):
        open_counts(adata, layer="counts")
    with pytest.raises(ValueError, match="not both"):
        open_counts(adata, layer="counts", use_raw=True)
    with pytest.raises(KeyError, match="Did you mean 'ensembl_id'"):
        open_counts(adata, gene_ids="ensembl_ids")
    adata.layers["counts"] = adata.X.copy()
    del adata.X
    with pytest.raises(ValueError, match=r"`adata.X` is empty. .*one of \['counts'\]"):
        open_counts(adata)


def test_names_that_tables_write_for_nothing_are_no_genes(official_v2):
    names = pd.Series(["GATA4", None, np.nan, "nan", "NA", "", "None", "-", "<NA>"])
    assert gene_names(names).tolist() == ["GATA4"] + [""] * 8
    assert gene_names(names.astype("category")).tolist() == ["GATA4"] + [""] * 8
    assert gene_names(pd.Series([1.0, 2.0])).tolist() == ["1.0", "2.0"]
    # The published mapping has genes of these names; a column full of them would have been summed into one.
    assert (official_v2.resolve(["NAN", "NA"]) >= 0).all()
    assert (official_v2.resolve(gene_names(names)) >= 0).sum() == 1


# --- rows -----------------------------------------------------------------------------------------------------------

X = np.random.default_rng(0).poisson(0.4, (53, 30)).astype(np.float32)


def on_disk(kind: str, tmp_path):
    h5 = h5py.File(tmp_path / "x.h5", "w")
    group = zarr.open_group(tmp_path / "x.zarr", mode="w", zarr_format=2)
    match kind.split():
        case ["h5", "dense"]:
            write_elem(h5, "x", X)
            return h5["x"]
        case ["zarr", "dense"]:
            write_elem(group, "x", X)
            return group["x"]
        case ["h5", form]:
            write_elem(h5, "x", getattr(sparse, f"{form}_matrix")(X))
            return sparse_dataset(h5["x"])
        case ["zarr", form]:
            write_elem(group, "x", getattr(sparse, f"{form}_matrix")(X))
            return sparse_dataset(group["x"])


IN_MEMORY = {
    "dense": X.copy,
    "fortran": lambda: np.asfortranarray(X),
    "csr_matrix": lambda: sparse.csr_matrix(X),
    "csr_array": lambda: sparse.csr_array(X),
    "csc_matrix": lambda: sparse.csc_matrix(X),
    "csc_array": lambda: sparse.csc_array(X),
    "dask dense": lambda: da.from_array(X, chunks=(20, 13)),
    "dask csr": lambda: da.from_array(X, chunks=(20, -1)).map_blocks(sparse.csr_matrix),
    "dask csc": lambda: da.from_array(X, chunks=(7, -1)).map_blocks(sparse.csc_matrix),
}
ON_DISK = ["h5 dense", "h5 csr", "h5 csc", "zarr dense", "zarr csr", "zarr csc"]


@pytest.mark.parametrize("size", [1, 10, 2048])
@pytest.mark.parametrize("kind", [*IN_MEMORY, *ON_DISK])
def test_row_blocks_give_every_row_once(kind, size, tmp_path, monkeypatch):
    for values in ("_SPARSE_PIECE", "_DENSE_PIECE"):
        monkeypatch.setattr(f"gfx._adata.{values}", 100)  # of about 500 that are not 0
    x = IN_MEMORY[kind]() if kind in IN_MEMORY else on_disk(kind, tmp_path)
    seen = 0
    for rows, block in row_blocks(x, size):
        assert isinstance(block, sparse.csr_array)
        assert rows.start == seen
        assert 0 < block.shape[0] == rows.stop - rows.start <= size
        np.testing.assert_array_equal(block.toarray(), X[rows])
        seen = rows.stop
    assert seen == len(X)


def test_rows_on_disk_are_read_one_piece_ahead(monkeypatch):
    monkeypatch.setattr("gfx._adata._DENSE_PIECE", 10 * X.shape[1])
    starts, is_read = [], [threading.Event() for _ in range(6)]

    class OnDisk:
        shape = X.shape

        def __getitem__(self, rows):
            starts.append(rows.start)
            is_read[rows.start // 10].set()
            return X[rows]

    blocks = row_blocks(OnDisk())
    for number in range(3):
        assert next(blocks)[0].start == 10 * number
        assert is_read[number + 1].wait(10)  # while the caller has the block before
    blocks.close()
    assert starts == [0, 10, 20, 30]


def test_a_file_with_missing_values_is_refused(tmp_path):
    x = on_disk("h5 csr", tmp_path)
    values = x.group["data"][:-3]
    del x.group["data"]
    x.group["data"] = values
    with pytest.raises(ValueError, match="same size"):
        list(row_blocks(x))


BIG_ENDIAN = {
    "dense": lambda: X.astype(">f4"),
    "int dense": lambda: X.astype(">i2"),
    "csr": lambda: with_arrays(sparse.csr_matrix(X), lambda values: values.astype(values.dtype.newbyteorder(">"))),
    "csc": lambda: with_arrays(sparse.csc_array(X), lambda values: values.astype(values.dtype.newbyteorder(">"))),
    "dask": lambda: da.from_array(X.astype(">f8"), chunks=(20, 13)),
}


def with_arrays(matrix, change):
    """Change the stored arrays themselves: constructors of scipy would mend or refuse them."""
    for name in ("data", "indices", "indptr"):
        setattr(matrix, name, change(getattr(matrix, name)))
    return matrix


@pytest.mark.parametrize("kind", BIG_ENDIAN)
def test_numbers_of_machines_with_the_other_byte_order_are_read(kind):
    for rows, block in row_blocks(BIG_ENDIAN[kind](), 10):
        assert all(getattr(block, name).dtype.isnative for name in ("data", "indices", "indptr"))
        np.testing.assert_array_equal(block.toarray(), X[rows])


@pytest.mark.parametrize("form", ["csr", "csc"])
def test_a_file_of_a_machine_with_the_other_byte_order_is_read(form, tmp_path):
    x = on_disk(f"h5 {form}", tmp_path)
    for name in ("data", "indices", "indptr"):
        values = x.group[name][:]
        del x.group[name]
        x.group.create_dataset(name, data=values.astype(values.dtype.newbyteorder(">")))
    blocks = [block for _, block in row_blocks(x, 10)]
    assert all(block.data.dtype.isnative for block in blocks)
    np.testing.assert_array_equal(sparse.vstack(blocks).toarray(), X)


def test_masked_values_are_missing_values():
    masked = np.ma.masked_array(X.astype(np.int64), mask=np.zeros(X.shape, dtype=bool))
    np.testing.assert_array_equal(sparse.vstack([block for _, block in row_blocks(masked)]).toarray(), X)
    masked[40, 3] = np.ma.masked
    for x in (masked, da.from_array(masked, chunks=(20, -1))):
        blocks = [block.toarray() for _, block in row_blocks(x, 10)]
        np.testing.assert_array_equal(np.argwhere(np.isnan(np.concatenate(blocks))), [[40, 3]])


def column_too_high(data, indices, indptr):
    indices[-1] = 10_000


def column_below_0(data, indices, indptr):
    indices[100] = -7


def falling(data, indices, indptr):
    indptr[20] = indptr[24]


def beyond_the_end(data, indices, indptr):
    indptr[-1] += 50


def before_the_start(data, indices, indptr):
    indptr[0] = -3


DAMAGE = {
    column_too_high: "`indices` go from 0 to 10000, and there are",
    column_below_0: "`indices` go from -7 to",
    falling: "`indptr` falls",
    beyond_the_end: "`indptr` does not lead through",
    before_the_start: "`indptr` does not lead through",
}


KINDS_OF_DAMAGE = {
    ("data", "text"): (TypeError, "Counts are numbers, found values of type"),
    ("data", "complex"): (TypeError, "Counts are numbers, found values of type"),
    ("indices", "text"): (ValueError, "damaged: `indices` are of type"),
    ("indices", "float"): (ValueError, "damaged: `indices` are of type float64"),
    ("indptr", "float"): (ValueError, "damaged: `indptr` does not lead"),
    ("indptr", "scalar"): (ValueError, "damaged: `indptr` does not lead"),
    ("indptr", "short"): (ValueError, "damaged: `indptr` does not lead"),
    ("indptr", "empty"): (ValueError, "damaged: `indptr` does not lead"),
    ("data and indices", "columns"): (ValueError, "damaged: `data` and `indices` are not lists of the same size"),
    ("data", "missing"): (ValueError, "damaged: it has no `data`"),
}


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize(("arrays", "kind"), KINDS_OF_DAMAGE)
def test_arrays_of_another_kind_are_refused_by_name(arrays, kind, form, tmp_path):
    x = on_disk(f"h5 {form}", tmp_path)
    change = {
        "text": lambda values: values.astype("S"),
        "complex": lambda values: values.astype(complex),
        "float": lambda values: values.astype(float),
        "scalar": lambda values: values[0],
        "short": lambda values: values[:-2],
        "empty": lambda values: values[:0],
        "columns": lambda values: values[:, None],
    }
    for name in arrays.split(" and "):
        values = x.group[name][:]
        del x.group[name]
        if kind != "missing":
            x.group[name] = change[kind](values)
    error, match = KINDS_OF_DAMAGE[arrays, kind]
    with pytest.raises(error, match=match):
        list(row_blocks(x))


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64, np.int64, np.int16])
@pytest.mark.parametrize("form", ["csr", "csc"])
def test_indices_of_any_whole_number_are_read(dtype, form, tmp_path):
    x = on_disk(f"h5 {form}", tmp_path)
    for name in ("indices", "indptr"):
        values = x.group[name][:].astype(dtype)
        del x.group[name]
        x.group[name] = values
    np.testing.assert_array_equal(sparse.vstack([block for _, block in row_blocks(x, 10)]).toarray(), X)
    (_, block), *_ = row_blocks(x)
    np.testing.assert_array_equal(block @ np.eye(X.shape[1]), X)  # scipy computes with them


def test_a_matrix_of_another_width_than_its_table_of_genes_is_refused(toy_cells):
    matrix = open_counts(toy_cells(5))
    with pytest.raises(ValueError, match="damaged: it has 100 columns, and 205 genes are named"):
        list(replace(matrix, x=matrix.x[:, :100]).blocks())


@pytest.mark.parametrize("place", ["memory", "h5", "zarr"])
@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_sparse_matrix_that_points_outside_itself_is_refused(damage, form, place, tmp_path):
    if place == "memory":
        x = getattr(sparse, f"{form}_array")(X)
        damage(x.data, x.indices, x.indptr)
    else:
        x = on_disk(f"{place} {form}", tmp_path)
        arrays = {name: x.group[name][:] for name in ("data", "indices", "indptr")}
        damage(**arrays)
        for name, values in arrays.items():
            x.group[name][:] = values
    with pytest.raises(ValueError, match=rf"matrix is damaged: {DAMAGE[damage]}.*from where it came"):
        list(row_blocks(x, 10))


VIEWS = """
import sys
from scipy import sparse
import gfx
adata = gfx.datasets.toy(40)
form, taken, array = sys.argv[1:]
adata.layers["counts"] = getattr(sparse, form)(adata.X)
getattr(adata.layers["counts"], array)[5:9] = 10**9
view = adata[::2] if taken == "cells" else adata[:, ::-1]
try:
    gfx.pp.check(view, layer="counts")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("form", ["csr_array", "csc_array"])
@pytest.mark.parametrize(("taken", "array"), [("cells", "indptr"), ("genes", "indices")])
def test_a_view_of_a_sparse_matrix_that_points_outside_itself_is_refused(form, taken, array):
    """In a process of its own, which would end."""
    call = [sys.executable, "-c", VIEWS, form, taken, array]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert f"This matrix is damaged: `{array}`" in done.stdout


def test_dask_chunks_are_computed_once():
    calls = []

    def load(block):
        calls.append(block.shape)
        return block

    x = da.from_array(X, chunks=(20, -1)).map_blocks(load, meta=X[:0])
    for _ in row_blocks(x, 3):
        pass
    assert sorted(calls) == [(13, 30), (20, 30), (20, 30)]


def test_row_blocks_of_nothing():
    assert list(row_blocks(sparse.csr_matrix((0, 5)))) == []
    assert [block.shape for _, block in row_blocks(np.zeros((3, 0)))] == [(3, 0)]


def test_half_precision_is_widened():
    block = next(row_blocks(X.astype(np.float16)))[1]
    assert block.dtype == np.float32
    np.testing.assert_array_equal(block.toarray(), X)


def test_row_blocks_refuse_what_is_no_matrix_of_numbers():
    with pytest.raises(TypeError, match="Counts are numbers, found values of type object"):
        next(row_blocks(X.astype(object)))
    with pytest.raises(TypeError, match="complex64"):
        next(row_blocks(sparse.csr_matrix(X.astype(np.complex64))))
    with pytest.raises(NotImplementedError, match=r"Cannot read counts from a pandas.*DataFrame"):
        next(row_blocks(pd.DataFrame(X)))


# --- values ---------------------------------------------------------------------------------------------------------


def counts_block(values: np.ndarray | None = None) -> sparse.csr_array:
    rng = np.random.default_rng(1)
    block = sparse.csr_array(rng.poisson(rng.lognormal(0, 1, 200), (30, 200)).astype(np.float64))
    if values is not None:
        block.data = values
    return block


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.float32, bool])
def test_raw_counts_pass_as_they_are(dtype):
    block = sparse.csr_array(X.astype(dtype))
    assert to_counts(block, "raw", "adata.X") is block


def bad(kind: str) -> sparse.csr_array:
    block = counts_block()
    depth = np.repeat(block.sum(axis=1), np.diff(block.indptr))
    normalised = block.data / depth * 1e4
    match kind:
        case "log1p":
            block.data = np.log1p(normalised)
        case "log2":
            block.data = np.log2(normalised + 1)
        case "normalized":
            block.data = normalised
        case "gamma":
            block.data = np.random.default_rng(0).gamma(2, 50, block.nnz)
        case "one":
            block.data[:] = 400
        case _:
            block.data[5] = float(kind)
    return block


@pytest.mark.parametrize(
    ("kind", "counts", "text"),
    [
        ("nan", "raw", "`adata.X` holds NaN values; counts are finite.*`layer=`"),
        ("nan", "raw", r"outer join of dense matrices.*join=\"outer\", fill_value=0\)"),
        ("inf", "log1p", "holds infinite values"),
        ("-3", "raw", r"negative values \(as low as -3\): scaled or batch-corrected.*`layer=`"),
        ("-3", "normalized", "negative values"),
        ("log1p", "raw", r"log-normalised counts.*If they are lost, say `counts='log1p'`: division"),
        ("log1p", "normalized", r"log-normalised counts.*counts='log1p'"),
        ("normalized", "raw", r"normalised counts.*If they are lost, say `counts='normalized'`: division"),
        ("normalized", "log1p", r"normalised counts.*counts='normalized'"),
        ("log2", "raw", r"to the base 2.*np\.log\(2\)"),
        ("log2", "log1p", r"to the base 2.*np\.log\(2\)"),
        ("gamma", "raw", "fractions, such as"),
        ("gamma", "log1p", "no multiples of one number: estimated counts, as of SoupX"),
        ("one", "log1p", "whole numbers up to 400: counts, not their logarithms"),
    ],
)
def test_values_that_are_not_what_was_said(kind, counts, text):
    with pytest.raises(ValueError, match=text):
        to_counts(bad(kind), counts, "adata.X")


@pytest.mark.parametrize("kind", ["normalized", "log1p"])
def test_whole_counts_come_back(kind):
    block = bad(kind)
    before = block.data.copy()
    np.testing.assert_array_equal(to_counts(block, kind, "adata.X").toarray(), counts_block().toarray())
    np.testing.assert_array_equal(block.data, before)


def test_repeated_entries_are_summed_before_the_logarithm_is_undone():
    logs = np.log1p(np.array([1.0, 3.0, 7.0]))
    # The first value is stored in two parts, and there is a stored zero.
    data, columns = np.array([0.4, logs[0] - 0.4, logs[1], logs[2], 0]), np.array([0, 0, 1, 2, 3])
    block = sparse.csr_array((data, columns, np.array([0, 5])), shape=(1, 4))
    assert to_counts(block, "log1p", "adata.X").toarray().tolist() == [[1, 3, 7, 0]]


def test_usable_calls(toy_cells):
    def usable(counts="raw", **place):
        return usable_calls(adata, open_counts(adata, **place), counts)

    adata = toy_cells(30)
    assert usable("log1p") == "This object can be used with `gfx.pp.tokenize(adata)`."
    assert usable("raw") == ""  # it was refused for what stands behind its first cells
    adata.layers["counts"] = adata.X.copy()
    assert usable("raw") == "This object can be used with `gfx.pp.tokenize(adata, layer='counts')`."
    adata.X = adata.X * -1
    assert usable("raw") == "This object can be used with `gfx.pp.tokenize(adata, layer='counts')`."
    assert usable("log1p", layer="counts") == usable("raw")
    adata.raw = ad.AnnData(np.log1p(adata.layers.pop("counts")), var=adata.var)
    assert "`gfx.pp.tokenize(adata, use_raw=True, counts='log1p')`" in usable()
    adata.raw = None
    assert usable() == ""


# --- genes ----------------------------------------------------------------------------------------------------------


def look_up(names, vocabulary) -> GeneMatch:
    return GeneMatch(vocabulary.resolve(names), np.asarray(names, dtype=object))


def test_match_genes(toy_vocabulary):
    names = [f"TOY{n}" for n in range(1, 30)] + ["OLDTOY1", "ENSG00000000001.4", "nothing"]
    match = match_genes(names, toy_vocabulary)
    assert (match.n_known, match.n_repeated, list(match.names[~match.known])) == (31, 2, ["nothing"])
    assert match.tokens[[0, 29, 30, 31]].tolist() == [4, 4, 4, -1]


def test_too_few_genes_show_both_sides(toy_vocabulary):
    names = [f"X{n}" for n in range(100)] + [f"TOY{n}" for n in range(1, 10)]
    with pytest.raises(ValueError, match=r"Only 9 of 109 genes .*\['X0', 'X1'.*'ENSG00000000001'.*'TOY1'.*gene_ids="):
        match_genes(names, toy_vocabulary)
    assert look_up(names, toy_vocabulary).n_known == 9
    # Ten are enough for a small panel, and a tenth of the shorter list has to be there.
    assert genes_problem(look_up([f"TOY{n}" for n in range(1, 11)], toy_vocabulary), toy_vocabulary) is None
    few = genes_problem(look_up([f"TOY{n}" for n in range(1, 6)], toy_vocabulary), toy_vocabulary)
    assert few.startswith("There are only 5 genes, all known to the vocabulary 'toy'; at least 10 are needed")
    names = [f"X{n}" for n in range(1000)] + [f"TOY{n}" for n in range(1, 20)]
    assert "Only 19 of 1,019" in genes_problem(look_up(names, toy_vocabulary), toy_vocabulary)


def test_a_vocabulary_of_another_species_knows_its_own_genes(real_cells):
    mouse = real_cells("other/mouse_heart_1k_v2_10x")
    vocabulary = build_vocabulary(mouse, gene_ids="ensembl_id")
    for names in (mouse.var["ensembl_id"], mouse.var_names):
        assert match_genes(names, vocabulary).n_known > 5_000
    with pytest.raises(ValueError, match=r"These are rat genes.*holds mouse genes\. Map them to mouse"):
        match_genes([f"ENSRNOG{n:011d}" for n in range(50)], vocabulary)
    with pytest.raises(ValueError, match="Only 0 of 50 genes"):
        match_genes([f"ENSG{n:011d}" for n in range(50)], vocabulary)


def test_other_species_are_named(real_cells, official_v2, toy_vocabulary):
    mouse = real_cells("other/mouse_heart_1k_v2_10x")
    # In capitals, most of these symbols are human ones, too; that is how they would slip through.
    assert look_up(mouse.var_names, official_v2).n_known > 10_000
    with pytest.raises(ValueError, match=r"These are mouse or rat genes, such as \['Xkr4'.*orthologues"):
        match_genes(mouse.var_names, official_v2)
    with pytest.raises(ValueError, match=r"These are mouse genes, such as \['ENSMUSG"):
        match_genes(mouse.var["ensembl_id"], official_v2)
    # How names are written says nothing where nothing is recognised.
    with pytest.raises(ValueError, match="Only 0 of 50 genes"):
        match_genes([f"Gene{n}" for n in range(50)], toy_vocabulary)
