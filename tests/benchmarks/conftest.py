"""What several benchmarks are checked on, made once."""

import pytest

from companion import load_task
from companion.data.task import Task


@pytest.fixture(scope="session")
def language() -> Task:
    """Python's language reference, in the batches of the recovery study."""
    return load_task("language-reference", batch_size=4)
