"""The classic road: what is trained is what is converted, and wrong turns are refused."""

import copy
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.ao.nn.quantized as nnq
from torch import nn
from torch.ao.quantization import FakeQuantizeBase, QuantStub, quantize_dynamic
from torchvision.models import resnet18

from companion import (
    W8A8,
    QuantWrapper,
    accuracy,
    convert,
    fit,
    load_pretrained,
    load_task,
    prepare_qat,
)
from companion.errors import (
    EmptyLoader,
    NothingToQuantize,
    NothingToTrain,
    UnsupportedBackend,
    UnsupportedModel,
    WrongStage,
)
from companion.evaluation.estimates import predict

WIDTHS = [8, 4, 3, 2]
SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9)


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 5),
    )  # fmt: skip


@pytest.fixture(scope="module")
def task():
    return load_task("digits-5-9", batch_size=25)


def trained(task, bits: int, steps: int = 25) -> QuantWrapper:
    qat = QuantWrapper(small_net()).prepare_qat(bits)
    fit(qat, task.train, steps=steps, optimizer=SGD, at={steps * 4 // 5: qat.freeze})
    return qat


def fake_quantizers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, FakeQuantizeBase)]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: module.weight()
        for name, module in model.named_modules()
        if isinstance(module, (nnq.Conv2d, nnq.Linear))
    }


def test_bare_wrapper_is_the_identity_around_the_model(task):
    net = small_net()
    x, _ = next(iter(task.test))
    wrapped = QuantWrapper(net)
    assert torch.equal(wrapped(x), net(x))
    assert not fake_quantizers(wrapped)
    assert wrapped.model is net
    assert isinstance(wrapped.quant, QuantStub)
    assert wrapped.stage == "float"


def test_prepare_leaves_the_given_model_alone(task):
    net = small_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    qat = QuantWrapper(net).prepare_qat()
    fit(qat, task.train, steps=2, optimizer=SGD)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert not fake_quantizers(net)


@pytest.mark.parametrize("bits", WIDTHS)
def test_trained_scale_is_the_converted_scale(task, bits):
    qat = trained(task, bits)
    int8 = qat.convert()
    qat.eval()(next(iter(task.test))[0])
    for name, weight in weights(int8).items():
        fake = qat.get_submodule(name).weight_fake_quant
        assert torch.equal(fake.scale, weight.q_per_channel_scales().float())
        integers = weight.int_repr()
        assert integers.min() >= -(2 ** (bits - 1))
        assert integers.max() <= 2 ** (bits - 1) - 1
        assert len(integers.unique()) > 2


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("frozen", [True, False])
def test_converted_weights_are_the_fake_quantized_ones(task, bits, frozen):
    qat = QuantWrapper(small_net()).prepare_qat(bits)
    fit(qat, task.train, steps=8, optimizer=SGD, at={6: qat.freeze} if frozen else None)
    int8 = qat.convert()
    qat.eval()
    for name, weight in weights(int8).items():
        layer = qat.get_submodule(name)
        value = layer.weight
        if hasattr(layer, "bn"):
            fold = layer.bn.weight / torch.sqrt(layer.bn.running_var + layer.bn.eps)
            value = value * fold.reshape(-1, 1, 1, 1)
        shown = layer.weight_fake_quant(value)
        assert torch.allclose(weight.dequantize(), shown, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", WIDTHS)
def test_fake_quantized_and_converted_predictions_agree(task, bits):
    qat = trained(task, bits)
    fake, _ = predict(qat, task.test)
    real, _ = predict(qat.convert(), task.test)
    assert np.mean(fake == real) >= 0.99


def test_narrow_weights_are_really_narrow(task):
    x, _ = next(iter(task.train))
    outputs = {}
    for bits in WIDTHS:
        qat = QuantWrapper(small_net()).prepare_qat(bits).calibrate([x])
        outputs[bits] = qat(x)
        layer = qat.model[0]
        fold = layer.bn.weight / torch.sqrt(layer.bn.running_var + layer.bn.eps)
        shown = layer.weight_fake_quant(layer.weight * fold.reshape(-1, 1, 1, 1))
        assert max(len(channel.unique()) for channel in shown) <= 2**bits
    exact = small_net().eval()(x)
    error = [(outputs[bits] - exact).norm() for bits in WIDTHS]
    assert error == sorted(error)
    assert 0 < error[0] < 0.1 * exact.norm()
    assert error[-1] > 3 * error[0]


def test_gradient_passes_straight_through_to_the_weights(task):
    x, y = next(iter(task.train))
    qat = QuantWrapper(small_net()).prepare_qat(2)
    layer = qat.model[7]
    seen = {}

    def keep(module, inputs, output):
        output.retain_grad()
        seen["o"] = output

    layer.weight_fake_quant.register_forward_hook(keep)
    nn.functional.cross_entropy(qat(x), y).backward()
    scale = layer.weight_fake_quant.scale[:, None]
    rounded = torch.round(layer.weight.detach() * (1 / scale))
    inside = (rounded >= -2) & (rounded <= 1)
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(layer.weight.grad, seen["o"].grad * inside)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in qat.parameters())


