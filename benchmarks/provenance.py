"""What every results file carries: how its numbers were made, and on what."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path

import torch

from companion.files import write_atomically

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "companion",
    "torch",
    "torchvision",
    "transformers",
    "numpy",
    "scikit-learn",
    "torchao",
    "peft",
)

PLACES = ("--work", "--texts")


def provenance(**settings) -> dict:
    """Return command, settings, versions, machine and date of this run.

    Examples
    --------
    >>> sorted(provenance(seeds=3))
    ['command', 'date', 'machine', 'settings', 'versions']
    """
    said = iter(sys.argv[1:])  # folders of this machine say nothing to others
    words = [word for word in said if word not in PLACES or not next(said, "")]
    words = [word for word in words if word != "--merge"]  # the runs were made without it
    return {
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *words]),
        "settings": settings,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": {
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "vector width": torch.backends.cpu.get_cpu_capability(),
            "quantized engine": torch.backends.quantized.engine,
        },
        "date": datetime.date.today().isoformat(),
    }


def write_results(name: str, records: list[dict], more: dict | None = None, **settings) -> Path:
    """Write ``benchmarks/results/<name>.json`` with provenance, and return its path."""
    path = RESULTS / f"{name}.json"
    content = {"provenance": provenance(**settings), "records": records} | (more or {})
    write_atomically(path, lambda partial: partial.write_text(as_json(content)))
    return path


def as_json(content: dict) -> str:
    """Indented, but lists of numbers on one line: one for each run, not for each example."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def restore(name: str, work: Path, key: str) -> None:
    """Lay the records of a results file into a folder of finished runs, one file each.

    What is there already stays; so a study goes on where the repository has it.

    Parameters
    ----------
    name : str
        Of the results file.
    work : Path
    key : str
        What a record is called by.
    """
    path = RESULTS / f"{name}.json"
    if path.exists():
        for record in json.loads(path.read_text())["records"]:
            if key not in record:
                raise ValueError(f"{path} is not of this study: remove it to begin anew")
            file = work / f"{record[key]}.json"
            if not file.exists():
                text = json.dumps(record)
                write_atomically(file, lambda partial, text=text: partial.write_text(text))
