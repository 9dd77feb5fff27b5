"""Data sets from files and from the Hub, read through `datasets`; some are known by name.

Built in chapters 8 and 12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from companion.errors import SourceUnavailable, extra

FILES = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
PARTS = ("train", "validation", "test")


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
    data = _load(path, *([known.config] if folder is None and known.config else []),
                 **({"revision": known.revision} if folder is None and known.revision else {}))  # fmt: skip
    wanted = {ours: theirs for ours, theirs in known.splits if theirs in data}
    parts = {ours: data[theirs] for ours, theirs in wanted.items()}
    parts["train"] = data["train"]
    if "test" not in parts:
        raise SourceUnavailable(f"{path} has no split {dict(known.splits)['test']!r} to measure on")
    if "validation" not in parts:
        cut = parts["train"].train_test_split(0.05, seed=0)
        parts |= {"train": cut["train"], "validation": cut["test"]}
    try:
        examples = {part: [e for row in parts[part] if (e := known.example(row)) is not None]
                    for part in PARTS}  # fmt: skip
    except KeyError as error:
        raise SourceUnavailable(f"{path} has no column {error} as {name} should have") from error
    empty = [part for part in PARTS if not examples[part]]
    if empty:
        raise SourceUnavailable(f"{path} gives no example for {', '.join(empty)}")
    return examples


def read_text(
    name: str, text_column: str = "text", config: str | None = None
) -> dict[str, tuple[str, ...]]:
    """Read documents from a file or a Hub data set; unsplit data is split 8 : 1 : 1.

    Parameters
    ----------
    name : str
        A file that ends as in `FILES`, or a Hub id.
    text_column : str
    config : str, optional

    Raises
    ------
    ValueError
        For a file of another kind, or a column that is not there.
    SourceUnavailable
        If it cannot be read, or is too short to split.
    """
    data = _load(name, config)
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
    return {
        part: tuple(text for text in data[part][text_column] if text and text.strip())
        for part in PARTS
    }


def _load(name: str, *config: str | None, **options):
    """What `datasets.load_dataset` gives for a file, a folder of files, or a Hub id."""
    with extra("language"):
        from datasets import load_dataset

    path = Path(name)
    if path.is_dir():
        found = {file.stem: str(file) for file in sorted(path.iterdir()) if file.suffix in FILES}
        if "train" not in found:
            raise SourceUnavailable(f"{name} holds no file train.csv, train.json, train.parquet")
        return _read(name, load_dataset, FILES[Path(found["train"]).suffix], data_files=found)
    if path.exists() and path.suffix not in FILES:
        raise ValueError(f"{name}: the file must end in {', '.join(FILES)}")
    if path.exists() and not path.stat().st_size:
        raise SourceUnavailable(f"{name} is empty: give a file with text")
    if path.exists():
        options = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
        return _read(name, load_dataset, FILES[path.suffix], data_files=str(path), **options)
    return _read(name, load_dataset, name, *config, **options)


def _read(name: str, load: Callable, *arguments: Any, **options: Any) -> Any:
    try:
        return load(*arguments, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceUnavailable(f"{name} could not be read: {error}") from error
