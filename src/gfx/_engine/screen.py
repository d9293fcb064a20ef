"""To go with its callers: a screen is :func:`gfx._engine.perturb.run_edits` of single deletions."""

from __future__ import annotations

from typing import Literal

import numpy as np

from gfx._core.edits import single_deletions
from gfx._core.screening import Screened
from gfx._engine.perturb import run_edits
from gfx._settings import settings

Operator = Literal["delete", "hold"]


def screen_exactly(encoder, ids, wanted, lengths, vocabulary, *, how, operator, goals=None, tokens_at_once) -> Screened:
    """Delete the wanted genes of each cell, one at a time."""
    found = Screened.nothing(*ids.shape, 0 if goals is None else len(goals))
    cell, place = np.nonzero(wanted)
    edits = single_deletions(ids, wanted)
    positions = "keep" if operator == "hold" else "close"
    with settings.override(batch_tokens=tokens_at_once):
        runs = run_edits(encoder, ids, lengths, vocabulary, edits, how=how, positions=positions, goals=goals)
    found.shift[cell, place], found.toward[cell, place] = runs.shift, runs.toward
    return found
