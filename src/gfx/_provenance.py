"""Left until every room imports `gfx._results`."""

from __future__ import annotations

from gfx._results import made_by, mask_name, record, storable

__all__ = ["made_by", "mask_name", "record", "storable"]
