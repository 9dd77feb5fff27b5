"""Baselines answer the questions of the tasks, and are no straw men."""

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier

from companion import load_task
from companion.course import passages
from companion.course.baselines import BASELINES, looks_like_code
from companion.course.sources import load_tokenizer
from companion.data.text import Trigram, encode
from companion.evaluation.estimates import Scores
from companion.evaluation.metrics import span_f1


@pytest.fixture(scope="module", params=BASELINES)
def scored(request):
    _, function = BASELINES[request.param]
    return request.param, function()


def test_they_score_every_example_of_the_test_split(scored):
    name, scores = scored
    assert isinstance(scores, Scores)
    n = {
        "language-reference": lambda: 20,
        "cloze": lambda: len(passages.continuations()["test"]),
        "topics": lambda: len(passages.topics()["test"]),
        "summaries": lambda: sum(p.summary is not None for p in passages.summaries()["test"]),
        "code-words": lambda: len(passages.code_words()["test"]),
    }[name]()
    assert len(scores.total) == len(scores.weight) == n
    assert load_task(name).name == name


def test_they_do_better_than_no_model(scored):
    name, scores = scored
    found = scores.estimate()
    if name == "language-reference":
        assert found.high < np.log(4096)
        tokens = [len(row) for row in encode(_reference(), load_tokenizer())]
        assert scores.weight.tolist() == tokens
    elif name == "cloze":
        assert found.low > 0.25
    elif name == "topics":
        train, test = passages.topics()["train"], passages.topics()["test"]
        constant = DummyClassifier().fit([[0]] * len(train), [t.label for t in train])
        assert found.low > constant.score([[0]] * len(test), [t.label for t in test])
    elif name == "summaries":
        assert found.low > 0.1  # chance is one in a thousand
    else:
        test = passages.code_words()["test"]
        rule = span_f1([["B-code" if looks_like_code(w) else "O" for w in t.words] for t in test],
                       [t.tags for t in test])  # fmt: skip
        assert scores.value > rule.value > 0.2


def _reference():
    from companion.course.corpus import language_reference

    return language_reference().test


def test_the_trigram_knows_the_order_of_what_it_read():
    tokenizer = load_tokenizer()
    read = encode(["the array of values"] * 3 + ["another text entirely"], tokenizer)
    model = Trigram.train(read, len(tokenizer), tokenizer.bos_token_id)
    texts = encode(["the array of values", "values the of array"], tokenizer)
    known, strange = model.losses(texts, tokenizer.bos_token_id)
    assert known < strange
