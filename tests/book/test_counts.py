"""What every chapter has, counted."""

import re

import pytest

from tests.book.notebooks import BOOK, from_source, sources
from tests.book.test_notebooks import code_cells, load, tags

COLLAPSED = {"hide-input", "hide-cell", "remove-input", "remove-cell"}


def prose(source) -> str:
    cells = from_source(source).cells
    return "\n".join(c.source for c in cells if c.cell_type == "markdown")


@pytest.fixture(params=sources(), ids=lambda p: p.stem)
def source(request):
    return request.param


def test_three_exercises_and_one_of_them_an_experiment(source):
    labels = re.findall(r"```\{exercise\}.*?:label: ([\w-]+)", prose(source), flags=re.S)
    assert len(labels) >= 3
    checked = [label for label in labels if not label.endswith("-experiment")]
    assert len(checked) >= 2


def test_the_first_code_that_is_seen_is_short(source):
    seen = next(c for c in code_cells(load(source)) if not tags(c) & COLLAPSED)
    length = len(seen.source.splitlines())
    assert length <= 12


def test_five_figures_move():
    pages = [*BOOK.glob("*.md"), *sources()]
    asked = {n for p in pages for n in re.findall(r'data-figure="([\w-]+)"', p.read_text())}
    scripts = {p.stem for p in (BOOK / "_static" / "moving").glob("*.js")} - {"moving"}
    assert asked == scripts
    assert len(asked) >= 5


def test_every_moving_figure_has_words_and_a_still_with_alt_text():
    for page in sources():
        for found in re.findall(r'<figure class="moving".*?</figure>', prose(page), flags=re.S):
            assert len(re.search(r"<figcaption>(.*?)</figcaption>", found, re.S)[1]) > 60
            assert len(re.search(r'alt="([^"]*)"', found)[1]) > 60
