"""Numbers and their grids: layouts, rounding, zero points, groups, ranges, bytes."""

from __future__ import annotations

import math
from statistics import NormalDist

from .style import (
    LEFT,
    MARGIN,
    RIGHT,
    SMALL,
    WIDTH,
    arrow,
    brick,
    dot,
    line,
    lines,
    path,
    picture,
    rect,
    signed,
    text,
)

ACROSS = WIDTH - 2 * MARGIN
WEIGHTS = (
    -1.03,
    -0.36,
    -0.21,
    -0.08,
    0.05,
    0.18,
    0.29,
    0.41,
)  # of chapter 4


def bit_layouts() -> str:
    """Draw what the bits of a float and of an integer stand for."""
    formats = [
        ("float32", (1, 8, 23), "4 bytes"),
        ("bfloat16", (1, 8, 7), "2 bytes"),
        ("int8", (8,), "1 byte, 256 values"),
        ("int4", (4,), "half a byte, 16 values"),
    ]
    cell, parts = ACROSS / 32, []
    for row, (name, widths, note) in enumerate(formats):
        y, x = 92 * row, float(LEFT)
        parts.append(text(LEFT, y + 16, name, bold=True))
        parts.append(
            text(
                RIGHT, y + 16, note, size=SMALL, anchor="end", fill="muted"
            )
        )
        fills = ("red", "mint", "wheat") if len(widths) == 3 else ("brick",)
        for width, fill in zip(widths, fills, strict=True):
            for _ in range(width):
                parts.append(
                    rect(x, y + 28, cell, 34, fill=fill, stroke="mortar", radius=2, weight=1)
                )  # fmt: skip
                x += cell
    y = 92 * len(formats) - 4
    for i, (fill, name) in enumerate(
        [("red", "sign"), ("mint", "exponent"), ("wheat", "fraction"), ("brick", "integer")]
    ):  # fmt: skip
        x = LEFT + (0, 76, 198, 318)[i]
        parts.append(
            rect(
                x, y, 16, 16, fill=fill, stroke="mortar", radius=2, weight=1
            )
        )
        parts.append(text(x + 23, y + 14, name, size=SMALL))
    return picture(["Four bits leave room for", "sixteen values"], y + 20, *parts)  # fmt: skip


def number_line() -> str:
    """Draw eight weights above the sixteen bricks of a four-bit grid."""
    step = max(map(abs, WEIGHTS)) / 7.5
    width = ACROSS / 16
    nearest = [
        -7 if w == min(WEIGHTS) else round(w / step) for w in WEIGHTS
    ]  # float32: just short of -7.5

    def at(steps: float) -> float:
        return LEFT + width * (steps + 8.5)

    parts = [
        text(LEFT, 18, "eight weights, floats", size=SMALL, fill="muted")
    ]
    for q in range(-8, 8):
        used = q in nearest
        x = at(q - 0.5)
        parts.append(
            brick(x + 0.75, 112, width - 1.5, 44, fill="brick" if used else "idle",
                  stroke="mortar" if used else "rule")
        )  # fmt: skip
        if used:
            parts.append(
                text(
                    at(q),
                    140,
                    signed(q),
                    size=SMALL,
                    anchor="middle",
                    fill="night",
                )
            )
    for w, q in zip(WEIGHTS, nearest, strict=True):
        parts.append(
            line(at(w / step), 50, at(q), 106, stroke="ink", weight=1.5)
        )
        parts.append(dot(at(w / step), 48, "red" if w == 0.18 else "ink"))
    parts.append(
        text(
            LEFT,
            182,
            "the road: integers from −8 to 7",
            size=SMALL,
            fill="muted",
        )
    )
    # one weight, step by step
    parts.append(line(LEFT, 208, RIGHT, 208, weight=1))
    x = (LEFT, LEFT + 166, LEFT + 292)
    wide = (88, 58, 140)
    labels = ("0.18", "1", "0.137")
    fills = ("wheat", "brick", "wheat")
    for left, w, label, fill in zip(x, wide, labels, fills, strict=True):
        parts.append(
            brick(left, 262, w, 44, label, fill=fill, size=20, bold=True)
        )
    parts.append(arrow(x[0] + wide[0] + 8, 284, x[1] - 8, 284))
    parts.append(arrow(x[1] + wide[1] + 8, 284, x[2] - 8, 284))
    parts.append(text(LEFT, 246, "weight w", size=SMALL, fill="muted"))
    parts.append(text(x[1] - 8, 246, "integer q", size=SMALL, fill="muted"))
    parts.append(
        text(x[2], 246, "what is left: s · q", size=SMALL, fill="muted")
    )
    parts.append(
        text(
            LEFT,
            336,
            "w / s = 1.31, and the nearest brick is 1",
            size=SMALL,
        )
    )
    return picture(["No weight lies more than", "half a brick from its own"], 340, *parts)  # fmt: skip


