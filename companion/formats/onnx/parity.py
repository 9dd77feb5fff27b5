"""Whether a served file computes what was trained: integers, logits, answers, and the metric.

Built in chapter 15.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from companion.data.task import Task
from companion.errors import extra
from companion.evaluation.estimates import Estimate
from companion.evaluation.forward import outputs
from companion.evaluation.metrics import METRICS
from companion.formats.onnx.model import OnnxModel
from companion.numerics.packing import unpack
from companion.qat.packed import Packed
from companion.study.tables import across_seeds


@dataclass(frozen=True)
class Parity:
    """How a served model differs from the converted one.

    Parameters
    ----------
    layers : int
        Matrices in the file, where those that are tied stand once (by W8A8 twice).
    integers, scales : bool
        Whether all of them are equal to the trained ones.
    logits : float
        Largest difference of a logit.
    argmax : float
        Share of the answers (a token, a class) that are the same.
    metric : str
    difference : Estimate
        Of the task's metric, served minus converted, in pairs.
    """

    layers: int
    integers: bool
    scales: bool
    logits: float
    argmax: float
    metric: str
    difference: Estimate

    def __str__(self) -> str:
        equal = {True: "equal", False: "NOT equal"}
        d = self.difference
        return (
            f"{self.layers} matrices: integers {equal[self.integers]}, scales "
            f"{equal[self.scales]}\n"
            f"logits: at most {self.logits:.1e} apart, the same answer for {self.argmax:.1%}\n"
            f"{self.metric}: {d.value:+.1e} [{d.low:+.1e}, {d.high:+.1e}] (n = {d.n})"
        )


def parity(model: nn.Module, path: str | Path, task: Task, *, batches: int = 4) -> Parity:
    """Compare a file of `export_onnx` with the model that it was made from.

    Parameters
    ----------
    model : nn.Module
        The converted model.
    path : path
    task : Task
        Its test split gives the metric, its validation split the logits.
    batches : int
        Of the validation split.

    Returns
    -------
    Parity
    """
    served, measure = OnnxModel(path), METRICS[task.metric].measure
    pairs = list(_matches(model, read_integers(path)))
    ours, theirs = ([logits.cpu() for _, logits in outputs(m, islice(task.validation, batches))]
                    for m in (model, served))  # fmt: skip
    error = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten()
                      for a, b in zip(ours, theirs, strict=True)])  # fmt: skip
    before, after = measure(model, task).scores, measure(served, task).scores
    difference = across_seeds(
        after.resampled() - before.resampled(), [after.value - before.value], len(after.total)
    )
    return Parity(
        len(pairs), all(p[0] for p in pairs), all(p[1] for p in pairs), error,
        float(same.float().mean()), task.metric, difference,
    )  # fmt: skip


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


def _matches(model: nn.Module, found: Mapping[str, tuple[np.ndarray, np.ndarray]]):
    """Whether the integers and the scales of each matrix are those of the file."""
    names: dict[int, set[str]] = {}
    layers = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, Packed):
            names.setdefault(layer.integers.data_ptr(), set()).add(name)
            layers[layer.integers.data_ptr()] = layer
    for place, layer in layers.items():
        ours = unpack(layer.integers, layer.scheme.weight_bits, layer.columns).cpu().numpy()
        in_file = names[place] & found.keys()  # two for W8A8: no operator shares an embedding
        if not in_file:
            yield False, False
        for name in in_file:
            integers, scales = found[name]
            padded = np.pad(ours, ((0, 0), (0, integers.shape[1] - layer.columns)))
            repeated = np.broadcast_to(layer.scale.cpu().float().numpy(), scales.shape)
            yield np.array_equal(integers, padded), np.array_equal(scales, repeated)
