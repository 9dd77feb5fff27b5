from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from companion import QuantScheme, fit, prepare_qat
from companion.errors import EmptyLoader, NonFiniteLoss, NothingToTrain
from companion.numerics import rounding
from companion.training.optimizer import SCHEDULES

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))


def loader(batch_size: int = 8, **options) -> DataLoader:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(60, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size, shuffle=True, **options)


def weights(m: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in m.parameters()]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def test_learns():
    history = fit(model(), loader(), steps=80, lr=0.01)
    assert len(history.loss) == len(history.learning_rate) == 80
    assert np.mean(history.loss[-10:]) < 0.6 * np.mean(history.loss[:10])


def test_is_the_loop_one_would_write():
    ours, theirs = model(), model()
    data = [(x, y) for x, y in loader()]
    fit(ours, data, steps=12, optimizer=SGD, schedule="constant", clip_norm=None)
    optimizer = SGD(theirs.parameters())
    for epoch in range(2):
        torch.manual_seed(epoch)
        for x, y in data[: 8 if epoch == 0 else 4]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(theirs(x), y).backward()
            optimizer.step()
    assert same(ours, theirs)


def test_same_seed_same_weights_other_seed_other_weights():
    runs = []
    for seed in (0, 0, 1):
        runs.append(m := model())
        fit(m, loader(), steps=10, seed=seed)
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_loader_with_its_own_generator_is_reproducible():
    shared = loader(generator=torch.Generator())
    first, second = model(), model()
    fit(first, shared, steps=10)
    fit(second, shared, steps=10)
    assert same(first, second)


# Gradients are means of 60 terms, in another order: 60 * 2**-24 of their size (below 1), five steps
# of rate 0.05 with momentum 0.9 (at most 10 of them), so that weights differ by 2e-6 at most.
SUMMED_OTHERWISE = 2e-6


@pytest.mark.parametrize("cuts", [(20, 20, 20), (7, 50, 3)])
@pytest.mark.parametrize("ignored", [False, True])
def test_accumulation_equals_the_large_batch(cuts, ignored):
    small, large = model(), model()
    small[1] = large[1] = nn.Identity()
    x, y = loader(60).dataset.tensors
    if ignored:
        y = y.clone()
        y[4:25] = -100
    options = {"steps": 5, "optimizer": SGD, "clip_norm": None}
    parts = list(zip(x.split(cuts), y.split(cuts), strict=True))
    together = fit(large, [(x, y)], **options)
    apart = fit(small, parts, accumulate=3, **options)
    assert apart.loss == pytest.approx(together.loss, rel=SUMMED_OTHERWISE)
    for a, b in zip(weights(small), weights(large), strict=True):
        assert torch.allclose(a, b, atol=SUMMED_OTHERWISE)


@pytest.mark.parametrize("method", ["absmax", "lsq"])
def test_accumulation_rounds_each_weight_once_a_step(method, monkeypatch):
    """And learns what it learns when every batch rounds anew."""
    seen, really = [], rounding._forward
    monkeypatch.setattr(rounding, "_forward", lambda *a: (seen.append(1), really(*a))[1])
    results, counts = [], []
    for hold in (rounding.hold_weights, nullcontext):
        monkeypatch.setattr("companion.training.fit.hold_weights", hold)
        rounded = prepare_qat(model(), QuantScheme(3, None), method)
        history = fit(rounded, loader(), steps=6, accumulate=3, lr=0.01)
        results.append([torch.tensor(history.loss), *weights(rounded)])
        counts.append(len(seen))
        seen.clear()
    assert counts == [6 * 2, 6 * 2 * 3]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("loss_type", ["ForCausalLM", "ForMaskedLM"])
