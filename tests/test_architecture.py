"""The shape of the source: who imports whom, what loads when, how public functions look, where slots are named."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pytest

import gfx

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import ToyCells

SOURCE = Path(gfx.__file__).parent
DOCS = Path(__file__).parents[1] / "docs"
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = ("pp", "tl", "get", "pl", "models", "datasets")

# Texts of docstrings and types of signatures: every floor may import these.
SHARED = {"_docs", "_types"}

# Who may import whom when the code runs, from bottom to top.
IMPORTS: dict[str, set[str]] = {
    "_docs": set(),
    "_types": set(),
    "_log": set(),
    "_locks": set(),
    "_settings": {"_log"},
    "_core": set(),
    "_downloads": {"_core", "_locks", "_log", "_settings"},
    "_adata": {"_core"},
    "_results": {"_adata", "_log"},
    "_tokens": {"_adata", "_core", "_log", "_results"},
    "_run_store": {"_core", "_locks", "_log"},
    "_engine": {"_core", "_log", "_settings"},
    "models": {"_adata", "_core", "_downloads", "_engine", "_log", "_settings"},
    "pp": {"_adata", "_core", "_log", "_results", "_tokens", "models"},
    "tl": {
        "_adata",
        "_core",
        "_engine",
        "_log",
        "_results",
        "_run_store",
        "_settings",
        "_tokens",
        "models",
    },
    "get": {"_adata", "_core", "_results", "_run_store"},
    "pl": {"_results", "get"},
    "_report": {"_adata", "_core", "_results", "get", "pl"},
    "datasets": {"_downloads", "_settings", "models"},
}

# Which libraries a floor may load. torch and transformers have one home, matplotlib another.
LOADS: dict[str, set[str]] = {
    "_docs": set(),
    "_types": set(),
    "_log": {"tqdm"},
    "_locks": set(),
    "_settings": set(),
    "_core": {"numba", "numpy", "pandas", "scipy", "sklearn"},
    "_downloads": {"pooch", "requests"},
    "_adata": {"numpy", "pandas", "scipy"},
    "_results": {"numpy"},
    "_tokens": {"numpy", "pandas", "scipy"},
    "_run_store": {"numpy", "zarr"},
    "_engine": {"numpy", "optuna", "peft", "safetensors", "torch", "transformers"},
    "models": {
        "anndata",
        "h5py",
        "numpy",
        "pandas",
        "safetensors",
        "scipy",
        "sklearn",
        "zarr",
    },
    "pp": {"numpy", "pandas"},
    "tl": {"anndata", "numpy", "pandas", "scanpy", "scipy"},
    "get": {"numpy", "pandas", "scipy", "sklearn"},
    "pl": {"adjustText", "matplotlib", "networkx", "numpy"},
    "_report": {"jinja2", "numpy", "pandas"},
    "datasets": {"anndata", "h5py", "numpy", "pandas", "scipy"},
}

HEAVY = ("torch", "transformers", "scanpy", "muon", "matplotlib", "dask", "numba", "anndata")


# --- reading the source ---------------------------------------------------------------------------------------------


def floor_of(file: Path) -> str:
    """Top-level module or package that a file belongs to; "gfx" for the package's own `__init__`."""
    first = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "gfx" if first == "__init__" else first


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def walk_running(node: ast.AST) -> Iterator[ast.AST]:
    """Walk over all code that runs, functions included; not over imports for type checkers."""
    yield node
    children = node.orelse if is_for_type_checkers(node) else ast.iter_child_nodes(node)
    for child in children:
        yield from walk_running(child)


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and dotted name of everything that a file imports when it runs."""
    for node in walk_running(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def violations(file: Path) -> list[str]:
    """List the imports of a file that the tables do not allow."""
    floor = floor_of(file)
    found = []
    for line, name in imported(file):
        library, _, rest = name.partition(".")
        if library == "gfx":
            other = rest.partition(".")[0]
            allowed = other == floor or other in IMPORTS[floor] | SHARED
        else:
            allowed = library in sys.stdlib_module_names or library in LOADS[floor]
        if not allowed:
            found.append(f"{file.relative_to(SOURCE)}:{line} imports {name}")
    return found


def strings_that_run(file: Path) -> Iterator[tuple[int, str]]:
    """Yield every string literal but docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