def test_qat_learns(task):
    history = fit(
        qat := QuantWrapper(small_net()).prepare_qat(4), task.train, steps=60, optimizer=SGD
    )
    assert np.mean(history.loss[-5:]) < 0.5 * history.loss[0]
    assert accuracy(qat.convert(), task.test).low > 0.6


def test_evaluation_does_not_change_a_prepared_model(task):
    qat = QuantWrapper(small_net()).prepare_qat()
    fit(qat, task.train, steps=3, optimizer=SGD)
    qat.eval()
    qat(next(iter(task.test))[0])
    before = {k: v.clone() for k, v in qat.state_dict().items()}
    qat(100 * torch.ones(1, 3, 32, 32))
    assert all(torch.equal(v, qat.state_dict()[k]) for k, v in before.items())


def test_freeze_fixes_ranges_and_batch_norm_but_not_weights(task):
    qat = QuantWrapper(small_net()).prepare_qat()
    fit(qat, task.train, steps=3, optimizer=SGD)
    qat.freeze()
    before = {k: v.clone() for k, v in qat.state_dict().items()}
    fit(qat, task.train, steps=3, optimizer=SGD)
    for key, value in qat.state_dict().items():
        fixed = any(
            word in key for word in ("fake_quant", "post_process", "running", "num_batches")
        )
        assert torch.equal(value, before[key]) is fixed, key


def test_freeze_reaches_batch_norm_that_was_not_fused(task):
    class Unfusable(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv, self.fc = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(self.conv(self.bn(x)).mean((2, 3)))

    qat = QuantWrapper(Unfusable()).prepare_qat()
    fit(qat, task.train, steps=1)
    qat.freeze()
    before = qat.model.bn.running_mean.clone()
    fit(qat, task.train, steps=2)
    assert torch.equal(qat.model.bn.running_mean, before)


def test_resnet18_carries_its_own_stubs_and_still_converts(task):
    model = load_pretrained(weights="digits", classes=5)
    assert isinstance(model.quant, QuantStub)
    qat = QuantWrapper(model).prepare_qat().calibrate(task.train, batches=2)
    assert [n for n, m in qat.named_modules() if isinstance(m, QuantStub)] == ["quant"]
    int8 = qat.convert()
    assert int8(next(iter(task.test))[0]).shape == (100, 5)
    fused = [m for m in int8.modules() if type(m).__name__ == "ConvReLU2d"]
    assert len(fused) == 9  # conv1 and the first convolution of eight blocks
    assert not [m for m in int8.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]


def test_sequential_models_are_fused(task):
    qat = QuantWrapper(small_net()).prepare_qat()
    assert type(qat.model[0]).__name__ == "ConvBnReLU2d"
    assert type(qat.model[3]).__name__ == "ConvReLU2d"


def test_calibration_is_static_post_training_quantization(task):
    net = small_net()
    fit(net, task.train, steps=60, optimizer=SGD)
    int8 = QuantWrapper(net).prepare_qat().calibrate(task.train).convert()
    assert accuracy(int8, task.test).value > accuracy(net, task.test).value - 0.03


def outlying_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    )
    net[0].weight.data[:, 0, 0, 0] *= 8  # what a range up to the largest weight suffers from
    return net.eval()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_searched_ranges_round_the_weights_better_and_convert(bits):
    x = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    error = {}
    for search in (False, True):
        wrapper = QuantWrapper(outlying_net()).prepare_qat(bits).calibrate([x], search=search)
        conv = wrapper.model[0]
        fold = (conv.bn.weight / (conv.bn.running_var + conv.bn.eps).sqrt()).view(-1, 1, 1, 1)
        weight = conv.weight * fold
        error[search] = float((conv.weight_fake_quant(weight) - weight).detach().square().sum())
        converted = wrapper.convert()
        assert torch.equal(converted(x).argmax(1), wrapper(x).argmax(1))
        assert torch.allclose(converted(x), wrapper(x), atol=0.3 * float(wrapper(x).abs().max()))
    assert error[True] < (0.9 if bits < 8 else 1.001) * error[False]


