"""Examples whose labels real authors wrote, cut from the docstrings of installed packages.

Each function returns plain Python values for the three splits of the corpus, which were made by
source file: no text of a held-out file is trained on. Those for chats split the files anew, since
they hold out more. Built in chapters 12 and 13.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from companion.course.corpus import Corpus, any_in, docstrings, ngrams
from companion.data.text import CHOICES, encode

LIBRARIES = ("matplotlib", "networkx", "numpy", "pandas", "scipy", "sklearn", "sympy", "torch",
             "transformers")  # fmt: skip
"""Classes of the task "topics": the packages with enough held-out docstrings."""
BODIES = 1000
"""Among so many bodies a summary line has to find its own."""
PARTS = ("train", "validation", "test")
SHARES = {"test": range(0, 16), "validation": range(16, 20)}
"""Percent of the source files that chats hold out."""
LONGEST = 600
"""Characters of a body that a prompt shows; a docstring of half as many again is shown whole."""
REPEATED, SHARED = 8, 13
"""Words in a row by which examples are found to be nearly the same, and held-out ones known."""
SUMMARIZE = "Write the summary line of this docstring."
AS_JSON = (
    'Read this docstring and answer with a JSON object that has the keys "summary", "parameters" and '
    '"raises": its summary line, the names of its parameters and those of the errors it raises.'
)
KEYS = ("summary", "parameters", "raises")
"""Keys of the answers of "docstring-json"."""
_NAMES = re.compile(
    r"matplotlib|pyplot|\bplt\b|\bmpl|networkx|\bnx\b|numpy|\bnp\b|pandas|\bpd\b|scipy|"
    r"scikit-learn|scikit|sklearn|sympy|py ?torch|torch|hugging ?face|transformers",
    re.IGNORECASE,
)
_MARKED = re.compile(r"(?::[\w:]+:)?(`{1,2})(?=\S)([^`\n]+?)(?<=\S)\1(?!`)")


class Topic(NamedTuple):
    """A passage and the package that it describes, as an index into `LIBRARIES`."""

    text: str
    label: int


class Pair(NamedTuple):
    """A summary line and the body of the same docstring; without summary, a body among others."""

    summary: str | None
    body: str


class Tagged(NamedTuple):
    """Words, and for each of them "O", "B-code" (a mark begins) or "I-code" (it goes on)."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


class Excerpt(NamedTuple):
    """The first tokens of a document, and the package that it comes from."""

    tokens: list[int]
    package: str


class Question(NamedTuple):
    """A beginning and four ways to go on, the true one first."""

    context: str
    choices: tuple[str, ...]


class Instruction(NamedTuple):
    """What is asked, what the author wrote, and the package that it comes from."""

    prompt: str
    completion: str
    package: str


@cache
def topics(per_class: int = 20) -> dict[str, tuple[Topic, ...]]:
    """Beginnings of docstrings, without the names that would give their library away.

    Parameters
    ----------
    per_class : int
        Passages of each library to train on.

    Returns
    -------
    dict of str to tuple of Topic
        Thirty passages of each library for validation, at most a hundred for test.

    Examples
    --------
    >>> example = topics()["test"][0]
    >>> LIBRARIES[example.label], len(example.text.split()) <= 20
    ('matplotlib', True)
    """
    corpus = docstrings(progress=False)
    rng = np.random.RandomState(0)  # legacy stream: frozen for good
    sizes = {"train": per_class, "validation": 30, "test": 100}
    parts, read = {}, set()
    for part, size in sizes.items():
        passages = np.array([_passage(document) for document in getattr(corpus, part)])
        packages = np.array(corpus.packages[part])
        whole = np.array([len(text.split()) >= 8 and text not in read for text in passages])
        read.update(passages)  # what a held-out passage must not repeat
        parts[part] = tuple(
            Topic(str(passages[row]), label)
            for label, package in enumerate(LIBRARIES)
            for row in rng.permutation(np.flatnonzero(whole & (packages == package)))[:size]
        )
    return parts


@cache
def summaries(pairs: int = 2000) -> dict[str, tuple[Pair, ...]]:
    """Summary lines, each with the beginning of the body that belongs to it.

    Parameters
    ----------
    pairs : int
        To train on.

    Returns
    -------
    dict of str to tuple of Pair
        The test split holds `BODIES` different bodies; those that come from elsewhere than
        the held-out files have no summary: they stand in the way, and are not asked for.

    Examples
    --------
    >>> test = summaries()["test"]
    >>> len(test), len({pair.body for pair in test})
    (1000, 1000)
    """
    corpus = docstrings(progress=False)
    found = _distinct(corpus, _pair, lambda pair: pair)
    train = _drawn(found["train"], pairs + BODIES)
    others = [Pair(None, body) for _, body in (*found["validation"], *train[pairs:])]
    test = (*found["test"], *others)[:BODIES]
    validation = _drawn(found["validation"], 128)
    return {"train": train[:pairs], "validation": validation, "test": tuple(test)}


