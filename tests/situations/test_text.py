"""Chats and batches: what is scored, where texts end, and what padding must not do."""

import torch

from companion import W4, convert, prepare_qat
from companion.data.chat import chat, encode_chat
from companion.data.text import IGNORED
from companion.training.losses import default_loss
from tests import tiny
from tests.data.test_chat import LLAMA3, TALK, scored, with_template


def padded_as_it_ends():
    """A tokenizer that pads with the token that ends a turn, as SmolLM2-Instruct's does."""
    tokenizer = with_template(LLAMA3, eos_token="<|eot|>", pad_token="<|eot|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    return tokenizer


def batch_of(tokenizer, talks):
    task = chat("talks", {"train": talks, "validation": talks, "test": talks}, tokenizer, "here",
                batch_size=len(talks))  # fmt: skip
    return next(iter(task.test))


SHORT = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Green."}]


def test_the_end_of_an_answer_is_learned_where_padding_is_the_same_token():
    """trl#1623, trl#3091, trl#6357, open-r1#494: padding was masked by its id, and with it the end of
    every answer, so models never stopped."""
    tokenizer = padded_as_it_ends()
    batch = batch_of(tokenizer, [TALK[:2], SHORT])
    end = tokenizer.eos_token_id
    for ids, labels, mask in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        learned = labels[labels != IGNORED]
        assert learned[-1] == end
        assert (learned == end).sum() == 1
        assert (labels[mask == 0] == IGNORED).all()
        assert (ids[mask == 0] == end).all()
    assert (batch["attention_mask"] == 0).any()


def test_padding_does_not_dilute_the_loss():
    """OpenJarvis#521: labels were a copy of the padded ids, and most of the loss was padding."""
    tokenizer = padded_as_it_ends()
    model = tiny.llama(tokenizer).eval()
    together = batch_of(tokenizer, [TALK[:2], SHORT])
    alone = [batch_of(tokenizer, [talk]) for talk in (TALK[:2], SHORT)]
    counts = [int((b["labels"][:, 1:] != IGNORED).sum()) for b in alone]
    with torch.no_grad():
        whole = default_loss(model, together)
        parts = [default_loss(model, b) * n for b, n in zip(alone, counts, strict=True)]
    assert torch.allclose(whole, sum(parts) / sum(counts), atol=1e-6)


def test_every_turn_ends_for_the_learner():
    """axolotl#1847: only the last end of turn of a conversation was scored."""
    tokenizer = padded_as_it_ends()
    found = scored(encode_chat(TALK, tokenizer), tokenizer)
    assert [text[-7:] for row in found for text in row] == ["<|eot|>"] * 2


def test_a_text_begins_once():
    """trl#696 and its kin: the template writes the first token of a text, and the tokenizer adds it
    again."""
    tokenizer = with_template(LLAMA3)
    (row,) = encode_chat(SHORT, tokenizer)
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
    assert row["input_ids"][0] == tokenizer.bos_token_id


def test_company_in_a_batch_changes_no_class():
    """transformers#35909: a decoder that classifies looked for its last token by a padding id that the
    tokenizer does not use, and answered differently in a batch."""
    tokenizer = tiny.byte_level(pad_token="[PAD]")
    model = tiny.llama(tokenizer, "LlamaForSequenceClassification", num_labels=3)
    model.config.pad_token_id = tokenizer.pad_token_id
    q = convert(prepare_qat(model, W4, skip=["score"]))
    texts = [tiny.TEXTS[8], tiny.TEXTS[0]]
    with torch.no_grad():
        together = q(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = [q(**tokenizer([text], return_tensors="pt")).logits for text in texts]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
