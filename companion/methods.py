"""How a range is chosen while training: weights by method, activations as they come.

Floor 3 of the house. Built in chapter 10.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from companion.errors import SchemeError
from companion.integers import (
    choose_scale,
    fake_quantize,
    fake_quantize_between,
    quantize,
)
from companion.scheme import Activations, QuantScheme

_SMALLEST_SCALE = torch.finfo(torch.float32).eps


class Absmax(nn.Module):
    """The grid follows the weights: the largest of each group always sits at its end.

    The scale is computed anew in every forward and rounded to the scheme's `scale_dtype`, so
    that training already sees the scale that conversion stores.

    Parameters
    ----------
    scheme : QuantScheme

    Examples
    --------
    >>> quantizer = Absmax(QuantScheme(weight_bits=2, group_size=2))
    >>> quantizer(torch.tensor([[0.2, -1.5, 3.0, 1.0]]))
    tensor([[ 0., -2.,  2.,  0.]])
    """

    def __init__(self, scheme: QuantScheme) -> None:
        super().__init__()
        self.scheme = scheme

    def groups(self, weight: Tensor) -> Tensor:
        """View the last dimension as (groups, group_size)."""
        return weight.unflatten(-1, (-1, self.scheme.group_size or weight.shape[-1]))

    def scale(self, groups: Tensor) -> Tensor:
        """Return one scale per group, shape (..., groups, 1)."""
        return choose_scale(groups, self.scheme.weight_bits, scale_dtype=self.scheme.scale_dtype)[0]

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight, of the same shape and dtype."""
        groups = self.groups(weight)
        return self.fake(groups, self.scale(groups)).view_as(weight)

    def fake(self, groups: Tensor, scale: Tensor) -> Tensor:
        """Round to the grid with a straight-through gradient."""
        return fake_quantize(groups, scale, bits=self.scheme.weight_bits)

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return int8 of the weight's shape and scales of shape (..., groups): what is stored."""
        groups = self.groups(weight.detach())
        scale = self.scale(groups)
        return quantize(groups, scale, bits=self.scheme.weight_bits).view_as(weight), scale[..., 0]

    def extra_repr(self) -> str:
        return f"{self.scheme.weight_bits} bits, group size {self.scheme.group_size or 'row'}"


class AbsmaxTorchaoGradient(Absmax):
    """Absmax with the gradient of torchao 0.18: none where a weight sits at an end of the grid.

    torchao rounds, then clamps; its gradient is that of a clamp applied to the rounded value.
    Kept as an arm to compare with; the forward is the same.

    Examples
    --------
    >>> weight = torch.tensor([[0.2, -1.5, 3.0, 1.0]], requires_grad=True)
    >>> AbsmaxTorchaoGradient(QuantScheme(weight_bits=2, group_size=2))(weight).sum().backward()
    >>> weight.grad
    tensor([[1., 0., 0., 1.]])
    """

    def fake(self, groups: Tensor, scale: Tensor) -> Tensor:
        qmin, qmax = self.scheme.integers
        wide = fake_quantize(groups, scale, bits=8)  # rounding alone: no value leaves 8 bits
        rounded = quantize(groups.detach(), scale, bits=8)
        inside = (rounded > qmin) & (rounded < qmax)
        return torch.where(inside, wide, super().fake(groups, scale).detach())


METHODS: dict[str, type[Absmax]] = {
    "absmax": Absmax,
    "absmax-torchao-gradient": AbsmaxTorchaoGradient,
}


def make_quantizer(scheme: QuantScheme, method: str = "absmax") -> Absmax:
    """Return a fresh weight quantizer of a method, by name.

    Examples
    --------
    >>> make_quantizer(QuantScheme(weight_bits=4))
    Absmax(4 bits, group size 32)
    """
    if method not in METHODS:
        raise SchemeError(f"method {method!r} is unknown: choose one of {', '.join(METHODS)}")
    return METHODS[method](scheme)


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
