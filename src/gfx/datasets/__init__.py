"""Cells for trying things out, offline."""

from __future__ import annotations

from gfx.datasets._ifnb import ifnb
from gfx.datasets._toy import toy

__all__ = ["ifnb", "toy"]
