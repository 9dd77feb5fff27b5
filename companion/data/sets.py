"""Data sets from files, read here, and from the Hub, through `datasets`; some are known by name.

Files are read without `datasets`, which takes brackets in their names for patterns. Built in
chapters 8, 12 and 13.
"""

from __future__ import annotations

import codecs
import io
import json
import re
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from companion.errors import DataWarning, MissingExtra, SourceUnavailable, extra

FILES = (".txt", ".json", ".jsonl", ".csv", ".parquet")
PARTS = ("train", "validation", "test")
Table = Mapping[str, Sequence]  # columns by name: a dictionary, or a split of `datasets`
FEWEST = 10  # documents that can be split 8 : 1 : 1
CHATS = ("messages", "conversations", "conversation")  # columns of the usual chat data sets
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Bytes at the beginning of a file that say how it is encoded."""


@dataclass(frozen=True)
class Known:
    """A data set that a name stands for, and how its rows become examples of a task.

    Parameters
    ----------
    kind : {"language", "classification", "tagging", "retrieval"}
    path : str
        Its id on the Hub.
    source : str
        Where it is from, and its licence.
    example : callable
        Turns a row into an example, or into None to leave it out.
    classes : tuple of str
    config, revision : str, optional
        As `datasets.load_dataset` takes them.
    splits : pairs of str
        Our name and the data set's name of the splits that we measure on. Where it has no
        labels for its test split, its validation split is our test; a validation split that
        is missing is cut from its training split.
    """

    kind: str
    path: str
    source: str
    example: Callable[[dict], Any]
    classes: tuple[str, ...] = ()
    config: str | None = None
    revision: str | None = None
    splits: tuple[tuple[str, str], ...] = (("test", "test"), ("validation", "validation"))


NER = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
KNOWN = {
    "sst2": Known(
        "classification", "stanfordnlp/sst2", "Stanford Sentiment Treebank, in GLUE",
        lambda row: (row["sentence"], row["label"]), ("negative", "positive"),
        splits=(("test", "validation"),),
    ),
    "ag_news": Known(
        "classification", "fancyzhx/ag_news", "AG News, for research",
        lambda row: (row["text"], row["label"]), ("World", "Sports", "Business", "Sci/Tech"),
        splits=(("test", "test"),),
    ),
    "wikitext-2": Known(
        "language", "Salesforce/wikitext", "WikiText-2 (CC BY-SA)",
        lambda row: row["text"] if row["text"].strip() else None, config="wikitext-2-raw-v1",
    ),
    "stsb": Known(
        "retrieval", "sentence-transformers/stsb", "STS benchmark, pairs that mean the same",
        lambda row: (row["sentence1"], row["sentence2"]) if row["score"] >= 0.8 else None,
    ),
    "conll2003": Known(
        "tagging", "eriktks/conll2003", "CoNLL-2003, Reuters text, for research",
        lambda row: (row["tokens"], [NER[tag] for tag in row["ner_tags"]]), NER,
        revision="refs/convert/parquet",
    ),
}  # fmt: skip
"""Names that stand for data sets on the Hub."""


def read_known(name: str, folder: str | Path | None = None) -> dict[str, list]:
    """Read a data set of `KNOWN` as examples of three splits.

    Parameters
    ----------
    name : str
        A key of `KNOWN`.
    folder : path, optional
        With files of the same columns, ``train``, ``validation`` and ``test``, each ending as
        in `FILES`, instead of the Hub.

    Returns
    -------
    dict of str to list

    Raises
    ------
    SourceUnavailable
        If it cannot be read, or a split stays empty.
    """
    known = KNOWN[name]
    path = known.path if folder is None else str(folder)
    data = _from_hub(path, known.config, known.revision) if folder is None else _from_folder(path)
    wanted = {ours: theirs for ours, theirs in known.splits if theirs in data}
    parts = {ours: _rows(data[theirs]) for ours, theirs in wanted.items()}
    if "train" not in data:
        raise SourceUnavailable(f"{path} has no split 'train' to train on")
    parts["train"] = _rows(data["train"])
    if "test" not in parts:
        raise SourceUnavailable(f"{path} has no split {dict(known.splits)['test']!r} to measure on")
    if "validation" not in parts:
        parts["train"], parts["validation"] = _cut(parts["train"], 0.05)
    try:
        examples = {part: [e for row in parts[part] if (e := known.example(row)) is not None]
                    for part in PARTS}  # fmt: skip
    except KeyError as error:
        raise SourceUnavailable(f"{path} has no column {error} as {name} should have") from error
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise SourceUnavailable(f"{path} holds other values than {name} should: {error}") from error
    empty = [part for part in PARTS if not examples[part]]
    if empty:
        raise SourceUnavailable(f"{path} gives no example for {', '.join(empty)}")
    return examples


def read_tables(
    name: str, config: str | None = None, encoding: str | None = None
) -> dict[str, Table]:
    """Read the columns of a file, a folder or a Hub data set, for each split that it has.

    Parameters
    ----------
    name : str
        A file that ends as in `FILES`; a folder with such files named train, and validation and
        test where there are any; or a Hub id. In a text file, empty lines set documents apart;
        where there are none, each line is a document.
    config : str, optional
        Of a Hub data set.
    encoding : str, optional
        Of a file, as Python names it. Default: what its first bytes say, otherwise UTF-8.

    Returns
    -------
    dict of str to mapping
        Columns by name, for "train" and whatever other splits there are.

    Raises
    ------
    ValueError
        For a file of another kind or encoding.
    SourceUnavailable
        If it cannot be read, or has no training split.
    """
    path = Path(name)
    if path.is_dir():
        data = _from_folder(name, encoding)
    elif path.exists():
        data = {"train": _from_file(path, encoding)}
    elif path.suffix.lower() in FILES or name.startswith((".", "/", "~")):
        raise SourceUnavailable(f"there is no file {name}")
    else:
        data = _from_hub(name, config)
    if "train" not in data:
        raise SourceUnavailable(f"{name} has no split 'train', only {', '.join(data)}")
    return {part: data[part] for part in PARTS if part in data}


def read_text(
    name: str,
    text_column: str = "text",
    config: str | None = None,
    encoding: str | None = None,
) -> dict[str, tuple[str, ...]]:
    """Read documents from a file, a folder or a Hub data set; splits that are missing are cut off.

    Parameters
    ----------
    name, config, encoding
        As in `read_tables`.
    text_column : str
        The column that holds the documents. What is empty in it is left out.

    Returns
    -------
    dict of str to tuple of str
        "train", "validation" and "test". A missing one is a tenth of the training split.

    Raises
    ------
    ValueError
        For a file of another kind or encoding, or a column that is not there or holds no text.
    SourceUnavailable
        If it cannot be read, is too short to split, or leaves a split empty.
    """
    return split_texts(name, read_tables(name, config, encoding), text_column)


def read_rows(
    name: str, config: str | None = None, encoding: str | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Read rows from a file, a folder or a Hub data set; splits that are missing are cut off.

    Parameters
    ----------
    name, config, encoding
        As in `read_tables`.

    Returns
    -------
    dict of str to list of dict
        "train", "validation" and "test", cut as by `read_text`; a value that is missing is None.

    Raises
    ------
    ValueError, SourceUnavailable
        As `read_text`.
    """
    return split_rows(name, read_tables(name, config, encoding))


