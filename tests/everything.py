"""Every check, one after the other, all of them whatever fails, with a sum at the end.

python -m tests.everything            all
python -m tests.everything unit book  those named

One process for each core, each with one thread: models this small gain little from a second thread.
Where OMP_NUM_THREADS is set, that many threads in one process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def parts() -> dict[str, list[str]]:
    """Name each check, with the command that runs it."""
    python = [sys.executable, "-m"]
    threads = os.environ.get("OMP_NUM_THREADS")
    several = [] if threads else ["-n", str(os.cpu_count()), "--dist", "loadfile"]
    return {
        "lint": [str(BIN / "ruff"), "check", "."],
        "format": [str(BIN / "ruff"), "format", "--check", "."],
        "unit": [*python, "pytest", *several, "--ignore", "tests/site"],
        "notebooks": [*python, "pytest", "--nbval", "book", "--nbval-cell-timeout=300", *several],
        "book": [str(BIN / "jupyter-book"), "build", "book/", "-W", "-n", "--keep-going", "-q"],
        "site": [*python, "pytest", "tests/site"],
    }


def main(names: list[str]) -> int:
    """Run the checks named, or all; return how many failed."""
    known = parts()
    unknown = set(names) - set(known)
    if unknown:
        print(f"{', '.join(sorted(unknown))} is no check: choose from {', '.join(known)}")
        return 2
    environment = os.environ.copy()
    environment.setdefault("OMP_NUM_THREADS", "1")
    results = []
    for name in names or known:
        print(f"\n== {name}: {' '.join(known[name])}", flush=True)
        start = time.perf_counter()
        code = subprocess.run(known[name], cwd=ROOT, env=environment).returncode
        results.append((name, code, time.perf_counter() - start))
    print()
    for name, code, seconds in results:
        print(f"{'passed' if code == 0 else 'FAILED'}  {name:9} {seconds / 60:5.1f} minutes")
    failed = sum(code != 0 for _, code, _ in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
