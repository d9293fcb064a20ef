"""Plots of learnt classes show what the tables hold: asserted on the artists, not on pixels."""

from __future__ import annotations

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

LABELS = {"labels": ["tolerant", "sensitive"]}
CELLS = {"cell_type": ["a", "b", "c"], "condition": ["sick", "healthy"]}
THREE = {"role": ["kinase", "receptor", "ligand"]}
DRAWN = {"model": "C3", "random weights": "0.6", "expression": "C0"}


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def genes(toy_cells, classified) -> ad.AnnData:
    adata = classified(toy_cells(), "tl.classify_genes", tasks=LABELS)
    adata.var["names"] = [f"the {name}" for name in adata.var_names]
    return adata


@pytest.fixture(scope="module")
def cells(toy_cells, classified) -> ad.AnnData:
    return classified(toy_cells(), "tl.classify_cells", tasks=CELLS)


@pytest.fixture(scope="module")
def predicted(toy_cells, classified) -> ad.AnnData:
    return classified(toy_cells(), "tl.predict_genes", tasks=LABELS, groups=["first", "second"])


def lines(ax: plt.Axes) -> dict[str, mpl.lines.Line2D]:
    """Lines by the method that the legend names; figures behind it are left out."""
    found = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    return {label.rstrip("0123456789.–() "): line for label, line in found.items()}


def bands(ax: plt.Axes) -> list[np.ndarray]:
    """Corners of bands, in the order of drawing."""
    return [band.get_paths()[0].vertices for band in ax.collections]


def band_at(band: np.ndarray, x: float) -> tuple[float, float]:
    heights = band[np.isclose(band[:, 0], x), 1]
    return heights.min(), heights.max()


def legend(ax: plt.Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


# --- ROC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [None, "gene", "occurrence"])
def test_roc_draws_mean_curves_with_their_spread(genes: ad.AnnData, unit: str | None) -> None:
    ax = gfx.pl.roc(genes, unit=unit, show=False)
    table = gfx.get.roc_df(genes).query("unit == @unit" if unit else "unit == 'gene'")
    found = lines(ax)
    assert list(found) == list(DRAWN)
    assert len(ax.lines) == len(found) + 1
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0, 0], [1, 1]])  # chance, in the place of the majority
    for (method, colour), band in zip(DRAWN.items(), bands(ax), strict=True):
        line = found[method]
        assert mpl.colors.same_color(line.get_color(), colour)
        of_method = table[table["method"] == method.replace(" ", "_")]
        curves = np.stack([one["tpr"].to_numpy() for _, one in of_method.groupby(["repeat", "fold"])])
        assert curves.shape == (15, 101)
        np.testing.assert_allclose(line.get_xdata(), np.linspace(0, 1, 101))
        np.testing.assert_allclose(line.get_ydata(), curves.mean(axis=0))
        sd = curves.std(axis=0, ddof=1)[30]
        assert band_at(band, 0.3) == pytest.approx((curves.mean(axis=0)[30] - sd, curves.mean(axis=0)[30] + sd))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("false positive rate", "true positive rate")
    assert ax.get_title() == "sensitive against all others"


def test_roc_has_the_auc_of_the_summary_in_its_legend(genes: ad.AnnData) -> None:
    # Occurrences of a gene are no replicates and have no interval.
    aucs = gfx.get.classification_df(genes).query("metric == 'auc'").set_index(["unit", "method"])
    intervals = {at: f" ({row.low:.2f}–{row.high:.2f})" for at, row in aucs.iterrows() if at[0] == "gene"}
    assert aucs.loc["gene", ["low", "high"]].notna().all(axis=None)
    for unit in ("gene", "occurrence"):
        table = aucs.loc[unit]
        ax = gfx.pl.roc(genes, unit=unit, show=False)
        assert ax.get_legend().get_title().get_text() == ("AUC (95 % interval)" if unit == "gene" else "AUC")
        assert legend(ax) == [
            f"{name} {table.at[method, 'mean']:.2f}" + intervals.get((unit, method), "")
            for name, method in (
                ("model", "model"),
                ("random weights", "random_weights"),
                ("expression", "expression"),
            )
        ]
    one = genes.copy()
    one.uns["gfx_gene_class"]["summary"][["low", "high"]] = np.nan
    ax = gfx.pl.roc(one, show=False)
    assert all("(" not in text and text[-1].isdigit() for text in legend(ax))
    assert ax.get_legend().get_title().get_text() == "AUC"


