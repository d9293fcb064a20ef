"""Texts that several docstrings share land where they belong."""

from __future__ import annotations

import inspect
import re

import pytest

import gfx
from gfx import _docs


def documented(docstring, **texts):
    def function() -> None: ...

    function.__doc__ = docstring
    filled = _docs.shared(**texts)(function)
    assert filled is function  # no wrapper: signature, name and source stay
    return function.__doc__


def test_a_line_that_is_a_placeholder_is_filled_and_indented() -> None:
    found = documented(
        "Do it.\n\n    Parameters\n    ----------\n    {some}\n    last\n        The last.\n",
        some="\nfirst\n    The first.\n\n    More of it.\nsecond\n    The second.\n",
    )
    assert found == (
        "Do it.\n\n    Parameters\n    ----------\n"
        "    first\n        The first.\n\n        More of it.\n    second\n        The second.\n"
        "    last\n        The last.\n"
    )
    assert not re.search(r"[ \t]+$", found, flags=re.M)


def test_the_same_text_at_several_depths() -> None:
    found = documented("Do it.\n\n{some}\n\t{some}\n        {some}\n", some="one\ntwo")
    assert found == "Do it.\n\none\ntwo\n\tone\n\ttwo\n        one\n        two\n"


def test_braces_inside_a_line_stay() -> None:
    text = 'Do it with {some} and ``{"a": 1}``.\n\n    {"a": 1}\n    {some} more\n'
    assert documented(text, some="x") == text


def test_braces_of_a_text_are_not_filled_again() -> None:
    assert documented("    {one}\n", one="{two}", two="no") == "    {two}\n"


def test_a_text_that_is_missing_is_an_error() -> None:
    with pytest.raises(KeyError, match="other"):
        documented("Do it.\n\n    {other}\n", some="x")


def test_no_docstring_at_all() -> None:
    """As under `python -OO`."""
    assert not documented(None, some="x")


PERTURBING = (gfx.tl.delete_genes, gfx.tl.overexpress_genes, gfx.tl.shift_genes)


@pytest.mark.parametrize("function", PERTURBING)
def test_what_functions_share_is_in_each_of_them(function) -> None:
    lines = inspect.getdoc(function).splitlines()
    for text in (_docs.MODEL, _docs.STATES, _docs.CONTROLS, _docs.READOUT, _docs.OUTPUT, _docs.PERTURBATION_ERRORS):
        wanted = inspect.cleandoc(text).splitlines()
        at = lines.index(wanted[0])
        assert lines[at : at + len(wanted)] == wanted


@pytest.mark.parametrize("function", PERTURBING)
def test_every_slot_is_told_under_its_own_name(function) -> None:
    keys = gfx._keys.perturbation_keys(f"tl.{function.__name__}")
    slots = set(re.findall(r"^`\.(\w+)\['(\w+)' \| key_added", inspect.getdoc(function), flags=re.M))
    assert slots == {(name.partition("_")[0], key) for name, key in vars(keys).items()}
