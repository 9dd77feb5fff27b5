"""`export_executorch`: a converted model as a file for ExecuTorch, which runs on phones and small devices.

ExecuTorch is PyTorch's own runtime for devices without Python. Its XNNPACK kernels multiply integers of
4 bits in groups, or of 8 bits by rows, with inputs that are rounded to 8 bits token by token (8da4w).
The integers of `convert` are handed to them through torchao's tensors, and nothing is rounded again.

Files can be made of decoders of transformers whose layers all keep the keys and values of the whole
text, as the Llama kind does (docs-lm, SmolLM2), of encoders and classifiers such as BERT, and of any module
of one input. Texts may have any length up to a limit that is set beforehand; a call takes one text.
Built in chapter 15.

References
----------
ExecuTorch's XNNPACK backend, https://docs.pytorch.org/executorch/stable/backends/xnnpack/.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from companion.errors import UnsupportedModel, WrongStage, expect, extra
from companion.files import write_atomically
from companion.formats.executorch.stored import TOLD, named, silent
from companion.formats.onnx.graphs import STAY, Graph, graph_of
from companion.formats.torchao import to_torchao
from companion.numerics.packing import pack, unpack
from companion.numerics.scheme import W4A8
from companion.qat.packed import Packed, QuantizedEmbedding, QuantizedLinear, record_parts
from companion.qat.prepare import replace_modules
from companion.qat.saved import refuse_foreign

BLOCK = 32
"""XNNPACK's blocks of weights that share a scale are multiples of it."""
LENGTH = 512
"""Most tokens of a text, where nothing else is asked for."""
TOKENS = 4
"""Length of the text that a model is traced with."""


def export_executorch(
    model: nn.Module,
    path: str | Path,
    *,
    max_length: int | None = None,
    scales: str = "exact",
    example: Tensor | None = None,
) -> Path:
    """Write a converted model as a ``.pte`` file that ExecuTorch runs on XNNPACK's kernels.

    The integers are those of `convert`. Weights of up to 4 bits are stored in 4, others in 8.
    XNNPACK always rounds the inputs of such layers to 8 bits by tokens, as ``W4A8`` trains it; of a
    model that was trained with weights only, `as_served` computes here what the file will. The two
    agree to the last digits, but where a last bit decides a rounding. That happens to whole tokens whose
    largest and smallest input are exactly opposite, as in rows of a rounded embedding: their zero point lies
    between two integers, and they, and what attends to them, differ as much as rounding inputs changes at all.

    The file's method ``forward`` takes, for a decoder, ``input_ids`` of shape (1, n) and
    ``positions`` of shape (n,), both int64, and gives logits of shape (1, n, vocabulary). It keeps keys
    and values, so that a text goes on from the tokens before; position 0 begins a new one. An encoder takes
    ``input_ids`` and ``attention_mask`` (BERT also ``token_type_ids``), and a module its one input. Copy
    what ``execute`` returns, since the next call writes over it. A table that is tied to the output layer
    stands in the file twice, as rows to look up and as XNNPACK's matrix. ExecuTorch has run the file once
    before it takes the place of an earlier one.

    Parameters
    ----------
    model : nn.Module
        From `convert` or `load_quantized`: weights only, or inputs of 8 bits by tokens.
    path : path
        Of the file, such as ``"model.pte"``. It is complete or not there at all.
    max_length : int, optional
        Most tokens of a text. The keys and values of so many are kept ready. Default: 512, or what
        the model takes where that is less.
    scales : {"exact", "bfloat16"}
        XNNPACK stores the scales of 4-bit weights in bfloat16. Where it cannot hold them, they are
        refused, or rounded to it: by 0.2 % at most, with the same integers.
    example : Tensor, optional
        An input of a module that is none of transformers'; the file takes this shape.

    Returns
    -------
    Path

    Raises
    ------
    WrongStage
        If the model was not converted.
    UnsupportedModel
        If XNNPACK has no kernel for its integers, scales or inputs, or ExecuTorch none for the rest.

    Examples
    --------
    >>> import tempfile
    >>> from companion import QuantScheme, convert, export_executorch, prepare_qat
    >>> scheme = QuantScheme(4, 32, torch.bfloat16)
    >>> q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), scheme, "absmax"))
    >>> file = tempfile.mkdtemp() + "/layer.pte"
    >>> export_executorch(q, file, example=torch.ones(1, 64)).name
    'layer.pte'
    >>> from companion.formats.executorch.stored import read_integers
    >>> [(integers, scale)] = read_integers(file)
    >>> integers.shape, torch.equal(scale, q[0].scale.float())
    (torch.Size([8, 64]), True)
    """
    expect("export_executorch", "model", model, nn.Module)
    expect("export_executorch", "path", path, str | Path)
    served = as_served(model, scales=scales)
    with extra("executorch"), silent():
        import executorch.kernels.quantized  # registers what looks rows up
        import executorch.runtime  # noqa: F401
    name = type(model).__name__
    quantization = served.quantization
    embeddings = {m: _Rows(m) for m in served.modules() if isinstance(m, QuantizedEmbedding)}
    names = named(served)
    served = to_torchao(replace_modules(served, embeddings))
    graph = graph_of(served, example)
    module, inputs, shapes, context = _traced_with(graph, served, max_length)
    described = asdict(replace(graph.description, context=context, quantization=str(quantization)))
    inside = {"inputs": list(graph.names), "names": names, "description": described}
    with _quiet(), _shared_histories():
        program = _lower(module, inputs, shapes, name, json.dumps(inside))

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            program.write_to_file(file)
        _run_once(partial, inputs, name)

    path = Path(path)
    write_atomically(path, write)
    return path


