"""Examples from docstrings: what they hold, and that nothing held out was read in training."""

import json
import re

import numpy as np
import pytest

from companion.course import passages
from companion.course.corpus import PACKAGES, any_in, docstrings, ngrams
from companion.course.passages import _cut, _pair, _passage, _tagged, _without_marks

PARTS = ("train", "validation", "test")


def texts(name, part):
    """All text of a split."""
    examples = getattr(passages, name)()[part]
    if name == "topics":
        return [example.text for example in examples]
    if name == "summaries":
        return [f"{pair.summary or ''} {pair.body}" for pair in examples]
    if name == "code_words":
        return [" ".join(tagged.words) for tagged in examples]
    return [" ".join((q.context, q.choices[0])) for q in examples]


@pytest.mark.parametrize("name", ["topics", "summaries", "code_words"])
def test_no_text_is_in_two_splits(name):
    parts = {part: set(texts(name, part)) for part in PARTS}
    for part in ("validation", "test"):
        assert len(parts[part]) >= 100
        assert not parts[part] & parts["train"]
    assert not parts["validation"] & parts["test"]


@pytest.mark.parametrize("name", ["summaries", "continuations"])
def test_no_thirteen_words_of_a_held_out_text_were_ever_trained_on(name, read):
    """Of all text that docs-lm has read, and so of the task's training split."""
    asked = [text for text in texts(name, "test") if not text.startswith(" ")]  # with a summary
    assert len(asked) > 300
    for text in asked:
        assert not any_in(ngrams(text), read), text


@pytest.mark.parametrize("name", ["topics", "code_words"])
def test_no_thirteen_words_of_a_held_out_text_stand_in_its_training_split(name):
    read = np.unique(np.concatenate([ngrams(text) for text in texts(name, "train")]))
    assert not any(any_in(ngrams(text), read) for text in texts(name, "test"))


def test_topics_hide_the_names():
    found = passages.topics()
    assert np.bincount([topic.label for topic in found["train"]]).tolist() == [20] * 9
    for part in PARTS:
        for topic in found[part]:
            assert not re.search(
                r"(?i)numpy|pandas|scipy|sklearn|torch|sympy|networkx|matplotlib|hugging",
                topic.text,
            )
            assert 8 <= len(topic.text.split()) <= 20


def test_a_passage_has_words_only():
    assert _passage("Title\n=====\nUse numpy here.") == "Title Use library here."


def test_summaries_among_a_thousand_bodies():
    test = passages.summaries()["test"]
    asked = [pair for pair in test if pair.summary is not None]
    assert len(asked) > 600
    assert len({pair.summary for pair in asked}) == len(asked)
    trained = {pair.body for pair in passages.summaries()["train"]}
    assert not trained & {pair.body for pair in test}


def test_a_pair_is_a_summary_and_twenty_words():
    body = " ".join(f"word{i}" for i in range(60))
    (pair,) = _pair(f"Do a\n thing with it.\n\n{body}")
    assert pair.summary == "Do a thing with it."
    assert pair.body == " ".join(body.split()[:20])
    assert list(_pair(f"Short.\n\n{body}")) == []
    assert list(_pair("One paragraph is not enough for this.")) == []


@pytest.mark.parametrize(
    ("text", "words", "tags"),
    [
        ("the ``max_iter`` of it", "the max_iter of it", "O B-code O O"),
        ("see :class:`~a.Bee`, too", "see a.Bee, too", "O B-code O"),
        ("a `two words` b", "a two words b", "O B-code I-code O"),
        ("`one` `two`", "one two", "B-code B-code"),
        ("a :ref:`guide <target>` b", "a guide b", "O B-code O"),
        ("none at all", "none at all", "O O O"),
    ],
)
def test_marks_are_taken_away_and_remembered(text, words, tags):
    assert _without_marks(text) == (tuple(words.split()), tuple(tags.split()))


def test_code_words_come_from_prose():
    prose = "The value of ``x`` is what the function will use later on."
    assert len(list(_tagged(prose))) == 1
    assert list(_tagged(">>> " + prose)) == []
    assert list(_tagged(prose.replace("``", ""))) == []
    assert list(_tagged("``a`` ``b`` ``c`` ``d`` ``e`` f g h")) == []
    assert not any("`" in word for part in PARTS for t in passages.code_words()[part]
                   for word in t.words)  # fmt: skip


def test_continuations_are_of_the_same_package():
    corpus = docstrings(progress=False)
    owners = {}
    for document, package in zip(corpus.test, corpus.packages["test"], strict=True):
        if (cut := _cut(document)) is not None:
            owners.setdefault(cut[1], set()).add(package)
    for question in passages.continuations()["test"]:
        assert len(set(question.choices)) == 4
        common = set.intersection(*(owners[choice] for choice in question.choices))
        assert common


