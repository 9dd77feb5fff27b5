"""The layout of ONNX Runtime's kernels, decoded by another hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from companion import W4, QuantScheme, convert, export_onnx, prepare_qat
from companion.errors import UnsupportedModel
from companion.formats.onnx.layers import Blocks, pack_unsigned, served_layers
from companion.formats.onnx.model import OnnxModel
from companion.numerics.packing import unpack


@given(st.sampled_from([2, 4, 8]), st.data())
def test_bytes_decode_to_the_integers_that_went_in(bits, data):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    q = data.draw(st.lists(st.integers(low, high), min_size=8, max_size=8))
    stored = pack_unsigned(torch.tensor(q, dtype=torch.int8), bits).numpy()
    ones_and_zeros = np.unpackbits(stored, bitorder="little").reshape(8, bits)
    values = (ones_and_zeros * 2 ** np.arange(bits)).sum(1)
    assert (values - 2 ** (bits - 1)).tolist() == q


def layer(columns: int, scheme: QuantScheme):
    torch.manual_seed(0)
    return convert(prepare_qat(nn.Sequential(nn.Linear(columns, 6)), scheme, "absmax"))[0]


def test_a_row_repeats_its_scale_and_is_filled_with_zeros():
    packed = layer(100, QuantScheme(3, None))
    blocks = Blocks(packed)
    assert (blocks.bits, blocks.size, blocks.count) == (4, 32, 4)  # no kernel has three bits
    assert torch.equal(blocks.scales, packed.scale.float().expand(6, 4))
    stored = blocks.integers.flatten(1)
    first, second = (stored & 15).to(torch.int8) - 8, (stored >> 4).to(torch.int8) - 8
    both = torch.stack([first, second], -1).flatten(1)
    assert torch.equal(both[:, :100], unpack(packed.integers, 3, 100))
    assert not both[:, 100:].any()


@pytest.mark.parametrize("group_size", [8, 24, 96])
def test_groups_without_a_kernel_are_refused_with_those_that_have_one(group_size):
    with pytest.raises(UnsupportedModel, match="use 16, 32, 64"):
        Blocks(layer(192, QuantScheme(4, group_size)))


def test_tied_layers_share_their_blocks():
    model = nn.ModuleDict({"embedding": nn.Embedding(64, 32), "output": nn.Linear(32, 64, False)})
    model["output"].weight = model["embedding"].weight
    converted = convert(prepare_qat(model, W4, "absmax", embeddings=True))
    first, second = served_layers(converted.values(), 0).values()
    assert first.blocks is second.blocks


class Texts(nn.Module):
    """For each width an embedding, a layer and an output, tied and not: all of it in one file."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList()
        for width in widths:
            for tied in (True, False):
                part = nn.ModuleDict({
                    "embedding": nn.Embedding(10, width),
                    "between": nn.Linear(width, width),
                    "output": nn.Linear(width, 10, bias=False),
                })  # fmt: skip
                if tied:
                    part["output"].weight = part["embedding"].weight
                self.parts.append(part)

    def forward(self, ids):
        found = [part["output"](part["between"](part["embedding"](ids))) for part in self.parts]
        return torch.stack(found, dim=1)


ALL = [32, 48, 96, 100, 576]


@pytest.mark.parametrize(
    ("bits", "group_size", "widths"),
    [(2, None, ALL), (4, None, ALL), (8, None, ALL), (2, 16, [32, 48, 96, 576]),
     (8, 32, [32, 96, 576]), (4, 64, [576]), (2, 128, [256])],
    ids=str,
)  # fmt: skip
def test_every_width_is_served_where_embeddings_are_rounded(tmp_path, bits, group_size, widths):
    """Rows with a single scale once ended in whole blocks, wider than the layer that follows."""
    scheme = QuantScheme(bits, group_size)
    model = convert(prepare_qat(Texts(widths), scheme, "absmax", embeddings=True))
    ids = torch.arange(10).view(2, 5)
    served = OnnxModel(export_onnx(model, tmp_path / "model.onnx", example=ids), threads=1)
    expected = model(ids)
    # two sums of at most 576 products, each in an order of its own: 576 steps of 6e-8 of the largest
    assert (served(ids) - expected).abs().max() < 576 * 2**-24 * expected.abs().max()
