"""Data and tasks with fixed splits, all readable without a network.

Floor 2 of the house. Built in chapter 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from companion.errors import SourceUnavailable
from companion.files import cache_folder

IMAGE_SIZE = 32
VALIDATION_SIZE = 100
EVALUATION_BATCH = 100


@dataclass(frozen=True)
class Task:
    """A data set, split once and for all, ready for `fit` and `accuracy`.

    Parameters
    ----------
    name : str
    train, validation, test : DataLoader
        Batches ``(inputs, labels)``. `train` is shuffled, the others keep their order.
    classes : tuple of str
        What label 0, 1, ... mean.
    source : str
        Where the data comes from, and its licence.
    """

    name: str
    train: DataLoader
    validation: DataLoader
    test: DataLoader
    classes: tuple[str, ...]
    source: str


def load_task(name: str, **options) -> Task:
    """Load a task by name.

    Parameters
    ----------
    name : str
        ``"digits-0-4"`` (to pre-train on), ``"digits-5-9"`` (to fine-tune on, few labels), or
        ``"cifar10"`` (downloaded by torchvision where a network allows).
    **options
        ``batch_size`` (default 32), and for the digits ``labels_per_class``: training images
        of each class, None for all that are not held out for
        validation and test.

    Returns
    -------
    Task

    Raises
    ------
    ValueError
        For an unknown name, with the known ones.
    SourceUnavailable
        If the data cannot be had.

    Examples
    --------
    >>> task = load_task("digits-5-9", batch_size=16)
    >>> images, labels = next(iter(task.train))
    >>> images.shape, task.classes[labels[0]] in "56789"
    (torch.Size([16, 3, 32, 32]), True)
    >>> len(task.train.dataset), len(task.validation.dataset), len(task.test.dataset)
    (100, 100, 596)
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown: choose one of {', '.join(TASKS)}")
    return TASKS[name](name, **options)


def _digits(digits: range, test_size: int, default_labels: int | None) -> Callable[..., Task]:
    """Build a loader of some digits: validation first, test last, training images between."""

    def load(name: str, batch_size: int = 32, labels_per_class: int | None = default_labels):
        from sklearn.datasets import load_digits

        scans = load_digits()
        chosen = np.flatnonzero(np.isin(scans.target, digits))
        order = np.random.RandomState(0).permutation(chosen)  # legacy stream: frozen for good
        data = TensorDataset(
            _enlarge(torch.tensor(scans.images[order], dtype=torch.float32)),
            torch.tensor(scans.target[order] - digits.start),
        )
        pool = np.arange(VALIDATION_SIZE, len(data) - test_size)
        if labels_per_class is not None:
            labels = data.tensors[1].numpy()[pool]
            pool = np.concatenate(
                [pool[labels == c][:labels_per_class] for c in range(len(digits))]
            )
        return Task(
            name,
            train=DataLoader(Subset(data, pool), batch_size, shuffle=True),
            validation=DataLoader(Subset(data, range(VALIDATION_SIZE)), EVALUATION_BATCH),
            test=DataLoader(
                Subset(data, range(len(data) - test_size, len(data))), EVALUATION_BATCH
            ),
            classes=tuple(map(str, digits)),
            source="scikit-learn's load_digits (UCI handwritten digits, CC BY 4.0)",
        )

    return load


def _enlarge(scans: Tensor) -> Tensor:
    """8x8 scans of 0 to 16 become 32x32 RGB images of -1 to 1, as ResNet expects."""
    images = scans[:, None] / 8 - 1
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    return images.repeat(1, 3, 1, 1)


def _cifar10(name: str, batch_size: int = 32) -> Task:
    from torchvision import transforms
    from torchvision.datasets import CIFAR10

    to_tensor = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    )
    folder = cache_folder()
    try:
        data = {part: CIFAR10(folder, part, transform=to_tensor, download=True)
                for part in (True, False)}  # fmt: skip
    except (OSError, RuntimeError) as error:
        raise SourceUnavailable(
            f"cifar10 could not be downloaded ({error}); without a network use 'digits-5-9', "
            f"or put the archive into {folder}"
        ) from error
    held_out = len(data[True]) - 10 * VALIDATION_SIZE
    return Task(
        name,
        train=DataLoader(Subset(data[True], range(held_out)), batch_size, shuffle=True),
        validation=DataLoader(
            Subset(data[True], range(held_out, len(data[True]))), EVALUATION_BATCH
        ),
        test=DataLoader(data[False], EVALUATION_BATCH),
        classes=tuple(data[True].classes),
        source="CIFAR-10 (Krizhevsky, 2009), through torchvision",
    )


TASKS: dict[str, Callable[..., Task]] = {
    "digits-0-4": _digits(range(0, 5), test_size=200, default_labels=None),
    "digits-5-9": _digits(range(5, 10), test_size=596, default_labels=20),
    "cifar10": _cifar10,
}
