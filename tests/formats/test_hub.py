"""The saved file: exact on the way back, small, and refused when it is not what was written."""

import copy
import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
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
    model_bytes,
    prepare_qat,
    save_quantized,
)
from companion.data.biencoder import BiEncoder
from companion.errors import DamagedFile, SourceUnavailable, UnsupportedModel, WrongStage
from companion.files import sha256
from companion.formats.hub import CONFIG, GENERATION, INDEX, WEIGHTS, is_saved
from companion.numerics.packing import narrowest
from companion.qat.packed import Packed
from companion.qat.saved import keep_types

KEY = "quantization_config"


def model(out: int = 8, **options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64, **options), nn.LayerNorm(64), nn.Linear(64, out))


def inputs() -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


IDS = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(2))


def llama(**config) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    settings = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64,
                "num_hidden_layers": 1, "num_attention_heads": 4, "eos_token_id": 2}  # fmt: skip
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**settings, **config})).eval()


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


def test_a_later_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("companion.formats.hub.FORMAT", 4)
    save_quantized(convert(prepare_qat(llama(), W4)), tmp_path)
    monkeypatch.undo()
    for call in (load_quantized, hf.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(DamagedFile, match="has format 4; this version reads 1 to 3"):
            call(tmp_path)


def write_as_before(model: nn.Module, folder: Path) -> Path:
    """`save_quantized` as it was: formats 1 and 2, which transformers refused."""
    state = model.state_dict()
    tensors, aliases, first = {}, {}, {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor.detach()
    parameters = dict(model.named_parameters())
    stored = {n: narrowest(t) if n in parameters else t for n, t in tensors.items()}
    narrowed = {n: dtype_name(t.dtype) for n, t in tensors.items() if stored[n].dtype != t.dtype}
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    record = model.quantization
    packed = {n: m for n, m in model.named_modules() if isinstance(m, Packed)}
    description = {
        "format": 2 if narrowed else 1,
        "class": type(model).__name__,
        "scheme": record.scheme.to_dict(),
        "method": record.method,
        "layers": record.layers,
        "skipped": record.skipped,
        "aliases": aliases,
        "computes": {n: dtype_name(m.dtype) for n, m in packed.items()},
        "buffers": {n: dtype_name(b.dtype) for n, b in model.named_buffers() if n not in state},
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "sha256": sha256(folder / WEIGHTS),
    } | ({"narrowed": narrowed} if narrowed else {})
    if getattr(model, "generation_config", None) is not None:
        (folder / GENERATION).write_text(model.generation_config.to_json_string())
        description["generation_sha256"] = sha256(folder / GENERATION)
    config = model.config.to_dict() if hasattr(model, "config") else {}
    config["quantization_config"] = {
        "library": "companion",
        "open_with": "companion.load_quantized",
    }
    config = json.loads(json.dumps({**config, "companion": description}, default=str))
    text = json.dumps(config, sort_keys=True).encode()
    config["companion"]["config_sha256"] = hashlib.sha256(text).hexdigest()
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return folder


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, 1), (torch.bfloat16, 2)])
@pytest.mark.parametrize("embeddings", [True, False])
def test_folders_of_before_still_open(tmp_path, dtype, kept, embeddings):
    start = llama(tie_word_embeddings=True, vocab_size=200)
    with torch.no_grad():
        for p in start.parameters():
            p.copy_(p.to(dtype))
    start.generation_config = hf.GenerationConfig(**SETTINGS)
    converted = convert(prepare_qat(start, W4, embeddings=embeddings))
    folder = write_as_before(converted, tmp_path)
    assert json.loads((folder / CONFIG).read_text())["companion"]["format"] == (
        1 if embeddings else kept
    )
    for loaded in (load_quantized(folder), load_quantized(folder, start)):
        assert torch.equal(loaded(IDS).logits, converted(IDS).logits)
        assert loaded.quantization == converted.quantization
        assert loaded.generation_config.to_dict() == start.generation_config.to_dict()
        assert {n: t.dtype for n, t in loaded.state_dict().items()} == {
            n: t.dtype for n, t in converted.state_dict().items()
        }
    assert is_saved(folder)
    with pytest.raises(ValueError, match="quant_method"):
        hf.AutoModelForCausalLM.from_pretrained(folder)
    flip(folder / WEIGHTS, -1)
    with pytest.raises(DamagedFile, match="hash differs"):
        load_quantized(folder)