def test_roc_of_one_curve_has_no_band(genes: ad.AnnData) -> None:
    adata = genes.copy()
    adata.uns["gfx_gene_class"]["roc"] = genes.uns["gfx_gene_class"]["roc"].query("repeat == 0 and fold == 0")
    ax = gfx.pl.roc(adata, show=False)
    assert not bands(ax)
    assert len(lines(ax)) == 3


def test_roc_of_several_classes(cells: ad.AnnData) -> None:
    table = gfx.get.roc_df(cells).query("task == 'cell_type' and method == 'model'")
    ax = gfx.pl.roc(cells, task="cell_type", show=False)
    curves = np.stack([one.groupby("fpr")["tpr"].mean() for _, one in table.groupby(["repeat", "fold"])])
    np.testing.assert_allclose(lines(ax)["model"].get_ydata(), curves.mean(axis=0))
    sd = curves.std(axis=0, ddof=1)[30]
    low, high = band_at(bands(ax)[0], 0.3)
    assert high - low == pytest.approx(2 * sd)
    assert ax.get_title() == "mean of 3 classes"
    auc = (
        gfx.get.classification_df(cells)
        .query("task == 'cell_type' and metric == 'auc'")
        .set_index("method")
        .loc["model"]
    )
    assert legend(ax)[0] == f"model {auc['mean']:.2f} ({auc['low']:.2f}–{auc['high']:.2f})"
    ax = gfx.pl.roc(cells, task="cell_type", class_name="b", show=False)
    expected = table[table["class"] == "b"].groupby("fpr")["tpr"].mean()
    np.testing.assert_allclose(lines(ax)["model"].get_ydata(), expected)
    assert ax.get_title() == "b against all others"
    assert legend(ax) == list(DRAWN)  # the AUC of the summary is over all classes
    assert not ax.get_legend().get_title().get_text()
    assert gfx.pl.roc(cells, task="condition", show=False).get_title() == "healthy against all others"


def test_roc_errors(genes: ad.AnnData, cells: ad.AnnData) -> None:
    with pytest.raises(
        KeyError, match=r"several values of 'task'; choose one with `task=`: \['cell_type', 'condition'\]"
    ):
        gfx.pl.roc(cells)
    with pytest.raises(KeyError, match=r"Did not find the task 'x'. Present: \['cell_type', 'condition'\]"):
        gfx.pl.roc(cells, task="x")
    with pytest.raises(KeyError, match=r"Did not find the unit 'cell'. Present: \['gene', 'occurrence'\]"):
        gfx.pl.roc(genes, unit="cell")
    with pytest.raises(KeyError, match=r"Did not find the class 'tolerant'. Present: \['sensitive'\]"):
        gfx.pl.roc(genes, class_name="tolerant")


# --- confusion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["model", "expression"])
def test_confusion_draws_the_shares_of_the_true_class(cells: ad.AnnData, method: str) -> None:
    ax = gfx.pl.confusion(cells, task="cell_type", method=method, show=False)
    table = gfx.get.confusion_df(cells).query("task == 'cell_type' and method == @method")
    image = ax.get_images()[0].get_array()
    classes = CELLS["cell_type"]
    for row in table.itertuples():
        assert image[classes.index(row.true), classes.index(row.predicted)] == pytest.approx(row.share)
    np.testing.assert_allclose(image.sum(axis=1), 1)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first class is on top
    assert [label.get_text() for label in ax.get_xticklabels()] == classes
    n = table.groupby("true")["n"].sum()
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"{name} ({n[name]:,.0f})" for name in classes]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class (cells)")
    written = {tuple(text.get_position()): text.get_text() for text in ax.texts}
    assert written == {
        (classes.index(row.predicted), classes.index(row.true)): f"{row.share:.2f}"
        for row in table.itertuples()
        if row.share > 0
    }
    assert len(written) == 8  # one pair never occurs
    assert ax.get_images()[0].get_clim() == (0, 1)


def test_confusion_is_grey_for_an_empty_class(cells: ad.AnnData) -> None:
    adata = cells.copy()
    pairs = adata.uns["gfx_cell_class"]["confusion"]
    pairs.loc[pairs["true"] == "b", "n"] = 0
    ax = gfx.pl.confusion(adata, task="cell_type", show=False)
    image = ax.get_images()[0]
    assert np.ma.getmaskarray(image.get_array()).tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert mpl.colors.same_color(image.get_cmap().get_bad(), "lightgray")
    assert ax.get_yticklabels()[1].get_text() == "b (0)"


