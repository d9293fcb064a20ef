"""Plots of finished results; they compute nothing and need no torch."""

from __future__ import annotations

from gfx.pl._attention import attention
from gfx.pl._confusion import confusion
from gfx.pl._deletion import deletion
from gfx.pl._gene_effects import gene_effects
from gfx.pl._gene_scores import gene_scores
from gfx.pl._learning_curve import learning_curve
from gfx.pl._rank_trend import rank_trend
from gfx.pl._roc import roc
from gfx.pl._screen import screen
from gfx.pl._synergy import synergy

__all__ = [
    "attention",
    "confusion",
    "deletion",
    "gene_effects",
    "gene_scores",
    "learning_curve",
    "rank_trend",
    "roc",
    "screen",
    "synergy",
]
