"""The affine grid by formula: choose a scale, round to integers, come back, learn through it.

Every function treats the **last dimension as one group**: ``x`` has shape ``(..., n)``, its
scale ``(..., 1)``. Per-tensor, per-channel, per-group: three views (`to_groups`).
Built in chapters 4, 6 and 9.

References
----------
Jacob et al., "Quantization and training of neural networks for efficient
integer-arithmetic-only inference", CVPR 2018 (the affine grid).
Bengio, Léonard and Courville, "Estimating or propagating gradients through stochastic
neurons", 2013 (the straight-through estimator).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from companion.errors import SchemeError, expect
from companion.numerics.scheme import integer_range

_SMALLEST_SCALE = torch.finfo(torch.float32).eps  # an all-zero group still needs a divisor


def to_groups(x: Tensor, group_size: int | None = None) -> Tensor:
    """View a weight so that its last dimension is one group.

    Parameters
    ----------
    x : Tensor, shape (rows, ...)
        A weight matrix, or a convolution's kernel whose rows are output channels.
    group_size : int, optional
        Neighbours along a row that share a scale; None keeps the whole row.

    Returns
    -------
    Tensor, shape (rows, groups, group_size)

    Raises
    ------
    SchemeError
        If `group_size` does not divide the row, with the sizes that do.

    Examples
    --------
    >>> to_groups(torch.zeros(8, 64), 32).shape
    torch.Size([8, 2, 32])
    >>> to_groups(torch.zeros(16, 3, 3, 3)).shape
    torch.Size([16, 1, 27])
    """
    rows = x.flatten(1)
    size = rows.shape[1] if group_size is None else group_size
    if rows.shape[1] % size:
        fits = [s for s in range(1, rows.shape[1] + 1) if rows.shape[1] % s == 0]
        raise SchemeError(
            f"group_size {size} does not divide a row of {rows.shape[1]} weights; it could be "
            f"{', '.join(map(str, fits[-6:]))}, or None for one scale per row"
        )
    return rows.unflatten(1, (-1, size))


def choose_scale(
    x: Tensor,
    bits: int = 8,
    *,
    signed: bool = True,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Choose the step between neighbouring integers so that the grid spans each group.

    Parameters
    ----------
    x : Tensor, shape (..., n), floating point
        Values to be covered; each row of n values gets its own scale.
    bits : int
        Width of the integers, 2 to 8.
    signed : bool
        Integers from ``-2**(bits-1)`` when True, from 0 when False.
    symmetric : bool
        True: zero sits on integer 0 and the larger side decides. False: the grid runs from
        the smallest to the largest value (0 always included) and the zero point moves.
    scale_dtype : torch.dtype
        Precision the scale is rounded to; it is computed in float32.

    Returns
    -------
    scale : Tensor, shape (..., 1), `scale_dtype`
        Distance between two neighbouring grid points.
    zero_point : Tensor, shape (..., 1), int32
        The integer that stands for 0.0.

    Examples
    --------
    >>> scale, zero_point = choose_scale(torch.tensor([-1.0, 0.5, 3.0]), bits=2)
    >>> scale, zero_point
    (tensor([2.]), tensor([0], dtype=torch.int32))
    >>> choose_scale(torch.tensor([-1.0, 0.5, 3.0]), bits=2, symmetric=False)[1]
    tensor([-1], dtype=torch.int32)
    """
    expect("choose_scale", "x", x, Tensor)
    expect("choose_scale", "bits", bits, int)
    if symmetric and not signed:
        raise SchemeError("a symmetric grid needs signed integers: pass signed=True")
    qmin, qmax = integer_range(bits, signed)
    x = x.detach().float()
    if symmetric:
        scale = symmetric_scale(x, bits, scale_dtype)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (qmax - qmin)).clamp(min=_SMALLEST_SCALE).to(scale_dtype)
    zero_point = (qmin - (low / scale.float()).round()).clamp(qmin, qmax)
    return scale, zero_point.to(torch.int32)


