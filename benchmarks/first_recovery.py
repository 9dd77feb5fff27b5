"""First recovery: float control, rounding to nearest and QAT of docs-lm, over several seeds.

    python -m benchmarks.first_recovery          (about forty minutes on two cores)

Fine-tunes docs-lm on the Python language reference. All arms share start, batches, steps and
number of learning-rate trials (on validation, with a seed of its own), and keep the weights that
did best on validation. Writes benchmarks/results/first_recovery.json: one record for each
seed, arm and scheme, with the loss on every test document, so that arms compare in pairs.
Interrupted, the same command goes on after the last finished run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from torch import nn
from tqdm import tqdm

from benchmarks.provenance import RESULTS, write_results
from companion import W2, W3, W4, QuantScheme, convert, fit, load_pretrained, load_task, prepare_qat
from companion.evaluation.language import document_losses
from companion.files import write_atomically
from companion.training.fit import History

SCHEMES = {"W4": W4, "W3": W3, "W2": W2}
RATES = (5e-4, 1e-3, 2e-3)
TUNING_SEED = 100
BATCH, EVERY = 8, 40


def train(
    scheme: QuantScheme | None, lr: float, seed: int, steps: int, task
) -> tuple[nn.Module, History]:
    """Fine-tune from the shipped weights, float or under fake quantization."""
    model = load_pretrained("docs-lm")
    if scheme is not None:
        model = prepare_qat(model, scheme, "absmax")
    history = fit(
        model,
        task.train,
        steps=steps,
        lr=lr,
        seed=seed,
        validate=lambda m: document_losses(m, task.validation).mean,
        validate_every=EVERY,
    )
    return model, history


def record(
    arm: str, name: str, seed: int, lr: float, history: History, model: nn.Module, task
) -> dict:
    """Measure a model on every test document."""
    losses = document_losses(model, task.test)
    best_step, best = min(history.validation, key=lambda entry: entry[1])
    return {
        "arm": arm, "scheme": name, "seed": seed, "lr": lr, "best_step": best_step,
        "validation_loss": best, "validation": history.validation,
        "loss": losses.loss.tolist(), "tokens": losses.tokens.tolist(),
    }  # fmt: skip


class Log:
    """Records kept on disk as they come, so that a finished run is never repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, run: Callable[[], list[dict]]) -> list[dict]:
        if key not in self.records:
            self.records[key] = run()
            write_atomically(self.path, lambda p: p.write_text(json.dumps(self.records)))
        return self.records[key]


def measure(names: list[str], seeds: int, steps: int, tuning_steps: int, log: Log) -> list[dict]:
    """Tune each arm's learning rate, then run all arms for every seed."""
    task = load_task("language-reference", batch_size=BATCH)
    arms: dict[str, QuantScheme | None] = {"float": None} | {name: SCHEMES[name] for name in names}
    bar = tqdm(total=len(arms) * (len(RATES) + seeds), desc="runs")
    chosen, records = {}, []

    def tune(name: str, lr: float) -> list[dict]:
        model, history = train(arms[name], lr, TUNING_SEED, tuning_steps, task)
        return [record("tuning", name, TUNING_SEED, lr, history, model, task)]

    for name in arms:
        trials = []
        for lr in RATES:
            trials += log.get(f"tuning {name} {lr} {tuning_steps}", lambda n=name, r=lr: tune(n, r))
            bar.update()
        chosen[name] = min(trials, key=lambda trial: trial["validation_loss"])["lr"]
        records += [{k: v for k, v in t.items() if k not in ("loss", "tokens")} for t in trials]

    def control(seed: int) -> list[dict]:
        model, history = train(None, chosen["float"], seed, steps, task)
        found = [record("control", "float", seed, chosen["float"], history, model, task)]
        for name in names:  # that control, rounded to nearest
            rounded = convert(prepare_qat(model, SCHEMES[name], "absmax"))
            found.append(record("ptq", name, seed, chosen["float"], history, rounded, task))
        return found

    def qat(name: str, seed: int) -> list[dict]:
        model, history = train(SCHEMES[name], chosen[name], seed, steps, task)
        return [record("qat", name, seed, chosen[name], history, convert(model), task)]

    for seed in range(seeds):
        records += log.get(f"control {seed} {steps} {names}", lambda s=seed: control(s))
        bar.update()
        for name in names:
            records += log.get(f"qat {name} {seed} {steps}", lambda n=name, s=seed: qat(n, s))
            bar.update()
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tuning-steps", type=int, default=60)
    parser.add_argument("--schemes", nargs="+", default=["W4", "W3", "W2"], choices=SCHEMES)
    args = parser.parse_args()
    log = Log(RESULTS / "first_recovery.unfinished.json")
    records = measure(args.schemes, args.seeds, args.steps, args.tuning_steps, log)
    print(write_results("first_recovery", records, rates=RATES, batch=BATCH, **vars(args)))
    log.path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
