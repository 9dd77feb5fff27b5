"""Hours in minutes: 2,000 steps of `fit`, and 10,000 requests from 8 threads, with flat memory.

    nice -n 5 python -m benchmarks.long_running

Memory is the process's resident set, read at twenty moments or more. Flat means that a straight line
through those after the first fifth rises by at most `MARGIN` megabytes from its beginning to its end: less
than one copy of this model's optimizer states a thousand steps, or a hundred bytes a request. Requests are
asked in any order by all threads at once, and each answer is compared, bit for bit, with that of one thread
asking alone. Writes benchmarks/results/long_running.json.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.provenance import write_results
from companion import W4, convert, export_onnx, fit, prepare_qat

MARGIN = 4.0
STEPS, REQUESTS, THREADS = 2_000, 10_000, 8


def resident() -> float:
    """Megabytes that this process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def rise(memory: list[float]) -> float:
    """Megabytes by which a straight line rises through what was read after the first fifth.

    Examples
    --------
    >>> round(rise([5.0] + [float(i) for i in range(9)]), 6)
    7.0
    """
    later = memory[len(memory) // 5 :]
    slope = np.polyfit(range(len(later)), later, 1)[0]
    return float(slope * (len(later) - 1))


def llama() -> nn.Module:
    """Return a small language model."""
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64)).eval()  # fmt: skip


def training(steps: int, folder: Path) -> dict:
    """Train, validate and write checkpoints all along."""
    qat, generator = prepare_qat(llama(), W4), torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 512, (4, 32), generator=generator) for _ in range(8)]
    batches = [{"input_ids": x, "labels": x} for x in ids]
    memory: list[float] = []
    started = time.monotonic()
    history = fit(qat, batches, steps=steps, checkpoint_dir=folder / "run", checkpoint_every=100,
                  at=dict.fromkeys(range(0, steps, max(1, steps // 40)), lambda: memory.append(resident())),
                  validate=lambda m: float(m(**batches[0]).loss.detach()), validate_every=200)  # fmt: skip
    return {"case": "fit", "steps": steps, "loss": [round(history.loss[0], 3), round(history.loss[-1], 3)],
            "checkpoints": steps // 100} | judged(memory, started)  # fmt: skip


def judged(memory: list[float], started: float) -> dict:
    """Say how memory went."""
    risen = rise(memory)
    return {"MB at first": round(memory[0], 1), "MB at last": round(memory[-1], 1),
            "rise_MB": round(risen, 2), "margin_MB": MARGIN, "flat": risen <= MARGIN,
            "seconds": round(time.monotonic() - started, 1)}  # fmt: skip


def asked(name: str, answer: Callable[[Tensor], Tensor], requests: int) -> dict:
    """Ask from many threads at once; every answer must be the one that a single thread gets."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 512, (1 + i % 3, 4 + i), generator=generator) for i in range(24)]
    alone = [answer(prompt) for prompt in prompts]
    memory, other = [], 0
    started = time.monotonic()
    bar = tqdm(total=requests, desc=name, disable=False)

    def one(number: int) -> bool:
        place = number * 7 % len(prompts)
        return torch.equal(answer(prompts[place]), alone[place])

    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, requests, max(1, requests // 40)):
            part = range(start, min(requests, start + max(1, requests // 40)))
            other += sum(not same for same in pool.map(one, part))
            gc.collect()
            memory.append(resident())
            bar.update(len(part))
    bar.close()
    return {"case": name, "requests": requests, "threads": THREADS, "other answers": other} | judged(
        memory, started)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    args = parser.parse_args()
    os.environ.pop("TQDM_DISABLE", None)
    from companion.formats.onnx.model import OnnxModel

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        records = [training(args.steps, Path(place))]
        print(records[-1])
        q = convert(prepare_qat(llama(), W4, "absmax"))
        served = OnnxModel(export_onnx(q, Path(place) / "model.onnx"), threads=1)
        records.append(asked("exported ONNX", lambda ids: served(ids).logits, args.requests))
        print(records[-1])

        def converted(ids: Tensor) -> Tensor:
            with torch.inference_mode():
                return q(ids).logits.clone()

        records.append(asked("converted model", converted, args.requests))
        print(records[-1])
    if (args.steps, args.requests) == (STEPS, REQUESTS):
        minutes = round((time.monotonic() - started) / 60, 1)
        print(write_results("long_running", records, minutes=minutes))


if __name__ == "__main__":
    main()
