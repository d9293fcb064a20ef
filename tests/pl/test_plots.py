"""Plots show what the tables hold: asserted on the artists, not on pixels."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import gfx
from gfx.pl._style import label_points

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
    given = {"model": toy_model, "n_random": 6}
    gfx.tl.delete_genes(adata, genes, **given)
    gfx.tl.delete_genes(adata, genes, groupby="cell_type", start="a", goal="b", key_added="by_state", **given)
    gfx.tl.delete_genes(adata, genes, model=toy_model, controls=None, key_added="alone")
    return adata


def points(ax: plt.Axes, colour: str) -> list[np.ndarray]:
    """Clouds of points of one colour, from the first row to the last."""
    wanted = mpl.colors.to_rgb(colour)
    clouds = [c for c in ax.collections if len(c.get_facecolor()) and np.allclose(c.get_facecolor()[:, :3], wanted)]
    return [np.asarray(cloud.get_offsets()) for cloud in clouds if len(cloud.get_offsets())]


def diamonds(ax: plt.Axes) -> np.ndarray:
    """Where effects stand, one point each, in the order of the rows."""
    at = np.concatenate([c.get_offsets() for c in ax.collections if c.get_zorder() == 3])
    return at[np.argsort(at[:, 1])]


def intervals(ax: plt.Axes) -> list[np.ndarray]:
    """Ends of the lines through effects, from the first row to the last."""
    return [line.get_xdata() for line in ax.lines if line.get_linewidth() == 1.5 and len(line.get_xdata())]


def entries(ax: plt.Axes) -> list[str]:
    """What the legend says."""
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_deletion_orders_rows_as_the_table(deleted: ad.AnnData) -> None:
    ax = gfx.pl.deletion(deleted, show=False)
    table = gfx.get.deletion_df(deleted)
    assert table["z"].is_monotonic_decreasing
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        f"{row.perturbation} ({row.n_cells})" for row in table.itertuples()
    ]
    assert ax.get_ylim()[1] < 0 < ax.get_ylim()[0]  # the first row is on top
    np.testing.assert_allclose(diamonds(ax)[:, 0], table["shift_mean"] - table["random_mean"])
    for row, text in zip(table.itertuples(), ax.texts, strict=True):
        assert text.get_text() == f"z {round(row.z, 1) + 0.0:+.1f}, p {row.p:.2g}"


def test_deletion_draws_random_sets_around_0(deleted: ad.AnnData) -> None:
    ax = gfx.pl.deletion(deleted, show=False)
    table, random = gfx.get.deletion_df(deleted), gfx.get.random_sets_df(deleted)
    clouds = points(ax, "0.6")
    assert len(clouds) == len(ax.patches) == len(table) == 3
    for cloud, bar, row in zip(clouds, ax.patches, table.itertuples(), strict=True):
        values = random.loc[random["perturbation"] == row.perturbation, "difference"]
        values -= values.mean()
        np.testing.assert_allclose(sorted(cloud[:, 0]), sorted(values))
        assert cloud[:, 0].mean() == pytest.approx(0, abs=1e-9)
        np.testing.assert_allclose([bar.get_x(), bar.get_x() + bar.get_width()], np.percentile(values, [5, 95]))
    assert ax.get_xlabel() == "excess shift over random sets (1 - cosine)"
    assert entries(ax) == [
        "rank-matched random sets",
        "their 5th to 95th percentile",
        "mean of the perturbed cells",
        "5th to 95th percentile of these cells",
    ]


def test_deletion_without_random_sets_draws_none(deleted: ad.AnnData) -> None:
    ax = gfx.pl.deletion(deleted, key="alone", show=False)
    assert not points(ax, "0.6")
    assert not ax.texts
    np.testing.assert_allclose(diamonds(ax)[:, 0], gfx.get.deletion_df(deleted, key="alone")["shift_mean"])
    assert ax.get_xlabel() == "shift (1 - cosine)"
    assert entries(ax) == ["mean of the perturbed cells", "5th to 95th percentile of these cells"]


def test_deletion_says_where_a_perturbation_has_no_random_sets(deleted: ad.AnnData) -> None:
    adata = deleted.copy()
    first = gfx.get.deletion_df(adata)["perturbation"].iloc[0]
    random = adata.uns["gfx_delete"]["random_sets"]
    adata.uns["gfx_delete"]["random_sets"] = random[random["perturbation"] != first].reset_index(drop=True)
    table = adata.uns["gfx_delete"]["table"]
    table.loc[table["perturbation"] == first, ["random_mean", "z", "p"]] = np.nan
    ax = gfx.pl.deletion(adata, show=False)
    assert [text.get_text() for text in ax.texts][-1] == "no random sets"
    assert len(points(ax, "0.6")) == 2


@pytest.mark.parametrize("n", [1, 60])
def test_rows_and_names_of_one_and_of_many_deletions_have_room(deleted: ad.AnnData, n: int) -> None:
    adata = deleted.copy()
    result = adata.uns["gfx_delete"]
    names = [f"GENE-WITH-A-LONG-NAME{number}" for number in range(n)]
    result["table"] = pd.concat([result["table"].head(1)] * n, ignore_index=True).assign(perturbation=names)
    result["random_sets"] = pd.concat([result["random_sets"].assign(perturbation=name) for name in names])
    result["perturbations"] = names
    del adata.obsm["gfx_delete_parts"]
    adata.obsm["gfx_delete"] = np.tile(adata.obsm["gfx_delete"][:, :1], n)
    ax = gfx.pl.deletion(adata, show=False)
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert len(boxes) == n
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    assert all(ax.figure.bbox.containsx(box.x0) for box in boxes)
    assert not ax.get_legend().get_window_extent().overlaps(ax.bbox)
    assert 2.5 < ax.figure.get_figheight() < 15


def test_deletion_spread_is_that_of_cells_and_colour_the_mean_rank(deleted: ad.AnnData) -> None:
    ax = gfx.pl.deletion(deleted, cmap="magma", show=False)
    table, cells = gfx.get.deletion_df(deleted), gfx.get.deletion_cells_df(deleted)
    faces = [c.get_facecolor()[0] for c in ax.collections if c.get_zorder() == 3 and len(c.get_offsets())]
    for line, face, row in zip(intervals(ax), faces, table.itertuples(), strict=True):
        values = cells.loc[cells["perturbation"] == row.perturbation, "shift"]
        np.testing.assert_allclose(line, np.percentile(values, [5, 95]) - row.random_mean)
        np.testing.assert_allclose(face, mpl.colormaps["magma"](row.rank_mean))


def test_deletion_leaves_out_what_is_in_few_cells(deleted: ad.AnnData) -> None:
    with pytest.raises(ValueError, match="no perturbation was made in at least 1000 cells"):
        gfx.pl.deletion(deleted, min_cells=1000, show=False)


@pytest.mark.parametrize("n", [0, 3])
def test_deletion_draws_no_spread_where_no_perturbed_cell_is_left(deleted: ad.AnnData, n: int) -> None:
    """The means are those of the cells that were perturbed, though only others are left, or none."""
    others = deleted[deleted.obs["cell_type"] != "a"][:n].copy()
    ax = gfx.pl.deletion(others, key="by_state", show=False)
    assert np.isnan(intervals(ax)).all()
    np.testing.assert_array_equal(diamonds(ax), diamonds(gfx.pl.deletion(deleted, key="by_state", show=False)))


def test_synergy_draws_excess_interval_and_random_pairs(deleted: ad.AnnData) -> None:
    axes = gfx.pl.synergy(deleted, show=False)
    (row,) = gfx.get.synergy_df(deleted).itertuples()
    random = gfx.get.random_sets_df(deleted).query("perturbation == @row.perturbation")
    for ax, measure in zip(axes, ("on_shifts", "on_vectors"), strict=True):
        difference = random[f"{measure}_difference"]
        of_random = getattr(row, f"{measure}_mean") + difference.mean()
        np.testing.assert_allclose(diamonds(ax), [[-difference.mean(), 0]])
        (interval,) = intervals(ax)
        ends = np.array([getattr(row, f"{measure}_low"), getattr(row, f"{measure}_high")])
        np.testing.assert_allclose(interval, ends - of_random)
        (cloud,) = points(ax, "0.6")
        np.testing.assert_allclose(sorted(cloud[:, 0]), sorted(difference - difference.mean()))
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [f"{row.perturbation} ({row.n_cells})"]
    by_state = gfx.pl.synergy(deleted, key="by_state", min_cells=1, show=False)
    assert len(points(by_state[0], "0.6")[0]) == 6  # a random set once, not once a state


def test_synergy_errors(deleted: ad.AnnData) -> None:
    with pytest.raises(ValueError, match="no perturbation was made in at least 1000 cells"):
        gfx.pl.synergy(deleted, min_cells=1000)
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match="draws on 2 axes, found 1"):
        gfx.pl.synergy(deleted, ax=[ax])


@pytest.mark.parametrize(("key", "beside"), [(None, "random_shift"), ("alone", "n_cells")])
def test_gene_effects_are_drawn_against_random_perturbations(deleted: ad.AnnData, key: str | None, beside: str) -> None:
    name = gfx.get.deletion_df(deleted)["perturbation"].iloc[0]
    table = gfx.get.gene_effects_df(deleted, name, key=key)
    table = table[(table["shift"] > 0) & (table[beside] > 0)]
    chosen = table["gene"].iloc[[2, 5]].tolist()
    ax = gfx.pl.gene_effects(deleted, name, key=key, targets={"mine": [*chosen, "none"]}, n_top=3, show=False)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), table[[beside, "shift"]])
    np.testing.assert_allclose(
        ax.collections[1].get_offsets(), table.loc[table["gene"].isin(chosen), [beside, "shift"]]
    )
    assert [text.get_text() for text in ax.texts] == table["gene"].head(3).tolist()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == (["as the median gene"] if beside == "random_shift" else []) + ["mine (2)"]
    assert len(ax.lines) == (beside == "random_shift")
    with pytest.raises(KeyError, match="Did not find the perturbation 'X'"):
        gfx.pl.gene_effects(deleted, "X")
    with pytest.raises(ValueError, match="no gene is in at least 1000 cells"):
        gfx.pl.gene_effects(deleted, name, min_cells=1000)


def test_gene_effects_line_is_where_the_excess_is_0(deleted: ad.AnnData) -> None:
    table = gfx.get.gene_effects_df(deleted).dropna(subset="excess")
    for name, genes in table.groupby("perturbation"):
        (line,) = gfx.pl.gene_effects(deleted, name, show=False).lines
        at, usual = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        np.testing.assert_allclose([at.min(), at.max()], [genes["random_shift"].min(), genes["random_shift"].max()])
        assert usual[0] / at[0] == pytest.approx(usual[1] / at[1])  # straight in logarithms, too
        above = np.log2(genes["shift"] / (genes["random_shift"] * usual[0] / at[0]))
        np.testing.assert_allclose(above, genes["excess"], atol=1e-5)
        assert (above > 1e-5).sum() == pytest.approx((above < -1e-5).sum(), abs=1)


def drawn_band(ax: plt.Axes) -> np.ndarray:
    (band,) = [c for c in ax.collections if isinstance(c, mpl.collections.PolyCollection)]
    return band.get_paths()[0].vertices


def test_rank_trend_draws_random_genes_line_band_and_perturbations(deleted: ad.AnnData) -> None:
    axes = gfx.pl.rank_trend(deleted, show=False)
    sample, table = gfx.get.rank_trend_df(deleted), gfx.get.deletion_df(deleted)
    assert [ax.get_title() for ax in axes] == ["model", "random weights"]
    for ax, prefix in zip(axes, ("", "random_weights_"), strict=True):
        column, effect = f"{prefix}shift", f"{prefix}shift_mean"
        drawn = sample[sample[column] > 0]
        (cloud,) = [c for c in points(ax, "0.6") if len(c) > 3]
        np.testing.assert_allclose(cloud, drawn[["rank", column]])
        trend = sample.attrs[f"{prefix}trend"]
        (line,) = ax.lines
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        assert (x.min(), x.max()) == (0, 1)
        np.testing.assert_allclose(np.log(y), trend["intercept"] + trend["slope"] * x, rtol=1e-6)
        corners = drawn_band(ax)
        around = np.log(corners[:, 1]) - trend["intercept"] - trend["slope"] * corners[:, 0]
        np.testing.assert_allclose(abs(around), 2 * trend["sd"], rtol=1e-6)
        assert (around > 0).any()
        assert (around < 0).any()
        (marks,) = [c for c in ax.collections if c.get_zorder() == 3]
        np.testing.assert_allclose(marks.get_offsets(), table[["rank_mean", effect]])
        named = [text.get_text() for text in ax.texts]
        assert named == table["perturbation"].tolist()
        assert ax.get_yscale() == "log"
        assert "rank of the gene" in ax.get_xlabel()
    assert axes[0].get_ylabel() == "shift of the cell (1 - cosine)"


def test_rank_trend_with_states_draws_each_perturbation_once(deleted: ad.AnnData) -> None:
    for ax in gfx.pl.rank_trend(deleted, key="by_state", min_cells=1, show=False):
        (marks,) = [c for c in ax.collections if c.get_zorder() == 3]
        assert len(marks.get_offsets()) == 3


def test_rank_trend_leaves_out_what_is_in_few_cells(deleted: ad.AnnData) -> None:
    model, random = gfx.pl.rank_trend(deleted, min_cells=1000, show=False)
    for ax in (model, random):
        assert not [c for c in ax.collections if c.get_zorder() == 3 and len(c.get_offsets())]
        assert not ax.texts
        assert len(ax.lines) == 1


def test_rank_trend_where_no_cell_has_the_perturbed_genes(toy_cells, toy_model) -> None:
    adata = toy_cells(12)
    absent = adata.var_names[(np.asarray(adata.X.sum(axis=0)).ravel() == 0) & adata.var_names.str.startswith("TOY")]
    with pytest.warns(UserWarning, match="effects are NaN"):
        gfx.tl.delete_genes(adata, absent[0], model=toy_model, n_random=4)
    axes = gfx.pl.rank_trend(adata, min_cells=1, show=False)
    assert [len(diamonds(ax)) for ax in axes] == [0, 0]
    assert all(len(cloud) for ax in axes for cloud in points(ax, "0.6"))


def test_rank_trend_on_axes_given_and_errors(deleted: ad.AnnData) -> None:
    _, axes = plt.subplots(1, 3)
    assert gfx.pl.rank_trend(deleted, ax=axes[:2], show=False) == [axes[0], axes[1]]
    assert not axes[2].has_data()
    assert len(plt.get_fignums()) == 1
    with pytest.raises(ValueError, match="draws on 2 axes, found 3"):
        gfx.pl.rank_trend(deleted, ax=axes)
    with pytest.raises(KeyError, match=r"has no genes of all ranks, because that call ran without this control"):
        gfx.pl.rank_trend(deleted, key="alone")
    with pytest.raises(KeyError, match="Did not find 'other'"):
        gfx.pl.rank_trend(deleted, key="other")


def test_names_of_points_overlap_neither_each_other_nor_a_point() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0.4, 0.6, (2, 16))
    figure, ax = plt.subplots(figsize=(2, 1.4), layout="constrained")
    ax.scatter(x, 10**y)
    ax.set_yscale("log")
    ax.set_xlim(0, 1)
    label_points(ax, [f"GENE{at}" for at in range(16)], x, 10**y)
    figure.canvas.draw()
    boxes = [mpl.text.Text.get_window_extent(text) for text in ax.texts]
    assert 3 < len(boxes) < 16  # there is not room for all
    assert ax.texts[0].get_text() == "GENE0"
    assert not any(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[:at])
    assert not any(box.contains(*point) for box in boxes for point in ax.transData.transform(np.c_[x, 10**y]))
    for box in boxes:
        assert ax.bbox.containsx(box.x0)
        assert ax.bbox.containsx(box.x1)


def test_names_of_points_cover_no_unnamed_point() -> None:
    figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    label_points(ax, ["GENE"], np.array([0.5]), np.array([0.5]))
    figure.canvas.draw()
    first = mpl.text.Text.get_window_extent(ax.texts[0])
    inside = np.column_stack([np.linspace(first.x0, first.x1, 22), np.full(22, (first.y0 + first.y1) / 2)])[1:-1]
    label_points(ax, ["GENE"], np.array([0.5]), np.array([0.5]), others=ax.transData.inverted().transform(inside))
    figure.canvas.draw()
    second = mpl.text.Text.get_window_extent(ax.texts[1])
    assert not any(second.contains(*point) for point in inside)


def test_names_of_points_touch_no_edge_of_the_axes() -> None:
    """In the corners a name has to move inwards; one that is wider than the axes is left out, and no other for it."""
    _, ax = plt.subplots(figsize=(3, 3))
    ax.set(xlim=(0, 1), ylim=(0, 1))
    x, y = np.array([[0.5, 0.5], [0, 0], [0, 1], [1, 0], [1, 1], [0.01, 0.4]]).T
    ax.scatter(x, y)
    names = ["a name of many words, " * 5, "ISG15", "FTL", "IFITM3", "B2M", "FTH1"]
    label_points(ax, names, x, y)
    assert [text.get_text() for text in ax.texts] == names[1:]
    ax.figure.canvas.draw()
    for text in ax.texts:
        box = mpl.text.Text.get_window_extent(text)
        assert ax.bbox.x0 + 2 < box.x0 < box.x1 < ax.bbox.x1 - 2, text.get_text()
        assert ax.bbox.y0 + 2 < box.y0 < box.y1 < ax.bbox.y1 - 2, text.get_text()


def test_names_without_room_leave_that_of_a_point_apart() -> None:
    """Only names in the crowd are left out, the first of them last, wherever the others stand in the order."""
    _, ax = plt.subplots(figsize=(3, 3), layout="constrained")
    rng = np.random.default_rng(0)
    x, y = np.append(rng.uniform(0.2, 0.3, 30), 0.9), np.append(rng.uniform(0.2, 0.3, 30), 0.9)
    ax.scatter(x, y)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    label_points(ax, [f"name {number}" for number in range(31)], x, y)
    named = [text.get_text() for text in ax.texts]
    assert len(named) < 31
    assert "name 30" in named


def test_labels_of_deletion_are_not_upon_the_power_of_ten(deleted: ad.AnnData) -> None:
    ax = gfx.pl.deletion(deleted, key="by_state", min_cells=1, show=False)
    ax.figure.canvas.draw()
    power = ax.xaxis.get_offset_text()
    assert power.get_text()
    assert not power.get_window_extent().overlaps(ax.xaxis.label.get_window_extent())


def test_deletion_with_states_draws_the_goal_or_the_state_asked_for(deleted: ad.AnnData) -> None:
    given = {"key": "by_state", "min_cells": 1, "show": False}
    table = gfx.get.deletion_df(deleted, key="by_state", min_cells=1)
    for state in (None, "c"):
        ax = gfx.pl.deletion(deleted, state=state, **given)
        assert f"toward {state or 'b'}" in ax.get_xlabel()
        rows = table[table["state"] == (state or "b")]
        np.testing.assert_allclose(diamonds(ax)[:, 0], rows["toward_mean"] - rows["toward_random_mean"])
        random = gfx.get.random_sets_df(deleted, key="by_state").query("state == @state" if state else "state == 'b'")
        drawn = np.concatenate(points(ax, "0.6"))[:, 0]
        of_rows = random.groupby("perturbation")["toward_difference"]
        np.testing.assert_allclose(sorted(drawn), sorted(of_rows.transform(lambda values: values - values.mean())))
    with pytest.raises(KeyError, match="Did not find the state 'z'"):
        gfx.pl.deletion(deleted, key="by_state", state="z")
    with pytest.raises(KeyError, match="without states"):
        gfx.pl.deletion(deleted, state="b")


def test_deletion_draws_no_random_sets_where_none_were_run(deleted: ad.AnnData, toy_model) -> None:
    adata = gfx.tl.delete_genes(
        deleted,
        common_genes(deleted),
        model=toy_model,
        controls=None,
        groupby="cell_type",
        start="a",
        goal="b",
        copy=True,
    )
    ax = gfx.pl.deletion(adata, min_cells=1, show=False)
    table = gfx.get.deletion_df(adata, min_cells=1).query("role == 'goal'")
    np.testing.assert_allclose(diamonds(ax)[:, 0], table["toward_mean"])
    assert not points(ax, "0.6")
    assert not any(text.get_text() for text in ax.texts)


def test_deletion_draws_on_the_axes_given_and_keeps_to_n_top(deleted: ad.AnnData) -> None:
    figure, axes = plt.subplots(1, 2)
    assert gfx.pl.deletion(deleted, ax=axes[1], n_top=1, show=False) is axes[1]
    assert len(axes[1].get_yticklabels()) == 1
    assert not axes[0].has_data()
    assert len(plt.get_fignums()) == 1
    assert axes[1].get_figure() is figure


def test_the_bar_of_colours_is_not_upon_z_and_p_in_a_figure_of_the_users(deleted: ad.AnnData) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    gfx.pl.deletion(deleted, ax=axes[0])
    figure.draw_without_rendering()
    (bar,) = set(figure.axes) - set(axes)
    assert axes[0].texts
    assert not any(text.get_window_extent().overlaps(bar.bbox) for text in axes[0].texts)


def test_plots_leave_the_object_alone(deleted: ad.AnnData) -> None:
    before = deleted.copy()
    gfx.pl.deletion(deleted, show=False)
    assert sorted(deleted.uns) == sorted(before.uns)
    np.testing.assert_array_equal(deleted.obsm["gfx_delete"], before.obsm["gfx_delete"])


@pytest.mark.parametrize(
    ("plot", "call"),
    [("deletion", "gfx.tl.delete_genes"), ("screen", "gfx.tl.screen_genes"), ("attention", "gfx.tl.attention")],
)
def test_without_a_result_the_error_names_the_call(toy_cells, plot: str, call: str) -> None:
    with pytest.raises(KeyError, match=call):
        getattr(gfx.pl, plot)(toy_cells(6))


# --- screens --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def screened(toy_cells, toy_model) -> ad.AnnData:
    """With some genes that stand out, which random weights make of nothing."""
    adata = toy_cells()
    gfx.tl.screen_genes(adata, model=toy_model, groupby="cell_type")
    gfx.tl.screen_genes(
        adata, model=toy_model, groupby="cell_type", start="a", goal="b", controls=None, key_added="mine"
    )
    genes = adata.varm["gfx_screen"]
    common = genes.index[genes["n_cells"] >= 20]
    adata.varm["gfx_screen"].loc[common[:30], "shift_excess"] = (np.linspace(1, 2, 30) * (-1) ** np.arange(30)).astype(
        np.float32
    )
    adata.var["names"] = [f"the {name}" for name in adata.var_names]
    return adata


def grey(ax: plt.Axes) -> np.ndarray:
    """Genes within the band."""
    (cloud,) = points(ax, "0.7")
    return cloud


def coloured(ax: plt.Axes) -> tuple[np.ndarray, np.ndarray]:
    """Genes beyond the band: rare ones, with faces, and others, without."""
    edged = [c for c in ax.collections if len(c.get_edgecolor()) and np.allclose(c.get_edgecolor()[:, :3], RED)]
    clouds = {bool(len(c.get_facecolor())): np.asarray(c.get_offsets()) for c in edged}
    return clouds.get(True, np.zeros((0, 2))), clouds.get(False, np.zeros((0, 2)))


RED = mpl.colors.to_rgb("C3")


def in_order(points: np.ndarray) -> np.ndarray:
    return points[np.lexsort(np.transpose(points))]


@pytest.mark.parametrize(("key", "effect"), [(None, "shift"), ("mine", "toward"), ("mine", "shift")])
def test_screen_draws_every_gene_and_colours_those_beyond_the_band(
    screened: ad.AnnData, key: str | None, effect: str
) -> None:
    (ax,) = gfx.pl.screen(screened, key=key, effect=None if key is None else effect, min_cells=5, n_names=0, show=False)
    table = gfx.get.screen_df(screened, key=key, min_cells=5)
    excess = f"{effect}_excess"
    z = table[f"{effect}_z"].abs()
    np.testing.assert_allclose(in_order(grey(ax)), in_order(table.loc[~(z > 3), ["rank_mean", excess]].to_numpy()))
    rare = (z > 3) & (table.get(f"{effect}_fdr", z * np.nan) <= 0.1)
    filled, open_ = coloured(ax)
    np.testing.assert_allclose(in_order(filled), in_order(table.loc[rare, ["rank_mean", excess]].to_numpy()))
    np.testing.assert_allclose(in_order(open_), in_order(table.loc[(z > 3) & ~rare, ["rank_mean", excess]].to_numpy()))
    assert (len(filled) > 0) == (key is None)
    assert len(open_) + len(filled) == (z > 3).sum() > 0
    told = ["z-score within ±3", "usual range at this rank", "z-score beyond ±3", "beyond ±3 and FDR ≤ 0.1"]
    assert entries(ax) == told[: 4 if key is None else 3]  # without a random-weights model there is no FDR
    assert ax.get_title() == ("all cells" if key is None else "a")
    assert ("toward b" in ax.get_ylabel()) == (effect == "toward")


def test_screen_draws_the_band_along_the_rank(screened: ad.AnnData) -> None:
    (ax,) = gfx.pl.screen(screened, key="mine", min_cells=5, n_names=0, show=False)
    table = gfx.get.screen_df(screened, key="mine")  # rarer genes have no limits
    x, y = drawn_band(ax).T
    assert (x.min(), x.max()) == pytest.approx((table["rank_mean"].min(), table["rank_mean"].max()))
    assert table["toward_low"].min() <= y.min() < y.max() <= table["toward_high"].max()
    # Half of the limits lie beyond it, half within, as for a median along the rank.
    high = {at: y[x == at].max() for at in x}
    above = np.mean([row.toward_high > high[row.rank_mean] for row in table.itertuples()])
    assert 0.3 < above < 0.7


def test_screen_names_the_farthest(screened: ad.AnnData) -> None:
    (ax,) = gfx.pl.screen(screened, n_names=6, names="names", show=False)
    table = gfx.get.screen_df(screened, names="names")
    farthest = table.loc[table["shift_z"].abs().sort_values(ascending=False).index[:6], "gene"].tolist()
    named = [text.get_text() for text in ax.texts]
    assert 3 <= len(named) <= 6
    assert set(named) <= set(farthest)
    assert named[0] == farthest[0]
    boxes = [mpl.text.Text.get_window_extent(text) for text in ax.texts]
    assert all(ax.bbox.x0 < box.x0 < box.x1 < ax.bbox.x1 for box in boxes)
    assert all(ax.bbox.y0 < box.y0 < box.y1 < ax.bbox.y1 for box in boxes)
    every = ax.transData.transform(np.concatenate(coloured(ax)))
    assert len(every) > 6  # also those without a name are not covered
    assert not any(box.contains(*point) for box in boxes for point in every)
    (ax,) = gfx.pl.screen(screened, n_names=0, show=False)
    assert not ax.texts


def test_screen_of_groups(screened: ad.AnnData) -> None:
    chosen = {"min_cells": 5, "n_names": 0, "show": False}
    axes = gfx.pl.screen(screened, ["a", "c"], **chosen)
    assert [ax.get_title() for ax in axes] == ["a", "c"]
    for ax, group in zip(axes, "ac", strict=True):
        table = gfx.get.screen_df(screened, group, min_cells=5)
        drawn = np.concatenate([grey(ax), *coloured(ax)])
        np.testing.assert_allclose(in_order(drawn), in_order(table[["rank_mean", "shift_excess"]].to_numpy()))
    _, given = plt.subplots(1, 3)
    assert gfx.pl.screen(screened, "b", ax=given[1], **chosen) == [given[1]]
    assert gfx.pl.screen(screened, ["a", "c"], ax=given[:2], **chosen) == [given[0], given[1]]
    assert not given[2].has_data()


def test_screen_of_many_groups_has_rows_of_panels(screened: ad.AnnData) -> None:
    axes = gfx.pl.screen(screened, ["a", "b", "c", "a", "b"], min_cells=5, n_names=0, show=False)
    assert [ax.get_subplotspec().rowspan.start for ax in axes] == [0, 0, 0, 1, 1]
    assert [bool(ax.get_ylabel()) for ax in axes] == [True, False, False, True, False]
    assert axes[0].figure.get_figwidth() < 16


def test_screen_of_groups_that_are_numbers(screened: ad.AnnData) -> None:
    adata = screened.copy()
    adata.uns["gfx_screen"]["groups"] = ["0", "1", "2"]
    for groups, titles in ((0, ["0"]), ("1", ["1"]), ([0, 2], ["0", "2"])):
        axes = gfx.pl.screen(adata, groups, min_cells=5, n_names=0, show=False)
        assert [ax.get_title() for ax in axes] == titles


def test_screen_errors(screened: ad.AnnData) -> None:
    with pytest.raises(KeyError, match=r"Did not find the effect 'toward'. Present: \['shift'\]"):
        gfx.pl.screen(screened, effect="toward")
    with pytest.raises(KeyError, match="Did not find the group 'x'"):
        gfx.pl.screen(screened, ["a", "x"])
    with pytest.raises(ValueError, match="no gene is in at least 1000 cells"):
        gfx.pl.screen(screened, min_cells=1000)
    _, axes = plt.subplots(1, 3)
    with pytest.raises(ValueError, match="draws on 2 axes, found 3"):
        gfx.pl.screen(screened, ["a", "b"], ax=axes)


# --- effects against their false discovery rate ---------------------------------------------------------------------


def drawn_points(ax: plt.Axes) -> np.ndarray:
    return in_order(np.concatenate([cloud.get_offsets() for cloud in ax.collections]))


def test_volcano_draws_each_gene_of_a_screen_that_has_an_fdr(screened: ad.AnnData) -> None:
    ax = gfx.pl.volcano(screened, key="gfx_screen", min_cells=5, fdr=0.2, show=False)
    table = gfx.get.screen_df(screened, key="gfx_screen", min_cells=5).dropna(subset="shift_fdr")
    expected = np.column_stack([table["shift_excess"], -np.log10(table["shift_fdr"])])
    np.testing.assert_allclose(drawn_points(ax), in_order(expected))
    (cloud,) = [c for c in ax.collections if len(c.get_offsets())]
    hits = table["shift_fdr"] <= 0.2
    for colour, of_colour in (
        ("C3", hits & (table["shift_excess"] > 0)),
        ("C0", hits & (table["shift_excess"] < 0)),
        ("0.6", ~hits),
    ):
        is_colour = (cloud.get_facecolor()[:, :3] == mpl.colors.to_rgb(colour)).all(axis=1)
        assert is_colour.sum() == of_colour.sum() > 0
    assert entries(ax) == ["FDR 0.2"]
    (line,) = [line for line in ax.lines if line.get_label() == "FDR 0.2"]
    assert line.get_ydata()[0] == pytest.approx(-np.log10(0.2))
    named = {text.get_text() for text in ax.texts}
    smallest = table.assign(size=-table["shift_excess"].abs()).sort_values(["shift_fdr", "size"]).head(15)
    assert named
    assert named <= set(smallest["gene"])
    height = ax.transData.transform((0, -np.log10(0.2)))[1]  # the dashed line goes through no name
    boxes = [mpl.text.Text.get_window_extent(text).padded(-1) for text in ax.texts]
    assert not any(box.y0 < height < box.y1 for box in boxes)
    assert ax.get_xlabel() == "excess shift over genes of similar rank (1 - cosine)"


@pytest.mark.parametrize(("key", "effect"), [("gfx_delete", None), ("by_state", "toward"), ("by_state", "shift")])
def test_volcano_of_perturbations(deleted: ad.AnnData, key: str, effect: str | None) -> None:
    ax = gfx.pl.volcano(deleted, key=key, effect=effect, min_cells=1, show=False)
    table = gfx.get.deletion_df(deleted, key=key, min_cells=1)
    table = table[table["role"] == "goal"] if "role" in table else table
    measure, prefix = ("toward", "toward_") if effect == "toward" else ("shift", "")
    excess = table[f"{measure}_mean"] - table[f"{prefix}random_mean"]
    expected = np.column_stack([excess, -np.log10(table[f"{prefix}fdr"])])
    np.testing.assert_allclose(drawn_points(ax), in_order(expected))
    assert {text.get_text() for text in ax.texts} <= set(table["perturbation"])
    toward = " toward b" if effect == "toward" else ""
    assert ax.get_xlabel().startswith(f"excess shift{toward} over random sets (")


def test_volcano_draws_an_fdr_of_0_as_a_triangle_above_all(
    screened: ad.AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = gfx.get.screen_df(screened, key="gfx_screen").dropna(subset="shift_fdr")
    table.loc[table.index[:2], "shift_fdr"] = 0.0
    monkeypatch.setattr("gfx.pl._screen.screen_df", lambda *_, **__: table)
    ax = gfx.pl.volcano(screened, key="gfx_screen", show=False)
    points, triangles = [np.asarray(c.get_offsets()) for c in ax.collections if len(c.get_offsets())]
    assert (len(points), len(triangles)) == (len(table) - 2, 2)
    assert triangles[:, 1].min() > points[:, 1].max()
    assert np.isfinite(triangles).all()
    assert entries(ax) == ["FDR too small for a number", "FDR 0.1"]


def test_volcano_errors(screened: ad.AnnData, deleted: ad.AnnData) -> None:
    with pytest.raises(KeyError, match="Did not find 'other'"):
        gfx.pl.volcano(deleted, key="other")
    with pytest.raises(ValueError, match="no gene has an FDR"):
        gfx.pl.volcano(screened, key="mine")
    with pytest.raises(ValueError, match="no gene has an FDR"):
        gfx.pl.volcano(deleted, key="alone")
    with pytest.raises(ValueError, match=r"`gfx.tl.delete_genes` has no groups"):
        gfx.pl.volcano(deleted, "a", key="gfx_delete")
    with pytest.raises(KeyError, match="Did not find the effect 'toward'"):
        gfx.pl.volcano(deleted, effect="toward", key="gfx_delete")