# --- imports --------------------------------------------------------------------------------------------------------


def test_tables_cover_every_floor() -> None:
    floors = {floor_of(file) for file in FILES} - {"gfx"}
    assert floors == set(IMPORTS) == set(LOADS)


def test_ladder_never_points_up() -> None:
    order = list(IMPORTS)
    for floor, below in IMPORTS.items():
        assert all(order.index(other) < order.index(floor) for other in below), floor


@pytest.mark.parametrize("floor", IMPORTS)
def test_floor_imports_what_it_may(floor: str) -> None:
    found = [problem for file in FILES if floor_of(file) == floor for problem in violations(file)]
    assert not found


def test_torch_transformers_and_matplotlib_have_one_home() -> None:
    homes = {library: {f for f, loads in LOADS.items() if library in loads} for library in HEAVY}
    assert homes["torch"] == homes["transformers"] == {"_engine"}
    assert homes["matplotlib"] == {"pl"}
    assert homes["scanpy"] == {"tl"}
    assert not homes["muon"] | homes["dask"]


def test_functions_are_compiled_where_there_is_a_folder_for_them() -> None:
    """numba by itself cannot be told to keep what it compiles where the user has no folder to write to."""
    assert [file.name for file in FILES if "njit" in file.read_text(encoding="utf-8")] == ["scratch.py"]


