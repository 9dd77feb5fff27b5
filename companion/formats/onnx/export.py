"""`export_onnx`: a converted model as an ONNX file, with the very integers that were trained.

Built in chapter 15.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor, nn

from companion.errors import UnsupportedModel, WrongStage, expect, extra
from companion.files import BLANK, flush, seal
from companion.formats.onnx.depth import (
    TRACED,
    deepen,
    operations,
    repeats,
    shallow,
    stack_of,
)
from companion.formats.onnx.graphs import KEY, STAY, Graph, cannot_be_traced, graph_of
from companion.formats.onnx.layers import served_layers
from companion.formats.onnx.stored import beside
from companion.qat.packed import Packed
from companion.qat.prepare import replace_modules
from companion.qat.saved import refuse_foreign

OPSET = 23
LARGEST = 1_900_000_000
"""Bytes of tensors above which they stand in a file of their own: ONNX ends at two gigabytes."""
LEVELS = (0, 1, 2, 3, 4)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    accuracy_level: int = 0,
    example: Tensor | None = None,
) -> Path:
    """Write a converted model as an ONNX file that ONNX Runtime serves.

    Nothing is quantized anew: the file holds the integers and scales of `convert`. Embeddings
    and output layers that share them share them there, too. There are kernels for 2, 4 and 8 bits,
    so integers of 3 take the room of 4. Of a deep model whose layers are alike four are traced, and
    one of them stands for the rest; tensors that are in float32 already are shared with the model, and
    the file is put together in memory. ``python -m benchmarks.deployed_speed --steps export`` measures
    the time this takes SmolLM2 in a fresh process, and the peak memory beyond the loaded model's.
    Language models take and give their keys and values; batch
    and length are free, and padding may stand on either side: positions are counted from the
    attention mask. A decoder's generation settings travel with it.

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
        If it was converted by `QuantWrapper` or `to_torchao`, if ONNX Runtime has no kernel for its
        groups, or no file can hold the model: it has an
        encoder and a decoder, a recurrent state, or something that PyTorch's exporter does not
        know.

    Examples
    --------
    >>> import tempfile
    >>> from companion import W4, convert, export_onnx, prepare_qat
    >>> q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), W4))
    >>> path = export_onnx(q, tempfile.mkdtemp() + "/layer.onnx", example=torch.ones(1, 64))
    >>> path.name
    'layer.onnx'
    """
    expect("export_onnx", "model", model, nn.Module)
    expect("export_onnx", "path", path, str | Path)
    if accuracy_level not in LEVELS:
        raise ValueError(f"accuracy_level {accuracy_level!r} is unknown: use one of {LEVELS}")
    refuse_foreign(model, "export_onnx")
    layers = [module for module in model.modules() if isinstance(module, Packed)]
    if getattr(model, "quantization", None) is None or not layers:
        raise WrongStage("export_onnx() needs a model from convert(): convert it first")
    served = _in_float32(model)
    layers = [module for module in served.modules() if isinstance(module, Packed)]
    served = replace_modules(served, served_layers(layers, accuracy_level))
    if any("Experts" in type(module).__name__ for module in served.modules()):
        served.set_experts_implementation("batched_mm")  # the one that PyTorch's exporter knows
    return write_graph(served.eval(), path, example=example)


def write_graph(model: nn.Module, path: str | Path, *, example: Tensor | None = None) -> Path:
    """Trace a model, quantized or float, and write it.

    The file is opened and run once by ONNX Runtime before it takes the place of an earlier one.

    Parameters
    ----------
    model, path, example
        As in `export_onnx`.
    """
    with extra("deploy"):
        import onnx

    path = Path(path)
    graph = graph_of(model.eval(), example)
    try:
        program = _program_of_a_few_layers(model, graph, example) or _traced(graph)
    except torch.onnx.OnnxExporterError as error:
        raise cannot_be_traced(model, error) from error
    for node in program.model.graph.all_nodes():  # stack traces, which weigh more than a layer
        node.metadata_props.clear()
    program.model.metadata_props[f"{KEY}.sha256"] = BLANK
    program.model.metadata_props[KEY] = json.dumps(asdict(graph.description))
    tensors = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".export-", dir=path.parent))
    try:
        program.save(partial / path.name, external_data=tensors > LARGEST)
        onnx.checker.check_model(partial / path.name)
        _run_once(partial / path.name, graph, type(model).__name__)
        seal(partial / path.name, *beside(partial / path.name))
        for file in partial.iterdir():
            flush(file)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == path.name):
            file.replace(path.parent / file.name)  # the tensors first, then what refers to them
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _in_float32(model: nn.Module) -> nn.Module:
    """A copy of a model that computes in float32, as the kernels do; it shares what is so already."""
    tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}
    stored = {id(x) for layer in model.modules() if isinstance(layer, Packed)
              for x in layer.buffers(recurse=False)}  # fmt: skip
    for key, tensor in tensors.items():
        wide = tensor.is_floating_point() and key not in stored
        there = tensor.detach().to("cpu", torch.float32 if wide else tensor.dtype)
        if there.data_ptr() != tensor.data_ptr() or there.dtype != tensor.dtype:
            same = isinstance(tensor, nn.Parameter)
            tensors[key] = nn.Parameter(there, tensor.requires_grad) if same else there
    served = copy.deepcopy(model, dict(tensors))
    for layer in served.modules():
        if isinstance(layer, Packed):
            layer.dtype = torch.float32
    return served


def _program_of_a_few_layers(
    model: nn.Module, graph: Graph, example: Tensor | None
) -> torch.onnx.ONNXProgram | None:
    """Trace four layers of a deep model and repeat one, or None where they are not alike."""
    stack = stack_of(graph.module)
    if stack is None:
        return None
    try:
        whole, more = operations(graph.module, graph.inputs), len(stack.layers) - TRACED
        with shallow(stack):
            small = graph_of(model, example)
            few = operations(small.module, small.inputs)
            if not repeats(few, whole, more):
                return None
            program = _traced(small)
        deepen(program.model.graph, stack, graph.names, graph.outputs)
    except Exception:  # Unlike, or whatever a model says to be cut: then it is traced as it is
        return None
    return program


def _traced(graph: Graph) -> torch.onnx.ONNXProgram:
    """Trace a module, and compute nothing twice."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    with _grouped_heads(), _uncollected():
        program = torch.onnx.export(
            graph.module.eval(), graph.inputs, dynamo=True, opset_version=OPSET, verbose=False,
            dynamic_shapes=graph.shapes, input_names=graph.names, output_names=graph.outputs,
        )  # fmt: skip
    CommonSubexpressionEliminationPass()(program.model)
    return program


def _run_once(file: Path, graph: Graph, name: str) -> None:
    """Open a written file and run it on what it was traced with, as whoever serves it will."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    tensors, _ = torch.utils._pytree.tree_flatten(graph.inputs)
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        given = (node.name for node in session.get_inputs())
        session.run(None, {n: t.numpy() for n, t in zip(given, tensors, strict=True)})
    except Exception as error:
        reason = shorten(str(error), 160, placeholder=" ...").rstrip(".")
        raise UnsupportedModel(
            f"ONNX Runtime cannot run the file of this {name}, which was not written ({reason}): "
            f"{STAY}"
        ) from error


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python from searching the exporter's many small objects for garbage: a fifth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
