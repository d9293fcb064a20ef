"""The science: pure functions on arrays. No AnnData, no torch."""
