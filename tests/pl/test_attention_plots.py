"""Plots of attention: every mark is a number of the table that it shows."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pytest

import gfx
from gfx.pl._attention import _n_columns, _tick_powers_of_2

if TYPE_CHECKING:
    import anndata as ad


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def attended(toy_cells, toy_model) -> ad.AnnData:
    adata = toy_cells()
    gfx.tl.attention(adata, model=toy_model, groupby="cell_type", genes=[f"TOY{number}" for number in range(1, 40)])
    gfx.tl.attention(adata, model=toy_model, deleted="TOY3", key_added="without")
    return adata


KEY = "gfx_attention"


def test_attention_heatmap_and_profiles_show_the_tables(attended: ad.AnnData) -> None:
    heads, ranks = gfx.pl.attention(attended, min_cells=1, show=False)
    table = gfx.get.attention_heads_df(attended)
    image = heads.get_images()[0].get_array()
    for row in table.itertuples():
        assert image[row.layer - 1, row.head - 1] == pytest.approx(row.entropy)
    n_layers, n_heads = image.shape
    # A line per head, one per layer, and the dotted line of even attention.
    assert len(ranks.lines) == n_layers * n_heads + n_layers + 1
    first = gfx.get.attention_ranks_df(attended).query("layer == 1 and head == 1 and rank == 1")["ratio"].item()
    assert ranks.lines[0].get_ydata()[0] == pytest.approx(first)
    told = [text.get_text() for text in ranks.get_legend().get_texts()]
    assert told == [
        *(f"layer {layer}, mean" for layer in range(1, n_layers + 1)),
        "a head of a layer",
        "uniform attention",
    ]


def test_ticks_of_ratios_are_powers_of_2_written_as_fractions(attended: ad.AnnData) -> None:
    ranks = gfx.pl.attention(attended, show=False)[1]
    for limits, expected in (
        ((1 / 300, 20), ["1/256", "1/64", "1/16", "1/4", "1", "4", "16"]),
        ((0.4, 3), ["1/2", "1", "2"]),
    ):
        ranks.set_ylim(*limits)
        _tick_powers_of_2(ranks)
        assert [label.get_text() for label in ranks.get_yticklabels()] == expected
        np.testing.assert_allclose(ranks.get_yticks(), [eval(text) for text in expected])
        assert not len(ranks.get_yticks(minor=True))


def test_labels_of_attention_do_not_collide(attended: ad.AnnData) -> None:
    axes = gfx.pl.attention(attended, show=False)
    figure = axes[0].figure
    figure.draw_without_rendering()
    bar = next(ax for ax in figure.axes if ax not in axes)
    room = [ax.get_tightbbox() for ax in (*axes, bar)]
    assert not any(box.overlaps(other) for number, box in enumerate(room) for other in room[:number])


def test_attention_wants_two_axes(attended: ad.AnnData) -> None:
    _, axes = plt.subplots(1, 3)
    with pytest.raises(ValueError, match="draws on 2 axes, found 3"):
        gfx.pl.attention(attended, ax=axes)
    assert gfx.pl.attention(attended, ax=axes[:2], min_cells=1, show=False) == [axes[0], axes[1]]
    with pytest.raises(ValueError, match="no rank is in at least 1000 cells"):
        gfx.pl.attention(attended, min_cells=1000)


@pytest.mark.parametrize("statistic", [None, "distance", "special"])
def test_matrix_of_heads_shows_the_table(attended: ad.AnnData, statistic: str | None) -> None:
    (ax,) = gfx.pl.attention_heads(attended, statistic=statistic, group="a", show=False, key=KEY)
    table = gfx.get.attention_heads_df(attended, group="a", key=KEY)
    image = ax.get_images()[0].get_array()
    for row in table.itertuples():
        assert image[row.layer - 1, row.head - 1] == pytest.approx(getattr(row, statistic or "entropy"))
    assert len(ax.texts) == len(table)


def test_heads_that_attend_to_a_set_are_framed(attended: ad.AnnData) -> None:
    adata = attended.copy()
    adata.varm[KEY] = adata.varm[KEY].copy()
    favoured = [f"TOY{number}" for number in range(1, 30)]
    adata.varm[KEY][adata.var_names.get_indexer(favoured), 2] *= 100  # the first head of the second layer
    sets = {"favoured": favoured, "others": [f"TOY{number}" for number in range(60, 90)]}
    axes = gfx.pl.attention_heads(adata, gene_sets=sets, show=False, min_cells=3, key=KEY)
    table = gfx.get.attention_heads_df(adata, gene_sets=sets, min_cells=3, key=KEY)
    assert [ax.get_title() for ax in axes] == list(sets)
    for ax, name in zip(axes, sets, strict=True):
        of_set = table[table["gene_set"] == name]
        image = ax.get_images()[0].get_array()
        for row in of_set.itertuples():
            assert image[row.layer - 1, row.head - 1] == pytest.approx(row.auc_matched)
        framed = {(round(patch.get_y() + 1.48), round(patch.get_x() + 1.48)) for patch in ax.patches}
        assert framed == set(of_set.loc[of_set["remains"], ["layer", "head"]].itertuples(index=False, name=None))
    (told,) = axes[-1].get_legend().get_texts()  # what a frame means
    assert told.get_text() == "beyond matched genes\nand random weights"
    assert (2, 1) in {(round(patch.get_y() + 1.48), round(patch.get_x() + 1.48)) for patch in axes[0].patches}


@pytest.mark.parametrize("layers", [None, [2], [3, 1]])
def test_maps_of_bands_show_logarithms_of_ratios(attended: ad.AnnData, layers: list[int] | None) -> None:
    axes = gfx.pl.attention_bands(attended, layers=layers, min_positions=1, show=False, key=KEY)
    table = gfx.get.attention_bands_df(attended, key=KEY)
    assert [ax.get_title() for ax in axes] == [f"network layer {layer}" for layer in layers or (1, 2, 3)]
    for ax, layer in zip(axes, layers or (1, 2, 3), strict=True):
        image = ax.get_images()[0].get_array()
        names = [label.get_text() for label in ax.get_yticklabels()]
        assert names == [label.get_text() for label in ax.get_xticklabels()]
        for (gives, receives), rows in table[table["layer"] == layer].groupby(["gives", "receives"]):
            expected = np.log2(rows["attention"].mean() / rows["uniform"].mean())
            assert image[names.index(gives), names.index(receives)] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("min_positions", [1, 1000])
def test_labels_of_few_bands_have_room(attended: ad.AnnData, min_positions: int) -> None:
    axes = gfx.pl.attention_bands(attended, layers=[1, 2], min_positions=min_positions, key=KEY, show=False)
    figure = axes[0].figure
    figure.draw_without_rendering()
    extents = [axes[0].yaxis.label.get_window_extent(), *(ax.xaxis.label.get_window_extent() for ax in axes)]
    assert not any(box.overlaps(other) for number, box in enumerate(extents) for other in extents[:number])
    assert all(figure.bbox.contains(*corner) for box in extents for corner in (box.min, box.max))


def test_four_panels_stand_in_two_rows() -> None:
    assert [_n_columns(n) for n in (1, 2, 3, 4, 6, 12)] == [1, 2, 3, 2, 3, 6]


@pytest.mark.parametrize("sort_by", ["attention", "ratio"])
@pytest.mark.parametrize("network", [False, True])
def test_neighbors_are_listed_with_what_ranks_make_expect(attended, sort_by: str, network: bool) -> None:
    how = {"n": 6, "sort_by": sort_by, "min_cells": 5, "network": network, "key": KEY}
    axes = gfx.pl.attention_neighbors(attended, "TOY5", show=False, **how)
    table = gfx.get.attention_pairs_df(attended, genes="TOY5", key=KEY)
    table = table[(table["attends_to"] != "TOY5") & (table["n_cells"] >= 5)].nlargest(6, sort_by)
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    assert names == table["attends_to"].tolist()
    expected, attention = (np.asarray(cloud.get_offsets()) for cloud in axes[0].collections[1:])
    np.testing.assert_allclose(expected[:, 0], table["expected"])
    np.testing.assert_allclose(attention[:, 0], table["attention"])
    assert len(axes) == 1 + network
    if network:
        assert {text.get_text() for text in axes[1].texts} == {"TOY5", *names}


def test_ticks_of_neighbors_do_not_collide(attended: ad.AnnData) -> None:
    (ax,) = gfx.pl.attention_neighbors(attended, "TOY3", n=2, min_cells=1, key=KEY, show=False)
    ax.figure.draw_without_rendering()
    extents = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert len(extents) >= 3
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(extents))


@pytest.mark.parametrize(
    "how", [{"group": "a", "reference": "b", "key": KEY}, {"key": "without"}], ids=["groups", "deletion"]
)
def test_differences_are_drawn_with_their_intervals(attended: ad.AnnData, how: dict) -> None:
    ax = gfx.pl.attention_difference(attended, n=8, min_cells=5, show=False, **how)
    table = gfx.get.attention_difference_df(attended, min_cells=5, **how)
    nearer = np.where(table["difference"] > 0, table["low"], -table["high"])
    table = table.iloc[np.argsort(-nearer, kind="stable")[:8]]
    labels = [label.get_text().split() for label in ax.get_yticklabels()]
    assert labels == [[row.gene, f"{row.layer}.{row.head}"] for row in table.itertuples()]
    lines, dots = ax.collections
    np.testing.assert_allclose(np.asarray(dots.get_offsets())[:, 0], table["difference"])
    ends = np.array([segment[:, 0] for segment in lines.get_segments()])
    np.testing.assert_allclose(ends, table[["low", "high"]])
    assert ("a - b" in ax.get_xlabel()) == ("group" in how)
    assert "over cells" in ax.get_xlabel()


def test_what_cannot_be_drawn_is_named(attended: ad.AnnData) -> None:
    with pytest.raises(ValueError, match=r"`statistic` is one of .*without `gene_sets`, found 'auc'"):
        gfx.pl.attention_heads(attended, statistic="auc", key=KEY)
    with pytest.raises(ValueError, match=r"`layers` are of \[1, 2, 3\], found \[4\]"):
        gfx.pl.attention_bands(attended, layers=[4], key=KEY)
    with pytest.raises(ValueError, match="no band of ranks has 1000000 positions"):
        gfx.pl.attention_bands(attended, min_positions=1_000_000, key=KEY)
    with pytest.raises(ValueError, match="attends to no other gene in 1000 cells"):
        gfx.pl.attention_neighbors(attended, "TOY5", min_cells=1000, key=KEY)
    with pytest.raises(ValueError, match="`sort_by` is 'attention' or 'ratio'"):
        gfx.pl.attention_neighbors(attended, "TOY5", sort_by="n_cells", key=KEY)
    with pytest.raises(ValueError, match="no gene has an interval with 1000 cells"):
        gfx.pl.attention_difference(attended, group="a", reference="b", min_cells=1000, key=KEY)
