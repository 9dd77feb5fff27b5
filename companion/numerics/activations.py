"""Dynamic activations: the inputs of a layer, rounded over the range they have right now.

Built in chapter 10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from companion.numerics.affine import fake_quantize_between
from companion.numerics.scheme import Activations

_SMALLEST_SCALE = torch.finfo(torch.float32).eps


def fake_quantize_activations(
    x: Tensor, form: Activations, group_size: int | None = None
) -> Tensor:
    """Round the inputs of a layer as they will be when it is served, gradient straight through.

    Dynamic: the range is that of this very input, so nothing needs calibration.

    Parameters
    ----------
    x : Tensor, shape (..., features)
    form : Activations
    group_size : int, optional
        Features that share a scale when the granularity is "block".

    Returns
    -------
    Tensor, shape and dtype of `x`

    Examples
    --------
    >>> x = torch.tensor([[-1.0, 0.26, 2.0]])
    >>> fake_quantize_activations(x, Activations(bits=2))
    tensor([[-1.,  0.,  2.]])
    """
    qmin, qmax = form.integers
    values = x.reshape(1, -1) if form.granularity == "tensor" else x
    if form.granularity == "block" and group_size:
        values = values.unflatten(-1, (-1, group_size))
    floats = values.detach().float()
    low, high = floats.amin(-1, keepdim=True), floats.amax(-1, keepdim=True)
    if form.symmetric:
        largest = torch.maximum(high, -low)
        scale = (largest / ((qmax - qmin) / 2)).clamp_(min=_SMALLEST_SCALE)
        zero_point: Tensor | int = 0
    else:
        low, high = low.clamp_(max=0), high.clamp_(min=0)  # zero is always a grid point
        scale = ((high - low) / (qmax - qmin)).clamp_(min=_SMALLEST_SCALE)
        zero_point = (qmin - (low / scale).round_()).clamp_(qmin, qmax)
    return fake_quantize_between(values, scale, zero_point, qmin, qmax).view_as(x)
