"""The report holds every result with its controls, tells the truth about them, and is safe to open."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from html import escape
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import gfx
from gfx._report import _sections
from gfx._results import TABLE, made_by

if TYPE_CHECKING:
    from pathlib import Path

# The toy cells' states are drawn at random, and most of the time nothing tells them apart.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

mpl.use("agg")

GENES = ["TOY90", "TOY48", "TOY165", ("TOY90", "TOY48")]
STATES = {"groupby": "condition", "start": "sick", "goal": "healthy", "donor_key": "donor"}

#: Names from a file of a stranger, which a browser would run.
CLASS, LABEL, KEY = "<img src=x onerror=alert(1)>", "<script>alert(2)</script>", "<b>bold"

#: What a page without scripts and without files of its own may have.
TAGS = {
    *("html", "head", "meta", "link", "title", "style", "body", "div", "nav", "main", "section", "h1", "h2", "h3", "p"),
    *("strong", "code", "a", "ol", "ul", "li", "dl", "dt", "dd", "figure", "img", "figcaption"),
    *("table", "thead", "tbody", "tr", "th", "td", "wbr"),
}


class Page(HTMLParser):
    """Tags, attributes, texts and tables of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source, self.tags, self.attributes, self.texts = text, Counter(), [], []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.tables and self.tables[-1] and self.tables[-1][-1] and self.lasttag in {"td", "th", "wbr"}:
            self.tables[-1][-1][-1] += data.strip()

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def section(self, key: str) -> str:
        """Return the part of the page on a result."""
        (part,) = (
            part for part in self.source.split("<section")[1:] if f"stored under <code>{escape(key)}</code>" in part
        )
        return part

    def with_columns(self, *columns: str) -> list[dict[str, str]]:
        """Return the rows of the first table that has these columns."""
        table = next(table for table in self.tables if table and set(columns) <= set(table[0]))
        return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


def reported(adata: object, path: Path, **kwargs: object) -> Page:
    assert gfx.get.report(adata, path, **kwargs) is None
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def everything(toy_cells, toy_folder, classified) -> ad.AnnData:
    """A result of every function."""
    adata = toy_cells(48)
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"a": CLASS})
    adata.var["label"] = adata.var_names.astype(object)
    adata.var.loc["TOY90", "label"] = LABEL
    with gfx.settings.override(model=toy_folder, verbosity=0):
        gfx.pp.tokenize(adata)
        gfx.tl.embed(adata)
        gfx.tl.embed_genes(adata, groupby="cell_type")
        gfx.tl.delete_genes(adata, GENES, n_random=9)
        gfx.tl.overexpress_genes(adata, GENES, n_random=9, **STATES)
        gfx.tl.shift_genes(adata, GENES[:2], by=("quartiles", 1), controls=None, key_added=KEY)
        gfx.tl.screen_genes(adata, groupby="cell_type")
        gfx.tl.attention(adata, groupby="cell_type", genes=["TOY90", "TOY48", "TOY165"])
        gfx.tl.attention(adata, deleted="TOY90", key_added="after")
    classified(adata, "tl.classify_genes")
    classified(adata, "tl.predict_genes")
    classified(adata, "tl.classify_cells", tasks={"cell_type": [CLASS, "b", "c"], "condition": ["sick", "healthy"]})
    return classified(adata, "tl.predict_cells", tasks={"cell_type": [CLASS, "b"]})


