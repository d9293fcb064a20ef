"""Tidy tables of results, one for every plot."""

from __future__ import annotations

from gfx.get._attention import (
    attention_bands_df,
    attention_df,
    attention_difference_df,
    attention_edges_df,
    attention_heads_df,
    attention_layers_df,
    attention_pairs_df,
    attention_ranks_df,
)
from gfx.get._classification import classification_df, confusion_df, gene_scores_df, learning_curve_df, roc_df
from gfx.get._official import official_statistics_df
from gfx.get._perturbation import (
    controls_df,
    deletion_cells_df,
    deletion_df,
    gene_effects_df,
    random_sets_df,
    rank_trend_df,
    synergy_df,
    target_effects_df,
)
from gfx.get._screen import screen_cells, screen_df

__all__ = [
    "attention_bands_df",
    "attention_df",
    "attention_difference_df",
    "attention_edges_df",
    "attention_heads_df",
    "attention_layers_df",
    "attention_pairs_df",
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
    "screen_df",
    "synergy_df",
    "target_effects_df",
]
