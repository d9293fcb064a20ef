"""Pretraining: from sources of cells to tokens on disk, a vocabulary and a model."""
