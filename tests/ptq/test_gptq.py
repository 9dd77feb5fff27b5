"""GPTQ against exhaustive search, against rounding to nearest, and through conversion."""

import itertools

import pytest
import torch
from torch import nn

from companion import QuantScheme, convert, dequantize, fit, load_pretrained, load_task, prepare_qat
from companion.errors import EmptyLoader, NothingToQuantize, SchemeError, UnsupportedModel
from companion.evaluation.language import document_losses
from companion.numerics.affine import quantize, to_groups
from companion.ptq.gptq import gptq, round_with_compensation


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, columns: int) -> torch.Tensor:
    return random(1, rows, columns) @ random(2, columns, columns)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("size", [16, 64, None])
@pytest.mark.parametrize("columns", [64, 192])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_are_closer_than_after_rounding_to_nearest(bits, columns, size, act_order):
    scheme = QuantScheme(bits, size)
    weight, x = random(0, 32, columns), correlated(512, columns)
    integers, scale = round_with_compensation(weight, x.t() @ x / 512, scheme, act_order=act_order)
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


def test_loud_columns_first_is_better_where_some_are_loud():
    scheme, better = QuantScheme(2, None), 0
    for seed in range(8):
        weight, x = random(seed, 32, 64), correlated(512, 64)
        x[:, -8:] *= 30  # rounded last, they would find no column that makes up for them
        error = []
        for act_order in (False, True):
            integers, scale = round_with_compensation(
                weight, x.t() @ x / 512, scheme, act_order=act_order
            )
            error.append(float(((integers * scale.float() - weight) @ x.t()).square().sum()))
        better += error[1] < 0.9 * error[0]
    assert better == 8


@pytest.mark.parametrize("act_order", [False, True])
def test_without_correlation_it_rounds_to_nearest(act_order):
    weight, scheme = random(3, 8, 64), QuantScheme(4, 32)
    integers, scale = round_with_compensation(weight, torch.eye(64), scheme, act_order=act_order)
    layer = nn.Linear(64, 8, bias=False)
    layer.weight.data = weight
    nearest = prepare_qat(nn.Sequential(layer), scheme, "mse")[0].quantizer.integers(weight)
    assert torch.equal(integers, nearest[0])
    assert torch.equal(scale, nearest[1])
    # inputs of several sizes: to nearest, too, with scales for the columns that count
    sizes = random(4, 64).abs() + 0.1
    integers, scale = round_with_compensation(
        weight, torch.diag(sizes), scheme, act_order=act_order
    )
    groups = weight.view(8, 2, 32)
    assert torch.equal(integers.view(8, 2, 32), quantize(groups, scale[..., None], bits=4))

    def error(integers, scale):
        off = (integers.view_as(groups) * scale[..., None].float() - groups).square()
        return (off * sizes.view(2, 32)).sum(-1)

    assert (error(integers, scale) <= error(*nearest)).all()
    assert error(integers, scale).sum() < 0.95 * error(*nearest).sum()


def test_layers_that_read_one_tensor_share_their_hessian_unless_it_changes_between():
    class Block(nn.Module):
        def __init__(self, changes: bool) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
            self.changes = changes

        def forward(self, x):
            x = x.clone()
            first = self.first(x)
            if self.changes:
                x[:, ::2] *= 10
            return first + self.second(x)

    x, scheme = correlated(256, 32), QuantScheme(2, 32)
    products = []
    for changes, mode in itertools.product((False, True), (torch.no_grad, torch.inference_mode)):
        torch.manual_seed(0)
        block = Block(changes)
        block.second.weight.data.copy_(block.first.weight)
        with mode():
            rounded = gptq(nn.Sequential(block), scheme, [(x, None)], progress=False)[0]
        same = torch.equal(rounded.first.weight, rounded.second.weight)
        assert same is not changes
        products.append(rounded.first.weight)
    assert all(torch.equal(products[0], weight) for weight in products)


@pytest.mark.parametrize("act_order", [False, True])
def test_columns_that_meet_nothing_do_not_choose_the_scale(act_order):
    weight, x = random(0, 32, 128), 0.01 * correlated(512, 128)
    x[:, ::4] = 0
    hessian = x.t() @ x / 512
    error = []
    for w in (weight, torch.where((x != 0).any(0), weight, 0.0)):  # what they hold cannot matter
        integers, scale = round_with_compensation(
            w, hessian, QuantScheme(3, 32), act_order=act_order
        )
        values = (integers.view(32, 4, 32) * scale[..., None].float()).view(32, 128)
        error.append(float(((values - weight) @ x.t()).square().mean()))
    assert error[0] < 1.2 * error[1]


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


