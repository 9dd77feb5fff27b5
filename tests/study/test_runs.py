"""The log of a comparison."""

import pytest

from companion.errors import CheckpointError
from companion.study.runs import Log


def test_log_runs_once_and_survives_without_a_file(tmp_path):
    calls = []
    for log in (Log(), Log(tmp_path / "log.json")):
        assert [log.get("a", lambda: calls.append(1) or 5) for _ in range(2)] == [5, 5]
    assert len(calls) == 2
    assert Log(tmp_path / "log.json").results == {"a": 5}


@pytest.mark.parametrize("text", ["{", "[1, 2]", '"text"'])
def test_what_is_no_log_is_named(tmp_path, text):
    path = tmp_path / "log.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="is no log of a comparison"):
        Log(path)
    assert path.read_text() == text
