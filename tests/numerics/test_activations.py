"""Dynamic activations against an independent reference."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from companion import Activations, choose_scale
from companion.numerics import activations
from companion.numerics.activations import fake_quantize_activations, fake_quantize_inputs

seeds = st.integers(0, 2**31)
bits = st.integers(2, 8)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(row: list[float], form: Activations) -> list[tuple[float, float, bool]]:
    """One group in double precision: each value's place, the step, and whether it is a tie."""
    qmin, qmax = form.integers
    if form.symmetric:
        scale, zero = max(abs(v) for v in row) / ((qmax - qmin) / 2), 0
    else:
        low, high = min(*row, 0.0), max(*row, 0.0)
        scale = (high - low) / (qmax - qmin)
        zero = min(max(qmin - round(low / scale), qmin), qmax)
    places = [min(max(round(v / scale) + zero, qmin), qmax) - zero for v in row]
    ties = [abs(v / scale % 1 - 0.5) < 1e-4 for v in row]
    return [(place * scale, scale, tie) for place, tie in zip(places, ties, strict=True)]


FORMS = [
    Activations(width, granularity, symmetric, span)
    for width in (4, 8)
    for granularity in ("token", "tensor", "block")
    for symmetric, span in ((False, None), (True, None), (False, (0, 2 ** (width - 1) - 1)))
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_activations_against_a_reference(form, shift):
    x = (random(2, 3, 5, 32) + shift).double()
    size = {"token": 32, "tensor": x.numel(), "block": 8}[form.granularity]
    rows = [reference(row, form) for row in x.reshape(-1, size).tolist()]
    expected, step, tie = torch.tensor(rows, dtype=torch.float64).view(*x.shape, 3).unbind(-1)
    result = fake_quantize_activations(x.float(), form, 8)
    assert (result.shape, result.dtype) == (x.shape, torch.float32)
    # a tie falls to either side in single precision; a symmetric grid puts its largest on one
    assert ((result - expected).abs() <= 1e-5 + 1.01 * step * tie).all()
    assert tie.mean() < (0.2 if form.granularity == "block" else 0.05)


@settings(max_examples=40, deadline=None)
@given(seeds, bits, st.booleans(), st.sampled_from([-2.0, 0.0, 2.0]))
def test_per_tensor_activations_equal_torch_forward_and_gradient(seed, bits, symmetric, shift):
    ours = (random(seed, 4, 16) + shift).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    form = Activations(bits, "tensor", symmetric)
    scale, zero_point = choose_scale(ours.flatten(), bits, symmetric=symmetric)
    y = fake_quantize_activations(ours, form)
    z = torch.fake_quantize_per_tensor_affine(
        theirs, scale.item(), zero_point.item(), *form.integers
    )
    assert torch.equal(y, z)
    upstream = random(seed + 1, 4, 16)
    y.backward(upstream)
    z.backward(upstream)
    assert torch.equal(ours.grad, theirs.grad)


def test_each_granularity_shares_its_scale_with_its_own_neighbours_only():
    x = random(3, 4, 32)
    changed = x.clone()
    changed[0, 0] = 50.0
    for granularity, touched in (("block", (0, 8)), ("token", (0, 32)), ("tensor", (None, None))):
        form = Activations(4, granularity)
        same = fake_quantize_activations(x, form, 8) == fake_quantize_activations(changed, form, 8)
        outside = same.clone()
        if granularity == "tensor":
            assert not same.all(-1).any()
        else:
            outside[0, slice(*touched)] = True
            assert outside.all()
            assert not same[0, slice(*touched)].all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_zero_stays_zero_and_a_row_of_two_values_is_met(form):
    x = torch.tensor([[0.0] * 8, [0.0, 2.5] * 4])
    qmin, qmax = form.integers
    step = 2.5 / (qmax - qmin) * (2 if form.symmetric else 1)
    y = fake_quantize_activations(x, form, 8)
    assert torch.equal(y[:, 0], torch.zeros(2))
    assert torch.equal(y[0], torch.zeros(8))
    # a grid that spans 0 to 2.5 ends there; a symmetric one ends half a step short on this side
    expected = 2.5 - step / 2 if form.symmetric else 2.5
    assert y[1, 1::2].tolist() == pytest.approx([expected] * 4, rel=1e-6)  # float32 resolution


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_zeros_alone_stay_zeros(form):
    y = fake_quantize_activations(torch.zeros(3, 8), form, 8)
    assert torch.equal(y, torch.zeros(3, 8))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 3, 8), (0, 0, 8)])
