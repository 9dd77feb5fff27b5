"""Networks that round while they train: stages, blocks, gradients, memory."""

from __future__ import annotations

import math

from .style import (
    LEFT,
    RIGHT,
    SMALL,
    arrow,
    brick,
    dot,
    head,
    line,
    lines,
    path,
    picture,
    rect,
    text,
)


def prepare_train_convert() -> str:
    """Draw the three stages, and what a weight is in each of them."""
    stages = [
        ("1 prepare", "floats; a rounding block is put in"),
        ("2 train", "floats move, rounded at every use"),
        ("3 convert", "integers, for good"),
    ]  # fmt: skip
    parts = []
    for i, (name, note) in enumerate(stages):
        y = 138 * i
        parts.append(
            rect(LEFT, y, RIGHT - LEFT, 108, stroke="rule", radius=8)
        )
        parts.append(text(LEFT + 16, y + 30, name, bold=True))
        parts.append(
            text(LEFT + 16, y + 92, note, size=SMALL, fill="muted")
        )
        if i < 2:
            parts.append(arrow(LEFT + 40, y + 110, LEFT + 40, y + 136))
    x = 182
    for i in (0, 1):
        y = 138 * i + 14
        parts.append(brick(x, y, 72, 40, "0.18", fill="wheat"))
        parts.append(arrow(x + 76, y + 20, x + 100, y + 20, weight=2))
        parts.append(brick(x + 102, y, 64, 40, "round", fill="card", stroke="red", weight=2.5))  # fmt: skip
        parts.append(arrow(x + 170, y + 20, x + 194, y + 20, weight=2))
        parts.append(brick(x + 196, y, 66, 40, "0.137", fill="wheat"))
    y = 138 + 14
    parts.append(path(f"M{x + 228} {y + 46}C{x + 200} {y + 64} {x + 70} {y + 64} {x + 38} {y + 50}", stroke="emerald"))  # fmt: skip
    parts.append(head(x + 36, y + 45, -2.2, "emerald"))
    y = 276 + 14
    parts.append(brick(x + 102, y, 64, 40, "1", size=20, bold=True))
    parts.append(text(x + 181, y + 27, "×", size=20, anchor="middle"))
    parts.append(brick(x + 196, y, 66, 40, "0.137", fill="wheat"))
    parts.append(text(LEFT, 416, "Converted first, there is no float left to move.", size=SMALL, fill="red"))  # fmt: skip
    return picture(["Integers come last, because", "an integer cannot learn"], 420, *parts)  # fmt: skip


def batch_norm_folding() -> str:
    """Draw one channel of a convolution and its batch norm, apart and folded."""
    parts = [text(LEFT, 16, "apart", bold=True)]

    def block(
        x: float, y: float, w: float, name: str, what: str, fill: str
    ) -> None:
        parts.append(
            rect(x, y, w, 72, fill=fill, stroke="mortar", radius=6)
        )
        parts.append(
            text(x + w / 2, y + 30, name, anchor="middle", bold=True)
        )
        parts.append(
            text(x + w / 2, y + 56, what, anchor="middle", size=SMALL)
        )

    def between(x: float, y: float, value: str) -> None:
        parts.append(arrow(x, y + 36, x + 50, y + 36, weight=2))
        parts.append(text(x + 22, y + 24, value, anchor="middle", size=SMALL, fill="red"))  # fmt: skip

    y = 30
    between(LEFT, y, "2")
    block(78, y, 104, "conv", "0.3 · x", "wheat")
    between(185, y, "0.6")
    block(238, y, 164, "batch norm", "2 · (x − 0.5) + 0.1", "mint")
    between(405, y, "0.3")
    parts.append(text(LEFT, 150, "folded", bold=True))
    y = 164
    between(LEFT, y, "2")
    block(78, y, 324, "one convolution", "0.6 · x − 0.9", "wheat")
    between(405, y, "0.3")
    parts.append(lines(LEFT, 274, ["weight 2 · 0.3 = 0.6", "bias 0.1 − 2 · 0.5 = −0.9"], size=SMALL, leading=26))  # fmt: skip
    return picture(["Batch norm folds into the", "convolution, unchanged"], 304, *parts)  # fmt: skip


def fake_quant() -> str:
    """Draw the block that rounds a weight on the way forward and lets the gradient back."""
    parts = []
    mid = 240
    # forward: downwards on the left, backward: upwards on the right
    rows = [
        (0, "weight 0.9, a float", "wheat"),
        (114, "÷ 0.5 = 1.8", "card"),
        (184, "round, clip: 2", "brick"),
        (254, "× 0.5 = 1.0", "card"),
        (368, "the layer computes with 1.0", "wheat"),
    ]
    parts.append(
        rect(LEFT + 56, 96, 320, 222, stroke="red", radius=10, weight=2.5)
    )
    for y, label, fill in rows:
        wide = 264 if fill == "wheat" else 196
        parts.append(brick(mid - wide / 2, y, wide, 46, label, fill=fill, bold=fill == "brick"))  # fmt: skip
    for a, b in ((48, 110), (162, 182), (232, 252), (302, 364)):
        parts.append(arrow(mid - 60, a, mid - 60, b, weight=2.5))
    parts.append(
        arrow(mid + 122, 366, mid + 122, 50, stroke="emerald", weight=3)
    )
    parts.append(text(LEFT, 76, "forward", size=SMALL, bold=True))
    parts.append(text(RIGHT, 76, "gradient", size=SMALL, fill="emerald", anchor="end", bold=True))  # fmt: skip
    parts.append(
        text(LEFT, 350, "fake quantization", size=SMALL, fill="red")
    )
    return picture(["The layer sees the brick,", "the optimizer moves the float"], 416, *parts)  # fmt: skip