def test_confusion_of_many_classes_writes_no_shares(toy_cells, classified) -> None:
    names = {"cell_type": [f"a long name of type {at}" for at in range(15)]}
    adata = classified(toy_cells(), "tl.classify_cells", tasks=names)
    ax = gfx.pl.confusion(adata, show=False)
    assert not ax.texts
    ax.figure.canvas.draw()
    page = ax.figure.bbox
    for label in [*ax.get_xticklabels(), *ax.get_yticklabels(), ax.xaxis.label, ax.yaxis.label]:
        box = label.get_window_extent()
        assert page.x0 <= box.x0 < box.x1 <= page.x1, label.get_text()
        assert page.y0 <= box.y0 < box.y1 <= page.y1, label.get_text()


def test_confusion_errors(genes: ad.AnnData, cells: ad.AnnData) -> None:
    with pytest.raises(KeyError, match=r"Did not find the method 'pca'. Present: \['expression', 'majority', 'model'"):
        gfx.pl.confusion(genes, method="pca")
    with pytest.raises(KeyError, match=r"choose one with `task=`: "):
        gfx.pl.confusion(cells)


# --- scores of genes ------------------------------------------------------------------------------------------------


def clouds(ax: plt.Axes) -> list[tuple[str, np.ndarray]]:
    """Colour and places of points, without those that only the legend has."""
    return [
        (mpl.colors.to_hex(cloud.get_facecolor()[0]), np.asarray(cloud.get_offsets()))
        for cloud in ax.collections
        if len(cloud.get_offsets())
    ]


def named(ax: plt.Axes) -> dict[str, np.ndarray]:
    """Names, and the points that they belong to."""
    return {text.get_text(): np.array(text.xy) for text in ax.texts}


@pytest.mark.parametrize("class_name", [None, "tolerant"])
def test_gene_scores_has_a_strip_a_label(genes: ad.AnnData, class_name: str | None) -> None:
    ax = gfx.pl.gene_scores(genes, class_name=class_name, n_names=3, show=False)
    table = gfx.get.gene_scores_df(genes)
    score = f"score_{class_name or 'sensitive'}"
    table["right"] = table["label"] == table["predicted"]
    everywhere = clouds(ax)
    assert sum(len(points) for _, points in everywhere) == len(table)
    expected_names = set()
    for strip, label in enumerate(LABELS["labels"]):
        for right, colour in ((True, "0.6"), (False, "C3")):
            (points,) = [
                points
                for found, points in everywhere
                if found == mpl.colors.to_hex(colour) and (np.abs(points[:, 0] - strip) <= 0.2).all()
            ]
            values = table.loc[(table["label"] == label) & (table["right"] == right), score]
            assert len(values) > 3
            np.testing.assert_allclose(np.sort(points[:, 1]), np.sort(values))
        ordered = table[table["label"] == label].sort_values(score)["gene"].tolist()
        expected_names |= {*ordered[:3], *ordered[-3:]}
    assert [label.get_text() for label in ax.get_xticklabels()] == [
        f"{label}\n({(table['label'] == label).sum()} genes)" for label in LABELS["labels"]
    ]
    assert ax.get_ylabel() == f"probability of '{class_name or 'sensitive'}'"
    found = named(ax)
    assert set(found) == expected_names
    by_name = table.set_index("gene")
    for name, (x, y) in found.items():
        assert y == pytest.approx(by_name.at[name, score])
        assert round(x) == LABELS["labels"].index(by_name.at[name, "label"])


def test_gene_scores_are_the_same_picture_every_time(genes: ad.AnnData) -> None:
    first, second = (clouds(gfx.pl.gene_scores(genes, show=False)) for _ in range(2))
    for (_, one), (_, other) in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def boxes_of_names(ax: plt.Axes) -> list[mpl.transforms.Bbox]:
    ax.figure.canvas.draw()
    return [mpl.text.Text.get_window_extent(text) for text in ax.texts]


@pytest.mark.parametrize("n_names", [5, 12])
def test_names_of_gene_scores_stand_apart(genes: ad.AnnData, predicted: ad.AnnData, n_names: int) -> None:
    for adata, n in ((genes, 4 * n_names), (predicted, 2 * n_names)):
        ax = gfx.pl.gene_scores(adata, n_names=n_names, show=False)
        boxes = boxes_of_names(ax)
        assert len(boxes) == n
        for at, box in enumerate(boxes):
            # Letters have room to spare above and below in the box of a line.
            assert not any(box.padded(-1).overlaps(other.padded(-1)) for other in boxes[:at])
            assert ax.bbox.y0 <= box.y0 + 1 < box.y1 - 1 <= ax.bbox.y1
        points = np.concatenate([points for _, points in clouds(ax)])
        inside = [box.padded(-1).contains(*at) for box in boxes for at in ax.transData.transform(points)]
        assert not any(inside)


