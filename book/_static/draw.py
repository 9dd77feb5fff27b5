"""Draw the logo, the icon, the cover and the README's picture.

python book/_static/draw.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Polygon, Rectangle

from companion.course.figures import estimates_by_bits
from companion.evaluation.estimates import proportion

HERE = Path(__file__).parent
GOLD, DARK, GREEN, PALE = "#E9B949", "#8A6410", "#2E7D5B", "#DDEFE6"


def road(
    ax, widths, x0=0.0, y0=0.0, length=8.0, start=2.2, end=0.55, label=True
):
    """Lay rows of bricks that narrow towards the horizon: each row has fewer of them."""
    edges = np.linspace(0, 1, len(widths) + 1) ** 0.8
    for row, bits in enumerate(widths):
        bottom, top = edges[row], edges[row + 1]
        half = [start + (end - start) * t for t in (bottom, top)]
        y = [y0 + length * t for t in (bottom, top)]
        shown = min(bits, 16)
        for brick in range(shown):
            left, right = 2 * brick / shown - 1, 2 * (brick + 1) / shown - 1
            ax.add_patch(Polygon(
                [(x0 + left * half[0], y[0]), (x0 + right * half[0], y[0]),
                 (x0 + right * half[1], y[1]), (x0 + left * half[1], y[1])],
                facecolor=GOLD, edgecolor=DARK, linewidth=1.0,
            ))  # fmt: skip
        if label:
            ax.text(x0 + np.mean(half) + 0.25, np.mean(y), f"{bits} bits", va="center",
                    color=DARK, fontsize=13 - row)  # fmt: skip


def city(ax, x0, y0, scale=1.0):
    """Draw the towers of the green city."""
    for dx, width, height in [(-1.1, 0.4, 0.9), (-0.6, 0.5, 1.5), (0, 0.6, 2.1), (0.65, 0.5, 1.4),
                              (1.15, 0.4, 0.8)]:  # fmt: skip
        left, wide, high = (
            x0 + scale * (dx - width / 2),
            scale * width,
            scale * height,
        )
        ax.add_patch(Rectangle((left, y0), wide, high, color=GREEN))
        ax.add_patch(Polygon([(left, y0 + high), (left + wide, y0 + high),
                              (left + wide / 2, y0 + high + 0.45 * scale)], color=GREEN))  # fmt: skip


def canvas(width, height, x, y, face="white"):
    fig = plt.figure(
        figsize=(width / 100, height / 100), dpi=100, facecolor=face
    )
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=x, ylim=y)
    ax.axis("off")
    return fig, ax


def cover():
    fig, ax = canvas(800, 420, (-7.6, 7.6), (0, 8), PALE)
    ax.add_patch(Rectangle((-7.6, 0), 15.2, 5.0, color="#BFE0CF", zorder=0))
    city(ax, 3.9, 4.9, 1.15)
    road(ax, [32, 16, 8, 4, 2], x0=3.9, length=4.95)
    ax.text(-7.2, 7.2, "The Yellow Brick Road to Few Bits", fontsize=17, color="#14402D",
            weight="bold")  # fmt: skip
    ax.text(
        -7.2,
        6.65,
        "quantization-aware fine-tuning in PyTorch",
        fontsize=12,
        color="#14402D",
    )
    fig.savefig(HERE / "cover.png")


def icons():
    for name, size in (("logo.png", 400), ("favicon.png", 64)):
        fig, ax = canvas(size, size, (-2.6, 2.6), (-0.2, 7.2))
        fig.patch.set_alpha(0)
        city(ax, 0, 4.2, 1.2)
        road(ax, [8, 4, 2], length=4.3, label=False)
        fig.savefig(HERE / name)


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
    cover()
    icons()
    results()
