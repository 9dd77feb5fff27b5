"""Numbers honest enough to print: every metric is an `Estimate` with an interval and n.

Floor 1 of the house. Built in chapters 3 (bytes) and 7 (accuracy, paired differences).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from scipy import stats
from torch import Tensor, nn

from companion.errors import EmptyLoader

CONFIDENCE = 0.95
RESAMPLES = 10_000


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
    interval = stats.binomtest(k, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(k / n, float(interval.low), float(interval.high), n, "Wilson")


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
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(float(counts @ values / n), float(low), float(high), n, "bootstrap")


def model_bytes(model: nn.Module) -> int:
    """Size of the whole file that a model is saved to, in bytes.

    The state is written as safetensors in memory and counted. Layers of
    ``torch.ao.nn.quantized`` are opened: their integers, scales and zero points count.

    Parameters
    ----------
    model : nn.Module
        Float, prepared or converted.

    Returns
    -------
    int

    Examples
    --------
    >>> model_bytes(nn.Linear(100, 100)) - 4 * (100 * 100 + 100)  # the header
    144
    """
    return len(to_safetensors(dict(_plain_tensors("", model.state_dict()))))


def _plain_tensors(name: str, value: Any) -> Iterable[tuple[str, Tensor]]:
    """Flatten nested state to ordinary tensors, opening packed and quantized ones."""
    if isinstance(value, torch.ScriptObject):
        value = value.__getstate__()
    if isinstance(value, Tensor) and value.is_quantized:
        if value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
            scale, zero_point = value.q_per_channel_scales(), value.q_per_channel_zero_points()
        else:
            scale, zero_point = torch.tensor(value.q_scale()), torch.tensor(value.q_zero_point())
        yield from (
            (f"{name}.integers", value.int_repr().contiguous()),
            (f"{name}.scale", scale.float()),
            (f"{name}.zero_point", zero_point.int()),
        )
    elif isinstance(value, Tensor):
        yield name, value.detach().contiguous().clone()
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _plain_tensors(f"{name}.{key}" if name else key, entry)
    elif isinstance(value, (tuple, list)):
        for index, entry in enumerate(value):
            yield from _plain_tensors(f"{name}.{index}", entry)


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one call: median and interquartile range, in milliseconds."""

    median_ms: float
    iqr_ms: float
    threads: int
    runs: int


def latency(
    call: Callable[[], Any], *, threads: int | None = None, min_seconds: float = 1.0
) -> Latency:
    """Time a call with ``torch.utils.benchmark``: warm-up, then repeated runs.

    Parameters
    ----------
    call : callable
        Takes no argument, such as ``lambda: model(x)``. Run under ``torch.no_grad()``.
    threads : int, optional
        Intra-op threads during the measurement; default the current number.
    min_seconds : float
        Least total time spent measuring.

    Returns
    -------
    Latency

    Examples
    --------
    >>> latency(lambda: torch.zeros(10), min_seconds=0.01).median_ms > 0
    True
    """
    from torch.utils.benchmark import Timer  # prints about CUDA when imported, so only here

    threads = threads or torch.get_num_threads()
    with torch.no_grad():
        timer = Timer("call()", globals={"call": call}, num_threads=threads)
        timer.timeit(3)  # warm-up
        result = timer.blocked_autorange(min_run_time=min_seconds)
    return Latency(result.median * 1e3, result.iqr * 1e3, threads, len(result.times))
