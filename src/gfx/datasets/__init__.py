"""Cells for trying things out: inside the package, or public ones that are downloaded."""

from __future__ import annotations

from gfx.datasets._ifnb import ifnb
from gfx.datasets._public import pbmc3k, visium_heart
from gfx.datasets._toy import toy

__all__ = ["ifnb", "pbmc3k", "toy", "visium_heart"]
