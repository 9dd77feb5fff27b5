"""What a task is worth without a network: the strongest simple answer to each of them.

Each reads the same examples as the task of the same name. Built in chapter 12.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache

import numpy as np

from companion.course.corpus import docstrings, language_reference
from companion.course.passages import code_words, continuations, summaries, topics
from companion.course.sources import load_tokenizer
from companion.data.text import CHOICES, Trigram, encode
from companion.errors import extra
from companion.evaluation.estimates import Scores
from companion.evaluation.metrics import first_is_best, hits, span_f1


@cache
def _docstring_tokens() -> list[np.ndarray]:
    """What docs-lm has read, two bytes a token."""
    rows = encode(docstrings(progress=False).train, load_tokenizer("docs-lm"))
    return [np.array(row, np.uint16) for row in rows]


def trigram_loss() -> Scores:
    """Kneser-Ney trigram of the training split of the language reference, and of all docstrings."""
    tokenizer, reference = load_tokenizer("docs-lm"), language_reference()
    read = [*_docstring_tokens(), *encode(reference.train, tokenizer)]
    model = Trigram.train(read, len(tokenizer), tokenizer.bos_token_id)
    test = encode(reference.test, tokenizer)
    return Scores(model.losses(test, tokenizer.bos_token_id), np.array([len(t) for t in test]))


def trigram_choice() -> Scores:
    """The same trigram's choice among four continuations."""
    tokenizer = load_tokenizer("docs-lm")
    model = Trigram.train(_docstring_tokens(), len(tokenizer), tokenizer.bos_token_id)
    questions = continuations()["test"]
    before = encode([question.context for question in questions], tokenizer)
    after = encode([f" {choice}" for q in questions for choice in q.choices], tokenizer)
    start = tokenizer.bos_token_id
    whole = model.losses([before[i // CHOICES] + tokens for i, tokens in enumerate(after)], start)
    alone = np.repeat(model.losses(before, start), CHOICES)
    losses = (whole - alone) / [len(tokens) for tokens in after]
    return hits(first_is_best(losses))


def tfidf() -> Scores:
    """TF-IDF of words and pairs of words, with logistic regression, on the same labels.

    The strength of the regularisation is chosen on validation.
    """
    with extra("course"):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

    parts = {part: tuple(zip(*examples, strict=True)) for part, examples in topics().items()}
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    train = vectorizer.fit_transform(parts["train"][0])
    held_out = {part: vectorizer.transform(parts[part][0]) for part in ("validation", "test")}
    models = [
        LogisticRegression(C=strength, max_iter=1000).fit(train, parts["train"][1])
        for strength in (1, 10, 100, 1000)
    ]
    best = max(models, key=lambda m: m.score(held_out["validation"], parts["validation"][1]))
    return hits(best.predict(held_out["test"]) == parts["test"][1])


def bm25() -> Scores:
    """BM25 of the summary line's words (Robertson and Zaragoza, 2009)."""
    with extra("course"):
        import bm25s

    pairs = summaries()["test"]
    tokens = bm25s.tokenize([pair.body for pair in pairs], show_progress=False)
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    asked = [row for row, pair in enumerate(pairs) if pair.summary is not None]
    queries = bm25s.tokenize([pairs[row].summary for row in asked], show_progress=False)
    found, _ = index.retrieve(queries, k=1, show_progress=False)
    return hits(found[:, 0] == asked)


def usual_tag() -> Scores:
    """The usual tag of a word in training; a rule of characters for words that were not seen."""
    parts = code_words()
    counts: dict[str, Counter] = {}
    for words, tags in parts["train"]:
        for word, tag in zip(words, tags, strict=True):
            counts.setdefault(_bare(word), Counter())[tag] += 1

    def tag(word: str) -> str:
        if _bare(word) in counts:
            return counts[_bare(word)].most_common(1)[0][0]
        return "B-code" if looks_like_code(word) else "O"

    test = parts["test"]
    return span_f1([[tag(word) for word in words] for words, _ in test], [tags for _, tags in test])


def looks_like_code(word: str) -> bool:
    """Whether a word holds an underscore, brackets, a dot or a capital inside.

    Examples
    --------
    >>> [looks_like_code(word) for word in ("max_iter", "fit(),", "np.ndarray.", "DataFrame", "The")]
    [True, True, True, True, False]
    """
    return bool(re.search(r"_|\w\(|\w\.\w|[a-z][A-Z]|=", _bare(word) + word[-2:]))


def _bare(word: str) -> str:
    return word.strip(".,;:!?\"'")


BASELINES: dict[str, tuple[str, Callable[[], Scores]]] = {
    "language-reference": ("Kneser-Ney trigram", trigram_loss),
    "cloze": ("Kneser-Ney trigram", trigram_choice),
    "topics": ("TF-IDF and logistic regression", tfidf),
    "summaries": ("BM25", bm25),
    "code-words": ("usual tag, or a rule of characters", usual_tag),
}
"""By the name of the task: what it is called, and the function that scores its test split."""
