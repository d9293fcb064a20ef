"""Tidy tables of finished results, one for every plot."""

from __future__ import annotations

from gfx.get._attention import attention_df, attention_heads_df, attention_ranks_df
from gfx.get._deletion import deletion_cells_df, deletion_df, gene_effects_df

__all__ = [
    "attention_df",
    "attention_heads_df",
    "attention_ranks_df",
    "deletion_cells_df",
    "deletion_df",
    "gene_effects_df",
]
