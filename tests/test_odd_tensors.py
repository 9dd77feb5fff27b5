"""Odd tensors and odd models, one parametrised test a room: the right value, or a refusal in words."""

import copy
import pickle

import pytest
import torch
from torch import nn

from companion import (
    W2,
    W4,
    QuantScheme,
    choose_scale,
    convert,
    dequantize,
    fake_quantize,
    pack,
    prepare_qat,
    quantize,
    unpack,
)

SHAPES = [(0,), (1,), (1, 1), (0, 4), (3, 0), (2, 3, 1)]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_of_any_shape_are_packed_and_come_back(shape, bits):
    q = torch.ones(shape, dtype=torch.int8)
    assert torch.equal(unpack(pack(q, bits), bits, shape[-1]), q)


VALUES = {
    "zeros": torch.zeros(2, 8),
    "subnormal": torch.full((2, 8), 1e-42),
    "huge": torch.full((2, 8), 3e38),
    "one sign": torch.linspace(-2, -1, 16).reshape(2, 8),
    "not contiguous": torch.linspace(-1, 1, 16).reshape(8, 2).t(),
    "expanded": torch.linspace(-1, 1, 8).expand(2, 8),
    "float64": torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(2, 8),
    "float16": torch.linspace(-1, 1, 16).reshape(2, 8).half(),
    "bfloat16": torch.linspace(-1, 1, 16).reshape(2, 8).bfloat16(),
}


@pytest.mark.parametrize("name", VALUES)
def test_quantizing_stays_within_half_a_step(name):
    x = VALUES[name]
    scale, zero = choose_scale(x.float(), 8)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    q = quantize(x.float(), scale, zero, 8)
    back = dequantize(q, scale, zero)
    assert torch.equal(fake_quantize(x.float(), scale, zero, 8), back)
    assert ((back - x.float()).abs() <= scale / 2 * 1.0001 + 1e-38).all()


def straight() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))


def zero_group(model):
    model[0].weight.data[3] = 0
    return model


def frozen(model):
    return model.requires_grad_(False)


def doubled(model):
    return model.double()


def hooked(model):
    model[0].register_forward_hook(lambda module, inputs, output: None)
    return model


def transposed(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    return model


def subnormal(model):
    model[0].weight.data[5] *= 1e-40
    return model


@pytest.mark.parametrize(
    "odd", [zero_group, frozen, doubled, hooked, transposed, subnormal, copy.deepcopy]
)
@pytest.mark.parametrize("scheme", [W4, W2, QuantScheme(4, None)], ids=["W4", "W2", "row"])
def test_a_converted_odd_model_computes_what_was_trained(odd, scheme):
    model = odd(straight())
    x = torch.linspace(-1, 1, 64).reshape(2, 32).to(model[0].weight.dtype)
    qat = prepare_qat(model, scheme, "absmax").eval()
    q = convert(qat)
    assert torch.isfinite(q(x)).all()
    assert torch.equal(q(x), qat(x))
    assert torch.equal(copy.deepcopy(q)(x), q(x))
    if odd is not hooked:  # a lambda cannot be pickled
        assert torch.equal(pickle.loads(pickle.dumps(q))(x), q(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_or_stay_visible(value):
    model = straight()
    model[0].weight.data[0, 0] = value
    try:
        q = convert(prepare_qat(model, W4, "absmax"))
    except (ValueError, RuntimeError) as error:
        said = str(error)
        assert "\n" not in said
    else:
        assert not torch.isfinite(q[0](torch.ones(1, 32))).all(), "NaN became a number, silently"


def test_a_model_on_meta_is_refused_or_stays_there():
    model = straight().to("meta")
    try:
        qat = prepare_qat(model, W4, "absmax")
    except (ValueError, RuntimeError, NotImplementedError) as error:
        said = str(error)
        assert "\n" not in said
    else:
        assert qat[0].weight.is_meta
