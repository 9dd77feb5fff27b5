"""The pictures of ideas as a browser shows them: in the page, in its theme, nothing cramped.

One tour opens every chapter once, without its scripts, of which no picture needs any.
"""

from dataclasses import dataclass, field

import pytest

from book._figures.style import PALETTE
from tests.book.test_figures import USES
from tests.site.conftest import WIDTHS

FAULTS = """() => [...document.querySelectorAll('svg.concept')].flatMap((svg) => {
  const card = svg.getBoundingClientRect(), scale = card.width / svg.viewBox.baseVal.width;
  const name = svg.querySelector('title').id, faults = [];
  const words = [...svg.querySelectorAll('text')].map((e) => [e, e.getBoundingClientRect()]);
  words.forEach(([e, box], i) => {
    const size = parseFloat(getComputedStyle(e).fontSize) * scale;
    if (size < 12) faults.push(`${name}: ${e.textContent} is ${size.toFixed(1)} px high`);
    if (box.left < card.left + 8 || box.right > card.right - 8 || box.bottom > card.bottom - 4)
      faults.push(`${name}: ${e.textContent} leaves the card`);
    words.slice(0, i).forEach(([other, its]) => {
      const across = Math.min(box.right, its.right) - Math.max(box.left, its.left);
      const down = Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top);
      if (across > -scale && down > 0.25 * Math.min(box.height, its.height))
        faults.push(`${name}: ${e.textContent} meets ${other.textContent}`);
    });
  });
  return faults;
})"""
WIDE_FACE = "* { font-family: 'DejaVu Sans' !important }"  # the widest of the usual ones
# add_style_tag would wait for an event that never comes where scripts are off
STYLE = """(rules) => {
  document.head.append(Object.assign(document.createElement('style'), {textContent: rules}));
}"""
SPOKEN = """() => [...document.querySelectorAll('figure svg.concept')].map((svg) => ({
  role: svg.getAttribute('role'),
  words: svg.getAttribute('aria-labelledby').split(' ').map((id) =>
    [...document.querySelectorAll(`[id="${id}"]`)].map((e) => e.textContent)),
}))"""
CARD = """(theme) => { document.documentElement.dataset.theme = theme;
  return [...document.querySelectorAll('svg.concept > rect')].map((e) => getComputedStyle(e).fill); }"""


@dataclass
class Seen:
    """What the tour found: faults by width, what is spoken, colours by theme."""

    faults: dict[int, list[str]] = field(default_factory=lambda: {w: [] for w in WIDTHS})
    spoken: list[dict] = field(default_factory=list)
    cards: dict[str, set[str]] = field(default_factory=lambda: {"light": set(), "dark": set()})


@pytest.fixture(scope="module")
def seen(browser, site):
    found = Seen()
    with browser.new_context(base_url=site.address, java_script_enabled=False) as context:
        page = context.new_page()
        page.set_default_timeout(120_000)
        for path in site.chapters:
            page.goto(path, wait_until="load")
            found.spoken += page.evaluate(SPOKEN)
            for theme, cards in found.cards.items():
                cards.update(page.evaluate(CARD, theme))
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": 844})
                found.faults[width] += page.evaluate(FAULTS)
            page.evaluate(STYLE, WIDE_FACE)
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": 844})
                found.faults[width] += page.evaluate(FAULTS)
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_words_are_large_enough_and_apart(seen, width):
    assert not seen.faults[width], "\n".join(seen.faults[width])


def test_each_is_an_image_with_a_name_and_a_description_of_its_own(seen):
    assert len(seen.spoken) == len(USES)
    for picture in seen.spoken:
        assert picture["role"] == "img"
        assert [len(found) for found in picture["words"]] == [1, 1]  # no id is there twice
        assert all(len(found[0].split()) >= 5 for found in picture["words"])


def test_colours_follow_the_theme(seen):
    for index, cards in enumerate(seen.cards.values()):
        value = PALETTE["card"][index]
        assert cards == {"rgb({}, {}, {})".format(*(int(value[i : i + 2], 16) for i in (1, 3, 5)))}


def test_as_a_file_it_shows_on_its_own_light_card(tab):
    """As in JupyterLab, where no page sets the colours."""
    page = tab(768)
    page.goto("_static/figures/number-line.svg")
    fill = page.locator("rect").first.evaluate("(e) => getComputedStyle(e).fill")
    assert fill == "rgb(253, 248, 234)"
