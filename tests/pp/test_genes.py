"""What counts as a gene, and the names that lead to it, in `pp.check`, `pp.tokenize` and all that reads counts."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import gfx
from gfx._core.gene_names import human_genes

OTHERS = {
    "CD3E": "Antibody Capture",
    "TOY1": "Antibody Capture",
    "TOY2": "CRISPR Guide Capture",
    "TOY3-1": "CRISPR Guide Capture",
    "Hashtag1": "Multiplexing Capture",
    "TOY4": "Peaks",
}


pytestmark = pytest.mark.filterwarnings("ignore:Variable names are not unique")


@pytest.fixture
def toy(as_model, toy_vocabulary):
    return as_model(toy_vocabulary)


def with_columns(cells: ad.AnnData, names: list[str], counts: int = 2) -> ad.AnnData:
    """Add columns, each with the same counts in every cell."""
    x = sparse.hstack([cells.X, np.full((cells.n_obs, len(names)), counts)]).tocsr()
    var = pd.concat([cells.var, pd.DataFrame({"ensembl_id": names}, index=names)])
    return ad.AnnData(x.astype(np.float32), obs=cells.obs, var=var)


def tokens(cells: ad.AnnData, model: object, **arguments: object) -> np.ndarray:
    return gfx.pp.tokenize(cells, model=model, copy=True, **arguments).obsm["gfx_tokens"]


def finding(cells: ad.AnnData, model: object, check: str, **arguments: object) -> str:
    row = gfx.pp.check(cells, model=model, **arguments).set_index("check").loc[check]
    return f"{row['status']}: {row['found']} {row['advice']}"


# --- not genes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_only_gene_expression_counts(toy, toy_cells, form, capsys):
    genes = toy_cells(20)
    cells = with_columns(genes, list(OTHERS))
    cells.var["feature_types"] = pd.Categorical(["Gene Expression"] * genes.n_vars + list(OTHERS.values()))
    cells.X = form(cells.X.toarray())
    with gfx.settings.override(verbosity=2):
        read = gfx.pp.tokenize(cells, model=toy, copy=True)
    np.testing.assert_array_equal(read.obsm["gfx_tokens"], tokens(genes, toy))
    left_out = "2 Antibody Capture, 2 CRISPR Guide Capture, 1 Multiplexing Capture, 1 Peaks"
    expected = gfx.pp.tokenize(genes, model=toy, copy=True).uns["gfx_tokens"]["report"]
    assert read.uns["gfx_tokens"]["report"] == expected | {"not_genes": left_out}
    assert f"Columns that are no genes were left out: {left_out}." in " ".join(capsys.readouterr().out.split())
    assert finding(cells, toy, "not genes") == f"ok: {left_out} They are left out."
    del cells.var["feature_types"]
    assert not np.array_equal(tokens(cells, toy), tokens(genes, toy))


def test_an_object_of_proteins_alone_is_refused(toy, toy_cells):
    cells = toy_cells(5)
    cells.var["feature_types"] = "Antibody Capture"
    for call in (gfx.pp.tokenize, gfx.pp.check):
        with pytest.raises(ValueError, match=r"no row of 'Gene Expression', only \['Antibody Capture'\].*`mod=`"):
            call(cells, model=toy)


def test_feature_types_of_another_kind_and_missing_ones_leave_out_nothing(toy, toy_cells):
    cells = toy_cells(5)
    expected = tokens(cells, toy)
    cells.var["feature_types"] = "protein_coding"
    np.testing.assert_array_equal(tokens(cells, toy), expected)
    cells.var["feature_types"] = ["Gene Expression"] * 100 + [np.nan] * 105
    np.testing.assert_array_equal(tokens(cells, toy), expected)


def test_spike_ins_and_names_of_proteins_are_no_genes(toy, toy_cells):
    genes = toy_cells(20)
    names = ["ERCC-00002", "ERCC-00171", "TOY1_TotalSeqB", "TOY2_ADT", "Hashtag3", "chr1-100-900"]
    cells = with_columns(genes, names)
    left_out = "2 spike-ins, 2 proteins, 1 hashtags, 1 peaks"
    read = gfx.pp.tokenize(cells, model=toy, copy=True)
    assert read.uns["gfx_tokens"]["report"]["not_genes"] == left_out
    expected = gfx.pp.tokenize(genes, model=toy, copy=True)
    np.testing.assert_array_equal(read.obsm["gfx_tokens"], expected.obsm["gfx_tokens"])
    assert (
        read.uns["gfx_tokens"]["report"]["share_of_counts"] == expected.uns["gfx_tokens"]["report"]["share_of_counts"]
    )
    # 10x writes the protein alone as the id of a feature, and the suffix in its name.
    cells.var.loc["TOY1_TotalSeqB", "ensembl_id"] = "TOY1"
    np.testing.assert_array_equal(tokens(cells, toy, gene_ids="ensembl_id"), tokens(genes, toy))


def test_vocabularies_and_pretraining_read_genes_alone(toy_vocabulary, toy_cells, tmp_path):
    genes = toy_cells(20)
    cells = with_columns(genes, ["ENSG00000000001.1", "ERCC-00002"])
    cells.var["feature_types"] = ["Gene Expression"] * genes.n_vars + ["Antibody Capture", "Gene Expression"]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    expected = gfx.models.summarize_genes(genes, gene_ids="ensembl_id")
    assert gfx.models.summarize_genes(cells, gene_ids="ensembl_id") == expected
    assert gfx.models.summarize_genes(tmp_path / "cells.h5ad", gene_ids="ensembl_id") == expected


def test_results_of_genes_and_baselines_leave_out_what_is_no_gene(toy_model, toy_cells):
    genes = toy_cells(20)
    cells = with_columns(genes, ["TOY1 "])  # white space is stripped of a name
    cells.var["feature_types"] = ["Gene Expression"] * genes.n_vars + ["Antibody Capture"]
    for adata in (cells, genes):
        gfx.tl.embed_genes(adata, model=toy_model)
        gfx.tl.delete_genes(adata, "TOY1", model=toy_model, controls=["baselines"])
    np.testing.assert_array_equal(cells.varm["gfx_genes"][:-1], genes.varm["gfx_genes"])
    assert np.isnan(cells.varm["gfx_genes"][-1]).all()
    pd.testing.assert_frame_equal(gfx.get.deletion_df(cells), gfx.get.deletion_df(genes))


# --- names made unique ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["-", "."])
def test_columns_whose_names_were_made_unique_are_summed(toy, toy_cells, separator):
    cells = with_columns(toy_cells(20), ["TOY1", "TOY2", "TOY3", "TOY3"])
    unique = cells.copy()
    unique.var_names = ad.utils.make_index_unique(unique.var_names, join=separator)
    assert f"TOY3{separator}2" in unique.var_names
    np.testing.assert_array_equal(tokens(unique, toy), tokens(cells, toy))
    report = gfx.pp.tokenize(unique, model=toy, copy=True).uns["gfx_tokens"]["report"]
    assert (report["n_genes_repeated"], report["n_genes_made_unique"]) == (4, 4)
    said = f"Such as TOY1{separator}1, TOY2{separator}1, TOY3{separator}1: summed with the gene"
    assert said in finding(unique, toy, "unique names")


def test_ids_that_were_made_unique_are_ids(toy, toy_cells):
    cells = with_columns(toy_cells(20), ["TOY1"])
    cells.var["ensembl_id"] = [*cells.var["ensembl_id"][:-1], "ENSG00000000001-1"]
    np.testing.assert_array_equal(tokens(cells, toy, gene_ids="ensembl_id"), tokens(cells, toy))


def test_numbered_guides_are_pointed_out_and_not_summed(toy, toy_cells):
    genes = toy_cells(20)
    cells = with_columns(genes, [f"TOY{gene}-{guide}" for gene in (1, 2, 3) for guide in (1, 2)])
    np.testing.assert_array_equal(tokens(cells, toy), tokens(genes, toy))
    assert "6 numbered like guides, such as 'TOY1-1'" in finding(cells, toy, "not genes")
    report = gfx.pp.tokenize(cells, model=toy, copy=True).uns["gfx_tokens"]["report"]
    assert (report["n_genes_made_unique"], report["not_genes"][:20]) == (0, "6 numbered like guid")


# --- one convention away --------------------------------------------------------------------------------------------


def test_every_vocabulary_knows_current_and_former_symbols(shared, official_v1, official_v2):
    current = pd.read_csv(shared / "data" / "genes" / "human_protein_coding_genes.tsv", sep="\t")
    mini = gfx.models.load("mini").vocabulary
    for vocabulary in (mini, official_v1, official_v2):
        table = current[current["ensembl_id"].isin(vocabulary.ids)]
        assert (vocabulary.resolve(table["gene_name"]) < 0).mean() < 0.002
        for pair in (("H3-3B", "H3F3B"), ("H2AZ1", "H2AFZ"), ("SEPTIN7", "SEPT7"), ("MARCHF1", "MARCH1")):
            new, old = vocabulary.resolve(pair)
            assert new == old >= 0


def test_names_of_the_model_itself_win(toy_vocabulary):
    name = next(name for name, gene in human_genes().items() if gene == "ENSG00000000003")
    assert toy_vocabulary.ids[toy_vocabulary.resolve([name])[0]] == "ENSG00000000003"
    symbols = toy_vocabulary.symbols.copy()
    symbols[10] = name
    assert replace(toy_vocabulary, symbols=symbols).resolve([name])[0] == 10


DATES = {
    "SEPTIN2": ["SEPT2", "2-Sep", "02-Sep", "Sep-02", "sep-2", "2-Sep-16", "Sep-02-2016", "2016-09-02"],
    "SEPTIN7": ["Sep-07", "2001-09-07 00:00:00", "2019/09/07"],
    "SELENOF": ["SEP15", "15-Sep"],
    "MARCHF5": ["5-Mar", "Mar-05", "5-Mar-2020", "2020-03-05T00:00:00"],
}
UNCLEAR = ["1-Mar", "Mar-02", "1-Mar-16", "2016-03-01", "2016-03-02 00:00:00"]  # MARCHF1 or MTARC1
NUMBERS_ALONE = ["9/2/2016", "02/09/16"]


def test_dates_are_genes_where_one_gene_is_meant_and_listed_where_not(toy, toy_cells, official_v1, official_v2):
    mini = gfx.models.load("mini").vocabulary
    for vocabulary in (mini, official_v1, official_v2):
        for symbol, dates in DATES.items():
            assert set(vocabulary.resolve(dates)) == set(vocabulary.resolve([symbol])) != {-1}
        assert (vocabulary.resolve([*NUMBERS_ALONE, "40-Sep", "2016-13-02", "2016-09-02-1", "MARS-1"]) == -1).all()
    for vocabulary in (mini, official_v1):
        assert (vocabulary.resolve(UNCLEAR) == -1).all()
    # The published dictionary says which it takes them for.
    assert set(official_v2.resolve(UNCLEAR)) == set(official_v2.resolve(["MARCHF1", "MARCHF2"]))
    cells = with_columns(toy_cells(20), [*UNCLEAR, *NUMBERS_ALONE])
    said = ", ".join([*UNCLEAR, *NUMBERS_ALONE])
    assert finding(cells, toy, "dates").startswith(
        f"warning: 7 names that are dates and may mean several genes {said}: spreadsheets"
    )


def test_unknown_names_with_most_counts_are_named(toy, toy_cells):
    cells = with_columns(toy_cells(20), ["OBSOLETE1", "LOC100"], 500)
    cells.var.loc["LOC100", "ensembl_id"] = None
    cells.X[:, 205] *= 2
    most = "of the counts belong to known genes; of the others, most to"
    assert f"{most} OBSOLETE1, LOC100, UNKNOWN" in finding(cells, toy, "share of counts")
    by_id = finding(cells, toy, "share of counts", gene_ids="ensembl_id")
    assert f"{most} OBSOLETE1, genes without a name, ENSG" in by_id


def test_dates_do_not_become_names_of_a_vocabulary(toy_cells):
    cells = toy_cells(20)
    cells.var_names = ["2-Mar", *cells.var_names[1:]]
    vocabulary = gfx.models.build_vocabulary(cells, gene_ids="ensembl_id", min_cells=1)
    assert "TOY2" in vocabulary.symbols
    assert vocabulary.resolve(["2-Mar"]) == [-1]


# --- prefixes and species -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["GRCh38_", "GRCh38___", "hg19_", "hg38-"])
@pytest.mark.parametrize("gene_ids", [None, "ensembl_id"])
def test_a_human_genome_in_front_of_names_is_stripped(toy, toy_cells, prefix, gene_ids):
    cells = toy_cells(20)
    expected = tokens(cells, toy)
    cells.var_names = prefix + cells.var_names
    cells.var["ensembl_id"] = prefix + cells.var["ensembl_id"]
    np.testing.assert_array_equal(tokens(cells, toy, gene_ids=gene_ids), expected)
    assert finding(cells, toy, "prefixes", gene_ids=gene_ids) == "ok: 205 names with a genome in front It is left out."


def test_another_prefix_is_named(toy, toy_cells):
    cells = toy_cells(20)
    cells.var_names = "rna_" + cells.var_names
    with pytest.raises(ValueError, match=r"prefix 'rna_'.*`adata.var_names = adata.var_names.str.removeprefix\('rna_'"):
        gfx.pp.tokenize(cells, model=toy)
    cells.var_names = cells.var_names.str.removeprefix("rna_")
    tokens(cells, toy)


def test_mouse_genes_among_human_ones_are_named_and_human_ones_counted(toy, toy_cells):
    human = toy_cells(20)
    mouse = [f"mm10___Gene{n}" for n in range(300)]
    cells = with_columns(human, mouse, 0)
    cells.var_names = ["GRCh38_" * (not name.startswith("mm10")) + name for name in cells.var_names]
    with pytest.raises(ValueError, match=r"mouse genes, such as \['mm10___Gene0', .*beside 200 human ones"):
        gfx.pp.tokenize(cells, model=toy)
    other = cells.copy()
    other.var_names = ["hsa-mir-8072", *cells.var_names[1:]]  # written like a gene of fish, and none of mouse either
    with pytest.raises(ValueError, match=r"mouse genes, such as \['mm10___Gene0', .*beside 199 human ones"):
        gfx.pp.tokenize(other, model=toy)
    fewer = cells[:, :300].copy()
    np.testing.assert_array_equal(tokens(fewer, toy), tokens(human, toy))
    assert "95 mouse The mouse genes are left out" in finding(fewer, toy, "gene names")


def test_mouse_symbols_beside_human_ones_are_left_out_and_not_summed(toy, toy_cells):
    human = toy_cells(20)
    cells = with_columns(human, [f"Toy{n}" for n in range(1, 101)], 1)
    read = gfx.pp.tokenize(cells, model=toy, copy=True)
    np.testing.assert_array_equal(read.obsm["gfx_tokens"], tokens(human, toy))
    assert read.uns["gfx_tokens"]["report"]["not_genes"] == "100 written like mouse genes, such as 'Toy1'"
    assert "written like mouse genes" in finding(cells, toy, "not genes")
    human.var_names = ["Toy1", *human.var_names[1:]]  # without the human gene it is only spelt in its own way
    np.testing.assert_array_equal(tokens(human, toy), tokens(toy_cells(20), toy))


def test_the_error_about_names_names_the_column_that_works(toy, toy_cells):
    cells = toy_cells(20)
    cells.var_names = [f"gene {n}" for n in range(205)]
    before = cells.copy()
    with pytest.raises(
        ValueError, match=r"`gene_ids='ensembl_id'` names 200 genes that the model knows\. Only 0 of 205"
    ):
        gfx.pp.tokenize(cells, model=toy)
    assert not cells.obsm
    assert not cells.uns
    pd.testing.assert_frame_equal(cells.var, before.var)


# --- columns of `var` -----------------------------------------------------------------------------------------------


def as_pandas_3():
    """Let text stay text when it becomes text again, and missing values stay numbers."""
    return nullcontext() if pd.__version__ >= "3" else pd.option_context("future.infer_string", True)


def text_of_pandas_3():
    with as_pandas_3():
        return pd.Series(["TOY1"]).dtype


@pytest.mark.parametrize("dtype", [object, "string", "category", text_of_pandas_3()], ids=str)
def test_missing_names_in_any_kind_of_text_column_are_no_genes(toy, toy_cells, dtype):
    cells = toy_cells(20)
    expected = tokens(cells[:, 1:].copy(), toy)
    cells.var["ensembl_id"] = pd.Series([None, *cells.var["ensembl_id"][1:]], index=cells.var_names, dtype=dtype)
    with as_pandas_3():
        np.testing.assert_array_equal(tokens(cells, toy, gene_ids="ensembl_id"), expected)
        gfx.pp.check(cells, model=toy, gene_ids="ensembl_id")


def test_columns_that_cannot_be_meant_are_refused_by_name(toy, toy_cells):
    cells = toy_cells(5)
    for names in (["TOY1"], np.array(["TOY1", "TOY2"])):
        with pytest.raises(
            TypeError, match=r"`gene_ids` is the name of a column of `adata.var`, found a (list|ndarray)"
        ):
            gfx.pp.tokenize(cells, model=toy, gene_ids=names)
    cells.var = pd.concat([cells.var, cells.var], axis=1)
    for call in (gfx.pp.tokenize, gfx.pp.check):
        with pytest.raises(ValueError, match=r"`adata.var` has 2 columns named 'ensembl_id'. Rename all but one"):
            call(cells, model=toy, gene_ids="ensembl_id")
    gfx.pp.check(cells, model=toy)