def gelu(x: float) -> float:
    return x * NormalDist().cdf(x)


def zero_point() -> str:
    """Draw the same activations over a symmetric and over an asymmetric grid."""
    low, high = -0.17, 4.83  # what the cell below the figure prints
    symmetric, asymmetric = high / 7.5, (high - low) / 15
    unit = ACROSS / (8.5 * symmetric + high + 0.42)

    def at(value: float) -> float:
        return LEFT + unit * (value + 8.5 * symmetric)

    values = [
        gelu(1.5 * NormalDist().inv_cdf((i + 0.5) / 2000))
        for i in range(2000)
    ]
    bins = [0] * 40
    width = 5.0 / len(bins)
    for value in values:
        bins[min(int((value + 0.2) / width), len(bins) - 1)] += 1
    floor, parts = 96, []
    for i, count in enumerate(bins):
        if count:
            tall = 84 * math.sqrt(count / max(bins))
            parts.append(
                rect(at(-0.2 + i * width) + 0.5, floor - tall, unit * width - 1, tall,
                     fill="muted", radius=0)
            )  # fmt: skip
    parts.append(line(LEFT, floor, RIGHT, floor))
    parts.append(lines(LEFT, 30, ["what leaves", "a GELU"], size=SMALL, fill="muted"))  # fmt: skip
    zero = at(0)
    parts.append(line(zero, floor, zero, 312, stroke="red", dash="2 6"))

    def road(
        y: float, step: float, first: int, offset: int, used: range
    ) -> None:
        for q in range(first, first + 16):
            x, wide = at(step * (q - offset - 0.5)), unit * step
            on = q in used
            parts.append(
                brick(x + 0.75, y, wide - 1.5, 40, fill="brick" if on else "idle",
                      stroke="mortar" if on else "rule")
            )  # fmt: skip

    road(150, symmetric, -8, 0, range(0, 8))
    parts.append(text(LEFT, 138, "symmetric", bold=True))
    parts.append(text(LEFT, 214, "8 bricks idle", size=SMALL, fill="red"))
    parts.append(text(RIGHT, 214, "step 0.644", size=SMALL, anchor="end", fill="muted"))  # fmt: skip
    road(262, asymmetric, 0, 1, range(0, 16))
    parts.append(text(LEFT, 250, "asymmetric", bold=True))
    parts.append(
        text(LEFT, 288, "all 16 in use", size=SMALL, fill="emerald")
    )
    parts.append(text(RIGHT, 326, "step 0.333", size=SMALL, anchor="end", fill="muted"))  # fmt: skip
    parts.append(text(zero, 336, "0 is integer 1", size=SMALL, anchor="middle", fill="red"))  # fmt: skip
    return picture(["A zero point puts every brick", "where the values are"], 340, *parts)  # fmt: skip


