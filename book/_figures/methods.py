"""The methods of chapter 11: ranges that are learned, teachers, adapters, compensation."""

from __future__ import annotations

from .style import (
    LEFT,
    RIGHT,
    SMALL,
    arrow,
    brick,
    dot,
    line,
    lines,
    picture,
    rect,
    signed,
    text,
)


def learned_step() -> str:
    """Draw three weights over a road of four bricks, and the two gradients of each."""
    parts, unit = [], 72

    def at(steps: float) -> float:
        return LEFT + unit * (steps + 3.45)

    for q in (-2, -1, 0, 1):
        parts.append(
            brick(at(q - 0.5) + 1, 76, unit - 2, 46, signed(q), size=20)
        )
    cases = ((-3.0, -2, "clipped"), (0.6, 1, "inside"), (2.0, 1, "clipped"))
    for steps, q, kind in cases:
        out = kind == "clipped"
        parts.append(dot(at(steps), 44, "red" if out else "ink", 8))
        parts.append(text(at(steps), 24, f"{signed(f'{steps:g}')} s", size=SMALL, anchor="middle", bold=True, fill="red" if out else "ink"))  # fmt: skip
        parts.append(
            line(at(steps), 52, at(q), 76, stroke="red" if out else "ink")
        )
    parts.append(arrow(at(-0.5), 142, at(0.5), 142, weight=2))
    parts.append(arrow(at(0.5), 142, at(-0.5), 142, weight=2))
    parts.append(
        text(at(0), 168, "step s, a parameter", size=SMALL, anchor="middle")
    )
    for y, name, answers, fill in (
        (194, "gradient that reaches the weight", ("0", "1", "0"), "idle"),
        (284, "gradient that reaches the step", ("−2", "0.4", "1"), "mint"),
    ):
        parts.append(text(LEFT, y + 16, name, size=SMALL))
        parts.append(
            rect(LEFT, y + 26, RIGHT - LEFT, 44, fill=fill, radius=6)
        )
        for (steps, _, _), answer in zip(cases, answers, strict=True):
            parts.append(text(at(steps), y + 55, answer, size=20, anchor="middle", bold=True))  # fmt: skip
    parts.append(text(LEFT, 384, "inside: round(0.6) − 0.6 = 0.4", size=SMALL, fill="muted"))  # fmt: skip
    return picture(["A weight beyond the road", "pulls at the step instead"], 390, *parts)  # fmt: skip


def teacher_student() -> str:
    """Draw what a label says about the next word beside what a teacher says."""
    words = ("value", "result", "list", "number", "banana")
    soft, parts = (0.46, 0.27, 0.16, 0.09, 0.02), []
    parts.append(text(LEFT, 18, "“… and returns the ___”", bold=True))
    x, wide = LEFT + 84, 118
    parts.append(text(x, 58, "the label", size=SMALL, fill="muted"))
    parts.append(
        text(x + 150, 58, "the float model", size=SMALL, fill="muted")
    )
    for i, (word, p) in enumerate(zip(words, soft, strict=True)):
        y = 74 + 44 * i
        parts.append(text(LEFT, y + 21, word, size=SMALL))
        parts.append(rect(x, y, wide, 30, stroke="rule"))
        if i == 0:
            parts.append(
                rect(x, y, wide, 30, fill="brick", stroke="mortar")
            )
        parts.append(rect(x + 150, y, 198, 30, stroke="rule"))
        parts.append(rect(x + 150, y, 198 * p / 0.5, 30, fill="emerald"))
    parts.append(
        lines(x, 314, ["one word right,", "the rest wrong"], size=SMALL)
    )
    parts.append(lines(x + 150, 314, ["how likely each one is,", "nonsense included"], size=SMALL, fill="emerald"))  # fmt: skip
    parts.append(line(LEFT, 362, RIGHT, 362, weight=1))
    parts.append(text(LEFT, 388, "The rounded model imitates the right column.", size=SMALL))  # fmt: skip
    return picture(["A label names one word,", "a teacher rates them all"], 394, *parts)  # fmt: skip


def lora() -> str:
    """Draw a weight and its adapter, added after the rounding and before it."""
    parts, unit, first = [], 72, LEFT + 36

    def at(steps: float) -> float:
        return first + unit * steps

    def road(y: float, chosen: int | None) -> None:
        for q in range(6):
            fill = "brick" if q == chosen else "wheat"
            parts.append(
                brick(
                    at(q - 0.5) + 1,
                    y,
                    unit - 2,
                    38,
                    signed(q - 2),
                    fill=fill,
                )
            )

    w, delta = 1.2, 1.45
    parts.append(text(LEFT, 16, "outside: fq(W) + BA", bold=True))
    road(96, None)
    parts.append(dot(at(w), 46, "ink", 7))
    parts.append(text(at(w) - 14, 52, "W", bold=True, anchor="end"))
    parts.append(line(at(w), 54, at(1), 92, stroke="ink"))
    parts.append(
        arrow(at(1), 82, at(1 + delta) - 9, 82, stroke="red", weight=3)
    )
    parts.append(text(at(1 + delta / 2) + 12, 68, "BA", fill="red", bold=True, anchor="middle"))  # fmt: skip
    parts.append(dot(at(1 + delta), 82, "red", 7))
    parts.append(text(at(1 + delta) + 16, 76, "between two bricks", size=SMALL, fill="red"))  # fmt: skip
    parts.append(text(LEFT, 160, "to store it, round once more, unpractised", size=SMALL, fill="muted"))  # fmt: skip
    y = 196
    parts.append(text(LEFT, y + 16, "inside: fq(W + BA)", bold=True))
    road(y + 96, 3)
    parts.append(dot(at(w), y + 52, "ink", 7))
    parts.append(text(at(w) - 14, y + 58, "W", bold=True, anchor="end"))
    parts.append(arrow(at(w) + 10, y + 52, at(w + delta) - 9, y + 52, stroke="emerald", weight=3))  # fmt: skip
    parts.append(text(at(w + delta / 2), y + 44, "BA", fill="emerald", bold=True, anchor="middle"))  # fmt: skip
    parts.append(dot(at(w + delta), y + 52, "emerald", 7))
    parts.append(
        line(at(w + delta), y + 60, at(3), y + 92, stroke="emerald")
    )
    parts.append(text(at(w + delta) + 18, y + 58, "then round", size=SMALL, fill="emerald"))  # fmt: skip
    parts.append(text(LEFT, y + 160, "on a brick: trained is what is stored", size=SMALL, fill="muted"))  # fmt: skip
    return picture(["Inside the rounding, the sum", "still ends on a brick"], y + 166, *parts)  # fmt: skip


