"""The examples in docstrings and in the README run, offline, and print what they say."""

from __future__ import annotations

import ast
import doctest
import importlib
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import gfx

if TYPE_CHECKING:
    from collections.abc import Callable

    import anndata as ad

SOURCE = Path(gfx.__file__).parent
README = Path(__file__).parents[1] / "README.md"


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


#: Cells with their results, by the call that made these.
MADE: dict[tuple[object, ...], ad.AnnData] = {}


def once(tool: Callable) -> Callable:
    """Run a tool once for the same cells and arguments: an example that repeats a call copies its results."""

    @wraps(tool)
    def call(adata: ad.AnnData, *args: object, **kwargs: object) -> None:
        cells = adata.X.data.tobytes(), adata.obs.to_csv(), adata.var.to_csv(), repr(adata)
        made_from = tool.__name__, repr(args), repr(kwargs), *cells
        if made_from not in MADE:
            assert tool(adata, *args, **kwargs) is None
            MADE[made_from] = adata.copy()
        made = MADE[made_from].copy()
        for element in ("obs", "var", "obsm", "varm", "uns"):
            for name in getattr(made, element):
                getattr(adata, element)[name] = getattr(made, element)[name]

    return call


@pytest.fixture
def each_call_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("attention", "classify_cells", "classify_genes", "delete_genes", "screen_genes"):
        monkeypatch.setattr(gfx.tl, name, once(getattr(gfx.tl, name)))


@pytest.mark.usefixtures("each_call_once")
@pytest.mark.parametrize(("module", "name"), examples())
def test_docstring_example(module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("agg")
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