def test_names_that_find_no_room_are_left_out(genes: ad.AnnData) -> None:
    ax = gfx.pl.gene_scores(genes, n_names=60, show=False)
    boxes = boxes_of_names(ax)
    assert 40 < len(boxes) < 120
    assert not any(a.padded(-1).overlaps(b.padded(-1)) for at, a in enumerate(boxes) for b in boxes[:at])
    table = gfx.get.gene_scores_df(genes)
    for label in LABELS["labels"]:
        assert table.loc[table["label"] == label, "gene"].iloc[0] in named(ax)
    assert not named(gfx.pl.gene_scores(genes, n_names=0, show=False))


def test_gene_scores_names_each_gene_of_a_small_strip_once(genes: ad.AnnData) -> None:
    few = gfx.get.gene_scores_df(genes)["gene"].tolist()[:3]
    ax = gfx.pl.gene_scores(genes[:, few].copy(), show=False)
    assert sorted(text.get_text() for text in ax.texts) == sorted(few)


def test_gene_scores_names_from_a_column_and_few_cells(genes: ad.AnnData) -> None:
    ax = gfx.pl.gene_scores(genes, names="names", show=False)
    assert all(name.startswith("the ") for name in named(ax))
    all_of_them = gfx.pl.gene_scores(genes, min_cells=1, show=False)
    assert sum(len(points) for _, points in clouds(all_of_them)) == genes.n_vars - 6
    with pytest.raises(ValueError, match="no gene was scored in at least 1000 cells"):
        gfx.pl.gene_scores(genes, min_cells=1000)


def test_gene_scores_of_three_classes(toy_cells, classified) -> None:
    adata = classified(toy_cells(), "tl.classify_genes", tasks=THREE)
    ax = gfx.pl.gene_scores(adata, class_name="receptor", show=False)
    assert len(ax.get_xticklabels()) == 3
    assert not ax.lines  # no 0.5: the highest of three may be lower
    assert len(gfx.pl.gene_scores(classified(toy_cells(), "tl.classify_genes"), show=False).lines) == 1
    with pytest.raises(KeyError, match=r"Did not find the class 'x'. Present: \['kinase', 'receptor', 'ligand'\]"):
        gfx.pl.gene_scores(adata, class_name="x")


@pytest.mark.parametrize("group", [None, "second"])
def test_predicted_genes_are_drawn_by_score_and_learnt_ones_marked(predicted: ad.AnnData, group: str | None) -> None:
    ax = gfx.pl.gene_scores(predicted, group, n_names=4, show=False)
    table = gfx.get.gene_scores_df(predicted, group)
    ((_, points),) = clouds(ax)
    np.testing.assert_array_equal(points[:, 0], np.arange(1, len(table) + 1))
    np.testing.assert_allclose(points[:, 1], table["score_sensitive"])
    (marks,) = (line for line in ax.lines if line.get_marker() == "|")
    assert marks.get_xdata().tolist() == (np.flatnonzero(table["in_training"]) + 1).tolist()
    assert (marks.get_ydata() < 0).all()
    assert ax.get_ylim()[0] < marks.get_ydata().min()
    assert legend(ax) == [f"all genes ({len(table)})", f"training set ({table['in_training'].sum()})"]
    assert (
        table.loc[:3, "in_training"].any() or table.loc[len(table) - 4 :, "in_training"].any()
    )  # some would be named else
    new = table.loc[~table["in_training"], "gene"].tolist()
    assert set(named(ax)) == {*new[:4], *new[-4:]}
    assert ax.get_title() == (group or "")
    assert min(ax.get_xticks()) >= 0
    assert max(ax.get_xticks()) <= len(table)


def test_predicted_genes_of_the_first_class_come_in_its_order(predicted: ad.AnnData) -> None:
    ax = gfx.pl.gene_scores(predicted, class_name="tolerant", show=False)
    ((_, points),) = clouds(ax)
    expected = np.sort(gfx.get.gene_scores_df(predicted)["score_tolerant"])[::-1]
    np.testing.assert_allclose(points[:, 1], expected)


