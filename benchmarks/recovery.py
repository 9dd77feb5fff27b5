"""docs-lm under rounding: what training takes back, each arm against what it differs from.

    python -m benchmarks.recovery                     (about five hours on two cores)
    python -m benchmarks.recovery --workers 2         (one process on each core: three)
    python -m benchmarks.recovery --costs             (the time of a step of each arm; three minutes)
    python -m benchmarks.recovery --costs blocks      (this one only; the others stay as they are)

100 optimizer steps of 1,024 tokens on docstrings, as docs-lm was pre-trained on, with test excerpts
from other source files and three draws of the training text. There is nothing new to learn: what is
measured is how much of the rounding's damage comes back. Shorter runs show how it
grows with the tokens, and what labels do with the time that a teacher takes. See benchmarks.arms for
what the arms share, and benchmarks/hypotheses.md for the rules. Writes
benchmarks/results/recovery.json.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from dataclasses import replace
from itertools import product
from statistics import median

import torch

from benchmarks.arms import (
    BLOCK_STEPS,
    CALIBRATION,
    FLOAT,
    IMITATING_FLOAT,
    SEEDS,
    W2,
    W3,
    W4,
    Arm,
    Budget,
    Imitation,
    Job,
    Work,
    command,
    prepare_torchao,
    round_with,
)
from benchmarks.excerpts import SIZE, read
from benchmarks.provenance import RESULTS, as_json
from benchmarks.verdicts import Families, judge
from companion import fit, fit_blocks, load_pretrained, prepare_qat
from companion.training.losses import default_loss

BUDGET = Budget((3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3), rows=4, looks=2)
METHODS = ("lsq", "torchao", "absmax")
ROUNDS, STEPS_TIMED = 12, 3
CURVE = (12, 25, 50)
"""Steps of shorter runs, one draw each."""
EQUAL = {"lsq": 228, "torchao": 220}
"""Steps with labels that take the time of the learned step with a teacher, and of training that
teacher first, by `--costs`."""
GENTLE = (1e-5, 3e-5, 1e-4)
"""Rates to begin with where blocks were trained before."""
PAIR = ("W2 g32", "W3 g32")
LEARNED = "lsq calibrated"
FAMILIES: Families = {
    "D": [(s, f"{LEARNED}, {t}, first", f"torchao, {t}, first")
          for s in PAIR for t in ("labels", "teacher")],
    "E": [(s, f"{a}, labels, first", f"{b}, labels, first")
          for s in PAIR for a, b in ((LEARNED, "lsq"), ("lsq", "absmax"))],
    "F": [(s, f"{LEARNED}, teacher, first", f"{LEARNED}, labels, first") for s in PAIR],
    "G": [(s, (f"{LEARNED}, labels, first", f"{LEARNED}, teacher, first"), "gptq")
          for s in (*PAIR, "W4 g32")],
    "H": [(s, f"{LEARNED}, teacher, first", f"{LEARNED}, teacher, late") for s in PAIR],
    "I": [(s, f"{LEARNED}, teacher, blocks", second) for s in PAIR
          for second in (f"{LEARNED}, teacher, first", "autoround")],
    "J": [(s, f"{LEARNED}, teacher, blocks first", f"{LEARNED}, teacher, blocks") for s in PAIR],
}  # fmt: skip
"""As in benchmarks/hypotheses.md."""


def jobs() -> Work:
    """In the order of their weight."""
    learned = Arm("lsq", calibrated=True)
    with_labels = [learned, Arm("torchao"), Arm("lsq"), Arm("absmax")]
    taught = [replace(arm, target="teacher") for arm in with_labels[:2]]
    late = [replace(arm, start="late") for arm in taught]
    queue: list = [Job(FLOAT)]
    queue += [("ptq", scheme, draw) for scheme in (W2, W3, W4) for draw in SEEDS]
    queue += [Job(arm, scheme) for scheme in (W2, W3) for arm in with_labels[:2] + taught]
    queue += [Job(arm, scheme) for scheme in (W2, W3) for arm in with_labels[2:]]
    queue += [Job(IMITATING_FLOAT)]
    queue += [Job(arm, W4) for arm in (with_labels[0], taught[0])]
    queue += [Job(late[0], scheme) for scheme in (W2, W3)]
    queue += [("autoround", scheme, draw) for scheme in (W2, W3) for draw in SEEDS]
    in_blocks = [replace(taught[0], start=start) for start in ("blocks", "blocks first")]
    queue += [Job(in_blocks[0], scheme) for scheme in (W2, W3)]
    queue += [Job(in_blocks[1], scheme, rates=GENTLE) for scheme in (W2, W3)]
    several = [(arm, scheme) for scheme in (W2, W3) for arm in with_labels[:2]]
    queue += [Job(arm, scheme, EQUAL[arm.method]) for arm, scheme in several]
    queue += [Job(arm, scheme, steps, (0,)) for arm, scheme in several for steps in CURVE]
    queue += [Job(arm, W4) for arm in (with_labels[1], taught[1])]
    queue += [Job(late[1], scheme) for scheme in (W2, W3)]
    return queue


def costs() -> dict[str, float]:
    """Time of an optimizer step of each method and target over the float step's, interleaved.

    Of rounding afterwards, all of it over all steps of a float run.
    """
    start = load_pretrained("docs-lm")
    ids = torch.randint(1, start.config.vocab_size, (BUDGET.rows, SIZE))
    teacher = Imitation(copy.deepcopy(start).eval())
    losses = {"labels": default_loss, "teacher": teacher}
    models = {"float": copy.deepcopy(start)}
    models |= {method: prepare_qat(start, W2, method) for method in METHODS if method != "torchao"}
    models["torchao"], _ = prepare_torchao(copy.deepcopy(start), W2)
    taken: dict[str, list[float]] = {}
    for _, (name, target) in product(range(ROUNDS), product(models, losses)):
        began = time.perf_counter()
        fit(models[name], [{"input_ids": ids, "labels": ids}], steps=STEPS_TIMED, lr=1e-5,
            loss_fn=losses[target], progress=False)  # fmt: skip
        taken.setdefault(f"{name}, {target}", []).append(time.perf_counter() - began)
    reference = median(taken["float, labels"])
    found = {name: round(median(times) / reference, 3) for name, times in taken.items()}
    texts = read(None, "docs-lm")
    batches = texts.calibration(CALIBRATION, 2 * BUDGET.rows, start.device)
    whole_run = reference / STEPS_TIMED * BUDGET.steps
    for name in ("gptq", "autoround", "blocks"):
        began = time.perf_counter()
        if name == "blocks":
            rows = texts.calibration(CALIBRATION, BUDGET.rows, start.device)  # as an arm has them
            fit_blocks(prepare_qat(start, W2), rows, teacher=start, batches=len(rows),
                       steps=BLOCK_STEPS, progress=False)  # fmt: skip
        else:
            round_with(name, copy.deepcopy(start), W2, batches)
        found[name] = round((time.perf_counter() - began) / whole_run, 3)
    return found


def more(records: list[dict], packages: list[str]) -> dict:
    """The verdicts on these records, and what an earlier `--costs` measured."""
    path = RESULTS / "recovery.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    found = {"costs": kept["costs"]} if "costs" in kept else {}
    if found:
        methods = {record["method"] for record in records} - {"nearest", "mse"}
        if "blocks" not in kept["costs"]:  # of an earlier state: `--costs` measures it
            methods = {name for name in methods if "blocks" not in name}
        found["time"] = {name: round(cost_of(name, kept["costs"]), 3) for name in sorted(methods)}
    return found | {"verdicts": judge(records, packages, FAMILIES, BUDGET.steps)}


def cost_of(method: str, costs: dict[str, float], late: float = 0.75) -> float:
    """Time of an arm over the float control's, by its name in the results file.

    A teacher's own training is not in it, nor that of the model that is rounded afterwards.

    Examples
    --------
    >>> cost_of("lsq calibrated, teacher, late", {"float, labels": 1.0, "lsq, teacher": 1.4}, late=0.5)
    1.2
    """
    if method in ("gptq", "autoround"):
        return costs[method]
    if method == FLOAT.name:
        return 1.0
    name, target, start = method.split(", ")
    name = name.split(" ")[0]  # a start that was calibrated costs nothing to speak of
    rounded = costs[f"{name}, {target}"]
    if start.startswith("blocks"):
        return costs["blocks"] + (rounded if start == "blocks first" else 0)
    return late * costs["float, labels"] + (1 - late) * rounded if start == "late" else rounded


def add_costs(names: list[str]) -> None:
    """Write the costs, or those named, into the results file, and leave the rest as it is."""
    path = RESULTS / "recovery.json"
    content, found = json.loads(path.read_text()), costs()
    kept = content.get("costs", {}) if names else {}
    content["costs"] = kept | {name: found[name] for name in names or found}
    path.write_text(as_json(content))


if __name__ == "__main__":
    if "--costs" in sys.argv:
        add_costs(sys.argv[sys.argv.index("--costs") + 1 :])
    else:
        command("recovery", "docs-lm", jobs(), BUDGET, __doc__, more)
