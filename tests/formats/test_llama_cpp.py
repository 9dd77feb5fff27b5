"""llama.cpp is asked like the model that its file came from."""

import sys

import pytest
import torch

from companion import QuantScheme, convert, load_pretrained, load_task, perplexity, prepare_qat
from companion.course.sources import load_tokenizer
from companion.errors import DamagedFile, MissingExtra, UnreadableBatch, UnsupportedModel
from companion.formats.gguf import export_gguf
from companion.formats.llama_cpp import LlamaCppModel
from companion.numerics.scheme import BLOCK8

TOKENIZER = load_tokenizer("docs-lm")
PROMPT = TOKENIZER("Return the", return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """docs-lm, trained to see inputs as llama.cpp rounds them, and its file."""
    scheme = QuantScheme(4, activations=BLOCK8)
    model = convert(prepare_qat(load_pretrained("docs-lm"), scheme, "mse", embeddings=True))
    path = export_gguf(model, tmp_path_factory.mktemp("gguf") / "model.gguf", TOKENIZER)
    return model, path, LlamaCppModel(path, threads=1)


def test_its_losses_are_those_of_the_model(both):
    model, _, served = both
    batch = next(iter(load_task("language-reference", batch_size=2, block_size=24).validation))
    ours, theirs = (perplexity(m, [batch]) for m in (model, served))
    assert theirs.n == ours.n
    assert theirs.value == pytest.approx(ours.value, rel=0.02)
    other = convert(prepare_qat(load_pretrained("docs-lm"), QuantScheme(2), "mse"))
    assert perplexity(other, [batch]).value != pytest.approx(ours.value, rel=0.05)


@torch.no_grad()
def test_rows_say_what_was_told_and_share_the_rest(both):
    model, _, served = both
    ids = torch.cat([torch.zeros(1, 2, dtype=torch.int64), PROMPT], 1)
    mask = (torch.arange(ids.shape[1]) >= 2).long()[None]
    logits = served(ids, mask).logits
    expected = model(PROMPT).logits.log_softmax(-1)
    assert not logits[0, :2].any()  # padding
    found = logits[0, 2:]
    assert torch.allclose(found.exp().sum(-1), torch.ones(len(found)), atol=1e-4)
    follows = PROMPT[0, 1:]
    for rows in (found, expected[0]):
        rows.clamp_(min=-20)
    places = torch.arange(len(follows))
    assert torch.allclose(found[places, follows], expected[0][places, follows], atol=0.2)
    assert torch.equal(found.argmax(-1), expected[0].argmax(-1))
    with pytest.raises(UnreadableBatch, match="attention_mask has shape"):
        served(ids, mask[:, :1])


def test_greedy_text_is_that_of_the_model(both):
    model, _, served = both
    ours = model.generate(PROMPT, max_new_tokens=12, do_sample=False)[0, PROMPT.shape[1] :].tolist()
    assert list(served.generate(PROMPT, max_new_tokens=12)) == ours
    padded = torch.nn.functional.pad(PROMPT, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(PROMPT), (3, 0))
    assert list(served.generate(padded, mask, max_new_tokens=12)) == ours
    few = served.generate(PROMPT, max_new_tokens=100)
    assert next(few) == ours[0]
    few.close()  # llama.cpp stops, and takes the next question
    assert list(served.generate(PROMPT, max_new_tokens=3)) == ours[:3]


def test_draws_follow_the_seed_and_the_settings(both):
    served = both[2]

    def drawn(**options):
        return list(served.generate(PROMPT, max_new_tokens=10, **options))

    assert drawn(temperature=1.5, seed=1) == drawn(temperature=1.5, seed=1)
    assert len({tuple(drawn(temperature=1.5, seed=seed)) for seed in range(4)}) > 1
    narrow = {"do_sample": True, "top_k": 1, "temperature": 5.0}
    assert drawn(settings=narrow) == drawn()
    plain, varied = (
        list(served.generate(PROMPT, max_new_tokens=40, settings=settings))
        for settings in ({}, {"repetition_penalty": 5.0})
    )
    assert len(set(plain)) < len(set(varied)) == len(varied)


def test_context_and_prompts_are_checked(both):
    served = both[2]
    assert served.description.context == 256
    assert served.vocabulary == 4096
    long = torch.randint(1, 4096, (1, 300), generator=torch.Generator().manual_seed(0))
    assert len(list(served.generate(long[:, :250], max_new_tokens=50, stop=False))) == 6
    served.log_probabilities(long[0, :255].tolist())  # the last that can be asked
    with pytest.raises(UnreadableBatch, match="has 300 tokens, and the model takes 256"):
        served(long)
    for ids, options, says in (
        (long, {}, "at most 255"), (PROMPT[:, :0], {}, "prompt is empty"),
        (PROMPT.repeat(2, 1), {}, "one text"), (PROMPT, {"temperature": -1.0}, "below 0"),
        (PROMPT, {"settings": {"num_beams": 4}}, "num_beams=4"),
        (PROMPT, {"settings": {"no_repeat_ngram_size": 2}}, "no_repeat_ngram_size"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            served.generate(ids, **options)


def test_files_that_cannot_be_opened_are_named(both, tmp_path, monkeypatch):
    whole = both[1].read_bytes()
    for content in (b"", b"GGUF", whole[:1000], b"no" + whole):
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(DamagedFile, match="export it again"):
            LlamaCppModel(tmp_path / "m.gguf")
    export_gguf(both[0], tmp_path / "m.gguf")
    with pytest.raises(UnsupportedModel, match="holds no tokenizer"):
        LlamaCppModel(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingExtra, match="pip install xllamacpp"):
        LlamaCppModel(both[1])
