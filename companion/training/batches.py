"""Batches without end, in an order that one seed decides and that can be replayed.

Built in chapter 2; shared by all arms of a comparison in chapter 11.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import count, islice

import numpy as np
import torch

from companion.errors import EmptyLoader
from companion.training.checkpoint import set_rng


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
    with torch.random.fork_rng(devices=[]):
        return list(islice(forever(loader, seed, 0, None), number))


def forever(loader: Iterable, seed: int, skip: int, rng: tuple | None) -> Iterator:
    """Yield batches without end, each pass seeded by its number, so any pass can be replayed.

    On resume, `skip` batches are replayed unseen; then the generators continue from `rng`.
    """
    seen = 0
    for epoch in count():
        _seed_everything(seed + epoch)
        if getattr(loader, "generator", None) is not None:
            loader.generator.manual_seed(seed + epoch)
        before = seen
        for batch in loader:
            seen += 1
            if seen > skip:
                yield batch
            elif seen == skip:
                set_rng(rng)
        if seen == before:
            raise EmptyLoader(
                "the loader gave no batch: is the data set empty, or smaller than one batch with "
                "drop_last=True?"
                if epoch == 0
                else f"the loader ran dry after {seen} batches: pass something that can be "
                "iterated again (a DataLoader or a list), not a generator"
            )


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
