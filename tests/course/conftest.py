"""The whole text of the course, read once."""

import numpy as np
import pytest

from companion.course.corpus import Corpus, docstrings, ngrams


@pytest.fixture(scope="session")
def whole() -> Corpus:
    return docstrings(progress=False)


@pytest.fixture(scope="session")
def read(whole) -> np.ndarray:
    """Every sequence of 13 words that docs-lm was trained on, sorted."""
    return np.unique(np.concatenate([ngrams(text) for text in whole.train]))
