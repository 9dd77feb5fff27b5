"""Notebooks are executed, paired, mostly compared, and clean of what differs between machines."""

import re
import tempfile
from pathlib import Path

import nbformat
import pytest
import yaml

from companion.course.check import EXERCISES
from tests.book.notebooks import BOOK, from_source, sources

PAIRS = sources()
UNCOMPARED = {"nbval-ignore-output", "nbval-skip"}
FORBIDDEN = {
    "a path of a machine": "|".join(
        [
            *map(re.escape, (str(Path.home()), str(BOOK.parent), tempfile.gettempdir())),
            "/home/",
            "/Users/",
        ]
    ),
    "an address": r"0x[0-9a-f]{6,}",
    "a timing": r"\b\d+(\.\d+)? ?(ms|µs|seconds)\b",
    "a warning": r"Warning",
}


def load(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def text(cell) -> str:
    """Everything a cell printed or returned, as text."""
    parts = []
    for output in cell.outputs:
        parts.append(output.get("text", ""))
        parts += [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "".join(parts)


@pytest.fixture(params=PAIRS, ids=lambda p: p.stem)
def source(request):
    return request.param


def test_every_notebook_is_paired_and_in_the_table_of_contents():
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text())
    listed = {c["file"] for part in toc["parts"] for c in part["chapters"]} | {toc["root"]}
    assert {p.stem for p in BOOK.glob("*.ipynb")} == {p.stem for p in PAIRS}
    assert {p.stem for p in PAIRS} <= listed
    assert all((BOOK / f"{n}.md").exists() or (BOOK / f"{n}.ipynb").exists() for n in listed)


def test_notebook_is_what_its_source_says(source):
    stored, fresh = load(source), from_source(source)
    assert len(stored.cells) == len(fresh.cells)
    for ours, theirs in zip(stored.cells, fresh.cells, strict=True):
        assert ours.cell_type == theirs.cell_type
        assert ours.source == theirs.source
        assert ours.metadata == theirs.metadata


def test_every_cell_was_executed_in_order_without_error(source):
    cells = code_cells(load(source))
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]


def test_most_cells_are_compared_and_none_is_skipped(source):
    cells = code_cells(load(source))
    compared = [c for c in cells if not tags(c) & UNCOMPARED]
    assert len(compared) >= 0.7 * len(cells)
    for cell in cells:
        assert "nbval-skip" not in tags(cell)
        assert "NBVAL_" not in cell.source


def test_uncompared_cells_are_followed_by_a_compared_verdict(source):
    cells = code_cells(load(source))
    for position, cell in enumerate(cells):
        if tags(cell) & UNCOMPARED and (cell.outputs or "print(" in cell.source):
            after = cells[position + 1 :]
            verdict = next((c for c in after if not tags(c) & UNCOMPARED), None)
            assert verdict is not None, cell.source
            assert re.search(r"\b(True|correct|not yet)\b|✓", text(verdict)), cell.source
            assert not re.search("False|✗", text(verdict)), verdict.source


def test_outputs_hold_nothing_of_this_machine(source):
    for cell in code_cells(load(source)):
        for output in cell.outputs:
            assert output.get("name") != "stderr", cell.source
            assert not {"image/svg+xml"} & set(output.get("data", {}))
            assert not any("widget" in kind for kind in output.get("data", {}))
        for what, pattern in FORBIDDEN.items():
            assert not re.search(pattern, text(cell)), f"{what} in the output of: {cell.source}"


def test_figures_have_alt_text_and_every_chapter_has_one(source):
    cells = [c for c in code_cells(load(source))
             if any("image/png" in o.get("data", {}) for o in c.outputs)]  # fmt: skip
    assert cells
    for cell in cells:
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        assert len(alt) > 30, cell.source


def test_chapter_has_its_frame(source):
    prose = "\n".join(c.source for c in load(source).cells if c.cell_type == "markdown")
    for part in ("{epigraph}", "What you will learn", "Running time", "## What we saw",
                 "## References", f"({source.stem[:4]})="):  # fmt: skip
        assert part in prose, part


def test_exercises_check_themselves_and_hide_their_solutions(source):
    notebook = load(source)
    prose = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    labels = re.findall(r"```\{exercise\}.*?:label: ([\w-]+)", prose, flags=re.S)
    solved = re.findall(r"```\{solution\} ([\w-]+)\n:class: dropdown", prose)
    assert len(labels) >= 2
    assert labels == solved
    for label in labels:
        if label.endswith("-experiment"):  # its end is open, and nothing can check it
            continue
        assert label in EXERCISES
        cells = [c for c in code_cells(notebook) if f'check("{label}"' in c.source]
        assert [("hide-cell" in tags(c)) for c in cells] == [False, True]
        assert f"{label}: not yet." in text(cells[0])
        assert text(cells[1]).strip().endswith(f"{label}: correct")


def test_exercises_all_have_a_place_in_the_book():
    used = {n for p in PAIRS for n in re.findall(r'check\("([\w-]+)"', p.read_text())}
    assert used == set(EXERCISES) - {"ch04-levels"}  # the example of check's own documentation


def test_pages_do_not_repeat_each_other():
    """No run of fifteen words of prose stands on two pages."""
    seen: dict[tuple, str] = {}
    for page in [*BOOK.glob("*.md"), *PAIRS]:
        prose = page.read_text()
        if page.suffix == ".py":
            cells = from_source(page).cells
            prose = "\n".join(c.source for c in cells if c.cell_type == "markdown")
        prose = re.sub(r"```.*?```", "", prose, flags=re.S)
        words = re.findall(r"[a-z']+", prose.lower())
        for start in range(len(words) - 14):
            run = tuple(words[start : start + 15])
            assert seen.setdefault(run, page.name) == page.name, f"{page.name}: {' '.join(run)}"


SHOWN = 76  # columns that stand beside the table of contents


def test_code_fits_beside_the_contents(source):
    for cell in code_cells(load(source)):
        wide = [line for line in cell.source.splitlines() if len(line) > SHOWN]
        assert not wide, wide


def test_set_up_and_figures_are_collapsed(source):
    """What imports, and what only draws, is there for who asks; the idea stands in the open."""
    cells = code_cells(load(source))
    assert "hide-input" in tags(cells[0])
    for cell in cells:
        draws = any("image/png" in output.get("data", {}) for output in cell.outputs)
        if draws and "print(" not in cell.source:
            assert tags(cell) & {"hide-input", "hide-cell"}, cell.source