def straight_through() -> str:
    """Draw the end of a four-bit road, and which weights a gradient reaches."""
    parts, unit = [], 74

    def at(steps: float) -> float:
        return LEFT + unit * (steps - 4.5)

    for q in (5, 6, 7):
        parts.append(
            brick(at(q - 0.5) + 1, 128, unit - 2, 46, str(q), size=20)
        )
    parts.append(rect(at(7.5) + 1, 128, RIGHT - at(7.5) - 1, 46, stroke="rule", dash="4 5"))  # fmt: skip
    parts.append(text((at(7.5) + RIGHT) / 2, 157, "no brick", size=SMALL, fill="muted", anchor="middle"))  # fmt: skip
    parts.append(text(LEFT, 20, "the same gradient for every weight", size=SMALL, fill="emerald"))  # fmt: skip
    cases = ((5.3, "5.3", 1), (7.3, "7.3", 1), (8.4, "8.4", 0))
    for steps, label, slope in cases:
        x = at(steps)
        parts.append(arrow(x, 32, x, 74, stroke="emerald", weight=3))
        parts.append(dot(x, 94, "ink" if slope else "red", 8))
        parts.append(
            text(
                x + 14,
                100,
                label,
                bold=True,
                fill="ink" if slope else "red",
            )
        )
    for y, name, answers, fill in (
        (
            206,
            "what arrives, by the true slope of a stair",
            (0, 0, 0),
            "idle",
        ),
        (296, "what arrives, straight through", (1, 1, 0), "mint"),
    ):
        parts.append(text(LEFT, y + 16, name, size=SMALL))
        parts.append(
            rect(LEFT, y + 26, RIGHT - LEFT, 44, fill=fill, radius=6)
        )
        for (steps, _, _), answer in zip(cases, answers, strict=True):
            parts.append(text(at(steps), y + 55, f"× {answer}", size=20, anchor="middle", bold=True))  # fmt: skip
    return picture(["On the road every weight is", "told, beyond its end none is"], 370, *parts)  # fmt: skip


def training_memory() -> str:
    """Draw the bytes that a parameter takes, from serving to training with a teacher."""
    unit = (RIGHT - LEFT) / 20
    rows = [
        ("to serve, float32", "4 bytes", [("weight", 4, "wheat")]),
        (
            "to serve, 4 bits in groups of 32",
            "0.56 bytes",
            [("", 0.5625, "brick")],
        ),
        (
            "to train with AdamW",
            "16 bytes",
            [("weight", 4, "wheat"), ("two moments", 8, "mint"), ("gradient", 4, "rose")],
        ),
        (
            "with the float model as teacher",
            "20 bytes",
            [("", 4, "wheat"), ("", 8, "mint"), ("", 4, "rose"), ("teacher", 4, "idle")],
        ),
    ]  # fmt: skip
    parts = []
    for row, (name, total, pieces) in enumerate(rows):
        y, x = 92 * row, float(LEFT)
        parts.append(text(LEFT, y + 16, name, size=SMALL))
        for label, bytes_, fill in pieces:
            wide = unit * bytes_
            parts.append(
                brick(x, y + 28, wide, 42, label, fill=fill, size=SMALL)
            )
            x += wide
        parts.append(
            text(RIGHT, y + 16, total, bold=True, anchor="end", size=SMALL)
        )
    y = 92 * len(rows)
    parts.append(text(LEFT, y + 16, "beside these: activations, with every token", size=SMALL))  # fmt: skip
    for i in range(6):
        wide = 62 - 6 * i
        x = LEFT + sum(62 - 6 * j + 5 for j in range(i))
        parts.append(rect(x, y + 28, wide, 42, stroke="muted", dash="4 5"))
    parts.append(arrow(LEFT + 322, y + 49, RIGHT, y + 49, stroke="muted"))
    return picture(["Half of what training takes", "is the optimizer’s"], y + 74, *parts)  # fmt: skip


def weights_read() -> str:
    """Draw the bytes of a weight as queues of different length before one gate."""
    rows = [
        ("float32", "4 bytes", 4.0, "wheat"),
        ("8 bits", "1 + 4/32 = 1.125", 1.125, "brick"),
        ("4 bits", "1/2 + 4/32 = 0.625", 0.625, "brick"),
        ("2 bits", "1/4 + 4/32 = 0.375", 0.375, "brick"),
    ]
    gate, unit, parts = RIGHT - 34, 84, []
    parts.append(text(LEFT, 16, "bytes of one weight, from memory", size=SMALL, fill="muted"))  # fmt: skip
    for row, (name, note, bytes_, fill) in enumerate(rows):
        y = 46 + 84 * row
        parts.append(text(LEFT, y + 2, name, bold=True, size=SMALL))
        parts.append(text(gate - 26, y + 2, note, size=SMALL, anchor="end"))
        x = gate - 26 - unit * bytes_
        parts.append(brick(x, y + 12, unit * bytes_, 34, fill=fill))
        for whole in range(1, math.ceil(bytes_)):
            parts.append(line(x + unit * (bytes_ - whole), y + 12, x + unit * (bytes_ - whole), y + 46, stroke="mortar", weight=1))  # fmt: skip
        parts.append(arrow(gate - 22, y + 29, gate - 3, y + 29, weight=2))
    parts.append(rect(gate, 30, 34, 84 * len(rows) - 24, fill="mint", stroke="emerald", radius=6))  # fmt: skip
    parts.append(
        text(
            RIGHT, 16, "processor", size=SMALL, fill="emerald", anchor="end"
        )
    )
    return picture(["A token waits until every", "weight has been read"], 346, *parts)  # fmt: skip
