"""Loaders: padding, labels of word pieces, places in a batch, order."""

import pytest
import torch

from companion import load_task
from companion.course.passages import code_words, continuations
from companion.course.sources import MINILM, load_tokenizer
from companion.data.examples import (
    ByLength,
    choices,
    classification,
    collate,
    collate_pairs,
    retrieval,
    tagging,
)
from companion.data.text import IGNORED

TEXTS = ["one", "two words", "and now three words", "a rather longer text of seven words"]


def splits(examples):
    return dict.fromkeys(("train", "validation", "test"), examples)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MINILM)


def test_rows_are_padded_to_the_longest_of_their_batch():
    rows = [{"input_ids": [1, 2, 3], "labels": [0, 1, 2]}, {"input_ids": [1], "labels": [0]}]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 0, 0]]
    assert batch["labels"].tolist() == [[0, 1, 2], [0, IGNORED, IGNORED]]


def test_batches_hold_similar_lengths_and_every_row_once():
    lengths = torch.randint(5, 60, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    order = list(ByLength(lengths, 10))
    assert sorted(order) == list(range(1000))
    spread = [
        max(b) - min(b)
        for i in range(0, 1000, 10)
        for b in [[lengths[r] for r in order[i : i + 10]]]
    ]
    assert sum(spread) / len(spread) < 5
    torch.manual_seed(3)
    first = list(ByLength(lengths, 10))
    torch.manual_seed(3)
    assert list(ByLength(lengths, 10)) == first != order


def test_classification(tokenizer):
    examples = [(text, label % 2) for label, text in enumerate(TEXTS)]
    task = classification("t", splits(examples), ("a", "b"), tokenizer, "here", batch_size=2)
    (batch,) = task.test
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == TEXTS
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    assert batch["attention_mask"].sum(1).tolist() == [3, 4, 6, 9]
    assert sum(len(b["labels"]) for b in task.train) == 4
    fixed = classification("t", splits(examples), ("a", "b"), tokenizer, "here", max_length=8,
                           padding="max_length")  # fmt: skip
    assert next(iter(fixed.test))["input_ids"].shape == (4, 8)


def test_the_first_piece_of_a_word_carries_its_tag(tokenizer):
    words, tags = ("use", "untokenizable", "words"), ("O", "B-code", "O")
    task = tagging("t", splits([(words, tags)]), ("O", "B-code", "I-code"), tokenizer, "here")
    (batch,) = task.test
    pieces = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    labels = batch["labels"][0].tolist()
    assert len(pieces) > 5
    for piece, label in zip(pieces, labels, strict=True):
        expected = {"use": 0, "words": 0}.get(piece, IGNORED)
        assert label == (1 if piece.startswith("un") else expected), piece


def test_every_word_of_the_code_words_is_scored_once(tokenizer):
    scored = sum(int((batch["labels"] != IGNORED).sum()) for batch in load_task("code-words").test)
    words = sum(len(tagged.words) for tagged in code_words()["test"])
    assert 0.97 * words < scored <= words  # very long passages are cut


def test_a_summary_is_labelled_by_the_place_of_its_body(tokenizer):
    pairs = [("query", text) for text in TEXTS[:3]] + [(None, TEXTS[3])]
    task = retrieval("t", splits(pairs), tokenizer, "here", batch_size=4)
    (batch,) = task.test
    assert batch["labels"].tolist() == [0, 1, 2, IGNORED]
    assert tokenizer.decode(batch["body_input_ids"][1], skip_special_tokens=True) == TEXTS[1]
    again = collate_pairs([{"input_ids": [1], "body_input_ids": [2], "labels": IGNORED}] * 2)
    assert again["labels"].tolist() == [IGNORED, IGNORED]


def test_held_out_examples_are_sorted_by_length_and_know_their_place(tokenizer):
    examples = [(text, 0) for text in (TEXTS[3], TEXTS[0], TEXTS[2])]
    (batch,) = classification("t", splits(examples), ("a",), tokenizer, "here").test
    assert batch["document"].tolist() == [1, 2, 0]
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == TEXTS[0]


def test_only_the_way_on_is_scored():
    tokenizer = load_tokenizer("docs-lm")
    (batch,) = choices([("The value", ("of the array", "is", "x y", "and so on"))], tokenizer)
    order = batch["document"].tolist()
    assert sorted(order) == [0, 1, 2, 3]
    row = batch["labels"][order.index(0)]
    assert tokenizer.decode(row[row != IGNORED]) == " of the array"
    whole = batch["input_ids"][order.index(0)]
    assert tokenizer.decode(whole[1:]).startswith("The value of the array")


def test_test_splits_are_the_same_every_time():
    for name in ("code-words", "summaries", "cloze"):
        first, second = ([b["input_ids"] for b in load_task(name).test] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    rows = sum(len(batch["document"]) for batch in load_task("cloze").test)
    assert rows == 4 * len(continuations()["test"])
