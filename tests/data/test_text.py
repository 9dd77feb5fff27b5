import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.data.text import IGNORED, Trigram, block_length, blocks, loaders, windows
from companion.errors import SourceUnavailable
from tests import tiny

documents = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=20), min_size=1, max_size=5)


@given(documents, st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_windows_predict_every_token_once_and_see_only_what_came_before(docs, size):
    rows = windows(docs, 0, size)
    for number, document in enumerate(docs):
        own = rows.columns["document"] == number
        labels = rows.columns["labels"][own]
        assert labels[labels != IGNORED].tolist() == document
        inputs = rows.columns["input_ids"][own]
        assert inputs.shape[1] == size
        assert inputs[0, 0] == 0
        scored = labels != IGNORED
        assert torch.equal(inputs[scored], labels[scored])


@given(documents, st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_blocks_are_the_stream_cut(docs, size):
    stream = [t for d in docs for t in (0, *d)]
    if len(stream) < size:
        return
    rows = blocks(docs, 0, size)
    assert rows.columns["input_ids"].flatten().tolist() == stream[: len(stream) // size * size]


def test_too_little_text_is_an_error():
    with pytest.raises(SourceUnavailable, match="3 tokens do not fill one block of 8"):
        blocks([[1, 2]], 0, 8)


def test_blocks_follow_what_the_model_takes():
    tokenizer = tiny.byte_level(model_max_length=12)
    parts = loaders([tiny.TEXTS] * 3, tokenizer, batch_size=2)
    assert [next(iter(part))["input_ids"].shape[1] for part in parts] == [12, 12, 12]
    assert block_length(tokenizer, 5) == 5
    assert block_length(tiny.byte_level(model_max_length=10**30)) == 256
    with pytest.raises(ValueError, match="blocks of 13 tokens do not fit a model that takes 12"):
        block_length(tokenizer, 13)
    with pytest.raises(ValueError, match="at least 2"):
        block_length(tokenizer, 1)


def brute_force(documents, grams, v):
    """Interpolated Kneser-Ney by its definition, with dictionaries and loops."""
    seen = [(0, 0, *d)[i : i + 3] for d in documents for i in range(len(d))]
    c3 = {g: seen.count(g) for g in set(seen)}
    c2, c1 = {}, {}
    for _, b, c in c3:
        c2[b, c] = c2.get((b, c), 0) + 1
    for _, c in c2:
        c1[c] = c1.get(c, 0) + 1

    def discount(counts):
        once, twice = (list(counts.values()).count(k) for k in (1, 2))
        return once / (once + 2 * twice) if once else 0.5

    d1, d2, d3 = map(discount, (c1, c2, c3))

    def p1(c):
        total = sum(c1.values())
        return max(c1.get(c, 0) - d1, 0) / total + d1 * len(c1) / total / v

    def p2(b, c):
        total = sum(n for (x, _), n in c2.items() if x == b)
        if not total:
            return p1(c)
        kinds = sum(x == b for x, _ in c2)
        return max(c2.get((b, c), 0) - d2, 0) / total + d2 * kinds / total * p1(c)

    def p3(a, b, c):
        total = sum(n for g, n in c3.items() if g[:2] == (a, b))
        if not total:
            return p2(b, c)
        kinds = sum(g[:2] == (a, b) for g in c3)
        return max(c3.get((a, b, c), 0) - d3, 0) / total + d3 * kinds / total * p2(b, c)

    return [p3(*g) for g in grams]


@given(documents)
@settings(max_examples=25, deadline=None)
def test_trigram_is_kneser_ney_by_its_definition(docs):
    model = Trigram.train(docs, vocabulary=10)
    grams = [(a, b, c) for a in (0, 1, 5) for b in (0, 2, 5) for c in range(10)]
    found = model.probability(np.array(grams))
    assert found == pytest.approx(brute_force(docs, grams, 10))
    assert found.reshape(-1, 10).sum(1) == pytest.approx(np.ones(9))


def test_trigram_losses_are_per_document():
    model = Trigram.train([[1, 2, 3]], vocabulary=5)
    both, first = model.losses([[1, 2], [3]]), model.losses([[1, 2]])
    assert (
        both[0]
        == first[0]
        == pytest.approx(-np.log(brute_force([[1, 2, 3]], [(0, 0, 1), (0, 1, 2)], 5)).sum())
    )
