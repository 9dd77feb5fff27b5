"""Draw the README's picture of results; book/_art draws the cover and the tale.

python book/_static/draw.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np

from companion.course.figures import estimates_by_bits
from companion.evaluation.estimates import proportion

HERE = Path(__file__).parent


def results():
    path = HERE.parents[1] / "benchmarks" / "results" / "classic_road.json"
    records = json.loads(path.read_text())["records"]
    shown = {
        "QAT": "qat",
        "PTQ, with care": "ptq searched",
        "PTQ, plain": "ptq",
    }

    def pooled(arm, bits):
        asked = (arm, bits, 0.02)
        chosen = [
            r for r in records if (r["arm"], r["bits"], r["lr"]) == asked
        ]
        return proportion(np.array([p == y for r in chosen
                                    for p, y in zip(r["predictions"], r["labels"], strict=True)]))  # fmt: skip

    fig = estimates_by_bits(
        {name: {b: pooled(arm, b) for b in (8, 4, 2)} for name, arm in shown.items()},
        ylabel="accuracy", reference=("float fine-tune", pooled("float", 32)),
    )  # fmt: skip
    fig.savefig(HERE / "results.png", dpi=110)


if __name__ == "__main__":
    results()