def as_served(model: nn.Module, *, scales: str = "exact") -> nn.Module:
    """Copy a converted model into the one that `export_executorch` writes.

    It has the same integers and scales, in the widths that XNNPACK multiplies, and rounds the
    inputs of its layers as XNNPACK does: to 8 bits, by tokens. What the file will answer can so be
    measured before there is one.

    Parameters
    ----------
    model, scales
        As in `export_executorch`.

    Returns
    -------
    nn.Module
        On the CPU, in float32 and in eval mode.

    Examples
    --------
    >>> from companion import W8, QuantScheme, convert, prepare_qat
    >>> q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), QuantScheme(8, None), "absmax"))
    >>> as_served(q)[0].scheme.activations
    Activations(bits=8, granularity='token', symmetric=False, range=None)
    """
    if scales not in ("exact", "bfloat16"):
        raise ValueError(f"scales={scales!r} is unknown: write 'exact' or 'bfloat16'")
    refuse_foreign(model, "export_executorch")
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    if getattr(model, "quantization", None) is None or not packed:
        raise WrongStage("export_executorch() needs a model from convert(): convert it first")
    if not any(isinstance(layer, QuantizedLinear) for layer in packed):
        raise UnsupportedModel(
            "only embeddings of this model are rounded, and XNNPACK multiplies no integers in it: use "
            "export_onnx() or save_quantized()"
        )
    served = copy.deepcopy(model).cpu().float().eval()
    stored: dict[tuple, tuple[Tensor, Tensor, int]] = {}  # layers that are tied stay so
    for name, layer in served.named_modules():
        if not isinstance(layer, Packed):
            continue
        linear = isinstance(layer, QuantizedLinear)
        if linear:
            _check_layer(name, layer)
        key = (layer.integers.data_ptr(), linear)
        if key not in stored:
            integers, scale, bits = _stored(name, layer, scales) if linear else _widened(layer)
            stored[key] = pack(integers, bits), scale, bits
        layer.integers, layer.scale, bits = stored[key]
        layer.scheme = replace(
            layer.scheme, weight_bits=bits, scale_dtype=layer.scale.dtype,
            activations=W4A8.activations,
        )  # fmt: skip
        if linear:
            record = replace(served.quantization, scheme=layer.scheme)
    served.quantization = record
    record_parts(served)
    return served


