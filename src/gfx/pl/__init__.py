"""Plots of results; they compute nothing and need no torch."""

from __future__ import annotations

from gfx.pl._attention import (
    attention,
    attention_bands,
    attention_difference,
    attention_heads,
    attention_neighbors,
)
from gfx.pl._classification import confusion, gene_scores, learning_curve, roc
from gfx.pl._perturbation import deletion, gene_effects, rank_trend, synergy
from gfx.pl._screen import screen, volcano

__all__ = [
    "attention",
    "attention_bands",
    "attention_difference",
    "attention_heads",
    "attention_neighbors",
    "confusion",
    "deletion",
    "gene_effects",
    "gene_scores",
    "learning_curve",
    "rank_trend",
    "roc",
    "screen",
    "synergy",
    "volcano",
]
