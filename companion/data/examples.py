"""From labelled text to loaders: classification, tagging, retrieval, multiple choice.

Rows are padded to the longest of their batch; batches for training are drawn by length with the
shuffle of `fit`, those to measure on are sorted by length; their ``document`` is the place that an
example had, and results come in that order. Built in chapter 12.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from companion.data.task import Task
from companion.data.text import IGNORED, encode, start_token
from companion.errors import extra

Row = dict[str, "list[int] | int"]
EVALUATION_BATCH = 100
PADDED = {"labels": IGNORED}  # what fills a list; all other columns are filled with zero


class ByLength(torch.utils.data.Sampler):
    """Rows in random order, but neighbours of similar length, so that little is padded.

    Parameters
    ----------
    lengths : sequence of int
    batch_size : int

    Examples
    --------
    >>> sorted(ByLength([3, 1, 2], batch_size=2))
    [0, 1, 2]
    """

    def __init__(self, lengths: Sequence[int], batch_size: int) -> None:
        self.lengths, self.batch_size = list(lengths), batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        with extra("language"):
            from transformers.trainer_pt_utils import get_length_grouped_indices

        return iter(get_length_grouped_indices(self.lengths, self.batch_size))


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Pad lists to the longest of the batch and gather numbers.

    Examples
    --------
    >>> collate([{"input_ids": [5, 6], "labels": 1}, {"input_ids": [7], "labels": 0}])
    {'input_ids': tensor([[5, 6],
            [7, 0]]), 'labels': tensor([1, 0])}
    """
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if isinstance(values[0], list):
            longest = max(map(len, values))
            fill = [PADDED.get(name, 0)]
            values = [value + fill * (longest - len(value)) for value in values]
        batch[name] = torch.tensor(values)
    return batch


