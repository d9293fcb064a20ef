"""Moved to `test_results.py`; left until every room reads and writes through `gfx._results`."""

from __future__ import annotations

from gfx import _keys, _results


def test_names_of_rooms_that_are_not_converted_are_those_of_the_table() -> None:
    for function in _results.PERTURBATIONS:
        keys = vars(_keys.perturbation_keys(function, "mine")).items()
        slots = {(slot.partition("_")[0], name) for slot, name in keys}
        assert slots == set(_results.slots_of(function, "mine"))
