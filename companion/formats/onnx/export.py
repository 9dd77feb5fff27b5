"""`export_onnx`: a converted model as an ONNX file, with the very integers that were trained.

Built in chapter 14.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from companion.data.biencoder import BiEncoder
from companion.errors import UnsupportedModel, WrongStage, extra
from companion.formats.onnx.layers import served_layers
from companion.qat.layers import Packed
from companion.qat.prepare import replace_modules

OPSET = 23
KEY = "companion"  # of the file's metadata
LARGEST = 1_900_000_000
"""Bytes of tensors above which they stand in a file of their own: ONNX ends at two gigabytes."""
LEVELS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Description:
    """What an exported file says about itself.

    Parameters
    ----------
    kind : {"decoder", "encoder", "retrieval", "module"}
    layers : int
        Of a decoder: those that keep keys and values.
    heads, head_dim : int
        Of its keys and values.
    context : int
        Most tokens that it takes, 0 where that is unknown.
    stop : tuple of int
        Tokens that end a text.
    loss_type : str
        As transformers name it.
    quantization : str
        What was quantized, and how.
    """

    kind: str
    layers: int = 0
    heads: int = 0
    head_dim: int = 0
    context: int = 0
    stop: tuple[int, ...] = ()
    loss_type: str = ""
    quantization: str = ""


class _Decoder(nn.Module):
    """Logits and the new keys and values, given those of the tokens before."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # RotaryEmbedding of ONNX wants a position for each token, not one row for all texts
        self.positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list) -> tuple:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        before = attention_mask.shape[1] - input_ids.shape[1]
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) + before
        options = {"position_ids": positions.expand_as(input_ids)} if self.positions else {}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask,
                            past_key_values=cache, use_cache=True, **options)  # fmt: skip
        layers = output.past_key_values.layers
        return output.logits, [(layer.keys, layer.values) for layer in layers]


