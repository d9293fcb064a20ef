"""What is imported, declared, pinned and packaged is the same."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from safetensors.numpy import load_file

import gfx

if TYPE_CHECKING:
    from hatchling.builders.plugin.interface import BuilderInterface

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
DECLARED = {requirement.name: requirement for requirement in map(Requirement, PROJECT["dependencies"])}

#: What is loaded where it is asked for, and not installed otherwise.
EXTRAS = ("train", "lora", "search")

DISTRIBUTION = {"sklearn": "scikit-learn"}
CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base", "adjustText": "adjusttext"}
#: A version of each package that conda-forge has, by its pages and recipes in 2026; not always the newest.
ON_CONDA_FORGE = {
    "adjusttext": "1.3.0",
    "anndata": "0.12.16",
    "h5py": "3.11.0",
    "hatchling": "1.27.0",
    "jinja2": "3.1.6",
    "matplotlib-base": "3.10.0",
    "mudata": "0.3.8",
    "networkx": "3.3",
    "numba": "0.60.0",
    "numpy": "2.0.0",
    "pandas": "2.3.0",
    "pip": "25.1",
    "pooch": "1.9.0",
    "python": "3.13.0",
    "pytorch": "2.12.0",
    "requests": "2.32.3",
    "safetensors": "0.8.0",
    "scanpy": "1.12.4",
    "scikit-learn": "1.6.0",
    "scipy": "1.13.0",
    "tqdm": "4.66.5",
    "transformers": "5.13.0",
    "zarr": "3.2.1",
}
# Declared, though gfx does not import it itself.
NEEDED_BY_OTHERS = {
    "mudata": "MuData is taken wherever AnnData is, and recognised without loading it",
    "scanpy": "neighbours, UMAP and plots after gfx",
}


def imported_libraries() -> set[str]:
    """Collect the top-level names that the source imports, for type checkers included."""
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"gfx"}


def recipe_list(section: str) -> dict[str, str]:
    """Read a list of `recipe/meta.yaml` under `requirements`: name and bound, in order."""
    text = (ROOT / "recipe" / "meta.yaml").read_text()
    block = re.search(rf"^  {section}:\n((?:    - .*\n)+)", text, flags=re.M).group(1)
    return dict(re.fullmatch(r"    - (\S+)(?: (\S+))?", line).groups("") for line in block.splitlines())


def pins(file: str = "constraints.txt") -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return dict(re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines)


def test_imported_libraries_are_declared_and_the_others_have_a_reason() -> None:
    imported = {DISTRIBUTION.get(name, name) for name in imported_libraries()}
    extras = {Requirement(entry).name for extra in EXTRAS for entry in PROJECT["optional-dependencies"][extra]}
    assert extras & imported == {"accelerate", "optuna", "peft"}
    assert imported <= set(DECLARED) | extras
    assert set(DECLARED) - imported <= set(NEEDED_BY_OTHERS)


def test_recipe_asks_for_what_the_project_asks_for() -> None:
    expected = {CONDA.get(name, name): str(requirement.specifier) for name, requirement in DECLARED.items()}
    assert recipe_list("run") == {"python": PROJECT["requires-python"]} | expected


def test_recipe_leads_to_the_project_s_pages() -> None:
    text = (ROOT / "recipe" / "meta.yaml").read_text()
    assert f"  doc_url: {PROJECT['urls']['Documentation']}\n  dev_url: {PROJECT['urls']['Source']}\n" in text
    assert re.search(r"^  identifiers:\n    - doi:10\.", text, flags=re.M)


@pytest.mark.parametrize("section", ["host", "run"])
def test_recipe_can_be_solved_on_conda_forge(section: str) -> None:
    """Each package is there under this name, in a version within the bound."""
    for name, bound in recipe_list(section).items():
        assert SpecifierSet(bound or "").contains(ON_CONDA_FORGE[name]), f"{name} {bound}"


def test_recipe_lists_are_sorted_and_its_build_tool_is_the_project_s() -> None:
    run = list(recipe_list("run"))
    assert run[0] == "python"
    assert run[1:] == sorted(run[1:])
    build = Requirement(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"][0])
    assert recipe_list("host")[build.name] == str(build.specifier)


def test_version_is_the_same_everywhere() -> None:
    version = PROJECT["version"]
    assert f'{{% set version = "{version}" %}}' in (ROOT / "recipe" / "meta.yaml").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_recipe_summary_is_the_project_s_and_short_enough() -> None:
    assert f'summary: "{PROJECT["description"]}"' in (ROOT / "recipe" / "meta.yaml").read_text()
    assert len(PROJECT["description"]) <= 120


GROUPS = PYPROJECT["dependency-groups"]
REQUIREMENTS = {"dependencies": PROJECT["dependencies"]} | PROJECT["optional-dependencies"] | GROUPS
#: Lists of which the lowest versions are not tested.
NEWEST_ONLY = ("notebook", "tutorials", "doc", "dev", "dist")


def required(*left_out: str) -> list[str]:
    """List every requirement once, but for those of some lists and of `all`, which names other lists."""
    lists = [entries for name, entries in REQUIREMENTS.items() if name not in ("all", *left_out)]
    return sorted({entry for entries in lists for entry in entries})


@pytest.mark.parametrize("requirement", required())
def test_pins_satisfy_the_bounds(requirement: str) -> None:
    asked = Requirement(requirement)
    assert asked.specifier.contains(pins()[canonicalize_name(asked.name)])


@pytest.mark.parametrize("requirement", required(*NEWEST_ONLY))
def test_lowest_pins_are_the_bounds(requirement: str) -> None:
    asked = Requirement(requirement)
    (bound,) = asked.specifier
    assert bound.operator == ">="
    assert Version(bound.version) == Version(pins("constraints-lowest.txt")[canonicalize_name(asked.name)])


def test_all_is_every_other_extra() -> None:
    everything = Requirement(*PROJECT["optional-dependencies"]["all"])
    assert everything.name == PROJECT["name"]
    assert everything.extras == set(PROJECT["optional-dependencies"]) - {"all"}


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    extras = pytest.importorskip("gfx._engine.extras")
    for package, extra in extras.EXTRA_WITH.items():
        assert package in {Requirement(entry).name for entry in PROJECT["optional-dependencies"][extra]}


@pytest.mark.parametrize(("file", "torch"), [("constraints.txt", "2.13.0"), ("constraints-lowest.txt", "2.6.0")])
def test_pins_name_no_place_and_no_cuda(file: str, torch: str) -> None:
    names = pins(file)  # reading fails on anything but name==version
    assert names["torch"] == torch
    assert not [name for name in names if name.startswith(("nvidia", "cuda", "triton"))]


# --- the model inside the package -----------------------------------------------------------------------------------

MINI = "gfx/models/mini"
#: Files in the package that were made from data of others.
DATA = {f"{MINI}/{name}" for name in ("config.json", "model.safetensors", "vocabulary.tsv.gz")}
DATA |= {"gfx/datasets/kang2018_ifnb.h5ad", "gfx/_core/gene_names.tsv.gz"}
#: Folders that tests read.
READ = {"benchmarks", "src", "tests", "tutorials"}


def builder_of(kind: str) -> BuilderInterface:
    """Make what lists the files of a wheel or a source archive, without building it."""
    builders = pytest.importorskip(f"hatchling.builders.{kind}", reason="`pip install hatchling`")
    return getattr(builders, f"{kind.capitalize()}Builder")(str(ROOT))


def packaged_by(builder: BuilderInterface) -> set[str]:
    return {Path(file.distribution_path).as_posix() for file in builder.recurse_included_files()}


def test_mini_is_small_and_reads_long_cells() -> None:
    folder = ROOT / "src" / MINI
    weights, vocabulary = folder / "model.safetensors", folder / "vocabulary.tsv.gz"
    assert {tensor.dtype for tensor in load_file(weights).values()} == {np.dtype(np.float16)}
    assert weights.stat().st_size + vocabulary.stat().st_size <= 8_000_000
    model = gfx.models.load("mini")
    assert model.weights.resolve() == weights.resolve()
    assert model.max_length >= 1024
    assert model.vocabulary.ids[:4].tolist() == ["<pad>", "<mask>", "<cls>", "<eos>"]
    assert model.vocabulary.is_special.sum() == 4


@pytest.mark.parametrize(("kind", "prefix"), [("wheel", ""), ("sdist", "src/")])
def test_data_are_packaged_with_what_is_owed_to_their_sources(kind: str, prefix: str) -> None:
    """What is built leaves out what version control ignores."""
    builder = builder_of(kind)
    assert {prefix + name for name in DATA | {"gfx/_report/page.html"}} <= packaged_by(builder)
    licences = {Path(file).as_posix() for file in builder.metadata.core.license_files}
    assert licences == {"LICENSE", "NOTICE", "docs/models/mini.md"}
    notice = (ROOT / "NOTICE").read_text()
    for name in sorted(DATA):
        assert name in notice or name.rpartition("/")[0] in notice


def test_source_archive_holds_all_that_its_tests_read() -> None:
    packaged = packaged_by(builder_of("sdist"))
    tracked = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if path.parts[len(ROOT.parts)] in READ}
    assert tracked <= packaged
    assert {"Makefile", "CHANGELOG.md", "constraints.txt", "recipe/meta.yaml", ".ci/run"} <= packaged


# --- what runs where changes are proposed -----------------------------------------------------------------------------

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_workflows_run_targets_of_the_makefile_and_all_that_a_change_must_pass() -> None:
    (matrix,) = [job["strategy"]["matrix"] for job in read_jobs("ci.yml") if "strategy" in job]
    targets = [*matrix["target"], *(job["target"] for job in matrix["include"])]
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.M)[1].split()
    assert set(targets) <= set(phony)
    must_pass = re.search(r"^make --keep-going (.*)$", (ROOT / ".ci" / "run").read_text(), flags=re.M)[1].split()
    assert set(must_pass) == {"lint", "docs", "tutorials", "test"} <= set(targets)


def test_slow_tests_run_once_a_week_and_before_a_release() -> None:
    (job,) = [job for job in read_jobs("ci.yml") if job.get("if") == "github.event_name == 'schedule'"]
    assert "make test-slow" in [step.get("run") for step in job["steps"]]
    assert yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())[True]["schedule"]  # `on` is yes
    assert re.search(r"^1\. `make [\w -]*\btest-slow\b", (ROOT / "RELEASING.md").read_text(), flags=re.M)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_actions_are_taken_by_major_version_and_may_read_only(file: Path) -> None:
    assert yaml.safe_load(file.read_text())["permissions"] == {"contents": "read"}
    for job in read_jobs(file.name):
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step.get("uses", "actions/none@v1"))


def read_jobs(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load((ROOT / ".github" / "workflows" / file).read_text())["jobs"].values())
