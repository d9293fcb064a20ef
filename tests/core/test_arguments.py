"""Seeds and other whole numbers, as users give them."""

from __future__ import annotations

import numpy as np
import pytest

from gfx._core.arguments import check_seed, check_whole


@pytest.mark.parametrize("seed", [7, np.int64(7), np.uint8(7), np.array([7])[0]])
def test_integers_of_python_and_numpy_are_the_same_seed(seed: object) -> None:
    found = check_seed(seed)
    assert found == 7
    assert type(found) is int


@pytest.mark.parametrize("seed", [True, np.True_, 7.0, "7", None, np.random.default_rng(0), np.array([7])])
def test_what_is_no_integer_is_refused(seed: object) -> None:
    with pytest.raises(TypeError, match="`rng` is a whole number, found"):
        check_seed(seed)


def test_numbers_below_the_least_are_refused() -> None:
    assert check_whole(np.int32(2), "n_splits", 2) == 2
    with pytest.raises(ValueError, match="`n_splits` is 2 or more, found 1"):
        check_whole(1, "n_splits", 2)
    with pytest.raises(ValueError, match="`rng` is 0 or more, found -1"):
        check_seed(-1)
