"""Names of groups, classes and sets of genes are as long as people make them: figures hold them all the same."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

import gfx
from gfx.pl._style import folded, set_label

if TYPE_CHECKING:
    from collections.abc import Iterator

    import anndata as ad

MONOCYTES = "classical CD14-positive monocytes of the peripheral blood, as annotated by the authors of the atlas"
NK = "natural killer cells (CD56dim and CD56bright, before and after six hours of stimulation in culture)"

#: How each plot that writes names of the user's is called.
CALLS: dict[str, dict[str, object]] = {
    "attention_difference": {"group": MONOCYTES, "reference": NK, "min_cells": 3},
    "attention_heads": {"gene_sets": {MONOCYTES: ["TOY1", "TOY2"], NK: ["TOY3", "TOY4"]}, "min_cells": 1},
    "confusion": {},
    "deletion": {"min_cells": 1},
    "gene_scores": {"min_cells": 1},
    "rank_trend": {"min_cells": 1},
    "roc": {},
    "screen": {"groups": [MONOCYTES, NK], "min_cells": 1, "key": "gfx_screen"},
    "synergy": {"min_cells": 1},
    "volcano": {"key": "gfx_delete", "min_cells": 1},
}


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def results(toy_cells, toy_model, classified) -> ad.AnnData:
    adata = toy_cells(30)
    adata = adata[adata.obs["cell_type"] != "c"].copy()
    adata.obs["long"] = np.where(adata.obs["cell_type"] == "a", MONOCYTES, NK)
    of_known = np.asarray((adata.X > 0).sum(axis=0)).ravel() * adata.var_names.str.startswith("TOY")
    genes = adata.var_names[np.argsort(-of_known, kind="stable")].tolist()
    counts = adata.X.toarray()
    counts[:, adata.var_names.isin(genes[:12])] += 1  # so that all have the set
    adata.X = counts
    states = {"groupby": "long", "start": MONOCYTES, "goal": NK}
    with pytest.warns(UserWarning, match="hardly separable"):
        gfx.tl.delete_genes(adata, [*genes[:2], tuple(genes[:12])], model=toy_model, n_random=4, **states)
    gfx.tl.attention(adata, model=toy_model, groupby="long", controls=None)
    gfx.tl.screen_genes(adata, model=toy_model, groupby="long", controls=None)
    return classified(adata, "tl.classify_genes", tasks={"labels": [MONOCYTES, NK]})


@pytest.mark.parametrize("name", CALLS)
def test_long_names_are_whole_and_leave_room_for_what_is_drawn(results: ad.AnnData, name: str) -> None:
    drawn = getattr(gfx.pl, name)(results, show=False, **CALLS[name])
    axes = drawn if isinstance(drawn, list) else [drawn]
    figure = axes[0].figure
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 > -0.05
    assert box.y0 > -0.05
    assert box.x1 < width + 0.05
    assert box.y1 < height + 0.05
    for ax in axes:
        assert min(ax.bbox.width, ax.bbox.height) > 1.0 * figure.dpi
        low, high = ax.get_xlim()
        labels = [tick.label1 for tick in ax.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        if not any(label.get_rotation() for label in labels):
            extents = [label.get_window_extent() for label in labels]
            assert not any(one.overlaps(other) for one, other in itertools.pairwise(extents))
    for labels in ([ax.title for ax in axes], [ax.xaxis.label for ax in axes]):
        extents = [label.get_window_extent() for label in labels if label.get_text()]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(extents, 2))


def test_sets_of_many_genes_are_called_by_their_first_ones() -> None:
    assert set_label("GATA4") == "GATA4"
    assert set_label("GATA4+TBX5+MEF2C+HAND2") == "GATA4+TBX5+MEF2C+HAND2"
    assert set_label("+".join(f"GENE{number}" for number in range(20))) == "GENE0+GENE1+GENE2 + 17 more"
    assert set_label("A" * 40) == "A" * 40
    assert set_label(f"{'A' * 40}+B") == f"{'A' * 40} + 1 more"


def test_text_is_folded_into_three_lines_at_most() -> None:
    _, ax = plt.subplots(figsize=(4, 4))
    assert folded("short", ax) == "short"
    assert folded("two\nlines", ax) == "two\nlines"
    lines = folded("word " * 100, ax).split("\n")
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert max(map(len, lines)) < 45
    assert max(map(len, folded("word " * 100, ax, share=0.5).split("\n"))) < 22
