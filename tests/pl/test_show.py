"""Plots that show their figure return nothing, all others the axes: the same rule for every function."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import pytest
import scanpy as sc

import gfx

if TYPE_CHECKING:
    from collections.abc import Iterator

    import anndata as ad

#: How each plot is called.
CALLS: dict[str, dict[str, object]] = {
    "attention": {"min_cells": 1},
    "attention_bands": {"min_positions": 1},
    "attention_difference": {"group": "a", "reference": "b", "min_cells": 3},
    "attention_heads": {},
    "attention_neighbors": {"gene": "TOY3", "min_cells": 1, "network": True},
    "confusion": {},
    "deletion": {"min_cells": 1},
    "gene_effects": {"perturbation": "TOY3", "min_cells": 1},
    "gene_scores": {"min_cells": 1},
    "learning_curve": {},
    "rank_trend": {"min_cells": 1},
    "roc": {},
    "screen": {"min_cells": 1},
    "synergy": {"min_cells": 1},
    "volcano": {"key": "gfx_delete", "min_cells": 1},
}


@pytest.fixture(scope="module")
def results(toy_cells, toy_model, classified) -> ad.AnnData:
    """Cells with a result of every kind."""
    adata = toy_cells(30)
    gfx.tl.attention(adata, model=toy_model, groupby="cell_type", genes=[f"TOY{number}" for number in range(1, 9)])
    gfx.tl.delete_genes(adata, ["TOY3", ("TOY1", "TOY3")], model=toy_model, n_random=4)
    gfx.tl.screen_genes(adata, model=toy_model, controls=None)
    return classified(adata, "tl.classify_genes", tasks={"labels": ["tolerant", "sensitive"]})


@pytest.fixture
def autoshow() -> Iterator[None]:
    """Leave scanpy's setting as it was."""
    before = sc.settings.autoshow
    yield
    sc.settings.autoshow = before


def test_every_plot_is_tested() -> None:
    assert sorted(CALLS) == sorted(gfx.pl.__all__)


@pytest.mark.usefixtures("autoshow")
@pytest.mark.parametrize("name", CALLS)
def test_a_plot_is_shown_or_returned(name: str, results: ad.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(**how: object) -> plt.Axes | list[plt.Axes] | None:
        return getattr(gfx.pl, name)(results, **CALLS[name], **how)

    shown: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf().number))
    axes = draw(show=False)
    panels = axes if isinstance(axes, list) else [axes]
    assert all(isinstance(panel, plt.Axes) for panel in panels)
    assert not shown
    assert draw(show=True) is None
    assert shown == [plt.gcf().number]

    for sc.settings.autoshow in (False, True):
        assert (draw() is None) == sc.settings.autoshow
    assert len(shown) == 2

    _, given = plt.subplots(1, len(panels), squeeze=False)
    given = given[0].tolist() if isinstance(axes, list) else given[0, 0]
    assert draw(ax=given) == given
    assert draw(ax=given, show=True) is None
    assert len(shown) == 3
    plt.close("all")


def test_scanpy_need_not_be_loaded(results: ad.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "scanpy")
    shown: list[bool] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    assert gfx.pl.roc(results) is None
    assert shown
    plt.close("all")
