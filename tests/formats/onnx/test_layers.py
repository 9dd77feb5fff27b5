"""The layout of ONNX Runtime's kernels, decoded by another hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from companion import W4, QuantScheme, convert, prepare_qat
from companion.errors import UnsupportedModel
from companion.formats.onnx.layers import Blocks, pack_unsigned, served_layers
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
