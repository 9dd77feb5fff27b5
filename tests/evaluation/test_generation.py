"""Answers in batches are those given one by one, at every stage; the metrics count what they say."""

import json

import numpy as np
import pytest
import torch

from companion import (
    W2,
    W4,
    W4A8,
    convert,
    load_pretrained,
    load_quantized,
    prepare_qat,
    save_quantized,
)
from companion.course.sources import load_tokenizer
from companion.data.chat import chat
from companion.data.text import IGNORED
from companion.errors import EmptyLoader, UnsupportedModel
from companion.evaluation.generation import (
    answer_table,
    answers,
    encode_prompt,
    exact_format,
    exact_value,
    forgotten,
    longest,
    rouge_l,
    stop_tokens,
)
from companion.formats.onnx.export import export_onnx
from tests import tiny

PROMPTS = [f"{text} to" for text in tiny.TEXTS[:9]]
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def stages(make, scheme, folder):
    """A model, the same under rounding, converted, and saved and loaded."""
    model = make(tiny.byte_level())
    with torch.no_grad():  # so that what was read matters, and not the last token alone
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(20)
    prepared = prepare_qat(model, scheme, "absmax")
    converted = convert(prepared)
    save_quantized(converted, folder)
    return {
        "float": model,
        "prepared": prepared,
        "converted": converted,
        "loaded": load_quantized(folder),
    }


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("scheme", [W4, W4A8])
def test_a_batch_answers_as_each_prompt_alone_does(make, scheme, tmp_path):
    tokenizer, found = tiny.byte_level(), {}
    for name, model in stages(make, scheme, tmp_path).items():
        model.train()
        alone = [
            answers(model, tokenizer, [p], max_new_tokens=12, batch_size=1)[0] for p in PROMPTS
        ]
        found[name] = answers(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=4)
        assert found[name] == alone
        assert model.training
    assert found["prepared"] == found["converted"] == found["loaded"]
    assert len(set(found["float"])) > 3
    assert found["float"] != found["prepared"]


def test_it_is_what_transformers_alone_says():
    tokenizer = tiny.byte_level()
    model = tiny.llama(tokenizer)
    ids = tokenizer(PROMPTS[4], return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    (found,) = answers(model, tokenizer, [PROMPTS[4]], max_new_tokens=12)
    assert found == tokenizer.decode(made, skip_special_tokens=True).strip()


def test_an_exported_file_answers_alike(tmp_path):
    tokenizer = tiny.byte_level()
    model = convert(prepare_qat(tiny.llama(tokenizer), W4, "absmax"))
    from companion.formats.onnx.model import OnnxModel

    served = OnnxModel(export_onnx(model, tmp_path / "model.onnx", accuracy_level=0))
    some = {"max_new_tokens": 12, "batch_size": 4}
    assert answers(served, tokenizer, PROMPTS, **some) == answers(model, tokenizer, PROMPTS, **some)
    drawn = [answers(served, tokenizer, PROMPTS, sample=True, seed=seed, top_p=0.9, **some)
             for seed in (0, 0, 1)]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]
    assert longest(served) == 64


