"""Saving and serving: the integers that were trained come back, tied tables once, settings with them."""

import numpy as np
import onnx
import pytest
import torch
import transformers as tf
from safetensors import safe_open
from torch import nn

from companion import (
    W2,
    W4,
    QuantScheme,
    convert,
    export_onnx,
    load_quantized,
    prepare_qat,
    save_quantized,
)
from companion.formats.gguf import export_gguf, read_gguf
from companion.formats.onnx.model import OnnxModel
from companion.numerics.packing import unpack
from companion.qat.packed import Packed
from tests import tiny

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))


def llama(vocabulary: int = 128, hidden: int = 64, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden,
                            num_hidden_layers=1, num_attention_heads=4, eos_token_id=2,
                            max_position_embeddings=64, **settings)  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


def rounded(model: nn.Module, scheme=W4, method="absmax", **options) -> nn.Module:
    return convert(prepare_qat(model, scheme, method, **options))


def test_saved_and_loaded_it_answers_the_same(tmp_path):
    """transformers#33358: a quantized model could not be saved, or came back as another."""
    q = rounded(llama())
    save_quantized(q, tmp_path / "q")
    assert torch.equal(load_quantized(tmp_path / "q")(IDS).logits, q(IDS).logits)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert torch.equal(again(IDS).logits, q(IDS).logits)


def test_four_bits_take_half_a_byte_on_disk(tmp_path):
    """ParetoQ#16: a checkpoint of a "4-bit" model was as large as in half precision."""
    model = llama(1024, 256, tie_word_embeddings=True)
    save_quantized(rounded(model, embeddings=True), tmp_path / "q")
    bytes_ = (tmp_path / "q" / "model.safetensors").stat().st_size
    assert bytes_ < 0.65 * model.num_parameters()  # half a byte, and a scale for 32 of them


def test_a_tied_table_stays_one_table(tmp_path):
    """sglang#2935, transformers#37905: rounded, a tied head became a second matrix, and the setting
    said the opposite of the file."""
    q = rounded(llama(tie_word_embeddings=True), embeddings=True)
    save_quantized(q, tmp_path / "q")
    with safe_open(tmp_path / "q" / "model.safetensors", "pt") as file:
        head = [name for name in file.keys() if "lm_head" in name]  # noqa: SIM118
        assert not sum(file.get_tensor(name).numel() for name in head)
    again = load_quantized(tmp_path / "q")
    assert again.config.tie_word_embeddings
    assert again.lm_head.integers.data_ptr() == again.model.embed_tokens.integers.data_ptr()


def test_a_tied_table_is_in_an_onnx_file_once(tmp_path):
    """onnxruntime-genai#1089: a file that keeps a tied table once was read as lacking the other."""
    q = rounded(llama(1024, tie_word_embeddings=True), embeddings=True)
    path = export_onnx(q, tmp_path / "model.onnx")
    table = 1024 * 64 // 2
    stored = [t for t in onnx.load(path).graph.initializer if np.prod(t.dims) >= table]
    assert len(stored) == 1
    with torch.no_grad():
        assert torch.allclose(OnnxModel(path)(IDS).logits, q(IDS).logits, atol=0.05)


@pytest.mark.parametrize("size", [16, 32, 128, 256, 512])
def test_no_size_of_group_is_served_as_zeros(tmp_path, size):
    """onnxruntime#28551: with blocks of 512 the kernel wrote zeros, without a word."""
    q = rounded(llama(hidden=512), QuantScheme(4, size))
    path = export_onnx(q, tmp_path / "model.onnx")
    with torch.no_grad():
        ours, theirs = q(IDS).logits, OnnxModel(path)(IDS).logits
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() < 0.05 * ours.abs().max()


def test_left_padding_moves_no_position(tmp_path):
    """optimum#877: exported, a model with learned positions counted the padding."""
    tokenizer = tiny.byte_level(pad_token="[PAD]")
    q = rounded(tiny.gpt2(tokenizer))
    model = OnnxModel(export_onnx(q, tmp_path / "model.onnx"))
    ids = torch.randint(3, 96, (1, 7))
    padded = torch.cat([torch.full((1, 4), tokenizer.pad_token_id), ids], 1)
    mask = (torch.arange(11) >= 4).long()[None]
    alone = model(ids).logits
    beside = model(padded, attention_mask=mask).logits[:, 4:]
    assert (alone - beside).abs().max() < 1e-3


@pytest.mark.parametrize("method", ["absmax", "lsq"])
@pytest.mark.parametrize("scheme", [W4, W2], ids=["W4", "W2"])
def test_llama_cpp_gets_the_scales_that_were_trained(tmp_path, scheme, method):
    """llama.cpp#24603, torchtune#2845, pytorch/ao#2419: scales were estimated again from the weights
    of a trained model, and much of what training had gained was lost."""
    q = rounded(llama(), scheme, method)
    with torch.no_grad():  # as if they had been trained: no estimate finds these again
        for layer in [m for m in q.modules() if isinstance(m, Packed)]:
            drawn = 1 + 0.4 * torch.rand(
                layer.scale.shape, generator=torch.Generator().manual_seed(1)
            )
            layer.scale.mul_(drawn).copy_(layer.scale.half())
    export_gguf(q, tmp_path / "model.gguf")
    found = read_gguf(tmp_path / "model.gguf", q)
    layers = {n: m for n, m in q.named_modules() if isinstance(m, Packed)}
    assert set(found) == set(layers)
    for name, layer in layers.items():
        ours = unpack(layer.integers, layer.scheme.weight_bits, layer.columns)
        assert np.array_equal(found[name].integers, ours.numpy())
        assert np.array_equal(found[name].scales, layer.scale.float().numpy())


def test_several_ends_and_penalties_travel(tmp_path):
    """faults of the first round, and many a model card: `generation_config` was lost on the way."""
    model = llama()
    model.generation_config.eos_token_id = [2, 7]
    model.generation_config.repetition_penalty = 1.3
    save_quantized(rounded(model), tmp_path / "q")
    told = load_quantized(tmp_path / "q").generation_config
    assert (told.eos_token_id, told.repetition_penalty) == ([2, 7], 1.3)
