"""Kill -9 at random moments: no half-written file is taken for a whole one, and nothing is lost.

    nice -n 5 python -m benchmarks.killed             (all; some minutes; resumable)

Each trial runs a job in a process of its own and kills it after a random share of the time that the
uninterrupted job took. Then the folder is read: what a reader accepts must be the previous file or the
complete new one, everything else must be refused in one line. Then the job runs again to its end, and what
it gives must be bit for bit what the uninterrupted one gave. Moments are drawn from a seed; where in the
job a moment falls depends on the machine's load. Writes benchmarks/results/killed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import fuzz
from benchmarks.provenance import write_results
from companion import W2, fit, fit_blocks, prepare_qat
from companion import save_quantized as save

SEED = 22


@dataclass(frozen=True)
class Job:
    """What is killed.

    Parameters
    ----------
    run : callable
        Works in a folder, goes on where it was, and returns what it made.
    read : callable
        What a reader finds in the folder; raises where nothing whole is there.
    before : callable, optional
        Fills the folder with an earlier result.
    trials : int
    """

    run: Callable[[Path], object]
    read: Callable[[Path], object]
    before: Callable[[Path], object] | None = None
    trials: int = 8


def toy() -> tuple[nn.Module, list]:
    """Return a small model and its batches."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3)))
    return model, [(torch.randn(16, 64), torch.arange(16) % 64) for _ in range(3)]


def run_fit(folder: Path) -> object:
    model, batches = toy()
    qat = prepare_qat(model, W2)
    history = fit(qat, batches, steps=120, checkpoint_dir=folder, checkpoint_every=5, resume=True,
                  validate=lambda m: float(m(batches[0][0]).square().mean()), validate_every=20,
                  progress=False)  # fmt: skip
    return [qat.state_dict(), history.loss, history.validation]


def run_blocks(folder: Path) -> object:
    model, batches = toy()
    qat = prepare_qat(model, W2)
    found = fit_blocks(qat, batches, teacher=model, steps=40, checkpoint_dir=folder, resume=True,
                       progress=False)  # fmt: skip
    return [qat.state_dict(), {name: history.loss for name, history in found.items()}]


def run_pretrain(folder: Path) -> object:
    from companion.course.corpus import Corpus
    from companion.course.pretrain import pretrain

    words = [
        "the",
        "road",
        "of",
        "yellow",
        "bricks",
        "leads",
        "to",
        "a",
        "green",
        "city",
        "that",
        "nobody",
        "has",
        "seen",
    ]
    texts = tuple(
        " ".join(words[(3 * i + k * (1 + i % 5)) % 14] for k in range(300)) for i in range(8)
    )
    report = pretrain(folder / "docs", steps=4, batch_size=1, corpus=Corpus(texts[:6], texts[6:7], texts[7:], {}),
                      progress=False)  # fmt: skip
    return [report, *read_pretrained(folder)]


def read_pretrained(folder: Path) -> list:
    from safetensors.torch import load_file

    return [load_file(folder / "docs" / "model.safetensors"),
            json.loads((folder / "docs" / "config.json").read_text())]  # fmt: skip


def read_checkpoints(folder: Path) -> object:
    from companion.training.checkpoint import read_checkpoint

    paths = sorted(folder.rglob("checkpoint.safetensors"))
    if not paths:
        raise FileNotFoundError
    return [read_checkpoint(path)["step"] for path in paths]


def read_log(folder: Path) -> object:
    from companion.study.runs import Log

    if not (folder / "log.json").exists():
        raise FileNotFoundError
    return len(Log(folder / "log.json").results)


def model(seed: int) -> nn.Module:
    return fuzz.converted(fuzz.llama(seed))


def export(way: str, seed: int, folder: Path) -> object:
    """Write the model of a seed in one of the formats."""
    from companion import export_onnx
    from companion.formats.compressed_tensors import export_compressed_tensors
    from companion.formats.gguf import export_gguf

    made = model(seed)
    if way == "save_quantized":
        save(made, folder / "model")
    elif way == "compressed-tensors":
        export_compressed_tensors(made, folder / "model")
    elif way == "gguf":
        export_gguf(made, folder / "model.gguf")
    else:
        export_onnx(made, folder / "model.onnx")
    return read(way, folder)


def read(way: str, folder: Path) -> object:
    """Read it back."""
    from companion.formats.gguf import read_gguf

    rng = random.Random(0)
    if way == "save_quantized":
        return fuzz.load_saved(folder / "model", rng)
    if way == "compressed-tensors":
        return fuzz.read_compressed(folder / "model", rng)
    if way == "gguf":
        return fuzz._matrices(read_gguf(folder / "model.gguf", model(0)))
    return fuzz.run_onnx(folder, rng)


