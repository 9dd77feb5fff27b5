"""What is read back from an ONNX file is what `convert` made, and what its kernels will round."""

import numpy as np
import pytest
import torch
from torch import nn

from companion import W2, W8, W8A8, QuantScheme, convert, export_onnx, prepare_qat
from companion.formats.onnx.stored import read_integers, read_onnx, rounded_block
from companion.numerics.packing import unpack
from companion.numerics.scheme import BLOCK8

SCHEMES = [W2, QuantScheme(3), QuantScheme(4, None), W8, W8A8]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_integers_and_scales_come_back(scheme, tmp_path):
    q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), scheme, "absmax"))
    path = export_onnx(q, tmp_path / "m.onnx", example=torch.ones(1, 64))
    ((name, (integers, scales)),) = read_integers(path).items()
    assert name == "0"
    assert np.array_equal(integers, unpack(q[0].integers, scheme.weight_bits, 64).numpy())
    assert set(np.unique(scales)) == set(q[0].scale.float().unique().tolist())
    assert np.array_equal(read_onnx(path, q)["0"].integers, integers)


@pytest.mark.parametrize(
    ("scheme", "level", "block"),
    [(W2, 0, None), (W2, 4, 32), (QuantScheme(4, 64), 4, 64), (W8A8, 4, None),
     (QuantScheme(4, activations=BLOCK8), 0, 32)],
    ids=str,
)  # fmt: skip
def test_what_kernels_round_is_read_from_the_file(scheme, level, block, tmp_path):
    q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), scheme, "absmax"))
    path = tmp_path / "m.onnx"
    export_onnx(q, path, accuracy_level=level, example=torch.ones(1, 64))
    assert rounded_block(path) == block
