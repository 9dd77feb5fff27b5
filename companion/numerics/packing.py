"""Integers without gaps: 4 bits two to a byte, 3 bits eight in three bytes.

Built in chapter 9.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from companion.errors import SchemeError
from companion.numerics.scheme import integer_range


def pack(q: Tensor, bits: int) -> Tensor:
    """Store integers without gaps: 4 bits two to a byte, 3 bits eight in three bytes.

    Eight neighbours become `bits` bytes, the first in the lowest bits, in two's complement;
    a last dimension that eight does not divide is padded.

    Parameters
    ----------
    q : Tensor, shape (..., n), int8
    bits : int
        Width of one integer, 2 to 8.

    Returns
    -------
    Tensor, shape (..., ceil(n / 8) * bits), uint8

    Raises
    ------
    SchemeError
        If one does not fit.

    Examples
    --------
    >>> pack(torch.tensor([1, 2, -1, 0, 0, 0, 0, 0], dtype=torch.int8), bits=4)
    tensor([33, 15,  0,  0], dtype=torch.uint8)
    """
    qmin, qmax = integer_range(bits)
    if q.numel() and not qmin <= q.min() <= q.max() <= qmax:
        raise SchemeError(f"an integer lies outside {qmin} to {qmax} and does not fit {bits} bits")
    q = nn.functional.pad(q, (0, -q.shape[-1] % 8)).unflatten(-1, (-1, 8))
    patterns = q.to(torch.int64) & (2**bits - 1)
    eight = (patterns << (bits * torch.arange(8, device=q.device))).sum(-1, keepdim=True)
    return ((eight >> (8 * torch.arange(bits, device=q.device))) & 255).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Bring packed integers back: the inverse of `pack`.

    Parameters
    ----------
    packed : Tensor, shape (..., ceil(n / 8) * bits), uint8
    bits : int
    n : int
        How many integers each row holds.

    Returns
    -------
    Tensor, shape (..., n), int8

    Examples
    --------
    >>> q = torch.tensor([[-4, 3, 0, 1, -1]], dtype=torch.int8)
    >>> torch.equal(unpack(pack(q, bits=3), bits=3, n=5), q)
    True
    """
    octets = packed.unflatten(-1, (-1, bits)).to(torch.int64)
    eight = (octets << (8 * torch.arange(bits, device=packed.device))).sum(-1, keepdim=True)
    patterns = (eight >> (bits * torch.arange(8, device=packed.device))) & (2**bits - 1)
    sign = 2 ** (bits - 1)
    return ((patterns ^ sign) - sign).to(torch.int8).flatten(-2)[..., :n]
