"""The appendix that translates names to torchao and torch.ao names only what exists."""

import importlib
import re
from functools import reduce
from importlib.metadata import version

import pytest

import companion
from companion.course.sources import quiet_transformers
from tests.book.notebooks import BOOK

PAGE = BOOK / "torchao_mapping.md"
HEAD = ["companion", "torchao", "torch.ao", "differences"]
NOT_QUANTIZATION = {"Estimate", "accuracy", "fit", "load_pretrained", "load_task"}


def rows(text: str) -> list[dict[str, str]]:
    """Return the rows of every table on the page, by the heads of their columns."""
    found, head = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else None
        if cells is None:
            head = None
        elif head is None:
            head = cells
        elif not set("".join(cells)) <= set("-: "):
            found.append(dict(zip(head, cells, strict=True)))
    return found


def names(cell: str) -> list[str]:
    """Return the full names of Python objects that a cell of the table quotes."""
    return re.findall(r"`((?:companion|torchao|torch)\.[\w.]+)`", cell)


def find(name: str):
    """Import whatever a dotted name stands for; attributes go before submodules."""

    def step(path_and_thing: tuple, part: str) -> tuple:
        path, thing = path_and_thing
        path = f"{path}.{part}"
        if part in getattr(thing, "__dataclass_fields__", {}):  # without a default, no attribute
            return path, thing.__dataclass_fields__[part]
        return path, getattr(thing, part) if hasattr(thing, part) else importlib.import_module(path)

    first, *rest = name.split(".")
    return reduce(step, rest, (first, importlib.import_module(first)))[1]


TABLE = rows(PAGE.read_text())
NAMES = sorted({name for row in TABLE for cell in row.values() for name in names(cell)})


@pytest.fixture(scope="module", autouse=True)
def _quietly():
    with quiet_transformers():
        yield


@pytest.mark.parametrize("name", NAMES)
def test_name_exists(name):
    find(name)


def test_a_name_that_is_gone_is_noticed():
    with pytest.raises(ImportError):
        find("torchao.quantization.this_was_removed")
    with pytest.raises(ImportError):
        find("torch.ao.quantization.QuantWrapper.this_was_removed")


def test_every_row_has_all_columns_and_a_name_or_a_dash_in_each():
    assert len(TABLE) > 30
    for row in TABLE:
        assert list(row) == HEAD
        assert names(row["companion"]) or row["companion"].startswith("{term}`"), row
        assert all(name.startswith("companion.") for name in names(row["companion"])), row
        for column in ("torchao", "torch.ao"):
            assert names(row[column]) or row[column] == "—", row
            assert not any(name.startswith("companion.") for name in names(row[column])), row
        assert row["differences"].endswith("."), row


def test_every_public_name_that_quantizes_has_a_row():
    mapped = {name.split(".")[1] for row in TABLE for name in names(row["companion"])}
    assert set(companion.__all__) - NOT_QUANTIZATION <= mapped


def test_page_says_when_and_with_what_it_was_checked():
    text = PAGE.read_text()
    assert re.search(r"Last checked on \d{4}-\d\d-\d\d", text)
    for package in ("torch", "torchao"):
        assert f"{package} {version(package).split('+')[0]}" in text
