"""What the pages say of themselves and where they lead, read from their text."""

import re
from collections import Counter
from html.parser import HTMLParser
from posixpath import dirname, join, normpath
from urllib.parse import unquote, urlsplit

import pytest


class Reader(HTMLParser):
    """Collect the names and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.assets: list[str] = []
        self.alts: list[str] = []
        self.meta: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        for name in ("src", "href"):
            loads = tag in ("img", "script", "link", "source", "iframe")
            if loads and values.get(name) and values.get("rel") != "canonical":
                self.assets.append(values[name])
        if tag == "img":
            self.alts.append(values.get("alt") or "")
        if tag == "meta" and values.get("property"):
            self.meta[values["property"]] = values["content"]


@pytest.fixture(scope="module")
def read(site):
    return {path: Reader((site.folder / path).read_text()) for path in [*site.pages, "index.html"]}


def test_every_link_and_anchor_leads_somewhere(read, site):
    faults = []
    for path, page in read.items():
        for link in page.links + page.assets:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = normpath(join(dirname(path), unquote(parts.path))) if parts.path else path
            anchor = unquote(parts.fragment)
            if not (site.folder / target).is_file():
                faults.append(f"{path} leads to {link}, which does not exist")
            elif anchor and target in read and anchor not in read[target].ids:
                faults.append(f"{path} leads to {link}: no such anchor")
    assert not faults, "\n".join(sorted(set(faults)))


def test_no_id_stands_twice_on_a_page(read):
    faults = [
        f"{path}: {name} {n} times"
        for path, page in read.items()
        for name, n in Counter(page.ids).items()
        if n > 1
    ]
    assert not faults, "\n".join(faults)


def test_no_word_became_an_address(read):
    """A link to elsewhere was written as one: https, or a name with its scheme."""
    faults = [f"{p}: {a}" for p, page in read.items() for a in page.links if a.startswith("http:")]
    assert not faults, "\n".join(faults)


def test_nothing_is_loaded_from_elsewhere(read):
    faults = [f"{p}: {a}" for p, page in read.items() for a in page.assets if urlsplit(a).netloc]
    assert not faults, "\n".join(faults)


def test_shared_links_have_a_name_a_title_a_picture_and_words_of_the_text(read, site):
    for path, page in read.items():
        if re.match(r"ch|intro|tale|next|glossary|reference/", path):
            assert page.meta["og:site_name"] == "The Yellow Brick Road to Few Bits"
            assert page.meta["og:title"]
            first = page.meta["og:description"]
            assert not [alt for alt in page.alts if alt[:40] in first and alt], path
            picture = page.meta["og:image"]
            if not urlsplit(picture).netloc:
                assert (site.folder / normpath(join(dirname(path), picture))).is_file(), path


def test_the_reference_has_a_page_for_each_room_and_an_entry_for_each_public_name(read, site):
    import companion

    ids = {
        name for path, page in read.items() if path.startswith("reference/") for name in page.ids
    }
    for module, names in companion._HOME.items():
        for name in names:
            assert f"companion.{module}.{name}" in ids, name
    rooms = {p.parent.name for p in (site.folder.parents[1] / "companion").glob("*/__init__.py")}
    assert rooms == {p[10:-5] for p in site.pages if p.startswith("reference/")}
