"""The pictures of ideas as a browser shows them: in the page, in its theme, nothing cramped."""

import pytest

from book._figures import DRAWINGS
from book._figures.style import PALETTE
from tests.book.test_figures import USES
from tests.site.conftest import WIDTHS, settle

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
WIDER = "* { font-family: 'DejaVu Sans' !important }"  # the widest of the usual faces


@pytest.mark.parametrize("width", WIDTHS)
def test_words_are_large_enough_and_apart(tab, site, width):
    page, faults, seen = tab(width), [], 0
    for path in site.chapters:
        settle(page, path)
        seen += page.locator("figure > svg.concept").count()
        faults += page.evaluate(FAULTS)
        page.add_style_tag(content=WIDER)
        faults += page.evaluate(FAULTS)
    assert not faults, "\n".join(faults)
    assert seen == len(USES)


def test_each_is_an_image_with_a_name_and_a_description(tab, site):
    page, names = tab(390), []
    for path in site.chapters:
        settle(page, path)
        ids = page.locator("[id]").evaluate_all("(all) => all.map((e) => e.id)")
        for svg in page.locator("svg.concept").all():
            assert svg.get_attribute("role") == "img"
            spoken = svg.get_attribute("aria-labelledby").split()
            assert [ids.count(name) for name in spoken] == [1, 1], path
            words = [page.locator(f"[id='{name}']").text_content() for name in spoken]
            assert all(len(w.split()) >= 5 for w in words)
            names.append(spoken[0].removeprefix("fig-").removesuffix("-title"))
    assert sorted(names) == sorted(use["name"] for _, use in USES)
    assert set(names) <= set(DRAWINGS)


def test_colours_follow_the_theme(tab, site):
    page = tab(390)
    settle(page, "ch04_integer_grid.html")
    card = page.locator("svg.concept > rect").first
    for theme, index in (("light", 0), ("dark", 1)):
        page.evaluate("(x) => { document.documentElement.dataset.theme = x }", theme)
        value = PALETTE["card"][index]
        wanted = "rgb({}, {}, {})".format(*(int(value[i : i + 2], 16) for i in (1, 3, 5)))
        assert card.evaluate("(e) => getComputedStyle(e).fill") == wanted


def test_as_a_file_it_shows_on_its_own_light_card(tab, site):
    """As in JupyterLab, where no page sets the colours."""
    page = tab(768)
    page.goto("_static/figures/number-line.svg")
    fill = page.locator("rect").first.evaluate("(e) => getComputedStyle(e).fill")
    assert fill == "rgb(253, 248, 234)"
