"""Layers as ONNX Runtime computes them: the same integers, laid out for its kernels.

PyTorch's exporter turns each of them into operators of ONNX Runtime; none is meant to run in
PyTorch. Built in chapter 15.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from companion.errors import UnsupportedModel
from companion.numerics.activations import fake_quantize_activations
from companion.numerics.packing import unpack
from companion.numerics.scheme import BLOCK8
from companion.qat.packed import DynamicInt8Linear, Packed, QuantizedEmbedding, QuantizedLinear

ROW_BLOCK = 32
"""A row with a single scale is served in blocks of so many weights, which repeat it."""
_SMALLEST_SCALE = torch.finfo(torch.float32).eps


def container_bits(bits: int) -> int:
    """Width in which ONNX Runtime keeps integers of `bits` bits: it has 2, 4 and 8.

    Examples
    --------
    >>> [container_bits(bits) for bits in (2, 3, 4, 5)]
    [2, 4, 4, 8]
    """
    return next(width for width in (2, 4, 8) if bits <= width)


def pack_unsigned(q: Tensor, bits: int) -> Tensor:
    """Shift signed integers to unsigned ones and pack them, the first in the lowest bits.

    Parameters
    ----------
    q : Tensor, shape (..., n), int8
    bits : int
        2, 4 or 8; n is a multiple of ``8 / bits``.

    Returns
    -------
    Tensor, shape (..., n * bits / 8), uint8

    Examples
    --------
    >>> pack_unsigned(torch.tensor([-8, 7], dtype=torch.int8), 4)
    tensor([240], dtype=torch.uint8)
    """
    per_byte = 8 // bits
    # int8 read as uint8 is the same modulo 256, and so is the sum: no wider copy is needed
    patterns = (q.view(torch.uint8) + 2 ** (bits - 1)).unflatten(-1, (-1, per_byte))
    packed = patterns[..., 0].clone()
    for place in range(1, per_byte):
        packed |= patterns[..., place] << (bits * place)
    return packed


class Blocks(nn.Module):
    """The integers and scales of one matrix, in blocks of a row; shared by layers that are tied.

    Parameters
    ----------
    packed : Packed
        A converted layer.

    Raises
    ------
    UnsupportedModel
        If ONNX Runtime has no kernel for the group size.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        scheme = packed.scheme
        self.size = scheme.group_size or ROW_BLOCK
        if self.size < 16 or self.size & (self.size - 1):
            raise UnsupportedModel(
                f"ONNX Runtime has no kernel for groups of {self.size} weights: use 16, 32, 64, "
                "128 or 256, or one scale per row (group_size=None)"
            )
        self.rows, self.columns = packed.rows, packed.columns
        self.bits = container_bits(scheme.weight_bits)
        self.count = -(-self.columns // self.size)
        integers = unpack(packed.integers, scheme.weight_bits, packed.columns)
        integers = nn.functional.pad(integers, (0, self.count * self.size - self.columns))
        scales = packed.scale.float()
        if scheme.group_size is None:
            scales = scales.expand(-1, self.count)
        integers = integers.unflatten(-1, (self.count, self.size))
        self.register_buffer("integers", pack_unsigned(integers, self.bits))
        self.register_buffer("scales", scales.contiguous())


class BlockLinear(nn.Module):
    """A linear layer as one MatMulNBits.

    Parameters
    ----------
    layer : QuantizedLinear
    blocks : Blocks
        Of that layer.
    accuracy_level : int
        0 computes in float32; 4 rounds the inputs of each block to 8 bits.
    """

    def __init__(self, layer: QuantizedLinear, blocks: Blocks, accuracy_level: int) -> None:
        super().__init__()
        self.blocks, self.bias = blocks, layer.bias
        self.activations, self.group_size = layer.scheme.activations, layer.scheme.group_size
        self.accuracy_level = accuracy_level
        if self.activations == BLOCK8 and self.group_size:
            self.activations, self.accuracy_level = None, 4  # the kernel itself rounds them so

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.blocks
        if self.activations is not None:
            x = fake_quantize_activations(x, self.activations, self.group_size)
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, blocks.integers, blocks.scales),
            {
                "K": blocks.columns,
                "N": blocks.rows,
                "bits": blocks.bits,
                "block_size": blocks.size,
                "accuracy_level": self.accuracy_level,
            },
            dtype=x.dtype,
            shape=(*x.shape[:-1], blocks.rows),
            version=1,
        )
        return y if self.bias is None else y + self.bias


