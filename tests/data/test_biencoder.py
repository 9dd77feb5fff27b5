"""Queries and texts through one encoder."""

import torch

from companion import W4, convert, load_pretrained, prepare_qat
from companion.course.sources import MINILM, load_tokenizer
from companion.course.tasks import load_task
from companion.training.losses import default_loss, distillation_loss


def small_batch():
    tokenizer = load_tokenizer(MINILM)
    sides = [["how to sort", "a red apple"], ["sorting a list of numbers", "fruit of a tree"]]
    queries, texts = (tokenizer(side, padding=True, return_tensors="pt") for side in sides)
    return {
        "input_ids": queries["input_ids"],
        "attention_mask": queries["attention_mask"],
        "body_input_ids": texts["input_ids"],
        "body_attention_mask": texts["attention_mask"],
        "labels": torch.tensor([0, 1]),
    }


def test_padding_changes_nothing():
    model = load_pretrained(MINILM, head="retrieval").eval()
    batch = small_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        alone = model.embed(ids, mask)
        padded = model.embed(*(torch.nn.functional.pad(x, (0, 5)) for x in (ids, mask)))
    assert torch.allclose(alone, padded, atol=1e-5)
    assert torch.allclose(alone.norm(dim=-1), torch.ones(2))


def test_scores_are_cosines_over_the_temperature_and_the_loss_their_cross_entropy():
    model = load_pretrained(MINILM, head="retrieval").eval()
    batch = small_batch()
    with torch.no_grad():
        match = model(**batch)
        q = model.embed(batch["input_ids"], batch["attention_mask"])
        b = model.embed(batch["body_input_ids"], batch["body_attention_mask"])
    by_hand = torch.stack([torch.stack([(x * y).sum() / 0.05 for y in b]) for x in q])
    assert torch.allclose(match.logits, by_hand, atol=1e-5)
    own = -(by_hand.diagonal() - by_hand.logsumexp(-1)).mean()
    assert torch.allclose(match.loss, own, atol=1e-5)
    assert match.logits.argmax(-1).tolist() == [0, 1]
    assert torch.equal(default_loss(model, batch), model(**batch).loss)


def test_it_is_prepared_imitates_and_converts_without_a_change():
    model = load_pretrained(MINILM, head="retrieval").eval()
    batch = next(iter(load_task("summaries", pairs=16, batch_size=4).train))
    prepared = prepare_qat(model, W4).eval()
    distillation_loss(model)(prepared, batch).backward()
    weight = prepared.encoder.encoder.layer[0].attention.self.query.weight
    assert weight.grad.abs().max() > 0
    with torch.no_grad():
        assert torch.equal(convert(prepared)(**batch).logits, prepared(**batch).logits)
