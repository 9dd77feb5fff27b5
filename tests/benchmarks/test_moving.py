"""What the figures that move read is what the results, the model and the chapter say."""

import json

import pytest

from benchmarks.moving import FIGURES, MAKERS, as_json, road


@pytest.mark.parametrize("name", MAKERS)
def test_the_committed_file_is_what_the_command_writes(name):
    assert (FIGURES / f"{name}.json").read_text() == as_json(MAKERS[name]())


def test_every_row_of_the_chapters_table_is_there():
    rows = road()["rows"]
    assert [row["number"] for row in rows] == ["1", "2", "3", "4", "5", "6", "7", ""]
    assert all(row["case"] and row["approach"] and row["why"] and row["chapters"] for row in rows)
    assert "[](" not in json.dumps(rows)


def test_files_are_small():
    assert sum(path.stat().st_size for path in FIGURES.iterdir()) < 200_000