INSTRUCTED = {
    "instructed_summaries": passages.instructed_summaries,
    "instructed_json": passages.instructed_json,
}


def told(example) -> str:
    return f"{example.completion}\n" + example.prompt.partition("\n")[2]


@pytest.mark.parametrize("name", INSTRUCTED)
def test_instructions_are_enough_and_of_files_of_their_own(name):
    found = INSTRUCTED[name](10**6, 10**6)
    assert len(found["train"]) >= {"instructed_summaries": 5000, "instructed_json": 2000}[name]
    assert len(found["test"]) >= 300
    assert len(found["validation"]) >= 100
    assert [len(INSTRUCTED[name](50, 40)[part]) for part in PARTS] == [50, 10, 40]
    corpus, files = docstrings(progress=False), {}
    for part in PARTS:
        for document, file in zip(getattr(corpus, part), corpus.modules[part], strict=True):
            files.setdefault(" ".join(document.partition("\n\n")[0].split()), set()).add(file)
    assert all(
        file.partition("/")[0] in PACKAGES for part in PARTS for file in corpus.modules[part]
    )
    owned = {part: {passages._part(f) for e in found[part] for f in files[summary(e)]
                    if len(files[summary(e)]) == 1} for part in PARTS}  # fmt: skip
    assert owned == {part: {part} for part in PARTS}


def summary(example) -> str:
    if example.completion.startswith("{"):
        return json.loads(example.completion)["summary"]
    return example.completion


@pytest.mark.parametrize("name", INSTRUCTED)
def test_no_instruction_is_seen_twice(name):
    found = INSTRUCTED[name]()
    answers = [example.completion for part in PARTS for example in found[part]]
    read = np.unique(np.concatenate([ngrams(told(e)) for e in found["train"]]))
    for part in ("validation", "test"):
        assert not any(any_in(ngrams(told(example)), read) for example in found[part])
    assert len(set(answers)) == len(answers)
    seen: set[int] = set()
    for example in found["train"] + found["test"]:
        grams = ngrams(told(example), 8).tolist()
        assert 2 * len(seen.intersection(grams)) < len(grams)
        seen.update(grams)


def test_a_summary_is_asked_for_behind_its_body():
    body = " ".join(f"word{i} is." for i in range(100))
    prompt, answer = passages._summary_asked(f"Do a thing\nwith it.\n\n{body}")
    assert answer == "Do a thing with it."
    assert prompt.startswith("Write the summary line of this docstring.\n\nword0 is.")
    assert prompt.endswith(" is.")
    assert len(prompt) < 660
    for other in ("Do it.", "do a thing with it.", "Do a thing with: it.", "Do this. Then do that.",
                  "Do a thing with it", "Do a thing with it..", ">>> do a thing."):  # fmt: skip
        assert passages._summary_asked(f"{other}\n\n{body}") is None, other
    assert passages._summary_asked("Do a thing with it.\n\nToo short.") is None
    assert passages._summary_asked(f"Do a thing with it.\n\nDo a thing with it. {body}") is None


def test_a_beginning_ends_with_a_sentence_or_a_line_and_no_heading():
    assert passages._beginning("One. Two. Three.", 12) == "One. Two."
    assert passages._beginning("a line\nanother line", 12) == "a line"
    assert passages._beginning("whole", 12) == "whole"
    assert passages._beginning("One.\n\nNotes\n-----\nIt is so.", 16) == "One."
    assert passages._beginning("one word without an end", 12) == ""


DOCUMENTED = """Do a thing with it.

More about it, which is not asked.

Parameters
----------
x, y : array
    What: it is.
*args
    More.
axis : int, optional

Returns
-------
float
    The value.

Raises
------
ValueError
    If it is not.
numpy.linalg.LinAlgError

Notes
-----
None.
"""


def test_json_says_what_a_docstring_documents():
    prompt, answer = passages._json_asked(DOCUMENTED)
    assert json.loads(answer) == {
        "summary": "Do a thing with it.",
        "parameters": ["x", "y", "*args", "axis"],
        "raises": ["ValueError", "numpy.linalg.LinAlgError"],
    }
    assert prompt.endswith("If it is not.\nnumpy.linalg.LinAlgError")
    assert "not asked" not in prompt
    assert "The value." in prompt
    assert passages._json_asked(DOCUMENTED.replace("Parameters", "Attributes")) is None
    assert passages._json_asked(DOCUMENTED.replace("*args\n", "any more\n")) is None
    assert passages._json_asked(DOCUMENTED.replace("More.", "More. " * 200)) is None
    for part in PARTS:
        for example in passages.instructed_json()[part]:
            asked = json.loads(example.completion)
            assert all(name in example.prompt for name in (asked["summary"], *asked["parameters"]))
