"""Weights rounded in one pass, bit for bit against the same written out plainly."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from companion import QuantScheme, prepare_qat
from companion.numerics import affine, rounding
from companion.numerics.affine import as_stored
from companion.numerics.rounding import (
    Grid,
    HeldWeights,
    can_be_fused,
    hold_weights,
    round_weight,
    rounded_linear,
)
from companion.qat import ranges

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SHAPES = [(48, 96), (300, 1536)]  # one part of the cache, and two


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Plain(torch.autograd.Function):
    """The plain reference: whole tensors, one operation after the other, everything kept."""

    @staticmethod
    def forward(ctx, weight, scale, grid):
        stored = as_stored(scale, grid.scale_dtype).float()
        position = weight.float() * (1.0 / stored)
        rounded = position.round()
        clipped = rounded.clamp(grid.qmin, grid.qmax)
        inside = rounded == clipped
        slope = torch.where(inside, clipped - position, clipped)
        if not grid.ends:
            inside = (rounded > grid.qmin) & (rounded < grid.qmax)
        ctx.save_for_backward(inside, slope)
        ctx.share = (weight.shape[-1] * grid.qmax) ** -0.5
        return clipped.mul_(stored).add_(0.0).to(weight.dtype)

    @staticmethod
    def backward(ctx, grad):
        inside, slope = ctx.saved_tensors
        return grad * inside, (grad * slope).sum(-1, keepdim=True) * ctx.share, None


def plain_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, grid: Grid) -> Tensor:
    groups = weight.unflatten(-1, (scale.shape[-2], -1))
    return F.linear(x, Plain.apply(groups, scale, grid).view_as(weight), bias)


def material(shape: tuple[int, int], size: int, dtype: torch.dtype, bits: int) -> list[Tensor]:
    """Inputs, weights with zero groups, outliers and ties, scales of both signs, and a bias."""
    rows, columns = shape
    weight = random(0, *shape)
    scale = (0.4 + 0.2 * random(1, rows, columns // size, 1).sigmoid()) * 8 / 2**bits
    scale[1::2] *= -1
    weight[0], weight[3, :32], weight[5, 7] = 0, 0, 50
    scale[7:11] = 0.5  # a power of two: ties are exact, those at both ends of the grid too
    ends = torch.tensor([-(2 ** (bits - 1)) - 0.5, 2 ** (bits - 1) - 0.5])
    weight[7:9, :2], weight[9:11] = ends * 0.5, (random(2, 2, columns) * 8).round() / 4
    scale[12] = 0  # vanished: the smallest number of its type stands in
    return [t.to(dtype) for t in (random(3, 2, 7, columns), weight)] + [
        scale,
        random(4, rows).to(dtype),
    ]


GRIDS = [
    Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, scale_dtype, ends)
    for bits, scale_dtype, ends in itertools.product(
        (2, 3, 4, 8), (torch.float16, torch.float32), (True, False)
    )
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [32, None], ids=["groups", "rows"])
def test_value_and_every_gradient_are_those_of_the_plain_reference(
    grid, dtype, shape, size, monkeypatch
):
    monkeypatch.setattr(affine, "_PART", 2**18)
    bits = grid.qmax.bit_length() + 1
    inputs = material(shape, size or shape[1], dtype, bits)
    upstream = random(5, 2, 7, shape[0]).to(dtype)
    learned = range(1 if not grid.ends else 2)  # that gradient at the ends never learns a step
    for learns in learned:
        results = []
        for linear in (rounded_linear, plain_linear):
            leaves = [t.clone().requires_grad_() for t in inputs]
            leaves[2].requires_grad_(bool(learns))
            y = linear(*leaves, grid)
            y.backward(upstream)
            results.append([y, *(t.grad for t in leaves if t.requires_grad)])
        assert len(results[0]) == 4 + learns
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)
        weight_grad = results[0][2]
        assert (weight_grad == 0).any()
        assert (weight_grad != 0).any()


@pytest.mark.parametrize("grid", GRIDS[::3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_alone_is_that_of_the_plain_reference(grid, dtype):
    _, weight, scale, _ = material((48, 96), 32, dtype, grid.qmax.bit_length() + 1)
    results = []
    for function in (round_weight, Plain.apply):
        leaves = [weight.view(48, 3, 32).clone().requires_grad_(), scale.clone().requires_grad_()]
        y = function(*leaves, grid)
        y.backward(random(6, 48, 3, 32).to(dtype))
        results.append([y, leaves[0].grad] + [leaves[1].grad] * grid.ends)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert not (results[0][0].signbit() & (results[0][0] == 0)).any()


@pytest.mark.parametrize("wanted", itertools.product([True, False], repeat=4), ids=str)
def test_only_what_is_asked_for_gets_a_gradient(wanted):
    grid, inputs = GRIDS[6], material((48, 96), 32, torch.float32, 3)
    grads = []
    for linear in (rounded_linear, plain_linear):
        leaves = [t.clone().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
        y = linear(*leaves, grid)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.square().sum().backward()
        grads.append([t.grad for t in leaves])
    for ours, theirs, asked in zip(*grads, wanted, strict=True):
        assert (ours is not None) == asked
        assert ours is theirs is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(96,), (0, 96), (1, 96), (2, 3, 4, 96)], ids=str)
def test_inputs_of_any_shape(shape):
    grid, (_, *rest) = GRIDS[6], material((48, 96), 32, torch.float32, 3)
    results = []
    for linear in (rounded_linear, plain_linear):
        leaves = [t.clone().requires_grad_() for t in (random(8, *shape), *rest)]
        y = linear(*leaves, grid)
        y.sum().backward()  # an expanded gradient
        results.append([y, *(t.grad for t in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_gradient_of_gradients():
    grid, inputs = GRIDS[6], material((48, 96), 32, torch.float64, 3)
    found = []
    for linear in (rounded_linear, plain_linear):
        leaves = [t.clone().requires_grad_() for t in inputs]
        first = torch.autograd.grad(linear(*leaves, grid).pow(3).sum(), leaves, create_graph=True)
        sum(t.double().square().sum() for t in first).backward()
        found.append([t.grad for t in leaves])
    for ours, theirs in zip(*found, strict=True):
        # a sum of products in another order: the resolution of its scale's float32
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_layers_of_different_sizes_share_the_memory_they_round_in_and_disturb_nobody():
    """Forward through all, then back through all, as in a model; and in evaluation between."""
    grid = GRIDS[4]
    layers = [
        material(shape, 32, torch.float32, 3)[1:] for shape in ((96, 96), (320, 96), (64, 320))
    ]
    results = []
    for linear in (rounded_linear, plain_linear):
        x, leaves = random(9, 5, 96), []
        for weight, scale, bias in layers:
            leaves += [weight.clone().requires_grad_(), scale.clone().requires_grad_()]
            x = linear(x, *leaves[-2:], bias, grid).tanh()
        with torch.inference_mode():
            linear(random(10, 5, 96), *layers[1][:2], None, grid)
        x.sum().backward()
        results.append([x, *(t.grad for t in leaves)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_memory_first_asked_for_in_inference_mode_can_be_written_to_afterwards():
    def first_inference_then_training() -> Tensor:
        x, weight, scale, bias = material((48, 96), 32, torch.float32, 4)
        with torch.inference_mode():
            rounded_linear(x, weight, scale, bias, GRIDS[8])
        return rounded_linear(x, weight.requires_grad_(), scale, bias, GRIDS[8])

    with ThreadPoolExecutor(1) as fresh:  # each thread has memory of its own
        result = fresh.submit(first_inference_then_training).result()
    assert torch.equal(result, first_inference_then_training())


def test_nothing_of_the_size_of_a_weight_is_kept_for_the_backward_pass():
    x, weight, scale, _ = material((300, 1536), 32, torch.float32, 4)
    kept = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    weight.requires_grad_()
    scale.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        rounded_linear(x, weight, scale, None, GRIDS[8])
    known = {t.untyped_storage().data_ptr() for t in (x, weight)}
    others = [t for t in kept if t.untyped_storage().data_ptr() not in known]
    assert sum(t.numel() for t in others) <= 2 * scale.numel()
    assert len(kept) >= 3  # the hook saw them


def test_the_gradient_becomes_the_parameters_without_a_copy():
    x, weight, scale, _ = material((48, 96), 32, torch.float32, 4)
    weight.requires_grad_()
    seen = []
    weight.register_hook(lambda grad: seen.append(grad.data_ptr()))
    rounded_linear(x, weight, scale, None, GRIDS[8]).sum().backward()
    assert weight.grad.data_ptr() == seen[0]


def test_where_somebody_else_decides_the_operations_stand_by_themselves():
    x, weight = random(0, 2, 32), random(1, 8, 32)
    assert can_be_fused(x, weight)
    assert not can_be_fused(x.bfloat16(), weight)
    assert not can_be_fused(x, weight.as_subclass(type("Other", (Tensor,), {})))
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_be_fused(x, weight)


@pytest.fixture
def roundings(monkeypatch) -> list:
    """The weights that a forward pass rounds, as it comes to them."""
    seen, really = [], rounding._forward
    monkeypatch.setattr(rounding, "_forward", lambda *a: (seen.append(a[0].shape), really(*a))[1])
    return seen


def two_layers(method: str) -> nn.Module:
    torch.manual_seed(0)
    float_model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    return prepare_qat(float_model, QuantScheme(3), method)


@pytest.mark.parametrize("method", ["absmax", "mse", "lsq"])
def test_held_weights_are_rounded_once_and_nothing_else_changes(method, roundings):
    results, counts = [], []
    for held in (False, True):
        model = two_layers(method)
        with hold_weights() if held else nullcontext():
            with torch.no_grad():  # as a checkpointed block begins
                y = model(random(3, 4, 64))
            for seed in range(3):
                model(random(seed, 4, 64)).square().mean().backward()
        results.append([y, *(p.grad for p in model.parameters())])
        counts.append(len(roundings))
        roundings.clear()
    assert counts == [8, 2]  # the way back rounds in its own pass
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("method", ["absmax", "lsq"])
def test_a_changed_weight_is_not_taken_for_the_held_one(method):
    x = random(0, 4, 64)
    model = two_layers(method)
    with hold_weights():
        before = model(x)
        with torch.no_grad():
            model[0].weight.mul_(-1)
        changed = model(x)
    assert torch.equal(changed, model(x))
    assert not torch.equal(changed, before)


def test_a_learned_step_that_moves_is_noticed():
    x = random(0, 4, 64)
    model = two_layers("lsq")
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    with hold_weights():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("step" in name)
        before = model(x)
        before.square().mean().backward()
        optimizer.step()
        after = model(x)
    assert torch.equal(after, model(x))
    assert not torch.equal(after, before)


def test_a_weight_that_is_computed_each_time_is_never_held():
    """A transposed one, as GPT-2's: memory that is used again looks like the tensor before."""
    torch.manual_seed(0)
    model, x = nn.Sequential(transformers.pytorch_utils.Conv1D(8, 64)), random(0, 4, 64)
    model = prepare_qat(model, QuantScheme(3), "absmax")
    held = HeldWeights()
    for _ in range(20):
        with hold_weights(held), torch.no_grad():
            found = model(x)
        assert torch.equal(found, model(x))
        with torch.no_grad():
            model[0].weight.mul_(-1)


def test_what_is_held_ends_with_its_block(roundings):
    model, x, held = two_layers("absmax"), random(0, 4, 64), HeldWeights()
    for _ in range(2):
        with hold_weights(held):
            model(x)
    assert len(roundings) == 2
    with pytest.raises(ZeroDivisionError), hold_weights():
        raise ZeroDivisionError
    model(x)
    assert len(roundings) == 4


def test_what_has_no_room_keeps_its_scale_alone(roundings, monkeypatch):
    monkeypatch.setattr(HeldWeights, "room", 4 * 64 * 32)  # the first layer fills it
    model, x = two_layers("absmax"), random(0, 4, 64)
    scales, really = [], ranges.symmetric_scale
    monkeypatch.setattr(ranges, "symmetric_scale", lambda *a: (scales.append(1), really(*a))[1])
    with hold_weights():
        found = [model(x) for _ in range(3)]
    assert (len(roundings), len(scales)) == (1 + 3, 2)
    assert all(torch.equal(y, model(x)) for y in found)