def exporter(way: str, trials: int) -> Job:
    return Job(partial(export, way, 0), partial(read, way), partial(export, way, 1), trials)


JOBS = {
    "fit": Job(run_fit, read_checkpoints, trials=10),
    "fit_blocks": Job(run_blocks, read_checkpoints),
    "pretrain": Job(run_pretrain, read_pretrained),
    "compare": Job(fuzz.compared, read_log, trials=10),
    "save_quantized": exporter("save_quantized", 8),
    "export compressed-tensors": exporter("compressed-tensors", 4),
    "export gguf": exporter("gguf", 4),
    "export onnx": exporter("onnx", 3),
}


def apart(task: Callable[[], object], kill_after: float | None = None) -> dict[str, Any]:
    """Run in a child; kill it after so many seconds, or wait for the hash of what it made."""

    def work(out: int) -> None:
        torch.set_num_threads(1)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1), os.dup2(silence, 2)
        try:
            said = {"digest": fuzz.digest(task())}
        except Exception as error:
            said = {"error": type(error).__name__, "said": str(error)[:300]}
        os.write(out, json.dumps(said).encode())

    started = time.monotonic()
    child, pipe = fuzz.fork(work)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    text = b""
    while chunk := os.read(pipe, 65536):
        text += chunk
    os.close(pipe)
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - started
    return (json.loads(text) if text else {}) | {"seconds": seconds, "signal": os.WTERMSIG(status)}


def trial(name: str, number: int, work: Path, whole: dict[str, Any]) -> dict[str, Any]:
    """Kill once, read what lies there, and go on."""
    job, rng = JOBS[name], random.Random(f"{SEED} {name} {number}")
    folder = work / f"{name} {number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    earlier = None
    if job.before is not None:
        earlier = apart(partial(job.before, folder))["digest"]
    share = rng.random()
    killed = apart(partial(job.run, folder), share * whole["seconds"])
    seen = apart(partial(job.read, folder))
    if "error" in seen:
        absent = (
            seen["error"] in ("FileNotFoundError", "NotFoundError") or "is missing" in seen["said"]
        )
        state = "nothing there yet" if absent else "refused"
    elif job.before is None:
        state = "a whole file"
    else:
        state = {earlier: "the previous", whole["digest"]: "the new"}.get(
            seen["digest"], "SOMETHING ELSE"
        )
    left = sum(
        "partial" in path.name or path.name.startswith(".export") for path in folder.rglob("*")
    )
    again = apart(partial(job.run, folder))
    equal = again.get("digest") == whole["digest"]
    result = {"job": name, "number": number, "share of the time": round(share, 3),
              "killed": killed["signal"] == 9, "there afterwards": state, "litter": left,
              "resumed equal": equal} | ({} if equal else {"said": again})  # fmt: skip
    if equal and state != "SOMETHING ELSE":
        shutil.rmtree(folder)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "killed"),
                        help="where outcomes are kept until all are there")  # fmt: skip
    args = parser.parse_args()
    fuzz.prepare_process()
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "trials.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line["job"], line["number"]) for line in found}
    started = time.monotonic()
    with tqdm(total=sum(JOBS[name].trials for name in args.jobs), disable=False) as bar:
        for name in args.jobs:
            bar.set_description(name)
            whole = None
            for number in range(JOBS[name].trials):
                if (name, number) not in done:
                    if whole is None:
                        folder = args.work / f"{name} whole"
                        shutil.rmtree(folder, ignore_errors=True)
                        folder.mkdir()
                        whole = apart(partial(JOBS[name].run, folder))
                        if "digest" not in whole:
                            raise RuntimeError(f"{name} fails uninterrupted: {whole}")
                    found.append(trial(name, number, args.work, whole))
                    with path.open("a") as file:
                        file.write(json.dumps(found[-1]) + "\n")
                bar.update()
    records = []
    for name in args.jobs:
        own = [line for line in found if line["job"] == name]
        records.append({
            "job": name, "trials": len(own), "killed in time": sum(line["killed"] for line in own),
            "there afterwards": dict(Counter(line["there afterwards"] for line in own)),
            "resumed bit-identical": sum(line["resumed equal"] for line in own),
            "litter": sum(line["litter"] for line in own),
            "faults": [line for line in own
                       if not line["resumed equal"] or line["there afterwards"] == "SOMETHING ELSE"],
        })  # fmt: skip
        print(json.dumps(records[-1])[:600])
    if set(args.jobs) == set(JOBS):
        faults = sum(len(record["faults"]) for record in records)
        kills = sum(record["killed in time"] for record in records)
        minutes = round((time.monotonic() - started) / 60, 1)
        print(write_results("killed", records, {"kills": kills, "faults": faults}, seed=SEED,
                            minutes=minutes))  # fmt: skip


if __name__ == "__main__":
    main()
