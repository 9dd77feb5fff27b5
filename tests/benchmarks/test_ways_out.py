"""The ways out: what chapter 15 says of them is in the file, and a piece of it is measured anew."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.provenance import RESULTS
from benchmarks.ways_out import KINDS, MODELS, SCHEMES, margin, measure, rounded
from companion.formats.registry import FORMATS
from companion.study.tables import scheme_name

CONTENT = json.loads((RESULTS / "ways_out.json").read_text())
RECORDS = {(r["model"], r["scheme"], r["format"]): r for r in CONTENT["records"]}
CHAPTER = (Path(__file__).parents[2] / "book" / "ch15_deployment.py").read_text()


def test_every_format_was_measured():
    """The benchmark goes on where the file ends: it may lack models or schemes, but no format."""
    every = {
        (name, scheme_name(scheme), form)
        for name in MODELS
        for scheme in SCHEMES
        for form in FORMATS
    }
    assert RECORDS.keys() <= every
    assert {
        key for key in every if key[:2] == ("docs-lm", scheme_name(SCHEMES[0]))
    } <= RECORDS.keys()
    assert KINDS.keys() == FORMATS.keys()


@pytest.mark.parametrize("key", RECORDS, ids=str)
def test_integers_and_scales_are_equal_and_the_margin_is_kept(key):
    record = RECORDS[key]
    assert record["integers"]
    assert record["scales"]
    assert record["margin"] == margin(key[0], key[2])
    away = record["logits"] if KINDS[key[2]] == "logits" else record["nats, inputs rounded"]
    assert record["within"] == (away <= record["margin"])
    assert record["within"]
    assert record["layers"] == {"docs-lm": 29, "smollm2": 211}[key[0]] + (key[2] == "executorch")


def test_the_chapter_shows_this_file():
    shown = CHAPTER.split("ways_out.json")[1].split("print(shown")[0]
    assert set(re.findall(r'r\["([\w, ]+)"\]', shown)) <= set(CONTENT["records"][0])


@pytest.mark.parametrize("form", ["companion", "onnx"])
def test_a_piece_is_measured_anew(form):
    """Bytes to a thousandth: a file says with which version it was written."""
    then = RECORDS["docs-lm", scheme_name(SCHEMES[0]), form]
    now = measure("docs-lm", rounded("docs-lm", SCHEMES[0]), form)
    assert now["integers"]
    assert now["scales"]
    assert now["within"]
    assert now["layers"] == then["layers"]
    assert now["bytes"] == pytest.approx(then["bytes"], rel=1e-3)
