"""Tidy tables of finished results, one for every plot."""

from __future__ import annotations

from gfx.get._attention import attention_df, attention_heads_df, attention_ranks_df
from gfx.get._classification import classification_df, confusion_df, learning_curve_df, roc_df
from gfx.get._controls import controls_df, random_sets_df, rank_trend_df
from gfx.get._deletion import deletion_cells_df, deletion_df, gene_effects_df
from gfx.get._gene_scores import gene_scores_df
from gfx.get._official_statistics import official_statistics_df
from gfx.get._screen import screen_cells, screen_controls_df, screen_df
from gfx.get._synergy import synergy_df
from gfx.get._targets import target_effects_df

__all__ = [
    "attention_df",
    "attention_heads_df",
    "attention_ranks_df",
    "classification_df",
    "confusion_df",
    "controls_df",
    "deletion_cells_df",
    "deletion_df",
    "gene_effects_df",
    "gene_scores_df",
    "learning_curve_df",
    "official_statistics_df",
    "random_sets_df",
    "rank_trend_df",
    "roc_df",
    "screen_cells",
    "screen_controls_df",
    "screen_df",
    "synergy_df",
    "target_effects_df",
]
