"""One way to perturb genes, with one model, in the cells of one object: ready to run on any genes and cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gfx._core.edits import can_be_perturbed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import BertModel

    from gfx._core.edits import Edit
    from gfx._engine.perturb import Comparison, EditEffects, Edits
    from gfx.tl._cell_states import States
    from gfx.tl._prepare import Prepared


@dataclass(frozen=True)
class Experiment:
    """What is done to genes, and where.

    Parameters
    ----------
    cells
        Cells, tokens and model.
    encoder
        The network up to the wanted layer.
    kind
        What is done to the genes.
    hold
        Other genes keep their positions.
    how
        How cells are compared.
    lengths
        Tokens of each cell, 0 for cells that are not perturbed, int `(n_obs,)`.
    new_ranks
        Finds the ranks that genes move to, `(n_edits, n_genes)`, from the cell of each edit and its genes.
    """

    cells: Prepared
    encoder: BertModel
    kind: Edit
    hold: bool
    how: Comparison
    lengths: np.ndarray
    new_ranks: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

    def where(self, genes: np.ndarray) -> np.ndarray:
        """Rows of the cells in which a set of genes can be perturbed."""
        vocabulary = self.cells.model.vocabulary
        return np.flatnonzero(can_be_perturbed(self.cells.tokens.ids, self.lengths, genes, vocabulary, self.kind))

    def edits(self, sets: Sequence[np.ndarray], cell: np.ndarray, which: np.ndarray) -> Edits:
        """Set up one edit for each cell and number of a set, both `(n_edits,)`."""
        from gfx._core.edits import pad_sets
        from gfx._engine.perturb import Edits

        cell, which = np.asarray(cell, dtype=np.int64), np.asarray(which, dtype=np.int64)
        to = None if self.new_ranks is None else self.new_ranks(cell, pad_sets(sets)[which])
        return Edits(self.kind, sets, cell, which, to)

    def embed_states(self, states: States, *, encoder: BertModel | None = None) -> np.ndarray:
        """Embed all cells of the states as they are, `(n_obs, d)`; with another network if one is given."""
        from gfx._engine.pooling import embed_cells

        tokens = self.cells.tokens
        return embed_cells(
            self.encoder if encoder is None else encoder,
            tokens.ids,
            np.where(states.group >= 0, tokens.lengths, 0),
            self.cells.model.vocabulary,
            how="cls" if self.how == "cls" else "mean",
        )

    def measure(self, edits: Edits, *, encoder: BertModel | None = None, **wanted: Any) -> EditEffects:
        """Run edits, with another network if one is given."""
        from gfx._engine.perturb import measure_edits

        return measure_edits(
            self.encoder if encoder is None else encoder,
            self.cells.tokens.ids,
            self.cells.tokens.lengths,
            self.cells.model.vocabulary,
            edits,
            how=self.how,
            hold=self.hold,
            **wanted,
        )
