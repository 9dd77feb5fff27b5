"""Dynamic activations: the inputs of a layer, rounded over the range they have right now.

Built in chapter 10.
"""

from __future__ import annotations

import threading
import weakref

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
    return _fake_quantize(x, form, group_size)[0]


def _fake_quantize(x: Tensor, form: Activations, group_size: int | None) -> tuple[Tensor, bool]:
    """Return `x` rounded, and whether nothing is kept for the backward pass."""
    if not x.numel():
        return x, True
    values = x.reshape(1, -1) if form.granularity == "tensor" else x
    if form.granularity == "block" and group_size:
        values = values.unflatten(-1, (-1, group_size))
    floats = values.detach().float()
    low, high = floats.amin(-1, keepdim=True), floats.amax(-1, keepdim=True)
    scale, zero_point = activation_grid(low, high, form)
    if _covers(low, high, scale, zero_point, form):
        return _RoundInside.apply(values, scale).view_as(x), True
    rounded = fake_quantize_between(values, scale, zero_point, *form.integers).view_as(x)
    return rounded, not rounded.requires_grad


def fake_quantize_inputs(x: Tensor, form: Activations, group_size: int | None = None) -> Tensor:
    """Do what `fake_quantize_activations` does, once for neighbouring layers with one input.

    The query, key and value of an attention read the same tensor. The last one rounded is
    remembered for as long as it lives and nobody writes to it; where gradients are wanted, on
    CPUs alone. Do not write to the result.

    Parameters
    ----------
    x, form, group_size
        As in `fake_quantize_activations`.

    Returns
    -------
    Tensor, shape and dtype of `x`

    Examples
    --------
    >>> x, form = torch.tensor([[-1.0, 0.26, 2.0]]), Activations(bits=2)
    >>> fake_quantize_inputs(x, form) is fake_quantize_inputs(x, form)
    True
    >>> fake_quantize_inputs(x.mul_(2), form)
    tensor([[-2.,  0.,  4.]])
    """
    if type(x) is not Tensor or torch.compiler.is_compiling() or x.is_inference():
        return fake_quantize_activations(x, form, group_size)  # changes of it would not show
    state = (form, group_size, x._version, x.data_ptr(), x.requires_grad, *_surroundings())
    last: _Last | None = getattr(_here, "last", None)
    if last is not None and last.state == state and last.x() is x and last.rounded is not None:
        return last.rounded
    rounded, keeps_nothing = _fake_quantize(x, form, group_size)
    # what is kept serves one backward pass, and the layers may ask for one each
    _here.last = _Last(x, state, rounded) if keeps_nothing else None
    return rounded


class _Last:
    """The tensor rounded last, held weakly, and its rounded form, for as long."""

    def __init__(self, x: Tensor, state: tuple, rounded: Tensor) -> None:
        self.state, self.rounded = state, rounded
        self.x = weakref.ref(x, self._forget)

    def _forget(self, _) -> None:
        self.rounded = None


_here = threading.local()


def _surroundings() -> tuple:
    """Whether gradients are recorded, and who keeps what they need."""
    # gradient checkpointing counts what each of its segments saves: none may share with another
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return torch.is_grad_enabled(), hooks and weakref.ref(hooks[0])


def _covers(
    low: Tensor, high: Tensor, scale: Tensor, zero_point: Tensor | int, form: Activations
) -> bool:
    """Whether no value can be clipped: rounding keeps order, so the outermost two decide.

    Only where the answer costs nothing: a GPU would have to be waited for.
    """
    if scale.device.type != "cpu" or torch.compiler.is_compiling() or type(scale) is not Tensor:
        return False
    qmin, qmax = form.integers
    inverse = 1.0 / scale
    bottom, top = (low * inverse).round_() + zero_point, (high * inverse).round_() + zero_point
    return bool(((bottom >= qmin) & (top <= qmax)).all())  # never where a range is not finite


class _RoundInside(torch.autograd.Function):
    """Round to a grid that clips nothing: neither zero point nor mask is needed."""

    @staticmethod
    def forward(ctx, x, scale):
        rounded = torch.mul(x.float(), 1.0 / scale).round_().mul_(scale)
        return rounded.add_(0.0).to(x.dtype)  # -0.0 becomes 0.0

    @staticmethod
    def backward(ctx, grad):
        return grad, None


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
