"""The exercises of Part II: a reference solution for each, inputs to try, a hint.

Stands apart from the floors of the house, below `check`.
"""

from __future__ import annotations

import math

import numpy as np

from companion.exercises import Exercise

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
}
