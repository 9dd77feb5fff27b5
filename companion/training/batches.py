"""Batches without end, in an order that one seed decides and that can be replayed.

Built in chapter 2; shared by all arms of a comparison in chapter 11.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from companion.errors import EmptyLoader
from companion.training.fingerprint import hash_of
from companion.training.state import kept_rng, pass_seed, seed_everything


def batches(loader: Iterable, number: int, seed: int = 0) -> list:
    """Draw the batches that `fit` would see with this seed, for runs that must share them.

    Parameters
    ----------
    loader : iterable of batches
    number : int
    seed : int

    Examples
    --------
    >>> batches([1, 2], 3)
    [1, 2, 1]
    """
    with kept_rng():
        return list(islice(forever(loader, seed), number))


def forever(loader: Iterable, seed: int) -> Iterator:
    """Yield batches without end; `pass_seed` seeds each pass, so that it can be replayed.

    Seeded are the global generators and those of the loader and of its samplers.
    """
    seen = 0
    for number in count():
        seed_everything(pass_seed(seed, number))
        for generator in _generators(loader):
            generator.manual_seed(pass_seed(seed, number))
        before = seen
        for batch in loader:
            seen += 1
            yield batch
        if seen == before:
            raise EmptyLoader(
                "the loader gave no batch: is the data set empty, or smaller than one batch with "
                "drop_last=True?"
                if number == 0
                else f"the loader ran dry after {seen} batches: pass something that can be "
                "iterated again (a DataLoader or a list), not a generator"
            )


class Stream:
    """The batches of a run, one after the other; remembers a hash of the first.

    Examples
    --------
    >>> stream = Stream([torch.zeros(1), torch.ones(1)], seed=0)
    >>> stream.take(3)
    [tensor([0.]), tensor([1.]), tensor([0.])]
    >>> stream.first == Stream([torch.ones(1)], seed=0).first
    False
    """

    def __init__(self, loader: Iterable, seed: int) -> None:
        self._batches = forever(loader, seed)
        self.first: str | None = None

    def take(self, number: int) -> list:
        """Return the next batches."""
        taken = [next(self._batches) for _ in range(number)]
        if self.first is None and taken:
            self.first = hash_of(taken[0])
        return taken

    def skip(self, number: int) -> None:
        """Leave out the next batches; they are drawn, so that what follows is the same."""
        for _ in range(number):
            self.take(1)


def _generators(loader: Iterable) -> list[torch.Generator]:
    batched = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batched, getattr(batched, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def to_device(batch: Any, device: torch.device) -> Any:
    """Move all tensors of a batch, however nested."""
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


def count_rows(batch: Any, default: int | None = None) -> int:
    """Rows of a batch: those of its labels or ids, otherwise of its first tensor that has any.

    Without such a tensor, `default`, or an error where there is none.

    Examples
    --------
    >>> count_rows({"scale": torch.tensor(2.0), "x": torch.ones(3, 5)})
    3
    """
    if isinstance(batch, Mapping):
        known = [batch[key] for key in ("labels", "input_ids") if key in batch]
        return count_rows([*known, *batch.values()], default)
    parts = batch if isinstance(batch, (tuple, list)) else [batch]
    sizes = [len(part) for part in parts if isinstance(part, Tensor) and part.dim()]
    if not sizes and default is not None:
        return default
    if not sizes:
        raise ValueError("a batch without tensors cannot be shared by several processes")
    return sizes[0]


def take_rows(batch: Any, rows: int, which: slice) -> Any:
    """Cut out rows of all tensors and lists that have as many; leave what else there is.

    Examples
    --------
    >>> take_rows((torch.arange(3), ["a", "b", "c"], torch.ones(1)), 3, slice(1, 3))
    (tensor([1, 2]), ['b', 'c'], tensor([1.]))
    """
    if isinstance(batch, Mapping):
        return {key: take_rows(value, rows, which) for key, value in batch.items()}
    if isinstance(batch, Tensor):
        return batch[which] if batch.dim() and len(batch) == rows else batch
    if isinstance(batch, (tuple, list)):
        if any(isinstance(part, Tensor) for part in batch):
            parts = (take_rows(part, rows, which) for part in batch)
            return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
        return batch[which] if len(batch) == rows else batch
    return batch
