"""`pp.check`: every finding is named, nothing is written, and what is an error there is an error in `pp.tokenize`."""

from __future__ import annotations

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import gfx

CHECKS = [
    "values",
    "gene names",
    "not genes",
    "genes",
    "share of counts",
    "prefixes",
    "id versions",
    "repeated genes",
    "unique names",
    "dates",
    "genes per cell",
    "empty cells",
    "long cells",
]


def findings(adata, model, **arguments) -> pd.DataFrame:
    """Check, and see to it that nothing was written."""
    slots = {slot: dict(getattr(adata, slot)) for slot in ("obsm", "varm", "layers", "uns")}
    obs, var = adata.obs.copy(), adata.var.copy()
    x = adata.X.copy()
    table = gfx.pp.check(adata, model=model, **arguments)
    assert {slot: dict(getattr(adata, slot)) for slot in slots} == slots
    pd.testing.assert_frame_equal(adata.obs, obs)
    pd.testing.assert_frame_equal(adata.var, var)
    if sparse.issparse(x):
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(adata.X, part), getattr(x, part))
    assert table.columns.tolist() == ["check", "status", "found", "advice"]
    assert set(table["status"]) <= {"ok", "warning", "error"}
    return table.set_index("check")


def test_good_cells(toy_model, toy_cells, capsys):
    cells = toy_cells(30)
    with gfx.settings.override(verbosity=2):
        table = findings(cells, toy_model)
    assert table.index.tolist() == CHECKS
    n_known = (cells.X.toarray()[:, :200] > 0).sum(axis=1)
    genes = f"{int(np.median(n_known))} known genes in the median cell, {n_known.min()} to {n_known.max()}"
    share = cells.X[:, :200].sum() / cells.X.sum()
    unknown = np.asarray(cells.X.sum(axis=0)).ravel()[200:]
    others = ", ".join(cells.var_names[200:][np.argsort(-unknown, kind="stable")[:3]])
    assert table["found"].to_dict() == {
        "values": f"raw counts in `adata.X`, up to {cells.X.max():.0f}",
        "gene names": "205 symbols",
        "not genes": "0 columns that are no genes",
        "genes": "200 of 205 genes known to the vocabulary 'toy'",
        "share of counts": f"{share:.1%} of the counts belong to known genes; of the others, most to {others}",
        "prefixes": "0 names with a genome in front",
        "id versions": "0 ids with a version",
        "repeated genes": "0 columns repeat a gene",
        "unique names": "0 names made unique by a number",
        "dates": "0 names that are dates and may mean several genes",
        "genes per cell": genes,
        "empty cells": "0 cells without a known gene",
        "long cells": f"{(n_known > 62).sum()} cells with more than 62 known genes",
    }
    # Toy cells have too few genes to be real ones, and more than the toy model reads.
    assert table.index[table["status"] == "warning"].tolist() == ["genes per cell", "long cells"]
    assert not (table["status"] == "error").any()
    said = capsys.readouterr().out
    assert said.count("200 of 205 genes known") == 1
    assert "30 cells × 205 genes in `adata.X`" in said
    with gfx.settings.override(verbosity=1):
        gfx.pp.check(cells, model=toy_model)
    assert capsys.readouterr().out == ""


def test_the_same_findings_from_every_matrix(toy_model, toy_cells, tmp_path):
    cells = toy_cells(30)
    expected = findings(cells, toy_model)
    for form in (
        sparse.csc_matrix,
        sparse.csr_array,
        lambda x: x.toarray(),
        lambda x: x.astype(np.uint16),
        lambda x: da.from_array(x.toarray(), chunks=(7, 40)),
    ):
        other = cells.copy()
        other.X = form(cells.X)
        pd.testing.assert_frame_equal(findings(other, toy_model), expected)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    pd.testing.assert_frame_equal(gfx.pp.check(backed, model=toy_model).set_index("check"), expected)
    backed.file.close()


def logs(x):
    return x.multiply(1e4 / x.sum(axis=1)).tocsr().log1p()


@pytest.mark.parametrize(
    ("change", "status", "found", "advice"),
    [
        (logs, "error", "log-normalised counts", r"`gfx\.pp\.tokenize\(adata, counts='log1p'\)`"),
        (lambda x: x * 0.37, "error", "counts divided by depth", r"counts='normalized'\)`"),
        (lambda x: logs(x) / np.log(2), "error", "logarithms to the base 2", r"np\.log\(2\)"),
        (lambda x: x.power(1.3), "error", "estimated counts, or FPKM", r"fractions, such as.*counts='estimated'"),
        (lambda x: x.toarray() - 1, "error", "negative values", "as low as -1"),
        (lambda x: x * np.inf, "error", "infinite values", "counts are finite"),
        (lambda x: x * np.nan, "error", "NaN", "counts are finite"),
        (lambda x: x * 0, "warning", "nothing but zeros", "nothing to rank"),
        (lambda x: (x > 0).astype(np.float32), "warning", "raw counts in `adata.X`, up to 1", "Only 0 and 1"),
    ],
)
def test_values(toy_model, toy_cells, change, status, found, advice):
    cells = toy_cells(30)
    cells.X = change(cells.X)
    row = findings(cells, toy_model).loc["values"]
    assert row["status"] == status
    assert found in row["found"]
    assert pd.Series([row["advice"]]).str.contains(advice).all()
    if status == "error":
        with pytest.raises(ValueError, match=r"adata\.X"):
            gfx.pp.tokenize(cells, model=toy_model)
    else:
        gfx.pp.tokenize(cells, model=toy_model)


