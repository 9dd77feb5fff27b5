"""The optimizer of a run: which parameters decay, and how its learning rate falls.

Built in chapter 2.

References
----------
Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from companion.errors import NothingToTrain

LEARNING_RATE = 5e-4
WEIGHT_DECAY = 0.01
_SCALES = ("step", "scale", "zero_point")  # learned ranges, here and in torchao
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def parameter_groups(model: nn.Module, weight_decay: float = WEIGHT_DECAY) -> list[dict]:
    """Split what trains into what decays and what does not, as optimizers take it.

    Matrices decay: the weights of linear layers, convolutions, embeddings and adapters. Biases,
    everything else of one dimension, the weights of normalizations whatever their shape, and learned
    quantization steps do not: decay would pull a scale towards 0, and every weight with it.

    Parameters
    ----------
    model : nn.Module
    weight_decay : float
        Of the first group.

    Returns
    -------
    list of dict
        ``{"params": [...], "weight_decay": ...}``, at most two; only parameters that require a
        gradient, each once.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    >>> [(len(g["params"]), g["weight_decay"]) for g in parameter_groups(model, 0.1)]
    [(1, 0.1), (3, 0.0)]
    """
    decays, stays, seen = [], [], set()
    for path, module in model.named_modules():
        kept = "norm" in type(module).__name__.lower() or "quantizer" in path.split(".")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            kept_too = parameter.dim() < 2 or name in _SCALES or name.endswith("bias")
            (stays if kept or kept_too else decays).append(parameter)
    groups = [(decays, weight_decay), (stays, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def make_optimizer(
    model: nn.Module,
    given: torch.optim.Optimizer | Callable[[list], torch.optim.Optimizer] | None,
    lr: float | None = None,
    weight_decay: float | None = None,
) -> torch.optim.Optimizer:
    """Return what was given, what it makes of the parameters, or AdamW on two groups.

    Raises
    ------
    NothingToTrain
        If there is nothing for it to move.
    ValueError
        If a rate or a decay was given that a given optimizer would not know of.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if given is None:
        decay = WEIGHT_DECAY if weight_decay is None else weight_decay
        optimizer = torch.optim.AdamW(
            parameter_groups(model, decay), lr=LEARNING_RATE if lr is None else lr
        )
    elif lr is not None or weight_decay is not None:
        raise ValueError(
            "lr and weight_decay are those of the default optimizer, AdamW: give yours its own, as in "
            "partial(torch.optim.SGD, lr=0.01, weight_decay=0.001)"
        )
    else:
        optimizer = given if isinstance(given, torch.optim.Optimizer) else given(parameters)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not known & {id(p) for p in parameters}:
        raise NothingToTrain(
            "the optimizer holds none of this model's parameters: build it after prepare_qat(), "
            "which makes a new model, or pass a function such as partial(torch.optim.SGD, lr=...)"
        )
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer


def schedule_of(given: str | Callable[[float], float]) -> Callable[[float], float]:
    """Look a schedule up by its name; a function is one.

    Examples
    --------
    >>> schedule_of("linear")(0.25)
    0.75
    """
    if callable(given):
        return given
    if given not in SCHEDULES:
        raise ValueError(
            f"schedule {given!r} is unknown: use one of {', '.join(SCHEDULES)}, or a function of the "
            "progress from 0 to 1"
        )
    return SCHEDULES[given]


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its first learning rate times a factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
