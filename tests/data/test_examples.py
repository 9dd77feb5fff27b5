"""Loaders: padding, labels of word pieces, places in a batch, order."""

import pytest
import torch

from companion import load_pretrained, load_task
from companion.course.passages import code_words, continuations
from companion.course.sources import MINILM, load_tokenizer
from companion.data.examples import Collator, choices, classification, retrieval, tagging
from companion.data.text import IGNORED
from companion.errors import UnsupportedModel
from tests import tiny

TEXTS = ["one", "two words", "and now three words", "a rather longer text of seven words"]


def splits(examples):
    return dict.fromkeys(("train", "validation", "test"), examples)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MINILM)


def test_rows_are_padded_to_the_longest_of_their_batch():
    rows = [{"input_ids": [1, 2, 3], "labels": [0, 1, 2]}, {"input_ids": [1], "labels": [0]}]
    batch = Collator(tiny.byte_level(pad_token="[PAD]", padding_side="left"))(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 1, 1]]  # [PAD] is number 1
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[0, 1, 2], [0, IGNORED, IGNORED]]


TOKENIZERS = {
    "its own": lambda: tiny.byte_level(pad_token="[PAD]"),
    "on the left": lambda: tiny.byte_level(pad_token="[PAD]", padding_side="left"),
    "none": lambda: tiny.byte_level(),
    "none, word pieces": tiny.word_pieces,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_decoder_classifies_a_text_alike_alone_and_in_a_batch(model, kind, tmp_path):
    """Whatever pads, if anything does: the mask and the model's own padding token say so alike."""
    tokenizer = TOKENIZERS[kind]()
    classes = {"llama": "LlamaForSequenceClassification", "gpt2": "GPT2ForSequenceClassification"}
    folder = tiny.saved(tmp_path, getattr(tiny, model)(tokenizer, classes[model]), tokenizer)
    loaded = load_pretrained(folder, head="classification").eval()
    examples = splits([(text, 0) for text in tiny.TEXTS])
    (batch,) = classification("t", examples, ("a", "b"), tokenizer, "here").test
    del batch["labels"], batch["document"]
    assert loaded.config.pad_token_id == batch["input_ids"][0, -1]
    with torch.no_grad():
        together = loaded(**batch).logits
        for row, mask in enumerate(batch["attention_mask"]):
            alone = loaded(input_ids=batch["input_ids"][row, : mask.sum()][None]).logits[0]
            # float32, sums of 32 products of values below 1
            assert torch.allclose(together[row], alone, atol=1e-5), tiny.TEXTS[row]
    assert tokenizer.pad_token_id is None or kind in ("its own", "on the left")  # left as it was


def test_a_fixed_length_is_padded_in_the_same_way():
    tokenizer = tiny.byte_level(padding_side="left")
    task = classification("t", splits([("a road", 0)]), ("a",), tokenizer, "here", max_length=16,
                          padding="max_length")  # fmt: skip
    (batch,) = task.test
    scored = int(batch["attention_mask"].sum())
    assert batch["input_ids"].shape == (1, 16)
    assert batch["input_ids"][0, scored:].tolist() == [tokenizer.eos_token_id] * (16 - scored)


def test_rows_are_never_longer_than_the_model_takes():
    tokenizer = tiny.byte_level(model_max_length=5)
    task = classification("t", splits([(" ".join(tiny.WORDS), 0)]), ("a",), tokenizer, "here")
    assert next(iter(task.test))["input_ids"].shape == (1, 5)
    with pytest.raises(UnsupportedModel, match="the model takes 5"):
        choices([("the road", ("of yellow bricks", "to a city that is green"))], tokenizer)


def test_a_text_without_tokens_is_one_that_can_be_answered():
    tokenizer = tiny.byte_level()
    assert tokenizer("")["input_ids"] == []
    (batch,) = classification("t", splits([("", 0)]), ("a",), tokenizer, "here").test
    assert batch["input_ids"].tolist() == [[tokenizer.eos_token_id]]
    assert batch["attention_mask"].tolist() == [[1]]


def test_a_tokenizer_without_any_special_token_says_what_to_name():
    tokenizer = tiny.byte_level(eos_token=None)
    with pytest.raises(UnsupportedModel, match="pad_token = "):
        classification("t", splits([("a", 0)]), ("a",), tokenizer, "here")


def test_token_types_go_along_where_the_tokenizer_makes_them(tokenizer):
    pairs = [("query", text) for text in TEXTS]
    (batch,) = retrieval("t", splits(pairs), tokenizer, "here", batch_size=4).test
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert batch["body_token_type_ids"].shape == batch["body_input_ids"].shape
    plain = tiny.byte_level()
    (batch,) = classification("t", splits([("a", 0)]), ("a",), plain, "here").test
    assert set(batch) == {"input_ids", "attention_mask", "labels", "document"} | (
        {"token_type_ids"} & set(plain.model_input_names)
    )


def test_batches_hold_similar_lengths_and_every_row_once(tokenizer):
    lengths = torch.randint(5, 60, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [(" ".join(["road"] * n), n) for n in lengths]
    task = classification("t", splits(examples), ("a",) * 60, tokenizer, "here", batch_size=10)

    def drawn(seed):
        torch.manual_seed(seed)
        return [batch["labels"].tolist() for batch in task.train]

    batches = drawn(0)
    assert sorted(n for batch in batches for n in batch) == sorted(lengths)
    assert sum(max(batch) - min(batch) for batch in batches) / len(batches) < 8
    assert drawn(3) == drawn(3) != batches


def test_classification(tokenizer):
    examples = [(text, label % 2) for label, text in enumerate(TEXTS)]
    task = classification("t", splits(examples), ("a", "b"), tokenizer, "here", batch_size=2)
    (batch,) = task.test
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == TEXTS
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    assert batch["attention_mask"].sum(1).tolist() == [3, 4, 6, 9]
    assert sum(len(b["labels"]) for b in task.train) == 4
    fixed = classification("t", splits(examples), ("a", "b"), tokenizer, "here", max_length=8,
                           padding="max_length")  # fmt: skip
    assert next(iter(fixed.test))["input_ids"].shape == (4, 8)


def test_the_first_piece_of_a_word_carries_its_tag(tokenizer):
    words, tags = ("use", "untokenizable", "words"), ("O", "B-code", "O")
    task = tagging("t", splits([(words, tags)]), ("O", "B-code", "I-code"), tokenizer, "here")
    (batch,) = task.test
    pieces = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    labels = batch["labels"][0].tolist()
    assert len(pieces) > 5
    for piece, label in zip(pieces, labels, strict=True):
        expected = {"use": 0, "words": 0}.get(piece, IGNORED)
        assert label == (1 if piece.startswith("un") else expected), piece


def test_every_word_of_the_code_words_is_scored_once(tokenizer):
    scored = sum(int((batch["labels"] != IGNORED).sum()) for batch in load_task("code-words").test)
    words = sum(len(tagged.words) for tagged in code_words()["test"])
    assert 0.97 * words < scored <= words  # very long passages are cut


def test_a_summary_is_labelled_by_the_place_of_its_body(tokenizer):
    pairs = [("query", text) for text in TEXTS[:3]] + [(None, TEXTS[3])]
    task = retrieval("t", splits(pairs), tokenizer, "here", batch_size=4)
    (batch,) = task.test
    assert batch["labels"].tolist() == [0, 1, 2, IGNORED]
    assert tokenizer.decode(batch["body_input_ids"][1], skip_special_tokens=True) == TEXTS[1]
    collate = Collator(tokenizer, pairs=True)
    again = collate([{"input_ids": [1], "body_input_ids": [2], "labels": IGNORED}] * 2)
    assert again["labels"].tolist() == [IGNORED, IGNORED]


def test_held_out_examples_are_sorted_by_length_and_know_their_place(tokenizer):
    examples = [(text, 0) for text in (TEXTS[3], TEXTS[0], TEXTS[2])]
    (batch,) = classification("t", splits(examples), ("a",), tokenizer, "here").test
    assert batch["document"].tolist() == [1, 2, 0]
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == TEXTS[0]


def test_only_the_way_on_is_scored():
    tokenizer = load_tokenizer("docs-lm")
    (batch,) = choices([("The value", ("of the array", "is", "x y", "and so on"))], tokenizer)
    order = batch["document"].tolist()
    assert sorted(order) == [0, 1, 2, 3]
    row = batch["labels"][order.index(0)]
    assert tokenizer.decode(row[row != IGNORED]) == " of the array"
    whole = batch["input_ids"][order.index(0)]
    assert tokenizer.decode(whole[1:]).startswith("The value of the array")


def test_test_splits_are_the_same_every_time():
    for name in ("code-words", "summaries", "cloze"):
        first, second = ([b["input_ids"] for b in load_task(name).test] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    rows = sum(len(batch["document"]) for batch in load_task("cloze").test)
    assert rows == 4 * len(continuations()["test"])
