"""What the README and the documentation say of the package is so."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gfx
from gfx import _results

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODULES = ("pp", "tl", "get", "pl", "models", "datasets")
PUBLIC = [
    (f"gfx.{module}.{name}", getattr(found, name))
    for module in MODULES
    for found in [importlib.import_module(f"gfx.{module}")]
    for name in found.__all__
]
FUNCTIONS = [(name, thing) for name, thing in PUBLIC if inspect.isfunction(thing)]


def sections(docstring: str) -> dict[str, str]:
    """Split a numpy docstring into its sections."""
    parts = re.split(r"^(\w[\w ]*)\n-+\n", inspect.cleandoc(docstring), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# --- API pages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_on_its_page(module: str) -> None:
    page = (DOCS / "api" / f"{module}.md").read_text()
    assert f".. currentmodule:: gfx.{module}\n" in page
    listed = re.findall(r"\.\. autosummary::\n(?:   :.*\n)+\n((?:   \w+\n)+)", page)
    assert sorted(" ".join(listed).split()) == sorted(importlib.import_module(f"gfx.{module}").__all__)


def test_every_part_of_the_package_has_a_page() -> None:
    pages = {page.stem for page in (DOCS / "api").glob("*.md")} - {"index"}
    assert pages == set(gfx.__all__) - {"__version__"}
    toctree = re.search(r"```\{toctree\}\n:maxdepth: 1\n\n(.*?)\n```", (DOCS / "api" / "index.md").read_text(), re.S)
    assert set(toctree.group(1).split()) == pages


def test_table_of_inputs_is_that_of_the_signatures() -> None:
    """That every tool reads every kind of matrix is tested in `tl/test_contracts.py`."""
    rows = re.findall(r"^\| \{func\}`([\w.]+)` \|(.+)\|$", (DOCS / "api" / "index.md").read_text(), flags=re.M)
    reading = {}
    for name, function in FUNCTIONS:
        has = set(inspect.signature(function).parameters)
        if "adata" in has and name.split(".")[1] in {"pp", "tl", "models"}:
            also = ("mod" in has, not name.startswith("gfx.pp"), not has.isdisjoint({"store", "folder"}))
            reading[name] = ["✓"] * 4 + ["✓" if is_so else "–" for is_so in also]
    assert {name: cells.replace(" ", "").split("|") for name, cells in rows} == reading


# --- docstrings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "function"), FUNCTIONS)
def test_docstring_says_what_goes_in_what_comes_out_and_how(name: str, function: object) -> None:
    parts = sections(function.__doc__)
    signature = inspect.signature(function)
    described = re.findall(r"^(\w[\w, ]*)$", parts.get("Parameters", ""), flags=re.M)
    assert [one for line in described for one in line.split(", ")] == list(signature.parameters)
    assert signature.return_annotation is not signature.empty
    assert "Returns" in parts
    assert ">>> import gfx" in parts["Examples"]
    assert f"{name}(" in parts["Examples"]


@pytest.mark.parametrize(("name", "thing"), PUBLIC)
def test_docstring_begins_with_one_sentence_and_is_filled_in(name: str, thing: object) -> None:
    docstring = inspect.cleandoc(thing.__doc__)
    first, _, _ = docstring.partition("\n\n")
    assert "\n" not in first or first.endswith("."), "one line, or one sentence"
    assert first.rstrip().endswith(".")
    assert not re.search(r"%\(\w+\)s|(?<![f`'\"{])\{\w+\}", docstring), "a placeholder was left"


def test_everything_cited_is_in_the_references() -> None:
    keys = set(re.findall(r"^@\w+\{(\w+),", (DOCS / "references.bib").read_text(), flags=re.M))
    cited = set()
    for file in [*(ROOT / "src").rglob("*.py"), *DOCS.rglob("*.md")]:
        text = file.read_text()
        for group in re.findall(r":cite:\w+:`([^`]+)`|\{cite:\w+\}`([^`]+)`", text):
            cited |= {key.strip() for key in "".join(group).split(",")}
    assert cited <= keys
    assert "Theodoris2023" in cited


# --- slots ----------------------------------------------------------------------------------------------------------


def test_table_of_slots_is_complete() -> None:
    table = (DOCS / "slots.md").read_text()
    told: dict[str, set[tuple[str, str]]] = {}
    call = ""
    for first, slots in re.findall(r"^\| *(`[\w.]+`|) *\| (`[^|]+`) \|", table, flags=re.M):
        call = first.strip("`") or call
        told.setdefault(call, set()).update(re.findall(r'(\w+)\["([\w{}]+)"\]', slots))
    expected = {
        f"gfx.{function}": set(_results.slots_of(function, row.default, [_results.TASK]))
        for function, row in _results.TABLE.items()
    }
    assert told == expected
    assert set(told) == {name for name, function in FUNCTIONS if "copy" in inspect.signature(function).parameters}


# --- README ---------------------------------------------------------------------------------------------------------


def test_readme_names_the_distribution_and_the_import_first() -> None:
    first = (ROOT / "README.md").read_text().split("\n\n")[1]
    assert "published as `scgfx`" in first
    assert "`import gfx`" in first


def test_readme_is_short_and_its_links_work_wherever_it_is_shown() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert not [link for link in links if not link.startswith("https://")]
    files = re.findall(r"https://(?:raw\.githubusercontent|github)\.com/OWNER/gfx/(?:blob/)?main/([^)]+)", text)
    assert {"LICENSE", "CITATION.cff"} <= set(files)
    assert not [file for file in files if not (ROOT / file).is_file()]
    pages = re.findall(r"https://scgfx\.readthedocs\.io/page/([\w/]+)\.html", text)
    assert pages
    assert not [page for page in pages if not (DOCS / f"{page}.md").is_file()]


def test_readme_tells_the_size_of_torch_before_the_first_line_that_installs() -> None:
    before, _, after = (ROOT / "README.md").read_text().partition("## Install")[2].partition("pip install")
    assert "https://download.pytorch.org/whl/cpu" in after.partition("pip install")[0]
    assert "several gigabytes" in " ".join(before.split())


def test_readme_tells_the_time_of_every_target() -> None:
    text = (ROOT / "README.md").read_text()
    told = set(re.findall(r"^\| `make ([\w-]+)` \| [^|]*(?:minutes?|seconds) \|", text, flags=re.M))
    assert {"demo", "tutorials", "test", "docs", "lint"} <= told


@pytest.mark.parametrize("page", ["README.md", "docs/installation.md", "docs/tutorials/index.md"])
def test_make_targets_that_pages_name_exist(page: str) -> None:
    targets = set(re.search(r"^\.PHONY: (.+)", (ROOT / "Makefile").read_text(), flags=re.M).group(1).split())
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", (ROOT / page).read_text(), flags=re.M))
    assert named
    assert named <= targets


def test_installation_lists_every_make_target() -> None:
    targets = set(re.search(r"^\.PHONY: (.+)", (ROOT / "Makefile").read_text(), flags=re.M).group(1).split())
    listed = set(re.findall(r"^\| `make ([\w-]+)`", (DOCS / "installation.md").read_text(), flags=re.M))
    assert listed == targets


def test_places_that_an_owner_replaces_are_called_owner() -> None:
    for page in {ROOT / "README.md", *DOCS.rglob("*.md")} - {*(DOCS / "_build").rglob("*.md")}:
        assert not re.search(r"<(?:this|your) [a-z]+>", page.read_text()), page.name


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))], ids=lambda page: page.name
)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    if "generated" in page.parts or "_build" in page.parts:
        return
    targets = re.findall(r"\]\(([^)#:\s]+\.\w+|[A-Z]+)\)", page.read_text())
    targets += re.findall(r"```\{(?:include|literalinclude)\} (\S+)", page.read_text())
    made = [target for target in targets if "generated" in Path(target).parts]  # by `make docs`
    assert not [target for target in targets if target not in made and not (page.parent / target).exists()]


def test_environment_variables_that_pages_name_exist() -> None:
    known = {f"GFX_{field.name.upper()}" for field in dataclasses.fields(gfx.settings)} | {"GFX_DOCS_LINKS"}
    for page in [ROOT / "README.md", *DOCS.glob("*.md")]:
        assert set(re.findall(r"GFX_[A-Z_]+[A-Z]", page.read_text())) <= known, page.name


def test_changelog_names_every_public_function() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    named = set(re.findall(r"`((?:pp|tl|get|pl|models|datasets)\.\w+)`", text))
    assert {name.removeprefix("gfx.") for name, _ in FUNCTIONS} <= named


def test_python_blocks_of_the_pages_are_python() -> None:
    for page in [ROOT / "README.md", *DOCS.glob("*.md"), *(DOCS / "api").glob("*.md")]:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S):
            ast.parse(block)


def test_every_benchmark_is_told_of() -> None:
    scripts = {script.name for script in (ROOT / "benchmarks").glob("*.py")}
    assert set(re.findall(r"`(\w+\.py)`", (ROOT / "benchmarks" / "README.md").read_text())) == scripts


# --- cards of notebooks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_panels", "size"), [(1, (400, 300)), (2, (266, 200))])
def test_cards_show_one_panel_whole_in_one_form(n_panels: int, size: tuple[int, int]) -> None:
    """The function alone, since the settings of the documentation write pages wherever they are loaded."""
    (fit,) = [
        ast.unparse(node)
        for node in ast.parse((DOCS / "conf.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "_fit"
    ]
    exec("from __future__ import annotations\n" + fit, known := {"np": np, "Image": Image, "BytesIO": BytesIO})
    picture = Image.new("RGB", (400, 200), "white")
    width = 360 // n_panels - 20
    for number, colour in enumerate(("red", "blue")[:n_panels]):
        picture.paste(colour, (20 + number * 180, 20, 20 + number * 180 + width, 180))
    picture.save(file := BytesIO(), format="png")
    card = known["_fit"](file.getvalue())
    assert card.size == size
    colours = {colour: n for n, colour in card.getcolors()}
    assert colours == {(255, 0, 0): width * 160, (255, 255, 255): size[0] * size[1] - width * 160}
