"""Real architectures drawn small, and the course's real weights: trained = converted = reloaded."""

import copy
import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from companion import (
    W2,
    W3,
    W4,
    W4A8,
    W8,
    W8A8,
    QuantScheme,
    convert,
    fit,
    load_pretrained,
    load_quantized,
    prepare_qat,
    save_quantized,
    to_torchao,
)
from companion.errors import NothingToTrain, UnsupportedModel, WrongStage
from companion.formats.hub import WEIGHTS
from companion.qat.packed import DynamicInt8Linear, Packed, QuantizedEmbedding, QuantizedLinear

COMMON = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
          "num_attention_heads": 4, "vocab_size": 96, "max_position_embeddings": 64,
          "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 16}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 96,
      "decoder_start_token_id": 0}  # fmt: skip
TINY = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, HEADS),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, {**HEADS, "sliding_window": 8}),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, GROUPED),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, GPT2),
    "bert": (hf.BertForMaskedLM, hf.BertConfig, COMMON),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, T5),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, {**GROUPED, "num_local_experts": 4}),
}
DENSE = [name for name in TINY if name != "mixtral"]
LAYERS = {"llama": 15, "qwen3": 15, "gemma3": 14, "phi3": 9, "gpt2": 8, "bert": 13, "t5": 32}
SCHEMES = [W8, W4, W3, W2, W4A8, QuantScheme(4, 64), QuantScheme(2, None)]
DTYPES = [torch.float32, torch.bfloat16]
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def short(scheme: QuantScheme) -> str:
    return f"W{scheme.weight_bits}{'A8' if scheme.activations else ''}-{scheme.group_size}"


