"""The arms of a comparison: when rounding begins, and LoRA inside the fake quantization."""

import logging
import warnings

import pytest
import torch
import transformers
from torch import nn

from companion import W2, W4, compare, convert, fit, prepare_qat
from companion.data.task import Task
from companion.qat.layers import FakeQuantLinear
from companion.qat.packed import Packed
from companion.study.recipes import ARMS, LORA_OUTSIDE, Arm, lora

logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


LAYERS = 7  # in a block of Llama; the head is the embedding


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True)).eval()  # fmt: skip


@pytest.fixture(scope="module")
def task():
    """Every token is followed by the next number."""
    start = torch.arange(16)[:, None]
    ids = (start + torch.arange(12)) % 64
    batches = [{"input_ids": rows, "labels": rows} for rows in ids.split(4)]
    return Task("counting", batches, batches, batches, (), "")


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_ends_in_packed_integers(name, task):
    arm = ARMS[name]
    assert arm.name == name
    model = arm.finish(arm.prepare(language_model(), W4, task, ()))
    assert sum(isinstance(module, Packed) for module in model.modules()) == LAYERS
    assert not any(isinstance(module, FakeQuantLinear) for module in model.modules())


def test_adapters_outside_are_an_arm_of_a_comparison(task):
    table = compare(language_model(), task, [W4], [LORA_OUTSIDE], steps=8, seeds=1, rates=[1e-2],
                    progress=False)  # fmt: skip
    row = table.loc[("W4 g32", "lora-outside")]
    assert row["bytes"] > table.loc[("W4 g32", "nearest"), "bytes"]
    assert row["value"] > 0


def test_steps_add_up():
    assert Arm("x", float_share=0.25).steps(400) == (100, 300)
    assert Arm("x", float_share=1.0).steps(7) == (7, 0)
    assert Arm("x").steps(7) == (0, 7)


def test_lora_trains_little_and_merges_without_a_change(task):
    batch = task.train[0]
    start = language_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = lora(start, W2)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * LAYERS
    assert all("lora_" in name for name in trained)
    history = fit(model, [batch], steps=20, lr=5e-2, progress=False)
    assert history.loss[-1] < 0.9 * history.loss[0]
    model.eval()
    ids = batch["input_ids"]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        after, converted = merged(input_ids=ids).logits, convert(merged)(input_ids=ids).logits
        untrained = start.eval()(input_ids=ids).logits
    assert torch.allclose(before, after, atol=1e-4 * float(before.abs().max()))
    assert torch.equal(after, converted)
    assert not torch.allclose(before, untrained, atol=0.1)
    weights = [merged.get_submodule(n).weight for n in merged.quantization.layers]
    assert not any(torch.equal(w, start.get_submodule(n).weight)
                   for w, n in zip(weights, merged.quantization.layers, strict=True))  # fmt: skip


def test_an_adapter_outside_the_rounding_would_not_survive_it():
    """Why the update goes into the parameter: added to the output, it would be rounded late."""
    torch.manual_seed(0)
    weight, update = torch.randn(32, 32), 0.3 * torch.randn(32, 4) @ torch.randn(4, 32)
    layer = nn.Linear(32, 32, bias=False)
    layer.weight.data = weight
    quantizer = prepare_qat(nn.Sequential(layer), W2)[0].quantizer
    outside = quantizer(weight) + update
    assert not torch.allclose(outside, quantizer(weight + update), atol=0.1)
