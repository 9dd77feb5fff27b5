"""Examples from docstrings: what they hold, and that nothing held out was read in training."""

import re

import numpy as np
import pytest

from companion.course import passages
from companion.course.corpus import _found, docstrings, ngrams
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
        assert not _found(ngrams(text), read), text


@pytest.mark.parametrize("name", ["topics", "code_words"])
def test_no_thirteen_words_of_a_held_out_text_stand_in_its_training_split(name):
    read = np.unique(np.concatenate([ngrams(text) for text in texts(name, "train")]))
    assert not any(_found(ngrams(text), read) for text in texts(name, "test"))


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
