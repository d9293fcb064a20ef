"""The plan of a training: a stopped run goes on in its folder with the same plan, and with no other."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from gfx import _log
from gfx._core.checkpoint import read_json
from gfx._core.manifest import compare_manifests, plain_manifest, write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PLAN_FILE = "plan.json"


def keep_to_plan(folder: Path, plan: Mapping[str, Any], *, unfinished: str) -> None:
    """Write the plan of a training into its folder; if one is there, refuse to go on with another.

    Other versions of gfx or torch are a warning that names them. `unfinished` is the subfolder that a message says to
    delete in order to begin anew.
    """
    file = folder / PLAN_FILE
    plan = plain_manifest(plan | {"gfx_version": version("scgfx"), "torch_version": version("torch")})
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(plan, indent=1))
        return
    advice = f"Give another folder; or delete `{PLAN_FILE}` and `{unfinished}` in that one, to begin anew."
    warning = compare_manifests(read_json(file), plan, holder=f"{folder} holds a run", advice=advice)
    if warning:
        _log.warn(warning)
