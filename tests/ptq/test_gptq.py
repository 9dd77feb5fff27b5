"""GPTQ against exhaustive search, against rounding to nearest, and through conversion."""

import itertools

import pytest
import torch
from torch import nn

from companion import QuantScheme, convert, dequantize, fit, load_pretrained, load_task, prepare_qat
from companion.errors import EmptyLoader
from companion.evaluation.language import document_losses
from companion.numerics.affine import to_groups
from companion.ptq.gptq import gptq, round_with_compensation


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, columns: int) -> torch.Tensor:
    return random(1, rows, columns) @ random(2, columns, columns)


@pytest.mark.parametrize("size", [16, 64, None])
@pytest.mark.parametrize("columns", [64, 192])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_are_closer_than_after_rounding_to_nearest(bits, columns, size):
    scheme = QuantScheme(bits, size)
    weight, x = random(0, 32, columns), correlated(512, columns)
    integers, scale = round_with_compensation(weight, x.t() @ x / 512, scheme)
    groups = to_groups(integers, size)
    ours = dequantize(groups, scale[..., None]).view_as(weight)
    layer = nn.Linear(columns, 32, bias=False)
    layer.weight.data = weight
    nearest = prepare_qat(nn.Sequential(layer), scheme, "mse")[0]
    nearest = nearest.quantizer(nearest.weight)
    error = [((w - weight) @ x.t()).square().sum() for w in (ours, nearest)]
    assert error[0] < 0.8 * error[1]


def test_close_to_the_best_of_all_roundings():
    """Two columns at 3 bits: every pair of integers is tried at the scale that was chosen."""
    x = correlated(256, 2)
    hessian = x.t() @ x / 256
    for seed in range(20):
        weight = random(seed, 1, 2)
        integers, scale = round_with_compensation(weight, hessian, QuantScheme(3, 2), damping=1e-6)

        def error(q, weight=weight, scale=scale):
            d = torch.tensor([q]) * scale.float() - weight
            return float(d @ hessian @ d.t())

        best = min(error(q) for q in itertools.product(range(-4, 4), repeat=2))
        assert error(integers[0].tolist()) <= 4 * best + 1e-6


def test_without_correlation_it_rounds_to_nearest():
    weight, scheme = random(3, 8, 64), QuantScheme(4, 32)
    integers, scale = round_with_compensation(weight, torch.eye(64), scheme)
    layer = nn.Linear(64, 8, bias=False)
    layer.weight.data = weight
    nearest = prepare_qat(nn.Sequential(layer), scheme, "mse")[0].quantizer.integers(weight)
    assert torch.equal(integers, nearest[0])
    assert torch.equal(scale, nearest[1])


def test_result_converts_exactly_and_trains_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    x, y = random(5, 64, 64), torch.arange(64) % 4
    before = {k: v.clone() for k, v in model.state_dict().items()}
    qat = gptq(model, QuantScheme(2), [(x, y)], progress=False)
    assert qat.training == model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(convert(qat)(x), qat.eval()(x))
    weight = qat[0].weight
    assert torch.allclose(qat[0].quantizer(weight), weight, rtol=1e-5)  # they lie on the grid
    history = fit(qat, [(x, y)], steps=40, lr=3e-3, progress=False)
    assert history.loss[-1] < 0.7 * history.loss[0]
    assert torch.equal(convert(qat)(x), qat.eval()(x))


def test_later_blocks_see_the_rounding_of_earlier_ones():
    """The second layer makes up for a first layer whose rounding shifts its inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))
    x = random(6, 256, 32)
    scheme = QuantScheme(2, 16)
    qat = gptq(model, scheme, [(x, None)], progress=False)
    hessian = model[0](x).t() @ model[0](x) / 256  # of the float model: not what it saw
    alone, _ = round_with_compensation(model[1].weight, hessian, scheme)
    assert not torch.equal(qat[1].quantizer.integers(qat[1].weight)[0], alone)


def test_empty_loader_and_activations():
    model = nn.Sequential(nn.Linear(32, 8))
    with pytest.raises(EmptyLoader, match="no batch to calibrate on"):
        gptq(model, QuantScheme(4), [])
    from companion import W4A8

    x = random(7, 16, 32)
    qat = gptq(model, W4A8, [(x, None)], progress=False)
    assert torch.equal(convert(qat)(x), qat.eval()(x))


@pytest.mark.parametrize("bits", [3, 2])
def test_beats_rounding_to_nearest_on_docs_lm(bits):
    task = load_task("language-reference")
    model, scheme = load_pretrained("docs-lm"), QuantScheme(bits)
    batch = next(iter(task.validation))
    batches = [batch for batch, _ in zip(task.train, range(6), strict=False)]
    loss = {
        "float": document_losses(model, [batch]).mean,
        "nearest": document_losses(prepare_qat(model, scheme, "absmax"), [batch]).mean,
        "mse": document_losses(prepare_qat(model, scheme, "mse"), [batch]).mean,
        "gptq": document_losses(gptq(model, scheme, batches, progress=False), [batch]).mean,
    }
    assert loss["float"] < loss["gptq"] < loss["mse"] < loss["nearest"]
    assert loss["gptq"] - loss["float"] < 0.6 * (loss["nearest"] - loss["float"])
