"""From documents to batches: token blocks to train on, windows to measure on, a trigram to beat.

Built in chapter 8.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from companion.errors import SourceUnavailable, UnsupportedModel

IGNORED = -100  # the label that transformers leaves out of the loss
CHOICES = 4  # ways to go on that a question of the cloze task offers
BLOCK = 256  # tokens in a row, where the model takes so many


class Rows(Dataset):
    """A data set of dictionaries, made from a dictionary of tensors with equal first dimension."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def encode(documents: Sequence[str], tokenizer) -> list[list[int]]:
    """Turn documents into token numbers, without special tokens.

    Parameters
    ----------
    documents : sequence of str
    tokenizer : PreTrainedTokenizerFast

    Returns
    -------
    list of list of int
    """
    return tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]


def blocks(documents: Sequence[list[int]], start: int, size: int) -> Rows:
    """Join documents into one stream, each behind a start token, and cut it into equal blocks.

    Parameters
    ----------
    documents : sequence of list of int
        Token numbers, from `encode`.
    start : int
        The token put before each document.
    size : int
        Tokens in a block; a shorter rest is dropped.

    Returns
    -------
    Rows
        ``input_ids`` and ``labels``, int64, shape (blocks, size).

    Examples
    --------
    >>> blocks([[5, 6], [7, 8, 9]], start=0, size=3)[1]["input_ids"]
    tensor([0, 7, 8])
    """
    stream = torch.tensor([token for document in documents for token in (start, *document)])
    rows = stream[: len(stream) // size * size].view(-1, size)
    if not len(rows):
        raise SourceUnavailable(
            f"{len(stream)} tokens do not fill one block of {size}: give more text or a "
            "smaller block_size"
        )
    return Rows(input_ids=rows, labels=rows)


def windows(documents: Sequence[list[int]], start: int, size: int) -> Rows:
    """Cut each document into windows such that every token is predicted exactly once.

    A window begins with the last token of the one before it (the first with `start`), which
    serves as context only. Short windows are padded and their padding is never scored.

    Parameters
    ----------
    documents : sequence of list of int
    start, size : int
        As in `blocks`.

    Returns
    -------
    Rows
        ``input_ids`` and ``labels``, int64, shape (windows, size), and ``document``, shape
        (windows,): which document a window belongs to.

    Examples
    --------
    >>> rows = windows([[5, 6, 7]], start=0, size=3)
    >>> rows[0]["labels"], rows[1]["labels"]
    (tensor([-100,    5,    6]), tensor([-100,    7, -100]))
    """
    inputs, labels, owners = [], [], []
    for number, document in enumerate(documents):
        tokens = [start, *document]
        for place in range(0, len(document), size - 1):
            window = tokens[place : place + size]
            padding = size - len(window)
            inputs.append(window + [start] * padding)
            labels.append([IGNORED, *window[1:]] + [IGNORED] * padding)
            owners.append(number)
    return Rows(
        input_ids=torch.tensor(inputs), labels=torch.tensor(labels), document=torch.tensor(owners)
    )


def start_token(tokenizer) -> int:
    """Return the token that begins a text, or if there is none, the one that ends it.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase

    Raises
    ------
    UnsupportedModel
        If it has neither, as those of encoders.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UnsupportedModel(
        "the tokenizer has no token that begins or ends a text: language modelling needs the "
        "tokenizer of a language model"
    )


def with_padding(tokenizer):
    """Return the tokenizer, or where it has no padding token, a copy that pads by its end token.

    What is padded is masked, so the token itself never counts. Tokenizers of GPT-2 and Llama
    come without one.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Left as it is.

    Raises
    ------
    UnsupportedModel
        If it has no special token at all.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer
    token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    if token is None:
        raise UnsupportedModel(
            "the tokenizer has no token to pad with: name one of its own, tokenizer.pad_token = ..."
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = token
    return tokenizer


def block_length(tokenizer, block_size: int | None = None) -> int:
    """Return how many tokens go into a row: 256, or as many as the tokenizer's model takes.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Its ``model_max_length`` is the most that a model takes.
    block_size : int, optional
        A number of your own.

    Raises
    ------
    ValueError
        If the model does not take so many, or the number is below 2: nothing would be predicted.
    """
    most = tokenizer.model_max_length
    if block_size is None:
        return int(min(BLOCK, most))
    if block_size < 2:
        raise ValueError(f"block_size {block_size} predicts no token: it must be at least 2")
    if block_size > most:
        raise ValueError(
            f"blocks of {block_size} tokens do not fit a model that takes {most}: block_size can "
            f"be at most {most}"
        )
    return block_size


def loaders(
    splits: Sequence[Sequence[str]],
    tokenizer,
    *,
    block_size: int | None = None,
    batch_size: int = 8,
) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Return loaders for training (shuffled blocks), validation and test (windows).

    Parameters
    ----------
    splits : three sequences of str
        Documents for training, validation and test.
    tokenizer : PreTrainedTokenizerFast
        Its beginning-of-text (or end-of-text) token starts each document.
    block_size : int, optional
        Tokens in a row. Default: 256, or fewer where the tokenizer's model takes fewer.
    batch_size : int
        Rows in a batch.
    """
    start, block_size = start_token(tokenizer), block_length(tokenizer, block_size)
    train, validation, test = (encode(split, tokenizer) for split in splits)
    return (
        DataLoader(blocks(train, start, block_size), batch_size, shuffle=True),
        DataLoader(windows(validation, start, block_size), 2 * batch_size),
        DataLoader(windows(test, start, block_size), 2 * batch_size),
    )


@dataclass(frozen=True)
class Trigram:
    """An interpolated Kneser-Ney trigram, the baseline that a language model has to beat.

    Each order keeps sorted codes of the sequences seen and their discounted shares; one
    absolute discount per order, estimated from the data.

    References
    ----------
    Kneser and Ney, "Improved backing-off for m-gram language modeling", ICASSP 1995.
    Chen and Goodman, "An empirical study of smoothing techniques for language modeling", 1999.

    Examples
    --------
    >>> model = Trigram.train([[1, 2, 3, 1, 2, 3, 1, 2, 4]], vocabulary=5)
    >>> totals = [sum(model.probability(np.array([[1, 2, w]]))[0] for w in range(5))]
    >>> round(float(totals[0]), 6)
    1.0
    """

    vocabulary: int
    unigram: np.ndarray
    shares: tuple[tuple[np.ndarray, np.ndarray], ...]  # orders 2 and 3: code -> discounted share
    weights: tuple[tuple[np.ndarray, np.ndarray], ...]  # orders 2 and 3: context -> left over

    @classmethod
    def train(cls, documents: Sequence[list[int]], vocabulary: int, start: int = 0) -> Trigram:
        """Count, with two start tokens before each document."""
        v = vocabulary
        grams = np.concatenate([_trigrams(document, start) for document in documents])
        codes3, counts3 = np.unique((grams[:, 0] * v + grams[:, 1]) * v + grams[:, 2],
                                    return_counts=True)  # fmt: skip
        # Lower orders count the distinct words that come before, not occurrences.
        codes2, counts2 = np.unique(codes3 % (v * v), return_counts=True)
        words, counts1 = np.unique(codes2 % v, return_counts=True)
        discount = _discount(counts1)
        unigram = np.full(v, discount * len(words) / v)
        unigram[words] += counts1 - discount
        shares, weights = zip(*(_order(c, n, v) for c, n in ((codes2, counts2), (codes3, counts3))),
                              strict=True)  # fmt: skip
        return cls(v, unigram / counts1.sum(), shares, weights)

    def probability(self, grams: np.ndarray) -> np.ndarray:
        """Return p(third token | the two before it), for rows of three tokens."""
        v = self.vocabulary
        result = self.unigram[grams[:, 2]]
        for (codes, share), (contexts, weight), context in zip(
            self.shares, self.weights, (grams[:, 1], grams[:, 0] * v + grams[:, 1]), strict=True
        ):
            found = _lookup(codes, share, context * v + grams[:, 2], 0.0)
            result = found + _lookup(contexts, weight, context, 1.0) * result
        return result

    def losses(self, documents: Sequence[list[int]], start: int = 0) -> np.ndarray:
        """Return the summed negative log-likelihood of each document, in nats."""
        return np.array(
            [-np.log(self.probability(_trigrams(document, start))).sum() for document in documents]
        )


def _trigrams(document: list[int], start: int) -> np.ndarray:
    tokens = np.concatenate(([start, start], document)).astype(np.int64)
    return np.stack([tokens[:-2], tokens[1:-1], tokens[2:]], 1)


def _discount(counts: np.ndarray) -> float:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else 0.5


def _order(codes: np.ndarray, counts: np.ndarray, v: int) -> tuple[tuple, tuple]:
    discount = _discount(counts)
    contexts, place, distinct = np.unique(codes // v, return_inverse=True, return_counts=True)
    total = np.bincount(place, counts)
    return (codes, (counts - discount) / total[place]), (contexts, discount * distinct / total)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, default: float) -> np.ndarray:
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], default)
