"""The exercises of Part II: a reference solution for each, inputs to try, a hint."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from companion.course.exercises.classic_road import Exercise


def _gradient(rounded: Tensor, bits: int, ends: bool) -> Tensor:
    """Straight-through gradient of rounded values, with or without the ends of the grid."""
    clipped = rounded.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    at_end = (rounded == -(2 ** (bits - 1))) | (rounded == 2 ** (bits - 1) - 1)
    return ((rounded == clipped) & (ends | ~at_end)).float()


def _scale_gradient(w: Tensor, s: float, bits: int, upstream: Tensor) -> Tensor:
    """Gradient of the loss for the scale of one group (Esser et al., equation 3)."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    steps = torch.round(w / s)
    clipped = steps.clamp(low, high)
    slope = torch.where(steps == clipped, steps - w / s, clipped)
    return (upstream * slope).sum() * (len(w) * high) ** -0.5


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Softened Kullback-Leibler divergence, averaged over rows."""
    p, q = (logits.div(temperature).log_softmax(-1) for logits in (teacher, student))
    return temperature**2 * torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)


def _macro_f1(predictions: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Mean of the F1 scores of the classes."""
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels, predictions), 1)
    return float(np.mean(2 * counts.diagonal() / (counts.sum(0) + counts.sum(1))))


def _mrr(scores: np.ndarray) -> float:
    """Mean reciprocal rank, where the own text of a query stands on the diagonal."""
    return float(np.mean(1 / (scores >= scores.diagonal()[:, None]).sum(1)))


def _rouge_l(given: str, author: str) -> float:
    """F1 of the longest common subsequence of the words of two texts."""
    one, other = given.split(), author.split()
    longest = np.zeros((len(one) + 1, len(other) + 1), int)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            skipped = max(longest[i, j + 1], longest[i + 1, j])
            longest[i + 1, j + 1] = longest[i, j] + 1 if a == b else skipped
    return float(2 * longest[-1, -1] / (len(one) + len(other)))


