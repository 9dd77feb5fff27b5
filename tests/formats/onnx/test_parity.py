"""Parity holds for the file of a model, and for no other."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from companion import W8A8, convert, export_onnx, load_task, prepare_qat
from companion.formats.onnx.parity import parity, read_integers
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
    assert str(report).startswith(f"{report.layers} matrices: integers equal, scales equal\n")
    assert "NOT equal" in str(replace(report, scales=False))


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
    monkeypatch.setattr("companion.formats.onnx.parity.read_integers", lambda _: found)
    report = parity(model, path, task, batches=1)
    assert not report.integers
    assert not report.scales
