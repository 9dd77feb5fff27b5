"""Text that is already on the machine: docstrings of installed packages, Python's reference.

Nothing is copied into the repository; the text is read where pip put it, de-duplicated, and
split by source file. Built in chapter 8.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

from companion.errors import SourceUnavailable
from companion.files import cache_folder, write_atomically

PACKAGES = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "pandas": "pandas",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "sympy": "sympy",
    "torch": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers",
}
"""Import name and distribution name of the packages whose docstrings are read."""

MIN_CHARACTERS = 80
NGRAM = 13  # words; the usual length for finding text that was seen in training
TRAIN_SHARE = 0.65  # of the language reference's text
FORMAT = 3  # raise when the rules below change, so that older caches are left aside
HELD_OUT = {"test": range(0, 5), "validation": range(5, 7)}  # percent of the source files


@dataclass(frozen=True)
class Corpus:
    """Documents of three splits, with the hash of their content and where they come from.

    Parameters
    ----------
    train, validation, test : tuple of str
    versions : dict of str to str
        Packages read, with their versions.
    packages, modules : dict of str to tuple of str
        For each split, the package and the source file that each document comes from; empty if
        not known.

    Examples
    --------
    >>> corpus = Corpus(("some text",), (), (), {"torch": "2.14.1"})
    >>> corpus.sha256[:8], len(corpus.train)
    ('6c3540f7', 1)
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    versions: dict[str, str]
    packages: dict[str, tuple[str, ...]] = field(default_factory=dict)
    modules: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        """Hash of all documents in order: equal text, equal hash."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            for document in part:
                digest.update(document.encode() + b"\0")
            digest.update(b"\1")
        return digest.hexdigest()


def docstrings(packages: Iterable[str] = tuple(PACKAGES), progress: bool = True) -> Corpus:
    """Collect the distinct docstrings of installed packages, split by source file.

    A docstring that shares 13 words in a row with the language reference is left out of every
    split, and one that shares them with the training split is left out of the held-out ones:
    what is measured later was never read before. Cached by package versions.

    Parameters
    ----------
    packages : iterable of str
        Import names; all must be installed.
    progress : bool
        Show a bar on stderr while files are read.

    Returns
    -------
    Corpus

    Raises
    ------
    SourceUnavailable
        If a package is not installed, with the command that installs it.

    Examples
    --------
    >>> corpus = docstrings(["networkx"], progress=False)
    >>> all(len(document) >= 80 for document in corpus.train)
    True
    """
    packages = sorted(packages)
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise SourceUnavailable(
            f"the corpus is read from installed packages, and {', '.join(missing)} is not "
            f"installed: pip install {' '.join(PACKAGES.get(name, name) for name in missing)}"
        )
    versions = {name: version(PACKAGES.get(name, name)) for name in packages}
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    key = hashlib.sha256(json.dumps([FORMAT, versions]).encode()).hexdigest()[:12]
    path = cache_folder() / f"docstrings-{key}.json"
    if not path.exists():
        splits = _split(packages, progress)
        write_atomically(path, lambda partial: partial.write_text(json.dumps(splits)))
    texts, owners, files = _read(path)
    return Corpus(versions=versions, packages=owners, modules=files, **texts)


def language_reference() -> Corpus:
    """Split the topics of the Python language reference that every CPython carries.

    Topics that another topic contains (more than half of their 13-word sequences) are dropped
    first; topics that still share one stand in the same split. The longest are trained on.

    Returns
    -------
    Corpus
        About two thirds of the text to train on, one sixth each for validation and test.

    Examples
    --------
    >>> reference = language_reference()
    >>> sum(map(len, reference.train)) > sum(map(len, reference.test))
    True
    """
    topics = {name: text for name, text in sorted(_topics().items()) if len(text) > 400}
    grams = {name: set(ngrams(text).tolist()) for name, text in topics.items()}
    kept: list[str] = []
    for name in sorted(topics, key=lambda n: (-len(topics[n]), n)):  # containers before contents
        shared = max((len(grams[name] & grams[other]) for other in kept), default=0)
        if shared <= len(grams[name]) / 2:
            kept.append(name)
    # Topics that still share a passage stand in one cluster, and a cluster in one split.
    clusters: list[list[str]] = []
    for name in kept:
        touching = [c for c in clusters if any(grams[name] & grams[other] for other in c)]
        apart = [c for c in clusters if c not in touching]
        clusters = [*apart, [name, *(other for c in touching for other in c)]]
    size = {min(c): sum(len(topics[name]) for name in c) for c in clusters}
    clusters.sort(key=lambda c: (-size[min(c)], min(c)))
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    used = 0
    for cluster in clusters:  # the longest to train on: held out, many short ones say more
        used += size[min(cluster)]
        smaller = min(HELD_OUT, key=lambda part: sum(len(topics[n]) for n in splits[part]))
        splits["train" if used <= TRAIN_SHARE * sum(size.values()) else smaller] += cluster
    return Corpus(
        versions={"python": ".".join(map(str, sys.version_info[:3]))},
        **{part: tuple(topics[name] for name in sorted(names)) for part, names in splits.items()},
    )


def ngrams(text: str, n: int = NGRAM) -> np.ndarray:
    """Hash every sequence of n words, without case and punctuation.

    Parameters
    ----------
    text : str
    n : int
        Words in a sequence.

    Returns
    -------
    ndarray of uint64, shape (words - n + 1,)

    Examples
    --------
    >>> int(np.isin(ngrams("a b c d", 3), ngrams("B, c; d", 3)).sum())
    1
    """
    words = [zlib.crc32(word.encode()) for word in re.findall(r"\w+", text.lower())]
    if len(words) < n:
        return np.empty(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(np.array(words, np.uint64), n)
    powers = np.array([pow(0x9E3779B97F4A7C15, k, 2**64) for k in range(n)], np.uint64)
    return (windows * powers).sum(1, dtype=np.uint64)


def any_in(grams: np.ndarray, read: np.ndarray) -> bool:
    """Whether any of a few hashes occurs among many.

    Parameters
    ----------
    grams : ndarray of uint64, shape (few,)
        From `ngrams`.
    read : ndarray of uint64, shape (many,)
        Sorted.

    Examples
    --------
    >>> any_in(ngrams("the road of yellow", 3), np.sort(ngrams("a road of yellow bricks", 3)))
    True
    """
    if not len(grams):
        return False
    places = np.searchsorted(read, grams).clip(max=len(read) - 1)
    return bool((read[places] == grams).any())


def _split(packages: list[str], progress: bool) -> dict[str, list[tuple[str, str, str]]]:
    """Return each document with its package and its source file, for each split."""
    reference = np.unique(np.concatenate([ngrams(text) for text in _topics().values()]))
    splits: dict[str, list[tuple[str, str, str]]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    files = [(package, *file) for package in packages for file in _files(package)]
    for package, package_root, file in tqdm(
        files, desc="docstrings", leave=False, **({} if progress else {"disable": True})
    ):
        name = file.relative_to(package_root.parent).as_posix()
        place = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
        part = next((part for part, places in HELD_OUT.items() if place in places), "train")
        for document in _docstrings(file):
            squeezed = " ".join(document.split())
            if squeezed not in seen and not any_in(ngrams(document), reference):
                seen.add(squeezed)
                splits[part].append((document, package, name))
    read = np.unique(np.concatenate([ngrams(text) for text, *_ in splits["train"]]))
    for part in HELD_OUT:
        splits[part] = [entry for entry in splits[part] if not any_in(ngrams(entry[0]), read)]
    return splits


@lru_cache(maxsize=2)
def _read(path: Path) -> tuple[dict[str, tuple[str, ...]], ...]:
    """Documents, packages and files of each split; several tasks ask for them in one process."""
    splits = json.loads(path.read_text())
    return tuple({part: tuple(entry[i] for entry in entries) for part, entries in splits.items()}
                 for i in range(3))  # fmt: skip


def _files(package: str) -> Iterator[tuple[Path, Path]]:
    root = Path(find_spec(package).origin).parent
    for file in sorted(root.rglob("*.py")):
        if "tests" not in file.relative_to(root).parts:
            yield root, file


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return  # templates and files for other Pythons
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node, clean=False)):
            text = inspect.cleandoc(text)
            if len(text) >= MIN_CHARACTERS:
                yield text


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics
