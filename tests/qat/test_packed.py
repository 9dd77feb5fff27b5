"""Layers of packed integers: shapes, types, the int8 kernel and what it does to a batch."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from companion import (
    W2,
    W3,
    W4,
    W4A8,
    W8,
    W8A8,
    QuantScheme,
    convert,
    model_bytes,
    prepare_qat,
    release_cache,
    unpack,
)
from companion.qat import packed
from companion.qat.packed import (
    DynamicInt8Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    leaves_room,
)
from tests.numerics.test_packing import PeakBytes


def pair(scheme: QuantScheme, columns: int = 64, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    prepared = prepare_qat(nn.Sequential(nn.Linear(columns, 24, **options)), scheme).eval()
    return prepared, convert(prepared)


def inputs(rows: int = 16, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("scheme", "columns"), [(W4, 64), (W3, 64), (QuantScheme(4, None), 50),
                                                 (QuantScheme(3, 10), 50), (W8, 96)])  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_buffers_hold_integers_and_scales_and_nothing_else(scheme, columns, bias):
    prepared, converted = pair(scheme, columns, bias=bias)
    layer = converted[0]
    groups = columns // (scheme.group_size or columns)
    assert (layer.integers.dtype, layer.scale.dtype) == (torch.uint8, torch.float16)
    assert layer.integers.shape == (24, -(-columns // 8) * scheme.weight_bits)
    assert layer.scale.shape == (24, groups)
    assert list(layer.state_dict()) == ["bias", "integers", "scale"][0 if bias else 1 :]
    q = unpack(layer.integers, scheme.weight_bits, columns)
    assert torch.equal(q, prepared[0].quantizer.integers(prepared[0].weight)[0])
    assert (layer.in_features, layer.out_features) == (columns, 24)
    assert torch.equal(
        layer(inputs(3, columns)), F.linear(inputs(3, columns), layer.weight, layer.bias)
    )


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("scheme", [W4, W4A8, QuantScheme(2, None)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv1d_computes_like_the_linear_layer_it_becomes(rows, scheme, dtype):
    torch.manual_seed(0)
    prepared = prepare_qat(nn.Sequential(Conv1D(6, 64)).to(dtype), scheme)
    assert prepared[0].matrix.shape == (6, 64)
    x = inputs(rows).to(dtype)
    assert torch.equal(convert(prepared)(x), prepared(x))


def test_layers_show_themselves():
    prepared = prepare_qat(nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 32), Conv1D(6, 32)), W4,
                           embeddings=True)  # fmt: skip
    for name in ("FakeQuantEmbedding(", "FakeQuantLinear(", "FakeQuantConv1D(", "4 bits"):
        assert name in repr(prepared)
    assert "(2): QuantizedLinear(6, 32, 4 bits)" in repr(convert(prepared))


def test_change_of_type_keeps_what_is_stored():
    _, converted = pair(W4)
    integers, scale = converted[0].integers.clone(), converted[0].scale.clone()
    converted.to(torch.bfloat16)
    assert converted[0].scale.dtype == torch.float16
    assert torch.equal(converted[0].scale, scale)
    assert torch.equal(converted[0].integers, integers)
    assert converted[0].weight.dtype == converted[0].bias.dtype == torch.bfloat16
    assert converted(inputs().bfloat16()).dtype == torch.bfloat16
    bfloat16_scales = pair(QuantScheme(4, 32, torch.bfloat16))[1].half()
    assert bfloat16_scales[0].scale.dtype == torch.bfloat16
    assert torch.equal(converted.float()[0].scale, scale)
    assert converted[0].weight.dtype == torch.float32


def test_bfloat16_weights_are_float32_weights_rounded_once():
    _, converted = pair(W4)
    exact = converted[0].weight
    assert torch.equal(converted.bfloat16()[0].weight, exact.bfloat16())


# Between simulation and kernel lie the order of at most 64 float32 sums, and one rounding of their
# product with the scales: 64 * 2**-24 of the largest.
RESOLUTION = 4e-6
SHAPES = [(64,), (1, 64), (16, 64), (2, 5, 64), (1, 1, 1, 64)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_int8_kernel_agrees_with_the_simulation_at_any_loudness(shape, bias):
    prepared, converted = pair(W8A8, bias=bias)
    assert type(converted[0]) is DynamicInt8Linear
    generator = torch.Generator().manual_seed(2)
    for exponent in range(-8, 5):
        for offset in (0, 1, -3):
            x = (torch.randn(shape, generator=generator) + offset) * 10.0**exponent
            expected, result = prepared(x), converted(x)
            assert result.shape == (*shape[:-1], 24)
            assert (result - expected).abs().max() <= RESOLUTION * expected.abs().max()
            assert torch.equal(QuantizedLinear.forward(converted[0], x), expected)
    assert converted[0]._kept.of[0] == "kernel"  # it was the kernel that answered


@torch.no_grad()
def test_an_input_on_a_tie_does_not_leave_the_grid():
    """-11.5 steps and 115.5: both round to even, and the zero point puts the larger on 128."""
    prepared, converted = pair(W8A8)
    x = torch.linspace(-11.5, 115.5, 64).repeat(2, 1) * 2.0**-4
    expected = prepared(x)
    assert (converted(x) - expected).abs().max() <= RESOLUTION * expected.abs().max()


@torch.no_grad()
def test_inputs_that_a_kernel_may_trip_over():
    prepared, converted = pair(W8A8)
    for shape in [(0, 64), (2, 0, 64), (0, 3, 64)]:
        empty = torch.zeros(shape)
        assert converted(empty).shape == prepared(empty).shape == (*shape[:-1], 24)
    silence = converted(torch.zeros(3, 64))
    assert torch.equal(silence, converted[0].bias.expand(3, 24))
    assert torch.equal(silence, prepared(torch.zeros(3, 64)))
    for size in (1e-30, 1e30):
        x = size * inputs(3)
        expected = prepared(x)
        assert expected.isfinite().all()
        assert (converted(x) - expected).abs().max() <= RESOLUTION * expected.abs().max()
    for bad in (torch.nan, torch.inf):
        x = inputs(3)
        x[1, 7] = bad
        assert converted(x).isnan().all()  # one scale for all, so all are lost, and it shows
        assert prepared(x).isnan().all()


def test_a_gradient_reaches_the_inputs_of_a_converted_layer():
    prepared, converted = pair(W8A8)
    gradients = []
    for model in (prepared, converted):
        x = inputs(3).requires_grad_()
        model(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("scheme", [W8A8, W4A8, W4, W3], ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_layers_compile_into_one_graph(scheme, backend):
    for model in pair(scheme):
        torch._dynamo.reset()
        expected = [model(inputs(rows)) for rows in (4, 7, 1)]
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for x, y in zip((4, 7, 1), expected, strict=True):
            assert (compiled(inputs(x)) - y).abs().max() <= RESOLUTION * y.abs().max()


@pytest.mark.parametrize("scheme", [W8A8, W4], ids=str)
@torch.no_grad()
def test_a_converted_layer_is_exported_after_it_ran(scheme):
    converted = pair(scheme)[1]
    expected = converted(inputs(5))
    rows = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(converted, (inputs(4),), dynamic_shapes=rows)
    result = program.module()(inputs(5))
    assert (result - expected).abs().max() <= RESOLUTION * expected.abs().max()


def test_only_the_kernels_own_scheme_runs_on_it():
    assert type(pair(W4A8)[1][0]) is QuantizedLinear
    grouped = QuantScheme(8, 32, activations=W8A8.activations)
    assert type(pair(grouped)[1][0]) is QuantizedLinear


def test_with_one_scale_per_tensor_a_row_depends_on_its_batch():
    x = inputs()
    loud = torch.cat([x, 40 * x[:1]])
    for scheme, depends in ((W8A8, True), (W4A8, False), (W4, False)):
        for model in pair(scheme):
            moved = (model(loud)[:16] - model(x)).abs().max() / model(x).abs().max()
            assert moved > 0.01 if depends else moved < 1e-6


@torch.no_grad()
def test_without_the_kernel_the_simulation_is_computed(monkeypatch):
    prepared, converted = pair(W8A8)
    expected = prepared(inputs())
    on_kernel = converted(inputs())
    # what torch.backends.quantized.supported_engines reads: a build without fbgemm, as on ARM
    monkeypatch.setattr(torch._C, "_supported_qengines", lambda: [2])
    assert torch.backends.quantized.supported_engines == ["qnnpack"]
    assert torch.equal(converted(inputs()), expected)
    monkeypatch.undo()
    assert not torch.equal(on_kernel, expected)  # else the line above could not have failed
    assert torch.equal(converted(inputs()), on_kernel)


def test_the_kernels_own_copy_follows_copies_types_and_loading():
    converted = pair(W8A8)[1]
    before = converted(inputs())
    assert torch.equal(copy.deepcopy(converted)(inputs()), before)
    assert torch.equal(
        converted.bfloat16()(inputs().bfloat16()).float(), converted(inputs().bfloat16()).float()
    )
    assert torch.equal(converted.float()[0].scale, pair(W8A8)[1][0].scale)
    converted = pair(W8A8)[1]
    converted(inputs())
    other = copy.deepcopy(converted)
    other[0].integers.neg_()
    other[0].bias.zero_()
    converted.load_state_dict(other.state_dict())
    assert torch.equal(converted(inputs()), copy.deepcopy(other)(inputs()))
    assert not torch.equal(converted(inputs()), before)


def test_the_engine_in_use_is_left_alone():
    before = torch.backends.quantized.engine
    pair(W8A8)[1](inputs())
    assert torch.backends.quantized.engine == before


def test_embedding_unpacks_the_rows_it_is_asked_for():
    torch.manual_seed(0)
    prepared = prepare_qat(nn.Sequential(nn.Embedding(30, 64)), W4, embeddings=True)
    converted = convert(prepared)
    ids = torch.tensor([[3, 29, 3], [0, 1, 2]])
    assert isinstance(converted[0], QuantizedEmbedding)
    assert converted(ids).shape == (2, 3, 64)
    assert torch.equal(converted(ids), prepared(ids))
    assert torch.equal(converted(ids), converted[0].weight[ids])


CHANGES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "half and back": lambda m: m.half().float(),
    "to a type": lambda m: m.to(torch.bfloat16),
    "to a device and a type": lambda m: m.to("cpu", torch.float16),
}
STORED = [W2, W3, W4, W8, W4A8, W8A8, QuantScheme(5, None, torch.bfloat16)]


@pytest.mark.parametrize("scheme", STORED, ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_integers_and_scales_survive(scheme, change):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 32), Conv1D(6, 32))
    converted = convert(prepare_qat(net, scheme, embeddings=True))
    stored = {n: b.clone() for n, b in converted.named_buffers()}
    assert len(stored) == 6
    changed = CHANGES[change](converted)
    assert {n: b.dtype for n, b in changed.named_buffers()} == {
        n: b.dtype for n, b in stored.items()
    }
    assert all(torch.equal(stored[n], b) for n, b in changed.named_buffers())
    assert changed(torch.tensor([[1, 2]])).dtype == changed[1].dtype == changed[1].bias.dtype


@pytest.mark.parametrize("scheme", STORED, ids=str)
def test_a_state_dict_brings_integers_back(scheme):
    first, second = (convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), scheme)) for _ in "ab")
    x = inputs(3)
    assert not torch.equal(first(x), second(x))
    for assign in (False, True):
        third = copy.deepcopy(second)
        third.load_state_dict(copy.deepcopy(first.state_dict()), assign=assign)
        assert torch.equal(third(x), first(x))
        assert third[0].integers.dtype == torch.uint8
        assert third[0].scale.dtype == scheme.scale_dtype


@pytest.mark.parametrize("scheme", STORED, ids=str)
def test_a_layer_without_memory_keeps_its_types_and_can_be_filled(scheme):
    converted = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), scheme))
    x, expected = inputs(3), converted(inputs(3))
    state = copy.deepcopy(converted.state_dict())
    empty = copy.deepcopy(converted).to("meta")
    assert all(t.is_meta and t.dtype == state[n].dtype for n, t in empty.state_dict().items())
    assert empty(x.to("meta")).shape == (3, 8)
    for filled in (copy.deepcopy(empty).to_empty(device="cpu"), empty):
        filled.load_state_dict(state, assign=True)
        assert torch.equal(filled(x), expected)


def test_a_factor_keeps_its_type_like_what_is_stored():
    scheme, factor = W4, torch.tensor(11.3137)
    for changed in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to("meta")):
        table = changed(QuantizedEmbedding(9, 64, scheme=scheme, factor=factor))
        assert (table.factor.dtype, table.factor.shape) == (torch.float32, ())
        assert table.factor.is_meta or torch.equal(table.factor, factor)
    assert table.to_empty(device="cpu").factor.dtype == torch.float32


@pytest.mark.parametrize("scheme", [W2, W4, W8, W4A8, W8A8], ids=str)
@pytest.mark.parametrize("method", ["absmax", "mse", "lsq"])
@torch.no_grad()
def test_groups_of_zeros_stay_zeros_and_spoil_nobody(scheme, method):
    layer = nn.Linear(64, 8)
    layer.weight[:, :32] = 0  # where rows are one group, half a row
    layer.weight[3] = 0
    prepared = prepare_qat(nn.Sequential(layer), scheme, method).eval()
    weight = convert(prepared)[0].weight
    assert torch.equal(weight[:, :32], torch.zeros(8, 32))
    assert torch.equal(weight[3], torch.zeros(64))
    rest = [row for row in range(8) if row != 3]
    given = layer.weight[rest, 32:]
    absmax = convert(prepare_qat(nn.Sequential(layer), scheme, "absmax"))[0].weight[rest, 32:]
    step = given.abs().amax(-1, keepdim=True) / (2**scheme.weight_bits - 1) * 2
    # half a step; and as many of them as there are to the largest, each off by a float16's half
    # unit in its last place
    most = step * (0.5 + 2.0 ** (scheme.weight_bits - 1) * 2**-11)
    assert ((absmax - given).abs() <= most).all()
    # the searched ranges start from absmax's, so that they lose no more than it does
    assert (weight[rest, 32:] - given).square().sum() <= (absmax - given).square().sum()
    x = inputs(5)
    assert torch.equal(convert(prepared)(x)[:, 3], layer.bias[3].expand(5))


def kept(layer: nn.Module) -> torch.Tensor | None:
    return None if layer._kept is None else layer._kept.value


KEPT = [W4, W3, W2, W8, W4A8, QuantScheme(5, 16)]


@pytest.mark.parametrize("scheme", KEPT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_kept_matrix_changes_no_bit_and_stays(scheme, dtype):
    prepared = prepare_qat(nn.Sequential(nn.Linear(64, 24)).to(dtype), scheme).eval()
    with_cache, without = convert(prepared), convert(prepared, cache=False)
    x = inputs().to(dtype)
    for _ in range(2):
        assert torch.equal(with_cache(x), without(x))
        assert torch.equal(with_cache(x), prepared(x))
    matrix = kept(with_cache[0])
    assert matrix.dtype == dtype
    assert torch.equal(matrix, without[0].weight)
    with_cache(x)
    assert kept(with_cache[0]) is matrix  # not made again
    assert kept(without[0]) is None


def test_values_are_integers_times_scales_rounded_once():
    generator = torch.Generator().manual_seed(0)
    for bits in range(2, 9):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            layer = pair(QuantScheme(bits, 16), 80)[1].to(dtype)[0]
            layer.scale.copy_(torch.rand(24, 5, generator=generator))
            q = unpack(layer.integers, bits, 80).double().unflatten(-1, (5, 16))
            exact = (q * layer.scale.double()[..., None]).flatten(-2)  # 8 and 11 bits: no rounding
            assert torch.equal(layer.weight, exact.to(dtype))


CHANGES_OF_WEIGHTS = {
    "in place": lambda layer, other: layer.integers.copy_(other.integers),
    "scales in place": lambda layer, other: layer.scale.mul_(2),
    "another buffer": lambda layer, other: setattr(layer, "integers", other.integers.clone()),
    "state": lambda layer, other: layer.load_state_dict(other.state_dict()),
    "assigned state": lambda layer, other: layer.load_state_dict(other.state_dict(), assign=True),
    "type": lambda layer, other: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES_OF_WEIGHTS)
@pytest.mark.parametrize("scheme", [W4, W8A8], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_what_is_kept_follows_what_is_stored(scheme, change, inference):
    torch.manual_seed(0)
    first, second = (convert(prepare_qat(nn.Linear(64, 24), scheme)) for _ in "ab")
    with torch.inference_mode(inference):
        before = first(inputs())
    with torch.no_grad():
        CHANGES_OF_WEIGHTS[change](first, second)
        x = inputs().to(first.dtype)
        fresh = copy.deepcopy(first)
        assert torch.equal(first(x), fresh(x))
        assert change == "type" or not torch.equal(first(x), before)


def test_what_is_kept_is_no_part_of_the_model():
    converted = pair(W4)[1]
    states = [converted.state_dict().keys(), model_bytes(converted), len(pickle.dumps(converted))]
    converted(inputs())
    assert kept(converted[0]).nbytes == 4 * 24 * 64
    assert states == [
        converted.state_dict().keys(), model_bytes(converted), len(pickle.dumps(converted))
    ]  # fmt: skip
    assert kept(copy.deepcopy(converted)[0]) is None
    assert kept(pickle.loads(pickle.dumps(converted))[0]) is None
    assert release_cache(converted) == 4 * 24 * 64
    assert kept(converted[0]) is None
    assert release_cache(converted) == 0


def test_nothing_is_kept_while_training_nor_by_compilers_nor_where_memory_is_short(monkeypatch):
    prepared, converted = pair(W4)
    expected = prepared(inputs())
    assert torch.equal(converted.train()(inputs()), expected)
    assert kept(converted[0]) is None
    torch.export.export(converted.eval(), (inputs(),))
    assert kept(converted[0]) is None
    monkeypatch.setattr(packed, "_host_memory", lambda: (1000, 2000))
    assert leaves_room(500, torch.device("cpu"))
    assert not leaves_room(501, torch.device("cpu"))
    assert torch.equal(converted(inputs()), expected)
    assert kept(converted[0]) is None  # 6,144 bytes
    monkeypatch.undo()
    converted(inputs())
    assert kept(converted[0]) is not None


def test_a_matrix_kept_in_inference_mode_serves_gradients_later():
    prepared, converted = pair(W4)
    with torch.inference_mode():
        converted(inputs())
    gradients = []
    for model in (prepared, converted):
        x = inputs().requires_grad_()
        model(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@torch.no_grad()
def test_the_kernel_and_a_matrix_are_never_both_kept():
    converted = pair(W8A8)[1]
    converted(inputs())
    assert converted[0]._kept.of[0] == "kernel"
    with torch.enable_grad():
        converted(inputs().requires_grad_())  # what training simulated
    assert converted[0]._kept.of[0] == "kernel"


LARGE = (2304, 576)  # rows and columns: two blocks, the second one smaller


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 576), (2, 7, 576), (0, 576), (576,)], ids=str)
@torch.no_grad()
def test_blocks_of_rows_compute_what_the_whole_matrix_does(shape, bias):
    torch.manual_seed(0)
    converted = convert(prepare_qat(nn.Linear(*LARGE[::-1], bias=bias), W4, "absmax"), cache=False)
    assert len(converted._blocks(packed._BLOCK)) == 2
    x = torch.randn(shape)
    expected = F.linear(x, converted.weight, converted.bias)
    y = converted(x)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    # a matrix product may add 576 terms in another order where it has fewer rows
    most = 576 * 2**-24 * (x.abs() @ converted.weight.abs().t()).max() if x.numel() else 0
    assert x.numel() == 0 or (y - expected).abs().max() <= most
    with torch.autocast("cpu", torch.bfloat16):
        assert converted(x).dtype == F.linear(x, converted.weight).dtype == torch.bfloat16
    with torch.enable_grad():
        assert converted(x.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("scheme", [W2, W3, W4, W8, QuantScheme(5, None)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_dequantizing_takes_little_more_than_its_result(scheme, dtype):
    layer = convert(prepare_qat(nn.Linear(*LARGE[::-1]), scheme, "absmax"), cache=False).to(dtype)
    weights = LARGE[0] * LARGE[1]
    with PeakBytes() as whole:
        assert layer.weight.shape == LARGE
    assert dtype.itemsize * weights <= whole.peak <= (dtype.itemsize + 2) * weights
    with PeakBytes() as forward:
        y = layer(torch.ones(1, 576, dtype=dtype))
    # of one block the integers, their products in float32, and these in the type of the model
    assert y.nbytes < forward.peak < 1.1 * (1 + 4 + dtype.itemsize % 4) * packed._BLOCK
