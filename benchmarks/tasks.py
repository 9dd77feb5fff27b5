"""Five language tasks: what rounding costs each, and what training under rounding gives back.

    python -m benchmarks.tasks                   (about two hours on two cores)
    python -m benchmarks.tasks topics cloze      (only these; the others keep what the file has)

Float control, post-training and quantization-aware training from the same start, at equal steps.
Which way QAT goes is fixed beforehand by the rule of chapter 11: a model that knows its task
already imitates itself from the first step; one with a freshly drawn head learns from the labels,
and rounds from the first step, too. Learning rates are tried at two bits in groups, two for each arm, on
validation, seed 100. The rows of the language model are of an earlier study, and stay as they are.
Writes benchmarks/results/tasks.json: ``records`` (one for each task, scheme, arm and seed),
``baselines``, ``runs`` and the ``levers``. Interrupted, the same command goes on after the last
finished run.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import numpy as np

from benchmarks.provenance import RESULTS, write_results
from companion import W8A8, QuantScheme, compare, load_pretrained, load_task, prepare_qat
from companion.course.baselines import BASELINES
from companion.course.sources import MINILM
from companion.evaluation.estimates import Scores
from companion.study.recipes import Arm
from companion.study.tables import scheme_name

TUNED = QuantScheme(2)
TRAINED = (QuantScheme(4), QuantScheme(3, None), QuantScheme(2), QuantScheme(2, None))
SCHEMES = (W8A8, *TRAINED)  # at eight bits there is nothing to train for: chapter 14
LEARNED = Arm("lsq", lambda model, scheme, task, skip: prepare_qat(model, scheme, skip=skip))
IMITATION = replace(LEARNED, name="imitation", distil=True)
"""The learned step size, with the start of the run as the teacher."""
POST_TRAINING = ("nearest", "gptq")
LOG = RESULTS / "tasks.unfinished.json"
LANGUAGE = "language-reference"
STUDIES = {  # task: model, head, how QAT goes, learning rates, options of the task
    "cloze": ("docs-lm", None, IMITATION, (1e-4, 1e-3), {"block_size": 128, "batch_size": 4}),
    "topics": (MINILM, "classification", LEARNED, (1e-4, 3e-4), {}),
    "summaries": (MINILM, "retrieval", IMITATION, (1e-4, 3e-4), {}),
    "code-words": (MINILM, "tokens", LEARNED, (1e-4, 3e-4), {}),
}
SKIP = ("classifier", "pooler")


def study(name: str, steps: int, seeds: int) -> tuple[list[dict], list[dict]]:
    """The runs and the trials of one task."""
    model_name, head, method, rates, options = STUDIES[name]
    task = load_task(name, **options)
    sized = {"classes": len(task.classes)} if task.classes else {}
    model = load_pretrained(model_name, head=head, **sized)
    present = {part for module, _ in model.named_modules() for part in module.split(".")}
    common = {"steps": steps, "log": LOG, "skip": [part for part in SKIP if part in present]}
    tuned = compare(model, task, [TUNED], [method], seeds=0, rates=rates, **common).attrs["rates"]
    chosen = {"float": tuned["float"]} | {
        f"{method.name} {scheme_name(scheme)}": tuned[f"{method.name} {scheme_name(TUNED)}"]
        for scheme in TRAINED
    }
    common |= {"seeds": seeds, "rates": chosen}
    rounded = compare(model, task, SCHEMES, ["gptq"], **common).attrs["runs"]
    trained = compare(model, task, TRAINED, [method], **common).attrs["runs"]
    runs = rounded + [run for run in trained if run["method"] == method.name]
    log = json.loads(LOG.read_text())
    trials = [run for key, run in log.items()
              if key.endswith("validation") and run["task"] == name]  # fmt: skip
    return runs, trials


def records(runs: list[dict], baselines: dict[str, dict]) -> list[dict]:
    """One line for each task, scheme, arm and seed: its value, and those it is compared with.

    The best post-training method of a scheme is the one with the lower validation loss over
    all seeds.
    """
    found = {(r["task"], r["scheme"], r["method"], r["seed"]): r for r in runs}
    scores = {key: Scores(np.array(r["total"]), np.array(r["weight"])) for key, r in found.items()}
    lines = []
    for (task, scheme, method, seed), run in found.items():
        estimate = scores[task, scheme, method, seed].estimate()
        line = {
            "model": run["model"], "task": task, "scheme": scheme, "method": method, "seed": seed,
            "steps": run["steps"], "lr": run["lr"], "metric": run["metric"],
            "value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n,
            "baseline": baselines[task]["value"],
        }  # fmt: skip
        if method != "float":
            control = scores[task, "float", "float", seed].value
            nearest = scores[task, scheme, "nearest", seed].value
            best = scores[task, scheme, best_post_training(runs, task, scheme), seed].value
            recovered = (
                (nearest - estimate.value) / (nearest - control) if nearest != control else None
            )
            line |= {"float": control, "ptq": nearest, "best_ptq": best, "qat": estimate.value,
                     "recovered": recovered}  # fmt: skip
        lines.append(line)
    return lines


def best_post_training(runs: list[dict], task: str, scheme: str) -> str:
    """The post-training method with the lowest validation loss, over all seeds."""
    losses: dict[str, list[float]] = {}
    for run in runs:
        if (run["task"], run["scheme"]) == (task, scheme) and run["method"] in POST_TRAINING:
            losses.setdefault(run["method"], []).append(run["validation_loss"])
    return min(losses, key=lambda method: sum(losses[method]))


def baseline(task: str) -> dict:
    """The strongest simple answer to a task, with its scores on every example."""
    name, measure = BASELINES[task]
    scores = measure()
    estimate = scores.estimate()
    return {"name": name, "value": estimate.value, "low": estimate.low, "high": estimate.high,
            "n": estimate.n, "total": [round(float(x), 4) for x in scores.total],
            "weight": scores.weight.tolist()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*", choices=[[], *STUDIES], help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    path = RESULTS / "tasks.json"
    known = json.loads(path.read_text()) if path.exists() else {"runs": [], "levers": []}
    runs = {name: [r for r in known["runs"] if r["task"] == name] for name in STUDIES}
    levers = {name: [r for r in known["levers"] if r["task"] == name] for name in STUDIES}
    for name in args.tasks or STUDIES:
        runs[name], levers[name] = study(name, args.steps, args.seeds)
    everything = [run for run in known["runs"] if run["task"] == LANGUAGE]
    everything += [run for found in runs.values() for run in found]
    done = dict.fromkeys(run["task"] for run in everything)
    baselines = {task: baseline(task) for task in done}
    more = {"baselines": baselines, "runs": everything,
            "levers": [run for found in levers.values() for run in found]}  # fmt: skip
    print(write_results("tasks", records(everything, baselines), more,
                        seeds=args.seeds, steps=args.steps))  # fmt: skip
    if all(runs.values()):
        LOG.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
