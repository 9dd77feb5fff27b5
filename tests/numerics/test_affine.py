"""The grid against PyTorch's own kernels, bit for bit, over random inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization import PerChannelMinMaxObserver

from companion import choose_scale, dequantize, fake_quantize, quantize
from companion.errors import SchemeError
from companion.numerics.affine import to_groups
from companion.numerics.scheme import integer_range

bits = st.integers(2, 8)
seeds = st.integers(0, 2**31)
magnitudes = st.sampled_from([1e-6, 0.02, 1.0, 300.0])


def random(seed: int, *shape: int) -> torch.Tensor:
    """Gaussian values, with some that fall exactly on ties between two grid points."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    ties = torch.randint(-20, 20, shape, generator=generator) / 2
    return torch.where(torch.rand(*shape, generator=generator) < 0.3, ties, x)


@settings(max_examples=60, deadline=None)
@given(seeds, bits, st.booleans(), st.booleans(), magnitudes)
def test_per_channel_equals_torch_forward_and_gradient(seed, bits, signed, symmetric, size):
    symmetric &= signed
    ours = (size * random(seed, 6, 33)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    scale, zero_point = choose_scale(ours * 0.7, bits, signed=signed, symmetric=symmetric)
    upstream = random(seed + 1, 6, 33)
    y = fake_quantize(ours, scale, zero_point, bits, signed=signed)
    z = torch.fake_quantize_per_channel_affine(
        theirs, scale.flatten(), zero_point.flatten(), 0, *integer_range(bits, signed)
    )
    assert torch.equal(y, z)
    y.backward(upstream)
    z.backward(upstream)
    assert torch.equal(ours.grad, theirs.grad)
    assert (ours.grad != 0).any()
    # the draw clips some values, unless they are so small that the smallest scale covers them
    assert (ours.grad == 0).any() or size == 1e-6


@settings(max_examples=40, deadline=None)
@given(seeds, bits, st.booleans())
def test_per_tensor_equals_torch_forward_and_gradient(seed, bits, symmetric):
    ours = random(seed, 64).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    scale, zero_point = choose_scale(ours * 0.7, bits, symmetric=symmetric)
    y = fake_quantize(ours, scale, zero_point, bits)
    z = torch.fake_quantize_per_tensor_affine(
        theirs, scale.item(), zero_point.item(), *integer_range(bits)
    )
    assert torch.equal(y, z)
    y.sum().backward()
    z.sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


@settings(max_examples=40, deadline=None)
@given(seeds, bits, st.booleans(), magnitudes)
def test_scale_equals_torch_observer(seed, bits, symmetric, size):
    x = size * random(seed, 4, 50)
    qmin, qmax = integer_range(bits)
    observer = PerChannelMinMaxObserver(
        dtype=torch.qint8, quant_min=qmin, quant_max=qmax,
        qscheme=torch.per_channel_symmetric if symmetric else torch.per_channel_affine,
    )  # fmt: skip
    observer(x)
    expected_scale, expected_zero = observer.calculate_qparams()
    scale, zero_point = choose_scale(x, bits, symmetric=symmetric)
    assert torch.equal(scale.flatten(), expected_scale)
    assert torch.equal(zero_point.flatten(), expected_zero)


@settings(max_examples=40, deadline=None)
@given(seeds, bits, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_fake_quantize_is_quantize_then_dequantize(seed, bits, symmetric, dtype):
    x = random(seed, 5, 16).to(dtype)
    scale, zero_point = choose_scale(x, bits, symmetric=symmetric)
    q = quantize(x, scale, zero_point, bits)
    qmin, qmax = integer_range(bits)
    assert q.dtype == torch.int8
    assert qmin <= q.min() <= q.max() <= qmax
    y = fake_quantize(x, scale, zero_point, bits)
    assert y.dtype == dtype
    assert torch.equal(y, dequantize(q, scale, zero_point, dtype))


@settings(max_examples=40, deadline=None)
@given(seeds, bits)
def test_grid_points_stay_where_they_are(seed, bits):
    x = random(seed, 3, 20)
    scale, zero_point = choose_scale(x, bits)
    once = fake_quantize(x, scale, zero_point, bits)
    assert torch.equal(fake_quantize(once, scale, zero_point, bits), once)


def test_error_is_at_most_half_a_step_inside_the_range():
    x = random(0, 8, 64)
    for width in (2, 4, 8):
        scale, zero_point = choose_scale(x, width, symmetric=False)
        error = (fake_quantize(x, scale, zero_point, width) - x).abs()
        # the zero point is rounded, so the outermost values may lie up to one step away
        assert (error <= scale * 1.0001).all()
        assert error.mean() < scale.mean() / 2


def test_gradient_is_one_inside_and_at_both_ends_and_zero_outside():
    x = torch.tensor([-2.6, -2.4, -2.0, 0.0, 1.0, 1.4, 1.6], requires_grad=True)
    fake_quantize(x, torch.tensor([1.0]), bits=2).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_rounds_half_to_even_through_the_reciprocal():
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(x, torch.tensor([1.0]), bits=4).tolist() == [-2, 0, 0, 2, 2]
    # at scale 0.1 the float32 quotient and the product with the reciprocal differ
    values = torch.arange(-60, 60) / 20
    scale = torch.tensor([0.1])
    by_reciprocal = quantize(values, scale, bits=8).float()
    assert torch.equal(by_reciprocal, torch.round(values * (1 / scale)))
    assert not torch.equal(by_reciprocal, torch.round(values / scale))


def test_all_zero_group_stays_zero():
    x = torch.zeros(2, 8)
    for symmetric in (True, False):
        scale, zero_point = choose_scale(x, 4, symmetric=symmetric)
        assert torch.equal(fake_quantize(x, scale, zero_point, 4), x)


def test_scale_dtype_rounds_the_scale_before_use():
    x = random(3, 4, 32)
    full, _ = choose_scale(x, 4)
    half, _ = choose_scale(x, 4, scale_dtype=torch.float16)
    assert half.dtype == torch.float16
    assert torch.equal(half, full.half())
    assert torch.equal(fake_quantize(x, half, bits=4), fake_quantize(x, half.float(), bits=4))


def test_groups_are_neighbours_of_a_row():
    w = torch.arange(24.0).reshape(2, 12)
    assert to_groups(w, 4).shape == (2, 3, 4)
    assert to_groups(w, 4)[1, 2].tolist() == [20, 21, 22, 23]
    assert to_groups(w).shape == (2, 1, 12)
    with pytest.raises(SchemeError, match="could be 1, 2, 3, 4, 6, 12"):
        to_groups(w, 5)


def test_symmetric_unsigned_grid_is_refused():
    with pytest.raises(SchemeError, match="signed=True"):
        choose_scale(torch.ones(3), signed=False)
