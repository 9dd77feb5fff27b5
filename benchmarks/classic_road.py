"""The classic road over several seeds: float control, static PTQ and QAT of ResNet-18.

    python -m benchmarks.classic_road            (about fifteen minutes on two cores)
    python -m benchmarks.classic_road --speed    (only the speed of int8; a minute, nothing else running)

At the learning rate of the recipe and at the one that chapter 2 finds better. Rounding afterwards
comes in three strengths: as it is, with batch norm measured anew, and with searched ranges as well.
Writes benchmarks/results/classic_road.json: one record for each rate, seed, arm and weight width,
with the prediction for every test image, so that any two arms can be compared in pairs; and under
"speed" how long float and int8 take.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks.provenance import RESULTS, as_json, write_results
from companion import QuantWrapper, fit, latency, load_pretrained, load_task
from companion.course.models import new_resnet18
from companion.evaluation.estimates import predict

BATCH, MOMENTUM, FREEZE_AT = 25, 0.9, 0.8  # optimizer as in the recipe of chapter 1
RATES = 0.001, 0.02
"""The recipe's learning rate, and a better one."""
POST_TRAINING: dict[str, dict[str, bool]] = {
    "ptq": {},
    "ptq batch norm": {"batch_norm": True},
    "ptq searched": {"batch_norm": True, "search": True},
}
MARGIN = 0.02
"""Accuracies that differ by less are called equivalent; fixed before any result was looked at."""
IMAGES, ROUNDS = (1, 25), 15


def arms(
    seed: int, bits: tuple[int, ...], steps: int, rate: float
) -> Iterator[tuple[str, int, nn.Module]]:
    """Yield (arm, weight bits, model), all trained from one start on the same batches."""
    task = load_task("digits-5-9", batch_size=BATCH)
    sgd = partial(torch.optim.SGD, lr=rate, momentum=MOMENTUM)
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
        for arm, how in POST_TRAINING.items():
            torch.manual_seed(seed)  # which batches calibrate
            ptq = QuantWrapper(control).prepare_qat(width).calibrate(task.train, **how)
            yield f"{arm} fake", width, ptq
            yield arm, width, ptq.convert()
        qat = QuantWrapper(start()).prepare_qat(width)
        train(qat, at={late: qat.freeze})
        yield "qat fake", width, qat
        yield "qat", width, qat.convert()


def freeze_batch_norm(model: nn.Module) -> None:
    """Fix batch-norm statistics: QAT does so late, hence its float control must too."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def measure(seeds: int, bits: tuple[int, ...], steps: int, rates=RATES) -> list[dict]:
    """Return one record per rate, seed, arm and width: accuracy and every prediction."""
    records = []
    test = load_task("digits-5-9").test
    for rate, seed in tqdm([*product(rates, range(seeds))], desc="rates and seeds"):
        for arm, width, model in arms(seed, bits, steps, rate):
            predictions, labels = predict(model, test)
            records.append({
                "lr": rate, "seed": seed, "arm": arm, "bits": width, "steps": steps,
                "n": len(labels), "accuracy": float(np.mean(predictions == labels)),
                "predictions": "".join(map(str, predictions)),
                "labels": "".join(map(str, labels)),
            })  # fmt: skip
    return records


def speed() -> list[dict]:
    """Time float and int8 in turn, by images at a time: medians in milliseconds."""
    task = load_task("digits-5-9", batch_size=BATCH)
    control = load_pretrained(classes=len(task.classes), weights="digits").eval()
    int8 = QuantWrapper(control).prepare_qat(8).calibrate(task.train).convert()
    rows = []
    for images in IMAGES:
        x = torch.rand(images, 3, 32, 32)
        taken = [[latency(partial(model, x), min_seconds=0.2).median_ms for model in (control, int8)]
                 for _ in range(ROUNDS)]  # fmt: skip
        before, after = (float(np.median(times)) for times in zip(*taken, strict=True))
        rows.append({"images": images, "float_ms": round(before, 2), "int8_ms": round(after, 2),
                     "engine": int8.backend, "threads": torch.get_num_threads()})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2])
    parser.add_argument("--speed", action="store_true", help="measure the speed only")
    args = parser.parse_args()
    path = RESULTS / "classic_road.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if args.speed:
        path.write_text(as_json(known | {"speed": speed()}))
        return
    records = measure(args.seeds, tuple(args.bits), args.steps)
    more = {key: known[key] for key in ("speed",) if key in known}
    settings = {"seeds": args.seeds, "steps": args.steps, "bits": args.bits, "rates": list(RATES)}
    print(write_results("classic_road", records, more, **settings))


if __name__ == "__main__":
    main()
