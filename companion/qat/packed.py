"""Layers of packed integers: what `convert` puts in the place of fake-quantized ones.

Built in chapter 10.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion.errors import WrongStage
from companion.numerics.activations import activation_grid, fake_quantize_activations
from companion.numerics.packing import pack, unpack
from companion.numerics.scheme import QuantScheme
from companion.qat.layers import FakeQuantEmbedding, FakeQuantLinear


class Packed(nn.Module):
    """Packed integers and their scales, in buffers that keep their types.

    Parameters
    ----------
    rows, columns : int
        Shape of the weight matrix.
    scheme : QuantScheme
    dtype : torch.dtype
        Of the values it dequantizes to: the type the model computes in.
    """

    def __init__(
        self, rows: int, columns: int, scheme: QuantScheme, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.rows, self.columns, self.scheme, self.dtype = rows, columns, scheme, dtype
        width = -(-columns // 8) * scheme.weight_bits
        groups = columns // (scheme.group_size or columns)
        self.register_buffer("integers", torch.zeros(rows, width, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(rows, groups, dtype=scheme.scale_dtype))

    def store(self, layer: FakeQuantLinear | FakeQuantEmbedding) -> Packed:
        """Take over the integers of a prepared layer."""
        integers, scale = layer.quantizer.integers(layer.matrix)
        self.integers, self.scale = pack(integers, self.scheme.weight_bits), scale
        return self

    def values(self, integers: Tensor, scale: Tensor) -> Tensor:
        """Unpack and dequantize rows."""
        groups = unpack(integers, self.scheme.weight_bits, self.columns).float()
        groups = groups.unflatten(-1, (scale.shape[-1], -1)).mul_(scale[..., None].float())
        return groups.to(self.dtype).flatten(-2)

    @property
    def weight(self) -> Tensor:
        """The whole weight matrix in floating point, computed anew each time."""
        return self.values(self.integers, self.scale)

    def _apply(self, fn, recurse=True):
        # model.half() or .bfloat16() change what is computed with, never what is stored: they
        # leave bytes alone, and as such it is shown to them.
        stored = {id(buffer) for buffer in self._buffers.values()}

        def move(t: Tensor) -> Tensor:
            if id(t) not in stored:
                return fn(t)
            return fn(t.reshape(-1).view(torch.uint8)).view(t.dtype).view(t.shape)

        super()._apply(move, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, {self.scheme.weight_bits} bits"


class QuantizedLinear(Packed):
    """A Linear layer that keeps packed integers and dequantizes them to compute.

    Smaller than a float layer, not faster: PyTorch multiplies the dequantized matrix.

    Parameters
    ----------
    bias : Tensor or None
    """

    def __init__(self, *shape, bias: Tensor | None = None, **kwargs) -> None:
        super().__init__(*shape, **kwargs)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def in_features(self) -> int:
        return self.columns

    @property
    def out_features(self) -> int:
        return self.rows

    def forward(self, x: Tensor) -> Tensor:
        scheme = self.scheme
        if scheme.activations is not None:
            x = fake_quantize_activations(x, scheme.activations, scheme.group_size)
        return F.linear(x, self.weight, self.bias)


class DynamicInt8Linear(QuantizedLinear):
    """W8A8 on the int8 kernel that x86 builds of PyTorch bring (fbgemm), several times faster.

    The range of the inputs is taken here and not by the kernel, which widens every range below
    .008: so quiet inputs, too, are rounded as they were in training. Where the kernel is missing
    or cannot go (another device, gradients, `torch.compile`, inputs that are not finite), the
    layer computes what training simulated.
    """

    _kernel = None

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel() or not self._kernel_serves(x):
            return super().forward(x)
        rows = x.detach().reshape(-1, self.columns).float()
        low, high = torch.aminmax(rows)
        scale, zero_point = activation_grid(low, high, self.scheme.activations)
        if not scale.isfinite():
            return super().forward(x)
        _, qmax = self.scheme.activations.integers
        if (high * (1 / scale)).round() + zero_point > qmax:  # by a rounded zero point, on a tie
            rows = rows.clamp(max=(qmax - zero_point) * scale)
        if self._kernel is None:
            self._kernel = self._prepack()
        result = self._kernel(rows, scale.item(), int(zero_point))
        return result.view(*x.shape[:-1], self.rows).to(x.dtype)

    def _kernel_serves(self, x: Tensor) -> bool:
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        trained = x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return (
            x.device.type == "cpu"
            and not traced
            and not (trained and torch.is_grad_enabled())
            and "fbgemm" in torch.backends.quantized.supported_engines
        )

    def _prepack(self) -> Callable[[Tensor, float, int], Tensor]:
        scale = self.scale[:, 0].double()
        weight = torch._make_per_channel_quantized_tensor(
            self.integers.view(torch.int8)[:, : self.columns],
            scale,
            torch.zeros_like(scale).long(),
            0,
        )
        bias = None if self.bias is None else self.bias.float()
        engine = torch.backends.quantized.engine
        try:
            torch.backends.quantized.engine = "fbgemm"
            packed = torch.ops.quantized.linear_prepack(weight, bias)
        finally:
            torch.backends.quantized.engine = engine
        # torch.export looks for such an object among a module's attributes, and cannot carry it
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return partial(multiply, W_prepack=packed)

    def _apply(self, fn, recurse=True):
        self._kernel = None
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_kernel"}

    def _load_from_state_dict(self, *args):
        self._kernel = None
        super()._load_from_state_dict(*args)


class QuantizedEmbedding(Packed):
    """An embedding that unpacks only the rows it is asked for.

    Parameters
    ----------
    factor : Tensor, optional
        What the rows are multiplied by afterwards, a single float32.
    """

    factor: Tensor | None

    def __init__(self, *shape, factor: Tensor | None = None, **kwargs) -> None:
        super().__init__(*shape, **kwargs)
        self.register_buffer("factor", factor)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.values(F.embedding(ids, self.integers), F.embedding(ids, self.scale))
        return rows if self.factor is None else (rows.float() * self.factor).to(rows.dtype)


def refuse_save_pretrained(model: nn.Module) -> None:
    """Make `save_pretrained`, and so every checkpoint of HF's Trainer, say how to save instead.

    Parameters
    ----------
    model : nn.Module
        Converted. What it holds of transformers would write a file that opens with random weights.
    """
    for module in model.modules():
        if hasattr(module, "save_pretrained") and any(
            isinstance(m, Packed) for m in module.modules()
        ):
            module.save_pretrained = _save_pretrained


def _save_pretrained(*args, **kwargs) -> None:
    raise WrongStage(
        "save_pretrained() cannot write the packed integers of a converted model: call "
        "companion.save_quantized(model, folder), and load_quantized(folder) to read it"
    )
