"""How the documentation is built: `make docs`, warnings being errors.

No connection is opened. `GFX_DOCS_LINKS=1 make docs` fetches the inventories of other projects and links to them.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from sphinx.pycode import ModuleAnalyzer

import gfx

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

HERE = Path(__file__).parent
GENERATED = HERE / "generated"

project = "gfx"
author = "The gfx developers"
copyright = f"2026, {author}"
version = release = installed_version("scgfx")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinxcontrib.bibtex",
]
templates_path = ["_templates"]
exclude_patterns = ["_build"]
default_role = "literal"
nitpicky = True

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

html_theme = "sphinx_book_theme"
html_title = "gfx"
html_theme_options = {
    "navbar_persistent": [],  # one search field, the one in the side bar
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
html_static_path = ["_static"]
html_css_files = ["gfx.css"]

# --- docstrings ----------------------------------------------------------------------------------------------------

autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
napoleon_google_docstring = False
# What a function writes is told in its own words there: a list of slots, not one type.
napoleon_custom_sections = ["Returns"]
# --- links to other projects ---------------------------------------------------------------------------------------

_INVENTORIES = {
    "anndata": "https://anndata.readthedocs.io/en/stable/",
    "matplotlib": "https://matplotlib.org/stable/",
    "mudata": "https://mudata.readthedocs.io/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "pandas": "https://pandas.pydata.org/docs/",
    "python": "https://docs.python.org/3/",
    "scanpy": "https://scanpy.readthedocs.io/en/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
}
intersphinx_mapping = (
    {name: (url, None) for name, url in _INVENTORIES.items()} if os.environ.get("GFX_DOCS_LINKS") else {}
)
# What the names stand for that modules import for type checkers only, as annotations spell them.
_SHORT_NAMES = {
    "AnnData": "anndata.AnnData",
    "Axes": "matplotlib.axes.Axes",
    "Data": "anndata.AnnData",
    "Iterator": "collections.abc.Iterator",
    "Mapping": "collections.abc.Mapping",
    "Mask": "numpy.ndarray",
    "Model": "gfx.models.Model",
    "ModelLike": "gfx.models.Model",
    "MuData": "mudata.MuData",
    "Path": "pathlib.Path",
    "Sequence": "collections.abc.Sequence",
    "np.ndarray": "numpy.ndarray",
    "np.random.Generator": "numpy.random.Generator",
    "pd.DataFrame": "pandas.DataFrame",
}
# Without inventories the names of other projects lead nowhere, nor do types that are not public; all others must.
nitpick_ignore_regex = [
    ("py:.*", r"(anndata|collections|matplotlib|mudata|numpy|pandas|pathlib|scanpy|scipy|torch|transformers)\..*"),
    ("py:.*", r"gfx\.(\w+\.)*_.*"),
    (
        "py:.*",
        r"(Any|Buckets|Counts|EllipsisType|GeneLabels|Genes|Literal|Method|ModelCard|Pooling|PoolingOfShifts|Positions|Vocabulary|VocabularyCard)",
    ),
    ("py:.*", r"(bool|dict|float|int|list|object|str|tuple)"),
    ("py:.*", "|".join(re.escape(name) for name in _SHORT_NAMES)),
]


def _qualify(app: Sphinx, env: BuildEnvironment, node: Element, content: Element) -> Element | None:
    """Look a short name up under its full one, here first; other projects' inventories are asked next."""
    full = _SHORT_NAMES.get(node["reftarget"])
    if full is None:
        return None
    node["reftarget"] = full
    return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, "class", full, node, content)


def setup(app: Sphinx) -> None:
    """Connect what is defined here."""
    app.connect("missing-reference", _qualify, priority=400)


# --- tables made from the package itself ----------------------------------------------------------------------------


def _write_tables() -> None:
    GENERATED.mkdir(exist_ok=True)
    models = gfx.models.available().reset_index(names="name")
    table = pd.DataFrame(
        {
            "name": [f"`{name}`" for name in models["name"]],
            "what it is": models["description"],
            "parameters": [f"{n / 1e6:.0f} M" for n in models["parameters"]],
            "reads": [f"{n:,} of {v}" for n, v in zip(models["input_size"], models["vocabulary"], strict=True)],
            "MB": [f"{size:,.0f}" for size in models["megabytes"]],
        }
    )
    table.to_csv(GENERATED / "models.csv", index=False)
    meanings = ModuleAnalyzer.for_module("gfx._settings").find_attr_docs()
    rows = [
        (
            f"`{field.name}`",
            f"`GFX_{field.name.upper()}`",
            f"`{field.default!r}`",
            " ".join(meanings["Settings", field.name]),
        )
        for field in fields(gfx.settings)
    ]
    columns = ["setting", "environment variable", "default", "meaning"]
    pd.DataFrame(rows, columns=columns).to_csv(GENERATED / "settings.csv", index=False)


_write_tables()