def test_draws_follow_the_seed_and_leave_the_callers_alone():
    tokenizer = tiny.byte_level()
    model = tiny.llama(tokenizer)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn = [
        answers(model, tokenizer, PROMPTS, max_new_tokens=8, sample=True, seed=s) for s in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = answers(model, tokenizer, PROMPTS, max_new_tokens=8)
    cold = answers(model, tokenizer, PROMPTS, max_new_tokens=8, sample=True, temperature=1e-4)
    narrow = answers(model, tokenizer, PROMPTS, max_new_tokens=8, sample=True, top_p=1e-6)
    assert greedy == cold == narrow != drawn[0]


def chatty(**special):
    tokenizer = tiny.byte_level(pad_token="[PAD]", **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def test_an_answer_ends_where_the_template_ends_a_turn():
    """The settings of many a base model know only the end of a text."""
    tokenizer = chatty()
    model = tiny.llama(tokenizer)
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    assert stop_tokens(model, tokenizer) == (tokenizer.eos_token_id, stop)
    with torch.no_grad():  # a model that says "the" and then stops
        said = tokenizer("the", add_special_tokens=False)["input_ids"][-1]
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight[:] = 0
        model.model.embed_tokens.weight[said] = 1
        model.lm_head.weight[said] = -1
        model.lm_head.weight[stop] = 1
        model.model.embed_tokens.weight[
            tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        ] = -1
    ids = encode_prompt("Hi", tokenizer)
    new = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
    assert new[:2].tolist() == [said, stop]
    assert len(new) == 6  # on its own it goes on
    assert (
        answers(model, tokenizer, ["Hi", "Hello, you"], max_new_tokens=6)
        == [tokenizer.decode([said]).strip()] * 2
    )
    asked = [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}]
    assert len(encode_prompt(asked, tokenizer)) > len(ids)


def test_smollm2_answers_in_a_batch_as_it_does_alone():
    model, tokenizer = load_pretrained("smollm2"), load_tokenizer("smollm2")
    prompts = ["What is the capital of France?", "Say hello.",
               "Write one short sentence about a yellow brick road and the city it leads to."]  # fmt: skip
    batch = answers(model, tokenizer, prompts, max_new_tokens=12)
    assert batch == [answers(model, tokenizer, [p], max_new_tokens=12)[0] for p in prompts]
    assert "Paris" in batch[0]
    assert not any("<|" in answer for answer in batch)


def test_what_cannot_be_answered_says_why():
    tokenizer = tiny.byte_level()
    model = tiny.llama(tokenizer)
    with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens, which with 30 .* takes \(64\)"):
        answers(model, tokenizer, ["a", "the road " * 30], max_new_tokens=30)
    with pytest.raises(UnsupportedModel, match="does not go on with a text"):
        answers(torch.nn.Linear(2, 2), tokenizer, ["a"])
    with pytest.raises(UnsupportedModel, match="no chat template"):
        answers(model, tokenizer, [[{"role": "user", "content": "a"}]])
    with pytest.raises(ValueError, match="leave sample out"):
        answers(model, tokenizer, ["a"], sample=True, temperature=0)
    assert answers(model, tokenizer, [""], max_new_tokens=2)  # begins with the start token
    assert answers(model, tokenizer, []) == []


def test_a_table_shows_answers_side_by_side():
    asked = [[{"role": "system", "content": "x"}, {"role": "user", "content": "Who?"}], "Where?"]
    table = answer_table(asked, {"float": ["Toto.", "Here."], "W4": ["Tot", "He"]})
    assert list(table.index) == ["Who?", "Where?"]
    assert table.loc["Where?", "W4"] == "He"
    with pytest.raises(ValueError, match="1 answers of 'float' to 2 prompts"):
        answer_table(asked, {"float": ["a"]})


# by Google's rouge_score 0.1.2, RougeScorer(["rougeL"]).score(true, given)["rougeL"].fmeasure
ROUGE = [
    ("the quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog", 0.5882352941176471),
    ("Return the sum of `x` over axis_0", "Returns the sum of x, over axis 0.", 0.875),
    ("", "The road.", 0.0),
    ("größe", "größe", 1.0),
    ("b a", "a b", 0.5),
    ("...", "!", 0.0),
]  # fmt: skip


def test_rouge_l_is_that_of_the_reference():
    given, true, wanted = zip(*ROUGE, strict=True)
    assert rouge_l(given, true).total.tolist() == pytest.approx(wanted, abs=1e-12)
    assert rouge_l(given, true).estimate().n == len(ROUGE)


def test_a_format_is_exact_or_it_is_not():
    right = '{"summary": "a", "names": []}'
    cases = {right: 1, '{"names": 1, "summary": 2}': 1, f" {right}\n": 1, f"```json\n{right}\n```": 0,
             right[:-1]: 0, '{"summary": "a"}': 0, '{"summary": 1, "names": 2, "more": 3}': 0,
             '{"summary": 1, "summary": 2, "names": 3}': 0, '["summary", "names"]': 0, "": 0,
             "[" * 100_000: 0}  # fmt: skip
    found = exact_format(list(cases), ["summary", "names"])
    assert found.total.tolist() == list(cases.values())


def test_a_value_is_right_whole_or_under_a_key():
    true = json.dumps({"a": 1, "b": ["x", "y"]})
    given = ['{"b": ["x", "y"], "a": 1}', '{"a": 2, "b": ["x", "y"]}', '{"a": 1}', "none"]
    assert exact_value(given, [true] * 4).total.tolist() == [1, 0, 0, 0]
    assert exact_value(given, [true] * 4, "b").total.tolist() == [1, 1, 0, 0]
    assert exact_value(given, [true] * 4, "a").total.tolist() == [1, 0, 1, 0]


def test_what_is_forgotten_is_the_divergence_of_scored_tokens():
    tokenizer = chatty(model_max_length=200)
    talks = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
             for text in tiny.TEXTS[:8]]  # fmt: skip
    task = chat(
        "chats", dict.fromkeys(("train", "validation", "test"), talks), tokenizer, "", batch_size=2
    )
    model = tiny.llama(tokenizer)
    rounded = prepare_qat(model, W2, "absmax")
    pairs = {"float": (model, rounded), "rounded": (rounded, model),
             "both": (rounded, prepare_qat(model, W4, "absmax")),
             "converted": (model, convert(rounded))}  # fmt: skip
    for original, moved in pairs.values():
        found, totals, weights = forgotten(moved, original, task.test), np.zeros(8), np.zeros(8)
        for batch in task.test:
            with torch.no_grad():
                p, q = (m(batch["input_ids"], batch["attention_mask"]).logits.double()
                        .log_softmax(-1)[:, :-1] for m in (original, moved))  # fmt: skip
            scored = batch["labels"][:, 1:] != IGNORED
            kl = (p.exp() * (p - q)).sum(-1) * scored
            totals[batch["document"]], weights[batch["document"]] = kl.sum(1), scored.sum(1)
        np.testing.assert_allclose(found.total, totals, rtol=2e-3)  # float32, and small
    assert found.weight.tolist() == weights.tolist()
    assert found.value > 1e-4
    estimate = found.estimate()
    assert (estimate.n, estimate.low < found.value < estimate.high) == (8, True)
    assert forgotten(model, model, task.train).value == pytest.approx(0, abs=1e-7)
    tokenizer.add_tokens(["another"])
    with pytest.raises(UnsupportedModel, match="compare a model with the one"):
        forgotten(tiny.llama(tokenizer), model, task.test)
    with pytest.raises(EmptyLoader, match="no token to score"):
        forgotten(model, model, [])
