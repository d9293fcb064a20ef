"""Run the README's lines with the installed package: `python -P tests/installed.py`, by the environment that has it."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import gfx

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    place = Path(gfx.__file__).resolve()
    if ROOT / "src" in place.parents:
        msg = f"This is to try an installed package, and gfx is imported from {place}."
        raise SystemExit(msg)
    lines = (ROOT / "README.md").read_text().partition("<!-- example -->\n```python\n")[2].partition("```")[0]
    names: dict[str, object] = {}
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        gfx.datasets.ifnb()[::8].copy().write_h5ad("cells.h5ad")
        exec(compile(lines, "README.md", "exec"), names)
        os.chdir(ROOT)
    print(names["adata"])


if __name__ == "__main__":
    main()