def symmetric_scale(x: Tensor, bits: int, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the scale of `choose_scale` where the grid is symmetric and the zero point 0.

    Examples
    --------
    >>> symmetric_scale(torch.tensor([-1.0, 0.5, 3.0]), bits=2)
    tensor([2.])
    """
    largest = _largest(x.detach().float())
    return (largest / ((2**bits - 1) / 2)).clamp(min=_SMALLEST_SCALE).to(scale_dtype)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | int = 0, bits: int = 8, *, signed: bool = True
) -> Tensor:
    """Round to the nearest integer of the grid: ``clip(round(x * (1 / scale)) + zero_point)``.

    PyTorch's kernels multiply too: a division would move values that sit on a tie.

    Parameters
    ----------
    x : Tensor, shape (..., n), floating point
    scale : Tensor, shape (..., 1) or broadcastable
    zero_point : Tensor or int
    bits : int
        Width of the integers, 2 to 8.
    signed : bool
        As in `choose_scale`.

    Returns
    -------
    Tensor, shape of `x`, int8 (uint8 if not `signed`)

    Examples
    --------
    >>> quantize(torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([2.0]), bits=2)
    tensor([0, 0, 1], dtype=torch.int8)
    """
    expect("quantize", "x", x, Tensor)
    expect("quantize", "scale", scale, Tensor)
    rounded = _round(x, scale, zero_point)
    return rounded.clamp(*integer_range(bits, signed)).to(torch.int8 if signed else torch.uint8)


def dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return from integers to values: ``(q - zero_point) * scale``, computed in float32.

    Parameters
    ----------
    q : Tensor, integer, shape (..., n)
    scale, zero_point : Tensor, shape (..., 1)
    dtype : torch.dtype
        Type of the result.

    Returns
    -------
    Tensor, shape of `q`, `dtype`

    Examples
    --------
    >>> dequantize(torch.tensor([0, 0, 1], dtype=torch.int8), torch.tensor([2.0]))
    tensor([0., 0., 2.])
    """
    expect("dequantize", "q", q, Tensor)
    expect("dequantize", "scale", scale, Tensor)
    values = q.float()
    if not isinstance(zero_point, int) or zero_point:
        values = values - zero_point
    return (values * scale.float()).to(dtype)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | int = 0, bits: int = 8, *, signed: bool = True
) -> Tensor:
    """Round to the grid but stay in floating point, with a gradient that flows straight through.

    Forward, it equals ``dequantize(quantize(x))`` bit for bit. Backward, the rounding is
    treated as the identity: the gradient is 1 where the rounded value lies inside the integer
    range, its ends included, and 0 where it was clipped. Both match
    ``torch.fake_quantize_per_tensor_affine`` and ``..._per_channel_affine``.

    Parameters
    ----------
    x : Tensor, shape (..., n), floating point
    scale, zero_point : Tensor, shape (..., 1)
        From `choose_scale`; they receive no gradient here.
    bits : int
        Width of the integers, 2 to 8.
    signed : bool
        As in `choose_scale`.

    Returns
    -------
    Tensor, shape and dtype of `x`

    Examples
    --------
    >>> x = torch.tensor([-1.0, 0.5, 9.0], requires_grad=True)
    >>> y = fake_quantize(x, torch.tensor([2.0]), bits=2)
    >>> y.detach()
    tensor([0., 0., 2.])
    >>> y.sum().backward(); x.grad
    tensor([1., 1., 0.])
    """
    expect("fake_quantize", "x", x, Tensor)
    expect("fake_quantize", "scale", scale, Tensor)
    return fake_quantize_between(x, scale, zero_point, *integer_range(bits, signed))


def fake_quantize_between(
    x: Tensor, scale: Tensor, zero_point: Tensor | int, qmin: int, qmax: int
) -> Tensor:
    """Fake-quantize to any range of integers, such as the 0 to 127 of fast int8 kernels."""
    return _FakeQuantize.apply(x, scale, zero_point, qmin, qmax)


def as_stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to the type that stores them; what would vanish stays its smallest number.

    Examples
    --------
    >>> as_stored(torch.tensor([0.1, 1e-9]), torch.float16)
    tensor([9.9976e-02, 5.9605e-08], dtype=torch.float16)
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return _opaque(scale, dtype)
    stored = scale.to(dtype)
    return stored.masked_fill(stored == 0, _SMALLEST[dtype])


