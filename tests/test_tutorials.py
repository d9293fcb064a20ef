"""What every notebook of tutorials/ has, and what its stored outputs do not tell. `make tutorials` runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

TUTORIALS = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))

#: Letters of a line of code that the documentation shows without scrolling.
WIDTH = 88


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> dict:
    return json.loads(request.param.read_text())


def texts(notebook: dict, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


def test_it_opens_with_a_question_and_ends_with_what_one_may_conclude(notebook: dict) -> None:
    first, *_, last = texts(notebook, "markdown")
    assert re.match(r"# .+\n\n(.+\n)*?.*\?\n", first), "a title, then a question"
    assert last.startswith("## What one may conclude\n")


def test_its_model_is_named_once(notebook: dict) -> None:
    code = "\n".join(texts(notebook, "code"))
    assert code.count('"mini"') == 1
    assert re.search(r'^model = "mini"$', code, flags=re.M)


def test_its_outputs_are_stored_and_tell_nothing_of_where_and_when_it_ran(notebook: dict) -> None:
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    assert not [cell["metadata"] for cell in notebook["cells"] if "execution" in cell["metadata"]], "times"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert not [output for output in outputs if any("widget" in kind for kind in output.get("data", {}))]
    said = json.dumps([{k: v for k, v in output.get("data", output).items() if k != "image/png"} for output in outputs])
    assert not re.search(r"/(?:home|root|tmp|work|Users|var)/|[A-Z]:\\\\", said), "a path of one machine"
    assert not re.search(r"\d\d:\d\d, Epoch|Training Loss", said), "the table of a training, and how long it took"


def test_one_cell_draws_the_picture_of_its_card(notebook: dict) -> None:
    (cell,) = [cell for cell in notebook["cells"] if "thumbnail" in cell["metadata"].get("tags", [])]
    assert sum("image/png" in output.get("data", {}) for output in cell["outputs"]) == 1


def test_its_code_fits_the_page(notebook: dict) -> None:
    lines = [line for code in texts(notebook, "code") for line in code.splitlines()]
    assert not [line for line in lines if len(line) > WIDTH]


def test_what_a_cell_prints_is_stored_in_one_piece(notebook: dict) -> None:
    for cell in notebook["cells"]:
        streams = [output.get("name") for output in cell.get("outputs", [])]
        assert not [name for name, following in pairwise(streams) if name is not None and name == following]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small(path: Path) -> None:
    assert path.stat().st_size < 600_000


# --- how they are run and stored ------------------------------------------------------------------------------------


def how_notebooks_run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("how_notebooks_run", TUTORIALS / "conftest.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def output(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": text.splitlines(keepends=True)}


def shown(text: str) -> dict:
    return {"output_type": "display_data", "metadata": {}, "data": {"text/plain": [text] if text else []}}


def test_a_stored_notebook_is_tidied() -> None:
    """Nothing is kept of when it ran, of the pieces in which its output came, or of a progress bar that has ended."""
    outputs = [
        output("a\nb"),
        shown(""),
        output("c\n"),
        output("d\n", "stderr"),
        output("e\n"),
        shown("f"),
        output("g\n"),
    ]
    cell = {"cell_type": "code", "metadata": {"execution": {"iopub.status.busy": "now"}, "tags": ["x"]}}
    text = {"cell_type": "markdown", "metadata": {}}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {
        "cells": [text, cell | {"outputs": outputs}],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python", "version": "3.11.4"}},
    }
    how_notebooks_run().tidy(notebook)
    joined = [output("a\nbc\n"), output("d\n", "stderr"), output("e\n"), shown("f"), output("g\n")]
    assert notebook == {
        "cells": [text, {"cell_type": "code", "metadata": {"tags": ["x"]}, "outputs": joined}],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
    }


#: Another item and its process stand for the notebook and its kernel; the notebook itself takes nbmake.
ITEMS = {
    "test_it.py": "import subprocess, sys\n\ndef test_it():\n    subprocess.run([sys.executable, '-c', {code!r}])\n",
    "it.ipynb": json.dumps(
        {
            "cells": [
                {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": "{code}"}
            ],
            "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
            "nbformat": 4,
            "nbformat_minor": 4,
        }
    ),
}


@pytest.mark.parametrize("longest", [None, 0.01])
@pytest.mark.parametrize("item", ITEMS)
def test_a_notebook_that_takes_too_long_fails(tmp_path: Path, item: str, longest: float | None) -> None:
    assert how_notebooks_run().LONGEST == 120
    (tmp_path / item).write_text(ITEMS[item].replace("{code!r}", repr(CODE)).replace("{code}", CODE))
    run = run_in(tmp_path, longest)
    assert run.returncode == (longest is not None), run.stdout
    assert ("s; a notebook may take 0.01 s: take fewer" in run.stdout) == (longest is not None)


def test_a_notebook_whose_time_is_not_seen_fails(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it():\n    pass\n")
    run = run_in(tmp_path)
    assert run.returncode == 1
    assert "test_it took 0 s: its kernel" in run.stdout


CODE = "sum(range(9_000_000))"


def run_in(folder: Path, longest: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run what is in a folder by the rules of tutorials/conftest.py, with another limit if one is given."""
    changed = "" if longest is None else f"\nLONGEST = {longest}\n"
    (folder / "conftest.py").write_text((TUTORIALS / "conftest.py").read_text() + changed)
    options = ["-p", "no:cacheprovider", "--rootdir", ".", "."]
    if any(folder.glob("*.ipynb")):
        pytest.importorskip("nbmake", reason="notebooks are run by nbmake, which is not installed")
        options += ["-p", "nbmake.pytest_plugin", "--nbmake"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


# --- another model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_unchanged_with_another_model(path: Path, like_published: Path, tmp_path: Path) -> None:
    """Genes, special tokens, layers, heads and width are others; only the line that names the model is exchanged."""
    for name in ("accelerate", "distributed", "muon"):
        pytest.importorskip(name, reason=f"notebooks need {name}, which is not installed")
    code = "\n\n".join(texts(json.loads(path.read_text()), "code"))
    script = tmp_path / "notebook.py"
    script.write_text(code.replace('model = "mini"', f"model = {str(like_published)!r}"))
    environment = os.environ | {"MPLBACKEND": "agg"}
    command = [sys.executable, "-W", "ignore", script.name]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
    assert "'mini'" not in run.stdout
