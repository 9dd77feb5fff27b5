"""Layers of packed integers: what `convert` puts in the place of fake-quantized ones.

Built in chapter 10.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import companion  # its face knows how a model is saved; the formats stand above
from companion.errors import expect
from companion.numerics.activations import activation_grid, fake_quantize_activations
from companion.numerics.packing import pack, unpack
from companion.numerics.scheme import QuantScheme
from companion.qat.layers import FakeQuantEmbedding, FakeQuantLinear

_BLOCK = 2**20
"""Weights that are dequantized at a time where none are kept: what caches hold, in float32."""
_FEWEST_ROWS = 256
"""Rows of a block at least: below, the matrix product itself gets slower."""


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
        extend_save_pretrained()
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
        groups.unflatten(-1, (scale.shape[-1], -1)).mul_(scale[..., None].float())
        return groups.to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """The whole weight matrix in floating point, computed anew each time."""
        small = self.dtype == torch.float32 and self.rows * self.columns <= _BLOCK
        if small or _is_traced():
            return self.values(self.integers, self.scale)
        whole = self.scale.new_empty(self.rows, self.columns, dtype=self.dtype)
        for rows in self._blocks(_BLOCK // 4):
            whole[rows] = self.values(self.integers[rows], self.scale[rows])
        return whole

    def _blocks(self, weights: int) -> list[slice]:
        """Cut the rows into blocks of about so many weights."""
        step = max(1, weights // self.columns)
        return [slice(first, first + step) for first in range(0, self.rows, step)]

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        extend_save_pretrained()  # in the process that unpickles

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, {self.scheme.weight_bits} bits"


class _Kept(NamedTuple):
    """What a layer keeps beside its integers, of which type, and the tensors it was made from."""

    of: tuple[str, torch.dtype]
    versions: list[tuple[Tensor, int]]
    value: Any


class QuantizedLinear(Packed):
    """A Linear layer of packed integers, which PyTorch multiplies in floating point.

    In eval mode it dequantizes them once and keeps the matrix beside them, so that every further
    forward costs what a float layer's does, in time and, for as long as it is kept, in memory.
    Without `cache`, while it trains, and where the machine's memory would run short, it
    dequantizes at each forward, a few megabytes at a time.

    Parameters
    ----------
    bias : Tensor or None
    cache : bool
        Whether to keep the matrix. It is no part of the state: no file, copy or count of bytes
        has it. `release_cache` gives its memory back.
    """

    cache = True  # a model pickled by an earlier version has no such attribute
    _kept: _Kept | None = None

    def __init__(self, *shape, bias: Tensor | None = None, cache: bool = True, **kwargs) -> None:
        super().__init__(*shape, **kwargs)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.cache = cache

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
        if _is_traced():
            return F.linear(x, self.weight, self.bias)
        if self._may_keep_matrix():
            return F.linear(x, self._once("matrix", lambda: self.weight), self.bias)
        blocks = self._blocks(max(_BLOCK, _FEWEST_ROWS * self.columns))
        if len(blocks) == 1 or not self._takes_blocks(x):
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, self.columns)
        y = x.new_empty(len(rows), self.rows)
        for block in blocks:
            weight = self.values(self.integers[block], self.scale[block]).t()
            if self.bias is None:
                torch.mm(rows, weight, out=y[:, block])
            else:
                torch.addmm(self.bias[block], rows, weight, out=y[:, block])
        return y.view(*x.shape[:-1], self.rows)

    def release(self) -> int:
        """Forget what is kept beside the integers, and return how many bytes a matrix took."""
        kept, self._kept = self._kept, None
        return kept.value.nbytes if kept and isinstance(kept.value, Tensor) else 0

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what `make` makes of the stored tensors, made anew only when these change."""
        stored = [t for t in (self.integers, self.scale, self.bias) if t is not None]
        versions = [(t, 0 if t.is_inference() else t._version) for t in stored]
        kept = self._kept
        if kept is None or kept.of != (name, self.dtype) or not _same(kept.versions, versions):
            with torch.inference_mode(False):  # a later forward may need a gradient
                kept = self._kept = _Kept((name, self.dtype), versions, make())
        return kept.value

    def _may_keep_matrix(self) -> bool:
        if not self.cache or self.training or self.integers.is_meta:
            return False
        size = self.rows * self.columns * self.dtype.itemsize
        return self._kept is not None or leaves_room(size, self.integers.device)

    def _takes_blocks(self, x: Tensor) -> bool:
        """Whether results may be written into memory that is there, past autograd and autocast."""
        return not (
            x.is_meta or self._is_differentiated(x) or torch.is_autocast_enabled(x.device.type)
        )

    def _is_differentiated(self, x: Tensor) -> bool:
        trained = x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return trained and torch.is_grad_enabled()

    def _apply(self, fn, recurse=True):
        self.release()
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}

    def _load_from_state_dict(self, *args):
        self.release()
        super()._load_from_state_dict(*args)


