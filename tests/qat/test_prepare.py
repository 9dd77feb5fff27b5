"""From float to rounded to integers: what is prepared, what is refused, and that it trains."""

import copy
import functools
import gc
import logging
import types
import weakref

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from companion import W2, W3, W4, W4A8, W8, W8A8, QuantScheme, convert, fit, prepare_qat
from companion.errors import (
    NothingToQuantize,
    NothingToTrain,
    SchemeError,
    UnknownLayer,
    UnsupportedModel,
    WrongStage,
)
from companion.qat.layers import FakeQuantEmbedding, FakeQuantLinear
from companion.qat.packed import QuantizedLinear
from companion.qat.ranges import METHODS, Absmax
from tests.numerics.test_packing import PeakBytes


class Block(nn.Module):
    """Residual, with names two levels deep."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.LayerNorm(64), Block(), nn.Linear(64, 3)).to(dtype)


def inputs(dtype: torch.dtype = torch.float32, rows: int = 24) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def batches() -> list:
    x = inputs(rows=64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]


@pytest.mark.parametrize("scheme", [W8, W4, W3, W2, QuantScheme(5, 16), QuantScheme(4, None), W4A8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_converted_equals_prepared(scheme, dtype, method):
    prepared, x = prepare_qat(model(dtype), scheme, method).eval(), inputs(dtype)
    converted = convert(prepared)
    assert prepared(x).dtype == dtype
    assert torch.equal(converted(x), prepared(x))
    assert not torch.equal(prepared(x), model(dtype)(x))


def test_weights_are_on_the_grid_by_an_independent_formula():
    float_model = model()
    converted = convert(prepare_qat(float_model, W3, "absmax"))
    groups = float_model[2].down.weight.detach().reshape(64, 4, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 3.5).half().float()
    expected = torch.round(groups * (1 / scale)).clamp(-4, 3) * scale
    assert torch.equal(converted[2].down.weight, expected.reshape(64, 128))


def test_the_float_model_is_left_as_it_is():
    float_model = model()
    before = copy.deepcopy(float_model.state_dict())
    fit(prepare_qat(float_model, W4), batches(), steps=3)
    assert all(torch.equal(before[k], v) for k, v in float_model.state_dict().items())
    assert type(float_model[0].up) is nn.Linear
    assert not hasattr(float_model, "quantization")


def test_prepared_keeps_names_parameters_mode_and_hooks():
    float_model, seen = model().train(), []
    float_model[3].register_forward_hook(lambda *_: seen.append(1))
    learned = prepare_qat(float_model, W4).state_dict()  # a learned range adds its own tensors only
    assert [n for n in learned if ".quantizer." not in n] == list(float_model.state_dict())
    prepared = prepare_qat(float_model, W4, "absmax")
    assert list(prepared.state_dict()) == list(float_model.state_dict())
    assert [n for n, _ in prepared.named_parameters()] == [
        n for n, _ in float_model.named_parameters()
    ]
    assert prepared.training
    prepared(inputs())
    assert seen == [1]
    prepared.load_state_dict(float_model.state_dict())


def test_convert_leaves_the_prepared_model_trainable_and_stops_gradients():
    prepared = prepare_qat(model(), W4).train()
    converted = convert(prepared)
    assert prepared.training
    assert all(p.requires_grad for p in prepared.parameters())
    assert not converted.training
    assert not any(p.requires_grad for p in converted.parameters())
    assert not any("weight" in n for n, _ in converted.named_parameters() if not n.startswith("1."))


def test_one_layer_alone_is_a_model_too():
    prepared = prepare_qat(nn.Linear(64, 8), W4)
    converted = convert(prepared)
    assert isinstance(converted, QuantizedLinear)
    assert torch.equal(converted(inputs()), prepared(inputs()))


def test_a_layer_used_under_two_names_is_converted_under_both():
    shared = nn.Linear(64, 64)
    converted = convert(prepare_qat(nn.Sequential(shared, nn.ReLU(), shared), W4))
    assert isinstance(converted[0], QuantizedLinear)
    assert converted[0] is converted[2]


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("0.up", ["0.up"]),
        (["up"], ["0.up", "2.up"]),
        (["2"], ["2.up", "2.down"]),
        (("*.down", "3"), ["0.down", "2.down", "3"]),
    ],
)
def test_skip_takes_names_ends_blocks_and_patterns(skip, left):
    prepared = prepare_qat(model(), W4, skip=skip)
    assert list(prepared.quantization.skipped) == left
    assert sorted(prepared.quantization.layers + left) == sorted(
        ["0.up", "0.down", "2.up", "2.down", "3"]
    )
    for name in left:
        assert type(prepared.get_submodule(name)) is nn.Linear


def test_embeddings_stay_unless_asked_for():
    def build(tied):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 20, bias=False))
        if tied:
            m[1].weight = m[0].weight
        return m

    ids = torch.arange(20)
    assert prepare_qat(build(False), W4).quantization.layers == ["1"]
    with pytest.raises(NothingToQuantize):  # the output layer follows its embedding
        prepare_qat(build(True), W4)
    for tied in (False, True):
        prepared = prepare_qat(build(tied), W4, embeddings=True)
        assert isinstance(prepared[0], FakeQuantEmbedding)
        assert (prepared[0].weight is prepared[1].weight) is tied
        converted = convert(prepared)
        assert torch.equal(prepared[0](ids), converted[0].weight)
        assert torch.equal(converted(ids), prepared(ids))
        assert (converted[0].integers is converted[1].integers) is tied
    with pytest.raises(NothingToQuantize):
        prepare_qat(build(True), W4, embeddings=True, skip=["1"])


def train_by_hand(prepared, steps=30):
    optimizer = torch.optim.AdamW(prepared.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        x, y = batches()[step % 4]
        optimizer.zero_grad()
        loss = F.cross_entropy(prepared(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("scheme", [W2, W4A8, W8A8])
def test_trains_in_a_loop_of_ones_own(scheme):
    prepared = prepare_qat(model(), scheme)
    losses = train_by_hand(prepared)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    start = prepare_qat(model(), scheme).state_dict()
    moved = {k for k, v in prepared.state_dict().items() if not torch.equal(start[k], v)}
    assert moved >= {k for k in start if not k.endswith((".first", ".follows"))}
    if scheme is not W8A8:
        assert torch.equal(convert(prepared)(inputs()), prepared.eval()(inputs()))


@pytest.mark.parametrize("method", METHODS)
def test_trains_in_fit(method):
    prepared = prepare_qat(model(), W2, method)
    history = fit(prepared, batches(), steps=30, lr=3e-3)
    assert sum(history.loss[-4:]) < 0.7 * sum(history.loss[:4])
    assert not torch.equal(prepared[0].up.weight, model()[0].up.weight)


def test_a_converted_model_does_not_train():
    with pytest.raises(NothingToTrain, match="Train before convert"):
        fit(convert(prepare_qat(model(), W4)), batches(), steps=1)


def test_deepcopy_and_state_dict_carry_a_prepared_model():
    prepared = prepare_qat(model(), W2)
    train_by_hand(prepared, 3)
    twin = copy.deepcopy(prepared)
    fresh = prepare_qat(model(), W2)
    fresh.load_state_dict(prepared.state_dict())
    for other in (twin, fresh):
        assert torch.equal(other(inputs()), prepared(inputs()))
        assert torch.equal(convert(other)(inputs()), prepared(inputs()))
    train_by_hand(twin, 2)
    assert not torch.equal(twin(inputs()), prepared(inputs()))
    assert isinstance(twin[0].up, FakeQuantLinear)


def test_a_converted_model_survives_deepcopy_and_state_dict():
    converted, other = convert(prepare_qat(model(), W4)), convert(prepare_qat(model(), W4))
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(converted.state_dict())
    for twin in (other, copy.deepcopy(converted)):
        assert torch.equal(twin(inputs()), converted(inputs()))


def test_the_report_says_what_was_swapped(caplog):
    with caplog.at_level(logging.INFO, logger="companion.qat.prepare"):
        prepared = prepare_qat(model(), QuantScheme(4, None), skip=["3"])
    assert str(prepared.quantization) == (
        "4 layers quantized (4 bits, group size row, lsq); 1 stay in floating point:\n"
        "  3: skipped by '3'"
    )
    assert str(prepared.quantization) in caplog.text


def test_errors_of_prepare():
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(NothingToQuantize, match=r"made of Conv2d, ReLU.*use QuantWrapper"):
        prepare_qat(conv, W4)
    with pytest.raises(NothingToQuantize, match="with skip="):
        prepare_qat(model(), W4, skip=["*"])
    with pytest.raises(UnknownLayer, match=r"'lm_head' matches no layer.*0\.up, 0\.down, 2\.up"):
        prepare_qat(model(), W4, skip=["3", "lm_head"])
    with pytest.raises(SchemeError, match=r"48 does not divide the 64 inputs of 0\.up \(and 4 more"
                                          r".*could be 2, 4, 8, 16, 32, 64, or None"):  # fmt: skip
        prepare_qat(model(), QuantScheme(4, 48))
    with pytest.raises(
        SchemeError, match=r"'slq' is unknown: choose one of absmax, absmax-torchao"
    ):
        prepare_qat(model(), W4, "slq")
    dynamic = torch.ao.quantization.quantize_dynamic(model(), {nn.Linear})
    with pytest.raises(UnsupportedModel, match=r"0\.up \(Linear\) holds quantized weights already"):
        prepare_qat(dynamic, W4)


def test_errors_of_order():
    prepared = prepare_qat(model(), W4)
    converted = convert(prepared)
    with pytest.raises(WrongStage, match=r"prepared already \(0\.up\)"):
        prepare_qat(prepared, W4)
    with pytest.raises(WrongStage, match=r"converted already \(0\.up\)"):
        prepare_qat(converted, W4)
    with pytest.raises(WrongStage, match="this one is converted already"):
        convert(converted)
    with pytest.raises(WrongStage, match="this one was not prepared"):
        convert(model())
    with pytest.raises(SchemeError, match=r"prepared with .*weight_bits=4.* not with .*=3"):
        convert(prepared, W3)
    assert torch.equal(convert(prepared, QuantScheme(4, 32))(inputs()), converted(inputs()))


def test_weights_too_large_for_float16_scales_are_refused():
    large = nn.Sequential(nn.Linear(64, 8))
    with torch.no_grad():
        large[0].weight[0, 0] = 1e9
    with pytest.raises(SchemeError, match=r"0 are too large for torch\.float16"):
        prepare_qat(large, W4)
    prepare_qat(large, QuantScheme(4, 32, torch.float32))


def test_a_model_that_training_broke_is_not_converted():
    prepared = prepare_qat(model(), W4)
    with torch.no_grad():
        prepared[2].up.weight[3, 5] = float("nan")
    with pytest.raises(SchemeError, match=r"2\.up are too large .* or not finite"):
        convert(prepared)


def linears(float_model: nn.Module) -> list[nn.Linear]:
    return [m for m in float_model.modules() if isinstance(m, nn.Linear)]


def check_rounded_throughout(float_model: nn.Module) -> nn.Module:
    """Prepared computes other than float, every step learns, converted computes the same."""
    prepared = prepare_qat(float_model, W2)
    prepared(inputs()).square().sum().backward()
    steps = [p for n, p in prepared.named_parameters() if n.endswith("step")]
    assert len(steps) == 5
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in steps)
    converted = convert(prepared.eval())
    assert torch.equal(converted(inputs()), prepared(inputs()))
    assert not torch.equal(float_model(inputs()), prepared(inputs()))
    return converted


def test_works_through_the_hooks_of_accelerate():
    hooked = model().eval()
    for layer in linears(hooked):
        add_hook_to_module(layer, AlignDevicesHook("cpu", io_same_device=True))
        add_hook_to_module(layer, ModelHook(), append=True)
    add_hook_to_module(hooked[0], AlignDevicesHook("cpu"))
    converted = check_rounded_throughout(hooked)
    assert type(converted[0].up._hf_hook).__name__ == "SequentialHook"
    assert hooked[0].up._old_forward.__self__ is hooked[0].up  # the float model keeps its own


def test_works_through_the_hooks_of_a_dispatched_model():
    check_rounded_throughout(dispatch_model(model().eval(), {"": "cpu"}, force_hooks=True))


def test_a_hook_sees_the_layer_that_it_is_on():
    class Seen(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module).__name__)
            return args, kwargs

    seen, hooked = [], nn.Sequential(nn.Linear(64, 8))
    add_hook_to_module(hooked[0], Seen())
    prepared = prepare_qat(hooked, W4)
    convert(prepared)(inputs())
    prepared(inputs())
    assert seen == ["QuantizedLinear", "FakeQuantLinear"]


def test_offloaded_weights_are_refused():
    with pytest.raises(UnsupportedModel, match=r"0\.up holds no values .* without offloading"):
        prepare_qat(cpu_offload(model(), execution_device=torch.device("cpu")), W4)
    with pytest.raises(UnsupportedModel, match="holds no values"), torch.device("meta"):
        prepare_qat(nn.Sequential(nn.Linear(64, 8)), W4)


def by_closure(module):
    before = module.forward
    module.forward = lambda x: 2 * before(x)


def by_partial(module):
    module.forward = functools.partial(type(module).forward, module)


def by_method(module):
    module.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), module)


def over_a_hook(module):
    add_hook_to_module(module, ModelHook())
    by_closure(module)


@pytest.mark.parametrize("replace", [by_closure, by_partial, by_method, over_a_hook])
def test_a_layer_whose_forward_was_replaced_is_refused_by_name(replace):
    patched = model()
    replace(patched[2].up)
    with pytest.raises(UnsupportedModel, match=r"forward of 2\.up was replaced.*skip=\['2\.up'\]"):
        prepare_qat(patched, W4)
    assert "2.up" in prepare_qat(patched, W4, skip=["2.up"]).quantization.skipped


def test_a_block_whose_new_forward_holds_the_old_block_is_refused():
    patched = model()
    by_closure(patched[2])
    with pytest.raises(UnsupportedModel, match=r"forward of 2 was replaced"):
        prepare_qat(patched, W4)
    followed = model().eval()
    by_method(followed[2])
    by_partial(followed[0])
    check_rounded_throughout(followed)


def test_compiled_parts_are_refused():
    parts = model()
    parts[0].up.compile(backend="eager")  # in place: the copy is as it was before
    check_rounded_throughout(parts.eval())
    parts[0] = torch.compile(parts[0], backend="eager")
    with pytest.raises(UnsupportedModel, match=r"0 was compiled by torch\.compile"):
        prepare_qat(parts, W4)
    with pytest.raises(UnsupportedModel, match="the model was compiled"):
        prepare_qat(torch.compile(model(), backend="eager"), W4)


COMPUTED = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("skip", [(), ("0",)])
def test_weights_that_a_hook_computes_are_refused(kind, skip):
    computed = model()
    COMPUTED[kind](computed[0].up)
    with pytest.raises(UnsupportedModel, match=r"0\.up\.weight is computed by a hook"):
        prepare_qat(computed, W4, skip=skip)


def test_parametrized_weights_stay_float_with_a_reason():
    for parametrize in (parametrizations.weight_norm, parametrizations.spectral_norm):
        computed = model()
        parametrize(computed[0].up)
        prepared = prepare_qat(computed, W4).eval()
        assert list(prepared.quantization.skipped) == ["0.up"]
        assert "computed by a parametrization" in prepared.quantization.skipped["0.up"]
        assert torch.equal(convert(prepared)(inputs()), prepared(inputs()))


def test_hooks_of_a_layer_go_on_after_conversion():
    float_model, kept = model().eval(), []
    layer = float_model[3]
    layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    layer.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs), with_kwargs=True)
    layer.register_forward_hook(lambda _, args, output: output + 1)
    layer.register_forward_hook(lambda *_: kept.append(1), always_call=True)
    check_rounded_throughout(float_model)
    assert len(kept) == 5


def test_a_layer_that_was_replaced_or_removed_since_is_named():
    prepared = prepare_qat(model(), W4)
    prepared[3] = nn.Linear(64, 3)
    with pytest.raises(WrongStage, match=r"3 is no longer .* \(it is Linear\).*before prepare_qat"):
        convert(prepared)
    del prepared[2].up
    with pytest.raises(WrongStage, match=r"2\.up is no longer .* \(it is gone\)"):
        convert(prepared)


class Tied(nn.Module):
    """Token rows and an output layer over the same weight, and a layer between."""

    def __init__(self):
        super().__init__()
        self.rows, self.inner, self.head = nn.Embedding(48, 64), Block(), nn.Linear(64, 48)
        self.head.weight = self.rows.weight

    def forward(self, ids):
        return self.head(self.inner(self.rows(ids)))


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("scheme", [W4, W8A8], ids=str)
def test_in_place_gives_what_a_copy_gives(scheme, embeddings):
    torch.manual_seed(0)
    start, ids = Tied(), torch.arange(12)[None]
    copied = prepare_qat(start, scheme, embeddings=embeddings)
    pointers = {n: p.data_ptr() for n, p in start.named_parameters()}
    prepared = prepare_qat(start, scheme, embeddings=embeddings, inplace=True)
    assert prepared is start
    assert pointers.items() <= {n: p.data_ptr() for n, p in start.named_parameters()}.items()
    assert torch.equal(prepared(ids), copied(ids))
    weights = [weakref.ref(m.weight) for m in prepared.modules() if hasattr(m, "quantizer")]
    expected = convert(copied)
    converted = convert(prepared, inplace=True)
    gc.collect()
    assert converted is start
    assert all(weight() is None for weight in weights)
    assert not converted.training
    state = expected.state_dict()
    assert state.keys() == converted.state_dict().keys()
    assert all(torch.equal(state[n], t) for n, t in converted.state_dict().items())
    assert torch.equal(converted(ids), expected(ids))
    if embeddings:
        assert converted.rows.integers is converted.head.integers


def test_in_place_each_weight_is_free_before_the_next_is_packed():
    alive = []

    class Counting(Absmax):
        def integers(self, matrix):
            alive.append(sum(weight() is not None for weight in weights))
            return super().integers(matrix)

    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in layers]
    prepared = prepare_qat(layers, W4, Counting, inplace=True)
    convert(prepared, inplace=True)
    assert alive[-4:] == [4, 3, 2, 1]


def test_one_layer_alone_cannot_become_another_and_is_returned():
    layer = nn.Linear(64, 8)
    assert prepare_qat(layer, W4, inplace=True) is layer
    assert isinstance(convert(layer, inplace=True), QuantizedLinear)


def test_a_model_refused_in_place_is_as_it_was():
    broken = model()
    with torch.no_grad():
        broken[3].weight[0, 0] = torch.nan  # the last layer that would be changed
    with pytest.raises(SchemeError, match="not finite"):
        prepare_qat(broken, W4, inplace=True)
    assert not hasattr(broken, "quantization")
    assert all(type(m) is nn.Linear for m in broken.modules() if isinstance(m, nn.Linear))
    assert not any("quantizer" in name for name, _ in broken.named_modules())
    prepared = prepare_qat(model(), W4)
    with torch.no_grad():
        prepared[3].weight[0, 0] = torch.inf
    before = copy.deepcopy(prepared.state_dict())
    with pytest.raises(SchemeError, match="not finite"):
        convert(prepared, inplace=True)
    assert prepared.state_dict().keys() == before.keys()
    assert isinstance(prepared[0].up, FakeQuantLinear)


def test_converting_copies_no_weight_that_it_packs():
    prepared = prepare_qat(nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))), W4, "absmax")
    weights = {p.data_ptr(): p.clone() for n, p in prepared.named_parameters() if "weight" in n}
    floats = sum(4 * p.numel() for p in weights.values())
    with PeakBytes() as peak:
        converted = convert(prepared)
    assert peak.peak < floats / 2  # integers and scales of all, and one matrix at a time
    assert not {p.data_ptr() for p in converted.parameters()} & weights.keys()
    now = {p.data_ptr(): p for p in prepared.parameters()}
    assert all(torch.equal(now[place], weight) for place, weight in weights.items())
    assert all(p.requires_grad for p in prepared.parameters())


def test_a_weight_that_something_else_reads_too_is_copied():
    prepared = prepare_qat(nn.Sequential(nn.Linear(64, 64)), W4)
    prepared.reader = nn.ParameterList([prepared[0].weight])
    converted = convert(prepared)
    assert torch.equal(converted.reader[0], prepared[0].weight)
    assert converted.reader[0].data_ptr() != prepared[0].weight.data_ptr()
    assert prepared[0].weight.requires_grad
    assert not converted.reader[0].requires_grad


def test_whether_matrices_are_kept_is_said_when_converting():
    prepared = prepare_qat(model(), W4)
    for cache in (True, False):
        layers = [m for m in convert(prepared, cache=cache).modules() if hasattr(m, "integers")]
        assert {layer.cache for layer in layers} == {cache}