def gptq() -> str:
    """Draw columns rounded one after the other, and the example of two of them."""
    parts, cell = [], 54
    columns = (
        "brick",
        "brick",
        "red",
        "wheat",
        "wheat",
        "wheat",
        "wheat",
        "wheat",
    )
    for row in range(3):
        for i, fill in enumerate(columns):
            parts.append(rect(LEFT + cell * i, 66 + 34 * row, cell, 34, fill=fill, stroke="mortar", radius=0))  # fmt: skip
    x = LEFT + 2.5 * cell
    for i in range(3, 8):
        there = LEFT + cell * (i + 0.5)
        top = 34 - 4 * (i - 3)
        parts.append(
            f'<path d="M{x} 58C{x} {top} {there} {top} {there} 54" fill="none" '
            'stroke="var(--fig-red, #b3202c)" stroke-width="2"/>'
        )
        parts.append(
            f'<path d="M{there - 6} 50L{there + 6} 50L{there} 63Z" fill="var(--fig-red, #b3202c)"/>'
        )
    parts.append(text(LEFT, 194, "rounded", size=SMALL))
    parts.append(text(x, 194, "now", size=SMALL, anchor="middle", fill="red", bold=True))  # fmt: skip
    parts.append(text(LEFT + 3 * cell + 10, 194, "floats, moved against it", size=SMALL))  # fmt: skip
    parts.append(line(LEFT, 214, RIGHT, 214, weight=1))
    unit = 190
    rows = (
        (240, "two weights, 0.6 each", (0.6, 0.6), "wheat", "1.2", "ink"),
        (318, "each to its nearest: 1 + 1", (1, 1), "brick", "2", "red"),
        (396, "the second makes up: 1 + 0", (1,), "brick", "1", "emerald"),
    )
    for y, name, bars, fill, total, ink in rows:
        parts.append(text(LEFT, y + 14, name, size=SMALL))
        left = float(LEFT)
        for bar in bars:
            parts.append(
                rect(
                    left, y + 24, unit * bar, 30, fill=fill, stroke="mortar"
                )
            )
            left += unit * bar
        parts.append(
            text(left + 12, y + 46, total, bold=True, fill=ink, size=20)
        )
    parts.append(line(LEFT + 1.2 * unit, 258, LEFT + 1.2 * unit, 460, stroke="ink", dash="3 6"))  # fmt: skip
    return picture(["The next columns make up", "for the error of this one"], 464, *parts)  # fmt: skip


def smoothquant() -> str:
    """Draw a loud channel divided, its column multiplied, and a product that stays."""
    parts = []
    loud, calm = (8, 64, 8, 8), (8, 8, 8, 8)
    quiet, busy = (8, 1, 8, 8), (8, 8, 8, 8)

    def bars(x: float, y: float, values, unit: float, fills) -> None:
        for i, (value, fill) in enumerate(zip(values, fills, strict=True)):
            tall = max(unit * value, 3)
            parts.append(rect(x + 48 * i, y - tall, 36, tall, fill=fill, stroke="mortar", weight=1))  # fmt: skip
        parts.append(line(x - 6, y, x + 186, y))

    left, right = LEFT + 6, LEFT + 240
    for x, name in ((left, "before"), (right, "after")):
        parts.append(text(x - 6, 16, name, bold=True))
    fills, after = ("wheat", "red", "wheat", "wheat"), ("wheat", "emerald", "wheat", "wheat")  # fmt: skip
    bars(left, 150, loud, 1.8, fills)
    bars(right, 150, calm, 1.8, after)
    bars(left, 272, quiet, 7.5, fills)
    bars(right, 272, busy, 7.5, after)
    parts.append(
        text(left - 6, 174, "activations", size=SMALL, fill="muted")
    )
    parts.append(
        text(right - 6, 174, "÷ 8 in channel 2", size=SMALL, fill="emerald")
    )
    parts.append(text(left - 6, 296, "weights", size=SMALL, fill="muted"))
    parts.append(
        text(right - 6, 296, "× 8 in column 2", size=SMALL, fill="emerald")
    )
    parts.append(line(LEFT, 318, RIGHT, 318, weight=1))
    parts.append(text(left - 6, 346, "64 · 1 = 64", bold=True))
    parts.append(text(right - 6, 346, "8 · 8 = 64", bold=True))
    return picture(
        ["What the inputs lose,", "the weights take on"], 352, *parts
    )