def tiny(name: str, dtype: torch.dtype = torch.float32, **config) -> hf.PreTrainedModel:
    """Draw a small model whose biases and norms are not the zeros and ones they start from."""
    kind, configuration, options = TINY[name]
    torch.manual_seed(0)
    model = kind(configuration(**{**options, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@torch.no_grad()  # with a gradient, T5's attention takes another kernel
def outputs(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **decoder)[0]


@cache
def pretrained(name: str) -> hf.PreTrainedModel:
    return load_pretrained(name)


def check_trained_equals_converted_equals_reloaded(model, scheme, folder, **options):
    prepared = prepare_qat(model, scheme, **options).eval()
    converted = convert(prepared)
    expected = outputs(prepared)
    assert torch.equal(outputs(converted), expected)
    assert not torch.equal(outputs(model), expected)
    reloaded = load_quantized(save_quantized(converted, folder))
    assert type(reloaded) is type(model)
    assert torch.equal(outputs(reloaded), expected)
    return prepared, converted, reloaded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=short)
@pytest.mark.parametrize("name", DENSE)
def test_tiny_models(name, scheme, dtype, tmp_path):
    prepared, *_ = check_trained_equals_converted_equals_reloaded(
        tiny(name, dtype), scheme, tmp_path
    )
    assert len(prepared.quantization.layers) == LAYERS[name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "scheme", [*SCHEMES[:5], QuantScheme(4, 128), QuantScheme(2, None)], ids=short
)
@pytest.mark.parametrize("name", ["docs-lm", "sentence-transformers/all-MiniLM-L6-v2"])
def test_real_weights(name, scheme, dtype, tmp_path):
    model = copy.deepcopy(pretrained(name)).to(dtype)
    check_trained_equals_converted_equals_reloaded(model, scheme, tmp_path)


def layer_outputs(prepared, converted):
    """What each rounded layer gives in the prepared model, and converted on the same input."""
    found, hooks = [], []
    for name, module in converted.named_modules():
        if isinstance(module, DynamicInt8Linear):
            hooks.append(prepared.get_submodule(name).register_forward_hook(
                lambda _, inputs, output, here=module: found.append((output, here(*inputs)))
            ))  # fmt: skip
    outputs(prepared)
    for hook in hooks:
        hook.remove()
    assert len(found) >= len(hooks) > 0
    return found


@pytest.mark.parametrize("name", [*DENSE, "docs-lm", "sentence-transformers/all-MiniLM-L6-v2"])
def test_w8a8_runs_on_the_kernel_within_its_tolerance(name, tmp_path):
    model = tiny(name) if name in TINY else pretrained(name)
    prepared = prepare_qat(model, W8A8).eval()
    converted = convert(prepared)
    assert any(isinstance(m, DynamicInt8Linear) for m in converted.modules())
    expected, result = outputs(prepared), outputs(converted)
    # Every layer, on what it reads in the prepared model. Through a whole model a float32 sum in
    # another order may move an input past the middle between two integers, and all that follows
    # sees it: that has to stay below what rounding to eight bits costs.
    for there, here in layer_outputs(prepared, converted):
        assert (here - there).abs().max() <= 1e-5 * there.abs().max()
    assert (result - expected).abs().mean() < (expected - outputs(model)).abs().mean()
    assert torch.equal(outputs(load_quantized(save_quantized(converted, tmp_path))), result)


def test_w8a8_makes_a_row_depend_on_its_batch_and_w4a8_does_not():
    for scheme, depends in ((W8A8, True), (W4A8, False)):
        model = prepare_qat(tiny("llama"), scheme).eval()
        moved = (outputs(model, IDS[:1]) - outputs(model)[:1]).abs().max()
        assert bool(moved > 1e-4) is depends


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_tied_embedding_and_head_share_one_rounded_weight(name, tmp_path):
    model = tiny(name, tie_word_embeddings=True)
    prepared, converted, reloaded = check_trained_equals_converted_equals_reloaded(
        model, W4, tmp_path, embeddings=True
    )
    table, head = prepared.get_input_embeddings(), prepared.get_output_embeddings()
    assert head.weight is table.weight
    hidden = torch.randn(3, 64)
    rounded = table.quantizer(table.weight)
    for m in (converted, reloaded):
        head = m.get_output_embeddings()
        assert head.integers.data_ptr() == m.get_input_embeddings().integers.data_ptr()
        assert head.scale.data_ptr() == m.get_input_embeddings().scale.data_ptr()
        assert torch.equal(head(hidden), F.linear(hidden, rounded, head.bias))
        assert torch.equal(m.get_input_embeddings()(IDS), table(IDS))
    names = [n for n in load_file(tmp_path / WEIGHTS) if n.endswith("integers")]
    packed = {id(m.integers) for m in converted.modules() if isinstance(m, Packed)}
    assert len(names) == len(packed) == len(prepared.quantization.layers) - 1


def test_saving_what_was_loaded_writes_the_same_weights(tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    *_, reloaded = check_trained_equals_converted_equals_reloaded(
        model, W4, tmp_path / "a", embeddings=True
    )
    save_quantized(reloaded, tmp_path / "b")
    first, second = ((tmp_path / folder / WEIGHTS).read_bytes() for folder in "ab")
    assert first == second


def test_tying_saves_exactly_the_bytes_of_one_table(tmp_path):
    sizes = []
    for tied in (True, False):
        model = tiny("llama", tie_word_embeddings=tied)
        folder = tmp_path / str(tied)
        *_, converted, _ = check_trained_equals_converted_equals_reloaded(
            model, W4, folder, embeddings=True
        )
        assert isinstance(converted.model.embed_tokens, QuantizedEmbedding)
        assert isinstance(converted.lm_head, QuantizedLinear)
        sizes.append(sum(t.nbytes for t in load_file(folder / WEIGHTS).values()))
        header = int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little")
        assert (folder / WEIGHTS).stat().st_size == 8 + header + sizes[-1]
    assert sizes[1] - sizes[0] == 96 * 64 // 2 + 96 * 2 * 2  # integers and scales


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemmas_scaled_embedding_is_rounded_before_it_is_scaled(dtype, tmp_path):
    prepared, converted, reloaded = check_trained_equals_converted_equals_reloaded(
        tiny("gemma3", dtype), W4, tmp_path, embeddings=True
    )
    assert not prepared.quantization.skipped
    table = prepared.model.embed_tokens
    for m in (converted, reloaded):
        assert torch.equal(m.model.embed_tokens.factor, torch.tensor(8.0))  # sqrt(64)
        assert m.lm_head.integers.data_ptr() == m.model.embed_tokens.integers.data_ptr()
    assert torch.equal(table(IDS), 8 * table.quantizer(table.weight)[IDS])
    assert torch.equal(to_torchao(converted)(IDS).logits, outputs(prepared))


def test_barts_embeddings_are_rounded_and_its_positions_are_not(tmp_path):
    torch.manual_seed(0)
    config = hf.BartConfig(vocab_size=96, d_model=64, encoder_layers=1, decoder_layers=1,
                           encoder_attention_heads=4, decoder_attention_heads=4,
                           encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32,
                           scale_embedding=True)  # fmt: skip
    prepared, *_ = check_trained_equals_converted_equals_reloaded(
        hf.BartForConditionalGeneration(config).eval(), W4, tmp_path, embeddings=True
    )
    own = "BartLearnedPositionalEmbedding is a subclass with a forward of its own"
    assert prepared.quantization.skipped == {
        "model.encoder.embed_positions": own, "model.decoder.embed_positions": own}  # fmt: skip


SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1}
OTHERS = {
    "mamba": (lambda: hf.MambaForCausalLM(hf.MambaConfig(**SMALL, state_size=8)), ["in_proj"]),
    "mamba2": (
        lambda: hf.Mamba2ForCausalLM(
            hf.Mamba2Config(**SMALL, state_size=8, num_heads=8, head_dim=16, n_groups=1,
                            chunk_size=8)
        ),
        ["in_proj", "lm_head"],
    ),
    "falcon": (
        lambda: hf.FalconForCausalLM(hf.FalconConfig(**SMALL, num_attention_heads=4)),
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
    "bloom": (
        lambda: hf.BloomForCausalLM(hf.BloomConfig(**SMALL, n_head=4)),
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_architectures_with_ways_of_their_own(name):
    build, layers = OTHERS[name]
    torch.manual_seed(0)
    model = build().eval()
    prepared = prepare_qat(model, W2).eval()
    assert [layer.split(".")[-1] for layer in prepared.quantization.layers] == layers
    expected = outputs(prepared)
    # what stays float is copied, and a matrix elsewhere in memory may be summed in another order
    assert torch.allclose(outputs(convert(prepared)), expected, rtol=0, atol=1e-5)
    assert (outputs(model) - expected).abs().max() > 1e-3


def test_mamba_says_which_weights_it_reads():
    skipped = prepare_qat(OTHERS["mamba"][0](), W4).quantization.skipped
    why = "MambaMixer reads its weight past its forward"
    assert {name.split(".")[-1] for name, reason in skipped.items() if reason == why} == {
        "x_proj", "dt_proj", "out_proj"}  # fmt: skip
    assert skipped["backbone.layers.0.mixer.conv1d"].startswith("a Conv1d")


@pytest.mark.parametrize("method", ["absmax", "mse", "lsq"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_resized_before_and_not_after(tied, method):
    model = tiny("llama", tie_word_embeddings=tied)
    prepared = prepare_qat(model, W4, method, embeddings=True)
    prepared.resize_token_embeddings(104, mean_resizing=False)
    if tied and method == "absmax":  # nothing was found for the old shape
        assert torch.equal(outputs(convert(prepared)), outputs(prepared))
        return
    before = r"resize_token_embeddings and the like\) before prepare_qat"
    with pytest.raises(WrongStage, match=before):
        convert(prepared)
    if method != "absmax":
        with pytest.raises(WrongStage, match=before):
            outputs(prepared)
    model.resize_token_embeddings(104, mean_resizing=False)
    prepared = prepare_qat(model, W4, method, embeddings=True)
    assert torch.equal(outputs(convert(prepared)), outputs(prepared))


FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from companion import load_quantized
ids = load_file(sys.argv[1] + "/ids.safetensors")["ids"]
with torch.no_grad():
    save_file({"logits": load_quantized(sys.argv[1])(ids).logits}, sys.argv[1] + "/out.safetensors")
"""


def test_a_fresh_process_computes_the_same(tmp_path):
    converted = convert(prepare_qat(tiny("llama", torch.bfloat16), W3, embeddings=True))
    save_quantized(converted, tmp_path)
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], check=True,
                   env=os.environ | threads)  # fmt: skip
    assert torch.equal(load_file(tmp_path / "out.safetensors")["logits"], outputs(converted))


@pytest.mark.parametrize("option", [{"dtype": torch.bfloat16}, {"attn_implementation": "eager"}])
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_reloaded_as_it_was_when_it_came_from_pretrained(name, option, tmp_path):
    tiny(name).save_pretrained(tmp_path / "float")
    model = TINY[name][0].from_pretrained(tmp_path / "float", **option)
    *_, reloaded = check_trained_equals_converted_equals_reloaded(model, W4, tmp_path / "w4")
    kept = {n: b.dtype for n, b in model.named_buffers()}
    assert {n: b.dtype for n, b in reloaded.named_buffers() if n in kept} == kept


def test_a_classifier_keeps_its_labels(tmp_path):
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig(**COMMON, num_labels=3)).eval()
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    *_, reloaded = check_trained_equals_converted_equals_reloaded(
        model, W4, tmp_path, skip=["classifier"]
    )
    assert reloaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"


def test_mixture_of_experts_is_refused_unless_its_experts_are_skipped(tmp_path):
    model = tiny("mixtral")
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.experts\.gate_up_proj .*skip="):
        prepare_qat(model, W4)
    prepared, *_ = check_trained_equals_converted_equals_reloaded(
        model, W4, tmp_path, skip=["*.experts"]
    )
    attention = [n for n in prepared.quantization.layers if "self_attn" in n]
    assert len(attention) == 8


ROWS = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(1))


def test_trains_in_fit():
    prepared = prepare_qat(tiny("llama"), W2)
    data = [{"input_ids": ROWS[i : i + 4], "labels": ROWS[i : i + 4]} for i in (0, 4)]
    history = fit(prepared, data, steps=20, lr=5e-3)
    assert history.loss[-1] < 0.7 * history.loss[0]
    with pytest.raises(NothingToTrain):
        fit(convert(prepared), data, steps=1)


def trainer(folder, model, **options):
    """Three passes over eight rows, in another order each, with a checkpoint after half of them."""
    arguments = hf.TrainingArguments(
        output_dir=str(folder), report_to=[], save_steps=6, max_steps=12, logging_steps=1,
        gradient_accumulation_steps=2, per_device_train_batch_size=4, learning_rate=5e-3,
        lr_scheduler_type="constant", disable_tqdm=True, use_cpu=True, **options)  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ROWS]
    return hf.Trainer(model=model, args=arguments, train_dataset=data)


def test_trains_in_the_trainer_of_transformers_which_saves_and_resumes(tmp_path):
    prepared = prepare_qat(tiny("llama"), W4A8)
    start = copy.deepcopy(prepared.state_dict())
    whole = trainer(tmp_path, prepared)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]
    moved = [not torch.equal(start[n], p) for n, p in prepared.named_parameters()]
    assert all(moved)
    assert torch.equal(outputs(convert(prepared)), outputs(prepared.eval()))
    resumed = prepare_qat(tiny("llama"), W4A8)
    trainer(tmp_path, resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for name, tensor in prepared.state_dict().items():  # weights, steps and where they began
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        prepared = prepare_qat(tiny("llama"), W3).train()
        if checkpointing:
            prepared.gradient_checkpointing_enable()
            assert prepared.is_gradient_checkpointing
        prepared(input_ids=ROWS, labels=ROWS).loss.backward()
        gradients.append([p.grad for p in prepared.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("scheme", [W4, W2, W4A8], ids=short)
def test_autocast_sees_the_same_before_and_after_conversion(scheme):
    prepared = prepare_qat(tiny("qwen3"), scheme).eval()
    plain = outputs(prepared)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = outputs(prepared)
        assert torch.equal(outputs(convert(prepared)), mixed)
    assert not torch.equal(plain, mixed.float())