def collate_pairs(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Pad as `collate` does; the label of a summary is the place of its body in the batch.

    Where ``labels`` are given already (bodies that no summary asks for), they stay.
    """
    batch = collate(rows)
    places = torch.arange(len(rows))
    batch["labels"] = torch.where(batch["labels"] == IGNORED, IGNORED, places)
    return batch


def classification(
    name: str, splits: Mapping[str, Sequence[tuple[str, int]]], classes: Sequence[str],
    tokenizer, source: str, *, max_length: int = 128, batch_size: int = 16, padding: str | bool = False,
) -> Task:  # fmt: skip
    """Make a task of pairs of a text and a label.

    Parameters
    ----------
    name : str
    splits : mapping of str to sequence of (str, int)
        "train", "validation" and "test".
    classes : sequence of str
        What label 0, 1, ... mean.
    tokenizer : PreTrainedTokenizerBase
    source : str
        Where the text is from, and its licence.
    max_length : int
        Tokens of a row at most.
    batch_size : int
        Rows to train on at a time.
    padding : "max_length" or False
        Pad every row alike; by default only to the longest of its batch.
    """

    def rows(examples):
        encoded = tokenizer(
            [text for text, _ in examples],
            truncation=True,
            max_length=max_length,
            padding=padding,
        )
        return [{**_inputs(encoded, i), "labels": int(label)}
                for i, (_, label) in enumerate(examples)]  # fmt: skip

    parts = _loaders(splits, rows, batch_size, collate)
    return Task(name, **parts, classes=tuple(classes), source=source, metric="accuracy")


def tagging(
    name: str, splits: Mapping[str, Sequence[tuple[Sequence[str], Sequence[str]]]],
    classes: Sequence[str], tokenizer, source: str, *, max_length: int = 64, batch_size: int = 16,
) -> Task:  # fmt: skip
    """Make a task of words with a tag each; the first piece of a word carries its tag.

    Parameters
    ----------
    name, tokenizer, source, max_length, batch_size
        As in `classification`; a word cut off at `max_length` is not scored.
    splits : mapping of str to sequence of (words, tags)
    classes : sequence of str
        The tags: "O", and "B-..." and "I-..." of each kind of span.
    """
    number = {tag: label for label, tag in enumerate(classes)}

    def rows(examples):
        encoded = tokenizer(
            [list(words) for words, _ in examples], is_split_into_words=True, truncation=True,
            max_length=max_length,
        )  # fmt: skip
        result = []
        for i, (_, tags) in enumerate(examples):
            owners, labels = encoded.word_ids(i), []
            for before, owner in zip([None, *owners], owners, strict=False):
                first = owner is not None and owner != before
                labels.append(number[tags[owner]] if first else IGNORED)
            result.append({**_inputs(encoded, i), "labels": labels})
        return result

    parts = _loaders(splits, rows, batch_size, collate)
    return Task(name, **parts, classes=tuple(classes), source=source, metric="span F1")


def retrieval(
    name: str, splits: Mapping[str, Sequence[tuple[str | None, str]]], tokenizer, source: str,
    *, max_length: int = 64, batch_size: int = 16,
) -> Task:  # fmt: skip
    """Make a task of pairs of texts that belong together, to be told from the other pairs.

    Training and validation ask for the own text among those of the batch (in-batch negatives,
    Henderson et al., 2017), the test split among all of its texts.

    Parameters
    ----------
    name, tokenizer, source, max_length, batch_size
        As in `classification`.
    splits : mapping of str to sequence of (query or None, text)
        Without a query, a text only stands among the others.
    """

    def rows(examples):
        queries, texts = (
            tokenizer([text or "" for text in side], truncation=True, max_length=max_length)
            for side in zip(*examples, strict=True)
        )
        return [
            {
                **_inputs(queries, i),
                **{f"body_{key}": value for key, value in _inputs(texts, i).items()},
                "labels": IGNORED if query is None else 0,
            }
            for i, (query, _) in enumerate(examples)
        ]

    parts = _loaders(splits, rows, batch_size, collate_pairs, evaluation_batch=batch_size)
    return Task(name, **parts, classes=(), source=source, metric="recall@1")


def choices(questions: Sequence[tuple[str, Sequence[str]]], tokenizer) -> DataLoader:
    """Rows of one beginning and one way to go on, of which only the latter is scored.

    Parameters
    ----------
    questions : sequence of (context, choices)
        Equally many choices each.
    tokenizer : PreTrainedTokenizerBase

    Returns
    -------
    DataLoader
        ``document`` numbers the rows: question by question, choice by choice.
    """
    start = start_token(tokenizer)
    rows = []
    for context, options in questions:
        before = [start, *encode([context], tokenizer)[0]]
        for after in encode([" " + option for option in options], tokenizer):
            rows.append({
                "input_ids": before + after,
                "labels": [IGNORED] * len(before) + after,
                "document": len(rows),
            })  # fmt: skip
    rows.sort(key=_length)
    return DataLoader(rows, EVALUATION_BATCH, collate_fn=collate)


def _inputs(encoded, row: int) -> Row:
    return {key: encoded[key][row] for key in ("input_ids", "attention_mask")}


def _length(row: Row) -> int:
    return max(len(value) for value in row.values() if isinstance(value, list))


def _loaders(
    splits: Mapping[str, Sequence], rows: Callable, batch_size: int, collate_fn: Callable,
    evaluation_batch: int = EVALUATION_BATCH,
) -> dict[str, DataLoader]:  # fmt: skip
    """A loader of each split: shuffled by length to train on, sorted by length to measure on."""
    train, validation, test = (rows(splits[part]) for part in ("train", "validation", "test"))
    lengths = [_length(row) for row in train]
    if len(set(lengths)) == 1:
        order = {"shuffle": True}
    else:
        order = {"sampler": ByLength(lengths, batch_size)}
    loaders = {"train": DataLoader(train, batch_size, collate_fn=collate_fn, **order)}
    for part, held_out in (("validation", validation), ("test", test)):
        numbered = [row | {"document": number} for number, row in enumerate(held_out)]
        numbered.sort(key=_length)
        loaders[part] = DataLoader(numbered, evaluation_batch, collate_fn=collate_fn)
    return loaders
