"""What fake quantization adds to a training step: companion and torchao beside the float step.

    python -m benchmarks.step_cost               (about two minutes; nothing else should run)

The three are timed in turns on one Linear layer, forward and backward, and compared as ratios.
Writes benchmarks/results/step_cost.json.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import nn

from benchmarks.provenance import write_results
from companion import Activations, QuantScheme, load_pretrained, prepare_qat

CASES = {  # name: width, tokens, 8-bit activations per token
    "int4 weights, d=256, 2048 tokens": (256, 2048, False),
    "the same with int8 activations": (256, 2048, True),
    "int4 weights, d=576, 512 tokens": (576, 512, False),
    "int4 weights, d=1024, 64 tokens": (1024, 64, False),
}


def prepare_torchao(model: nn.Module, activations: bool) -> nn.Module:
    """Return torchao's fake-quantized copy at the same format."""
    load_pretrained("docs-lm")  # imports transformers and torchao without their log lines
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    if activations:
        base = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=PerGroup(32)
        )
    else:
        base = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    model = copy.deepcopy(model)
    quantize_(model, QATConfig(base, step="prepare"))
    return model


def step(model: nn.Module, x: torch.Tensor) -> float:
    """Time one forward and backward, in seconds."""
    start = time.perf_counter()
    model(x).square().mean().backward()
    return time.perf_counter() - start


def measure(rounds: int) -> list[dict]:
    """Time the three in turns, so that a slow moment of the machine hits all of them."""
    records = []
    for name, (width, tokens, activations) in CASES.items():
        torch.manual_seed(0)
        layers = [nn.Linear(width, width, bias=False) for _ in range(4)]
        model = nn.Sequential(*layers)
        scheme = QuantScheme(4, 32, activations=Activations(8, "token") if activations else None)
        arms = {
            "float": model,
            "companion": prepare_qat(model, scheme, "absmax"),
            "torchao": prepare_torchao(model, activations),
        }
        x = torch.randn(tokens, width, requires_grad=True)
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for turn in range(rounds + 5):
            for arm, m in arms.items():
                seconds = step(m, x)
                if turn >= 5:  # the first turns warm up
                    times[arm].append(seconds)
        median = {arm: sorted(t)[len(t) // 2] for arm, t in times.items()}
        ratio = {arm: round(median[arm] / median["float"], 3) for arm in ("companion", "torchao")}
        records.append({"case": name, **ratio, "float_ms": round(1e3 * median["float"], 3)})
        print(records[-1])
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=150)
    args = parser.parse_args()
    print(write_results("step_cost", measure(args.rounds), **vars(args)))


if __name__ == "__main__":
    main()
