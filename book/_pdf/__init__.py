"""The whole book as one PDF: Chromium prints the built pages, and this joins them.

Every page is printed as a reader would print it, with its boxes open and its moving figures as stills.
Joined, they get a cover, bookmarks for parts, chapters and sections, and links that lead from page to
page inside the file.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urldefrag

import yaml
from pypdf import PdfReader, PdfWriter
from pypdf.annotations import Link
from pypdf.generic import ArrayObject, Fit, NameObject

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BOOK = Path(__file__).parents[1]
TITLE = "The Yellow Brick Road to Few Bits"
COVER = """<!DOCTYPE html><meta charset="utf-8"><title>{title}</title>
<style>
  body {{ margin: 0; font-family: sans-serif; color: #22304a; text-align: center; }}
  img {{ width: 100%; }}
  h1 {{ font-size: 34pt; margin: 22mm 0 6mm; }}
  p {{ font-size: 13pt; margin: 0 12mm 18mm; line-height: 1.5; }}
</style>
<h1>{title}</h1>
<p>A course on quantization-aware fine-tuning in PyTorch</p>
<img src="{image}" alt="">"""
OPEN = """async (title) => {
  await window.MathJax?.startup?.promise;
  document.querySelectorAll("details").forEach((box) => { box.open = true; });
  document.documentElement.dataset.theme = "light";
  const heading = document.querySelector("#jb-print-docs-body h1");
  if (heading) heading.textContent = title;
  document.querySelectorAll("img[loading]").forEach((e) => { e.loading = "eager"; });
  await Promise.all([...document.images].map((e) => e.decode().catch(() => {})));
}"""


HEADINGS = """() => [...document.querySelectorAll(".bd-article :is(h2, h3)")].map((e) => {
  const own = e.cloneNode(true);
  own.querySelectorAll(".headerlink, mjx-assistive-mml").forEach((x) => x.remove());
  return own.textContent.trim();
})"""


class Entry(NamedTuple):
    """A page of the book and the part that it belongs to."""

    name: str
    part: str


@dataclass
class Printed:
    """One printed page of the site: its sheets, and where they begin in the whole."""

    title: str
    reader: PdfReader
    first: int
    places: dict[str, int] = field(default_factory=dict)  # of its fragments


def entries() -> list[Entry]:
    """Return the pages in the order of the table of contents."""
    contents = yaml.safe_load((BOOK / "_toc.yml").read_text())
    found = [Entry(contents["root"], "")]
    for part in contents["parts"]:
        for chapter in part["chapters"]:
            found.append(Entry(chapter["file"], part["caption"]))
            found += [
                Entry(section["file"], part["caption"])
                for section in chapter.get("sections", ())
            ]
    return found


def print_page(page: Page, address: str) -> bytes:
    """Return a page as a PDF, open and at rest."""
    page.goto(address, wait_until="load")
    page.emulate_media(media="print", color_scheme="light")
    page.evaluate(OPEN, title_of(page))
    return page.pdf(
        format="A4",
        print_background=True,
        outline=True,
        tagged=True,
        prefer_css_page_size=False,
    )


def title_of(page: Page) -> str:
    """Return a page's title with its chapter's number, without the book's."""
    return page.title().rpartition(" — ")[0] or page.title()


def links(sheet: Any) -> list[Any]:
    """Take the links off a sheet and return them."""
    every = sheet.get("/Annots") or []
    found = [a.get_object() for a in every]
    taken = [a for a in found if a.get("/Subtype") == "/Link"]
    kept = [a for a in every if a.get_object() not in taken]
    sheet[NameObject("/Annots")] = ArrayObject(kept)
    return taken


def target(
    link: Any, here: str, printed: dict[str, Printed], root: str
) -> int | str | None:
    """Return the sheet that a link leads to, or an address outside, None where it leads nowhere."""
    if "/Dest" in link:
        return printed[here].places.get(str(link["/Dest"]).lstrip("/"))
    uri = str(link.get("/A", {}).get("/URI", ""))
    if not uri.startswith(root):
        return uri if uri.startswith("http") else None
    address, fragment = urldefrag(uri)
    name = unquote(address[len(root) :]).removesuffix(".html")
    if name not in printed:
        return None
    other = printed[name]
    return other.places.get(unquote(fragment), other.first)


def fragments(reader: PdfReader, first: int) -> dict[str, int]:
    """Return the sheet on which each named place lies, counted in the whole."""
    places = {}
    for name, place in reader.named_destinations.items():
        number = reader.get_destination_page_number(place)
        if number is not None and number >= 0:
            places[str(name).lstrip("/")] = first + number
    return places


def write(
    site: Path,
    file: Path,
    browser: Browser,
    *,
    names: list[str] | None = None,
    said: Callable[[str], None] = print,
) -> Path:
    """Print the pages of a built book and join them.

    Parameters
    ----------
    site : Path
        The folder of the built pages.
    file : Path
        What is written.
    browser : playwright.sync_api.Browser
        Chromium.
    names : list of str, optional
        The pages to print; all of the table of contents where it is left out.
    said : callable
        Is told each page's name and its sheets.
    """
    root = site.resolve().as_uri() + "/"
    context = browser.new_context(viewport={"width": 900, "height": 1200})
    page = context.new_page()
    page.route(
        re.compile(r"/moving/[\w.-]+\.js"), lambda route: route.abort()
    )
    writer, printed, part = PdfWriter(), {}, None
    add_cover(writer, page, site)
    above = None
    for entry in entries():
        if names is not None and entry.name not in names:
            continue
        reader = PdfReader(
            BytesIO(print_page(page, f"{root}{entry.name}.html"))
        )
        first, title = len(writer.pages), title_of(page)
        for sheet in reader.pages:
            writer.add_page(sheet)
        printed[entry.name] = Printed(title, reader, first)
        printed[entry.name].places = fragments(reader, first)
        if entry.part != part:
            part = entry.part
            above = writer.add_outline_item(part, first) if part else None
        chapter = writer.add_outline_item(title, first, parent=above)
        add_sections(
            writer, reader, first, chapter, page.evaluate(HEADINGS)
        )
        said(f"{title}: {len(reader.pages)} pages")
    context.close()
    for name, one in printed.items():
        for number in range(one.first, one.first + len(one.reader.pages)):
            for link in links(writer.pages[number]):
                place = target(link, name, printed, root)
                if place is not None:
                    where = (
                        {"url": place}
                        if isinstance(place, str)
                        else {"target_page_index": place, "fit": Fit.fit()}
                    )
                    writer.add_annotation(
                        number, Link(rect=link["/Rect"], **where)
                    )
    writer.add_metadata({"/Title": TITLE, "/Author": "the founders"})
    writer.compress_identical_objects(
        remove_duplicates=True, remove_unreferenced=True
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    writer.write(file)
    return file


def add_cover(writer: PdfWriter, page: Page, site: Path) -> None:
    """Put the cover in front."""
    image = (site / "_static/tale/cover.svg").resolve().as_uri()
    page.goto(
        f"{site.resolve().as_uri()}/intro.html"
    )  # from there it may show the picture
    page.set_content(
        COVER.format(title=html.escape(TITLE), image=image),
        wait_until="load",
    )
    for sheet in PdfReader(
        BytesIO(page.pdf(format="A4", print_background=True))
    ).pages:
        writer.add_page(sheet)
    writer.add_outline_item("Cover", 0)


def add_sections(
    writer: PdfWriter,
    reader: PdfReader,
    first: int,
    chapter: Any,
    headings: list[str],
) -> None:
    """Put a bookmark for each section below that of its chapter.

    Chromium leaves out the space where a heading breaks, so the words are taken from the page.
    """
    words = {"".join(heading.split()): heading for heading in headings}

    def walk(items: list) -> None:
        for item in items:
            if isinstance(item, list):
                walk(item)
                continue
            number = reader.get_destination_page_number(item)
            heading = words.get("".join(item.title.split()))
            if heading and number is not None:
                writer.add_outline_item(
                    heading, first + number, parent=chapter
                )

    walk(reader.outline)
