"""What a forward of converted layers costs in PyTorch, beside the float model's.

    python -m benchmarks.forward_cost --minutes 2.5     (again until it says that all is there)

The arms of a row are timed in turns on SmolLM2-135M, logits at every position, and compared as
ratios of medians: "kept", with the matrices that layers keep after their first forward; "blocks",
without (cache=False); "before", as this package did until then, one integer of a cell at a time
and every matrix anew at each forward. Peak bytes are those of all tensors made during the first
forward of one token, beyond the float model's. Nothing else should run. Writes
benchmarks/results/forward_cost.json, row by row.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.provenance import RESULTS, write_results
from companion import (
    W2,
    W3,
    W4,
    W8,
    QuantScheme,
    convert,
    load_pretrained,
    model_bytes,
    prepare_qat,
    release_cache,
    save_quantized,
)
from companion.errors import SourceUnavailable
from companion.qat.packed import QuantizedLinear

SCHEMES = {"W4": W4, "W3": W3, "W2": W2, "W8": W8}
TOKENS = {1: 15, 64: 7, 512: 3}
"""Tokens of a forward, and how many rounds they are timed at least."""
MEMORY = ("load", "convert", "convert in place")


def unpack_before(packed: Tensor, bits: int, n: int) -> Tensor:
    """Unpack as `companion.unpack` did before it moved halves of words: one place of a cell a step."""
    count = 8 // math.gcd(8, bits)
    width = count * bits // 8
    octets = packed.unflatten(-1, (-1, width))
    cells = torch.empty(*octets.shape[:-1], count, dtype=torch.uint8)
    for i in range(count):
        byte, shift = divmod(i * bits, 8)
        cells[..., i] = octets[..., byte] >> shift
        if shift + bits > 8:
            cells[..., i] |= octets[..., byte + 1] << (8 - shift)
    sign = 2 ** (bits - 1)
    integers = cells.bitwise_and_(2**bits - 1).view(torch.int8).bitwise_xor_(sign).sub_(sign)
    return integers.flatten(-2)[..., :n]


def forward_before(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """Compute a weight-only layer as `QuantizedLinear` did before."""
    groups = unpack_before(layer.integers, layer.scheme.weight_bits, layer.columns).float()
    groups = groups.unflatten(-1, (layer.scale.shape[-1], -1)).mul_(layer.scale[..., None].float())
    return F.linear(x, groups.to(layer.dtype).flatten(-2), layer.bias)


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside this context held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        known = {t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._known or not size:
            return
        self._known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, place, size)

    def _release(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def arms_of(
    model: nn.Module, scheme: QuantScheme, embeddings: bool
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Make the forwards that a row compares; they share what they can, and each is a call."""
    kept = convert(prepare_qat(model, scheme, "absmax", embeddings=embeddings))
    layers = [m for m in kept.modules() if isinstance(m, QuantizedLinear)]

    def switched(cache: bool, forward: Callable | None = None):
        def call(ids: Tensor) -> Tensor:
            for layer in layers:
                layer.cache = cache
                if forward is not None:
                    layer.forward = forward.__get__(layer)
            try:
                return kept(input_ids=ids, use_cache=False).logits
            finally:
                for layer in layers:
                    layer.__dict__.pop("forward", None)

        return call

    return {
        "float": lambda ids: model(input_ids=ids, use_cache=False).logits,
        "kept": switched(True),
        "blocks": switched(False),
        "before": switched(False, forward_before),
    } | {"release": lambda ids: torch.tensor(release_cache(kept))}