def test_one_bad_row_of_many_is_found(toy_model, toy_cells):
    cells = toy_cells(30)
    many = ad.concat([cells] * 100, index_unique="-")
    many.var = cells.var
    many.X.data[-70] = -1
    assert findings(many, toy_model).loc["values", "status"] == "error"


def test_offers_what_can_be_used(toy_model, toy_cells):
    cells = toy_cells(30)
    cells.layers["counts"] = cells.X.copy()
    cells.X = cells.X.toarray() - 1
    advice = findings(cells, toy_model).loc["values", "advice"]
    assert "`gfx.pp.tokenize(adata, layer='counts')`" in advice
    assert findings(cells, toy_model, layer="counts").loc["values", "status"] == "ok"


def test_gene_names(toy_model, toy_cells):
    cells = toy_cells(30)
    ids = cells.var["ensembl_id"]
    cells.var["mixed"] = [f"{name}.4" if n % 2 else name for n, name in enumerate(ids)]
    cells.var.loc[cells.var_names[10:20], "mixed"] = [f"TOY{n}" for n in range(11, 21)]
    cells.var.loc[cells.var_names[20], "mixed"] = "TOY1"
    cells.var.loc[cells.var_names[21], "mixed"] = np.nan
    cells.var.loc[cells.var_names[22], "mixed"] = "ENSMUSG00000021944"
    table = findings(cells, toy_model, gene_ids="mixed")
    assert table.loc["gene names", "found"] == "mixed: 192 Ensembl ids, 11 symbols, 1 without a name, 1 mouse"
    assert table.loc["gene names", "status"] == "warning"
    assert "mouse genes are left out" in table.loc["gene names", "advice"]
    assert table.loc["genes", "found"].startswith("198 of 205")
    assert table.loc["repeated genes", "found"] == "1 columns repeat a gene"
    n_versioned = cells.var["mixed"].astype(str).str.contains(r"\.4$").sum()
    assert table.loc["id versions", "found"] == f"{n_versioned} ids with a version"


def test_a_better_column_is_named(toy_model, toy_cells):
    cells = toy_cells(30)
    cells.var_names = [str(n) for n in range(205)]
    cells.var["chromosome"] = pd.Categorical(["1"] * 205)
    table = findings(cells, toy_model)
    assert table.loc["gene names", "found"] == "205 numbers"
    assert table.loc["genes", "status"] == "error"
    assert "`gene_ids='ensembl_id'` names 200 genes" in table.loc["genes", "advice"]
    assert "Only 0 of 205 genes" in table.loc["genes", "advice"]
    cells.var_names = cells.var["ensembl_id"]
    assert "`gene_ids=None` names 200 genes" in findings(cells, toy_model, gene_ids="chromosome").loc["genes", "advice"]


def test_cells(toy_model, toy_cells):
    cells = toy_cells(30)
    for cell in (3, 4):
        cells.X.data[cells.X.indptr[cell] : cells.X.indptr[cell + 1]] = 0
    table = findings(cells, toy_model)
    assert table.loc["empty cells", ["status", "found"]].tolist() == ["warning", "2 cells without a known gene"]
    assert ", 0 to" in table.loc["genes per cell", "found"]
    none = findings(cells[:0].copy(), toy_model)
    assert none.loc["cells", "status"] == "warning"  # `pp.tokenize` does nothing, and does not stop


def test_real_cells(real_cells, official_v2, as_model):
    model = as_model(official_v2, 4096, "V2")
    human = findings(real_cells("eval/pbmc3k_10x"), model)
    assert (human["status"] == "ok").all()
    assert human.loc["gene names", "found"] == "32,738 symbols"
    mouse = real_cells("other/mouse_heart_1k_v2_10x")
    for gene_ids, name in ((None, "mouse or rat"), ("ensembl_id", "mouse")):
        table = findings(mouse, model, gene_ids=gene_ids)
        assert table.loc["genes", "status"] == "error"
        assert f"These are {name} genes" in table.loc["genes", "advice"]
        assert f" {name}" in table.loc["gene names", "found"]


def test_scanpy_cells(official_v2, as_model):
    scanpy = pytest.importorskip("scanpy")
    cells, model = scanpy.datasets.pbmc68k_reduced(), as_model(official_v2, 4096, "V2")
    scaled = gfx.pp.check(cells, model=model).set_index("check").loc["values"]
    assert scaled["status"] == "error"
    assert "`gfx.pp.tokenize(adata, use_raw=True, counts='log1p')`" in scaled["advice"]
    for counts, status in (("raw", "error"), ("normalized", "error"), ("log1p", "ok")):
        raw = gfx.pp.check(cells, model=model, use_raw=True, counts=counts).set_index("check").loc["values"]
        assert (raw["status"], raw["found"]) == (status, "log-normalised counts in `adata.raw.X`, up to 6.489")


def test_mudata(toy_model, toy_cells, as_mudata):
    mdata = as_mudata({"rna": toy_cells(9)})
    pd.testing.assert_frame_equal(gfx.pp.check(mdata, model=toy_model), gfx.pp.check(toy_cells(9), model=toy_model))
    with pytest.raises(KeyError, match="Did not find modality"):
        gfx.pp.check(mdata, model=toy_model, mod="atac")


def test_calls_that_cannot_be_understood(toy_model, toy_cells):
    cells = toy_cells(5)
    with pytest.raises(KeyError, match=r"Did not find 'nothing' in `adata.layers`"):
        gfx.pp.check(cells, model=toy_model, layer="nothing")
    with pytest.raises(ValueError, match=r"`counts` is one of \['raw'.*found 'logs'"):
        gfx.pp.check(cells, model=toy_model, counts="logs")
    with pytest.raises(KeyError, match="Did you mean 'ensembl_id'"):
        gfx.pp.check(cells, model=toy_model, gene_ids="ensembl")
