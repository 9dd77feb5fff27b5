"""The pictures of ideas: drawn as committed, in one style, each in its place with words beside it."""

import itertools
import re
from xml.etree import ElementTree

import pytest

from book._figures import DRAWINGS, FOLDER, draw, draw_all
from book._figures.style import MARGIN, PALETTE, SMALL, WIDTH, colour
from tests.book.notebooks import BOOK, from_source, sources

SVG = "{http://www.w3.org/2000/svg}"
NARROWEST = 374  # px that a phone of 390 gives a picture
FIGURES = [
    re.compile(pattern, flags=re.S)
    for pattern in (
        r":::\{figure-md\} (?P<label>\S+)\n\n?"
        r"!\[(?P<alt>[^]]*)\]\(_static/figures/(?P<name>[\w-]+)\.svg\)\n\n"
        r"(?P<caption>.*?)\s*\n:::",
        r"```\{figure\} _static/figures/(?P<name>[\w-]+)\.svg\n"
        r":name: (?P<label>\S+)\n:alt: (?P<alt>[^\n]*)\n\n"
        r"(?P<caption>.*?)\n```",
    )
]
CSS = (BOOK / "_static" / "course.css").read_text()


def shown():
    """Every use of a picture: its page and the parts of its directive."""
    for path in [*sources(), *BOOK.glob("*.md")]:
        text = path.read_text()
        if path.suffix == ".py":
            text = "\n\n".join(
                c.source for c in from_source(path).cells if c.cell_type == "markdown"
            )
        for pattern in FIGURES:
            yield from ((path.name, match) for match in pattern.finditer(text))


USES = list(shown())


@pytest.fixture(params=DRAWINGS)
def name(request):
    return request.param


def test_there_are_as_many_as_ideas():
    assert len(DRAWINGS) >= 16


def test_what_is_committed_is_what_the_command_draws(tmp_path):
    draw_all(tmp_path)
    drawn = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert {p.name: p.read_text() for p in FOLDER.iterdir()} == drawn


def test_what_no_function_draws_any_more_is_removed(tmp_path):
    (tmp_path / "old.svg").write_text("")
    draw_all(tmp_path)
    assert not (tmp_path / "old.svg").exists()


def test_every_picture_is_shown(name):
    assert [page for page, use in USES if use["name"] == name]


def test_no_use_is_written_in_another_way():
    """What the patterns above do not see is not checked below."""
    named = [n for p in [*sources(), *BOOK.glob("*.md")]
             for n in re.findall(r"_static/figures/([\w-]+)\.svg", p.read_text())]  # fmt: skip
    assert sorted(named) == sorted(use["name"] for _, use in USES)
    assert set(named) <= set(DRAWINGS)


@pytest.mark.parametrize(("page", "use"), USES, ids=[use["name"] for _, use in USES])
def test_alt_text_and_caption_are_sentences_of_their_own(page, use):
    for words in (use["alt"], use["caption"]):
        assert len(words) > 60, page
        assert words.rstrip().endswith((".", ".)")), page
    assert use["alt"] != use["caption"]
    # a line that begins so would begin a list
    assert not re.search(r"^(1\.|[-+*]) ", use["alt"], flags=re.M), page


def test_labels_differ():
    labels = [use["label"] for _, use in USES]
    assert len(labels) == len(set(labels))


def test_file_is_a_plain_drawing_with_a_finding_for_a_title(name):
    root = ElementTree.fromstring(draw(name))
    tags = {e.tag.removeprefix(SVG) for e in root.iter()}
    assert tags <= {"svg", "title", "g", "rect", "path", "circle", "text"}
    for element in root.iter():
        assert not {k for k in element.attrib if k.startswith("on") or "href" in k or k == "id"}
        assert "url(" not in " ".join(element.attrib.values())
    title = root.find(f"{SVG}title").text
    assert len(title.split()) >= 5
    words = [e.text for e in root.iter(f"{SVG}text")]
    assert title.startswith(words[0])


def test_type_is_at_least_twelve_pixels_on_a_phone(name):
    root = ElementTree.fromstring(draw(name))
    assert root.get("viewBox").split()[2] == str(WIDTH)
    for element in root.iter(f"{SVG}text"):
        size = float(element.get("font-size", root.get("font-size")))
        assert size >= SMALL
        assert size * NARROWEST / WIDTH >= 12, element.text


def test_colours_are_the_palettes(name):
    used = set(re.findall(r"var\([^)]*\)", draw(name)))
    assert used <= {colour(c) for c in PALETTE}
    assert not re.search(r'(fill|stroke)="(?!var|none)', draw(name))


def test_the_page_sets_the_palette_in_both_themes():
    for theme, index in (("light", 0), ("dark", 1)):
        blocks = re.findall(rf'html\[data-theme="{theme}"\] {{\n(.*?)}}', CSS, flags=re.S)
        (block,) = [b for b in blocks if "--fig-" in b]
        values = dict(re.findall(r"--fig-(\w+): (#\w{6});", block))
        assert values == {name: pair[index] for name, pair in PALETTE.items()}


def luminance(value: str) -> float:
    parts = [int(value[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


GROUNDS = ("card", "wheat", "mint", "rose", "idle")
PAIRS = [
    *itertools.product(("ink",), GROUNDS),
    *itertools.product(("muted",), ("card", "idle")),
    *itertools.product(("red", "emerald"), ("card",)),
    ("night", "brick"),
    ("card", "ink"),
]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(("ink", "ground"), PAIRS)
def test_text_stands_out_from_its_ground(ink, ground, theme):
    bright, dim = sorted((luminance(PALETTE[n][theme]) for n in (ink, ground)), reverse=True)
    assert (bright + 0.05) / (dim + 0.05) >= 4.5


def test_nothing_is_drawn_beyond_the_margins(name):
    """Boxes, and where lines of text begin or end; a browser measures the text itself."""
    root = ElementTree.fromstring(draw(name))
    boxes = [e for e in root.iter(f"{SVG}rect") if e.get("width") != str(WIDTH)]
    for box in boxes:
        left = float(box.get("x"))
        assert left >= MARGIN - 0.01
        assert left + float(box.get("width")) <= WIDTH - MARGIN + 0.01
