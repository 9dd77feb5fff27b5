"""Weights on their grid while they train: one pass over them forward, one pass back.

Nothing is kept for the backward pass but the weight itself and its scales: what was rounded to
where costs less to compute again than to write to memory and to read from it. On a CPU the
weight is gone through in parts that stay in the cache. Built in chapters 10 and 16.

References
----------
Bengio, Léonard and Courville, "Estimating or propagating gradients through stochastic
neurons", 2013 (the straight-through estimator).
Esser et al., "Learned step size quantization", ICLR 2020 (the gradient of the step).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion.numerics.affine import as_stored, parts_of, workspace


class Grid(NamedTuple):
    """The integers of a weight, the type of their scale, and where a gradient passes.

    Parameters
    ----------
    qmin, qmax : int
    scale_dtype : torch.dtype
        Scales are rounded to it before weights are.
    ends : bool
        Whether a weight on the smallest or largest integer receives its gradient.
    """

    qmin: int
    qmax: int
    scale_dtype: torch.dtype = torch.float32
    ends: bool = True

    @property
    def between(self) -> tuple[float, float]:
        """Rounded weights strictly between these two receive their gradient."""
        margin = 0.5 if self.ends else -0.5
        return self.qmin - margin, self.qmax + margin


def round_weight(groups: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Round groups of weights to their grid with a straight-through gradient.

    Parameters
    ----------
    groups : Tensor, shape (..., n), floating point
    scale : Tensor, shape (..., 1)
        Where it requires a gradient, it receives that of Esser et al., equation 3: rounded minus
        exact position inside the range, the end of the range outside, over ``sqrt(n * qmax)``.
    grid : Grid

    Returns
    -------
    Tensor, shape and dtype of `groups`

    Examples
    --------
    >>> weight = torch.tensor([[0.2, -1.5, 5.0]], requires_grad=True)
    >>> scale = torch.tensor([[1.0]], requires_grad=True)
    >>> rounded = round_weight(weight, scale, Grid(-2, 1))
    >>> rounded.detach()
    tensor([[ 0., -2.,  1.]])
    >>> rounded.sum().backward(); weight.grad
    tensor([[1., 1., 0.]])
    """
    return _RoundWeight.apply(groups, scale, grid)


def rounded_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    grid: Grid,
    held: Held | None = None,
) -> Tensor:
    """Compute ``F.linear(x, rounded weight, bias)``, keeping no rounded weight for the way back.

    Parameters
    ----------
    x : Tensor, shape (..., columns)
    weight : Tensor, shape (rows, columns)
    scale : Tensor, shape (rows, groups, 1)
    bias : Tensor, shape (rows,), optional
    grid : Grid
    held : Held, optional
        Where the rounded weight is kept after all, for the products to come (`hold_weights`).

    Examples
    --------
    >>> x, weight = torch.ones(1, 2), torch.tensor([[0.2, -1.5], [1.4, 5.0]])
    >>> rounded_linear(x, weight, torch.ones(2, 1, 1), None, Grid(-2, 1))
    tensor([[-2.,  2.]])
    """
    return _RoundedLinear.apply(x, weight, scale, bias, grid, held)


@dataclass
class Held:
    """What was computed of one weight and stays true while nothing that it depends on changes.

    Parameters
    ----------
    state : list
        Where those tensors are, and in which version.
    may_keep : bool
        Whether there is room for the rounded weight.
    scale : Tensor, optional
    rounded : tuple of Tensor, optional
        The scale as stored, and the weight on its grid.
    """

    state: list
    may_keep: bool
    scale: Tensor | None = None
    rounded: tuple[Tensor, Tensor] | None = None


class HeldWeights(dict):
    """`Held` by quantizer, rounded weights of up to a gigabyte together."""

    room = 2**30


@contextmanager
def hold_weights(held: HeldWeights | None = None) -> Iterator[None]:
    """Say that no weight changes inside: each is then rounded once, however often it is used.

    For several passes between two steps of an optimizer: accumulated gradients, an evaluation.
    Up to a gigabyte of rounded weights is kept meanwhile; beyond that it is their scales alone.
    A step of an optimizer is noticed, and so is anything else that PyTorch counts as a change;
    what is written through ``.data`` is not.

    Parameters
    ----------
    held : HeldWeights, optional
        What an earlier block filled, to go on with.

    Examples
    --------
    >>> from companion import QuantScheme, prepare_qat
    >>> model = prepare_qat(nn.Sequential(nn.Linear(32, 8)), QuantScheme(4), "absmax")
    >>> with hold_weights():
    ...     same = torch.equal(model(torch.ones(1, 32)), model(torch.ones(1, 32)))
    >>> same
    True
    """
    before, _here.held = getattr(_here, "held", None), HeldWeights() if held is None else held
    try:
        yield
    finally:
        _here.held = before


