"""The examples in docstrings and in the README run, offline, and print what they say."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import gfx

SOURCE = Path(gfx.__file__).parent
README = Path(__file__).parents[1] / "README.md"
DOCS = Path(__file__).parents[1] / "docs"


def examples() -> list[tuple[str, str]]:
    """Find module and name of every docstring with an example, without importing anything."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        module = ".".join(["gfx", *file.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if documented and ">>>" in (ast.get_docstring(node) or ""):
                found.append((module, getattr(node, "name", "")))
    return found


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_examples_fit_in_the_documentation(file: Path) -> None:
    """The page of a function shows 86 letters of a line, with its prompt, on a screen of 1,440 pixels."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    assert not [line for line in lines if line.startswith((">>> ", "... ")) and len(line) > 86]


@pytest.fixture
def each_call_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    for name, tool in importlib.import_module("each_call_once").TOOLS.items():
        monkeypatch.setattr(gfx.tl, name, tool)


@pytest.mark.usefixtures("each_call_once")
@pytest.mark.parametrize(("module", "name"), examples())
def test_docstring_example(module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("agg")
    monkeypatch.setattr(plt, "show", lambda: None)  # where there is a screen, it warns that agg shows nothing
    monkeypatch.chdir(tmp_path)
    place = importlib.import_module(module)
    tests = [
        test
        for test in doctest.DocTestFinder(recurse=True).find(place, module)
        if test.examples and test.name == f"{module}.{name}".removesuffix(".")
    ]
    assert len(tests) == 1
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    with gfx.settings.override(verbosity=0):
        runner.run(tests[0], out=report.append)
    plt.close("all")
    assert not runner.failures, "".join(report)


def test_readme_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = README.read_text().partition("<!-- example -->\n```python\n")[2].partition("```")[0]
    gfx.datasets.toy(n_cells=20).write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with gfx.settings.override(verbosity=0):
        exec(compile(block, "README.md", "exec"), names)
    assert names["adata"].obsm["X_gfx"].shape[0] == 20