def granularity() -> str:
    """Draw which weights share a scale with one that is far too large."""
    ways = [
        ("per tensor", 32, "1 scale", "32 weights"),
        ("per row", 8, "4 scales", "8 weights"),
        ("groups of 4", 4, "8 scales", "4 weights"),
    ]
    cell, parts, giant = 34, [], (1, 5)
    for block, (name, size, scales, coarse) in enumerate(ways):
        top = 196 * block
        parts.append(text(LEFT, top + 16, name, bold=True))
        for row in range(4):
            for column in range(8):
                place, it = 8 * row + column, 8 * giant[0] + giant[1]
                shares = place // size == it // size
                parts.append(
                    rect(LEFT + cell * column, top + 28 + cell * row, cell, cell,
                         fill="rose" if shares else "wheat", stroke="mortar", weight=0.75,
                         radius=0)
                )  # fmt: skip
        for share in range(32 // size):
            first = share * size
            row, column = divmod(first, 8)
            wide, tall = (8, 4) if size == 32 else (size, 1)
            parts.append(
                rect(LEFT + cell * column, top + 28 + cell * row, cell * wide, cell * tall,
                     stroke="mortar", weight=3, radius=2)
            )  # fmt: skip
        x, y = LEFT + cell * giant[1] + cell / 2, top + 28 + 1.5 * cell
        parts.append(dot(x, y, "red", 11))
        parts.append(text(316, top + 62, scales, bold=True))
        parts.append(lines(316, top + 96, [coarse, "get its step"], size=SMALL, fill="red"))  # fmt: skip
    parts.append(dot(LEFT + 10, 588, "red", 9))
    parts.append(text(LEFT + 28, 594, "one weight far larger than the others", size=SMALL))  # fmt: skip
    return picture(["One giant makes the step long", "for all who share its scale"], 600, *parts)  # fmt: skip


def calibration() -> str:
    """Draw five batches, one stray value, and the two ranges that observers take from them."""
    highs = (
        2.83,
        3.11,
        2.96,
        3.21,
        3.63,
    )  # of the five batches of chapter 4
    stray, average, low = 30.0, 5.162, -0.17
    unit = (ACROSS - 74) / (stray - low)

    def at(value: float) -> float:
        return LEFT + 66 + unit * (value - low)

    parts = [text(LEFT, 16, "five batches", size=SMALL, fill="muted")]
    for row, high in enumerate(highs):
        y = 44 + 26 * row
        parts.append(
            text(LEFT, y + 6, str(row + 1), size=SMALL, fill="muted")
        )
        parts.append(
            rect(at(low), y - 7, unit * (high - low), 14, fill="muted")
        )
    parts.append(dot(at(stray), 96, "red", 7))
    parts.append(text(at(stray) - 16, 102, "one stray value: 30", size=SMALL, anchor="end", fill="red"))  # fmt: skip
    parts.append(line(LEFT, 176, RIGHT, 176, weight=1))
    for y, name, end, fill, note in (
        (222, "min–max", stray, "red", "steps 7.9 times as long"),
        (302, "moving average", average, "emerald", "1.4 times as long"),
    ):
        parts.append(text(LEFT, y - 12, name, bold=True))
        parts.append(
            text(RIGHT, y - 12, note, size=SMALL, anchor="end", fill=fill)
        )
        wide = unit * (end - low)
        shown = 16
        for i in range(shown):
            parts.append(
                rect(at(low) + wide * i / shown, y, wide / shown, 30, fill="brick",
                     stroke="mortar", weight=1, radius=1)
            )  # fmt: skip
    parts.append(text(LEFT, 242, "−0.17", size=SMALL, fill="muted"))
    parts.append(text(LEFT, 322, "−0.17", size=SMALL, fill="muted"))
    parts.append(
        text(at(average) + 10, 322, "5.16", size=SMALL, fill="muted")
    )
    return picture(
        ["One stray value of 5,000", "stretches every step"], 336, *parts
    )


def packing() -> str:
    """Draw how eight integers of four bits come to lie in four bytes."""
    integers = (-7, -3, -2, -1, 0, 1, 2, 3)  # of chapter 4
    cell, parts = ACROSS / 8, []
    parts.append(text(LEFT, 16, "eight integers from −8 to 7", size=SMALL, fill="muted"))  # fmt: skip
    for i, q in enumerate(integers):
        x = LEFT + cell * i
        parts.append(brick(x + 1, 26, cell - 2, 40, signed(q), size=20))
        parts.append(arrow(x + cell / 2, 72, x + cell / 2, 100, weight=2))
        parts.append(
            brick(
                x + 1,
                104,
                cell - 2,
                38,
                f"{q & 15:04b}",
                fill="wheat",
                mono=True,
            )
        )
    parts.append(
        text(LEFT, 166, "their four lowest bits", size=SMALL, fill="muted")
    )
    for i in range(4):
        x = LEFT + 2 * cell * i
        first, second = integers[2 * i], integers[2 * i + 1]
        byte = (first & 15) | (second & 15) << 4
        parts.append(path(f"M{x + cell / 2} 178C{x + cell / 2} 204 {x + 1.5 * cell} 200 {x + 1.5 * cell} 226", stroke="red"))  # fmt: skip
        parts.append(path(f"M{x + 1.5 * cell} 178C{x + 1.5 * cell} 204 {x + cell / 2} 200 {x + cell / 2} 226", stroke="muted"))  # fmt: skip
        parts.append(
            brick(x + 2, 230, 2 * cell - 4, 42, f"{byte >> 4:04b} {byte & 15:04b}", mono=True,
                  weight=2.5)
        )  # fmt: skip
        parts.append(
            text(
                x + cell,
                298,
                f"0x{byte:02x}",
                size=SMALL,
                anchor="middle",
                mono=True,
            )
        )
    parts.append(text(LEFT, 332, "four bytes; in float32 it would be 32", size=SMALL, fill="muted"))  # fmt: skip
    return picture(["Two integers share a byte,", "the first in its lower half"], 336, *parts)  # fmt: skip
