"""Which layers are found, which are left, and which models are refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from companion import W2, W4, QuantScheme, convert, prepare_qat
from companion.errors import NothingToQuantize, SchemeError, UnsupportedModel
from companion.qat.selection import (
    Quantization,
    check_divisible,
    kind_of,
    matches,
    refuse_unseen_weights,
)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", True),
        ("model.layers.0.mlp.up_proj", "up_proj", True),
        ("model.layers.0.mlp.up_proj", "mlp", True),
        ("model.layers.0.mlp.up_proj", "layers.0", True),
        ("model.layers.0.mlp.up_proj", "layers.*.mlp", True),
        ("model.layers.10.mlp.up_proj", "layers.1", False),
        ("model.layers.0.mlp.up_proj", "proj", False),
        ("model.layers.0.mlp.up_proj", "*proj", True),
        ("lm_head", "lm_head", True),
        ("lm_head", "head", False),
        ("", "lm_head", False),
    ],
)
def test_patterns_match_whole_parts_of_names(name, pattern, expected):
    assert matches(name, pattern) is expected


def test_only_layers_whose_forward_is_known_are_taken():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert [kind_of(m) for m in (nn.Linear(2, 2), nn.Embedding(2, 2), Conv1D(2, 2))] == [
        "Linear", "Embedding", "Conv1D"]  # fmt: skip
    assert kind_of(Scaled(2, 2)) is None
    assert kind_of(nn.Conv1d(2, 2, 1)) is None
    assert kind_of(weight_norm(nn.Linear(2, 2))) is None
    prepared = prepare_qat(nn.Sequential(Scaled(32, 32), nn.Linear(32, 2)), W4)
    assert prepared.quantization.layers == ["1"]
    assert prepared.quantization.skipped == {"0": "Scaled is a subclass with a forward of its own"}


def test_divisors_are_common_to_all_chosen_layers():
    layers = {"a": nn.Linear(96, 5), "b": nn.Linear(80, 5), "c": nn.Linear(7, 5)}
    with pytest.raises(SchemeError, match=r"64 does not divide the 96 inputs of a \(and 1 more "
                                          r"layers\).*1, 2, 4, 8, 16, or None"):  # fmt: skip
        check_divisible(layers, ["a", "b"], QuantScheme(4, 64))
    check_divisible(layers, ["a", "b"], QuantScheme(4, 16))
    check_divisible(layers, ["a", "b", "c"], QuantScheme(4, None))


def test_the_inputs_of_conv1d_are_its_rows():
    layers = {"a": Conv1D(5, 64)}  # 64 inputs, 5 outputs
    check_divisible(layers, ["a"], QuantScheme(4, 64))
    with pytest.raises(SchemeError, match="the 48 inputs of 0"):
        prepare_qat(nn.Sequential(Conv1D(64, 48)), W4)


def test_encoder_layers_with_a_fast_path_are_refused_while_it_is_on():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 1)
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(UnsupportedModel, match=r"layers\.0 .*set_fastpath_enabled\(False\) first"):
        prepare_qat(model, W4)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        prepared, x = prepare_qat(model, W4).eval(), torch.randn(2, 5, 64)
        assert prepared.quantization.layers == ["layers.0.linear1", "layers.0.linear2"]
        # without gradients, as converted: torch's attention takes another kernel with them
        prepared.requires_grad_(False)
        assert torch.equal(convert(prepared)(x), prepared(x))
        assert not torch.equal(model.eval()(x), prepared(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_fused_expert_weights_are_refused_unless_skipped():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.zeros(4, 8, 8))

    model = nn.ModuleDict({"attention": nn.Linear(32, 8), "experts": Experts()})
    with pytest.raises(UnsupportedModel, match=r"experts\.gate_up fuses the weights of 4 experts"):
        refuse_unseen_weights(model, ())
    refuse_unseen_weights(model, ("experts",))
    plain = nn.ParameterDict({"kernel": nn.Parameter(torch.zeros(4, 8, 8))})
    refuse_unseen_weights(plain, ())  # three dimensions alone are no experts


@pytest.mark.parametrize("fast_path", [True, False])
def test_attention_reads_the_weights_of_its_output_layer(fast_path):
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        model = nn.ModuleDict({"a": nn.MultiheadAttention(32, 2), "b": nn.Linear(32, 32)})
        assert prepare_qat(model, W4).quantization.skipped == {
            "a.out_proj": "MultiheadAttention reads its weight past its forward",
            "a.in_proj_weight": "a matrix of MultiheadAttention, which prepare_qat does not round",
        }
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def product(layer, x):
    return F.linear(x, layer.weight, layer.bias)


class Reads(nn.Module):
    """Whose forward is given; each of them ends with the layer `last`, which is called."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.many = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
        self.__class__ = type("Reader", (Reads,), {"forward": forward})

    def helped(self, x):
        return F.linear(x, self.b.weight)

    @property
    def dtype(self):
        return self.a.weight.dtype


