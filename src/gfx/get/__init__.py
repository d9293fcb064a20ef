"""Tidy tables of results, one for every plot."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from gfx._report import report

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
    "report",
    "roc_df",
    "screen_cells",
    "screen_df",
    "synergy_df",
    "target_effects_df",
]


def __getattr__(name: str) -> object:
    # The report draws: it stands above `pl`, which stands above these tables.
    if name == "report":
        return importlib.import_module("gfx._report").report
    msg = f"module 'gfx.get' has no attribute {name!r}"
    raise AttributeError(msg)
