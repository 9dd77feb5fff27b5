"""The exercises of Part II: a reference solution for each, inputs to try, a hint.

Stands apart from the floors of the house, below `check`.
"""

from __future__ import annotations

from companion.exercises import Exercise

LANGUAGE_MODELS: dict[str, Exercise] = {}
