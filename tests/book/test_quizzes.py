"""Every chapter asks three questions, and explains every answer to each."""

import re
import sys

import pytest

from tests.book.notebooks import BOOK, from_source, sources

sys.path.insert(0, str(BOOK / "_ext"))
from course_site.quizzes import FOLDER, read

FILES = sorted(FOLDER.glob("*.md"))
ORDER = "*A question to predict first:*", ":::{admonition} Before you read on"


def prose(source) -> str:
    cells = from_source(source).cells
    return "\n\n".join(c.source for c in cells if c.cell_type == "markdown")


def test_there_is_one_for_each_chapter():
    assert [file.stem for file in FILES] == [source.stem[:4] for source in sources()]


@pytest.fixture(params=FILES, ids=lambda p: p.stem)
def questions(request):
    return read(request.param.read_text())


def test_three_questions_with_explained_answers(questions):
    assert len(questions) >= 3
    for question in questions:
        assert "?" in question.text
        assert len(question.answers) >= 3
        assert [a.right for a in question.answers].count(True) == 1
        assert all(len(a.why.split()) >= 5 for a in question.answers), question.title
        assert len({a.why for a in question.answers}) == len(question.answers)


def test_the_right_answers_place_varies(questions):
    assert len({[a.right for a in q.answers].index(True) for q in questions}) >= 2


def test_no_place_is_right_more_often_than_half_of_the_time():
    places = [[a.right for a in q.answers].index(True) for f in FILES for q in read(f.read_text())]
    assert max(places.count(place) for place in set(places)) <= len(places) / 2


@pytest.mark.parametrize(
    "text",
    [
        "## T\n\nQ?\n\n- [x] a\n\n  because\n\n- [ ] b\n",
        "## T\n\nQ?\n\n- [ ] a\n\n  because\n\n- [ ] b\n\n  because\n",
        "## T\n\nQ?\n\n- [x] a\n\n  because\n\n- [x] b\n\n  because\n",
    ],
    ids=["no reason", "none right", "two right"],
)
def test_a_faulty_file_is_refused(text):
    with pytest.raises(ValueError, match="every answer needs its reason"):
        read(text)


@pytest.mark.parametrize("source", sources(), ids=lambda p: p.stem)
def test_the_chapter_shows_it_before_the_exercises(source):
    text, name = prose(source), source.stem[:4]
    placed = re.findall(r"^```\{quiz\} (\S+)$", text, flags=re.M)
    assert placed == [name]
    assert text.index("{quiz}") < text.index("## Exercises")
    assert f"_quizzes/{name}.md" in text  # what a reader of the notebook is told


@pytest.mark.parametrize("source", sources(), ids=lambda p: p.stem)
def test_the_chapter_asks_for_a_prediction(source):
    text = prose(source)
    asked = [text.index(opening) for opening in ORDER if opening in text]
    assert asked
    assert "?" in text[asked[0] : asked[0] + 500]
    assert min(asked) < text.index("## Exercises")