@torch.library.custom_op(
    "companion::as_stored", mutates_args=(), schema="(Tensor scale, ScalarType dtype) -> Tensor"
)
def _opaque(scale, dtype):
    """`as_stored` for compilers, which drop a rounding to half precision when they can see it."""
    return as_stored(scale, dtype)


@_opaque.register_fake
def _(scale, dtype):
    return torch.empty_like(scale, dtype=dtype)


_SMALLEST = {
    dtype: torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def _largest(x: Tensor) -> Tensor:
    """Return ``x.abs().amax(-1, keepdim=True)``."""
    if x.device.type != "cpu" or type(x) is not Tensor or torch.compiler.is_compiling():
        return x.abs().amax(-1, keepdim=True)
    largest = x.new_empty(*x.shape[:-1], 1)
    if largest.numel():
        for part, found in parts_of(x, largest):
            absolute = torch.abs(part, out=workspace(part.shape, part))
            torch.amax(absolute, -1, keepdim=True, out=found)
    return largest


def parts_of(groups: Tensor, *others: Tensor | None) -> Iterable[tuple]:
    """Cut tensors of as many groups, (..., n) or (..., 1), into parts that fit a CPU's caches.

    Examples
    --------
    >>> [[tuple(t.shape) for t in part] for part in parts_of(torch.ones(2, 3, 4), torch.ones(2, 3, 1))]
    [[(2, 3, 4), (2, 3, 1)]]
    """
    if groups.device.type != "cpu" or groups.numel() <= _PART:
        return ((groups, *others),)
    count, size = groups.shape[:-1].numel(), groups.shape[-1]
    step = max(1, _PART // size)
    parts = -(-count // step)
    flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (groups, *others)]
    return zip(*([None] * parts if t is None else t.split(step) for t in flat), strict=True)


def workspace(shape: torch.Size, like: Tensor, place: int = 0) -> Tensor:
    """Return memory, in float32, that this thread is done with before it asks for that place again.

    Fresh memory costs a CPU more than all the arithmetic: it comes page by page, and cold.

    Examples
    --------
    >>> workspace(torch.Size([2, 3]), torch.ones(1)).shape
    torch.Size([2, 3])
    """
    count = shape.numel()
    if like.device.type != "cpu" or count > _KEPT:
        return torch.empty(shape, device=like.device)
    kept = vars(_here).setdefault("workspaces", {})
    if place not in kept or kept[place].numel() < count:
        with torch.inference_mode(False):  # or nothing outside that mode could write to it
            kept[place] = torch.empty(count)
    return kept[place][:count].view(shape)


_PART = 2**20
"""Numbers gone through at a time on a CPU: four megabytes, so that a few such tensors fit its caches.
Smaller parts lose more at their many beginnings than they win."""
_KEPT = 2**24
"""Workspace that a thread keeps, in numbers: 64 megabytes; larger weights ask for it each time."""
_here = threading.local()


def _round(x: Tensor, scale: Tensor, zero_point: Tensor | int) -> Tensor:
    rounded = torch.mul(x.float(), 1.0 / scale.float()).round_()
    return rounded if isinstance(zero_point, int) and zero_point == 0 else rounded.add_(zero_point)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, qmin, qmax):
        rounded = _round(x, scale, zero_point)
        clipped = rounded.clamp(qmin, qmax)
        if ctx.needs_input_grad[0]:
            # Whole steps outside the range, cut at one, mark what was clipped. In place and
            # without a comparison, both of which CPUs reward.
            ctx.save_for_backward(rounded.sub_(clipped).abs_().clamp_(max=1).neg_().add_(1))
        if not isinstance(zero_point, int) or zero_point:
            clipped.sub_(zero_point)
        return clipped.mul_(scale.float()).add_(0.0).to(x.dtype)  # -0.0 becomes 0.0

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return (grad * inside).to(grad.dtype), None, None, None, None