def test_a_folder_of_before_keeps_each_type(tmp_path):
    start = llama().bfloat16()
    start.model.norm.float().weight.data += 1e-3  # lost in bfloat16
    start.config.dtype = torch.bfloat16
    loaded = load_quantized(write_as_before(convert(prepare_qat(start, W4)), tmp_path))
    assert torch.equal(loaded.model.norm.weight, start.model.norm.weight)
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.norm.weight.dtype == torch.float32


def test_a_folder_of_before_of_ones_own_class_still_opens(tmp_path):
    converted = convert(prepare_qat(model(), W3))
    loaded = load_quantized(write_as_before(converted, tmp_path), model())
    assert torch.equal(loaded(inputs()), converted(inputs()))


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


SETTINGS = {"eos_token_id": [2, 7], "pad_token_id": 0, "repetition_penalty": 1.3, "do_sample": True,
            "temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_new_tokens": 12,
            "bad_words_ids": [[5], [6, 7]], "suppress_tokens": [3], "no_repeat_ngram_size": 2}  # fmt: skip


def test_generation_settings_come_back_and_are_heeded(tmp_path):
    start = llama()
    start.generation_config = hf.GenerationConfig(**SETTINGS)
    converted = convert(prepare_qat(start, W4))
    loaded = load_quantized(save_quantized(converted, tmp_path))
    assert loaded.generation_config.to_dict() == start.generation_config.to_dict()
    again = load_quantized(save_quantized(loaded, tmp_path / "again"), llama())  # a model given
    assert again.generation_config.to_dict() == start.generation_config.to_dict()
    texts = []
    for model in (converted, loaded, again):
        torch.manual_seed(1)
        texts.append(model.generate(IDS))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    # the token that comes first, made an end: generating stops there at once
    first = int(loaded.generate(IDS, do_sample=False)[0, IDS.shape[1]])
    start.generation_config = hf.GenerationConfig(eos_token_id=[2, first], max_new_tokens=12)
    stopping = load_quantized(
        save_quantized(convert(prepare_qat(start, W4)), tmp_path / "stopping")
    )
    greedy = stopping.generate(IDS, **{k: SETTINGS[k] for k in ("repetition_penalty",
        "bad_words_ids", "suppress_tokens", "no_repeat_ngram_size", "pad_token_id")})  # fmt: skip
    assert greedy.shape[1] == IDS.shape[1] + 1


def test_a_model_that_does_not_generate_writes_no_settings(saved):
    assert not (saved / GENERATION).exists()


GENERATION_DAMAGE = {
    "missing": lambda p: p.unlink(),
    "edited": lambda p: edit(p, lambda c: c.update(eos_token_id=3)),
    "empty": lambda p: p.write_text(""),
}


@pytest.mark.parametrize("damage", GENERATION_DAMAGE)
def test_damaged_generation_settings_are_refused(tmp_path, damage):
    save_quantized(convert(prepare_qat(llama(), W4)), tmp_path)
    GENERATION_DAMAGE[damage](tmp_path / GENERATION)
    with pytest.raises(DamagedFile, match=r"[Cc]opy"):
        load_quantized(tmp_path)


def test_what_stayed_float_keeps_the_bytes_of_its_checkpoint(tmp_path):
    """Loaded in float32, as training wants it, a bfloat16 checkpoint must not grow."""
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        llama(vocab_size=4000).to(dtype).save_pretrained(folder / "start")
        start = hf.AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
        converted = convert(prepare_qat(start, W4))
        loaded = load_quantized(save_quantized(converted, folder / "w4"))
        size = (folder / "w4" / WEIGHTS).stat().st_size
        assert size < 0.95 * (folder / "start" / WEIGHTS).stat().st_size
        assert load_file(folder / "w4" / WEIGHTS)["model.embed_tokens.weight"].dtype == dtype
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert loaded.config.dtype == torch.float32
        assert torch.equal(loaded(IDS).logits, converted(IDS).logits)
        names = 128 * len(converted.quantization.layers)  # of empty weights, for transformers
        assert model_bytes(converted) < size < model_bytes(converted) + names
        save_quantized(loaded, folder / "again")
        assert (folder / "again" / WEIGHTS).read_bytes() == (folder / "w4" / WEIGHTS).read_bytes()


