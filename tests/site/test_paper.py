"""The book on paper: one sheet of formulas, and all of it as one file with bookmarks and links."""

import subprocess
import sys
from io import BytesIO

import pytest
from pypdf import PdfReader

from book._pdf import TITLE, entries, write
from tests.book.notebooks import BOOK
from tests.site.conftest import settle


def sheets(page, form: str) -> PdfReader:
    return PdfReader(BytesIO(page.pdf(format=form, print_background=True)))


@pytest.mark.parametrize("form", ["A4", "Letter"])
def test_the_road_on_one_page_is_one_page_and_nothing_is_cut(tab, form):
    page = tab(900)
    settle(page, "one_page.html")
    page.emulate_media(media="print")
    (sheet,) = sheets(page, form).pages
    words = " ".join(sheet.extract_text().split())
    for part in ("The grid.", "The road.", "Which road?", "Ways out.", "Before you believe"):
        assert part in words
    page.set_viewport_size({"width": 718, "height": 1000})  # what A4 leaves between its margins
    cut = page.locator(".sheet :is(pre, table, .math)").evaluate_all(
        "(all) => all.filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)"
    )
    assert not cut


def test_menus_are_not_printed(tab):
    page = tab(900)
    settle(page, "ch04_integer_grid.html")
    page.emulate_media(media="print")
    for menu in (".bd-sidebar-primary", ".bd-sidebar-secondary", ".bd-header-article",
                 ".prev-next-footer", "#jb-print-toc", ".copybtn"):  # fmt: skip
        assert not page.locator(menu).locator("visible=true").count(), menu


@pytest.fixture(scope="module")
def whole(site, browser, tmp_path_factory):
    file = tmp_path_factory.mktemp("pdf") / "book.pdf"
    return PdfReader(write(site.folder, file, browser, said=lambda line: None))


def bookmarks(items, depth=0):
    for item in items:
        if isinstance(item, list):
            yield from bookmarks(item, depth + 1)
        else:
            yield depth, item


def test_the_whole_book_has_its_pages_titles_and_bookmarks(whole, site):
    assert len(whole.pages) > 5 * len(site.chapters)
    assert whole.metadata.title == TITLE
    marked = list(bookmarks(whole.outline))
    tale = [item.title for _, item in marked].index("The tale")  # before it stands the welcome
    chapters = [
        (item.title, whole.get_destination_page_number(item))
        for depth, item in marked[tale:]
        if depth == 1
    ]
    assert len(chapters) == len(entries()) - 1
    numbered = [(title, page) for title, page in chapters if title[0].isdigit()]
    assert [title.split(" · ")[0] for title, _ in numbered] == [
        str(n + 1) for n in range(len(site.chapters))
    ]
    for title, page in chapters:
        text = whole.pages[page].extract_text()
        assert "".join(title.split()) in "".join(text.split()), title
    assert [page for _, page in chapters] == sorted(page for _, page in chapters)
    sections = [item.title for depth, item in marked if depth == 2]
    assert sections.count("Quiz") >= 14
    assert "Fusion: batch norm disappears into the convolution" in sections


def test_links_lead_inside_and_name_nothing_of_this_machine(whole):
    inside = 0
    for page in whole.pages:
        for link in page.get("/Annots") or []:
            link = link.get_object()
            uri = str(link.get("/A", {}).get("/URI", ""))
            assert not uri.startswith("file"), uri
            inside += not uri
    assert inside > 500


def test_moving_figures_are_stills_and_solutions_are_open(whole):
    words = "".join("".join(p.extract_text().split()) for p in whole.pages)
    assert words.count("Astillof") == len(
        [p for p in BOOK.glob("ch*.py") for _ in range(p.read_text().count("data-figure="))]
    )
    assert "Quantizebeforeandafter,andcountthedifferences." in words  # a solution of chapter 6


def test_without_a_book_there_is_one_sentence(tmp_path, monkeypatch):
    code = "import pathlib, book._pdf.__main__ as m; m.SITE = pathlib.Path('nowhere'); m.main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         cwd=BOOK.parent)  # fmt: skip
    assert run.returncode == 1
    assert "make book" in run.stderr or "Chromium" in run.stderr