def split_texts(
    name: str, tables: Mapping[str, Table], text_column: str = "text"
) -> dict[str, tuple[str, ...]]:
    """Take the documents out of tables, and cut the splits that are missing off.

    Parameters
    ----------
    name : str
        What messages call them.
    tables : mapping of str to mapping
        From `read_tables`.
    text_column : str

    Examples
    --------
    >>> found = split_texts("notes", {"train": {"text": [f"line {i}" for i in range(10)]}})
    >>> {part: len(texts) for part, texts in found.items()}
    {'train': 8, 'validation': 1, 'test': 1}
    """
    parts = {part: _texts(name, table, text_column) for part, table in tables.items()}
    parts = _split(name, parts, "documents")
    if empty := [part for part in PARTS if not parts[part]]:
        raise SourceUnavailable(
            f"{name} leaves no text for {', '.join(empty)}: column {text_column!r} is empty there"
        )
    return {part: tuple(texts) for part, texts in parts.items()}


def split_rows(
    name: str, tables: Mapping[str, Table], needed: Sequence[str] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Take the rows out of tables, and cut the splits that are missing off.

    Parameters
    ----------
    name, tables
        As in `split_texts`.
    needed : sequence of str
        Columns in which nothing may be missing or blank; rows in which something is are left out,
        and a `DataWarning` says how many.

    Examples
    --------
    >>> found = split_rows("notes", {"train": {"n": list(range(10))}}, ["n"])
    >>> found["test"]
    [{'n': 4}]
    """
    parts = {}
    for part, table in tables.items():
        names = columns(table)
        if missing := [column for column in needed if column not in names]:
            raise ValueError(
                f"{name} has no column {missing[0]!r} in its split {part}, only {', '.join(names)}: "
                "pass --text-column and --label-column, or text_column and label_column"
            )
        parts[part] = _rows(table)
    whole = {part: [row for row in rows if not any(_blank(row[column]) for column in needed)]
             for part, rows in parts.items()}  # fmt: skip
    total, left = (sum(map(len, found.values())) for found in (parts, whole))
    if left < total:
        warnings.warn(
            f"{total - left} of {total} rows of {name} lack {' or '.join(map(repr, needed))} and are "
            "left out",
            DataWarning,
            stacklevel=2,
        )
    parts = _split(name, whole, "rows")
    if empty := [part for part in PARTS if not parts[part]]:
        raise SourceUnavailable(f"{name} leaves no row for {', '.join(empty)}")
    return parts


def labelled(
    name: str, tables: Mapping[str, Table], text_column: str = "text", label_column: str = "label"
) -> tuple[dict[str, list[tuple[str, int]]], tuple[str, ...]]:
    """Take texts and their labels out of tables, and number the classes.

    Parameters
    ----------
    name, tables
        As in `split_texts`.
    text_column, label_column : str
        Labels are texts or numbers. Rows in which either is missing are left out, with a warning.

    Returns
    -------
    splits : dict of str to list of (str, int)
        "train", "validation" and "test".
    classes : tuple of str
        What label 0, 1, ... mean: sorted, numbers by their size.

    Raises
    ------
    ValueError
        If a column is not there or holds something else, or there are fewer than two classes, or
        the training split lacks one.

    Examples
    --------
    >>> table = {"text": ["green", "red"] * 10, "label": ["go", "stop"] * 10}
    >>> splits, classes = labelled("lights", {"train": table})
    >>> classes, splits["test"]
    (('go', 'stop'), [('green', 0), ('green', 0)])
    """
    splits = split_rows(name, tables, (text_column, label_column))
    rows = [row for part in PARTS for row in splits[part]]
    for column, kinds, wanted in ((text_column, str, "text"),
                                  (label_column, (str, int, float), "text or a number")):  # fmt: skip
        odd = next((row[column] for row in rows if not isinstance(row[column], kinds)), None)
        if odd is not None:
            raise ValueError(
                f"column {column!r} of {name} holds {reprlib.repr(odd)}, which is not {wanted}: pass "
                "--text-column and --label-column, or text_column and label_column"
            )
    found = {part: [_class(row[label_column]) for row in splits[part]] for part in PARTS}
    classes = sorted(set(chain(*found.values())), key=_rank)
    if len(classes) < 2:
        raise ValueError(
            f"column {label_column!r} of {name} holds one class only, {classes[0]!r}: give a file with "
            "at least two, or read it as text with kind='language'"
        )
    if unseen := [label for label in classes if label not in found["train"]]:
        raise ValueError(
            f"no row of the training split of {name} has the label {unseen[0]!r}: give more rows of "
            "each class, or files of your own named train, validation and test in a folder"
        )
    number = {label: place for place, label in enumerate(classes)}
    pairs = {part: [(row[text_column], number[label]) for row, label in
                    zip(splits[part], found[part], strict=True)] for part in PARTS}  # fmt: skip
    return pairs, tuple(classes)


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _class(label: Any) -> str:
    """1 and 1.0 are one class: a column of numbers in which one is missing is read as fractions."""
    return str(int(label) if isinstance(label, float) and label.is_integer() else label)


def _rank(label: str) -> tuple[bool, float, str]:
    """Numbers by their size, and before texts."""
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label


def _split(name: str, parts: dict[str, list], what: str) -> dict[str, list]:
    """Cut the splits that are missing off the training split, a tenth of it each."""
    missing = [part for part in PARTS if part not in parts]
    train = parts["train"]
    if missing and len(train) < FEWEST:
        lines = (
            ". In a text file, empty lines set documents apart, or line ends where there are no empty "
            "lines" if what == "documents" else ""
        )  # fmt: skip
        raise SourceUnavailable(
            f"{name} holds fewer than {FEWEST} {what} ({len(train)}): too few to split{lines}"
        )
    if len(missing) == 2:
        train, rest = _cut(train, 0.2)
        cut = dict(zip(missing, _cut(rest, 0.5), strict=True))
    elif missing:
        train, held_out = _cut(train, 0.1)
        cut = {missing[0]: held_out}
    else:
        cut = {}
    return parts | cut | {"train": train}


def _cut(rows: Sequence, share: float) -> tuple[list, list]:
    """Cut a random share off, the same every time."""
    with extra("language"):
        from datasets import Dataset

    numbers = Dataset.from_dict({"row": list(range(len(rows)))})
    return tuple([rows[row] for row in part["row"]]
                 for part in numbers.train_test_split(share, seed=0).values())  # fmt: skip


def _texts(name: str, table: Table, column: str) -> list[str]:
    """The documents of a column, without those that are missing or blank."""
    names = columns(table)
    chats = [chat for chat in CHATS if chat in names]
    if chats and (column in chats or column not in names):
        raise ValueError(
            f"{name} holds chats (column {chats[0]!r}), and a language task reads plain text: leave "
            "text_column and kind out to learn the answers, or write each chat into a column 'text', "
            "for instance with "
            f"tokenizer.apply_chat_template({chats[0]}, tokenize=False)"
        )
    if column not in names:
        raise ValueError(
            f"{name} has no column {column!r}: pass --text-column or text_column, one of "
            f"{', '.join(names)}"
        )
    values = [value for value in table[column][:] if value is not None]
    other = next((value for value in values if not isinstance(value, str)), None)
    if other is not None:
        fit = [n for n in names if any(isinstance(v, str) for v in table[n][:FEWEST])]
        way = f"pass --text-column or text_column, one of {', '.join(fit)}" if fit else (
            "it has no column of text")  # fmt: skip
        raise ValueError(
            f"column {column!r} of {name} holds {reprlib.repr(other)}, which is no text: {way}"
        )
    return [value for value in values if value.strip()]


def columns(table: Table) -> list[str]:
    """Return the names of the columns of a table, as `read_tables` gives it.

    Examples
    --------
    >>> columns({"text": [], "label": []})
    ['text', 'label']
    """
    return list(getattr(table, "column_names", table))


def _rows(table: Table) -> list[dict[str, Any]]:
    names = columns(table)
    return [dict(zip(names, row, strict=True))
            for row in zip(*(table[name][:] for name in names), strict=True)]  # fmt: skip


def _from_folder(name: str, encoding: str | None = None) -> dict[str, Table]:
    """Tables of the files of a folder that are named after splits."""
    files = [file for file in sorted(Path(name).iterdir()) if file.suffix.lower() in FILES]
    found = {part: [file for file in files if file.stem == part] for part in PARTS}
    for part, named in found.items():
        if len(named) > 1:
            raise SourceUnavailable(
                f"{name} holds {' and '.join(file.name for file in named)}: keep one of them as {part}"
            )
    if not found["train"]:
        there = f", but {', '.join(file.name for file in files[:3])}" if files else ""
        raise SourceUnavailable(
            f"{name} holds no file train{FILES[0]}, train{FILES[1]}, ...{there}: name one of the files "
            "train, or give a single file"
        )
    return {part: _from_file(named[0], encoding) for part, named in found.items() if named}


def _from_file(path: Path, encoding: str | None = None) -> dict[str, list]:
    """The columns of a file."""
    kind = path.suffix.lower()
    if kind not in FILES:
        raise ValueError(f"{path}: the file must end in {', '.join(FILES)}")
    if not path.stat().st_size:
        raise SourceUnavailable(f"{path} is empty: give a file with text")
    if kind == ".parquet":
        if encoding is not None:
            raise ValueError(f"{path}: Parquet files say themselves how they are encoded")
        with _said(path), extra("language"):
            import pandas as pd

            return _columns_of(pd.read_parquet(io.BytesIO(path.read_bytes())))
    text = _decoded(path, encoding)
    if not text.strip():
        raise SourceUnavailable(f"{path} is empty: give a file with text")
    if kind == ".txt":
        return {"text": _documents(text)}
    if kind == ".csv":
        with _said(path), extra("language"):
            import pandas as pd

            return _columns_of(pd.read_csv(io.StringIO(text), low_memory=False))
    rows = _objects(path, text)
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(chain(*rows))}


def _columns_of(frame) -> dict[str, list]:
    frame = frame.astype(object).where(frame.notna(), None)
    return {str(column): frame[column].tolist() for column in frame}


def _decoded(path: Path, encoding: str | None) -> str:
    """The text of a file, its line ends as newlines."""
    content = path.read_bytes()
    said = next((codec for mark, codec in MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding or said)
    except LookupError:
        raise ValueError(
            f"encoding {encoding!r} is unknown: write utf-8, latin-1, cp1252 or utf-16"
        ) from None
    except UnicodeError as error:
        if b"\0" in content[:4096] and said == "utf-8":
            raise _binary(path) from None
        raise ValueError(
            f"{path} is no text in {encoding or said} ({error}): pass --encoding or encoding, such as "
            "latin-1"
        ) from None
    if "\0" in text:
        raise _binary(path)
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _binary(path: Path) -> ValueError:
    return ValueError(
        f"{path} holds zero bytes: it is no text, or text in UTF-16 (then pass --encoding or encoding, "
        "utf-16)"
    )


def _documents(text: str) -> list[str]:
    """What empty lines set apart; in a text without any, its lines."""
    parts = [part for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]
    return parts if len(parts) > 1 else [line for line in text.split("\n") if line.strip()]


def _objects(path: Path, text: str) -> list[dict[str, Any]]:
    """The objects of a JSON file: a list of them, or one on each line."""
    whole = text.lstrip().startswith("[")
    number, rows = 1, []
    try:
        for number, part in enumerate([text] if whole else text.split("\n"), 1):  # noqa: B007
            if part.strip():
                rows.append(json.loads(part))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: line {number + error.lineno - 1} is no JSON ({error.msg}): write one object a "
            "line, or a list of objects"
        ) from None
    except RecursionError:
        raise ValueError(f"{path}: line {number} is nested too deeply: leave it out") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise ValueError(f"{path}: line {number} cannot be read ({error})") from None
    rows = rows[0] if whole else rows
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f'{path} holds no objects with named columns, such as {{"text": "..."}}')
    return rows


def _from_hub(name: str, config: str | None = None, revision: str | None = None) -> Any:
    """What `datasets.load_dataset` gives; without a network, what it kept from an earlier time."""
    with extra("language"):
        import datasets

    options = {} if revision is None else {"revision": revision}
    with _offline_unless_reachable(name), _said(name):
        return datasets.load_dataset(name, *([config] if config else []), **options)


@contextmanager
def _offline_unless_reachable(name: str) -> Iterator[None]:
    """Ask the Hub once, for five seconds: `datasets` alone asks for half a minute."""
    import datasets
    from huggingface_hub import dataset_info
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    before = datasets.config.HF_HUB_OFFLINE
    try:
        dataset_info(name, timeout=5)
    except (HfHubHTTPError, HFValidationError):
        pass  # the Hub answered; what it said, load_dataset will say better
    except Exception:  # of whichever library it asks with
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def _said(name: str | Path) -> Iterator[None]:
    """Turn an error of a library that reads files into one line of ours."""
    try:
        yield
    except MissingExtra:
        raise
    except Exception as error:  # they have many kinds, not all of them of a common class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceUnavailable(f"{name} could not be read: {reason}") from error