def _check_layer(name: str, layer: QuantizedLinear) -> None:
    scheme = layer.scheme
    if scheme.activations not in (None, W4A8.activations):
        raise UnsupportedModel(
            f"{name} rounds its inputs in another way than XNNPACK, which always rounds them to 8 bits "
            'by tokens: train weights only, or with Activations(8, "token") as in W4A8'
        )
    group = scheme.group_size
    if scheme.weight_bits > 4 and group and group != layer.columns:
        raise UnsupportedModel(
            f"{name} has {scheme.weight_bits}-bit weights in groups of {group}, and XNNPACK multiplies "
            f"more than 4 bits with one scale per row only: train with "
            f"QuantScheme({scheme.weight_bits}, None)"
        )
    if scheme.weight_bits <= 4 and (group or layer.columns) % BLOCK:
        raise UnsupportedModel(
            f"{name} has groups of {group or layer.columns} weights, and XNNPACK's blocks are multiples "
            f"of {BLOCK}: train in groups of a multiple of {BLOCK}, or leave the layer out with skip="
        )


def _widened(layer: Packed) -> tuple[Tensor, Tensor, int]:
    """Integers, scales and the width, 4 or 8 bits, in which they are stored."""
    integers = unpack(layer.integers, layer.scheme.weight_bits, layer.columns)
    return integers, layer.scale, 4 if layer.scheme.weight_bits <= 4 else 8


def _stored(name: str, layer: Packed, scales: str) -> tuple[Tensor, Tensor, int]:
    """Do the same for a matrix that XNNPACK multiplies: with positive scales that it can hold."""
    integers, scale, bits = _widened(layer)
    groups = integers.unflatten(-1, (scale.shape[-1], -1))
    turned = scale < 0
    stuck = turned & (groups == -(2 ** (bits - 1))).any(-1)
    if stuck.any():
        raise UnsupportedModel(
            f"{int(stuck.sum())} of {stuck.numel()} groups of {name} have a negative scale and use the "
            f"integer {-(2 ** (bits - 1))}, and XNNPACK takes positive scales only: prepare the model "
            'with method="absmax", whose scales are positive'
        )
    integers = torch.where(turned[..., None], -groups, groups).flatten(-2)
    scale = scale.abs()
    if bits == 8:
        return integers, scale, bits
    brain = scale.to(torch.bfloat16)
    if scales == "exact" and not torch.equal(brain.to(scale.dtype), scale):
        raise UnsupportedModel(
            f"{name} has scales in {str(scale.dtype).removeprefix('torch.')} that bfloat16 does not hold, "
            "and XNNPACK has no others for 4-bit weights: train with scale_dtype=torch.bfloat16, or "
            'export with scales="bfloat16", which rounds them'
        )
    return integers, brain, bits


class _Rows(nn.Module):
    """An embedding whose rows ExecuTorch dequantizes as it looks them up."""

    def __init__(self, layer: QuantizedEmbedding) -> None:
        super().__init__()
        integers, scale, bits = _widened(layer)
        self.halved = bits == 4 and layer.columns // scale.shape[-1] % 2 == 0  # two in a byte
        if self.halved:
            halves = (integers + 8).view(torch.uint8)
            integers = halves[:, ::2] << 4 | halves[:, 1::2]
        self.register_buffer("integers", integers.contiguous(), persistent=False)
        self.register_buffer("scale", scale.float(), persistent=False)
        self.factor = None if layer.factor is None else float(layer.factor)

    def forward(self, ids: Tensor) -> Tensor:
        look_up = torch.ops.quantized_decomposed
        if self.halved:
            rows = look_up.embedding_4bit(self.integers, self.scale, None, -8, 7, ids)
        else:
            rows = look_up.embedding_byte(self.integers, self.scale, None, -128, 127, ids)
        return rows if self.factor is None else rows * self.factor