class _Encoder(nn.Module):
    """The logits of a head, or the last hidden state where there is none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


class _Embedder(nn.Module):
    """One vector for each text."""

    def __init__(self, model: BiEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.embed(input_ids, attention_mask)


@dataclass(frozen=True)
class _Graph:
    """What the exporter needs: a module, inputs to trace it with, and names."""

    module: nn.Module
    inputs: tuple
    shapes: tuple
    names: Sequence[str]
    outputs: Sequence[str]


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    accuracy_level: int = 0,
    example: Tensor | None = None,
) -> Path:
    """Write a converted model as an ONNX file that ONNX Runtime serves.

    Nothing is quantized anew: the file holds the integers and scales of `convert`. Embeddings
    and output layers that share them share them there, too. Language models take and give their
    keys and values; batch and length are free.

    Parameters
    ----------
    model : nn.Module
        From `convert` or `load_quantized`: a language model or encoder of transformers, a
        `companion.data.biencoder.BiEncoder`, or with `example` any module of one input.
    path : path
        Of the file, such as ``"model.onnx"``. Above two gigabytes the tensors go to a second
        file beside it. Either is complete or not there at all.
    accuracy_level : {0, 1, 2, 3, 4}
        How ONNX Runtime multiplies weights of up to eight bits: 0 in float32; 4 rounds the
        inputs to 8 bits by blocks: faster tokens, slower prompts. Models trained with `BLOCK8`
        activations always take 4, and W8A8 multiplies integers.
    example : Tensor, optional
        An input, of any batch size.

    Returns
    -------
    Path

    Raises
    ------
    WrongStage
        If the model was not converted.
    UnsupportedModel
        If ONNX Runtime has no kernel for its groups, or the model cannot be traced.

    Examples
    --------
    >>> import tempfile
    >>> from companion import W4, convert, export_onnx, prepare_qat
    >>> q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), W4))
    >>> path = export_onnx(q, tempfile.mkdtemp() + "/layer.onnx", example=torch.ones(1, 64))
    >>> path.name
    'layer.onnx'
    """
    if accuracy_level not in LEVELS:
        raise ValueError(f"accuracy_level {accuracy_level!r} is unknown: use one of {LEVELS}")
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    if getattr(model, "quantization", None) is None or not packed:
        raise WrongStage("export_onnx() needs a model from convert(): convert it first")
    served = (
        copy.deepcopy(model).cpu().float()
    )  # what its kernels compute in; integers stay as they are
    layers = [module for module in served.modules() if isinstance(module, Packed)]
    served = replace_modules(served, served_layers(layers, accuracy_level))
    return write_graph(served.eval(), path, example=example)


def write_graph(model: nn.Module, path: str | Path, *, example: Tensor | None = None) -> Path:
    """Trace a model, quantized or float, and write it.

    Parameters
    ----------
    model, path, example
        As in `export_onnx`.
    """
    with extra("deploy"):
        import onnx

    path = Path(path)
    graph, description = _graph(model, example)
    try:
        with _grouped_heads():
            program = torch.onnx.export(
                graph.module.eval(), graph.inputs, dynamo=True, opset_version=OPSET, verbose=False,
                dynamic_shapes=graph.shapes, input_names=graph.names, output_names=graph.outputs,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise UnsupportedModel(f"{type(model).__name__} cannot be traced: {reason}") from error
    for node in program.model.graph.all_nodes():  # stack traces, which weigh more than a layer
        node.metadata_props.clear()
    program.model.metadata_props[KEY] = json.dumps(asdict(description))
    tensors = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".export-", dir=path.parent))
    try:
        program.save(partial / path.name, external_data=tensors > LARGEST)
        onnx.checker.check_model(partial / path.name)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == path.name):
            file.replace(path.parent / file.name)  # the tensors first, then what refers to them
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


@contextmanager
def _grouped_heads() -> Iterator[None]:
    """Keep transformers from repeating keys and values for every head that shares them.

    ONNX's Attention shares them itself; the copies are 18 operators of each layer.
    """
    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _graph(model: nn.Module, example: Tensor | None) -> tuple[_Graph, Description]:
    quantization = str(getattr(model, "quantization", "") or "float32")
    if example is not None:
        graph = _Graph(model, (example,), ({0: "batch"},), ("input",), ("output",))
        return graph, Description("module", quantization=quantization)
    ids, mask = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)
    text = {0: "batch", 1: "length"}
    if isinstance(model, BiEncoder):
        graph = _Graph(_Embedder(model), (ids, mask), (text, text),
                       ("input_ids", "attention_mask"), ("sentence_embedding",))  # fmt: skip
        return graph, Description("retrieval", quantization=quantization)
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModel(
            f"{type(model).__name__} is no model of transformers: pass an input for it, example=..."
        )
    loss_type = getattr(model, "loss_type", None) or ""
    if not model.can_generate():
        graph = _Graph(_Encoder(model), (ids, mask), (text, text),
                       ("input_ids", "attention_mask"), ("logits",))  # fmt: skip
        return graph, Description("encoder", loss_type=loss_type, quantization=quantization)
    return _decoder_graph(model, config, ids, quantization)


def _decoder_graph(model: nn.Module, config, ids: Tensor, quantization: str):
    stop = {
        token
        for source in (config, getattr(model, "generation_config", None))
        for token in _as_tuple(getattr(source, "eos_token_id", None))
    }
    config = config.get_text_config(decoder=True)  # models that also see have one inside
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    before, layers = 3, config.num_hidden_layers
    past = [tuple(torch.zeros(len(ids), heads, before, width) for _ in "kv") for _ in range(layers)]
    mask = torch.ones(len(ids), before + ids.shape[1], dtype=torch.int64)
    text, one = {0: "batch", 1: "length"}, {0: "batch", 2: "past"}
    shapes = (text, {0: "batch", 1: "past_and_length"}, [(one, one)] * layers)
    names = [f"{{}}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    graph = _Graph(_Decoder(model), (ids, mask, past), shapes,
                   ["input_ids", "attention_mask", *(n.format("past_key_values") for n in names)],
                   ["logits", *(n.format("present") for n in names)])  # fmt: skip
    return graph, Description(
        "decoder", layers, heads, width, getattr(config, "max_position_embeddings", 0),
        tuple(sorted(stop)),
        "ForCausalLM", quantization,
    )  # fmt: skip


def _as_tuple(tokens: int | Sequence[int] | None) -> tuple[int, ...]:
    if tokens is None:
        return ()
    return tuple(tokens) if isinstance(tokens, Sequence) else (tokens,)