def test_trained_values_are_kept_or_rounded_when_asked(tmp_path):
    start = llama(vocab_size=4000, tie_word_embeddings=True)
    with torch.no_grad():
        for p in start.parameters():
            p.copy_(p.bfloat16())
    prepared = prepare_qat(start, W4)
    with torch.no_grad():
        for p in prepared.parameters():
            p.mul_(1.0001)  # as a step of training would
    converted = convert(prepared)
    loaded = load_quantized(save_quantized(converted, tmp_path / "exact"))
    assert torch.equal(loaded(IDS).logits, converted(IDS).logits)
    rounded = keep_types(converted, start)
    loaded = load_quantized(save_quantized(rounded, tmp_path / "rounded"))
    assert torch.equal(loaded(IDS).logits, rounded(IDS).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    exact, small = ((tmp_path / f / WEIGHTS).stat().st_size for f in ("exact", "rounded"))
    assert exact - small == pytest.approx(2 * 4000 * 64, abs=256)


def test_a_bfloat16_model_says_so_when_it_comes_back(tmp_path):
    llama().bfloat16().save_pretrained(tmp_path / "start")
    start = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    loaded = load_quantized(save_quantized(convert(prepare_qat(start, W4)), tmp_path / "w4"))
    assert loaded.config.dtype == loaded.dtype == torch.bfloat16
    assert loaded.get_memory_footprint() < start.get_memory_footprint()


PEAK = """
import sys, torch
from pathlib import Path
import companion
from transformers import LlamaForCausalLM

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

for load in (companion.load_quantized, LlamaForCausalLM.from_pretrained):
    load(sys.argv[1])  # what is imported on the way
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    model = load(sys.argv[2])
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.view(-1).view(torch.uint8).max()  # pages of the file that were only promised
    print(status("VmHWM") - before)
    del model, tensor  # pages shared with the file go with it
"""


def test_loading_takes_little_more_memory_than_the_file(tmp_path):
    big = llama(vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=2)
    converted = convert(prepare_qat(big, W8, "absmax", embeddings=True))
    file = save_quantized(converted, tmp_path / "big") / WEIGHTS
    save_quantized(convert(prepare_qat(llama(), W4)), tmp_path / "small")
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "big")],
        check=True, capture_output=True, text=True)  # fmt: skip
    size = file.stat().st_size
    assert size > 17e6  # the float model would take four times as much
    peaks = [int(line) for line in result.stdout.split()]
    assert len(peaks) == 2
    assert all(0.9 * size < peak < 1.3 * size for peak in peaks), peaks


@pytest.mark.parametrize("cache", [True, False])
def test_a_loaded_model_keeps_its_matrices_if_asked(saved, cache):
    loaded = load_quantized(saved, model(), cache=cache)
    loaded(inputs())
    matrices = [m._kept is not None for m in loaded.modules() if hasattr(m, "integers")]
    assert matrices == [cache] * 2
    assert not load_quantized(saved, model())[0]._kept


def test_loading_draws_no_random_numbers_and_leaves_other_threads_their_weights(tmp_path):
    folder = save_quantized(convert(prepare_qat(llama(), W4)), tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    made, stop = [], threading.Event()

    def elsewhere() -> None:
        while not stop.is_set():
            made.append(nn.Linear(2, 2, bias=False).weight.is_meta)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    for _ in range(3):
        load_quantized(folder)
    stop.set()
    thread.join()
    assert made
    assert not any(made)
    torch.manual_seed(3)
    load_quantized(folder)
    assert torch.equal(torch.rand(3), expected)
    assert not nn.Linear(2, 2).weight.is_meta


CODEGEN = {
    "n_embd": 64,
    "n_layer": 1,
    "n_head": 4,
    "vocab_size": 96,
    "n_positions": 64,
    "rotary_dim": 8,
}
WITH_BUFFERS = {  # buffers that no file holds: frequencies, positions, masks, tables of sines
    "codegen": (hf.CodeGenForCausalLM, hf.CodeGenConfig(**CODEGEN)),
    "yarn": (hf.LlamaForCausalLM, hf.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=64, rope_parameters={
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
            "original_max_position_embeddings": 16})),
    "pegasus": (hf.PegasusForConditionalGeneration, hf.PegasusConfig(
        vocab_size=96, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4)),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64)),
    "falcon": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64)),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_BUFFERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_buffers_that_no_file_holds_are_computed_anew(tmp_path, name, dtype):
    kind, config = WITH_BUFFERS[name]
    torch.manual_seed(0)
    start = kind(config).to(dtype).eval()
    ids = {"input_ids": IDS.clamp(max=95)}
    if start.config.is_encoder_decoder:
        ids["decoder_input_ids"] = ids["input_ids"]
    converted = convert(prepare_qat(start, W4))
    folder = save_quantized(converted, tmp_path)
    for loaded in (load_quantized(folder), load_quantized(folder, start)):
        assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
        buffers = dict(loaded.named_buffers())
        assert all(torch.equal(buffers[n], b) for n, b in converted.named_buffers())
        assert torch.equal(loaded(**ids).logits, converted(**ids).logits)


