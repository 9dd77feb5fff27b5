"""The saved file: exact on the way back, small, and refused when it is not what was written."""

import copy
import hashlib
import json
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, load_model, save_model
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
from companion.errors import DamagedFile, UnsupportedModel, WrongStage
from companion.qat.saved import CONFIG, GENERATION, KEY, WEIGHTS, keep_types


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


def test_another_format_is_refused(saved, monkeypatch):
    monkeypatch.setattr("companion.qat.saved.FORMAT", 2)
    with pytest.raises(DamagedFile, match="has format 1; this version reads 2"):
        load_quantized(saved, model())
    monkeypatch.setattr("companion.qat.saved.FORMAT", 3)
    save_quantized(convert(prepare_qat(model(), W4)), saved)
    monkeypatch.undo()
    with pytest.raises(DamagedFile, match="has format 3; this version reads 1 and 2"):
        load_quantized(saved, model())


def test_a_folder_of_before_still_opens(tmp_path):
    """Format 1 as it was first written: no generation settings, nothing for transformers."""
    converted = convert(prepare_qat(llama(), W4))
    save_quantized(converted, tmp_path)
    (tmp_path / GENERATION).unlink()
    config = json.loads((tmp_path / CONFIG).read_text())
    del (
        config["quantization_config"],
        config[KEY]["generation_sha256"],
        config[KEY]["config_sha256"],
    )
    config[KEY]["config_sha256"] = hashlib.sha256(
        json.dumps(config, sort_keys=True).encode()
    ).hexdigest()
    (tmp_path / CONFIG).write_text(json.dumps(config, indent=1))
    assert config[KEY]["format"] == 1
    assert torch.equal(load_quantized(tmp_path)(IDS).logits, converted(IDS).logits)


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


OPENERS = {
    "AutoModelForCausalLM": hf.AutoModelForCausalLM.from_pretrained,
    "AutoModel": hf.AutoModel.from_pretrained,
    "AutoModelForSequenceClassification": hf.AutoModelForSequenceClassification.from_pretrained,
    "the class itself": hf.LlamaForCausalLM.from_pretrained,
    "another of its classes": hf.LlamaModel.from_pretrained,
    "with a type": lambda f: hf.AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16),
    "pipeline": lambda f: hf.pipeline("text-generation", model=str(f), tokenizer=str(f)),
}


@pytest.mark.parametrize("opener", OPENERS)
def test_transformers_refuses_the_folder_instead_of_drawing_weights(tmp_path, opener):
    folder = save_quantized(convert(prepare_qat(llama(), W4)), tmp_path)
    with pytest.raises(ValueError, match="quant_method"):
        OPENERS[opener](folder)
    assert getattr(load_quantized(folder).config, "quantization_config", None) is None


def test_save_pretrained_points_to_save_quantized(tmp_path):
    converted = convert(prepare_qat(llama(), W4))
    loaded = load_quantized(save_quantized(converted, tmp_path / "w4"))
    arguments = hf.TrainingArguments(output_dir=str(tmp_path / "t"), report_to=[], use_cpu=True)
    for refused in (
        converted.save_pretrained,
        converted.model.save_pretrained,
        copy.deepcopy(converted).save_pretrained,
        pickle.loads(pickle.dumps(converted)).save_pretrained,
        loaded.save_pretrained,
        hf.Trainer(model=converted, args=arguments).save_model,
    ):
        with pytest.raises(WrongStage, match=r"call companion\.save_quantized\(model, folder\)"):
            refused(str(tmp_path / "out"))
    assert not list(tmp_path.glob("out/*.safetensors"))
    prepared = prepare_qat(llama(), W4)
    prepared.save_pretrained(tmp_path / "prepared")  # its weights are float: nothing to refuse
    assert torch.equal(convert(prepared)(IDS).logits, converted(IDS).logits)


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
        assert model_bytes(converted) == pytest.approx(size, abs=64)  # the file's own metadata
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
    assert exact - small == pytest.approx(2 * 4000 * 64, abs=64)


def test_a_bfloat16_model_says_so_when_it_comes_back(tmp_path):
    llama().bfloat16().save_pretrained(tmp_path / "start")
    start = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    loaded = load_quantized(save_quantized(convert(prepare_qat(start, W4)), tmp_path / "w4"))
    assert loaded.config.dtype == loaded.dtype == torch.bfloat16
    assert loaded.get_memory_footprint() < start.get_memory_footprint()


PEAK = """
import sys, torch
from pathlib import Path
from companion import load_quantized

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

load_quantized(sys.argv[1])  # what is imported on the way
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
model = load_quantized(sys.argv[2])
print(status("VmHWM") - before)
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
    # the file itself, and what an allocator and some hundred modules take: 1.0 to 1.3 measured
    assert int(result.stdout) < 1.6 * size


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


@pytest.mark.parametrize("method", ["absmax", "mse", "lsq"])
def test_a_checkpoint_of_a_prepared_model_with_tied_embeddings(tmp_path, method):
    """transformers#33807: a range that two layers share must not stand in the file twice."""
    prepared = prepare_qat(llama(tie_word_embeddings=True), W4, method, embeddings=True)
    with torch.no_grad():
        for p in prepared.parameters():
            p.mul_(1 + 0.1 * torch.rand_like(p))
    expected = prepared(IDS).logits
    prepared.save_pretrained(tmp_path / "hf")
    save_model(prepared, str(tmp_path / "model.safetensors"))
    for fill in (
        lambda m: m.load_state_dict(load_file(tmp_path / "hf" / WEIGHTS), strict=False),
        lambda m: load_model(m, tmp_path / "model.safetensors"),
        lambda m: m.load_state_dict(prepared.state_dict()),
    ):
        again = prepare_qat(llama(tie_word_embeddings=True), W4, method, embeddings=True).eval()
        assert not torch.equal(again(IDS).logits, expected)
        fill(again)
        assert torch.equal(again(IDS).logits, expected)
        assert torch.equal(convert(again)(IDS).logits, expected)
    twin = copy.deepcopy(prepared)
    assert twin.lm_head.quantizer is twin.model.embed_tokens.quantizer
    assert twin.lm_head.quantizer is not prepared.lm_head.quantizer


def test_the_trainer_keeps_and_resumes_tied_embeddings(tmp_path):
    rows = torch.randint(3, 128, (8, 12), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": row, "labels": row} for row in rows]

    def train(folder, resume=None):
        model = prepare_qat(llama(tie_word_embeddings=True), W4, embeddings=True)
        arguments = hf.TrainingArguments(
            output_dir=str(tmp_path / folder), report_to=[], save_steps=2, max_steps=4, use_cpu=True,
            per_device_train_batch_size=4, learning_rate=5e-3, disable_tqdm=True, seed=1)  # fmt: skip
        hf.Trainer(model=model, args=arguments, train_dataset=data).train(resume)
        return model.eval()

    whole = train("a")
    resumed = train("b", str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(whole(IDS).logits, resumed(IDS).logits)
    assert torch.equal(convert(whole)(IDS).logits, convert(resumed)(IDS).logits)
