"""What is known of each gene: medians within a stated bound, the same in any order, parts that add up, files."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfx.models import GeneSummary
from gfx.models.pretraining._vocabulary import ACCURACY, _histogram, _merged

#: A hair wider than promised, for what rounding adds at the bounds of a bucket.
WITHIN = ACCURACY * (1 + 1e-9)


def summary_of(rows, names=()):
    """Summarize rows of gene and value, one part for each run of a gene, and one for each name."""
    parts = [GeneSummary(np.array([], dtype=object), _histogram(np.array([], int), np.array([]), 0), {}, {})]
    for gene, run in itertools.groupby(rows, key=lambda row: row[0]):
        parts.append(part_of(gene, [value for _, value in run]))
    parts += [part_of(gene, [], {gene: {symbol: 1}}, {gene: {f"type of {symbol}": 1}}) for gene, symbol in names]
    return _merged(parts)


def part_of(gene, values, symbols=(), gene_types=()):
    histogram = _histogram(np.zeros(len(values), int), np.array(values, dtype=float), 1)
    return GeneSummary(np.array([gene], dtype=object), histogram, dict(symbols), dict(gene_types))


def naive_medians(rows):
    values = {}
    for gene, value in rows:
        values.setdefault(gene, []).append(value)
    return {gene: float(np.median(np.array(of_gene))) for gene, of_gene in values.items()}


def many_rows(n=600, seed=0):
    rng = np.random.default_rng(seed)
    genes = [f"ENSG{gene:011d}" for gene in rng.integers(0, 12, n)]
    return list(zip(genes, rng.lognormal(1, 2, n).tolist(), strict=True))


VALUES = st.one_of(
    st.floats(2.0**-1000, 2.0**1000),
    st.floats(0.25, 8),
    st.floats(1.0, 1.01),  # so that buckets are shared
)
ROWS = st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), VALUES), max_size=40)
NAMES = st.lists(st.tuples(st.sampled_from(["a", "b", "d"]), st.sampled_from(["S", "T"])), max_size=4)

# --- medians --------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(ROWS)
def test_medians_are_within_the_bound(rows):
    summary, expected = summary_of(rows), naive_medians(rows)
    assert summary.ids.tolist() == sorted(expected)
    np.testing.assert_allclose(summary.medians(), [expected[gene] for gene in summary.ids], rtol=WITHIN)
    assert summary.n_cells.tolist() == [sum(gene == other for other, _ in rows) for gene in summary.ids]


@settings(max_examples=100)
@given(VALUES)
def test_each_value_is_within_the_bound(value):
    assert summary_of([("a", value)]).medians() == pytest.approx([value], rel=WITHIN)


def test_the_bound_is_reached_but_not_exceeded():
    """Values from one end of a bucket to the other: a smaller bound would be false, a larger one too modest."""
    values = np.linspace(1, 1.01, 10_001)
    errors = [abs(summary_of([("a", value)]).medians()[0] / value - 1) for value in values[::50]]
    assert 0.9 * ACCURACY < max(errors) <= WITHIN


def test_medians_of_many_values():
    rows = many_rows(1000)
    expected = naive_medians(rows)
    summary = summary_of(rows)
    np.testing.assert_allclose(summary.medians(), [expected[gene] for gene in summary.ids], rtol=WITHIN)


def test_a_gene_that_no_cell_detects_has_no_median():
    summary = summary_of([("b", 2.0)], names=[("a", "S"), ("c", "S")])
    assert summary.ids.tolist() == ["a", "b", "c"]
    assert summary.n_cells.tolist() == [0, 1, 0]
    assert summary.n_cells.dtype == np.int64
    assert summary.medians() == pytest.approx([np.nan, 2.0, np.nan], rel=WITHIN, nan_ok=True)


def test_extreme_values_have_buckets():
    limits = np.finfo(np.float64)
    extremes = [float(limits.smallest_subnormal), float(limits.tiny), 1.0, float(limits.max)]
    summary = summary_of([(gene, value) for gene in "abc" for value in extremes])
    assert summary.histogram.shape[0] == 3
    assert summary.histogram.nnz == 12
    assert summary.histogram.indices[0] == 0
    assert summary.histogram.indices[-1] == summary.histogram.shape[1] - 1


# --- merging --------------------------------------------------------------------------------------------------------


@given(ROWS, ROWS, NAMES, NAMES)
def test_merged_parts_are_the_whole(first, second, names, more_names):
    a, b = summary_of(first, names), summary_of(second, more_names)
    assert a.merge(b) == b.merge(a) == summary_of(first + second, names + more_names)


@settings(max_examples=50)
@given(st.lists(ROWS, min_size=3, max_size=5), st.randoms(use_true_random=False))
def test_neither_grouping_nor_order_matters(parts, random):
    summaries = [summary_of(rows) for rows in parts]
    left = functools.reduce(GeneSummary.merge, summaries)
    right = functools.reduce(lambda merged, part: part.merge(merged), summaries[::-1])
    rows = [row for part in parts for row in part]
    random.shuffle(rows)
    assert left == right == summary_of(rows)


def test_merging_changes_neither_part():
    rows = many_rows()
    a, b = summary_of(rows[:300]), summary_of(rows[300:])
    a.merge(b)
    assert a == summary_of(rows[:300])
    assert b == summary_of(rows[300:])


def test_summaries_that_differ_are_not_equal():
    summary = summary_of([("a", 1.0)])
    assert summary != summary_of([("a", 1.5)])
    assert summary != summary_of([("a", 1.0), ("a", 1.0)])
    assert summary != summary_of([("b", 1.0)])
    assert summary != summary_of([("a", 1.0)], names=[("a", "S")])
    assert summary != "a"


def test_few_parts_wait_to_be_added(monkeypatch):
    """Each is at least twice the next: an entry is added up about as often as the number of parts can be halved."""
    rng, added, merge = np.random.default_rng(0), [], GeneSummary.merge

    def watched(one, other):
        added.append(one.histogram.nnz + other.histogram.nnz)
        return merge(one, other)

    monkeypatch.setattr(GeneSummary, "merge", watched)
    parts = [part_of(f"gene {rng.integers(20)}", rng.lognormal(1, 2, rng.integers(1, 50))) for _ in range(300)]
    total = _merged(parts)
    assert len(added) == 299
    assert total.n_cells.sum() == sum(part.n_cells.sum() for part in parts)
    assert sum(added) < 2 * np.log2(300) * sum(part.histogram.nnz for part in parts)


# --- files ----------------------------------------------------------------------------------------------------------


def test_files(tmp_path):
    rows, names = many_rows(), [("ENSG00000000003", "THREE"), ("ENSG00000000099", "NINE"), ("ENSG00000000003", "DREI")]
    summary = summary_of(rows, names)
    path = summary.save(tmp_path / "one.npz")
    assert path == tmp_path / "one.npz"
    assert GeneSummary.load(str(path)) == summary
    np.testing.assert_array_equal(GeneSummary.load(path).medians(), summary.medians())
    # The same bytes, whatever came first.
    again = summary_of(rows[::-1], names[::-1]).save(tmp_path / "again.npz")
    assert again.read_bytes() == path.read_bytes()
    # Parts merge in files as they do in memory.
    parts = [
        GeneSummary.load(summary_of(part, these).save(tmp_path / "part.npz"))
        for part, these in ((rows[:40], names[:1]), (rows[40:], names[1:]))
    ]
    assert parts[1].merge(parts[0]).save(tmp_path / "merged.npz").read_bytes() == path.read_bytes()
    assert {array.dtype.kind for array in np.load(path, allow_pickle=False).values()} <= set("fiU")


def test_an_empty_summary_is_saved_and_merged(tmp_path):
    empty = summary_of([])
    assert GeneSummary.load(empty.save(tmp_path / "empty.npz")) == empty
    assert repr(empty) == "GeneSummary(0 genes, 0 detections)"
    summary = summary_of([("a", 1.0)])
    assert empty.merge(summary) == summary.merge(empty) == summary


def test_files_that_are_no_summary(tmp_path):
    path = summary_of(many_rows()).save(tmp_path / "one.npz")
    whole = path.read_bytes()
    arrays = dict(np.load(path))
    wrong = tmp_path / "wrong.npz"
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        wrong.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"wrong\.npz is no readable summary of genes .*copied or fetched complete"
        ):
            GeneSummary.load(wrong)
    at = len(whole) // 2
    wrong.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    with pytest.raises(ValueError, match=r"wrong\.npz is no readable summary"):
        GeneSummary.load(wrong)
    np.savez(wrong, cells=np.arange(3))
    with pytest.raises(ValueError, match=r"wrong\.npz is no summary of genes, it holds \['cells'\].*summarize_genes"):
        GeneSummary.load(wrong)
    np.savez(wrong, **(arrays | {"ids": np.array(["a", {}], dtype=object)}))
    with pytest.raises(ValueError, match=r"wrong\.npz is no readable summary.*allow_pickle=False"):
        GeneSummary.load(wrong)
    np.savez(wrong, **(arrays | {"accuracy": np.float64(0.01)}))
    with pytest.raises(ValueError, match=r"wrong\.npz has medians within 1\.00%, this version of gfx within 0\.05%"):
        GeneSummary.load(wrong)
    for spoilt in (
        {"n_cells": arrays["n_cells"][:-1]},
        {"ids": arrays["ids"][:-1]},
        {"bucket": arrays["bucket"] + 2**30},
        {"first_bucket": arrays["first_bucket"][::-1].copy()},
        {"names": np.array("no JSON")},
    ):
        np.savez(wrong, **(arrays | spoilt))
        with pytest.raises(ValueError, match=r"wrong\.npz is no readable summary"):
            GeneSummary.load(wrong)


def test_summaries_are_saved_as_npz_alone(tmp_path):
    with pytest.raises(ValueError, match=r"found 'one\.h5ad'. Save to 'one\.npz'"):
        summary_of([]).save(tmp_path / "one.h5ad")
    assert not list(tmp_path.iterdir())


def test_repr():
    assert repr(summary_of(many_rows(1200))) == "GeneSummary(12 genes, 1,200 detections)"
