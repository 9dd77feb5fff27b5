"""What the page of promises names is there, and is run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "book" / "promises.md").read_text()
FILES = sorted(set(re.findall(r"`(tests/[\w/]+\.py)`", TEXT)))
COMMANDS = sorted(set(re.findall(r"`make ([\w-]+)`", TEXT)))


def test_every_promise_names_what_would_fail():
    rows = re.findall(r"^: (.*)$", TEXT, re.MULTILINE)
    assert len(rows) > 15
    assert not [row for row in rows if not re.search(r"`(tests/|make |python -m )", row)]


@pytest.mark.parametrize("path", FILES)
def test_the_checks_exist(path):
    assert re.search(r"^def (test_|_no_network)", (ROOT / path).read_text(), re.MULTILINE)


@pytest.mark.parametrize("target", COMMANDS)
def test_the_commands_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