# --- learning curve -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "metric", "label"),
    [
        (None, "auc", "AUC (genes)"),
        ("occurrence", "accuracy", "accuracy (occurrences)"),
        ("gene", "macro_f1", "macro F1 (genes)"),
    ],
)
def test_learning_curve_draws_every_number_of_cells(
    genes: ad.AnnData, unit: str | None, metric: str, label: str
) -> None:
    ax = gfx.pl.learning_curve(genes, unit=unit, metric=metric, show=False)
    table = gfx.get.learning_curve_df(genes)
    table = table[(table["unit"] == (unit or "gene")) & (table["metric"] == metric)]
    found = lines(ax)
    assert list(found) == [*DRAWN, "majority"]
    for (method, line), band in zip(found.items(), bands(ax), strict=True):
        rows = table[table["method"] == method.replace(" ", "_")]
        np.testing.assert_array_equal(line.get_xdata(), [100, 500, 2000])
        np.testing.assert_allclose(line.get_ydata(), rows["mean"])
        for row in rows.itertuples():
            assert band_at(band, row.n_cells) == pytest.approx((row.mean - row.sd, row.mean + row.sd))
    assert ax.get_xscale() == "log"
    assert [text.get_text() for text in ax.get_xticklabels()] == ["100", "500", "2,000"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training cells", label)


def test_learning_curve_of_one_seed_and_of_one_point(genes: ad.AnnData) -> None:
    adata = genes.copy()
    summary = adata.uns["gfx_gene_class"]["summary"].assign(sd=np.nan)
    adata.uns["gfx_gene_class"]["summary"] = summary[(summary["method"] != "expression") | (summary["n_cells"] == 2000)]
    ax = gfx.pl.learning_curve(adata, show=False)
    ax.figure.canvas.draw()
    assert lines(ax)["expression"].get_xdata().tolist() == [2000]
    assert lines(ax)["expression"].get_marker() == "o"


def test_learning_curve_errors(genes: ad.AnnData, cells: ad.AnnData) -> None:
    with pytest.raises(KeyError, match=r"Did not find the metric 'f1'. Present: \['auc', 'accuracy', 'macro_f1'\]"):
        gfx.pl.learning_curve(genes, metric="f1")
    with pytest.raises(KeyError, match=r"choose one with `task=`: \['cell_type', 'condition'\]"):
        gfx.pl.learning_curve(cells)
    with pytest.raises(KeyError, match="Did not find the unit 'gene'"):
        gfx.pl.learning_curve(cells, task="condition", unit="gene")


# --- all of them ----------------------------------------------------------------------------------------------------

PLOTS = ["roc", "confusion", "gene_scores", "learning_curve"]


@pytest.mark.parametrize("plot", PLOTS)
def test_plots_draw_on_the_axes_given(genes: ad.AnnData, plot: str) -> None:
    figure, axes = plt.subplots(1, 2)
    before = genes.copy()
    assert getattr(gfx.pl, plot)(genes, ax=axes[1], show=False) is axes[1]
    assert not axes[0].has_data()
    assert len(plt.get_fignums()) == 1
    assert axes[1].get_figure() is figure
    assert sorted(genes.uns) == sorted(before.uns)
    assert sorted(genes.var) == sorted(before.var)
    assert getattr(gfx.pl, plot)(genes, figsize=(7, 3), show=False).figure.get_size_inches().tolist() == [7, 3]


@pytest.mark.parametrize("plot", PLOTS)
def test_no_result_or_several_are_an_error_that_says_what_to_do(toy_cells, classified, plot: str) -> None:
    draw, adata = getattr(gfx.pl, plot), toy_cells()
    with pytest.raises(KeyError, match=r"Did not find a result of `gfx.tl.classify_genes` or .* Run one of them first"):
        draw(adata)
    for key in ("one", "other"):
        classified(adata, "tl.classify_genes", key=key)
    with pytest.raises(KeyError, match=r"choose one with `key=`: \['one', 'other'\]"):
        draw(adata)
    assert draw(adata, key="other", show=False).has_data()


@pytest.mark.parametrize("plot", PLOTS)
def test_mudata(genes: ad.AnnData, as_mudata, plot: str) -> None:
    other = genes[:, :5].copy()
    other.var_names = [f"other {name}" for name in other.var_names]
    mdata = as_mudata({"rna": genes, "other": other})
    assert getattr(gfx.pl, plot)(mdata, mod="rna", show=False).has_data()
