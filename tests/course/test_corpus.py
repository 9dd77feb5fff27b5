import numpy as np
import pytest

from companion.course import corpus
from companion.course.corpus import docstrings, language_reference, ngrams
from companion.errors import SourceUnavailable
from companion.files import cache_folder

SPLITS = ("train", "validation", "test")


def grams(documents) -> np.ndarray:
    return np.unique(np.concatenate([ngrams(text) for text in documents]))


def test_no_thirteen_words_are_shared_across_splits_or_with_the_pre_training_text(whole, read):
    reference = language_reference()
    parts = [read, grams(whole.validation), grams(whole.test),
             *(grams(getattr(reference, part)) for part in SPLITS)]  # fmt: skip
    assert min(map(len, parts)) > 1000
    for i, first in enumerate(parts):
        for j, second in enumerate(parts[:i]):
            if {i, j} != {1, 2}:  # the two held-out splits of the docstrings are never trained on
                few, many = sorted((first, second), key=len)
                assert not corpus.any_in(few, many), (i, j)


def test_the_whole_corpus_is_what_the_course_says(whole):
    assert len(whole.train) > 30_000
    assert sum(map(len, whole.train)) > 25e6
    assert len(whole.test) > 1000
    squeezed = [" ".join(text.split()) for part in SPLITS for text in getattr(whole, part)]
    assert len(set(squeezed)) == len(squeezed)
    assert min(map(len, whole.train)) >= 80


def test_language_reference_holds_out_many_topics_and_no_duplicate():
    reference = language_reference()
    sizes = {part: sum(map(len, getattr(reference, part))) for part in SPLITS}
    assert 0.5 < sizes["train"] / sum(sizes.values()) < 0.75
    assert min(len(reference.validation), len(reference.test)) >= 15
    assert language_reference().sha256 == reference.sha256


def test_ngrams_ignore_case_and_punctuation_and_nothing_else():
    text = "one two three four five"
    assert np.array_equal(ngrams(text, 3), ngrams("One, two; THREE (four) five!", 3))
    assert len(np.unique(ngrams("a b c a b c", 3))) == 3
    assert not np.isin(ngrams("three two one", 3), ngrams(text, 3)).any()
    assert len(ngrams("too short", 3)) == 0


def test_cache_is_used_and_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    first = docstrings(["networkx"], progress=False)
    (file,) = cache_folder().iterdir()
    monkeypatch.setattr(corpus, "_split", None)  # would fail if it were read anew
    assert docstrings(["networkx"], progress=False) == first
    assert file.name.startswith("docstrings-")


def test_held_out_files_are_whole_files():
    """A file's docstrings all go to one split."""
    found = docstrings(["networkx"], progress=False)
    where = {text: part for part in SPLITS for text in getattr(found, part)}
    for _, file in corpus._files("networkx"):
        texts = [text for text in corpus._docstrings(file) if text in where]
        unique = {where[text] for text in texts if texts.count(text) == 1}
        assert len(unique) <= 1 or "train" in unique  # a text may occur in an earlier file


def test_a_missing_package_is_named_with_its_remedy():
    with pytest.raises(SourceUnavailable, match="pip install no_such_package"):
        docstrings(["no_such_package"])
