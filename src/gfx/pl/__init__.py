"""Plots of finished results; they compute nothing and need no torch."""

from __future__ import annotations

from gfx.pl._attention import attention
from gfx.pl._deletion import deletion

__all__ = ["attention", "deletion"]
