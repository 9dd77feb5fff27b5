"""Bit for bit what torchao computes, and where its gradient differs."""

import copy
import logging
import warnings

import pytest
import torch
from torch import nn

from companion import Activations, QuantScheme, convert, prepare_qat
from companion.errors import UnsupportedModel, WrongStage
from companion.numerics.affine import to_groups

logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
pytest.importorskip("torchao")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.qat import QATConfig

TOKEN = Activations(8, "token")
CASES = [
    pytest.param(bits, size, activations, id=f"{bits}-{size}-{'a8' if activations else 'a16'}")
    for bits in (2, 3, 4, 8)
    for size in (32, 64, None)
    for activations in (None, TOKEN)
]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64, bias=False), nn.ReLU(), nn.Linear(64, 32))


def inputs() -> torch.Tensor:
    return torch.randn(16, 128, generator=torch.Generator().manual_seed(1))


def base(bits: int, size: int | None, activations: Activations | None):
    dtype = getattr(torch, f"int{bits}")
    granularity = PerAxis(0) if size is None else PerGroup(size)
    if activations is None:
        return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)


def prepared_by_torchao(*case) -> nn.Module:
    theirs = model()
    quantize_(theirs, QATConfig(base(*case), step="prepare"))
    return theirs


def scheme(bits, size, activations) -> QuantScheme:
    return QuantScheme(bits, size, torch.float32, activations)


@pytest.mark.parametrize("case", [p.values for p in CASES], ids=[p.id for p in CASES])
def test_prepared_and_converted_are_equal(case):
    theirs, ours, x = (
        prepared_by_torchao(*case),
        prepare_qat(model(), scheme(*case), "absmax"),
        inputs(),
    )
    expected = theirs(x)
    assert torch.equal(ours(x), expected)
    quantize_(theirs, QATConfig(base(*case), step="convert"))
    converted = convert(ours)
    assert torch.equal(converted(x), expected)
    assert torch.equal(theirs(x), expected)
    for i in (0, 2):
        assert torch.equal(converted[i].weight, theirs[i].weight.dequantize())
        assert torch.equal(converted[i].bias, theirs[i].bias) if i else converted[i].bias is None


def gradients(m: nn.Module) -> list[torch.Tensor]:
    return torch.autograd.grad(m(inputs()).square().sum(), list(m.parameters()))


@pytest.mark.parametrize("case", [p.values for p in CASES], ids=[p.id for p in CASES])
def test_gradient_of_the_arm_that_copies_torchao(case):
    theirs = gradients(prepared_by_torchao(*case))
    arm = gradients(prepare_qat(model(), scheme(*case), "absmax-torchao-gradient"))
    # torchao also stops the gradient of activations at the ends of their grid, ours never does:
    # with rounded activations only the last layer sees the same gradient from above
    last = slice(None) if case[2] is None else slice(1, None)
    for a, b in zip(arm[last], theirs[last], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [32, 64, None])
def test_torchao_stops_the_gradient_at_both_ends_and_ours_beyond_them(bits, size):
    case = (bits, size, None)
    layer = model()[0]
    theirs = gradients(prepared_by_torchao(*case))[0]
    ours = gradients(prepare_qat(model(), scheme(*case), "absmax"))[0]
    through = gradients_through(layer, scheme(*case))
    qmin, qmax = scheme(*case).integers
    groups = to_groups(layer.weight.detach(), size)
    step = groups.abs().amax(-1, keepdim=True) / ((qmax - qmin) / 2)
    place = torch.round(groups * (1 / step)).view_as(layer.weight)
    tiny = 1e-5 * through.abs().max()  # torchao multiplies and divides by the scale again
    at_or_beyond = (place <= qmin) | (place >= qmax)
    assert (theirs[at_or_beyond].abs() <= tiny).all()
    assert torch.allclose(theirs[~at_or_beyond], through[~at_or_beyond], rtol=1e-4, atol=tiny)
    beyond = (place < qmin) | (place > qmax)
    assert torch.equal(ours[beyond], torch.zeros(int(beyond.sum())))
    assert torch.equal(ours[~beyond], through[~beyond])
    ends = at_or_beyond & ~beyond
    assert ends.any()
    assert (ours[ends] != 0).float().mean() > 0.9


def gradients_through(layer: nn.Linear, form: QuantScheme) -> torch.Tensor:
    """The gradient with respect to the rounded weight itself: no straight-through rule."""
    net = copy.deepcopy(convert(prepare_qat(model(), form, "absmax")))
    weight = net[0].weight.requires_grad_()
    y = net[2](torch.relu(nn.functional.linear(inputs(), weight)))
    return torch.autograd.grad(y.square().sum(), weight)[0]


def test_what_torchao_quantized_is_refused():
    theirs = prepared_by_torchao(4, 32, None)
    with pytest.raises(WrongStage, match="prepared already"):
        prepare_qat(theirs, QuantScheme(4))
    quantize_(theirs, QATConfig(base(4, 32, None), step="convert"))
    with pytest.raises(UnsupportedModel, match=r"0 \(Linear\) holds quantized weights already"):
        prepare_qat(theirs, QuantScheme(4))
    directly = model()
    quantize_(directly, IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)))
    with pytest.raises(UnsupportedModel, match="load the model in floating point"):
        prepare_qat(directly, QuantScheme(4))