class DynamicInt8Linear(QuantizedLinear):
    """W8A8 on the int8 kernel that x86 builds of PyTorch bring (fbgemm), several times faster.

    The range of the inputs is taken here and not by the kernel, which widens every range below
    .008: so quiet inputs, too, are rounded as they were in training. Where the kernel is missing
    or cannot go (another device, gradients, `torch.compile`, inputs that are not finite), the
    layer computes what training simulated.
    """

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
        kernel = self._once("kernel", self._prepack)
        result = kernel(rows, scale.item(), int(zero_point))
        return result.view(*x.shape[:-1], self.rows).to(x.dtype)

    def _kernel_serves(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and not _is_traced()
            and not self._is_differentiated(x)
            and _has_fbgemm()
        )

    def _may_keep_matrix(self) -> bool:  # beside the kernel's own copy it would be a second one
        cpu = self.integers.device.type == "cpu"
        return not (cpu and _has_fbgemm()) and super()._may_keep_matrix()

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


def release_cache(model: nn.Module) -> int:
    """Free the float matrices that converted layers keep for speed; the model stays usable.

    Layers made with ``cache=True`` dequantize again, and keep the matrix again, at their next
    forward; ``convert(..., cache=False)`` and ``load_quantized(..., cache=False)`` make models
    that keep none.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    int
        The bytes that were freed.

    Examples
    --------
    >>> import torch
    >>> from companion import W4, convert, prepare_qat
    >>> model = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), W4))
    >>> model(torch.ones(1, 64)).shape, release_cache(model)  # 64 * 8 weights in float32
    (torch.Size([1, 8]), 2048)
    """
    expect("release_cache", "model", model, nn.Module)
    return sum(m.release() for m in model.modules() if isinstance(m, QuantizedLinear))


def leaves_room(size: int, device: torch.device) -> bool:
    """Whether a quarter of a device's memory stays free when `size` bytes more are taken.

    True where nobody says how much there is.

    Examples
    --------
    >>> leaves_room(1, torch.device("cpu")), leaves_room(10**18, torch.device("cpu"))
    (True, False)
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        try:
            free, total = _host_memory()
        except (OSError, KeyError, ValueError):
            return True
    return size <= free - total / 4


def _host_memory() -> tuple[int, int]:
    """Bytes that are free, and all: of the machine or, where that is less, of its container."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    bytes_ = {name: 1024 * int(count) for name, count, *_ in lines}
    free, total = bytes_["MemAvailable:"], bytes_["MemTotal:"]
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max" and int(text) < total:
        total = int(text)
        free = min(free, total - int(limit.with_name("memory.current").read_text()))
    return free, total


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is one of transformers'; nothing is imported to find out.

    Examples
    --------
    >>> is_pretrained(nn.Linear(2, 2))
    False
    """
    bases = ((base.__module__.partition(".")[0], base.__name__) for base in type(model).__mro__)
    return ("transformers", "PreTrainedModel") in bases


def record_parts(model: nn.Module) -> None:
    """Leave with each part of a converted model that transformers could save its own record.

    Parameters
    ----------
    model : nn.Module
        With its record `quantization`; changed in place.
    """
    record = model.quantization
    for name, module in model.named_modules():
        inside = f"{name}."
        layers = [n.removeprefix(inside) for n in record.layers if n.startswith(inside)]
        if name and layers and is_pretrained(module):
            skipped = {n.removeprefix(inside): why for n, why in record.skipped.items()
                       if n.startswith(inside)}  # fmt: skip
            module.quantization = replace(record, layers=layers, skipped=skipped)


def extend_save_pretrained() -> None:
    """Let the `save_pretrained` of transformers' models write packed integers, if there are some.

    HF's Trainer calls it for its checkpoints, and `push_to_hub` for what it uploads; as it was, it
    would write a file that opens with random weights. The class is extended, once, and no model:
    a method of its own would keep each model alive beyond its last use.
    """
    module = sys.modules.get("transformers.modeling_utils")
    theirs = getattr(getattr(module, "PreTrainedModel", None), "save_pretrained", None)
    if theirs is None or hasattr(theirs, "packed"):
        return

    @wraps(theirs)
    def save_pretrained(self, *args, **kwargs):
        packed = any(isinstance(m, Packed) for m in self.modules())
        return (_save_packed if packed else theirs)(self, *args, **kwargs)

    save_pretrained.packed = _save_packed
    module.PreTrainedModel.save_pretrained = save_pretrained


def _save_packed(
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    token: str | bool | None = None,
    save_peft_format: bool = True,
    save_original_format: bool = True,
    distributed_checkpoint: bool = False,
    **upload: Any,
) -> None:
    """Write what `from_pretrained` opens; arguments as in transformers."""
    if variant is not None or distributed_checkpoint:
        raise ValueError(
            "save_pretrained() of a converted model takes neither variant nor "
            "distributed_checkpoint: leave them out"
        )
    if not is_main_process:
        return
    companion.save_quantized(model, save_directory, max_shard_size=max_shard_size, state=state_dict)
    if push_to_hub:
        name = upload.pop("repo_id", Path(save_directory).name)
        model.push_to_hub(name, token=token, max_shard_size=max_shard_size, **upload)


def _same(old: list[tuple[Tensor, int]], new: list[tuple[Tensor, int]]) -> bool:
    return len(old) == len(new) and all(
        a is b and i == j for (a, i), (b, j) in zip(old, new, strict=True)
    )


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines
