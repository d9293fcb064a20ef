"""The page of departures names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "differences.md"


def test_every_departure_names_a_test_that_exists():
    defined = {
        node.name
        for file in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    departures = [row for row in rows if not re.match(r"\| *\|", row)]
    assert len(departures) >= 11
    for row in departures:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, f"no test named: {row}"
        assert set(named) <= defined, f"no such test: {sorted(set(named) - defined)}"
