"""Classes of genes and cells: evaluate classifiers, train one on all labels, and predict with it."""

from __future__ import annotations

from gfx.tl.classification._classify import classify_cells, classify_genes
from gfx.tl.classification._predict import predict_cells, predict_genes

__all__ = ["classify_cells", "classify_genes", "predict_cells", "predict_genes"]
