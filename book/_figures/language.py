"""Models compared and tokens scored: pairs, perplexity, shares, masks."""

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
    text,
)


def paired_difference() -> str:
    """Draw two intervals that overlap, and the difference of the pairs that does not hold zero."""
    parts = []
    # 500 images: 25 a row
    parts.append(text(LEFT, 16, "the same 500 images, met by both models", size=SMALL, fill="muted"))  # fmt: skip
    wide, x = RIGHT - LEFT, float(LEFT)
    for count, fill, name in ((380, "wheat", "both right: 380"), (20, "red", ""), (100, "idle", "neither")):  # fmt: skip
        parts.append(brick(x, 28, wide * count / 500, 46, name, fill=fill))
        x += wide * count / 500
    parts.append(text(LEFT + wide * 390 / 500, 98, "only the first: 20", size=SMALL, fill="red", anchor="middle"))  # fmt: skip

    def scale(low: float, high: float):
        return lambda v: LEFT + wide * (v - low) / (high - low)

    at = scale(0.70, 0.86)
    parts.append(text(LEFT, 150, "each model alone: accuracy", bold=True))
    for y, name, low, value, high in (
        (184, "first", 0.763, 0.800, 0.833),
        (218, "second", 0.721, 0.760, 0.795),
    ):
        parts.append(rect(at(low), y - 7, at(high) - at(low), 14, fill="brick", stroke="mortar", radius=7))  # fmt: skip
        parts.append(dot(at(value), y, "ink"))
        where = at(high) + 12
        parts.append(text(where, y + 6, name, size=SMALL))
    parts.append(
        line(at(0.763), 176, at(0.763), 226, stroke="muted", dash="2 5")
    )
    parts.append(
        line(at(0.795), 176, at(0.795), 226, stroke="muted", dash="2 5")
    )
    parts.append(text((at(0.763) + at(0.795)) / 2, 252, "overlap", size=SMALL, fill="muted", anchor="middle"))  # fmt: skip
    at = scale(-0.03, 0.13)
    parts.append(
        text(LEFT, 300, "image by image: the difference", bold=True)
    )
    parts.append(line(at(0), 318, at(0), 358, stroke="ink", weight=2))
    parts.append(text(at(0), 380, "0", size=SMALL, anchor="middle"))
    parts.append(
        rect(
            at(0.024), 331, at(0.058) - at(0.024), 14, fill="red", radius=7
        )
    )
    parts.append(dot(at(0.040), 338, "ink"))
    parts.append(
        text(at(0.058) + 12, 344, "0.04, not 0", size=SMALL, fill="red")
    )
    return picture(
        ["Alone they look alike,", "in pairs they do not"], 388, *parts
    )


def perplexity() -> str:
    """Draw what comes next as doors that are equally likely."""
    parts = []
    cases = (
        (1, "knows the next token", "1"),
        (2, "loss ln 2 = 0.69", "2"),
        (8, "loss ln 8 = 2.08", "8"),
    )
    for i, (doors, note, ppl) in enumerate(cases):
        y = 112 * i
        wide = 26
        for door in range(doors):
            x = LEFT + 34 * door
            parts.append(rect(x, y + 28, wide, 48, fill="emerald" if doors == 1 else "brick", stroke="mortar", radius=4))  # fmt: skip
            parts.append(dot(x + wide - 7, y + 54, "card", 2.5, "none"))
        if doors == 1:
            note = "certain, and right: loss ln 1 = 0"
        parts.append(text(LEFT, y + 16, note, size=SMALL))
        parts.append(
            text(RIGHT, y + 46, ppl, size=34, bold=True, anchor="end")
        )
        parts.append(text(RIGHT, y + 72, "perplexity", size=SMALL, fill="muted", anchor="end"))  # fmt: skip
    return picture(["Perplexity counts the doors", "between which it hesitates"], 310, *parts)  # fmt: skip


def recovered_share() -> str:
    """Draw three losses on one ruler, and the share as a part of the way between two of them."""
    parts = []
    x, top, bottom, mid = 150, 20, 320, 230
    parts.append(
        arrow(x, bottom + 36, x, top - 20, stroke="muted", weight=2)
    )
    parts.append(
        text(
            x - 12, top - 2, "loss", size=SMALL, fill="muted", anchor="end"
        )
    )
    for y, name, note, fill in (
        (top + 20, "PTQ", "rounded afterwards", "red"),
        (mid, "QAT", "trained under rounding", "emerald"),
        (bottom, "control", "float, as many steps", "ink"),
    ):
        parts.append(line(x - 14, y, 456, y, stroke="rule", weight=1.5))
        parts.append(dot(x, y, fill, 8))
        parts.append(
            text(x - 24, y + 6, name, bold=True, fill=fill, anchor="end")
        )
        parts.append(
            text(
                RIGHT, y + 24, note, size=SMALL, fill="muted", anchor="end"
            )
        )
    parts.append(
        rect(180, top + 20, 26, mid - top - 20, fill="emerald", radius=3)
    )
    parts.append(
        rect(
            180, mid, 26, bottom - mid, fill="rose", stroke="red", radius=3
        )
    )
    parts.append(lines(220, 120, ["taken back:", "PTQ − QAT"], size=SMALL, fill="emerald"))  # fmt: skip
    parts.append(text(220, 292, "still missing", size=SMALL, fill="red"))
    parts.append(lines(LEFT, 386, ["recovered share =", "taken back / (taken back + still missing)"], size=SMALL))  # fmt: skip
    return picture(["What QAT is worth is its part", "of the way back to float"], 416, *parts)  # fmt: skip
