"""Losses in pieces: values and every gradient are those of all logits at once."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from companion import W4, W8A8, fit, prepare_qat
from companion.errors import NothingToTrain
from companion.evaluation import logits as module
from companion.evaluation.logits import LazyLogits, LazyLoss
from companion.training.chunked import Imitation, chunked_loss
from companion.training.losses import default_loss, distillation_loss
from tests.evaluation.test_logits import (
    BATCH,
    IDS,
    LABELS,
    ROWS,
    TOKENS,
    WORDS,
    Largest,
    fused,
    make,
)

CLOSE = 2e-5
"""Of the largest gradient: sums of some hundred float32 products, in another order."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Seven rows at a time, so that pieces end anywhere."""
    monkeypatch.setattr(module, "PIECE_BYTES", 4 * WORDS * 7)


def plain_divergence(model, teacher, batch, temperature, share):
    """What `distillation_loss` states, of all logits at once."""
    with torch.no_grad():
        wanted = teacher(**batch).logits
    output = model(**batch)
    kept = (batch["labels"] != -100) & batch["attention_mask"].bool()
    counted = F.pad(kept[:, 1:], (0, 1))
    divergence = F.kl_div(
        (output.logits[counted] / temperature).log_softmax(-1),
        (wanted[counted] / temperature).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    return share * temperature**2 * divergence + (1 - share) * output.loss


def derived(model, loss_of, scale=1.0):
    """A loss, and the gradient of each parameter that has one."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = loss_of(model)
    (scale * loss).backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, close=CLOSE):
    (loss, gradients), (plain_loss, plain_gradients) = found, expected
    assert loss.item() == pytest.approx(plain_loss.item(), rel=close)
    assert set(gradients) == set(plain_gradients)
    largest = max(gradient.abs().max() for gradient in plain_gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - plain_gradients[name]).abs().max() <= close * largest, name


def frozen_head():
    model = make("Llama")
    model.lm_head.requires_grad_(False)
    return model


def checkpointed():
    model = make("Llama")
    model.gradient_checkpointing_enable()
    return model


MODELS = {
    "Llama": partial(make, "Llama"),
    "Llama, tied": partial(make, "Llama", tie_word_embeddings=True),
    "GPT-2, with dropout": partial(make, "GPT2"),
    "Gemma 2 caps": partial(make, "Gemma2"),
    "Granite scales": partial(make, "Granite"),
    "Phi has a bias": partial(make, "Phi"),
    "prepared": lambda: prepare_qat(make("Llama"), W4),
    "prepared, tied": lambda: prepare_qat(
        make("Llama", tie_word_embeddings=True), W4, embeddings=True),
    "rounded inputs": lambda: prepare_qat(make("Llama"), W8A8),
    "head frozen": frozen_head,
    "checkpointed": checkpointed,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_cross_entropy_is_the_models_own(name):
    model = MODELS[name]().train()
    found = derived(model, lambda m: default_loss(m, BATCH), 0.25)
    assert type(found[0].grad_fn).__name__ == "_ChunkedBackward"
    assert_close(found, derived(model, lambda m: m(**BATCH).loss, 0.25))


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("name", ["Llama", "Gemma 2 caps", "prepared, tied", "head frozen"])
def test_divergence_is_that_of_all_logits(name, share):
    model, teacher = MODELS[name]().train(), make("Llama", initializer_range=0.2)
    batch = BATCH | {"attention_mask": (torch.arange(TOKENS) < 12).expand(ROWS, -1).long()}
    loss_fn = distillation_loss(teacher, 2.0, share)
    found = derived(model, lambda m: loss_fn(m, batch))
    assert type(found[0].grad_fn).__name__ == "_ChunkedBackward"
    assert_close(found, derived(model, lambda m: plain_divergence(m, teacher, batch, 2.0, share)))


def test_a_teacher_or_a_student_may_compute_its_logits():
    """A loss of its own that adds to the cross-entropy, or an output layer that is watched."""
    watched = make("Llama", initializer_range=0.2)
    watched.lm_head.register_forward_hook(lambda *_: None)
    for student, teacher in (
        (make("Llama"), watched),
        (make("Mixtral"), make("Llama", initializer_range=0.2)),
    ):
        loss_fn = distillation_loss(teacher, share=0.5)
        plain = partial(plain_divergence, teacher=teacher, batch=BATCH, temperature=1, share=0.5)
        assert_close(derived(student, lambda m, f=loss_fn: f(m, BATCH)), derived(student, plain))


@pytest.mark.parametrize(
    "construct", [partial(make, "Mixtral"), partial(make, "Bert"), partial(make, "T5"), fused]
)
def test_other_losses_are_left_to_the_model(construct):
    """Experts add to the loss, or the loss or the product is the model's own."""
    model = construct().train()
    torch.manual_seed(0)
    expected = model(**BATCH).loss
    for _ in range(2):
        torch.manual_seed(0)
        assert torch.equal(default_loss(model, BATCH), expected)


@pytest.mark.parametrize("more", [
    {"num_items_in_batch": torch.tensor(50)}, {"num_items_in_batch": 50},
    {"shift_labels": LABELS}, {"labels": F.pad(LABELS, (0, 1), value=5)[:, 1:]},
])  # fmt: skip
def test_what_a_batch_says_about_its_loss_is_heard(more):
    model = make("Llama")
    assert_close(
        derived(model, lambda m: default_loss(m, BATCH | more)),
        derived(model, lambda m: m(**BATCH | more).loss),
    )


def test_masked_words_are_scored_in_place():
    model = make("ModernBert")
    found = derived(model, lambda m: default_loss(m, BATCH))
    assert type(found[0].grad_fn).__name__ == "_ChunkedBackward"
    assert_close(found, derived(model, lambda m: m(**BATCH).loss))


@pytest.mark.parametrize("way", ["autocast", "bfloat16"])
def test_half_precision(way):
    """Each way is as far from float32 as the other: products in bfloat16, sums in float32."""
    exact = derived(make("Llama"), lambda m: m(**BATCH).loss)
    model = make("Llama")
    model = model.bfloat16() if way == "bfloat16" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        plain = derived(model, lambda m: m(**BATCH).loss)
        ours = derived(model, lambda m: default_loss(m, BATCH))
    assert type(ours[0].grad_fn).__name__ == "_ChunkedBackward"

    def error(gradients):
        return sum((gradients[n].float() - g).square().sum() for n, g in exact[1].items()).sqrt()

    assert error(ours[1]) <= 1.1 * error(plain[1])
    assert ours[0].item() == pytest.approx(plain[0].item(), rel=2**-8)  # of bfloat16
    assert all(p.grad.dtype == p.dtype for p in model.parameters())


def test_all_logits_never_exist_at_once():
    student, teacher = (make("Llama", vocab_size=4096, hidden_size=32) for _ in range(2))
    for step in (default_loss, distillation_loss(teacher), distillation_loss(teacher, share=0.5)):
        with Largest() as seen:
            step(student, BATCH).backward()
        assert seen.numbers == 4096 * 32  # the gradient of the embedding
    with Largest() as seen:
        student(**BATCH).loss.backward()
    assert seen.numbers == ROWS * TOKENS * 4096


def test_it_is_differentiated_again_but_not_twice():
    model = make("Llama")
    loss = default_loss(model, BATCH)
    once = torch.autograd.grad(2 * loss, model.lm_head.weight, retain_graph=True)[0]
    again = torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)[0]
    assert torch.equal(once, 2 * again)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, model.lm_head.weight, create_graph=True)


