"""The learning rates of chapter 10: three trials for either arm, measured on validation.

    python -m benchmarks.first_rates          (about ten minutes on two cores)

docs-lm on the Python language reference, in floating point and under two bits, as in the chapter but
with a seed of its own. Writes benchmarks/results/first_rates.json.
"""

from __future__ import annotations

from benchmarks.provenance import write_results
from companion import W2, load_task
from companion.study.compare import trial
from companion.study.recipes import ARMS, FLOAT

RATES, STEPS = (5e-4, 1e-3, 2e-3), 60


def main() -> None:
    task = load_task("language-reference")
    records = []
    for name, scheme, arm in (("float", None, FLOAT), ("W2", W2, ARMS["absmax"])):
        for rate in RATES:
            found = trial("docs-lm", task, scheme, arm, steps=STEPS, rate=rate)
            records.append({"arm": name, "lr": rate} | {
                key: found[key] for key in ("seed", "steps", "validation_loss", "validation")
            })  # fmt: skip
    print(write_results("first_rates", records, rates=RATES, steps=STEPS))


if __name__ == "__main__":
    main()
