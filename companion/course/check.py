"""Exercises that check themselves: `check` runs your answer beside a reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from companion.course.exercises import EXERCISES


def check(name: str, answer: Any) -> None:
    """Print whether an answer is right, and if not, on which input it differs, with a hint.

    Where the ``...`` of the exercise still stands, there is nothing to hint at.

    Parameters
    ----------
    name : str
        The exercise, such as ``"ch04-scale"``.
    answer : callable or value
        Your function, or your number where the exercise asks for one.

    Raises
    ------
    KeyError
        For an unknown exercise, with the known ones.

    Examples
    --------
    >>> check("ch04-levels", lambda bits: 2**bits)
    ch04-levels: correct
    >>> check("ch04-levels", lambda bits: 2 * bits)
    ch04-levels: not yet. For (3,) you gave 6. Hint: each bit doubles the number of patterns.
    >>> check("ch04-levels", lambda bits: ...)
    ch04-levels: not yet. Replace the ... in the cell above.
    """
    if name not in EXERCISES:
        raise KeyError(f"no exercise {name!r}; there are {', '.join(EXERCISES)}")
    exercise = EXERCISES[name]
    for inputs in exercise.inputs:
        given = _given(answer, inputs)
        if _untouched(given):
            print(f"{name}: not yet. Replace the ... in the cell above.")
            return
        if not _same(given, exercise.reference(*inputs)):
            shown = "" if not inputs else f"For {_short(inputs)} you gave {_short(given)}. "
            print(f"{name}: not yet. {shown}Hint: {exercise.hint}")
            return
    print(f"{name}: correct")


def _given(answer: Any, inputs: tuple) -> Any:
    try:
        return answer(*inputs) if callable(answer) else answer
    except TypeError as error:
        if "ellipsis" in str(error):  # it computes with the ... of the exercise
            return ...
        raise


def _untouched(given: Any) -> bool:
    """Whether an answer is, or holds, what stands in the cell before anything is written there."""
    if isinstance(given, (tuple, list)):
        return any(map(_untouched, given))
    return given is None or given is Ellipsis


def _same(given: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return (
            isinstance(given, Tensor)
            and given.shape == expected.shape
            and bool(torch.allclose(given.double(), expected.double(), rtol=1e-5, atol=1e-7))
        )
    try:
        return bool(np.allclose(given, expected, rtol=1e-4))
    except TypeError:
        return given == expected


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        inner = ", ".join(map(_short, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, nn.Module):
        return type(value).__name__
    return repr(value)
