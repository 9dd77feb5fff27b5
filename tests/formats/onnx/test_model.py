"""A served model answers like the one it came from, and says what is wrong with a file."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from transformers import LlamaConfig, LlamaForCausalLM

from companion import W8, convert, export_onnx, load_task, perplexity, prepare_qat
from companion.course.sources import load_tokenizer
from companion.errors import DamagedFile, UnsupportedModel
from companion.formats.onnx.model import OnnxModel

PROMPT = load_tokenizer("docs-lm")("Return the", return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def served(served_docs_lm):
    return OnnxModel(served_docs_lm[1], threads=1)


def test_greedy_text_is_that_of_the_converted_model(served_docs_lm, served):
    model, _ = served_docs_lm
    ours = model.generate(PROMPT, max_new_tokens=40, do_sample=False)[0, PROMPT.shape[1] :].tolist()
    assert list(served.generate(PROMPT, max_new_tokens=40)) == ours
    assert len(set(ours)) > 5


def test_draws_follow_the_seed_and_the_temperature(served):
    first, again, other = (
        list(served.generate(PROMPT, max_new_tokens=20, temperature=1.0, seed=seed))
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    cold = list(served.generate(PROMPT, max_new_tokens=20, temperature=1e-4))
    assert cold == list(served.generate(PROMPT, max_new_tokens=20))


def test_text_ends_with_the_context_and_with_each_stop_token(served):
    long = torch.randint(1, 4096, (1, 300), generator=torch.Generator().manual_seed(0))
    assert served.description.context == 256
    assert len(list(served.generate(long[:, :250], max_new_tokens=50, stop=False))) == 6
    for full in (256, 300):
        with pytest.raises(ValueError, match=f"the prompt has {full} tokens .* at most 255"):
            served.generate(long[:, :full])
    tokens = list(served.generate(PROMPT, max_new_tokens=10))
    for stop in ([tokens[3], tokens[6]], [4095, tokens[5]]):
        first = min(tokens.index(token) for token in stop if token in tokens)
        found = served.generate(PROMPT, max_new_tokens=10, settings={"eos_token_id": stop})
        assert list(found) == tokens[: first + 1]


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (PROMPT[:, :0], {}, "the prompt is empty"),
        (PROMPT[0], {}, "give .1, length."),
        (PROMPT.repeat(2, 1), {}, "one text"),
        (PROMPT, {"attention_mask": torch.zeros_like(PROMPT)}, "the prompt is empty"),
        (PROMPT, {"attention_mask": torch.ones(1, 99)}, "attention_mask has shape"),
        (PROMPT, {"max_new_tokens": 0}, "asks for no token"),
        (PROMPT, {"temperature": -1.0}, "below 0"),
        (PROMPT, {"settings": {"max_length": 1}}, "give max_new_tokens"),
        (PROMPT, {"settings": {"num_beams": 4, "penalty_alpha": 0.6}}, "num_beams=4, penalty_alpha"),
        (PROMPT, {"settings": {"stop_strings": ["."]}}, "does not know stop_strings"),
    ],
)  # fmt: skip
def test_what_it_cannot_go_on_with_is_said_at_once(served, ids, options, message):
    with pytest.raises(ValueError, match=message):
        served.generate(ids, **options)


SETTINGS = [
    {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": [13, 18, 280]},
    {"begin_suppress_tokens": [280]}, {"bad_words_ids": [[280], [18, 13]]},
    {"forced_eos_token_id": 7}, {"min_new_tokens": 12, "eos_token_id": [280, 13, 18]},
    {"min_length": 9, "eos_token_id": [280, 13, 18]},
    {"exponential_decay_length_penalty": (3, 1.5)}, {"sequence_bias": [[[280], -9.0]]},
    {"max_length": 11}, {"max_new_tokens": 5, "max_length": 11},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "+".join(settings))
def test_settings_hold_as_in_transformers(served_docs_lm, served, settings):
    model, _ = served_docs_lm
    limit = {} if {"max_length", "max_new_tokens"} & settings.keys() else {"max_new_tokens": 16}
    expected = model.generate(PROMPT, do_sample=False, pad_token_id=0, **limit, **settings)
    found = list(served.generate(PROMPT, **limit, settings=settings))
    assert found == expected[0, PROMPT.shape[1] :].tolist()


def test_settings_travel_in_the_file(tmp_path):
    """Several tokens that end a text, a penalty, a length: as transformers go by them."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, eos_token_id=2, pad_token_id=0)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.repetition_penalty = 1.7
    ids = torch.tensor([[5, 6, 7, 8]])
    free = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)[0, 4:].tolist()
    model.generation_config.eos_token_id = [61, free[4]]
    model.generation_config.max_new_tokens = 9
    q = convert(prepare_qat(model, W8, "absmax"))
    served = OnnxModel(export_onnx(q, tmp_path / "model.onnx"), threads=1)
    assert served.description.stop == tuple(sorted([61, free[4]]))  # and not 2
    expected = q.generate(ids)[0, 4:].tolist()
    assert list(served.generate(ids)) == expected
    assert len(expected) < 9
    plain = q.generate(ids, max_new_tokens=9, repetition_penalty=1.0, eos_token_id=None)[0, 4:]
    assert list(served.generate(ids, max_new_tokens=9, settings={}, stop=False)) == plain.tolist()
    assert plain.tolist() != free


