"""Metrics against scikit-learn, by hand, and on models whose answers are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, label_ranking_average_precision_score
from sklearn.preprocessing import MultiLabelBinarizer
from torch import nn

from companion.data.task import Task
from companion.data.text import IGNORED
from companion.errors import EmptyLoader, UnreadableBatch
from companion.evaluation.metrics import (
    METRICS,
    first_is_best,
    hits,
    macro_f1,
    recall_at,
    reciprocal_rank,
    span_f1,
    spans,
)

TAGS = ("O", "B-x", "I-x", "B-y", "I-y")
SENTENCES = st.lists(
    st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1, max_size=8),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(deadline=None)  # a busy machine is no bug
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40))
def test_accuracy_and_macro_f1_are_those_of_scikit_learn(pairs):
    ours, true = map(np.array, zip(*pairs, strict=True))
    assert macro_f1(ours, true).value == pytest.approx(f1_score(true, ours, average="macro"))
    assert hits(ours == true).value == pytest.approx(accuracy_score(true, ours))


@settings(deadline=None)  # a busy machine is no bug
@given(SENTENCES)
def test_span_f1_is_the_micro_f1_of_scikit_learn_over_spans(sentences):
    ours, true = ([[pair[i] for pair in pairs] for pairs in sentences] for i in (0, 1))
    scores = span_f1(ours, true)
    sets = [
        {(row, *span) for row, tags in enumerate(side) for span in spans(tags)}
        for side in (ours, true)
    ]
    if not sets[0] | sets[1]:
        assert scores.weight.sum() == 0
        return
    binary = MultiLabelBinarizer().fit([sets[0] | sets[1]])
    given_, true_ = (binary.transform([side]) for side in sets)
    expected = f1_score(true_, given_, average="micro", zero_division=0)
    assert scores.value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", set()),
        ("B-x I-x", {("x", 0, 2)}),
        ("B-x B-x", {("x", 0, 1), ("x", 1, 2)}),
        ("I-x I-y", {("x", 0, 1), ("y", 1, 2)}),
        ("B-x I-y I-y", {("x", 0, 1), ("y", 1, 3)}),
        ("O I-x", {("x", 1, 2)}),
    ],
)
def test_spans(tags, found):
    assert spans(tags.split()) == found


@settings(deadline=None)  # a busy machine is no bug
@given(st.lists(st.integers(1, 20), min_size=1, max_size=20))
def test_reciprocal_rank_is_scikit_learns_with_one_relevant_text(ranks):
    relevance = np.zeros((len(ranks), 20))
    relevance[np.arange(len(ranks)), np.array(ranks) - 1] = 1
    scores = np.tile(-np.arange(20.0), (len(ranks), 1))
    expected = label_ranking_average_precision_score(relevance, scores)
    assert reciprocal_rank(np.array(ranks)).value == pytest.approx(expected)
    assert recall_at(3, np.array(ranks)).value == pytest.approx(np.mean(np.array(ranks) <= 3))


def test_intervals_cover():
    """Of the intervals of 200 samples about 95 % hold the true macro-F1."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 40_000)
    guess = np.where(rng.random(40_000) < 0.7, true, rng.integers(0, 3, 40_000))
    truth = f1_score(true, guess, average="macro")
    held = 0
    for part in range(200):
        found = macro_f1(guess[part * 200 :][:200], true[part * 200 :][:200])
        held += found.low <= truth <= found.high
    assert 0.9 <= held / 200 <= 0.99


def test_a_tie_is_no_answer():
    assert first_is_best(np.array([1, 1, 2, 3.0, 1, 2, 2, 2])).tolist() == [False, True]


class Answers(nn.Module):
    """Says what the first feature of the input says."""

    def forward(self, input_ids):
        return SimpleNamespace(logits=nn.functional.one_hot(input_ids, 5).float())


def task(test, metric, classes=()):
    return Task("task", [], [], test, classes, "", metric)


