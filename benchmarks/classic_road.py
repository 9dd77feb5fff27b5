"""The classic road over several seeds: float control, static PTQ and QAT of ResNet-18.

    python -m benchmarks.classic_road            (about six minutes on two cores)

Writes benchmarks/results/classic_road.json: one record for each seed, arm and weight width,
with the prediction for every test image, so that any two arms can be compared in pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks.provenance import write_results
from companion import QuantWrapper, fit, load_pretrained, load_task
from companion.course.models import new_resnet18
from companion.evaluation.estimates import predict

BATCH, LR, MOMENTUM, FREEZE_AT = 25, 0.001, 0.9, 0.8  # optimizer as in the recipe of chapter 1


def arms(seed: int, bits: tuple[int, ...], steps: int) -> Iterator[tuple[str, int, nn.Module]]:
    """Yield (arm, weight bits, model), all trained from one start on the same batches."""
    task = load_task("digits-5-9", batch_size=BATCH)
    sgd = partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM)
    train = partial(fit, loader=task.train, steps=steps, optimizer=sgd, schedule="constant",
                    seed=seed, progress=False)  # fmt: skip

    def start() -> nn.Module:
        return load_pretrained(classes=len(task.classes), weights="digits", seed=seed)

    late = int(FREEZE_AT * steps)
    scratch, control = new_resnet18(len(task.classes), seed), start()
    train(scratch)
    yield "scratch", 32, scratch
    train(control, at={late: partial(freeze_batch_norm, control)})
    yield "float", 32, control
    for width in bits:
        ptq = QuantWrapper(control).prepare_qat(width).calibrate(task.train)
        yield "ptq fake", width, ptq
        yield "ptq", width, ptq.convert()
        qat = QuantWrapper(start()).prepare_qat(width)
        train(qat, at={late: qat.freeze})
        yield "qat fake", width, qat
        yield "qat", width, qat.convert()


def freeze_batch_norm(model: nn.Module) -> None:
    """Fix batch-norm statistics: QAT does so late, hence its float control must too."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def measure(seeds: int, bits: tuple[int, ...], steps: int) -> list[dict]:
    """Return one record per seed, arm and width: accuracy and every prediction."""
    records = []
    test = load_task("digits-5-9").test
    for seed in tqdm(range(seeds), desc="seeds"):
        for arm, width, model in arms(seed, bits, steps):
            predictions, labels = predict(model, test)
            records.append({
                "seed": seed, "arm": arm, "bits": width, "steps": steps, "n": len(labels),
                "accuracy": float(np.mean(predictions == labels)),
                "predictions": "".join(map(str, predictions)),
                "labels": "".join(map(str, labels)),
            })  # fmt: skip
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2])
    args = parser.parse_args()
    records = measure(args.seeds, tuple(args.bits), args.steps)
    print(write_results("classic_road", records, **vars(args)))


if __name__ == "__main__":
    main()
