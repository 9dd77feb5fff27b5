"""Numbers honest enough to print: every metric is an `Estimate` with an interval and n.

Built in chapter 7.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from torch import nn

from companion.data.text import IGNORED
from companion.errors import EmptyLoader, expect
from companion.evaluation.forward import rows_of, scored

CONFIDENCE = 0.95
RESAMPLES = 10_000
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
AT_ONCE = 2**19
"""Counts that are drawn at once: 4 MB."""
SMALLEST = 10
"""Examples that a stratum must have to be drawn from by itself."""
KEPT = 4000
"""Examples up to which the counts are kept, one byte each, for the next score on as many."""


@dataclass(frozen=True)
class Estimate:
    """A measured value, its 95 % interval, and the number of examples behind it.

    Examples
    --------
    >>> print(Estimate(0.9, 0.826, 0.945, 100, "Wilson"))
    0.900 [0.826, 0.945] (n = 100)
    """

    value: float
    low: float
    high: float
    n: int
    method: str = ""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n = {self.n})"


@dataclass(frozen=True)
class Scores:
    """What each example adds to a ratio of sums: a mean loss, an accuracy, an F1 score.

    Parameters
    ----------
    total, weight : ndarray of float, shape (examples,)
        The metric is ``total.sum() / weight.sum()``.

    Examples
    --------
    >>> hits = Scores(np.array([1.0, 0.0, 1.0, 1.0]), np.ones(4))
    >>> hits.value, print(hits.estimate())
    0.750 [0.250, 1.000] (n = 4)
    (0.75, None)
    """

    total: np.ndarray
    weight: np.ndarray

    @property
    def value(self) -> float:
        """The ratio on all examples."""
        return float(self.total.sum() / self.weight.sum())

    def resampled(self, seed: int = 0) -> np.ndarray:
        """The ratio on 10,000 bootstrap resamples of the examples, shape (10000,).

        Equal seeds draw equal examples, which pairs the resamples of two models.
        """
        return resampled([self], seed)[0]

    def estimate(self) -> Estimate:
        """The ratio with its percentile-bootstrap 95 % interval."""
        low, high = np.quantile(self.resampled(), TAILS)
        return Estimate(self.value, float(low), float(high), len(self.total), "bootstrap")


def resampled(
    scores: Sequence[Scores], seed: int = 0, strata: Sequence | None = None
) -> np.ndarray:
    """Resample several scores on the same examples in one pass, as `Scores.resampled` does one.

    Parameters
    ----------
    scores : sequence of Scores
    seed : int
    strata : sequence, length n, optional
        As in `resamples`.

    Returns
    -------
    ndarray, shape (scores, 10000)

    Examples
    --------
    >>> scores = Scores(np.array([1.0, 0.0]), np.ones(2))
    >>> np.array_equal(resampled([scores, scores])[1], scores.resampled())
    True
    """
    parts = [
        [(counts @ each.total, counts @ each.weight) for each in scores]
        for counts in resamples(len(scores[0].total), seed, strata)
    ]
    total, weight = np.moveaxis(np.concatenate(parts, axis=-1), 1, 0)
    return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)


def resamples(n: int, seed: int = 0, strata: Sequence | None = None) -> Iterator[np.ndarray]:
    """How often each of n examples is drawn, in 10,000 resamples with replacement (Efron, 1979).

    Own draws, not those of `scipy.stats.bootstrap`: every published interval rests on them.

    Parameters
    ----------
    n : int
    seed : int
    strata : sequence, length n, optional
        Which stratum each example belongs to, its topic for example: as many are then drawn of
        each as there are. Those of fewer than ten examples are drawn from together, since what
        little they hold says too little about how far they vary.

    Yields
    ------
    ndarray of float, shape (resamples, n)
        Part by part, so that memory does not grow with n; of float so that products are fast.

    Examples
    --------
    >>> parts = [counts.shape for counts in resamples(100)]
    >>> sum(rows for rows, _ in parts), {n for _, n in parts}
    (10000, {100})
    >>> drawn = next(resamples(30, strata=["a"] * 10 + ["b"] * 20))
    >>> set(drawn[:, :10].sum(1).tolist())  # ten of the first ten, always
    {10.0}
    """
    if strata is not None:
        yield from _within(np.unique(np.asarray(strata), return_inverse=True)[1], seed)
        return
    for counts in _kept(n, seed) if n <= KEPT else _draws(np.full(n, 1 / n), n, seed):
        yield counts.astype(float)


def _within(strata: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Counts of examples drawn within their strata, small ones taken as one."""
    strata = np.where(np.bincount(strata)[strata] < SMALLEST, -1, strata)
    parts = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    rng, rows = np.random.default_rng(seed), max(1, AT_ONCE // len(strata))
    for start in range(0, RESAMPLES, rows):
        counts = np.empty((min(rows, RESAMPLES - start), len(strata)))
        for own in parts:
            counts[:, own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), len(counts))
        yield counts


