"""Types that many signatures share; imported for type checkers alone, so nothing is loaded when the code runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path
    from typing import TypeAlias

    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

    from gfx.models import Model

    #: What tools and readers take: cells, or a MuData with a modality of them.
    Data: TypeAlias = AnnData | MuData

    #: A published name, a folder, or a loaded model.
    ModelLike: TypeAlias = str | Path | Model

    #: A boolean column of `obs`, or one truth value per cell.
    Mask: TypeAlias = str | np.ndarray | pd.Series

#: How a cell becomes one vector.
Pooling = Literal["auto", "mean", "cls"]

#: How the shift of a cell is measured.
PoolingOfShifts = Literal["auto", "mean", "cls", "genes"]

#: Whether the genes behind a deleted one move up or keep their positions.
Positions = Literal["close", "keep"]
