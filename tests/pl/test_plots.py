"""Plots show what the tables hold: asserted on the artists, not on pixels."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

import gfx

if TYPE_CHECKING:
    from collections.abc import Iterator

    import anndata as ad


def common_genes(adata: ad.AnnData) -> list[str | tuple[str, str]]:
    """Two genes that most cells express, and the pair."""
    known = adata.var_names.str.startswith("TOY")
    detected = np.asarray((adata.X > 0).sum(axis=0)).ravel() * known
    first, second = adata.var_names[np.argsort(-detected, kind="stable")[3:5]]
    return [first, second, (first, second)]


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def deleted(toy_cells, toy_model) -> ad.AnnData:
    adata = toy_cells()
    genes = common_genes(adata)
    gfx.tl.delete_genes(adata, genes, model=toy_model)
    gfx.tl.delete_genes(adata, genes, model=toy_model, groupby="cell_type", start="a", goal="b", key_added="by_state")
    return adata


@pytest.fixture(scope="module")
def attended(toy_cells, toy_model) -> ad.AnnData:
    adata = toy_cells()
    gfx.tl.attention(adata, model=toy_model)
    return adata


def test_deletion_orders_rows_by_mean_effect(deleted: ad.AnnData) -> None:
    ax = gfx.pl.deletion(deleted, show=False)
    table = gfx.get.deletion_df(deleted).sort_values("shift_mean", ascending=False)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        f"{row.perturbation} ({row.n_cells})" for row in table.itertuples()
    ]
    top, bottom = ax.get_ylim()[1], ax.get_ylim()[0]
    assert top < 0 < bottom  # the first row is on top
    assert ax.get_xscale() == "log"


def test_deletion_draws_every_cell_and_its_median(deleted: ad.AnnData) -> None:
    ax = gfx.pl.deletion(deleted, show=False)
    cells = gfx.get.deletion_cells_df(deleted)
    drawn = [offsets for offsets in (c.get_offsets() for c in ax.collections) if len(offsets) > 1]
    assert sum(map(len, drawn)) == len(cells)
    medians = sorted(
        line.get_xdata()[0] for line in ax.lines if line.get_color() == "black" and len(line.get_xdata()) == 2
    )
    expected = sorted(cells.groupby("perturbation")["shift"].median())
    for value in expected:
        assert any(np.isclose(value, m, rtol=1e-5) for m in medians)


def test_deletion_box_colour_is_the_mean_rank(deleted: ad.AnnData) -> None:
    ax = gfx.pl.deletion(deleted, cmap="viridis", show=False)
    table = gfx.get.deletion_df(deleted).sort_values("shift_mean", ascending=False)
    boxes = [patch for patch in ax.patches if hasattr(patch, "get_path")]
    for patch, rank in zip(boxes, table["rank_mean"], strict=True):
        np.testing.assert_allclose(patch.get_facecolor()[:3], mpl.colormaps["viridis"](rank)[:3], atol=1e-6)


def test_deletion_with_states_draws_the_goal_or_the_state_asked_for(deleted: ad.AnnData) -> None:
    ax = gfx.pl.deletion(deleted, key="by_state", show=False)
    assert "towards b" in ax.get_xlabel()
    assert ax.get_xscale() == "linear"
    assert "towards c" in gfx.pl.deletion(deleted, key="by_state", state="c", show=False).get_xlabel()
    with pytest.raises(KeyError, match="Did not find the state 'z'"):
        gfx.pl.deletion(deleted, key="by_state", state="z")
    with pytest.raises(KeyError, match="without states"):
        gfx.pl.deletion(deleted, state="b")


def test_deletion_draws_on_the_axes_given_and_keeps_to_n_top(deleted: ad.AnnData) -> None:
    figure, axes = plt.subplots(1, 2)
    assert gfx.pl.deletion(deleted, ax=axes[1], n_top=1, show=False) is axes[1]
    assert len(axes[1].get_yticklabels()) == 1
    assert not axes[0].has_data()
    assert len(plt.get_fignums()) == 1
    assert axes[1].get_figure() is figure


def test_plots_leave_the_object_alone(deleted: ad.AnnData) -> None:
    before = deleted.copy()
    gfx.pl.deletion(deleted, show=False)
    assert sorted(deleted.uns) == sorted(before.uns)
    np.testing.assert_array_equal(deleted.obsm["gfx_delete"], before.obsm["gfx_delete"])


def test_attention_heatmap_and_profiles_show_the_tables(attended: ad.AnnData) -> None:
    heads, ranks = gfx.pl.attention(attended, min_cells=1, show=False)
    table = gfx.get.attention_heads_df(attended)
    image = heads.get_images()[0].get_array()
    for row in table.itertuples():
        assert image[row.block - 1, row.head - 1] == pytest.approx(row.entropy)
    n_blocks, n_heads = image.shape
    # A line per head, one per block, and the dotted line of even attention.
    assert len(ranks.lines) == n_blocks * n_heads + n_blocks + 1
    first = gfx.get.attention_ranks_df(attended).query("block == 1 and head == 1 and rank == 1")["ratio"].item()
    assert ranks.lines[0].get_ydata()[0] == pytest.approx(first)


def test_attention_wants_two_axes(attended: ad.AnnData) -> None:
    _, axes = plt.subplots(1, 3)
    with pytest.raises(ValueError, match="draws on 2 axes, found 3"):
        gfx.pl.attention(attended, ax=axes)
    assert gfx.pl.attention(attended, ax=axes[:2], min_cells=1, show=False) == [axes[0], axes[1]]
    with pytest.raises(ValueError, match="No rank is reached by 1000 cells"):
        gfx.pl.attention(attended, min_cells=1000)


@pytest.mark.parametrize(("plot", "call"), [("deletion", "gfx.tl.delete_genes"), ("attention", "gfx.tl.attention")])
def test_without_a_result_the_error_names_the_call(toy_cells, plot: str, call: str) -> None:
    with pytest.raises(KeyError, match=call):
        getattr(gfx.pl, plot)(toy_cells(6))


def test_plotting_needs_no_torch(deleted: ad.AnnData, tmp_path) -> None:
    deleted.write_h5ad(tmp_path / "deleted.h5ad")
    code = f"""
import sys, anndata, gfx, matplotlib
matplotlib.use("Agg")
sys.modules["torch"] = None
gfx.pl.deletion(anndata.read_h5ad({str(tmp_path / "deleted.h5ad")!r}), key="by_state")
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
