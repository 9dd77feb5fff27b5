"""The scale that rounds given weights best, by trying.

Built in chapter 11.
"""

from __future__ import annotations

import torch
from torch import Tensor

from companion.numerics.affine import fake_quantize, symmetric_scale
from companion.numerics.scheme import QuantScheme


def best_ratio(
    groups: Tensor,
    scheme: QuantScheme,
    importance: Tensor | None = None,
    signed: bool | None = None,
) -> Tensor:
    """Search the scale that rounds each group with the smallest squared error.

    Parameters
    ----------
    groups : Tensor, shape (..., group_size)
    scheme : QuantScheme
    importance : Tensor, broadcastable to `groups`, optional
        What the squared error of each weight counts: the mean square of the input that it meets,
        for example.
    signed : bool, optional
        Whether a negative scale may turn the grid around; default: below eight bits.

    Returns
    -------
    Tensor, shape (..., 1), float32
        The best scale over the absmax scale, negative where a turned grid does better.

    Examples
    --------
    >>> best_ratio(torch.tensor([[-2.0, 1.0]]), QuantScheme(2, 2, torch.float32))
    tensor([[0.7500]])
    >>> best_ratio(torch.tensor([[2.0, -1.0]]), QuantScheme(2, 2, torch.float32))
    tensor([[-0.7500]])
    >>> best_ratio(torch.tensor([[4.0, 1.0]]), QuantScheme(2, 2, torch.float32), torch.tensor([9, 1]))
    tensor([[-0.7500]])
    """
    groups = groups.float()
    if importance is not None:  # a group of which nothing counts is searched as if all did
        importance = importance.float().expand_as(groups)
        importance = importance.masked_fill(importance.sum(-1, keepdim=True) == 0, 1)
    absmax = symmetric_scale(groups, scheme.weight_bits)
    best = torch.ones_like(absmax)
    smallest = torch.full_like(absmax, torch.inf)
    # Eight-bit kernels expect positive scales, and one integer of 256 is not worth a sign.
    signs = (1, -1) if (scheme.weight_bits < 8 if signed is None else signed) else (1,)
    for ratio in _RATIOS:
        for share in (ratio * sign for sign in signs):
            scale = (absmax * share).to(scheme.scale_dtype)
            error = (fake_quantize(groups, scale, bits=scheme.weight_bits) - groups).square_()
            if importance is not None:
                error = error.mul_(importance)
            error = error.sum(-1, keepdim=True)
            better = error < smallest
            best = torch.where(better, share, best)
            smallest = torch.where(better, error, smallest)
    return best


_RATIOS = [step / 40 for step in range(44, 9, -1)]  # 1.1 down to 0.25 of the absmax scale