def layers(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


THREE = QuantScheme(3, 16)


def error(rounded: nn.Module, model: nn.Module, x: torch.Tensor) -> float:
    return float((rounded(x) - model(x)).float().square().mean())


def test_layers_without_input_are_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(32, 4), nn.Linear(32, 4)

        def forward(self, x):
            return self.used(x) + self.idle(x[:0]).sum()

    x = random(8, 64, 32)
    with pytest.raises(NothingToQuantize, match=r"idle received no input.*skip=\['idle'\]"):
        gptq(Experts(), THREE, [(x, None)], progress=False)
    qat = gptq(Experts(), THREE, [(x, None)], skip=["idle"], progress=False)
    assert torch.equal(convert(qat)(x), qat(x))


def test_dead_columns_and_zero_weights():
    model, x = layers(32, 32, 8), random(9, 64, 32)
    x[:, 3] = 0
    x[:, 16:] = 0
    model[0].weight.data[:4] = 0
    model[1].weight.data.zero_()
    qat = gptq(model, THREE, [(x, None)], progress=False)
    assert all(p.isfinite().all() for p in qat.parameters())
    assert torch.equal(qat[0].weight[:4], torch.zeros(4, 32))
    assert torch.equal(convert(qat)(x), qat(x))
    nearest = prepare_qat(model, THREE, "mse")
    assert error(qat[0], model[0], x) < error(nearest[0], model[0], x)
    silent = gptq(model, THREE, [(torch.zeros(4, 32), None)], progress=False)
    assert torch.equal(convert(silent)(x), silent(x))


@pytest.mark.parametrize("share", ["module", "weight"])
def test_shared_layers_are_rounded_once_for_all_their_inputs(share):
    model, x = layers(32, 32, 32), random(10, 256, 32)
    if share == "module":
        model[1] = model[0]
    else:
        model[1].weight = model[0].weight
    qat = gptq(model, THREE, [(x, None)], progress=False)
    assert qat[0].weight is qat[1].weight
    assert torch.equal(convert(qat)(x), qat(x))
    assert error(qat, model, x) < error(prepare_qat(model, THREE, "mse"), model, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x = layers(32, 32, 8).to(dtype), random(11, 128, 32).to(dtype)
    qat = gptq(model, THREE, [(x, None)], progress=False)
    assert qat[0].weight.dtype == dtype
    assert torch.equal(convert(qat)(x), qat(x))
    assert error(qat, model, x) < error(prepare_qat(model, THREE, "mse"), model, x)


@pytest.mark.parametrize(
    "x", [random(12, 8, 32) * torch.nan, random(12, 8, 32) / 0, random(12, 8, 32) * 1e30]
)
def test_inputs_that_are_not_finite_are_refused_by_name(x):
    with pytest.raises(UnsupportedModel, match=r"^0 meets inputs that are not finite"):
        gptq(layers(32, 8), THREE, [(x, None)], progress=False)


def test_damping_that_cannot_steady_is_refused():
    x = random(13, 4, 32)  # four examples for 32 columns
    for damping in (0, -1.0):
        with pytest.raises(SchemeError, match="must be above 0"):
            gptq(layers(32, 8), THREE, [(x, None)], damping=damping, progress=False)
    with pytest.raises(UnsupportedModel, match="too much alike for damping=1e-25"):
        gptq(layers(32, 8), THREE, [(x, None)], damping=1e-25, progress=False)


def test_hooks_and_keyword_inputs_are_seen_as_the_layer_sees_them():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layers(32, 8)[0]

        def forward(self, x):
            return self.layer(**{"x" if hasattr(self.layer, "quantizer") else "input": x})

    x, scaled = random(14, 64, 32), torch.linspace(0.1, 5, 32)
    by_name, hooked = ByName(), layers(32, 8)
    hooked[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] * scaled,))
    expected = gptq(layers(32, 8), THREE, [(x, None)], progress=False)[0].weight
    assert torch.equal(gptq(by_name, THREE, [(x, None)], progress=False).layer.weight, expected)
    expected = gptq(layers(32, 8), THREE, [(x * scaled, None)], progress=False)[0].weight
    rounded = gptq(hooked, THREE, [(x, None)], progress=False)
    assert torch.equal(rounded[0].weight, expected)
    assert len(rounded[0]._forward_pre_hooks) == 1  # ours are gone


def test_plain_tensors_are_batches_too():
    model, x = layers(32, 8), random(15, 64, 32)
    plain, pairs = (gptq(model, THREE, [b], progress=False) for b in (x, (x, None)))
    assert torch.equal(plain[0].weight, pairs[0].weight)


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


class Chain(nn.Module):
    """Blocks in a row; how they are run, and what each may see, is set by name."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(5))
        self.runs = 0
        for layer in self.layers:
            layer[1].register_forward_hook(self._count)

    def _count(self, *_):
        self.runs += 1

    def forward(self, x):
        layers = list(self.layers)[:: -1 if self.way == "backwards" else 1]
        first = None
        for number, layer in enumerate(layers):
            before = x
            x = layer(x)
            first = x if number == 0 else first
            if self.way == "twice":
                x = layer(x)
            if self.way == "past a block":
                x = x + before  # the next block needs more than this one gave back
            if self.way == "from the first":
                x = x + first
        return x


@pytest.mark.parametrize(
    ("way", "short"),
    [
        ("in turn", True),
        ("backwards", False),
        ("twice", False),
        ("past a block", False),
        ("from the first", False),
    ],
)
def test_short_passes_give_what_full_ones_give(way, short, monkeypatch):
    torch.manual_seed(0)
    model, data = Chain(way), [(random(i, 16, 32), None) for i in range(8)]
    found = gptq(model, THREE, data, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("companion.ptq.gptq._Passes.check", never_in_turn)
        full = gptq(model, THREE, data, progress=False)
    for name, layer in found.named_modules():
        if name in found.quantization.layers:
            other = full.get_submodule(name)
            assert torch.equal(layer.weight, other.weight), name
            assert torch.equal(layer.quantizer.first, other.quantizer.first), name
    assert (found.runs < 0.6 * full.runs) == short, (found.runs, full.runs)


def never_in_turn(passes, place):
    passes.in_turn = False


def test_short_passes_on_docs_lm(monkeypatch):
    model, task = load_pretrained("docs-lm"), load_task("language-reference")
    data = [batch for batch, _ in zip(task.train, range(3), strict=False)]
    found = gptq(model, THREE, data, progress=False)
    tokens = data[0]["input_ids"][:1, :8]
    states = found(tokens, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1  # nothing of the passes is left
    monkeypatch.setattr("companion.ptq.gptq._Passes.check", never_in_turn)
    full = gptq(model, THREE, data, progress=False)
    assert all(
        torch.equal(a, b) for a, b in zip(found.parameters(), full.parameters(), strict=True)
    )
