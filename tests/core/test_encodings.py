"""Tokens of cells one behind the other: what comes out is what a list of lists would give."""

from __future__ import annotations

import numpy as np
import pytest

from gfx._core.encodings import Encodings

CELLS = [[], [5, 3, 900], [7], [], [3, 5, 2, 65535, 8], []]


@pytest.fixture(params=["padded", "one behind the other"])
def encodings(request):
    lengths = np.array([len(cell) for cell in CELLS], dtype=np.int32)
    padded = np.zeros((len(CELLS), 9), dtype=np.uint16)
    for row, cell in zip(padded, CELLS, strict=True):
        row[: len(cell)] = cell
    rows = Encodings.of(padded, lengths)
    if request.param == "padded":
        assert np.shares_memory(rows.values, padded)
        return rows
    packed = rows.without_padding()
    assert packed.values.tolist() == [token for cell in CELLS for token in cell]
    return packed


def test_cells_come_back(encodings):
    assert len(encodings) == len(CELLS)
    assert [row.tolist() for row in encodings] == CELLS
    assert encodings.values.dtype == np.uint16
    assert [row.tolist() for row in encodings.without_padding()] == CELLS


@pytest.mark.parametrize("cells", [[4, 1, 4], [2, 0], [0, 3, 5], []])
def test_some_cells_are_padded_to_the_longest_of_them(encodings, cells):
    found = encodings.padded(np.array(cells, dtype=np.int64))
    longest = max((len(CELLS[cell]) for cell in cells), default=0)
    assert found.dtype == np.uint16
    assert found.shape == (len(cells), longest)
    assert found.tolist() == [CELLS[cell] + [0] * (longest - len(CELLS[cell])) for cell in cells]


def test_places_of_genes(encodings):
    genes = [3, 5, 65535, 4]
    expected = [[cell.index(gene) if gene in cell else -1 for gene in genes] for cell in CELLS]
    assert encodings.places(genes).tolist() == expected
    assert Encodings.of(np.zeros((2, 0), np.uint16), np.zeros(2, int)).places([3]).tolist() == [[-1], [-1]]


def test_no_cells():
    none = Encodings.of(np.zeros((0, 0), np.uint16), np.zeros(0, int))
    assert len(none) == 0
    assert none.values.dtype == np.uint16
    assert none.padded(np.zeros(0, int)).shape == (0, 0)
