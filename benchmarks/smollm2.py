"""SmolLM2-135M under rounding: what training takes back, each arm against what it differs from.

    python -m benchmarks.smollm2                      (days on two cores; minutes on one GPU)
    python -m benchmarks.smollm2 --workers 4          (four processes share one GPU)
    python -m benchmarks.smollm2 --small              (tries every kind of run for four steps)

100 optimizer steps of 2,048 tokens on docstrings, 261 test excerpts, three draws of the training
text. See benchmarks.arms for what the arms share, and benchmarks/hypotheses.md for the rules.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.arms import (
    FLOAT,
    IMITATING_FLOAT,
    SEEDS,
    W2,
    W3,
    W4,
    Arm,
    Budget,
    Job,
    Work,
    command,
)
from benchmarks.verdicts import Families, judge
from companion import QuantScheme

LONG = 600
"""Steps of the longest run of the curve."""
BUDGET = Budget((2e-5, 6e-5, 2e-4), (5e-5, 1.5e-4, 5e-4), bfloat16=True)
W4_ROW = QuantScheme(4, None)
AROUND = (1.5e-4, 5e-4, 1.5e-3)
"""Rates that the calibrated arm begins with: around the best of the plain one."""
LEARNED, TORCHAO = Arm("lsq", calibrated=True), Arm("torchao")
DEFAULT = replace(LEARNED, target="teacher", start="late")
TORCHAO_DEFAULT = replace(DEFAULT, method="torchao", calibrated=False)

NAME, PAIR = LEARNED.name.split(", ")[0], ("W2 g32", "W3 g32")
BITS = {"W2 g32": "two", "W3 g32": "three", "W4 g32": "four"}
COMPARED = ("labels, first", "teacher, late")
FAMILIES: Families = {
    **{f"A, {bits} bits": [(s, f"{NAME}, {how}", f"torchao, {how}") for how in COMPARED]
       for s, bits in BITS.items()},
    **{f"B, {bits} bits": [(s, tuple(f"{NAME}, {how}" for how in COMPARED), "gptq")]
       for s, bits in BITS.items()},
    "C": [(s, f"{NAME}, labels, first", f"{NAME}, labels, late") for s in PAIR],
}  # fmt: skip
"""As in benchmarks/hypotheses.md."""


def verdicts(records: list[dict], packages: list[str]) -> dict:
    return {"verdicts": judge(records, packages, FAMILIES, BUDGET.steps)}


def jobs() -> Work:
    """In the order of their weight: what is cut off by the time matters least."""
    plain = Arm("lsq")
    taught = [replace(arm, target="teacher") for arm in (LEARNED, TORCHAO)]
    late = [replace(arm, start="late") for arm in (LEARNED, TORCHAO)]
    queue: list = [Job(FLOAT)]
    for s in (W2, W3):
        queue += [Job(LEARNED, s, rates=AROUND), Job(TORCHAO, s)]
        queue += [("ptq", s, draw) for draw in SEEDS]
        queue += [Job(arm, s) for arm in (DEFAULT, TORCHAO_DEFAULT)]
    queue += [Job(arm, W4) for arm in (LEARNED, TORCHAO)]
    queue += [("ptq", W4, draw) for draw in SEEDS]
    queue += [Job(arm, W4) for arm in (DEFAULT, TORCHAO_DEFAULT)]
    queue += [Job(IMITATING_FLOAT)]
    queue += [Job(arm, s) for s in (W2, W3) for arm in late]
    queue += [Job(arm, s) for s in (W2, W3) for arm in taught]
    # levers: where the learned steps start, how fast they move, absmax; on validation only
    queue += [Job(plain, s, draws=()) for s in (W2, W3, W4)]
    queue += [Job(replace(plain, step_rate=10.0), s, draws=()) for s in (W2, W3)]
    queue += [Job(replace(LEARNED, step_rate=10.0), s, draws=()) for s in (W2, W3)]
    queue += [Job(Arm("absmax"), s, draws=()) for s in (W2, W3)]
    queue += [Job(FLOAT, None, LONG, (0,))]
    queue += [Job(arm, s, LONG, (0,)) for s in (W2, W3) for arm in (LEARNED, TORCHAO)]
    queue += [Job(arm, W4_ROW) for arm in (LEARNED, TORCHAO, DEFAULT, TORCHAO_DEFAULT)]
    queue += [("ptq", W4_ROW, draw) for draw in SEEDS]
    return queue


if __name__ == "__main__":
    command("smollm2", "smollm2", jobs(), BUDGET, __doc__, verdicts)
