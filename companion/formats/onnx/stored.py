"""What stands in an exported ONNX file: its integers and scales, and how its kernels round.

Built in chapter 15.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from companion.errors import DamagedFile, extra, readable
from companion.files import is_sealed
from companion.formats.onnx.graphs import KEY
from companion.formats.served import Matrix

if TYPE_CHECKING:
    import onnx

REMEDY = "export it again"


def beside(path: str | Path) -> list[Path]:
    """Return the second file of a large model, which holds its tensors.

    Parameters
    ----------
    path : path
    """
    tensors = Path(f"{path}.data")
    return [tensors] if tensors.is_file() else []


def check_whole(path: str | Path) -> None:
    """Refuse a file that is not the one that `export_onnx` wrote.

    Parameters
    ----------
    path : path

    Raises
    ------
    DamagedFile
        If it is missing, or its hash differs.
    """
    if not Path(path).is_file():
        raise DamagedFile(f"{path} is missing: give the file that export_onnx() wrote")
    if is_sealed(path, *beside(path)) is False:
        raise DamagedFile(f"{path} is not the file that was written (its hash differs): {REMEDY}")


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
    check_whole(path)
    with extra("deploy"):
        import onnx

    with readable(path, REMEDY):
        model = onnx.load(path, load_external_data=False)
        _check_origin(model, path)
        for node in model.graph.node:
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

    Raises
    ------
    DamagedFile
        If the file is missing, truncated or edited.
    """
    check_whole(path)
    with extra("deploy"):
        import onnx  # noqa: F401
    with readable(path, REMEDY):
        return _read(path)


def _read(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    import onnx
    from onnx.numpy_helper import to_array

    model = onnx.load(path)
    _check_origin(model, path)
    graph = model.graph
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


def _check_origin(model: onnx.ModelProto, path: str | Path) -> None:
    """Refuse what is none of ours, such as an empty file, which is a valid empty model."""
    if KEY not in {told.key for told in model.metadata_props}:
        raise DamagedFile(f"{path} was not written by export_onnx()")


def _unpacked(stored: np.ndarray, bits: int) -> np.ndarray:
    """From bytes, shape (rows, blocks, bytes), to signed integers, shape (rows, columns)."""
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)
    patterns = (stored[..., None] >> shifts) & (2**bits - 1)
    return patterns.reshape(len(stored), -1).astype(np.int16) - 2 ** (bits - 1)
