"""Validation on the way, and the weights that did best in it.

Built in chapter 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from companion.training.processes import Processes
from companion.training.state import kept_modes, kept_rng


class Validation:
    """Calls `validate` when it is due, and keeps a copy of the weights with the lowest value.

    What the callback draws at random or does to training modes does not reach the training.

    Parameters
    ----------
    validate : callable or None
        None is never due.
    every, steps : int
        Steps between two calls, and of the run.
    record : list of [int, float]
        Where steps done and values are put; of a resumed run it holds those from before.
    best : dict of Tensor
        The best weights so far, if any.

    Examples
    --------
    >>> model, values = nn.Linear(1, 1), iter([2.0, 3.0])
    >>> validation = Validation(lambda m: next(values), every=5, steps=7, record=[], best={})
    >>> alone = Processes(torch.device("cpu"))
    >>> for done in (0, 2, 5):
    ...     validation(model, done, alone)
    >>> validation.record
    [[0, 2.0], [5, 3.0]]
    """

    def __init__(
        self,
        validate: Callable[[nn.Module], float] | None,
        every: int,
        steps: int,
        record: list[list],
        best: dict[str, Tensor],
    ) -> None:
        self.validate, self.every, self.steps = validate, every, steps
        self.record, self.best = record, best

    def __call__(self, model: nn.Module, done: int, processes: Processes) -> None:
        """Validate after so many steps, if it is due."""
        due = done % self.every == 0 or done == self.steps
        if self.validate is None or not due or (self.record and self.record[-1][0] == done):
            return
        with kept_rng(), kept_modes(model):
            value = torch.tensor(float(self.validate(model)), dtype=torch.float64)
        value = processes.mean(value)
        self.record.append([done, value])
        if math.isfinite(value) and value <= min(v for _, v in self.record if math.isfinite(v)):
            self.best = {key: part.detach().clone() for key, part in model.state_dict().items()}
