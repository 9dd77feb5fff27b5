"""The methods that are compared, each as one arm: when the rounding begins, and how.

Built in chapter 11.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from companion.data.task import Task
from companion.errors import UnsupportedModel
from companion.numerics.scheme import QuantScheme
from companion.ptq.gptq import gptq
from companion.qat.calibration import BATCHES
from companion.qat.lora import convert_base, lora, lora_outside
from companion.qat.prepare import convert, prepare_qat
from companion.training.batches import batches
from companion.training.blocks import fit_blocks

Prepare = Callable[..., nn.Module]  # (model, scheme, task, skip)


@dataclass(frozen=True)
class Arm:
    """One way to get from a float model to a quantized one, in a given number of steps.

    Parameters
    ----------
    name : str
    prepare : callable, optional
        ``prepare(model, scheme, task, skip)`` returns the model to train further, or to finish.
        None leaves it in floating point. Where `compare` is asked to round embeddings, it also
        gets ``embeddings=True``.
    finish : callable
        Turns the trained model into the one that is measured.
    float_share : float
        Of the steps, in floating point before `prepare`: 0 rounds from the first step on, 1
        after the last (post-training quantization).
    distil : bool
        After the float steps, imitate the model that they gave instead of the labels.

    Examples
    --------
    >>> late = Arm("late", lambda model, scheme, task, skip: prepare_qat(model, scheme, skip=skip),
    ...            float_share=0.5)
    >>> late.steps(9)
    (4, 5)
    """

    name: str
    prepare: Prepare | None = None
    finish: Callable[[nn.Module], nn.Module] = convert
    float_share: float = 0.0
    distil: bool = False

    def steps(self, total: int) -> tuple[int, int]:
        """Split a number of steps into those before and those under rounding."""
        first = round(self.float_share * total)
        return first, total - first


def _with(method: str) -> Prepare:
    return lambda model, scheme, task, skip, embeddings=False: prepare_qat(
        model, scheme, method, skip=skip, embeddings=embeddings
    )


def _calibrated(
    model: nn.Module, scheme: QuantScheme, task: Task, skip: Sequence[str], embeddings: bool = False
) -> nn.Module:
    """Learned steps whose search for a start knows what the weights meet in training."""
    seen = batches(task.train, BATCHES)
    return prepare_qat(model, scheme, skip=skip, embeddings=embeddings, calibration=seen)


def _matrices_only(prepare: Prepare) -> Prepare:
    """Refuse embeddings on behalf of a method that has no rule for them."""

    def checked(model, scheme, task, skip, embeddings: bool = False) -> nn.Module:
        if embeddings:
            raise UnsupportedModel(
                f"{prepare.__name__.strip('_')} has no rule for embeddings: leave one of the two out"
            )
        return prepare(model, scheme, task, skip)

    return checked


def _gptq(model: nn.Module, scheme: QuantScheme, task: Task, skip: Sequence[str]) -> nn.Module:
    torch.manual_seed(0)  # which batches calibrate
    return gptq(model, scheme, task.train, skip=skip, progress=False)


def _blockwise(
    model: nn.Module, scheme: QuantScheme, task: Task, skip: Sequence[str], embeddings: bool = False
) -> nn.Module:
    """Round a trained model, and let its blocks learn one by one to do what they did before."""
    torch.manual_seed(0)  # what is read
    prepared = _calibrated(model, scheme, task, skip, embeddings)
    fit_blocks(prepared, task.train, teacher=model, progress=False)
    return prepared


def _lora_outside(
    model: nn.Module, scheme: QuantScheme, task: Task, skip: Sequence[str]
) -> nn.Module:
    return lora_outside(model, scheme, skip=skip)


FLOAT = Arm("float", finish=lambda model: model, float_share=1.0)
NEAREST = Arm("nearest", _with("absmax"), float_share=1.0)
LORA_OUTSIDE = Arm("lora-outside", _matrices_only(_lora_outside), convert_base, float_share=0.75)
"""Adapters in float beside a rounded base, as they are usually shipped: no model in few bits comes out,
so `compare` takes it, without `models`, and does not know it by name."""
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        NEAREST,
        Arm("nearest-mse", _with("mse"), float_share=1.0),
        Arm("gptq", _matrices_only(_gptq), float_share=1.0),
        Arm("blockwise", _blockwise, float_share=1.0),
        Arm("absmax", _with("absmax")),
        Arm("absmax-torchao-gradient", _with("absmax-torchao-gradient")),
        Arm("mse", _with("mse")),
        Arm("lsq", _calibrated),
        Arm("delayed", _with("absmax"), float_share=0.75),
        Arm("distilled", _with("absmax"), float_share=0.75, distil=True),
        Arm(
            "lora",
            _matrices_only(lora),
            lambda model: convert(model.merge_and_unload()),
            float_share=0.75,
        ),
        Arm("default", _calibrated, float_share=0.75, distil=True),
    )
}
"""The methods that `compare` knows by name."""
