"""The integers and scales of a fixed small model never change: converted, saved and exported.

The stored hashes were made by the package before its move into rooms. A change of these bytes is a
change of what users get: it needs a reason, and `python -m tests.qat.test_unchanged_integers` once.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from companion import W4A8, W8A8, QuantScheme, convert, export_onnx, prepare_qat, save_quantized

STORED = Path(__file__).with_name("unchanged_integers.json")
SCHEMES = {
    "W8": QuantScheme(8, 16),
    "W4": QuantScheme(4, 16),
    "W3": QuantScheme(3, 16),
    "W2": QuantScheme(2, 16),
    "W2 row": QuantScheme(2, None),
    "W4A8": QuantScheme(4, 16, activations=W4A8.activations),
    "W8A8": W8A8,
}


def fixed_model() -> nn.Module:
    """Weights by arithmetic, the same on every machine."""
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False))
    start = 0
    with torch.no_grad():
        for p in model.parameters():
            k = torch.arange(start, start + p.numel(), dtype=torch.float64)
            p.copy_(((k * 0.6180339887498949) % 1 - 0.5).pow(3).mul(4).view_as(p).float())
            start += p.numel()
    return model


def digest(tensors: dict[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        found.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def hashes(scheme: QuantScheme, method: str) -> dict[str, str]:
    onnx = pytest.importorskip("onnx")
    from onnx.numpy_helper import to_array

    converted = convert(prepare_qat(fixed_model(), scheme, method))
    folder = save_quantized(converted, tempfile.mkdtemp())
    result = {
        "converted": digest(arrays(converted.state_dict())),
        "saved": digest(arrays(load_file(folder / "model.safetensors"))),
    }
    if scheme.weight_bits != 3:  # ONNX Runtime has no kernel for three bits
        path = export_onnx(converted, folder / "model.onnx", example=torch.ones(1, 64))
        tensors = onnx.load(path).graph.initializer
        result["exported"] = digest({tensor.name: to_array(tensor) for tensor in tensors})
    return result


@pytest.mark.parametrize("method", ["absmax", "mse", "lsq"])
@pytest.mark.parametrize("name", SCHEMES)
def test_integers_are_those_of_before(name, method):
    assert hashes(SCHEMES[name], method) == json.loads(STORED.read_text())[f"{name} {method}"]


if __name__ == "__main__":
    found = {f"{name} {method}": hashes(scheme, method)
             for name, scheme in SCHEMES.items() for method in ("absmax", "mse", "lsq")}  # fmt: skip
    STORED.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit()