def _moved(original: Tensor, model: Tensor, labels: Tensor) -> float:
    """Mean KL(original || model) over the predictions that are scored."""
    p, q = (logits[labels != -100].log_softmax(-1) for logits in (original, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


LANGUAGE_MODELS: dict[str, Exercise] = {
    "ch08-perplexity": Exercise(
        lambda probabilities: float(np.exp(-np.mean(np.log(probabilities)))),
        "average -log(p) over the tokens, then take exp of that average.",
        [([0.5, 0.5, 0.5],), ([0.1, 0.9, 0.4, 0.02],), ([1.0, 1.0],)],
    ),
    "ch08-windows": Exercise(
        lambda n, size: math.ceil(n / (size - 1)),
        "the first token of a window is context only, so a window scores at most size - 1 tokens.",
        [(3, 3), (255, 256), (256, 256), (1000, 256)],
    ),
    "ch09-bits": Exercise(
        lambda bits, group_size, scale_bits: bits + scale_bits / group_size,
        "the scale of a group is shared by its group_size weights.",
        [(4, 32, 16), (2, 64, 16), (3, 128, 32)],
    ),
    "ch09-pack": Exercise(
        lambda first, second: (first & 15) | ((second & 15) << 4),
        "x & 15 keeps the four lowest bits of a negative number, too; << 4 moves them up by four.",
        [(1, 2), (-1, 0), (-8, 7), (3, -5)],
    ),
    "ch10-recovery": Exercise(
        lambda control, ptq, qat: float(np.log(ptq / qat) / np.log(ptq / control)),
        "the loss is the logarithm of the perplexity: (ptq - qat) / (ptq - control) of the logs.",
        [(20.0, 30.0, 22.0), (12.0, 60.0, 18.0), (20.0, 30.0, 30.0)],
    ),
    "ch10-ste": Exercise(
        _gradient,
        "compare with -2**(bits-1) and 2**(bits-1) - 1, by <= if ends else by <, and cast to float.",
        [
            (torch.tensor([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0]), 2, True),
            (torch.tensor([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0]), 2, False),
            (torch.arange(-10.0, 10.0), 4, True),
            (torch.arange(-10.0, 10.0).view(4, 5), 4, False),
        ],
    ),
    "ch11-lsq": Exercise(
        _scale_gradient,
        "round(w / s) - w / s inside the range, its end outside; sum, then 1 / sqrt(n * qmax).",
        [
            (torch.tensor([0.3, -1.2, 2.6, -5.0]), 0.5, 3, torch.tensor([1.0, -2.0, 0.5, 3.0])),
            (torch.linspace(-1, 1, 8), 0.4, 2, torch.ones(8)),
        ],
    ),
    "ch11-distil": Exercise(
        _divergence,
        "divide both logits by the temperature; sum p * (log p - log q) over classes, not rows.",
        [
            (torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]), 1.0),
            (torch.tensor([[0.0, 1.0, -1.0]]), torch.tensor([[1.0, 0.0, 2.0]]), 3.0),
        ],
    ),
    "ch12-macro-f1": Exercise(
        _macro_f1,
        "F1 of a class is 2 * both / (predicted + true), where both counts the right answers.",
        [
            (np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]), 2),
            (np.array([0, 1, 2, 2, 2, 0]), np.array([0, 1, 1, 2, 2, 2]), 3),
        ],
    ),
    "ch12-mrr": Exercise(
        _mrr,
        "the rank of the own text is how many scores of its row are at least its own.",
        [
            (np.array([[3.0, 1.0, 2.0], [5.0, 4.0, 1.0], [1.0, 2.0, 0.0]]),),
            (np.eye(4),),
        ],
    ),
    "ch13-mask": Exercise(
        lambda turns: [
            token if role == "assistant" else -100 for role, tokens in turns for token in tokens
        ],
        "go through the turns in order; a token is its own label where the assistant speaks.",
        [
            ([("user", [5, 6]), ("assistant", [7, 2])],),
            (
                [
                    ("system", [3]),
                    ("user", [4]),
                    ("assistant", [8, 2]),
                    ("user", [4]),
                    ("assistant", [9, 9, 2]),
                ],
            ),
        ],
    ),
    "ch13-rouge": Exercise(
        _rouge_l,
        "2 * (words of the longest common subsequence) / (words of both texts together).",
        [
            ("the road leads to a city", "a yellow road leads to the city"),
            ("follow the road", "follow the road"),
            ("green spectacles", "a pair of silver shoes"),
            ("to to the the", "the to the to"),
        ],
    ),
    "ch13-forgotten": Exercise(
        _moved,
        "keep the rows whose label is not -100; sum p * (log p - log q) over words, mean over rows.",
        [
            (
                torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 1.0], [1.0, 1.0, 0.0]]),
                torch.tensor([[1.0, 0.0, 2.0], [0.0, 5.0, 1.0], [1.0, 2.0, 0.0]]),
                torch.tensor([-100, 2, 0]),
            ),
            (
                torch.tensor([[0.0, 3.0], [1.0, 0.0]]),
                torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
                torch.tensor([1, -100]),
            ),
        ],
    ),
    "ch14-questions": Exercise(
        lambda damage: math.floor(1.96**2 * (1 - damage) / damage) + 1,
        "square both sides of damage > 1.96 * sqrt(damage * (1 - damage) / n) and solve for n.",
        [(3 / 198,), (0.1,), (0.002,)],
    ),
    "ch14-budget": Exercise(
        lambda megabytes, parameters, group_size: max(
            (b for b in (8, 4, 3, 2) if (b + 16 / group_size) * parameters <= 8e6 * megabytes),
            default=0,
        ),
        "a weight takes bits + 16 / group_size bits, and a megabyte has eight million.",
        [(2.0, 3_410_176, 32), (1.0, 3_410_176, 32), (4500.0, 8e9, 32), (3.0, 8e6, 16)],
    ),
    "ch15-unsigned": Exercise(
        lambda weights, inputs: int(((weights.long() - 128) * inputs.long()).sum()),
        "the sum of (w + 128) * x is the sum of w * x plus 128 times the sum of x.",
        [
            (torch.tensor([128, 255, 0, 7], dtype=torch.uint8), torch.tensor([9, 127, 127, 3])),
            (torch.full((300,), 255, dtype=torch.uint8), torch.full((300,), 127)),
        ],
    ),
    "ch15-limit": Exercise(
        lambda weights, bits, group_size, bandwidth: (
            1e3 * weights * (bits / 8 + 4 / group_size) / (1e9 * bandwidth)
        ),
        "a weight takes bits / 8 bytes and its part of a 4-byte scale; a gigabyte has 1e9 bytes.",
        [(134e6, 4, 32, 20.0), (7e9, 8, 64, 50.0), (1e6, 2, 32, 11.5)],
    ),
    "ch16-cards": Exercise(
        lambda parameters, gigabytes: math.ceil(16 * parameters / (1e9 * gigabytes)),
        "four bytes for the weight, four for its gradient, eight for two moments; round up.",
        [(70e9, 80), (8e9, 24), (1e9, 16), (1.1e9, 16)],
    ),
    "ch16-mean": Exercise(
        lambda rows, losses: sum(n * x for n, x in zip(rows, losses, strict=True)) / sum(rows),
        "a part with more rows weighs more: multiply by its rows, divide by all of them.",
        [([1, 2], [3.0, 6.0]), ([4, 4], [1.0, 2.0]), ([1, 1, 6], [8.0, 0.0, 4.0])],
    ),
    "ch17-share": Exercise(
        lambda control, ptq, qat: math.log(ptq / qat) / math.log(ptq / control),
        "the loss in nats is the logarithm of the perplexity.",
        [(29.461, 140.294, 48.768), (8.905, 11.878, 9.859)],
    ),
    "ch17-cache": Exercise(
        lambda parameters, bits, layers, heads, width: (
            math.floor(parameters * bits / (8 * 2 * 2 * layers * heads * width)) + 1
        ),
        "a token keeps a key and a value, of two bytes a number, in every layer and head.",
        [(135e6, 4, 30, 3, 64), (8e9, 4, 32, 8, 128), (27e9, 4, 62, 16, 128)],
    ),
}