def test_a_given_model_keeps_its_weights_and_lends_none(tmp_path):
    start = model()
    before = {name: p.data_ptr() for name, p in start.named_parameters()}
    loaded = load_quantized(save_quantized(convert(prepare_qat(start, W4)), tmp_path), start)
    assert {name: p.data_ptr() for name, p in start.named_parameters()} == before
    assert not set(before.values()) & {p.data_ptr() for p in loaded.parameters()}
    assert all(p.requires_grad for p in start.parameters())


def test_a_failure_leaves_nothing_half_written(tmp_path, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    converted = convert(prepare_qat(llama(), W2))
    monkeypatch.setattr("companion.formats.hub._hash", lambda config: 1 / 0)
    for folder in (saved, tmp_path / "new"):
        with pytest.raises(ZeroDivisionError):
            save_quantized(converted, folder)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_crash_between_two_files_is_noticed(saved, monkeypatch):
    """The settings are replaced last, so new weights beside old ones have the wrong hash."""
    replace = Path.replace

    def crash(path, target):
        if path.name == CONFIG:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_quantized(convert(prepare_qat(model(), W2)), saved)
    with pytest.raises(DamagedFile, match="hash differs"):
        load_quantized(saved, model())
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]


def test_files_of_another_model_go_and_a_tokenizer_stays(tmp_path):
    converted = convert(prepare_qat(llama(), W4))
    (tmp_path / "tokenizer.json").write_text("{}")
    save_quantized(converted, tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX).exists()
    assert not (tmp_path / WEIGHTS).exists()
    assert torch.equal(load_quantized(tmp_path)(IDS).logits, converted(IDS).logits)
    assert torch.equal(load_quantized(tmp_path, llama())(IDS).logits, converted(IDS).logits)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    flip(shard, -1)
    with pytest.raises(DamagedFile, match="hash differs"):
        load_quantized(tmp_path)
    shard.write_bytes(content)
    save_quantized(converted, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        CONFIG, GENERATION, WEIGHTS, "tokenizer.json"]  # fmt: skip
    assert torch.equal(load_quantized(tmp_path)(IDS).logits, converted(IDS).logits)


def test_a_model_of_the_hub_is_found_in_its_cache(tmp_path, monkeypatch):
    revision = "0" * 40
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    converted = convert(prepare_qat(llama(), W4))
    save_quantized(converted, repository / "snapshots" / revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    theirs = hf.AutoModelForCausalLM.from_pretrained("owner/model", cache_dir=tmp_path)
    for loaded in (load_quantized("owner/model"), theirs):
        assert torch.equal(loaded(IDS).logits, converted(IDS).logits)
    with pytest.raises(SourceUnavailable, match="'owner/other' is no folder, and could not be had"):
        load_quantized("owner/other")


def test_a_biencoder_is_saved_as_its_encoder(tmp_path):
    torch.manual_seed(0)
    encoder = hf.BertModel(hf.BertConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1,
                                         num_attention_heads=4, intermediate_size=64))  # fmt: skip
    converted = convert(prepare_qat(BiEncoder(encoder), W4))
    save_quantized(converted, tmp_path)
    mask = torch.ones_like(IDS)
    expected = converted.embed(IDS, mask)
    theirs = hf.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(BiEncoder(theirs).embed(IDS, mask), expected)
    loaded = load_quantized(tmp_path, BiEncoder(encoder))
    assert torch.equal(loaded.embed(IDS, mask), expected)
    assert loaded.quantization == converted.quantization
    with pytest.raises(UnsupportedModel, match="BiEncoder is no model class of transformers"):
        load_quantized(tmp_path)