def test_batch_norm_is_measured_anew_under_rounding():
    batches = list(torch.rand(3, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 5)
    net = outlying_net()
    wrapper = QuantWrapper(net).prepare_qat(2).calibrate(batches, search=True, batch_norm=True)
    conv = wrapper.model[0]
    fold = (conv.bn.weight / (conv.bn.running_var + conv.bn.eps).sqrt()).view(-1, 1, 1, 1)
    rounded = conv.weight_fake_quant(conv.weight * fold) / fold
    seen = [torch.nn.functional.conv2d(x, rounded, net[0].bias) for x in batches]
    for name, of_batch in (
        ("running_mean", lambda y: y.mean((0, 2, 3))),
        ("running_var", lambda y: y.var((0, 2, 3))),
    ):
        expected = torch.stack([of_batch(y) for y in seen]).mean(0)
        assert torch.allclose(getattr(conv.bn, name), expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(getattr(net[1], name), expected, rtol=0.1)
    assert conv.bn.momentum == net[1].momentum
    assert not conv.bn.training
    assert torch.equal(wrapper.convert()(batches[0]).argmax(1), wrapper(batches[0]).argmax(1))


def test_at_eight_bits_careful_calibration_changes_next_to_nothing(task):
    net = small_net()
    fit(net, task.train, steps=60, lr=1e-2, progress=False)
    plain, careful = (
        QuantWrapper(net).prepare_qat(8).calibrate(task.train, **how).convert()
        for how in ({}, {"search": True, "batch_norm": True})
    )
    assert accuracy(plain, task.test).value > 0.5
    assert accuracy(careful, task.test).value > accuracy(plain, task.test).value - 0.1


def test_a_batch_that_fails_leaves_the_statistics_and_the_rounding():
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    wrapper = QuantWrapper(outlying_net()).prepare_qat(4).calibrate([x])
    before, norm = wrapper(x), copy.deepcopy(wrapper.model[0].bn.state_dict())
    with pytest.raises(RuntimeError):
        wrapper.calibrate([x, x[:, :, :4]], batch_norm=True)
    assert all(torch.equal(v, norm[k]) for k, v in wrapper.model[0].bn.state_dict().items())
    # a moving average forgets its past to the last bit but one: up to a step of the last layer
    assert torch.allclose(wrapper.eval()(x), before, atol=0.02)
    assert all(q.fake_quant_enabled for q in fake_quantizers(wrapper))


def test_frozen_ranges_and_statistics_are_not_searched_and_measured_anew():
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    wrapper = QuantWrapper(outlying_net()).prepare_qat(4).calibrate([x]).freeze()
    for how in ({"search": True}, {"batch_norm": True}):
        with pytest.raises(WrongStage, match="before freeze"):
            wrapper.calibrate([x], **how)


def test_a_mirrored_channel_is_searched_as_it_is_rounded():
    """Batch norm with a negative factor turns the weights of a channel around."""
    x, error = torch.rand(8, 1, 8, 8), []
    for sign in (1, -1):
        net = outlying_net()
        net[0].weight.data.abs_().mul_(sign)
        net[1].weight.data.fill_(sign)
        wrapper = QuantWrapper(net).prepare_qat(2).calibrate([x], search=True)
        conv = wrapper.model[0]
        weight = conv.weight * sign / (conv.bn.running_var + conv.bn.eps).sqrt().view(-1, 1, 1, 1)
        error.append(float((conv.weight_fake_quant(weight) - weight).detach().square().sum()))
    assert error[0] == pytest.approx(error[1], rel=1e-4)


def test_a_searched_range_comes_back_with_the_state():
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    wrapper = QuantWrapper(outlying_net()).prepare_qat(2).calibrate([x], search=True)
    again = QuantWrapper(outlying_net()).prepare_qat(2)
    again(x)
    again.load_state_dict(wrapper.state_dict())
    assert torch.equal(again.eval()(x), wrapper(x))
    older = {k: v for k, v in wrapper.state_dict().items() if not k.endswith("ratio")}
    again.load_state_dict(older)
    assert not torch.equal(again(x), wrapper(x))


def test_calibration_without_a_batch_is_an_error():
    qat = QuantWrapper(small_net()).prepare_qat()
    for loader, batches in ([], 8), ([torch.rand(1, 3, 32, 32)], 0):
        with pytest.raises(EmptyLoader, match="no batch to calibrate on"):
            qat.calibrate(loader, batches)


def test_plain_residual_add_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match=r"'layer1.0'.*FloatFunctional"):
        QuantWrapper(resnet18()).prepare_qat()


@pytest.mark.parametrize(
    "join", [torch.add, torch.mul, lambda a, b: torch.cat([a, b], 1), lambda a, b: a.add_(b)]
)
def test_other_plain_joins_are_refused_too(join):
    class Joins(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return join(self.inner(x), x)

    with pytest.raises(UnsupportedModel, match="FloatFunctional"):
        QuantWrapper(Joins()).prepare_qat()
    with pytest.raises(UnsupportedModel, match="'0'"):
        QuantWrapper(nn.Sequential(Joins())).prepare_qat()


def test_float_functional_is_accepted_and_counts_are_not():
    class Fine(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.join = nn.Conv2d(3, 3, 1), nnq.FloatFunctional()

        def forward(self, x):
            return self.join.add_relu(self.conv(x), x)

    x = torch.rand(2, 3, 4, 4)
    qat = QuantWrapper(Fine()).prepare_qat().calibrate([x])
    assert torch.allclose(qat.convert()(x), qat(x), atol=1e-6)


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(NothingToQuantize, match="no Conv2d or Linear"):
        QuantWrapper(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3))).prepare_qat()


def test_dynamic_quantization_before_qat_is_an_error():
    broken = quantize_dynamic(small_net(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedModel, match=r"'7' is already quantized"):
        QuantWrapper(broken).prepare_qat()


def test_calls_out_of_order_are_errors(task):
    wrapped = QuantWrapper(small_net())
    for call in (wrapped.convert, wrapped.freeze, lambda: wrapped.calibrate(task.train)):
        with pytest.raises(WrongStage, match=r"call prepare_qat\(\)"):
            call()
    wrapped.prepare_qat()
    with pytest.raises(WrongStage, match="already prepared"):
        wrapped.prepare_qat()
    with pytest.raises(WrongStage, match="before any data"):
        wrapped.convert()
    int8 = wrapped.calibrate(task.train, batches=1).convert()
    for call in (int8.prepare_qat, int8.convert, int8.freeze):
        with pytest.raises(WrongStage):
            call()


def test_training_after_convert_is_an_error(task):
    int8 = QuantWrapper(small_net()).prepare_qat().calibrate(task.train, batches=1).convert()
    with pytest.raises(WrongStage, match="does not train"):
        int8.train()
    with pytest.raises(NothingToTrain):
        fit(int8, task.train, steps=1)
    assert int8.eval() is int8


def test_the_prepared_wrapper_can_train_on_after_convert(task):
    qat = trained(task, 4)
    first = qat.convert()
    fit(qat, task.train, steps=10, optimizer=SGD)
    second = qat.convert()
    same = [torch.equal(a.int_repr(), b.int_repr())
            for a, b in zip(weights(first).values(), weights(second).values(), strict=True)]  # fmt: skip
    assert not all(same)


def test_unsupported_backend_names_the_supported_ones():
    with pytest.raises(UnsupportedBackend, match="choose one of"):
        QuantWrapper(small_net(), backend="tpu")


@pytest.mark.parametrize(
    "backend", [e for e in torch.backends.quantized.supported_engines if e != "none"]
)
def test_every_supported_backend_runs(task, backend):
    qat = QuantWrapper(small_net(), backend=backend).prepare_qat()
    fit(qat, task.train, steps=8, optimizer=SGD)
    fake, _ = predict(qat, task.test)
    real, _ = predict(qat.convert(), task.test)
    assert np.mean(fake == real) >= 0.97


@pytest.mark.parametrize(
    "backend",
    [e for e in torch.backends.quantized.supported_engines if e not in ("none", "qnnpack")],
)
def test_products_fit_into_sixteen_bits(task, backend):
    """Kernels for AVX2 add pairs of products in 16 bits, and saturate (oneDNN's do, too)."""
    qat = QuantWrapper(small_net(), backend=backend).prepare_qat().calibrate(task.train)
    assert (qat.quant.activation_post_process.scale * 127).item() >= 1.9  # images span -1 to 1


ENGINES = [e for e in torch.backends.quantized.supported_engines if e != "none"]


@pytest.fixture(params=ENGINES)
def process_engine(request):
    """The engine that the rest of the process uses, whatever the wrapper does."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = request.param
    yield request.param
    torch.backends.quantized.engine = before


def test_the_engine_of_the_process_stays(process_engine, monkeypatch):
    x = torch.rand(2, 3, 32, 32)
    at_call, at_packing = {}, {}
    for backend in ENGINES:
        qat = QuantWrapper(small_net(), backend).prepare_qat().calibrate([x])
        int8 = qat.convert()
        int8.model[0].register_forward_hook(
            lambda *_, b=backend: at_call.__setitem__(b, torch.backends.quantized.engine)
        )
        pack = nnq.Conv2d.set_weight_bias

        def packing(self, weight, bias, b=backend, pack=pack):
            at_packing[b] = torch.backends.quantized.engine
            pack(self, weight, bias)

        with monkeypatch.context() as patch:
            patch.setattr(nnq.Conv2d, "set_weight_bias", packing)
            copied = copy.deepcopy(int8)
            assert at_packing.pop(backend) == backend
        assert torch.equal(copied(x), int8(x))
        copied.load_state_dict(int8.state_dict())
        assert torch.equal(copied(x), int8(x))
        assert torch.backends.quantized.engine == process_engine
    assert at_call == {backend: backend for backend in ENGINES}


def test_the_engine_of_the_process_stays_after_a_failure(process_engine):
    x = torch.rand(2, 3, 32, 32)
    int8 = QuantWrapper(small_net()).prepare_qat().calibrate([x]).convert()
    with pytest.raises(RuntimeError):
        int8(x[:, :1])
    with pytest.raises(KeyError):
        int8.load_state_dict({})
    assert torch.backends.quantized.engine == process_engine


def test_dynamic_int8_leaves_the_engine_too(process_engine):
    x = torch.rand(3, 16)
    qat = prepare_qat(nn.Sequential(nn.Linear(16, 4)), W8A8)
    int8 = convert(qat)
    y = int8(x)
    assert torch.allclose(y, qat.eval()(x), atol=1e-5)  # float32 sums of 16 products in two orders
    assert torch.equal(copy.deepcopy(int8)(x), y)
    assert torch.backends.quantized.engine == process_engine


def test_a_converted_wrapper_can_be_scripted():
    x = torch.rand(2, 3, 32, 32)
    int8 = QuantWrapper(small_net()).prepare_qat().calibrate([x]).convert()
    with pytest.warns(FutureWarning, match="torch.jit.script"):
        script = torch.jit.script(int8)
    assert torch.equal(script(x), int8(x))


def repeated(*names: str) -> nn.Module:
    """A net of the named layers; the same name is the same module."""
    kinds = {
        "conv": lambda: nn.Conv2d(3, 3, 1), "bn": lambda: nn.BatchNorm2d(3), "relu": nn.ReLU,
        "relu6": nn.ReLU6, "id": nn.Identity, "drop": nn.Dropout,
        "block": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()),
    }  # fmt: skip
    torch.manual_seed(1)
    made: dict[str, nn.Module] = {}
    for name in names:
        made.setdefault(name, kinds[name.rstrip("12")]())
    net = nn.Sequential(*(made[name] for name in names))
    for parameter in net.parameters():
        parameter.data += 0.2  # so that no ReLU is dead
    return net


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return nn.functional.relu(self.bn(self.conv(x)))


class Peeks(nn.Module):
    """Reads what a convolution gives before its ReLU: merging the two would change it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
        self.join = nnq.FloatFunctional()

    def forward(self, x):
        before = self.layers[0](x)
        return self.join.add(self.layers[2](self.layers[1](before)), before)


SHARING = {
    "shared relu": repeated("conv1", "relu", "conv2", "relu"),
    "shared relu after norms": repeated("conv1", "bn1", "relu", "conv2", "bn2", "relu"),
    "shared relu and dropout": repeated("conv1", "relu", "drop", "conv2", "relu", "drop"),
    "shared relu6": repeated("conv1", "relu6", "conv2", "relu6"),
    "shared convolution": repeated("conv", "relu1", "conv", "relu2"),
    "shared convolution, norms of their own": repeated("conv", "bn1", "conv", "bn2"),
    "shared norm": repeated("conv1", "bn", "conv2", "bn"),
    "shared block": repeated("block", "block", "conv"),
    "identity for relu": repeated("conv1", "bn1", "id", "conv2"),
    "identity between": repeated("conv1", "id", "bn1", "relu"),
    "functional relu": Functional(),
    "result read twice": Peeks(),
}


@pytest.mark.parametrize("net", SHARING.values(), ids=SHARING)
def test_shared_modules_and_joined_results_keep_their_meaning(net):
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    net.train()
    for _ in range(20):
        net(x)
    net.eval()
    qat = QuantWrapper(net).prepare_qat().calibrate([x])
    assert (qat(x) - net(x)).abs().max() < 0.05 * net(x).abs().max()  # a few steps of 1/127
    int8 = qat.convert()
    assert not [m for m in int8.modules() if type(m) in (nn.Conv2d, nn.BatchNorm2d)]
    # ReLU6 has an output range of its own only after conversion: one step of it.
    assert (int8(x) - qat(x)).abs().max() < 0.02 * net(x).abs().max()


def test_tied_layers_train_as_one_and_their_ranges_apart():
    qat = QuantWrapper(SHARING["shared convolution"]).prepare_qat()
    assert qat.model[0].weight is qat.model[2].weight
    qat(torch.rand(2, 3, 8, 8)).sum().backward()
    scales = [qat.model[i].activation_post_process.scale for i in (0, 2)]
    assert not torch.equal(*scales)


def test_norm_after_linear_is_merged():
    net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
    x = torch.rand(4, 8)
    qat = QuantWrapper(net).prepare_qat().calibrate([x])
    assert torch.allclose(qat.convert()(x), qat(x), atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.PReLU(), "LeakyReLU"),
        (nn.ConvTranspose2d(3, 3, 2), "upsample"),
        (nn.BatchNorm2d(3, affine=False), "affine=True"),
        (nn.BatchNorm2d(3, track_running_stats=False), "track_running_stats=True"),
        (nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(3)), "follow a Linear"),
    ],
)
def test_layers_without_a_kernel_are_refused_by_name(layer, why):
    with pytest.raises(UnsupportedModel, match=rf"layer '1(\.1)?'.*{why}"):
        QuantWrapper(nn.Sequential(nn.Conv2d(3, 3, 1), layer)).prepare_qat()


