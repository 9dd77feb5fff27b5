"""The cover and the pictures of the tale: drawn by book/_art, safe to show, said in words."""

import json
import re
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from book._art.__main__ import PIXELS, STATIC, drawings
from tests.book.notebooks import BOOK, from_source, sources

ROOT = BOOK.parent
SVG = "{http://www.w3.org/2000/svg}"
DRAWN = drawings()
PICTURE = re.compile(r"!\[([^\]]+)\]\((_static/tale/[\w-]+\.svg)\)")


@pytest.mark.parametrize("name", DRAWN)
def test_a_drawing_is_what_its_script_draws_and_loads_nothing(name):
    text = (STATIC / name).read_text()
    assert text == DRAWN[name], "python -m book._art"
    root = ET.fromstring(text)
    title = root.find(f"{SVG}title")
    assert root.tag == f"{SVG}svg"
    assert len(title.text) > 10
    assert root.get("aria-labelledby") == title.get("id")
    names = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(names) == len(set(names))
    for element in root.iter():
        assert element.tag.removeprefix(SVG) not in (
            "script",
            "foreignObject",
            "image",
            "style",
            "text",
        )
        for key, value in element.attrib.items():
            assert not key.startswith("on"), key
            for target in re.findall(r"url\(([^)]*)\)", value) + ([value] if "href" in key else []):
                assert target.startswith("#"), target
                assert target[1:] in names, target
    assert len(text) < 100_000


def test_no_file_lies_beside_the_drawings():
    there = {p.relative_to(STATIC).as_posix() for p in (STATIC / "tale").iterdir()}
    assert there == {name for name in DRAWN if name.startswith("tale/")}


@pytest.mark.parametrize("source", sources(), ids=lambda p: p.stem)
def test_every_chapter_opens_with_its_vignette(source):
    opening = from_source(source).cells[0].source
    ((alt, file),) = PICTURE.findall(opening)
    assert file == f"_static/tale/{source.stem[:4]}.svg"
    assert opening.index(file) < opening.index("{epigraph}")
    assert len(alt) > 40
    assert alt.endswith(".")
    assert '<svg xmlns="http://www.w3.org/2000/svg" width="220"' in (BOOK / file).read_text()


def test_the_tale_has_three_pictures_and_the_cover_stands_first():
    found = PICTURE.findall((BOOK / "tale.md").read_text())
    assert [file[13:-4] for _, file in found] == ["curtain", "basket", "evening"]
    assert all(len(alt) > 60 for alt, _ in found)
    intro = (BOOK / "intro.md").read_text()
    for file, theme in (("cover", "only-light"), ("cover-night", "only-dark")):
        block = re.search(rf"```\{{image\}} _static/tale/{file}\.svg\n(.*?)```", intro, re.S)[1]
        assert len(re.search(":alt: (.*)", block)[1]) > 60
        assert f":class: cover {theme}\n" in block
    assert "(book/_static/tale/cover.svg)" in (ROOT / "README.md").read_text()


def test_shared_links_show_the_cover_at_its_size(monkeypatch):
    monkeypatch.syspath_prepend(BOOK / "_ext")
    from course_site.address import COVER

    for name, (_, size) in PIXELS.items():
        with Image.open(STATIC / name) as picture:
            assert picture.format == "PNG"
            assert picture.size == size
    assert COVER == "_static/cover.png"
    assert PIXELS["cover.png"][1] == (1200, 630)


def test_the_first_result_is_that_of_its_file():
    records = json.loads((ROOT / "benchmarks/results/classic_road.json").read_text())["records"]

    def of_100(arm: str, bits: int) -> int:
        right = [
            p == y
            for r in records
            if (r["arm"], r["bits"], r["lr"]) == (arm, bits, 0.02)
            for p, y in zip(r["predictions"], r["labels"], strict=True)
        ]
        return round(100 * sum(right) / len(right))

    flat = " ".join((BOOK / "intro.md").read_text().split())
    assert f"it names {of_100('ptq', 2)} correctly, and chance would name {100 // 5}" in flat
    assert of_100("qat", 2) == of_100("float", 32)
    assert f"under the same rounding it names {of_100('qat', 2)}" in flat
