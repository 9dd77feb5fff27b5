"""Layers of packed integers: shapes, types, the int8 kernel and what it does to a batch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from companion import W3, W4, W4A8, W8, W8A8, QuantScheme, convert, prepare_qat, unpack
from companion.qat.layers import DynamicInt8Linear, QuantizedEmbedding, QuantizedLinear


def pair(scheme: QuantScheme, columns: int = 64, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    prepared = prepare_qat(nn.Sequential(nn.Linear(columns, 24, **options)), scheme).eval()
    return prepared, convert(prepared)


def inputs(rows: int = 16, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("scheme", "columns"), [(W4, 64), (W3, 64), (QuantScheme(4, None), 50),
                                                 (QuantScheme(3, 10), 50), (W8, 96)])  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_buffers_hold_integers_and_scales_and_nothing_else(scheme, columns, bias):
    prepared, converted = pair(scheme, columns, bias=bias)
    layer = converted[0]
    groups = columns // (scheme.group_size or columns)
    assert (layer.integers.dtype, layer.scale.dtype) == (torch.uint8, torch.float16)
    assert layer.integers.shape == (24, -(-columns // 8) * scheme.weight_bits)
    assert layer.scale.shape == (24, groups)
    assert list(layer.state_dict()) == ["bias", "integers", "scale"][0 if bias else 1 :]
    q = unpack(layer.integers, scheme.weight_bits, columns)
    assert torch.equal(q, prepared[0].quantizer.integers(prepared[0].weight)[0])
    assert (layer.in_features, layer.out_features) == (columns, 24)
    assert torch.equal(
        layer(inputs(3, columns)), F.linear(inputs(3, columns), layer.weight, layer.bias)
    )


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("scheme", [W4, W4A8, QuantScheme(2, None)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv1d_computes_like_the_linear_layer_it_becomes(rows, scheme, dtype):
    torch.manual_seed(0)
    prepared = prepare_qat(nn.Sequential(Conv1D(6, 64)).to(dtype), scheme)
    assert prepared[0].matrix.shape == (6, 64)
    x = inputs(rows).to(dtype)
    assert torch.equal(convert(prepared)(x), prepared(x))


def test_layers_show_themselves():
    prepared = prepare_qat(nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 32), Conv1D(6, 32)), W4,
                           embeddings=True)  # fmt: skip
    for name in ("FakeQuantEmbedding(", "FakeQuantLinear(", "FakeQuantConv1D(", "4 bits"):
        assert name in repr(prepared)
    assert "(2): QuantizedLinear(6, 32, 4 bits)" in repr(convert(prepared))


def test_change_of_type_keeps_what_is_stored():
    _, converted = pair(W4)
    integers, scale = converted[0].integers.clone(), converted[0].scale.clone()
    converted.to(torch.bfloat16)
    assert converted[0].scale.dtype == torch.float16
    assert torch.equal(converted[0].scale, scale)
    assert torch.equal(converted[0].integers, integers)
    assert converted[0].weight.dtype == converted[0].bias.dtype == torch.bfloat16
    assert converted(inputs().bfloat16()).dtype == torch.bfloat16
    bfloat16_scales = pair(QuantScheme(4, 32, torch.bfloat16))[1].half()
    assert bfloat16_scales[0].scale.dtype == torch.bfloat16
    assert torch.equal(converted.float()[0].scale, scale)
    assert converted[0].weight.dtype == torch.float32


def test_bfloat16_weights_are_float32_weights_rounded_once():
    _, converted = pair(W4)
    exact = converted[0].weight
    assert torch.equal(converted.bfloat16()[0].weight, exact.bfloat16())


def test_int8_kernel_agrees_with_the_simulation():
    for bias in (True, False):
        prepared, converted = pair(W8A8, bias=bias)
        assert type(converted[0]) is DynamicInt8Linear
        expected = prepared(inputs())
        assert (converted(inputs()) - expected).abs().max() < 1e-5 * expected.abs().max()
        simulated = QuantizedLinear.forward(converted[0], inputs())
        assert torch.equal(simulated, expected)


def test_only_the_kernels_own_scheme_runs_on_it():
    assert type(pair(W4A8)[1][0]) is QuantizedLinear
    grouped = QuantScheme(8, 32, activations=W8A8.activations)
    assert type(pair(grouped)[1][0]) is QuantizedLinear


def test_with_one_scale_per_tensor_a_row_depends_on_its_batch():
    x = inputs()
    loud = torch.cat([x, 40 * x[:1]])
    for scheme, depends in ((W8A8, True), (W4A8, False), (W4, False)):
        for model in pair(scheme):
            moved = (model(loud)[:16] - model(x)).abs().max() / model(x).abs().max()
            assert moved > 0.01 if depends else moved < 1e-6


def test_without_the_kernel_the_simulation_is_computed(monkeypatch):
    prepared, converted = pair(W8A8)
    monkeypatch.setattr(torch.ops.quantized, "linear_dynamic", None)
    with pytest.raises(TypeError):
        converted(inputs())
    monkeypatch.setattr(DynamicInt8Linear, "forward", QuantizedLinear.forward)
    assert torch.equal(converted(inputs()), prepared(inputs()))


def test_the_kernels_own_copy_follows_copies_types_and_loading():
    converted = pair(W8A8)[1]
    before = converted(inputs())
    assert torch.equal(copy.deepcopy(converted)(inputs()), before)
    assert torch.equal(
        converted.bfloat16()(inputs().bfloat16()).float(), converted(inputs().bfloat16()).float()
    )
    assert torch.equal(converted.float()[0].scale, pair(W8A8)[1][0].scale)
    converted = pair(W8A8)[1]
    converted(inputs())
    other = copy.deepcopy(converted)
    other[0].integers.neg_()
    other[0].bias.zero_()
    converted.load_state_dict(other.state_dict())
    assert torch.equal(converted(inputs()), copy.deepcopy(other)(inputs()))
    assert not torch.equal(converted(inputs()), before)


def test_the_engine_in_use_is_left_alone():
    before = torch.backends.quantized.engine
    pair(W8A8)[1](inputs())
    assert torch.backends.quantized.engine == before


def test_embedding_unpacks_the_rows_it_is_asked_for():
    torch.manual_seed(0)
    prepared = prepare_qat(nn.Sequential(nn.Embedding(30, 64)), W4, embeddings=True)
    converted = convert(prepared)
    ids = torch.tensor([[3, 29, 3], [0, 1, 2]])
    assert isinstance(converted[0], QuantizedEmbedding)
    assert converted(ids).shape == (2, 3, 64)
    assert torch.equal(converted(ids), prepared(ids))
    assert torch.equal(converted(ids), converted[0].weight[ids])


def test_padding_row_of_an_embedding_gets_no_gradient():
    table = nn.Embedding(6, 32, padding_idx=0)
    prepared = prepare_qat(nn.Sequential(table), W4, embeddings=True)
    prepared(torch.tensor([0, 1, 1])).sum().backward()
    grad = prepared[0].weight.grad
    assert torch.equal(grad[0], torch.zeros(32))
    assert (grad[1] == 2).sum() >= 31  # the largest may be cut
    assert torch.equal(grad[2:], torch.zeros(4, 32))