@pytest.mark.parametrize("teacher", [False, True])
def test_micro_batches_weigh_by_their_scored_tokens(loss_type, teacher):
    """And one in which nothing is scored weighs nothing, instead of making the loss NaN."""
    ids = torch.randint(50, (6, 9), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    for row, scored in enumerate([9, 2, 5, 1, 8, 3]):
        labels[row, scored:] = -100
    labels[4:] = -100
    whole = {"input_ids": ids, "labels": labels}
    parts = [{name: value[i : i + 2] for name, value in whole.items()} for i in (0, 2, 4)]
    options = {"steps": 1, "optimizer": SGD, "clip_norm": None,
               "teacher": Tokens(loss_type, seed=1) if teacher else None}  # fmt: skip
    small, large = Tokens(loss_type), Tokens(loss_type)
    together = fit(large, [whole], **options)
    apart = fit(small, parts, accumulate=3, **options)
    assert apart.loss == pytest.approx(together.loss, rel=SUMMED_OTHERWISE)
    for a, b in zip(weights(small), weights(large), strict=True):
        assert torch.allclose(a, b, atol=SUMMED_OTHERWISE)


class Tokens(nn.Module):
    """Scores each token's label from the token, or the next one's as language models do."""

    def __init__(self, loss_type: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.loss_type = loss_type
        self.net = nn.Embedding(50, 50)

    def forward(self, input_ids, labels):
        logits, kept = self.net(input_ids), slice(1, None)
        scores, answers = logits, labels
        if self.loss_type == "ForCausalLM":
            scores, answers = logits[:, :-1], labels[:, kept]
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), answers.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def test_nothing_scored_is_an_error_that_says_so():
    x, y = torch.ones(4, 4), torch.full((4,), -100)
    with pytest.raises(NothingToTrain, match="step 0: no prediction of the batch is scored"):
        fit(model(), [(x, y)], steps=1)
    tokens = torch.ones(2, 3, dtype=torch.int64)
    batch = {"input_ids": tokens, "labels": torch.full_like(tokens, -100)}
    for teacher in (None, Tokens("ForCausalLM", 1)):
        with pytest.raises(NothingToTrain, match="no prediction of the batch is scored"):
            fit(Tokens("ForCausalLM"), [batch], steps=1, teacher=teacher)


def test_a_loss_of_your_own_need_not_go_by_labels():
    x, y = torch.ones(4, 4), torch.full((4,), -100)
    history = fit(model(), [(x, y)], steps=2, loss_fn=lambda m, b: m(b[0]).square().mean())
    assert len(history.loss) == 2


def test_settings_that_would_do_nothing_are_errors():
    with pytest.raises(ValueError, match="give yours its own"):
        fit(model(), loader(), steps=1, optimizer=SGD, lr=0.1)
    with pytest.raises(ValueError, match="give yours its own"):
        fit(model(), loader(), steps=1, optimizer=SGD, weight_decay=0.1)
    with pytest.raises(ValueError, match="use one of constant, linear, cosine"):
        fit(model(), loader(), steps=1, schedule="cosin")
    with pytest.raises(NothingToTrain, match="put 'labels' into the batch"):
        fit(Unlabelled(2, 2), [{"input": torch.ones(1, 2)}], steps=1)


class Unlabelled(nn.Linear):
    def forward(self, input):
        return SimpleNamespace(logits=super().forward(input), loss=None)


def test_schedules_start_at_one_and_follow_their_name():
    history = fit(model(), loader(), steps=10, lr=0.1, schedule="linear")
    assert history.learning_rate == pytest.approx([0.1 * (1 - i / 10) for i in range(10)])
    assert SCHEDULES["cosine"](0) == 1
    assert SCHEDULES["cosine"](1) == pytest.approx(0)
    history = fit(model(), loader(), steps=4, lr=0.1, schedule=lambda progress: 2.0)
    assert history.learning_rate == [0.2] * 4


def test_clipping_bounds_the_step():
    free, clipped = model(), model()
    start = weights(free)
    sgd = partial(torch.optim.SGD, lr=1.0)
    for m, norm in ((free, None), (clipped, 1e-3)):
        fit(m, loader(), steps=1, optimizer=sgd, clip_norm=norm)
    length = [
        torch.cat([(a - b).flatten() for a, b in zip(weights(m), start, strict=True)]).norm()
        for m in (free, clipped)
    ]
    assert length[1] == pytest.approx(1e-3, rel=1e-3)
    assert length[0] > 0.01


def test_actions_are_called_before_their_step():
    seen, m = [], model()
    fit(m, loader(), steps=5, at={2: lambda: seen.append(weights(m)), 0: lambda: seen.append(1)})
    reference = model()
    fit(reference, loader(), steps=2, schedule=lambda p: SCHEDULES["cosine"](p * 2 / 5))
    assert seen[0] == 1
    assert all(torch.equal(a, b) for a, b in zip(seen[1], weights(reference), strict=True))


def test_own_loss_and_dict_batches():
    class Output:
        def __init__(self, loss):
            self.loss = loss

    class HuggingFaceLike(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return Output((self.w * x).square().sum())

    m = HuggingFaceLike()
    fit(m, [{"x": torch.ones(3)}], steps=30, lr=0.1)
    assert m.w.abs().max() < 0.5
    m = nn.Linear(1, 1)
    fit(m, [torch.ones(2, 1)], steps=30, lr=0.1, loss_fn=lambda m, b: m(b).square().mean())
    assert m(torch.ones(1, 1)).abs() < 0.3


def test_no_bar_where_it_was_not_asked_for(capsys):
    """That it shows otherwise is seen in test_processes.py."""
    fit(model(), loader(), steps=2, progress=False)
    assert capsys.readouterr().err == ""


def test_nothing_trainable_is_an_error():
    frozen = model().requires_grad_(False)
    with pytest.raises(NothingToTrain, match="Train before convert"):
        fit(frozen, loader(), steps=1)


def test_gradient_that_reaches_nothing_is_an_error():
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(NothingToTrain, match="reached no parameter"):
        fit(Detached(4, 3), loader(), steps=1)


def test_optimizer_of_another_model_is_an_error():
    with pytest.raises(NothingToTrain, match="build it after prepare_qat"):
        fit(model(), loader(), steps=1, optimizer=SGD(model(1).parameters()))


def test_empty_and_exhausted_loaders_are_errors():
    with pytest.raises(EmptyLoader, match="no batch"):
        fit(model(), [], steps=1)
    with pytest.raises(EmptyLoader, match="ran dry after 8 batches"):
        fit(model(), iter(list(loader())), steps=20)


def test_non_finite_loss_names_its_step():
    data = list(loader())
    data[3] = (data[3][0] * float("nan"), data[3][1])
    with pytest.raises(NonFiniteLoss, match="nan at step 3"):
        fit(model(), data, steps=10)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"accumulate": 0}, {"checkpoint_every": 0}])
def test_counts_must_be_positive(bad):
    with pytest.raises(ValueError, match="at least 1"):
        fit(model(), loader(), **({"steps": 2} | bad))


def test_documents_of_a_batch_are_not_handed_to_the_model():
    class Language(nn.Linear):
        def forward(self, input_ids, labels):
            return type("Output", (), {"loss": super().forward(input_ids).square().mean()})

    batch = {"input_ids": torch.ones(2, 4), "labels": torch.ones(2), "document": torch.ones(2)}
    assert len(fit(Language(4, 1), [batch], steps=2).loss) == 2