def test_package_itself_imports_settings_only() -> None:
    own = {
        name for _, name in imported(SOURCE / "__init__.py") if name.partition(".")[0] not in sys.stdlib_module_names
    }
    assert own == {"gfx._settings.settings"}


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def f():\n    import torch", "imports torch"),
        ("from gfx.pl import deletion", "imports gfx.pl.deletion"),
        ("from gfx import tl", "imports gfx.tl"),
        ("import scanpy.pp as pp", "imports scanpy.pp"),
    ],
)
def test_violations_are_seen(source: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    file = tmp_path / "pp" / "_new.py"
    file.parent.mkdir()
    file.write_text(source)
    assert [found.partition(" ")[2] for found in violations(file)] == [problem]
    file.write_text(f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {source.splitlines()[-1].strip()}")
    assert not violations(file)


def test_architecture_page_tells_the_same() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|([^|]*)\|$", (DOCS / "architecture.md").read_text(), flags=re.M)
    assert [row[0] for row in rows] == list(IMPORTS)
    assert {floor: set(re.findall(r"`(\w+)`", below)) for floor, below, _ in rows} == IMPORTS
    assert {floor: set(loads.split()) for floor, _, loads in rows} == LOADS


# --- what loads when ------------------------------------------------------------------------------------------------


def loaded_after(code: str) -> set[str]:
    report = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_import_loads_nothing_heavy() -> None:
    assert not loaded_after("import gfx") & set(HEAVY)


def test_the_drawn_tree_is_the_source() -> None:
    """Every folder is a line, every file a word of its folder's lines, and nothing is drawn that is not there."""
    drawn = re.search(r"```\nsrc/gfx/\n(.*?)```", (DOCS / "architecture.md").read_text(), flags=re.DOTALL)[1]
    folders = re.findall(r"(?<![\w/])(\w+)/", drawn)
    assert sorted(folders) == sorted({file.parent.name for file in SOURCE.rglob("*.py") if file.parent != SOURCE})
    words = set(re.findall(r"\w+", drawn))
    for file in SOURCE.rglob("*.py"):
        if file.name != "__init__.py":
            assert {file.stem, file.stem.removeprefix("_")} & words, file.relative_to(SOURCE)


def test_parts_that_run_no_model_load_no_torch() -> None:
    loaded = loaded_after("import gfx\ngfx.pp, gfx.get, gfx.pl, gfx.models")
    assert not loaded & {"torch", "transformers", "scanpy", "muon", "matplotlib", "dask"}


def test_preprocessing_tables_and_plots_work_where_torch_is_missing_and_on_any_number_of_threads(
    toy_folder: Path, toy_cells: ToyCells, tmp_path: Path
) -> None:
    adata = toy_cells(100)  # several parts of `_encode`
    with gfx.settings.override(verbosity=0):
        gfx.tl.delete_genes(adata, "TOY90", model=toy_folder, n_random=3)
        tokenized = gfx.pp.tokenize(adata, model=toy_folder, copy=True)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    code = f"""
import sys
class Missing:
    def find_spec(self, name, *others):
        if name in ("torch", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import anndata, matplotlib
matplotlib.use("agg")
import gfx
adata = anndata.read_h5ad({str(tmp_path / "cells.h5ad")!r})
gfx.pp.check(adata, model={str(toy_folder)!r})
gfx.pp.tokenize(adata, model={str(toy_folder)!r})
gfx.get.deletion_df(adata)
gfx.pl.deletion(adata, min_cells=1, show=False)
gfx.get.report(adata, {str(tmp_path / "report.html")!r})
adata.write_h5ad({str(tmp_path / "out.h5ad")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"NUMBA_NUM_THREADS": "4"})
    key = gfx._results.key_of("pp.tokenize", None)
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "out.h5ad").obsm[key], tokenized.obsm[key])


# --- public functions -----------------------------------------------------------------------------------------------

MOST_PARAMETERS = 18
#: What the settings say, in no signature.
SETTINGS = {"device", "dtype", "batch_size", "client"}


def public(*modules: str) -> list[tuple[str, object]]:
    """Return name and object of everything public in these modules."""
    return [
        (f"{module}.{name}", getattr(found, name))
        for module in modules
        for found in [importlib.import_module(f"gfx.{module}")]
        for name in found.__all__
    ]


@pytest.mark.parametrize(("name", "function"), [pair for pair in public("pp", "tl") if inspect.isfunction(pair[1])])
def test_signature(name: str, function: object) -> None:
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional[0] == "adata"
    assert len(positional) <= 3
    assert {p.kind for p in parameters[len(positional) :]} <= {inspect.Parameter.KEYWORD_ONLY}, "no *args, no **kwargs"
    last = [p.name for p in parameters[-2:]]
    if re.search(r"\b(AnnData|Data)\b", str(signature.return_annotation)):  # it writes
        assert last == ["mod", "copy"]
        assert signature.parameters["copy"].default is False
    else:
        assert signature.return_annotation is not signature.empty
        assert last[-1] == "mod"
        assert "copy" not in signature.parameters
    assert signature.parameters["mod"].default is None


@pytest.mark.parametrize(("name", "function"), public("get", "pl"))
def test_readers_take_the_data_first_and_keep_their_options_named(name: str, function: object) -> None:
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional[0] == "adata"
    assert len(positional) <= 3
    assert len(parameters) <= 12
    assert {"key", "mod"} <= set(signature.parameters)
    assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize(("name", "function"), public(*MODULES))
def test_no_function_has_more_than_eighteen_parameters(name: str, function: object) -> None:
    if inspect.isfunction(function):
        parameters = inspect.signature(function).parameters
        assert len(parameters) <= MOST_PARAMETERS
        assert not SETTINGS & set(parameters)


@pytest.mark.parametrize(("name", "function"), public(*MODULES))
def test_defaults_cannot_be_changed_by_a_call(name: str, function: object) -> None:
    parameters = inspect.signature(function).parameters.values()
    assert not [p.name for p in parameters if isinstance(p.default, list | dict | set)]


# --- slots ----------------------------------------------------------------------------------------------------------

# A field of `uns[...]["params"]`, not a slot.
NO_SLOTS = {"gfx_version"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_slots_are_named_in_one_file(file: Path) -> None:
    spelled = [
        f"{file.relative_to(SOURCE)}:{line} {text!r}"
        for line, text in strings_that_run(file)
        if text.startswith(("gfx_", "X_gfx")) and text not in NO_SLOTS
    ]
    assert bool(spelled) == (file.name == "_results.py"), spelled
