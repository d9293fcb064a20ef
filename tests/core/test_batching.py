from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gfx._core.batching import batches_by_length, pieces

LENGTHS = st.lists(st.integers(0, 40), max_size=60)


@given(LENGTHS, st.integers(1, 200))
def test_every_cell_with_tokens_is_in_exactly_one_batch(lengths, max_tokens):
    lengths = np.array(lengths, dtype=np.int32)
    batches = batches_by_length(lengths, max_tokens)
    rows = np.concatenate([*batches, np.array([], dtype=int)]).astype(int)
    assert sorted(rows) == np.flatnonzero(lengths).tolist()


@given(LENGTHS, st.integers(1, 200))
def test_batches_stay_within_their_limit_longest_first(lengths, max_tokens):
    lengths = np.array(lengths, dtype=np.int32)
    batches = batches_by_length(lengths, max_tokens)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= max_tokens
    in_order = [int(lengths[row]) for batch in batches for row in batch]
    assert in_order == sorted(in_order, reverse=True)


@given(LENGTHS, st.integers(1, 200))
def test_batches_are_as_full_as_the_limit_allows(lengths, max_tokens):
    lengths = np.array(lengths, dtype=np.int32)
    batches = batches_by_length(lengths, max_tokens)
    for batch in batches[:-1]:
        assert (len(batch) + 1) * lengths[batch].max() > max_tokens


def test_cells_of_equal_length_keep_their_order():
    batches = batches_by_length(np.array([3, 5, 3, 5, 3]), 1000)
    assert [batch.tolist() for batch in batches] == [[1, 3, 0, 2, 4]]


def test_no_cells_no_batches():
    assert batches_by_length(np.zeros(0, dtype=np.int32), 100) == []
    assert batches_by_length(np.zeros(4, dtype=np.int32), 100) == []


@given(LENGTHS, st.integers(1, 200), st.integers(1, 100))
def test_different_lengths_share_a_batch_up_to_a_limit_of_their_own(lengths, max_tokens, mixed_tokens):
    lengths = np.array(lengths, dtype=np.int32)
    batches = batches_by_length(lengths, max_tokens, mixed_tokens=mixed_tokens)
    assert sorted(row for batch in batches for row in batch) == np.flatnonzero(lengths).tolist()
    for batch in batches:
        n_tokens = len(batch) * lengths[batch].max()
        assert len(batch) == 1 or n_tokens <= max_tokens
        assert np.ptp(lengths[batch]) == 0 or n_tokens <= mixed_tokens


def test_pieces_are_of_one_size_but_for_the_last():
    assert [piece.tolist() for piece in pieces(np.arange(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]
