"""How the documentation is built: `make docs`, warnings being errors.

No connection is opened. `GFX_DOCS_LINKS=1 make docs`, or Read the Docs, fetches the inventories of other projects and
links to them.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import shutil
import sys
from dataclasses import fields
from functools import cache
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from docutils import nodes
from PIL import Image
from sphinx.addnodes import desc
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
    "matplotlib.sphinxext.plot_directive",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    "sphinxext.opengraph",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "generated/gallery.md"]
default_role = "literal"
nitpicky = True

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are stored with their outputs; `make tutorials` runs them
copybutton_exclude = ".linenos, .gp, .go"
ogp_social_cards = {"enable": False}
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

html_theme = "sphinx_book_theme"
html_title = "gfx"
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_theme_options = {
    "repository_url": "https://github.com/OWNER/gfx",
    "use_repository_button": True,
    "use_issues_button": True,
    "navbar_persistent": [],  # one search field, the one in the side bar
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
html_favicon = "_static/favicon.svg"
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
# --- pictures: the example of each plot, drawn while the documentation is built ---------------------------------------

sys.path.insert(0, str(HERE))
plot_include_source = True
plot_html_show_source_link = plot_html_show_formats = False
plot_formats = [("png", 144)]
plot_pre_code = "import gfx, each_call_once; vars(gfx.tl).update(each_call_once.TOOLS); gfx.settings.verbosity = 1"


def _draw_example(_app: Sphinx, _what: str, name: str, *rest: object) -> None:
    """Hand the example of a plot over to matplotlib's directive, which shows and runs it."""
    lines = rest[-1]
    if name.startswith("gfx.pl.") and "Examples" in lines:
        begin = lines.index("Examples") + 2
        lines[begin:] = [".. plot::", "", *(f"   {line}" for line in lines[begin:])]


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
    "torch": "https://docs.pytorch.org/docs/stable/",
}
intersphinx_mapping = (
    {name: (url, None) for name, url in _INVENTORIES.items()}
    if os.environ.get("GFX_DOCS_LINKS") or os.environ.get("READTHEDOCS")
    else {}
)
# What the names stand for that modules import for type checkers only, as annotations spell them.
_SHORT_NAMES = {
    "AnnData": "anndata.AnnData",
    "Axes": "matplotlib.axes.Axes",
    "Iterator": "collections.abc.Iterator",
    "Mapping": "collections.abc.Mapping",
    "Model": "gfx.models.Model",
    "MuData": "mudata.MuData",
    "Path": "pathlib.Path",
    "Sequence": "collections.abc.Sequence",
    "np.ndarray": "numpy.ndarray",
    "np.random.Generator": "numpy.random.Generator",
    "pd.DataFrame": "pandas.DataFrame",
    "pd.Series": "pandas.Series",
}
# Without inventories the names of other projects lead nowhere, nor do types that are not public; all others must.
nitpick_ignore_regex = [
    ("py:.*", r"(anndata|collections|matplotlib|mudata|numpy|pandas|pathlib|scanpy|scipy|torch|transformers)\..*"),
    ("py:.*", r"gfx\.(\w+\.)*_.*"),
    (
        "py:.*",
        r"(Any|Literal|ModelCard|Vocabulary|VocabularyCard|genes?|these)",
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


# --- signatures: types are spelled out, arguments of long calls are grouped -------------------------------------------

#: Arguments of tools with more than eight; those that are not named say what is done.
_GROUPS = {
    "Which cells and counts": (
        *("layer", "use_raw", "gene_ids", "counts", "n_counts"),
        *("mask_obs", "groupby", "start", "goal", "max_cells"),
    ),
    "Read-out": ("hidden_layer", "pooling", "heads", "n_neighbors"),
    "Controls and evaluation": (
        *("controls", "n_random", "donor_key", "n_splits", "n_repeats", "learning_curve", "rng"),
        *("held_out", "patience"),
    ),
    "Where data and results are stored": ("store", "folder", "key_added", "mod", "copy"),
}
#: Types that are told in words, since what they stand for is long.
_IN_WORDS = {"Genes": "gene, tuple of genes, or list of these", "EllipsisType": "..."}


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(Path(find_spec(module).origin).read_text(encoding="utf-8"))


def _meaning(module: str, name: str) -> str | None:
    """Say what a name stands for that a module defines, or imports, as an alias of types; else `None`."""
    if name in _IN_WORDS:
        return _IN_WORDS[name]
    for node in ast.walk(_tree(module)):
        match node:
            case ast.ImportFrom(module=str(origin), names=names) if origin.startswith("gfx."):
                if any(imported.name == name for imported in names):
                    return _meaning(origin, name)
            case (
                ast.Assign(targets=[ast.Name(id=alias)], value=ast.BinOp() | ast.Subscript() as value)
                | ast.AnnAssign(target=ast.Name(id=alias), value=ast.BinOp() | ast.Subscript() as value)
            ) if alias == name:
                return _spelled_out(module, ast.unparse(value))
    return None


def _spelled_out(module: str, annotation: str) -> str:
    return re.sub(r"(?<![\w.'\"])[A-Z]\w+\b", lambda name: _meaning(module, name[0]) or name[0], annotation)


def _spell_out(_app: Sphinx, function: object, _: object) -> None:
    """Replace aliases of types, which are private, in the annotations of a function."""
    for name, annotation in getattr(function, "__annotations__", {}).items():
        if isinstance(annotation, str):
            function.__annotations__[name] = _spelled_out(function.__module__, annotation)


def _group_arguments(_app: Sphinx, doctree: nodes.document) -> None:
    """Divide the list of arguments of tools that have many into groups with a heading each."""
    tools = [call for call in doctree.findall(desc) if call["objtype"] == "function" and call[0]["module"] != "gfx.pl"]
    for field in [field for tool in tools for field in tool.findall(nodes.field)]:
        items = [*field[1][0].children] if field[0].astext() == "Parameters" else []
        if len(items) <= 8:
            continue
        groups: dict[str, list[nodes.Node]] = {group: [] for group in ("What is done", *_GROUPS)}
        for position, item in enumerate(items):
            name = next(item.findall(nodes.strong)).astext()
            group = next((group for group, names in _GROUPS.items() if name in names), "What is done")
            # The column that a classifier predicts is `groupby`, too, in second place.
            groups["What is done" if (position, name) == (1, "groupby") else group].append(item)
        field[1].clear()
        for group, members in groups.items():
            if members:
                field[1] += nodes.paragraph("", "", nodes.emphasis(text=group), classes=["argument-group"])
                field[1] += nodes.bullet_list("", *members)


def setup(app: Sphinx) -> None:
    """Connect what is defined here."""
    app.connect("missing-reference", _qualify, priority=400)
    app.connect("autodoc-before-process-signature", _spell_out)
    app.connect("autodoc-process-docstring", _draw_example, priority=400)  # napoleon comes next
    app.connect("doctree-read", _group_arguments)


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
            f"`GFX_{field.name.upper()}`" if field.name != "client" else "",  # an object
            f"`{field.default!r}`",
            " ".join(meanings["Settings", field.name]),
        )
        for field in fields(gfx.settings)
    ]
    columns = ["setting", "environment variable", "default", "meaning"]
    pd.DataFrame(rows, columns=columns).to_csv(GENERATED / "settings.csv", index=False)


