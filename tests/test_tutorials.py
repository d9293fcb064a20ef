"""What every notebook of tutorials/ has, and what its stored outputs do not tell. `make tutorials` runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))


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


def test_one_cell_draws_the_picture_of_its_card(notebook: dict) -> None:
    (cell,) = [cell for cell in notebook["cells"] if "thumbnail" in cell["metadata"].get("tags", [])]
    (picture,) = [output["data"] for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert picture


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small(path: Path) -> None:
    assert path.stat().st_size < 600_000
