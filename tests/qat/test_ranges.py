"""How the range of the weights is chosen, each method against its paper's formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion import (
    QuantScheme,
    choose_scale,
    convert,
    dequantize,
    prepare_qat,
)
from companion.errors import SchemeError, WrongStage
from companion.numerics.affine import to_groups
from companion.qat.ranges import METHODS, Absmax, LearnedStepSize, make_quantizer

seeds = st.integers(0, 2**31)
bits = st.integers(2, 8)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(seeds, bits, st.sampled_from([16, 32, None]), st.sampled_from(list(METHODS)),
       st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))  # fmt: skip
def test_what_training_sees_is_what_is_stored(seed, bits, group_size, method, scale_dtype):
    weight = random(seed, 6, 64)
    quantizer = make_quantizer(QuantScheme(bits, group_size, scale_dtype), method, weight)
    integers, scale = quantizer.integers(weight)
    assert (integers.dtype, integers.shape) == (torch.int8, weight.shape)
    assert (scale.dtype, scale.shape) == (scale_dtype, (6, 64 // (group_size or 64)))
    stored = dequantize(to_groups(integers, group_size), scale[..., None]).view_as(weight)
    assert torch.equal(quantizer(weight), stored)


def test_the_scale_is_rounded_before_weights_are():
    weight = random(0, 8, 64)
    quantizer = make_quantizer(QuantScheme(4, 32))  # float16 scales
    groups = to_groups(weight, 32)
    exact, _ = choose_scale(groups, 4)
    scale = exact.half().float()
    assert not torch.equal(scale, exact)
    expected = torch.round(groups * (1 / scale)).clamp(-8, 7) * scale
    assert torch.equal(quantizer(weight), expected.view(8, 64))
    assert torch.equal(quantizer.integers(weight)[1], exact[..., 0].half())


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_gradients_differ_at_the_ends_of_the_grid_only(width):
    weight = random(1, 6, 64).requires_grad_()
    scheme = QuantScheme(width, 32, torch.float32)
    grads = {}
    for method in ("absmax", "absmax-torchao-gradient"):
        result = make_quantizer(scheme, method)(weight)
        (grads[method],) = torch.autograd.grad(result.sum(), weight)
    qmin, qmax = scheme.integers
    groups = to_groups(weight.detach(), 32)
    scale = groups.abs().amax(-1, keepdim=True) / ((qmax - qmin) / 2)
    place = torch.round(groups * (1 / scale)).view(6, 64)
    assert torch.equal(grads["absmax"], ((place >= qmin) & (place <= qmax)).float())
    assert torch.equal(grads["absmax-torchao-gradient"], ((place > qmin) & (place < qmax)).float())
    assert not torch.equal(grads["absmax"], grads["absmax-torchao-gradient"])


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(SchemeError, match=r"'slq' is unknown.*absmax, .*, lsq"):
        make_quantizer(QuantScheme(4), "slq")


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_learned_step_by_hand(scale):
    """Esser et al., equation 3, on one group: two values inside a 3-bit range, two outside."""
    quantizer = LearnedStepSize(QuantScheme(3, 4, torch.float32))
    quantizer.start_at(torch.tensor([[[scale]]]))
    ratios = torch.tensor([0.6, -2.3, 5.0, -9.0])  # w / s; the integers run from -4 to 3
    weight = (ratios * scale)[None].requires_grad_()
    upstream = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    result = quantizer(weight)
    assert torch.equal(result, torch.tensor([[1.0, -2.0, 3.0, -4.0]]) * scale)
    result.backward(upstream)
    # round(w/s) - w/s inside, the end of the range outside
    slopes = torch.tensor([1 - 0.6, -2 + 2.3, 3.0, -4.0])
    gradient_scale = 1 / (4 * 3) ** 0.5  # 1 / sqrt(n * Qp)
    by_hand = float((upstream[0] * slopes).sum()) * gradient_scale
    # what the optimizer sees is the scale over its first value
    assert quantizer.step.grad.item() == pytest.approx(by_hand * scale, rel=1e-5)
    assert torch.equal(weight.grad, upstream * torch.tensor([[1.0, 1.0, 0.0, 0.0]]))


def test_learned_step_gradient_is_the_slope_of_the_loss_where_values_are_clipped():
    """Outside the range the result is exactly proportional to the scale: finite differences."""
    weight = torch.tensor([[9.0, -9.0, 9.0, 7.0]])
    quantizer = LearnedStepSize(QuantScheme(2, 4, torch.float32))
    quantizer.start_at(torch.tensor([[[0.5]]]))
    before = quantizer(weight).sum()
    before.backward()
    quantizer.step.data.fill_(1.01)
    slope = (quantizer(weight).sum() - before).item() / 0.01
    assert quantizer.step.grad.item() == pytest.approx(slope / (4 * 1) ** 0.5, rel=1e-3)


def test_the_rounded_scale_is_what_learned_training_sees():
    weight = random(2, 4, 64)
    quantizer = make_quantizer(QuantScheme(4, 32), "lsq", weight)  # float16 scales
    quantizer.step.data.mul_(1.0003)
    integers, scale = quantizer.integers(weight)
    assert scale.dtype == torch.float16
    stored = dequantize(to_groups(integers, 32), scale[..., None]).view_as(weight)
    assert torch.equal(quantizer(weight), stored)


def test_a_negative_scale_turns_the_grid_around():
    scheme = QuantScheme(2, 4, torch.float32)
    weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])  # the integers -2 to 1 hold its mirror image
    quantizer = make_quantizer(scheme, "mse", weight)
    integers, scale = quantizer.integers(weight)
    assert scale.item() == pytest.approx(-1.0)
    assert integers.tolist() == [[1, 0, -1, -2]]
    assert torch.allclose(quantizer(weight), weight)


def test_clipped_range_follows_the_weights():
    weight = random(3, 4, 32)
    quantizer = make_quantizer(QuantScheme(3, 32, torch.float32), "mse", weight)
    assert torch.allclose(quantizer(2 * weight), 2 * quantizer(weight))


@pytest.mark.parametrize("method", ["mse", "lsq"])
def test_tied_embedding_shares_its_range(method):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(10, 32)
            self.head = torch.nn.Linear(32, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    qat = prepare_qat(Tied(), QuantScheme(2, 16), method, embeddings=True)
    assert qat.embed.quantizer is qat.head.quantizer
    if method == "lsq":
        qat.embed.quantizer.step.data[3:].mul_(1.2)
    ids = torch.tensor([[1, 7, 7, 3]])
    assert torch.equal(qat.embed(ids), qat.embed.quantizer(qat.embed.weight)[ids])
    assert torch.equal(convert(qat)(ids), qat.eval()(ids))


def test_a_method_of_ones_own():
    class Halved(Absmax):
        def scale(self, groups, rows=None):
            return super().scale(groups) / 2

    model = torch.nn.Sequential(torch.nn.Linear(32, 4))
    qat = prepare_qat(model, QuantScheme(4), Halved)
    assert "Halved" in str(qat.quantization)
    assert torch.equal(convert(qat)(torch.ones(1, 32)), qat(torch.ones(1, 32)))


EMPTIED = {
    "all zero": lambda w: w.zero_(),
    "next to zero": lambda w: w.mul_(1e-7),
    "a hundredth of what is usual": lambda w: w.mul_(0.01),
    "a row": lambda w: w[1].zero_(),
    "a group of each row": lambda w: w[:, :32].zero_(),
    "all but one weight of a group": lambda w: w[:, 1:32].zero_(),
    "all but one weight of a row": lambda w: w[:, 1:].zero_(),
}


def train_with_last_layer(empty, method, scheme, dtype=torch.float32, steps=60):
    """Train 64 random rows into four classes; return the last loss and the model."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)
    ).to(dtype)
    with torch.no_grad():
        empty(model[2].weight)
    if method != "float":
        model = prepare_qat(model, scheme, method)
    x, y = random(1, 64, 64).to(dtype), torch.arange(64) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
    return loss.item(), model, x


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (QuantScheme(2), torch.float32),
        (QuantScheme(8, None), torch.float32),
        (QuantScheme(4), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("empty", EMPTIED)
def test_a_layer_that_starts_from_nothing_trains_as_in_floating_point(empty, scheme, dtype):
    exact, *_ = train_with_last_layer(EMPTIED[empty], "float", scheme, dtype)
    for method in ("absmax", "mse", "lsq"):
        loss, qat, x = train_with_last_layer(EMPTIED[empty], method, scheme, dtype)
        assert loss < exact + 0.1  # stuck, it stays above 1
        assert torch.equal(convert(qat)(x), qat.eval()(x))


@pytest.mark.parametrize("method", ["absmax", "mse", "lsq"])
def test_an_embedding_that_starts_from_nothing_trains_too(method):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(8, 32, padding_idx=0), torch.nn.Linear(32, 8))
    with torch.no_grad():
        model[0].weight.zero_()
    qat, ids = prepare_qat(model, QuantScheme(2, 16), method, embeddings=True), torch.arange(1, 8)
    optimizer = torch.optim.AdamW(qat.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(qat(ids), ids)
        loss.backward()
        optimizer.step()
    assert loss < 0.2  # of 2.08 at the start
    assert torch.equal(qat[0](torch.tensor([0])), torch.zeros(1, 32))
    everything = torch.arange(8)
    assert torch.equal(convert(qat)(everything), qat.eval()(everything))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_zeros_round_to_zeros_and_no_scale_vanishes(method, scale_dtype):
    weight = random(4, 4, 64)
    weight[0], weight[1], weight[2, :32] = 0, weight[1] * 1e-9, 0
    quantizer = make_quantizer(QuantScheme(3, 32, scale_dtype), method, weight)
    for now in (weight, torch.zeros_like(weight), 1e-12 * weight):  # as it shrinks in training
        rounded, (integers, scale) = quantizer(now), quantizer.integers(now)
        assert (scale != 0).all()
        assert scale.isfinite().all()
        assert torch.equal(rounded[now == 0], torch.zeros_like(rounded[now == 0]))
        assert torch.equal(integers[now == 0], torch.zeros_like(integers[now == 0]))
        stored = dequantize(to_groups(integers, 32), scale[..., None]).view_as(integers)
        assert torch.equal(rounded, stored)


def test_a_scale_that_float16_cannot_hold_is_its_smallest_number():
    quantizer = LearnedStepSize(QuantScheme(4, 4, torch.float16))
    quantizer.start_at(torch.tensor([[[1.0]]]))
    quantizer.step.data.fill_(1e-9)
    assert torch.equal(quantizer(torch.zeros(1, 4)), torch.zeros(1, 4))
    assert quantizer.integers(torch.ones(1, 4))[1].item() == 2**-24


def test_only_groups_without_a_range_follow_their_weights():
    weight = random(5, 4, 64) * 0.1
    weight[1, :32] = 0
    quantizer = make_quantizer(QuantScheme(4, 32), "lsq", weight)
    assert quantizer.follows.nonzero().tolist() == [[1, 0]]
    before = quantizer.integers(weight)[1].clone()
    after = quantizer.integers(10 * weight + 1)[1]
    assert (before == after).sum() == 7  # a learned range stays where its step puts it
    absmax = choose_scale(to_groups(10 * weight + 1, 32), 4)[0][1, 0]
    assert after[1, 0] == (absmax * quantizer.first[1, 0]).half()
    assert make_quantizer(QuantScheme(4, 32), "lsq", random(5, 4, 64)).follows.sum() == 0


def test_following_groups_travel_with_the_state_and_older_states_have_none():
    weight = random(6, 4, 64)
    other = make_quantizer(QuantScheme(4, 32), "lsq", weight)
    weight[2] = 0
    quantizer = make_quantizer(QuantScheme(4, 32), "lsq", weight)
    state = quantizer.state_dict()
    other.load_state_dict(state)
    assert torch.equal(other(3 * weight + 1), quantizer(3 * weight + 1))
    del state["follows"]
    other.load_state_dict(state)
    assert not other.follows.any()


def test_scales_of_zeros_follow_too_after_gptq():
    quantizer = LearnedStepSize(QuantScheme(4, 4))
    quantizer.start_at(torch.tensor([[[0.5], [1.2e-7]]], dtype=torch.float16))
    assert quantizer.follows.tolist() == [[False, True]]


def test_ranges_of_another_shape_are_refused():
    for method in ("mse", "lsq"):
        quantizer = make_quantizer(QuantScheme(4, 32), method, random(0, 4, 64))
        with pytest.raises(WrongStage, match=r"5 rows with 2 groups does not fit .* 4 with 2"):
            quantizer(random(0, 5, 64))
        with pytest.raises(WrongStage, match="resize_token_embeddings"):
            quantizer.check_rows(5)