def test_a_model_that_samples_draws_from_what_its_settings_leave(served):
    """One token left is the likeliest; of two, nothing else is ever drawn."""
    greedy = list(served.generate(PROMPT, max_new_tokens=8))
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-4}):
        settings = {"do_sample": True, **narrow}
        assert list(served.generate(PROMPT, max_new_tokens=8, settings=settings)) == greedy
    two = served(PROMPT).logits[0, -1].topk(2).indices.tolist()
    drawn = {next(served.generate(PROMPT, seed=seed, settings={"do_sample": True, "top_k": 2,
                                                               "temperature": 5.0}))
             for seed in range(20)}  # fmt: skip
    assert drawn == set(two)
    wide = {next(served.generate(PROMPT, seed=seed, settings={"do_sample": True, "temperature": 99.0}))
            for seed in range(60)}  # fmt: skip
    assert wide <= set(served(PROMPT).logits[0, -1].topk(50).indices.tolist())  # as transformers


def test_padding_is_left_out_of_a_prompt(served):
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), PROMPT], dim=1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones_like(PROMPT)], dim=1)
    expected = list(served.generate(PROMPT, max_new_tokens=5))
    assert list(served.generate(padded, mask, max_new_tokens=5)) == expected


BATCH = ["Return the", "The for statement is used to iterate", "A"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.3, "top_k": 30, "seed": 5},
        {"temperature": 0.9, "top_p": 0.8, "seed": 2},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_goes_on_as_its_texts_do_one_by_one(served, side, options):
    tokenizer = load_tokenizer("docs-lm")
    rows = [tokenizer(text).input_ids for text in BATCH]
    width = max(map(len, rows))
    gaps = [(0, width - len(row)) if side == "right" else (width - len(row), 0) for row in rows]
    ids, mask = (
        torch.stack([torch.nn.functional.pad(torch.tensor(row), gap) for row, gap in zip(of, gaps)])  # noqa: B905
        for of in (rows, [[1] * len(row) for row in rows])
    )
    found = served.generate_batch(ids, mask, max_new_tokens=9, **options)
    seed = options.pop("seed", 0)
    one_by_one = [list(served.generate(torch.tensor([row]), max_new_tokens=9, seed=seed + place,
                                       **options)) for place, row in enumerate(rows)]  # fmt: skip
    assert found == one_by_one
    assert len({tuple(row) for row in found}) == 3


def test_texts_of_a_batch_end_each_for_itself(served):
    long = torch.randint(1, 4096, (1, 250), generator=torch.Generator().manual_seed(0))
    short = torch.nn.functional.pad(PROMPT, (250 - PROMPT.shape[1], 0))
    ids, mask = torch.cat([long, short]), torch.cat([long, short]) != 0
    mask[0] = True
    full, other = served.generate_batch(ids, mask, max_new_tokens=12, stop=False)
    assert (len(full), len(other)) == (6, 12)  # the context ends at 256
    assert other == list(served.generate(PROMPT, max_new_tokens=12, stop=False))
    stop = other[3]
    settings = {"eos_token_id": stop}
    assert served.generate_batch(PROMPT, max_new_tokens=12, settings=settings)[0] == other[:4]
    with pytest.raises(ValueError, match="the prompt is empty"):
        served.generate_batch(ids, torch.zeros_like(ids))
    with pytest.raises(ValueError, match="at most 255"):
        served.generate_batch(torch.ones(2, 256, dtype=torch.int64))


def test_top_k_of_one_is_the_likeliest(served):
    greedy = list(served.generate(PROMPT, max_new_tokens=6))
    assert list(served.generate(PROMPT, max_new_tokens=6, temperature=3.0, top_k=1)) == greedy
    assert list(served.generate(PROMPT, max_new_tokens=6, temperature=3.0, top_p=1e-9)) == greedy
    assert list(served.generate(PROMPT, max_new_tokens=6, temperature=3.0)) != greedy


def test_perplexity_takes_it_like_any_model(served_docs_lm, served):
    batches = list(load_task("language-reference", batch_size=4).validation)[:3]
    ours, theirs = (perplexity(m, batches) for m in (served_docs_lm[0], served))
    # a mean of thousands of losses, each up to 1e-4 off in either direction (see test_export.py)
    assert theirs.value == pytest.approx(ours.value, rel=1e-5)
    assert theirs.n == ours.n


def test_what_a_file_cannot_do_is_said(served):
    with pytest.raises(UnsupportedModel, match="'decoder', and 'retrieval' is needed"):
        served.embed(PROMPT)


def test_missing_truncated_and_foreign_files_are_refused(served_docs_lm, tmp_path):
    with pytest.raises(DamagedFile, match="is missing"):
        OnnxModel(tmp_path / "no.onnx")
    half = tmp_path / "half.onnx"
    whole = served_docs_lm[1].read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedFile, match="export it again"):
        OnnxModel(half)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "foreign", [x], [y])
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "a.onnx")
    with pytest.raises(DamagedFile, match="was not written by export_onnx"):
        OnnxModel(tmp_path / "a.onnx")


def test_it_says_what_it_is(served):
    assert "decoder: 30 layers quantized (4 bits" in repr(served)
    assert np.prod(served(PROMPT).logits.shape) == PROMPT.numel() * 4096
