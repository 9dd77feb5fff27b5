"""Adapters inside the rounding merge exactly; those outside it are refused, of every kind."""

import copy

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from companion import W2, W4, W4A8, convert, prepare_qat
from companion.errors import SourceUnavailable, UnknownLayer, UnsupportedModel, WrongStage
from companion.qat.lora import convert_base, lora, lora_outside, lora_qat
from companion.qat.packed import Packed
from companion.qat.prepare import pause_rounding

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


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


CONFIGS = {
    "rank": (4, 8),
    "layers": (peft.LoraConfig(r=4, target_modules=HEADS), 2),
    "all": (peft.LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"]), 7),
    "pattern": (peft.LoraConfig(r=4, target_modules=r".*mlp.*_proj"), 3),
    "none named": (peft.LoraConfig(r=2, lora_alpha=9), 8),
    "scaled by its root": (peft.LoraConfig(r=4, use_rslora=True, target_modules=HEADS), 2),
    "a first layer": (peft.LoraConfig(r=4, target_modules=HEADS, layers_to_transform=[0]), 2),
    "random": (peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"), 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_configured_adapters_merge_exactly_and_are_saved_as_peft_does(name, dtype, tmp_path):
    config, layers = CONFIGS[name]
    model = lora_qat(llama().to(dtype), W2, config)
    assert sum("lora_A" in n for n, _ in model.named_parameters()) == layers
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    train(shaken(model))
    trained = logits(model)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "adapter_model.safetensors",
        "companion.json",
    }
    loaded = lora_qat(llama().to(dtype), W2, tmp_path)
    assert torch.equal(logits(loaded), trained)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    by_peft = peft.PeftModel.from_pretrained(prepare_qat(llama().to(dtype), W2, "mse"), tmp_path)
    assert torch.equal(logits(by_peft), trained)
    merged = loaded.merge_and_unload()
    assert torch.equal(logits(merged), trained)
    assert torch.equal(logits(convert(merged)), trained)


def test_a_configuration_is_left_as_it_was():
    config = peft.LoraConfig(r=4, target_modules=HEADS)
    before = config.to_dict()
    lora_qat(llama(), W4, config)
    lora_outside(llama(), W4, config)
    assert config.to_dict() == before


REFUSED = {
    "lora_dropout": {"lora_dropout": 0.1},
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["embed_tokens"]},
    "bias": {"bias": "all"},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "lora_bias": {"lora_bias": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "target_parameters": {"target_parameters": ["q_proj.weight"]},
    "trainable_token_indices": {"trainable_token_indices": [1]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_move_the_result_are_refused(name):
    config = peft.LoraConfig(r=4, target_modules=HEADS, **REFUSED[name])
    with pytest.raises(UnsupportedModel, match=rf"inside the rounding cannot have .*{name}="):
        lora_qat(llama(), W4, config)
    if name not in ("lora_dropout", "rank_pattern"):
        with pytest.raises(UnsupportedModel, match=rf"outside the rounding cannot have .*{name}="):
            lora_outside(llama(), W4, config)


@pytest.mark.parametrize("build", [lora_qat, lora_outside])
def test_targets_that_are_not_rounded_are_refused(build):
    with pytest.raises(UnknownLayer, match=r"'nothing' matches no layer"):
        build(llama(), W4, peft.LoraConfig(target_modules=["q_proj", "nothing"]))
    with pytest.raises(
        UnknownLayer, match="'lm_head' matches lm_head, which stays in floating point"
    ):
        build(llama(), W4, peft.LoraConfig(target_modules=["lm_head"]), skip=["lm_head"])
    with pytest.raises(UnknownLayer, match="leaves out every rounded layer"):
        build(llama(), W4, peft.LoraConfig(exclude_modules=r".*"))
    with pytest.raises(UnsupportedModel, match="IA3Config says nothing"):
        build(llama(), W4, AROUND["ia3"])


def test_an_adapter_goes_onto_no_other_rounding(tmp_path):
    model = lora_qat(llama(), W4, peft.LoraConfig(r=4, target_modules=HEADS), skip=["lm_head"])
    model.save_pretrained(tmp_path)
    other = llama()
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    for start, scheme, skip, what in (
        (llama(), W2, ["lm_head"], "scheme"),
        (other, W4, ["lm_head"], "weights"),
        (llama(), W4, [], "weights"),
    ):
        with pytest.raises(WrongStage, match=rf"does not belong to this rounding \(other .*{what}"):
            lora_qat(start, scheme, tmp_path, skip=skip)
    calibration = [{"input_ids": IDS}]
    with pytest.raises(WrongStage, match=r"\(other ranges\)"):
        lora_qat(llama(), W4, tmp_path, skip=["lm_head"], calibration=calibration)
    (tmp_path / "companion.json").unlink()
    with pytest.raises(WrongStage, match=r"there is no companion\.json"):
        lora_qat(llama(), W4, tmp_path, skip=["lm_head"])
    adapted(llama(), "lora").save_pretrained(tmp_path / "around")
    with pytest.raises(WrongStage, match="trained around layers"):
        lora_qat(llama(), W4, tmp_path / "around")
    with pytest.raises(SourceUnavailable, match=r"holds no adapter_model\.safetensors"):
        lora_qat(llama(), W4, str(tmp_path / "nowhere"))


def test_adapters_outside_the_rounding_stay_beside_packed_integers(tmp_path):
    config = peft.LoraConfig(
        r=4, target_modules=HEADS, lora_dropout=0.5, rank_pattern={"v_proj": 2}
    )
    start = logits(prepare_qat(llama(), W2, "mse"))
    model = lora_outside(llama(), W2, config)
    assert torch.equal(logits(model), start)  # begins as the rounded model
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    train(model.train())
    trained = logits(model)
    assert not torch.equal(trained, start)
    converted = convert_base(model)
    assert torch.equal(logits(converted), trained)
    assert sum(isinstance(m, Packed) for m in converted.modules()) == 8
    assert torch.equal(logits(model), trained)  # the given one is left as it was
    with pytest.raises(WrongStage, match="would round the sum anew"):
        convert(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(prepare_qat(llama(), W2, "mse"), tmp_path)
    assert torch.equal(logits(again), trained)
    with pytest.raises(UnsupportedModel, match="adapters stand beside its integers"):
        converted.get_base_model().save_pretrained(tmp_path / "base")
    merged = model.merge_and_unload().requires_grad_(True)
    assert not torch.allclose(logits(convert(merged)), trained, atol=1e-2)  # off the grid


def test_what_cannot_stand_outside_is_refused():
    with pytest.raises(UnsupportedModel, match="Conv1D"):
        lora_outside(gpt2(), W4)
    for model in (
        llama(),
        prepare_qat(llama(), W4),
        adapted(llama(), "lora"),
        lora_qat(llama(), W4),
    ):
        with pytest.raises(WrongStage, match="lora_outside"):
            convert_base(model)
    pause_rounding(model := lora_outside(llama(), W4))
    with pytest.raises(WrongStage, match="is paused"):
        convert_base(model)
