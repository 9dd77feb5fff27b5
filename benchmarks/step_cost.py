"""What fake quantization adds to a training step: companion and torchao beside the float step.

    python -m benchmarks.step_cost                       (half an hour; nothing else should run)
    python -m benchmarks.step_cost --rows SmolLM2 --schemes W4 --before ../earlier

The arms of a row are timed in turns, forward and backward, and compared as ratios of medians.
``--before`` names the folder of an earlier version, whose arms a second process times in the same
turns. A row that is finished is kept (``--again`` measures it anew). Beside each ratio stands a
roofline: what reading every rounded weight once more, forward and back, would take at the bandwidth
that this machine has; and the bytes that the operations read and write beyond those of the float
step, from caches or from memory, for each weight. Writes benchmarks/results/step_cost.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.provenance import RESULTS, write_results
from companion import load_pretrained, prepare_qat
from companion.course.sources import MINILM
from companion.numerics.scheme import parse_scheme
from companion.training.memory import PeakMemory

ROWS = {  # name: width of four layers, or a model, and rows of tokens
    "SmolLM2-135M, 128 tokens": ("smollm2", 1, 128),
    "SmolLM2-135M, 512 tokens": ("smollm2", 1, 512),
    "MiniLM, 32 x 40 tokens": (MINILM, 32, 40),
    "d=256, 2048 tokens": (256, 1, 2048),
    "d=576, 512 tokens": (576, 1, 512),
    "d=1024, 64 tokens": (1024, 1, 64),
}
SCHEMES = ["W4", "W3", "W2", "W4A8", "W8A8"]
METHODS = ["absmax", "lsq"]
WARM_UP = 2
MUST = 2 * 4
"""Bytes that rounding has to read of each weight: once forward, once on the way back."""


class Arms:
    """The models of one row at one scheme, and a step of each."""

    def __init__(self, row: str, scheme: str) -> None:
        kind, rows, tokens = ROWS[row]
        torch.manual_seed(0)
        if isinstance(kind, str):
            self.inputs = {"input_ids": torch.randint(0, 30_000, (rows, tokens))}
            if kind == "smollm2":
                self.inputs["labels"] = self.inputs["input_ids"]
            model = load_pretrained(kind).train()
        else:
            self.inputs = {"input": torch.randn(tokens, kind, requires_grad=True)}
            model = nn.Sequential(*(nn.Linear(kind, kind, bias=False) for _ in range(4)))
        self.models = {"float": model}
        for method in METHODS:
            self.models[method] = prepare_qat(model, parse_scheme(scheme), method)
        self.weights = sum(
            m.weight.numel() for m in self.models["absmax"].modules() if hasattr(m, "quantizer")
        )
        if scheme != "W8A8":
            self.models["torchao"] = prepare_torchao(model, scheme)

    def step(self, arm: str) -> float:
        """Time one forward and backward, in seconds."""
        model = self.models[arm]
        model.zero_grad()
        start = time.perf_counter()
        out = model(**self.inputs)
        if "labels" in self.inputs:
            out.loss.backward()
        else:
            getattr(out, "last_hidden_state", out).square().mean().backward()
        return time.perf_counter() - start

    def moved(self, arm: str) -> int:
        """Bytes that the operations of a step read and write, wherever they lie."""
        with Moved() as moved:
            self.step(arm)
        return moved.bytes

    def peak(self, arm: str) -> int:
        """Bytes that a step takes at most beyond the weights."""
        self.step(arm)  # what is made once
        self.models[arm].zero_grad()
        with PeakMemory() as memory:
            self.step(arm)
        return memory.bytes


class Moved(TorchDispatchMode):
    """Add up the bytes of what operations take and give; views move nothing."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view:
            given = {k: v for k, v in kwargs.items() if k not in ("out", "grad_input")}
            tensors = [t for t in tree_leaves((args, given, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def prepare_torchao(model: nn.Module, scheme: str) -> nn.Module:
    """Return torchao's fake-quantized copy at the same format."""
    load_pretrained("docs-lm")  # imports transformers and torchao without their log lines
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    dtype = getattr(torch, f"int{parse_scheme(scheme).weight_bits}")
    if parse_scheme(scheme).activations:
        base = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=dtype, weight_granularity=PerGroup(32)
        )
    else:
        base = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(32))
    model = copy.deepcopy(model)
    chosen = {id(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {
        id(getattr(model, "lm_head", None))  # tied to the embedding; ours leaves it in float, too
    }
    quantize_(model, QATConfig(base, step="prepare"), lambda m, _: id(m) in chosen)
    return model


class Served:
    """The arms of a version of the package, in a process of their own.

    What an allocator gives back to the system, and has to ask for again, differs by more than what
    is measured. So each version has the same kind of process to itself, which gives nothing back
    while times are taken, and everything while memory is.
    """

    def __init__(self, folder: Path, row: str, scheme: str, keeps: bool = True) -> None:
        command = [sys.executable, __file__, "--serve", row, scheme]
        of_glibc = {"MALLOC_MMAP_THRESHOLD_": str(2**30 if keeps else 2**16),
                    "MALLOC_TRIM_THRESHOLD_": str(2**33 if keeps else 2**16)}  # fmt: skip
        environment = {**os.environ, **of_glibc, "PYTHONPATH": str(folder.resolve())}
        self.process = subprocess.Popen(command, env=environment, cwd=folder, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def step(self, arm: str) -> float:
        """Seconds of one forward and backward."""
        return self.ask(f"step {arm}")

    def ask(self, question: str) -> float:
        self.process.stdin.write(f"{question}\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("answer "):
            if not line:
                raise RuntimeError(f"no answer to {question!r}: the reason stands above")
        return float(line.split()[1])

    def peak(self, arm: str) -> float:
        """Megabytes that a step takes at most beyond the weights."""
        return round(self.ask(f"peak {arm}") / 1e6, 1)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(row: str, scheme: str) -> None:
    """Answer on standard output what is asked on standard input: "step absmax", "peak float"."""
    arms = Arms(row, scheme)
    for line in sys.stdin:
        question, arm = line.split()
        print("answer", arms.weights if question == "weights" else getattr(arms, question)(arm),
              flush=True)  # fmt: skip


def bandwidth() -> float:
    """Bytes that a second reads from memory, the best of five."""
    block, times = torch.ones(2**26), []
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return block.nbytes / min(times)


def measure(row: str, scheme: str, rounds: int, before: Path | None) -> dict:
    """Time the arms in turns, so that a slow moment of the machine hits all of them."""
    folders = {"": Path(__file__).parent.parent} | ({" before": before} if before else {})
    versions = {name: Served(folder, row, scheme) for name, folder in folders.items()}
    torchao = ["torchao"] if scheme != "W8A8" else []  # its configs know no activations per tensor
    times: dict[str, list[float]] = {}
    for turn in range(rounds + WARM_UP):
        for arm in ("float", *METHODS, *torchao):
            for name, version in versions.items():
                seconds = version.step(arm)
                if turn >= WARM_UP:
                    times.setdefault(arm + name, []).append(seconds)
    median = {arm: statistics.median(t) for arm, t in times.items()}
    ratio = {
        arm + name: round(median[arm + name] / median["float" + name], 3)
        for arm in (*METHODS, *torchao)
        for name in versions
    }
    weights = versions[""].ask("weights absmax")
    moved = {arm: versions[""].ask(f"moved {arm}") for arm in ("float", *METHODS, *torchao)}
    for version in versions.values():
        version.close()
    peak = {}
    for name, folder in folders.items():
        version = Served(folder, row, scheme, keeps=False)
        peak |= {arm + name: version.peak(arm) for arm in ("float", *METHODS, *torchao)}
        version.close()
    return {
        "row": row, "scheme": scheme, "rounds": rounds, "ratio": ratio,
        "roofline": round(1 + MUST * weights / bandwidth() / median["float"], 3),
        "bytes a weight": {"must": MUST} | {arm: round((moved[arm] - moved["float"]) / weights, 1)
                                            for arm in (*METHODS, *torchao)},
        "ms": {arm: round(1e3 * seconds, 2) for arm, seconds in median.items()},
        "peak MB": peak,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="*", default=[""], help="beginnings of names")
    parser.add_argument("--schemes", nargs="*", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--before", type=Path, help="folder of an earlier version")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve)
    path = RESULTS / "step_cost.json"
    records = json.loads(path.read_text())["records"] if path.exists() else []
    found = {(r["row"], r["scheme"]): r for r in records if "row" in r}
    for row in (r for r in ROWS if r.startswith(tuple(args.rows))):
        for scheme in args.schemes:
            if args.again or (row, scheme) not in found:
                found[row, scheme] = measure(row, scheme, args.rounds, args.before)
                print(found[row, scheme], flush=True)
                order = [(r, s) for r in ROWS for s in SCHEMES if (r, s) in found]
                write_results("step_cost", [found[key] for key in order],
                              rounds=args.rounds, warm_up=WARM_UP)  # fmt: skip


if __name__ == "__main__":
    main()
