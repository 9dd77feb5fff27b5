"""Image tasks: scanned digits that come with scikit-learn, and CIFAR-10 where a network allows.

Built in chapter 2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from companion.data.task import Task
from companion.errors import SourceUnavailable, extra
from companion.files import cache_folder

IMAGES = ("digits-0-4", "digits-5-9", "cifar10")
"""The tasks of this module."""
IMAGE_SIZE = 32
VALIDATION_SIZE = 100
EVALUATION_BATCH = 100


def digits(digits: range, test_size: int, default_labels: int | None) -> Callable[..., Task]:
    """Build a loader of some digits: validation first, test last, training images between."""

    def load(name: str, batch_size: int = 32, labels_per_class: int | None = default_labels):
        with extra("course"):
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


def cifar10(name: str, batch_size: int = 32) -> Task:
    """Read CIFAR-10 through torchvision, which downloads it where a network allows."""
    with extra("course"):
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
