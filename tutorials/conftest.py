"""How `make tutorials` runs the notebooks: each within two minutes, and stored without what differs from run to run."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Seconds of processors' time that a notebook may take as a whole: with a core of its own, seconds of a clock.
LONGEST = 120


_before = pytest.StashKey[float]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Read the clock; nbmake limits the time of each cell alone."""
    item.stash[_before] = seconds_of_kernels()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    """Fail a notebook that took too long, whatever else the computer does."""
    report = yield
    took = seconds_of_kernels() - item.stash[_before]
    if call.when == "call" and report.passed and not 0 < took <= LONGEST:
        report.outcome = "failed"
        report.longrepr = f"{item.name} took {took:.0f} s; a notebook may take {LONGEST} s: take fewer cells or genes."
        if took == 0:
            report.longrepr = f"{item.name} took 0 s: its kernel has not ended, or is no process of this one."
    return report


def seconds_of_kernels() -> float:
    """Processors' time of the processes that were begun here and have ended, in seconds."""
    times = os.times()
    return times.children_user + times.children_system


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Tidy a notebook that nbmake has stored."""
    if item.config.getoption("overwrite", default=False):
        notebook = json.loads(item.path.read_text(encoding="utf-8"))
        tidy(notebook)
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
        item.path.write_text(f"{text}\n", encoding="utf-8")


def tidy(notebook: dict[str, Any]) -> None:
    """Drop times and the version of the kernel, and join what a cell printed piece by piece."""
    notebook["metadata"]["language_info"] = {"name": "python"}
    for cell in notebook["cells"]:
        cell["metadata"].pop("execution", None)
        if "outputs" in cell:
            cell["outputs"] = joined(cell["outputs"])


def joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join consecutive outputs of one stream; what a progress bar leaves, an empty output, does not part them."""
    kept: list[dict[str, Any]] = []
    for output in outputs:
        if "data" in output and not any(map("".join, output["data"].values())):
            continue
        is_stream = output["output_type"] == "stream"
        if is_stream and kept and kept[-1].get("name") == output["name"]:
            text = "".join([*kept[-1]["text"], *output["text"]])
            kept[-1]["text"] = text.splitlines(keepends=True)
        else:
            kept.append(output)
    return kept