def alias(self, x):
    layer = self.a
    return self.last(F.linear(x, layer.weight))


def loop(self, x):
    for layer in self.many:
        x = F.linear(x, layer.weight, layer.bias)
    return self.last(x)


def called(self, x):
    for layer in self.many:
        x = layer(x)
    return self.last(self.a(self.b(x)))


def described(self, x):
    if self.a.weight is None or not isinstance(self.b.weight, torch.Tensor):
        return x
    x = x.to(self.a.weight.dtype).to(self.dtype).view(-1, self.b.weight.shape[1])
    return self.last(self.a(self.b(x)))


READS = {
    "itself": (lambda self, x: self.last(x @ self.a.weight.t()), ["a"]),
    "by another name": (alias, ["a"]),
    "by a method": (lambda self, x: self.last(self.helped(x)), ["b"]),
    "by a function": (lambda self, x: self.last(product(self.a, x)), ["a"]),
    "by an inner function": (lambda self, x: self.last((lambda y: y @ self.a.weight)(x)), ["a"]),
    "by getattr": (lambda self, x: self.last(F.linear(x, getattr(self.a, "weight"))), ["a"]),  # noqa: B009
    "two at once": (lambda self, x: self.last(x @ (self.a.weight + self.b.weight)), ["a", "b"]),
    "in a loop": (loop, ["many.0", "many.1"]),
    "in a list": (lambda self, x: self.last(sum(x @ m.weight for m in self.many)),
                  ["many.0", "many.1"]),
    "by place": (lambda self, x: self.last(x @ self.many[0].weight), ["many.0", "many.1"]),
    "not at all": (called, []),
    "of its type alone": (described, []),
}  # fmt: skip


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("method", ["absmax", "lsq"])
def test_a_layer_whose_weight_is_read_past_its_forward_stays_float(how, method):
    torch.manual_seed(0)
    forward, expected = READS[how]
    model, x = Reads(forward), torch.randn(4, 32)
    prepared = prepare_qat(model, W2, method).eval()
    why = "Reader reads its weight past its forward"
    assert prepared.quantization.skipped == dict.fromkeys(expected, why)
    assert torch.equal(convert(prepared)(x), prepared(x))
    assert not torch.equal(prepared(x), model(x))


def test_an_embedding_that_is_a_head_too_is_read():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.last = nn.Embedding(20, 32), nn.Linear(32, 32)

        def forward(self, ids):
            return F.linear(self.last(self.table(ids)), self.table.weight)

    prepared, ids = prepare_qat(Tied(), W2, embeddings=True), torch.arange(9)
    assert prepared.quantization.layers == ["last"]
    assert torch.equal(convert(prepared)(ids), prepared(ids))


def test_weights_are_read_where_no_source_is():
    scope: dict = {"nn": nn}
    exec(
        "class Typed(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return self.b(x @ self.a.weight.t())\n",
        scope,
    )
    model = scope["Typed"]()
    model.a, model.b = nn.Linear(32, 32), nn.Linear(32, 32)
    assert list(prepare_qat(model, W4).quantization.skipped) == ["a"]


class Plain(nn.Linear):
    pass


class Spelled(nn.Linear):  # as Falcon's
    def forward(self, input):
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-50, 50))


class Noisy(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y + torch.randn_like(y) if self.training else y


class Unbiased(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight)


class Gated(nn.Linear):  # today as nn.Linear, tomorrow not
    gate = 1.0

    def __init__(self, *shape):
        super().__init__(*shape)
        self.gate = 1.0

    def forward(self, x):
        return self.gate * super().forward(x)


class LowRank(nn.Linear):  # an adapter whose second factor starts from zeros
    def __init__(self, *shape):
        super().__init__(*shape)
        self.up, self.down = nn.Parameter(torch.ones(2, 32)), nn.Parameter(torch.zeros(32, 2))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.up), self.down)


class Helpful(nn.Linear):
    def scaled(self, factor):
        return self.weight * factor


@pytest.mark.parametrize("kind", [Plain, Spelled])
@pytest.mark.parametrize("bias", [True, False])
def test_a_subclass_that_computes_what_linear_does_is_taken(kind, bias):
    torch.manual_seed(0)
    prepared, x = prepare_qat(nn.Sequential(kind(32, 32, bias)), W4), torch.randn(3, 32)
    assert prepared.quantization.layers == ["0"]
    assert torch.equal(convert(prepared)(x), prepared(x))


@pytest.mark.parametrize("kind", [Halved, Clipped, Noisy, Unbiased, Gated, LowRank])
def test_a_subclass_that_computes_something_else_is_named(kind):
    why = f"{kind.__name__} is a subclass with a forward of its own"
    assert (
        prepare_qat(nn.Sequential(kind(32, 32), nn.Linear(32, 2)), W4).quantization.skipped["0"]
        == why
    )
    with pytest.raises(NothingToQuantize, match=f"0: {why}"):
        prepare_qat(nn.Sequential(kind(32, 32)), W4)


