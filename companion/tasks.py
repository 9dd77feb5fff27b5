"""Data and tasks with fixed splits, all readable without a network.

Floor 3 of the house. Built in chapters 2 and 8.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from companion.corpus import Corpus, docstrings, language_reference
from companion.errors import SourceUnavailable
from companion.images import cifar10, digits
from companion.sources import MINILM, find, load_tokenizer
from companion.task import Task
from companion.text import Rows, loaders

EVALUATION_BATCH = 100
LIBRARIES = ("matplotlib", "networkx", "numpy", "pandas", "scipy", "sklearn", "sympy", "torch",
             "transformers")  # fmt: skip
"""Classes of the task "topics": the packages with enough held-out docstrings."""
_NAMES = re.compile(
    r"matplotlib|pyplot|\bplt\b|\bmpl|networkx|\bnx\b|numpy|\bnp\b|pandas|\bpd\b|scipy|"
    r"scikit-learn|scikit|sklearn|sympy|py ?torch|torch|hugging ?face|transformers",
    re.IGNORECASE,
)


def load_task(name: str, **options) -> Task:
    """Load a task by name.

    Parameters
    ----------
    name : str
        Images: ``"digits-0-4"`` (to pre-train on), ``"digits-5-9"`` (to fine-tune on, few
        labels), ``"cifar10"`` (downloaded by torchvision where a network allows).
        Language modelling: ``"language-reference"`` (Python's, to fine-tune on),
        ``"docstrings"`` (what docs-lm was pre-trained on; larger test split), a local text,
        JSON, CSV or Parquet file, or the Hub id of a data set. Classification: ``"topics"``
        (which library does a docstring describe, names masked, few labels).
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


def _topics(
    name: str,
    tokenizer=None,
    per_class: int = 20,
    tokens: int = 32,
    batch_size: int = 16,
    progress: bool = True,
) -> Task:
    """The beginning of a docstring, without the names that would give its library away."""
    corpus = docstrings(progress=progress)
    tokenizer = tokenizer or load_tokenizer(MINILM)
    rng = np.random.RandomState(0)  # legacy stream: frozen for good
    sizes = {"train": per_class, "validation": 30, "test": 100}
    parts, read = {}, set()
    for part, size in sizes.items():
        passages = np.array([_passage(document) for document in getattr(corpus, part)])
        packages = np.array(corpus.packages[part])
        whole = np.array([len(text.split()) >= 8 and text not in read for text in passages])
        read.update(passages)  # what a held-out passage must not repeat
        chosen = np.concatenate(
            [
                rng.permutation(np.flatnonzero(whole & (packages == package)))[:size]
                for package in LIBRARIES
            ]
        )
        encoded = tokenizer(
            passages[chosen].tolist(),
            truncation=True, max_length=tokens, padding="max_length", return_tensors="pt",
        )  # fmt: skip
        labels = torch.tensor([LIBRARIES.index(package) for package in packages[chosen]])
        rows = Rows(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], labels=labels
        )
        parts[part] = DataLoader(
            rows,
            batch_size if part == "train" else EVALUATION_BATCH,
            shuffle=part == "train",
        )
    source = f"docstrings of {', '.join(f'{k} {corpus.versions[k]}' for k in LIBRARIES)}"
    return Task(name, **parts, classes=LIBRARIES, source=source)


def _passage(document: str) -> str:
    """Twenty words without what names a library; a rule of = signs under a title is no word."""
    words = _NAMES.sub("library", document[:500]).split()
    return " ".join([word for word in words if re.search(r"\w", word)][:20])


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
    "digits-0-4": digits(range(0, 5), test_size=200, default_labels=None),
    "digits-5-9": digits(range(5, 10), test_size=596, default_labels=20),
    "cifar10": cifar10,
    "language-reference": _language_reference,
    "docstrings": _docstrings,
    "topics": _topics,
}