class _Decoder(nn.Module):
    """Logits of the tokens given, whose keys and values are kept at their positions."""

    def __init__(
        self, model: nn.Module, shapes: tuple[tuple[int, int, int], ...], length: int
    ) -> None:
        super().__init__()
        self.model, self.length, self.layers = model, length, len(shapes)
        for layer, (heads, *widths) in enumerate(shapes):
            for part, width in zip(("keys", "values"), widths, strict=True):
                kept = torch.zeros(1, heads, length, width)
                self.register_buffer(f"{part}_{layer}", kept, persistent=False)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        from transformers.cache_utils import Cache, StaticLayer

        cache = []
        for number in range(self.layers):
            layer = StaticLayer(self.length)
            layer.keys, layer.values = (
                getattr(self, f"{part}_{number}") for part in ("keys", "values")
            )
            layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
            layer.cumulative_length = positions[0].clone()  # it is counted up in place
            layer.is_initialized = True
            cache.append(layer)
        return self.model(
            input_ids=input_ids, position_ids=positions[None], use_cache=True,
            past_key_values=Cache(layers=cache),
        ).logits  # fmt: skip


def _traced_with(
    graph: Graph, model: nn.Module, max_length: int | None
) -> tuple[nn.Module, tuple[Tensor, ...], tuple[dict, ...], int]:
    """What is traced, its inputs, which of their dimensions are free, and the most tokens."""
    kind = graph.description.kind
    if kind == "module":
        return graph.module, graph.inputs, ({},) * len(graph.inputs), 0
    config = next(m.config for m in model.modules() if hasattr(m, "config"))
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or LENGTH
    if max_length is None:
        max_length = min(LENGTH, context)
    if not TOKENS <= max_length <= context:
        raise ValueError(
            f"max_length={max_length} is not possible: choose {TOKENS} to {context} tokens, which this "
            "model takes"
        )
    length = torch.export.Dim("length", min=1, max=max_length)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    if kind == "decoder":
        module = _Decoder(model, graph.description.past, max_length)
        return module, (ids, torch.arange(TOKENS)), ({1: length}, {0: length}), max_length
    inputs = tuple(torch.full_like(ids, name == "attention_mask") for name in graph.names)
    return graph.module, inputs, ({1: length},) * len(inputs), max_length


def _lower(module: nn.Module, inputs: tuple, shapes: tuple, name: str, told: str) -> Any:
    """Trace a module and hand what XNNPACK computes to it; `told` is what the file says of itself."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from torchao.utils import unwrap_tensor_subclass

    try:
        with torch.no_grad():
            traced = torch.export.export(
                unwrap_tensor_subclass(module.eval()), inputs, dynamic_shapes=shapes
            )
            edge = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()],
                                               constant_methods={TOLD: told})  # fmt: skip
            left = [str(node.target) for node in edge.exported_program().graph.nodes
                    if "dequantize" in str(node.target)]  # fmt: skip
            if not left:
                return edge.to_executorch()
    except Exception as error:  # whatever the exporters say of a model that they do not know
        reason = shorten(str(error), 160, placeholder=" ...").rstrip(".")
        raise UnsupportedModel(
            f"{name} cannot be lowered to ExecuTorch ({type(error).__name__}: {reason}): {STAY}, or use "
            "export_onnx()"
        ) from error
    raise UnsupportedModel(
        f"XNNPACK leaves quantized layers of this {name} out, which would be dequantized at each call: "
        f"{STAY}, or use export_onnx()"
    )


def _run_once(file: Path, inputs: tuple[Tensor, ...], name: str) -> None:
    """Load a written file and run it on what it was traced with, as whoever serves it will."""
    from executorch.runtime import Runtime

    try:
        with silent():
            Runtime.get().load_program(file).load_method("forward").execute(list(inputs))
    except Exception as error:
        reason = shorten(str(error), 160, placeholder=" ...").rstrip(".")
        raise UnsupportedModel(
            f"ExecuTorch cannot run the file of this {name}, which was not written ({reason}): {STAY}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' notes to their authors from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def _shared_histories() -> Iterator[None]:
    """Keep PyTorch from copying a node's whole history at each of the many passes over a graph.

    Histories are only read, and copying them took most of the time.
    """
    from torch.fx.traceback import NodeSource

    NodeSource.__deepcopy__ = lambda self, memo: self
    try:
        yield
    finally:
        del NodeSource.__deepcopy__