def held_of(quantizer: nn.Module, weight: Tensor) -> Held | None:
    """Return what is kept of the weight of a quantizer, or None where `hold_weights` is not on.

    Nothing is kept of a weight that is computed anew each time: it has no versions to go by.
    """
    everything: HeldWeights | None = getattr(_here, "held", None)
    if everything is None or not isinstance(weight, nn.Parameter):
        return None
    tensors = weight, *quantizer.parameters(), *quantizer.buffers()
    if any(t.is_inference() for t in tensors):
        return None
    state = [(t.data_ptr(), t._version, t.dtype, t.shape) for t in tensors]
    held = everything.get(quantizer)
    if held is None:
        held = everything[quantizer] = Held(state, weight.nbytes <= everything.room)
        everything.room -= weight.nbytes * held.may_keep
    elif held.state != state:
        held = everything[quantizer] = Held(state, held.may_keep)
    return held


_here = threading.local()


def can_be_fused(x: Tensor, weight: Tensor) -> bool:
    """Whether `rounded_linear` may stand in for the product with a rounded weight.

    Not where a compiler reads the operations and fuses them itself, not under autocast, which
    chooses the type of the product, and not for tensors that stand for something else (DTensor).
    """
    return (
        _is_ordinary(x)
        and _is_ordinary(weight)
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )


