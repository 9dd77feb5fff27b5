"""A served model answers like the one it came from, and says what is wrong with a file."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from companion import load_task, perplexity
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


def test_text_ends_with_the_context_and_with_a_stop_token(served, monkeypatch):
    long = torch.randint(1, 4096, (1, 250), generator=torch.Generator().manual_seed(0))
    assert served.description.context == 256
    assert len(list(served.generate(long, max_new_tokens=50))) <= 6
    tokens = list(served.generate(PROMPT, max_new_tokens=10))
    stop = tokens[3]
    form = type(served.description)(**vars(served.description) | {"stop": (stop,)})
    monkeypatch.setattr(served, "description", form)
    assert list(served.generate(PROMPT, max_new_tokens=10)) == tokens[: tokens.index(stop) + 1]


def test_perplexity_takes_it_like_any_model(served_docs_lm, served):
    batches = list(load_task("language-reference", batch_size=4).validation)[:3]
    ours, theirs = (perplexity(m, batches) for m in (served_docs_lm[0], served))
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
