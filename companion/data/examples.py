"""From labelled text to loaders: classification, tagging, retrieval, multiple choice.

Rows are padded to the longest of their batch, by the tokenizer and on the right; batches for
training are drawn by length with the shuffle of `fit`, those to measure on are sorted by length;
their ``document`` is the place that an example had, and results come in that order. Built in
chapter 12.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from companion.data.task import Task
from companion.data.text import IGNORED, encode, start_token, with_padding
from companion.errors import UnsupportedModel, extra

Row = dict[str, "list[int] | int"]
EVALUATION_BATCH = 100
SIDES = ("", "body_")  # of a pair: what the columns of its first and its second text begin with


class Collator:
    """Make a batch of rows: token columns padded by the tokenizer, lists of labels by -100.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Its padding token fills the rows, and its attention mask leaves them out. Always on the
        right, whatever its own side is: there every model counts positions from the first token.
    pairs : bool
        The label of a row is the place of its second text in the batch, unless it is -100.

    Examples
    --------
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> letters = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[PAD]": 2}))
    >>> collate = Collator(PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="[PAD]"))
    >>> batch = collate([{"input_ids": [0, 1], "labels": 1}, {"input_ids": [0], "labels": 0}])
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[0, 1], [0, 2]], [[1, 1], [1, 0]])
    """

    def __init__(self, tokenizer, *, pairs: bool = False) -> None:
        self.tokenizer, self.pairs = with_padding(tokenizer), pairs

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        with extra("language"):
            from transformers.data.data_collator import pad_without_fast_tokenizer_warning as pad

        batch: dict[str, Tensor] = {}
        for side in SIDES:
            names = [n for n in self.tokenizer.model_input_names if side + n in rows[0]]
            if names:
                texts = [{name: row[side + name] for name in names} for row in rows]
                padded = pad(self.tokenizer, texts, padding_side="right", return_tensors="pt")
                batch |= {side + name: tensor for name, tensor in padded.items()}
        for name in sorted(set(rows[0]) - set(batch)):
            values = [row[name] for row in rows]
            if isinstance(values[0], list):
                width = batch["input_ids"].shape[1]
                values = [value + [IGNORED] * (width - len(value)) for value in values]
            batch[name] = torch.tensor(values)
        if self.pairs:
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
        Tokens of a row at most; fewer where the tokenizer's model takes fewer.
    batch_size : int
        Rows to train on at a time.
    padding : "max_length" or False
        Pad every row alike; by default only to the longest of its batch.
    """

    def rows(examples):
        encoded = _encoded(tokenizer, [text for text, _ in examples], max_length, padding=padding)
        return [row | {"labels": int(label)}
                for row, (_, label) in zip(encoded, examples, strict=True)]  # fmt: skip

    tokenizer = with_padding(tokenizer)
    parts = loaders_by_length(splits, rows, batch_size, Collator(tokenizer))
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
            max_length=_limit(tokenizer, max_length),
        )  # fmt: skip
        result = []
        for i, (row, (_, tags)) in enumerate(zip(_rows(tokenizer, encoded), examples, strict=True)):
            owners, labels = encoded.word_ids(i), []
            for before, owner in zip([None, *owners], owners, strict=False):
                first = owner is not None and owner != before
                labels.append(number[tags[owner]] if first else IGNORED)
            result.append(row | {"labels": labels})
        return result

    parts = loaders_by_length(splits, rows, batch_size, Collator(tokenizer))
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
        sides = [
            [{prefix + name: tokens for name, tokens in row.items()}
             for row in _encoded(tokenizer, [text or "" for text in texts], max_length)]
            for prefix, texts in zip(SIDES, zip(*examples, strict=True), strict=True)
        ]  # fmt: skip
        return [
            query | text | {"labels": IGNORED if asked is None else 0}
            for query, text, (asked, _) in zip(*sides, examples, strict=True)
        ]

    parts = loaders_by_length(splits, rows, batch_size, Collator(tokenizer, pairs=True),
                              evaluation_batch=batch_size)  # fmt: skip
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
    if rows and _length(rows[-1]) > tokenizer.model_max_length:
        raise UnsupportedModel(
            f"a question with its answer has {_length(rows[-1])} tokens, and the model takes "
            f"{tokenizer.model_max_length}: give a model with a longer context"
        )
    return DataLoader(rows, EVALUATION_BATCH, collate_fn=Collator(tokenizer))


def _encoded(
    tokenizer, texts: Sequence[str], max_length: int, padding: str | bool = False
) -> list[Row]:
    """The token columns of each text, as the tokenizer names them."""
    encoded = tokenizer(list(texts), truncation=True, max_length=_limit(tokenizer, max_length),
                        padding=padding, padding_side="right")  # fmt: skip
    return _rows(tokenizer, encoded)


def _rows(tokenizer, encoded) -> list[Row]:
    names = [name for name in tokenizer.model_input_names if name in encoded]
    rows = [dict(zip(names, values, strict=True)) for values in
            zip(*(encoded[name] for name in names), strict=True)]  # fmt: skip
    # a text without tokens still needs one to answer for
    empty = {"input_ids": [with_padding(tokenizer).pad_token_id], "attention_mask": [1]}
    return [row if row["input_ids"] else {n: empty.get(n, [0]) for n in names} for row in rows]


def _limit(tokenizer, max_length: int) -> int:
    return int(min(max_length, tokenizer.model_max_length))


def _length(row: Row) -> int:
    return max(len(value) for value in row.values() if isinstance(value, list))


def loaders_by_length(
    splits: Mapping[str, Sequence], rows: Callable, batch_size: int, collate_fn: Callable,
    evaluation_batch: int = EVALUATION_BATCH,
) -> dict[str, DataLoader]:  # fmt: skip
    """A loader of each split: shuffled by length to train on, sorted by length to measure on.

    Parameters
    ----------
    splits : mapping of str to sequence
        "train", "validation" and "test".
    rows : callable
        Turns the examples of a split into rows of token columns. A row to measure on that has no
        ``document`` is one of its own.
    batch_size : int
        Rows to train on at a time.
    collate_fn : callable
        Such as `Collator`.
    evaluation_batch : int
        Rows to measure on at a time.
    """
    with extra("language"):
        from transformers.trainer_pt_utils import LengthGroupedSampler

    train, validation, test = (rows(splits[part]) for part in ("train", "validation", "test"))
    lengths = [_length(row) for row in train]
    if len(set(lengths)) == 1:
        order = {"shuffle": True}
    else:
        order = {"sampler": LengthGroupedSampler(batch_size, lengths=lengths)}
    loaders = {"train": DataLoader(train, batch_size, collate_fn=collate_fn, **order)}
    for part, held_out in (("validation", validation), ("test", test)):
        numbered = [{"document": number} | row for number, row in enumerate(held_out)]
        numbered.sort(key=_length)
        loaders[part] = DataLoader(numbered, evaluation_batch, collate_fn=collate_fn)
    return loaders