def test_nothing_comes_out_of_nothing(form, shape):
    x = torch.zeros(shape, requires_grad=True)
    y = fake_quantize_activations(x, form, 8)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_not_finite_shows_in_all_that_share_its_scale(form, bad):
    x = torch.ones(3, 16)
    x[1, 9] = bad
    y = fake_quantize_activations(x, form, 8)
    touched = torch.zeros(3, 16, dtype=torch.bool)
    rows, columns = {"tensor": (slice(None), slice(None)), "token": (1, slice(None)),
                     "block": (1, slice(8, None))}[form.granularity]  # fmt: skip
    touched[rows, columns] = True
    assert y[touched].isnan().all()
    assert y[~touched].isfinite().all()


def test_activation_gradient_goes_straight_through():
    x = random(4, 6, 32).requires_grad_()
    form = Activations(8, "token")
    upstream = random(5, 6, 32)
    fake_quantize_activations(x, form).backward(upstream)
    # the grid spans the row, so at most its two ends can fall outside, by a rounded zero point
    outside = x.grad == 0
    assert (outside.sum(-1) <= 1).all()
    assert torch.equal(x.grad[~outside], upstream[~outside])


def test_bfloat16_inputs_are_rounded_in_float32():
    x = random(6, 4, 32).bfloat16()
    form = Activations(8, "token")
    y = fake_quantize_activations(x, form)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, fake_quantize_activations(x.float(), form).bfloat16())


def test_layers_with_one_input_round_it_once_and_never_after_it_changed():
    form = Activations(8, "token")
    x = random(7, 4, 32)
    once = fake_quantize_inputs(x, form)
    assert fake_quantize_inputs(x, form) is once
    assert torch.equal(once, fake_quantize_activations(x, form))
    assert fake_quantize_activations(x, form) is not once  # that one may be written to
    assert fake_quantize_inputs(x, Activations(4, "token")) is not once
    assert fake_quantize_inputs(x.clone(), form) is not once
    fake_quantize_inputs(x, form)
    for change in (lambda: x.mul_(3), lambda: setattr(x, "data", random(8, 4, 32))):
        change()
        assert torch.equal(fake_quantize_inputs(x, form), fake_quantize_activations(x, form))
    with torch.inference_mode():  # writing leaves no trace there
        y = random(9, 4, 32)
        fake_quantize_inputs(y, form)
        y.mul_(3)
        assert torch.equal(fake_quantize_inputs(y, form), fake_quantize_activations(y, form))


def test_a_shared_rounding_holds_neither_its_input_nor_its_result():
    form, x = Activations(8, "token"), random(7, 4, 32).requires_grad_() * 1
    gone = [weakref.ref(x), weakref.ref(fake_quantize_inputs(x, form))]
    assert gone[1]() is not None
    del x
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_through_a_shared_rounding_are_those_of_separate_ones(form):
    weights = [random(seed, 32, 32) for seed in (1, 2, 3)]
    found = []
    for function in (fake_quantize_inputs, fake_quantize_activations):
        x = random(4, 5, 32).requires_grad_()
        with torch.no_grad():
            function(x, form, 8)  # without a graph, so no use afterwards
        for _ in range(2):  # a second backward pass over the same tensor
            y = [function(x, form, 8) @ weight for weight in weights]
            sum(part.square().sum() for part in y).backward()
        found.append(x.grad)
    assert torch.equal(*found)
    assert found[0].any()


@pytest.mark.parametrize("boundary", ["around both", "around the second"])
def test_a_shared_rounding_and_gradient_checkpointing(boundary):
    form, weight, found = Activations(8, "token"), random(1, 32, 32), []
    for checkpointed in (True, False):
        x = random(4, 5, 32).requires_grad_()

        def layer(x):
            return fake_quantize_inputs(x, form) @ weight.sin()

        def both(x):
            return layer(x) + layer(x).square()

        def run(function, x, checkpointed=checkpointed):
            return checkpoint(function, x, use_reentrant=False) if checkpointed else function(x)

        y = run(both, x) if boundary == "around both" else layer(x) + run(layer, x).square()
        fake_quantize_inputs(random(5, 5, 32), form)  # another takes the place
        y.sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_clips_nothing_takes_the_short_way_to_the_same_bits(form, monkeypatch):
    """Rows with ties at an end among them: -11.5 and 115.5 steps round to 128 of them apart."""
    x = random(3, 64, 32)
    ties = torch.linspace(-11.5, 115.5, 32).expand(2, 32)
    for inputs in (x, torch.cat([x, ties])):
        short = []
        for way in (activations._covers, lambda *_: False):
            monkeypatch.setattr(activations, "_covers", way)
            leaf = inputs.clone().requires_grad_()
            y = fake_quantize_activations(leaf, form, 8)
            y.backward(random(6, *inputs.shape))
            short += [y.detach(), leaf.grad]
            monkeypatch.undo()
        assert torch.equal(short[0], short[2])
        assert torch.equal(short[1], short[3])
