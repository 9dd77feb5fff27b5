"""What the classic road does to a model, step by step, on ``torch.ao.quantization``.

Built in chapters 5 and 6.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from companion.errors import NothingToQuantize, UnsupportedModel
from companion.numerics.scheme import QuantScheme, integer_range
from companion.numerics.search import best_ratio

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
            observer=_clipping(ao.MovingAveragePerChannelMinMaxObserver),
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


def _clipping(observer: type) -> type:
    """Let the range of a channel be a share of its weights' range; all of it, until searched."""

    class Clipping(observer):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.register_buffer("ratio", torch.ones(()))

        def forward(self, weight: Tensor) -> Tensor:
            seen = super().forward(weight)
            self.min_val.mul_(self.ratio)
            self.max_val.mul_(self.ratio)
            return seen

        def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
            # a state saved before ranges could be searched has none
            self.ratio = torch.empty_like(
                state_dict.setdefault(f"{prefix}ratio", torch.ones(())), device=self.min_val.device
            )
            super()._load_from_state_dict(state_dict, prefix, *args)

    return Clipping


def search_range(module: nn.Module, weight_bits: int) -> None:
    """Find for each output channel the share of its range that leaves the least squared error."""
    rows = module.weight.detach().flatten(1)
    if hasattr(module, "bn"):  # what is rounded is the weight as batch norm scales it
        rows = rows * module.bn.weight.detach().sign()[:, None]
    scheme = QuantScheme(weight_bits, None, torch.float32)
    ratio = best_ratio(rows[:, None], scheme, signed=False)
    module.weight_fake_quant.activation_post_process.ratio = ratio.flatten()


@contextmanager
def remeasured_batch_norm(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms average the statistics of the batches that pass, from nothing on.

    If a batch fails, they have the statistics from before.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.momentum) for norm in norms]
    statistics = [copy.deepcopy(dict(norm.named_buffers())) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    try:
        yield
    except BaseException:
        for norm, kept in zip(norms, statistics, strict=True):
            for name, value in kept.items():
                getattr(norm, name).copy_(value)
        raise
    finally:
        for norm, (mode, momentum) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(mode)


_WITHOUT_KERNEL = {
    nn.PReLU: "has a quantized kernel that scales positive inputs too (torch 2.14): use LeakyReLU",
    nn.modules.conv._ConvTransposeNd: "cannot have scales per channel on this road: upsample and "
    "convolve (nn.Upsample, nn.Conv2d) instead",
}
_PATTERNS = (  # the longest first
    (nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
    (nn.Conv2d, nn.BatchNorm2d),
    (nn.Conv2d, nn.ReLU),
    (nn.Linear, nn.BatchNorm1d),
    (nn.Linear, nn.ReLU),
)


def fuse(model: nn.Module, ao) -> None:
    """Merge convolution, batch norm and ReLU, by the model's own `fuse_model` or in sequence.

    A layer whose result someone else reads as well stays alone.
    """
    if hasattr(model, "fuse_model"):
        model.fuse_model(is_qat=True)
        return
    follows = _neighbours(model)
    for sequence in [m for m in model.modules() if type(m) is nn.Sequential]:
        modules = list(sequence._modules.items())  # named_children() drops repeats
        start = 0
        while start < len(modules):
            for pattern in _PATTERNS:
                names, run = zip(*modules[start : start + len(pattern)], strict=True)
                if tuple(map(type, run)) == pattern and follows(run):
                    ao.fuse_modules_qat(sequence, list(names), inplace=True)
                    start += len(pattern) - 1
                    break
            start += 1
    fused = [m for m in model.modules() if type(m).__module__.startswith("torch.ao.nn.")]
    merged = {part for module in fused for part in module.children()}
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm1d and module not in merged:
            raise UnsupportedModel(
                f"layer {name!r} (BatchNorm1d) has no quantized kernel of its own: let it follow a "
                "Linear layer in an nn.Sequential, which merges the two, or use LayerNorm"
            )


def own_module_for_each_place(model: nn.Module) -> None:
    """Copy modules that stand at several places; the copies share their parameters and buffers.

    Each place then has ranges of its own, and upstream, which would swap the first of them only,
    swaps them all.
    """
    seen: set[nn.Module] = set()

    def visit(parent: nn.Module) -> None:
        for name, child in list(parent._modules.items()):  # named_children() drops repeats
            if child is None:
                continue
            if child in seen:
                kept = {id(tensor): tensor for tensor in (*child.parameters(), *child.buffers())}
                parent._modules[name] = child = copy.deepcopy(child, kept)
            seen.add(child)
            visit(child)

    visit(model)


def _neighbours(model: nn.Module) -> Callable[[Sequence[nn.Module]], bool]:
    """Return the question whether neighbours in a Sequential are neighbours in the computation."""
    paths = {module: path for path, module in model.named_modules()}
    graph = _trace(model)
    calls: dict[object, list[fx.Node]] = {}
    for node in graph.nodes if graph else ():
        calls.setdefault(node.target, []).append(node)

    def follows(run: Sequence[nn.Module]) -> bool:
        for module, reader in pairwise(run):
            here, there = calls.get(paths[module], []), calls.get(paths[reader], [])
            if len(here) != len(there):
                return False
            if any({n.target for n in node.users} != {paths[reader]} for node in here):
                return False
        return True

    return follows


@contextmanager
def quantized_engine(name: str) -> Iterator[None]:
    """Let PyTorch pack and run integers with one engine; the process keeps the one it had."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


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
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            not module.affine or not module.track_running_stats
        ):
            why = "needs affine=True and track_running_stats=True to become integers"
        else:
            why = next(
                (why for kind, why in _WITHOUT_KERNEL.items() if isinstance(module, kind)), ""
            )
        if why:
            raise UnsupportedModel(f"layer {name!r} ({type(module).__name__}) {why}")
    join = _find_plain_join(model)
    if join:
        layer, operation = join
        raise UnsupportedModel(
            f"layer {layer!r} joins activations with a plain {operation!r}, which has no "
            "quantized kernel: give the layer a torch.ao.nn.quantized.FloatFunctional() in "
            "__init__ and call it instead (torchvision.models.quantization has such ResNets)"
        )


def _find_plain_join(model: nn.Module) -> tuple[str, str] | None:
    """Return the first layer that adds, multiplies or joins two tensors, and how."""
    graph = _trace(model)
    for node in graph.nodes if graph else ():
        operation = str(getattr(node.target, "__name__", node.target)).rstrip("_")
        if node.op not in ("call_function", "call_method") or operation not in _JOINS:
            continue
        if operation == "cat" or sum(isinstance(a, fx.Node) for a in node.args) > 1:
            path = list(node.meta.get("nn_module_stack") or {"": None})[-1]
            return path or "(the model itself)", operation
    return None


def _trace(model: nn.Module) -> fx.Graph | None:
    """Return what the model computes as a graph; None where its control flow depends on data."""
    model = copy.deepcopy(model)
    functional = torch.ao.nn.quantized.FloatFunctional
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, functional):
                setattr(parent, name, _Opaque())
    try:
        return _Tracer().trace(model)
    except Exception:  # whatever a forward raises on a proxy: it cannot be looked through
        return None


class _Opaque(nn.Module):
    """Stands in for a FloatFunctional while tracing, so that its additions are not reported."""

    def forward(self, *args):
        return args[0]

    def add(self, *args):
        return self(*args)  # through __call__ as it is while tracing

    add_relu = add_scalar = mul = mul_scalar = cat = matmul = add


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
