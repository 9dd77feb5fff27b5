"""Execute the notebooks from their .py pairs and store the outputs that readers see.

python -m tests.book.notebooks              all of them
python -m tests.book.notebooks ch04 ch05    those whose name begins so
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

BOOK = Path(__file__).parents[2] / "book"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def sources(prefixes: tuple[str, ...] = ("",)) -> list[Path]:
    """Return the .py halves of the notebooks, in reading order."""
    return [path for path in sorted(BOOK.glob("*.py")) if path.name.startswith(prefixes)]


def from_source(path: Path) -> nbformat.NotebookNode:
    """Read a py:percent file as a notebook without outputs and with stable cell ids."""
    notebook = jupytext.read(path)
    notebook.metadata = nbformat.NotebookNode(
        kernelspec=KERNEL, language_info={"name": "python"},
        jupytext={"formats": "ipynb,py:percent"},
    )  # fmt: skip
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{path.stem}-{number}"
    return notebook


def execute(path: Path) -> float:
    """Execute one notebook, store it beside its source, and return the seconds it took."""
    notebook = from_source(path)
    start = time.perf_counter()
    NotebookClient(notebook, timeout=600, record_timing=False, store_widget_state=False,
                   resources={"metadata": {"path": str(BOOK)}}).execute()  # fmt: skip
    seconds = time.perf_counter() - start
    notebook.metadata.language_info = {"name": "python"}  # the patch version is no content
    nbformat.write(notebook, path.with_suffix(".ipynb"))
    return seconds


def execute_all(paths: list[Path]) -> None:
    """Execute notebooks side by side: one process for each core, each with one thread."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # a bar is no result
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start, failed = time.perf_counter(), []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        runs = {pool.submit(execute, path): path.stem for path in paths}
        for run in as_completed(runs):
            if error := run.exception():
                failed.append(runs[run])
                print(f"{runs[run]}: FAILED\n{error}", flush=True)
            else:
                print(f"{runs[run]}: {run.result():.0f} s", flush=True)
    print(f"all: {time.perf_counter() - start:.0f} s")
    if failed:
        sys.exit(f"not stored: {', '.join(sorted(failed))}")


if __name__ == "__main__":
    execute_all(sources(tuple(sys.argv[1:]) or ("",)))
