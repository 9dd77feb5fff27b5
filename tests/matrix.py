"""The notebooks under other settings of a machine: threads, and the widest instructions allowed.

python -m tests.matrix                         every chapter under every setting (hours; it goes on
                                               where it stopped)
python -m tests.matrix ch09 ch10               these chapters
python -m tests.matrix --share 6               a sixth of all pairs, another one every day
python -m tests.matrix --threads 2 --capability avx2

What was run is kept in benchmarks/results/matrix.json: a pair that passed with the same notebook and
package is not run again, unless --again is given.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.provenance import RESULTS, as_json, provenance
from companion.files import write_atomically

ROOT = Path(__file__).parents[1]
REPORT = RESULTS / "matrix.json"
THREADS = (1, 2, 4)
CAPABILITIES = {  # how torch, oneDNN and MKL are told; the machine's own need no telling
    "default": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "widest": None,
}
NAMES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
Pair = tuple[str, int, str]  # chapter, threads, capability


def pairs(chapters: list[str], threads: list[int], capabilities: list[str]) -> list[Pair]:
    """Every chapter under every setting, in an order in which each share has some of all."""
    return list(itertools.product(chapters, threads, capabilities))


def share_of(found: list[Pair], parts: int, day: int) -> list[Pair]:
    """One of so many parts; in as many days each pair has its turn."""
    return [pair for index, pair in enumerate(found) if (index + day) % parts == 0]


def environment(threads: int, capability: str) -> dict[str, str]:
    """What a run is told."""
    told = dict(zip(NAMES, CAPABILITIES[capability] or (), strict=False))
    kept = {key: value for key, value in os.environ.items() if key not in NAMES}
    return kept | told | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def state(chapter: str) -> str:
    """A hash of what a chapter's outputs depend on: its notebook, the package, the results files."""
    files = [ROOT / "book" / f"{chapter}.ipynb", *sorted((ROOT / "companion").rglob("*.py"))]
    files += sorted(path for path in RESULTS.glob("*.json") if path != REPORT)
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run(pair: Pair) -> dict:
    """Execute a chapter and compare its outputs with those that are stored."""
    chapter, threads, capability = pair
    command = [sys.executable, "-m", "pytest", "-q", "--nbval", f"book/{chapter}.ipynb",
               "--nbval-cell-timeout=900"]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=environment(threads, capability), capture_output=True, text=True
    )
    report = {"chapter": chapter, "threads": threads, "capability": capability,
              "passed": done.returncode == 0, "seconds": round(time.perf_counter() - started, 1),
              "state": state(chapter), "cpu": torch.backends.cpu.get_cpu_capability()}  # fmt: skip
    if done.returncode:
        told = done.stdout[-6000:] + done.stderr[-1000:]
        tqdm.write(f"\n{chapter} with {threads} threads, {capability}:\n{told}")
        report["failed"] = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return report


def known() -> list[dict]:
    return json.loads(REPORT.read_text())["records"] if REPORT.exists() else []


def keep(report: dict, runs: list[dict]) -> list[dict]:
    """The runs with this one among them, on disk, too."""
    key = ("chapter", "threads", "capability")
    runs = [run for run in runs if any(run[k] != report[k] for k in key)] + [report]
    runs.sort(key=lambda run: [str(run[k]) for k in key])
    made = provenance() | {"command": "python -m tests.matrix"}
    text = as_json({"provenance": made, "records": runs})
    write_atomically(REPORT, lambda part: part.write_text(text))
    return runs


def main(arguments: list[str] | None = None) -> int:
    """Run the pairs asked for; return 1 if one fails."""
    every = sorted(path.stem for path in (ROOT / "book").glob("ch*.ipynb"))
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix", description=__doc__.split("\n")[0]
    )
    parser.add_argument("chapters", nargs="*", metavar="chNN", help="default: all")
    parser.add_argument("--threads", type=int, action="append", choices=THREADS)
    parser.add_argument("--capability", action="append", choices=CAPABILITIES)
    parser.add_argument("--share", type=int, default=1, help="run one pair in so many, by the day")
    parser.add_argument("--again", action="store_true", help="also what has passed before")
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True,
                        help="write the report (default) or not")  # fmt: skip
    args = parser.parse_args(arguments)
    chapters = [name for name in every
                if not args.chapters or name.split("_")[0] in args.chapters
                or name in args.chapters]  # fmt: skip
    if not chapters:
        parser.error(f"no such chapter: choose from {', '.join(every)}")
    wanted = pairs(chapters, args.threads or [*THREADS], args.capability or [*CAPABILITIES])
    wanted = share_of(wanted, args.share, datetime.date.today().toordinal())
    runs = known()
    passed = {(run["chapter"], run["threads"], run["capability"], run["state"])
              for run in runs if run["passed"]}  # fmt: skip
    if not args.again:
        wanted = [pair for pair in wanted if (*pair, state(pair[0])) not in passed]
    failed = 0
    with tqdm(total=len(wanted), desc="notebooks") as bar:
        for threads, group in itertools.groupby(sorted(wanted, key=lambda p: p[1]), lambda p: p[1]):
            beside = max(1, (os.cpu_count() or 1) // threads)
            with ThreadPoolExecutor(beside) as pool:
                for report in pool.map(run, group):
                    bar.update()
                    failed += not report["passed"]
                    runs = keep(report, runs) if args.keep else runs
    print(f"{len(wanted) - failed} of {len(wanted)} pairs passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
