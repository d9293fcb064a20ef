"""What a page is made of, and how numbers, tables and figures look on it."""

from __future__ import annotations

import base64
import inspect
import platform
import re
import struct
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: Rows of a table that are shown; all are in the table of `gfx.get`.
MOST_ROWS = 30

#: Points of a picture on a point of the page, so that it is sharp on fine screens.
_DENSITY = 1.5

#: Libraries whose versions results may depend on.
_LIBRARIES = ("scgfx", "anndata", "numpy", "pandas", "scipy", "scikit-learn", "torch", "transformers", "matplotlib")


@dataclass(frozen=True)
class Table:
    """Cells of a table as text, with what is said below it."""

    columns: list[str]
    rows: list[list[str]]
    is_number: list[bool]
    below: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture as base64, what it shows, and how to read it."""

    png: str
    alt: str
    caption: str
    width: int
    height: int


@dataclass
class Section:
    """What is told of one result, in the order of the page."""

    key: str
    function: str
    title: str
    params: Mapping[str, Any]
    summary: str = ""
    warnings: list[str] = field(default_factory=list)
    parts: list[tuple[str, Table | Figure | str]] = field(default_factory=list)
    may: list[str] = field(default_factory=list)
    may_not: list[str] = field(default_factory=list)

    def add(self, title: str, part: Table | Figure | str) -> None:
        """Show a table, a figure or a text under a title; one without a title belongs to what is above it."""
        self.parts.append((title, part))

    @property
    def parameters(self) -> Table:
        """How the result was made, as a table."""
        return pairs(self.params)

    @property
    def anchor(self) -> str:
        """Name to link to, of characters that addresses may have."""
        return "result-" + "".join(letter if letter.isalnum() else f"_{ord(letter):x}_" for letter in self.key)


def written(value: object) -> str:
    """Write a value as text: three digits of a fraction, a dash where there is none."""
    match value:
        case bool() | np.bool_():
            return "yes" if value else "no"
        case int() | np.integer():
            return f"{value:,}"
        case float() | np.floating():
            if np.isnan(value):
                return "–"
            return f"{value:,.0f}" if 1000 <= abs(value) < np.inf else f"{value:.3g}"
        case np.ndarray() | list() | tuple():
            return ", ".join(written(entry) for entry in np.ravel(np.asarray(value, dtype=object))) or "none"
        case dict():
            return "; ".join(f"{name}: {written(entry)}" for name, entry in value.items())
        case _:
            return "–" if value is None or value is pd.NA or value is pd.NaT else str(value)


def tabulate(table: pd.DataFrame, below: str = "", *, most: int = MOST_ROWS) -> Table:
    """Write the first rows of a table as text, without columns that are empty."""
    table = table.loc[:, table.notna().any()]
    if len(table) > most:
        below = f"The first {most} of {len(table):,} rows. {below}".strip()
    shown = table.head(most)
    rows = [[written(value) for value in row] for row in shown.itertuples(index=False)]
    is_number = [pd.api.types.is_numeric_dtype(shown[name].dtype) for name in shown]
    return Table([str(name) for name in shown], rows, is_number, below.replace("`", ""))


def pairs(entries: Mapping[str, object]) -> Table:
    """Write names and values as a table of two columns."""
    return Table([], [[str(name), written(value)] for name, value in entries.items()], [False, False])


def draw(plot: Callable, *args: object, **kwargs: object) -> Figure | str:
    """Draw a plot of `gfx.pl`, with its docstring as caption; a text where there is nothing to draw."""
    from gfx.pl._style import as_png

    try:
        png = as_png(lambda: plot(*args, **kwargs, show=False))
    except ValueError as nothing:
        return f"No figure: {nothing}"
    told = re.split(r"^Parameters$", inspect.cleandoc(plot.__doc__ or plot.__name__), maxsplit=1, flags=re.MULTILINE)[0]
    first, _, caption = re.sub(r":\w+:`([^`]*)`", r"\1", told).replace("`", "").partition("\n\n")
    width, height = (round(size / _DENSITY) for size in struct.unpack(">II", png[16:24]))  # of the header
    return Figure(
        base64.b64encode(png).decode("ascii"), " ".join(first.split()), " ".join(caption.split()), width, height
    )


def render(sections: list[Section], overview: Table, checksums: Mapping[str, Table]) -> str:
    """Fill the page."""
    import jinja2

    here = Path(__file__).parent
    surroundings = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    shown = {
        name for section in sections for _, part in section.parts if isinstance(part, Table) for name in part.columns
    }
    return surroundings.get_template("page.html").render(
        sections=sections,
        overview=overview,
        checksums=checksums,
        terms={name: meaning for name, meaning in TERMS.items() if name in shown},
        versions=pairs(_versions()),
        citations=_citations(sections),
        kind=lambda part: type(part).__name__,
    )


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


# --- words ----------------------------------------------------------------------------------------------------------

#: What to cite for a model, by its vocabulary: text and address.
_PAPERS = {
    "V1": (
        "Theodoris et al. Transfer learning enables predictions in network biology. Nature 618, 616–624 (2023).",
        "https://doi.org/10.1038/s41586-023-06139-9",
    ),
    "V2": (
        "Chen et al. Scaling and quantization of large-scale foundation model enables resource-efficient predictions "
        "in network biology. Nature Computational Science 6, 450–463 (2026).",
        "https://doi.org/10.1038/s43588-026-00972-4",
    ),
}


def _citations(sections: list[Section]) -> list[tuple[str, str]]:
    """Text and address of what to cite: the package, and the paper of each model."""
    cited = [(f"gfx {version('scgfx')}, published as scgfx: Geneformer for AnnData.", "")]
    used = {(section.params.get("model"), section.params.get("vocabulary")) for section in sections}
    for model, vocabulary in sorted(used - {(None, None)}):
        own = ("The model mini is a part of gfx.", "")
        unknown = (f"The source of the model {model!r}, which is not a published Geneformer.", "")
        entry = own if model == "mini" else _PAPERS.get(vocabulary, unknown)
        if entry not in cited:
            cited.append(entry)
    return cited


_NULL = "rank-matched random gene sets"

#: What columns mean, for those that a page shows.
TERMS = {
    "n_cells": "number of cells that the value is a mean over",
    "rank_mean": "mean rank of the gene: 0 is the first gene of a cell, 1 the last",
    "shift_mean": "mean shift of the cells: 1 - cosine between the embedding before and after",
    "toward_mean": "mean change of the cells' cosine to the centroid of the state; positive for a shift toward it",
    "random_mean": f"the same for {_NULL} in the same cells: the null",
    "toward_random_mean": f"the same for {_NULL} in the same cells: the null",
    "n_random": "number of random sets",
    "random_n_cells": "median number of cells of a random set",
    "z": f"difference from the mean of {_NULL}, in their standard deviations",
    "toward_z": "difference from the mean of the null, in its standard deviations",
    "shift_z": "difference from genes of similar rank and number of cells, in robust standard deviations",
    "p": f"two-sided fraction of {_NULL} that are at least as extreme",
    "fdr": "false discovery rate (Benjamini and Hochberg)",
    "toward_p": "two-sided fraction of the null that is at least as extreme",
    "toward_fdr": "false discovery rate (Benjamini and Hochberg)",
    "shift_p": "two-sided fraction of the genes of a random-weights model that are at least as extreme",
    "shift_fdr": "false discovery rate (Benjamini and Hochberg)",
    "shift_excess": "shift minus that of genes of similar rank in the same cell, mean over cells",
    "toward_excess": "shift toward the goal minus that of genes of similar rank in the same cell, mean over cells",
    "shift_low": "lower end of the range of genes of similar rank and number of cells (z = -3)",
    "shift_high": "upper end of that range (z = 3)",
    "toward_low": "lower end of the range of genes of similar rank and number of cells (z = -3)",
    "toward_high": "upper end of that range (z = 3)",
    "random_weights_shift_mean": "mean shift in a random-weights model",
    "random_weights_toward_mean": "mean shift toward the goal in a random-weights model",
    "toward_without_mean": "shift toward the centroid that is computed without the gene",
    "n_donors": "number of donors",
    "donor_mean": "mean excess over donors",
    "donor_low": "lower end of its 95 % interval over donors",
    "donor_high": "upper end of its 95 % interval over donors",
    "donor_p": "p-value of a test over donors against random sets",
    "donor_fdr": "its false discovery rate",
    "detection": "fraction of the cells with the gene: a baseline",
    "expression_mean": "mean logarithm of the normalised counts: a baseline",
    "logfc": "log2 fold change from start to goal: a baseline",
    "exact_n_cells": "number of cells in which the gene was deleted exactly",
    "exact_shift_mean": "mean shift in these cells",
    "exact_toward_mean": "mean shift toward the goal in these cells",
    "random_shift": f"shift of the gene when {_NULL} are perturbed instead",
    "excess": "log2 ratio of shift and random_shift, less its median over genes",
    "on_shifts_mean": "shift of the set minus the sum of the shifts of its genes",
    "on_vectors_mean": "shift of the set minus the shift of the summed displacements of its genes",
    "method": "the model, the random-weights model, or a baseline that needs no model",
    "mean": "mean over repeats",
    "low": "lower end of the 95 % interval",
    "high": "upper end of the 95 % interval",
    "sd": "standard deviation over repeats, which are not replicates",
    "auc": "area under the ROC curve; 0.5 is chance",
    "macro_f1": "mean of the F1 scores of the classes",
    "label": "the given class",
    "predicted": "the class with the highest score",
    "in_training": "whether the gene was in the training set: its score is no prediction then",
    "rank": "mean rank of the gene in its cells, in genes",
    "attention": "attention that the gene receives from an average position of its cells, mean over heads",
    "uniform": "what it would receive if attention were uniform",
    "ratio": "attention divided by uniform attention",
    "random_ratio": "the same ratio in the random-weights model",
    "expected": "attention that the ranks of the two genes alone make expect",
    "coexpression": "correlation of their normalised counts in the same cells",
    "entropy": "entropy of the attention relative to uniform attention, which is 1",
    "distance": "mean distance in ranks of attention from gene to gene",
    "special": "fraction of attention to special tokens",
    "entropy_random": "entropy in the random-weights model",
    "distance_random": "distance in the random-weights model",
    "special_random": "attention to special tokens in the random-weights model",
}