@torch.no_grad()
def measure_forward(model: nn.Module, name: str, tokens: int, rounds: int) -> dict:
    """Time the arms of one row in turns; equal logits first."""
    scheme, embeddings = SCHEMES[name.split()[0]], "embeddings" in name
    arms = arms_of(model, scheme, embeddings)
    release = arms.pop("release")
    ids = torch.randint(3, 40_000, (1, tokens), generator=torch.Generator().manual_seed(0))
    expected = arms["before"](ids)
    differ = {arm: float((arms[arm](ids) - expected).abs().max()) for arm in ("kept", "blocks")}
    peak = {}
    for arm, call in arms.items():
        release(ids)
        with PeakBytes() as bytes_:
            call(ids[:, :1])
        peak[arm] = bytes_.peak
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(rounds + 2):
        for arm, call in arms.items():
            start = time.perf_counter()
            call(ids)
            if turn >= 2:  # the first turns warm up
                times[arm].append(time.perf_counter() - start)
    median = {arm: statistics.median(t) for arm, t in times.items()}
    return {
        "what": "forward",
        "scheme": name,
        "tokens": tokens,
        "float_ms": round(1e3 * median["float"], 2),
        **{arm: round(median[arm] / median["float"], 3) for arm in ("kept", "blocks", "before")},
        "largest_difference": differ,
        "peak_mb": {
            arm: round((peak[arm] - peak["float"]) / 1e6, 2) for arm in ("kept", "blocks", "before")
        },
    }


IN_A_PROCESS = """
import sys
from pathlib import Path
from companion import W4, convert, load_pretrained, load_quantized, prepare_qat

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

what, folder, small = sys.argv[1:]
model = load_quantized(small)  # what is imported on the way
if what != "load":
    model = prepare_qat(load_pretrained("smollm2"), W4, "absmax", inplace=True)
    [p.data.sum() for p in model.parameters()]  # what a file lends is in memory once it is read
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
model = load_quantized(folder) if what == "load" else convert(model, inplace="place" in what)
print(status("VmHWM") - before)
"""


def measure_memory(model: nn.Module, what: str) -> dict:
    """Measure in a process of its own how far loading or converting raises its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        big, small = Path(folder, "big"), Path(folder, "small")
        converted = convert(prepare_qat(model, W4, "absmax"))
        save_quantized(converted, big)
        save_quantized(convert(prepare_qat(load_pretrained("docs-lm"), W4, "absmax")), small)
        run = [sys.executable, "-c", IN_A_PROCESS, what, str(big), str(small)]
        # without the holes that glibc keeps between tensors: see companion.training.memory
        settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        result = subprocess.run(run, check=True, capture_output=True, text=True, env=settings)
    return {
        "what": what,
        "scheme": "W4",
        "float_mb": round(model_bytes(model) / 1e6, 1),
        "file_mb": round(model_bytes(converted) / 1e6, 1),
        "raises_peak_by_mb": round(int(result.stdout.split()[-1]) / 1e6, 1),
    }


def rows() -> list[tuple]:
    """Every row: what, scheme and tokens."""
    names = [*SCHEMES, "W4 with embeddings"]
    return [("forward", name, tokens) for tokens in TOKENS for name in names] + [
        (what, "W4", None) for what in MEMORY
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="start no row after so many")
    parser.add_argument("--rounds", type=int, default=1, help="times the rounds of each row")
    parser.add_argument("--anew", action="store_true", help="measure rows that are there again")
    args = parser.parse_args()
    path, start = RESULTS / "forward_cost.json", time.monotonic()
    there = [] if args.anew or not path.exists() else json.loads(path.read_text())["records"]
    done = {(r["what"], r["scheme"], r.get("tokens")): r for r in there}
    try:
        model = load_pretrained("smollm2").eval()
    except SourceUnavailable as error:
        raise SystemExit(str(error)) from None
    for row in rows():
        if row in done or time.monotonic() - start > 60 * args.minutes:
            continue
        what, name, tokens = row
        if what == "forward":
            done[row] = measure_forward(model, name, tokens, args.rounds * TOKENS[tokens])
        else:
            done[row] = measure_memory(model, what)
        gc.collect()
        print(done[row], flush=True)
        write_results("forward_cost", [done[r] for r in rows() if r in done], rounds=args.rounds)
    left = [row for row in rows() if row not in done]
    print(f"{len(left)} rows are left" if left else f"all is there: {path}")


if __name__ == "__main__":
    main()