def test_operators_without_a_kernel_are_named_when_they_run():
    class Exponential(nn.Module):
        def forward(self, x):
            return torch.exp(x)

    x = torch.rand(1, 3, 4, 4)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), Exponential())
    int8 = QuantWrapper(net).prepare_qat().calibrate([x]).convert()
    with pytest.raises(UnsupportedModel, match=r"aten::exp.*no kernel"):
        int8(x)


def test_resume_of_a_prepared_model_is_bit_identical(task, tmp_path):
    def run(folder, interrupt):
        qat = QuantWrapper(small_net()).prepare_qat(4)
        actions = {6: qat.freeze} | ({8: interrupt} if interrupt else {})
        fit(qat, task.train, steps=12, optimizer=SGD, at=actions, checkpoint_dir=folder,
            checkpoint_every=1, resume=True)  # fmt: skip
        return qat

    def stop():
        raise KeyboardInterrupt

    whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop)
    resumed = run(tmp_path / "cut", None)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


REMOVED = """
import sys, torch
for name in [n for n in sys.modules if n.startswith("torch.ao.quantization")]:
    del sys.modules[name]
sys.modules["torch.ao.quantization"] = None
if hasattr(torch.ao, "quantization"):
    del torch.ao.quantization
import companion
from companion import W4, QuantWrapper, choose_scale, fit
from companion.errors import UnsupportedModel
model = torch.nn.Linear(2, 2)
fit(model, [(torch.eye(2), torch.tensor([0, 1]))], steps=2, progress=False)
try:
    QuantWrapper(model)
except UnsupportedModel as error:
    print("refused:", error)
"""


def test_package_works_where_the_classic_road_has_been_removed():
    run = subprocess.run([sys.executable, "-c", REMOVED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("refused: this PyTorch no longer has torch.ao.quantization")
