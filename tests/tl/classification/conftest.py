"""Quick settings of classifiers, genes and cells as two kinds of units, and a view of what each training is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import gfx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import anndata as ad


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """float32 on every CPU; few draws of bootstraps, and no penalty to choose: both are tested in the core."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("gfx._engine.device.has_fast_bfloat16", lambda *_, **__: False)
        monkeypatch.setattr("gfx._core.classification.N_DRAWS", 5)
        monkeypatch.setattr("gfx._core.linear_head._best_strength", one_strength)
        yield


def one_strength(features: np.ndarray, classes: np.ndarray, inner_folds: np.ndarray, settings: Any) -> float:
    """Choose as if all penalties were equal, among folds that could be used to choose."""
    assert len(features) == len(classes) == len(inner_folds)
    assert set(np.unique(inner_folds)) == set(range(int(inner_folds.max()) + 1))
    return 0.1


@dataclass(frozen=True)
class Kind:
    """How genes, or cells, are classified, and where their results are."""

    of: str
    function: Callable[..., None]
    what: Any
    element: str
    key: str

    def probe(self, adata: ad.AnnData, what: Any = None, **how: Any) -> None:
        """Evaluate a linear probe in two folds."""
        how = {"method": "linear_probe", "n_splits": 2, "n_repeats": 1, "controls": None} | how
        self.function(adata, self.what if what is None else what, **how)

    def read(self, adata: ad.AnnData, part: str = "", key: str | None = None) -> np.ndarray:
        """Read scores or, as a part, folds of all genes or cells."""
        return getattr(adata, self.element)[(key or self.key) + part]

    def scored(self, adata: ad.AnnData) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Class, folds, scores and predicted class of each gene or cell that has a score; of genes in two classes."""
        given, told = adata.obs.get("cell_type"), adata.obs.get(f"{self.key}_cell_type")
        if self.of == "genes":
            given, told = adata.var[self.key], adata.var[f"{self.key}_predicted"]
        columns = given.cat.codes.to_numpy(), self.read(adata, "_fold"), self.read(adata), told.cat.codes.to_numpy()
        known = ~np.isnan(columns[2][:, 0])
        assert (known == (columns[1] >= 0).all(axis=1)).all()
        assert (known == (columns[3] >= 0)).all()
        return tuple(column[known] for column in columns)


#: Classes that have nothing to do with the genes; neighbours in the vocabulary are of different classes.
ODD_EVEN = {"even": [f"TOY{n}" for n in range(2, 81, 2)], "odd": [f"TOY{n}" for n in range(1, 81, 2)]}
KINDS = {
    "genes": Kind("genes", gfx.tl.classify_genes, ODD_EVEN, "varm", "gfx_gene_class"),
    "cells": Kind("cells", gfx.tl.classify_cells, "cell_type", "obsm", "gfx_cell_class"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Genes, and cells."""
    return KINDS[request.param]


@pytest.fixture(scope="session")
def watch() -> Callable[[pytest.MonkeyPatch], list[tuple[Any, Any, Any]]]:
    """List the cells that each training is shown and validated by, and the classifier that comes out; all is real."""
    from gfx._engine import fine_tuning

    def start(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
        seen: list[tuple[Any, Any, Any]] = []
        run = fine_tuning.fine_tune

        def watched(make: Any, cells: Any, *args: Any, validation: Any, **how: Any) -> Any:
            seen.append((cells, validation, run(make, cells, *args, validation=validation, **how)))
            return seen[-1][2]

        monkeypatch.setattr(fine_tuning, "fine_tune", watched)
        return seen

    return start


@pytest.fixture
def trainings(watch: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """See `watch`, for one test."""
    return watch(monkeypatch)