class BlockEmbedding(nn.Module):
    """An embedding as one GatherBlockQuantized.

    Parameters
    ----------
    blocks : Blocks
    factor : Tensor, optional
        What the rows are multiplied by afterwards.
    """

    def __init__(self, blocks: Blocks, factor: Tensor | None = None) -> None:
        super().__init__()
        self.blocks, self.factor = blocks, None if factor is None else float(factor)

    def forward(self, ids: Tensor) -> Tensor:
        blocks = self.blocks
        rows = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            (blocks.integers.view(blocks.rows, -1), ids, blocks.scales),
            {
                "bits": blocks.bits,
                "block_size": blocks.size,
                "gather_axis": 0,
                "quantize_axis": 1,
            },
            dtype=torch.float32,
            shape=(*ids.shape, blocks.count * blocks.size),  # whole blocks, as they are stored
            version=1,
        )
        if blocks.columns < rows.shape[-1]:
            rows = rows[..., : blocks.columns]
        return rows if self.factor is None else rows * self.factor


class Int8Linear(nn.Module):
    """W8A8 as MatMulInteger, with signed weights and unsigned inputs of seven bits.

    AVX2 kernels add pairs of products in 16 bits and saturate, silently, beyond 32,767. Inputs of
    seven bits stay below: 2 * 127 * 128 is 32,512. Unsigned weights would be safe with any
    inputs, but take a kernel that is several times slower.

    Parameters
    ----------
    layer : DynamicInt8Linear
    """

    def __init__(self, layer: DynamicInt8Linear) -> None:
        super().__init__()
        integers = unpack(layer.integers, layer.scheme.weight_bits, layer.columns)
        self.bias = layer.bias
        self.register_buffer("integers", integers.t().contiguous())
        self.register_buffer("scales", layer.scale[:, 0].float())
        self.form = layer.scheme.activations

    def forward(self, x: Tensor) -> Tensor:
        _, qmax = self.form.integers  # from zero up
        everything = tuple(range(x.dim()))
        low, high = x.amin(everything).clamp(max=0), x.amax(everything).clamp(min=0)
        scale = ((high - low) / qmax).clamp(min=_SMALLEST_SCALE)
        zero_point = (low / scale).round().neg().to(torch.uint8)  # from 0 to qmax by itself
        rounded = torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, scale, zero_point), dtype=torch.uint8, shape=x.shape
        ).clamp(max=qmax)
        sums = torch.onnx.ops.symbolic(
            "MatMulInteger",
            (rounded, self.integers, zero_point),
            dtype=torch.int32,
            shape=(*x.shape[:-1], len(self.scales)),
        )
        y = sums.float() * (scale * self.scales)
        return y if self.bias is None else y + self.bias


def served_layers(layers: Iterable[Packed], accuracy_level: int) -> dict[Packed, nn.Module]:
    """Make the served layer of each converted one; those that share integers go on sharing them.

    Parameters
    ----------
    layers : iterable of Packed
    accuracy_level : int
        As in `BlockLinear`.
    """
    shared: dict[int, Blocks] = {}
    served: dict[Packed, nn.Module] = {}
    for layer in layers:
        if isinstance(layer, DynamicInt8Linear):
            served[layer] = Int8Linear(layer)
            continue
        key = layer.integers.data_ptr()
        blocks = shared[key] if key in shared else shared.setdefault(key, Blocks(layer))
        served[layer] = (
            BlockEmbedding(blocks, layer.factor)
            if isinstance(layer, QuantizedEmbedding)
            else BlockLinear(layer, blocks, accuracy_level)
        )
    return served