_write_tables()


# --- tutorials: pages of their own, and a card for each on the page that lists them ----------------------------------


def _fit(picture: bytes) -> Image.Image:
    """Bring a picture into the form of a card, 4 to 3: of several panels side by side, the first is shown."""
    image = Image.open(BytesIO(picture)).convert("RGB")
    drawn = np.flatnonzero(np.asarray(image.convert("L")).min(axis=0) < 250)
    gaps = (np.diff(drawn) - 1) * ((image.height * 0.8 < drawn) & (drawn < image.height * 1.5))[:-1]
    if image.width > image.height * 1.7 and gaps.any():
        image = image.crop((0, 0, drawn[gaps.argmax()] + 5, image.height))
    size = max(image.width, image.height * 4 // 3), max(image.height, image.width * 3 // 4)
    card = Image.new("RGB", size, "white")
    card.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return card


def _card(notebook: Path) -> str:
    """Write the card of a notebook: its title, its question (or first sentence), and the picture of its tagged cell."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    title, paragraph = re.match(r"# *(.+)\s+(?:\*\*[^*]+\*\*\s*)?(.+(?:\n.+)*)", text).groups()
    sentences = re.split(r"(?<=[.?!])\s+", paragraph)
    question = next((sentence for sentence in sentences if sentence.endswith("?")), sentences[0])
    tagged = [cell for cell in cells if "thumbnail" in cell["metadata"].get("tags", [])]
    outputs = [output.get("data", {}) for cell in tagged for output in cell["outputs"]]
    picture = next(("".join(data["image/png"]) for data in outputs if "image/png" in data), None)
    options = f":link: {notebook.stem}\n:link-type: doc"
    if picture:
        _fit(base64.b64decode(picture)).save(GENERATED / f"{notebook.stem}.png")
        options += f"\n:img-top: /generated/{notebook.stem}.png\n:img-alt: {title}"
    return f":::{{grid-item-card}} {title}\n{options}\n\n{question}\n:::\n"


def _add_tutorials() -> None:
    pages = HERE / "tutorials"
    notebooks = sorted((HERE.parent / "tutorials").glob("[0-9]*.ipynb"))
    for page in {*pages.glob("*.ipynb")} - {pages / notebook.name for notebook in notebooks}:
        page.unlink()
    for notebook in notebooks:
        shutil.copy2(notebook, pages)
    cards = "\n".join(_card(notebook) for notebook in notebooks)
    toctree = "\n".join(notebook.stem for notebook in notebooks)
    (GENERATED / "gallery.md").write_text(
        f"::::{{grid}} 1 1 2 3\n:gutter: 3\n\n{cards}::::\n\n```{{toctree}}\n:hidden:\n\n{toctree}\n```\n"
        if notebooks
        else ""
    )


_add_tutorials()