@cache
def code_words(passages: int = 1000, held_out: int = 500) -> dict[str, tuple[Tagged, ...]]:
    """Prose whose authors marked some words as code, the marks taken away.

    Parameters
    ----------
    passages : int
        To train on.
    held_out : int
        At most so many for test, and a fifth of that for validation.

    Examples
    --------
    >>> passage = code_words()["test"][0]
    >>> len(passage.words) == len(passage.tags), "B-code" in passage.tags
    (True, True)
    """
    corpus = docstrings(progress=False)
    found = _distinct(corpus, _tagged, lambda tagged: [" ".join(tagged.words)])
    sizes = {"train": passages, "validation": held_out // 5, "test": held_out}
    return {part: _drawn(found[part], size) for part, size in sizes.items()}


def excerpts(
    tokenizer, length: int = 255, shortest: int = 192, per_package: int = 60
) -> dict[str, list[Excerpt]]:
    """Documents of nearly equal length for a language model to be measured on.

    A mean over documents of which one is thirty times another rests on few of them; these weigh
    nearly the same, and no package has more than a quarter of them.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    length : int
        Tokens that are kept of a document.
    shortest : int
        Tokens that a document must have.
    per_package : int
        Most documents of one package.

    Returns
    -------
    dict of str to list of Excerpt
        For the splits "validation" and "test".

    Examples
    --------
    >>> from companion.course.sources import load_tokenizer
    >>> test = excerpts(load_tokenizer("docs-lm"))["test"]
    >>> len(test) >= 200, {192 <= len(excerpt.tokens) <= 255 for excerpt in test}
    (True, {True})
    """
    corpus, found = docstrings(progress=False), {}
    for part in ("validation", "test"):
        found[part], used = [], Counter()
        documents = getattr(corpus, part)
        for tokens, package in zip(
            encode(documents, tokenizer), corpus.packages[part], strict=True
        ):
            if len(tokens) >= shortest and used[package] < per_package:
                used[package] += 1
                found[part].append(Excerpt(tokens[:length], package))
    return found


def reading(tokenizer, tokens: int, draw: int = 0) -> list[list[int]]:
    """Documents to train on, drawn at random until they hold so many tokens.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    tokens : int
    draw : int
        Other numbers give other documents in another order.

    Returns
    -------
    list of list of int

    Examples
    --------
    >>> from companion.course.sources import load_tokenizer
    >>> first, second = (reading(load_tokenizer("docs-lm"), 5000, draw) for draw in (0, 1))
    >>> sum(map(len, first)) >= 5000, first[0] == second[0]
    (True, False)
    """
    train = docstrings(progress=False).train
    order = np.random.default_rng(draw).permutation(len(train))
    documents: list[list[int]] = []
    held = 0
    for start in range(0, len(order), 500):
        for document in encode([train[i] for i in order[start : start + 500]], tokenizer):
            if held >= tokens:
                return documents
            documents.append(document)
            held += len(document)
    return documents


@cache
def continuations(questions: int = 1000) -> dict[str, tuple[Question, ...]]:
    """Beginnings of docstrings, each with its true continuation and three of the same package.

    Parameters
    ----------
    questions : int
        At most so many for each held-out split; the training split has none.

    Examples
    --------
    >>> question = continuations()["test"][0]
    >>> len(question.choices), len(set(question.choices))
    (4, 4)
    """
    corpus = docstrings(progress=False)
    parts = {}
    for part in ("validation", "test"):
        rng = np.random.RandomState(0)
        cut = [_cut(document) for document in getattr(corpus, part)]
        packages = np.array(corpus.packages[part])
        long = np.array([piece is not None for piece in cut])
        made = []
        for row in rng.permutation(np.flatnonzero(long)):
            kind = np.flatnonzero(long & (packages == packages[row]))
            others = {cut[other][1] for other in kind} - {cut[row][1]}
            if len(others) >= CHOICES - 1:
                wrong = rng.permutation(sorted(others))[: CHOICES - 1]
                made.append(Question(cut[row][0], (cut[row][1], *map(str, wrong))))
        parts[part] = tuple(made[:questions])
    return parts


@cache
def instructed_summaries(
    examples: int = 5000, held_out: int = 400
) -> dict[str, tuple[Instruction, ...]]:
    """Docstrings without their summary line, which is asked for.

    Parameters
    ----------
    examples : int
        To train on.
    held_out : int
        At most so many for test, and a quarter of that for validation.

    Returns
    -------
    dict of str to tuple of Instruction
        The prompt shows the beginning of the body, up to the end of a sentence or line. Split by
        package and module; no thirteen words in a row of a held-out prompt and answer stand in
        the training split, no example shares half of its text with those drawn before it, and no
        two have the same answer.

    Examples
    --------
    >>> test = instructed_summaries()["test"]
    >>> len(test) >= 300, test[0].completion.endswith(".")
    (True, True)
    """
    return _instructed(_summary_asked, examples, held_out)


@cache
def instructed_json(
    examples: int = 5000, held_out: int = 400
) -> dict[str, tuple[Instruction, ...]]:
    """Docstrings in NumPy's style, with what they document as JSON.

    Parameters
    ----------
    examples, held_out : int
        As in `instructed_summaries`; there are fewer, about 3,000 to train on.

    Returns
    -------
    dict of str to tuple of Instruction
        The answer has the keys `KEYS`; a parser derived it from the prompt, and so can say
        whether another answer is right. Split as by `instructed_summaries`.

    References
    ----------
    numpydoc, "Style guide": sections Parameters and Raises.

    Examples
    --------
    >>> test = instructed_json()["test"]
    >>> len(test) >= 300, tuple(json.loads(test[0].completion)) == KEYS
    (True, True)
    """
    return _instructed(_json_asked, examples, held_out)


def _passage(document: str) -> str:
    """Twenty words without what names a library; a rule of = signs under a title is no word."""
    words = _NAMES.sub("library", document[:500]).split()
    return " ".join([word for word in words if re.search(r"\w", word)][:20])


def _pair(document: str) -> Iterable[Pair]:
    """The summary line (a whole paragraph of 5 to 30 words), and 20 words of what follows it."""
    paragraphs = re.split(r"\n\s*\n", document.strip(), maxsplit=1)
    if len(paragraphs) == 2:
        summary, body = (text.split() for text in paragraphs)
        if 5 <= len(summary) <= 30 and len(body) >= 20:
            yield Pair(" ".join(summary), " ".join(body[:20]))


def _tagged(document: str) -> Iterable[Tagged]:
    """The paragraphs of prose in which something, but not most, is marked as code."""
    for paragraph in re.split(r"\n\s*\n", document):
        if re.search(r">>>|^\s*[-=~*.|+]|::", paragraph, flags=re.M):
            continue  # examples, headings, lists, tables, directives
        words, tags = _without_marks(" ".join(paragraph.split()))
        words, tags = words[:32], tags[:32]
        marked = sum(tag != "O" for tag in tags)
        if len(words) >= 8 and 0 < marked <= len(words) / 2 and not any("`" in w for w in words):
            yield Tagged(words, tags)


def _without_marks(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Take backticks and roles away, and remember which words stood in them."""
    plain, marks, position = "", [], 0
    for match in _MARKED.finditer(text):
        plain += text[position : match.start()]
        inner = re.sub(r"\s*<[^>]*>$", "", match[2]).lstrip("~!")  # `text <target>`, ~short
        marks.append((len(plain), len(plain) + len(inner)))
        plain, position = plain + inner, match.end()
    plain += text[position:]
    words, tags = [], []
    for match in re.finditer(r"\S+", plain):
        mark = next((m for m in marks if m[0] < match.end() and match.start() < m[1]), None)
        words.append(match[0])
        begins = mark is None or not tags or match.start() <= mark[0]
        tags.append("O" if mark is None else "B-code" if begins else "I-code")
    return tuple(words), tuple(tags)


def _cut(document: str) -> tuple[str, str] | None:
    """24 words, and the 4 that follow; a longer way on would tell less of whether they fit."""
    words = document.split()
    return (" ".join(words[:24]), " ".join(words[24:28])) if len(words) >= 28 else None


def _distinct(
    corpus: Corpus, make: Callable[[str], Iterable[Any]], texts: Callable[[Any], Iterable[str]]
) -> dict[str, tuple]:
    """Make examples of every document; each text occurs once, in the first split that has it."""
    seen: set[str] = set()
    parts = {}
    for part in PARTS:
        kept = []
        for document in getattr(corpus, part):
            for example in make(document):
                if not seen & set(texts(example)):
                    seen.update(texts(example))
                    kept.append(example)
        parts[part] = tuple(kept)
    return parts


def _instructed(
    make: Callable[[str], tuple[str, str] | None], examples: int, held_out: int
) -> dict[str, tuple[Instruction, ...]]:
    """Make a prompt and an answer of every docstring, split by module, nothing twice."""
    corpus = docstrings(progress=False)
    found: dict[str, list[Instruction]] = {part: [] for part in PARTS}
    for part in PARTS:
        for document, package, module in zip(
            getattr(corpus, part), corpus.packages[part], corpus.modules[part], strict=True
        ):
            if (pair := make(document)) is not None:
                found[_part(module)].append(Instruction(*pair, package))
    kept = _apart({part: _drawn(found[part], len(found[part])) for part in ("train", *SHARES)})
    read = np.unique(np.concatenate([ngrams(_told(e), SHARED) for e in kept["train"]]))
    for part in SHARES:
        kept[part] = [e for e in kept[part] if not any_in(ngrams(_told(e), SHARED), read)]
    sizes = {"train": examples, "validation": held_out // 4, "test": held_out}
    return {part: tuple(kept[part][:size]) for part, size in sizes.items()}


def _part(module: str) -> str:
    """The split of a source file; its path begins with its package."""
    place = int(hashlib.sha256(f"chat {module}".encode()).hexdigest(), 16) % 100
    return next((part for part, places in SHARES.items() if place in places), "train")


def _told(example: Instruction) -> str:
    """What an example tells, without what all are asked."""
    _, _, text = example.prompt.partition("\n")
    return f"{example.completion}\n{text}"


def _apart(parts: Mapping[str, Iterable[Instruction]]) -> dict[str, list[Instruction]]:
    """Leave out what shares half of its text with examples before it, or has the same answer."""
    seen: set[int] = set()
    answers: set[str] = set()
    kept: dict[str, list[Instruction]] = {part: [] for part in parts}
    for part, examples in parts.items():
        for example in examples:
            grams = ngrams(_told(example), REPEATED).tolist()
            if example.completion not in answers and 2 * len(seen.intersection(grams)) < len(grams):
                kept[part].append(example)
                seen.update(grams)
                answers.add(example.completion)
    return kept


def _summary_asked(document: str) -> tuple[str, str] | None:
    """The body as a prompt, and the summary line: one sentence of 4 to 25 words."""
    if (parts := _summary_and_body(document)) is None:
        return None
    summary, body = parts
    body = _beginning(body)
    if len(body.split()) < 15 or summary in body:
        return None
    return f"{SUMMARIZE}\n\n{body}", summary


def _json_asked(document: str) -> tuple[str, str] | None:
    """A whole docstring up to its last section that counts, and what it holds as JSON."""
    if (parts := _summary_and_body(document)) is None:
        return None
    pieces = re.split(r"^(\w[\w ]+)\n-{3,}\s*$\n?", parts[1], flags=re.MULTILINE)
    sections = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    shown = [f"{title}\n{'-' * len(title)}\n{sections[title].strip()}"
             for title in ("Parameters", "Returns", "Raises") if title in sections]  # fmt: skip
    prompt = "\n\n".join([AS_JSON, parts[0], *shown])
    parameters, raises = (_names(sections.get(title, "")) for title in ("Parameters", "Raises"))
    if (
        not parameters
        or None in (*parameters, *raises)
        or len(prompt) > len(AS_JSON) + 1.5 * LONGEST
    ):
        return None
    answer = dict(zip(KEYS, (parts[0], parameters, raises), strict=True))
    return prompt, json.dumps(answer, ensure_ascii=False)


def _summary_and_body(document: str) -> tuple[str, str] | None:
    """A docstring whose first paragraph is one sentence of 4 to 25 words, taken apart."""
    first, _, body = document.partition("\n\n")
    summary = " ".join(first.split())
    if not re.fullmatch(r"[A-Z][^:]*[^.:]\.", summary) or re.search(r"[.!?] [A-Z]", summary):
        return None
    return (summary, body.strip("\n")) if 4 <= len(summary.split()) <= 25 else None


def _names(section: str) -> list[str | None]:
    """Names that a section defines, as "x, y : int" does; None for a line that is no name."""
    lines = [line for line in section.splitlines() if line and not line[0].isspace()]
    names = [name.strip() for line in lines for name in re.split(r" ?:", line)[0].split(",")]
    return [name if re.fullmatch(r"\*{0,2}\w[\w.]*", name) else None for name in names]


def _beginning(text: str, most: int = LONGEST) -> str:
    """So much of a text as fits, up to the end of a sentence or a line, and no bare heading."""
    if len(text) > most:
        ends = [end.end() for end in re.finditer(r"[.!?](?=\s)|\n(?![-=~]{3})", text[: most + 1])]
        text = text[: ends[-1] if ends else 0]
    return re.sub(r"\n+[^\n]+\n[-=~]{3,}\s*$", "", text).strip()


def _drawn(examples: Sequence, number: int) -> tuple:
    """A fixed random choice."""
    order = np.random.RandomState(0).permutation(len(examples))[:number]
    return tuple(examples[row] for row in order)
