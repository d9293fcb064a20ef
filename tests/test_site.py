"""The documentation as a browser shows it: `make docs` builds it, and without it, or without a browser, tests skip."""

from __future__ import annotations

import functools
import http.server
import inspect
import re
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import gfx

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: The pages with the source of modules are wide inside their boxes only, and all of one make.
PAGES = sorted(page.relative_to(SITE).as_posix() for page in SITE.rglob("*.html"))
PAGES = [page for page in PAGES if not page.startswith(("_static", "_modules"))]

pytestmark = [
    pytest.mark.skipif(not PAGES, reason="the documentation is not built: make docs"),
    pytest.mark.skipif(BROWSER is None, reason="there is no chromium or chrome"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing of requests."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser.new_page()
        browser.close()


#: What is read without scrolling at a desk, and on which pages: code, what cells print, and tables.
BOXES = "div.highlight pre, div.cell_output pre, div.cell_output .text_html, div.pst-scrollable-table-container"
UNCUT = re.compile(r"(?:api/)?index|screening|classification|tutorials/(?:index|\d.+)|generated/gfx\.pl\..+")


def test_every_page_fits_a_phone_and_a_desk_without_an_error(page: Page, address: str) -> None:
    problems: list[str] = []
    page.on("console", lambda message: message.type == "error" and problems.append(f"{page.url}: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"{page.url}: {error}"))
    page.on("request", lambda request: request.url.startswith((address, "data:")) or problems.append(request.url))
    cut = "boxes => boxes.filter(box => box.scrollWidth > box.clientWidth).map(box => box.innerText)"
    n_boxes = 0
    for name in PAGES:
        page.goto(f"{address}/{name}")
        for width in (390, 1440):
            page.set_viewport_size({"width": width, "height": 900})
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                problems.append(f"{name}: {wide} px wide in a window of {width}")
        if UNCUT.fullmatch(name.removesuffix(".html")):
            shown = page.locator(BOXES)
            n_boxes += shown.count()
            problems += [f"{name}: cut at a desk: {text[:200]}" for text in shown.evaluate_all(cut)]
    assert n_boxes > 100
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", ["generated/gfx.pl.screen.html", "screening.html"])
def test_pictures_are_legible_in_the_dark(page: Page, address: str, name: str) -> None:
    """Their letters are black on nothing, and the theme would make them paler."""
    page.goto(f"{address}/{name}")
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    pictures = page.locator("article.bd-article img")
    looks = "images => images.map(i => getComputedStyle(i)).map(look => [look.backgroundColor, look.filter])"
    assert pictures.count()
    assert {tuple(look) for look in pictures.evaluate_all(looks)} == {("rgb(255, 255, 255)", "none")}


def test_cards_of_tutorials_have_pictures_of_one_form(page: Page, address: str) -> None:
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(f"{address}/tutorials/index.html")
    sizes = page.locator("img.sd-card-img-top").evaluate_all("images => images.map(i => [i.width, i.height])")
    assert len(sizes) == page.locator(".sd-card").count()
    assert len({tuple(size) for size in sizes}) == 1


def test_a_phone_is_shown_the_narrow_overview(page: Page, address: str) -> None:
    for width, file in {390: "overview_narrow.svg", 1440: "overview.svg"}.items():
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(f"{address}/index.html")
        assert page.locator("img.overview").evaluate("image => image.currentSrc").endswith(f"/{file}")


def test_pages_lead_to_the_repository(page: Page, address: str) -> None:
    page.goto(f"{address}/index.html")
    assert page.locator('a[href="https://github.com/OWNER/gfx"]').count()


def test_arguments_of_tools_with_more_than_eight_are_in_groups() -> None:
    names = [(part, name) for part in ("pp", "tl", "models") for name in getattr(gfx, part).__all__]
    functions = {f"gfx.{part}.{name}": getattr(getattr(gfx, part), name) for part, name in names}
    long = {
        name
        for name, function in functions.items()
        if inspect.isfunction(function) and len(inspect.signature(function).parameters) > 8
    }
    grouped = {name for name in functions if "argument-group" in (SITE / "generated" / f"{name}.html").read_text()}
    assert grouped == long


def test_signatures_name_no_private_aliases_of_types() -> None:
    """The aliases are assigned in the source, in capitals, from types that are joined or subscripted."""
    source = "\n".join(file.read_text() for file in Path(gfx.__file__).parent.rglob("*.py"))
    types = r"^ *([A-Z]\w+)(?:: TypeAlias)? = (?:Literal|Mapping|Iterable|[\w.]+ \||[A-Z]\w+ \|)"
    aliases = set(re.findall(types, source, flags=re.M))
    assert {"Data", "Genes", "GeneLabels", "ModelLike", "Method"} <= aliases
    shown = re.compile(f">({'|'.join(aliases)})<")
    pages = {name: (SITE / name).read_text() for name in PAGES if name.startswith("generated/")}
    assert pages
    assert not {name: shown.findall(text) for name, text in pages.items() if shown.search(text)}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("knockout", "screening.html"),
        ("volcano", "generated/gfx.pl.volcano.html"),
        ("CITE-seq", "data.html"),
        ("UMAP", "embedding.html"),
        ("batch effect", "embedding.html"),
        ("cell type annotation", "classification.html"),
        ("null model", "controls.html"),
        ("validation", "validation.html"),
        ("limitations", "limits.html"),
    ],
)
def test_search_finds_the_page_among_the_first_three(page: Page, address: str, words: str, expected: str) -> None:
    page.goto(f"{address}/search.html?q={words}")
    page.wait_for_function("document.querySelector('#search-results .search-summary')?.innerText.match(/found/)")
    links = page.locator("#search-results ul.search li a").all()[:3]
    assert any(link.get_attribute("href").startswith(expected) for link in links)