@pytest.fixture(scope="module")
def file_of_everything(everything, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reports") / "everything.html"
    gfx.get.report(everything, path, names="label")
    return path


@pytest.fixture(scope="module")
def page(file_of_everything) -> Page:
    return Page(file_of_everything.read_text(encoding="utf-8"))


@pytest.fixture
def deleted(toy_cells, toy_folder) -> ad.AnnData:
    adata = toy_cells(24)
    gfx.tl.delete_genes(adata, GENES[:2], model=toy_folder, n_random=5)
    return adata


@pytest.fixture
def embedded(toy_cells, toy_folder) -> ad.AnnData:
    """A result without figures, so that its report is quick."""
    adata = toy_cells(24)
    gfx.tl.embed(adata, model=toy_folder)
    return adata


# --- what is told ---------------------------------------------------------------------------------------------------


def test_every_function_has_its_part_of_the_page() -> None:
    assert set(_sections._TOLD) == set(TABLE) - {"pp.tokenize"}


def test_every_result_is_told_of_with_its_parameters(everything, page) -> None:
    keys = [key for key, entry in everything.uns.items() if made_by(entry) not in {None, "pp.tokenize"}]
    assert len(keys) == 12
    assert page.tags["section"] == len(keys)
    for key in keys:
        assert f"gfx.{everything.uns[key]['params']['function']}, stored under {key}" in page.text
    assert page.tags["img"] >= 15
    assert not re.findall(r"No figure: [^.]*", page.text)
    for title in ("What may be concluded", "What may not", "Parameters"):
        assert page.text.count(title) == len(keys)


def test_contents_lead_to_every_part(page) -> None:
    links = [value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href") and value[0] == "#"]
    anchors = [value for _, name, value in page.attributes if name == "id"]
    assert sorted(links) == sorted(anchors)
    assert len(set(anchors)) == len(anchors)


def test_effects_stand_beside_their_null_and_their_baselines(everything, page) -> None:
    table = gfx.get.deletion_df(everything, key=gfx._results.key_of("tl.delete_genes", None))
    rows = page.with_columns("shift_mean", "random_mean", "z", "p", "fdr", "random_weights_shift_mean", "detection")
    assert [row["perturbation"] for row in rows] == table["perturbation"].tolist()
    for row, (_, expected) in zip(rows, table.iterrows(), strict=True):
        assert float(row["z"]) == pytest.approx(expected["z"], rel=5e-3)
        assert float(row["random_mean"]) == pytest.approx(expected["random_mean"], rel=5e-3)
    toward = page.with_columns("toward_mean", "toward_random_mean", "toward_z", "toward_fdr", "detection", "logfc")
    donors = page.with_columns("perturbation", "state", "n_donors", "donor_mean", "donor_low", "donor_fdr")
    assert [(row["perturbation"], row["state"]) for row in donors] == [
        (row["perturbation"], row["state"]) for row in toward
    ]
    assert page.with_columns("gene", "shift_excess", "shift_low", "shift_z", "shift_p", "random_weights_shift_mean")
    assert page.with_columns("gene", "attention", "uniform", "ratio", "random_ratio")
    methods = {row["method"] for row in page.with_columns("task", "method", "low", "high")}
    assert methods == {"model", "random_weights", "expression", "majority"}


def test_controls_come_before_effects(page) -> None:
    source = page.source
    for effects in ("<h3>Effects</h3>", "<h3>Genes</h3>"):
        before = source[: source.index(effects)]
        assert before.rindex("<h3>Controls</h3>") > before.rindex("<section")


def test_data_models_and_versions_have_checksums(everything, page) -> None:
    params = everything.uns[gfx._results.key_of("tl.embed", None)]["params"]
    for name in ("weights_sha256", "config_sha256", "vocabulary_sha256"):
        assert params[name] in page.text
    assert "sha256 of the values in adata.X" in page.text
    assert "sha256 of tokens" in page.text
    assert f"scgfx {gfx.__version__}" in " ".join(" ".join(row) for table in page.tables for row in table)


def test_checksums_come_after_results(everything, page) -> None:
    overview, rest = page.source.split("<section", 1)
    assert "sha256" not in overview
    assert page.tables[0][:2] == [["cells", "48"], ["genes", str(everything.n_vars)]]
    assert page.tables[0][2][0] == "models"
    assert rest.index('<h2 id="checksums">') > rest.rindex("</section>")
    assert "sha256 of cell names" in rest


def test_columns_that_are_shown_are_explained(page) -> None:
    for column in ("toward_z", "random_mean", "donor_fdr", "shift_excess", "random_ratio", "in_training"):
        explained = column in {row for table in page.tables for row in (table[0] if table else [])}
        assert (f"<dt>{column}</dt>" in page.source) == explained, column


# --- what it warns of -----------------------------------------------------------------------------------------------


MISSING = (
    "No rank-matched random gene sets",
    "No random-weights model",
    "No baselines",
    "Cells are not replicates: no",
)


def test_missing_controls_are_told(page) -> None:
    section = page.section(KEY)
    for missing in MISSING:
        assert missing in section
    assert "There are no p-values." in section


def test_no_missing_control_is_told_where_all_were_run(page) -> None:
    section = page.section(gfx._results.key_of("tl.overexpress_genes", None))
    assert "differ" in section
    for missing in MISSING:
        assert missing not in section


@pytest.mark.parametrize(
    ("control", "measure", "statistic", "passes", "fails", "said"),
    [
        (
            "random_weights",
            "shift",
            "spearman",
            -0.9,
            0.9,
            "genes by the shift in almost the same way (Spearman 0.90)",
        ),
        ("rank", "shift", "spearman", 0.3, -0.9, "The rank of a gene explains the shift (Spearman -0.90)"),
        ("detection", "toward", "spearman", -0.2, -0.8, "cells with a gene explains the shift toward the goal"),
        ("expression", "shift", "spearman", 0.2, 0.8, "Mean expression explains the shift"),
        ("logfc", "toward", "spearman", 0.2, 0.8, "The fold change between the states explains the shift toward"),
        ("exact", "toward", "spearman", 0.95, 0.8, "Estimates of the shift toward the goal correlate"),
        ("state_axis", "toward", "auc", 0.95, 0.55, "hardly separable"),
        ("state_axis", "toward", "auc", 0.95, np.nan, "could not be tested"),
    ],
)
def test_controls_that_explain_the_effect_are_told(
    control: str, measure: str, statistic: str, passes: float, fails: float, said: str
) -> None:
    row = {"control": [control], "measure": [measure], "statistic": [statistic]}
    assert not _sections._failed(pd.DataFrame(row | {"value": [passes]}))
    (warning,) = _sections._failed(pd.DataFrame(row | {"value": [fails]}))
    assert said in warning


def test_thresholds_are_those_that_tools_warn_at() -> None:
    from gfx.tl import _states
    from gfx.tl.screen import LOWEST_AGREEMENT

    assert _sections.LOWEST_AUC == _states.LOWEST_AUC
    assert _sections.LOWEST_AGREEMENT == LOWEST_AGREEMENT


def test_a_control_as_good_as_the_model_is_told() -> None:
    rows = pd.DataFrame({"mean": [0.82, 0.58, 0.66, 0.5], "low": 0.77, "high": 0.87})
    rows.index = ["model", "random_weights", "expression", "majority"]
    summary, warnings = _sections._compared("condition", rows, "auc")
    assert summary == (
        "condition: AUC 0.82 (95 % interval 0.77 to 0.87), random weights 0.58, best baseline (expression) 0.66."
    )
    assert not warnings
    rows.loc[["random_weights", "expression"], "mean"] = 0.78
    first, second = _sections._compared("condition", rows, "auc")[1]
    assert "the random-weights model reaches 0.78" in first
    assert "the baseline expression reaches 0.78" in second
    first, second = _sections._compared("condition", rows.loc[["model"]], "auc")[1]
    assert "no random-weights model was run" in first
    assert "no baselines were run" in second


def test_a_result_that_lost_its_parts_says_so_and_shows_nothing(deleted, tmp_path) -> None:
    name = gfx._results.key_of("tl.delete_genes", None)
    del deleted.varm[name]
    page = reported(deleted, tmp_path / "r.html")
    assert f"adata.varm['{name}'] got lost" in page.text
    assert not page.tags["img"]


# --- safe and self-contained ----------------------------------------------------------------------------------------


def test_names_of_strangers_are_text(page) -> None:
    for name in (CLASS, LABEL, KEY):
        assert name in page.text
        assert name not in page.source
    assert set(page.tags) == TAGS
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_nothing_is_fetched(page) -> None:
    for tag, name, value in page.attributes:
        if name in {"src", "srcset", "data", "action"}:
            assert value.startswith("data:image/png;base64,")
        elif name == "href":
            assert value.startswith("#" if tag == "a" else "data:")
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")
def test_browser_shows_it_without_errors_requests_or_sideways_scrolling(file_of_everything, tmp_path) -> None:
    """The page is shown in frames as wide as a phone and as a desk's screen, beside a script that measures them.

    Tables scroll on a phone alone.
    """
    address = file_of_everything.as_uri()
    frames = "".join(f'<iframe width="{width}" height="900" src="{address}"></iframe>' for width in (390, 1440))
    (tmp_path / "frames.html").write_text(
        f"""<!DOCTYPE html><body>{frames}<script>
        onload = () => {{ document.title = [...document.querySelectorAll("iframe")].map(frame => {{
            const page = frame.contentWindow, images = [...page.document.images];
            return [page.innerWidth, page.document.documentElement.scrollWidth, images.length,
                images.every(image => image.complete && image.naturalWidth > 0),
                page.performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length,
                [...page.document.querySelectorAll(".table")].some(table => table.scrollWidth > table.clientWidth)];
        }}).join(" "); }}
        </script></body>""",
        encoding="utf-8",
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--allow-file-access-from-files", "--enable-logging=stderr", "--dump-dom"]
    command.append((tmp_path / "frames.html").as_uri())
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    n_images = file_of_everything.read_text(encoding="utf-8").count("<img ")
    measured = [frame.split(",") for frame in title.split()]
    assert [frame[2:5] for frame in measured] == [[str(n_images), "true", "0"]] * 2
    assert [frame[5] for frame in measured] == ["true", "false"]
    for inner, scrolled, *_ in measured:
        assert int(scrolled) <= int(inner)
    assert "CONSOLE" not in done.stderr, done.stderr


# --- the file -------------------------------------------------------------------------------------------------------


def test_same_object_gives_the_same_file_also_after_it_was_stored(deleted, tmp_path) -> None:
    table = deleted.uns[gfx._results.key_of("tl.delete_genes", None)]["controls"]
    table.loc[(table["control"] == "rank") & (table["statistic"] == "spearman"), "value"] = -0.9
    first = reported(deleted, tmp_path / "first.html").source
    assert "The rank of a gene explains the shift (Spearman -0.90)" in first
    deleted.write_h5ad(tmp_path / "cells.h5ad")
    assert reported(ad.read_h5ad(tmp_path / "cells.h5ad"), tmp_path / "second.html").source == first


def test_checksum_of_values_is_that_of_any_storage_and_changes_nothing(embedded, tmp_path) -> None:
    def checksum(x: object) -> str:
        embedded.X = x
        rows = [row for table in reported(embedded, tmp_path / "r.html").tables for row in table]
        return next(row[1] for row in rows if row[0] == "sha256 of the values in adata.X")

    x = embedded.X.copy()
    untidy = sparse.csr_matrix(x, dtype=np.float64)
    untidy.data[0] = 0
    expected = checksum(untidy.toarray())
    assert len(expected) == 64
    assert checksum(untidy) == expected
    assert embedded.X.data[0] == 0
    assert checksum(untidy.tocsc()) == expected
    assert checksum(x) != expected


def test_object_figures_and_settings_of_plots_are_as_before(deleted, tmp_path) -> None:
    before = deleted.copy()
    mine = plt.figure()
    with mpl.rc_context({"axes.facecolor": "red"}):
        settings = dict(mpl.rcParams)
        reported(deleted, tmp_path / "r.html")
        assert dict(mpl.rcParams) == settings
    assert plt.get_fignums() == [mine.number]
    plt.close(mine)
    assert repr(deleted) == repr(before)
    assert list(deleted.uns) == list(before.uns)
    np.testing.assert_array_equal(deleted.X.toarray(), before.X.toarray())


def test_existing_file_is_replaced_as_a_whole_or_not_at_all(embedded, tmp_path, monkeypatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("former")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "replace", full)
        with pytest.raises(OSError, match="No space left"):
            gfx.get.report(embedded, path)
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]
    assert "Embedded cells" in reported(embedded, path).text
    assert list(tmp_path.iterdir()) == [path]


def test_chosen_results_alone(everything, tmp_path) -> None:
    key = gfx._results.key_of("tl.embed", None)
    page = reported(everything, tmp_path / "r.html", key=key)
    assert page.tags["section"] == 1
    assert "no control of its own" in page.text
    assert "Which cells are alike to this model" in page.text


def test_modality_of_mudata(embedded, as_mudata, tmp_path) -> None:
    mdata = as_mudata({"rna": embedded, "protein": ad.AnnData(np.ones((embedded.n_obs, 2)))})
    alone = reported(embedded, tmp_path / "alone.html").source
    assert reported(mdata, tmp_path / "r.html", mod="rna").source == alone


def test_what_cannot_be_reported_is_refused(embedded, toy_cells, tmp_path) -> None:
    path = tmp_path / "r.html"
    with pytest.raises(KeyError, match=r"no result to report. Run one of `gfx\.tl`"):
        gfx.get.report(toy_cells(3), path)
    with pytest.raises(KeyError, match=r"Did not find the results \['mine'\]. Present:"):
        gfx.get.report(embedded, path, key="mine")
    with pytest.raises(ValueError, match="`key` names no result"):
        gfx.get.report(embedded, path, key=[])
    with pytest.raises(KeyError, match="'symbol'"):
        gfx.get.report(embedded, path, names="symbol")
    with pytest.raises(ValueError, match=r"ends in '\.html'"):
        gfx.get.report(embedded, tmp_path / "report.pdf")
    with pytest.raises(FileNotFoundError, match="no folder"):
        gfx.get.report(embedded, tmp_path / "nowhere" / "r.html")
    with pytest.raises(TypeError, match="found a NoneType"):
        gfx.get.report(embedded, None)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        gfx.get.report(embedded, tmp_path / "folder.html")
    assert not path.exists()
