"""The log of a comparison."""

from companion.study.runs import Log


def test_log_runs_once_and_survives_without_a_file(tmp_path):
    calls = []
    for log in (Log(), Log(tmp_path / "log.json")):
        assert [log.get("a", lambda: calls.append(1) or 5) for _ in range(2)] == [5, 5]
    assert len(calls) == 2
    assert Log(tmp_path / "log.json").results == {"a": 5}
