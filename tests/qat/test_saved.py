"""The saved file: exact on the way back, small, and refused when it is not what was written."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from companion import (
    W2,
    W3,
    W4,
    W4A8,
    W8,
    W8A8,
    Activations,
    QuantScheme,
    convert,
    load_pretrained,
    load_quantized,
    prepare_qat,
    save_quantized,
)
from companion.errors import DamagedFile, UnsupportedModel, WrongStage
from companion.qat.saved import CONFIG, KEY, WEIGHTS


def model(out: int = 8, **options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64, **options), nn.LayerNorm(64), nn.Linear(64, out))


def inputs() -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(tmp_path):
    return save_quantized(convert(prepare_qat(model(), W4)), tmp_path / "a" / "b")


SCHEMES = [W8, W4, W3, W2, W4A8, W8A8, QuantScheme(4, 64), QuantScheme(5, None, torch.float32),
           QuantScheme(4, 32, torch.bfloat16, Activations(7, "block", True, (-3, 9)))]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(tmp_path, scheme, dtype):
    converted = convert(prepare_qat(model().to(dtype), scheme, skip=["2"]))
    start = model()
    before = copy.deepcopy(start.state_dict())
    loaded = load_quantized(save_quantized(converted, tmp_path), start)
    assert torch.equal(loaded(inputs().to(dtype)), converted(inputs().to(dtype)))
    assert loaded.quantization == converted.quantization
    assert all(torch.equal(before[k], v) for k, v in start.state_dict().items())
    assert type(start[0]) is nn.Linear
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    state = loaded.state_dict()
    assert {k: (v.dtype, v.tolist()) for k, v in converted.state_dict().items()} == {
        k: (v.dtype, v.tolist()) for k, v in state.items()
    }


def test_each_tensor_keeps_its_own_type(tmp_path):
    mixed = model().bfloat16()
    mixed[1] = nn.LayerNorm(64)
    mixed[1].weight.data += 1e-3  # lost in bfloat16
    converted = convert(prepare_qat(mixed, W4))
    loaded = load_quantized(save_quantized(converted, tmp_path), mixed)
    assert loaded[1].weight.dtype == torch.float32
    assert torch.equal(loaded[1].weight, mixed[1].weight)


def test_a_layer_under_two_names_is_saved_once(tmp_path):
    torch.manual_seed(0)
    shared = nn.Linear(64, 64)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    converted = convert(prepare_qat(net, W4))
    loaded = load_quantized(save_quantized(converted, tmp_path), net)
    assert sorted(load_file(tmp_path / WEIGHTS)) == ["0.bias", "0.integers", "0.scale"]
    assert loaded[0] is loaded[2]
    assert torch.equal(loaded(inputs()), converted(inputs()))


def test_saving_again_overwrites_and_writes_the_same_bytes(saved):
    first = [(saved / name).read_bytes() for name in (WEIGHTS, CONFIG)]
    converted = load_quantized(saved, model())
    save_quantized(convert(prepare_qat(model(), W2)), saved)
    assert load_quantized(saved, model()).quantization.scheme == W2
    save_quantized(converted, str(saved))
    assert [(saved / name).read_bytes() for name in (WEIGHTS, CONFIG)] == first
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(("scheme", "most"), [(W4, 0.15), (W3, 0.12), (W2, 0.09)])
def test_the_file_is_as_small_as_its_integers(tmp_path, scheme, most):
    net = nn.Sequential(nn.Linear(512, 512, bias=False))
    save_quantized(convert(prepare_qat(net, scheme)), tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size
    assert size < most * 512 * 512 * 4
    assert size < 512 * 512 * scheme.bits_per_weight(512) / 8 + 512  # and a short header


@pytest.mark.parametrize(("scheme", "most"), [(W4, 0.15), (W3, 0.12), (W2, 0.09)])
def test_share_of_the_bytes_of_linear_layers(scheme, most, tmp_path):
    model = load_pretrained("docs-lm")
    converted = convert(prepare_qat(model, scheme, embeddings=True))
    save_quantized(converted, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for name in {n.rpartition(".")[0] for n in tensors if n.endswith(".integers")}:
        layer = converted.get_submodule(name)
        stored = tensors[f"{name}.integers"].nbytes + tensors[f"{name}.scale"].nbytes
        assert stored <= most * 4 * layer.rows * layer.columns
    # the whole file too: next to nothing of this model stays in floating point
    assert (tmp_path / WEIGHTS).stat().st_size <= most * 4 * model.num_parameters()


def test_only_a_converted_model_can_be_saved(tmp_path):
    for early in (model(), prepare_qat(model(), W4)):
        with pytest.raises(WrongStage, match="convert it first"):
            save_quantized(early, tmp_path)
    assert not list(tmp_path.iterdir())


def edit(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "weights truncated": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]),
    "weights empty": lambda f: (f / WEIGHTS).write_bytes(b""),
    "last byte": lambda f: flip(f / WEIGHTS, -1),
    "byte of the header": lambda f: flip(f / WEIGHTS, 20),
    "weights longer": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"\0"),
    "weights missing": lambda f: (f / WEIGHTS).unlink(),
    "config missing": lambda f: (f / CONFIG).unlink(),
    "config empty": lambda f: (f / CONFIG).write_text(""),
    "config truncated": lambda f: (f / CONFIG).write_bytes((f / CONFIG).read_bytes()[:-20]),
    "config not text": lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{}"),
    "config a list": lambda f: (f / CONFIG).write_text("[]"),
    "config of a float model": lambda f: (f / CONFIG).write_text('{"model_type": "llama"}'),
    "other bits": lambda f: edit(f / CONFIG, lambda c: c[KEY]["scheme"].update(weight_bits=3)),
    "other hash": lambda f: edit(f / CONFIG, lambda c: c[KEY].update(sha256="0" * 64)),
    "no hash": lambda f: edit(f / CONFIG, lambda c: c[KEY].pop("sha256")),
    "own hash gone": lambda f: edit(f / CONFIG, lambda c: c[KEY].pop("config_sha256")),
    "model field": lambda f: edit(f / CONFIG, lambda c: c.update(hidden_act="gelu")),
    "other folder's weights": lambda f: save_quantized(
        convert(prepare_qat(model(), W2)), f.parent / "other"
    ) and (f.parent / "other" / WEIGHTS).replace(f / WEIGHTS),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_in_one_clear_line(saved, damage):
    load_quantized(saved, model())
    DAMAGE[damage](saved)
    with pytest.raises(DamagedFile, match=r"[Cc]opy|give the folder") as error:
        load_quantized(saved, model())
    assert str(saved) in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_another_format_is_refused(saved, monkeypatch):
    monkeypatch.setattr("companion.qat.saved.FORMAT", 2)
    with pytest.raises(DamagedFile, match="has format 1; this version reads 2"):
        load_quantized(saved, model())


def test_spaces_in_the_config_do_not_matter(saved):
    edit(saved / CONFIG, lambda config: None)
    load_quantized(saved, model())


def test_a_class_of_ones_own_needs_the_model(saved):
    with pytest.raises(UnsupportedModel, match=r"Sequential is no model class.*model=\.\.\."):
        load_quantized(saved)


OTHERS = {
    "other outputs": lambda: model(9),
    "no bias": lambda: model(bias=False),
    "a layer more": lambda: nn.Sequential(*model(), nn.Linear(8, 8)),
    "a layer less": lambda: model()[:2],
    "other names": lambda: nn.ModuleDict({"a": nn.Linear(64, 64)}),
    "no weight there": lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 8)),
    "a norm there": lambda: nn.Sequential(nn.LayerNorm(64), nn.LayerNorm(64), nn.Linear(64, 8)),
    "a convolution there": lambda: nn.Sequential(nn.Conv2d(1, 1, 3), *model()[1:]),
    "one layer alone": lambda: nn.Linear(64, 64),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_model_of_another_architecture_is_refused(saved, other):
    with pytest.raises(UnsupportedModel, match="does not fit the file, which holds a Sequential"):
        load_quantized(saved, OTHERS[other]())
