"""Text comes piece by piece, and the pieces together are the whole text."""

import pytest
import torch

from companion.cli.generate import Streamer, generate
from companion.errors import UnsupportedModel
from tests import tiny

TOKENIZERS = {"bytes": tiny.byte_level, "word pieces": tiny.word_pieces}
TEXTS = [
    "größe 我们 🚀",
    "the road of yellow bricks",
    "a  city\n\n  that is green\n",
    "🚀🚀 to 我",
    "é",
]


def streamed(tokenizer, prompt: list[int], tokens: list[int]) -> list[str]:
    pieces: list[str] = []
    streamer = Streamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([prompt]))
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return pieces


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text_and_no_character_comes_in_parts(kind, text):
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer(f"the road {text}")["input_ids"]
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids)):
        before = tokenizer.decode(ids[:cut])
        pieces = streamed(tokenizer, ids[:cut], ids[cut:])
        if not before.endswith("\N{REPLACEMENT CHARACTER}"):  # as every prompt that was a text
            assert before + "".join(pieces) == whole
            assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(streamed(tokenizer, ids[:2], ids[2:])) > 1


def test_what_never_becomes_a_character_comes_at_the_end():
    tokenizer = tiny.word_pieces()
    half = tokenizer("🚀", add_special_tokens=False)["input_ids"][:-1]
    ids = tokenizer("the road")["input_ids"]
    pieces = streamed(tokenizer, ids, half)
    assert set("".join(pieces)) <= {" ", "\N{REPLACEMENT CHARACTER}"}
    assert tokenizer.decode(ids) + "".join(pieces) == tokenizer.decode(ids + half)


@pytest.fixture(scope="module", params=TOKENIZERS)
def model(request, tmp_path_factory) -> str:
    tokenizer = TOKENIZERS[request.param]()
    return tiny.saved(tmp_path_factory.mktemp("model"), tiny.gpt2(tokenizer), tokenizer)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 3}])
def test_it_goes_on_with_the_prompt_as_transformers_would(model, settings):
    pieces, again = [], []
    generate(model, "the road", pieces.append, max_new_tokens=20, **settings)
    generate(model, "the road", again.append, max_new_tokens=20, **settings)
    assert pieces[0] == "the road"
    assert pieces == again
    assert len(pieces) > 2
    if not settings:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        ids = tokenizer("the road", return_tensors="pt").input_ids
        made = AutoModelForCausalLM.from_pretrained(model).generate(
            ids, max_new_tokens=20, do_sample=False
        )
        assert "".join(pieces) == tokenizer.decode(made[0], skip_special_tokens=True)


def test_an_empty_prompt_begins_with_the_start_token(model):
    pieces: list[str] = []
    generate(model, "", pieces.append, max_new_tokens=5, temperature=2.0)
    assert pieces[0] == ""
    assert "".join(pieces)


def test_a_prompt_that_fills_the_context_is_an_error_and_nothing_is_shown(model):
    pieces: list[str] = []
    with pytest.raises(ValueError, match="the model takes 64, which leaves no room"):
        generate(model, "the road " * 40, pieces.append)
    assert pieces == []
    generate(model, "the road " * 5, pieces.append, max_new_tokens=1000)  # until it is full
    assert len("".join(pieces)) > len("the road " * 5)


def test_a_served_model_streams_alike(served_docs_lm):
    _, path = served_docs_lm
    from companion.course.sources import load_tokenizer

    load_tokenizer("docs-lm").save_pretrained(path.parent)
    pieces: list[str] = []
    generate(str(path), "The for statement", pieces.append, max_new_tokens=8)
    assert "".join(pieces).startswith("The for statement")
    assert len(pieces) > 3
    with pytest.raises(ValueError, match="the model takes 256"):
        generate(str(path), "for " * 300, pieces.append)


def test_an_encoder_does_not_go_on(tmp_path):
    tokenizer = tiny.byte_level()
    folder = tiny.saved(tmp_path, tiny.llama(tokenizer, "LlamaModel"), tokenizer)
    with pytest.raises(UnsupportedModel, match="is no language model"):
        generate(folder, "a", print)
