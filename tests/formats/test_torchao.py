"""torchao's tensors with our integers compute what the converted model computes."""

import logging

import pytest
import torch
import transformers as hf
from torch import nn

from companion import (
    W2,
    W3,
    W4,
    W4A8,
    W8,
    W8A8,
    QuantScheme,
    convert,
    load_pretrained,
    load_quantized,
    prepare_qat,
    save_quantized,
    to_torchao,
)
from companion.errors import UnsupportedBackend, UnsupportedModel, WrongStage
from companion.formats.torchao import multiplies_exactly
from companion.numerics.scheme import BLOCK8

logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
EXACT = [W2, W3, W4, W8, W4A8, QuantScheme(2, None), QuantScheme(5, 64, torch.float32)]


@pytest.fixture(scope="module")
def language_model() -> nn.Module:
    return load_pretrained("docs-lm").eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(10, 4000, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scheme", EXACT, ids=str)
@pytest.mark.parametrize("method", ["absmax", "lsq"])
@torch.no_grad()
def test_logits_are_equal(language_model, ids, scheme, method):
    q = convert(prepare_qat(language_model, scheme, method, embeddings=True))
    theirs = to_torchao(q)
    assert not any(type(m).__module__.startswith("companion") for m in theirs.modules())
    assert torch.equal(theirs(ids).logits, q(ids).logits)
    assert theirs.lm_head.weight is theirs.get_input_embeddings().weight  # still tied


def in_torchao(q: nn.Module) -> nn.Module | None:
    """The W8A8 model in torchao's tensors, or None where its kernel saturates and this is refused."""
    if multiplies_exactly():
        return to_torchao(q)
    with pytest.raises(UnsupportedBackend, match="saturates on this machine"):
        to_torchao(q)
    return None


def saturating(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What kernels for AVX2 without VNNI compute: pairs of products in sixteen bits."""
    products = (inputs.int() + 128)[:, :, None] * weight.int()[None]
    pairs = (products[:, ::2] + products[:, 1::2]).clamp(-(2**15), 2**15 - 1)
    return pairs.sum(1).int() - 128 * weight.int().sum(0)


def test_a_kernel_that_saturates_is_refused(monkeypatch):
    q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), W8A8, "absmax"))
    monkeypatch.setattr(torch, "_int_mm", saturating)
    with pytest.raises(UnsupportedBackend, match="saturates on this machine"):
        to_torchao(q)


@torch.no_grad()
def test_eight_bit_inputs_agree_with_the_int8_kernel():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(256, 64))
    x = 3 * torch.randn(16, 256) - 1
    q = convert(prepare_qat(layer, W8A8, "absmax"))
    expected = q(x)
    if (theirs := in_torchao(q)) is not None:
        assert torch.allclose(theirs(x), expected, atol=1e-5 * expected.abs().max().item())
    assert not torch.allclose(expected, layer(x), atol=1e-3)  # rounding does show


@torch.no_grad()
def test_eight_bits_with_an_embedding(ids):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(4096, 32), nn.Linear(32, 8))
    q = convert(prepare_qat(net, W8A8, "absmax", embeddings=True))
    if (theirs := in_torchao(q)) is not None:
        assert torch.equal(theirs[0](ids), q[0](ids))
        assert torch.allclose(theirs(ids), q(ids), atol=1e-5)


@torch.no_grad()
def test_a_saved_model_and_its_bias_come_through(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    q = convert(prepare_qat(net, QuantScheme(3, 8), "lsq"))
    folder = save_quantized(q, tmp_path / "q")
    x = torch.randn(5, 64)
    theirs = to_torchao(load_quantized(folder, net))
    assert torch.equal(theirs(x), q(x))
    assert theirs[0].bias is not None
    assert theirs[2].bias is None
    assert torch.equal(q(x), theirs(x))  # the converted model was left as it is


@torch.no_grad()
def test_the_result_can_be_exported():
    torch.manual_seed(0)
    q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), W4A8, "lsq"))
    x = torch.randn(3, 64)
    program = torch.export.export(to_torchao(q), (x,))
    assert torch.equal(program.module()(x), q(x))


@torch.no_grad()
@pytest.mark.parametrize("scheme", [W4, W2], ids=str)
def test_half_precision_is_kept(scheme):
    torch.manual_seed(0)
    q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), scheme, "lsq")).to(torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(to_torchao(q)(x), q(x))


def test_refusals():
    layer = nn.Sequential(nn.Linear(64, 8))
    with pytest.raises(WrongStage, match="convert it first"):
        to_torchao(prepare_qat(layer, W4))
    blocks = convert(prepare_qat(layer, QuantScheme(4, activations=BLOCK8)))
    with pytest.raises(UnsupportedModel, match="no counterpart"):
        to_torchao(blocks)


@torch.no_grad()
def test_quiet_inputs_agree_too():
    torch.manual_seed(0)
    q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), W8A8, "absmax"))
    theirs = in_torchao(q)
    for exponent in range(-8, 5) if theirs is not None else ():
        x = torch.randn(4, 64) * 10.0**exponent
        expected = q(x)
        # the order of 64 float32 sums
        assert (theirs(x) - expected).abs().max() <= 4e-6 * expected.abs().max()


def test_the_record_does_not_travel(tmp_path):
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4))  # fmt: skip
    converted = convert(prepare_qat(llama, W4))
    save_quantized(converted, tmp_path)
    for model in (converted, load_quantized(tmp_path)):
        theirs = to_torchao(model)
        assert not any(hasattr(module, "quantization") for module in theirs.modules())
        assert not hasattr(theirs.config, "quantization_config")
        assert hasattr(model, "quantization")