def test_a_subclass_with_methods_keeps_them():
    record = prepare_qat(nn.Sequential(Helpful(32, 32), nn.Linear(32, 2)), W4).quantization
    assert record.skipped == {"0": "Helpful is a subclass with methods of its own"}


class Times(nn.Embedding):
    def __init__(self, *shape, scale):
        super().__init__(*shape)
        self.scale = scale

    def forward(self, ids):
        return super().forward(ids) * self.scale


class Rooted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * self.embedding_dim**0.5


class Normed(nn.Embedding):
    def forward(self, ids):
        return F.normalize(super().forward(ids), dim=-1)


class Moved(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("build", "factor"),
    [(lambda: Times(20, 32, scale=1.7), 1.7), (lambda: Rooted(20, 32), 32**0.5)],
)
def test_an_embedding_times_a_constant_is_rounded_and_multiplied(build, factor, dtype):
    torch.manual_seed(0)
    model, ids = nn.Sequential(build(), nn.Linear(32, 4)).to(dtype), torch.arange(20)
    state = torch.get_rng_state()
    prepared = prepare_qat(model, W4, embeddings=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert prepared.quantization.layers == ["0", "1"]
    assert prepared[0].factor == pytest.approx(factor)
    rows = prepared[0].quantizer(prepared[0].weight)
    assert torch.equal(prepared[0](ids), rows * factor)
    converted = convert(prepared)
    assert torch.equal(converted(ids), prepared(ids))
    assert converted.half()[0].factor.dtype == torch.float32


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (Normed(20, 32), "Normed is a subclass with a forward of its own"),
        (Moved(20, 32), "Moved is a subclass with a forward of its own"),
        (nn.Embedding(20, 32, max_norm=1.0), "max_norm rescales its rows whenever they"),
    ],
)
def test_other_embeddings_stay_with_a_reason(table, why):
    model = nn.Sequential(table, nn.Linear(32, 2))
    assert prepare_qat(model, W4, embeddings=True).quantization.skipped["0"].startswith(why)
    assert prepare_qat(model, W4).quantization.skipped["0"] == "embedding (embeddings=False)"


def test_every_matrix_that_stays_is_listed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.free, self.scale = nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.ones(8))
            self.conv, self.rnn = nn.Conv1d(4, 4, 3), nn.GRU(8, 8)
            self.pair, self.norm = nn.Bilinear(8, 8, 8), nn.LayerNorm(8)
            self.bag, self.late = nn.EmbeddingBag(5, 8), nn.LazyLinear(8)
            self.normed = weight_norm(nn.Linear(8, 8))
            self.last = nn.Linear(32, 2)

    record = prepare_qat(Model(), W4).quantization
    of_class = "a {}, which prepare_qat does not round".format
    assert record.layers == ["last"]
    assert record.skipped.pop("late").startswith("it has no weight before its first batch")
    assert record.skipped.pop("normed").startswith("its weight is computed by a parametrization")
    assert record.skipped == {
        "free": of_class("matrix of Model"),
        "conv": of_class("Conv1d"),
        "rnn.weight_ih_l0": of_class("matrix of GRU"),
        "rnn.weight_hh_l0": of_class("matrix of GRU"),
        "pair": of_class("Bilinear"),
        "bag": of_class("EmbeddingBag"),
    }
    skipped = prepare_qat(Model(), W4, skip=["conv", "late"]).quantization.skipped
    assert skipped["conv"] == "skipped by 'conv'"


def test_fused_experts_are_listed_once_they_are_skipped():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.zeros(4, 8, 8))

    model = nn.ModuleDict({"attention": nn.Linear(32, 8), "experts": Experts()})
    record = prepare_qat(model, W4, skip=["experts"]).quantization
    assert record.skipped == {"experts.gate_up": "skipped by 'experts'"}


def test_a_long_report_takes_one_line_per_kind_and_then_stops():
    skipped = {f"layers.{i}.{key}": "skipped by 'layers'" for key in "abc" for i in range(30)}
    report = str(Quantization(W4, "lsq", ["head"], skipped)).splitlines()
    assert report[0].endswith("90 stay in floating point:")
    assert report[1:] == [f"  layers.*.{key} (30): skipped by 'layers'" for key in "abc"]
    others = {f"a{chr(97 + i)}": f"tied to layers.{i}" for i in range(25)}
    assert str(Quantization(W4, "lsq", ["head"], others)).splitlines()[-1] == (
        "  and 5 more, in `quantization.skipped`"
    )


def test_the_report_reads_as_sentences():
    record = Quantization(W4, "absmax", ["a", "b"])
    assert str(record) == (
        "2 layers quantized (4 bits, group size 32, absmax); 0 stay in floating point"
    )
