"""What stands in a file of ExecuTorch: its integers and scales, and what it says of itself.

Built in chapter 15.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from companion.errors import DamagedFile, extra
from companion.formats.served import Matrix, first_line
from companion.numerics.packing import unpack
from companion.qat.packed import Packed, QuantizedEmbedding

TOLD = "companion"
"""The file's method that gives, in JSON, what `export_executorch` says of it."""
ROWS = "quantized_decomposed::embedding_"
"""How the operators begin that look rows of integers up."""


@contextmanager
def silent() -> Iterator[None]:
    """Keep off the screen what ExecuTorch's own code says of the processor as it is loaded.

    It writes to the process's standard error, and in a notebook to Python's.

    Examples
    --------
    >>> import sys
    >>> with silent():
    ...     _ = os.write(2, b"unheard"), print("unheard", file=sys.stderr)
    """
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def named(model: nn.Module) -> dict[str, list[str]]:
    """Name the layers whose integers and scales a file will hold, by a hash of both.

    ExecuTorch keeps no names. With these each matrix of a file is found again.

    Parameters
    ----------
    model : nn.Module
        From `as_served`.

    Returns
    -------
    dict of str to list of str
        Several names where layers hold the same.
    """
    found: dict[str, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, Packed):
            integers = unpack(layer.integers, layer.scheme.weight_bits, layer.columns)
            rows = isinstance(layer, QuantizedEmbedding)
            found.setdefault(_hash(integers, layer.scale, rows), []).append(name)
    return found


def read_executorch(path: str | Path, model: nn.Module) -> dict[str, Matrix]:
    """Read integers and scales as `companion.formats.registry.FORMATS` asks for them.

    Parameters
    ----------
    path : path
    model : nn.Module
        Not asked: the file says all itself.
    """
    file = _deserialized(path)
    try:
        names = json.loads(_told(file))["names"]
    except (StopIteration, KeyError, ValueError):
        raise DamagedFile(
            f"{path} was not written by export_executorch(): export it again"
        ) from None
    found = {}
    for integers, scale, rows in _stored(file):
        for name in names.get(_hash(integers, scale, rows), ()):
            found[name] = Matrix(integers.numpy(), scale.numpy())
    return found


def read_integers(path: str | Path) -> list[tuple[Tensor, Tensor]]:
    """Read the integers and scales of every quantized matrix out of an exported file.

    Parameters
    ----------
    path : path

    Returns
    -------
    list of (Tensor of int8, Tensor of float32)
        Integers of shape (rows, columns) and scales of shape (rows, groups): the matrices that
        XNNPACK multiplies, in the file's order, which may be another than the model's.
    """
    return [(integers, scale) for integers, scale, rows in _stored(_deserialized(path)) if not rows]


def _deserialized(path: str | Path) -> Any:
    with extra("executorch"):
        from executorch.exir._serialize._program import deserialize_pte_binary

    try:
        return deserialize_pte_binary(Path(path).read_bytes())
    except Exception as error:  # whatever the reader of flat buffers meets in what is none
        raise DamagedFile(
            f"{path} is no whole file of ExecuTorch ({first_line(error)}): export it again"
        ) from None


def _told(file: Any) -> str:
    """The text that a file says of itself."""
    plan = next(plan for plan in file.program.execution_plan if plan.name == TOLD)
    return plan.values[plan.outputs[0]].val.string_val


def _stored(file: Any) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Integers and scales of each matrix, and whether its rows are looked up."""
    plan = next(plan for plan in file.program.execution_plan if plan.name == "forward")
    named_data = file.named_data
    data = {key: bytes(named_data.buffers[entry.buffer_index])
            for key, entry in named_data.pte_data.items()} if named_data else {}  # fmt: skip
    for call in (i.instr_args for chain in plan.chains for i in chain.instructions):
        if type(call).__name__ == "DelegateCall":
            delegate = plan.delegates[call.delegate_index]
            payload = file.program.backend_delegate_data[delegate.processed.index].data
            for integers, scale in _matrices(_xnnpack_graph(bytes(payload)), data):
                yield integers, scale, False
        elif type(call).__name__ == "KernelCall":
            name = plan.operators[call.op_index].name
            if name.startswith(ROWS):
                integers, scale = (
                    _constant(file, plan.values[place].val) for place in call.args[:2]
                )
                if name.startswith(f"{ROWS}4bit"):  # the first of two in the upper half
                    halves = torch.stack([integers >> 4, integers & 15], -1).flatten(1)
                    integers = halves.to(torch.int8) - 8
                yield integers, scale, True


def _constant(file: Any, tensor: Any) -> Tensor:
    """A tensor that stands in the file."""
    dtype = {"BYTE": torch.uint8, "CHAR": torch.int8, "FLOAT": torch.float32}[
        tensor.scalar_type.name
    ]
    raw = bytearray(file.program.constant_buffer[tensor.data_buffer_idx].storage)
    size = torch.Size(tensor.sizes)
    return torch.frombuffer(raw, dtype=dtype)[: size.numel()].view(size)  # what fills up, left out


def _hash(integers: Tensor, scale: Tensor, rows: bool) -> str:
    found = hashlib.sha256(integers.contiguous().to(torch.int8).numpy().tobytes())
    found.update(scale.contiguous().float().numpy().tobytes())
    return f"{'rows' if rows else 'matrix'} {found.hexdigest()}"


def _xnnpack_graph(payload: bytes) -> dict[str, Any]:
    """Read the graph that XNNPACK was handed, as its schema describes it."""
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as theirs
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = theirs.XNNHeader.from_bytes(payload[: theirs.XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "schema.fbs").write_bytes(theirs._get_schema_bytes())
        (Path(folder) / "graph.bin").write_bytes(payload[start : start + header.flatbuffer_size])
        _flatc_decompile(folder, f"{folder}/schema.fbs", f"{folder}/graph.bin", ["--raw-binary"])
        text = (Path(folder) / "graph.json").read_text()
    return json.loads(re.sub(r"\binf\b", "Infinity", text))  # as Python reads it


def _matrices(graph: dict[str, Any], data: dict[str, bytes]) -> Iterator[tuple[Tensor, Tensor]]:
    """The integers and scales of each matrix in a graph of XNNPACK."""
    values = [value["xvalue_union"] for value in graph["xvalues"]]
    tensors = {value.get("tensor_value", value)["id_out"]: value for value in values}
    keys = [constant.get("named_key") for constant in graph["constant_data"]]
    for node in graph["xnodes"]:
        if node["xnode_union_type"] != "XNNFullyConnected":
            continue
        value = tensors[node["xnode_union"]["filter_id"]]
        if "quant_params" not in value:
            continue  # a matrix in floating point
        described, grid = value["tensor_value"], value["quant_params"]
        raw = torch.frombuffer(
            bytearray(data[keys[described["constant_buffer_idx"]]]), dtype=torch.uint8
        )
        scale = bytearray(data[keys[grid["scale_buffer_idx"]]])
        rows, columns = described["dims"]
        if described["datatype"] == "xnn_datatype_qbint4":
            raw = raw.view(rows, -1)
            halves = torch.stack([raw & 15, raw >> 4], -1).flatten(1)
            integers = halves.to(torch.int8) - 8
            scales = torch.frombuffer(scale, dtype=torch.bfloat16)
        else:
            integers = raw.view(torch.int8).view(rows, columns)
            scales = torch.frombuffer(scale, dtype=torch.float32)
        yield integers[:, :columns], scales.float().view(rows, -1)
