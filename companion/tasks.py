"""Data and tasks with fixed splits, all readable without a network.

Floor 3 of the house. Built in chapters 2 and 8.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from companion.corpus import Corpus, docstrings, language_reference
from companion.errors import SourceUnavailable
from companion.files import cache_folder
from companion.sources import find, load_tokenizer
from companion.text import loaders

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
        Batches ``(inputs, labels)``, or dictionaries for language models. `train` is
        shuffled, the others keep their order.
    classes : tuple of str
        What label 0, 1, ... mean; empty for language modelling.
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
        Images: ``"digits-0-4"`` (to pre-train on), ``"digits-5-9"`` (to fine-tune on, few
        labels), ``"cifar10"`` (downloaded by torchvision where a network allows).
        Language modelling: ``"language-reference"`` (Python's, to fine-tune on),
        ``"docstrings"`` (what docs-lm was pre-trained on; larger test split), a local text,
        JSON, CSV or Parquet file, or the Hub id of a data set.
    **options
        ``batch_size``; for the digits ``labels_per_class``, training images of each class
        (None for all that are not held out); for language modelling ``tokenizer`` (default:
        docs-lm's) and ``block_size`` (256 tokens), for docstrings ``documents`` (at most so
        many of each split), for files and Hub ids ``text_column`` and ``config``.

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
    >>> next(iter(load_task("language-reference").train))["input_ids"].shape
    torch.Size([8, 256])
    """
    if name in TASKS:
        return TASKS[name](name, **options)
    if Path(name).exists() or "/" in name:
        return _data_set(name, **options)
    raise ValueError(
        f"task {name!r} is unknown: choose one of {', '.join(TASKS)}, a file, or the Hub id of a "
        "data set (owner/name)"
    )


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


def _language_reference(name: str, **options) -> Task:
    reference = language_reference()
    source = f"the Python {reference.versions['python']} language reference (PSF licence)"
    return _language_task(name, reference, source, **options)


def _docstrings(name: str, documents: int | None = None, progress: bool = True, **options) -> Task:
    corpus = docstrings(progress=progress)
    _announce_difference(corpus)
    splits = {part: getattr(corpus, part)[:documents] for part in ("train", "validation", "test")}
    source = f"docstrings of {', '.join(f'{k} {v}' for k, v in corpus.versions.items())}"
    return _language_task(name, Corpus(versions=corpus.versions, **splits), source, **options)


def _announce_difference(corpus: Corpus) -> None:
    """Warn where this machine's packages hold other text than docs-lm was pre-trained on."""
    shipped = json.loads(Path(find("docs-lm")[0], "training.json").read_text())
    if corpus.sha256 != shipped["corpus_sha256"]:
        others = [
            f"{name} {found} (there {shipped['versions'].get(name)})"
            for name, found in corpus.versions.items()
            if found != shipped["versions"].get(name)
        ]
        warnings.warn(
            f"the docstrings of this machine (sha256 {corpus.sha256[:12]}) are not those that docs-lm "
            f"was pre-trained on ({shipped['corpus_sha256'][:12]}): {', '.join(others)}. Some held-out "
            "text may have been seen, and numbers differ a little from the book's",
            stacklevel=3,
        )


def _data_set(name: str, text_column: str = "text", config: str | None = None, **options) -> Task:
    """Read a file or a Hub data set through `datasets`; unsplit data is split 8 : 1 : 1."""
    from datasets import load_dataset

    kinds = {
        ".txt": "text",
        ".json": "json",
        ".jsonl": "json",
        ".csv": "csv",
        ".parquet": "parquet",
    }
    path = Path(name)
    if path.exists() and path.suffix not in kinds:
        raise ValueError(f"{name}: the file must end in {', '.join(kinds)}")
    try:
        if path.exists():
            extra = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
            data = load_dataset(kinds[path.suffix], data_files=str(path), **extra)
        else:
            data = load_dataset(name, config)
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceUnavailable(f"{name} could not be read: {error}") from error
    if text_column not in data["train"].column_names:
        raise ValueError(
            f"{name} has no column {text_column!r}: pass text_column, one of "
            f"{', '.join(data['train'].column_names)}"
        )
    if not {"validation", "test"} <= set(data):
        if len(data["train"]) < 10:
            raise SourceUnavailable(f"{name} holds fewer than 10 documents: too few to split")
        most, rest = data["train"].train_test_split(0.2, seed=0).values()
        validation, test = rest.train_test_split(0.5, seed=0).values()
        data = {"train": most, "validation": validation, "test": test}
    splits = {
        part: tuple(text for text in data[part][text_column] if text and text.strip())
        for part in ("train", "validation", "test")
    }
    return _language_task(name, Corpus(versions={}, **splits), name, **options)


def _language_task(
    name: str, corpus: Corpus, source: str, tokenizer=None, block_size=256, batch_size=8
) -> Task:
    splits = (corpus.train, corpus.validation, corpus.test)
    tokenizer = tokenizer or load_tokenizer("docs-lm")
    parts = loaders(splits, tokenizer, block_size=block_size, batch_size=batch_size)
    return Task(name, *parts, classes=(), source=source)


TASKS: dict[str, Callable[..., Task]] = {
    "digits-0-4": _digits(range(0, 5), test_size=200, default_labels=None),
    "digits-5-9": _digits(range(5, 10), test_size=596, default_labels=20),
    "cifar10": _cifar10,
    "language-reference": _language_reference,
    "docstrings": _docstrings,
}
