"""`to_torchao`: a converted model handed on, as torchao's tensors with the same integers.

Built in chapter 17.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from companion.errors import UnsupportedBackend, UnsupportedModel, WrongStage, expect, extra
from companion.numerics.packing import unpack
from companion.numerics.scheme import W4A8
from companion.qat.packed import DynamicInt8Linear, Packed, QuantizedEmbedding
from companion.qat.prepare import replace_modules
from companion.qat.saved import refuse_foreign


def to_torchao(model: nn.Module) -> nn.Module:
    """Copy a converted model into layers of PyTorch whose weights are torchao's tensors.

    Nothing is rounded again: integers and scales are those that were trained. What comes out
    needs no companion, and `torch.export` takes it.

    Parameters
    ----------
    model : nn.Module
        From `convert` or `load_quantized`; left as it is.

    Returns
    -------
    nn.Module
        In eval mode. Weight-only schemes and per-token activations answer as `model` does, bit
        for bit in float32; W8A8 up to the order of sums.

    Raises
    ------
    WrongStage
        If the model was not converted.
    UnsupportedModel
        If torchao has no counterpart of the scheme's activations.

    Examples
    --------
    >>> from companion import W4, convert, prepare_qat
    >>> q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), W4))
    >>> x = torch.ones(2, 64)
    >>> torch.equal(to_torchao(q)(x), q(x))
    True
    """
    expect("to_torchao", "model", model, nn.Module)
    refuse_foreign(model, "to_torchao")
    model = copy.deepcopy(model)
    layers = [module for module in model.modules() if isinstance(module, Packed)]
    if not layers:
        raise WrongStage("to_torchao() needs a model from convert(): convert it first")
    shared: dict[tuple, nn.Parameter] = {}  # what was tied stays tied
    new: dict[nn.Module, nn.Module] = {}
    for layer in layers:
        key = (layer.integers.data_ptr(), isinstance(layer, DynamicInt8Linear))
        if key not in shared:
            shared[key] = nn.Parameter(_tensor(layer), requires_grad=False)
        new[layer] = _empty(layer)
        new[layer].weight = shared[key]
    model = replace_modules(model, new)
    for module in model.modules():
        for ours in ("quantization", "hf_quantizer"):  # of packed integers
            module.__dict__.pop(ours, None)
        vars(getattr(module, "config", None) or nn.Module()).pop("quantization_config", None)
    return model.eval()


class ScaledEmbedding(nn.Embedding):
    """An embedding whose rows are multiplied by a constant once they are looked up, as Gemma's.

    Parameters
    ----------
    rows, columns : int
    factor : float
    """

    def __init__(self, rows: int, columns: int, factor: float) -> None:
        super().__init__(rows, columns, device="meta")
        self.factor = factor

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        return (rows.float() * self.factor).to(rows.dtype)


def _empty(layer: Packed) -> nn.Module:
    """PyTorch's layer of the same shape, its weight still to come."""
    if isinstance(layer, QuantizedEmbedding):
        if layer.factor is None:
            return nn.Embedding(layer.rows, layer.columns, device="meta")
        return ScaledEmbedding(layer.rows, layer.columns, float(layer.factor))
    linear = nn.Linear(layer.columns, layer.rows, bias=layer.bias is not None, device="meta")
    linear.bias = layer.bias
    return linear


def _tensor(layer: Packed) -> Tensor:
    """The integers and scales of a layer as a tensor of torchao."""
    integers = unpack(layer.integers, layer.scheme.weight_bits, layer.columns)
    scale = layer.scale.float()  # exact; the values are then multiplied as they are here
    if isinstance(layer, DynamicInt8Linear):
        return _int8(integers, scale, layer)
    return _intx(integers, scale, layer)


def _intx(integers: Tensor, scale: Tensor, layer: Packed) -> Tensor:
    with extra("torchao"):
        from torchao.quantization import IntxUnpackedToInt8Tensor

    inputs = layer.scheme.activations  # an embedding ignores them, but may share its tensor
    if inputs not in (None, W4A8.activations):
        if not isinstance(layer, QuantizedEmbedding):
            raise UnsupportedModel(
                f"torchao has no counterpart of {inputs}: convert with W8A8, with "
                "Activations(8, 'token'), or without activations"
            )
        inputs = None
    return IntxUnpackedToInt8Tensor(
        integers,
        scale,
        torch.zeros_like(scale, dtype=torch.int8),
        getattr(torch, f"int{layer.scheme.weight_bits}"),
        (1, layer.columns // scale.shape[1]),
        layer.dtype,
        inputs and "int8_asym_per_token",
    )


def multiplies_exactly() -> bool:
    """Whether ``torch._int_mm``, which torchao's W8A8 calls, is exact on this machine.

    oneDNN's kernels for AVX2 without VNNI add pairs of products in 16 bits, where they saturate.
    """
    inputs = torch.full((32, 64), 63, dtype=torch.int8)
    weight = torch.full((64, 32), 127, dtype=torch.int8)
    return bool((torch._int_mm(inputs, weight) == 64 * 63 * 127).all())


def _int8(integers: Tensor, scale: Tensor, layer: Packed) -> Tensor:
    if not multiplies_exactly():
        raise UnsupportedBackend(
            "torchao multiplies 8-bit integers by torch._int_mm, which saturates on this machine "
            "and would give other results than were trained: keep the converted model, whose own "
            "kernel is exact, or serve it by export_onnx()"
        )
    with extra("torchao"):
        from torchao.quantization import Int8Tensor, PerTensor
        from torchao.quantization.quant_primitives import MappingType
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    # reduce_range rounds to -64 ... 63: the grid of our 0 ... 127, counted from another zero
    inputs = QuantizeTensorToInt8Kwargs(PerTensor(), MappingType.ASYMMETRIC, reduce_range=True)
    block = [1, layer.columns]
    return Int8Tensor(integers, scale, block, layer.dtype, act_quant_kwargs=inputs)
