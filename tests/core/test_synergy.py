"""Excess of a set over its genes, against a loop over cells; and what adds up must not look like synergy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from gfx._core.statistics import synergy

N_GENES, N_CELLS, WIDTH = 3, 20, 8


def apart(one, other):
    one, other = (np.asarray(vector, dtype=np.float64) for vector in (one, other))
    return 1 - one @ other / np.sqrt((one @ one) * (other @ other))


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    before = rng.normal(size=(N_CELLS, WIDTH)).astype(np.float32)
    singles = before + rng.normal(0, 0.3, (N_GENES, N_CELLS, WIDTH)).astype(np.float32)
    together = before + rng.normal(0, 0.5, (N_CELLS, WIDTH)).astype(np.float32)
    return before, together, singles


def compare(before, together, singles):
    shift = np.array([apart(*pair) for pair in zip(before, together, strict=True)])
    each = np.array([[apart(*pair) for pair in zip(before, moved, strict=True)] for moved in singles])
    found = synergy(before, together, singles, shift, each)
    on_shifts, on_vectors = found["together"] - found["summed"], found["displaced"] - found["composed"]
    return SimpleNamespace(**found, on_shifts=on_shifts, on_vectors=on_vectors)


def test_agrees_with_a_loop(vectors):
    before, together, singles = vectors
    found = compare(before, together, singles)
    for cell in range(N_CELLS):
        shift = apart(before[cell], together[cell])
        summed = sum(apart(before[cell], singles[gene, cell]) for gene in range(N_GENES))
        displaced = before[cell] + sum(singles[gene, cell] - before[cell] for gene in range(N_GENES))
        composed = apart(before[cell], displaced)
        assert found.together[cell] == pytest.approx(shift)
        assert found.summed[cell] == pytest.approx(summed)
        assert found.composed[cell] == pytest.approx(composed, abs=1e-6)
        assert found.on_shifts[cell] == pytest.approx(shift - summed)
        assert found.on_vectors[cell] == pytest.approx(shift - composed, abs=1e-6)


def test_shifts_are_taken_as_given(vectors):
    """How a cell's shift is measured is not decided here: the mean over genes is no shift of the mean."""
    shift, singles = np.arange(N_CELLS) / 10, np.ones((N_GENES, N_CELLS))
    found = synergy(*vectors, shift, singles)
    np.testing.assert_array_equal(found["together"], shift)
    np.testing.assert_array_equal(found["summed"], np.full(N_CELLS, N_GENES))


def test_displacements_that_add_up_are_no_synergy_on_vectors(vectors):
    before, _, singles = (array.astype(np.float64) for array in vectors)
    found = compare(before, before + (singles - before).sum(axis=0), singles)
    np.testing.assert_allclose(found.on_vectors, 0, atol=1e-12)
    assert np.abs(found.on_shifts).mean() > 0.01


def test_two_genes_that_push_the_same_way():
    """Shifts grow with the square of small displacements: the sum of shifts calls this synergy."""
    before = np.eye(WIDTH)[:1]
    push = 0.01 * np.eye(WIDTH)[1]
    singles = np.stack([before + push, before + push])
    found = compare(before, before + 2 * push, singles)
    assert found.together / found.summed == pytest.approx(2, rel=1e-3)
    assert found.on_shifts > 0
    assert found.on_vectors == pytest.approx(0, abs=1e-15)


def test_two_genes_that_push_against_each_other():
    before = np.eye(WIDTH)[:1]
    push = 0.1 * np.eye(WIDTH)[1]
    found = compare(before, before, np.stack([before + push, before - push]))
    assert found.on_shifts == pytest.approx(-found.summed)
    assert found.on_vectors == pytest.approx(0, abs=1e-15)


def test_small_shifts_of_single_precision():
    """The shift is below the rounding of a cosine in float32: it is taken in float64."""
    before = np.full((1, WIDTH), 3.0, dtype=np.float32)
    push = np.array([3e-4, -3e-4, 0, 0, 0, 0, 0, 0], dtype=np.float32)
    singles = np.stack([before + push])
    found = compare(before, before + push, singles)
    assert found.composed == pytest.approx(apart(before[0], singles[0, 0]), rel=1e-6)
    assert 0 < found.composed < 1e-8
