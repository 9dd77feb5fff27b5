"""What stands in an exported ONNX file: its integers and scales, and how its kernels round.

Built in chapter 15.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from companion.errors import extra
from companion.formats.served import Matrix


def read_onnx(path: str | Path, model: nn.Module) -> dict[str, Matrix]:
    """Read the integers and scales of a file, as `companion.formats.registry.FORMATS` asks for them.

    Parameters
    ----------
    path : path
    model : nn.Module
        Not asked: the file says all itself.
    """
    return {name: Matrix(*stored) for name, stored in read_integers(path).items()}


def rounded_block(path: str | Path) -> int | None:
    """Say in blocks of how many the kernels round a layer's inputs to 8 bits, or None.

    Parameters
    ----------
    path : path
    """
    with extra("deploy"):
        import onnx

    for node in onnx.load(path, load_external_data=False).graph.node:
        told = {a.name: a.i for a in node.attribute}
        if node.op_type == "MatMulNBits" and told.get("accuracy_level") == 4:
            return told["block_size"]
    return None


def read_integers(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read the integers and scales of every quantized matrix out of an exported file.

    Parameters
    ----------
    path : path

    Returns
    -------
    dict of str to (ndarray of int8, ndarray of float32)
        By the name of a layer: signed integers of shape (rows, columns), padded to whole blocks,
        and scales of shape (rows, blocks); for W8A8 (rows, 1).
    """
    with extra("deploy"):
        import onnx
        from onnx.numpy_helper import to_array

    graph = onnx.load(path).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    bits = {}  # of each tensor of integers, from the operator that reads it
    views = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}
    for node in graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            name = node.input[1 if node.op_type == "MatMulNBits" else 0]
            width = next(a.i for a in node.attribute if a.name == "bits")
            bits[views.get(name, name)] = width
        elif node.op_type == "MatMulInteger":
            bits[node.input[1]] = None
    found = {}
    for name, width in bits.items():
        prefix = name.removesuffix("integers")
        integers, scales = (to_array(tensors[prefix + part]) for part in ("integers", "scales"))
        if width is None:  # W8A8 is stored by columns
            integers, scales = integers.T, scales[:, None]
        else:
            integers = _unpacked(integers, width)
        layer = prefix.removeprefix("model.").removesuffix(".").removesuffix(".blocks")
        found[layer] = integers.astype(np.int8), scales
    return found


def _unpacked(stored: np.ndarray, bits: int) -> np.ndarray:
    """From bytes, shape (rows, blocks, bytes), to signed integers, shape (rows, columns)."""
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)
    patterns = (stored[..., None] >> shifts) & (2**bits - 1)
    return patterns.reshape(len(stored), -1).astype(np.int16) - 2 ** (bits - 1)
