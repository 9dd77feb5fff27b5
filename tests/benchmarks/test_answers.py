"""Stored answers: all there, greedy, and a saved model joins them."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.answers import GPTQ, NEAREST, PROMPTS, TOKENS, answers, labelled, name_of, record
from benchmarks.provenance import RESULTS
from companion import W2, W3, convert, load_pretrained, load_quantized, prepare_qat, save_quantized
from companion.course.sources import load_tokenizer

CONTENT = json.loads((RESULTS / "answers.json").read_text())
RECORDS = {r["name"]: r for r in CONTENT["records"]}


def test_every_width_answered_every_prompt():
    usual = {"float", *(f"W{b} g32 nearest" for b in NEAREST)}
    assert usual <= set(RECORDS)
    assert {n for n in RECORDS if n.endswith(" gptq")} <= {f"W{b} g32 gptq" for b in GPTQ}
    assert len(RECORDS) == len(CONTENT["records"])
    for found in RECORDS.values():
        assert tuple(found["answers"]) == PROMPTS
        assert all(len(answer["text"]) > 3 for answer in found["answers"].values())
    assert CONTENT["provenance"]["settings"]["tokens"] == TOKENS


def test_paris_is_lost_with_the_bits():
    told = [name for name, r in RECORDS.items() if "Paris" in r["answers"][PROMPTS[0]]["text"]]
    assert {"float", "W8 g32 nearest", "W4 g32 nearest"} <= set(told)
    assert "W2 g32 nearest" not in told


def test_the_float_model_still_says_what_is_stored():
    said = answers(load_pretrained("smollm2").eval(), PROMPTS[:1], tokens=12)
    assert said[PROMPTS[0]] == RECORDS["float"]["answers"][PROMPTS[0]]


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = len(load_tokenizer("smollm2"))
    config = LlamaConfig(vocab_size=size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, tie_word_embeddings=True)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_an_answer_is_greedy_and_says_whether_it_was_cut_off(tiny):
    tokenizer = load_tokenizer("smollm2")
    (found,) = answers(tiny, PROMPTS[:1], tokens=5).values()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": PROMPTS[0]}],
                                        add_generation_prompt=True, return_dict=True)["input_ids"]  # fmt: skip
    start = len(ids)
    for _ in range(5):
        ids.append(int(tiny(torch.tensor([ids])).logits[0, -1].argmax()))
    assert found["text"] == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert found["ended"] == (tokenizer.eos_token_id in ids[start:])


@pytest.mark.parametrize("scheme", [W2, replace(W3, group_size=16)])
def test_a_saved_model_is_recorded_by_its_label_and_width(tiny, tmp_path, scheme):
    saved = save_quantized(convert(prepare_qat(tiny, scheme, "absmax")), tmp_path / "saved")
    model = load_quantized(saved).eval()
    found = record(model, model.quantization.scheme, "after QAT")
    assert found["name"] == name_of(scheme, "after QAT")
    assert found["bits"] == scheme.weight_bits
    assert tuple(found["answers"]) == PROMPTS


def test_a_label_without_a_folder_is_refused():
    import argparse

    with pytest.raises(argparse.ArgumentTypeError, match="LABEL=FOLDER"):
        labelled("after QAT")
