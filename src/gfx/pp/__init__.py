"""From counts to what a model reads: check cells, and write them as tokens."""

from __future__ import annotations

from gfx.pp._check import check
from gfx.pp._tokenize import tokenize

__all__ = ["check", "tokenize"]
