"""The command that runs notebooks under other settings: it runs all, and it can fail."""

import json
import os

import nbformat
import pytest

from tests import matrix


def test_in_so_many_days_every_pair_has_its_turn():
    found = matrix.pairs(["a", "b", "c"], [*matrix.THREADS], [*matrix.CAPABILITIES])
    days = [matrix.share_of(found, 6, 739_000 + day) for day in range(6)]
    assert sorted(pair for day in days for pair in day) == sorted(found)
    assert {len(day) for day in days} == {4, 5}


def test_a_run_is_told_its_setting_and_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    told = matrix.environment(4, "widest")
    assert (told["OMP_NUM_THREADS"], told.get("ATEN_CPU_CAPABILITY")) == ("4", None)
    assert matrix.environment(1, "default")["ATEN_CPU_CAPABILITY"] == "default"


@pytest.fixture
def book(tmp_path, monkeypatch):
    """Two chapters of one cell each, which says with how many threads it runs; one expects another."""
    (tmp_path / "book").mkdir()
    for name, stored in (("ch01_right", "1"), ("ch02_wrong", "7")):
        output = nbformat.v4.new_output("stream", name="stdout", text=f"{stored}\n")
        cell = nbformat.v4.new_code_cell(
            "import os\nprint(os.environ['OMP_NUM_THREADS'])", outputs=[output], execution_count=1
        )
        notebook = nbformat.v4.new_notebook(cells=[cell])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, tmp_path / "book" / f"{name}.ipynb")
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "REPORT", tmp_path / "matrix.json")
    return tmp_path


def test_a_notebook_that_says_something_else_fails_and_what_passed_is_not_run_again(book, capsys):
    asked = ["--threads", "1", "--capability", "default"]
    assert matrix.main(asked) == 1
    records = json.loads((book / "matrix.json").read_text())["records"]
    assert {r["chapter"]: r["passed"] for r in records} == {"ch01_right": True, "ch02_wrong": False}
    assert all(r["capability"] == "default" for r in records)
    assert os.environ.get("ATEN_CPU_CAPABILITY") is None
    capsys.readouterr()
    assert matrix.main([*asked, "ch01"]) == 0
    assert "0 of 0 pairs passed" in capsys.readouterr().out


def test_an_unknown_chapter_is_refused(capsys):
    with pytest.raises(SystemExit):
        matrix.main(["ch99"])
    assert "no such chapter" in capsys.readouterr().err
