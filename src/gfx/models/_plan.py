"""What a folder is trained on and how: a stopped run goes on with the same, and with nothing else."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PLAN_FILE = "plan.json"


def keep_to_plan(folder: Path, plan: Mapping[str, Any], *, unfinished: str, kept: str = "") -> None:
    """Note what a folder is trained on and how; refuse to go on there with something else.

    Parameters
    ----------
    unfinished
        Folder in there that holds what is not finished.
    kept
        What stays useful when that is deleted, for the message.
    """
    file = folder / PLAN_FILE
    plan = json.loads(json.dumps(plan, default=str))  # as it is read back: lists for tuples, text for paths
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(plan, indent=1))
        part.replace(file)  # there as a whole, or not at all
        return
    before = json.loads(file.read_text())
    changed = sorted(key for key in plan | before if plan.get(key) != before.get(key))
    if changed:
        lines = "\n".join(f"- {key}: {before.get(key)!r}, now {plan.get(key)!r}" for key in changed)
        msg = (
            f"{folder} holds a run with another {', '.join(changed)}, which cannot go on with these:\n{lines}\n"
            f"Give another folder; or delete `{PLAN_FILE}` and `{unfinished}` in that one, to begin anew{kept}."
        )
        raise ValueError(msg)
