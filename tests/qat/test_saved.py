"""A converted model taken apart and put together, and what a prepared one is saved as."""

import copy

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from companion import W2, W4, convert, prepare_qat
from companion.errors import UnsupportedModel
from companion.qat.saved import describe, fill, renamed

WEIGHTS = "model.safetensors"
IDS = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(2))


def llama(**config) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    settings = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64,
                "num_hidden_layers": 1, "num_attention_heads": 4, "eos_token_id": 2}  # fmt: skip
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**settings, **config})).eval()


@pytest.mark.parametrize("embeddings", [True, False])
def test_taken_apart_and_filled_it_is_the_same_model(embeddings):
    start = llama(tie_word_embeddings=True)
    q = convert(prepare_qat(start, W4, embeddings=embeddings))
    tensors, description = describe(q)
    table = "integers" if embeddings else "weight"
    assert description["aliases"][f"lm_head.{table}"] == f"model.embed_tokens.{table}"
    again = fill(start, description, tensors, cache=False)
    assert torch.equal(again(IDS).logits, q(IDS).logits)
    assert (
        getattr(again.lm_head, table).data_ptr()
        == getattr(again.model.embed_tokens, table).data_ptr()
    )
    assert not any(getattr(m, "cache", False) for m in again.modules())
    assert again.quantization == q.quantization


def test_a_state_gathered_elsewhere_is_what_is_described():
    q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), W2))
    state = {name: torch.zeros_like(tensor) for name, tensor in q.state_dict().items()}
    assert not describe(q, state)[0]["0.integers"].any()
    assert describe(q)[0]["0.integers"].any()


def test_renaming_leaves_out_what_has_no_name():
    _, description = describe(convert(prepare_qat(llama(), W4, skip=["o_proj", "lm_head"])))
    inner = renamed(description, lambda n: n[6:] if n.startswith("model.") else None)
    assert "layers.0.self_attn.q_proj" in inner["layers"]
    assert "lm_head" not in inner["skipped"]
    assert "layers.0.self_attn.o_proj" in inner["skipped"]
    assert set(inner["computes"]) == set(inner["layers"])


def test_a_tensor_too_few_is_named():
    start = nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8))
    tensors, description = describe(convert(prepare_qat(start, W4)))
    with pytest.raises(UnsupportedModel, match=r"holds a Sequential(.|\n)*1\.weight"):
        fill(start, description, {n: t for n, t in tensors.items() if n != "1.weight"})


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
    for restore in (
        lambda m: m.load_state_dict(load_file(tmp_path / "hf" / WEIGHTS), strict=False),
        lambda m: load_model(m, tmp_path / "model.safetensors"),
        lambda m: m.load_state_dict(prepared.state_dict()),
    ):
        again = prepare_qat(llama(tie_word_embeddings=True), W4, method, embeddings=True).eval()
        assert not torch.equal(again(IDS).logits, expected)
        restore(again)
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
