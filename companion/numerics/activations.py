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
    if not x.numel():
        return x
    values = x.reshape(1, -1) if form.granularity == "tensor" else x
    if form.granularity == "block" and group_size:
        values = values.unflatten(-1, (-1, group_size))
    floats = values.detach().float()
    low, high = floats.amin(-1, keepdim=True), floats.amax(-1, keepdim=True)
    scale, zero_point = activation_grid(low, high, form)
    return fake_quantize_between(values, scale, zero_point, *form.integers).view_as(x)


def activation_grid(low: Tensor, high: Tensor, form: Activations) -> tuple[Tensor, Tensor | int]:
    """Span the grid of activations over the range they have.

    Parameters
    ----------
    low, high : Tensor, float32
        Smallest and largest of the values that share a scale; may be overwritten.
    form : Activations

    Returns
    -------
    scale : Tensor
        Distance between neighbouring grid points; NaN or infinite where the range is.
    zero_point : Tensor or int
        The integer that stands for 0.0, as a float.

    Examples
    --------
    >>> activation_grid(torch.tensor(-1.0), torch.tensor(2.0), Activations(2))
    (tensor(1.), tensor(-1.))
    """
    qmin, qmax = form.integers
    if form.symmetric:
        largest = torch.maximum(high, -low)
        return (largest / ((qmax - qmin) / 2)).clamp_(min=_SMALLEST_SCALE), 0
    # zero is always a grid point; ranges are short, and nobody reads them again
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    scale = ((high - low) / (qmax - qmin)).clamp_(min=_SMALLEST_SCALE)
    return scale, (qmin - (low / scale).round_()).clamp_(qmin, qmax)
