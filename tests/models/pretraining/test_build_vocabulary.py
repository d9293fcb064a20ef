"""A vocabulary from counts: in memory or on disk, at once or in parts."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import tracemalloc

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.stats import rankdata

from gfx.models import build_vocabulary, summarize_genes
from gfx.models._vocabulary_file import read_vocabulary, write_vocabulary
from gfx.models.pretraining._vocabulary import ACCURACY

WITHIN = ACCURACY * (1 + 1e-9)


def gene_ids(n, start=1):
    return [f"ENSG{number:011d}" for number in range(start, start + n)]


def naive_medians(sources, min_cells):
    seen = {}
    for adata in sources:
        for row in np.asarray(adata.X.todense(), dtype=np.float64):
            for gene, count in zip(adata.var_names, row, strict=True):
                if count > 0:
                    seen.setdefault(gene, []).append(count / row.sum() * 10_000)
    return {gene: np.median(values) for gene, values in seen.items() if len(values) >= min_cells}


def two_sources(seed=0):
    """Cells that share some genes, with other genes in each."""
    rng = np.random.default_rng(seed)
    sources = []
    for start, n_cells in ((1, 40), (11, 25)):
        counts = rng.poisson(rng.lognormal(-1, 1.5, 30), (n_cells, 30)).astype(np.float32)
        adata = ad.AnnData(sparse.csr_matrix(counts))
        adata.var_names = gene_ids(30, start)
        sources.append(adata)
    return sources


@pytest.mark.parametrize("min_cells", [1, 5, 30])
def test_medians(min_cells):
    sources = two_sources()
    vocabulary = build_vocabulary(sources, min_cells=min_cells)
    expected = naive_medians(sources, min_cells)
    assert vocabulary.ids[:4].tolist() == ["<pad>", "<mask>", "<cls>", "<eos>"]
    assert vocabulary.ids[4:].tolist() == sorted(expected)
    np.testing.assert_allclose(vocabulary.medians[4:], [expected[gene] for gene in vocabulary.ids[4:]], rtol=WITHIN)
    assert len(expected) > 5


def test_cells_without_counts_change_no_median():
    sources = two_sources()
    sources[0].X = sparse.csr_matrix(sources[0].X.multiply(np.arange(40)[:, None] > 3))
    vocabulary = build_vocabulary(sources, min_cells=5)
    expected = naive_medians([sources[0][4:], sources[1]], 5)
    np.testing.assert_allclose(vocabulary.medians[4:], [expected[gene] for gene in vocabulary.ids[4:]], rtol=WITHIN)


def test_depth_is_that_of_all_genes():
    """Genes that are not learnt count for the depth."""
    sources = two_sources()
    chosen = sources[0].var_names[:12].tolist()
    vocabulary = build_vocabulary(sources, genes=chosen, min_cells=5)
    expected = naive_medians(sources, 5)
    assert set(vocabulary.ids[4:]) == set(chosen) & set(expected)
    np.testing.assert_allclose(vocabulary.medians[4:], [expected[gene] for gene in vocabulary.ids[4:]], rtol=WITHIN)


def test_repeated_genes_are_summed():
    (first, _) = two_sources()
    twice = ad.AnnData(sparse.hstack([first.X, first.X], format="csr"))
    twice.var_names = [*first.var_names, *[f"{gene}.7" for gene in first.var_names]]
    vocabulary, expected = build_vocabulary([twice]), build_vocabulary([first])
    assert vocabulary.ids.tolist() == expected.ids.tolist()
    np.testing.assert_allclose(vocabulary.medians, expected.medians, rtol=WITHIN)  # twice the count of twice the depth
    assert set(vocabulary.symbols) == {""}  # an id with a version is no symbol


def test_symbols_and_aliases():
    first, second = two_sources()
    for adata, names in ((first, "GENE{}"), (second, "Old{}")):
        adata.var["ensembl"] = adata.var_names.to_numpy()
        adata.var_names = [names.format(int(gene[4:])) for gene in adata.var["ensembl"]]
    vocabulary = build_vocabulary([first, first, second], gene_ids="ensembl", min_cells=1)
    shared = "ENSG00000000015"
    assert vocabulary.symbols[vocabulary.token_of[shared]] == "GENE15"  # as most sources say
    assert vocabulary.resolve(["gene15", "OLD15", shared]).tolist() == [vocabulary.token_of[shared]] * 3


def test_files(tmp_path):
    first, second = two_sources()
    first.write_h5ad(tmp_path / "first.h5ad")
    second.write_h5ad(tmp_path / "second.h5ad")
    found = build_vocabulary([tmp_path / "first.h5ad", str(tmp_path / "second.h5ad")])
    assert found.sha256 == build_vocabulary([first, second]).sha256


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("csr", "float32"), ("csc", "int64"), ("dense", "uint8"), ("zarr", "int64"), ("zarr dense", "float32")],
)
def test_files_of_any_kind(tmp_path, kind, dtype):
    (first, _) = two_sources()
    expected = build_vocabulary(first)
    x = first.X.astype(dtype)
    first.X = {"csr": x, "csc": x.tocsc(), "zarr": x}.get(kind, x.toarray())
    path = tmp_path / "cells"
    if kind.startswith("zarr"):
        first.write_zarr(path)
    else:
        first.write_h5ad(path)
    found = build_vocabulary(path)
    assert found.sha256 == expected.sha256
    assert found.n_cells.tolist() == expected.n_cells.tolist()
    assert build_vocabulary(first).sha256 == expected.sha256


def test_one_source_need_not_be_in_a_list(tmp_path):
    (first, _) = two_sources()
    first.write_h5ad(tmp_path / "first.h5ad")
    expected = build_vocabulary([first]).sha256
    for source in (first, tmp_path / "first.h5ad", str(tmp_path / "first.h5ad")):
        assert build_vocabulary(source).sha256 == expected


def test_sources_without_usable_genes_are_refused(tmp_path):
    first, second = two_sources()
    with pytest.raises(ValueError, match="`sources` is empty"):
        build_vocabulary([])
    symbols = second.copy()
    symbols.var_names = ["ENSA", *[f"GENE{at}" for at in range(29)]]  # ENSA is a symbol, not an Ensembl id
    with pytest.raises(ValueError, match=r"source 1: no gene to learn from.*'ENSA'.*`gene_ids=`"):
        build_vocabulary([first, symbols])
    logs = second.copy()
    logs.X = logs.X.log1p()
    logs.write_h5ad(tmp_path / "logs.h5ad")
    with pytest.raises(ValueError, match=r"logs\.h5ad: `adata\.X` holds fractions"):
        build_vocabulary([first, tmp_path / "logs.h5ad"])
    with pytest.raises(ValueError, match=r"source 0: no gene to learn from"):
        build_vocabulary([first], genes=["ENSG00000099999"])
    with pytest.raises(
        ValueError, match=r"None of 30 genes is left: `min_cells=41`, the most cells that detect one are"
    ):
        build_vocabulary([first], min_cells=41)
    with pytest.raises(ValueError, match=r"source 0: Did not find 'ensembl' in `adata\.var`"):
        build_vocabulary([first], gene_ids="ensembl")


def test_bad_files_are_all_named(tmp_path):
    first, second = two_sources()
    first.write_h5ad(tmp_path / "good.h5ad")
    whole = (tmp_path / "good.h5ad").read_bytes()
    (tmp_path / "short.h5ad").write_bytes(whole[: len(whole) // 2])
    second.var["ensembl_id"] = "none"
    second.X.data[0] = -1
    second.write_h5ad(tmp_path / "negative.h5ad")
    second.var_names = [f"GENE{at}" for at in range(30)]
    second.write_h5ad(tmp_path / "symbols.h5ad")
    summary = summarize_genes(first).save(tmp_path / "broken.npz")
    summary.write_bytes(summary.read_bytes()[:-1])
    names = ("negative.h5ad", "short.h5ad", "good.h5ad", "symbols.h5ad", "broken.npz")
    with pytest.raises(ValueError, match=r"^4 of 5 sources cannot be used") as error:
        build_vocabulary([tmp_path / name for name in names])
    lines = str(error.value).splitlines()[1:]
    assert [line.partition(":")[0].partition(" is ")[0] for line in lines] == [
        "- negative.h5ad",
        "- short.h5ad",
        "- symbols.h5ad",
        "- broken.npz",
    ]
    assert "negative values" in lines[0]
    assert "cannot be read to its end" in lines[1]
    assert "no gene to learn from. Genes look like ['GENE0'" in lines[2]
    with pytest.raises(ValueError, match=r"good\.h5ad: Did not find 'ensembl_id' in `adata\.var`"):
        build_vocabulary(tmp_path / "good.h5ad", gene_ids="ensembl_id")
    with pytest.raises(ValueError, match=r"symbols\.h5ad: no gene to learn from. Genes look like \['', '', ''\]"):
        build_vocabulary(tmp_path / "symbols.h5ad", gene_ids="ensembl_id")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 sources do not exist: .*nowhere\.npz"):
        build_vocabulary([first, tmp_path / "nowhere.npz"])


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"min_cells": 0}, ValueError, "`min_cells=0`: a gene that no cell detects has no median"),
        ({"gene_types": ["coding"]}, TypeError, "a mapping of Ensembl ids, found list"),
        ({"gene_types": {"ENSG00000000001": None}}, TypeError, "ENSG00000000001' has None. Leave out unknowns"),
        ({"gene_types": "biotype"}, ValueError, "source 0: Did not find 'biotype' in `adata.var`"),
    ],
)
def test_wrong_arguments(wrong, error, text):
    with pytest.raises(error, match=text):
        build_vocabulary(two_sources(), **wrong)


# --- what else is known of genes ------------------------------------------------------------------------------------


def test_detections_are_counted():
    sources = two_sources()
    vocabulary = build_vocabulary(sources, min_cells=5)
    counts = pd.concat([adata.to_df() for adata in sources]).fillna(0)
    assert vocabulary.n_cells.dtype == np.int64
    assert vocabulary.n_cells[:4].tolist() == [0] * 4
    assert vocabulary.n_cells[4:].tolist() == (counts > 0).sum()[vocabulary.ids[4:]].tolist()


def test_gene_types(tmp_path):
    first, second = two_sources()
    for adata in (first, second):
        adata.var["kind"] = ["coding" if int(gene[4:]) % 2 else None for gene in adata.var_names]
    second.var.loc["ENSG00000000012", "kind"] = "lncRNA"
    second.write_h5ad(tmp_path / "second.h5ad")
    found = build_vocabulary([first, tmp_path / "second.h5ad"], gene_types="kind", min_cells=1)
    of = dict(zip(found.ids, found.gene_types, strict=True))
    assert (of["<pad>"], of["ENSG00000000015"], of["ENSG00000000012"], of["ENSG00000000014"]) == (
        "",
        "coding",
        "lncRNA",
        "",
    )
    types = {"ENSG00000000015.3": "of the mapping", "ENSG00000099999": "unseen"}
    for sources in ([first, second], [summarize_genes(first), second], summarize_genes([first, second])):
        mapped = build_vocabulary(sources, gene_types=types)
        assert set(mapped.gene_types) == {"", "of the mapping"}
        assert mapped.gene_types[mapped.token_of["ENSG00000000015"]] == "of the mapping"
    assert build_vocabulary([first, second]).gene_types is None
    assert found.sha256 == build_vocabulary([first, second], min_cells=1).sha256


def test_the_most_frequent_gene_type_is_taken():
    sources = [two_sources()[0] for _ in range(3)]
    for adata, kind in zip(sources, ("zebra", "ape", "ape"), strict=True):
        adata.var["kind"] = kind
    for order in itertools.permutations(sources):
        assert set(build_vocabulary(order, gene_types="kind").gene_types[4:]) == {"ape"}
    for order in itertools.permutations(sources[:2]):  # of as many, always the same
        assert set(build_vocabulary(order, gene_types="kind").gene_types[4:]) == {"zebra"}


def test_vocabulary_files(tmp_path):
    (first, _) = two_sources()
    first.var["kind"] = ["coding" if int(gene[4:]) % 2 else "" for gene in first.var_names]
    with_all = build_vocabulary(first, gene_types="kind")
    without = dataclasses.replace(with_all, n_cells=None, gene_types=None)
    columns = {}
    for name, vocabulary in (("all", with_all), ("none", without)):
        (tmp_path / name).mkdir()
        path = write_vocabulary(vocabulary, tmp_path / name)
        found = read_vocabulary(path)
        assert found.sha256 == vocabulary.sha256 == with_all.sha256
        for what in ("n_cells", "gene_types"):
            before, after = getattr(vocabulary, what), getattr(found, what)
            assert (after is None) if before is None else (after.tolist() == before.tolist())
            assert before is None or after.dtype == before.dtype
        columns[name] = gzip.decompress(path.read_bytes()).decode().splitlines()[1].split("\t")
    assert columns["none"] == ["token", "id", "symbol", "median", "aliases"]
    assert columns["all"] == [*columns["none"], "n_cells", "gene_type"]


@pytest.mark.parametrize("column", ["n_cells", "gene_types"])
def test_columns_of_another_length_are_refused(column):
    vocabulary = build_vocabulary(two_sources())
    with pytest.raises(ValueError, match=rf"has {len(vocabulary)} ids, .*3 {column}.*; one of each per token"):
        dataclasses.replace(vocabulary, **{column: np.zeros(3, np.int64)})


# --- parts ----------------------------------------------------------------------------------------------------------


def same(one, other):
    """Whether two vocabularies hold the same, names included."""
    return (
        one.sha256 == other.sha256
        and one.aliases == other.aliases
        and all(
            getattr(one, what).tolist() == getattr(other, what).tolist()
            for what in ("symbols", "n_cells", "gene_types")
        )
    )


def test_parts_of_any_kind_in_any_order(tmp_path):
    sources = [*two_sources(), *two_sources(seed=1)]
    for at, adata in enumerate(sources):
        adata.var["ensembl"] = adata.var_names.to_numpy()
        adata.var["kind"] = f"kind {at // 2}"
        adata.var_names = [f"{'GENE' if at % 2 else 'Old'}{int(gene[4:])}" for gene in adata.var["ensembl"]]
    how = {"gene_ids": "ensembl", "gene_types": "kind"}
    whole = build_vocabulary(sources, **how)
    parts = [summarize_genes(adata, **how) for adata in sources]
    sources[0].write_h5ad(tmp_path / "first.h5ad")
    mixed = [tmp_path / "first.h5ad", sources[1], parts[2], str(parts[3].save(tmp_path / "fourth.npz"))]
    for order in itertools.permutations(mixed):
        assert same(build_vocabulary(order, **how), whole)
    assert summarize_genes(mixed, **how) == summarize_genes(sources, **how)
    assert summarize_genes(sources, **how) == summarize_genes(sources[::-1], **how)
    assert same(build_vocabulary(parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])), whole)


def test_genes_are_chosen_from_summaries_of_more_genes():
    sources = two_sources()
    chosen = gene_ids(12, 8)
    whole = build_vocabulary(sources, genes=chosen)
    assert build_vocabulary(summarize_genes(sources), genes=chosen).sha256 == whole.sha256
    assert 0 < whole.n_genes <= 12


def test_block_borders_make_no_difference(monkeypatch):
    (first, _) = two_sources()
    expected = summarize_genes(first)
    first.X = first.X.toarray()  # blocks of a dense matrix hold so many values
    monkeypatch.setattr("gfx._adata._DENSE_PIECE", 90)
    assert summarize_genes(first) == expected


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(1, 6))
def test_medians_of_any_counts(data, n_cells, n_genes):
    counts = st.lists(st.integers(0, 60_000), min_size=n_genes, max_size=n_genes)
    x = np.array(data.draw(st.lists(counts, min_size=n_cells, max_size=n_cells)), np.int64)
    adata = ad.AnnData(sparse.csr_matrix(x), var=pd.DataFrame(index=gene_ids(n_genes)))
    summary, expected = summarize_genes(adata), naive_medians([adata], 1)
    medians = [expected.get(gene, np.nan) for gene in summary.ids]
    np.testing.assert_allclose(summary.medians(), medians, rtol=WITHIN)
    assert summary.n_cells.tolist() == (x > 0).sum(axis=0).tolist()


def real_files(shared):
    names = ("darmanis2015_adult_brain_100", "mimitou2019_eccite_pbmc", "cimseq_celllines_singlets")
    return [shared / "data" / "cells" / "train" / f"{name}.h5ad" for name in names]


def test_real_cells(shared):
    files = real_files(shared)
    summary = summarize_genes(files, gene_ids="ensembl_id")
    parts = [summarize_genes(file, gene_ids="ensembl_id") for file in files]
    assert parts[2].merge(parts[0]).merge(parts[1]) == summary
    values = {}
    for file in files:
        adata = ad.read_h5ad(file)
        x = sparse.csr_array(adata.X).astype(np.float64)
        x.data *= np.repeat(10_000 / x.sum(axis=1), np.diff(x.indptr))
        x.eliminate_zeros()
        by_gene, ids = x.tocsc(), adata.var["ensembl_id"].astype(str)
        for column in np.flatnonzero(~ids.duplicated(keep=False) & ids.str.startswith("ENSG")):
            detected = by_gene.data[by_gene.indptr[column] : by_gene.indptr[column + 1]]
            values.setdefault(ids.iloc[column].partition(".")[0], []).append(detected)
    expected = {gene: np.concatenate(arrays) for gene, arrays in values.items()}
    n_cells = dict(zip(summary.ids, summary.n_cells, strict=True))
    genes = [gene for gene, found in expected.items() if len(found) == n_cells[gene] > 0]
    medians = dict(zip(summary.ids, summary.medians(), strict=True))
    assert len(genes) > 15_000
    np.testing.assert_allclose(
        [medians[gene] for gene in genes], [np.median(expected[gene]) for gene in genes], rtol=WITHIN
    )


def test_ranks_in_real_cells_hardly_depend_on_the_bound(shared):
    """Dividing by medians within the bound leaves nearly all genes of a cell where exact medians put them."""
    (file, *_) = real_files(shared)
    adata = ad.read_h5ad(file)
    counts = sparse.csr_array(adata.X).toarray().astype(np.float64)
    normalised = counts / counts.sum(axis=1, keepdims=True)
    used = (counts > 0).sum(axis=0) >= 3
    normalised = normalised[:, used]
    exact = np.array([np.median(column[column > 0]) for column in normalised.T])
    rounded = exact * np.random.default_rng(0).uniform(1 - ACCURACY, 1 + ACCURACY, len(exact))
    moves = []
    for cell in normalised:
        detected = cell > 0
        places = [rankdata(-cell[detected] / medians[detected]) for medians in (exact, rounded)]
        moves.append(np.abs(places[0] - places[1]).mean() / detected.sum())
    assert np.mean(moves) < 1e-3


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_is_bounded_while_a_file_is_read(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    n_cells, n_genes = 40_000, 60
    monkeypatch.setattr("gfx._adata._SPARSE_PIECE", 1024 * n_genes)  # that in hand and that ahead are one block
    adata = ad.AnnData(sparse.csr_matrix(rng.integers(1, 9, (n_cells, n_genes)).astype(np.float32)))
    adata.var_names = gene_ids(n_genes)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    del adata
    build_vocabulary(two_sources())  # what is compiled and imported once
    tracemalloc.start()
    summary = summarize_genes(tmp_path / "cells.h5ad")
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    all_values = 8 * n_cells * n_genes / 1e6
    block = 2048 * n_genes * 60 / 1e6  # a block, its chosen genes, their values, their buckets and what counts these
    assert peak < block + 5 * 12 * summary.histogram.nnz / 1e6 + 1 < all_values
