"""What the classic road does to a model, step by step, on ``torch.ao.quantization``.

Built in chapters 5 and 6.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from companion.errors import NothingToQuantize, UnsupportedModel
from companion.numerics.scheme import integer_range

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
# What the quantized engines cannot compute on two tensors outside a FloatFunctional.
_JOINS = {"add", "iadd", "sub", "mul", "imul", "cat", "matmul"}


def torch_ao():
    """Import the classic API, or say what to use instead where it has been removed."""
    try:
        import torch.ao.quantization as ao
    except ImportError:
        raise UnsupportedModel(
            "this PyTorch no longer has torch.ao.quantization: use torchao's pt2e flow for "
            "convolutions, or prepare_qat(...) of this package for Linear layers"
        ) from None
    return ao


def make_qconfig(weight_bits: int, backend: str, ao) -> Any:
    """Non-fused fake quantizers, whose training scale is the scale that conversion uses.

    The fused observer (upstream's default) computes its own scale when narrowed below 8 bits,
    and conversion another: chapter 6 shows a model lost that way.
    """
    qmin, qmax = integer_range(weight_bits)
    observer = ao.MovingAverageMinMaxObserver
    return ao.QConfig(
        activation=ao.FakeQuantize.with_args(
            observer=observer if backend == "qnnpack" else _half_range(observer),
            quant_min=0,
            quant_max=255,
            dtype=torch.quint8,
        ),
        weight=ao.FakeQuantize.with_args(
            observer=ao.MovingAveragePerChannelMinMaxObserver,
            averaging_constant=1.0,  # the range is that of the weights now, not of their past
            quant_min=qmin,
            quant_max=qmax,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        ),
    )


def _half_range(observer: type) -> type:
    """Spread the observed range over 0 to 127, so that 8-bit products fit into 16 bits on AVX2.

    Upstream's ``reduce_range`` also clips fake quantization at 127, while the kernels clip at
    255: outliers then differ between training and serving. Here both clip at 255.
    """

    class HalfRange(observer):
        def calculate_qparams(self):
            self.quant_max = 127
            try:
                return super().calculate_qparams()
            finally:
                self.quant_max = 255

    return HalfRange


def fuse(model: nn.Module, ao) -> None:
    """Merge convolution, batch norm and ReLU, by the model\'s own `fuse_model` or in sequence."""
    if hasattr(model, "fuse_model"):
        model.fuse_model(is_qat=True)
        return
    for sequence in [m for m in model.modules() if type(m) is nn.Sequential]:
        names = [name for name, _ in sequence.named_children()]
        kinds = tuple(type(module) for module in sequence)
        for start in range(len(names)):
            for pattern in (
                (nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
                (nn.Conv2d, nn.BatchNorm2d),
                (nn.Conv2d, nn.ReLU),
                (nn.Linear, nn.ReLU),
            ):
                end = start + len(pattern)
                if kinds[start:end] == pattern:
                    ao.fuse_modules_qat(sequence, names[start:end], inplace=True)
                    break


def remove_stubs(model: nn.Module, ao) -> None:
    """Replace inner stubs by the identity: two in a row would quantize what is quantized."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, (ao.QuantStub, ao.DeQuantStub)):
                setattr(parent, name, nn.Identity())


def refuse_unquantizable(model: nn.Module, ao) -> None:
    """Raise the error, with its remedy, for a model that this road cannot carry."""
    packed = [
        name
        for name, module in model.named_modules()
        if type(module).__module__.startswith(_QUANTIZED)
        and not isinstance(module, torch.ao.nn.quantized.FloatFunctional)
    ]
    if packed:
        raise UnsupportedModel(
            f"layer {packed[0]!r} is already quantized, and quantized layers do not train: "
            "start from the float model (no quantize_dynamic before prepare_qat)"
        )
    if not any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()):
        raise NothingToQuantize(
            "the model has no Conv2d or Linear layer, so quantization would change nothing"
        )
    join = _find_plain_join(model)
    if join:
        layer, operation = join
        raise UnsupportedModel(
            f"layer {layer!r} joins activations with a plain {operation!r}, which has no "
            "quantized kernel: give the layer a torch.ao.nn.quantized.FloatFunctional() in "
            "__init__ and call it instead (torchvision.models.quantization has such ResNets)"
        )


def _find_plain_join(model: nn.Module) -> tuple[str, str] | None:
    """Trace the model and return the first layer that adds, multiplies or joins two tensors."""
    model = copy.deepcopy(model)
    functional = torch.ao.nn.quantized.FloatFunctional
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, functional):
                setattr(parent, name, _Opaque())
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception:  # data-dependent control flow: cannot be looked through, so not refused
        return None
    for node in graph.nodes:
        operation = str(getattr(node.target, "__name__", node.target)).rstrip("_")
        if node.op not in ("call_function", "call_method") or operation not in _JOINS:
            continue
        if operation == "cat" or sum(isinstance(a, fx.Node) for a in node.args) > 1:
            path = list(node.meta.get("nn_module_stack") or {"": None})[-1]
            return path or "(the model itself)", operation
    return None


class _Opaque(nn.Module):
    """Stands in for a FloatFunctional while tracing, so that its additions are not reported."""

    def forward(self, *args):
        return args[0]

    add = add_relu = add_scalar = mul = mul_scalar = cat = matmul = nn.Module.__call__


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _Opaque) or super().is_leaf_module(module, name)


@torch.no_grad()
def snap_to_grid(module: nn.Module) -> None:
    """Replace weights by the grid points that fake quantization shows the layer."""
    fold = torch.ones(len(module.weight))
    if hasattr(module, "bn"):  # the fused layer quantizes the weight as batch norm scales it
        fold = module.bn.weight / torch.sqrt(module.bn.running_var + module.bn.eps)
    fold = fold.reshape([-1] + [1] * (module.weight.dim() - 1))
    snapped = module.weight_fake_quant(module.weight * fold) / fold
    module.weight.copy_(torch.where(fold == 0, module.weight, snapped))