def test_accuracy_of_known_answers():
    test = [{"input_ids": torch.tensor([0, 1, 2]), "labels": torch.tensor([0, 1, 1])}]
    found = METRICS["accuracy"].measure(Answers(), task(test, "accuracy"))
    assert found.scores.total.tolist() == [1, 1, 0]
    assert found.also["macro-F1"].value == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_scores_come_in_the_order_that_the_examples_had():
    test = [
        {"input_ids": torch.tensor([0]), "labels": torch.tensor([0]), "document": torch.tensor([2])},
        {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 1]),
         "document": torch.tensor([0, 1])},
    ]  # fmt: skip
    found = METRICS["accuracy"].measure(Answers(), task(test, "accuracy"))
    assert found.scores.total.tolist() == [1, 0, 1]


def test_span_f1_of_known_answers_leaves_unscored_tokens_out():
    test = [{"input_ids": torch.tensor([[1, 2, 0, 1]]),
             "labels": torch.tensor([[1, IGNORED, 0, 0]])}]  # fmt: skip
    found = METRICS["span F1"].measure(Answers(), task(test, "span F1", TAGS))
    assert (found.scores.total.tolist(), found.scores.weight.tolist()) == ([2], [3])


class Directions(nn.Module):
    """Looks up a vector for the first token."""

    def __init__(self, vectors):
        super().__init__()
        self.vectors = nn.functional.normalize(vectors, dim=-1)

    def embed(self, input_ids, attention_mask):
        return self.vectors[input_ids[:, 0]]


def test_recall_ranks_among_all_batches_and_asks_only_for_what_has_a_query():
    vectors = torch.tensor([[1.0, 0], [0, 1.0], [1, 1], [1, 0.1]])
    ids = torch.tensor([[0], [1], [2], [3]])
    bodies = torch.tensor([[0], [0], [2], [1]])  # the second asks for another's body
    labels = torch.tensor([0, 1, IGNORED, 3])

    def batch(rows):
        mask = torch.ones(len(rows), 1)
        return {"input_ids": ids[rows], "attention_mask": mask, "body_input_ids": bodies[rows],
                "body_attention_mask": mask, "labels": labels[rows]}  # fmt: skip

    test = [batch([0, 1]), batch([2, 3])]
    found = METRICS["recall@1"].measure(Directions(vectors), task(test, "recall@1"))
    # bodies point (1, 0), (1, 0), (1, 1), (0, 1). Query 0 ties with a copy of its body: rank 2.
    # Query 1 is orthogonal to its own, and ties with the copy of it: rank 4. Query 3: rank 4.
    assert found.scores.total.tolist() == [0, 0, 0]
    assert found.also["MRR"].value == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 3)
    assert found.also["recall@10"].value == 1


def test_recall_names_what_embeddings_would_leave_out():
    ids, mask = torch.tensor([[0], [1]]), torch.ones(2, 1)
    batch = {"input_ids": ids, "attention_mask": mask, "body_input_ids": ids,
             "body_attention_mask": mask, "labels": torch.tensor([0, 1])}  # fmt: skip
    model, types = Directions(torch.eye(2)), torch.zeros_like(ids)
    plain = METRICS["recall@1"].measure(model, task([batch], "recall@1"))
    assert plain.scores.value == 1
    silent = task([batch | {"body_token_type_ids": types}], "recall@1")
    assert METRICS["recall@1"].measure(model, silent).scores.value == 1
    with pytest.raises(UnreadableBatch, match="'body_token_type_ids', which Directions does not"):
        METRICS["recall@1"].measure(
            model, task([batch | {"body_token_type_ids": types + 1}], "recall@1")
        )


@pytest.mark.parametrize("metric", ["accuracy", "recall@1", "span F1", "loss"])
def test_nothing_to_measure_is_an_error(metric):
    model = Directions(torch.eye(2)) if metric == "recall@1" else Answers()
    with pytest.raises(EmptyLoader):
        METRICS[metric].measure(model, task([], metric))
