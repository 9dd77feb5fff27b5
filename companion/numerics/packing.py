"""Integers without gaps, and floats in as few bytes as hold them.

Built in chapter 9.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from companion.errors import SchemeError
from companion.numerics.scheme import check_bits, integer_range


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
    TypeError
        If they are no tensor of integers.

    Examples
    --------
    >>> pack(torch.tensor([1, 2, -1, 0, 0, 0, 0, 0], dtype=torch.int8), bits=4)
    tensor([33, 15,  0,  0], dtype=torch.uint8)
    """
    qmin, qmax = integer_range(bits)
    _check(q, "pack")
    if q.numel() and not qmin <= q.min() <= q.max() <= qmax:
        raise SchemeError(f"an integer lies outside {qmin} to {qmax} and does not fit {bits} bits")
    count, width = _cell(bits)
    q = nn.functional.pad(q.to(torch.int8), (0, -q.shape[-1] % 8))
    cells = q.view(torch.uint8).unflatten(-1, (-1, count))
    packed = torch.zeros(*cells.shape[:-1], width, dtype=torch.uint8, device=q.device)
    pattern = 2**bits - 1
    for i in range(count):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= (cells[..., i] & pattern).bitwise_left_shift_(shift)
        if shift + bits > 8:  # the rest goes into the lowest bits of the next byte
            packed[..., byte + 1] |= (cells[..., i] & pattern).bitwise_right_shift_(8 - shift)
    return packed.flatten(-2)


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

    Raises
    ------
    SchemeError
        If `n` integers do not take that many bytes.
    TypeError
        If they are no tensor of bytes, or `n` is no whole number.

    Examples
    --------
    >>> q = torch.tensor([[-4, 3, 0, 1, -1]], dtype=torch.int8)
    >>> torch.equal(unpack(pack(q, bits=3), bits=3, n=5), q)
    True
    """
    check_bits(bits)
    _check(packed, "unpack", torch.uint8)
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"n={n!r} is no number of integers: give the length of a row")
    if packed.shape[-1] != -(-n // 8) * bits:
        raise SchemeError(
            f"{n} integers of {bits} bits are packed in {-(-n // 8) * bits} bytes, not in "
            f"{packed.shape[-1]}"
        )
    if bits == 8:
        return packed.view(torch.int8)[..., :n].clone()
    count, width = _cell(bits)
    octets = packed.unflatten(-1, (-1, width))
    word = _WORD[count]  # as wide as the integers of a cell will be
    words = torch.empty(octets.shape[:-1], dtype=word, device=packed.device)
    words.copy_(octets[..., 0])
    for i in range(1, width):
        words |= octets[..., i].to(word).bitwise_left_shift_(8 * i)
    for shift, stay, move in _SPREAD[bits]:
        moved = words.bitwise_left_shift(shift).bitwise_and_(move)
        words.bitwise_and_(stay).bitwise_or_(moved)
        del moved  # before the next step takes as much again
    sign = 2 ** (bits - 1)
    integers = words.view(torch.int8).bitwise_xor_(sign).sub_(sign)
    return integers[..., :n]


def _check(x: Tensor, call: str, dtype: torch.dtype | None = None) -> None:
    """Refuse what is no tensor of integers with at least one dimension."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{call}() takes a tensor of integers, not {type(x).__name__}")
    if (
        x.is_floating_point()
        or x.is_complex()
        or x.dtype not in (x.dtype if dtype is None else dtype,)
    ):
        wanted = "integers" if dtype is None else str(dtype)
        raise TypeError(f"{call}() takes a tensor of {wanted}, not of {x.dtype}")
    if not x.dim():
        raise SchemeError(f"{call}() takes rows of integers, and this tensor has no dimension")


def narrowest(x: Tensor) -> Tensor:
    """Return a large float32 tensor in 16 bits where these hold all its values, else itself.

    Parameters
    ----------
    x : Tensor

    Returns
    -------
    Tensor, shape of `x`, bfloat16, float16 or the type of `x`

    Examples
    --------
    >>> x = torch.randn(64, 64)
    >>> narrowest(x).dtype, narrowest(x.bfloat16().float()).dtype
    (torch.float32, torch.bfloat16)
    """
    if x.dtype == torch.float32 and x.numel() >= _LARGE:
        for dtype in (torch.bfloat16, torch.float16):
            narrow = x.to(dtype)
            if torch.equal(narrow.float(), x):
                return narrow
    return x


_LARGE = 4096  # values; of norms and biases there is little to save


_WORD = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes; the lowest byte is the first


def _cell(bits: int) -> tuple[int, int]:
    """Return how many integers fill how many whole bytes: 2 in 1 at four bits, 8 in 3 at three."""
    count = 8 // math.gcd(8, bits)
    return count, count * bits // 8


def _spread(bits: int) -> list[tuple[int, int, int]]:
    """Return how the integers of a cell come to lie one to a byte, by halving a word.

    The upper half of what each lane holds moves to the upper half of the lane; then each half is
    a lane. All words of a tensor take a step at once, in three passes that a processor's widest
    registers serve.

    Returns
    -------
    list of (shift, stay, move)
        How far the upper halves move, where the lower ones are, and where the upper ones arrive.
    """
    count, _ = _cell(bits)
    steps, lanes = [], 1
    while lanes < count:
        lane, half = 8 * count // lanes, bits * count // lanes // 2  # bits
        stay = sum((2**half - 1) << lane * i for i in range(lanes))
        steps.append((lane // 2 - half, stay, stay << lane // 2))
        lanes *= 2
    return steps


_SPREAD = {bits: _spread(bits) for bits in range(2, 8)}
