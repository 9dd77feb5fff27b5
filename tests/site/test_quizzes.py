"""Quizzes in a browser: choose, check, be told why; by hand, from a keyboard, without scripts, on paper."""

import pytest

from tests.book.test_quizzes import FILES, read
from tests.site.conftest import WIDTHS, settle

PAGE = "ch06_training.html"
ANSWERS = read(FILES[5].read_text())[0].answers
RIGHT = [a.right for a in ANSWERS].index(True)
WRONG = (RIGHT + 1) % len(ANSWERS)


@pytest.fixture(params=WIDTHS)
def field(tab, request):
    """The first question of a chapter."""
    page = tab(request.param)
    settle(page, PAGE)
    return page.locator(".quiz fieldset").first


def test_a_wrong_answer_is_explained_and_then_the_right_one(field):
    said, button = field.locator(".quiz-said"), field.get_by_role("button", name="Check")
    assert button.is_disabled()
    for place, right in ((WRONG, "false"), (RIGHT, "true")):
        field.locator("label").nth(place).click()
        assert said.inner_text() == ""  # nothing is given away before it is asked for
        button.click()
        assert said.get_attribute("data-right") == right
        assert ANSWERS[place].why.split(". ")[0][:25] in said.inner_text()
        assert field.locator("label").nth(place).get_attribute("data-right") == right
        assert field.locator("label[data-right]").count() == 1
    assert said.get_attribute("role") == "status"
    assert not field.locator(".quiz-answers").is_visible()
    for label in field.locator("label").all():
        assert label.bounding_box()["height"] >= 44


def test_it_works_from_a_keyboard(field):
    page, said = field.page, field.locator(".quiz-said")
    field.locator("input").first.focus()
    page.keyboard.press("Space")
    for _ in range(RIGHT):
        page.keyboard.press("ArrowDown")
    assert said.inner_text() == ""  # moving through the answers tells nothing
    page.keyboard.press("Enter")
    assert said.get_attribute("data-right") == "true"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "quiz-check"
    page.keyboard.press("Enter")
    assert said.get_attribute("data-right") == "false"


def test_without_scripts_the_answers_stand_in_a_box(tab):
    page = tab(390, java_script_enabled=False)
    page.goto(PAGE, wait_until="load")
    field = page.locator(".quiz fieldset").first
    assert not field.locator("input").first.is_visible()
    why = field.locator(".quiz-why")
    assert not why.first.is_visible()
    field.locator("summary").click()
    assert why.count() == len(ANSWERS)
    assert all(box.is_visible() for box in why.all())
    assert [box.get_attribute("data-right") for box in why.all()].index("true") == RIGHT


def test_on_paper_all_reasons_are_there(tab):
    page = tab(768)
    settle(page, PAGE)
    page.emulate_media(media="print")
    field = page.locator(".quiz fieldset").first
    assert not field.locator(".quiz-check").is_visible()
    for box in field.locator(".quiz-why").all():
        assert box.bounding_box()["height"] > 20


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chapter_has_its_questions_and_names_do_not_meet(tab, site, scheme):
    page = tab(1400, color_scheme=scheme)
    for path in site.chapters:
        page.goto(path, wait_until="load")
        fields = page.locator(".quiz fieldset")
        if not fields.count():
            assert path[:4] in ("ch11", "ch12", "ch13")  # written, not yet placed
            continue
        names = page.locator(".quiz input").evaluate_all("(all) => all.map((e) => e.name)")
        assert fields.count() >= 3
        assert len(set(names)) == fields.count()