def test_a_weight_that_changed_in_between_is_noticed():
    model = make("Llama")
    loss = default_loss(model, BATCH)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_mean_of_nothing_is_no_number():
    batch = BATCH | {"labels": torch.full_like(LABELS, -100)}
    model = make("Llama")
    assert default_loss(model, batch).isnan()
    assert model(**batch).loss.isnan()
    with pytest.raises(NothingToTrain, match="is scored"):
        fit(model, [batch], steps=1, progress=False)


def test_a_label_beyond_the_vocabulary_is_an_error():
    for wrong in (WORDS, -1):
        batch = BATCH | {"labels": LABELS.where(IDS[1, 3] != IDS, wrong)}
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            default_loss(make("Llama"), batch)


def test_without_gradients_none_is_computed():
    with torch.no_grad():
        loss = default_loss(make("Llama"), BATCH)
    assert not loss.requires_grad


def test_training_goes_the_same_way():
    """Ten steps of AdamW in float64, where rounding leaves no trace."""
    batches = [{k: v[rows] for k, v in BATCH.items()} for rows in ([0], [1, 2])]
    ours, plain = make("Llama").double(), make("Llama").double()
    options = {"steps": 10, "lr": 1e-2, "accumulate": 2, "progress": False}
    start = copy.deepcopy(plain.state_dict())
    fit(ours, batches, **options)

    class Own:  # which is asked as any loss function
        def __call__(self, model, batch):
            return model(**batch).loss

    fit(plain, batches, loss_fn=Own(), **options)
    for name, weight in plain.named_parameters():
        moved = (weight - start[name]).abs().max()
        # the model's own loss is a float32 number: its gradient has 2**-24 of relative error
        assert (weight - ours.get_parameter(name)).abs().max() < 1e-3 * moved, name


def test_its_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    inputs, weight, bias, target = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 5, 4), (WORDS, 4), (WORDS,), (2, 5, 4))
    )
    teacher = LazyLogits(target.detach(), weight.detach().flip(0))
    labels = torch.randint(0, WORDS, (2, 5))
    labels[0, :2] = -100

    def loss(inputs, weight, bias):
        logits = LazyLogits(inputs, weight, bias) / 2
        counted = torch.arange(10).view(2, 5) > 0
        return chunked_loss(
            logits, LazyLoss(logits, labels), Imitation(teacher, counted, 2.0, 0.7), 0.3
        )

    assert torch.autograd.gradcheck(loss, (inputs, weight, bias))
