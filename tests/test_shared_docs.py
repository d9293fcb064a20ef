"""Texts that several docstrings share land where they belong."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import gfx
from gfx import _docs, _results


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


def test_the_table_fills_a_line_without_being_told() -> None:
    found = documented("Do it.\n\n    Parameters\n    ----------\n    {layer}\n    {after_attention}\n")
    assert "\n    layer\n        Layer of the AnnData" in found
    assert "\n    adata\n        After :func:`gfx.tl.attention`.\n" in found


def test_a_text_of_the_function_goes_before_that_of_the_table() -> None:
    assert documented("    {layer}\n", layer="layer\n    Another.") == "    layer\n        Another.\n"


@pytest.mark.parametrize("name", _docs.TEXTS)
def test_texts_of_the_table_are_full_sentences_that_fit_a_docstring(name) -> None:
    parameter, *lines = _docs.TEXTS[name].splitlines()
    assert parameter.isidentifier()
    assert lines
    assert all(line.startswith("    ") and len(line) <= 116 for line in lines)
    assert lines[-1].endswith(".")


MODULES = ("pp", "tl", "get", "pl", "models", "datasets")
FILES = sorted(Path(gfx.__file__).parent.rglob("*.py"))


#: Rooms that do not use the table yet.
NOT_YET = ("get", "pl", "models")


def names(module):
    """Names of everything public in a module."""
    return importlib.import_module(f"gfx.{module}").__all__


def parameters_as_typed():
    """Yield where each parameter of a function is described in the source, its name, and its text on one line."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            docstring = ast.get_docstring(node) or "" if isinstance(node, ast.FunctionDef) else ""
            if "\n{mod}\n" in docstring or file.parent.name not in NOT_YET:
                section = docstring.partition("Parameters\n---")[2].partition("\n---")[0]
                for match in re.finditer(r"^(\w+)\n((?: {4}.*\n?)+)", section, flags=re.M):
                    yield f"{file.parent.name}.{node.name}", match[1], " ".join(match[2].split())


def test_no_placeholder_survives() -> None:
    for module in MODULES:
        for name in names(module):
            docstring = inspect.getdoc(getattr(getattr(gfx, module), name))
            assert not re.search(r"^\s*\{\w+\}$", docstring, flags=re.M), f"{module}.{name}"


def test_no_text_of_the_table_is_typed_again() -> None:
    texts = {" ".join(text.split()): name for name, text in _docs.TEXTS.items()}
    again = [(where, name) for where, name, text in parameters_as_typed() if f"{name} {text}" in texts]
    assert not again


def test_no_parameter_of_public_functions_is_described_twice_in_the_same_words() -> None:
    public = {f"{module}.{name}" for module in MODULES for name in names(module)}
    typed: dict[tuple[str, str], list[str]] = {}
    for where, name, text in parameters_as_typed():
        if where in public:
            typed.setdefault((name, text), []).append(where)
    assert not {parameter: places for parameter, places in typed.items() if len(places) > 1}


PERTURBING = (gfx.tl.delete_genes, gfx.tl.overexpress_genes, gfx.tl.shift_genes)


@pytest.mark.parametrize("function", PERTURBING)
def test_every_slot_of_a_perturbation_is_told_under_its_own_name(function) -> None:
    name = f"tl.{function.__name__}"
    slots = set(re.findall(r"^`\.(\w+)\['(\w+)' \| key_added", inspect.getdoc(function), flags=re.M))
    assert slots == set(_results.slots_of(name, _results.TABLE[name].default))
