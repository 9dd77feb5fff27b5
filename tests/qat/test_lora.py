"""Adapters inside the rounding merge exactly; those outside it are refused, of every kind."""

import copy

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from companion import W2, W4, W4A8, convert, prepare_qat
from companion.errors import UnsupportedModel, WrongStage
from companion.qat.lora import lora

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
HEADS = ["q_proj", "v_proj"]
AROUND = {
    "lora": peft.LoraConfig(r=4, target_modules=HEADS),
    "dora": peft.LoraConfig(r=4, target_modules=HEADS, use_dora=True),
    "embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens"]),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=HEADS),
    "ia3": peft.IA3Config(target_modules=HEADS, feedforward_modules=[]),
    "loha": peft.LoHaConfig(r=4, target_modules=HEADS),
    "modules to save": peft.LoraConfig(r=4, target_modules=HEADS, modules_to_save=["lm_head"]),
}
PROMPTS = {
    "prompts": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefixes": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=64, eos_token_id=2,
                            num_hidden_layers=1, num_attention_heads=4)  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=32,
                           bos_token_id=1, eos_token_id=2)  # fmt: skip
    return hf.GPT2LMHeadModel(config).eval()


def adapted(model: nn.Module, kind: str) -> nn.Module:
    return peft.get_peft_model(model, copy.deepcopy({**AROUND, **PROMPTS}[kind]))


def shaken(model: nn.Module) -> nn.Module:
    """Move what trains, as if it had been trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", AROUND)
def test_a_model_with_adapters_is_not_rounded_with_them(kind):
    with pytest.raises(UnsupportedModel, match=r"carries an adapter.*merge_and_unload.*lora\.lora"):
        prepare_qat(adapted(llama(), kind), W4, embeddings=True)


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_model_with_prompts_is_prepared_below_them(kind):
    model = adapted(llama(), kind)
    with pytest.raises(UnsupportedModel, match=r"belongs to PEFT: prepare its get_base_model\(\)"):
        prepare_qat(model, W4)
    assert len(prepare_qat(model.get_base_model(), W4).quantization.layers) == 8


def test_adapters_that_transformers_added_are_seen_too():
    model = llama()
    model.add_adapter(AROUND["lora"])
    with pytest.raises(UnsupportedModel, match="carries an adapter"):
        prepare_qat(model, W4)


@pytest.mark.parametrize("kind", AROUND)
def test_an_adapter_around_a_rounded_layer_is_refused_before_and_after_merging(kind):
    model = shaken(adapted(prepare_qat(llama(), W4, embeddings=True), kind))
    with pytest.raises(WrongStage, match=r"would round the sum anew.*inside the rounding"):
        convert(model)
    merged = model.merge_and_unload()
    name = "embed_tokens" if kind == "embedding" else "q_proj"
    with pytest.raises(WrongStage, match=rf"{name} changed while it was frozen.*lora\.lora"):
        convert(merged)
    merged.requires_grad_(True)  # the way out that the message names
    assert len(convert(merged).quantization.layers) == 9


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_above_a_rounded_model_leave_it_convertible(kind):
    prepared = prepare_qat(llama(), W4)
    model = adapted(prepared, kind)
    with pytest.raises(WrongStage, match="get_base_model"):
        convert(model)
    converted = convert(model.get_base_model())
    with torch.no_grad():
        assert torch.equal(converted(IDS).logits, prepared.eval()(IDS).logits)


def test_freezing_after_training_or_loading_is_no_merging():
    prepared = prepare_qat(llama(), W4)
    train(prepared, steps=1)
    convert(prepared.requires_grad_(False))
    loaded = prepare_qat(llama(), W4).requires_grad_(False)
    loaded.load_state_dict(prepared.state_dict())
    assert torch.equal(convert(loaded).lm_head.integers, convert(prepared).lm_head.integers)
    convert(prepare_qat(llama().requires_grad_(False), W4))


@pytest.mark.parametrize("scheme", [W2, W4, W4A8], ids=["W2", "W4", "W4A8"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_adapters_inside_the_rounding_merge_exactly(build, scheme):
    model = lora(build(), scheme, rank=4)
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model)
    assert all("lora_" in name for name in before)
    assert all(not torch.equal(p, dict(model.named_parameters())[n]) for n, p in before.items())
    with torch.no_grad():
        trained = model.eval()(input_ids=IDS).logits
        with pytest.raises(WrongStage, match="call merge_and_unload"):
            convert(model)
        merged = model.merge_and_unload()
        assert torch.equal(merged(IDS).logits, trained)
        assert torch.equal(convert(merged)(IDS).logits, trained)


def test_adapters_inside_may_come_from_elsewhere():
    """No step was trained here, so every weight is frozen when it changes."""
    model = shaken(lora(llama(), W4, rank=4))
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert torch.equal(convert(model.merge_and_unload())(IDS).logits, expected)
