"""Parity holds for the file of a model, and for no other."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from companion import W4, W8A8, convert, export_onnx, load_task, prepare_qat, save_quantized
from companion.course.sources import load_tokenizer
from companion.errors import UnsupportedModel
from companion.formats.compressed_tensors import export_compressed_tensors
from companion.formats.onnx.stored import read_integers
from companion.formats.parity import parity
from companion.qat.packed import Packed


@pytest.fixture(scope="module")
def task():
    whole = load_task("language-reference", batch_size=4)
    few = list(whole.validation)[:2]
    return replace(whole, validation=few, test=few)


def test_the_served_file_is_the_trained_model(served_docs_lm, task):
    model, path = served_docs_lm
    report = parity(model, path, task)
    assert report.integers
    assert report.scales
    assert report.layers == len(read_integers(path)) == len(model.quantization.layers) - 1
    assert report.logits < 1e-4
    assert report.argmax > 0.999
    assert report.metric == "loss"
    assert abs(report.difference.value) < 1e-5
    assert report.difference.low <= report.difference.value <= report.difference.high
    first, *rest = str(report).splitlines()
    assert first.split() == ["integers", "equal", "in", str(report.layers), "matrices"]
    assert rest[-1].startswith("loss, served minus trained")
    assert "NOT equal" in str(replace(report, scales=False))
    assert report.verdict.startswith(
        "The file holds the integers and scales that were trained, and"
    )
    assert "its scales are not those" in replace(report, scales=False).verdict


@pytest.mark.parametrize("what", ["integers", "scale"])
def test_another_model_is_noticed(served_docs_lm, task, what):
    model, path = served_docs_lm
    other = copy.deepcopy(model)
    layer = [module for module in other.modules() if isinstance(module, Packed)][7]
    stored = getattr(layer, what)
    stored.view(-1)[5] = stored.view(-1)[5] + torch.ones((), dtype=stored.dtype)
    report = parity(other, path, task)
    assert (report.integers, report.scales) == (what != "integers", what != "scale")
    assert report.logits > 1e-4


def test_w8a8_keeps_an_embedding_twice_and_both_are_compared(task, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=32, intermediate_size=32,
                         num_hidden_layers=1, num_attention_heads=2,
                         tie_word_embeddings=True)  # fmt: skip
    model = convert(prepare_qat(LlamaForCausalLM(config), W8A8, "absmax", embeddings=True))
    report = parity(model, export_onnx(model, tmp_path / "model.onnx"), task, batches=1)
    assert report.layers == len(model.quantization.layers)
    assert report.integers
    assert report.scales


def test_a_layer_that_the_file_lacks_is_noticed(served_docs_lm, task, monkeypatch):
    model, path = served_docs_lm
    found = read_integers(path)
    found.pop("model.layers.0.mlp.down_proj")
    monkeypatch.setattr("companion.formats.onnx.stored.read_integers", lambda _: found)
    report = parity(model, path, task, batches=1)
    assert not report.integers
    assert not report.scales


def test_with_a_prompt_both_go_on_and_the_logits_are_of_that_text(served_docs_lm):
    model, path = served_docs_lm
    prompt = load_tokenizer("docs-lm")("Return the", return_tensors="pt").input_ids
    report = parity(model, path, prompt=prompt, max_new_tokens=5)
    assert report.ours == report.theirs
    assert len(report.ours) == 5
    assert report.places == prompt.shape[1] + 5
    assert report.difference is None
    assert report.rounded is None
    assert 0 <= report.divergence + 1e-9 < 1e-6
    assert "computes something else" in replace(report, divergence=1.0).verdict
    assert "computes something else" in replace(report, divergence=1.0, rounded=0.5).verdict
    assert "rounds the inputs" in replace(report, divergence=0.1, rounded=0.001).verdict


def test_what_an_engine_rounds_is_told_apart(served_docs_lm, tmp_path):
    """At level 4 the kernels round inputs: from the model that does so, too, the file is less far."""
    model, _ = served_docs_lm
    prompt = load_tokenizer("docs-lm")("The for statement is", return_tensors="pt").input_ids
    report = parity(model, export_onnx(model, tmp_path / "m.onnx", accuracy_level=4), prompt=prompt)
    assert report.integers
    assert 0 < report.rounded < report.divergence / 2
    assert "also rounds the inputs" in report.verdict
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_turned_signs_are_the_same_value_and_are_counted(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    model = convert(prepare_qat(LlamaForCausalLM(config), W4, "mse"))
    export_compressed_tensors(model, tmp_path, zero_points=True)
    report = parity(model, tmp_path, served=model)
    negative = sum(
        int((m.scale < 0).sum()) for n, m in model.named_modules()
        if isinstance(m, Packed) and n != "lm_head"
    )  # fmt: skip
    assert report.integers
    assert report.scales
    assert report.turned == negative > 10
    assert report.floats == 1  # the output layer
    model.lm_head.scale[0] *= 2
    assert not parity(model, tmp_path, served=model).integers
    model.lm_head.scale[0] /= 2
    layer = model.model.layers[0].mlp.up_proj
    layer.scale[0] *= -1  # the scale alone
    wrong = parity(model, tmp_path, served=model)
    assert (wrong.integers, wrong.scales) == (False, True)


def test_a_folder_is_read_past_its_loader(served_docs_lm, tmp_path):
    model, _ = served_docs_lm
    report = parity(model, save_quantized(model, tmp_path), served=model)
    assert report.integers
    assert report.format == "companion"
    with pytest.raises(UnsupportedModel, match="in none of the formats companion"):
        parity(model, tmp_path / "no")


def test_scales_that_were_rounded_are_told_apart_from_those_of_another_model(tmp_path):
    """What `export_executorch` does when it is asked to; turned groups stay so."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    model = convert(prepare_qat(LlamaForCausalLM(config), W4, "absmax"))
    coarse = copy.deepcopy(model)
    layers = [module for module in coarse.modules() if isinstance(module, Packed)]
    for layer in layers:
        layer.scale.copy_(layer.scale.bfloat16())
    report = parity(model, save_quantized(coarse, tmp_path), served=model)
    assert (report.integers, report.scales) == (True, False)
    assert report.rounded_scales == len(layers)
    assert "rounded to bfloat16: train with scale_dtype" in report.verdict
    assert f"rounded to bfloat16 in {len(layers)} matrices" in str(report)
    layers[0].scale[0, 0] *= 1.5
    other = parity(model, save_quantized(coarse, tmp_path), served=model)
    assert other.rounded_scales == 0
    assert "This is another model" in other.verdict
