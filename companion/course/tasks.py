"""Tasks by name, with fixed splits; nearly all are readable without a network.

Built in chapters 2, 8, 12 and 13.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch.utils.data import DataLoader

from companion.course.corpus import PACKAGES, Corpus, docstrings, language_reference
from companion.course.images import cifar10, digits
from companion.course.passages import (
    LIBRARIES,
    code_words,
    continuations,
    excerpts,
    instructed_json,
    instructed_summaries,
    reading,
    summaries,
    topics,
)
from companion.course.sources import MINILM, SMOLLM2, find, load_tokenizer
from companion.data.chat import chat, conversations, is_chat
from companion.data.examples import choices, classification, retrieval, tagging
from companion.data.sets import (
    KNOWN,
    columns,
    labelled,
    read_known,
    read_tables,
    split_rows,
    split_texts,
)
from companion.data.task import Task
from companion.data.text import block_length, blocks, loaders, start_token, windows


def load_task(name: str, **options) -> Task:
    """Load a task by name.

    Parameters
    ----------
    name : str
        Images: ``"digits-0-4"`` (to pre-train on), ``"digits-5-9"`` (to fine-tune on, few
        labels), ``"cifar10"`` (downloaded by torchvision where a network allows).
        Language modelling: ``"language-reference"`` (Python's, to fine-tune on),
        ``"docstrings"`` (what docs-lm was pre-trained on; larger test split), ``"excerpts"`` (of
        docstrings: test documents of nearly equal length), a local text,
        JSON, CSV or Parquet file, a folder of them named train, validation and test, or the Hub
        id of a data set. Text: ``"topics"`` (which
        library does a docstring describe, names masked, few labels), ``"code-words"`` (which
        words did the author mark as code), ``"summaries"`` (which body belongs to a summary
        line), ``"cloze"`` (which of four passages goes on). Chats, of which the answers are
        learned: ``"docstring-summaries"`` (write the summary line of a docstring),
        ``"docstring-json"`` (say as JSON what it documents). With a network: ``"sst2"``,
        ``"ag_news"``, ``"wikitext-2"``, ``"stsb"``, ``"conll2003"``.

        What a file, folder or Hub data set becomes goes by its columns: chats
        (`companion.data.chat.conversations` lists them) become a chat task, unless a
        ``text_column`` is asked for; a column ``label`` makes it a classification; all else is
        text for language modelling. ``kind`` decides otherwise.
    **options
        ``batch_size``; for the digits ``labels_per_class``, training images of each class
        (None for all that are not held out); for language modelling ``tokenizer`` (default:
        docs-lm's) and ``block_size`` (256 tokens, or what the tokenizer's model takes), for
        docstrings ``documents`` (at most so many of each split), for excerpts ``tokens`` (to train
        on) and ``draw`` (which documents these are), for files ``encoding`` and for Hub ids
        ``config``, for both ``text_column``, ``label_column`` and ``kind`` ("language", "chat" or
        "classification"); for tasks on text ``tokenizer`` (default: that of the model the task is
        made for, of chats SmolLM2's), or instead ``model``, a name whose tokenizer is loaded; for
        chats and classifications ``max_length`` (tokens of a row at most: a longer conversation is
        left out, with a warning, a longer text is cut); for chats of docstrings ``examples`` (to
        train on) and ``held_out`` (to test on); for the names that need a network ``folder``, with
        files of the same columns.

    Returns
    -------
    Task

    Raises
    ------
    ValueError
        For an unknown name, with the known ones; for an option that the task does not have; for
        data that cannot be read as what it is.
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
    if name in TASKS or Path(name).exists() or "/" in name:
        model = options.pop("model", None)
        if model is not None:
            if options.get("tokenizer") is not None:
                raise ValueError("model and tokenizer both name a tokenizer: give one of them")
            options["tokenizer"] = load_tokenizer(model)
        try:
            return TASKS.get(name, _data_set)(name, **options)
        except TypeError as error:
            found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if found is None or found[1] not in options:
                raise
            given = "model" if found[1] == "tokenizer" and model is not None else found[1]
            raise ValueError(f"task {name!r} has no option {given!r}") from None
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


def _excerpts(
    name: str, tokenizer=None, tokens: int = 400_000, draw: int = 0, batch_size: int = 16
) -> Task:
    """Rows of 256 tokens; each document of validation and test is one row."""
    tokenizer = tokenizer or load_tokenizer("docs-lm")
    start, size = start_token(tokenizer), block_length(tokenizer)
    held_out = excerpts(tokenizer, size - 1)
    validation, test = ([e.tokens for e in held_out[part]] for part in ("validation", "test"))
    return Task(
        name,
        DataLoader(blocks(reading(tokenizer, tokens, draw), start, size), batch_size, shuffle=True),
        DataLoader(windows(validation, start, size), 2 * batch_size),
        DataLoader(windows(test, start, size), 2 * batch_size),
        classes=(),
        source=_read_from(),
    )


def _topics(name: str, tokenizer=None, per_class: int = 20, tokens: int = 32, batch_size: int = 16):
    """Which library does the beginning of a docstring describe, its name masked?"""
    return classification(name, topics(per_class), LIBRARIES,
                          tokenizer or load_tokenizer(MINILM), _read_from(LIBRARIES),
                          max_length=tokens, batch_size=batch_size, padding="max_length")  # fmt: skip


def _code_words(name: str, tokenizer=None, batch_size: int = 16, **sizes) -> Task:
    """Which words did the author mark as code?"""
    return tagging(name, code_words(**sizes), ("O", "B-code", "I-code"),
                   tokenizer or load_tokenizer(MINILM), _read_from(), batch_size=batch_size)  # fmt: skip


def _summaries(name: str, tokenizer=None, batch_size: int = 16, **sizes) -> Task:
    """Which body belongs to a summary line?"""
    return retrieval(name, summaries(**sizes), tokenizer or load_tokenizer(MINILM),
                     _read_from(), batch_size=batch_size)  # fmt: skip


def _docstring_chats(
    name: str, tokenizer=None, examples: int = 5000, held_out: int = 400, **options
) -> Task:
    """Answer as the author of a docstring did, or would have to."""
    made = {"docstring-summaries": instructed_summaries, "docstring-json": instructed_json}
    splits = {part: conversations(example._asdict() for example in found)
              for part, found in made[name](examples, held_out).items()}  # fmt: skip
    return chat(name, splits, tokenizer or load_tokenizer(SMOLLM2), _read_from(), **options)


def _cloze(name: str, tokenizer=None, questions: int = 1000, **options) -> Task:
    """Which of four ways to go on is the author's? Trained as a language model, on what docs-lm has read."""
    corpus = docstrings(progress=False)
    _announce_difference(corpus)
    tokenizer = tokenizer or load_tokenizer("docs-lm")
    some = replace(corpus, train=corpus.train[::9], validation=corpus.validation[::60])
    task = _language_task(name, some, _read_from(), tokenizer, **options)
    asked = choices(continuations(questions)["test"], tokenizer)
    return replace(task, test=asked, metric="right choices")


def _read_from(packages: Sequence[str] = tuple(PACKAGES)) -> str:
    versions = docstrings(progress=False).versions
    return f"docstrings of {', '.join(f'{package} {versions[package]}' for package in packages)}"


def _known(name: str, tokenizer=None, folder=None, batch_size: int = 16, **options) -> Task:
    """A data set of the Hub that has a name of its own here."""
    known, splits = KNOWN[name], read_known(name, folder)
    if known.kind == "language":
        corpus = Corpus(versions={}, **{part: tuple(texts) for part, texts in splits.items()})
        return _language_task(
            name, corpus, known.source, tokenizer, batch_size=batch_size, **options
        )
    tokenizer = tokenizer or load_tokenizer(MINILM)
    make = {"classification": classification, "tagging": tagging, "retrieval": retrieval}[
        known.kind
    ]
    labels = (known.classes,) if known.classes else ()
    return make(name, splits, *labels, tokenizer, known.source, batch_size=batch_size, **options)


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


def _data_set(
    name: str, kind: str | None = None, config: str | None = None, encoding: str | None = None,
    **options,
) -> Task:  # fmt: skip
    """A file, a folder or a Hub data set, as what its columns say that it is."""
    tables = read_tables(name, config, encoding)
    kind = kind or _kind(columns(tables["train"]), options)
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown: choose one of {', '.join(KINDS)}")
    return KINDS[kind](name, tables, **options)


def _kind(names: Sequence[str], options: Mapping) -> str:
    if "text_column" not in options and "label_column" not in options and is_chat(names):
        return "chat"
    labels = options.get("label_column", "label")
    return "classification" if labels in names or "label_column" in options else "language"


def _texts(name: str, tables: Mapping, text_column: str = "text", **options) -> Task:
    splits = split_texts(name, tables, text_column)
    return _language_task(name, Corpus(versions={}, **splits), name, **options)


def _chats(name: str, tables: Mapping, tokenizer=None, **options) -> Task:
    splits = split_rows(name, tables)
    chats = {part: conversations(rows) for part, rows in splits.items()}
    return chat(name, chats, tokenizer or load_tokenizer(SMOLLM2), name, **options)


def _labelled_texts(
    name: str, tables: Mapping, text_column: str = "text", label_column: str = "label",
    tokenizer=None, **options,
) -> Task:  # fmt: skip
    splits, classes = labelled(name, tables, text_column, label_column)
    return classification(
        name, splits, classes, tokenizer or load_tokenizer(MINILM), name, **options
    )


KINDS = {"language": _texts, "chat": _chats, "classification": _labelled_texts}
"""What data of one's own may become."""


def _language_task(
    name: str, corpus: Corpus, source: str, tokenizer=None, block_size=None, batch_size=8
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
    "excerpts": _excerpts,
    "topics": _topics,
    "code-words": _code_words,
    "summaries": _summaries,
    "cloze": _cloze,
    "docstring-summaries": _docstring_chats,
    "docstring-json": _docstring_chats,
    **dict.fromkeys(KNOWN, _known),
}
