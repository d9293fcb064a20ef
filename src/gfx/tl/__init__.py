"""Tools: run a model on cells and write what it finds into the AnnData."""

from __future__ import annotations

from gfx.tl._attention import attention
from gfx.tl._embed import embed
from gfx.tl._embed_genes import embed_genes
from gfx.tl.classification import classify_cells, classify_genes, predict_cells, predict_genes
from gfx.tl.perturbation import delete_genes, overexpress_genes, shift_genes
from gfx.tl.screen import FirstOrder, screen_genes

__all__ = [
    "FirstOrder",
    "attention",
    "classify_cells",
    "classify_genes",
    "delete_genes",
    "embed",
    "embed_genes",
    "overexpress_genes",
    "predict_cells",
    "predict_genes",
    "screen_genes",
    "shift_genes",
]
