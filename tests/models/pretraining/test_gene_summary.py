"""What is kept of each gene: exact or sketched, the same in any order, and never more than was allowed."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from ddsketch import DDSketch
from ddsketch.mapping import LogarithmicMapping
from hypothesis import given, settings
from hypothesis import strategies as st

from gfx.models import GeneSummary
from gfx.models.pretraining._gene_summary import ACCURACY, GrowingSummary, Piece, bucket_keys

#: A hair wider than promised, for what rounding adds at the bounds of a bucket.
WITHIN = ACCURACY * (1 + 1e-9)


def summary_of(rows, max_values, names=()):
    """Summarize rows of gene and value, a piece for each run of a gene."""
    growing = GrowingSummary(max_values)
    for gene, run in itertools.groupby(rows, key=lambda row: row[0]):
        values = np.array([value for _, value in run], np.float32)
        growing.add(Piece(np.array([growing.add_gene(gene)]), np.array([len(values)]), values))
    for gene, symbol in names:
        growing.add_gene(gene)
        growing.add_names(gene, {symbol: 1}, {f"type of {symbol}": 1})
    return growing.finish()


def naive_medians(rows):
    values = {}
    for gene, value in rows:
        values.setdefault(gene, []).append(np.float32(value))
    return {gene: float(np.median(np.array(found))) for gene, found in values.items()}


def many_rows(n=600, seed=0):
    rng = np.random.default_rng(seed)
    genes = [f"ENSG{gene:011d}" for gene in rng.integers(0, 12, n)]
    return list(zip(genes, rng.lognormal(1, 2, n).astype(np.float32).tolist(), strict=True))


VALUES = st.one_of(
    st.floats(2**-100, 2.0**100, width=32),
    st.floats(0.25, 8, width=32),  # so that buckets are shared
)
ROWS = st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), VALUES), max_size=40)
NAMES = st.lists(st.tuples(st.sampled_from(["a", "b", "d"]), st.sampled_from(["S", "T"])), max_size=4)

# --- medians --------------------------------------------------------------------------------------------------------


@given(ROWS)
def test_exact_medians_are_those_of_numpy(rows):
    found, expected = summary_of(rows, 1000), naive_medians(rows)
    assert found.is_exact
    assert found.ids.tolist() == sorted(expected)
    assert found.medians().tolist() == [expected[gene] for gene in found.ids]  # to the last bit


@given(ROWS.filter(bool))
def test_sketched_medians_are_as_near_as_promised(rows):
    found, expected = summary_of(rows, 0), naive_medians(rows)
    assert not found.is_exact
    assert found.ids.tolist() == sorted(expected)
    np.testing.assert_allclose(found.medians(), [expected[gene] for gene in found.ids], rtol=WITHIN)


def test_sketched_medians_of_many_values():
    rows = many_rows()
    expected = naive_medians(rows)
    found = summary_of(rows, 50)
    np.testing.assert_allclose(found.medians(), [expected[gene] for gene in found.ids], rtol=WITHIN)
    assert (found.medians() != summary_of(rows, 1000).medians()).any()


def test_a_gene_that_no_cell_detects_has_no_median():
    for max_values in (0, 10):
        found = summary_of([("b", 2.0)], max_values, names=[("a", "S")])
        assert found.ids.tolist() == ["a", "b"]
        assert found.n_cells.tolist() == [0, 1]
        assert found.n_cells.dtype == np.int64
        assert found.medians() == pytest.approx([np.nan, 2.0], rel=WITHIN, nan_ok=True)


# --- the sketch is the library's ------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.lists(VALUES, min_size=1))
def test_keys_are_those_of_the_library(values):
    mapping = LogarithmicMapping(ACCURACY)
    assert bucket_keys(np.array(values, np.float32)).tolist() == [mapping.key(value) for value in values]


def test_extreme_values_have_keys_of_their_own():
    """All positive float32, so that no gene's key is taken for another gene's."""
    limits = np.finfo(np.float32)
    extremes = [float(limits.smallest_subnormal), float(limits.tiny), 1.0, float(limits.max)]
    found = summary_of([(gene, value) for gene in "abc" for value in extremes[:1] + extremes[-2:]], 0)
    mapping = LogarithmicMapping(ACCURACY)
    genes, keys = found.buckets.genes_and_keys()
    assert genes.tolist() == [gene for gene in range(3) for _ in range(3)]
    assert keys.tolist() == 3 * [mapping.key(value) for value in (extremes[0], 1.0, extremes[-1])]


def test_sketch_is_what_the_library_counts_value_by_value():
    rows = [row for row in many_rows() if row[0].endswith("3")]
    rows = rows[: len(rows) - 1 + len(rows) % 2]  # an odd number has one middle
    sketch = DDSketch(relative_accuracy=ACCURACY)
    for _, value in rows:
        sketch.add(value)
    (median,) = summary_of(rows, 10).medians()
    assert median == sketch.get_quantile_value(0.5)


# --- merging --------------------------------------------------------------------------------------------------------


@given(ROWS, ROWS, NAMES, NAMES, st.sampled_from([0, 5, 20, 1000]))
def test_merged_parts_are_the_whole(first, second, names, more_names, max_values):
    """Exact, sketched, or one of each."""
    a, b = summary_of(first, max_values, names), summary_of(second, max_values, more_names)
    whole = summary_of(first + second, max_values, names + more_names)
    assert a.merge(b) == b.merge(a) == whole
    assert whole.is_exact == (len(first) + len(second) <= max_values)


@settings(max_examples=50)
@given(st.lists(ROWS, min_size=3, max_size=5), st.sampled_from([0, 10, 60, 1000]), st.randoms(use_true_random=False))
def test_neither_grouping_nor_order_matters(parts, max_values, random):
    summaries = [summary_of(rows, max_values) for rows in parts]
    left = functools.reduce(GeneSummary.merge, summaries)
    right = functools.reduce(lambda so_far, one: one.merge(so_far), summaries[::-1])
    rows = [row for part in parts for row in part]
    random.shuffle(rows)
    assert left == right == summary_of(rows, max_values)


def test_merging_changes_neither_part():
    rows = many_rows()
    for first, second in ((1000, 1000), (10, 1000), (1000, 10), (10, 10)):
        a, b = summary_of(rows[:300], first), summary_of(rows[300:], second)
        a.merge(b)
        assert a == summary_of(rows[:300], first)
        assert b == summary_of(rows[300:], second)


def test_the_smaller_number_of_values_holds():
    rows = many_rows(100)
    for a, b in itertools.permutations((summary_of(rows[:50], 60), summary_of(rows[50:], 1000))):
        assert a.merge(b) == summary_of(rows, 60)


def test_summaries_that_differ_are_not_equal():
    one = summary_of([("a", 1.0)], 10)
    assert one != summary_of([("a", 1.5)], 10)
    assert one != summary_of([("b", 1.0)], 10)
    assert one != summary_of([("a", 1.0)], 0)
    assert one != summary_of([("a", 1.0)], 10, names=[("a", "S")])
    assert one != "a"


# --- memory ---------------------------------------------------------------------------------------------------------


@given(ROWS, st.integers(0, 50))
def test_never_more_values_than_allowed(rows, max_values):
    growing = GrowingSummary(max_values)
    for n, (gene, value) in enumerate(rows, start=1):
        growing.add(Piece(np.array([growing.add_gene(gene)]), np.array([1]), np.array([value], np.float32)))
        assert growing.n_kept == sum(len(piece.values) for piece in growing._pieces) <= max_values
        assert growing.n_kept == n or n > max_values  # and none is given up before


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_values", [0, 50, 1000])
def test_files(tmp_path, max_values):
    rows, names = many_rows(), [("ENSG00000000003", "THREE"), ("ENSG00000000099", "NINE"), ("ENSG00000000003", "DREI")]
    one = summary_of(rows, max_values, names)
    path = one.save(tmp_path / "one.npz")
    assert path == tmp_path / "one.npz"
    assert GeneSummary.load(str(path)) == one
    np.testing.assert_array_equal(GeneSummary.load(path).medians(), one.medians())
    # The same bytes, whatever came first.
    again = summary_of(rows[::-1], max_values, names[::-1]).save(tmp_path / "again.npz")
    assert again.read_bytes() == path.read_bytes()
    # Parts merge in files as they do in memory.
    parts = [
        GeneSummary.load(summary_of(part, max_values, these).save(tmp_path / "part.npz"))
        for part, these in ((rows[:40], names[:1]), (rows[40:], names[1:]))
    ]
    assert parts[1].merge(parts[0]).save(tmp_path / "merged.npz").read_bytes() == path.read_bytes()
    assert {array.dtype.kind for array in np.load(path, allow_pickle=False).values()} <= set("fiU")


def test_a_file_of_nothing(tmp_path):
    empty = GrowingSummary(0).finish()
    assert GeneSummary.load(empty.save(tmp_path / "empty.npz")) == empty
    assert repr(empty) == "GeneSummary(0 genes, 0 detections, exact)"
    one = summary_of([("a", 1.0)], 10)
    assert empty.merge(one) == one.merge(empty) == summary_of([("a", 1.0)], 0)


@pytest.mark.parametrize("max_values", [0, 1000])
def test_files_that_are_no_summary(tmp_path, max_values):
    path = summary_of(many_rows(), max_values).save(tmp_path / "one.npz")
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
    with pytest.raises(ValueError, match=r"wrong\.npz was made to sketch to 1\.00%, this version of gfx to 0\.50%"):
        GeneSummary.load(wrong)
    np.savez(wrong, **(arrays | {"n_cells": arrays["n_cells"] + 1}))
    with pytest.raises(ValueError, match=r"wrong\.npz holds another number of values"):
        GeneSummary.load(wrong)


def test_summaries_have_names_of_their_own(tmp_path):
    with pytest.raises(ValueError, match=r"found 'one\.h5ad'. Save to 'one\.npz'"):
        summary_of([], 1).save(tmp_path / "one.h5ad")
    assert not list(tmp_path.iterdir())


def test_repr():
    assert repr(summary_of(many_rows(1200), 10_000)) == "GeneSummary(12 genes, 1,200 detections, exact)"
    assert repr(summary_of(many_rows(1200), 10)) == "GeneSummary(12 genes, 1,200 detections, medians within 0.5%)"
