"""What the loss over 49,152 words adds: perplexity and training steps of SmolLM2-135M.

    python -m benchmarks.loss_cost               (about five minutes; nothing else should run)

Perplexity: the test part of Python's language reference, batch by batch in turns: all logits and
their cross-entropy at once (plain), the package's way, and the bare forward pass with logits only
where a label is scored. Training: one forward and backward pass of 512 tokens, on labels and with
a teacher, in turns; the peak memory of each in a process of its own. Only ratios compare machines.
With --only, one part is measured and the rows of the others stay as they are in the file.
Writes benchmarks/results/loss_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.provenance import RESULTS, write_results
from companion import W4, load_pretrained, load_task, prepare_qat
from companion.course.sources import load_tokenizer
from companion.evaluation.language import document_losses
from companion.training.losses import default_loss, distillation_loss
from companion.training.memory import PeakMemory

TOKENS, BLOCK, ROWS = 12_000, 512, 4
STEPS = ("labels", "teacher")
WAYS = ("plain", "pieces")


def plain_losses(model: nn.Module, batch: dict) -> Tensor:
    """Cross-entropy of every token, all logits at once."""
    logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")


def bare(model: nn.Module, batch: dict) -> Tensor:
    """Logits where a label is scored, and no loss."""
    scored = F.pad(batch["labels"][:, 1:] != -100, (0, 1))
    return model(input_ids=batch["input_ids"], logits_to_keep=scored).logits


def perplexity_seconds(name: str, rounds: int) -> list[dict]:
    """Time the ways over batches of some 12,000 scored tokens in all."""
    model = load_pretrained(name).eval()
    task = load_task("language-reference", tokenizer=load_tokenizer(name), block_size=BLOCK,
                     batch_size=ROWS)  # fmt: skip
    ways = {"bare": bare, "plain": plain_losses, "pieces": lambda m, b: document_losses(m, [b])}
    seconds = dict.fromkeys(ways, 0.0)
    tokens = fed = 0
    for number, batch in enumerate(task.test):
        for way in sorted(ways, key=lambda way: (list(ways).index(way) + number) % len(ways)):
            start = time.perf_counter()
            with torch.no_grad():
                ways[way](model, batch)
            if number:  # the first batch warms up
                seconds[way] += time.perf_counter() - start
        if number:
            tokens += int((batch["labels"][:, 1:] != -100).sum())
            fed += batch["input_ids"].numel()
        if tokens >= TOKENS:
            break
    return [{"case": "perplexity", "tokens scored": tokens, "tokens fed": fed, "block": BLOCK,
            "rows": ROWS} | {f"{way}_s": round(t, 2) for way, t in seconds.items()} | {
            f"{way} / bare": round(seconds[way] / seconds["bare"], 3) for way in WAYS}]  # fmt: skip


def plain_teacher(teacher: nn.Module) -> Callable[[nn.Module, dict], Tensor]:
    """Return the divergence from a teacher, all logits of both at once."""

    def loss(model: nn.Module, batch: dict) -> Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=batch["input_ids"]).logits
        scored = F.pad(batch["labels"][:, 1:] != -100, (0, 1))
        given = model(input_ids=batch["input_ids"]).logits
        return F.kl_div(given[scored].log_softmax(-1), wanted[scored].log_softmax(-1),
                        reduction="batchmean", log_target=True)  # fmt: skip

    return loss


def loss_of(step: str, way: str, teacher: nn.Module) -> Callable[[nn.Module, dict], Tensor]:
    """Return one way to compute the loss of a training step."""
    if step == "labels":
        return default_loss if way == "pieces" else lambda model, batch: model(**batch).loss
    return (distillation_loss if way == "pieces" else plain_teacher)(teacher)


def step_parts(name: str) -> tuple[nn.Module, nn.Module, dict]:
    """Return a model prepared for W4, its teacher and a batch of one block."""
    teacher = load_pretrained(name).eval()
    ids = torch.randint(0, teacher.config.vocab_size, (1, BLOCK),
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    return prepare_qat(teacher, W4).train(), teacher, {"input_ids": ids, "labels": ids}


def step_seconds(name: str, rounds: int) -> list[dict]:
    """Time forward and backward of each step, both ways in turns."""
    model, teacher, batch = step_parts(name)
    records = []
    for step in STEPS:
        losses = {way: loss_of(step, way, teacher) for way in WAYS}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(rounds + 1):
            for way in WAYS if turn % 2 else WAYS[::-1]:
                model.zero_grad()
                start = time.perf_counter()
                losses[way](model, batch).backward()
                if turn:  # the first turn warms up
                    seconds[way].append(time.perf_counter() - start)
        times = {way: median(values) for way, values in seconds.items()}
        records.append({"case": f"training step, {step}", "tokens": BLOCK}
                       | {f"{way}_s": round(t, 3) for way, t in times.items()}
                       | {"pieces / plain": round(times["pieces"] / times["plain"], 3)})  # fmt: skip
    return records


def step_memory(name: str, step: str, way: str) -> int:
    """Peak bytes of a second step, beyond models and gradients; in this process."""
    model, teacher, batch = step_parts(name)
    loss = loss_of(step, way, teacher)
    loss(model, batch).backward()
    model.zero_grad(set_to_none=False)
    with PeakMemory() as peak:
        loss(model, batch).backward()
    return peak.bytes


def step_bytes(name: str, rounds: int) -> list[dict]:
    """Measure the peak memory of each step, both ways."""
    return [{"case": f"memory of a training step, {step}", "tokens": BLOCK}
            | {f"{way}_peak_MB": memory_apart(name, step, way) for way in WAYS}
            for step in STEPS]  # fmt: skip


def memory_apart(name: str, step: str, way: str) -> float:
    """Megabytes of `step_memory`, measured in a process that returns what it frees."""
    command = [sys.executable, "-m", "benchmarks.loss_cost", "--model", name, "--memory", step, way]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return round(json.loads(run.stdout.splitlines()[-1]) / 1e6)


PARTS = {"perplexity": perplexity_seconds, "steps": step_seconds, "memory": step_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", choices=PARTS, help="measure this part, keep the rows of the others"
    )
    parser.add_argument("--memory", nargs=2, metavar=("STEP", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(step_memory(args.model, *args.memory))
        return
    path = RESULTS / "loss_cost.json"
    kept = json.loads(path.read_text())["records"] if args.only and path.exists() else []
    records = {record["case"]: record for record in kept}
    for part in [args.only] if args.only else PARTS:
        for record in PARTS[part](args.model, args.rounds):
            record["threads"] = torch.get_num_threads()
            print(record, flush=True)
            records[record["case"]] = record
    print(write_results("loss_cost", [*records.values()], model=args.model, rounds=args.rounds))


if __name__ == "__main__":
    main()
