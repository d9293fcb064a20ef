"""Tasks of the runner: embeddings and classes of cells and genes, attention, and effects of perturbed genes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from gfx._core.edits import Edits, single_deletions
from gfx._core.screening import wanted_places
from gfx._core.statistics import synergy
from gfx._engine.attention import sum_attention
from gfx._engine.class_scores import of_cells, probabilities_and_squares
from gfx._engine.first_order import estimate_deletions
from gfx._engine.perturb import run_edits
from gfx._engine.pooling import embed_cells, sum_genes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import BertModel

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.attention import Pairs
    from gfx._engine.classifier import Classifier
    from gfx._engine.perturb import Comparison
    from gfx._engine.pooling import Pooling
    from gfx._engine.run import CellBlock, Network, Result
    from gfx._types import Positions


@dataclass(frozen=True)
class NetworkTask:
    """What a network computes for a block of cells: named arrays."""

    network: Network
    vocabulary: Vocabulary

    def run(self, cells: CellBlock, device: torch.device) -> Result:
        return self.compute(self.network.load(device), cells)

    def compute(self, model: Any, cells: CellBlock) -> Result:
        """Make the arrays, as each task does in its own way."""
        raise NotImplementedError

    def shapes(self, cells: CellBlock) -> dict[str, tuple[int, ...]]:
        """Shapes of results, as far as they are known before; a store that has others is not believed."""
        return {}


@dataclass(frozen=True)
class CellEmbedding(NetworkTask):
    """The vector of each cell: `vectors`, float32 `(n_cells, d)`."""

    pooling: Pooling

    def compute(self, model: BertModel, cells: CellBlock) -> Result:
        return {"vectors": embed_cells(model, cells.ids, cells.lengths, self.vocabulary, how=self.pooling)}

    def shapes(self, cells: CellBlock) -> dict[str, tuple[int, ...]]:
        return {"vectors": (len(cells), self.network.config["hidden_size"])}


@dataclass(frozen=True)
class GeneEmbedding(NetworkTask):
    """Hidden states of each gene, added up over the cells of each `group`, int `(n_cells,)`, that blocks are given.

    See :func:`gfx._engine.pooling.sum_genes`.
    """

    n_groups: int

    def compute(self, model: BertModel, cells: CellBlock, **how: Any) -> Result:
        how |= {"group": cells.given["group"], "n_groups": self.n_groups}
        return sum_genes(model, cells.ids, cells.lengths, self.vocabulary, **how)


@dataclass(frozen=True)
class GeneClasses(GeneEmbedding):
    """Probabilities of the classes of each gene and their squares, added up as embeddings are: `d` is twice as many."""

    def compute(self, model: Classifier, cells: CellBlock, **how: Any) -> Result:
        width = 2 * model.head.n_logits
        return super().compute(model, cells, forward=probabilities_and_squares, width=width, **how)


@dataclass(frozen=True)
class CellClasses(NetworkTask):
    """The probabilities of the classes of each cell: `vectors`, float32 `(n_cells, n_classes)`."""

    def compute(self, model: Classifier, cells: CellBlock) -> Result:
        return {"vectors": of_cells(model, cells.ids, cells.lengths, self.vocabulary)}


@dataclass(frozen=True)
class Attention(NetworkTask):
    """Attention, added up over the cells of each `unit`, int `(n_cells,)`, that blocks are given.

    See :func:`gfx._engine.attention.sum_attention`.
    """

    n_units: int
    deleted: tuple[int, ...] = ()
    pairs: Pairs | None = None

    def compute(self, model: BertModel, cells: CellBlock) -> Result:
        how: dict[str, Any] = {"n_units": self.n_units, "deleted": self.deleted, "pairs": self.pairs}
        return sum_attention(model, cells.ids, cells.lengths, self.vocabulary, unit=cells.given["unit"], **how)


@dataclass(frozen=True)
class Perturbation(NetworkTask):
    """Effects of perturbing sets of genes, run by run.

    Blocks are given, for each run, `cell`, its row in the block, and `set`, int `(n_runs,)`; for moved genes `to`, see
    :class:`gfx._core.edits.Edits`; `members`, the runs of the genes of a set one by one, `(n_runs, largest)`, -1
    where there is none, and `own`, False for runs that serve for nothing else; and `group`, in which the shifts of
    other genes are added up, -1 for none.

    Parameters
    ----------
    operator, positions, pooling
        What is done to the genes, whether other genes close up, and how cells are compared.
    sets
        Tokens perturbed together, one array each.
    goals
        Vectors of states, `(n_states, d)`, or `(n_sets, n_states, d)` for other ones with each set.
    split
        Split shifts into composition, position and context, for one more pass.
    keep_vectors
        Return `vectors`, the cell after each perturbation, float32 `(n_runs, d)`.
    """

    operator: str
    positions: Positions
    pooling: Comparison
    sets: Sequence[np.ndarray]
    goals: np.ndarray | None = None
    split: bool = False
    keep_vectors: bool = False

    def compute(self, model: BertModel, cells: CellBlock) -> Result:
        given, members = cells.given, cells.given.get("members")
        result = run_edits(
            model,
            cells.ids,
            cells.lengths,
            self.vocabulary,
            Edits(self.operator, self.sets, given["cell"], given["set"], given.get("to")),
            how=self.pooling,
            positions=self.positions,
            split=self.split,
            goals=self.goals,
            gene_groups=given.get("group"),
            keep_vectors=self.keep_vectors or members is not None,
            in_full=given.get("own"),
        )
        vectors = result.pop("vectors", None)
        if self.keep_vectors and vectors is not None:
            result["vectors"] = vectors[:, 1]
        if members is not None and vectors is not None:
            result |= _synergy(members, vectors, result["shift"])
        return result

    def shapes(self, cells: CellBlock) -> dict[str, tuple[int, ...]]:
        return _effect_shapes(len(cells.given["cell"]), self.goals)


def _effect_shapes(n_runs: int, goals: np.ndarray | None) -> dict[str, tuple[int, ...]]:
    return {"shift": (n_runs,), "rank": (n_runs,), "toward": (n_runs, 0 if goals is None else goals.shape[-2])}


def _synergy(members: np.ndarray, vectors: np.ndarray, shift: np.ndarray) -> Result:
    """Compare sets of several genes with their genes one by one; NaN for single genes."""
    result = {name: np.full(len(members), np.nan) for name in ("together", "summed", "displaced", "composed")}
    n_members = (members >= 0).sum(axis=1)
    for size in np.unique(n_members[n_members > 0]):
        run = np.flatnonzero(n_members == size)
        single = members[run, :size].T  # genes × runs
        before, after = vectors[run, 0], vectors[run, 1]
        # Each displacement from its own start: inserting one gene cuts fewer off a full cell than inserting them all.
        moved = vectors[single, 1] - vectors[single, 0]
        compared = synergy(before, after, before + moved, shift[run], shift[single])
        for name, values in result.items():
            values[run] = compared[name]
    return result


@dataclass(frozen=True)
class Screen(NetworkTask):
    """Effects of deleting genes one at a time: all wanted ones of each cell.

    Blocks may be given `wanted`, which places of the cells to delete, bool `(n_cells, longest)`. A run is returned for
    each gene of each cell, in the order of cells and ranks: `cell`, its number in the AnnData, `token` and `rank`, 0
    the first gene of the cell and 1 its last; and `shift` and `toward`, see :func:`gfx._engine.perturb.run_edits`.

    Parameters
    ----------
    is_exact
        Run each cell without each gene; else estimate all genes of a cell by derivatives.
    positions, pooling, goals
        As of :class:`Perturbation`.
    genes
        Which tokens to delete at all, bool `(n_tokens,)`.
    n_probes, seed
        Random directions for estimates of shifts, and their seed.
    """

    is_exact: bool
    positions: Positions
    pooling: Comparison
    genes: np.ndarray
    goals: np.ndarray | None
    n_probes: int
    seed: int

    @property
    def measures_shifts(self) -> bool:
        """Whether shifts are measured: estimates of them need probes."""
        return self.is_exact or self.n_probes > 0

    def compute(self, model: BertModel, cells: CellBlock) -> Result:
        edits = single_deletions(cells.ids, self._wanted(cells))
        what = model, cells.ids, cells.lengths, self.vocabulary, edits
        how: dict[str, Any] = {"how": self.pooling, "positions": self.positions, "goals": self.goals}
        if self.is_exact:
            effects = run_edits(*what, **how)
        else:
            # Directions depend on what a cell is, not on where it stands: a subset of the cells gives the same.
            rows = zip(cells.ids, cells.lengths, strict=True)
            seeds = [(self.seed, crc32(tokens[:length].astype("<i8").tobytes())) for tokens, length in rows]
            effects = estimate_deletions(*what, n_probes=self.n_probes, seeds=seeds, **how)
        return {
            "cell": cells.number[edits.cell].astype(np.int32),
            "token": np.asarray(edits.sets)[edits.which, 0].astype(np.int32),
            **effects,
        }

    def _wanted(self, cells: CellBlock) -> np.ndarray:
        wanted = cells.given.get("wanted")
        return wanted_places(cells.ids, cells.lengths, self.genes, self.vocabulary) if wanted is None else wanted

    def shapes(self, cells: CellBlock) -> dict[str, tuple[int, ...]]:
        n_runs = int(self._wanted(cells).sum())
        shapes = {"cell": (n_runs,), "token": (n_runs,), **_effect_shapes(n_runs, self.goals)}
        return {name: shape for name, shape in shapes.items() if name != "shift" or self.measures_shifts}
