"""Losses and gradients that are numbers, or an error that says which remedy is the likely one.

Built in chapter 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from companion.errors import NonFiniteLoss
from companion.training.processes import Processes


def check_finite(
    what: str, value: float | Tensor, step: int, processes: Processes, compute: Callable[[], Any]
) -> None:
    """Raise `NonFiniteLoss` for NaN and infinity; mention float16 where that is computed in.

    Parameters
    ----------
    what : {"loss", "gradient"}
        Whose number it is. A gradient may be infinite where its scale is being searched.
    value : float or Tensor
    step : int
    processes : Processes
    compute : callable
        Computes the loss once more, to see in which numbers.

    Examples
    --------
    >>> alone, half = Processes(torch.device("cpu")), torch.tensor([1e5]).half()
    >>> check_finite("loss", math.inf, 3, alone, lambda: half + 1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    companion.errors.NonFiniteLoss: the loss is inf at step 3, computed in float16, whose ...
    """
    if what == "gradient" and processes.scales_gradients:
        return
    value = float(value.full_tensor() if hasattr(value, "full_tensor") else value)
    if math.isfinite(value):
        return
    if processes.precision == "fp16" or computes_in_half(compute):
        raise NonFiniteLoss(
            f"the {what} is {value} at step {step}, computed in float16, whose numbers end at 65504 "
            "and whose small gradients vanish: use bfloat16 (as wide as float32), float32 "
            "(model.float()), or float32 weights under `accelerate launch --mixed_precision fp16`, "
            "which scales the loss"
        )
    raise NonFiniteLoss(
        f"the {what} is {value} at step {step}: lower the learning rate, clip gradients "
        "(clip_norm=1.0) or look at the batch of that step"
    )


def computes_in_half(compute: Callable[[], Any]) -> bool:
    """Whether a computation meets a float16 tensor: of the model, or by autocast on the way.

    Examples
    --------
    >>> computes_in_half(lambda: torch.ones(2).half().float().sum())
    True
    """
    with torch.no_grad(), _Watch() as watch:
        compute()
    return watch.half


class _Watch(TorchDispatchMode):
    half = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor))
        self.half |= any(tensor.dtype == torch.float16 for tensor in tensors)
        return result
