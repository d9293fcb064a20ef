"""Tools: run a model on cells and write what it finds into the AnnData."""

from __future__ import annotations

from gfx.tl import classification, perturbation, screen
from gfx.tl._attention import attention
from gfx.tl._embed import embed
from gfx.tl._embed_genes import embed_genes
from gfx.tl.classification import *  # noqa: F403 - each room lists its functions
from gfx.tl.perturbation import *  # noqa: F403
from gfx.tl.screen import *  # noqa: F403

__all__ = ["attention", "embed", "embed_genes"]
__all__ += classification.__all__ + perturbation.__all__ + screen.__all__