def _is_ordinary(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()


class _RoundWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, groups, scale, grid):
        stored = as_stored(scale, grid.scale_dtype).float()
        ctx.save_for_backward(groups, scale, stored)
        ctx.grid = grid
        if not _is_ordinary(groups):
            rounded = (groups.float() * stored.reciprocal()).round().clamp(grid.qmin, grid.qmax)
            return (rounded * stored + 0.0).to(groups.dtype)
        rounded = torch.empty_like(groups, memory_format=torch.contiguous_format)
        _forward(groups, stored, grid, rounded)
        return rounded.add_(0.0)  # -0.0 becomes 0.0

    @staticmethod
    def backward(ctx, grad):
        groups, scale, stored = ctx.saved_tensors
        learns = ctx.needs_input_grad[1]
        if torch.is_grad_enabled() or not _is_ordinary(groups):
            stored = as_stored(scale.detach(), ctx.grid.scale_dtype).float()
            return *_by_formula(grad, groups.detach(), stored, ctx.grid, learns), None
        passed = torch.empty_like(grad, memory_format=torch.contiguous_format)
        to_scale = _backward(groups, stored, ctx.grid, grad, passed, learns)
        return passed, to_scale, None


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale, bias, grid, held):
        if held is not None and held.rounded is not None:
            ctx.save_for_backward(x, weight, scale, *held.rounded)
            ctx.grid = grid
            return F.linear(x, held.rounded[1], bias)
        stored = as_stored(scale, grid.scale_dtype).float()
        keep = held is not None and held.may_keep
        rounded = torch.empty_like(weight) if keep else _space(weight)
        _forward(_groups(weight, scale), stored, grid, _groups(rounded, scale))
        if keep:
            held.rounded = stored, rounded
            ctx.save_for_backward(x, weight, scale, stored, rounded)
        else:
            ctx.save_for_backward(x, weight, scale, stored)
        ctx.grid = grid
        return F.linear(x, rounded, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale, stored, *kept = ctx.saved_tensors
        x_wants, weight_wants, learns, bias_wants, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        to_bias = rows.sum(0) if bias_wants else None
        if torch.is_grad_enabled():  # a gradient of gradients: by operations that have one
            inputs = [
                t for t, w in zip((x, weight, scale), ctx.needs_input_grad, strict=False) if w
            ]
            rounded = round_weight(_groups(weight, scale), scale, ctx.grid).view_as(weight)
            found = iter(torch.autograd.grad(F.linear(x, rounded), inputs, grad, create_graph=True))
            return (
                *(next(found) if w else None for w in ctx.needs_input_grad[:3]),
                to_bias,
                None,
                None,
            )
        groups, to_weight, to_scale = _groups(weight, scale), None, None
        rounded = kept[0] if kept else _space(weight) if x_wants else None
        if weight_wants or learns:
            to_weight = rows.t().mm(x.reshape(-1, x.shape[-1]))
            passed = _groups(to_weight, scale)
            values = None if rounded is None or kept else _groups(rounded, scale)
            to_scale = _backward(groups, stored, ctx.grid, passed, passed, learns, values)
        elif rounded is not None and not kept:
            _forward(groups, stored, ctx.grid, _groups(rounded, scale))
        to_x = rows.mm(rounded).view_as(x) if x_wants else None
        return to_x, to_weight if weight_wants else None, to_scale, to_bias, None, None


def _space(weight: Tensor) -> Tensor:
    """Return memory of a weight's shape and dtype that is done with before the next product."""
    if weight.dtype == torch.float32:
        return workspace(weight.shape, weight)
    return torch.empty_like(weight)


def _groups(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.view(*weight.shape[:-1], scale.shape[-2], -1)


def _by_formula(
    grad: Tensor, groups: Tensor, stored: Tensor, grid: Grid, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """Return what reaches weights and scale, by operations that compile and have gradients."""
    low, high = grid.between
    position = groups.float() * (1.0 / stored)
    rounded = position.round()
    inside = (rounded > low) & (rounded < high)
    passed = torch.where(inside, grad, 0.0)
    if not learns:
        return passed, None
    clipped = rounded.clamp(grid.qmin, grid.qmax)
    slope = torch.where(inside, clipped - position, clipped)
    return passed, (grad * slope).sum(-1, keepdim=True) * _share(groups, grid)


def _forward(groups: Tensor, stored: Tensor, grid: Grid, values: Tensor) -> None:
    """Write the rounded weights to `values`, part by part."""
    in_place = values.dtype == torch.float32
    for weight, inverted, step, value in parts_of(groups, stored.reciprocal(), stored, values):
        rounded = torch.mul(weight.float(), inverted, out=value if in_place else None)
        rounded.round_().clamp_(grid.qmin, grid.qmax).mul_(step)
        if not in_place:
            value.copy_(rounded)


def _backward(
    groups: Tensor,
    stored: Tensor,
    grid: Grid,
    grad: Tensor,
    passed: Tensor,
    learns: bool,
    values: Tensor | None = None,
) -> Tensor | None:
    """Write to `passed` what of `grad` reaches the weights, part by part.

    Parameters
    ----------
    grad, passed : Tensor, shape of `groups`
        They may be the same.
    learns : bool
        Whether to return the gradient of the scale.
    values : Tensor, shape of `groups`, optional
        Receives the rounded weights once more, for the gradient of what they multiply.
    """
    low, high = grid.between
    to_scale = torch.empty(stored.shape, dtype=torch.promote_types(grad.dtype, stored.dtype),
                           device=stored.device) if learns else None  # fmt: skip
    tensors = groups, stored.reciprocal(), stored, grad, passed, to_scale, values
    in_place = values is not None and values.dtype == torch.float32
    for weight, inverted, step, upstream, through, slope, value in parts_of(*tensors):
        place = value if in_place else None
        if slope is None:
            rounded = torch.mul(weight.float(), inverted, out=place).round_()
            clipped = rounded
        else:
            position = torch.mul(weight.float(), inverted, out=workspace(weight.shape, weight, 1))
            rounded = torch.round(position, out=workspace(weight.shape, weight, 2))
            clipped = torch.clamp(rounded, grid.qmin, grid.qmax, out=place)
            # Esser et al., eq. 3: round(w/s) - w/s inside the range, the end of the range outside
            _keep_between(position, rounded, low, high, position)
            torch.sub(clipped, position, out=position)
            wide = slope.dtype == torch.float64
            product = upstream * position if wide else position.mul_(upstream)
            torch.sum(product, -1, keepdim=True, out=slope)
        _keep_between(upstream, rounded, low, high, through)
        if value is not None:
            if slope is None:
                clipped.clamp_(grid.qmin, grid.qmax)
            clipped.mul_(step)
            if not in_place:
                value.copy_(clipped)
    return None if to_scale is None else to_scale.mul_(_share(groups, grid))


def _keep_between(values: Tensor, places: Tensor, low: float, high: float, out: Tensor) -> None:
    """Copy values to `out`, with zeros where the place is not strictly between two ends."""
    # the gradient of a clamp is the one kernel that compares and selects in a single pass
    keep = torch.ops.aten.hardtanh_backward
    if values.dtype in (torch.float32, torch.float64):
        keep.grad_input(values, places.to(values.dtype), low, high, grad_input=out)
    else:
        out.copy_(keep(values.to(places.dtype), places, low, high))


def _share(groups: Tensor, grid: Grid) -> float:
    return (groups.shape[-1] * grid.qmax) ** -0.5  # Esser et al., section 2.2
