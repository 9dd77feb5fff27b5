"""Numbers honest enough to print: every metric is an `Estimate` with an interval and n.

Built in chapter 7.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from torch import nn

from companion.errors import EmptyLoader

CONFIDENCE = 0.95
RESAMPLES = 10_000
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


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
        counts = resamples(len(self.total), seed)
        weight = counts @ self.weight
        return np.divide(counts @ self.total, weight, out=np.zeros(len(counts)), where=weight > 0)

    def estimate(self) -> Estimate:
        """The ratio with its percentile-bootstrap 95 % interval."""
        low, high = np.quantile(self.resampled(), TAILS)
        return Estimate(self.value, float(low), float(high), len(self.total), "bootstrap")


@lru_cache(maxsize=2)
def resamples(n: int, seed: int = 0) -> np.ndarray:
    """How often each of n examples is drawn, in 10,000 resamples with replacement (Efron, 1979).

    Returns
    -------
    ndarray of float, shape (10000, n)
        Of float so that products with it are fast.
    """
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)


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


@torch.no_grad()
def predict(model: nn.Module, loader: Iterable) -> tuple[np.ndarray, np.ndarray]:
    """Return predicted and true classes, with the model in eval mode meanwhile.

    Parameters
    ----------
    model : nn.Module
        Maps a batch of inputs to scores of shape (batch, classes).
    loader : iterable of (inputs, labels)

    Returns
    -------
    predictions, labels : ndarray of int64, shape (n,)

    Raises
    ------
    EmptyLoader
        If the loader gives no batch.

    Examples
    --------
    >>> predict(nn.Identity(), [(torch.eye(2), torch.tensor([0, 1]))])
    (array([0, 1]), array([0, 1]))
    """
    was_training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    pairs = [(model(x.to(device)).argmax(-1).cpu(), y.cpu()) for x, y in loader]
    if was_training:
        model.train()
    if not pairs:
        raise EmptyLoader("the loader gave no batch to evaluate on: is the data set empty?")
    predictions, labels = (torch.cat(part).numpy() for part in zip(*pairs, strict=True))
    return predictions, labels


def accuracy(model: nn.Module, loader: Iterable) -> Estimate:
    """Share of examples classified correctly, with a Wilson 95 % interval.

    The Wilson score interval (Wilson, 1927) stays inside [0, 1] and keeps a width at 100 %.

    Parameters
    ----------
    model : nn.Module
    loader : iterable of (inputs, labels)

    Returns
    -------
    Estimate
        Between 0 and 1.

    Examples
    --------
    >>> print(accuracy(nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))]))
    0.500 [0.095, 0.905] (n = 2)
    """
    predictions, labels = predict(model, loader)
    return proportion(predictions == labels)


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
    return Estimate(k / n, max(0.0, centre - half), min(1.0, centre + half), n, "Wilson")


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
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES) @ values / n
    low, high = np.quantile(draws, TAILS)
    return Estimate(float(counts @ values / n), float(low), float(high), n, "bootstrap")
