"""What is measured on a task: accuracy, macro-F1, recall@k, MRR, span F1, each with its interval.

Built in chapter 12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from companion.data.text import CHOICES, IGNORED
from companion.errors import EmptyLoader, UnsupportedModel
from companion.evaluation.estimates import TAILS, Estimate, Scores, resamples
from companion.evaluation.forward import (
    BOOKKEEPING,
    check_fit,
    device_of,
    evaluating,
    labels_of,
    outputs,
    refuse,
    rows_of,
)
from companion.evaluation.language import document_losses
from companion.numerics.rounding import HeldWeights, hold_weights

SIDES = ("input_ids", "attention_mask", "body_input_ids", "body_attention_mask")
"""What `BiEncoder.embed` reads, of the queries and of the texts."""


@dataclass(frozen=True)
class Measured:
    """A model's scores on a test split, and what else was read off on the way.

    Parameters
    ----------
    scores : Scores
        One entry for each example.
    also : mapping of str to Estimate
        Other metrics of the same answers.
    """

    scores: Scores
    also: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """How a task is measured.

    Parameters
    ----------
    name : str
    higher_is_better : bool
    measure : callable
        ``measure(model, task)`` returns a `Measured` on the task's test split.
    """

    name: str
    higher_is_better: bool
    measure: Callable[[nn.Module, object], Measured]


def hits(right: np.ndarray) -> Scores:
    """Share of right answers, as scores: one for each that is right.

    Examples
    --------
    >>> hits(np.array([True, False])).value
    0.5
    """
    return Scores(right.astype(float), np.ones(len(right)))


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> Estimate:
    """Mean over the classes of the F1 score, so that small classes count as much as large ones.

    Parameters
    ----------
    predictions, labels : ndarray of int, shape (n,)

    Returns
    -------
    Estimate
        Interval by the bootstrap over examples. A class that is neither predicted nor true in
        a resample does not count there; scikit-learn leaves it out in the same way.

    Examples
    --------
    >>> print(macro_f1(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0])).value)
    0.7333333333333334
    """
    classes = np.unique(np.concatenate([predictions, labels]))
    given, true = (np.equal.outer(x, classes).astype(float) for x in (predictions, labels))
    twice, both = 2 * given * true, given + true  # (n, classes)

    def mean(counts: np.ndarray) -> np.ndarray:
        weight = counts @ both
        share = np.divide(counts @ twice, weight, out=np.full_like(weight, np.nan),
                          where=weight > 0)  # fmt: skip
        return np.nanmean(share, axis=-1)

    low, high = np.quantile(np.concatenate([*map(mean, resamples(len(labels)))]), TAILS)
    value = float(mean(np.ones((1, len(labels))))[0])
    return Estimate(value, float(low), float(high), len(labels), "bootstrap")


def recall_at(k: int, ranks: np.ndarray) -> Estimate:
    """Share of queries whose own text is among the first k.

    Parameters
    ----------
    k : int
    ranks : ndarray of int, shape (queries,)
        1 where the own text comes first.

    Examples
    --------
    >>> recall_at(2, np.array([1, 2, 9])).value
    0.6666666666666666
    """
    return hits(ranks <= k).estimate()


def reciprocal_rank(ranks: np.ndarray) -> Estimate:
    """Mean over the queries of one over the rank of the own text (MRR).

    Examples
    --------
    >>> reciprocal_rank(np.array([1, 2])).value
    0.75
    """
    return Scores(1 / ranks, np.ones(len(ranks))).estimate()


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Kind, first word and word after the last of each tagged span.

    An "I-" that follows no span of its kind begins one, as conlleval has it.

    Parameters
    ----------
    tags : sequence of str
        "O", "B-kind", "I-kind".

    References
    ----------
    Tjong Kim Sang and De Meulder, "Introduction to the CoNLL-2003 shared task", 2003.

    Examples
    --------
    >>> sorted(spans(["B-code", "I-code", "O", "B-code", "B-code"]))
    [('code', 0, 2), ('code', 3, 4), ('code', 4, 5)]
    """
    found, begun = set(), None  # (kind, first word)
    for place, tag in enumerate([*tags, "O"]):
        part, _, kind = tag.partition("-")
        if begun and not (part == "I" and kind == begun[0]):
            found.add((*begun, place))
            begun = None
        if part != "O" and begun is None:
            begun = (kind, place)
    return found


