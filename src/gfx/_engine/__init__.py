"""The machine: everything that runs a model. No AnnData."""