@lru_cache(maxsize=2)
def _kept(n: int, seed: int) -> list[np.ndarray]:
    # one example is drawn 256 times or more in less than one of 10**500 resamples
    return [counts.astype(np.uint8) for counts in _draws(np.full(n, 1 / n), n, seed)]


def _draws(shares: np.ndarray, n: int, seed: int) -> Iterator[np.ndarray]:
    """Multinomial counts of n draws, the same numbers as if all were drawn at once."""
    rng, rows = np.random.default_rng(seed), max(1, AT_ONCE // len(shares))
    for start in range(0, RESAMPLES, rows):
        yield rng.multinomial(n, shares, min(rows, RESAMPLES - start))


@dataclass(frozen=True)
class Paired:
    """Two models on the same examples.

    Parameters
    ----------
    difference : Estimate
        Accuracy of the first minus the second.
    only_first, only_second : int
        Examples that one model alone got right: the disagreements that matter.
    agreement : float
        Share of examples on which both predict the same class.
    """

    difference: Estimate
    only_first: int
    only_second: int
    agreement: float

    @property
    def tie(self) -> bool:
        """True when the interval of the difference contains 0."""
        return self.difference.low <= 0 <= self.difference.high


def predict(model: nn.Module, loader: Iterable) -> tuple[np.ndarray, np.ndarray]:
    """Return predicted and true classes, with the model in eval mode meanwhile.

    Parameters
    ----------
    model : nn.Module
        Answers with scores of shape (batch, classes), or with an object whose ``logits`` they are.
    loader : iterable of (inputs, labels), or of dict
        Dictionaries hold the arguments of the model's forward, and ``labels``. What is labelled
        -100 is left out; where each token has a label, so does each scored token an answer.

    Returns
    -------
    predictions, labels : ndarray of int64, shape (n,)

    Raises
    ------
    EmptyLoader
        If the loader gives no batch.
    UnsupportedModel
        If the model has no head for these labels.
    UnreadableBatch
        If the model does not take what the batches hold.

    Examples
    --------
    >>> import torch
    >>> predict(nn.Identity(), [(torch.eye(2), torch.tensor([0, 1]))])
    (array([0, 1]), array([0, 1]))
    """
    pairs = [(given[true != IGNORED], true[true != IGNORED])
             for _, given, true in _answers(model, loader)]  # fmt: skip
    predictions, labels = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return predictions, labels


def _answers(model: nn.Module, loader: Iterable) -> list[tuple[list, np.ndarray, np.ndarray]]:
    """Which example each row belongs to, the classes that the model gives, and the true ones."""
    found: list[tuple[list, np.ndarray, np.ndarray]] = []
    rows = 0
    for batch, logits, labels in scored(model, loader):
        given, true = (tensor.cpu().numpy() for tensor in (logits.argmax(-1), labels))
        found.append((rows_of(batch, labels, rows), given, true))
        rows += len(labels)
    if not any((true != IGNORED).any() for _, _, true in found):
        raise EmptyLoader(
            "the loader gave no batch to evaluate on, or none with a label other than -100: is "
            "the data set empty?"
        )
    return found


def accuracy(model: nn.Module, loader: Iterable) -> Estimate:
    """Share of examples classified correctly, with a Wilson 95 % interval.

    The Wilson score interval (Wilson, 1927) stays inside [0, 1] and keeps a width at 100 %.
    Where each token has a label, it is the share of scored tokens, and the interval comes from
    resampling the examples, because the tokens of one go together.

    Parameters
    ----------
    model : nn.Module
    loader : iterable of (inputs, labels), or of dict
        As in `predict`.

    Returns
    -------
    Estimate
        Between 0 and 1; n is the number of examples.

    Examples
    --------
    >>> import torch
    >>> print(accuracy(nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))]))
    0.500 [0.095, 0.905] (n = 2)
    """
    expect("accuracy", "model", model, nn.Module)
    parts = _answers(model, loader)
    if parts[0][2].ndim == 1:
        right = np.concatenate([given[true != IGNORED] == true[true != IGNORED]
                                for _, given, true in parts])  # fmt: skip
        return proportion(right)
    return summed(
        (owner, float(((row == true) & (true != IGNORED)).sum()), int((true != IGNORED).sum()))
        for owners, given, labels in parts
        for owner, row, true in zip(owners, given, labels, strict=True)
    ).estimate()


def summed(rows: Iterable[tuple[Any, float, int]]) -> Scores:
    """Add up the rows of each example: (which example, total, weight), sorted by example.

    Raises
    ------
    EmptyLoader
        If no row has any weight.

    Examples
    --------
    >>> summed([("b", 1.0, 1), ("a", 0.5, 2), ("b", 2.0, 1)]).total
    array([0.5, 3. ])
    """
    sums: dict[Any, list] = {}
    for owner, total, weight in rows:
        entry = sums.setdefault(owner, [0.0, 0])
        entry[0] += total
        entry[1] += weight
    if not sum(weight for _, weight in sums.values()):
        raise EmptyLoader("the loader gave no token to score: is the split empty?")
    total, weight = zip(*(sums[owner] for owner in sorted(sums)), strict=True)
    return Scores(np.array(total), np.array(weight))


def proportion(hits: np.ndarray) -> Estimate:
    """Share of True with a Wilson 95 % interval.

    Parameters
    ----------
    hits : ndarray of bool, shape (n,)

    Examples
    --------
    >>> print(proportion(np.array([True] * 9 + [False])))
    0.900 [0.596, 0.982] (n = 10)
    """
    n, k = len(hits), int(np.sum(hits))
    z = NormalDist().inv_cdf(TAILS[1])
    centre = (k / n + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(k / n * (1 - k / n) / n + z**2 / (4 * n**2))
    # at the ends the formula gives 0 and 1, but for the last digit
    low = 0.0 if k == 0 else centre - half
    high = 1.0 if k == n else centre + half
    return Estimate(k / n, low, high, n, "Wilson")


def paired(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> Paired:
    """Compare two models on the same examples: difference in accuracy with its interval.

    Pairing removes the difficulty of the examples, which both models share; the interval is
    the percentile bootstrap over examples (Efron, 1979), seeded, 10,000 resamples.

    Parameters
    ----------
    first, second : ndarray of int, shape (n,)
        Predictions of the two models, from `predict`.
    labels : ndarray of int, shape (n,)

    Returns
    -------
    Paired

    Examples
    --------
    >>> labels = np.zeros(100, int)
    >>> result = paired(labels, np.r_[np.ones(20, int), labels[20:]], labels)
    >>> print(result.difference, result.only_first, result.tie)
    0.200 [0.120, 0.280] (n = 100) 20 False
    """
    a, b = first == labels, second == labels
    return Paired(
        bootstrap(a.astype(float) - b.astype(float)),
        only_first=int(np.sum(a & ~b)),
        only_second=int(np.sum(b & ~a)),
        agreement=float(np.mean(first == second)),
    )


def bootstrap(values: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of values with a percentile-bootstrap 95 % interval.

    Parameters
    ----------
    values : ndarray of float, shape (n,)
    seed : int

    Examples
    --------
    >>> print(bootstrap(np.ones(5)))
    1.000 [1.000, 1.000] (n = 5)
    """
    values, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    n = int(counts.sum())
    # Resampling n values with replacement is a multinomial draw over the distinct ones.
    draws = np.concatenate([part @ values / n for part in _draws(counts / n, n, seed)])
    low, high = np.quantile(draws, TAILS)
    return Estimate(float(counts @ values / n), float(low), float(high), n, "bootstrap")
