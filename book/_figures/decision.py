"""The chart of chapter 14: which road for which case."""

from __future__ import annotations

from .style import (
    LEFT,
    RIGHT,
    SMALL,
    arrow,
    head,
    lines,
    path,
    picture,
    rect,
    text,
)

STEPS = [  # question, answer, what leads on
    (["1 A convolutional network?"], ["QuantWrapper: prepare,", "train, freeze, convert"], "no"),
    (["2 Must it be faster, not only", "smaller?"], ["Find a kernel first, and take", "the format that it runs"], "either way"),
    (["3 Activations in 8 bits, too?"], ["SmoothQuant if channels are", "loud; then QAT as below"], "either way"),
    (["4 Are 8 bits enough, or is the", "damage not clearly above zero?"], ["Round to nearest. Done:", "nothing to recover"], "no"),
    (["5 Very little text to train on,", "or none?"], ["Do not train: searched range,", "or GPTQ on what there is"], "no"),
    (["6 Four bits, in groups?"], ["GPTQ. Train only if what is", "left is clearly above zero"], "no"),
    (["7 Two or three bits?"], ["QAT: learned step, the float", "model as teacher, GPTQ as the", "bar to clear. Too little", "memory? With LoRA inside"], ""),
]  # fmt: skip


def decision() -> str:
    """Draw seven questions from top to bottom, each with the road that it leads to."""
    parts = [rect(LEFT, 0, RIGHT - LEFT, 66, fill="ink", radius=10)]
    parts.append(lines(LEFT + 18, 28, ["Start: fine-tune in float, round a copy,", "measure the damage in pairs."], fill="card", size=SMALL))  # fmt: skip
    spine, answer = LEFT + 26, LEFT + 132
    y = 66.0
    for question, road, onward in STEPS:
        parts.append(arrow(spine, y, spine, y + 26))
        y += 28
        tall = 20 + 24 * len(question)
        parts.append(rect(LEFT, y, RIGHT - LEFT, tall, fill="wheat", stroke="mortar", radius=10))  # fmt: skip
        for i, words in enumerate(question):
            parts.append(
                text(
                    LEFT + 18 + 20 * bool(i),
                    y + 28 + 24 * i,
                    words,
                    bold=True,
                )
            )
        y += tall
        high = 20 + 24 * len(road)
        middle = y + 14 + high / 2
        x = LEFT + 92
        parts.append(path(f"M{x} {y}V{middle}H{answer - 8}", weight=2.5))
        parts.append(head(answer - 1, middle, 0))
        parts.append(
            text(
                x + 8, y + 22, "yes", size=SMALL, fill="emerald", bold=True
            )
        )
        parts.append(rect(answer, y + 14, RIGHT - answer, high, fill="mint", stroke="emerald", radius=6))  # fmt: skip
        parts.append(lines(answer + 14, y + 40, road))
        if onward:
            words = onward.split()
            parts.append(lines(spine + 9, y + high + 2 - 20 * (len(words) - 1), words, size=SMALL, leading=20))  # fmt: skip
            parts.append(path(f"M{spine} {y}V{y + high + 14}", weight=2.5))
        y += high + 14
    return picture(
        ["Measure first; then seven", "questions find the road"], y, *parts
    )