def span_f1(given: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> Scores:
    """F1 of spans that agree in kind and in both ends.

    Parameters
    ----------
    given, true : sequences of tag sequences
        One for each example.

    Returns
    -------
    Scores
        Twice the spans in common, over the spans of both; their ratio is the micro F1.

    Examples
    --------
    >>> span_f1([["B-x", "O"], ["O", "O"]], [["B-x", "O"], ["O", "B-x"]]).value
    0.6666666666666666
    """
    total, weight = [], []
    for ours, theirs in zip(given, true, strict=True):
        a, b = spans(ours), spans(theirs)
        total.append(2.0 * len(a & b))
        weight.append(float(len(a) + len(b)))
    return Scores(np.array(total), np.array(weight))


def _loss(model: nn.Module, task) -> Measured:
    losses = document_losses(model, task.test)
    return Measured(Scores(losses.loss, losses.tokens))


def _accuracy(model: nn.Module, task) -> Measured:
    given, true = (np.array(side) for side in zip(*(
        (int(scores.argmax()), int(label)) for scores, label in _answers(model, task)
    ), strict=True))  # fmt: skip
    return Measured(hits(given == true), {"macro-F1": macro_f1(given, true)})


def _cloze(model: nn.Module, task) -> Measured:
    """Right where the true continuation, the first, has the lowest loss per token."""
    losses = document_losses(model, task.test)
    return Measured(hits(first_is_best(losses.loss / losses.tokens)))


def first_is_best(losses: np.ndarray) -> np.ndarray:
    """Whether the first of each four losses is the lowest; a tie is no answer.

    Parameters
    ----------
    losses : ndarray of float, shape (4 * questions,)

    Examples
    --------
    >>> first_is_best(np.array([1.0, 2, 3, 4, 5, 5, 6, 7]))
    array([ True, False])
    """
    table = losses.reshape(-1, CHOICES)
    return table[:, 0] < table[:, 1:].min(1)


def _span_f1(model: nn.Module, task) -> Measured:
    given, true = [], []
    for scores, labels in _answers(model, task):
        scored = labels != IGNORED
        given.append([task.classes[i] for i in scores.argmax(-1)[scored]])
        true.append([task.classes[i] for i in labels[scored]])
    return Measured(span_f1(given, true))


def _recall(model: nn.Module, task) -> Measured:
    """Rank of the own text among all texts of the split; equal scores count against it."""
    if not hasattr(model, "embed"):
        raise UnsupportedModel(
            f"{type(model).__name__} does not embed texts, so it cannot look for any: load it "
            'with load_pretrained(name, head="retrieval")'
        )

    device = device_of(model)

    def embed(batch: Mapping, side: str) -> Tensor:
        ids, mask = (batch[f"{side}{part}"].to(device) for part in ("input_ids", "attention_mask"))
        return model.embed(ids, mask).cpu()

    def read() -> Iterator[tuple[list, Iterable]]:
        rows, held = 0, HeldWeights()
        for batch in task.test:
            refuse(model, batch, set(batch) - {*SIDES, *BOOKKEEPING})
            with evaluating(model), hold_weights(held):
                queries, texts = embed(batch, ""), embed(batch, "body_")
            labels = labels_of(batch).cpu()
            yield rows_of(batch, labels, rows), zip(queries, texts, labels != IGNORED, strict=True)
            rows += len(labels)

    queries, texts, asked = map(torch.stack, zip(*_in_order(read()), strict=True))
    own = asked.nonzero()
    scores = queries[asked] @ texts.T
    ranks = (scores >= scores.gather(1, own)).sum(1).numpy()
    return Measured(hits(ranks == 1),
                    {"recall@10": recall_at(10, ranks), "MRR": reciprocal_rank(ranks)})  # fmt: skip


def _answers(model: nn.Module, task) -> list[tuple[Tensor, Tensor]]:
    """The model's scores for each example of the test split, with its labels."""

    def read() -> Iterator[tuple[list, Iterable]]:
        rows = 0
        for batch, logits in outputs(model, task.test):
            labels = labels_of(batch).to(logits.device)
            check_fit(model, logits, labels)
            if task.classes and logits.shape[-1] != len(task.classes):
                raise UnsupportedModel(
                    f"{type(model).__name__} knows {logits.shape[-1]} classes, and {task.name} has "
                    f"{len(task.classes)}: it was made for another task"
                )
            yield rows_of(batch, labels, rows), zip(logits.cpu(), labels.cpu(), strict=True)
            rows += len(labels)

    return _in_order(read())


def _in_order(batches: Iterable[tuple[list, Iterable]]) -> list:
    """What was read off each row, in the order that the examples had."""
    places: list = []
    found: list = []
    for owners, rows in batches:
        places += owners
        found += rows
    if not found:
        raise EmptyLoader("the loader gave no batch to evaluate on: is the data set empty?")
    return [found[row] for row in np.argsort(places, kind="stable")]


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", False, _loss),
        Metric("accuracy", True, _accuracy),
        Metric("right choices", True, _cloze),
        Metric("recall@1", True, _recall),
        Metric("span F1", True, _span_f1),
    )
}
"""By name: what `Task.metric` may be."""
